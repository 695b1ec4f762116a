"""Stage 1: supervised fine-tuning. The policy learns to answer with a rationale, then the label.

    python train_sft.py                                                   # the built-in demo data, a tiny model, CPU
    python train_sft.py --task sst2 --train_file train.jsonl --eval_file dev.jsonl --model Qwen/Qwen3-0.6B

The loss is the mean negative log-likelihood of the answer's tokens, the end token included; prompts are not learnt. After
each epoch the policy answers the dev rows greedily, and the epoch with the best dev metric is the one that is kept.
Writes runs/<task>/sft: a Hugging Face model directory, metrics.jsonl, rllr.json.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from rllr.answers import answer_rows
from rllr.common.config import check_choice, check_divisible, check_positive, check_range, parse_config
from rllr.common.errors import InputError, command
from rllr.common.files import check_run_directory
from rllr.common.log import say, show_config
from rllr.data.encoding import Encoder
from rllr.data.splits import DataConfig, inherit, load_splits
from rllr.evaluate import show_samples
from rllr.layout import pack, shuffled_batches, split_rows
from rllr.logprobs import token_logprobs
from rllr.metrics import metric_line, rank, score_answers, tell_parse_failures
from rllr.model.backbone import backbone_of
from rllr.model.dropout import set_dropout
from rllr.model.loading import allow_remote_code, cast_parameters, fingerprint, load_policy, load_tokenizer
from rllr.model.recompute import checkpoint_layers
from rllr.model.roles import DTYPES, LoRAConfig, check_lora, new_role, rate_factor
from rllr.model.trial import check_policy
from rllr.rationales.factory import WRITERS, check_writer, default_writer, make_writer
from rllr.run.machine import set_up
from rllr.run.optimizer import clip_gradient, make_optimizer, optimizer_step, require_finite
from rllr.run.records import check_same_task, make_record, read_record, resolve_task, save_policy
from rllr.run.resume import RunConfig, take_up
from rllr.run.run import Run, digest, reads_of
from rllr.tiny import TinyConfig, build_tiny

BASE = "base"  # in the run's directory: the model that --model tiny built


@dataclass
class Config(RunConfig, LoRAConfig, DataConfig):
    model: str = "tiny"  # hub name or directory of a causal LM; tiny: build one from scratch
    output_dir: str | None = None  # where the policy goes (runs/<task>/sft)
    rationales: str | None = None  # who writes them: given, evidence, demo, model (by the data: see README)
    rationale_model: str | None = None  # the causal LM that writes them, for --rationales model
    tiny_epochs: int = 2  # passes over all texts when --model tiny is built
    epochs: int = 6  # passes over the labelled rows
    batch_size: int = 32  # answers per optimiser step
    micro_batch_size: int = 0  # answers per forward; 0: the whole batch. Does not change the gradient
    tokens_per_batch: int = 0  # padded tokens per forward; 0: no limit. Does not change the gradient either
    gradient_checkpointing: bool = False  # compute layers again in backward instead of keeping their activations
    learning_rate: float | None = None  # AdamW peak (tiny 1e-3, any other model 1e-5; adapters 3e-3, 1e-4)
    warmup: float = 0.05  # share of the steps
    schedule: str = "linear"  # linear, cosine or constant, after the warm-up
    weight_decay: float = 0.01  # not on biases and norms
    dropout: float | None = None  # while training (tiny 0.2, any other model 0); off in every later pass
    max_grad_norm: float = 1.0  # clipping
    max_new_tokens: int = 48  # of an answer (256 in the paper)
    eval_rows: int = 0  # dev rows that each epoch's evaluation answers; 0: all
    eval_batch_size: int = 256  # prompts decoded together
    log_every: int = 20  # steps between printed lines; metrics.jsonl has every step
    show: int = 3  # sample answers printed after each epoch
    precision: str = "fp32"  # fp32, or bf16 for autocast (GPU)
    seed: int = 0  # order of the rows, dropout, and the labelled rows unless --data_seed is given

    def validate(self):
        check_positive(self, "epochs", "batch_size", "learning_rate", "max_grad_norm", "max_new_tokens", "eval_batch_size",
                       "log_every", "keep_last")  # fmt: skip
        check_positive(self, "micro_batch_size", "tokens_per_batch", "weight_decay", "show", "labelled", "eval_rows",
                       "save_every", zero=True)  # fmt: skip
        check_range(self, "warmup", 0, 1)
        check_range(self, "dropout", 0, 0.9)
        check_range(self, "held_out", 0.001, 0.9)
        check_choice(self, "schedule", ("linear", "cosine", "constant"))
        check_choice(self, "precision", ("fp32", "bf16"))
        check_choice(self, "rationales", (None, *WRITERS))
        check_divisible(self, "batch_size", "micro_batch_size")
        check_lora(self)
        if self.lora_rank and self.model == "tiny":
            raise InputError(
                "--lora_rank with --model tiny: a model built from scratch has nothing to adapt; train it in full, and "
                "use adapters in train_rm.py and train_ppo.py, or give a pretrained --model"
            )


def sft_loss(model, rows, answer_tokens, encoder):
    """-sum log pi(answer | prompt) / answer_tokens. `answer_tokens` counts the whole batch, so that the micro-batches'
    losses add up to the exact token mean whatever the split."""
    return -token_logprobs(model, *pack(rows, encoder.pad_id, model.device)).sum() / answer_tokens


def default_directory(config):
    """Where the run goes without --output_dir."""
    return f"runs/{resolve_task(config, read_record(config.model), config.model).name}/sft"


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    taken_up = take_up("sft", config, default_directory)
    config.validate()
    allow_remote_code(config.trust_remote_code)
    record = read_record(config.model)
    task = resolve_task(config, record, config.model)
    inherit(config, record, config.model)  # a tiny model built beforehand knows its data
    config.answer_format = task.answer_format
    check_same_task(record, task, f"--model {config.model}")
    tiny = config.model == "tiny" or record.get("tiny", False)
    config.task, config.data_seed = (
        config.task or task.name,
        config.seed if config.data_seed is None else config.data_seed,
    )
    config.learning_rate = config.learning_rate or (1e-3 if tiny else 1e-5) * rate_factor(config, tiny)
    config.dropout = (0.2 if tiny else 0.0) if config.dropout is None else config.dropout
    directory = config.output_dir or f"runs/{task.name}/sft"
    inputs = [config.model, config.task, config.train_file, config.eval_file, config.rationale_model]
    if not taken_up:
        check_run_directory(directory, config.overwrite, inputs)
    device, autocast = set_up(config.precision, config.seed, config.deterministic)

    splits = load_splits(config, task, say, record, taken_up)
    built = taken_up.directory / BASE if taken_up and taken_up.checkpoint and config.model == "tiny" else None
    if config.model != "tiny" or built:
        model, tokenizer = load_policy(built or config.model, device=device), load_tokenizer(built or config.model)
    show_config(config, "train_sft")
    if config.model == "tiny" and not built:
        model, tokenizer = build_tiny(
            splits, task, TinyConfig(epochs=config.tiny_epochs), config.seed, device, autocast
        )
    encoder = Encoder(tokenizer, model, taken_up.recorded.get("clock") if taken_up else record.get("clock"))

    labelled = encoder.fit(splits.labelled, task, config.max_new_tokens, say)
    evaluation = encoder.fit(splits.eval[: config.eval_rows or None], task, config.max_new_tokens, say)
    config.rationales = config.rationales or default_writer(task, labelled)
    if task.answer_format == "rationale":
        check_writer(config.rationales, labelled, task, config.rationale_model)
    on = {"path": config.model, "fingerprint": fingerprint(model)}
    if task.answer_format == "rationale":
        writer = make_writer(
            config.rationales, labelled, task, config=config, device=device, directory=Path(directory).parent, log=say
        )

    def write_answer(example):
        rationale = writer.write(example, example.label) if task.answer_format == "rationale" else None
        return task.render_answer(example.label, rationale)

    rows = encoder.rows(labelled, task, write_answer, config.max_new_tokens, say)  # (prompt ids, answer ids, id)
    names = {example.id: example.name for example in labelled}
    check_policy(model, encoder, task, labelled + evaluation, config.max_new_tokens, config.model, say)

    reads = reads_of(task, splits) | {"--model": on["fingerprint"], "the encoded rows": digest(rows)}
    run = Run("sft", config, directory, reads, taken_up, inputs, encoder.clock)
    directory, metrics = run.directory, run.metrics
    kept = {"tiny": tiny, "clock": encoder.clock, "rows": splits.digests()}  # of every record
    if config.model == "tiny" and not built:
        save_policy(model, encoder, directory / BASE, make_record("tiny", task, config, directory / BASE, **kept))
    base = model
    if config.lora_rank:
        model = new_role(cast_parameters(base, DTYPES[config.base_dtype]), "sft", config, config.seed)

    steps = config.epochs * len(shuffled_batches(rows, config.batch_size, config.seed, 0))
    optimizer, scheduler = make_optimizer(
        model, config.learning_rate, steps,
        warmup_share=config.warmup, schedule=config.schedule, weight_decay=config.weight_decay,
    )  # fmt: skip
    set_dropout(base, config.dropout)
    if config.gradient_checkpointing:
        checkpoint_layers(backbone_of(model))

    # Where the loop stands: `batch` batches of `epoch` are done, with that summed loss and that many answer tokens.
    at = SimpleNamespace(step=0, epoch=0, batch=0, loss=0.0, tokens=0, best=None)
    run.track(steps, at, model=model, optimizer=optimizer, scheduler=scheduler)
    with run, tqdm(total=steps, initial=at.step, desc="sft", mininterval=2, disable=None) as progress:
        while at.epoch < config.epochs:
            model.train()
            for batch in shuffled_batches(rows, config.batch_size, config.seed, at.epoch)[at.batch :]:
                answer_tokens, batch_loss = sum(len(answer) for _, answer, _ in batch), 0.0
                learning_rate = scheduler.get_last_lr()[0]
                with run.step(at.step + 1):
                    lengths = [len(prompt) + len(answer) for prompt, answer, _ in batch]
                    for micro_batch in split_rows(batch, lengths, config.micro_batch_size, config.tokens_per_batch):
                        with autocast():
                            loss = sft_loss(model, micro_batch, answer_tokens, encoder)
                        require_finite(loss, "the SFT loss", [names[id] for _, _, id in micro_batch])
                        loss.backward()
                        batch_loss += loss.item()
                    grad_norm = clip_gradient(model, config.max_grad_norm)
                    optimizer_step(optimizer, scheduler)
                at.step, at.batch = at.step + 1, at.batch + 1
                at.loss, at.tokens = at.loss + batch_loss * answer_tokens, at.tokens + answer_tokens
                line = f"step {at.step}/{steps}  loss {batch_loss:.3f}  grad norm {grad_norm:.2f}"
                metrics.write({"step": at.step, "epoch": at.epoch, "loss": batch_loss, "grad_norm": grad_norm, "lr": learning_rate},
                              line if at.step % config.log_every == 0 else None)  # fmt: skip
                run.checkpoint(at.step, last=at.step == steps)
                progress.update()

            model.eval()
            answers = answer_rows(
                model, encoder, task, evaluation, config.max_new_tokens, config.eval_batch_size, autocast
            )
            scores = score_answers(task, evaluation, answers)
            metrics.write(
                {"step": at.step, "epoch": at.epoch, **{f"eval/{name}": value for name, value in scores.items()}},
                f"epoch {at.epoch + 1}/{config.epochs}  loss {at.loss / at.tokens:.3f}  dev {metric_line(scores)}",
            )
            show_samples(task, evaluation, answers, config.show)
            tell_parse_failures(scores["parse_failures"], say)
            if at.best is None or rank(task, scores) >= rank(
                task, at.best
            ):  # of equals the later one, which has learnt more
                at.best = scores | {"epoch": at.epoch + 1}
                settings = kept | {"eval": at.best}
                settings["fingerprint"] = fingerprint(model.merged_state() if config.lora_rank else model)
                if config.lora_rank:  # the later stages read the merged model, the adapter is for whoever wants it
                    own = make_record("sft", task, config, directory / "adapter", base=on, **settings)
                    save_policy(model, encoder, directory / "adapter", own)
                record = make_record("sft", task, config, directory, **settings)
                save_policy(model, encoder, directory, record, config.lora_rank > 0, splits.text_hashes())
            at.epoch, at.batch, at.loss, at.tokens = at.epoch + 1, 0, 0.0, 0
    say(f"best epoch {at.best['epoch']}: dev {metric_line(at.best)}; saved {directory}")


if __name__ == "__main__":
    main()
