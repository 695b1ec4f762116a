"""Stage 2: a reward model from preference pairs.

    python train_rm.py --pairs label                 # label-sensitive: RLLR's reward
    python train_rm.py --pairs rationale             # rationale-sensitive: classic RLHF's reward
    python train_rm.py --pairs my_pairs.jsonl        # {prompt, chosen, rejected, kind} per line

Starts from the SFT policy with a new scalar head and learns by Bradley-Terry which of two answers is preferred. Held-out
pairs stop it. At the end its scores on answers sampled by the policy are measured and stored: PPO reads scores in these
units. Writes runs/<task>/rm-label (or rm-rationale): a model directory that also loads as a sequence classifier.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from rllr.common.config import check_choice, check_divisible, check_positive, check_range, parse_config
from rllr.common.errors import InputError, brief, command
from rllr.common.files import RECORD, check_run_directory, disk_faults, write_json
from rllr.common.log import say, show_config
from rllr.data.encoding import Encoder
from rllr.data.rows import load_pairs
from rllr.data.splits import DataConfig, find_policy, load_splits, take_over
from rllr.judge import STATISTICS, ScoreStatistics, score_rows
from rllr.layout import pack, shuffled_batches, split_rows
from rllr.model.dropout import set_dropout
from rllr.model.heads import RewardModel, reward_pad_token_id
from rllr.model.loading import allow_remote_code, fingerprint, load_policy, load_tokenizer
from rllr.model.recompute import checkpoint_layers
from rllr.model.roles import LoRAConfig, RolePolicy, check_lora, load_base, load_scalar_role, new_role, rate_factor
from rllr.model.trial import check_policy
from rllr.pairs import (
    LABEL_PAIRS,
    Pair,
    describe,
    label_sensitive_pairs,
    rationale_sensitive_pairs,
    split_by_prompt,
    write_pairs,
)  # fmt: skip
from rllr.rationales.factory import WRITERS, check_writer, default_label_pairs, default_writer, make_writer
from rllr.reports.reward_report import classifier_report, pair_report, sampled_scores, save_statistics, show_pairs
from rllr.rewards import pairwise_accuracy, pairwise_loss
from rllr.run.machine import set_up
from rllr.run.optimizer import clip_gradient, make_optimizer, optimizer_step, require_finite
from rllr.run.records import make_record
from rllr.run.resume import RunConfig, take_up
from rllr.run.run import Run, digest, reads_of


@dataclass
class Config(RunConfig, LoRAConfig, DataConfig):
    policy: str | None = None  # the SFT policy's directory (runs/<task>/sft)
    pairs: str = "label"  # label, rationale, or a JSONL file of pairs
    output_dir: str | None = None  # where the reward model goes (runs/<task>/rm-<pairs>)
    rationales: str | None = None  # who writes them: given, evidence, demo, model (as the policy's)
    rationale_model: str | None = None  # the causal LM that writes them, for --rationales model
    label_pairs: str | None = (
        None  # independent, paper or drawn: see rllr/pairs.py (evidence independent, demo drawn, else paper)
    )
    negatives: str = "one"  # one wrong label per pair, drawn uniformly, or all of them
    pairs_per_row: int = 4  # pairs drawn of each row (label pairs; drawings that coincide count once)
    loss: str = "eos"  # eos: score at the last response token; span: mean from the first token that differs
    margin: float = 0.0  # by which the chosen answer must win, in raw score
    center_coef: float = 0.01  # weight of mean((chosen + rejected)^2), which settles the zero
    epochs: int = 3  # passes over the pairs, at most
    patience: int = 2  # checks without a better held-out accuracy before stopping
    checks_per_epoch: int = 2  # evaluations on the held-out pairs
    batch_size: int = 32  # pairs per optimiser step
    micro_batch_size: int = 0  # pairs per forward; 0: the whole batch. Does not change the gradient
    tokens_per_batch: int = 0  # padded tokens per forward; 0: no limit. Does not change the gradient either
    gradient_checkpointing: bool = False  # compute layers again in backward instead of keeping their activations
    learning_rate: float | None = None  # AdamW peak (tiny 5e-4, any other model 5e-6; adapters 1.5e-3, 5e-5)
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01  # not on biases and norms
    dropout: float | None = None  # while training (tiny 0.2, any other model 0)
    max_grad_norm: float = 1.0  # clipping
    max_new_tokens: int = 48  # of the sampled answers
    temperature: float = 1.0  # of the sampled answers: PPO's
    statistics_prompts: int = 1024  # sampled answers behind the stored statistics (at least 512)
    log_every: int = 20  # steps between printed lines; metrics.jsonl has every step
    eval_batch_size: int = 128  # rows per forward without gradient
    precision: str = "fp32"  # fp32, or bf16 for autocast (GPU)
    seed: int = 0  # head, order and drawing of the pairs, dropout, sampled answers

    def validate(self):
        check_positive(self, "epochs", "batch_size", "learning_rate", "max_grad_norm", "max_new_tokens", "temperature",
                       "patience", "checks_per_epoch", "pairs_per_row", "eval_batch_size", "log_every", "statistics_prompts",
                       "keep_last")  # fmt: skip
        check_positive(self, "micro_batch_size", "tokens_per_batch", "weight_decay", "margin", "center_coef", "save_every",
                       zero=True)  # fmt: skip
        check_range(self, "warmup", 0, 1)
        check_range(self, "dropout", 0, 0.9)
        check_choice(self, "loss", ("eos", "span"))
        check_choice(self, "negatives", ("one", "all"))
        check_choice(self, "label_pairs", (None, *LABEL_PAIRS))
        check_choice(self, "rationales", (None, *WRITERS))
        check_choice(self, "precision", ("fp32", "bf16"))
        check_divisible(self, "batch_size", "micro_batch_size")
        check_lora(self)


def draw_pairs(config, examples, task, writer, seed):
    """The pairs of some rows, as --pairs asks: label-sensitive ones `pairs_per_row` times over, without repetitions."""
    if config.pairs == "rationale":
        return rationale_sensitive_pairs(examples, task, writer, seed=seed, log=say)
    drawn = {}
    for copy in range(config.pairs_per_row):
        for pair in label_sensitive_pairs(
            examples, task, writer, rationales=config.label_pairs, negatives=config.negatives, seed=seed + copy, log=say
        ):
            drawn[pair] = None
    return list(drawn)


def encode_pairs(pairs, encoder, max_new_tokens):
    """[(prompt ids, chosen ids, rejected ids, the prompt's beginning)]; pairs longer than the context are dropped, counted and named, and
    answers longer than PPO will let any be are told of."""
    rows, kept, dropped, longest = [], [], [], []
    for pair in pairs:
        prompt, chosen, rejected = (
            encoder.prompt_ids(pair.prompt),
            encoder.answer_ids(pair.chosen),
            encoder.answer_ids(pair.rejected),
        )
        if len(prompt) + max(len(chosen), len(rejected)) > encoder.context:
            dropped.append(pair)
        else:
            rows.append((prompt, chosen, rejected, brief(pair.prompt)))
            kept.append(pair)
            longest.append(max(len(chosen), len(rejected)))
    beyond = [length for length in longest if length > max_new_tokens]
    if beyond:
        say(
            f"warning: {len(beyond)} of {len(pairs)} pairs have an answer longer than --max_new_tokens {max_new_tokens}, up to {max(beyond)} tokens: "
            "PPO would cut such answers; raise it in every stage, or shorten the rationales"
        )
    if dropped:
        say(
            f"{len(dropped)} of {len(pairs)} pairs are longer than the context and dropped, e.g. {dropped[0].prompt[:60]!r}"
        )
    if not rows:
        raise InputError(f"no pair fits the model's context of {encoder.context} tokens")
    return rows, kept


def rm_loss(model, rows, pair_count, encoder, config):
    """Sum of the pairs' Bradley-Terry losses / pair_count, the whole batch's, so that any split gives the same gradient."""
    both = [(row[0], row[1]) for row in rows] + [(row[0], row[2]) for row in rows]
    sequences, prompt_lens, mask = pack(both, encoder.pad_id, model.device)
    if config.loss == "eos":
        chosen, rejected = model(sequences, prompt_lens, mask).chunk(2)
        return pairwise_loss(chosen, rejected, config.margin, config.center_coef, reduction="none").sum() / pair_count
    # The reference's span loss: every position from the first token that differs; here without the padding.
    chosen, rejected = model.span_scores(sequences, prompt_lens, mask).chunk(2)
    losses = 0.0
    for i, (_, a, b, *_) in enumerate(rows):
        first = next((t for t, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        span = slice(min(first, len(a) - 1, len(b) - 1), min(len(a), len(b)))
        losses = losses + pairwise_loss(chosen[i, span], rejected[i, span], config.margin, config.center_coef)
    return losses / pair_count


@torch.no_grad()
def score_pairs(model, rows, encoder, config, autocast):
    """Raw scores (chosen [N], rejected [N]) of encoded pairs."""
    both = [(row[0], row[1]) for row in rows] + [(row[0], row[2]) for row in rows]
    return score_rows(model, *pack(both, encoder.pad_id, model.device), config.eval_batch_size, autocast).chunk(2)


def kind_of(config):
    """What the pairs are: label, rationale or file."""
    return config.pairs if config.pairs in ("label", "rationale") else "file"


def default_directory(config):
    """Where the run goes without --output_dir."""
    return f"runs/{find_policy(config)[1].name}/rm-{kind_of(config)}"


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    taken_up = take_up("rm", config, default_directory)
    config.validate()
    allow_remote_code(config.trust_remote_code)
    record, task, contradictions = take_over(config)
    for line in contradictions:
        say(f"warning: {line}: rows that evaluate here may have trained the policy")
    tiny, kind = record.get("tiny", False), kind_of(config)
    config.learning_rate = config.learning_rate or (5e-4 if tiny else 5e-6) * rate_factor(config, tiny)
    config.dropout = (0.2 if tiny else 0.0) if config.dropout is None else config.dropout
    directory = config.output_dir or f"runs/{task.name}/rm-{kind}"
    inputs = [config.policy, config.task, config.train_file, config.eval_file, config.rationale_model, config.pairs]
    if not taken_up:
        check_run_directory(directory, config.overwrite, inputs)
    device, autocast = set_up(config.precision, config.seed, config.deterministic)

    splits = load_splits(config, task, say, record, taken_up)
    if config.lora_rank:  # one base: the policy is the base itself, the reward model an adapter on it
        base, policy_fingerprint = load_base(config.policy, config, device)
        start, policy = new_role(base, "reward", config, config.seed), RolePolicy(base, None)
    else:
        policy, start = (load_policy(config.policy, device=device) for _ in range(2))
        policy_fingerprint = fingerprint(policy)
    tokenizer = load_tokenizer(config.policy)
    encoder = Encoder(tokenizer, policy, record.get("clock") or (taken_up and taken_up.recorded.get("clock")))
    labelled, held_out, unlabelled, evaluation = (
        encoder.fit(rows, task, config.max_new_tokens, say)
        for rows in (splits.labelled, splits.held_out, splits.unlabelled, splits.eval)
    )
    check_policy(policy, encoder, task, labelled + unlabelled, config.max_new_tokens, config.policy, say, alike=[start])
    config.rationales = (
        config.rationales or record.get("config", {}).get("rationales") or default_writer(task, labelled)
    )
    config.label_pairs = config.label_pairs or default_label_pairs(config.rationales)
    writer = None
    if kind == "file":
        train_pairs, held_pairs = split_by_prompt([Pair(**pair) for pair in load_pairs(config.pairs, say)])
    else:
        check_writer(config.rationales, labelled + held_out, task, config.rationale_model)
    show_config(config, "train_rm")
    if kind != "file":
        writer = make_writer(
            config.rationales,
            labelled,
            task,
            config=config,
            device=device,
            directory=Path(directory).parent,
            log=say,
            also=held_out,
        )
        train_pairs = draw_pairs(config, labelled, task, writer, config.seed)
        held_pairs = draw_pairs(config, held_out, task, writer, 10_000 + config.seed)
    train_rows, train_pairs = encode_pairs(train_pairs, encoder, config.max_new_tokens)
    held_rows, held_pairs = encode_pairs(held_pairs, encoder, config.max_new_tokens)
    say(f"train: {describe(train_pairs)}\nheld out: {describe(held_pairs)}")
    reads = reads_of(task, splits) | {"--policy": policy_fingerprint}
    reads["--pairs" if kind == "file" else "the encoded pairs"] = digest(train_rows, held_rows)
    run = Run("rm", config, directory, reads, taken_up, inputs, encoder.clock)
    directory, metrics = run.directory, run.metrics
    if kind != "file":
        with disk_faults(str(directory / "pairs.jsonl")):
            write_pairs(directory / "pairs.jsonl", train_pairs)
            write_pairs(directory / "pairs_held_out.jsonl", held_pairs)

    sampled = sampled_scores(policy, encoder, task, unlabelled or held_out, config, autocast)
    model = RewardModel.from_policy(start, seed=config.seed)
    batches_per_epoch = math.ceil(len(train_rows) / config.batch_size)
    steps = config.epochs * batches_per_epoch
    optimizer, scheduler = make_optimizer(
        model, config.learning_rate, steps, warmup_share=config.warmup, weight_decay=config.weight_decay
    )
    set_dropout(base if config.lora_rank else model, config.dropout)
    if config.gradient_checkpointing:
        checkpoint_layers(model.backbone)
    check_every = max(1, batches_per_epoch // config.checks_per_epoch)
    pad_id = reward_pad_token_id(tokenizer, encoder.stop_ids, model.config.vocab_size)

    # Where the loop stands: `batch` batches of `epoch` are done; `best` (accuracy, -loss) is in the run's directory.
    at = SimpleNamespace(step=0, epoch=0, batch=0, best=None, since_best=0, stopped=False)
    run.track(steps, at, model=model, optimizer=optimizer, scheduler=scheduler)
    with run:
        with tqdm(total=steps, initial=at.step, desc="rm", mininterval=2, disable=None) as progress:
            while at.epoch < config.epochs and not at.stopped:
                for batch in shuffled_batches(train_rows, config.batch_size, config.seed, at.epoch)[at.batch :]:
                    model.train()
                    batch_loss, learning_rate = 0.0, scheduler.get_last_lr()[0]
                    with run.step(at.step + 1):
                        lengths = [
                            2 * (len(prompt) + max(len(chosen), len(rejected))) for prompt, chosen, rejected, _ in batch
                        ]
                        for micro_batch in split_rows(batch, lengths, config.micro_batch_size, config.tokens_per_batch):
                            with autocast():
                                loss = rm_loss(model, micro_batch, len(batch), encoder, config)
                            require_finite(loss, "the reward model's loss", [row[3] for row in micro_batch])
                            loss.backward()
                            batch_loss += loss.item()
                        grad_norm = clip_gradient(model, config.max_grad_norm)
                        optimizer_step(optimizer, scheduler)
                    at.step, at.batch = at.step + 1, at.batch + 1
                    progress.update()
                    line = f"step {at.step}/{steps}  loss {batch_loss:.3f}  grad norm {grad_norm:.2f}"
                    metrics.write({"step": at.step, "epoch": at.epoch, "loss": batch_loss, "grad_norm": grad_norm, "lr": learning_rate},
                                  line if at.step % config.log_every == 0 else None)  # fmt: skip
                    if at.step % check_every == 0 or at.step == steps:
                        model.eval()
                        chosen, rejected = score_pairs(model, held_rows, encoder, config, autocast)
                        held_loss, held_accuracy = (
                            pairwise_loss(chosen, rejected).item(),
                            pairwise_accuracy(chosen, rejected).item(),
                        )
                        metrics.write(
                            {"step": at.step, "eval/loss": held_loss, "eval/accuracy": held_accuracy},
                            f"step {at.step}/{steps}  loss {batch_loss:.3f}  held-out loss {held_loss:.3f}  "
                            f"accuracy {100 * held_accuracy:.1f} %",
                        )
                        # By accuracy, then loss: a model that is surer of itself may order better at a higher loss, and PPO
                        # reads the order.
                        result = [held_accuracy, -held_loss]
                        at.since_best = 0 if at.best is None or result > at.best else at.since_best + 1
                        if at.since_best == 0:
                            at.best = result
                            for stale in (RECORD, STATISTICS):  # of weights that are about to go
                                (directory / stale).unlink(missing_ok=True)
                            model.save_pretrained(directory, tokenizer, pad_id)
                        at.stopped = at.since_best >= config.patience
                    run.checkpoint(at.step, last=at.step == steps or at.stopped)
                    if at.stopped:
                        break
                at.epoch, at.batch = at.epoch + 1, 0
        if at.stopped:
            say(f"stopped at step {at.step}: {config.patience} checks without a better held-out accuracy")

        if config.lora_rank:  # the best state
            model = load_scalar_role(RewardModel, base, directory, "best")
        else:
            model = RewardModel.from_pretrained(directory, device=device)
        chosen, rejected = score_pairs(model, held_rows, encoder, config, autocast)
        show_pairs(held_pairs, chosen, rejected)
        report = {"pairs": pair_report(held_pairs, chosen, rejected)}
        if kind != "rationale":
            report["classifier"] = classifier_report(
                model, policy, encoder, task, {"held_out": held_out, "eval": evaluation}, writer, config, autocast
            )
        statistics = ScoreStatistics.of(
            score_rows(model, *sampled.batch, config.eval_batch_size, autocast), truncated=sampled.truncated,
            temperature=config.temperature, policy_fingerprint=policy_fingerprint,
        )  # fmt: skip
        with disk_faults(str(directory / STATISTICS)):
            save_statistics(statistics, directory)
        say(
            f"scores on {statistics.count} answers sampled by the policy: mean {statistics.mean:.3f}, "
            f"standard deviation {statistics.std:.3f}"
        )
        on = {"base": {"path": config.policy, "fingerprint": policy_fingerprint}} if config.lora_rank else {}
        record = make_record(
            f"rm-{kind}",
            task,
            config,
            directory,
            tiny=tiny,
            report=report,
            policy_fingerprint=policy_fingerprint,
            rows=splits.digests(),
            **on,
        )
        with disk_faults(str(directory / RECORD)):
            write_json(directory / RECORD, record)
        metrics.write(
            {"step": at.step, **{f"final/{k}": v for k, v in report["pairs"]["all"].items() if not isinstance(v, list)}}
        )
        say(f"saved {directory}")


if __name__ == "__main__":
    main()
