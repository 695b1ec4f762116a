"""The guard: looks by hand, what is no hacking, what a run does where it is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from stopping import Killed, assert_same_run, kill_at, refused
from toy_runs import read_metrics, run, told

import rllr.update
import train_ppo
from rllr import guard
from rllr.guard import Guard, beats, fallen, is_less_grounded, is_reward_hacking, paired
from rllr.model.records import read_record

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
    """Normal quantiles, from a table: 0.08 / 1 -> 1.4051, / 4 -> 2.0537, / 8 -> 2.3263."""
    assert [fallen(looks) for looks in (1, 2, 5, 9)] == pytest.approx([1.4051, 1.4051, 2.0537, 2.3263], abs=1e-4)


@pytest.mark.parametrize("looks, quantile", [(2, 1.4051), (9, 2.3263)])
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


def test_less_grounded_is_told_once():
    watch = Guard()
    watch.start = START
    loose = look(750, grounded=0.0)
    assert [watch.sees_less_grounded(now) for now in (START, loose, loose)] == [False, True, False]


def test_the_state_goes_through_json():
    watch, other = Guard(), Guard()
    watch.start = look(750, 1 / 3, grounded=None)
    watch.sees_hacking(10, look(690, 2 / 3), 9)
    vars(other).update(json.loads(json.dumps(vars(watch))))
    assert vars(other) == vars(watch)
    assert watch.sees_hacking(20, look(690, 2 / 3), 9) and other.sees_hacking(20, look(690, 2 / 3), 9)


def test_the_sentences():
    now = look(690, 0.5)
    assert guard.hacking_sentence(START, look(700, 0.3), now) == (
        "reward hacking: in the last two looks at dev the score is 0.40 above the start's and accuracy 5.5 points "
        "below it (standard error 0.7)"
    )
    loose = look(750) | {"grounded": [0.0] * 100 + [1.0] * 900}
    assert "grounded fell by 10.0 points (standard error 0.9)" in guard.grounded_sentence(START, loose)


def test_the_guard_stands_on_numpy_alone():
    code = "import sys, rllr.guard; print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "True"]


# ---- in a run --------------------------------------------------------------------------------------------------------

HACKED = {0: (8, 0.0), 1: (8, 0.1), 2: (3, 0.5), 3: (3, 0.6)}  # {step: (of 8 dev rows right, score)}; after 3 as at 3


def flags_of(toy, *more):
    return ["--label_rm", toy.label_rm, "--eval_every", 1, "--save_every", 2, "--log_every", 1, *more]


def test_stop(toy, tmp_path, monkeypatch):
    told(monkeypatch, HACKED)
    output = toy.ppo(tmp_path / "ppo", *flags_of(toy), steps=6)  # exit code 0: it returns
    assert "step 3: reward hacking: in the last two looks at dev the score is 0.55 above the start's" in output
    assert "accuracy 62.5 points below it (standard error 18.3); the run stops here (--on_hacking stop)" in output
    assert "what helps is on-policy pairs" in output and "the guard has 8 dev rows" in output
    assert [line["step"] for line in read_metrics(tmp_path / "ppo", "judge/score")] == [1, 2, 3]
    last, best = (read_record(tmp_path / "ppo" / name) for name in ("last", "best"))
    assert (last["step"], last["hacking"], best["step"]) == (3, [3], 0)
    assert "no step beats the start by more than one standard error: best is the policy that PPO started from" in output
    again = run(train_ppo.main, "--resume", tmp_path / "ppo")
    assert "the guard stopped this run at step 3: it ends there again; --on_hacking kl or ignore goes on" in again
    assert [line["step"] for line in read_metrics(tmp_path / "ppo", "judge/score")] == [1, 2, 3]
    on = run(train_ppo.main, "--resume", tmp_path / "ppo", "--on_hacking", "kl")
    assert "the guard stopped this run at step 3: it goes on (--on_hacking kl) with beta 0.2" in on
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["shape/kl_coef"] for line in lines] == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2, 0.4])


def test_kl(toy, tmp_path, monkeypatch):
    """Two looks that are down double beta, the next two again; the last look has nothing left to raise."""
    told(monkeypatch, HACKED)
    output = toy.ppo(tmp_path / "ppo", *flags_of(toy, "--on_hacking", "kl"), steps=7)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["shape/kl_coef"] for line in lines] == pytest.approx([0.1] * 3 + [0.2] * 2 + [0.4] * 2)
    assert "the run goes on (--on_hacking kl) with beta 0.2; what helps" in output and "beta 0.8" not in output
    assert read_record(tmp_path / "ppo" / "last")["hacking"] == [3, 5, 7]


def test_ignore(toy, tmp_path, monkeypatch):
    told(monkeypatch, HACKED)
    output = toy.ppo(tmp_path / "ppo", *flags_of(toy, "--on_hacking", "ignore"), steps=4)
    assert output.count("reward hacking") == 1 and "the run goes on (--on_hacking ignore); what helps" in output
    assert [line["shape/kl_coef"] for line in read_metrics(tmp_path / "ppo", "judge/score")] == [0.1] * 4


def test_gold_is_never_hacked(toy, tmp_path, monkeypatch):
    """Its score is accuracy itself."""
    monkeypatch.setattr("rllr.keeper.row_values", lambda task, rows, answers: [float(next(falling))] * len(rows))
    falling = iter([1, 0, 0, 0])
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", "--eval_every", 1, steps=3)
    assert "reward hacking" not in output
    assert [line["eval/score"] for line in read_metrics(tmp_path / "ppo", "eval/score")] == [1, 0, 0, 0]


@pytest.mark.parametrize("answer", ["stop", "kl"])
def test_killed_and_resumed_the_guard_decides_the_same(toy, tmp_path, monkeypatch, answer):
    """Killed in the fifth step, whose look makes the verdict: the look before it is in the checkpoint."""
    told(monkeypatch, {step: (8, 0.0) for step in range(4)} | {4: (3, 0.5)})
    flags = flags_of(toy, "--on_hacking", answer)
    output = toy.ppo(tmp_path / "whole", *flags, steps=7)
    assert "step 5: reward hacking" in output
    with monkeypatch.context() as patch:
        kill_at(patch, rllr.update, "_losses", 10)  # two to a step
        with pytest.raises(Killed):
            toy.ppo(tmp_path / "parts", *flags, steps=7)
    output = toy.ppo(tmp_path / "parts", *flags, "--resume", steps=7)
    assert "step-000004" in output and "step 5: reward hacking" in output
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_warning_of_rationales_that_come_loose(toy, tmp_path, monkeypatch):
    values = iter([1.0] * 8 + [0.0] * 16)
    monkeypatch.setattr("rllr.keeper.grounded", lambda task, row, answer: next(values))
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", "--eval_every", 1, steps=2)
    assert output.count("grounded fell by 100.0 points") == 1 and "step 1: warning: rationales" in output


def test_doubling_nothing_is_refused(toy, tmp_path, capsys):
    flags = ["--policy", toy.sft, "--reward", "gold", "--on_hacking", "kl", "--kl_coef", 0]
    assert "--on_hacking kl doubles --kl_coef, which is 0" in refused(capsys, "ppo", *flags)
