"""Files and hub data sets become lists of `Example`s, and examples are drawn from them at random.

    train.jsonl | .json | .csv | .tsv | .parquet | a hub data set | "demo:train"   →   list[Example]

`rllr.data.tables` reads the files, `rllr.data.row_reader` reads the rows.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..common.errors import InputError, brief, brief_list
from ..tasks import Example, Task
from .row_reader import RowReader, present_columns
from .tables import SAVED_DATA_SET, Table, dataset_rows, first_line, read_table

NAMED_LABELS = 12  # number of spellings of a missing label that a log line names


class NoSuchSplit(InputError):
    """A data set that has no split of that name."""


@dataclass(frozen=True)
class Source:
    """Where examples come from: a file `path` ("demo:train" for the built-in data) or a hub `dataset`."""

    path: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"  # of the hub data set
    columns: dict[str, str] = field(default_factory=dict)
    label_map: dict[str, str] = field(default_factory=dict)
    delimiter: str | None = None  # of a CSV file; None: it is recognised
    encoding: str | None = None  # of a text file; None: UTF-8 or UTF-16

    def __post_init__(self):
        if bool(self.path) == bool(self.dataset):
            raise InputError("give a data file or --dataset <hub name>, one of the two")


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_examples(
    source, task: Task, *, labels="required", columns=None, label_map=None, empty="drop", log=print
) -> list[Example]:
    """Examples from a path, a `Source` or a `Table`.

    columns, label_map: dicts or flag strings ("text=sentence"); None takes those of the `Source`.
    labels: "required", "optional" or "ignored"; with "ignored", no label, score or rationale column is read. Rows with
    an empty text, and rows without a required label, are dropped; `log` gets a line that counts and names them. empty:
    "drop", or "keep" for rows without a text as well, with text "". InputError for anything else that is wrong with the
    file, the mapping or a row.
    """
    if isinstance(source, Table):
        reader = RowReader(source, task, columns, label_map, labels)
        return _to_examples(reader, labels=labels, empty=empty, log=log)
    if not isinstance(source, Source):
        source = Source(path=str(source))
    columns = source.columns if columns is None else columns
    label_map = source.label_map if label_map is None else label_map
    options = {"columns": columns, "label_map": label_map, "labels": labels, "log": log}
    if source.dataset:
        return load_hub_examples(source.dataset, task, config=source.dataset_config, split=source.split, **options)
    if source.path.partition(":")[0] == "demo":
        return _demo_examples(source.path.partition(":")[2] or "train", task)
    table = read_table(source.path, source.delimiter, source.encoding)
    return load_examples(table, task, empty=empty, **options)


def load_hub_examples(
    name: str, task: Task, *, config=None, split="train", columns=None, label_map=None, labels="required", log=print
) -> list[Example]:
    """Examples from a hub data set, a local directory with the same layout, or one saved by `save_to_disk`.

    InputError as for `load_examples`; NoSuchSplit if there is no such split.
    """
    full_name = "/".join(filter(None, (name, config, split)))
    try:
        names, rows = dataset_rows(_load_split(name, config, split))
    except InputError:
        raise
    except Exception as error:  # datasets, fsspec, httpx and pyarrow have no common base of errors
        flags = f"--dataset {name}" + (f" --dataset_config {config}" if config else "")
        kind = NoSuchSplit if "Unknown split" in str(error) else InputError
        raise kind(f"{flags}, split {split!r}: cannot be loaded: {first_line(error)}") from error
    table = Table(full_name, full_name, rows, "row", names)
    return load_examples(table, task, labels=labels, columns=columns, label_map=label_map, log=log)


def _load_split(name, config, split):
    import datasets  # the import takes two seconds, which a JSONL file need not wait for

    if not any((Path(name) / file).is_file() for file in SAVED_DATA_SET):
        return datasets.load_dataset(name, config, split=split)
    saved = datasets.load_from_disk(name).with_format(None)  # gives the rows as plain values
    if not isinstance(saved, datasets.DatasetDict):
        if split != "train":
            raise NoSuchSplit(f"--dataset {name}: was saved as one data set, without splits, so there is no {split!r}")
        return saved
    if split not in saved:
        raise NoSuchSplit(f"--dataset {name}: has no split {split!r}; it has {brief_list(saved)}")
    return saved[split]


def _demo_examples(split: str, task: Task) -> list[Example]:
    from .demo import demo_examples

    if split not in ("train", "dev", "test"):
        raise InputError(f"demo:{split}: the built-in data has demo:train, demo:dev and demo:test")
    examples = demo_examples(split)
    for example in examples:
        if task.is_pair or task.canonical_label(example.label or "") is None:
            raise InputError(f"demo:{split}: its labels ({example.label!r}, ...) are not those of task {task.name}")
    return examples


def _to_examples(reader: RowReader, *, labels: str, empty: str, log) -> list[Example]:
    """The examples of all rows of a table, with unique ids; see `load_examples`."""
    table, examples = reader.table, []
    dropped: dict[str, list[int]] = defaultdict(list)  # {reason: row numbers}
    repeated: list[int] = []  # numbers of the rows whose own id has occurred before
    times_seen: dict[str, int] = defaultdict(int)
    for n, row in table.rows:
        example = reader.example(n, row)
        if empty == "drop" and (not example.text or reader.task.is_pair and not example.text_b):
            dropped["empty text"].append(n)
        elif labels == "required" and example.label is None:
            dropped["no label"].append(n)
        else:
            unique = example.id
            while times_seen[unique]:  # a repeated id becomes id#2, id#3, ...
                times_seen[example.id] += 1
                unique = f"{example.id}#{times_seen[example.id]}"
            times_seen[unique] += 1
            if unique != example.id and "id" in reader.columns:  # `rllr.data.splits` reports repeated texts
                repeated.append(n)
            examples.append(replace(example, id=unique))
    table.report(dropped, repeated, len(examples), log)
    missing = reader.without_label
    if labels == "optional" and missing or any(missing):
        named = [f"{brief(word) if word else 'empty'}: {count}" for word, count in missing.most_common(NAMED_LABELS)]
        log(f"{table.name}: rows without a label: {missing.total()} ({', '.join(named)})")
    return examples


def load_pairs(path, log=print) -> list[dict]:
    """Preference pairs of a file as dicts of prompt, chosen, rejected and kind.

    The file has these columns (kind is optional), or the authors' ranking format {instruction, input, output: [chosen,
    rejected]}. Rows with an empty text, or with `chosen` equal to `rejected`, are dropped; `log` gets a line that
    counts and names them. InputError for anything else that is wrong.
    """
    table = read_table(path)
    ranking = "prompt" not in table.columns and {"instruction", "output"} <= set(table.columns)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in table.columns]
    if missing and not ranking:
        raise InputError(
            f"{table.name}: no column {missing[0]!r}; a pair has prompt, chosen and rejected "
            f"(or instruction, input, output: [chosen, rejected]); {present_columns(table.columns)}"
        )
    pairs, dropped = [], defaultdict(list)  # dropped: {reason: row numbers}
    for n, row in table.rows:
        if ranking:
            row = _ranking_row(table, n, row)
        pair = {name: table.text(n, row, name) or "" for name in ("prompt", "chosen", "rejected")}
        if not all(pair.values()):
            dropped["empty prompt, chosen or rejected"].append(n)
        elif pair["chosen"].strip() == pair["rejected"].strip():
            dropped["chosen equals rejected"].append(n)
        else:
            pairs.append(pair | {"kind": table.text(n, row, "kind") or "file"})
    table.report(dropped, [], len(pairs), log)
    return pairs


def _ranking_row(table: Table, n: int, row: dict) -> dict:
    """A row in the authors' ranking format as prompt, chosen, rejected. The prompt is instruction and input."""
    output = row.get("output")
    if not isinstance(output, list) or len(output) != 2:
        raise table.error(n, "output", "output", f"must be the list [chosen, rejected], got {brief(output)}")
    prompt = "\n".join(filter(None, (table.text(n, row, "instruction"), table.text(n, row, "input"))))
    return {"prompt": prompt, "chosen": output[0], "rejected": output[1], "kind": row.get("kind")}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def select_labelled(examples: list[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(`n` examples with their labels, the others without label, score and rationales); both keep the order.

    The draw is stratified: each label gets its share of the n, and at least one row if n is large enough. The choice
    depends only on ids, labels, seed and n, and it is nested: with one seed, the first 1000 are among the first 2000.
    """
    candidates = [i for i, example in enumerate(examples) if example.label is not None]
    if not 1 <= n <= len(candidates):
        raise InputError(f"cannot keep the labels of {n} examples: only {len(candidates)} have one (the least is 1)")
    chosen = set(_by_class(examples, candidates, "labelled", seed, first=0.0)[:n])
    unlabelled = [
        replace(example, label=None, score=None, rationale=None, rationales={})
        for i, example in enumerate(examples)
        if i not in chosen
    ]
    return [example for i, example in enumerate(examples) if i in chosen], unlabelled


def split_holdout(examples: list[Example], amount: int | float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out) examples. amount: the number of rows to hold out, or a share below 1.

    The draw is stratified: each label is held out in its share, and a label of only one row is kept. The choice depends
    only on ids, labels, seed and amount.
    """
    total = len(examples)
    n = max(1, round(amount * total)) if 0 < amount < 1 else int(amount) if float(amount).is_integer() else 0
    if not 1 <= n < total:
        raise InputError(f"cannot hold out {amount} of {total} examples: give a share below 1 or a smaller number")
    held = set(_by_class(examples, range(total), "holdout", seed, first=0.5)[:n])
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def _by_class(examples, indices, purpose, seed, first):
    """Indices in an order in which every prefix has the shares of the classes, up to one row.

    A class of m rows is at the places first / m, (first + 1) / m, ... of the whole. Within a class, and at equal
    places, the order is random by id.
    """
    key, classes = _shuffle_key(examples, purpose, seed), defaultdict(list)
    places: dict[int, float] = {}
    for i in sorted(indices, key=key):
        classes[examples[i].label].append(i)
    for members in classes.values():
        places |= {i: (rank + first) / len(members) for rank, i in enumerate(members)}
    return sorted(places, key=lambda i: (places[i], key(i)))


def _shuffle_key(examples: list[Example], purpose: str, seed: int):
    """A sort key for indices: a random order by id. `purpose` makes the draws of different functions independent."""
    return lambda i: (hashlib.sha256(f"{purpose}\0{seed}\0{examples[i].id}".encode()).digest(), i)
