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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rllr.answers import answer_rows
from rllr.common import ranks
from rllr.common.config import check_divisible, flag
from rllr.common.errors import InputError, brief, command
from rllr.common.files import RECORD, ROWS, disk_faults, write_json
from rllr.common.log import progress, say
from rllr.cross_fit import sft_recipe
from rllr.data.encoding import Encoder
from rllr.data.met_rows import joined_hashes, recorded_hashes
from rllr.data.splits import DataConfig, load_splits
from rllr.judge import STATISTICS, ScoreStatistics, score_rows
from rllr.layout import pack, shuffled_batches
from rllr.model.dropout import set_dropout
from rllr.model.heads import RewardModel, reward_pad_token_id
from rllr.model.loading import fingerprint, load_policy, load_tokenizer
from rllr.model.recompute import checkpoint_layers
from rllr.model.records import check_same_task, policy_directory, read_record
from rllr.model.roles import LoRAConfig, RolePolicy, check_lora, load_base, load_scalar_role, new_role
from rllr.model.shards import loading_device, shard
from rllr.model.trial import check_policy
from rllr.pairs import LABEL_PAIRS, describe
from rllr.rationales.factory import RationaleConfig
from rllr.report.reward_report import (
    PREVIEW_ROWS,
    PREVIEW_SAMPLES,
    classifier_report,
    pair_report,
    preview_report,
    sample_answers,
    save_statistics,
    show_pairs,
)
from rllr.rewards import pairwise_accuracy, pairwise_loss
from rllr.rm_pairs import encode_pairs, make_pairs, save_pairs
from rllr.run.optimizer import Optimizer, gradient_step, own_micro_batches
from rllr.run.rates import settle_rates
from rllr.run.run import Run, digest, input_fingerprints, is_tiny
from rllr.run.settings import PolicyConfig, SupervisedConfig


@dataclass
class Config(SupervisedConfig, PolicyConfig, RationaleConfig, LoRAConfig, DataConfig):
    GROUP = "reward model"
    SECTION = "rm"
    pairs: str = flag("label", "label, rationale, or a JSONL file of pairs")
    label_pairs: str | None = flag(
        None,
        "on_policy (the default), or written pairs alone: independent, paper or drawn (docs/reward-hacking.md)",
        choices=LABEL_PAIRS,
    )
    grounded_pairs: bool | None = flag(
        None,
        "add pairs of right samples: a rationale that stands in its text beats one that does not "
        "(--pairs rationale yes, label no)",
    )
    negatives: str = flag("one", "one wrong label per pair, drawn uniformly, or all of them", choices=("one", "all"))
    pairs_per_row: int = flag(4, "written pairs of each row (label pairs; drawings that coincide count once)", above=0)
    samples_per_row: int = flag(
        8, "answers that the policy samples for each row, for on-policy and grounded pairs", above=0
    )
    cross_fit: str = flag(
        "auto",
        "whether policies that never saw a labelled row answer it, for pairs of samples: auto, where the policy knows "
        "its rows by heart; always; never",
        choices=("auto", "always", "never"),
    )
    folds: int = flag(2, "parts of the labelled rows, each answered by a policy fine-tuned on the others", above=1)
    sampler: str | None = flag(
        None, "a further policy that answers every row for pairs of samples, such as a former PPO run's best"
    )
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
        None, "AdamW peak (by size, docs/models.md: tiny 5e-4, 135 M 4.9e-5; adapters 1.5e-3, 4.9e-4)", above=0
    )
    temperature: float = flag(1.0, "of the sampled answers: PPO's", above=0)
    preview_rows: int = flag(PREVIEW_ROWS, "dev rows of PPO's preview, at most", above=0)
    preview_samples: int = flag(PREVIEW_SAMPLES, "answers that the preview samples for each of them", above=0)
    statistics_prompts: int = flag(1024, "sampled answers behind the stored statistics (at least 512)", above=0)

    def validate(self):
        super().validate()
        check_divisible(self, "batch_size", "micro_batch_size")
        check_lora(self)
        if self.grounded_pairs and self.kind == "file":
            raise InputError(f"--grounded_pairs adds pairs to --pairs label or rationale, not to {brief(self.pairs)}")

    @property
    def kind(self):
        """What the pairs are: label, rationale or file."""
        return self.pairs if self.pairs in ("label", "rationale") else "file"

    @property
    def samples_labels(self):
        """Whether label pairs are made of what the policy samples."""
        return self.kind == "label" and self.label_pairs == "on_policy"

    def default_directory(self, task):
        return f"runs/{task.name}/rm-{self.kind}"

    def protected_paths(self):
        data = [self.task, self.train_file, self.eval_file, self.test_file]
        return [self.policy, *data, self.rationale_model, self.pairs, self.sampler]

    def resolve(self, task, record):
        tiny = is_tiny(self, record)
        if self.rationales is None:  # the policy's writer, asked where SFT asked it
            config = record.get("config", {})
            self.rationales = config.get("rationales")
            self.endpoint_url = self.endpoint_url or config.get("endpoint_url")
            self.endpoint_model = self.endpoint_model or config.get("endpoint_model")
        if self.grounded_pairs and task.answer_format == "label":
            raise InputError("--grounded_pairs: the answers are labels alone, without a rationale; leave it out")
        if self.kind == "rationale" and task.answer_format == "label":
            raise InputError("--pairs rationale: the answers are labels alone, without a rationale; use --pairs label")
        self.grounded_pairs = self.kind == "rationale" if self.grounded_pairs is None else self.grounded_pairs
        samples = self.grounded_pairs or self.kind == "label" and self.label_pairs in (None, "on_policy")
        for name, default in (("sampler", None), ("cross_fit", "auto")):
            if getattr(self, name) not in (default, "never") and not samples:
                raise InputError(f"--{name} {getattr(self, name)}: is for pairs of samples, and this run makes none")
        if self.cross_fit == "always":
            sft_recipe(self.policy, record)
        if self.sampler:
            self.sampler = policy_directory(self.sampler, say)
            if not Path(self.sampler).is_dir():
                raise InputError(f"--sampler {self.sampler}: no such directory; give a policy's, or a PPO run's")
            check_same_task(read_record(self.sampler), task, f"--sampler {self.sampler}")
        self.dropout = (0.2 if tiny else 0.0) if self.dropout is None else self.dropout


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

    def best(self, directory, config):
        """The reward model as it was saved last: the best one."""
        ranks.wait()  # for the one that has saved it
        if self.base is not None:
            return load_scalar_role(RewardModel, self.base, directory, "best")
        device = loading_device(config, self.policy.device)
        return shard(RewardModel.from_pretrained(directory, device=device), config)


def load_models(run) -> Models:
    """The policy twice, once as the start of the reward model; or once, with an adapter that becomes it."""
    config = run.config
    if config.lora_rank:
        base, found = load_base(config.policy, config, run.device)
        start, policy = new_role(base, "reward", config, config.seed), RolePolicy(base, None)
    else:
        device = loading_device(config, run.device)
        policy = load_policy(config.policy, device=device)
        base, found, policy = None, fingerprint(policy), shard(policy, config)
        start = load_policy(config.policy, device=device)
    encoder = Encoder(load_tokenizer(config.policy), policy, run.clock)
    model = RewardModel.from_policy(start, seed=config.seed)
    return Models(policy, model if config.lora_rank else shard(model, config), base, encoder, found)


def save_rows(run, splits):
    """Beside the model, as hashes, the rows that it and its policy have met: none of them is new to both."""
    with disk_faults(str(run.directory / ROWS)):
        write_json(run.directory / ROWS, joined_hashes(recorded_hashes(run.config.policy), splits.text_hashes()))


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
        for stale in (RECORD, STATISTICS) if ranks.is_first() else ():  # they describe weights that are replaced now
            (run.directory / stale).unlink(missing_ok=True)
        tokenizer, encoder = models.encoder.tokenizer, models.encoder
        pad_id = reward_pad_token_id(tokenizer, encoder.stop_ids, model.config.vocab_size)
        model.save_pretrained(run.directory, tokenizer, pad_id)
    loop.stopped = loop.since_best >= config.patience


def report(run, models, held, writer, sampled, parts):
    """What the best model is worth: by kind of pair, as a classifier, on sampled answers. Saved beside it."""
    config, directory = run.config, run.directory
    model, (held_rows, held_pairs) = models.best(directory, config), held
    chosen, rejected = score_pairs(model, held_rows, models.encoder, config)
    show_pairs(held_pairs, chosen, rejected)
    found = {"pairs": pair_report(held_pairs, chosen, rejected)}
    if config.kind != "rationale":
        policy, encoder, limits = models.policy, models.encoder, config.answer_limits
        answered = {
            part: (rows, answer_rows(policy, encoder, run.task, rows, **limits)) for part, rows in parts.items()
        }
        found["classifier"] = classifier_report(model, models, run.task, answered, writer, config)
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
        found["preview"] = preview_report(
            model, models, run.task, answered["eval"], statistics, config,
            most=config.preview_rows, count=config.preview_samples,
        )  # fmt: skip
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
    settle_rates(run, learning_rate=("reward", model))
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
    save_rows(run, splits)
    if config.kind != "file":
        save_pairs(run.directory, train_pairs, held_pairs)
    more = held_out if splits.few_unlabelled else []
    sampled = sample_answers(policy, encoder, task, unlabelled + more, config)

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
        with progress(total=steps, initial=loop.step, desc="rm") as bar:
            while loop.epoch < config.epochs and not loop.stopped:
                for batch in shuffled_batches(train_rows, config.batch_size, config.seed, loop.epoch)[loop.batch :]:
                    model.train()
                    learning_rate = optimizer.learning_rate
                    with run.step(loop.step + 1):
                        loop.loss, grad_norm = gradient_step(
                            optimizer,
                            own_micro_batches(batch, config),
                            lambda rows: rm_loss(model, rows, len(batch), encoder, config),
                            "the reward model's loss",
                            lambda rows: [row.name for row in rows],
                        )
                    loop.step, loop.batch = loop.step + 1, loop.batch + 1
                    bar.update()
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
