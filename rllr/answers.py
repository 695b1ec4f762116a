"""What a policy answers: greedy or sampled, as text, with the label read from it."""

import hashlib
from dataclasses import dataclass

import torch

from .rollout import Rollout, generate
from .tasks import parse_answer


@dataclass(frozen=True)
class Answer:
    """What a model answered: text, the label read from it (None: parse failure), whether the limit cut it."""

    text: str
    label: str | None
    truncated: bool


def write_answers(
    model, encoder, prompts, *, max_new_tokens, batch_size, temperature=None, generator=None, answers_per_prompt=1
) -> Rollout:
    """Answers to prompts (lists of ids): sampled at a temperature, or, without one, greedy. Several to a prompt are
    neighbours in the rollout."""
    return generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_token_id=encoder.stop_ids,
        pad_token_id=encoder.pad_id,
        temperature=temperature or 1.0,
        greedy=temperature is None,
        generator=generator,
        batch_size=batch_size,
        answers_per_prompt=answers_per_prompt,
    )


def read_answers(rollout, encoder, task) -> list[Answer]:
    """The answers of a rollout as text, each with its label."""
    answers = zip(texts_of(rollout, encoder), rollout.truncated.tolist())
    return [Answer(text, parse_answer(task, text), cut) for text, cut in answers]


def texts_of(rollout, encoder) -> list[str]:
    """The answers of a rollout as text."""
    return [encoder.decode(response) for response in rollout.responses()]


def named_generator(name) -> torch.Generator:
    """A random stream of its own for what the name says, e.g. "preview/0"."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))


def answer_rows(model, encoder, task, examples, *, max_new_tokens, batch_size=64) -> list[Answer]:
    """The model's greedy answers, in the order of the examples."""
    prompts = encoder.prompts(task, examples)
    rollout = write_answers(model, encoder, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return read_answers(rollout, encoder, task)
