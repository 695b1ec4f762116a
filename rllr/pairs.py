"""Preference pairs, from which a reward model becomes sensitive to the label (RLLR) or to the rationale (RLHF).

    label-sensitive       gold label + a rationale   beats   wrong label + a rationale        (section 3.2 of the paper)
    on-policy             the policy's own right answer  beats  its own wrong one            (label-sensitive, too)
    rationale-sensitive   gold label + a better one  beats   gold label + a worse one
    grounded              the policy's own right answer that quotes its text  beats  its own right one that invents

In the paper, each side of a label pair has its own best rationale. If rationales name evidence words, the reward model
then learns to measure how strong these words are, and PPO answers every text with the strongest words. So, for evidence
words, nine label pairs in ten draw their rationales without knowing which label is right. Then only the label, compared
with the text, tells the sides apart. docs/reward-hacking.md has the measurements.
"""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from .common.errors import InputError
from .common.files import write_lines
from .tasks import split_answer, whole_words, word_found

LABEL_PAIRS = ("on_policy", "independent", "paper", "drawn")  # on_policy: written pairs and the policy's own samples
CONCLUSION = re.compile(r"\bsuggests? $")  # before a label that a writer of ours names, spelled as the task spells it
DRAWN_SHARE = 0.5  # with "drawn": label pairs with a random basis on the wrong side; the others are as in the paper
INDEPENDENT_SHARE = 0.9  # with "independent": label pairs with random bases; the others are as in the paper
SAME_RATIONALE_SHARE = 0.5  # independent pairs in which both sides have the same basis
FLIPPED_WHOLE_SHARE = 0.5  # flipped pairs whose rejected rationale argues for the wrong label, too
SAMPLED_SHARE = 0.7  # on-policy pairs whose right side is a sample, too; the others have the written gold answer
GROUNDED_GAP = 0.5  # by which the share of words that stand in the text differs between a grounded pair's sides
OTHER_TEXT_SHARE = 0.5  # rationale-sensitive pairs whose worse rationale is from another text


@dataclass(frozen=True)
class Pair:
    """A preference pair. `prompt` is without chat template; the answers are texts without an end token."""

    prompt: str
    chosen: str
    rejected: str
    kind: str


def label_sensitive_pairs(examples, task, writer, *, rationales="independent", negatives="one", seed=0, log=print):
    """Pairs. Chosen: the gold label with a rationale; rejected: a wrong label with a rationale for it.

    writer: an `rllr.rationales.writers.RationaleWriter`. rationales: "independent" (see above), "paper" (each side has
    the writer's own rationale for its label) or "drawn" (half as in the paper; in the other half the wrong side has any
    rationale, perhaps of another text, as a policy that ignores the text writes it). negatives: "one" wrong label,
    chosen uniformly, or "all" of them. Kinds of pairs: label/paper, label/independent, label/drawn.

    The pairs of a row depend only on the seed and the row. Pairs with identical sides are dropped and counted.
    InputError for a row without a label.
    """
    if rationales not in LABEL_PAIRS[1:] or negatives not in ("one", "all"):
        choices = f"choose {', '.join(LABEL_PAIRS[1:])}; negatives {negatives!r}: one or all"
        raise InputError(f"--label_pairs {rationales!r}: {choices}")
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


def on_policy_pairs(examples, task, writer, answers, *, seed=0):
    """Pairs of what the policy itself writes, which is what PPO will ask the reward model about.

    answers: {row id: [`rllr.answers.Answer`]}, several sampled by the policy for each row. Each distinct one with a
    wrong label is rejected against a sample with the gold label or, without one and in some other cases, against the
    written gold answer, if its row has a rationale (kind label/on_policy). One right sample of each row is preferred to
    itself with a wrong label (label/flipped); in half of these the rationale is `relabelled`, too, since one that
    contradicts its label is seen to be wrong without a look at the text. Samples without a readable label, and those
    that the length limit cut, make no pair. The pairs of a row depend only on the seed, the row and its samples; a row
    whose samples are all right gives one pair, and none at all is no error.
    """
    pairs = []
    for example in examples:
        rng, gold = random.Random(f"on_policy/{seed}/{example.id}"), _label(example)
        whole = _whole(answers[example.id])
        right = [text for text, label in whole.items() if label == gold]
        wrong = [text for text, label in whole.items() if label != gold]
        prompt, written = task.prompt_of(example), _written(example, task, writer)
        for rejected in wrong:
            sampled = right and (rng.random() < SAMPLED_SHARE or not written)
            if sampled or written:
                chosen = rng.choice(right) if sampled else written
                pairs.append(Pair(prompt, chosen, rejected, "label/on_policy"))
        if right:
            chosen, label = rng.choice(right), rng.choice(task.wrong_labels(gold))
            rationale = split_answer(task, chosen)[0]
            if rng.random() < FLIPPED_WHOLE_SHARE:
                rationale = relabelled(rationale, gold, label, f"{example.text}\n{example.text_b or ''}")
            pairs.append(Pair(prompt, chosen, task.render_answer(label, rationale), "label/flipped"))
    return pairs


def relabelled(rationale, old, new, text=""):
    """The rationale with two labels exchanged wherever it names one, as a whole word of any case. Unchanged where it
    names neither.

    Its last mention concludes. Others may be no mention of a label: numbers may count something, and a word that stands
    in the text, too, may be quoted from it. Those stay, or the rationale would quote what the text does not say.
    """
    named = whole_words((old, new))
    last = max((match.start() for match in named.finditer(rationale)), default=0)
    numbers = not any(character.isalpha() for character in old + new)
    quoted = [word for word in (old, new) if whole_words([word]).search(text)]

    def exchanged(match):
        found = word_found(match[0], (old, new))
        if match.start() < last and (numbers or found in quoted):
            return match[0]
        word = new if found == old else old
        if "_" not in match[0] and not CONCLUSION.search(rationale[: match.start()]):
            word = word.replace("_", " ")  # as a sentence names it, so that both sides of a pair read alike
        if match[0] in (old, new):
            return word  # else it begins a sentence, or the task writes its labels in another case
        return word[:1].upper() + word[1:] if match[0][:1].isupper() else word.lower()

    return named.sub(exchanged, rationale)


def grounded_pairs(examples, task, writer, answers, grounded, *, seed=0):
    """Rationale-sensitive pairs of what the policy itself writes: the label is right on both sides, and the words of
    the chosen rationale stand in the text, where those of the rejected one do not (kind rationale/grounded).

    answers: as in `on_policy_pairs`. grounded: `rllr.grounding.grounded`, the share of a rationale's words that stand
    in the text; where it is None the rationale names nothing, which counts as 0, lest naming nothing be a way out. Each
    distinct right sample is rejected against a better right sample or, without one and in some other cases, against the
    written gold answer, if its row has a rationale. A better one has a share that is at least GROUNDED_GAP higher;
    where neither is better, the sample makes no pair. Left out are the samples that `on_policy_pairs` leaves out. The
    pairs of a row depend only on the seed, the row and its samples, and none at all is no error.
    """
    pairs = []
    for example in examples:
        rng, gold = random.Random(f"grounded/{seed}/{example.id}"), _label(example)
        written = _written(example, task, writer)
        right = [text for text, label in _whole(answers[example.id]).items() if label == gold]
        shares = {text: grounded(task, example, text) or 0.0 for text in [*right, *([written] if written else [])]}
        for rejected in right:
            wanted = shares[rejected] + GROUNDED_GAP
            better = [text for text in right if shares[text] >= wanted]
            if written and shares[written] >= wanted and not (better and rng.random() < SAMPLED_SHARE):
                better = [written]
            if better:
                pairs.append(Pair(task.prompt_of(example), rng.choice(better), rejected, "rationale/grounded"))
    return pairs


def rationale_sensitive_pairs(examples, task, writer, *, seed=0, log=print):
    """Pairs with the gold label on both sides. Chosen: the writer's rationale for it; rejected: a worse one.

    The worse rationale has the basis of another text (half of the pairs, kind rationale/other_text) or the basis for a
    wrong label (the other half, rationale/wrong_evidence), phrased for the gold label. The choice of the other text
    depends on all rows and their order. Otherwise as `label_sensitive_pairs`.
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


def _written(example, task, writer):
    """The written gold answer; None for a row without a rationale."""
    gold = _label(example)
    return task.render_answer(gold, writer.write(example, gold)) if writer.can_write(example) else None


def _whole(answers):
    """{text: label} of the distinct answers that end by themselves and carry a readable label."""
    return {answer.text: answer.label for answer in answers if answer.label and not answer.truncated}


def _label(example):
    if example.label is None:
        raise InputError(f"row {example.name}: has no label, so no preference pair can be made of it")
    return example.label


def _refuse_identical(pairs, log):
    """Drop pairs with identical sides: they teach nothing (loss log 2, no gradient). InputError if none is left."""
    kept = [pair for pair in pairs if pair.chosen.strip() != pair.rejected.strip()]
    if len(kept) < len(pairs):
        first = next(pair for pair in pairs if pair.chosen.strip() == pair.rejected.strip())
        log(f"{len(pairs) - len(kept)} of {len(pairs)} pairs refused: both sides are the same, e.g. {first.chosen!r}")
    if not kept:
        raise InputError("no preference pair is left: every chosen answer equals its rejected one")
    return kept


def write_pairs(path, pairs):
    """Pairs as JSONL with the fields prompt, chosen, rejected, kind; `train_rm.py --pairs FILE` reads them back."""
    write_lines(path, map(asdict, pairs))


def read_pairs(path):
    """The very pairs that `write_pairs` wrote: what a policy samples may hold characters that no data file may.

    InputError for anything else; `data.rows.load_pairs` reads the pairs of a user's file.
    """
    try:
        return [Pair(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError, RecursionError):
        raise InputError(f"{path}: not the pairs that this run wrote; restore the file, or start again") from None


def split_by_prompt(pairs, share=0.1):
    """(train, held out) pairs: a hash chooses a share of the prompts, and all pairs of these prompts are held out."""

    def digest(prompt):
        return hashlib.sha256(prompt.encode("utf-8", "replace")).digest()

    prompts = sorted({pair.prompt for pair in pairs}, key=digest)
    if len(prompts) < 2:
        raise InputError(f"--pairs: {len(pairs)} pairs over {len(prompts)} prompt: give at least two, one to hold out")
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return [pair for pair in pairs if pair.prompt not in held], [pair for pair in pairs if pair.prompt in held]


def describe(pairs):
    """'1800 pairs: 1620 label/independent, 180 label/paper'."""
    kinds = Counter(pair.kind for pair in pairs)
    return f"{len(pairs)} pairs: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
