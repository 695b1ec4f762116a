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
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from numbers import Number
from pathlib import Path

from ..common.errors import InputError, brief, brief_list
from ..tasks import Example, Task, same_word, split_answer
from .tables import SAVED_DATA_SET, Table, dataset_rows, first_line, read_table

FIELDS = ("id", "text", "text_b", "label", "score", "rationale", "rationales")
IGNORABLE = ("id", "score", "rationale", "rationales")  # fields that --columns may map to nothing
NO_LABEL = (
    "",
    "-1",
    "nan",
    "none",
    "null",
    "<na>",
)  # how files say that a row has no label, where these are no labels of the task
NAMED_LABELS = 12  # spellings of a missing label that a log line names


class NoSuchSplit(InputError):
    """A data set that has no split of that name."""


@dataclass(frozen=True)
class Source:
    """Where examples come from: a file `path` ("demo:train" for the built-in data) or else a hub `dataset`."""

    path: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"  # of a hub data set
    columns: dict[str, str] = field(default_factory=dict)
    label_map: dict[str, str] = field(default_factory=dict)
    delimiter: str | None = None  # of a CSV file; None: recognised
    encoding: str | None = None  # of a text file; None: UTF-8

    def __post_init__(self):
        if bool(self.path) == bool(self.dataset):
            raise InputError("give a data file or --dataset <hub name>, one of the two")


# ---- the public functions


def load_examples(
    source, task: Task, *, labels="required", columns=None, label_map=None, empty="drop", log=print
) -> list[Example]:
    """Examples from a path, a `Source` or a `Table`. `columns` and `label_map` are dicts or flag strings ("text=sentence").

    labels: "required", "optional", or "ignored": then label, score and rationale columns are not even read. Rows with an
    empty text, or without a label where labels are required, are dropped; `log` gets a line that counts and names them.
    empty "keep" keeps rows without a text, as "". Raises InputError for everything else that is wrong with the file, the
    mapping or a row.
    """
    if isinstance(source, Table):
        return _to_examples(source, task, columns, label_map, labels, empty, log)
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
    table = read_table(source.path, source.delimiter, source.encoding)
    return _to_examples(table, task, columns, label_map, labels, empty, log)


def load_hub_examples(
    name: str, task: Task, *, config=None, split="train", columns=None, label_map=None, labels="required", log=print
) -> list[Example]:
    """Examples from a hub data set, a local directory laid out like one, or one that `datasets` saved with save_to_disk.

    Raises InputError as above, and NoSuchSplit.
    """
    full_name = "/".join(filter(None, (name, config, split)))
    try:
        names, rows = dataset_rows(_load_split(name, config, split))
    except InputError:
        raise
    except Exception as error:  # datasets, fsspec, httpx and pyarrow each raise their own; there is no common base
        flags = f"--dataset {name}" + (f" --dataset_config {config}" if config else "")
        kind = NoSuchSplit if "Unknown split" in str(error) else InputError
        raise kind(f"{flags}, split {split!r}: cannot be loaded: {first_line(error)}") from error
    return _to_examples(Table(full_name, full_name, rows, "row", names), task, columns, label_map, labels, "drop", log)


def _load_split(name, config, split):
    import datasets  # here, because the import takes two seconds that a JSONL file need not wait for

    if not any((Path(name) / file).is_file() for file in SAVED_DATA_SET):
        return datasets.load_dataset(name, config, split=split)
    saved = datasets.load_from_disk(name).with_format(None)  # Arrow and JSON; the rows as plain values
    if not isinstance(saved, datasets.DatasetDict):
        if split != "train":
            raise NoSuchSplit(f"--dataset {name}: was saved as one data set, without splits, so there is no {split!r}")
        return saved
    if split not in saved:
        raise NoSuchSplit(f"--dataset {name}: has no split {split!r}; it has {brief_list(saved)}")
    return saved[split]


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

    Drawn by class: each label has its share of the n, and one row at least as long as there are n. The choice hangs on ids,
    labels, seed and n alone, and is nested: under one seed the 1000 are among the 2000.
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
    """(kept, held out): `amount` is a number of rows or a share below 1, drawn by class: each label is held out in its share, and
    a label of one row is kept. The choice hangs on ids, labels, seed and amount."""
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
    """Indices in an order any beginning of which has the classes' own shares, to one row: a class of m rows stands at the places
    first / m, (first + 1) / m, ... of the whole. Within a class, and where places coincide, the order is drawn by id."""
    key, classes, places = _shuffle_key(examples, purpose, seed), defaultdict(list), {}
    for i in sorted(indices, key=key):
        classes[examples[i].label].append(i)
    for members in classes.values():
        places |= {i: (rank + first) / len(members) for rank, i in enumerate(members)}
    return sorted(places, key=lambda i: (places[i], key(i)))


def parse_mapping_flag(value: str | dict | None, flag: str = "--columns") -> dict[str, str]:
    """ "text=sentence,label=gold" as a dict; a dict is checked likewise. Raises InputError that names the flag.

    Nothing behind the = means: a column that is not read, a label word that stands for no label.
    """
    entries = [(str(left), right) for left, right in value.items()] if isinstance(value, dict) else []
    for entry in value.split(",") if isinstance(value, str) and value.strip() else ():
        left, equals, right = (part.strip() for part in entry.partition("="))
        if not left or not equals:
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
        if not mapping[name] and name not in IGNORABLE:
            raise InputError(
                f"{flag} {name}=: the field {name!r} is needed; only {', '.join(IGNORABLE)} can be left out like this"
            )
    return mapping


# ---- rows to examples


def _to_examples(table: Table, task: Task, columns, label_map, labels: str, empty: str, log) -> list[Example]:
    reader = _RowReader(table, task, columns, label_map, labels)
    examples, dropped, times_seen, repeated = [], defaultdict(list), defaultdict(int), []
    for n, row in table.rows:
        example = reader.example(n, row)
        if empty == "drop" and (not example.text or task.is_pair and not example.text_b):
            dropped["empty text"].append(n)
        elif labels == "required" and example.label is None:
            dropped["no label"].append(n)
        else:
            unique = example.id
            while times_seen[unique]:  # an id that comes again becomes id#2, id#3, ...
                times_seen[example.id] += 1
                unique = f"{example.id}#{times_seen[example.id]}"
            times_seen[unique] += 1
            repeated += (
                [n] if unique != example.id and "id" in reader.columns else []
            )  # equal texts are `splits`' to tell of
            examples.append(replace(example, id=unique))
    table.report(dropped, repeated, len(examples), log)
    if labels == "optional" and reader.without_label or any(reader.without_label):
        named = ", ".join(
            f"{brief(word) if word else 'empty'}: {count}"
            for word, count in reader.without_label.most_common(NAMED_LABELS)
        )
        log(f"{table.name}: rows without a label: {sum(reader.without_label.values())} ({named})")
    return examples


class _RowReader:
    """Turns a row into an Example. Every complaint names the place, the field and the column it came from."""

    def __init__(self, table: Table, task: Task, columns, label_map, labels: str):
        self.table, self.task, mapping = table, task, parse_mapping_flag(columns)
        self.without_label = Counter()  # spelling: rows
        present = table.columns
        for name, column in mapping.items():
            if column and column not in present:
                self._refuse_missing_header()
                raise InputError(
                    f"{table.name}: no column {brief(column)} (--columns {name}={column}); {_present(present)}"
                )
        # A column given to one field is not read for another as well: after score=label, `label` holds no labels.
        self.columns = {name: name for name in FIELDS if name in present and name not in mapping.values()} | mapping
        self.columns = {name: column for name, column in self.columns.items() if column}
        if not (task.ordinal or {"pearson", "spearman"} & set(task.metrics)) and "score" not in mapping:
            self.columns.pop("score", None)  # somebody's column of that name: scores mean something on a scale alone
        # The authors' own format: the label and the rationale are both inside `output`.
        needed = {"instruction"} if labels == "ignored" else {"instruction", "output"}
        self.rllr = "text" not in self.columns and needed <= set(present)
        if self.rllr:
            self.columns = {"text": "instruction", "label": "output", "rationale": "rationale"} | self.columns
        if labels == "ignored":
            self.columns = {name: column for name, column in self.columns.items() if name in ("id", "text", "text_b")}
        self.label_map = {
            same_word(word): self._mapped_label(word, label)
            for word, label in parse_mapping_flag(label_map, "--label_map").items()
        }
        has_label = "label" in self.columns or task.ordinal and "score" in self.columns
        for name in ["text"] + ["text_b"] * task.is_pair + ["label"] * (labels == "required" and not has_label):
            if name not in self.columns:
                self._refuse_missing_header()
                raise InputError(
                    f"{table.name}: no column for the field {name!r} of task {task.name}; "
                    f"{_present(present)}; say which it is with --columns {name}=<column>"
                )

    def _refuse_missing_header(self):
        """InputError where what should be the names of the columns is a row: one of them is a label, and none a field."""
        names = self.table.columns
        labels = [name for name in names if self.task.canonical_label(name) is not None]
        if labels and not set(names) & set(FIELDS):
            raise InputError(
                f"{self.table.name}: has no header: its first line is a row ({brief_list(names, 3)}); write the columns' names above it, "
                "for example text,label"
            )

    def _mapped_label(self, word: str, label: str) -> str | None:
        if not str(label):
            return None
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
            place=f"{self.table.short}:{n}",
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
        if name not in self.columns:
            return None
        return self.table.text(n, row, name, self.columns[name], self._how_to_ignore(name) if name in IGNORABLE else "")

    def _error(self, n: int, name: str, problem: str) -> InputError:
        return self.table.error(n, name, self.columns.get(name, name), problem)

    def _id(self, n: int, row: dict) -> str:
        """The row's own id, any scalar; else a hash of its texts, which is the same wherever the row stands."""
        value = self._value(row, "id")
        if isinstance(value, (list, dict)):
            raise self._error(
                n, "id", f"must be one value, got {type(value).__name__} {brief(value)}{self._how_to_ignore('id')}"
            )
        if isinstance(value, str):
            self.table.text(n, row, "id", self.columns["id"])  # for its errors
        written = "" if value is None or value != value else str(value).strip()
        return written or text_hash(
            self._text(n, row, "text"), self._text(n, row, "text_b") if self.task.is_pair else None
        )

    def _how_to_ignore(self, name):
        return f"; --columns {name}= leaves this column out"

    def _label(self, n: int, value, name: str = "label") -> str | None:
        """The task's label for a value: a word, a number, or an integer that stands for a ClassLabel's name. None: no label.

        Compared as written first, then as a number: "1.0" may be a task's label, or a 1 as pandas writes it.
        """
        names = self.table.class_names.get(self.columns.get(name), [])
        words = _label_words(value, names)
        if words is None:
            raise self._error(n, name, f"must be a word or a number, got {type(value).__name__} {brief(value)}")
        for word in words:
            if same_word(word) in self.label_map:
                label = self.label_map[same_word(word)]
                return self._no_label(word, name) if label is None else label
        # The first word alone: the integer behind a ClassLabel's name says nothing about the task's own digits.
        label = self.task.canonical_label(words[0])
        label = self._label_of_number(words[0]) if label is None else label
        if label is not None:
            return label
        if same_word(words[-1]) in NO_LABEL:
            return self._no_label(words[-1], name)
        theirs = f" (the data set's labels: {', '.join(names)})" if names else ""
        hint = "; is it a score? --columns score=<column>" if self.task.ordinal and isinstance(value, float) else ""
        raise self._error(
            n,
            name,
            f"is {brief(words[0])}{theirs}, not a label of task {self.task.name}: "
            f"{', '.join(self.task.labels)}; map it with --label_map <theirs>=<ours>,... (nothing behind the =: no label){hint}",
        )

    def _no_label(self, word, name):
        if name == "label":
            self.without_label[word.strip()] += 1

    def _label_of_number(self, word):
        number = _number(word)
        return None if number is None else next((label for label in self.task.labels if _number(label) == number), None)

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
                problem = f"is not valid JSON: {first_line(error)}{self._how_to_ignore('rationales')}"
                raise self._error(n, "rationales", problem) from None
        if not isinstance(value, dict | None):
            problem = f"must map labels to texts, got {type(value).__name__} {brief(value)}{self._how_to_ignore('rationales')}"
            raise self._error(n, "rationales", problem)
        texts = {word: self.table.text(n, value, "rationales", word) for word in value or {}}
        return {self._label(n, word, "rationales"): text for word, text in texts.items() if text and word.strip()}


def _label_words(value, names: list[str]) -> list[str] | None:
    """The spellings under which to look a label up, "" for a missing one; None for what can be no label."""
    if value is None:
        return [""]
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, str):
        return [value]
    if isinstance(value, int) and names:  # -1 is how hub data sets mark a missing label
        return [names[value], str(value)] if 0 <= value < len(names) else [str(value)]
    if isinstance(value, Number):
        whole = _number(str(value))
        return [str(value)] + ([str(int(whole))] if whole is not None and whole == int(whole) else [])
    return None


def _number(word: str) -> Decimal | None:
    """A word as a finite number; None where it is none."""
    try:
        number = Decimal(word.strip()) if len(word) < 100 else None
    except InvalidOperation:
        return None
    return number if number is not None and number.is_finite() and abs(number.adjusted()) < 100 else None


def text_hash(text: str | None, text_b: str | None = None) -> str:
    """What tells a row from others by its texts alone, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([text or "", text_b or ""]).encode()).hexdigest()[:16]


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
