"""The pairs of a reward model's run: written by the rationale writer, sampled by the policy, encoded, and kept.

`rllr.pairs` says what a pair is; here is which ones a run of `train_rm.py` makes, from which rows, and as which ids.
"""

from typing import NamedTuple

from .common.errors import InputError, brief
from .common.files import disk_faults
from .common.log import say
from .cross_fit import cross_fitted_answers, sft_recipe, share_right
from .data.rows import load_pairs
from .grounding import grounded, known_means
from .model.loading import check_same_tokenizer, load_policy, load_tokenizer
from .model.shards import loading_device, shard
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
from .report.reward_report import sample_rows

PAIR_FILES = ("pairs.jsonl", "pairs_held_out.jsonl")  # in the run's directory
FEW_TOO_LONG = 0.005  # of the pairs; a sampled rationale with another label than its own may be a token too long
LEARNT_BY_HEART = 0.5  # of wrong samples on held-out rows, below which those on labelled rows are too few


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
    """The written pairs of the rows that have a rationale: label-sensitive ones `pairs_per_row` times over, without
    repetitions. None at all is no error where pairs of samples come beside them."""
    examples = [example for example in examples if writer.can_write(example)]
    if config.pairs == "rationale":
        return rationale_sensitive_pairs(examples, task, writer, seed=seed, log=say)
    on_policy = config.label_pairs == "on_policy"
    if not examples:
        if on_policy:
            return []
        raise InputError(
            f"--label_pairs {config.label_pairs}: written pairs need rationales, and the rows to train on or those "
            "held out have none; give more, or leave this flag out (on_policy)"
        )
    rationales = default_label_pairs(config.rationales) if on_policy else config.label_pairs
    options = {"rationales": rationales, "negatives": config.negatives, "log": say}
    drawn: dict[Pair, None] = {}  # in order, without repetitions
    for copy in range(config.pairs_per_row):
        drawn |= dict.fromkeys(label_sensitive_pairs(examples, task, writer, seed=seed + copy, **options))
    return list(drawn)


def sample_pairs(run, models, parts, writer):
    """On-policy pairs of each part, {"labelled", "held out": rows}, from --samples_per_row sampled answers a row."""
    config, task = run.config, run.task

    def ask(policy, rows, name):
        return sample_rows(policy, models.encoder, task, rows, f"pairs/{name}/{config.seed}", config)

    answers = {part: ask(models.policy, rows, part) for part, rows in parts.items()}
    right = {part: share_right(rows, answers[part]) for part, rows in parts.items()}
    say(
        f"sampled by the policy: {100 * right['labelled']:.1f} % right on the labelled rows, "
        f"{100 * right['held out']:.1f} % on rows held out"
    )
    if is_cross_fit_due(config, run.start_record, right):
        answers["labelled"] = cross_fitted_answers(run, models.encoder, parts["labelled"], writer, ask)
    if config.sampler:
        sampler = shard(load_policy(config.sampler, device=loading_device(config, run.device)), config)
        check_same_tokenizer(load_tokenizer(config.sampler), models.encoder.tokenizer, f"--sampler {config.sampler}")
        for part, rows in parts.items():
            found = ask(sampler, rows, f"sampler {part}")
            say(f"sampled by --sampler: {100 * share_right(rows, found):.1f} % right, {part}")
            answers[part] = {row.id: answers[part][row.id] + found[row.id] for row in rows}
    return [pairs_of_samples(config, task, part, rows, writer, answers[part]) for part, rows in parts.items()]


def pairs_of_samples(config, task, part, rows, writer, answers):
    """The pairs that sampled answers, {row id: answers}, make: for the label, for the rationale, or for both."""
    pairs = on_policy_pairs(rows, task, writer, answers, seed=config.seed) if config.samples_labels else []
    if config.grounded_pairs:
        stands = [
            grounded(task, row, answer.text) for row in rows for answer in answers[row.id] if answer.label == row.label
        ]
        for share in known_means({part: stands}).values():
            say(f"grounded: {100 * share:.1f} % of the right samples on the rows that are {part}")
        pairs += grounded_pairs(rows, task, writer, answers, grounded, seed=config.seed)
    return pairs


def is_cross_fit_due(config, record, right):
    """Whether the labelled rows are to be answered by other policies than the one that learnt them.

    record: of the policy. right: {"labelled", "held out": share of its samples that are right}. Says so where they
    should be and cannot be, or must not.
    """
    if config.cross_fit == "always":
        return True
    if 1 - right["labelled"] >= LEARNT_BY_HEART * (1 - right["held out"]):
        return False
    by_heart = "the policy knows its labelled rows by heart"
    try:
        remedy = "leave out --cross_fit never"
        is_due = config.cross_fit == "auto" and bool(sft_recipe(config.policy, record))
    except InputError as error:
        remedy, is_due = f"no cross-fitting: {error}", False
    if is_due:
        say(f"{by_heart}: other policies answer them, each fine-tuned without them")
    else:
        say(f"warning: {by_heart}, and makes few on-policy pairs there; {remedy}")
    return is_due


def tell_other_prompts(pairs, task, path):
    """Warn where a file's prompts are not the task's: PPO's answers are scored after those."""
    others = [pair.prompt for pair in pairs if not task.is_prompt(pair.prompt)]
    if others:
        say(
            f"warning: {path}: {len(others)} of {len(pairs)} prompts are not of the task's form {brief(task.prompt)}, "
            f"such as {brief(others[0])}; PPO asks in the task's form, so the scores may not carry over"
        )


def make_pairs(run, models, labelled, held_out):
    """(pairs to train on, held-out pairs, the rationale writer): drawn from the rows, or read from --pairs FILE."""
    config, task = run.config, run.task
    if config.kind == "file":
        pairs = [Pair(**pair) for pair in load_pairs(config.pairs, say)]
        tell_other_prompts(pairs, task, config.pairs)
        return *split_by_prompt(pairs), None
    writer = config.rationales or default_writer(task, labelled)
    run.settle(rationales=writer, label_pairs=config.label_pairs or "on_policy")
    check_writer(config, labelled, task)
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
    PPO will let any be are told of where they are more than a few. InputError where no pair fits."""
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
    if len(beyond) > FEW_TOO_LONG * len(pairs):
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
