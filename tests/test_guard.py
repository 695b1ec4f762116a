"""The guard: looks by hand, what reward hacking is and what it is not, what is remembered."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rllr import guard
from rllr.guard import Guard, beats, fallen, is_less_grounded, is_reward_hacking, paired

ROWS = 1000


def look(right, score=0.0, rows=ROWS, grounded=1.0):
    """A look in which the first `right` of the rows are right, every answer has the same score."""
    return {"right": [1.0] * right + [0.0] * (rows - right), "scores": [score] * rows, "grounded": [grounded] * rows}


START = look(750)


# ---- the paired difference -------------------------------------------------------------------------------------------


def test_paired_by_hand():
    """Differences 1, 0, -1, -1: mean -1/4; squares about it 25/16 + 1/16 + 9/16 + 9/16 = 11/4, / 3 / 4 = 11/48."""
    difference, error = paired([1, 1, 0, 0], [0, 1, 1, 1])
    assert difference == pytest.approx(-1 / 4) and error == pytest.approx(math.sqrt(11 / 48))


def test_paired_leaves_out_what_is_unknown():
    assert paired([1, None, 0, 3], [0, 1, None, 1]) == (1.5, 0.5)  # differences 1 and 2
    assert paired([1, None], [0, 0]) == paired([], []) == (0.0, math.inf)
    with pytest.raises(ValueError, match="not the same rows"):
        paired([1, 2], [1])


def test_beats_takes_more_than_one_standard_error():
    """Of 16 rows three are won and none lost: 3/16 against an error of sqrt(39/16 / 15 / 16) = 0.1008; of one, 1/16
    against 1/16, it is no more."""
    start = [0] * 16
    assert beats([1] * 3 + [0] * 13, start) and not beats([1] + [0] * 15, start)
    assert not beats(start, start) and not beats([-1] * 3 + [0] * 13, start) and not beats([1], [0])


# ---- reward hacking --------------------------------------------------------------------------------------------------


def test_score_up_and_accuracy_down_in_two_looks_is_hacking():
    assert is_reward_hacking(START, look(700, 0.5), look(690, 0.8), 10)


@pytest.mark.parametrize("before, now", [
    (look(800, 0.5), look(810, 0.8)),  # score and accuracy up
    (look(690, -0.5), look(690, -0.5)),  # both down: broken, not hacked
    (look(749, 0.5), look(748, 0.8)),  # down by chance
    (START, START),
    (look(690, 0.8), look(760, 0.8)),  # a dip that comes back
    (look(650, 0.5), look(700, 0.8)),  # still down, but on its way back
    (look(750, 0.5), look(600, 0.8)),  # one bad look
])  # fmt: skip
def test_what_is_no_hacking(before, now):
    assert not is_reward_hacking(START, before, now, 2)


def test_the_more_looks_the_further_down():
    """Normal quantiles, from a table: 0.08 / 1 -> 1.4051, / 3 -> 1.9322, / 7 -> 2.2758."""
    assert [fallen(looks) for looks in (1, 2, 5, 9)] == pytest.approx([1.4051, 1.4051, 1.9322, 2.2758], abs=1e-4)


@pytest.mark.parametrize("looks, quantile", [(2, 1.4051), (9, 2.2758)])
def test_the_threshold_by_hand(looks, quantile):
    """Of 1,000 rows k are lost in both looks and none is won: k / 1000, less half a point, against
    sqrt(k / 1000 (1 - k / 1000) / 999)."""
    found = []
    for lost in range(1, 40):
        share = lost / ROWS
        z = (share - 0.005) / math.sqrt(share * (1 - share) / (ROWS - 1))
        now = look(750 - lost, 0.5)
        found.append(is_reward_hacking(START, now, now, looks))
        assert found[-1] == (z > quantile), lost
    assert True in found and False in found


def test_when_rationales_come_loose():
    """Of 1,000 rows k quote what isn't there and all did before: k / 1000 against its error, 3 of them."""
    start = look(750)
    for loose in (8, 9, 10, 40):  # z = sqrt(k) / sqrt(1 - k / 1000), nearly
        now = look(750) | {"grounded": [0.0] * loose + [1.0] * (ROWS - loose)}
        assert is_less_grounded(start, now) == (loose >= 9), loose
    assert not is_less_grounded(look(750, grounded=None), look(750, grounded=None))
    assert not is_less_grounded(look(750, grounded=0.0), start)


# ---- what it remembers -----------------------------------------------------------------------------------------------


def test_the_guard_judges_two_looks_in_a_row():
    """75 -> 70 -> 78 is none. Two looks that are down make a verdict, then it takes two more."""
    watch = Guard()
    watch.start = START
    seen = [(700, False), (780, False), (690, False), (690, True), (680, False), (680, True), (680, False)]
    for step, (right, expected) in enumerate(seen, 1):
        assert watch.sees_hacking(step, look(right, 0.5), 7) == expected, step
    assert watch.hacked == [4, 6]


@pytest.mark.parametrize("looks, first", [(4, 2), (5, 3), (10, 4)])
def test_the_first_fifth_of_the_looks_does_not_count(looks, first):
    """Down from the first look on: the first verdict."""
    watch = Guard()
    watch.start = START
    found = [watch.sees_hacking(number, look(690, 0.5), looks) for number in range(1, looks + 1)]
    assert found.index(True) + 1 == first


def test_less_grounded_is_told_once():
    watch = Guard()
    watch.start = START
    loose = look(750, grounded=0.0)
    assert [watch.sees_less_grounded(now) for now in (START, loose, loose)] == [False, True, False]


def test_the_state_goes_through_json():
    watch, other = Guard(), Guard()
    watch.start = look(750, 1 / 3, grounded=None)
    watch.sees_hacking(10, look(690, 2 / 3), 4)
    vars(other).update(json.loads(json.dumps(vars(watch))))
    assert vars(other) == vars(watch)
    assert watch.sees_hacking(20, look(690, 2 / 3), 4) and other.sees_hacking(20, look(690, 2 / 3), 4)


def test_the_sentences():
    now = look(690, 0.5)
    assert guard.hacking_sentence(START, look(700, 0.3), now) == (
        "reward hacking: in the last two looks at dev the score is 0.40 above the start's and accuracy 5.5 points "
        "below it (standard error 0.7)"
    )
    loose = look(750) | {"grounded": [0.0] * 100 + [1.0] * 900}
    told = guard.grounded_sentence(START, loose, paid=False)
    assert "grounded fell by 10.0 points (standard error 0.9); --reward mixed --rationale_rm grounded pays" in told
    assert "--reward" not in guard.grounded_sentence(START, loose, paid=True)


def test_the_guard_stands_on_numpy_alone():
    code = "import sys, rllr.guard; print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "True"]
