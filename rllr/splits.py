"""Which rows serve which stage. Settled by the SFT run, recorded beside its model, and taken over by the later stages.

labelled    SFT and both reward models train on these
held_out    labelled too, but set aside from all training: pairs that evaluate and stop a reward model
unlabelled  prompts of PPO; their labels, where a file has them, are removed
eval        dev rows: they choose epoch, step and recipe
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .data import Source, load_examples, parse_mapping_flag, select_labelled, split_holdout
from .errors import InputError
from .tasks import Task, load_task
from .training import check_same_task, read_record, resolve_task

EVAL_SHARE = 0.1  # of the rows, where no evaluation data is given


@dataclass
class DataConfig:
    """Settings of the data, shared by the three scripts. RM and PPO take what is not given from the policy's record."""

    task: str | None = None  # a built-in task's name or a .yaml/.json task file; without it the policy's, else demo
    train_file: str | None = None  # JSONL, JSON, CSV, TSV or Parquet
    eval_file: str | None = None  # dev rows; without it a tenth of the training rows is set aside
    dataset: str | None = None  # hub name instead of files
    dataset_config: str | None = None  # the hub data set's configuration, e.g. sst2 of glue
    train_split: str | None = None  # of the hub data set (train)
    eval_split: str | None = None  # of the hub data set (validation)
    columns: str | None = None  # other column names: text=sentence,label=gold
    label_map: str | None = None  # other label words: Sci/Tech=technology,0=negative
    answer_format: str | None = None  # rationale: rationale, then the label line; label: the label line alone
    labelled: int | None = None  # rows whose labels are used, the rest are PPO's prompts; without it all rows serve all
    held_out: float | None = None  # share of the labelled rows set aside to evaluate reward models (0.1)
    data_seed: int | None = None  # chooses the labelled and the held-out rows (--seed of the SFT run)

    def data_settings(self):
        """These settings alone, of a script's whole configuration: what a model's record hands on to the later stages."""
        return {field.name: getattr(self, field.name) for field in fields(DataConfig)}


@dataclass
class Splits:
    labelled: list
    held_out: list
    unlabelled: list
    eval: list


def load_splits(config: DataConfig, task: Task, log=print) -> Splits:
    """The rows of every stage. Raises InputError where a file, flag or row is at fault."""
    rows = _load(config, task, "train", log)
    evaluation = _load(config, task, "eval", log)
    seed = config.data_seed or 0
    if evaluation is None:
        labelled_rows = [row for row in rows if row.label is not None]
        _, evaluation = split_holdout(labelled_rows, EVAL_SHARE, seed)
        taken = {row.id for row in evaluation}
        rows = [row for row in rows if row.id not in taken]
        log(f"no evaluation data given: {len(evaluation)} of the labelled rows are set aside for it")
    if config.labelled:
        known = sum(row.label is not None for row in rows)
        if not 1 <= config.labelled <= known:
            raise InputError(
                f"--labelled {config.labelled}: there are {known} training rows with a label; give 1 to {known}"
            )
        labelled, unlabelled = select_labelled(rows, config.labelled, seed)
    else:
        labelled = [row for row in rows if row.label is not None]
        unlabelled = [row for row in rows if row.label is None]
    if len(labelled) < 10:
        raise InputError(f"{len(labelled)} labelled rows: too few to train on and set some aside; give at least 10")
    if config.held_out is not None and not 0 < config.held_out < 1:
        raise InputError(f"--held_out {config.held_out}: give a share of the labelled rows between 0 and 1")
    labelled, held_out = split_holdout(labelled, config.held_out or 0.1, seed)
    log(
        f"rows: {len(labelled)} labelled to train on, {len(held_out)} labelled held out, {len(unlabelled)} unlabelled, "
        f"{len(evaluation)} for evaluation"
    )
    return Splits(labelled, held_out, unlabelled, evaluation)


def load_evaluation(config: DataConfig, task: Task, part="eval", log=print) -> list:
    """The evaluation rows alone; part "test" is the demo data's test split. Without evaluation data, those set aside."""
    if part == "test":
        if task.name != "demo" or config.eval_file:
            raise InputError("--part test: only the demo data has a test part; give your own test rows as --eval_file")
        return load_examples(Source(path="demo:test"), task, log=log)
    rows = _load(config, task, "eval", log)
    return load_splits(config, task, log).eval if rows is None else rows


def gold_labels(config: DataConfig, task: Task) -> dict[str, str]:
    """{row id: label} of every training row, for the `gold` reward, an upper bound that sees what PPO must not."""
    return {row.id: row.label for row in _load(config, task, "train", lambda line: None) if row.label is not None}


def _load(config, task, part, log):
    columns = parse_mapping_flag(config.columns, "--columns")
    label_map = parse_mapping_flag(config.label_map, "--label_map")
    path = getattr(config, f"{part}_file")
    if path:
        source = Source(path=path, columns=columns, label_map=label_map)
    elif config.dataset:
        default = {"train": "train", "eval": "validation"}[part]
        split = getattr(config, f"{part}_split") or default
        source = Source(
            dataset=config.dataset,
            dataset_config=config.dataset_config,
            split=split,
            columns=columns,
            label_map=label_map,
        )
    elif task.name == "demo":
        source = Source(path="demo:train" if part == "train" else "demo:dev")
    elif part == "eval":
        return None
    else:
        raise InputError(f"task {task.name!r} needs data: --train_file FILE, or --dataset NAME from the hub")
    return load_examples(source, task, labels="required" if part == "eval" else "optional", log=log)


def inherit(config: DataConfig, record: dict, names=None):
    """Fill the data settings that were not given from a model's record; returns the names of those that contradict it."""
    recorded = record.get("data", {})
    contradictions = []
    for name in asdict(DataConfig()):
        mine, theirs = getattr(config, name), recorded.get(name)
        if mine is None:
            setattr(config, name, theirs)
        elif theirs is not None and mine != theirs:
            contradictions.append(f"--{name} {mine} (the policy was trained with {theirs})")
    return contradictions


def find_policy(config):
    """(record, task) of the policy a later stage starts from; fills config.policy. InputError where there is none."""
    config.policy = config.policy or f"runs/{load_task(config.task or 'demo').name}/sft"
    if not Path(config.policy).is_dir() and config.policy.count("/") != 1:  # one slash may be a hub name
        raise InputError(f"--policy {config.policy}: no such directory; train_sft.py makes one")
    record = read_record(config.policy)
    return record, resolve_task(config, record)


def take_over(config):
    """(record, task, contradictions) of the policy a later stage starts from; fills config.policy and the data settings.

    InputError where there is no such policy, or where it was trained on another task.
    """
    record, task = find_policy(config)
    contradictions = inherit(config, record)
    check_same_task(record, task, f"--policy {config.policy}")
    return record, task, contradictions
