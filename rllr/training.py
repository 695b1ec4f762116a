"""What the three scripts share: run directories, records, metrics, optimiser and schedule, batches, console lines."""

import ctypes
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import InputError, RunError
from .layout import pack_sequences
from .tasks import Task, load_task

RECORD = "rllr.json"  # beside every model we save: which stage made it, from what, on which rows


def say(line):
    """A line on stdout that does not tear the progress bar."""
    tqdm.write(str(line), file=sys.stdout)


def set_up(precision, seed):
    """Quiet libraries, the device, allocator settings. Returns (device, autocast): use `with autocast():` in forwards."""
    import transformers

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


# ---- run directories and records -------------------------------------------------------------------------------------


def check_run_directory(path, overwrite, inputs=()):
    """The path of a run's output directory, once it is seen to be free; nothing is touched yet.

    InputError where it already holds something, unless `overwrite`. --overwrite replaces a directory only if a run of
    ours made it, and never one that holds an input of this run (`inputs`: the paths it reads from).
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {path}: is a file")
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise InputError(
                f"--output_dir {path}: cannot be written: {ancestor} is no directory that you may write to"
            )
        if path.is_dir() and any(path.iterdir()):
            ours = (path / RECORD).is_file() or (path / "metrics.jsonl").is_file()
            if not overwrite:
                raise InputError(
                    f"--output_dir {path}: already holds {'a run' if ours else 'files'}; give another or --overwrite"
                )
            if not ours:
                raise InputError(f"--output_dir {path}: holds files that no run of rllr wrote; not overwriting them")
            for name in filter(None, inputs):
                if Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
                    raise InputError(
                        f"--output_dir {path}: --overwrite would delete {name}, which this run reads; give another"
                    )
    except OSError as error:
        raise InputError(f"--output_dir {path}: cannot be read: {error.strerror or error}") from None
    return path


def open_run_directory(path, overwrite, inputs=()):
    """Make a run's output directory, empty. InputErrors as `check_run_directory`, and where it cannot be written."""
    path = check_run_directory(path, overwrite, inputs)
    try:
        if path.is_dir():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--output_dir {path}: cannot be written: {error.strerror or error}") from None
    return path


def write_json(path, value):
    """A JSON file, through a temporary name: a killed run leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_record(model_dir):
    """The record beside a model we saved, {} for a model from elsewhere. InputError where it is damaged."""
    path = Path(model_dir) / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    try:
        assert isinstance(record, dict) and isinstance(record.get("data", {}), dict)
        task_of_record(record)
    except (AssertionError, InputError):
        raise InputError(f"{path}: not a record of rllr; delete it or restore it") from None
    return record


def save_policy(model, encoder, path, record, merged=False):
    """A policy as a plain Hugging Face directory with our record: weights, config, stop ids, tokenizer.

    Of an adapter on a shared base (`rllr.shared`) only the adapter, in PEFT's format; `merged`: the plain model.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = encoder.stop_ids if len(encoder.stop_ids) > 1 else encoder.stop_ids[0]
    (model.save_merged if merged else model.save_pretrained)(path)
    encoder.tokenizer.save_pretrained(path)
    write_json(path / RECORD, record)


def make_record(stage, task: Task, config, **more):
    """What a later stage, or a reader, must know of a model: stage, task, data settings, the whole resolved config."""
    from .splits import DataConfig

    settings = dataclasses.asdict(config)
    data = {field.name: settings[field.name] for field in dataclasses.fields(DataConfig)}
    return {"stage": stage, "task": dataclasses.asdict(task), "data": data, "config": settings, **more}


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


def resolve_task(config, record, default="demo"):
    """The task that --task names, else the one recorded with the model; --answer_format overrides either."""
    recorded = task_of_record(record)
    moved = (
        config.task == record.get("data", {}).get("task") and not Path(config.task or "").exists()
    )  # its file is gone
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
    """The resolved configuration, one line per setting."""
    say(f"{title}: " + ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v is not None))


class MetricsLog:
    """`metrics.jsonl`: one JSON object a step, and the same in a readable line."""

    def __init__(self, directory):
        self.file = open(Path(directory) / "metrics.jsonl", "a", encoding="utf-8")
        self.start = time.monotonic()

    def write(self, metrics, line=None):
        metrics = {name: _plain(value) for name, value in metrics.items()}
        metrics.setdefault("seconds", round(time.monotonic() - self.start, 3))
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        if line:
            say(line)

    def close(self):
        self.file.close()


def _plain(value):
    """A number JSON can hold: tensors become floats, what is not finite becomes null."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Clock:
    """Seconds per named phase: `with clock("rollout"): ...`, then `clock.take()`."""

    def __init__(self):
        self.spent = {}

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        self.started = time.monotonic()

    def __exit__(self, *exception):
        self.spent[self.name] = self.spent.get(self.name, 0.0) + time.monotonic() - self.started

    def take(self):
        spent, self.spent = self.spent, {}
        return {f"time/{name}": round(seconds, 4) for name, seconds in spent.items()}


# ---- optimisation ----------------------------------------------------------------------------------------------------


def make_optimizer(model, learning_rate, steps, *, warmup_share=0.0, schedule="linear", weight_decay=0.0):
    """(AdamW, scheduler): linear warm-up over a share of the steps, then linear decay to 0, cosine to 0, or constant.

    Weight decay spares biases and norms. On CUDA the fused kernel is used.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = bool(parameters) and parameters[0].device.type == "cuda"
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


def optimizer_step(model, optimizer, scheduler, max_grad_norm):
    """Clip the gradient's norm, step, clear. Returns the norm before clipping; RunError, and no step, if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    if not torch.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm.item()}; stopped before the update.")
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def require_finite(loss, what):
    """Stop a run whose loss is not finite, before the optimiser spreads it."""
    if not torch.isfinite(loss).all():
        raise RunError(f"{what} is {loss.item()}; stopped before the update.")


@contextmanager
def name_faults(step, where):
    """A RunError from inside also says at which step it came and `where` the last good state is."""
    try:
        yield
    except RunError as error:
        raise RunError(f"step {step}: {error} {where}") from None


def shuffled_batches(rows, batch_size, seed, epoch):
    """Batches of an epoch in an order that depends on seed and epoch alone; the last one may be smaller.

    Rows of similar length come together (little padding), the batches in random order. rows: (prompt ids, response ids).
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
    """(prompt ids, response ids) rows -> (sequences, prompt_lens, response_mask)."""
    prompts, responses = zip(*rows)
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
