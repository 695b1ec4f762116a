"""Files become rows, each with its line: JSONL, JSON, CSV, TSV by the standard library, Parquet through `datasets`.

`datasets` would lose the line numbers that a useful error needs, read the texts "NA" and "null" of a CSV file as missing,
and guess column types; so text files are read here.
"""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InputError, brief, brief_list

NAMED_ROWS = 5  # how many dropped rows a log line names
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


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
            raise self.error(n, name, column or name, f"must be text, got {type(value).__name__} {brief(value)}")
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
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None
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
        raise InputError(f"{path}:{line}: JSON that cannot be read: {first_line(error)}") from None


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
                    raise InputError(f"{path}:{line}: the header names a column twice: {brief_list(header)}")
            elif cells and len(cells) != len(header):
                raise InputError(
                    f"{path}:{line}: has {len(cells)} fields where the header has {len(header)}; "
                    f"put quotes around a field that holds the delimiter {delimiter!r}"
                )
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
        return dataset_rows(datasets.Dataset(pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()))
    except Exception as error:  # as in load_hub_examples
        raise InputError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


def dataset_rows(dataset) -> tuple[dict[str, list[str]], list[tuple[int, dict]]]:
    """(names of the ClassLabel columns, numbered rows) of a `datasets.Dataset`."""
    names = {column: list(kind.names) for column, kind in dataset.features.items() if hasattr(kind, "int2str")}
    return names, list(enumerate(dataset, start=1))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
