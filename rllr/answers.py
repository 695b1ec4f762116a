"""What a policy answers: greedy or sampled, as text, with the label read from it."""

from contextlib import nullcontext
from dataclasses import dataclass

from .rollout import generate
from .tasks import parse_answer


@dataclass(frozen=True)
class Answer:
    """What a model answered: the text, the label read from it (None: parse failure), whether the length limit cut it."""

    text: str
    label: str | None
    truncated: bool


def answer_rows(model, encoder, task, examples, max_new_tokens, batch_size=64, autocast=nullcontext) -> list[Answer]:
    """The model's greedy answers, in the order of the examples."""
    prompts = [encoder.prompt_ids(task.render_prompt(example.text, example.text_b)) for example in examples]
    with autocast():
        rollout = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=encoder.stop_ids,
            greedy=True,
            batch_size=batch_size,
        )
    texts = [encoder.decode(response) for response in rollout.responses()]
    return [Answer(text, parse_answer(task, text), cut) for text, cut in zip(texts, rollout.truncated.tolist())]
