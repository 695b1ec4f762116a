"""Records: what is kept beside a model of how it was made (rllr.json), and what a later stage takes from it."""

import dataclasses
from pathlib import Path

from ..common import ranks
from ..common.errors import InputError, brief
from ..common.files import (
    RECORD,
    ROWS,
    RUN,
    disk_faults,
    path_for_record,
    path_from_record,
    read_json,
    saving_into,
    write_json,
)
from ..tasks import Task, load_task
from .shards import is_sharded, whole_tensors

BEST = "best"  # in a PPO run's directory: the policy that it hands back
RECORD_FORMAT = 2  # of rllr.json; raised where what a run computes changes, with a line in CHANGELOG.md


# Settings that may name a file or a directory. Records name them from where they lie (`files.path_for_record`).
PATHS = frozenset(
    "task train_file eval_file test_file dataset model policy sampler label_rm rationale_rm value_init rationale_model "
    "pairs".split()
)
WORDS = {"tiny", "label", "rationale", "grounded"}  # these words never name a path, whatever lies in the directory
TASK_FILES = (".yaml", ".yml", ".json")


def settings_of(config):
    """All settings as a record keeps them, but --resume and --overwrite: they are of one command, not of the run."""
    of_the_command = {"resume": None, "overwrite": False}
    settings = dataclasses.asdict(config)
    return settings | {name: value for name, value in of_the_command.items() if name in settings}


def settings_for_record(settings, directory):
    """Settings as a record in `directory` keeps them."""

    def kept(name, value):
        names_a_task = name == "task" and Path(value or "").suffix.lower() not in TASK_FILES
        if name not in PATHS or value in WORDS or names_a_task:
            return value
        return path_for_record(value, directory)

    return {name: kept(name, value) for name, value in settings.items()}


def moved_record(record, source, directory):
    """A record that was kept in `source` as `directory` keeps it: its paths lead to the same places from there."""

    def moved(name, value):
        here = path_from_record(value, source)
        if name not in PATHS or here == value:
            return value
        return path_for_record(here, directory) if Path(here).exists() else str(Path(here).absolute())

    return record | {
        part: {name: moved(name, value) for name, value in record[part].items()}
        for part in ("data", "config")
        if isinstance(record.get(part), dict)
    }


def read_record(model_dir):
    """The record beside a model we saved, {} for any other model. InputError for a damaged or older record."""
    path = Path(model_dir) / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    if isinstance(record, dict) and record.get("stage") and record.get("format", 1) != RECORD_FORMAT:
        raise InputError(other_format(path, record.get("format", 1), RECORD_FORMAT, "train the model again"))
    try:
        if not isinstance(record, dict) or not all(
            isinstance(record.get(name, {}), dict) for name in ("data", "rows", "base")
        ):
            raise InputError("")
        task_of_record(record)
    except InputError:
        raise InputError(f"{path}: not a record of rllr; delete it or restore it") from None
    return record


def policy_directory(name, log=print):
    """The model that a name stands for: of a PPO run's directory, which holds no model itself, the policy that the run
    hands back, <run>/best; any other name, or None, as it is.

    InputError where the run has not saved one yet.
    """
    directory = Path(name or "")
    if name is None or (directory / RECORD).is_file() or not (directory / RUN).is_file():
        return name
    run = read_json(directory / RUN)
    stage = run.get("stage") if isinstance(run, dict) else None
    if stage not in ("sft", "rm", "ppo"):
        return name
    if stage != "ppo":
        raise InputError(
            f"{name}: this run has saved no model yet; let it run, or go on with train_{stage}.py --resume {name}"
        )
    best = directory / BEST
    if not (best / RECORD).is_file():
        raise InputError(f"{name}: this PPO run has saved no policy yet; let it run, or name another directory")
    log(f"{name} is a PPO run: its policy is {best} (step {read_record(best).get('step')})")
    return str(best)


def other_format(path, found, own, remedy):
    """The sentence that refuses what another version of rllr wrote."""
    return (
        f"{path}: has format {brief(found)}, this version of rllr has format {own}, and what a run computes has "
        "changed in between "
        f"(CHANGELOG.md); {remedy}, or use the version that wrote it"
    )


def save_policy(model, encoder, path, record, merged=None, rows=None):
    """A policy as a plain Hugging Face directory with our record: weights, config, stop ids, tokenizer.

    Of an adapter on a shared base (`rllr.model.roles`) only the adapter, in PEFT's format; with `merged`, its
    `merged_state()`, the plain model.
    rows: hashes of the texts that trained and evaluated it (`Splits.text_hashes`). Of several ranks the first writes.
    """
    state, is_role = merged, hasattr(model, "shared_model")  # of a role only the adapter is kept, which is whole
    if not is_role and is_sharded(model):
        state = whole_tensors(model.state_dict(keep_vars=True))
    if not ranks.is_first():
        return
    model.generation_config.eos_token_id = encoder.stop_ids if len(encoder.stop_ids) > 1 else encoder.stop_ids[0]
    with disk_faults(f"model {path}"), saving_into(path) as temporary:
        (model.save_pretrained if merged is None else model.save_merged)(temporary, state_dict=state)
        encoder.tokenizer.save_pretrained(temporary)
        if rows:
            write_json(temporary / ROWS, rows)
        write_json(temporary / RECORD, record)


def make_record(stage, task: Task, config, directory, **more):
    """What a later stage, or a reader, must know of the model in `directory`: stage, task, data, all settings."""
    settings = settings_for_record(settings_of(config), directory)
    if "base" in more:
        more["base"] = more["base"] | {"path": path_for_record(more["base"]["path"], directory)}
    data = settings_for_record(config.data_settings(), directory)
    return {
        "format": RECORD_FORMAT,
        "stage": stage,
        "task": dataclasses.asdict(task),
        "data": data,
        "config": settings,
        **more,
    }


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
    """The task that --task names, else that of the model in `directory`; --answer_format overrides either."""
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
