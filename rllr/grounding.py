"""Whether a rationale speaks of its text: do the words that it quotes stand there? `grounded` says it of one answer.

The two forms that quote are read back where they are written: `data.demo.quote_of`, `rationales.writers.evidence_of`.
It is words that are looked up, not their order nor their meaning: a grounded rationale may still argue badly.
"""

import torch

from .data.demo import RATIONALE_LINK, RATIONALE_START, quote_of
from .rationales.words import words_of
from .rationales.writers import evidence_of
from .tasks import LABEL_PREFIX, Example, Task, same_word, split_answer

# English words that say nothing about a text. Negations are none of them. In other languages every word counts.
FUNCTION_WORDS = frozenset(
    "a about also am an and are as at be because been being both but by can could did do does for from had has have he "
    "her his how i if in into is it its it's me more my of on or our she so some such than that that's the their them "
    "then there these they this those to too was we were what when where which while who why will with would you "
    "your".split()
)

KINDS = (("right", True), ("wrong", False))  # of answers


def grounded(task: Task, example: Example, answer: str) -> float | None:
    """The share of a rationale that stands in the row's text or texts; None where there is nothing to look up.

    A rationale in a form that quotes has 1 if all quoted words stand where it says, else 0. Any other has the share of
    its content words, those that are neither function words nor words of a label.
    """
    rationale = _rationale_of(task, answer)
    first, second = _words(example.text), _words(example.text_b or "")
    places = {"has": first | second, "both": first & second, "first": first - second, "second": second - first}
    evidence = evidence_of(rationale)
    if evidence is not None:
        kind, named = evidence
        return float(all(_stands(word, places[kind]) for word in named)) if named else None
    if rationale.startswith(RATIONALE_START) and RATIONALE_LINK in rationale:
        quoted = _words(quote_of(rationale).removeprefix("that "))
        return float(quoted <= places["has"]) if quoted else None
    content = _words(rationale) - FUNCTION_WORDS - _words("\n".join(task.labels))
    return len(content & places["has"]) / len(content) if content else None


class GroundedReward:
    """reward_fn of a rule where a rationale reward model may stand: the share of a rationale that stands in its text.

    0 as well for a rationale that names nothing, and for an answer without a label: silence is no way out.
    """

    def __init__(self, task):
        self.task = task

    def __call__(self, samples):
        answers = zip(samples.examples, samples.answers, samples.labels, strict=True)
        shares = [label and grounded(self.task, example, answer) or 0.0 for example, answer, label in answers]
        return torch.tensor(shares, dtype=torch.float32, device=samples.sequences.device)


def known_means(groups: dict) -> dict[str, float]:
    """{name: mean of those values that are not None}, without the names that have no such value."""
    known = {name: [value for value in values if value is not None] for name, values in groups.items()}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def means_by_right(name, shares, right) -> dict[str, float]:
    """The means of `grounded` shares: {name: of all, name_right, name_wrong: of those answers}, as `known_means`."""
    apart = {kind: [s for s, r in zip(shares, right, strict=True) if r == is_right] for kind, is_right in KINDS}
    return known_means({name: shares} | {f"{name}_{kind}": values for kind, values in apart.items()})


def _rationale_of(task, answer):
    """What stands before the label line, also before one that cannot be read, was cut ("Lab") or is written twice."""
    rationale, _ = split_answer(task, answer)
    *before, last = rationale.split("\n")
    start = last.strip()[: len(LABEL_PREFIX)].casefold()
    return "\n".join(before).strip() if LABEL_PREFIX.casefold().startswith(start) else rationale


def _words(text):
    """The words of a text, as they are compared: whole, in any case and any Unicode form."""
    return {same_word(word) for word in words_of(text)}


def _stands(word, words):
    """Whether a quoted word is among the words of a text. It may come in quotation marks."""
    inside = _words(word)
    return same_word(word) in words or bool(inside) and inside <= words
