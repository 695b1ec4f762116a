"""Files and hub data sets become `Example`s; whatever is wrong with them, one InputError with file, line and field.

    train.jsonl | .json | .csv | .tsv | .parquet | a hub data set | "demo:train"   →   list[Example]

Columns are `text`, `text_b`, `label`, `score`, `rationale`, `rationales`, `id`; others are renamed with
`--columns text=sentence,label=gold`. The format of the authors' repository (`instruction`, `input`, `output`) is read
as well.

Parquet and the hub go through `datasets`. Text files are read with the standard library: `datasets` loses the line
numbers that a useful error needs, reads the texts "NA" and "null" of a CSV file as missing, and guesses column types.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import InputError
from .tasks import Example, Task, split_answer

FIELDS = ("id", "text", "text_b", "label", "score", "rationale", "rationales")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
NAMED_ROWS = 5  # how many dropped rows a log line names


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


@dataclass(frozen=True)
class Table:
    """Rows as read, each with its 1-based place: the line of a text file, or the row of Parquet and the hub."""

    name: str  # path or hub name, for messages
    short: str  # what ids are made of: file name or hub name
    rows: list[tuple[int, dict]]
    unit: str = "line"
    class_names: dict[str, list[str]] = field(default_factory=dict)  # column -> names of its integers (ClassLabel)

    def __post_init__(self):
        if not self.rows:
            raise InputError(f"{self.name}: holds no rows")
        for n, row in self.rows:
            if not isinstance(row, dict):
                raise InputError(f"{self.at(n)}: must be a JSON object of fields, got {type(row).__name__}")

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for _, row in self.rows for key in row))

    def at(self, n: int) -> str:
        return f"{self.name}:{n}" if self.unit == "line" else f"{self.name}: row {n}"

    def error(self, n: int, name: str, column: str, problem: str) -> InputError:
        source = f" (column {column!r})" if column != name else ""
        return InputError(f"{self.at(n)}: field {name!r}{source} {problem}")

    def text(self, n: int, row: dict, name: str, column: str | None = None) -> str | None:
        """The text in a column, None if absent or blank; anything but text is an error, and so is broken Unicode."""
        value = row.get(column or name)
        if value is not None and not isinstance(value, str):
            raise self.error(n, name, column or name, f"must be text, got {type(value).__name__} {_brief(value)}")
        if value and re.search(r"[\ud800-\udfff]", value):  # JSON can escape half a character; no tokenizer takes it
            raise self.error(n, name, column or name, "has a lone surrogate (half of a \\u pair); mend or remove it")
        return value if value and value.strip() else None

    def report(self, dropped: dict[str, list[int]], repeated: list[int], kept: int, log) -> None:
        """One log line with what was dropped and why; InputError if nothing is left."""
        line = f"{len(self.rows)} rows read"
        for reason, places in dropped.items():
            line += f", {len(places)} dropped ({reason}): {self._some(places)}"
        if not kept:
            raise InputError(f"{self.name}: no usable row: {line}")
        if repeated:
            line += f", {len(repeated)} repeated ids made unique with #2, #3, ...: {self._some(repeated)}"
        log(f"{self.name}: {line}")

    def _some(self, places: list[int]) -> str:
        named = ", ".join(f"{self.unit} {n}" for n in places[:NAMED_ROWS])
        return named + (", ..." if len(places) > NAMED_ROWS else "")


# ---- the public functions


def load_examples(source, task: Task, *, require_labels=True, columns=None, label_map=None, log=print) -> list[Example]:
    """Examples from a path or a `Source`. `columns` and `label_map` are dicts or flag strings ("text=sentence").

    Rows with an empty text, or without a label where labels are required, are dropped; `log` gets a line that counts
    and names them. Raises InputError for everything else that is wrong with the file, the mapping or a row.
    """
    if not isinstance(source, Source):
        source = Source(path=str(source))
    columns = source.columns if columns is None else columns
    label_map = source.label_map if label_map is None else label_map
    if source.dataset:
        return load_hub_examples(source.dataset, task, config=source.dataset_config, split=source.split, log=log,
                                 columns=columns, label_map=label_map, require_labels=require_labels)
    if source.path.partition(":")[0] == "demo":
        return _demo_examples(source.path.partition(":")[2] or "train", task)
    return _to_examples(read_table(source.path), task, columns, label_map, require_labels, log)


def load_hub_examples(name: str, task: Task, *, config=None, split="train", columns=None, label_map=None,
                      require_labels=True, log=print) -> list[Example]:
    """Examples from a hub data set, or a local directory laid out like one. Raises InputError as above."""
    import datasets  # here, because the import takes two seconds that a JSONL file need not wait for

    full_name = "/".join(filter(None, (name, config, split)))
    try:
        names, rows = _dataset_rows(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # datasets, fsspec, httpx and pyarrow each raise their own; there is no common base
        flags = f"--dataset {name}" + (f" --dataset_config {config}" if config else "")
        raise InputError(f"{flags}, split {split!r}: cannot be loaded: {_first_line(error)}") from error
    table = Table(full_name, full_name, rows, "row", names)
    return _to_examples(table, task, columns, label_map, require_labels, log)


def load_pairs(path, log=print) -> list[dict]:
    """Preference pairs as dicts of prompt, chosen, rejected and kind, from a file with these columns (kind optional)
    or in the authors' ranking format {instruction, input, output: [chosen, rejected]}.

    Rows with an empty text or with `chosen` equal to `rejected` are dropped, counted and named. Raises InputError.
    """
    table = read_table(path)
    ranking = "prompt" not in table.columns and {"instruction", "output"} <= set(table.columns)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in table.columns]
    if missing and not ranking:
        raise InputError(f"{table.name}: no column {missing[0]!r}; a pair has prompt, chosen and rejected "
                         f"(or instruction, input, output: [chosen, rejected]); {_present(table.columns)}")
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
    unlabelled = [replace(example, label=None, score=None, rationale=None, rationales={})
                  for i, example in enumerate(examples) if i not in chosen]
    return [example for i, example in enumerate(examples) if i in chosen], unlabelled


def split_holdout(examples: list[Example], amount: int | float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out): `amount` is a number of rows or a share below 1. The choice hangs on ids, seed and amount."""
    total = len(examples)
    n = max(1, round(amount * total)) if 0 < amount < 1 else int(amount) if float(amount).is_integer() else 0
    if not 1 <= n < total:
        raise InputError(f"cannot hold out {amount} of {total} examples: give a share below 1 or a smaller number")
    held = set(sorted(range(total), key=_shuffle_key(examples, "holdout", seed))[:n])
    return ([example for i, example in enumerate(examples) if i not in held],
            [example for i, example in enumerate(examples) if i in held])


def parse_mapping_flag(value: str | dict | None, flag: str = "--columns") -> dict[str, str]:
    """"text=sentence,label=gold" as a dict; a dict is checked likewise. Raises InputError that names the flag."""
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
            raise InputError(f"{flag} {name}={mapping[name]}: unknown field {name!r}; write field=column, the field "
                             f"being one of {', '.join(FIELDS)}")
    return mapping


# ---- files to rows


def read_table(path) -> Table:
    """All rows of a file, each with its line; the suffix tells the format. Raises InputError with file and line."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give one data file ({', '.join(SUFFIXES)})")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}") from None
    if content.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: is compressed with gzip; unpack it first (gunzip)")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown file type {suffix!r}; the name must end in one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        names, rows = _read_parquet(path, content)
        return Table(str(path), path.name, rows, "row", names)
    read = {".csv": _read_csv, ".tsv": _read_tsv, ".json": _read_json}.get(suffix, _read_json_lines)
    rows = list(read(path, _decode(path, content)))
    if len({line for line, _ in rows}) < len(rows):  # several elements of a JSON array on one line: number them instead
        return Table(str(path), path.name, list(enumerate((row for _, row in rows), start=1)), "row")
    return Table(str(path), path.name, rows)


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # -sig drops the byte order mark that Windows programs write
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None


def _read_json_lines(path: Path, content: str):
    # Not str.splitlines: it also cuts at U+2028 and the like, which JSON strings may hold.
    lines = enumerate(re.split(r"\r\n|\n|\r", content), start=1)
    return ((n, _parse_json(path, n, line)) for n, line in lines if line.strip())


def _read_json(path: Path, content: str):
    """A JSON array of objects, one object, or JSON lines under the name .json."""
    if not content.lstrip().startswith("["):
        try:
            return [(1, json.loads(content))]
        except (ValueError, RecursionError):
            return _read_json_lines(path, content)
    # Parsed as a whole for its errors, then by element: json.loads does not tell on which line an element begins.
    rows, separator, position = [], re.compile(r"[\s,]*"), content.index("[") + 1
    line = 1 + content.count("\n", 0, position)
    for _ in _parse_json(path, 1, content):
        start = separator.match(content, position).end()
        element, end = json.JSONDecoder().raw_decode(content, start)
        rows.append((line + content.count("\n", position, start), element))
        line, position = line + content.count("\n", position, end), end
    return rows


def _parse_json(path: Path, line: int, text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a JSON array belongs in a .json file" if text.startswith("[") and path.suffix != ".json" else ""
        raise InputError(f"{path}:{line + error.lineno - 1}: not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:  # an integer of over 4300 digits; thousands of nested brackets
        raise InputError(f"{path}:{line}: JSON that cannot be read: {_first_line(error)}") from None


def _read_csv(path: Path, content: str, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL):
    """Rows of a file with a header. A quoted field may hold delimiters and newlines; a row's line is its first."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header, next_line = None, 1
    try:
        for cells in reader:
            line, next_line = next_line, reader.line_num + 1
            if header is None and cells:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise InputError(f"{path}:{line}: the header names a column twice: {', '.join(header)}")
            elif cells and len(cells) != len(header):
                raise InputError(f"{path}:{line}: has {len(cells)} fields where the header has {len(header)}; "
                                 f"put quotes around a field that holds the delimiter {delimiter!r}")
            elif cells:
                yield line, dict(zip(header, cells))
    except csv.Error as error:
        raise InputError(f"{path}:{next_line}: quotes do not pair up in the row that begins here: {error}") from None


def _read_tsv(path: Path, content: str):
    """Quoted as in CSV; but with quotes as plain characters (GLUE's files) where that alone makes every line a row."""
    try:
        plain = list(_read_csv(path, content, "\t", csv.QUOTE_NONE))
    except InputError:
        return _read_csv(path, content, "\t")
    try:
        quoted = list(_read_csv(path, content, "\t"))
    except InputError:
        return plain
    return plain if len(plain) > len(quoted) and "\t" in content else quoted


def _read_parquet(path: Path, content: bytes):
    import datasets
    import pyarrow.parquet

    try:  # not datasets.load_dataset, which leaves a copy in the cache and takes [ ] * in a path for a pattern
        return _dataset_rows(datasets.Dataset(pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()))
    except Exception as error:  # as in load_hub_examples
        raise InputError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error


def _dataset_rows(dataset) -> tuple[dict[str, list[str]], list[tuple[int, dict]]]:
    """(names of the ClassLabel columns, numbered rows) of a `datasets.Dataset`."""
    names = {column: list(kind.names) for column, kind in dataset.features.items() if hasattr(kind, "int2str")}
    return names, list(enumerate(dataset, start=1))


# ---- rows to examples


def _to_examples(table: Table, task: Task, columns, label_map, require_labels: bool, log) -> list[Example]:
    reader = _RowReader(table, task, columns, label_map, require_labels)
    examples, dropped, times_seen, repeated = [], defaultdict(list), defaultdict(int), []
    for n, row in table.rows:
        example = reader.example(n, row)
        if not example.text or task.is_pair and not example.text_b:
            dropped["empty text"].append(n)
        elif require_labels and example.label is None:
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

    def __init__(self, table: Table, task: Task, columns, label_map, require_labels: bool):
        self.table, self.task, mapping = table, task, parse_mapping_flag(columns)
        present = table.columns
        for name, column in mapping.items():
            if column not in present:
                raise InputError(f"{table.name}: no column {column!r} (--columns {name}={column}); {_present(present)}")
        # A column given to one field is not read for another as well: after score=label, `label` holds no labels.
        self.columns = {name: name for name in FIELDS if name in present and name not in mapping.values()} | mapping
        # The authors' own format: the label and the rationale are both inside `output`.
        self.rllr = "text" not in self.columns and {"instruction", "output"} <= set(present)
        if self.rllr:
            self.columns = {"text": "instruction", "label": "output", "rationale": "rationale"} | self.columns
        self.label_map = {word.strip().casefold(): self._mapped_label(word, label)
                          for word, label in parse_mapping_flag(label_map, "--label_map").items()}
        has_label = "label" in self.columns or task.ordinal and "score" in self.columns
        for name in ["text"] + ["text_b"] * task.is_pair + ["label"] * (require_labels and not has_label):
            if name not in self.columns:
                raise InputError(f"{table.name}: no column for the field {name!r} of task {task.name}; "
                                 f"{_present(present)}; say which it is with --columns {name}=<column>")

    def _mapped_label(self, word: str, label: str) -> str:
        canonical = self.task.canonical_label(str(label))
        if canonical is None:
            raise InputError(f"--label_map {word}={label}: {label!r} is not a label of task {self.task.name}: "
                             f"{', '.join(self.task.labels)}")
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
        output = row.get("output")
        if isinstance(output, list):
            raise self._error(n, "label", "is a list: this is ranking data, for preference pairs (load_pairs)")
        output, text = self.table.text(n, row, "output"), self.table.text(n, row, "input")
        rationale, label = split_answer(self.task, output or "")
        found = {"output": output, "rationale": None} if label is None else {"output": label, "rationale": rationale}
        return row | found | ({"instruction": text} if text else {})

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
            raise self._error(n, name, f"must be a word or a number, got {type(value).__name__} {_brief(value)}")
        for word in words:
            if word.strip().casefold() in self.label_map:
                return self.label_map[word.strip().casefold()]
        # The first word alone: the integer behind a ClassLabel's name says nothing about the task's own digits.
        if not words or self.task.canonical_label(words[0]) is not None:
            return self.task.canonical_label(words[0]) if words else None
        theirs = f" (the data set's labels: {', '.join(names)})" if names else ""
        hint = "; is it a score? --columns score=<column>" if self.task.ordinal and isinstance(value, float) else ""
        raise self._error(n, name, f"is {_brief(words[0])}{theirs}, not a label of task {self.task.name}: "
                                   f"{', '.join(self.task.labels)}; map it with --label_map <theirs>=<ours>,...{hint}")

    def _score(self, n: int, row: dict) -> float | None:
        value = self._value(row, "score")
        if value is None or isinstance(value, str) and not value.strip():
            return None
        try:
            score = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise self._error(n, "score", f"must be a finite number, got {_brief(value)}")
        return score

    def _rationales(self, n: int, row: dict) -> dict[str, str]:
        """{label: rationale}; a string is JSON (CSV has no other way), a null or empty rationale counts as absent."""
        value = self._value(row, "rationales")
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except (ValueError, RecursionError) as error:
                raise self._error(n, "rationales", f"is not valid JSON: {_first_line(error)}") from None
        if not isinstance(value, dict | None):
            raise self._error(n, "rationales", f"must map labels to texts, got {type(value).__name__} {_brief(value)}")
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
        raise table.error(n, "output", "output", f"must be the list [chosen, rejected], got {_brief(output)}")
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
    return f"the columns are {', '.join(map(repr, columns))}"


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
