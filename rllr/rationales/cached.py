"""Rationales that a language model writes, kept in a JSONL file as they come: a broken run goes on where it stopped."""

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

from ..common import ranks
from ..common.errors import InputError
from ..common.files import disk_faults
from .writers import GivenWriter

CACHE = "rationales.jsonl"  # beside a task's runs


class CachedWriter(GivenWriter):
    """Rationales for every label, right or wrong, of somebody who gets the text and the label, as in the paper (Liao et
    al. 2024), where that was a large language model.

    A line of the cache is {"id", "label", "rationale", "asked"}: asked is a digest of the prompt and of who was asked,
    and if either changes, the rationale is not used. Its `rationale` may be null: nothing that can be used was written.
    """

    ranks_share = True  # whether several ranks write together; else the first writes alone

    INSTRUCTION = (
        "{question}\n\nThe answer is {label}. In one sentence, name what in the text supports that answer. "
        "Do not write anything else."
    )

    def __init__(self, examples, task, cache_file, *, asked=None, source="", log=print):
        """examples: the rows. asked: the rows as the model gets them, where they were cut. source: who is asked."""
        self.task = task
        wanted = [(example, label) for example in (examples if asked is None else asked) for label in task.labels]
        digests = {(example.id, label): digest_of(source, self.prompt(example, label)) for example, label in wanted}
        cached = read_cache(cache_file)
        written = {key: cached[key][0] for key, digest in digests.items() if key in cached and cached[key][1] == digest}
        missing = [(example, label) for example, label in wanted if (example.id, label) not in written]
        if missing:
            log(f"writing {len(missing)} rationales ({len(wanted) - len(missing)} are in {cache_file})")
        Path(cache_file).parent.mkdir(parents=True, exist_ok=True)
        ranks.wait()  # until all have read the cache
        if ranks.is_first():
            drop_torn_line(cache_file)

        def write():
            found = {}
            for example, label, text, more in self.write_missing(missing) if missing else ():
                found[example.id, label] = text
                row = {"id": example.id, "label": label, "rationale": text, "asked": digests[example.id, label]}
                if ranks.is_first():
                    with disk_faults(str(cache_file)), open(cache_file, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row | more) + "\n")
            return found

        written |= write() if self.ranks_share else ranks.from_first(write)
        filled = [
            dataclasses.replace(
                example,
                rationales={label: written[example.id, label] for label in task.labels if written[example.id, label]},
                rationale=written.get((example.id, example.label)),
            )
            for example in examples
        ]
        self.by_id = {example.id: example for example in filled}
        super().__init__(filled, task)

    @abstractmethod
    def write_missing(self, missing) -> Iterable[tuple]:
        """(row, label, rationale or None, further fields of its line in the cache) of each (row, label), in any
        order, as they are written."""

    def prompt(self, example, label):
        """What is asked for: the reason for a label, right or wrong."""
        return self.INSTRUCTION.format(question=self.task.prompt_of(example), label=label)

    def _find(self, example, label):
        return super()._find(self.by_id.get(example.id, example), label)

    def argues_for_all(self, example):
        own = self.by_id.get(example.id)
        return own is not None and len(own.rationales) == len(self.task.labels)


def one_line(text):
    """A text on one line: so it cannot add a second label line to an answer."""
    return " ".join(text.split())


def digest_of(source, prompt):
    return hashlib.sha256(f"{source}\n{prompt}".encode("utf-8", "replace")).hexdigest()[:16]


def read_cache(cache_file):
    """{(id, label): (rationale, digest of the prompt)} of a cache; {} if there is none. InputError names the line."""
    written = {}
    try:
        with open(cache_file, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # the run was killed while it wrote this line
                    break
                try:
                    row = json.loads(line)
                    written[row["id"], row["label"]] = row["rationale"], row.get("asked")
                except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: not JSON, or not UTF-8
                    problem = "not a cached rationale; delete the line or the file"
                    raise InputError(f"{cache_file}:{number}: {problem}") from None
    except FileNotFoundError:
        pass
    return written


def drop_torn_line(cache_file):
    """Remove what follows a file's last line end: half a line that a killed run has left."""
    try:
        with open(cache_file, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    except FileNotFoundError:
        pass
