"""Answers are measured: what is too long for --max_new_tokens, or for the context."""

import pytest
from families import toy_tokenizer
from test_encoding import encoder_of
from toy_runs import ANSWER, TRAIN_ROWS, run, write_rows

import train_sft
from rllr.common.errors import InputError
from rllr.pairs import Pair
from rllr.rm_pairs import encode_pairs
from rllr.tasks import Example, Task

TASK = Task("t", ("good", "bad"), "{text}?")


def rows_of(rationale, text="x" * 60, reserve=16, context=64):
    """The row that SFT would learn, with the log; the toy tokenizer gives each byte an id."""
    log, encoder = [], encoder_of(toy_tokenizer(), context=context)
    fitted = encoder.fit([Example("a", text, label="good")], TASK, reserve, log.append)
    write = lambda example: TASK.render_answer("good", rationale)  # noqa: E731
    return encoder.rows(fitted, TASK, write, reserve, log.append)[0], log


def test_an_answer_within_the_limit_is_no_matter():
    (prompt, answer, name, _), log = rows_of("ab")
    assert (len(prompt), len(answer), name) == (48, len("ab\nLabel: good") + 1, "a") and len(log) == 1


def test_a_longer_answer_is_counted_and_its_text_cut_for_it():
    """30 tokens of answer in a context of 64 leave 34 for the prompt, where 48 would do for the limit of 16."""
    (prompt, answer, *_), log = rows_of("r" * 17)
    assert (len(prompt), len(answer)) == (34, 30)
    assert log[-1] == (
        "warning: 1 of 1 answers are longer than --max_new_tokens 16: a. The policy would learn to write what is then "
        "cut, without a "
        "label; raise it to 30, or shorten the rationales"
    )
    assert log[-2].startswith("1 of 1 texts were cut to fit the context of 64 tokens")


def test_a_longer_answer_to_a_short_text_cuts_nothing():
    (prompt, answer, *_), log = rows_of("r" * 17, text="x")
    assert (len(prompt), len(answer), len(log)) == (3, 30, 1)


def test_an_answer_that_does_not_fit_alone_is_refused():
    with pytest.raises(
        InputError,
        match="^row a: the prompt template takes 2 tokens and the answer 63, more than the model's context of 64",
    ):
        rows_of("r" * 50)


def test_the_three_cases_in_a_run(toy, tmp_path, capsys):
    """The base has 64 positions: a long rationale is told, one that cannot fit is refused before anything is
    written."""
    rows = [dict(row, rationales={row["label"]: "so " * (1 + i % 2) * 5}) for i, row in enumerate(TRAIN_ROWS)]
    data = [
        "--task",
        toy.task,
        "--train_file",
        write_rows(tmp_path / "rows.jsonl", rows),
        "--model",
        toy.base,
        "--epochs",
        1,
    ]
    output = run(train_sft.main, *data, *ANSWER, "--output_dir", tmp_path / "out")
    assert "answers are longer than --max_new_tokens 12: rows.jsonl:" in output
    rows[7]["rationales"][rows[7]["label"]] = "so " * 70
    data[3] = write_rows(tmp_path / "rows2.jsonl", rows)
    with pytest.raises(SystemExit):
        run(train_sft.main, *data, *ANSWER, "--output_dir", tmp_path / "none")
    assert (
        "error: row rows2.jsonl:8: the prompt template takes " in capsys.readouterr().err
        and not (tmp_path / "none").exists()
    )


@pytest.mark.parametrize("long, said", [(0, False), (1, False), (2, True), (300, True)])
def test_pairs_with_longer_answers_are_told_of_where_they_are_more_than_a_few(capsys, long, said):
    """One of 300 is a sampled rationale with a label that is a token longer: nobody can do anything about it."""
    answers = ["y" * 20 if row < long else "y" * 3 for row in range(300)]
    pairs = [Pair(f"prompt {row}", "x" * 4, answer, "label") for row, answer in enumerate(answers)]
    rows, kept = encode_pairs(pairs, encoder_of(toy_tokenizer(), context=64), 16)
    assert len(rows) == len(kept) == 300
    warning = f"warning: {long} of 300 pairs have an answer longer than --max_new_tokens 16, up to 21 tokens"
    assert (warning in capsys.readouterr().out) == said
