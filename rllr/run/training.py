"""What the three scripts share: records, optimiser and schedule, what must be finite, batches, console lines."""

import ctypes
import dataclasses
import math
import os
import random
import sys
import textwrap
from pathlib import Path

import torch

from ..common.errors import InputError, RunError, brief
from ..common.files import RECORD, ROWS, disk_faults, path_for_record, path_from_record, read_json, saving_into, write_json
from ..layout import pack_sequences
from ..common.log import say
from ..tasks import Task, load_task


RECORD_FORMAT = 2  # of rllr.json; raised where what a run computes changes, with a line in CHANGELOG.md


def set_up(precision, seed, deterministic=False):
    """Quiet libraries, the device, allocator settings. Returns (device, autocast): use `with autocast():` in forwards.

    deterministic: a GPU computes the same bits every time; an operation that cannot is named in a warning.
    """
    import transformers

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    return device, autocast


def keep_freed_memory():
    """Ask glibc to keep freed blocks instead of giving each large tensor back to the kernel.

    On CPU every step frees and takes the same large blocks; without page faults training ran a third faster here
    (docs). Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, limit = -1, -3, 2**30
    mallopt(M_MMAP_THRESHOLD, limit)
    mallopt(M_TRIM_THRESHOLD, 2 * limit - 1)


# ---- records -----------------------------------------------------------------------------------------------------------


# Settings that may name a file or a directory. Records name them from where they lie (`files.path_for_record`).
PATHS = {"task", "train_file", "eval_file", "dataset", "model", "policy", "label_rm", "rationale_rm", "value_init", "rationale_model", "pairs"}
WORDS = {"tiny", "label", "rationale"}  # what stands in such a setting for something else, whatever lies in the directory


def settings_for_record(settings, directory):
    """Settings as a record in `directory` keeps them."""

    def kept(name, value):
        if name not in PATHS or value in WORDS or name == "task" and Path(value or "").suffix.lower() not in (".yaml", ".yml", ".json"):
            return value
        return path_for_record(value, directory)

    return {name: kept(name, value) for name, value in settings.items()}


def read_record(model_dir):
    """The record beside a model we saved, {} for a model from elsewhere. InputError where it is damaged, or of another format."""
    path = Path(model_dir) / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    if isinstance(record, dict) and record.get("stage") and record.get("format", 1) != RECORD_FORMAT:
        raise InputError(other_format(path, record.get("format", 1), RECORD_FORMAT, "train the model again"))
    try:
        if not isinstance(record, dict) or not all(isinstance(record.get(name, {}), dict) for name in ("data", "rows", "base")):
            raise InputError("")
        task_of_record(record)
    except InputError:
        raise InputError(f"{path}: not a record of rllr; delete it or restore it") from None
    return record


def other_format(path, found, own, remedy):
    """The sentence that refuses what another version of rllr wrote."""
    return (
        f"{path}: has format {brief(found)}, this version of rllr has format {own}, and what a run computes has changed in between "
        f"(CHANGELOG.md); {remedy}, or use the version that wrote it"
    )


def save_policy(model, encoder, path, record, merged=False, rows=None):
    """A policy as a plain Hugging Face directory with our record: weights, config, stop ids, tokenizer.

    Of an adapter on a shared base (`rllr.model.roles`) only the adapter, in PEFT's format; `merged`: the plain model. rows: hashes of
    the texts that trained and evaluated it (`Splits.text_hashes`).
    """
    model.generation_config.eos_token_id = encoder.stop_ids if len(encoder.stop_ids) > 1 else encoder.stop_ids[0]
    with disk_faults(f"model {path}"), saving_into(path) as temporary:
        (model.save_merged if merged else model.save_pretrained)(temporary)
        encoder.tokenizer.save_pretrained(temporary)
        if rows:
            write_json(temporary / ROWS, rows)
        write_json(temporary / RECORD, record)


def make_record(stage, task: Task, config, directory, **more):
    """What a later stage, or a reader, must know of the model in `directory`: stage, task, data settings, the whole resolved config."""
    settings = settings_for_record(dataclasses.asdict(config), directory)
    if "base" in more:
        more["base"] = more["base"] | {"path": path_for_record(more["base"]["path"], directory)}
    data = settings_for_record(config.data_settings(), directory)
    return {"format": RECORD_FORMAT, "stage": stage, "task": dataclasses.asdict(task), "data": data, "config": settings, **more}


def task_of_record(record):
    """The task a model was trained on, None for a model from elsewhere."""
    fields = record.get("task")
    if not fields:
        return None
    try:
        return Task(**{**fields, "labels": tuple(fields["labels"]), "metrics": tuple(fields["metrics"])})
    except (TypeError, KeyError):
        raise InputError(
            f"{RECORD}: field 'task' is damaged ({fields!r:.60}); restore the file or train the model again"
        ) from None


def resolve_task(config, record, directory, default="demo"):
    """The task that --task names, else the one in the record of the model in `directory`; --answer_format overrides either."""
    recorded = task_of_record(record)
    theirs = path_from_record(record.get("data", {}).get("task"), directory)
    moved = config.task == theirs and not Path(config.task or "").exists()  # its file is gone
    if recorded and (moved or config.task in (None, recorded.name)):
        return dataclasses.replace(recorded, answer_format=config.answer_format or recorded.answer_format)
    return load_task(config.task or default, config.answer_format)


def check_same_task(record, task, path):
    """InputError where a model was trained for other labels or another prompt than this task has."""
    other = task_of_record(record)
    if other and (other.labels, other.prompt) != (task.labels, task.prompt):
        raise InputError(
            f"{path}: was trained on task {other.name!r} (labels {', '.join(other.labels)}), not on {task.name!r} "
            f"(labels {', '.join(task.labels)}); give a model of this task"
        )


def show_config(config, title):
    """The settings that differ from their defaults, wrapped; all of them are in the run's record."""
    fields = dataclasses.fields(config)
    changed = [f"{field.name}={getattr(config, field.name)}" for field in fields if getattr(config, field.name) != field.default]
    say(textwrap.fill(f"{title}: {', '.join(changed)}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


# ---- optimisation ----------------------------------------------------------------------------------------------------


def make_optimizer(model, learning_rate, steps, *, warmup_share=0.0, schedule="linear", weight_decay=0.0):
    """(AdamW, scheduler): linear warm-up over a share of the steps, then linear decay to 0, cosine to 0, or constant.

    Weight decay spares biases and norms. The fused kernel goes over the weights once, and takes no memory of its own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = bool(parameters) and parameters[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=fused)
    warmup = int(warmup_share * steps)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * min(1, progress))), "constant": 1.0}[
            schedule
        ]

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, factor(step)))


def clip_gradient(model, max_grad_norm):
    """Scale a gradient down to this norm. Returns the norm before; RunError if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    if not torch.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm.item()}; stopped before the update.")
    return norm


def optimizer_step(optimizer, scheduler):
    """Step optimiser and learning rate, clear the gradient."""
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)


def require_finite(values, what, ids=()):
    """Stop a run whose loss (a scalar), or one of whose rows [B] or [B, R], is not finite, before an optimiser spreads it.

    ids: of the prompts, one per row of `values` or all that a loss is of.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return
    if values.dim():
        bad = (~finite.flatten(1).all(1) if values.dim() > 1 else ~finite).nonzero().flatten().tolist()
        ids, values = [ids[i] for i in bad] if ids else bad, values[bad[0]][~finite[bad[0]]].flatten()[0]
    raise RunError(f"{what} is {values.item()}{name_ids(ids)}; stopped before the update.")


def name_ids(ids, shown=5):
    """What an error says of the rows it is about: (prompts a, b, ... of 12) after a space; nothing for no ids."""
    named = ", ".join(map(str, ids[:shown])) + (f", ... of {len(ids)}" if len(ids) > shown else "")
    return f" (prompt{'s' if len(ids) > 1 else ''} {named})" if ids else ""


def shuffled_batches(rows, batch_size, seed, epoch):
    """Batches of an epoch in an order that depends on seed and epoch alone; the last one may be smaller.

    Rows of similar length come together (little padding), the batches in random order. rows: (prompt ids, response ids, ...).
    """
    rng = random.Random(f"batches/{seed}/{epoch}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    pool = 16 * batch_size
    chunks = [
        sorted(order[i : i + pool], key=lambda r: len(rows[r][0]) + len(rows[r][1])) for i in range(0, len(order), pool)
    ]
    batches = [chunk[i : i + batch_size] for chunk in chunks for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return [[rows[r] for r in batch] for batch in batches]


def pack(rows, pad_token_id, device):
    """Rows that begin with (prompt ids, response ids) -> (sequences, prompt_lens, response_mask)."""
    prompts, responses, *_ = zip(*rows)
    return pack_sequences(prompts, responses, pad_token_id, device)


def split_rows(rows, lengths, size=0, tokens=0):
    """Micro-batches of at most `size` rows, and of at most `tokens` padded tokens (its rows x the longest of them).

    0: no limit. lengths: of each row, in tokens. With a limit on tokens, rows of similar length come together; a row that is
    longer than the limit goes alone.
    """
    if not tokens:
        size = size or len(rows)
        return [rows[i : i + size] for i in range(0, len(rows), size)]
    batches, width = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == (size or len(rows)) or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = lengths[i]
        batches[-1].append(rows[i])
    return batches
