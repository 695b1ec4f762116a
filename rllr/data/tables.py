"""Read files as rows with line numbers: JSONL, JSON, CSV and TSV with the standard library, Parquet through `datasets`.

Text files are not read through `datasets`: it loses the line numbers that a useful error message needs, reads the texts
"NA" and "null" of a CSV file as missing, and guesses column types.
"""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..common.errors import InputError, brief, brief_list
from ..common.files import is_lfs_pointer

NAMED_ROWS = 5  # number of dropped rows that a log line names
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Names of delimiters, because a tab is hard to type in a shell.
DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
NEWLINE = b"\n"
SAVED_DATA_SET = ("state.json", "dataset_dict.json")  # files in a directory that save_to_disk of `datasets` wrote


@dataclass(frozen=True)
class Table:
    """Rows as read, each with its number from 1: the line in a text file, or the row of Parquet and hub data."""

    name: str  # path or hub name, for messages
    short: str  # file name or hub name, for the places of rows
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
        if self.name == "standard input":
            return f"{self.name}, line {n}"
        return f"{self.name}:{n}" if self.unit == "line" else f"{self.name}: row {n}"

    def error(self, n: int, name: str, column: str, problem: str) -> InputError:
        """The error for a field of row n, to be raised by the caller."""
        source = f" (column {column!r})" if column != name else ""
        return InputError(f"{self.at(n)}: field {name!r}{source} {problem}")

    def text(self, n: int, row: dict, name: str, column: str | None = None, hint="") -> str | None:
        """The text in a column, None if absent or blank. InputError for broken Unicode and for other types.

        hint: ends the error message for other types.
        """
        value = row.get(column or name)
        if value is not None and not isinstance(value, str):
            raise self.error(n, name, column or name, f"must be text, got {type(value).__name__} {brief(value)}{hint}")
        if value and re.search(r"[\ud800-\udfff]", value):  # JSON can escape half a character, tokenizers refuse it
            raise self.error(n, name, column or name, "has a lone surrogate (half of a \\u pair); correct or remove it")
        return value if value and value.strip() else None

    def report(self, dropped: dict[str, list[int]], repeated: list[int], kept: int, log) -> None:
        """Log one line that says which rows were dropped and why. InputError if none is left."""
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


def read_table(path, delimiter=None, encoding=None) -> Table:
    """All rows of a file with their lines; the file name's end tells the format. InputError with file and line.

    delimiter: of a CSV or TSV file. By default it is recognised: comma, semicolon, tab, |, or the one in a first line
    `sep=;`. encoding: of a text file. By default UTF-8, or UTF-16 with a byte order mark.
    """
    path = Path(path)
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_DATA_SET):
            raise InputError(f"{path}: is a data set that `datasets` saved; give it as --dataset {path}")
        raise InputError(f"{path}: is a directory; give one data file ({', '.join(SUFFIXES)})")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None
    if content.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: is compressed with gzip; unpack it first (gunzip)")
    if is_lfs_pointer(content):
        raise InputError(f"{path}: is a git-lfs pointer, not the file itself; fetch it with: git lfs pull")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown file type {suffix!r}; the name must end in one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        names, rows = _read_parquet(path, content)
        return Table(str(path), path.name, rows, "row", names)
    text = decode(path, content, encoding)
    if suffix == ".tsv" and delimiter is None:
        rows = list(_read_tsv(path, text))
    elif suffix in (".csv", ".tsv"):
        rows = list(_read_csv(path, text, _delimiter(delimiter)))
    else:
        rows = list((_read_json if suffix == ".json" else _read_json_lines)(path, text))
    if len({line for line, _ in rows}) < len(rows):  # several elements of a JSON array on one line: number the rows
        return Table(str(path), path.name, list(enumerate((row for _, row in rows), start=1)), "row")
    return Table(str(path), path.name, rows)


def check_output(path, overwrite, source=None):
    """InputError where JSON lines are not to be written to this path: it is there, is what is read (`source`), lies
    nowhere, or its name promises another format, in which it could not be read again."""
    path = Path(path)
    if source and path.exists() and Path(source).exists() and path.samefile(source):
        raise InputError(f"--output {path}: is the file that is read; give another name")
    if path.exists() and not overwrite:
        raise InputError(f"--output {path}: exists; give another name or --overwrite")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--output {path}: cannot be written; name a file in a directory that is there")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise InputError(f"--output {path}: JSON lines are written; give a name that ends in .jsonl")


def _delimiter(given):
    if given is None:
        return None
    delimiter = DELIMITERS.get(given.lower(), given)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise InputError(f"--delimiter {brief(given)}: give one character, or one of tab, comma, semicolon, pipe")
    return delimiter


def decode(path: Path | str, content: bytes, encoding: str | None) -> str:
    """The text of a file, or of what `path` names. encoding None: UTF-8, or UTF-16 with a byte order mark."""
    if encoding is None:
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        known = "for example utf-8, cp1252, utf-16 or gb18030"
        raise InputError(f"--encoding {brief(encoding)}: no such encoding; {known}") from None
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        where = f"{path}:{content[:start].count(NEWLINE) + 1}"
        if encoding != "utf-8":
            raise InputError(f"{where}: not {encoding} text ({first_line(error)}); give its own --encoding") from None
        likely = _likely_encoding(content)
        advice = f"it looks like {likely}: give --encoding {likely}, or save the file as UTF-8"
        raise InputError(f"{where}: not UTF-8 text (byte {start + 1}); {advice}") from None


def _likely_encoding(content: bytes) -> str:
    """cp1252 (Windows, western languages) if every byte is a character in it; else Latin-1, where every byte is one."""
    try:
        content.decode("cp1252")
        return "cp1252"
    except UnicodeDecodeError:
        return "latin-1"


def _read_json_lines(path: Path, content: str):
    # str.splitlines would also cut at U+2028 and similar characters, which JSON strings may hold.
    lines = enumerate(re.split(r"\r\n|\n|\r", content), start=1)
    return ((n, _parse_json(path, n, line)) for n, line in lines if line.strip())


def _read_json(path: Path, content: str):
    """Rows of a .json file: an array of objects, one object, or JSON lines."""
    if not content.lstrip().startswith("["):
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            return _read_json_lines(path, content)
        if isinstance(row, dict) and len(row) > 1 and all(isinstance(value, (list, dict)) for value in row.values()):
            raise InputError(
                f"{path}: is column-wise JSON, as pandas writes it by default; write a row per line: "
                "df.to_json(path, orient='records', lines=True)"
            )
        return [(1, row)]
    # Parse the whole array for its errors, then each element: json.loads does not tell on which line an element begins.
    rows, value, position = [], re.compile(r"[^\s,]"), content.index("[") + 1
    line = 1 + content.count("\n", 0, position)
    for _ in _parse_json(path, 1, content):
        start = next(value.finditer(content, position)).start()
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


def _read_csv(path: Path, content: str, delimiter: str | None = None, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL):
    """Rows of a file with a header. A quoted field may hold delimiters and newlines; a row's line is its first line.

    Columns without a name (the index of pandas, empty columns of a spreadsheet) are left out.
    """
    csv.field_size_limit(2**31 - 1)  # Python's default of 131,072 characters is too small for long texts
    skip, delimiter = _dialect(content, delimiter)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    next_line = 1
    try:
        for cells in reader:
            line, next_line = next_line, reader.line_num + 1
            if line <= skip:
                continue
            if cells and not header:
                header = [cell.strip() for cell in cells]
                named = [name for name in header if name]
                if len(set(named)) < len(named):
                    raise InputError(f"{path}:{line}: the header names a column twice: {brief_list(header)}")
            elif cells and len(cells) != len(header):
                raise InputError(
                    f"{path}:{line}: has {len(cells)} fields where the header has {len(header)}; "
                    f"put quotes around a field that holds the delimiter {delimiter!r}"
                )
            elif cells:
                yield line, {name: cell for name, cell in zip(header, cells) if name}
    except csv.Error as error:
        raise InputError(f"{path}:{next_line}: quotes do not pair up in the row that begins here: {error}") from None


def _dialect(content: str, delimiter: str | None) -> tuple[int, str]:
    """(lines before the header, delimiter).

    The delimiter is the one in a first line `sep=;`. Without such a line it is the comma, if it splits the header, else
    the character that splits the header into the most cells.
    """
    # Some programs write a line `sep=;` for spreadsheet programs.
    stated = re.match(r'"?sep=([^\r\n"])"?[ ]*(\r\n|\n|\r)', content, re.IGNORECASE)
    if stated:
        return 1, delimiter or stated[1]
    if delimiter:
        return 0, delimiter
    header = next((line for line in content[:100_000].splitlines() if line.strip()), "")
    cells = {each: len(next(csv.reader([header], delimiter=each), [])) for each in ",;\t|"}
    return 0, "," if cells[","] > 1 else max(cells, key=lambda each: cells[each])


def _read_tsv(path: Path, content: str):
    """Rows with quotes as in CSV, or as plain characters (GLUE's files) if only that makes every line a row."""
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

    try:  # datasets.load_dataset would leave a copy in its cache and read [ ] * in a path as a pattern
        return dataset_rows(datasets.Dataset(pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()))
    except Exception as error:  # pyarrow and datasets each raise their own errors, without a common base
        raise InputError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


def dataset_rows(dataset) -> tuple[dict[str, list[str]], list[tuple[int, dict]]]:
    """(names of the ClassLabel columns, numbered rows) of a `datasets.Dataset`."""
    names = {column: list(kind.names) for column, kind in dataset.features.items() if hasattr(kind, "int2str")}
    return names, list(enumerate(dataset, start=1))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
