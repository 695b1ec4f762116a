"""Stage 1: supervised fine-tuning. The policy learns to answer with a rationale, then the label.

    python train_sft.py                                                   # the built-in demo data, a tiny model, CPU
    python train_sft.py --task sst2 --train_file train.jsonl --eval_file dev.jsonl --model Qwen/Qwen3-0.6B

The loss is the mean negative log-likelihood of the answer's tokens, the end token included; prompts are not learnt. After
each epoch the policy answers the dev rows greedily, and the epoch with the best dev metric is the one that is kept.
Writes runs/<task>/sft: a Hugging Face model directory, metrics.jsonl, rllr.json.
"""

import os
from dataclasses import dataclass

from tqdm import tqdm

from rllr.config import check_choice, check_divisible, check_positive, check_range, parse_config
from rllr.dropout import set_dropout
from rllr.encoding import Encoder
from rllr.engine.checkpointing import checkpoint_layers
from rllr.errors import InputError, command
from rllr.evaluate import answer_rows, metric_line, score_answers, show_samples
from rllr.logprobs import token_logprobs
from rllr.model import backbone_of, fingerprint, load_policy, load_tokenizer
from rllr.rationales import WRITERS, check_writer, default_writer, make_writer
from rllr.shared import DTYPES, LoRAConfig, cast_parameters, check_lora, new_role, rate_factor
from rllr.splits import DataConfig, inherit, load_splits
from rllr.tiny import TinyConfig, build_tiny
from rllr.training import (
    MetricsLog, check_run_directory, check_same_task, make_optimizer, make_record, name_faults, open_run_directory, optimizer_step,
    pack, read_record, require_finite, resolve_task, save_policy, say, set_up, show_config, shuffled_batches, split_rows,
)  # fmt: skip


@dataclass
class Config(LoRAConfig, DataConfig):
    model: str = "tiny"  # hub name or directory of a causal LM; tiny: build one from scratch
    output_dir: str | None = None  # where the policy goes (runs/<task>/sft)
    overwrite: bool = False  # replace a run that is already there
    rationales: str | None = None  # who writes them: given, evidence, demo, model (by the data: see README)
    rationale_model: str | None = None  # the causal LM that writes them, for --rationales model
    tiny_epochs: int = 2  # passes over all texts when --model tiny is built
    epochs: int = 6  # passes over the labelled rows
    batch_size: int = 32  # answers per optimiser step
    micro_batch_size: int = 0  # answers per forward; 0: the whole batch. Does not change the gradient
    tokens_per_batch: int = 0  # padded tokens per forward; 0: no limit. Does not change the gradient either
    gradient_checkpointing: bool = False  # compute layers again in backward instead of keeping their activations
    learning_rate: float | None = None  # AdamW peak (tiny 1e-3, any other model 1e-5; adapters 1e-2, 1e-4)
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
                       "log_every")  # fmt: skip
        check_positive(self, "micro_batch_size", "tokens_per_batch", "weight_decay", "show", "labelled", "eval_rows", zero=True)
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


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    config.validate()
    record = read_record(config.model)
    task = resolve_task(config, record)
    inherit(config, record)  # a tiny model built beforehand knows its data
    config.answer_format = task.answer_format
    check_same_task(record, task, f"--model {config.model}")
    tiny = config.model == "tiny" or record.get("tiny", False)
    config.task, config.data_seed = (
        config.task or task.name,
        config.seed if config.data_seed is None else config.data_seed,
    )
    config.learning_rate = config.learning_rate or (1e-3 if tiny else 1e-5) * rate_factor(config)
    config.dropout = (0.2 if tiny else 0.0) if config.dropout is None else config.dropout
    device, autocast = set_up(config.precision, config.seed)

    splits = load_splits(config, task, say)
    if config.model != "tiny":
        model, tokenizer = load_policy(config.model, device=device), load_tokenizer(config.model)
    directory = check_run_directory(config.output_dir or f"runs/{task.name}/sft", config.overwrite, [config.model])
    show_config(config, "train_sft")
    if config.model == "tiny":
        model, tokenizer = build_tiny(
            splits, task, TinyConfig(epochs=config.tiny_epochs), config.seed, device, autocast
        )
    encoder = Encoder(tokenizer, model)

    labelled = encoder.fit(splits.labelled, task, config.max_new_tokens, say)
    evaluation = encoder.fit(splits.eval[: config.eval_rows or None], task, config.max_new_tokens, say)
    config.rationales = config.rationales or default_writer(task, labelled)
    if task.answer_format == "rationale":
        check_writer(config.rationales, labelled, task, config.rationale_model)
    open_run_directory(directory, config.overwrite)
    base = model
    if config.lora_rank:
        on = {"path": config.model, "fingerprint": fingerprint(base)}
        model = new_role(cast_parameters(base, DTYPES[config.base_dtype]), "sft", config, config.seed)
    if task.answer_format == "rationale":
        writer = make_writer(
            config.rationales, labelled, task, config=config, device=device, directory=directory.parent, log=say
        )
    rows = []
    for example in labelled:
        rationale = writer.write(example, example.label) if task.answer_format == "rationale" else None
        prompt = encoder.prompt_ids(task.render_prompt(example.text, example.text_b))
        rows.append((prompt, encoder.answer_ids(task.render_answer(example.label, rationale))))

    steps = config.epochs * len(shuffled_batches(rows, config.batch_size, config.seed, 0))
    optimizer, scheduler = make_optimizer(
        model, config.learning_rate, steps,
        warmup_share=config.warmup, schedule=config.schedule, weight_decay=config.weight_decay,
    )  # fmt: skip
    set_dropout(base, config.dropout)
    if config.gradient_checkpointing:
        checkpoint_layers(backbone_of(model))
    metrics, progress, step, best = (
        MetricsLog(directory),
        tqdm(total=steps, desc="sft", mininterval=2, disable=None),
        0,
        None,
    )
    for epoch in range(config.epochs):
        model.train()
        epoch_loss, epoch_tokens = 0.0, 0
        for batch in shuffled_batches(rows, config.batch_size, config.seed, epoch):
            answer_tokens, batch_loss = sum(len(answer) for _, answer in batch), 0.0
            learning_rate, step = scheduler.get_last_lr()[0], step + 1
            with name_faults(step, f"The best epoch so far is in {directory}."):
                lengths = [len(prompt) + len(answer) for prompt, answer in batch]
                for micro_batch in split_rows(batch, lengths, config.micro_batch_size, config.tokens_per_batch):
                    with autocast():
                        loss = sft_loss(model, micro_batch, answer_tokens, encoder)
                    require_finite(loss, "the SFT loss")
                    loss.backward()
                    batch_loss += loss.item()
                grad_norm = optimizer_step(model, optimizer, scheduler, config.max_grad_norm)
            epoch_loss, epoch_tokens = epoch_loss + batch_loss * answer_tokens, epoch_tokens + answer_tokens
            line = f"step {step}/{steps}  loss {batch_loss:.3f}  grad norm {grad_norm:.2f}"
            metrics.write({"step": step, "epoch": epoch, "loss": batch_loss, "grad_norm": grad_norm, "lr": learning_rate},
                          line if step % config.log_every == 0 else None)  # fmt: skip
            progress.update()

        model.eval()
        answers = answer_rows(model, encoder, task, evaluation, config.max_new_tokens, config.eval_batch_size, autocast)
        scores = score_answers(task, evaluation, answers)
        metrics.write(
            {"step": step, "epoch": epoch, **{f"eval/{name}": value for name, value in scores.items()}},
            f"epoch {epoch + 1}/{config.epochs}  loss {epoch_loss / epoch_tokens:.3f}  dev {metric_line(scores)}",
        )
        show_samples(task, evaluation, answers, config.show)
        if best is None or scores[task.metric] > best[task.metric]:
            best = scores | {"epoch": epoch + 1}
            settings = {"tiny": tiny, "eval": best}
            settings["fingerprint"] = fingerprint(model.merged_state() if config.lora_rank else model)
            if config.lora_rank:  # the later stages read the merged model, the adapter is for whoever wants it
                own = make_record("sft", task, config, base=on, **settings)
                save_policy(model, encoder, directory / "adapter", own)
            save_policy(model, encoder, directory, make_record("sft", task, config, **settings), config.lora_rank > 0)
    progress.close()
    say(f"best epoch {best['epoch']}: dev {metric_line(best)}; saved {os.fspath(directory)}")


if __name__ == "__main__":
    main()
