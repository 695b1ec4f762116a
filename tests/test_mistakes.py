"""The mistakes of docs/details.md: each can still be made, and none goes unnoticed."""

import re
from pathlib import Path

import mistakes
import pytest
from mistakes import MISTAKES, compare, find, mutate

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "details.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MISTAKES)
def test_the_code_that_is_replaced_is_there(name):
    mistake = MISTAKES[name]
    mutate(find(mistake.path), mistake.old, mistake.new)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_no_mistake_goes_unnoticed(name):
    """The run as it is replays without a difference; with the mistake a check ends it, or the replay names it."""
    found = compare(MISTAKES[name])
    lines, said = found["right"]
    assert said is None and len(lines) == mistakes.STEPS
    assert all(metric in lines[0] for metric in MISTAKES[name].shows)
    expected = {
        "index_shift": "stopped: step 1: log-probabilities recorded while sampling differ",
        "eos_mask": "replay: metrics of step 1 (improve/policy_loss)",
        "whitening": "replay: whitened_advantage of step 1",
        "first_ratio": "stopped: step 1: the ratio new / old on the first minibatch",
        "score_position": "replay: reward of step 1",
        "truncation": "replay: score of step 1",
        "token_mean": "replay: metrics of step 1 (improve/policy_loss)",
        "kl_sign": "replay: reward of step 2",  # in the first step policy and reference are equal
    }
    assert found["mistake"][1].startswith(expected[name])


def test_the_page_has_every_mistake():
    assert re.findall(r"\$ python tests/mistakes.py (\w+)", PAGE) == list(MISTAKES)
    for name, mistake in MISTAKES.items():
        assert f"{name}: in {mistake.path}\n    {mistake.old}\n->  {mistake.new}\n" in PAGE


def test_the_tests_that_the_page_names_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) >= 12
    for file, test in named:
        assert re.search(rf"(?m)^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8")), (file, test)


def test_the_command_lists_and_refuses(capsys):
    assert mistakes.main([]) == 0
    assert capsys.readouterr().out.count("->") == len(MISTAKES)
    assert mistakes.main(["typo"]) == 2
    assert "no such mistake: typo; there are index_shift" in capsys.readouterr().out
