"""What a run says: `metrics.jsonl`, lines on the console, seconds per phase."""

import dataclasses
import json
import math
import os
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from . import ranks
from .files import METRICS, disk_faults


def say(line):
    """A line on stdout that does not tear the progress bar. Of several ranks the first alone prints."""
    if not ranks.is_first():
        return
    tqdm.write(str(line), file=sys.stdout)


def progress(iterable=None, **options):
    """A progress bar, where a person looks on; of several ranks the first alone has one."""
    return tqdm(iterable, mininterval=2, disable=None if ranks.is_first() else True, **options)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a step. A resumed run goes on in it: no step twice, no torn line.

    trackers: None, or what else is told of every line (`run.trackers.Trackers`).
    """

    def __init__(self, directory):
        self.path, self.start, self.trackers = Path(directory) / METRICS, time.monotonic(), None
        self.file = open(self.path if ranks.is_first() else os.devnull, "a", encoding="utf-8")

    def write(self, metrics, line=None):
        metrics = {name: _plain(value) for name, value in metrics.items()}
        metrics.setdefault("seconds", round(time.monotonic() - self.start, 3))
        with disk_faults(str(self.path)):
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        if self.trackers:
            self.trackers.write(metrics)
        if line:
            say(line)

    def state_dict(self):
        return {"bytes": self.file.tell(), "seconds": time.monotonic() - self.start}

    def load_state_dict(self, state):
        if not ranks.is_first():
            return
        written = self.path.stat().st_size
        if not isinstance(state["bytes"], int) or state["bytes"] < 0:
            raise ValueError(f"bytes is {state['bytes']!r:.20}")
        if written < state["bytes"]:
            say(f"warning: {self.path} is shorter than it was at the checkpoint; lines are missing")
        self.file.truncate(self._end_of_line(min(written, state["bytes"])))
        self.file.seek(0, os.SEEK_END)
        self.start = time.monotonic() - state["seconds"]

    def _end_of_line(self, place):
        """The end of the last whole line up to a place in the file."""
        with open(self.path, "rb") as file:
            return file.read(place).rfind(b"\n") + 1

    def sync(self):
        if not ranks.is_first():
            return
        with disk_faults(str(self.path)):
            os.fsync(self.file.fileno())

    def close(self):
        with suppress(OSError):  # of a full disk, which `write` has told of
            self.file.close()
        if self.trackers:  # last: they may wait for a network
            self.trackers.close()


def _plain(value):
    """A number JSON can hold: tensors become floats, what is not finite becomes null."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Clock:
    """Seconds per named phase: `with clock("rollout"): ...`, then `clock.take()`."""

    def __init__(self):
        self.spent = {}

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        self.started = time.monotonic()

    def __exit__(self, *exception):
        self.spent[self.name] = self.spent.get(self.name, 0.0) + time.monotonic() - self.started

    def take(self):
        spent, self.spent = self.spent, {}
        return {f"time/{name}": round(seconds, 4) for name, seconds in spent.items()}


def show_config(config, title):
    """The settings that differ from their defaults, wrapped; all of them are in the run's record."""
    fields = dataclasses.fields(config)
    changed = [
        f"{field.name}={getattr(config, field.name)}"
        for field in fields
        if getattr(config, field.name) != field.default
    ]
    say(
        textwrap.fill(
            f"{title}: {', '.join(changed)}",
            120,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
