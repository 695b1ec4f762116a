"""The pairs of a reward model's run: written by the rationale writer, sampled by the policy, encoded, and kept.

`rllr.pairs` says what a pair is; here is which ones a run of `train_rm.py` makes, from which rows, and as which ids.
"""

from typing import NamedTuple

from .common.errors import InputError, brief
from .common.files import disk_faults
from .common.log import say
from .data.rows import load_pairs
from .grounding import grounded, known_means
from .pairs import (
    Pair,
    grounded_pairs,
    label_sensitive_pairs,
    on_policy_pairs,
    rationale_sensitive_pairs,
    read_pairs,
    split_by_prompt,
    write_pairs,
)
from .rationales.factory import check_writer, default_label_pairs, default_writer, make_writer
from .reports.reward_report import sample_rows

PAIR_FILES = ("pairs.jsonl", "pairs_held_out.jsonl")  # in the run's directory
LEARNT_BY_HEART = 0.2  # samples right on labelled rows minus those on held-out rows, above which a warning is due


class PairRow(NamedTuple):
    """An encoded pair: prompt and chosen answer first, as `layout.shuffled_batches` wants it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    name: str  # the prompt's beginning, for messages

    @property
    def length(self):
        """Padded tokens of both sides together."""
        return 2 * (len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)))


def draw_pairs(config, examples, task, writer, seed):
    """The written pairs of some rows: label-sensitive ones `pairs_per_row` times over, without repetitions."""
    if config.pairs == "rationale":
        return rationale_sensitive_pairs(examples, task, writer, seed=seed, log=say)
    on_policy = config.label_pairs == "on_policy"
    rationales = default_label_pairs(config.rationales) if on_policy else config.label_pairs
    options = {"rationales": rationales, "negatives": config.negatives, "log": say}
    drawn: dict[Pair, None] = {}  # in order, without repetitions
    for copy in range(config.pairs_per_row):
        drawn |= dict.fromkeys(label_sensitive_pairs(examples, task, writer, seed=seed + copy, **options))
    return list(drawn)


def sample_pairs(run, models, parts, writer):
    """On-policy pairs of each part, {"labelled", "held out": rows}, from --samples_per_row sampled answers a row."""
    config, task, found, right = run.config, run.task, [], {}
    stands: dict[str, list[float | None]] = {}  # part -> how grounded its right samples are
    for part, rows in parts.items():
        answers = sample_rows(models.policy, models.encoder, task, rows, f"pairs/{part}/{config.seed}", config)
        pairs = on_policy_pairs(rows, task, writer, answers, seed=config.seed) if config.samples_labels else []
        if config.grounded_pairs:
            stands[part] = [grounded(task, r, a.text) for r in rows for a in answers[r.id] if a.label == r.label]
            pairs += grounded_pairs(rows, task, writer, answers, grounded, seed=config.seed)
        found.append(pairs)
        labels = [(row.label, answer.label) for row in rows for answer in answers[row.id]]
        right[part] = sum(gold == label for gold, label in labels) / len(labels)
    say(
        f"sampled by the policy: {100 * right['labelled']:.1f} % right on the labelled rows, "
        f"{100 * right['held out']:.1f} % on rows held out"
    )
    for part, share in known_means(stands).items():
        say(f"grounded: {100 * share:.1f} % of the right samples on the rows that are {part}")
    if right["labelled"] - right["held out"] > LEARNT_BY_HEART:
        say(
            "warning: the policy has learnt its labelled rows by heart: its samples there are hardly ever wrong, and "
            "make few on-policy pairs. Train SFT for fewer epochs, or use more labelled rows"
        )
    return found


def make_pairs(run, models, labelled, held_out):
    """(pairs to train on, held-out pairs, the rationale writer): drawn from the rows, or read from --pairs FILE."""
    config, task = run.config, run.task
    writer = config.rationales or default_writer(task, labelled)
    run.settle(rationales=writer, label_pairs=config.label_pairs or "on_policy")
    if config.kind == "file":
        return *split_by_prompt([Pair(**pair) for pair in load_pairs(config.pairs, say)]), None
    check_writer(config.rationales, labelled + held_out, task, config.rationale_model)
    options = {"config": config, "device": run.device, "directory": run.directory.parent, "also": held_out}
    writer = make_writer(config.rationales, labelled, task, log=say, **options)
    sampled = config.samples_labels or config.grounded_pairs
    if sampled and run.resumed and all((run.directory / name).is_file() for name in PAIR_FILES):
        train_pairs, held_pairs = (read_pairs(run.directory / name) for name in PAIR_FILES)  # sampled once, then kept
        return train_pairs, held_pairs, writer
    train_pairs = draw_pairs(config, labelled, task, writer, config.seed)
    held_pairs = draw_pairs(config, held_out, task, writer, 10_000 + config.seed)
    if sampled:
        parts = {"labelled": labelled, "held out": held_out}
        ours, theirs = sample_pairs(run, models, parts, writer)
        train_pairs, held_pairs = train_pairs + ours, held_pairs + theirs
    return train_pairs, held_pairs, writer


def encode_pairs(pairs, encoder, max_new_tokens):
    """([`PairRow`], the pairs kept). Pairs longer than the context are dropped, counted and named; answers longer than
    PPO will let any be are told of. InputError where no pair fits."""
    rows, kept, dropped, longest = [], [], [], []
    for pair in pairs:
        row = PairRow(
            encoder.prompt_ids(pair.prompt),
            encoder.answer_ids(pair.chosen),
            encoder.answer_ids(pair.rejected),
            brief(pair.prompt),
        )
        if row.length > 2 * encoder.context:
            dropped.append(pair)
        else:
            rows.append(row)
            kept.append(pair)
            longest.append(max(len(row.chosen_ids), len(row.rejected_ids)))
    beyond = [length for length in longest if length > max_new_tokens]
    if beyond:
        say(
            f"warning: {len(beyond)} of {len(pairs)} pairs have an answer longer than "
            f"--max_new_tokens {max_new_tokens}, up to {max(beyond)} tokens: PPO would cut such "
            "answers; raise it in every stage, or shorten the rationales"
        )
    if dropped:
        example = f"e.g. {dropped[0].prompt[:60]!r}"
        say(f"{len(dropped)} of {len(pairs)} pairs are longer than the context and dropped, {example}")
    if not rows:
        raise InputError(f"no pair fits the model's context of {encoder.context} tokens")
    return rows, kept


def save_pairs(directory, train_pairs, held_pairs):
    """The pairs beside the model, as --pairs FILE would read them."""
    for name, pairs in zip(PAIR_FILES, (train_pairs, held_pairs)):
        with disk_faults(str(directory / name)):
            write_pairs(directory / name, pairs)
