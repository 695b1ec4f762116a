"""Rationales written by a local language model, with a cache on disk. The paper used a large language model."""

import dataclasses
import hashlib
import json
from pathlib import Path

from ..answers import texts_of, write_answers
from ..common.errors import InputError
from ..model.trial import check_policy
from .writers import GivenWriter


class ModelWriter(GivenWriter):
    """Rationales by a local causal LM that gets the text and a label, right or wrong, as in the paper.

    Our own rollouts write them. They are cached in a JSONL file, so an interrupted run continues where it stopped.
    """

    INSTRUCTION = (
        "{question}\n\nThe answer is {label}. In one sentence, name what in the text supports that answer. "
        "Do not write anything else."
    )

    def __init__(self, examples, task, model, encoder, cache_file, *, max_new_tokens=64, batch_size=16, log=print):
        question = encoder.prompt_ids(self.INSTRUCTION.format(question="", label=max(task.labels, key=len)))
        fitted = encoder.fit(examples, task, max_new_tokens + len(question), log)
        if fitted:
            check_policy(model, encoder, task, fitted, max_new_tokens=max_new_tokens, name="--rationale_model")
        wanted = [(example, label) for example in fitted for label in task.labels]
        digests = {(example.id, label): self._digest(example, label, task, model) for example, label in wanted}
        cached = read_cache(cache_file)
        written = {key: cached[key][0] for key, digest in digests.items() if key in cached and cached[key][1] == digest}
        missing = [(example, label) for example, label in wanted if (example.id, label) not in written]
        if missing:
            log(f"writing {len(missing)} rationales ({len(wanted) - len(missing)} are in {cache_file})")
        Path(cache_file).parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(cache_file)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            texts = self._ask(batch, task, model, encoder, max_new_tokens)
            with open(cache_file, "a", encoding="utf-8") as file:
                for (example, label), text in zip(batch, texts):
                    written[example.id, label] = text
                    row = {"id": example.id, "label": label, "rationale": text, "asked": digests[example.id, label]}
                    file.write(json.dumps(row) + "\n")
        filled = [
            dataclasses.replace(
                example,
                rationales={label: written[example.id, label] for label in task.labels},
                rationale=written.get((example.id, example.label)),
            )
            for example in examples
        ]
        self.by_id = {example.id: example for example in filled}
        super().__init__(filled, task)

    def _prompt(self, example, label, task):
        return self.INSTRUCTION.format(question=task.render_prompt(example.text, example.text_b), label=label)

    def _digest(self, example, label, task, model):
        """A digest of the prompt and the model's name. If either changes, the cached rationale is not used."""
        asked = f"{model.config.name_or_path}\n{self._prompt(example, label, task)}"
        return hashlib.sha256(asked.encode("utf-8", "replace")).hexdigest()[:16]

    def _ask(self, batch, task, model, encoder, max_new_tokens):
        prompts = [encoder.prompt_ids(self._prompt(example, label, task)) for example, label in batch]
        rollout = write_answers(model, encoder, prompts, max_new_tokens=max_new_tokens, batch_size=len(prompts))
        # A rationale of one line cannot add a second label line to the answer.
        return [" ".join(text.split()) or "no reason given" for text in texts_of(rollout, encoder)]

    def _find(self, example, label):
        return super()._find(self.by_id.get(example.id, example), label)

    def argues_for_all(self, example):
        return example.id in self.by_id


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
