"""--resume: which run, from which checkpoint, with which settings.

Without the right to guess: what would make it another run is refused with all names and both values, and a run whose
checkpoints are damaged or gone is never begun anew in silence.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..common.config import convert_setting
from ..common.errors import InputError
from ..common.files import METRICS, RUN, is_empty, path_from_record, read_json
from ..common.log import say
from .checkpoint import FOLDER, damage, list_checkpoints, mend, run_of
from .records import PATHS, other_format

# On --resume these may differ from the run's own: they change what is printed or kept, or how long the run is;
FREE = {"save_every", "keep_last", "steps", "epochs", "log_every", "show", "show_every", "max_ref_kl", "on_ref_kl"}
# these as well, with a warning: the numbers agree to rounding, no longer to the bit;
ROUNDING = {"micro_batch_size", "tokens_per_batch", "gradient_checkpointing", "eval_batch_size"}
# these are compared by what they hold, not by name (`Run.reads`).
BY_CONTENT = {"task", "train_file", "eval_file", "dataset", "delimiter", "encoding", "model", "policy", "label_rm", "rationale_rm",
              "value_init"}  # fmt: skip
OWN = {"output_dir", "overwrite", "resume", "trust_remote_code"}  # of each command, never taken from the run
NEWEST = "newest"
RUN_FORMAT = 2  # of run.json; raised where what a run computes changes, with a line in CHANGELOG.md


@dataclass
class RunConfig:
    """Settings of a run's directory and checkpoints, shared by the three scripts."""

    overwrite: bool = False  # replace a run that is already there
    resume: str | None = field(
        default=None, metadata={"bare": NEWEST}
    )  # go on from the newest whole checkpoint, or this one
    save_every: int = 100  # optimiser steps between checkpoints (PPO: rollouts); 0: none but when asked to stop
    keep_last: int = 2  # checkpoints kept, the newest ones
    deterministic: bool = False  # on a GPU: deterministic kernels only, so that a resumed run is the same to the bit
    trust_remote_code: bool = False  # let a model's own Python code run, as some hub models need


@dataclass
class TakenUp:
    """A run that is being resumed."""

    directory: Path
    checkpoint: Path | None  # None: it was stopped before its first one
    recorded: (
        dict  # its run.json: stage, config, reads, machine, steps, first_checkpoint (its step, once there was one)
    )

    def check_reads(self, config, reads):
        """InputError unless what the run reads, {"--flag" or what else it is: fingerprint}, is what it began with."""

        def named(name):
            return f"{name} {getattr(config, name[2:], None) or ''}".strip() if name.startswith("--") else name

        began = self.recorded["reads"]
        changed = [
            f"{named(name)} holds {str(found)[:12]}, the run began with {str(began.get(name))[:12]}"
            for name, found in reads.items() if began.get(name) != found
        ]  # fmt: skip
        if changed:
            raise InputError(f"--resume {self.directory}: this would be another run: {'; '.join(changed)}")


def take_up(stage, config, default_directory):
    """The run that --resume asks for, None without the flag. Settings that were not given become the run's own.

    default_directory(config): where this script's run would be without --output_dir. Refuses settings that would make it
    another run, damaged checkpoints where none is whole, directories that hold no run, and runs whose checkpoints are gone.
    """
    if config.resume is None:
        return None
    if config.overwrite:
        raise InputError("--resume goes on with a run, --overwrite deletes it; give one of the two")
    directory, wanted = _find_run(config, default_directory)
    if is_empty(directory):
        say(f"nothing to resume in {directory}: the run starts from the beginning")
        return None
    if not (directory / RUN).is_file():
        raise InputError(f"--resume {directory}: holds no {RUN}, so it is no run that can be gone on with")
    checkpoint = _whole_checkpoint(directory, wanted)
    recorded = run_of(checkpoint) if checkpoint else read_json(directory / RUN)
    if not isinstance(recorded, dict) or not all(
        isinstance(recorded.get(k), dict) for k in ("config", "reads", "machine")
    ):
        raise InputError(f"{directory / RUN}: is not the record of a run; start again with --overwrite")
    if recorded.get("format", 1) != RUN_FORMAT:
        raise InputError(
            other_format(directory / RUN, recorded.get("format", 1), RUN_FORMAT, "start again with --overwrite")
        )
    if recorded.get("stage") != stage:
        raise InputError(
            f"--resume {directory}: is a run of train_{recorded.get('stage')!s:.20}.py, not of train_{stage}.py"
        )
    taken_up = TakenUp(directory, checkpoint, recorded)
    _settle(config, taken_up)
    lost = 0 if checkpoint else _steps_lost(taken_up)
    if lost:
        raise InputError(
            f"--resume {directory}: {lost} steps were done, but there is no checkpoint; --overwrite starts again"
        )
    config.output_dir = str(directory)
    return taken_up


def _steps_lost(taken_up):
    """Steps that a run without a checkpoint had done; 0 where it never came to have one, though it would have: it can begin again."""
    if "first_checkpoint" not in taken_up.recorded and taken_up.recorded["config"].get("save_every"):
        return 0
    done = 0
    for line in (
        (taken_up.directory / METRICS).read_bytes().splitlines() if (taken_up.directory / METRICS).is_file() else ()
    ):
        try:
            done = max(done, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass  # a torn line
    return done


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
        raise InputError(
            f"--resume {wanted}: is neither a run's directory nor one of its checkpoints ({FOLDER}/step-...)"
        )
    if config.output_dir and Path(config.output_dir).resolve() != directory.resolve():
        raise InputError(
            f"--resume {wanted}: belongs to the run in {directory}, not to --output_dir {config.output_dir}"
        )
    return directory, None if is_run else wanted


def _whole_checkpoint(directory, wanted):
    """The one that was asked for, or the newest one that is whole; damaged ones are named. None if there was none yet."""
    mend(directory)
    candidates = [wanted] if wanted else list_checkpoints(directory)
    for path in candidates:
        problem = damage(path)
        if problem is None:
            return path
        if wanted:
            raise InputError(
                f"--resume {wanted}: is damaged: {problem}; --resume {directory} takes the newest whole one"
            )
        say(f"warning: checkpoint {path} is damaged: {problem}")
    if candidates:
        raise InputError(
            f"--resume: no whole checkpoint in {directory / FOLDER}; give another, or start again with --overwrite"
        )
    return None


def _settle(config, taken_up):
    """Settings not given become the run's; of those given, InputError for what would make it another run."""
    refused, recorded = [], taken_up.recorded["config"]
    config.inherited = {}
    for setting in dataclasses.fields(config):
        name = setting.name
        if name not in recorded or name in OWN:
            continue
        theirs = convert_setting(setting, recorded[name], f"{taken_up.directory / RUN}: {name}")
        recorded[name] = theirs = path_from_record(theirs, taken_up.directory) if name in PATHS else theirs
        mine = getattr(config, name)
        if name not in config.given:
            setattr(config, name, theirs)
            config.inherited |= {name: str(taken_up.directory / RUN)} if theirs is not None else {}
        elif mine != theirs and name in ROUNDING:
            say(
                f"warning: --{name} {mine} (the run began with {theirs}): equal to rounding from here on, not to the bit"
            )
        elif mine != theirs and name not in FREE | BY_CONTENT:
            refused.append(f"--{name} {mine} (the run has {theirs})")
    if refused:
        raise InputError(f"--resume {taken_up.directory}: this would be another run: {'; '.join(refused)}")
    if ":" in str(recorded.get("reward")) and "reward" not in config.given:  # code runs by a flag, never by a file
        raise InputError(
            f"--resume {taken_up.directory}: its reward is code of yours; give --reward {recorded['reward']} again"
        )
    names = taken_up.recorded.get("given", [])
    config.given |= set(names) if isinstance(names, list) else set()
