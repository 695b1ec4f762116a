"""Stage 2: a reward model from preference pairs.

    python train_rm.py --pairs label                 # label-sensitive: RLLR's reward
    python train_rm.py --pairs rationale             # rationale-sensitive: classic RLHF's reward
    python train_rm.py --pairs my_pairs.jsonl        # {prompt, chosen, rejected, kind} per line

Starts from the SFT policy with a new scalar head and learns by Bradley-Terry which of two answers is preferred.
Held-out pairs stop it. At the end its scores on answers sampled by the policy are measured and stored: PPO reads
scores in these units. Writes runs/<task>/rm-label (or rm-rationale): a model directory that also loads as a sequence
classifier.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from tqdm import tqdm

from rllr.common.config import check_divisible, flag
from rllr.common.errors import InputError, brief, command
from rllr.common.files import RECORD, disk_faults, write_json
from rllr.common.log import say
from rllr.data.encoding import Encoder
from rllr.data.rows import load_pairs
from rllr.data.splits import DataConfig, load_splits
from rllr.judge import STATISTICS, ScoreStatistics, score_rows
from rllr.layout import micro_batches, pack, shuffled_batches
from rllr.model.dropout import set_dropout
from rllr.model.heads import RewardModel, reward_pad_token_id
from rllr.model.loading import fingerprint, load_policy, load_tokenizer
from rllr.model.recompute import checkpoint_layers
from rllr.model.roles import LoRAConfig, RolePolicy, check_lora, load_base, load_scalar_role, lora_rate_factor, new_role
from rllr.model.trial import check_policy
from rllr.pairs import (
    LABEL_PAIRS,
    Pair,
    describe,
    label_sensitive_pairs,
    on_policy_pairs,
    rationale_sensitive_pairs,
    split_by_prompt,
    write_pairs,
)
from rllr.rationales.factory import RationaleConfig, check_writer, default_label_pairs, default_writer, make_writer
from rllr.reports.reward_report import (
    classifier_report,
    pair_report,
    preview_report,
    sample_answers,
    sample_rows,
    save_statistics,
    show_pairs,
)
from rllr.rewards import pairwise_accuracy, pairwise_loss
from rllr.run.optimizer import Optimizer, gradient_step
from rllr.run.run import Run, digest, input_fingerprints, is_tiny
from rllr.run.settings import PolicyConfig, SupervisedConfig

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


@dataclass
class Config(SupervisedConfig, PolicyConfig, RationaleConfig, LoRAConfig, DataConfig):
    GROUP = "reward model"
    pairs: str = flag("label", "label, rationale, or a JSONL file of pairs")
    label_pairs: str | None = flag(
        None,
        "on_policy (the default), or written pairs alone: independent, paper or drawn (docs/label-pairs.md)",
        choices=LABEL_PAIRS,
    )
    negatives: str = flag("one", "one wrong label per pair, drawn uniformly, or all of them", choices=("one", "all"))
    pairs_per_row: int = flag(4, "written pairs of each row (label pairs; drawings that coincide count once)", above=0)
    samples_per_row: int = flag(8, "answers that the policy samples for each row, for on-policy pairs", above=0)
    loss: str = flag(
        "eos",
        "eos: score at the last response token; span: mean from the first token that differs",
        choices=("eos", "span"),
    )
    margin: float = flag(0.0, "by which the chosen answer must win, in raw score", at_least=0)
    center_coef: float = flag(0.01, "weight of mean((chosen + rejected)^2), which settles the zero", at_least=0)
    epochs: int = flag(3, "passes over the pairs, at most", above=0)
    patience: int = flag(2, "checks without a better held-out accuracy before stopping", above=0)
    checks_per_epoch: int = flag(2, "evaluations on the held-out pairs", above=0)
    batch_size: int = flag(32, "pairs per optimiser step", above=0)
    eval_batch_size: int = flag(128, "prompts decoded, or rows scored, together", above=0)
    learning_rate: float | None = flag(
        None, "AdamW peak (tiny 5e-4, any other model 5e-6; adapters 1.5e-3, 5e-5)", above=0
    )
    temperature: float = flag(1.0, "of the sampled answers: PPO's", above=0)
    preview_rows: int = flag(400, "dev rows of PPO's preview, at most", above=0)
    preview_samples: int = flag(16, "answers that the preview samples for each of them", above=0)
    statistics_prompts: int = flag(1024, "sampled answers behind the stored statistics (at least 512)", above=0)

    def validate(self):
        super().validate()
        check_divisible(self, "batch_size", "micro_batch_size")
        check_lora(self)

    @property
    def kind(self):
        """What the pairs are: label, rationale or file."""
        return self.pairs if self.pairs in ("label", "rationale") else "file"

    def default_directory(self, task):
        return f"runs/{task.name}/rm-{self.kind}"

    def protected_paths(self):
        return [self.policy, self.task, self.train_file, self.eval_file, self.rationale_model, self.pairs]

    def resolve(self, task, record):
        tiny = is_tiny(self, record)
        self.rationales = self.rationales or record.get("config", {}).get("rationales")
        self.learning_rate = self.learning_rate or (5e-4 if tiny else 5e-6) * lora_rate_factor(self, tiny)
        self.dropout = (0.2 if tiny else 0.0) if self.dropout is None else self.dropout


# ---- the pairs -------------------------------------------------------------------------------------------------------


def draw_pairs(config, examples, task, writer, seed):
    """The written pairs of some rows: label-sensitive ones `pairs_per_row` times over, without repetitions."""
    if config.pairs == "rationale":
        return rationale_sensitive_pairs(examples, task, writer, seed=seed, log=say)
    on_policy = config.label_pairs == "on_policy"
    rationales = default_label_pairs(config.rationales) if on_policy else config.label_pairs
    options = {"rationales": rationales, "negatives": config.negatives, "log": say}
    drawn = {}
    for copy in range(config.pairs_per_row):
        drawn |= dict.fromkeys(label_sensitive_pairs(examples, task, writer, seed=seed + copy, **options))
    return list(drawn)


def sample_pairs(run, models, parts, writer):
    """On-policy pairs of each part, {"labelled", "held out": rows}: of --samples_per_row answers that the policy
    samples."""
    config, task, found, right = run.config, run.task, [], {}
    for part, rows in parts.items():
        answers = sample_rows(models.policy, models.encoder, task, rows, f"pairs/{part}/{config.seed}", config)
        found.append(on_policy_pairs(rows, task, writer, answers, seed=config.seed))
        labels = [(row.label, answer.label) for row in rows for answer in answers[row.id]]
        right[part] = sum(gold == label for gold, label in labels) / len(labels)
    say(
        f"sampled by the policy: {100 * right['labelled']:.1f} % right on the labelled rows, "
        f"{100 * right['held out']:.1f} % on rows held out"
    )
    if right["labelled"] - right["held out"] > LEARNT_BY_HEART:
        say(
            "warning: the policy has learnt its labelled rows by heart: its samples there are hardly ever wrong, and "
            "make "
            "few on-policy pairs. Train SFT for fewer epochs, or use more labelled rows"
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
    if run.resumed and all((run.directory / name).is_file() for name in PAIR_FILES):  # sampled once, then kept
        kept = ([Pair(**pair) for pair in load_pairs(str(run.directory / name), say)] for name in PAIR_FILES)
        return *kept, writer
    train_pairs = draw_pairs(config, labelled, task, writer, config.seed)
    held_pairs = draw_pairs(config, held_out, task, writer, 10_000 + config.seed)
    if config.kind == "label" and config.label_pairs == "on_policy":
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


# ---- the loss --------------------------------------------------------------------------------------------------------


def pack_both(rows, encoder, device):
    """`Packed` chosen answers [N], then the rejected ones [N]."""
    both = [(row.prompt_ids, row.chosen_ids) for row in rows] + [(row.prompt_ids, row.rejected_ids) for row in rows]
    return pack(both, encoder.pad_id, device)


def rm_loss(model, rows, pair_count, encoder, config):
    """Sum of the pairs' Bradley-Terry losses / the whole batch's pair_count: any split gives the same gradient."""
    packed = pack_both(rows, encoder, model.device)
    if config.loss == "eos":
        chosen, rejected = model(*packed).chunk(2)
        return pairwise_loss(chosen, rejected, config.margin, config.center_coef, reduction="none").sum() / pair_count
    # The reference's span loss: every position from the first token that differs; here without the padding.
    chosen, rejected = model.span_scores(*packed).chunk(2)
    losses = 0.0
    for i, (_, a, b, _) in enumerate(rows):
        first = next((t for t, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        span = slice(min(first, len(a) - 1, len(b) - 1), min(len(a), len(b)))
        losses = losses + pairwise_loss(chosen[i, span], rejected[i, span], config.margin, config.center_coef)
    return losses / pair_count


def score_pairs(model, rows, encoder, config):
    """Raw scores (chosen [N], rejected [N]) of encoded pairs."""
    return score_rows(model, pack_both(rows, encoder, model.device), config.eval_batch_size).chunk(2)


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """The policy that is asked for answers, and the model that learns to judge them; on one base with --lora_rank."""

    policy: Any
    model: RewardModel
    base: Any  # None where each is a model of its own
    encoder: Encoder
    fingerprint: str  # of the policy's weights

    def best(self, directory):
        """The reward model as it was saved last: the best one."""
        if self.base is not None:
            return load_scalar_role(RewardModel, self.base, directory, "best")
        return RewardModel.from_pretrained(directory, device=self.policy.device)


def load_models(run) -> Models:
    """The policy twice, once as the start of the reward model; or once, with an adapter that becomes it."""
    config = run.config
    if config.lora_rank:
        base, found = load_base(config.policy, config, run.device)
        start, policy = new_role(base, "reward", config, config.seed), RolePolicy(base, None)
    else:
        policy, start = (load_policy(config.policy, device=run.device) for _ in range(2))
        base, found = None, fingerprint(policy)
    encoder = Encoder(load_tokenizer(config.policy), policy, run.clock)
    return Models(policy, RewardModel.from_policy(start, seed=config.seed), base, encoder, found)


def check_held_out(run, models, held_rows, loop):
    """Score the held-out pairs. Save the best model so far; stop after --patience checks without a better one."""
    model, config = models.model, run.config
    model.eval()
    chosen, rejected = score_pairs(model, held_rows, models.encoder, config)
    loss, accuracy = pairwise_loss(chosen, rejected).item(), pairwise_accuracy(chosen, rejected).item()
    run.metrics.write(
        {"step": loop.step, "eval/loss": loss, "eval/accuracy": accuracy},
        f"step {loop.step}/{run.record['steps']}  loss {loop.loss:.3f}  held-out loss {loss:.3f}  "
        f"accuracy {100 * accuracy:.1f} %",
    )
    # By accuracy, then loss: a model that is surer of itself may order better at a higher loss, and PPO reads the
    # order.
    result = [accuracy, -loss]
    loop.since_best = 0 if loop.best is None or result > loop.best else loop.since_best + 1
    if loop.since_best == 0:
        loop.best = result
        for stale in (RECORD, STATISTICS):  # they describe weights that are replaced now
            (run.directory / stale).unlink(missing_ok=True)
        tokenizer, encoder = models.encoder.tokenizer, models.encoder
        pad_id = reward_pad_token_id(tokenizer, encoder.stop_ids, model.config.vocab_size)
        model.save_pretrained(run.directory, tokenizer, pad_id)
    loop.stopped = loop.since_best >= config.patience


def report(run, models, held, writer, sampled, parts):
    """What the best model is worth: by kind of pair, as a classifier, on sampled answers. Saved beside it."""
    config, directory = run.config, run.directory
    model, (held_rows, held_pairs) = models.best(directory), held
    chosen, rejected = score_pairs(model, held_rows, models.encoder, config)
    show_pairs(held_pairs, chosen, rejected)
    found = {"pairs": pair_report(held_pairs, chosen, rejected)}
    if config.kind != "rationale":
        found["classifier"] = classifier_report(model, models, run.task, parts, writer, config)
    statistics = ScoreStatistics.of(
        score_rows(model, sampled.packed, config.eval_batch_size),
        truncated=sampled.truncated,
        temperature=config.temperature,
        policy_fingerprint=models.fingerprint,
    )
    with disk_faults(str(directory / STATISTICS)):
        save_statistics(statistics, directory)
    say(
        f"scores on {statistics.count} answers sampled by the policy: mean {statistics.mean:.3f}, "
        f"standard deviation {statistics.std:.3f}"
    )
    if config.kind != "rationale":
        found["preview"] = preview_report(model, models, run.task, parts["eval"], statistics, config)
    base = {"base": {"path": config.policy, "fingerprint": models.fingerprint}} if config.lora_rank else {}
    more = {"report": found, "policy_fingerprint": models.fingerprint} | base
    with disk_faults(str(directory / RECORD)):
        write_json(directory / RECORD, run.model_record(directory, stage=f"rm-{config.kind}", **more))
    return {f"final/{name}": value for name, value in found["pairs"]["all"].items() if not isinstance(value, list)}


@command
def main(argv=None):
    run = Run.open("rm", Config, argv, __doc__)
    config, task = run.config, run.task

    splits = load_splits(config, task, say, run.start_record, run.resumed)
    models = load_models(run)
    policy, model, encoder = models.policy, models.model, models.encoder
    labelled, held_out, unlabelled, dev = (
        encoder.fit(rows, task, config.max_new_tokens, say)
        for rows in (splits.labelled, splits.held_out, splits.unlabelled, splits.eval)
    )
    check_policy(
        policy, encoder, task, labelled + unlabelled,
        max_new_tokens=config.max_new_tokens, name=config.policy, log=say, alike=[model],
    )  # fmt: skip

    # Label-sensitive pairs: what makes the score, and so the reward, follow the label.
    train_pairs, held_pairs, writer = make_pairs(run, models, labelled, held_out)
    train_rows, train_pairs = encode_pairs(train_pairs, encoder, config.max_new_tokens)
    held_rows, held_pairs = encode_pairs(held_pairs, encoder, config.max_new_tokens)
    say(f"train: {describe(train_pairs)}\nheld out: {describe(held_pairs)}")
    what = "--pairs" if config.kind == "file" else "the encoded pairs"
    reads = {"--policy": models.fingerprint, what: digest(train_rows, held_rows)}
    run.start(input_fingerprints(task, splits) | reads, encoder.clock, splits.digests())
    if config.kind != "file":
        save_pairs(run.directory, train_pairs, held_pairs)
    sampled = sample_answers(policy, encoder, task, unlabelled or held_out, config)

    batches_per_epoch = math.ceil(len(train_rows) / config.batch_size)
    steps = config.epochs * batches_per_epoch
    check_every = max(1, batches_per_epoch // config.checks_per_epoch)
    optimizer = Optimizer(
        model, config.learning_rate, steps,
        warmup=config.warmup, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    set_dropout(model if models.base is None else models.base, config.dropout)
    if config.gradient_checkpointing:
        checkpoint_layers(model.backbone)

    # Where the loop stands: `batch` batches of `epoch` are done; `best` (accuracy, -loss) is in the run's directory.
    loop = SimpleNamespace(step=0, epoch=0, batch=0, loss=0.0, best=None, since_best=0, stopped=False)
    run.track(steps, loop, model=model, **optimizer.parts())
    with run:
        with tqdm(total=steps, initial=loop.step, desc="rm", mininterval=2, disable=None) as progress:
            while loop.epoch < config.epochs and not loop.stopped:
                for batch in shuffled_batches(train_rows, config.batch_size, config.seed, loop.epoch)[loop.batch :]:
                    model.train()
                    learning_rate = optimizer.learning_rate
                    with run.step(loop.step + 1):
                        lengths = [row.length for row in batch]
                        loop.loss, grad_norm = gradient_step(
                            optimizer,
                            micro_batches(batch, lengths, config.micro_batch_size, config.tokens_per_batch),
                            lambda rows: rm_loss(model, rows, len(batch), encoder, config),  # noqa: B023
                            "the reward model's loss",
                            lambda rows: [row.name for row in rows],
                        )
                    loop.step, loop.batch = loop.step + 1, loop.batch + 1
                    progress.update()
                    run.log_step(loop, {"loss": loop.loss, "grad_norm": grad_norm, "lr": learning_rate})
                    if loop.step % check_every == 0 or loop.step == steps:
                        check_held_out(run, models, held_rows, loop)
                    run.checkpoint(loop.step, last=loop.step == steps or loop.stopped)
                    if loop.stopped:
                        break
                loop.epoch, loop.batch = loop.epoch + 1, 0
        if loop.stopped:
            say(f"stopped at step {loop.step}: {config.patience} checks without a better held-out accuracy")
        parts = {"held_out": held_out, "eval": dev}
        final = report(run, models, (held_rows, held_pairs), writer, sampled, parts)
        run.metrics.write({"step": loop.step, **final})
        say(f"saved {run.directory}")


if __name__ == "__main__":
    main()
