"""The life of a run: begun or gone on with, checkpointed, stopped on request, and stopped by a fault without losing anything.

    run = Run("sft", config, directory, taken_up)            # the directory, metrics.jsonl, what is being resumed
    at = SimpleNamespace(step=0, epoch=0, batch=0)           # where the loop stands
    run.track(at=at, model=model, optimizer=optimizer, ...)  # the parts of its state; resuming, they get their state here
    with run:                                                # Ctrl-C and SIGTERM become requests
        while at.step < steps:
            with run.step(at.step + 1):                      # a fault names the step and saves the state before it
                ...
            at.step += 1
            run.checkpoint(at.step)                          # where one is due, or a stop was asked for
"""

import dataclasses
import hashlib
import json
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from .checkpoint import (
    FOLDER, STATE, WEIGHTY, GlobalStreams, damage, list_checkpoints, read_checkpoint, restore_part, state_of, write_checkpoint,
)  # fmt: skip
from .errors import InputError, RunError, Stopped
from .files import RUN, disk_faults, open_run_directory, read_json, write_json
from .metrics import MetricsLog, say

# On --resume these may differ from the run's own: they change what is printed or kept, or how long the run is;
FREE = {"output_dir", "overwrite", "resume", "save_every", "keep_last", "steps", "epochs", "log_every", "show", "show_every",
        "max_ref_kl", "on_ref_kl", "trust_remote_code"}  # fmt: skip
# these as well, with a warning: the numbers agree to rounding, no longer to the bit;
ROUNDING = {"micro_batch_size", "tokens_per_batch", "gradient_checkpointing", "eval_batch_size"}
# these are compared by what they hold, not by name (`Run.reads`).
BY_CONTENT = {"task", "train_file", "eval_file", "model", "policy", "label_rm", "rationale_rm", "value_init"}
NEWEST = "newest"
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass
class RunConfig:
    """Settings of a run's directory and checkpoints, shared by the three scripts."""

    overwrite: bool = False  # replace a run that is already there
    resume: str | None = field(default=None, metadata={"bare": NEWEST})  # go on: from the newest whole checkpoint, or from this one (or this run)
    save_every: int = 100  # optimiser steps between checkpoints (PPO: rollouts); 0: none but when asked to stop
    keep_last: int = 2  # checkpoints kept, the newest ones
    deterministic: bool = False  # on a GPU: deterministic kernels only, so that a resumed run is the same to the bit
    trust_remote_code: bool = False  # let a model's own Python code run, as some hub models need


@dataclass
class TakenUp:
    """A run that is being resumed."""

    directory: Path
    checkpoint: Path | None  # None: it was stopped before its first one
    recorded: dict  # its run.json: stage, config, reads, machine


def take_up(stage, config, default_directory):
    """The run that --resume asks for, None without the flag. Settings that were not given become the run's own.

    default_directory(config): where this script's run would be without --output_dir. Refuses settings that would make it
    another run, damaged checkpoints where none is whole, and directories that hold no run.
    """
    if config.resume is None:
        return None
    if config.overwrite:
        raise InputError("--resume goes on with a run, --overwrite deletes it; give one of the two")
    directory, wanted = _find_run(config, default_directory)
    if not directory.is_dir() or not any(directory.iterdir()):
        say(f"nothing to resume in {directory}: the run starts from the beginning")
        return None
    if not (directory / RUN).is_file():
        raise InputError(f"--resume {directory}: holds no {RUN}, so it is no run that can be gone on with")
    recorded = read_json(directory / RUN)
    checkpoint = _whole_checkpoint(directory, wanted)
    if checkpoint:
        recorded = read_checkpoint(checkpoint).get("run", recorded)
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(k), dict) for k in ("config", "reads", "machine")):
        raise InputError(f"{directory / RUN}: is not the record of a run; start again with --overwrite")
    if recorded.get("stage") != stage:
        raise InputError(f"--resume {directory}: is a run of train_{recorded.get('stage')!s:.20}.py, not of train_{stage}.py")
    taken_up = TakenUp(directory, checkpoint, recorded)
    _settle(config, taken_up)
    config.output_dir = str(directory)
    return taken_up


def _find_run(config, default_directory):
    """(run directory, checkpoint asked for or None) of --resume and --output_dir."""
    if config.resume == NEWEST:
        return Path(config.output_dir or default_directory(config)), None
    wanted = Path(config.resume)
    if not wanted.is_dir():
        raise InputError(f"--resume {wanted}: no such run or checkpoint directory")
    is_run = (wanted / RUN).is_file()
    directory = wanted if is_run else wanted.parent.parent
    if not is_run and (wanted.parent.name != FOLDER or wanted not in list_checkpoints(directory)):
        raise InputError(f"--resume {wanted}: is neither a run's directory nor one of its checkpoints ({FOLDER}/step-...)")
    if config.output_dir and Path(config.output_dir).resolve() != directory.resolve():
        raise InputError(f"--resume {wanted}: belongs to the run in {directory}, not to --output_dir {config.output_dir}")
    return directory, None if is_run else wanted


def _whole_checkpoint(directory, wanted):
    """The one that was asked for, or the newest one that is whole; damaged ones are named. None if there was none yet."""
    candidates = [wanted] if wanted else list_checkpoints(directory)
    for path in candidates:
        problem = damage(path)
        if problem is None:
            return path
        say(f"warning: checkpoint {path} is damaged: {problem}")
    if candidates:
        raise InputError(f"--resume: no whole checkpoint in {directory / FOLDER}; give another, or start again with --overwrite")
    return None


def _settle(config, taken_up):
    """Settings not given become the run's; of those given, InputError for what would make it another run."""
    refused = []
    for name, theirs in taken_up.recorded["config"].items():
        if name not in {f.name for f in dataclasses.fields(config)} or name in ("resume", "overwrite", "output_dir"):
            continue
        mine = getattr(config, name)
        if name not in config.given:
            setattr(config, name, theirs)
        elif mine != theirs and name in ROUNDING:
            say(f"warning: --{name} {mine} (the run began with {theirs}): equal to rounding from here on, not to the bit")
        elif mine != theirs and name not in FREE | BY_CONTENT:
            refused.append(f"--{name} {mine} (the run has {theirs})")
    if refused:
        raise InputError(f"--resume {taken_up.directory}: this would be another run: {'; '.join(refused)}")


def machine():
    """What a run's bits hang on beside its settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__}


def reads_of(task, splits):
    """What every stage reads, for `Run`: the rows themselves, whatever file they come from."""
    return {
        "--task": digest(task), "--train_file": digest(splits.labelled, splits.held_out, splits.unlabelled),
        "--eval_file": digest(splits.eval),
    }  # fmt: skip


def digest(*values):
    """SHA-256 of values that JSON can hold (dataclasses too): the content of rows, pairs and tasks, whatever file they came from."""
    text = json.dumps(values, default=lambda value: dataclasses.asdict(value), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class StopRequest:
    """Ctrl-C and SIGTERM, within the block, as a request: `name` says which came. A second one interrupts at once."""

    def __init__(self):
        self.name, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _asked(self, number, frame):
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        print(f"{self.name}: finishing this step, then saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Run:
    """A run while it trains: its directory, its metrics, its checkpoints."""

    def __init__(self, stage, config, directory, reads, taken_up=None, inputs=()):
        """reads: {"--flag value" or what else it is: fingerprint} of everything the run reads; a resumed run must read the same.
        inputs: paths that --overwrite must not delete."""
        self.stage, self.config, self.reads, self.taken_up = stage, config, reads, taken_up
        self.checkpoint_read = taken_up.checkpoint if taken_up else None
        if taken_up:
            self._check_reads(taken_up.recorded)
        if self.checkpoint_read:
            self.directory = Path(directory)
        else:  # also where it was stopped before its first checkpoint: the same seed makes the same run
            self.directory = open_run_directory(directory, config.overwrite or taken_up is not None, inputs)
        config.resume, config.overwrite = None, False
        self.record = {"stage": stage, "config": dataclasses.asdict(config), "reads": reads, "machine": machine()}
        with disk_faults(str(self.directory / RUN)):
            write_json(self.directory / RUN, self.record)
        self.metrics, self.request, self.before, self.parts = MetricsLog(self.directory), StopRequest(), None, {}

    def _check_reads(self, recorded):
        changed = [
            f"{name}{' ' + str(getattr(self.config, name[2:], None) or '') if name.startswith('--') else ''} holds {str(found)[:12]}, the run began with {str(recorded['reads'].get(name))[:12]}"
            for name, found in self.reads.items() if recorded["reads"].get(name) != found
        ]  # fmt: skip
        if changed:
            raise InputError(f"--resume {self.taken_up.directory}: this would be another run: {'; '.join(changed)}")

    def track(self, steps, at, **parts):
        """Name the parts of the run's state; `at` says where the loop stands, of `steps`. Resuming from a checkpoint, they are
        given their state here. InputError where it does not fit them, or has more steps behind it."""
        self.parts = {"at": at, **parts, "metrics": self.metrics, "streams": GlobalStreams()}
        if not self.checkpoint_read:
            if self.taken_up:
                say(f"no checkpoint yet in {self.directory}: the run starts from step 0 again")
            return
        state, path = read_checkpoint(self.checkpoint_read), self.checkpoint_read
        for name, part in self.parts.items():
            try:
                restore_part(part, state["parts"][name])
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                raise InputError(f"checkpoint {path}: its {STATE} does not fit this run: {name}: {error}") from None
        if at.step > steps:
            raise InputError(f"--resume {path}: {at.step} steps are done, more than the {steps} asked for")
        then = self.taken_up.recorded["machine"]
        for name, now in machine().items():
            if now != then.get(name):
                say(f"warning: {name} {now}, the run began with {then.get(name)}: equal to rounding from here on, not to the bit")
        for name in ("steps", "epochs"):
            now, before = getattr(self.config, name, None), self.taken_up.recorded["config"].get(name)
            if now != before:
                say(f"--{name} {before} -> {now}: the learning rate's schedule is planned anew from here")
        say(f"resumed from {path}: {at.step} of {steps} steps are done")

    def __enter__(self):
        self.request.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.request.__exit__()
        self.metrics.close()
        if isinstance(error, OUT_OF_MEMORY):  # outside of a step
            raise RunError(f"{_of_memory(error)}; go on with --resume and a smaller --eval_batch_size. {self._newest()}") from None

    @contextmanager
    def step(self, number, rescue=None):
        """One step. A fault inside it names the step, and the state before it is saved where no optimiser has moved yet.

        rescue: called then, saves what else is worth it and returns a sentence that says so.
        """
        light = {name: state_of(part) for name, part in self.parts.items() if not isinstance(part, WEIGHTY)}
        try:
            yield
        except (RunError, *OUT_OF_MEMORY) as error:
            message = str(error)
            if not isinstance(error, RunError):
                message = f"{_of_memory(error)}; go on with --resume and a smaller --tokens_per_batch."
            saved = [_outcome(save) for save in (rescue, lambda: self._save_before(number - 1, light)) if save]
            raise RunError(" ".join([f"step {number}: {message}", *saved])) from None

    def _save_before(self, step, light):
        """Save the state in which a failed step began; says where it, or the newest one, is."""
        schedules = [name for name, part in self.parts.items() if isinstance(part, torch.optim.lr_scheduler.LRScheduler)]
        if all(self.parts[name].last_epoch == light[name]["last_epoch"] for name in schedules):
            weighty = {name: state_of(part) for name, part in self.parts.items() if isinstance(part, WEIGHTY)}
            return f"The state before it is in {self._write(step, light | weighty)}."
        return self._newest()

    def _newest(self):
        newest = next((path for path in list_checkpoints(self.directory) if damage(path) is None), None)
        return f"The newest checkpoint is {newest}." if newest else "There is no checkpoint yet."

    def checkpoint(self, step, last=False):
        """Write a checkpoint where one is due; Stopped, with the state saved, where a signal asked for it."""
        every = self.config.save_every
        if self.request.name or every and (last or step % every == 0):
            self._write(step, {name: state_of(part) for name, part in self.parts.items()})
        if self.request.name and not last:
            raise Stopped(f"{self.request.name}: stopped after step {step}; go on with --resume {self.directory}")

    def _write(self, step, parts):
        self.metrics.sync()
        return write_checkpoint(self.directory, step, {"step": step, "run": self.record, "parts": parts}, self.config.keep_last)


def _of_memory(error):
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"


def _outcome(save):
    """What a rescue says of itself, or why it failed: the fault that called for it must not get lost behind its own."""
    try:
        return save()
    except RunError as error:
        return str(error)
