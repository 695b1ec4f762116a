"""Files and hub data sets become `Example`s; whatever is wrong with them, one InputError with file, line and field.

    train.jsonl | .json | .csv | .tsv | .parquet | a hub data set | "demo:train"   →   list[Example]

Columns are `text`, `text_b`, `label`, `score`, `rationale`, `rationales`, `id`; others are renamed with
`--columns text=sentence,label=gold`. The format of the authors' repository (`instruction`, `input`, `output`) is read
as well.

Parquet and the hub go through `datasets`. Text files are read with the standard library: `datasets` loses the line
numbers that a useful error needs, reads the texts "NA" and "null" of a CSV file as missing, and guesses column types.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

from .errors import InputError, brief, brief_list
from .tables import Table, dataset_rows, first_line, read_table
from .tasks import Example, Task, split_answer

FIELDS = ("id", "text", "text_b", "label", "score", "rationale", "rationales")


@dataclass(frozen=True)
class Source:
    """Where examples come from: a file `path` ("demo:train" for the built-in data) or else a hub `dataset`."""

    path: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"  # of a hub data set
    columns: dict[str, str] = field(default_factory=dict)
    label_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if bool(self.path) == bool(self.dataset):
            raise InputError("give a data file or --dataset <hub name>, one of the two")


# ---- the public functions


def load_examples(source, task: Task, *, labels="required", columns=None, label_map=None, log=print) -> list[Example]:
    """Examples from a path or a `Source`. `columns` and `label_map` are dicts or flag strings ("text=sentence").

    labels: "required", "optional", or "ignored": then label, score and rationale columns are not even read. Rows with an
    empty text, or without a label where labels are required, are dropped; `log` gets a line that counts and names them.
    Raises InputError for everything else that is wrong with the file, the mapping or a row.
    """
    if not isinstance(source, Source):
        source = Source(path=str(source))
    columns = source.columns if columns is None else columns
    label_map = source.label_map if label_map is None else label_map
    if source.dataset:
        return load_hub_examples(
            source.dataset,
            task,
            config=source.dataset_config,
            split=source.split,
            log=log,
            columns=columns,
            label_map=label_map,
            labels=labels,
        )
    if source.path.partition(":")[0] == "demo":
        return _demo_examples(source.path.partition(":")[2] or "train", task)
    return _to_examples(read_table(source.path), task, columns, label_map, labels, log)


def load_hub_examples(
    name: str, task: Task, *, config=None, split="train", columns=None, label_map=None, labels="required", log=print
) -> list[Example]:
    """Examples from a hub data set, or a local directory laid out like one. Raises InputError as above."""
    import datasets  # here, because the import takes two seconds that a JSONL file need not wait for

    full_name = "/".join(filter(None, (name, config, split)))
    try:
        names, rows = dataset_rows(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # datasets, fsspec, httpx and pyarrow each raise their own; there is no common base
        flags = f"--dataset {name}" + (f" --dataset_config {config}" if config else "")
        raise InputError(f"{flags}, split {split!r}: cannot be loaded: {first_line(error)}") from error
    table = Table(full_name, full_name, rows, "row", names)
    return _to_examples(table, task, columns, label_map, labels, log)


def load_pairs(path, log=print) -> list[dict]:
    """Preference pairs as dicts of prompt, chosen, rejected and kind, from a file with these columns (kind optional)
    or in the authors' ranking format {instruction, input, output: [chosen, rejected]}.

    Rows with an empty text or with `chosen` equal to `rejected` are dropped, counted and named. Raises InputError.
    """
    table = read_table(path)
    ranking = "prompt" not in table.columns and {"instruction", "output"} <= set(table.columns)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in table.columns]
    if missing and not ranking:
        raise InputError(
            f"{table.name}: no column {missing[0]!r}; a pair has prompt, chosen and rejected "
            f"(or instruction, input, output: [chosen, rejected]); {_present(table.columns)}"
        )
    pairs, dropped = [], defaultdict(list)
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


def select_labelled(examples: list[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """`n` examples that keep their labels, and the rest with label, score and rationales taken away; order is kept.

    The choice hangs on ids, seed and n alone, and is nested: under one seed the 1000 are among the 2000.
    """
    candidates = [i for i, example in enumerate(examples) if example.label is not None]
    if not 1 <= n <= len(candidates):
        raise InputError(f"cannot keep the labels of {n} examples: only {len(candidates)} have one (the least is 1)")
    chosen = set(sorted(candidates, key=_shuffle_key(examples, "labelled", seed))[:n])
    unlabelled = [
        replace(example, label=None, score=None, rationale=None, rationales={})
        for i, example in enumerate(examples)
        if i not in chosen
    ]
    return [example for i, example in enumerate(examples) if i in chosen], unlabelled


def split_holdout(examples: list[Example], amount: int | float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out): `amount` is a number of rows or a share below 1. The choice hangs on ids, seed and amount."""
    total = len(examples)
    n = max(1, round(amount * total)) if 0 < amount < 1 else int(amount) if float(amount).is_integer() else 0
    if not 1 <= n < total:
        raise InputError(f"cannot hold out {amount} of {total} examples: give a share below 1 or a smaller number")
    held = set(sorted(range(total), key=_shuffle_key(examples, "holdout", seed))[:n])
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def parse_mapping_flag(value: str | dict | None, flag: str = "--columns") -> dict[str, str]:
    """ "text=sentence,label=gold" as a dict; a dict is checked likewise. Raises InputError that names the flag."""
    entries = [(str(left), right) for left, right in value.items()] if isinstance(value, dict) else []
    for entry in value.split(",") if isinstance(value, str) and value.strip() else ():
        left, _, right = (part.strip() for part in entry.partition("="))
        if not left or not right:
            raise InputError(f"{flag} {value!r}: {entry.strip()!r} is not of the form name=value; commas separate them")
        entries.append((left, right))
    mapping = dict(entries)
    if len(mapping) < len(entries):
        raise InputError(f"{flag} {value!r}: a name is given twice")
    for name in mapping if flag.endswith("columns") else ():
        if name not in FIELDS:
            raise InputError(
                f"{flag} {name}={mapping[name]}: unknown field {name!r}; write field=column, the field "
                f"being one of {', '.join(FIELDS)}"
            )
    return mapping


# ---- rows to examples


def _to_examples(table: Table, task: Task, columns, label_map, labels: str, log) -> list[Example]:
    reader = _RowReader(table, task, columns, label_map, labels)
    examples, dropped, times_seen, repeated = [], defaultdict(list), defaultdict(int), []
    for n, row in table.rows:
        example = reader.example(n, row)
        if not example.text or task.is_pair and not example.text_b:
            dropped["empty text"].append(n)
        elif labels == "required" and example.label is None:
            dropped["no label"].append(n)
        else:
            unique = example.id
            while times_seen[unique]:  # an id that comes again becomes id#2, id#3, ...
                times_seen[example.id] += 1
                unique = f"{example.id}#{times_seen[example.id]}"
            times_seen[unique] += 1
            repeated += [n] if unique != example.id else []
            examples.append(replace(example, id=unique))
    table.report(dropped, repeated, len(examples), log)
    return examples


class _RowReader:
    """Turns a row into an Example. Every complaint names the place, the field and the column it came from."""

    def __init__(self, table: Table, task: Task, columns, label_map, labels: str):
        self.table, self.task, mapping = table, task, parse_mapping_flag(columns)
        present = table.columns
        for name, column in mapping.items():
            if column not in present:
                raise InputError(f"{table.name}: no column {brief(column)} (--columns {name}={column}); {_present(present)}")
        # A column given to one field is not read for another as well: after score=label, `label` holds no labels.
        self.columns = {name: name for name in FIELDS if name in present and name not in mapping.values()} | mapping
        # The authors' own format: the label and the rationale are both inside `output`.
        needed = {"instruction"} if labels == "ignored" else {"instruction", "output"}
        self.rllr = "text" not in self.columns and needed <= set(present)
        if self.rllr:
            self.columns = {"text": "instruction", "label": "output", "rationale": "rationale"} | self.columns
        if labels == "ignored":
            self.columns = {name: column for name, column in self.columns.items() if name in ("id", "text", "text_b")}
        self.label_map = {
            word.strip().casefold(): self._mapped_label(word, label)
            for word, label in parse_mapping_flag(label_map, "--label_map").items()
        }
        has_label = "label" in self.columns or task.ordinal and "score" in self.columns
        for name in ["text"] + ["text_b"] * task.is_pair + ["label"] * (labels == "required" and not has_label):
            if name not in self.columns:
                raise InputError(
                    f"{table.name}: no column for the field {name!r} of task {task.name}; "
                    f"{_present(present)}; say which it is with --columns {name}=<column>"
                )

    def _mapped_label(self, word: str, label: str) -> str:
        canonical = self.task.canonical_label(str(label))
        if canonical is None:
            raise InputError(
                f"--label_map {word}={label}: {label!r} is not a label of task {self.task.name}: "
                f"{', '.join(self.task.labels)}"
            )
        return canonical

    def example(self, n: int, row: dict) -> Example:
        if self.rllr:
            row = self._unpack_output(n, row)
        for name in ("text", "text_b") if self.task.is_pair else ("text",):
            if self.columns[name] not in row:
                raise self._error(n, name, f"is missing; {_present(row)}")
        label, score = self._label(n, self._value(row, "label")), self._score(n, row)
        rationales = self._rationales(n, row)
        if label is None and score is not None and self.task.ordinal:
            label = self._label(n, math.floor(score + 0.5), "score")  # half up; round() makes 2.5 a 2
        return Example(
            id=self._id(n, row),
            text=self._text(n, row, "text") or "",
            text_b=self._text(n, row, "text_b"),
            label=label,
            score=score,
            rationale=self._text(n, row, "rationale") or rationales.get(label),
            rationales=rationales,
        )

    def _unpack_output(self, n: int, row: dict) -> dict:
        """{instruction, input, output} with text, label and rationale put where `self.columns` looks for them."""
        text = self.table.text(n, row, "input")
        row = row | ({"instruction": text} if text else {})
        if "label" not in self.columns:
            return row
        if isinstance(row.get("output"), list):
            raise self._error(n, "label", "is a list: this is ranking data, for preference pairs (load_pairs)")
        output = self.table.text(n, row, "output")
        rationale, label = split_answer(self.task, output or "")
        return row | (
            {"output": output, "rationale": None} if label is None else {"output": label, "rationale": rationale}
        )

    def _value(self, row: dict, name: str):
        return row.get(self.columns[name]) if name in self.columns else None

    def _text(self, n: int, row: dict, name: str) -> str | None:
        return self.table.text(n, row, name, self.columns[name]) if name in self.columns else None

    def _error(self, n: int, name: str, problem: str) -> InputError:
        return self.table.error(n, name, self.columns.get(name, name), problem)

    def _id(self, n: int, row: dict) -> str:
        value = self._value(row, "id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(n, row, "id") or f"{self.table.short}:{n}"

    def _label(self, n: int, value, name: str = "label") -> str | None:
        """The task's label for a value: a word, a number, or an integer that stands for a ClassLabel's name."""
        names = self.table.class_names.get(self.columns.get(name), [])
        words = _label_words(value, names)
        if words is None:
            raise self._error(n, name, f"must be a word or a number, got {type(value).__name__} {brief(value)}")
        for word in words:
            if word.strip().casefold() in self.label_map:
                return self.label_map[word.strip().casefold()]
        # The first word alone: the integer behind a ClassLabel's name says nothing about the task's own digits.
        if not words or self.task.canonical_label(words[0]) is not None:
            return self.task.canonical_label(words[0]) if words else None
        theirs = f" (the data set's labels: {', '.join(names)})" if names else ""
        hint = "; is it a score? --columns score=<column>" if self.task.ordinal and isinstance(value, float) else ""
        raise self._error(
            n,
            name,
            f"is {brief(words[0])}{theirs}, not a label of task {self.task.name}: "
            f"{', '.join(self.task.labels)}; map it with --label_map <theirs>=<ours>,...{hint}",
        )

    def _score(self, n: int, row: dict) -> float | None:
        value = self._value(row, "score")
        if value is None or isinstance(value, str) and not value.strip():
            return None
        try:
            score = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise self._error(n, "score", f"must be a finite number, got {brief(value)}")
        return score

    def _rationales(self, n: int, row: dict) -> dict[str, str]:
        """{label: rationale}; a string is JSON (CSV has no other way), a null or empty rationale counts as absent."""
        value = self._value(row, "rationales")
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except (ValueError, RecursionError) as error:
                raise self._error(n, "rationales", f"is not valid JSON: {first_line(error)}") from None
        if not isinstance(value, dict | None):
            raise self._error(n, "rationales", f"must map labels to texts, got {type(value).__name__} {brief(value)}")
        texts = {word: self.table.text(n, value, "rationales", word) for word in value or {}}
        return {self._label(n, word, "rationales"): text for word, text in texts.items() if text and word.strip()}


def _label_words(value, names: list[str]) -> list[str] | None:
    """The spellings under which to look a label up; none for a missing label; None for what can be no label."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return []
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, int) and names:  # -1 is how hub data sets mark a missing label
        return [names[value], str(value)] if 0 <= value < len(names) else [] if value == -1 else [str(value)]
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\.0+\s*", value):  # "3.0", pandas' way to write a 3 in CSV
        return [value.partition(".")[0], value]
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, int | float):
        return [str(int(value)) if float(value).is_integer() else str(value)]
    return None


# ---- small things


def _ranking_row(table: Table, n: int, row: dict) -> dict:
    """The authors' ranking row as prompt, chosen, rejected; the prompt is the instruction with the input below it."""
    output = row.get("output")
    if not isinstance(output, list) or len(output) != 2:
        raise table.error(n, "output", "output", f"must be the list [chosen, rejected], got {brief(output)}")
    prompt = "\n".join(filter(None, (table.text(n, row, "instruction"), table.text(n, row, "input"))))
    return {"prompt": prompt, "chosen": output[0], "rejected": output[1], "kind": row.get("kind")}


def _demo_examples(split: str, task: Task) -> list[Example]:
    from .demo import demo_examples

    if split not in ("train", "dev", "test"):
        raise InputError(f"demo:{split}: the built-in data has demo:train, demo:dev and demo:test")
    examples = demo_examples(split)
    for example in examples:
        if task.is_pair or task.canonical_label(example.label or "") is None:
            raise InputError(f"demo:{split}: its labels ({example.label!r}, ...) are not those of task {task.name}")
    return examples


def _shuffle_key(examples: list[Example], purpose: str, seed: int):
    """Sort key that orders indices at random by id; `purpose` keeps the draws of different functions independent."""
    return lambda i: (hashlib.sha256(f"{purpose}\0{seed}\0{examples[i].id}".encode()).digest(), i)


def _present(columns) -> str:
    return f"the columns are {brief_list(columns)}"
