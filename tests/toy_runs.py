"""A toy task and one run of every stage on it, built once per test process in a few seconds: what the tests of the
scripts and of bad input start from. Treat what lies there as read-only."""

import atexit
import contextlib
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import torch

import train_ppo
import train_rm
import train_sft
from rllr import tiny
from rllr.keeper import Keeper

WORDS = {"good": "tasty lovely superb fresh kind".split(), "bad": "stale awful rude bland dirty".split()}
NOUNS = "soup bread waiter room view tea cake wine staff".split()
OTHER = {"good": "bad", "bad": "good"}
ANSWER = ["--max_new_tokens", "12"]  # an answer takes eight or nine


def typed(text):
    """A standard input that holds this text."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")


def grid():
    """'the soup was tasty', good: every noun with every word. Right rationale: the word, wrong one: the noun."""
    return [
        {"text": f"the {noun} was {word}", "label": label, "rationales": {label: word, OTHER[label]: noun}}
        for noun in NOUNS for label, words in WORDS.items() for word in words
    ]  # fmt: skip


TRAIN_ROWS = [row for i, row in enumerate(grid()) if i % 7 % 3]
DEV_ROWS = [row for i, row in enumerate(grid()) if not i % 7 % 3][:24]


def write_rows(path, rows):
    """A JSONL file; returns its path as text."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_metrics(directory, *needed):
    """The lines of metrics.jsonl that hold all the names asked for."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if all(name in line for name in needed)]


def run(main, *arguments):
    """Call a script's main with an argument list; what it prints to stdout is returned."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main([str(argument) for argument in arguments])
    return output.getvalue()


def told(monkeypatch, looks):
    """From now on looks at eight dev rows come out as told: {step: (rows right, score)}; other steps as the last."""
    plain = Keeper.look

    def look_as_told(self, step):
        scores, found = plain(self, step)
        right, score = looks.get(step, looks[max(looks)])
        self.scores = scores | {"accuracy": right / 8, "macro_f1": 0.0, "parse_failures": 0.0, "score": score}
        return self.scores, found | {"right": [1.0] * right + [0.0] * (8 - right), "scores": [score] * 8}

    monkeypatch.setattr(Keeper, "look", look_as_told)


class Toy:
    """Paths of the toy task's files and models, and the flags that go with them."""

    def __init__(self, root):
        self.root = Path(root)
        self.task, self.base, self.sft = self.root / "toy.yaml", self.root / "base", self.root / "sft"
        self.label_rm, self.rationale_rm = self.root / "rm-label", self.root / "rm-rationale"
        self.train, self.dev = self.root / "train.jsonl", self.root / "dev.jsonl"
        self.data = ["--task", self.task, "--train_file", self.train, "--eval_file", self.dev, "--labelled", "40"]
        self.sft_flags = "--epochs 30 --batch_size 8 --learning_rate 1e-2 --dropout 0.1 --show 0".split() + ANSWER
        self.rm_flags = "--epochs 12 --patience 99 --learning_rate 1e-2 --dropout 0".split() + ANSWER
        self.ppo_flags = "--steps 2 --rollout_prompts 8 --eval_rows 8".split() + ANSWER

    def build(self):
        self.task.write_text('name: toy\nlabels: [good, bad]\nprompt: "{text}"\n')
        write_rows(self.train, TRAIN_ROWS)
        write_rows(self.dev, DEV_ROWS)
        run(
            tiny.main, *self.data[:-2], "--output_dir", self.base,
            "--epochs", 20, "--batch_size", 16, "--learning_rate", 1e-2,
            "--hidden_size", 48, "--heads", 2, "--layers", 2, "--vocabulary", 400, "--context", 64,
        )  # fmt: skip
        rationale_flags = ["--pairs", "rationale", "--output_dir", self.rationale_rm]
        self.outputs = {
            "sft": run(train_sft.main, *self.data, *self.sft_flags, "--model", self.base, "--output_dir", self.sft),
            "rm-label": run(train_rm.main, "--policy", self.sft, *self.rm_flags, "--output_dir", self.label_rm),
            "rm-rationale": run(train_rm.main, "--policy", self.sft, *self.rm_flags, *rationale_flags),
        }
        return self

    def ppo(self, directory, *flags, policy=None, steps=2):
        """A PPO run into `directory`; returns what it printed. Later flags override earlier ones."""
        flags = [*self.ppo_flags, "--steps", steps, *flags, "--output_dir", directory]
        return run(train_ppo.main, "--policy", policy or self.sft, *flags)


@functools.cache
def toy_runs():
    """The one `Toy` of this process, built at the first call and removed at its end."""
    root = tempfile.mkdtemp(prefix="rllr-toy-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with torch.random.fork_rng():
        return Toy(root).build()
