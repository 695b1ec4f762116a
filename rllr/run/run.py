"""The life of a run: it begins or goes on, writes checkpoints, stops on request, and loses nothing in a fault.

In a script:

    run = Run.open("sft", Config, argv, __doc__)             # flags, --resume, the task; a used directory is refused
    run.start(fingerprints, encoder.clock, splits.digests()) # the directory, run.json, metrics.jsonl
    loop = SimpleNamespace(step=0, epoch=0, batch=0)         # where the loop stands
    run.track(steps, loop, model=model, ...)                 # the parts of its state; a resumed run gets them back here
    with run:                                                # Ctrl-C and SIGTERM become requests
        while loop.step < steps:
            with run.step(loop.step + 1):                    # a fault names the step and saves the state before it
                ...
            loop.step += 1
            run.checkpoint(loop.step)                        # where one is due, or a stop was asked for
"""

import dataclasses
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import torch

from ..common import ranks
from ..common.config import parse_config
from ..common.errors import InputError, RunError, Stopped, out_of_memory
from ..common.files import METRICS, RUN, check_run_directory, disk_faults, open_run_directory, write_json
from ..common.log import MetricsLog, say, show_config
from ..data.inherited import find_start, inherit
from ..model.loading import allow_remote_code
from ..model.records import check_same_task, make_record, policy_directory, settings_for_record, settings_of
from ..model.shards import shards, whole
from .checkpoint import (
    STATE,
    WEIGHTY,
    GlobalStreams,
    checkpoint_path,
    list_checkpoints,
    problem_with,
    read_checkpoint,
    restore_part,
    state_of,
    step_of,
    write_checkpoint,
)
from .machine import machine, set_up, wants_cuda_graphs
from .resume import RUN_FORMAT, find_run_to_resume
from .stop import StopRequest
from .trackers import Trackers, check_trackers, open_trackers


def input_fingerprints(task, splits):
    """What every stage reads: the rows themselves, whatever file they come from, and how they are split."""
    rows = digest(splits.labelled, splits.held_out, splits.unlabelled, splits.eval, splits.test)
    return {"--task": digest(task), **splits.fingerprints(), "the splits": rows}


def digest(*values):
    """SHA-256 of values that JSON can hold, dataclasses too: the content of rows, whatever file they come from."""
    text = json.dumps(values, default=_plain_fields, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_fields(value):
    fields = dataclasses.asdict(value)
    fields.pop("place", None)  # of a row: where it stands is no content
    return fields


def is_tiny(config, record):
    """Whether a stage starts from a tiny model, or from one that an earlier stage made of it. record: of that model."""
    return getattr(config, "model", None) == "tiny" or bool(record.get("tiny", False))


class Run:
    """One run of a stage: from `open` on its settings and task, from `start` on its directory and metrics."""

    def __init__(self, stage, config, directory, *, task=None, start_record=None, resumed=None, device=None):
        """start_record: of the model that the stage starts from. resumed: the run that goes on (`run.resume`)."""
        self.stage, self.config, self.task, self.device, self.resumed = stage, config, task, device, resumed
        self.start_record, self.directory = start_record or {}, Path(directory)
        self.request, self.parts, self.moved = StopRequest(), {}, False

    @classmethod
    def open(cls, stage, Config, argv=None, description=None):
        """The run that the flags ask for, with every setting resolved, before a model is loaded or a file written.

        Config, beside its flags, has `START`, the setting that names the model the stage starts from, and three
        methods: `default_directory(task)`, `protected_paths()`, which --overwrite must not delete, and `resolve(task,
        record)`, which fills in the defaults. InputError for bad settings, an unknown model, or an output directory
        that is in use.
        """
        ranks.start()
        config = parse_config(Config, argv, description)
        check_trackers(config)
        setattr(config, config.START, policy_directory(getattr(config, config.START), say))
        resumed = find_run_to_resume(stage, config, lambda: config.default_directory(find_start(config)[1]))
        config.validate()
        check_trackers(config)  # again: a resumed run has settings of its own
        allow_remote_code(config.trust_remote_code)
        record, task = find_start(config)
        start = getattr(config, config.START)
        contradictions = inherit(config, record, start)
        check_same_task(record, task, f"--{config.START} {start}")
        for contradiction in contradictions if record.get("stage") != "tiny" else ():  # a tiny model knows no labels
            say(f"warning: {contradiction}: rows that evaluate here may have trained the policy")
        config.task = config.task or task.name
        config.resolve(task, record)
        directory = config.output_dir or config.default_directory(task)
        if not resumed:
            check_run_directory(directory, config.overwrite, config.protected_paths())
        ranks.wait()  # before one of them opens the directory that another still checks
        device = set_up(config.precision, config.seed, config.deterministic, shards(config), wants_cuda_graphs(config))
        show_config(config.freeze(), f"train_{stage}")
        if config.shard and not shards(config):
            say("warning: --shard without several processes does nothing; torchrun starts them (docs/several-gpus.md)")
        return cls(stage, config, directory, task=task, start_record=record, resumed=resumed, device=device)

    def settle(self, why="", **late):
        """Give settings their values whose defaults hang on data or models (`Settings.settle`), and say so, and why."""
        chosen = {name: value for name, value in late.items() if getattr(self.config, name) is None}
        self.config.settle(**late)
        if chosen:
            reason = f" ({why})" if why else ""
            say(f"train_{self.stage}: {', '.join(f'{name}={value}' for name, value in chosen.items())}{reason}")

    @property
    def tiny(self):
        """Whether the model is our small one, made from scratch: it wants other dropout than a pretrained one."""
        return is_tiny(self.config, self.start_record)

    @property
    def clock(self):
        """The moment that a chat template may print (`Encoder.clock`); a resumed run keeps its own."""
        return (self.resumed.recorded if self.resumed else self.start_record).get("clock")

    def start(self, fingerprints, clock=None, rows=None):
        """Open the output directory, or check that a resumed run reads what it read, and write run.json.

        fingerprints: {"--flag" or another name: fingerprint} of everything the run reads. clock: of the encoder. rows:
        digests of the splits, for the records of the models.
        """
        config, resumed = self.config, self.resumed
        if resumed:
            resumed.check_fingerprints(config, fingerprints)
        elif ranks.is_first():
            open_run_directory(self.directory, config.overwrite, config.protected_paths())
        ranks.wait()
        self.kept = {"tiny": self.tiny, "clock": clock, "rows": rows or {}}  # in every model's record
        self.record = {
            "format": RUN_FORMAT,
            "stage": self.stage,
            "config": settings_for_record(settings_of(config), self.directory),
            "given": sorted(config.given),
            "reads": fingerprints,
            "machine": machine(),
            **({"clock": clock} if clock else {}),
        }
        if resumed and resumed.checkpoint:
            self.record["first_checkpoint"] = resumed.recorded.get("first_checkpoint", step_of(resumed.checkpoint))
        else:  # new, or stopped before its first checkpoint: the same seed makes the same run
            if ranks.is_first():
                (self.directory / METRICS).unlink(missing_ok=True)
            self._write_record()
        self.metrics = MetricsLog(self.directory)

    def model_record(self, directory, stage=None, **more):
        """The record of a model of this run that is saved in `directory` (`model.records`)."""
        return make_record(stage or self.stage, self.task, self.config, directory, **(self.kept | more))

    def _write_record(self):
        with disk_faults(str(self.directory / RUN)):
            write_json(self.directory / RUN, self.record)

    def track(self, steps, loop, **parts):
        """Name the parts of the run's state; `loop` says where the loop stands, of `steps`. A run that goes on from a
        checkpoint gives them their state here. InputError where it does not fit them, or has more steps behind it."""
        self.parts = {"loop": loop, **parts, "streams": GlobalStreams(), "metrics": self.metrics}
        for part in self.parts.values():
            if isinstance(part, torch.optim.Optimizer):
                part.register_step_pre_hook(self._moving)
        if self.resumed and self.resumed.checkpoint:
            self._restore(steps, loop, self.resumed.checkpoint)
        elif self.resumed:
            say(f"no checkpoint yet in {self.directory}: the run starts from step 0 again")
        self.record["steps"] = steps
        self._write_record()
        self.metrics.trackers = Trackers(open_trackers(self, loop.step) if ranks.is_first() else ())

    def _restore(self, steps, loop, path):
        state, recorded = read_checkpoint(path), self.resumed.recorded
        changed = recorded.get("steps") != steps
        if changed and path != next(iter(list_checkpoints(self.directory)), path):
            raise InputError(
                f"--resume {path}: an older checkpoint goes on as the run did; "
                "change --steps or --epochs from the newest one"
            )
        for name, part in self.parts.items():  # the metrics come last: no file changes before all the rest fits
            try:
                restore_part(part, state["parts"][name])
            except Exception as error:  # whatever torch, NumPy and random raise for a foreign state
                raise InputError(f"checkpoint {path}: its {STATE} does not fit this run: {name}: {error}") from None
            if name == "loop" and loop.step > steps:
                raise InputError(f"--resume {path}: {loop.step} steps are done, more than the {steps} asked for")
        for name, now in machine().items():
            then = recorded["machine"].get(name, 1 if name == "processes" else None)
            if now != then:
                say(f"warning: {name} {now}, the run began with {then}: equal to rounding from here on, not to the bit")
        if changed:
            say(f"{recorded.get('steps')} -> {steps} steps: the learning rate follows a new schedule from here")
        say(f"resumed from {path}: {loop.step} of {steps} steps are done")

    def _moving(self, *arguments):
        self.moved = True  # before an optimiser touches a weight, or allocates its moments

    def __enter__(self):
        self.request.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.request.__exit__(kind, error, trace)
        self.metrics.close()
        if out_of_memory(error):  # outside of a step
            raise RunError(
                f"{_first_words(error)}; go on with --resume and a smaller --eval_batch_size{self._room()}. "
                f"{self._newest()}"
            ) from None

    @contextmanager
    def step(self, number, rescue=None):
        """One step. A fault inside it names the step, and the state before it is saved where no optimiser has moved
        yet.

        rescue: called then, saves what else is worth it and returns a sentence that says so.
        """
        light = {name: state_of(part) for name, part in self.parts.items() if not isinstance(part, WEIGHTY)}
        self.moved = False
        try:
            with ranks.own_dropout(self.config.seed, number):
                yield
        except Exception as error:
            saves = [rescue, lambda: self._save_before(number - 1, light)]
            if shards(self.config):  # no rank has all weights, and the others may not come to put them together
                saves = [self._newest]
            saved = [_outcome(save) for save in saves if save]
            error = ranks.lost_rank(error) or error
            if out_of_memory(error):
                error = RunError(
                    f"{_first_words(error)}; go on with --resume and a smaller --tokens_per_batch{self._room()}."
                )
            if isinstance(error, (RunError, InputError)):
                raise RunError(" ".join([f"step {number}: {error}", *saved])) from None
            say(" ".join([f"step {number}: {type(error).__name__}.", *saved]))
            raise  # none of our errors: its traceback is worth more than a line

    def _save_before(self, step, light):
        """Save the state in which a failed step began; says where it, or the newest one, is."""
        if self.moved:
            return self._newest()
        path = checkpoint_path(self.directory, step)
        if problem_with(path):
            weighty = {name: state_of(part) for name, part in self.parts.items() if isinstance(part, WEIGHTY)}
            path = self._write(step, light | weighty)
        return f"The state before it is in {path}."

    def _room(self):
        """What else makes room where weights are sharded: a pass without gradients has one whole model."""
        return ", or --precision bf16, which halves the whole model of a rollout" if shards(self.config) else ""

    def _newest(self):
        newest = next((path for path in list_checkpoints(self.directory) if problem_with(path) is None), None)
        return f"The newest checkpoint is {newest}." if newest else "There is no checkpoint yet."

    def log_step(self, loop, numbers):
        """A line of metrics.jsonl for a step of supervised training, and every --log_every steps one on the console."""
        step, steps = loop.step, self.record["steps"]
        line = f"step {step}/{steps}  loss {numbers['loss']:.3f}  grad norm {numbers['grad_norm']:.2f}"
        shown = line if step % self.config.log_every == 0 else None
        self.metrics.write({"step": step, "epoch": loop.epoch, **numbers}, shown)

    def checkpoint(self, step, last=False, must=False):
        """Write a checkpoint where one is due, or must be; Stopped, with the state saved, where a signal asked for
        it."""
        every, asked = self.config.save_every, self.request.agree()
        if asked or must or every and (last or step % every == 0):
            self._write(step, {name: state_of(part) for name, part in self.parts.items()})
        if asked and not last:
            raise Stopped(f"{asked}: stopped after step {step}; go on with --resume {self.directory}")

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
    """RunError, with its name, where a trained weight is not finite: such a state must not replace a good one."""
    for name, weight in state_of(model).items():
        if not whole(torch.isfinite(weight).all()):
            raise RunError(f"{what} is not finite ({name}); it is not saved. {hint()}".strip())


def _first_words(error):
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"


def _outcome(save):
    """What a rescue says of itself, or why it failed: the fault that called for it must not get lost behind its own."""
    try:
        return save()
    except RunError as error:
        return str(error)
