"""Whether a rationale's words stand in its text: by hand, of every writer, and in every report that says so."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from toy_runs import read_metrics, run

from rllr import evaluate
from rllr.answers import Answer
from rllr.data.demo import demo_examples
from rllr.evaluate import compare, table
from rllr.grounding import GroundedReward, grounded, known_means
from rllr.judge import Samples
from rllr.metrics import answer_metrics, metric_line, rank
from rllr.model.records import read_record
from rllr.rationales.factory import make_writer
from rllr.rationales.writers import EvidenceWriter, evidence_of
from rllr.report.ppo_step import grounded_metrics
from rllr.tasks import TASKS, Example, Task

SINGLE = TASKS["sst2"]
PAIR = TASKS["mrpc"]
UNSURE = Task("unsure", ("good", "not_good"), "{text}\n{instruction}")


def of_single(text, rationale, label="negative"):
    return grounded(SINGLE, Example("1", text), SINGLE.render_answer(label, rationale))


def of_pair(first, second, rationale):
    return grounded(PAIR, Example("1", first, second), PAIR.render_answer("equivalent", rationale))


# ---- the forms that quote


@pytest.mark.parametrize("text, rationale, expected", [
    ("a dull and overlong mess", "the words dull and overlong suggest negative", 1),
    ("a dull and overlong mess", "the words docks and accents suggest negative", 0),
    ("a dull and overlong mess", "the words dull and accents suggest negative", 0),  # all of them, or none
    ("a dull and overlong mess", "the word mess suggests negative", 1),
    ("a dull and overlong mess", "the word mass suggests negative", 0),
    ("a dull and overlong mess", "the words and and mess suggest negative", 1),  # "and" may be the word itself
    ("a dull, overlong mess", "the words mess and and suggest negative", 0),
    ("a dull and overlong mess", "the words a and dull and mess suggest negative", 1),
    ("a dull and overlong mess", 'the words "dull" and "overlong" suggest negative', 1),
    ("a dull and overlong mess", 'the words "dull" and "docks" suggest negative', 0),
    ("a dull and overlong mess", "the word ... suggests negative", 0),  # that is no word
    ("A DULL mess", "The words dull and MESS suggest negative", 1),
    ("no party here", "the word art suggests negative", 0),  # part of a word is no word
    ("art at no party", "the word art suggests negative", 1),
    ("it's a well-made film", "the words It's and well-made suggest positive", 1),
    ("it's a well-made film", "the words It's and made suggest positive", 0),
    ("Die Tür war schön, die Straße groß", "the words TÜR and STRASSE suggest negative", 1),
    ("Die Tur war schon", "the word Tür suggests negative", 0),
    ("cafe\u0301 noir", "the word caf\u00e9 suggests negative", 1),  # one letter, two ways to write it
    ("यह फिल्म बहुत अच्छी थी", "the words अच्छी and फिल्म suggest positive", 1),
    ("यह फिल्म बहुत अच्छी थी", "the word बेकार suggests negative", 0),
    ("यह फिल्म बहुत अच्छी थी", "the word अच्छ suggests negative", 0),
    ("质量太差", "the words 太差 and 质量 suggest negative", 1),
    ("质量太差", "the words 太差 and 很好 suggest negative", 0),
    ("质量太差", "the word 量太差 suggests negative", 1),
    ("质量太差，今天iPhone好用", "the words iphone and 好用 suggest positive", 1),
    ("质量太差", "no word stands out, which suggests negative", None),
])  # fmt: skip
def test_evidence_by_hand(text, rationale, expected):
    assert of_single(text, rationale) == expected


@pytest.mark.parametrize("rationale, expected", [
    ("both say barks, which suggests equivalent", 1), ("both say dog and barks, which suggests equivalent", 0),
    ("only the first says dog, which suggests equivalent", 1),
    ("only the first says cat, which suggests equivalent", 0),
    ("only the first says barks, which suggests equivalent", 0),  # the second says it, too
    ("only the second says Cat and loudly, which suggests equivalent", 1),
    ("only the second says dog, which suggests equivalent", 0),
    ("only the second says cow, which suggests equivalent", 0),
    ("the words dog and cat suggest equivalent", 1), ("the words dog and cow suggest equivalent", 0),
    ("a dog, a cat, a cow", 2 / 3),
])  # fmt: skip
def test_a_word_of_a_pair_stands_where_the_rationale_says(rationale, expected):
    assert of_pair("The dog barks.", "the cat barks loudly", rationale) == pytest.approx(expected)


@pytest.mark.parametrize("rationale, expected", [
    ("what decides is that the battery dies quickly, which is negative", 1),
    ("what decides is that the screen dies quickly, which is negative", 1),  # words, not their order
    ("what decides is that the battery never dies quickly, which is negative", 0),
    ("what decides is the gorgeous screen, which is positive", 1),
    ("what decides is the gorgeous jacket, which is positive", 0),
    ("what decides is the screen that is gorgeous, which is positive", 0),  # only the first "that" is the form's own
    ("what decides is , which is positive", None),
])  # fmt: skip
def test_the_demo_form_by_hand(rationale, expected):
    assert of_single("although the screen is gorgeous, the battery dies quickly.", rationale) == expected


@pytest.mark.parametrize("name", ["demo", "evidence"])
def test_what_a_writer_writes_of_a_row_is_grounded_there(name):
    """For either label. Of the next row's rationales, hardly any is."""
    task, rows = TASKS["demo"], demo_examples("train")[:500]
    writer = make_writer(name, rows, task)
    answers = {(e.id, label): task.render_answer(label, writer.write(e, label)) for e in rows for label in task.labels}
    assert {grounded(task, e, answers[e.id, label]) for e in rows for label in task.labels} == {1.0}
    other = [grounded(task, e, answers[before.id, before.label]) for before, e in zip(rows, rows[1:])]
    assert sum(other) / len(other) < 0.05


def test_evidence_of_pairs_in_several_scripts_is_grounded():
    rng = random.Random(0)
    words = "dog Cat it's well-made and art party Tür Straße फिल्म अच्छी 质量太差 好 第0条 iPhone好用 word-今天 ดีมาก"
    rows = [
        Example(
            str(i),
            *(" ".join(rng.choices(words.split(), k=rng.randrange(1, 6))) for _ in "ab"),
            rng.choice(PAIR.labels),
        )
        for i in range(200)
    ]
    for task in (SINGLE, PAIR):
        rows = [Example(e.id, e.text, e.text_b, task.labels[i % 2]) for i, e in enumerate(rows)]
        writer = EvidenceWriter(rows, task)
        for e in rows:
            for label in task.labels:
                basis = writer.basis(e, label)
                assert evidence_of(writer.phrase(basis, label)) == basis
                assert grounded(task, e, task.render_answer(label, writer.phrase(basis, label))) == 1.0


def test_evidence_of_other_texts():
    assert evidence_of("no word stands out, which suggests bad") == ("has", ())
    for text in (
        "the words", "dull", "", "so the word dull suggests bad", "the word dull suggests ", "both say a, then b",
        "the words of the critic are harsh and suggest bad", "what decides is the plot, which is bad",
        "the word dull suggests bad\nand more",
    ):  # fmt: skip
        assert evidence_of(text) is None, text


# ---- free text, and none


@pytest.mark.parametrize("text, rationale, expected", [
    ("a dull and overlong mess", "it is dull, overlong and loud", 2 / 3),
    ("a dull and overlong mess", "it is a mess", 1), ("a dull mess", "not a mess", 1 / 2),
    ("a dull mess", "the film is loud", 0),
    ("a dull mess", "the text says it is dull", 1 / 3),  # text, says, dull
    ("a dull mess", "Dull, dull, DULL: negative", 1),  # each word once, and no label
    ("a dull mess", "it is so", None),  # function words only
    ("party", "art", 0), ("ein schönes, großes Haus", "GROSSES Haus, Garten", 2 / 3),
    ("质量太差", "质量很差", 1 / 3),  # 质量, not 量很 and 很差
    ("यह फिल्म अच्छी थी", "फिल्म अच्छी कहानी", 2 / 3),
    ("a dull mess", "the mess\nis dull and\nloud", 2 / 3),
    ("a dull mess", "what decides is dull", 1 / 2),  # without its end that form is free text
    ("a dull mess", "the words dull and", 1 / 2),
])  # fmt: skip
def test_free_text_by_hand(text, rationale, expected):
    assert of_single(text, rationale) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("answer, expected", [
    ("Label: negative", None), ("", None), ("\n \n", None), ("?!", None), ("Label: maybe", None), ("Label:", None),
    ("Lab", None), ("\nLabel: negative or positive", None),
    ("the words dull and mess suggest negative", 1), ("the words dull and docks suggest neg", 0),
    ("the words dull and mess suggest negative\nLabel: maybe", 1),
    ("the words dull and mess suggest negative\nLab", 1),
    ("the words dull and docks suggest negative\n\nlabel: ", 0),
    ("dull dullness", 1 / 2), ("loud\nLabel: loud\nLabel: negative", 0),
    ("the word dull suggests negative\nLabel: negative\nLabel: negative", 1), ("Label: maybe\nLabel: negative", None),
])  # fmt: skip
def test_parse_failures_and_answers_without_a_rationale(answer, expected):
    for task in (SINGLE, TASKS["mr"]):
        assert grounded(task, Example("1", "a dull mess"), answer) == expected


def test_words_of_labels_do_not_count_in_free_text_alone():
    row = Example("1", "a dull mess")
    assert grounded(UNSURE, row, "dull, so not_good\nLabel: not_good") == 1
    assert grounded(UNSURE, row, "the word not_good suggests not_good\nLabel: not_good") == 0


# ---- in the reports

ROWS = [Example(str(i), "a dull mess", label=label) for i, label in enumerate(["negative", "positive"] * 2)]
INVENTED, TRUE = "the word loud suggests negative", "the word dull suggests negative"


def given(*answers):
    return [
        Answer(f"{rationale}\nLabel: {label}" if label else rationale, label, False) for rationale, label in answers
    ]


def test_known_means():
    assert known_means({"a": [1.0, None, 0.5], "b": [None], "c": [], "d": [0.0]}) == {"a": 0.75, "d": 0.0}


def test_metrics_of_right_and_wrong_answers_apart():
    """Right: 1 and 0.5; wrong: 0 and a parse failure's 0.5."""
    answers = given((TRUE, "negative"), (INVENTED, "negative"), ("dull, loud", "negative"), ("loud mess", None))
    scores = answer_metrics(SINGLE, ROWS, answers)
    assert (scores["grounded"], scores["grounded_right"], scores["grounded_wrong"]) == (0.5, 0.75, 0.25)
    assert list(scores)[-4:] == ["parse_failures", "grounded", "grounded_right", "grounded_wrong"]
    assert metric_line(scores).endswith("  parse_failures 25.0 %  grounded 50.0 % (right 75.0, wrong 25.0)")
    assert rank(SINGLE, scores) == rank(SINGLE, {k: v for k, v in scores.items() if not k.startswith("grounded")})


def test_metrics_where_there_is_nothing_to_tell():
    right = answer_metrics(SINGLE, ROWS[:1], given((TRUE, "negative")))
    assert right["grounded"] == right["grounded_right"] == 1 and "grounded_wrong" not in right
    assert metric_line(right).endswith("  grounded 100.0 % (right 100.0)")
    wrong = answer_metrics(SINGLE, ROWS[:2], given(("", "negative"), (INVENTED, "negative")))
    assert wrong["grounded"] == wrong["grounded_wrong"] == 0 and "grounded_right" not in wrong
    without = answer_metrics(SINGLE, ROWS, given(*[("", "negative")] * 4))
    assert not [name for name in without if "grounded" in name] and "grounded" not in metric_line(without)


def test_the_table_has_a_column_where_a_model_gives_rationales():
    silent, invented = given(*[("", "negative")] * 4), given((TRUE, "negative"), *[(INVENTED, "negative")] * 3)
    title, first, second = table(SINGLE, compare(SINGLE, ROWS, {"one": silent, "two": invented})).split("\n")
    place = title.index("grounded")
    assert title[place:] == "grounded  difference to the first"
    assert first[place : place + 8].strip() == "-" and second[: place + 8].endswith("  25.0 % (right 50.0, wrong 0.0)")
    assert second[place + 8 :].startswith("  +0.0 (")
    assert "grounded" not in table(SINGLE, compare(SINGLE, ROWS, {"one": silent}))


def test_the_metrics_of_a_ppo_step():
    """All together where a prompt's gold label is not known; else those of right and of wrong answers, too."""

    def samples(*answers, gold):
        answers = given(*answers)
        labels = [answer.label for answer in answers]
        return SimpleNamespace(answers=[answer.text for answer in answers], labels=labels, gold_labels=gold)

    four = [(TRUE, "negative"), (INVENTED, None), ("", "positive"), ("mess", "x")]
    unknown = samples(*four, gold=["negative", None, None, None])
    assert grounded_metrics(SINGLE, ROWS, unknown) == {"act/grounded": pytest.approx(2 / 3)}
    known = grounded_metrics(SINGLE, ROWS, samples(*four, gold=["negative", "positive"] * 2))
    apart = {"act/grounded_right": 1.0, "act/grounded_wrong": 0.5}
    assert known == {"act/grounded": pytest.approx(2 / 3)} | apart
    assert grounded_metrics(SINGLE, ROWS[:1], samples(("", "negative"), gold=["negative"])) == {}


def test_all_stages_tell_it(toy, tmp_path):
    """The toy's rationales are one word of the text, so a trained policy's are grounded, and the figure is high."""
    lines = read_metrics(toy.sft, "eval/grounded")
    assert len(lines) == 30 and lines[-1]["eval/grounded"] > 0.8 and "%  grounded " in toy.outputs["sft"]
    assert 0.8 < read_record(toy.sft)["eval"]["grounded"] <= 1
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", steps=1)
    assert [line["step"] for line in read_metrics(tmp_path / "ppo", "eval/grounded")] == [0, 1]
    assert all(" grounded " in line for line in output.split("\n") if line.startswith(("step 0/1", "before", "after")))
    assert "grounded" in read_record(tmp_path / "ppo" / "last")["eval"]
    (step,) = read_metrics(tmp_path / "ppo", "act/grounded")
    assert 0.2 < step["act/grounded"] <= 1
    flags = ["--models", toy.sft, "--eval_file", toy.dev, "--output_dir", tmp_path / "out", "--max_new_tokens", 12]
    output = run(evaluate.main, *flags)
    (row,) = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert row["grounded"] == pytest.approx(read_record(toy.sft)["eval"]["grounded"])
    assert "  grounded  " in output and f"  {100 * row['grounded']:.1f} % (right " in output


def test_the_figure_of_a_ppo_step_is_of_its_own_prompts(toy, tmp_path, monkeypatch):
    """Each answer is held against the text that it answers."""
    import train_ppo

    seen = SimpleNamespace(pairs=[])

    def spy(task, examples, samples):
        seen.pairs += zip([task.prompt_of(example) for example in examples], samples.answers, strict=True)
        return {}

    prompts = []

    def show(run, step, samples, judged, scores):
        prompts.extend(zip(samples.prompts, samples.answers))

    monkeypatch.setattr(train_ppo, "grounded_metrics", spy)
    monkeypatch.setattr(train_ppo, "show_rollout", show)
    toy.ppo(tmp_path / "ppo", "--reward", "gold", "--show_every", 1, steps=2)
    assert len(prompts) == 16 and seen.pairs == prompts


# ---- as a reward -----------------------------------------------------------------------------------------------------


def test_as_a_reward_it_pays_for_words_that_stand_in_their_own_rows_text():
    texts = ["a dull mess", "a dull mess", "a fine film", "a fine film", "a fine film"]
    rationales = [
        "the word dull suggests negative", "the word fine suggests positive",  # the second is another row's word
        "the word fine suggests positive",
        "",  # names nothing
        "a film about the sea",  # half of its content words
    ]  # fmt: skip
    answers = [SINGLE.render_answer("negative", rationale) for rationale in rationales]
    rows = [Example(str(n), text) for n, text in enumerate(texts)]
    labels = ["negative", "positive"] + ["negative"] * 3
    samples = Samples(["p"] * 5, answers, labels, [None] * 5, *[torch.zeros(5, 1)] * 4, examples=rows)
    assert GroundedReward(SINGLE)(samples).tolist() == [1, 0, 1, 0, 0.5]
    samples.labels = [None, *labels[1:4], None]  # an answer that names no label would earn as much for less
    assert GroundedReward(SINGLE)(samples).tolist() == [0, 0, 1, 0, 0]
