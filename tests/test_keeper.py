"""What a PPO run keeps and does where the guard finds reward hacking: looks that come out as told, in toy runs."""

import json

import pytest
from stopping import Killed, assert_same_run, kill_at, refused
from toy_runs import read_metrics, run, told

import rllr.update
import train_ppo
from rllr.keeper import Keeper
from rllr.model.records import read_record

HACKED = {0: (8, 0.0), 1: (8, 0.1), 2: (3, 0.5), 3: (3, 0.6)}  # {step: (of 8 dev rows right, score)}; after 3 as at 3


def flags_of(toy, *more):
    return ["--label_rm", toy.label_rm, "--eval_every", 1, "--save_every", 2, "--log_every", 1, *more]


@pytest.mark.parametrize("save_every", (2, 0))
def test_stop(toy, tmp_path, monkeypatch, save_every):
    """The stop leaves a checkpoint, also where none was asked for."""
    told(monkeypatch, HACKED)
    output = toy.ppo(tmp_path / "ppo", *flags_of(toy, "--save_every", save_every), steps=6)  # exit code 0: it returns
    assert "step 3: reward hacking: in the last two looks at dev the score is 0.55 above the start's" in output
    assert "accuracy 62.5 points below it (standard error 18.3); the run stops here (--on_hacking stop)" in output
    assert "what helps is on-policy pairs" in output and "8 dev rows: below 400 the guard misses" in output
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
    told(monkeypatch, dict.fromkeys(range(4), (8, 0.0)) | {4: (3, 0.5)})
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


@pytest.mark.parametrize("paid", [False, True])
def test_the_warning_of_rationales_that_come_loose(toy, tmp_path, monkeypatch, paid):
    """It names the reward that pays for them, unless that is paid already."""
    values = iter([1.0] * 8 + [0.0] * 16)
    monkeypatch.setattr("rllr.keeper.grounded", lambda task, row, answer: next(values))
    mixed = ["--reward", "mixed", "--label_rm", toy.label_rm, "--rationale_rm", "grounded"]
    reward = mixed if paid else ["--reward", "gold"]
    output = toy.ppo(tmp_path / "ppo", *reward, "--on_hacking", "ignore", "--eval_every", 1, steps=2)
    assert output.count("grounded fell by 100.0 points") == 1 and "step 1: warning: rationales" in output
    assert ("--rationale_rm grounded pays for it, too" in output) != paid


@pytest.mark.parametrize(("macro_f1", "warns"), [(0.589, True), (0.591, False)])
def test_the_warning_of_a_policy_that_leans_to_the_larger_class(toy, tmp_path, monkeypatch, macro_f1, warns):
    """Seven right instead of two, and a macro F1 that falls from 60 % by more than a point, or by less."""
    told(monkeypatch, {0: (2, 0.0), 1: (7, 0.5)})
    plain = Keeper.look

    def look(self, step):
        scores, found = plain(self, step)
        self.scores = scores | {"macro_f1": macro_f1 if step else 0.6}
        return self.scores, found

    monkeypatch.setattr(Keeper, "look", look)
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", steps=1)
    assert ("warning: accuracy rose, but macro F1 fell (60.0 -> 58.9 %)" in output) == warns
    assert "best: step 1" in output


def test_doubling_nothing_is_refused(toy, tmp_path, capsys):
    flags = ["--policy", toy.sft, "--reward", "gold", "--on_hacking", "kl", "--kl_coef", 0]
    assert "--on_hacking kl doubles --kl_coef, which is 0" in refused(capsys, "ppo", *flags)
    adaptive = ["--reward", "gold", "--kl_control", "adaptive", "--rollout_prompts", 40, "--answers_per_prompt", 2]
    assert "--kl_horizon 16: one rollout could take beta to 0; give more than 16" in refused(
        capsys, "ppo", *adaptive, "--kl_horizon", 16
    )


def test_a_reward_for_rationales_needs_some(toy, capsys):
    flags = ["--policy", toy.sft, "--answer_format", "label", "--rationale_rm", "grounded"]
    for reward in ("rationale", "mixed"):
        message = refused(capsys, "ppo", *flags, "--reward", reward)
        assert f"--reward {reward}: the policy's answers are labels alone, without a rationale" in message


def test_the_next_stage_starts_from_what_a_run_hands_back(toy, tmp_path, monkeypatch):
    told(monkeypatch, {0: (2, 0.0), 1: (7, 0.5)})
    toy.ppo(tmp_path / "first", "--reward", "gold", steps=1)
    output = toy.ppo(tmp_path / "second", "--reward", "gold", policy=tmp_path / "first", steps=1)
    best = tmp_path / "first" / "best"
    assert f"{tmp_path / 'first'} is a PPO run: its policy is {best} (step 1)" in output
    reads = [
        json.loads((tmp_path / name / "run.json").read_text())["reads"]["--policy"] for name in ("first", "second")
    ]
    assert reads[0] != reads[1]
    run(train_ppo.main, "--resume", tmp_path / "second", "--policy", tmp_path / "first")  # the same again
