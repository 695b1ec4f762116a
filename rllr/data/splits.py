"""Which rows serve which stage. The SFT run settles it and records it beside its model; the later stages inherit it.

labelled    SFT and both reward models train on these
held_out    labelled too, but set aside from all training: pairs that evaluate and stop a reward model
unlabelled  prompts of PPO; their labels, where a file has them, are removed
eval        dev rows: they choose epoch, step and recipe; PPO's preview and guard look at them
test        they train nothing and choose nothing: figures that are reported come from them
"""

from dataclasses import dataclass, field, fields, replace

from ..common.config import Settings, flag
from ..common.errors import InputError
from ..tasks import Task
from .inherited import HELD_OUT_SHARE, SOURCES, check_same_draw, origin_of, rows_for, source_of
from .met_rows import STILL, hashes_of, rows_digest
from .row_reader import parse_mapping_flag, text_hash
from .rows import NoSuchSplit, Source, load_examples, select_labelled, split_holdout
from .split_report import tell_splits

EVAL_SHARE = 0.1  # of the labelled rows, where no evaluation data is given
TEST_SHARE = 0.1  # the same for test
FEWEST_TEST_ROWS = 50  # where that share makes fewer, none are set aside: they would tell little and cost labels
FEW_SHARE = 0.1
FEWEST_ROWS = 10  # labelled, and with a rationale, below which there is nothing to train on
PARTS = ("train", "eval", "test")  # what is read: each from a file, or a split, of its own
SPLITS = ("labelled", "held_out", "unlabelled", "eval", "test")  # what the rows become


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
    test_file: str | None = flag(None, "rows that train and choose nothing, for the figures to report")
    test_share: float | None = flag(
        None,
        f"share of the labelled training rows set aside where no test data is given; 0: none ({TEST_SHARE}, none "
        f"where that is below {FEWEST_TEST_ROWS} rows)",
        between=(0, 0.5),
    )
    dataset: str | None = flag(None, "instead of files: a hub name, or a directory that `datasets` saved")
    dataset_config: str | None = flag(None, "the hub data set's configuration, e.g. sst2 of glue")
    train_split: str | None = flag(None, "of the hub data set (train)")
    eval_split: str | None = flag(
        None, "of the hub data set (validation; where it has none, a tenth of the training rows)"
    )
    test_split: str | None = flag(None, "of the hub data set; without it a share of the training rows is set aside")
    label_map: str | None = flag(None, "other label words: Sci/Tech=technology,0=negative; -1= stands for no label")
    answer_format: str | None = flag(None, "rationale: rationale, then the label line; label: the label line alone")
    labelled: int | None = flag(
        None, "rows whose labels are used, the rest are PPO's prompts; without it all rows serve all", at_least=0
    )
    rationale_rows: int | None = flag(
        None, "labelled rows whose rationale is used; of the others only the label, by the reward models (all)", above=0
    )
    held_out: float | None = flag(
        None, f"share of the labelled rows set aside to evaluate reward models ({HELD_OUT_SHARE})", between=(0.001, 0.9)
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
    test: list = field(default_factory=list)
    sources: dict = field(default_factory=dict)  # {one of PARTS: digest of the rows as they were read}
    gold: dict = field(default_factory=dict)  # {row id: label} of every training row: only --reward gold looks at it
    known: dict = field(default_factory=dict)  # what the draw went by beside rows and settings (`inherited.rows_for`)

    def prompts(self, kind="auto"):
        """The rows that PPO answers. auto: those without a label, and where these are few, or none, those that trained
        SFT, too; labelled: the latter alone."""
        return self.labelled if kind == "labelled" else self.unlabelled + self.labelled * self.few_unlabelled

    @property
    def few_unlabelled(self):
        """Whether the rows without a label are fewer than a FEW_SHARE of the others: a gap or two in a file with
        labels, rather than a pool of prompts."""
        return len(self.unlabelled) < FEW_SHARE * len(self.labelled)

    def digests(self):
        """What a record keeps: of the rows that were read, and of each split, whatever their order."""
        own = {name: rows_digest(getattr(self, name)) for name in SPLITS if getattr(self, name)}
        return {f"read for {name}": digest for name, digest in self.sources.items()} | own

    def fingerprints(self):
        """What a run that is resumed is compared by."""
        return {f"--{name}_file": digest for name, digest in self.sources.items()}

    def text_hashes(self):
        """What `rows.json` keeps: which texts trained a policy (labelled), chose it (held_out, eval), and did neither
        (test); and what the draw went by, so that a later stage draws the same rows."""
        return {name: hashes_of(getattr(self, name)) for name in SPLITS if name != "unlabelled"} | self.known


def load_splits(config: DataConfig, task: Task, log=print, record=None, resumed=None) -> Splits:
    """The rows of every stage. Raises InputError where a file, flag or row is at fault.

    record: of the policy that a later stage starts from. Rows that its record names must be those that it trained on.
    Rows that a flag names on purpose may be others, without those that trained or evaluated the policy. resumed: a run
    that goes on (`rllr.run.resume`), whose rows must be the same.
    """
    parts = {part: _load(config, task, part, log) for part in PARTS}
    sources = {part: rows_digest(rows) for part, rows in parts.items() if rows is not None}
    gold = {row.id: row.label for row in parts["train"] if row.label is not None}
    if resumed:
        resumed.check_fingerprints(config, Splits([], [], [], [], sources=sources).fingerprints())
    parts, known = rows_for(config, record or {}, sources, parts, log)
    still = {text: split for split in SPLITS for text in known.get(STILL + split, ())}
    seed = config.data_seed or 0
    if all(row.label is None for row in parts["train"]):
        raise InputError(
            f"{source_of(config, 'train')}: no row has a label; name their column with --columns label=<column>, or "
            "map the words in it with --label_map <theirs>=<ours>,..."
        )
    rows, evaluation, test = _set_aside(parts, still, _test_share(config, record or {}, sources), seed, log)
    if config.labelled:
        there, before = (sum(row.label is not None for row in part) for part in (rows, parts["train"]))
        if not 1 <= config.labelled <= there:
            aside = f" (and {before - there} set aside)" if there < before else ""
            raise InputError(
                f"--labelled {config.labelled}{origin_of(config, 'labelled')}: there are {there} training rows with a "
                f"label{aside}; give 1 to {there}"
            )
        labelled, unlabelled = select_labelled(rows, config.labelled, seed)
    else:
        labelled = [row for row in rows if row.label is not None]
        unlabelled = [row for row in rows if row.label is None]
    if len(labelled) < FEWEST_ROWS:
        raise InputError(
            f"{len(labelled)} labelled rows: too few to train on and set some aside; give at least {FEWEST_ROWS}"
        )
    if config.rationale_rows:
        labelled = _keep_rationales(labelled, config.rationale_rows, seed)
    if config.held_out is not None and not 0 < config.held_out < 1:
        raise InputError(f"--held_out {config.held_out}: give a share of the labelled rows between 0 and 1")
    labelled, held_out = _hold_out(labelled, still, config.held_out or HELD_OUT_SHARE, seed, log)
    splits = Splits(labelled, held_out, unlabelled, evaluation, test, sources, gold, known)
    check_same_draw(config, record or {}, splits.digests())
    tell_splits(splits, task, log)
    return splits


def _keep_rationales(labelled, count, seed):
    """The rows, `count` of them with their rationales: by class, the very rows that --labelled `count` would choose of
    those that have one. The others keep their label alone."""
    explained = [row for row in labelled if row.rationale or row.rationales]
    if count > len(explained):
        raise InputError(
            f"--rationale_rows {count}: there are {len(explained)} labelled rows with a rationale in the data; give at "
            "most as many, or leave it out"
        )
    kept = {row.id for row in select_labelled(explained, count, seed)[0]}
    return [row if row.id in kept else replace(row, rationale=None, rationales={}) for row in labelled]


def _test_share(config, record, sources):
    """--test_share. None, the default with its bound, becomes 0 where the policy trained on these very rows and its
    record names no test rows: what would be set aside now has trained it."""
    recorded, given = record.get("rows", {}), getattr(config, "given", ())
    settled = record.get("stage") != "tiny" and recorded.get("read for train") == sources["train"]
    theirs = record.get("data", {}).get("test_share")
    if settled and "test_share" in given and config.test_share != theirs:
        raise InputError(
            f"--test_share {config.test_share}: the policy's SFT run has set its rows aside; leave this flag out, "
            "or its dev rows would become training rows"
        )
    return 0 if config.test_share is None and settled and "test" not in recorded else config.test_share


def _set_aside(parts, still, test_share, seed, log):
    """(training, evaluation, test rows). Where no test or evaluation data is given, labelled rows are set aside for it.

    The draw is by class and by id: the same rows in every stage. Test rows come first and hang on no seed, so they are
    the same with every seed, and with and without evaluation data. test_share None: TEST_SHARE, unless that makes fewer
    than FEWEST_TEST_ROWS. still {text hash: split}: rows that the model which SFT starts from has met stay what they
    were for it; only the others are drawn from.
    """
    labelled = [row for row in parts["train"] if row.label is not None]
    stay, new = _by_split(labelled, still)
    kind = "new labelled" if still else "labelled"
    rest, evaluation, test, aside = new, parts["eval"], parts["test"], []
    if test is None:
        count, test = round((TEST_SHARE if test_share is None else test_share) * len(new)), stay["test"]
        if test_share is None and len(test) + count < FEWEST_TEST_ROWS:
            log(
                f"no test data given: {TEST_SHARE} of the {len(new)} {kind} rows is {count}, fewer than "
                f"{FEWEST_TEST_ROWS}, so none are set aside; give --test_file, or --test_share to set some aside"
            )
        elif count:
            rest, drawn = split_holdout(new, count, seed=0)
            test = test + drawn
            log(f"no test data given: {len(drawn)} of the {kind} rows are set aside for it")
        aside += test
    if evaluation is None:
        count, evaluation = round(EVAL_SHARE * len(new)), stay["eval"]
        if not new and not evaluation:
            raise InputError("every labelled row trained the model that SFT starts from; give rows that are new to it "
                             "as --eval_file")  # fmt: skip
        if count or not evaluation:
            _, drawn = split_holdout(rest, max(1, count), seed)
            evaluation = evaluation + drawn
            log(f"no evaluation data given: {len(drawn)} of the {kind} rows are set aside for it")
        aside += evaluation
    taken = {row.id for row in aside}
    return [row for row in parts["train"] if row.id not in taken], evaluation, test


def _hold_out(labelled, still, share, seed, log):
    """(rows to train on, held-out rows). Where an SFT goes on, those that its start held out, and a share of the new
    ones; of all rows, with a warning, where it has trained on every one."""
    stay, new = _by_split(labelled, still)
    held = stay["held_out"] + (split_holdout(new, share, seed)[1] if len(new) > 1 else [])
    if not held:
        log("warning: every labelled row trained the model that SFT starts from, those too that are held out to stop "
            "the reward model: its accuracy on their pairs will look too good")  # fmt: skip
        return split_holdout(labelled, share, seed)
    taken = {row.id for row in held}
    return [row for row in labelled if row.id not in taken], [row for row in labelled if row.id in taken]


def _by_split(rows, still):
    """({split: rows that stay in it}, the other rows)."""
    stay: dict[str, list] = {name: [] for name in SPLITS}
    if not still:  # most runs: no text need be hashed
        return stay, rows
    new: list = []
    for row in rows:
        stay.get(still.get(text_hash(row.text, row.text_b)), new).append(row)
    return stay, new


def load_evaluation(config, task: Task, part="eval", log=print, record=None) -> list:
    """The evaluation rows alone, or, part "test", the test rows; those set aside where there is no data of their own.

    config: a DataConfig with the `policy` that is evaluated. record: of a model whose data settings were inherited; its
    rows must be the same ones still. Rows that a flag names are taken as they are. InputError where there are no test
    rows.
    """
    rows, record = _load(config, task, part, log), record or {}
    if rows is None and part == "test" and "test" not in record.get("rows", {}) and not config.test_share:
        raise InputError("--part test: the policy's record names no test rows; give rows that are new as --test_file")
    if rows is None:
        return getattr(load_splits(config, task, log, record), part)
    if not SOURCES & set(getattr(config, "given", ())):
        rows = rows_for(config, record, {part: rows_digest(rows)}, {part: rows}, log)[0][part]
    return rows


def _load(config, task, part, log):
    settings: dict = {name: parse_mapping_flag(getattr(config, name), f"--{name}") for name in ("columns", "label_map")}
    path, fallback = getattr(config, f"{part}_file"), False
    if path:
        source = Source(path=path, delimiter=config.delimiter, encoding=config.encoding, **settings)
    elif config.dataset:
        split = getattr(config, f"{part}_split")
        fallback = part == "eval" and not split
        split = split or {"train": "train", "eval": "validation"}.get(part)
        if split is None:
            return None  # a hub data set's test split often has no labels: it is read where --test_split names it
        source = Source(dataset=config.dataset, dataset_config=config.dataset_config, split=split, **settings)
    elif task.name == "demo":
        source = Source(path=f"demo:{'dev' if part == 'eval' else part}")
    elif part != "train":
        return None
    else:
        raise InputError(f"task {task.name!r} needs data: --train_file FILE, or --dataset NAME from the hub")
    try:
        return load_examples(source, task, labels="optional" if part == "train" else "required", log=log)
    except NoSuchSplit as error:
        if not fallback:
            raise
        log(f"{error}; evaluation rows are set aside from the training rows")
        return None
    except InputError as error:
        origin = origin_of(config, f"{part}_file" if path else "dataset")
        if origin_of(config, "columns") and "--columns" in str(error):
            where = config.inherited["columns"]
            raise InputError(f"{error}; --columns {config.columns} is from {where}; give this file's own") from error
        raise InputError(f"{error}{origin}") from error
