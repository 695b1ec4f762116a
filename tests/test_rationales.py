"""Rationale writers: log-odds by hand and by a slow count, wording, drawing without regard to the label, the cache."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model

import rllr.rationales.model_writer
from rllr.common.errors import InputError
from rllr.data.demo import phrase_rationale, quote_of
from rllr.data.encoding import Encoder
from rllr.rationales.__main__ import main
from rllr.rationales.cached import read_cache
from rllr.rationales.factory import default_label_pairs, default_writer, make_writer
from rllr.rationales.model_writer import ModelWriter
from rllr.rationales.writers import DemoWriter, EvidenceWriter, GivenWriter
from rllr.tasks import TASKS, Example, Task

SST2, MRPC = TASKS["sst2"], TASKS["mrpc"]
POS, NEG = "positive", "negative"
CORPUS = [
    Example("a", "Good film", label=POS),
    Example("b", "good story", label=POS),
    Example("c", "good bad film", label=NEG),
    Example("d", "bad story", label=NEG),
    Example("e", "bad film", label=NEG),
    Example("f", "fine", label=POS),
]
SAME, OTHER = "equivalent", "not_equivalent"
PAIRS = [
    Example("1", "a cat sat", "a cat sat", SAME),
    Example("2", "dogs run", "dogs run fast", SAME),
    Example("3", "birds sing", "fish swim", OTHER),
    Example("4", "a cat sat", "a dog ran", OTHER),
]


@pytest.fixture
def writer():
    return EvidenceWriter(CORPUS, SST2)


def quiet(line):
    pass


# ---- evidence


def log_odds(writer, word, label, row=None):
    return writer._score(("has", word), label, row and writer.counted[row])


def test_log_odds_by_hand(writer):
    """Half an occurrence is added to each count: of 3 positive and 3 negative rows, 'good' is in 2 and 1."""
    assert log_odds(writer, "good", POS) == pytest.approx(math.log((2.5 / 4) / (1.5 / 4)))
    assert log_odds(writer, "film", POS) == pytest.approx(math.log(1.5 / 2.5))
    assert log_odds(writer, "bad", NEG) == pytest.approx(math.log(3.5 / 0.5))
    assert log_odds(writer, "unheard", POS) == pytest.approx(0)


def test_log_odds_leave_out_the_row_that_is_written_about(writer):
    assert log_odds(writer, "good", POS, "a") == pytest.approx(math.log((1.5 / 3) / (1.5 / 4)))
    assert log_odds(writer, "good", NEG, "a") == pytest.approx(math.log((1.5 / 4) / (1.5 / 3)))
    assert log_odds(writer, "good", POS, "c") == pytest.approx(math.log((2.5 / 4) / (0.5 / 3)))
    assert log_odds(writer, "fine", POS, "f") == pytest.approx(math.log((0.5 / 3) / (0.5 / 4)))
    assert log_odds(writer, "fine", POS) == pytest.approx(math.log(3))  # for another row it is evidence


def test_evidence_words_in_the_texts_own_spelling(writer):
    row = Example("new", "Good, BAD film!")
    assert writer.basis(row, POS) == ("has", ("Good", "film"))  # log-odds log 5/3, log 3/5; 'bad' has log 1/7
    assert writer.basis(row, NEG) == ("has", ("BAD", "film"))
    assert writer.write(row, POS) == "the words Good and film suggest positive"
    assert writer.write(CORPUS[5], NEG) == "the word fine suggests negative"
    assert writer.write(Example("new", "...!"), NEG) == "no word stands out, which suggests negative"


def slow_scores(examples, task, example, label):
    """{kind: {word: what it says for the label}} of a row, counted by loops over the other labelled rows."""

    def features(row):
        first = row.text.lower().split()
        if not task.is_pair:
            return {"has": set(first)}
        second = row.text_b.lower().split()
        return {
            "both": {w for w in second if w in first},
            "first": {w for w in first if w not in second},
            "second": {w for w in second if w not in first},
        }

    def score(has_it):
        others = [e for e in examples if e.label and e.id != example.id]
        inside = [has_it(features(e)) for e in others if e.label == label]
        outside = [has_it(features(e)) for e in others if e.label != label]
        return math.log((sum(inside) + 0.5) / (len(inside) + 1) / (sum(outside) + 0.5) * (len(outside) + 1))

    found = {}
    for kind, words in features(example).items():
        size = score(lambda f: min(5, len(f[kind])) == min(5, len(words))) if task.is_pair else 0.0
        found[kind] = {word: size + score(lambda f: word in f[kind]) for word in words}
    return found


WORDS = "red blue green black white brown pink grey".split()


def random_rows(count, labels, pair=False, seed=0):
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    return [Example(str(i), text(), text() if pair else None, rng.choice(labels)) for i in range(count)]


@pytest.mark.parametrize("task", [SST2, TASKS["agnews"], MRPC, TASKS["mnli"]], ids=lambda task: task.name)
def test_evidence_agrees_with_a_slow_count(task):
    rows = random_rows(37, task.labels, task.is_pair)
    held_out = random_rows(5, task.labels, task.is_pair, seed=1)
    held_out = [replace(row, id=f"held-out-{row.id}") for row in held_out] + [replace(held_out[0], id="u", label=None)]
    writer = EvidenceWriter(rows, task)
    for row in rows + held_out:
        for label in task.labels:
            kind, words = writer.basis(row, label)
            scores = slow_scores(rows, task, row, label)
            best = max(score for words_of_kind in scores.values() for score in words_of_kind.values())
            top = sorted(scores[kind].values(), reverse=True)[:2]
            assert top[0] == pytest.approx(best) and len(set(words)) == len(words)
            assert [scores[kind][word] for word in words] == pytest.approx(top)


def test_features_of_a_pair():
    writer = EvidenceWriter(PAIRS, MRPC)
    features = writer._features(Example("x", "The cat sat", "the DOG sat down"))
    assert features == {
        ("both", 2): None, ("both", "the"): "the", ("both", "sat"): "sat",
        ("first", 1): None, ("first", "cat"): "cat",
        ("second", 2): None, ("second", "dog"): "DOG", ("second", "down"): "down",
    }  # fmt: skip
    features = writer._features(Example("x", "1 2 3 4 5 6 7", None))
    assert ("first", 5) in features and ("both", 0) in features and ("first", 7) not in features


def test_evidence_of_a_pair_by_hand():
    """For a new row: 'fish' and 'swim' in the second text alone have log 3, two such words log 5: more than 'cat'."""
    writer, row = EvidenceWriter(PAIRS, MRPC), Example("x", "a cat sat", "fish swim")
    assert writer._score(("second", "fish"), OTHER, None) == pytest.approx(math.log(3))
    assert writer._score(("second", 2), OTHER, None) == pytest.approx(math.log(5))
    assert writer.write(row, OTHER) == "only the second says fish and swim, which suggests not_equivalent"
    assert writer.write(row, SAME) == "only the first says a and cat, which suggests equivalent"
    same = Example("y", "a cat sat", "A Cat sat")
    assert writer.write(same, SAME) == "both say Cat and sat, which suggests equivalent"
    assert writer.write(Example("z", "?", "!"), SAME) == "no word stands out, which suggests equivalent"


@pytest.mark.parametrize(
    "kind, words, text",
    [
        ("has", (), "no word stands out, which suggests X"),
        ("has", ("dull",), "the word dull suggests X"),
        ("has", ("dull", "long"), "the words dull and long suggest X"),
        ("both", ("dull",), "both say dull, which suggests X"),
        ("both", ("dull", "long"), "both say dull and long, which suggests X"),
        ("first", ("dull",), "only the first says dull, which suggests X"),
        ("second", ("dull", "long"), "only the second says dull and long, which suggests X"),
        ("second", (), "no word stands out, which suggests X"),
    ],
)
def test_wording(writer, kind, words, text):
    assert writer.phrase((kind, words), "X") == text


def test_words_with_apostrophes_and_hyphens():
    writer = EvidenceWriter([Example("a", "it's well-made, isn’t it? über", label=POS)], SST2)
    assert [w for _, w in writer._features(writer.examples[0])] == ["it's", "well-made", "isn’t", "it", "über"]


def test_evidence_needs_labels():
    with pytest.raises(InputError, match="evidence needs labelled rows"):
        EvidenceWriter([replace(row, label=None) for row in CORPUS], SST2)
    half = [replace(row, label=None) if row.id in "ade" else row for row in CORPUS]
    assert EvidenceWriter(half, SST2).rows == {POS: 2, NEG: 1}  # rows without a label are not counted


# ---- drawing


def given_rows():
    return [
        replace(row, rationale=f"{row.id} {row.label}", rationales={label: f"{row.id} {label}" for label in (POS, NEG)})
        for row in CORPUS
    ]


def demo_rows():
    return [replace(r, rationales={w: phrase_rationale(t, w) for w, t in r.rationales.items()}) for r in given_rows()]


WRITERS = {
    "evidence": lambda: EvidenceWriter(CORPUS, SST2),
    "given": lambda: GivenWriter(given_rows(), SST2),
    "demo": lambda: DemoWriter(demo_rows(), SST2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_draws_hang_on_the_generator_and_not_on_the_label(name):
    writer = WRITERS[name]()
    for row in writer.examples:
        draws = {}
        for label in (POS, NEG):
            rng = random.Random(3)
            draws[label] = [writer.draw(replace(row, label=label), rng) for _ in range(200)]
        assert draws[POS] == draws[NEG]
        assert len(set(draws[POS])) > 3
        assert draws[POS] != [writer.draw(row, random.Random(4)) for _ in range(200)]


@pytest.mark.parametrize("name", WRITERS)
def test_drawn_bases_speak_for_either_label_alike(name):
    """Of a corpus that is its own mirror image, what is drawn must be it too: each word as often as its opposite."""
    mirror = {"good": "bad", "bad": "good", "fine": "poor", "poor": "fine", "film": "film", POS: NEG, NEG: POS}
    rows = [Example("1", "good film", label=POS), Example("2", "bad film", label=NEG)]
    rows += [Example("3", "fine good", label=POS), Example("4", "poor bad", label=NEG)]
    if name != "evidence":
        rows = [replace(r, rationales={w: f"{w} {r.text}" for w in (POS, NEG)}) for r in rows]
        rows = [replace(r, rationales={w: phrase_rationale(t, w) for w, t in r.rationales.items()}) for r in rows]
    writer = {"evidence": EvidenceWriter, "given": GivenWriter, "demo": DemoWriter}[name](rows, SST2)
    counts = []
    for row in rows[:2]:  # two rows of which one is the other's mirror image
        rng = random.Random(row.id)
        counts.append(Counter())
        for _ in range(4000):
            basis = writer.draw(row, rng)
            counts[-1].update(sorted(set(basis[1] if name == "evidence" else basis.replace(",", "").split())))
    for word, opposite in mirror.items():
        assert abs(counts[0][word] - counts[1][opposite]) < 200, (word, counts)


def test_evidence_draws_from_three_sources_in_equal_shares(writer):
    row, rng, draws = Example("new", "alpha beta gamma delta"), random.Random(0), Counter()
    for _ in range(6000):
        draws[writer.draw(row, rng)] += 1
    own = {basis: n for basis, n in draws.items() if set(basis[1]) <= {"alpha", "beta", "gamma", "delta"}}
    assert 0.64 < sum(own.values()) / 6000 < 0.69  # the rest are of another text
    assert len(own) == 12  # two of four words, in any order
    assert 0.33 < own["has", ("alpha", "beta")] / 6000 < 0.39  # a third as best evidence, 1/12 of a third by chance
    assert {word for (_, words) in draws if (_, words) not in own for word in words} == {
        "Good", "good", "bad", "film", "story", "fine"
    }  # fmt: skip


def test_given_draws_own_rationales_twice_as_often():
    writer, rng = WRITERS["given"](), random.Random(0)
    draws = [writer.draw(writer.examples[0], rng) for _ in range(6000)]
    assert 0.69 < sum(text.startswith("a ") for text in draws) / 6000 < 0.75  # 2/3, and a sixth of the last third
    assert 0.47 < sum(text.endswith(POS) for text in draws) / 6000 < 0.53


# ---- given, demo


def test_given_rationales():
    full, gold = given_rows()[0], Example("g", "fine", label=POS, rationale="the gold one")
    writer = GivenWriter([full, gold], SST2)
    assert writer.write(full, POS) == "a positive" and writer.write(full, NEG) == "a negative"
    assert writer.write(gold, POS) == writer.write(gold, NEG) == "the gold one"  # a wrong label without one of its own
    assert writer.argues_for_all(full) and not writer.argues_for_all(gold)
    only = Example("o", "fine", label=POS, rationales={POS: "why not"})
    assert GivenWriter([only], SST2).write(only, NEG) == "why not"


def test_rows_without_a_rationale():
    """They are known, and nothing is drawn from them; where no row has a rationale for its label, one is named."""
    wrong = Example("train.jsonl:8", "fine", label=POS, rationales={NEG: "for the wrong label alone"})
    unlabelled = Example("u", "no label", rationale="of nothing")
    writer, rng = GivenWriter([wrong, *given_rows(), unlabelled], SST2), random.Random(0)
    assert [writer.can_write(row) for row in (wrong, *given_rows(), unlabelled)] == [False] + [True] * len(CORPUS) + [
        False
    ]
    assert not {writer.draw(given_rows()[0], rng) for _ in range(500)} & {"for the wrong label alone", "of nothing", ""}
    with pytest.raises(InputError, match="row train.jsonl:8: has no rationale for its label 'positive', nor has any"):
        GivenWriter([wrong, unlabelled], SST2)
    assert EvidenceWriter(CORPUS, SST2).can_write(wrong)


def test_demo_rationales_round_trip():
    quotes = ["that the battery dies quickly", "a screen, which is dim", "which is positive, which is negative"]
    for quote in quotes:
        assert quote_of(phrase_rationale(quote, POS)) == quote
    rationales = {NEG: phrase_rationale(quotes[0], NEG), POS: phrase_rationale("x y", POS)}
    row = Example("a", "t", label=NEG, rationales=rationales)
    writer = DemoWriter([row], TASKS["demo"])
    assert writer.basis(row, NEG) == quotes[0] and writer.basis(row, POS) == "x y"
    assert {label: writer.write(row, label) for label in (POS, NEG)} == row.rationales
    assert writer.phrase("x y", NEG) == "what decides is x y, which is negative"


# ---- a language model


@pytest.fixture(scope="module")
def asked(tokenizer):
    model = tiny_model("llama", vocab_size=262, max_position_embeddings=512)
    return {"model": model, "encoder": Encoder(tokenizer, model), "max_new_tokens": 6, "log": quiet}


def greedy(model, encoder, prompt, count):
    """The likeliest answer, by full forward passes."""
    ids = encoder.prompt_ids(prompt)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and not (len(ids) > start and ids[-1] in encoder.stop_ids):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return encoder.decode(ids[start:])


def test_model_rationales_are_asked_for_every_label_and_cached(tmp_path, asked, monkeypatch):
    cache = tmp_path / "rationales.jsonl"
    rows = [*CORPUS[:3], Example("u", "no label")]
    writer = ModelWriter(rows, SST2, cache_file=cache, batch_size=3, **asked)
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert {(line["id"], line["label"]) for line in lines} == {(row.id, label) for row in rows for label in (POS, NEG)}
    assert len(lines) == 8 and read_cache(cache) == {
        (line["id"], line["label"]): (line["rationale"], line["asked"]) for line in lines
    }
    for line in lines:
        row = next(row for row in rows if row.id == line["id"])
        question = f"Sentence: {row.text}\nNegative or positive? Reason, then label:"
        prompt = ModelWriter.INSTRUCTION.format(question=question, label=line["label"])
        expected = " ".join(greedy(asked["model"], asked["encoder"], prompt, 6).split()) or "no reason given"
        assert line["rationale"] == expected == writer.write(row, line["label"])
        assert "\n" not in expected
    assert writer.argues_for_all(rows[0]) and not writer.argues_for_all(CORPUS[5])

    def refuse(*args, **options):
        raise AssertionError("asked again")

    monkeypatch.setattr(rllr.rationales.model_writer, "write_answers", refuse)
    again = ModelWriter(rows, SST2, cache_file=cache, **asked)
    assert [again.write(row, POS) for row in rows] == [writer.write(row, POS) for row in rows]
    assert len(cache.read_text().splitlines()) == 8


def test_a_changed_text_is_not_answered_from_the_cache(tmp_path, asked, monkeypatch):
    """Same id, other words: the cached rationale would be about a text that is no longer there."""
    cache, seen = tmp_path / "rationales.jsonl", []
    ModelWriter([Example("a", "Good film", label=POS)], SST2, cache_file=cache, **asked)
    real = rllr.rationales.model_writer.write_answers
    monkeypatch.setattr(
        rllr.rationales.model_writer,
        "write_answers",
        lambda model, encoder, prompts, **rest: seen.append(len(prompts)) or real(model, encoder, prompts, **rest),
    )
    ModelWriter([Example("a", "bad film", label=POS)], SST2, cache_file=cache, **asked)
    assert sum(seen) == 2


@pytest.mark.parametrize(
    "said, written", [(" It is\n dull.\nLabel: negative\n", "It is dull. Label: negative"), ("\n ", "no reason given")]
)
def test_a_model_rationale_is_one_line(tmp_path, asked, monkeypatch, said, written):
    """So that the label line stays the last one, and the only one of its kind."""

    def say(model, encoder, prompts, **options):
        return SimpleNamespace(responses=lambda: [asked["encoder"].answer_ids(said)] * len(prompts))

    monkeypatch.setattr(rllr.rationales.model_writer, "write_answers", say)
    writer = ModelWriter(CORPUS[:1], SST2, cache_file=tmp_path / "rationales.jsonl", **asked)
    assert writer.write(CORPUS[0], POS) == written


def test_an_interrupted_writer_goes_on(tmp_path, asked, monkeypatch):
    cache, whole = tmp_path / "rationales.jsonl", tmp_path / "whole.jsonl"
    ModelWriter(CORPUS, SST2, cache_file=whole, batch_size=4, **asked)
    original, asked_for = rllr.rationales.model_writer.write_answers, []

    def stops_at_the_second_batch(model, encoder, prompts, **options):
        asked_for.append(len(prompts))
        if len(asked_for) == 2:
            raise KeyboardInterrupt
        return original(model, encoder, prompts, **options)

    monkeypatch.setattr(rllr.rationales.model_writer, "write_answers", stops_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        ModelWriter(CORPUS, SST2, cache_file=cache, batch_size=4, **asked)
    assert len(read_cache(cache)) == 4
    ModelWriter(CORPUS, SST2, cache_file=cache, batch_size=4, **asked)
    assert asked_for == [4, 4, 4, 4] and read_cache(cache) == read_cache(whole)


def test_half_a_line_at_the_end_of_a_cache_is_written_again(asked, tmp_path):
    """What a run leaves that was killed in the middle of a line; half a line anywhere else is somebody's edit, and
    refused."""
    cache, whole = tmp_path / "rationales.jsonl", tmp_path / "whole.jsonl"
    ModelWriter(CORPUS, SST2, cache_file=whole, batch_size=4, **asked)
    lines = whole.read_bytes().splitlines(keepends=True)
    cache.write_bytes(b"".join(lines[:5]) + lines[5][:17])
    assert len(read_cache(cache)) == 5
    ModelWriter(CORPUS, SST2, cache_file=cache, batch_size=4, **asked)
    assert read_cache(cache) == read_cache(whole) and cache.read_bytes().count(b"\n") == len(lines)
    cache.write_bytes(lines[0][:17] + b"\n" + lines[1])
    with pytest.raises(InputError, match="rationales.jsonl:1: not a cached rationale"):
        read_cache(cache)


@pytest.mark.parametrize(
    "bad", [b"{", b"[]", b"3", b'{"id": "b", "label": "x"}', b'{"id": [], "label": 1, "rationale": "r"}', b"\xff\xfe"]
)
def test_a_damaged_cache_names_its_line(tmp_path, asked, bad):
    cache = tmp_path / "rationales.jsonl"
    cache.write_bytes(b'{"id": "a", "label": "positive", "rationale": "r"}\n' + bad + b"\n")
    with pytest.raises(InputError, match=rf"^{cache}:2: not a cached rationale"):
        ModelWriter(CORPUS, SST2, cache_file=cache, **asked)


# ---- choosing one, and the command


def test_defaults():
    assert default_writer(TASKS["demo"], CORPUS) == "demo"
    assert default_writer(SST2, CORPUS + given_rows()) == "given" and default_writer(SST2, CORPUS) == "evidence"
    assert default_writer(SST2, []) == "evidence"
    labels = [default_label_pairs(name) for name in ("given", "evidence", "demo", "model")]
    assert labels == ["paper", "independent", "drawn", "paper"]


def test_make_writer():
    assert type(make_writer("evidence", CORPUS, SST2)) is EvidenceWriter
    assert type(make_writer("demo", demo_rows(), SST2)) is DemoWriter
    with pytest.raises(InputError, match="--rationales 'gpt': choose from given, evidence, demo, model"):
        make_writer("gpt", CORPUS, SST2)
    with pytest.raises(InputError, match="--rationale_model"):
        make_writer("model", CORPUS, SST2)


def test_make_writer_loads_the_model_and_keeps_the_cache(tmp_path, asked, tokenizer):
    asked["model"].save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    config = type("Config", (), {"rationale_model": str(tmp_path / "lm")})
    row, other = CORPUS[0], Example("also", "so so", label=NEG)
    writer = make_writer("model", [row], SST2, config=config, directory=tmp_path, log=quiet, also=[other])
    assert set(read_cache(tmp_path / "rationales.jsonl")) == {(i, w) for i in ("a", "also") for w in (POS, NEG)}
    assert writer.write(other, NEG)


def run(*argv):
    """Exit code of the command."""
    try:
        main([str(arg) for arg in argv])
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command_writes_a_data_file(tmp_path, capsys):
    data, output = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"sentence": r.text, "label": r.label, "id": r.id}) + "\n" for r in CORPUS))
    command = ["--task", "sst2", "--train_file", data, "--columns", "text=sentence", "--output", output]
    assert run(*command) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["id"], r["text"], r["label"]) for r in rows] == [(e.id, e.text, e.label) for e in CORPUS]
    for row in rows:
        assert row["rationale"] == row["rationales"][row["label"]] and set(row["rationales"]) == {POS, NEG}
    assert rows[5]["rationale"] == "the word fine suggests positive"
    capsys.readouterr()
    assert run(*command) == 2 and f"--output {output}: exists" in capsys.readouterr().err
    assert (
        run(*command, "--overwrite", "--writer", "given") == 2
        and "row a (train.jsonl:1): has no" in capsys.readouterr().err
    )
    # What was written can be read back as given rationales.
    assert run("--task", "sst2", "--train_file", output, "--output", tmp_path / "2.jsonl", "--writer", "given") == 0
    assert (tmp_path / "2.jsonl").read_text() == output.read_text()


def test_the_command_hands_on_rows_without_a_label(tmp_path, capsys):
    """They are PPO's prompts. Its own input it does not write over."""
    texts = {"dull": "negative", "what": None, "fine": "positive"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts.items()))
    flags = ["--task", "sst2", "--train_file", str(path)]
    assert run(*flags, "--output", str(path), "--overwrite") == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert run(*flags, "--output", str(tmp_path / "out.jsonl")) == 0
    assert "3 rows written" in (said := capsys.readouterr().out) and "1 of them as they were, without a label" in said
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in written] == ["negative", None, "positive"]
    explained = {"rationale", "rationales"}
    assert [set(row) - {"id", "text", "label"} for row in written] == [explained, set(), explained]


def test_the_command_on_pairs_with_scores(tmp_path):
    data, output = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": "a cat", "text_b": "a dog", "score": n / 2} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--task", "stsb", "--train_file", data, "--output", output) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["text_b"], r["score"]) for r in written] == [("a dog", n / 2) for n in range(6)]
    assert set(written[0]["rationales"]) == set(TASKS["stsb"].labels)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--task", "sst2", "--output", "{dir}/x.jsonl"], "--train_file"),
        (["--output", "{dir}/none/x.jsonl"], "cannot be written"),
        (["--output", "{dir}"], "exists"),
        (["--overwrite", "--output", "{dir}"], "cannot be written"),
        (["--writer", "gpt", "--output", "{dir}/x.jsonl"], "--writer 'gpt'"),
        (["--writer", "model", "--output", "{dir}/x.jsonl"], "--rationale_model"),
        ([], "--output"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, argv, words):
    assert run(*[arg.format(dir=tmp_path) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and not (tmp_path / "x.jsonl").exists()


def test_a_task_needs_no_rationales_to_have_labels_of_its_own():
    task = Task("own", ("x", "y", "z"), "{text}")
    rows = [Example(str(i), f"w{i % 3} t", label="xyz"[i % 3]) for i in range(9)]
    writer = EvidenceWriter(rows, task)
    assert all(writer.write(row, row.label).startswith(f"the words w{i % 3} and t") for i, row in enumerate(rows))
