"""What a console lacks, and the line of settings."""

import io
import sys

import pytest
from toy_runs import ANSWER, TRAIN_ROWS, write_rows

import train_ppo
import train_sft
from rllr.common.errors import any_console


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_lacks_a_character_gets_an_escape(toy, tmp_path, monkeypatch, encoding):
    """The first sample is printed before the policy is saved: no run may die there."""
    rows = [dict(row, text="π" + row["text"]) for row in TRAIN_ROWS]
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    data = [
        "--task",
        toy.task,
        "--train_file",
        write_rows(tmp_path / "rows.jsonl", rows),
        "--model",
        toy.base,
        "--epochs",
        1,
        "--show",
        2,
    ]
    train_sft.main([str(flag) for flag in [*data, *ANSWER, "--output_dir", tmp_path / "out"]])
    console.flush()
    assert (
        r"\u03c0the" in console.buffer.getvalue().decode(encoding)
        and (tmp_path / "out" / "model.safetensors").is_file()
    )


def test_streams_that_cannot_be_told_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    any_console()


def test_the_settings_line_is_short():
    """What differs from the defaults, wrapped; the rest is in run.json."""
    out = io.StringIO()
    from contextlib import redirect_stdout

    from rllr.common.log import show_config

    with redirect_stdout(out):
        show_config(
            train_ppo.Config(policy="p" * 30, steps=7, kl_coef=0.2, gamma=1.0, output_dir="o" * 60), "train_ppo"
        )
    lines = out.getvalue().splitlines()
    assert (
        lines[0].startswith("train_ppo: ")
        and f"policy={'p' * 30}" in out.getvalue()
        and all(len(line) <= 120 for line in lines)
    )
    assert "steps=7" in out.getvalue() and "kl_coef=0.2" in out.getvalue() and "gamma" not in out.getvalue()
