"""Which rows serve which stage. The SFT run settles it and records it beside its model; the later stages inherit it.

labelled    SFT and both reward models train on these
held_out    labelled too, but set aside from all training: pairs that evaluate and stop a reward model
unlabelled  prompts of PPO; their labels, where a file has them, are removed
eval        dev rows: they choose epoch, step and recipe
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..common.config import Settings, flag
from ..common.errors import InputError, brief
from ..common.files import RECORD, ROWS, path_from_record, read_json
from ..model.records import PATHS, read_record, resolve_task
from ..tasks import Task, load_task
from .row_reader import parse_mapping_flag, text_hash
from .rows import NoSuchSplit, Source, load_examples, select_labelled, split_holdout

EVAL_SHARE = 0.1  # of the rows, where no evaluation data is given
NAMED_CLASSES = 12  # labels, at most, whose rows a log line counts
SOURCES = frozenset(
    "train_file eval_file dataset dataset_config train_split eval_split columns label_map delimiter encoding".split()
)


@dataclass
class FileConfig(Settings):
    """How a file of rows is read."""

    GROUP = "data"
    columns: str | None = flag(None, "other column names: text=sentence,label=gold; score= leaves that column out")
    delimiter: str | None = flag(None, "of CSV files: a character, or tab (recognised)")
    encoding: str | None = flag(None, "of text files (UTF-8)")


@dataclass
class DataConfig(FileConfig):
    """The data of the three scripts. RM and PPO inherit what is not given from the policy's record."""

    GROUP = "data"
    task: str | None = flag(
        None, "a built-in task's name or a .yaml/.json task file; without it the policy's, else demo"
    )
    train_file: str | None = flag(None, "rows to train on: JSONL, JSON, CSV, TSV or Parquet")
    eval_file: str | None = flag(None, "dev rows; without it a tenth of the training rows is set aside")
    dataset: str | None = flag(None, "instead of files: a hub name, or a directory that `datasets` saved")
    dataset_config: str | None = flag(None, "the hub data set's configuration, e.g. sst2 of glue")
    train_split: str | None = flag(None, "of the hub data set (train)")
    eval_split: str | None = flag(
        None, "of the hub data set (validation; where it has none, a tenth of the training rows)"
    )
    label_map: str | None = flag(None, "other label words: Sci/Tech=technology,0=negative; -1= stands for no label")
    answer_format: str | None = flag(None, "rationale: rationale, then the label line; label: the label line alone")
    labelled: int | None = flag(
        None, "rows whose labels are used, the rest are PPO's prompts; without it all rows serve all", at_least=0
    )
    held_out: float | None = flag(
        None, "share of the labelled rows set aside to evaluate reward models (0.1)", between=(0.001, 0.9)
    )
    data_seed: int | None = flag(None, "chooses the labelled and the held-out rows (--seed of the SFT run)")

    def data_settings(self):
        """These settings alone, out of a script's settings: what a model's record hands on to the later stages."""
        return {field.name: getattr(self, field.name) for field in fields(DataConfig)}


@dataclass
class Splits:
    labelled: list
    held_out: list
    unlabelled: list
    eval: list
    sources: dict = field(default_factory=dict)  # {"train", "eval"}: digest of the rows as they were read
    gold: dict = field(default_factory=dict)  # {row id: label} of every training row: only --reward gold looks at it

    def prompts(self, kind="auto"):
        """The rows that PPO answers. auto: those without a label, or, where all have one, those that trained SFT;
        labelled: the latter in any case."""
        return self.labelled if kind == "labelled" else self.unlabelled or self.labelled

    def digests(self):
        """What a record keeps: of the rows that were read, and of each split, whatever their order."""
        own = {name: rows_digest(getattr(self, name)) for name in ("labelled", "held_out", "unlabelled", "eval")}
        return {f"read for {name}": digest for name, digest in self.sources.items()} | own

    def fingerprints(self):
        """What a run that is resumed is compared by."""
        return {f"--{name}_file": digest for name, digest in self.sources.items()}

    def text_hashes(self):
        """What `rows.json` keeps: which texts trained (labelled) and evaluated (held_out, eval) a policy."""
        return {
            name: [text_hash(e.text, e.text_b) for e in getattr(self, name)]
            for name in ("labelled", "held_out", "eval")
        }


def rows_digest(rows):
    """SHA-256 of rows, whatever their order and place."""
    one = (
        json.dumps([e.id, e.text, e.text_b, e.label, e.score, e.rationale, e.rationales], sort_keys=True) for e in rows
    )
    return hashlib.sha256(
        "\n".join(sorted(hashlib.sha256(row.encode()).hexdigest() for row in one)).encode()
    ).hexdigest()


def load_splits(config: DataConfig, task: Task, log=print, record=None, resumed=None) -> Splits:
    """The rows of every stage. Raises InputError where a file, flag or row is at fault.

    record: of the policy that a later stage starts from. Rows that its record names must be those that it trained on.
    Rows that a flag names on purpose may be others, without those that trained or evaluated the policy. resumed: a run
    that goes on (`rllr.run.resume`), whose rows must be the same.
    """
    rows = _load(config, task, "train", log)
    evaluation = _load(config, task, "eval", log)
    sources = {"train": rows_digest(rows)} | ({} if evaluation is None else {"eval": rows_digest(evaluation)})
    gold = {row.id: row.label for row in rows if row.label is not None}
    if resumed:
        resumed.check_fingerprints(config, Splits([], [], [], [], sources).fingerprints())
    rows, evaluation = _other_rows(config, record or {}, sources, rows, evaluation, log)
    seed = config.data_seed or 0
    labelled_rows = [row for row in rows if row.label is not None]
    if not labelled_rows:
        raise InputError(
            f"{_source(config, 'train')}: no row has a label; name their column with --columns label=<column>, or map "
            "the words in it with "
            "--label_map <theirs>=<ours>,..."
        )
    if evaluation is None:
        _, evaluation = split_holdout(labelled_rows, EVAL_SHARE, seed)
        taken = {row.id for row in evaluation}
        rows = [row for row in rows if row.id not in taken]
        log(f"no evaluation data given: {len(evaluation)} of the labelled rows are set aside for it")
    if config.labelled:
        known = sum(row.label is not None for row in rows)
        if not 1 <= config.labelled <= known:
            raise InputError(
                f"--labelled {config.labelled}{_origin(config, 'labelled')}: there are {known} training rows with a "
                f"label; give 1 to {known}"
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
    splits = Splits(labelled, held_out, unlabelled, evaluation, sources, gold)
    tell_splits(splits, task, log)
    return splits


# ---- what the log says of the rows -----------------------------------------------------------------------------------


def tell_splits(splits, task, log):
    """Rows per split and class, and a warning for what makes their figures mean less than they seem to."""
    named = {
        "labelled to train on": splits.labelled, "labelled held out": splits.held_out, "unlabelled": splits.unlabelled,
        "for evaluation": splits.eval,
    }  # fmt: skip
    log("rows: " + "; ".join(f"{len(rows)} {name}{_by_label(rows, task)}" for name, rows in named.items()))
    train = {_texts(row) for row in splits.labelled + splits.held_out + splits.unlabelled}
    learnt = {_texts(row) for row in splits.labelled}
    for name, rows, others, where in (
        ("evaluation", splits.eval, train, "training rows"), ("held-out", splits.held_out, learnt, "rows to train on"),
    ):  # fmt: skip
        shared = [row for row in rows if _texts(row) in others]
        if shared:
            log(
                f"warning: {len(shared)} of {len(rows)} {name} texts are among the {where} as well "
                f"({', '.join(r.name for r in shared[:3])}"
                f"{', ...' if len(shared) > 3 else ''}): what is measured on them says little about new texts"
            )
    for name, rows in (("rows to train on", splits.labelled), ("evaluation rows", splits.eval)):
        present = {row.label for row in rows}
        if len(present) == 1:
            log(
                f"warning: all {len(rows)} {name} are labelled {present.pop()!r}: "
                "always the same answer is 100 % right there"
            )
    missing = [label for label in task.labels if label not in {row.label for row in splits.labelled}]
    if missing:
        log(
            "warning: no row to train on is labelled "
            f"{', '.join(map(brief, missing))}: the policy cannot learn to say so"
        )


def _by_label(rows, task):
    counts = Counter(row.label for row in rows)
    if not any(label in counts for label in task.labels) or len(task.labels) > NAMED_CLASSES:
        return ""
    return f" ({', '.join(f'{label} {counts[label]}' for label in task.labels)})"


def _texts(row):
    """A row's texts as they are compared: without case and white space."""
    return tuple("".join((text or "").casefold().split()) for text in (row.text, row.text_b))


# ---- rows of the policy's record, rows of another file ---------------------------------------------------------------


def _other_rows(config, record, sources, rows, evaluation, log):
    """(training rows, evaluation rows) for a policy with this record: the rows that it names or, where a flag names
    other data, those that neither trained nor evaluated the policy. InputError where the record's rows have changed."""
    recorded = record.get("rows", {})
    changed = [name for name, digest in sources.items() if recorded.get(f"read for {name}") not in (None, digest)]
    if not changed:
        return rows, evaluation
    if not SOURCES & set(getattr(config, "given", ())):
        raise InputError("; ".join(
            f"{_source(config, name)}: its rows are other ones now (digest {sources[name][:12]}) than those that "
            f"the policy was trained with (digest {recorded[f'read for {name}'][:12]})"
            for name in changed
        ) + ". Restore them, or give the data by flag to use it on purpose")  # fmt: skip
    if record.get("stage") == "tiny":  # it read texts, and no labels
        return rows, evaluation
    hashes = recorded_hashes(config.policy)
    trained, evaluated = (
        set(hashes.get("labelled", ())),
        {h for name in ("held_out", "eval") for h in hashes.get(name, ())},
    )
    for name in changed:
        log(
            f"warning: {_source(config, name)}: other rows than those that the policy "
            "was trained with, taken because a flag names them"
        )
    if "train" in changed:
        rows = _without(rows, trained | evaluated, "trained or evaluated the policy", config, "train", log)
    if "eval" in changed:
        evaluation = _without(evaluation, trained, "trained the policy", config, "eval", log)
    return rows, evaluation


def _without(rows, hashes, did, config, name, log):
    kept = [row for row in rows if text_hash(row.text, row.text_b) not in hashes]
    if len(kept) < len(rows):
        log(f"{_source(config, name)}: {len(rows) - len(kept)} of {len(rows)} rows {did} and are left out")
    if not kept:
        raise InputError(f"{_source(config, name)}: every row of it {did}; give other rows")
    return kept


def recorded_hashes(policy):
    """{split: hashes of its texts} that a policy's directory keeps; {} for one that keeps none."""
    path = Path(policy or "") / ROWS
    hashes = read_json(path) if policy and path.is_file() else {}
    if not isinstance(hashes, dict) or not all(isinstance(names, list) for names in hashes.values()):
        raise InputError(f"{path}: damaged; restore it, or train the policy again")
    return hashes


def _source(config, name):
    """What a message calls the training or evaluation data: flag, value, and where the value came from."""
    flag = f"{name}_file" if getattr(config, f"{name}_file") else "dataset"
    return f"--{flag} {getattr(config, flag) or 'demo'}{_origin(config, flag)}"


def _origin(config, setting):
    origin = getattr(config, "inherited", {}).get(setting)
    return f" (from {origin})" if origin else ""


def load_evaluation(config, task: Task, part="eval", log=print, record=None) -> list:
    """The evaluation rows alone; part "test" is the demo data's test split. Without evaluation data, those set aside.

    config: a DataConfig with the `policy` that is evaluated. record: of a model whose data settings were inherited; its
    evaluation rows must be the same ones still. Rows that
    a flag names are taken as they are, with a warning where they trained the model.
    """
    if part == "test":
        if task.name != "demo" or config.eval_file:
            raise InputError("--part test: only the demo data has a test part; give your own test rows as --eval_file")
        return load_examples(Source(path="demo:test"), task, log=log)
    rows = _load(config, task, "eval", log)
    if rows is None:
        return load_splits(config, task, log, record).eval
    if not SOURCES & set(getattr(config, "given", ())):
        return _other_rows(config, record or {}, {"eval": rows_digest(rows)}, [], rows, log)[1]
    trained = set(recorded_hashes(config.policy).get("labelled", ()))
    learnt = sum(text_hash(row.text, row.text_b) in trained for row in rows)
    if learnt:
        log(f"warning: {_source(config, 'eval')}: {learnt} of {len(rows)} rows trained {config.policy}")
    return rows


def _load(config, task, part, log):
    settings: dict = {name: parse_mapping_flag(getattr(config, name), f"--{name}") for name in ("columns", "label_map")}
    path, fallback = getattr(config, f"{part}_file"), False
    if path:
        source = Source(path=path, delimiter=config.delimiter, encoding=config.encoding, **settings)
    elif config.dataset:
        split = getattr(config, f"{part}_split")
        fallback = part == "eval" and not split
        split = split or {"train": "train", "eval": "validation"}[part]
        source = Source(dataset=config.dataset, dataset_config=config.dataset_config, split=split, **settings)
    elif task.name == "demo":
        source = Source(path="demo:train" if part == "train" else "demo:dev")
    elif part == "eval":
        return None
    else:
        raise InputError(f"task {task.name!r} needs data: --train_file FILE, or --dataset NAME from the hub")
    try:
        return load_examples(source, task, labels="required" if part == "eval" else "optional", log=log)
    except NoSuchSplit as error:
        if not fallback:
            raise
        log(f"{error}; evaluation rows are set aside from the training rows")
        return None
    except InputError as error:
        raise InputError(f"{error}{_origin(config, f'{part}_file' if path else 'dataset')}") from error


def inherit(config: DataConfig, record: dict, directory):
    """Fill the data settings that were not given from the record of the model in `directory`; returns the names of
    those that contradict it."""
    recorded = record.get("data", {})
    contradictions, origin = [], str(Path(directory or "") / RECORD)
    config.inherited = dict(getattr(config, "inherited", {}))
    for name in asdict(DataConfig()):
        mine, theirs = getattr(config, name), recorded.get(name)
        theirs = path_from_record(theirs, directory) if name in PATHS else theirs
        if mine is None:
            setattr(config, name, theirs)
            config.inherited |= {name: origin} if theirs is not None else {}
        elif (
            theirs is not None and mine != theirs and name not in SOURCES | {"task"}
        ):  # those are compared by what they hold
            contradictions.append(f"--{name} {mine} (the policy was trained with {theirs})")
    return contradictions


def find_start(config):
    """(record, task) of the model that a stage starts from, which config.START names; fills in --policy.

    InputError where a later stage finds no policy.
    """
    if config.START == "policy":
        config.policy = config.policy or f"runs/{load_task(config.task or 'demo').name}/sft"
        if not Path(config.policy).is_dir() and config.policy.count("/") != 1:  # one slash may be a hub name
            raise InputError(f"--policy {config.policy}: no such directory; train_sft.py makes one")
    start = getattr(config, config.START)
    record = read_record(start)
    return record, resolve_task(config, record, start)
