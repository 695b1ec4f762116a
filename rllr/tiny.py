"""`--model tiny`: a small Llama-architecture model from scratch, for machines without a pretrained one at hand.

A byte-level BPE tokenizer is trained on the training texts, then the model warms up by language modelling on texts
(labels are not used) with a copying exercise after each: stretches of the text, now and then two words of it. Without
the exercise the model cannot quote the text it reads, and a rationale that names evidence is out of reach.

    python -m rllr.tiny --task sst2 --train_file train.jsonl --output_dir runs/sst2/tiny     # to share between runs
"""

import random
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .common import ranks
from .common.config import Settings, flag, parse_config
from .common.errors import InputError, command
from .common.files import check_run_directory, open_run_directory
from .common.log import progress, say, show_config
from .data.encoding import PLAIN_TEMPLATE, Encoder
from .data.splits import DataConfig, load_splits
from .layout import pack, shuffled_batches
from .logprobs import token_logprobs
from .model.dropout import set_dropout
from .model.loading import placed
from .model.records import make_record, save_policy
from .rationales.words import words_of
from .run.machine import set_up
from .run.optimizer import Optimizer, gradient_step
from .run.settings import ModelConfig
from .tasks import load_task

PAD, EOS = "<pad>", "<eos>"
TEXTS, MOST_PASSES = 10_000, 10  # texts to warm up on: a part where there are more, several passes where there are less
COPIES = 4  # lines of a text's exercise: most of what a model learns from, since copying is what it learns slowly
COPY_SPAN = (8, 16)  # words of a line, a stretch of the text; longer ones teach to go on where the last word came from,
# but of a short text half may do, or every line would be the same
COPY_WORDS, WORDS_SHARE = 2, 0.25  # instead of a stretch so many words from anywhere, in this share of the lines


@dataclass
class TinyConfig(Settings):
    GROUP = "tiny model"
    hidden_size: int = flag(128, "width of the hidden states", above=0)
    layers: int = flag(3, "decoder layers", above=0)
    heads: int = flag(4, "attention heads", above=0)
    vocabulary: int = flag(6000, "BPE tokens, at most", above=0)
    context: int = flag(512, "longest text, in tokens", above=0)
    epochs: int | None = flag(
        None, f"passes over all texts ({TEXTS} texts are read: a part, or several passes)", above=0
    )
    learning_rate: float = flag(3e-3, "AdamW peak, cosine after 5 % warm-up", above=0)
    batch_size: int = flag(16, "texts per step", above=0)
    dropout: float = flag(0.0, "while warming up", between=(0, 0.9))


def build_tiny(splits, task, config: TinyConfig, seed, device):
    """(model, tokenizer), warmed up on the texts of every split but the evaluation rows."""
    examples = splits.labelled + splits.held_out + splits.unlabelled
    tokenizer = _train_tokenizer(examples, task, config)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=int(config.hidden_size * 8 / 3) // 16 * 16,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model = placed(model, device)
    say(f"tiny: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    encoder = Encoder(tokenizer, model)
    texts, passes = _texts_to_read(examples, config.epochs, seed)
    rows = _exercises(encoder, encoder.fit(texts, task, reserve=48, log=say), task, seed)
    _warm_up(model, encoder, rows, passes, config, seed)
    return model, tokenizer


def _texts_to_read(examples, epochs, seed):
    """(texts, passes over them): all texts and `epochs`, where it is given; else TEXTS of them, in whole passes where
    there are fewer."""
    if epochs:
        return examples, epochs
    if len(examples) > TEXTS:
        return random.Random(f"texts/{seed}").sample(examples, TEXTS), 1
    return examples, min(MOST_PASSES, -(-TEXTS // len(examples)))


def _train_tokenizer(examples, task, config):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        PLAIN_TEMPLATE.format(prompt=task.prompt_of(example)) + task.render_answer(label)
        for example in examples
        for label in task.labels
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=config.context, padding_side="right"
    )


def _exercises(encoder, examples, task, seed):
    """[(first token, all the others)]: each prompt with its copying exercise behind it, as far as the context goes."""
    rows = []
    for example, ids in zip(examples, encoder.prompts(task, examples)):
        rng = random.Random(f"copy/{seed}/{example.id}")
        lines = [_line_to_copy(example, rng) for _ in range(COPIES)]
        copied = encoder.answer_ids("\n".join(lines))
        while len(lines) > 1 and len(ids) + len(copied) > encoder.context:
            lines.pop()
            copied = encoder.answer_ids("\n".join(lines))
        rows.append((ids[:1], ids[1:] + copied))  # everything after the first token is predicted
    return rows


def _warm_up(model, encoder, rows, passes, config, seed):
    """Language modelling on all rows: the mean negative log-likelihood of every token but the first."""
    steps = passes * len(shuffled_batches(rows, config.batch_size, seed, 0))
    optimizer = Optimizer(model, config.learning_rate, steps, warmup=0.05, schedule="cosine", weight_decay=0.1)
    set_dropout(model, config.dropout).train()
    start, bar = time.monotonic(), progress(total=steps, desc="tiny: language modelling")
    for epoch in range(passes):
        total, count = 0.0, 0
        for batch in shuffled_batches(rows, config.batch_size, seed, epoch):
            own, tokens = ranks.share(batch), sum(len(after) for _, after in batch)
            packed = [(pack(own, encoder.pad_id, model.device), 1.0)] if own else []
            loss, _ = gradient_step(
                optimizer, packed, lambda packed, tokens=tokens: -token_logprobs(model, *packed).sum() / tokens
            )
            total, count = total + loss * tokens, count + tokens
            bar.update()
        seconds = time.monotonic() - start
        say(f"tiny: epoch {epoch + 1}/{passes}  loss {total / count:.3f} nats per token  {seconds:.0f} s")
    bar.close()
    model.eval()


def _line_to_copy(example, rng):
    text = f"{example.text} {example.text_b or ''}"
    words = text.split()
    words = words if len(words) > 1 else list(words_of(text).values()) or words  # a script without spaces
    if rng.random() < WORDS_SHARE:
        return " and ".join(rng.sample(words, min(COPY_WORDS, len(words))))
    shortest, longest = COPY_SPAN
    length = rng.randint(min(shortest, max(1, len(words) // 2)), longest)
    start = rng.randrange(max(1, len(words) - length + 1))
    return " ".join(words[start : start + length])


@dataclass
class Config(TinyConfig, ModelConfig, DataConfig):
    GROUP = "run"
    output_dir: str | None = flag(None, "where the model goes (runs/<task>/tiny)")
    overwrite: bool = flag(False, "replace a run that is already there")
    seed: int = flag(0, "weights, order of the texts, copying exercise")


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    if config.hidden_size % config.heads or config.hidden_size // config.heads % 2:
        raise InputError(f"--hidden_size {config.hidden_size}: must be an even multiple of --heads {config.heads}")
    task = load_task(config.task or "demo", config.answer_format)
    device = set_up(config.precision, config.seed)
    splits = load_splits(config, task, say)
    directory = check_run_directory(config.output_dir or f"runs/{task.name}/tiny", config.overwrite)
    show_config(config, "tiny")
    model, tokenizer = build_tiny(splits, task, config, config.seed, device)
    open_run_directory(directory, config.overwrite)
    record = make_record("tiny", task, config, directory, tiny=True, rows=splits.digests())
    save_policy(model, Encoder(tokenizer, model), directory, record)
    say(f"saved {directory}: train_sft.py --model {directory}")


if __name__ == "__main__":
    main()
