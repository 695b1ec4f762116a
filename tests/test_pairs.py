"""Preference pairs: what stands on each side, how the sides' rationales are drawn, seeds, and what is refused."""

import hashlib
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from rllr.answers import Answer
from rllr.common.errors import InputError
from rllr.data.rows import load_pairs
from rllr.grounding import grounded
from rllr.pairs import (
    Pair,
    describe,
    grounded_pairs,
    label_sensitive_pairs,
    on_policy_pairs,
    rationale_sensitive_pairs,
    read_pairs,
    relabelled,
    split_by_prompt,
    write_pairs,
)  # fmt: skip
from rllr.rationales.writers import EvidenceWriter, RationaleWriter
from rllr.tasks import TASKS, Example, Task, load_task, parse_answer, split_answer

SST2, STSB, AGNEWS = TASKS["sst2"], TASKS["stsb"], TASKS["agnews"]
CHI_SQUARE_999 = {3: 16.27, 4: 18.47, 5: 20.52}  # degrees of freedom: the bound that chance passes once in a thousand


class Scripted(RationaleWriter):
    """Rationales that say where they come from; no two draws are alike."""

    def basis(self, example, label):
        return f"own {example.id} {label}"

    def draw(self, example, rng):
        return f"drawn {rng.random()}"

    def phrase(self, basis, label):
        return f"{basis} for {label}"


class Stubborn(Scripted):
    """Gives the same basis whatever the row and the label."""

    def basis(self, example, label):
        return "it is so"

    draw = basis


def rows(count, task=SST2, seed=0):
    rng = random.Random(seed)
    return [
        Example(f"r{i}", f"text {i}", f"other {i}" if task.is_pair else None, rng.choice(task.labels))
        for i in range(count)
    ]


def sides(pair, task):
    """((basis, label the rationale is worded for, label line), the same of the rejected answer)."""
    found = []
    for answer in (pair.chosen, pair.rejected):
        rationale, label = split_answer(task, answer)
        basis, _, worded = rationale.rpartition(" for ")
        found.append((basis, worded, label))
    return found


# ---- label-sensitive


@pytest.mark.parametrize("rationales", ["independent", "paper", "drawn"])
@pytest.mark.parametrize("task", [SST2, STSB, AGNEWS], ids=lambda task: task.name)
def test_gold_label_against_a_wrong_one(task, rationales):
    examples = rows(60, task)
    pairs = label_sensitive_pairs(examples, task, Scripted(), rationales=rationales)
    assert len(pairs) == 60
    for pair, example in zip(pairs, examples):
        assert pair.prompt == task.render_prompt(example.text, example.text_b)  # unrendered, in the order of the rows
        (_, worded, chosen), (_, worded_rejected, rejected) = sides(pair, task)
        assert parse_answer(task, pair.chosen) == chosen == worded == example.label
        assert parse_answer(task, pair.rejected) == rejected == worded_rejected != example.label
        assert rejected in task.labels


def test_the_papers_pairs_are_what_the_writer_writes():
    writer, examples = Scripted(), rows(20, AGNEWS)
    for pair, example in zip(label_sensitive_pairs(examples, AGNEWS, writer, rationales="paper"), examples):
        wrong = parse_answer(AGNEWS, pair.rejected)
        assert pair.kind == "label/paper"
        assert pair.chosen == f"own {example.id} {example.label} for {example.label}\nLabel: {example.label}"
        assert pair.chosen == AGNEWS.render_answer(example.label, writer.write(example, example.label))
        assert pair.rejected == AGNEWS.render_answer(wrong, writer.write(example, wrong))


def test_drawn_pairs_keep_the_gold_side():
    """The gold label's rationale is always its own; the wrong label's is drawn in half of the pairs."""
    examples = rows(2000)
    pairs, drawn = label_sensitive_pairs(examples, SST2, Scripted(), rationales="drawn"), 0
    for pair, example in zip(pairs, examples):
        (chosen, _, _), (rejected, worded, _) = sides(pair, SST2)
        assert chosen == f"own {example.id} {example.label}"
        assert pair.kind == ("label/drawn" if rejected.startswith("drawn") else "label/paper")
        assert rejected.startswith("drawn") or rejected == f"own {example.id} {worded}"
        drawn += pair.kind == "label/drawn"
    assert 0.46 < drawn / 2000 < 0.54


def test_shares_of_independent_pairs():
    """Nine in ten are drawn; half of these rest on one basis, the others on two; the tenth is as in the paper."""
    pairs, kinds, same = label_sensitive_pairs(rows(4000), SST2, Scripted()), Counter(), 0
    for pair in pairs:
        (chosen, *_), (rejected, *_) = sides(pair, SST2)
        kinds[pair.kind] += 1
        drawn = [basis.startswith("drawn ") for basis in (chosen, rejected)]
        assert drawn == [pair.kind == "label/independent"] * 2
        same += chosen == rejected
    assert set(kinds) == {"label/independent", "label/paper"} and sum(kinds.values()) == 4000
    assert abs(kinds["label/independent"] - 3600) < 76  # four standard deviations
    assert abs(same - 1800) < 126


def test_a_drawn_basis_does_not_give_the_label_away():
    """With the evidence writer: a word stands on the chosen side of independent pairs as often as on the other."""
    words = "red blue green black white brown".split()
    rng = random.Random(1)
    examples = [Example(str(i), " ".join(rng.sample(words, 3)), label=rng.choice(SST2.labels)) for i in range(1500)]
    counts = [Counter(), Counter()]
    for pair in label_sensitive_pairs(examples, SST2, EvidenceWriter(examples, SST2)):
        if pair.kind == "label/independent":
            for count, answer in zip(counts, (pair.chosen, pair.rejected)):
                count.update(set(words) & set(split_answer(SST2, answer)[0].split()))
    for word in words:
        assert counts[0][word] > 200 and abs(counts[0][word] - counts[1][word]) < 4 * counts[0][word] ** 0.5


@pytest.mark.parametrize("rationales", ["independent", "paper"])
@pytest.mark.parametrize("task, gold", [(STSB, "2"), (AGNEWS, "world")], ids=["stsb", "agnews"])
def test_wrong_labels_are_uniform(task, gold, rationales):
    examples = [Example(str(i), "t", "u" if task.is_pair else None, gold) for i in range(3000)]
    pairs = label_sensitive_pairs(examples, task, Scripted(), rationales=rationales)
    counts = Counter(parse_answer(task, pair.rejected) for pair in pairs)
    expected = 3000 / (len(task.labels) - 1)
    assert set(counts) == set(task.wrong_labels(gold))
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < CHI_SQUARE_999[len(counts)]


def test_all_wrong_labels():
    examples = rows(30, STSB)
    pairs = label_sensitive_pairs(examples, STSB, Scripted(), negatives="all")
    assert len(pairs) == 30 * 5
    for i, example in enumerate(examples):
        mine = pairs[5 * i : 5 * i + 5]
        assert sorted(parse_answer(STSB, pair.rejected) for pair in mine) == sorted(set("012345") - {example.label})
        assert {parse_answer(STSB, pair.chosen) for pair in mine} == {example.label}
        assert {pair.prompt for pair in mine} == {STSB.render_prompt(example.text, example.text_b)}


MAKERS = {
    "one": lambda examples, **more: label_sensitive_pairs(examples, AGNEWS, Scripted(), **more),
    "all": lambda examples, **more: label_sensitive_pairs(examples, AGNEWS, Scripted(), negatives="all", **more),
    "paper": lambda examples, **more: label_sensitive_pairs(examples, AGNEWS, Scripted(), rationales="paper", **more),
    "rationale": lambda examples, **more: rationale_sensitive_pairs(examples, AGNEWS, Scripted(), **more),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_seeds(maker):
    make, examples = MAKERS[maker], rows(50, AGNEWS)
    random.seed(1)
    first = make(examples, seed=3)
    random.seed(2)  # nothing hangs on the global generator
    assert make(examples, seed=3) == first != make(examples, seed=4)


@pytest.mark.parametrize("maker", ["one", "all", "paper"])
def test_a_rows_pairs_hang_on_the_row_alone(maker):
    make, examples = MAKERS[maker], rows(50, AGNEWS)
    pairs = set(make(examples))
    shuffled = random.Random(0).sample(examples, 50)
    assert set(make(shuffled)) == pairs
    assert set(make(shuffled[:20])) <= pairs and len(make(shuffled[:20])) == (60 if maker == "all" else 20)


def test_answers_that_are_a_label_alone():
    task = load_task("sst2", "label")
    pairs = label_sensitive_pairs(rows(10), task, Scripted())
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        ("Label: positive", "Label: negative"), ("Label: negative", "Label: positive")
    }  # fmt: skip
    assert all(pair.prompt.endswith("positive? Label:") for pair in pairs)


# ---- rationale-sensitive


@pytest.mark.parametrize("task", [SST2, STSB], ids=lambda task: task.name)
def test_the_gold_label_on_both_sides(task):
    examples = rows(1000, task)
    labels = {example.id: example.label for example in examples}
    pairs, kinds = rationale_sensitive_pairs(examples, task, Scripted()), Counter()
    for pair, example in zip(pairs, examples, strict=True):
        assert pair.prompt == task.render_prompt(example.text, example.text_b)
        (better, worded, chosen), (worse, worded_worse, rejected) = sides(pair, task)
        assert chosen == rejected == worded == worded_worse == example.label
        assert better == f"own {example.id} {example.label}"
        _, text, label = worse.split()
        if pair.kind == "rationale/other_text":
            assert text != example.id and label == labels[text]  # what speaks for the other text's own label
        else:
            assert text == example.id and label != example.label
        kinds[pair.kind] += 1
    assert set(kinds) == {"rationale/other_text", "rationale/wrong_evidence"}
    assert abs(kinds["rationale/other_text"] - 500) < 64  # four standard deviations


def test_another_text_stands_in_where_the_wrong_label_has_the_same_basis():
    class OneBasis(Scripted):
        def basis(self, example, label):
            return f"own {example.id}"

    pairs = rationale_sensitive_pairs(rows(40), SST2, OneBasis())
    assert len(pairs) == 40 and {pair.kind for pair in pairs} == {"rationale/other_text"}


def test_two_rows_are_enough_and_one_is_not():
    assert len(rationale_sensitive_pairs(rows(2), SST2, Scripted())) == 2
    with pytest.raises(InputError, match="at least two rows, got 1"):
        rationale_sensitive_pairs(rows(1), SST2, Scripted())


# ---- refused


def test_identical_sides_are_refused_counted_and_shown():
    class SometimesStubborn(Scripted):
        def basis(self, example, label):
            return "it is so" if example.id != "r12" else super().basis(example, label)

    examples, lines = rows(13), []
    pairs = rationale_sensitive_pairs(examples, SST2, SometimesStubborn(), log=lines.append)
    refused = 13 - len(pairs)
    assert refused > 6  # only the last row has a rationale of its own; the others differ only where it was drawn
    assert lines == [f"{refused} of 13 pairs refused: both sides are the same, e.g. {lines[0].partition('e.g. ')[2]}"]
    assert "'it is so for " in lines[0]
    assert all(("own r12" in pair.chosen) != ("own r12" in pair.rejected) for pair in pairs[:-1])
    assert pairs[-1].prompt == SST2.render_prompt(examples[12].text) and "own r12" in pairs[-1].chosen


def test_no_pair_is_left():
    for writer, task in ((Stubborn(), SST2), (Scripted(), load_task("sst2", "label"))):
        lines = []
        with pytest.raises(InputError, match="no preference pair is left"):
            rationale_sensitive_pairs(rows(5), task, writer, log=lines.append)
        assert lines and lines[0].startswith("5 of 5 pairs refused")


def test_a_row_without_a_label_is_named():
    examples = [*rows(3), Example("data.jsonl:9", "t")]
    for make in (label_sensitive_pairs, rationale_sensitive_pairs):
        with pytest.raises(InputError, match="row data.jsonl:9: has no label"):
            make(examples, SST2, Scripted())


@pytest.mark.parametrize("options", [{"rationales": "own"}, {"negatives": "two"}])
def test_unknown_options(options):
    with pytest.raises(InputError, match="choose independent, paper, drawn.*one or all"):
        label_sensitive_pairs(rows(3), SST2, Scripted(), **options)


def test_describe():
    pairs = [Pair("p", "a", "b", "label/paper")] * 2 + [Pair("p", "a", "b", "label/independent")]
    assert describe(pairs) == "3 pairs: 1 label/independent, 2 label/paper"


def test_pairs_are_written_and_read_back(tmp_path):
    pairs = [Pair("two\nlines", 'a "b"', "ü\u2028", "label/paper"), Pair("p", "x", "y", "rationale/other_text")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert [Pair(**row) for row in load_pairs(tmp_path / "pairs.jsonl", log=lambda line: None)] == pairs


def test_a_prompts_pairs_stay_together_when_some_are_held_out():
    pairs = [Pair(f"prompt {i % 40}", f"a{i}", "b", "file") for i in range(120)]
    train, held = split_by_prompt(pairs)
    assert len(held) == 12 and sorted(train + held, key=pairs.index) == pairs  # a tenth of the prompts, by three
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    shuffled = random.Random(0).sample(pairs, 120)
    assert set(split_by_prompt(shuffled)[1]) == set(held)  # whatever the order of the file
    by_hash = sorted((f"prompt {i}" for i in range(40)), key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    assert {pair.prompt for pair in held} == set(by_hash[:4])  # and in every process
    assert len(split_by_prompt(pairs, 0.25)[1]) == 30
    train, held = split_by_prompt(pairs[:2])
    assert len(train) == len(held) == 1
    with pytest.raises(InputError, match="--pairs: 2 pairs over 1 prompt: give at least two"):
        split_by_prompt([pairs[0], pairs[40]])


@pytest.mark.parametrize("text", ["a\x00b", "one\u2028two", 'tab\tand "quotes"', " space \r\n", "\ufffd\x1f"])
def test_a_runs_own_pairs_come_back_whatever_was_sampled(tmp_path, text):
    """A policy may write what no data file may hold, NUL for one; a run that goes on must find the very same pairs."""
    pairs = [Pair("p", text, "b", "label/on_policy"), Pair(text, "c", text, "label/flipped")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs and [path.name for path in tmp_path.iterdir()] == [
        "pairs.jsonl"
    ]


@pytest.mark.parametrize("content", ['{"prompt": "p", "cho', '{"prompt": "p"}\n', "[1]\n", "3\n", "\xff\n"])
def test_a_damaged_file_of_the_runs_pairs_is_named(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="pairs.jsonl: not the pairs that this run wrote"):
        read_pairs(tmp_path / "pairs.jsonl")


# ---- on-policy pairs -------------------------------------------------------------------------------------------------


def said(*texts, truncated=False):
    """Sampled answers, with the label that each carries."""
    return [Answer(text, parse_answer(SST2, text), truncated) for text in texts]


GOOD, BAD = "fine\nLabel: positive", "dull\nLabel: negative"
ROW = Example("a", "a fine film", label="positive")


def test_a_wrong_sample_loses_to_a_right_one_or_to_the_written_answer():
    written = "own a positive for positive\nLabel: positive"
    answers = {f"r{i}": said(GOOD, BAD, BAD) for i in range(400)}  # one distinct wrong sample each
    many = [Example(name, f"text {name}", label="positive") for name in answers]
    pairs = [pair for pair in on_policy_pairs(many, SST2, Scripted(), answers) if pair.kind == "label/on_policy"]
    assert len(pairs) == 400 and {pair.rejected for pair in pairs} == {BAD}
    sampled = sum(pair.chosen == GOOD for pair in pairs)
    assert 245 < sampled < 315  # of 400 seven in ten: 280 +- 4 standard errors of 9
    others = [pair for pair in pairs if pair.chosen != GOOD]
    assert all(pair.chosen == written.replace("own a", f"own {pair.prompt.split()[2]}") for pair in others)
    (alone,) = on_policy_pairs([ROW], SST2, Scripted(), {"a": said(BAD)})  # no right sample to choose
    assert (alone.chosen, alone.rejected, alone.kind) == (written, BAD, "label/on_policy")
    assert alone.prompt == SST2.prompt_of(ROW)


class Speechless(Scripted):
    """Has no rationale for any row."""

    def can_write(self, example):
        return False

    def write(self, example, label):
        raise AssertionError("was asked for a rationale that it has not")


def test_a_row_without_a_rationale_makes_pairs_of_samples_alone():
    answers = {f"r{i}": said(GOOD, BAD) for i in range(50)}
    many = [Example(name, f"text {name}", label="positive") for name in answers]
    pairs = on_policy_pairs(many, SST2, Speechless(), answers)
    sides = Counter((pair.chosen, pair.rejected, pair.kind) for pair in pairs)
    assert sides == {(GOOD, BAD, "label/on_policy"): 50, (GOOD, "fine\nLabel: negative", "label/flipped"): 50}
    assert on_policy_pairs([ROW], SST2, Speechless(), {"a": said(BAD)}) == []  # no right sample, and none written
    answers = {"a": said(INVENTS, QUOTES), "b": said(INVENTS)}
    (pair,) = grounded_pairs([ROW, replace(ROW, id="b")], SST2, Speechless(), answers, grounded)
    assert (pair.chosen, pair.rejected) == (QUOTES, INVENTS)


def test_a_right_sample_is_preferred_to_itself_with_a_wrong_label():
    (pair,) = on_policy_pairs([ROW], SST2, Scripted(), {"a": said(GOOD, GOOD)})
    assert (pair.chosen, pair.rejected, pair.kind) == (GOOD, "fine\nLabel: negative", "label/flipped")
    news = Example("b", "oil", label="world")
    answer = [Answer("war\nLabel: world", "world", False)]
    flipped = {on_policy_pairs([news], AGNEWS, Scripted(), {"b": answer}, seed=seed)[0].rejected for seed in range(40)}
    assert flipped == {f"war\nLabel: {label}" for label in ("business", "sports", "technology")}


def test_half_of_the_flipped_rationales_argue_for_the_wrong_label_too():
    """The others contradict themselves, as an answer must not."""
    answers = {f"r{i}": said("dull, so negative\nLabel: negative") for i in range(400)}
    many = [Example(name, f"text {name}", label="negative") for name in answers]
    sides = Counter(pair.rejected for pair in on_policy_pairs(many, SST2, Speechless(), answers))
    assert set(sides) == {"dull, so negative\nLabel: positive", "dull, so positive\nLabel: positive"}
    assert 165 < sides["dull, so positive\nLabel: positive"] < 235  # half of 400, +- 3.5 standard errors of 10


@pytest.mark.parametrize(
    "rationale, old, new, expected",
    [
        ("the word dull suggests negative", "negative", "positive", "the word dull suggests positive"),
        ("Negative, not positive: NEGATIVE", "negative", "positive", "Positive, not negative: Positive"),
        ("negatives are nonnegative_s", "negative", "positive", "negatives are nonnegative_s"),
        ("nonnegative", "negative", "positive", "nonnegative"),
        ("they say the same", "equivalent", "not equivalent", "they say the same"),
        ("not equivalent, far from equivalent", "equivalent", "not equivalent", "equivalent, far from not equivalent"),
        ("The two are not equivalent.", "not_equivalent", "equivalent", "The two are equivalent."),
        ("They are equivalent.", "equivalent", "not_equivalent", "They are not equivalent."),
        ("so not_equivalent", "not_equivalent", "equivalent", "so equivalent"),
        ("Not a  duplicate: it asks who.", "not_duplicate", "duplicate", "Duplicate: it asks who."),
        ("the word what suggests equivalent", "equivalent", "not_equivalent", "the word what suggests not_equivalent"),
        ("not_spam or not spam", "not_spam", "is_spam", "is_spam or is spam"),
        ("so it is spam mail", "spam", "spam mail", "so it is spam"),
        ("so it is spam", "Spam", "Ham", "so it is ham"),
        ("Spam", "Spam", "Ham", "Ham"),
        ("4 words of 5, so 4", "4", "5", "4 words of 5, so 5"),
        ("c++ (a.b)", "c++", "a.b", "a.b (c++)"),
        ("\u8bf4\u662f\u6b63\u9762\u7684", "\u6b63\u9762", "\u8d1f\u9762", "\u8bf4\u662f\u8d1f\u9762\u7684"),
        ("это спортивный спорт", "спорт", "мир", "это спортивный мир"),
        ("Überpositiv ist nicht positiv", "positiv", "negativ", "Überpositiv ist nicht negativ"),
        ("요컨대 긍정이다", "긍정", "부정", "요컨대 부정이다"),  # a noun with its particle
        ("बुरा और बुर", "बुर", "भल", "बुरा और भल"),  # the first one's last vowel is a mark
        ("sport and world", "world", "business", "sport and business"),
        ("", "a", "b", ""),
    ],
)  # fmt: skip
def test_labels_are_exchanged_where_a_rationale_names_them(rationale, old, new, expected):
    assert relabelled(rationale, old, new) == expected


@pytest.mark.parametrize(
    "rationale, text, expected",
    [
        ("the words world and cup suggest sports", "The World Cup final", "the words world and cup suggest world"),
        ("the words world and cup suggest sports", "a cup of tea", "the words sports and cup suggest world"),
        ("the word sports suggests sports", "sports and more", "the word sports suggests world"),
        ("sports, not world: sports", "worldly sportsmen", "world, not sports: world"),
    ],
)
def test_what_a_rationale_quotes_is_no_label(rationale, text, expected):
    assert relabelled(rationale, "sports", "world", text) == expected


def test_flipped_pairs_know_the_text_that_a_rationale_quotes():
    task = Task("news", ("sports", "world"), "{text} / {text_b}")
    row = Example("a", "the final", "of the world cup", label="sports")
    answers = {"a": [Answer("the words world and cup suggest sports\nLabel: sports", "sports", False)]}
    rejected = {
        pair.rejected for seed in range(8) for pair in on_policy_pairs([row], task, Speechless(), answers, seed=seed)
    }
    assert rejected == {
        "the words world and cup suggest world\nLabel: world",
        "the words world and cup suggest sports\nLabel: world",
    }


def test_samples_without_a_label_and_cut_ones_make_no_pair():
    cut = said(BAD, GOOD, truncated=True)
    assert on_policy_pairs([ROW], SST2, Scripted(), {"a": [*said("no label here"), *cut]}) == []


def test_on_policy_pairs_hang_on_the_row_and_the_seed_alone():
    answers = {f"r{i}": said(GOOD, BAD, f"{i}\nLabel: negative", "so\nLabel: positive") for i in range(30)}
    many = [Example(name, f"text {name}", label="positive") for name in answers]
    whole = on_policy_pairs(many, SST2, Scripted(), answers)
    assert (
        whole
        == on_policy_pairs(many, SST2, Scripted(), answers)
        != on_policy_pairs(many, SST2, Scripted(), answers, seed=1)
    )
    alone = on_policy_pairs(many[7:8], SST2, Scripted(), answers)
    assert len(alone) == 3 and [pair for pair in whole if pair.prompt == alone[0].prompt] == alone
    with pytest.raises(InputError, match="has no label"):
        on_policy_pairs([Example("a", "x")], SST2, Scripted(), {"a": said(GOOD)})


# ---- grounded pairs --------------------------------------------------------------------------------------------------

QUOTES, INVENTS = (
    "the word fine suggests positive\nLabel: positive",
    "the word superb suggests positive\nLabel: positive",
)
WRONG = "the word superb suggests negative\nLabel: negative"


class Quoting(Scripted):
    """Writes a rationale that stands in the text."""

    def write(self, example, label):
        return f"the word {example.text.split()[-1]} suggests {label}"


def by_share(shares):
    """Instead of `grounded`: the share of an answer, by its first word; 0 for any other."""
    return lambda task, example, answer: shares.get(answer.split()[0], 0.0)


def labelled(*words):
    """Right answers of one word each."""
    return said(*(f"{word}\nLabel: positive" for word in words))


def test_a_right_sample_that_quotes_its_text_beats_one_that_invents():
    answers = {"a": said(INVENTS, WRONG, QUOTES, INVENTS, "no label here")}
    expected = Pair(SST2.prompt_of(ROW), QUOTES, INVENTS, "rationale/grounded")
    assert grounded_pairs([ROW], SST2, Scripted(), answers, grounded) == [expected]


def test_the_written_answer_stands_in_where_no_sample_is_better():
    """If it stands in the text itself; else the row makes no pair."""
    (pair,) = grounded_pairs([ROW], SST2, Quoting(), {"a": said(INVENTS, WRONG)}, grounded)
    assert (pair.chosen, pair.rejected) == ("the word film suggests positive\nLabel: positive", INVENTS)
    assert grounded_pairs([ROW], SST2, Scripted(), {"a": said(INVENTS, WRONG)}, grounded) == []
    assert grounded_pairs([ROW], SST2, Quoting(), {"a": said(QUOTES, WRONG)}, grounded) == []  # nothing to better


def test_seven_of_ten_better_sides_are_samples():
    answers = {f"r{i}": said(QUOTES, INVENTS) for i in range(400)}
    many = [Example(name, f"a fine {name}", label="positive") for name in answers]
    pairs = grounded_pairs(many, SST2, Quoting(), answers, grounded)
    assert len(pairs) == 400 and {pair.rejected for pair in pairs} == {INVENTS}
    assert 245 < sum(pair.chosen == QUOTES for pair in pairs) < 315  # 280 +- 4 standard errors of 9
    written = [pair.chosen for pair in pairs if pair.chosen != QUOTES]
    assert all(re.fullmatch(r"the word r\d+ suggests positive\nLabel: positive", text) for text in written)


def test_a_rationale_that_names_nothing_is_no_way_out():
    """`grounded` is None for it: it loses to one that quotes, and is itself no better than one that invents."""
    bare, prompt = "Label: positive", SST2.prompt_of(ROW)
    assert grounded(SST2, ROW, bare) is None
    pairs = grounded_pairs([ROW], SST2, Scripted(), {"a": said(bare, INVENTS, QUOTES)}, grounded)
    assert pairs == [Pair(prompt, QUOTES, text, "rationale/grounded") for text in (bare, INVENTS)]


def test_free_text_must_be_better_by_half():
    """Shares 0.1, 0.5, 0.6 and 1: 0.1 loses to 0.6 or 1, 0.5 to 1; 0.6 and 1 lose to none."""
    shares = by_share({"low": 0.1, "half": 0.5, "more": 0.6, "all": 1.0})
    answers = {"a": labelled("low", "half", "more", "all")}
    found = set()
    for seed in range(30):
        pairs = grounded_pairs([ROW], SST2, Scripted(), answers, shares, seed=seed)
        found |= {(pair.chosen.split()[0], pair.rejected.split()[0]) for pair in pairs}
        assert len(pairs) == 2
    assert found == {("more", "low"), ("all", "low"), ("all", "half")}


def test_wrong_cut_and_unlabelled_samples_are_on_no_side():
    shares = by_share({"good": 1.0, "right": 1.0})
    answers = [
        *labelled("bad"),
        *said("good\nLabel: negative", "good"),
        *said("right\nLabel: positive", truncated=True),
    ]
    assert grounded_pairs([ROW], SST2, Scripted(), {"a": answers}, shares) == []
    cut = said("bad\nLabel: positive", truncated=True)
    assert grounded_pairs([ROW], SST2, Scripted(), {"a": [*cut, *labelled("right")]}, shares) == []


def test_grounded_pairs_hang_on_the_row_and_the_seed_alone():
    shares = by_share({"x": 1.0, "y": 1.0, "z": 1.0})
    answers = {f"r{i}": labelled("x", "y", "z", "low", f"{i}") for i in range(30)}
    many = [Example(name, f"text {name}", label="positive") for name in answers]
    whole = grounded_pairs(many, SST2, Scripted(), answers, shares)
    random.seed(3)
    assert whole == grounded_pairs(many, SST2, Scripted(), answers, shares)
    assert whole != grounded_pairs(many, SST2, Scripted(), answers, shares, seed=1)
    assert grounded_pairs(many[7:8], SST2, Scripted(), answers, shares) == whole[14:16]
    with pytest.raises(InputError, match="has no label"):
        grounded_pairs([Example("a", "x")], SST2, Scripted(), {"a": said(GOOD)}, shares)
