"""The life of a run: it begins or goes on, writes checkpoints, stops on request, and loses nothing in a fault.

In a script:

    run = Run("sft", config, directory, reads, taken_up)     # the directory, metrics.jsonl, what is being resumed
    at = SimpleNamespace(step=0, epoch=0, batch=0)           # where the loop stands
    run.track(steps, at, model=model, optimizer=..., ...)    # the parts of its state; resuming, they get their state here
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
from pathlib import Path

import torch

from ..common.errors import InputError, RunError, Stopped, out_of_memory
from ..common.files import METRICS, RUN, disk_faults, open_run_directory, write_json
from ..common.log import MetricsLog, say
from .checkpoint import (
    STATE,
    WEIGHTY,
    GlobalStreams,
    checkpoint_path,
    damage,
    list_checkpoints,
    read_checkpoint,
    restore_part,
    state_of,
    step_of,
    write_checkpoint,
)  # fmt: skip
from .machine import machine
from .records import settings_for_record
from .resume import RUN_FORMAT


def reads_of(task, splits):
    """What every stage reads, for `Run`: the rows themselves, whatever file they come from, and how they are split."""
    return {
        "--task": digest(task),
        **splits.reads(),
        "the splits": digest(splits.labelled, splits.held_out, splits.unlabelled, splits.eval),
    }


def digest(*values):
    """SHA-256 of values that JSON can hold (dataclasses too): the content of rows, pairs and tasks, whatever file they came from."""
    text = json.dumps(values, default=_plain_fields, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_fields(value):
    fields = dataclasses.asdict(value)
    fields.pop("place", None)  # of a row: where it stands is no content
    return fields


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

    def __init__(self, stage, config, directory, reads, taken_up=None, inputs=(), clock=None):
        """reads: {"--flag" or what else it is: fingerprint} of everything the run reads; a resumed run must read the same.
        inputs: paths that --overwrite must not delete. clock: the moment that the chat template shows (`Encoder.clock`)."""
        self.config, self.reads, self.taken_up = config, reads, taken_up
        self.directory = Path(directory)
        if taken_up:
            taken_up.check_reads(config, reads)
        else:
            open_run_directory(directory, config.overwrite, inputs)
        config.resume, config.overwrite = None, False
        settings = settings_for_record(dataclasses.asdict(config), self.directory)
        self.record = {
            "format": RUN_FORMAT, "stage": stage, "config": settings, "given": sorted(getattr(config, "given", ())), "reads": reads,
            "machine": machine(), **({"clock": clock} if clock else {}),
        }  # fmt: skip
        if taken_up and taken_up.checkpoint:
            self.record["first_checkpoint"] = taken_up.recorded.get("first_checkpoint", step_of(taken_up.checkpoint))
        else:  # new, or stopped before its first checkpoint: the same seed makes the same run
            (self.directory / METRICS).unlink(missing_ok=True)
            self._write_record()
        self.metrics, self.request, self.parts, self.moved = MetricsLog(self.directory), StopRequest(), {}, False

    def _write_record(self):
        with disk_faults(str(self.directory / RUN)):
            write_json(self.directory / RUN, self.record)

    def track(self, steps, at, **parts):
        """Name the parts of the run's state; `at` says where the loop stands, of `steps`. Resuming from a checkpoint, they are
        given their state here. InputError where it does not fit them, or has more steps behind it."""
        self.parts = {"at": at, **parts, "streams": GlobalStreams(), "metrics": self.metrics}
        for part in self.parts.values():
            if isinstance(part, torch.optim.Optimizer):
                part.register_step_pre_hook(self._moving)
        if self.taken_up and self.taken_up.checkpoint:
            self._restore(steps, at, self.taken_up.checkpoint)
        elif self.taken_up:
            say(f"no checkpoint yet in {self.directory}: the run starts from step 0 again")
        self.record["steps"] = steps
        self._write_record()

    def _restore(self, steps, at, path):
        state, recorded = read_checkpoint(path), self.taken_up.recorded
        changed = recorded.get("steps") != steps
        if changed and path != next(iter(list_checkpoints(self.directory)), path):
            raise InputError(
                f"--resume {path}: an older checkpoint goes on as the run did; change --steps or --epochs from the newest one"
            )
        for (
            name,
            part,
        ) in self.parts.items():  # the metrics last: nothing on the disk is touched before all the rest fits
            try:
                restore_part(part, state["parts"][name])
            except Exception as error:  # whatever torch, NumPy and random say of a state that is none of theirs
                raise InputError(f"checkpoint {path}: its {STATE} does not fit this run: {name}: {error}") from None
            if name == "at" and at.step > steps:
                raise InputError(f"--resume {path}: {at.step} steps are done, more than the {steps} asked for")
        for name, now in machine().items():
            if now != recorded["machine"].get(name):
                then = recorded["machine"].get(name)
                say(f"warning: {name} {now}, the run began with {then}: equal to rounding from here on, not to the bit")
        if changed:
            say(f"{recorded.get('steps')} -> {steps} steps: the learning rate's schedule is planned anew from here")
        say(f"resumed from {path}: {at.step} of {steps} steps are done")

    def _moving(self, *arguments):
        self.moved = True  # before an optimiser touches a weight, or allocates its moments

    def __enter__(self):
        self.request.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.request.__exit__()
        self.metrics.close()
        if out_of_memory(error):  # outside of a step
            raise RunError(
                f"{_first_words(error)}; go on with --resume and a smaller --eval_batch_size. {self._newest()}"
            ) from None

    @contextmanager
    def step(self, number, rescue=None):
        """One step. A fault inside it names the step, and the state before it is saved where no optimiser has moved yet.

        rescue: called then, saves what else is worth it and returns a sentence that says so.
        """
        light = {name: state_of(part) for name, part in self.parts.items() if not isinstance(part, WEIGHTY)}
        self.moved = False
        try:
            yield
        except Exception as error:
            saved = [_outcome(save) for save in (rescue, lambda: self._save_before(number - 1, light)) if save]
            if out_of_memory(error):
                error = RunError(f"{_first_words(error)}; go on with --resume and a smaller --tokens_per_batch.")
            if isinstance(error, (RunError, InputError)):
                raise RunError(" ".join([f"step {number}: {error}", *saved])) from None
            say(" ".join([f"step {number}: {type(error).__name__}.", *saved]))
            raise  # none of our errors: its traceback is worth more than a line

    def _save_before(self, step, light):
        """Save the state in which a failed step began; says where it, or the newest one, is."""
        if self.moved:
            return self._newest()
        path = checkpoint_path(self.directory, step)
        if damage(path):
            weighty = {name: state_of(part) for name, part in self.parts.items() if isinstance(part, WEIGHTY)}
            path = self._write(step, light | weighty)
        return f"The state before it is in {path}."

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
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                require_finite_weights(part, f"a weight of the {name} after step {step}", self._newest)
        self.metrics.sync()
        path = write_checkpoint(
            self.directory, step, {"step": step, "run": self.record, "parts": parts}, self.config.keep_last
        )
        if "first_checkpoint" not in self.record:  # from now on a run without checkpoints has lost them
            self.record["first_checkpoint"] = step
            self._write_record()
        return path


def require_finite_weights(model, what, hint=lambda: ""):
    """RunError, with the weight's name, where a trained weight is NaN or infinite: such a state must not replace a good one."""
    for name, weight in state_of(model).items():
        if not torch.isfinite(weight).all():
            raise RunError(f"{what} is not finite ({name}); it is not saved. {hint()}".strip())


def _first_words(error):
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"


def _outcome(save):
    """What a rescue says of itself, or why it failed: the fault that called for it must not get lost behind its own."""
    try:
        return save()
    except RunError as error:
        return str(error)
