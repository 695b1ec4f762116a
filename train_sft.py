"""Stage 1: supervised fine-tuning. The policy learns to answer with a rationale, then the label.

    python train_sft.py                                                   # the built-in demo data, a tiny model, CPU
    python train_sft.py --task sst2 --train_file train.jsonl --eval_file dev.jsonl --model Qwen/Qwen3-0.6B

The loss is the mean negative log-likelihood of the answer's tokens, the end token included; prompts are not learnt.
Every --eval_every epochs the policy answers the dev rows greedily, and the epoch with the best dev metric is the one
that is kept. Writes runs/<task>/sft: a Hugging Face model directory, metrics.jsonl, rllr.json.
"""

from dataclasses import dataclass
from types import SimpleNamespace

from rllr.answers import answer_rows
from rllr.common.config import check_divisible, flag
from rllr.common.errors import InputError, command
from rllr.common.files import BASE
from rllr.common.log import progress, say
from rllr.data.encoding import Encoder
from rllr.data.met_rows import joined_hashes, recorded_hashes
from rllr.data.splits import FEWEST_ROWS, DataConfig, load_splits
from rllr.evaluate import show_samples
from rllr.layout import shuffled_batches
from rllr.logprobs import sft_loss
from rllr.metrics import answer_metrics, metric_line, rank, still_rising, tell_parse_failures
from rllr.model.backbone import backbone_of
from rllr.model.dropout import set_dropout
from rllr.model.loading import cast_parameters, fingerprint, load_policy, load_tokenizer
from rllr.model.recompute import checkpoint_layers
from rllr.model.records import save_policy
from rllr.model.roles import DTYPES, LoRAConfig, check_lora, new_role
from rllr.model.shards import loading_device, shard
from rllr.model.trial import check_policy
from rllr.rationales.factory import RationaleConfig, check_writer, default_writer, make_writer
from rllr.run.optimizer import Optimizer, gradient_step, own_micro_batches
from rllr.run.rates import settle_rates
from rllr.run.run import Run, digest, input_fingerprints, is_tiny
from rllr.run.settings import SupervisedConfig
from rllr.tiny import TEXTS, TinyConfig, build_tiny


@dataclass
class Config(SupervisedConfig, RationaleConfig, LoRAConfig, DataConfig):
    GROUP = "supervised fine-tuning"
    SECTION = "sft"
    START = "model"  # the setting that names the model which the stage starts from
    model: str = flag("tiny", "hub name or directory of a causal LM; tiny: build one from scratch")
    tiny_epochs: int | None = flag(
        None, f"passes over all texts when --model tiny is built ({TEXTS} texts are read)", above=0
    )
    epochs: int = flag(6, "passes over the labelled rows", above=0)
    batch_size: int = flag(32, "answers per optimiser step", above=0)
    learning_rate: float | None = flag(
        None, "AdamW peak (by size, docs/models.md: tiny 1e-3, 135 M 9.7e-5; adapters 3e-3, 9.7e-4)", above=0
    )
    schedule: str = flag(
        "linear", "linear, cosine or constant, after the warm-up", choices=("linear", "cosine", "constant")
    )
    eval_every: int = flag(1, "epochs between evaluations on dev; the last epoch has one, too", above=0)
    eval_rows: int = flag(0, "dev rows per evaluation; 0: all", at_least=0)
    show: int = flag(3, "sample answers printed at each evaluation", at_least=0)

    def validate(self):
        super().validate()
        check_divisible(self, "batch_size", "micro_batch_size")
        check_lora(self)
        if self.lora_rank and self.model == "tiny":
            raise InputError(
                "--lora_rank with --model tiny: a model built from scratch has nothing to adapt; train it in full, and "
                "use adapters in train_rm.py and train_ppo.py, or give a pretrained --model"
            )

    def default_directory(self, task):
        return f"runs/{task.name}/sft"

    def protected_paths(self):
        return [self.model, self.task, self.train_file, self.eval_file, self.test_file, self.rationale_model]

    def resolve(self, task, record):
        tiny = is_tiny(self, record)
        self.answer_format = task.answer_format
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.dropout = (0.2 if tiny else 0.0) if self.dropout is None else self.dropout


def load_model(run, splits):
    """(the model to train, its encoder). --model tiny is built here; a resumed run finds it in its own directory."""
    source = run.config.model
    if source == "tiny" and run.resumed and run.resumed.checkpoint:
        source = run.directory / BASE
    if source == "tiny":
        tiny_config = TinyConfig(epochs=run.config.tiny_epochs)
        model, tokenizer = build_tiny(splits, run.task, tiny_config, run.config.seed, run.device)
    else:
        model = load_policy(source, device=loading_device(run.config, run.device))
        tokenizer = load_tokenizer(source)
    return model, Encoder(tokenizer, model, run.clock)


def tell_rationales(count, rows):
    """Say how many rows to train on have a rationale where some have none. InputError for too few."""
    if count == rows:
        return
    say(
        f"rationales: {count} of the {rows} rows to train on have one; SFT learns from these, and the reward models "
        "from the labels of all (--rationales evidence writes one for each row)"
    )
    if count < FEWEST_ROWS:
        raise InputError(
            f"{count} labelled rows with a rationale: too few to train on; give at least {FEWEST_ROWS}, or "
            "--rationales evidence, which writes one for each row"
        )


def encode_answers(run, labelled, encoder):
    """The rows to learn from: each prompt with the answer that the rationale writer and the gold label make. Those
    without a rationale are left to the reward models, which learn their labels."""
    config, task = run.config, run.task
    run.settle(rationales=config.rationales or default_writer(task, labelled))
    if task.answer_format == "label":
        writer = None
    else:
        check_writer(config, labelled, task)
        cache = run.directory.parent
        writer = make_writer(
            config.rationales, labelled, task, config=config, device=run.device, directory=cache, log=say
        )
        every, labelled = labelled, [row for row in labelled if writer.can_write(row)]
        tell_rationales(len(labelled), len(every))

    def write_answer(example):
        return task.render_answer(example.label, writer.write(example, example.label) if writer else None)

    return encoder.rows(labelled, task, write_answer, config.max_new_tokens, say)


def evaluate_epoch(run, model, encoder, dev, loop):
    """Answer the dev rows greedily, say and log how it went, show samples; the scores."""
    model.eval()
    answers = answer_rows(model, encoder, run.task, dev, **run.config.answer_limits)
    scores = answer_metrics(run.task, dev, answers)
    run.metrics.write(
        {"step": loop.step, "epoch": loop.epoch, **{f"eval/{name}": value for name, value in scores.items()}},
        f"epoch {loop.epoch + 1}/{run.config.epochs}  loss {loop.loss / loop.tokens:.3f}  dev {metric_line(scores)}",
    )
    show_samples(run.task, dev, answers, run.config.show)
    tell_parse_failures(scores["parse_failures"], say)
    return scores


def rising_sentence(best, before, epochs, rows) -> str | None:
    """What to try where dev was still rising when training ended, None where it was not. best, before: the scores of
    the best epoch, and of the best one until that (None: there was none)."""
    if before is None or best["epoch"] < epochs or "accuracy" not in best:  # a task may be judged by Pearson alone
        return None
    if not still_rising(best["accuracy"], before["accuracy"], rows):
        return None
    return (
        f"hint: dev accuracy was still rising, from {100 * before['accuracy']:.1f} % after epoch {before['epoch']} to "
        f"{100 * best['accuracy']:.1f} %: a larger --epochs may give a better policy"
    )


def save_best(run, model, encoder, splits, base_record, scores):
    """The policy as the later stages read it; of an adapter the merged model, and the adapter beside it."""
    merged, directory = model.merged_state() if run.config.lora_rank else None, run.directory
    settings = {"eval": scores, "fingerprint": fingerprint(model if merged is None else merged)}
    rows = joined_hashes(recorded_hashes(run.config.model), splits.text_hashes())  # an SFT that goes on has met more
    settings["base_fingerprint"] = base_record["fingerprint"]  # of what `rllr.cross_fit` starts from again
    if merged is not None:
        record = run.model_record(directory / "adapter", base=base_record, **settings)
        save_policy(model, encoder, directory / "adapter", record, rows=rows)
    save_policy(model, encoder, directory, run.model_record(directory, **settings), merged, rows)


@command
def main(argv=None):
    run = Run.open("sft", Config, argv, __doc__)
    config, task = run.config, run.task

    splits = load_splits(config, task, say, run.start_record, run.resumed)
    base, encoder = load_model(run, splits)
    settle_rates(run, learning_rate=("sft", base))
    base_record = {"path": config.model, "fingerprint": fingerprint(base)}
    base = shard(cast_parameters(base, DTYPES[config.base_dtype]), config)
    labelled = encoder.fit(splits.labelled, task, config.max_new_tokens, say)
    dev = encoder.fit(splits.eval[: config.eval_rows or None], task, config.max_new_tokens, say)
    rows = encode_answers(run, labelled, encoder)
    check_policy(base, encoder, task, labelled + dev, max_new_tokens=config.max_new_tokens, name=config.model, log=say)
    reads = {"--model": base_record["fingerprint"], "the encoded rows": digest([row[:3] for row in rows])}
    run.start(input_fingerprints(task, splits) | reads, encoder.clock, splits.digests())
    if config.model == "tiny" and not (run.resumed and run.resumed.checkpoint):
        save_policy(base, encoder, run.directory / BASE, run.model_record(run.directory / BASE, stage="tiny"))

    model = new_role(base, "sft", config, config.seed) if config.lora_rank else base
    set_dropout(base, config.dropout)
    if config.gradient_checkpointing:
        checkpoint_layers(backbone_of(model))
    steps = config.epochs * len(shuffled_batches(rows, config.batch_size, config.seed, 0))
    optimizer = Optimizer(
        model, config.learning_rate, steps,
        warmup=config.warmup, schedule=config.schedule,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip

    # Where the loop stands: `batch` batches of `epoch` are done, with that summed loss and that many answer tokens.
    # best, before: the scores of the best epoch, and of the best one until that.
    loop = SimpleNamespace(step=0, epoch=0, batch=0, loss=0.0, tokens=0, best=None, before=None)
    run.track(steps, loop, model=model, **optimizer.parts())
    with run, progress(total=steps, initial=loop.step, desc="sft") as bar:
        while loop.epoch < config.epochs:
            model.train()
            for batch in shuffled_batches(rows, config.batch_size, config.seed, loop.epoch)[loop.batch :]:
                answer_tokens = sum(len(row.answer_ids) for row in batch)
                learning_rate = optimizer.learning_rate
                with run.step(loop.step + 1):
                    loss, grad_norm = gradient_step(
                        optimizer,
                        own_micro_batches(batch, config),
                        lambda rows: sft_loss(model, rows, answer_tokens, encoder),
                        "the SFT loss",
                        lambda rows: [row.name for row in rows],
                    )
                loop.step, loop.batch = loop.step + 1, loop.batch + 1
                loop.loss, loop.tokens = loop.loss + loss * answer_tokens, loop.tokens + answer_tokens
                run.log_step(loop, {"loss": loss, "grad_norm": grad_norm, "lr": learning_rate})
                run.checkpoint(loop.step, last=loop.step == steps)
                bar.update()

            if (loop.epoch + 1) % config.eval_every == 0 or loop.epoch + 1 == config.epochs:
                scores = evaluate_epoch(run, model, encoder, dev, loop)
                # Of equals the later one, which learnt more.
                if loop.best is None or rank(task, scores) >= rank(task, loop.best):
                    loop.best, loop.before = scores | {"epoch": loop.epoch + 1}, loop.best
                    save_best(run, model, encoder, splits, base_record, loop.best)
            loop.epoch, loop.batch, loop.loss, loop.tokens = loop.epoch + 1, 0, 0.0, 0
    say(f"best epoch {loop.best['epoch']}: dev {metric_line(loop.best)}; saved {run.directory}")
    if hint := rising_sentence(loop.best, loop.before, config.epochs, len(dev)):
        say(hint)


if __name__ == "__main__":
    main()
