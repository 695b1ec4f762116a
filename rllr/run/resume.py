"""--resume: which run, from which checkpoint, with which settings.

Nothing is guessed. Settings that would make it another run are refused, all of them by name and with both values. A
run whose checkpoints are damaged or gone is refused too, and does not start from the beginning unless it is told to.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ..common.config import convert_setting
from ..common.errors import InputError
from ..common.files import METRICS, RUN, is_empty, path_from_record, read_json, relative_path
from ..common.log import say
from ..model.records import PATHS, other_format
from .checkpoint import FOLDER, list_checkpoints, problem_with, restore_names, run_of
from .settings import NEWEST

# On --resume these may differ from the run's own: they change what is printed or kept, or how long the run is;
FREE = set(
    "save_every keep_last steps epochs log_every show show_every max_ref_kl on_ref_kl on_hacking audit tensorboard "
    "wandb endpoint_url endpoint_requests endpoint_timeout".split()
)
# these as well, with a warning: the numbers agree to rounding, no longer to the bit;
ROUNDING = {"micro_batch_size", "tokens_per_batch", "gradient_checkpointing", "eval_batch_size", "shard", "cuda_graphs"}
# these are compared by what they hold, not by name (`input_fingerprints`).
BY_CONTENT = frozenset(
    "task train_file eval_file test_file dataset delimiter encoding model policy label_rm rationale_rm "
    "value_init".split()
)
OWN = {"output_dir", "overwrite", "resume", "trust_remote_code"}  # of each command, never taken from the run
RUN_FORMAT = 5  # of run.json; raised where what a run computes changes, with a line in CHANGELOG.md


@dataclass
class Resumed:
    """A run that is being resumed."""

    directory: Path
    checkpoint: Path | None  # None: it was stopped before its first one
    recorded: (
        dict  # its run.json: stage, config, reads, machine, steps, first_checkpoint (its step, once there was one)
    )

    def check_fingerprints(self, config, fingerprints):
        """InputError unless what the run reads, {"--flag" or another name: fingerprint}, is what it began with."""

        def named(name):
            return f"{name} {getattr(config, name[2:], None) or ''}".strip() if name.startswith("--") else name

        began = self.recorded["reads"]
        changed = [
            f"{named(name)} holds {str(found)[:12]}, the run began with {str(began.get(name))[:12]}"
            for name, found in fingerprints.items() if began.get(name) != found
        ]  # fmt: skip
        if changed:
            raise InputError(f"--resume {self.directory}: this would be another run: {'; '.join(changed)}")


def find_run_to_resume(stage, config, default_directory):
    """The run that --resume asks for, None without the flag. Settings that were not given become the run's own.

    default_directory(): where this script's run would be without --output_dir. InputError for settings that would make
    it another run, damaged checkpoints where none is whole, directories that hold no run, and runs whose checkpoints
    are gone.
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
        raise InputError(f"--resume {directory}: holds no {RUN}, so it is no run that can go on")
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
    resumed = Resumed(directory, checkpoint, recorded)
    _take_settings(config, resumed)
    lost = 0 if checkpoint else _steps_lost(resumed)
    if lost:
        raise InputError(
            f"--resume {directory}: {lost} steps were done, but there is no checkpoint; --overwrite starts again"
        )
    config.output_dir = str(directory)
    return resumed


def _steps_lost(resumed):
    """Steps that a run without a checkpoint had done; 0 where none was due yet, so that it can start again."""
    if "first_checkpoint" not in resumed.recorded and resumed.recorded["config"].get("save_every"):
        return 0
    metrics, done = resumed.directory / METRICS, 0
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else ():
        try:
            done = max(done, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass  # a torn line
    return done


def _find_run(config, default_directory):
    """(run directory, checkpoint asked for or None) of --resume and --output_dir."""
    if config.resume == NEWEST:
        return Path(config.output_dir or default_directory()), None
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
    """The one asked for, or the newest whole one; damaged ones are named. None if there was none yet."""
    restore_names(directory)
    candidates = [wanted] if wanted else list_checkpoints(directory)
    for path in candidates:
        problem = problem_with(path)
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


def _take_settings(config, resumed):
    """Settings not given become the run's; of those given, InputError for what would make it another run."""
    refused, recorded = [], resumed.recorded["config"]
    here = relative_path(resumed.directory)  # lest the records that the run goes on to write name absolute paths
    config.inherited = {}
    for setting in dataclasses.fields(config):
        name = setting.name
        if name not in recorded or name in OWN:
            continue
        theirs = convert_setting(setting, recorded[name], f"{resumed.directory / RUN}: {name}")
        recorded[name] = theirs = path_from_record(theirs, here) if name in PATHS else theirs
        mine = getattr(config, name)
        if name not in config.given:
            setattr(config, name, theirs)
            config.inherited |= {name: str(resumed.directory / RUN)} if theirs is not None else {}
        elif mine != theirs and name in ROUNDING:
            say(
                f"warning: --{name} {mine} (the run began with {theirs}): equal to "
                "rounding from here on, not to the bit"
            )
        elif mine != theirs and name not in FREE | BY_CONTENT:
            refused.append(f"--{name} {mine} (the run has {theirs})")
    if refused:
        raise InputError(f"--resume {resumed.directory}: this would be another run: {'; '.join(refused)}")
    if ":" in str(recorded.get("reward")) and "reward" not in config.given:  # code runs by a flag, never by a file
        raise InputError(
            f"--resume {resumed.directory}: its reward is code of yours; give --reward {recorded['reward']} again"
        )
    names = resumed.recorded.get("given", [])
    config.given |= set(names) if isinstance(names, list) else set()
