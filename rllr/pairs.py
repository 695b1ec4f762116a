"""Preference pairs: where a reward model learns to be sensitive to the label (RLLR) or to the rationale (RLHF).

    label-sensitive       gold label + a rationale   beats   wrong label + a rationale        (section 3.2 of the paper)
    rationale-sensitive   gold label + a better one  beats   gold label + a worse one

The paper writes each side its own best rationale. With rationales that name evidence, that teaches the reward model to
measure how strong the words are, and PPO answers every text with the strongest words of the language. So by default nine
label pairs in ten draw their rationales without regard to which label is right; then only the label can tell the sides
apart, and the text must be read. docs/label-pairs.md has the figures.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass

from .common.errors import InputError

LABEL_PAIRS = ("independent", "paper", "drawn")
DRAWN_SHARE = 0.5  # of the label pairs under "drawn": the wrong label's rationale is any; the rest are as in the paper
INDEPENDENT_SHARE = 0.9  # of the label pairs under "independent"; the rest are as in the paper
SAME_RATIONALE_SHARE = 0.5  # of the independent pairs: both sides rest on the same basis
OTHER_TEXT_SHARE = 0.5  # of the worse rationales in rationale-sensitive pairs: taken from another text


@dataclass(frozen=True)
class Pair:
    """A preference. `prompt` is the unrendered prompt (no chat template), the answers are text without an end token."""

    prompt: str
    chosen: str
    rejected: str
    kind: str


def label_sensitive_pairs(examples, task, writer, *, rationales="independent", negatives="one", seed=0, log=print):
    """Chosen: the gold label with a rationale; rejected: a wrong label with a rationale for it.

    writer: an `rllr.rationales.writers.RationaleWriter`. rationales: "independent" (the module's docstring), "paper" (each side
    the writer's own rationale for its label) or "drawn" (half as in the paper, half with any rationale, also one of
    another text, on the wrong label's side: a policy that has lost the text writes such). negatives: "one" wrong label,
    uniform among them, or "all" of them. Kinds: label/paper, label/independent, label/drawn. A row's pairs depend on the
    seed and the row alone. Identical sides are refused and counted. Raises InputError for a row without a label.
    """
    if rationales not in LABEL_PAIRS or negatives not in ("one", "all"):
        raise InputError(
            f"--label_pairs {rationales!r}: choose {', '.join(LABEL_PAIRS)}; negatives {negatives!r}: one or all"
        )
    pairs = []
    for example in examples:
        rng = random.Random(f"label/{seed}/{example.id}")
        wrong = task.wrong_labels(_label(example))
        for label in wrong if negatives == "all" else [rng.choice(wrong)]:
            if rationales == "drawn" and rng.random() < DRAWN_SHARE:
                kind = "label/drawn"
                chosen_basis, rejected_basis = writer.basis(example, example.label), writer.draw(example, rng)
            elif rationales == "independent" and rng.random() < INDEPENDENT_SHARE:
                kind, chosen_basis = "label/independent", writer.draw(example, rng)
                same = rng.random() < SAME_RATIONALE_SHARE
                rejected_basis = chosen_basis if same else writer.draw(example, rng)
            else:
                kind = "label/paper"
                chosen_basis, rejected_basis = writer.basis(example, example.label), writer.basis(example, label)
            chosen = task.render_answer(example.label, writer.phrase(chosen_basis, example.label))
            rejected = task.render_answer(label, writer.phrase(rejected_basis, label))
            pairs.append(Pair(task.render_prompt(example.text, example.text_b), chosen, rejected, kind))
    return _refuse_identical(pairs, log)


def rationale_sensitive_pairs(examples, task, writer, *, seed=0, log=print):
    """The gold label on both sides; chosen: the writer's rationale for it, rejected: a worse one.

    Half of the worse ones come from another text (kind rationale/other_text), half rest on what speaks for a wrong label
    of the same text (rationale/wrong_evidence), all worded for the gold label. Which other text it is depends on the rows
    given and their order. Otherwise as `label_sensitive_pairs`.
    """
    if len(examples) < 2:
        raise InputError(f"rationale-sensitive pairs need at least two rows, got {len(examples)}")
    pairs = []
    for example in examples:
        rng = random.Random(f"rationale/{seed}/{example.id}")
        better = writer.basis(example, _label(example))
        worse, kind = writer.basis(example, rng.choice(task.wrong_labels(example.label))), "rationale/wrong_evidence"
        if rng.random() < OTHER_TEXT_SHARE or worse == better:
            other = examples[rng.randrange(len(examples))]
            while other is example:
                other = examples[rng.randrange(len(examples))]
            worse, kind = writer.basis(other, _label(other)), "rationale/other_text"
        chosen, rejected = (
            task.render_answer(example.label, writer.phrase(basis, example.label)) for basis in (better, worse)
        )
        pairs.append(Pair(task.render_prompt(example.text, example.text_b), chosen, rejected, kind))
    return _refuse_identical(pairs, log)


def _label(example):
    if example.label is None:
        raise InputError(f"row {example.name}: has no label, so no preference pair can be made of it")
    return example.label


def _refuse_identical(pairs, log):
    """Identical sides teach nothing (loss log 2, no gradient) and hide how many pairs there really are."""
    kept = [pair for pair in pairs if pair.chosen.strip() != pair.rejected.strip()]
    if len(kept) < len(pairs):
        first = next(pair for pair in pairs if pair.chosen.strip() == pair.rejected.strip())
        log(f"{len(pairs) - len(kept)} of {len(pairs)} pairs refused: both sides are the same, e.g. {first.chosen!r}")
    if not kept:
        raise InputError("no preference pair is left: every chosen answer equals its rejected one")
    return kept


def write_pairs(path, pairs):
    """Pairs as JSONL with the fields prompt, chosen, rejected, kind; `train_rm.py --pairs FILE` reads them back."""
    with open(path, "w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")


def split_by_prompt(pairs, share=0.1):
    """(train, held out) pairs of a file: a share of the prompts, chosen by a hash, is held out with all its pairs."""
    prompts = sorted(
        {pair.prompt for pair in pairs}, key=lambda p: hashlib.sha256(p.encode("utf-8", "replace")).digest()
    )
    if len(prompts) < 2:
        raise InputError(f"--pairs: {len(pairs)} pairs over {len(prompts)} prompt: give at least two, one to hold out")
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return [pair for pair in pairs if pair.prompt not in held], [pair for pair in pairs if pair.prompt in held]


def describe(pairs):
    """'1800 pairs: 1620 label/independent, 180 label/paper'."""
    kinds = Counter(pair.kind for pair in pairs)
    return f"{len(pairs)} pairs: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
