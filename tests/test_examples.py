"""The examples do what they say: each runs, and what it prints or learns is checked against numbers made by hand."""

import itertools
import math
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from endpoint_server import completion, serving
from toy_runs import WORDS, read_lines, read_metrics

import train_ppo
import train_rm
import train_sft
from examples import custom_reward
from examples import judge_behind_a_server as judge
from examples import ppo_without_a_language_model as small
from rllr.common.config import parse_config
from rllr.data.rows import load_examples, load_pairs
from rllr.data.splits import load_splits
from rllr.grounding import grounded
from rllr.tasks import load_task, split_answer

ROOT = Path(__file__).resolve().parent.parent
OWN_TASK = ROOT / "examples" / "own_task"
STAGES = {f"{module.__name__}.py": module for module in (train_sft, train_rm, train_ppo)}


def commands_of(text):
    """[(script, its arguments)] of the lines of a shell script, or of a docstring, that run a stage."""
    for name, value in re.findall(r"(?m)^(\w+)=(\S+)$", text):
        text = text.replace(f"${name}", value)
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("python train_")]
    return [(script, arguments) for _, script, *arguments in words]


# ---- a reward function of one's own ----------------------------------------------------------------------------------

TEXT = "although the screen is gorgeous, the battery dies quickly."
WORTH = {  # answer: (label, what it is worth by hand)
    # Of nine words with three letters or more four stand in the text: the, battery, dies, quickly. 13 words in all.
    custom_reward.ANSWERS[0]: ("negative", 1 + 2 * 4 / 9 - 0.05 * 13),
    "the battery dies quickly\nLabel: negative": ("negative", 1 + 2 - 0.05 * 6),
    "The BATTERY dies quickly.\nLabel: positive\n": ("positive", 1 + 2 - 0.05 * 6),  # case, stop, last line
    "the delivery took forever\nLabel: negative": ("negative", 1 + 2 / 4 - 0.05 * 6),  # "the" alone
    "is it\nLabel: negative": ("negative", 1 - 0.05 * 4),  # nothing long enough to look up
    "Label: negative": ("negative", 1 - 0.05 * 2),  # "negative" of the label line is no quote
    "negative\nLabel: negative": ("negative", 1 - 0.05 * 3),
    "the battery dies quickly": (None, -1),
    "": (None, -1),
}


@pytest.mark.parametrize("answer", WORTH)
def test_what_the_reward_pays(answer):
    label, worth = WORTH[answer]
    assert custom_reward.score(TEXT, answer, label) == pytest.approx(worth)


def test_the_reward_keeps_rows_answers_and_labels_together():
    rows = [SimpleNamespace(text=TEXT), SimpleNamespace(text="the delivery took forever")] * 2
    answers = ["the battery dies quickly\nLabel: negative"] * 3 + ["the battery dies quickly"]
    samples = SimpleNamespace(examples=rows, answers=answers, labels=["negative", "negative", "negative", None])
    assert custom_reward.reward(samples) == pytest.approx([2.7, 1.2, 2.7, -1.0])


def test_the_reward_as_a_program():
    command = [sys.executable, "-m", "examples.custom_reward"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == TEXT and [line.split()[0] for line in lines[1:]] == ["+1.24", "+2.70", "+2.70", "+1.20", "-1.00"]


def test_the_reward_in_a_run(toy, tmp_path):
    """On the toy task "the soup was tasty" is explained by "tasty", and the prompt is the text alone."""
    toy.ppo(tmp_path / "ppo", "--reward", "examples.custom_reward:reward", "--eval_every", 1)
    assert len(read_metrics(tmp_path / "ppo", "judge/score")) == 2
    looks = [row for step in (0, 1, 2) for row in read_lines(tmp_path / "ppo" / "dev" / f"step-{step:06d}.jsonl")]
    one_word = rf"({'|'.join(WORDS['good'] + WORDS['bad'])})\nLabel: (good|bad)"
    rows = [row for row in looks if re.fullmatch(one_word, row["answer"])]
    assert len(looks) == 24 and len(rows) > 12
    for row in rows:  # of three words, one of them looked up
        stands = row["answer"].split("\n")[0] in row["prompt"].split()
        assert row["score"] == pytest.approx(1 + 2 * stands - 0.05 * 3)


def test_a_judge_behind_a_server(monkeypatch):
    """It is asked once for each answer, many at once, and pays a tenth of the mark."""
    pytest.importorskip("openai", reason='the endpoint needs: pip install "[endpoint]"')
    for cached in (judge.judged, judge.client):
        cached.cache_clear()
    marks = {"good": "9", "bad": "Mark: 2.", "best": "10"}

    def reply(request, number):
        content = request["messages"][0]["content"]
        assert "what it was asked" in content and request["model"] == "m"
        return completion(next(mark for word, mark in marks.items() if f"answered:\n{word}\n" in content))

    with serving(reply) as (url, served):
        monkeypatch.setenv("JUDGE_URL", url)
        monkeypatch.setenv("JUDGE_MODEL", "m")
        samples = SimpleNamespace(prompts=["what it was asked"] * 3, answers=["good", "bad", "best"])
        assert judge.reward(samples) == [0.9, 0.2, 1.0] and judge.reward(samples) == [0.9, 0.2, 1.0]
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    ("text", "mark"), [("7", 7), ("10", 10), ("0", 0), (" 8/10", 8), ("I give it 3.", 3), ("42, no: 4", 4),
                       ("4.5", None), ("11", None), ("none", None)]
)  # fmt: skip
def test_the_mark_in_a_judges_answer(text, mark):
    if mark is None:
        with pytest.raises(ValueError, match="the judge gave no mark"):
            judge.mark_in(text)
    else:
        assert judge.mark_in(text) == mark


def test_the_rewards_command_is_taken_by_the_parser():
    [(script, arguments)] = commands_of(custom_reward.__doc__)
    config = parse_config(STAGES[script].Config, arguments)
    assert config.reward == "examples.custom_reward:reward"
    task = load_task(str(OWN_TASK / "task.yaml"))
    assert config.policy == train_sft.Config().default_directory(task)  # what run.sh makes


# ---- a task of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """{script: its settings} of run.sh, in the folder that it goes to."""
    monkeypatch.chdir(ROOT)
    commands = commands_of((OWN_TASK / "run.sh").read_text(encoding="utf-8"))
    assert [script for script, _ in commands] == list(STAGES)
    return {script: parse_config(STAGES[script].Config, arguments) for script, arguments in commands}


def test_the_commands_hand_on_what_they_make(own):
    sft, rm, ppo = own.values()
    task = load_task(sft.task)
    assert sft.model == "tiny" and rm.kind == "file" and ppo.reward == "label"
    assert rm.policy == ppo.policy == sft.default_directory(task)
    assert ppo.label_rm == rm.default_directory(task)


def test_the_rows_are_read_as_they_are_meant(own):
    sft, logged = own["train_sft.py"], []
    task = load_task(sft.task)
    splits = load_splits(sft, task, logged.append)
    assert len(splits.labelled) + len(splits.held_out) == 48 and len(splits.unlabelled) == len(splits.eval) == 16
    for rows, each in ((splits.labelled + splits.held_out, 24), (splits.eval, 8)):
        assert [sum(row.label == label for row in rows) for label in task.labels] == [each, each]
    texts = [row.text for part in (splits.labelled, splits.held_out, splits.unlabelled, splits.eval) for row in part]
    assert len(set(texts)) == len(texts) == 80
    assert not any("dropped" in line or "stand in" in line for line in logged)
    # Half of the rationales quote their message, word for word; the others have no word of it.
    stands = [grounded(task, row, f"{row.rationale}\nLabel: {row.label}") for row in splits.labelled + splits.held_out]
    quoted = [row.rationale in row.text for row in splits.labelled + splits.held_out]
    assert sum(quoted) == 24 and all((share != 0.0) == quote for share, quote in zip(stands, quoted))
    assert all(row.rationale in row.text for row in splits.eval)


def test_the_pairs_are_what_their_kinds_say(own):
    task, logged = load_task(own["train_sft.py"].task), []
    rows = {
        task.prompt_of(row): row
        for row in load_examples(own["train_sft.py"].train_file, task, labels="optional", log=logged.append)
    }
    pairs = load_pairs(own["train_rm.py"].pairs, logged.append)
    assert len(pairs) == 96 and not any("dropped" in line for line in logged)
    for pair in pairs:
        row = rows[pair["prompt"]]  # the prompt as PPO's policy sees it
        chosen, rejected = (split_answer(task, pair[side]) for side in ("chosen", "rejected"))
        assert chosen[1] == row.label and chosen[0] in row.text
        assert (rejected[1] != row.label) == (pair["kind"] == "label")
        assert (rejected[0] == "") == (pair["kind"] == "bare")
        assert (rejected[0] not in row.text) == (pair["kind"] == "vague")
    assert [sum(pair["kind"] == kind for pair in pairs) for kind in ("label", "vague", "bare")] == [48, 36, 12]


def test_the_readme_beside_them_names_every_file():
    named = set(re.findall(r"(?m)^\| `(\S+)` \|", (OWN_TASK / "README.md").read_text(encoding="utf-8")))
    assert named == {path.name for path in OWN_TASK.iterdir()} - {"README.md"}


@pytest.mark.slow
def test_the_commands_run_and_ppo_learns_the_pairs(tmp_path):
    """run.sh itself, in a copy of the repository; then PPO with the reward function, from the policy that it made."""
    for name in ("rllr", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in STAGES:
        shutil.copy(ROOT / script, tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    options = {"env": os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}

    done = subprocess.run(["bash", tmp_path / "examples" / "own_task" / "run.sh"], cwd="/", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs" / "support"
    assert {path.name for path in runs.iterdir()} == {"sft", "rm-file", "ppo-label"}
    assert read_metrics(runs / "rm-file", "final/accuracy")[0]["final/accuracy"] >= 0.8
    steps = read_metrics(runs / "ppo-label", "judge/score", "act/grounded")
    assert len(steps) == 30
    for name, gain in (("judge/score", 0.3), ("act/grounded", 0.1)):
        assert mean(steps[-5:], name) > mean(steps[:5], name) + gain, name
    assert re.search(r"(?m)^before  dev accuracy .*\nafter   dev accuracy ", done.stdout)
    assert (runs / "ppo-label" / "last" / "model.safetensors").is_file()

    [(script, arguments)] = commands_of(custom_reward.__doc__)
    command = [sys.executable, script, *arguments, "--steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(runs / "ppo-examples.custom_reward.reward", "judge/score")) == 3


def mean(lines, name):
    return sum(line[name] for line in lines) / len(lines)


# ---- the mathematics alone -------------------------------------------------------------------------------------------

POINTS = {  # by hand: pairs of neighbours that go on in the round a, b, c, a
    "abcab.": 4,
    "bcabc.": 4,
    "ab.": 1,
    "ca.": 1,  # the round closes
    "ba.": 0,
    "aab.": 1,
    "acb.": 0,
    "a.": 0,
    ".": 0,
    "abcabc": 0,  # without its full stop
}


def symbols_of(*answers):
    """[B, R] of answers as text; behind the full stop there are more of them."""
    rows = [[small.SYMBOLS.index(symbol) for symbol in answer.ljust(small.LONGEST, ".")] for answer in answers]
    return torch.tensor(rows)


def test_the_score_of_an_answer():
    assert small.score(symbols_of(*POINTS)).tolist() == list(POINTS.values())


def test_chance_and_the_best_score():
    """0.28 and 4, as the docstring says: over all answers, each as likely as a random policy makes it."""
    answers = ["".join(symbols) for symbols in itertools.product(small.SYMBOLS, repeat=small.LONGEST)]
    scores = small.score(symbols_of(*(answer.partition(".")[0] + "." * ("." in answer) for answer in answers)))
    # L symbols and a full stop have the probability (3/4)^L / 4; of the L - 1 pairs, a third goes on in the round.
    chance = sum(0.75**length / 4 * (length - 1) / 3 for length in range(1, 6))
    assert scores.mean().item() == pytest.approx(chance) == pytest.approx(0.2754, abs=1e-4)
    assert scores.max() == 4


def test_the_mask_ends_with_the_full_stop(rng):
    symbols, mask = small.sample(torch.zeros(small.LONGEST, 4, 4), rng)
    for row, valid in zip(symbols.tolist(), mask.tolist()):
        length = row.index(small.END) + 1 if small.END in row else small.LONGEST
        assert valid == [t < length for t in range(small.LONGEST)]
    assert torch.allclose(small.logprobs_of(torch.zeros(small.LONGEST, 4, 4), symbols), torch.tensor(-math.log(4)))


def test_log_probabilities_are_those_that_were_sampled_from():
    """A table that allows "bca." alone."""
    logits = torch.full((small.LONGEST, 4, 4), -1e4)
    logits[0, small.END, 1] = logits[1, 1, 2] = logits[2, 2, 0] = logits[3, 0, small.END] = 0.0
    symbols, mask = small.sample(logits, torch.Generator().manual_seed(0))
    assert torch.equal(symbols, symbols_of("bca.").expand(small.ANSWERS, -1)) and (mask.sum(1) == 4).all()
    assert torch.equal(small.logprobs_of(logits, symbols)[mask], torch.zeros(4 * small.ANSWERS))


def learns(means):
    """From chance, within four standard errors of 256 answers, to 97 % of the most there is."""
    return abs(means[0] - 0.2754) < 0.16 and sum(means[-5:]) / 5 > 3.88


@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_learns_the_round(seed):
    assert learns(small.train(seed, log=lambda line: None))


def test_a_large_kl_coefficient_keeps_the_policy_where_it_starts(monkeypatch):
    """A nat costs 20 points, more than any answer can bring. Without a KL it would score 3.9 by then."""
    monkeypatch.setattr(small, "KL_COEF", 20.0)
    monkeypatch.setattr(small, "ROLLOUTS", 15)
    means = small.train(0, log=lambda line: None)
    assert sum(means[-5:]) / 5 < 0.5


NAMES = ("score", "expected")  # in a line of the program


def test_the_program_shows_how_it_learns(capsys):
    runpy.run_path(small.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    scores, expected = ([float(re.search(rf"{name} (\d\.\d\d)", line).group(1)) for line in lines] for name in NAMES)
    assert len(lines) == 9 and learns(scores[:1] + scores[-1:] * 5)
    assert lines[-1].endswith("cab.") or lines[-1].endswith("abc.")
    # The value function has learnt the return: at most 4, less the KL's price, 0.05 a nat, of six symbols.
    assert expected[0] < 0.5 and 3.2 < expected[-1] < 4


def test_a_seed_settles_every_number(monkeypatch):
    monkeypatch.setattr(small, "ROLLOUTS", 3)
    first, again, other = (small.train(seed, log=lambda line: None) for seed in (5, 5, 6))
    assert first == again != other
