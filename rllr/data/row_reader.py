"""One row of a table becomes one `Example`; anything wrong with it becomes an InputError with file, line and field.

Columns are `text`, `text_b`, `label`, `score`, `rationale`, `rationales`, `id`; `--columns text=sentence,label=gold`
gives other names. The format of the authors' repository (`instruction`, `input`, `output`) can be read as well.
"""

import hashlib
import json
import math
from collections import Counter
from decimal import Decimal, InvalidOperation
from numbers import Number

from ..common.errors import InputError, brief, brief_list
from ..tasks import Example, Task, same_word, split_answer
from .tables import Table, first_line

FIELDS = ("id", "text", "text_b", "label", "score", "rationale", "rationales")
IGNORABLE = ("id", "score", "rationale", "rationales")  # fields that --columns may map to nothing
# Values that mean "no label" in many files, if they are no labels of the task.
NO_LABEL = ("", "-1", "nan", "none", "null", "<na>")


def parse_mapping_flag(value: str | dict | None, flag: str = "--columns") -> dict[str, str]:
    """ "text=sentence,label=gold" as a dict; a dict is checked in the same way. InputError names the flag.

    Nothing after the = means a column that is not read, or a label word that stands for no label.
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
            advice = f"write field=column, the field being one of {', '.join(FIELDS)}"
            raise InputError(f"{flag} {name}={mapping[name]}: unknown field {name!r}; {advice}")
        if not mapping[name] and name not in IGNORABLE:
            advice = f"only {', '.join(IGNORABLE)} can be left out like this"
            raise InputError(f"{flag} {name}=: the field {name!r} is needed; {advice}")
    return mapping


def text_hash(text: str | None, text_b: str | None = None) -> str:
    """16 hexadecimal digits that identify a row by its texts."""
    return hashlib.sha256(json.dumps([text or "", text_b or ""]).encode()).hexdigest()[:16]


def present_columns(columns) -> str:
    """The end of a message: which columns there are."""
    return f"the columns are {brief_list(columns)}"


class RowReader:
    """Turns a row into an Example. Every error names the place of the row, the field, and the column it was read from.

    columns, label_map: as for `rllr.data.rows.load_examples`; labels: "required", "optional" or "ignored".
    """

    def __init__(self, table: Table, task: Task, columns, label_map, labels: str):
        self.table, self.task, mapping = table, task, parse_mapping_flag(columns)
        self.without_label: Counter[str] = Counter()  # {spelling of a missing label: rows}
        self.columns = self._find_columns(mapping)
        # In the authors' format the label and the rationale are both inside `output`.
        needed = {"instruction"} if labels == "ignored" else {"instruction", "output"}
        self.authors_format = "text" not in self.columns and needed <= set(table.columns)
        if self.authors_format:
            self.columns = {"text": "instruction", "label": "output", "rationale": "rationale"} | self.columns
        self.may_lack = labels == "ignored"  # what is only read to be answered: a missing text is an empty one
        if labels == "ignored":
            self.columns = {name: column for name, column in self.columns.items() if name in ("id", "text", "text_b")}
        words = parse_mapping_flag(label_map, "--label_map")
        self.label_map = {same_word(word): self._mapped_label(word, label) for word, label in words.items()}
        self._check_needed_columns(labels)

    def _find_columns(self, mapping: dict[str, str]) -> dict[str, str]:
        """{field: column} of the fields to read. InputError for a mapped column that is not there."""
        present = self.table.columns
        for name, column in mapping.items():
            if column and column not in present:
                self._refuse_missing_header()
                problem = f"no column {brief(column)} (--columns {name}={column}); {present_columns(present)}"
                raise InputError(f"{self.table.name}: {problem}")
        # A column is read for one field only: after score=label, the column `label` holds no labels.
        columns = {name: name for name in FIELDS if name in present and name not in mapping.values()} | mapping
        on_a_scale = self.task.ordinal or {"pearson", "spearman"} & set(self.task.metrics)
        if not on_a_scale and "score" not in mapping:
            columns.pop("score", None)  # without a scale, a column of this name holds something else
        return {name: column for name, column in columns.items() if column}

    def _check_needed_columns(self, labels: str):
        has_label = "label" in self.columns or self.task.ordinal and "score" in self.columns
        needs_label = labels == "required" and not has_label
        for name in ["text"] + ["text_b"] * self.task.is_pair + ["label"] * needs_label:
            if name not in self.columns:
                self._refuse_missing_header()
                raise InputError(
                    f"{self.table.name}: no column for the field {name!r} of task {self.task.name}; "
                    f"{present_columns(self.table.columns)}; say which it is with --columns {name}=<column>"
                )

    def _refuse_missing_header(self):
        """InputError if the column names look like a row: one is a label of the task, and none is a field."""
        names = self.table.columns
        labels = [name for name in names if self.task.canonical_label(name) is not None]
        if labels and not set(names) & set(FIELDS):
            raise InputError(
                f"{self.table.name}: has no header: its first line is a row ({brief_list(names, 3)}); write the "
                "columns' names above it, for example text,label"
            )

    def _mapped_label(self, word: str, label: str) -> str | None:
        if not str(label):
            return None
        canonical = self.task.canonical_label(str(label))
        if canonical is None:
            problem = f"{label!r} is not a label of task {self.task.name}: {', '.join(self.task.labels)}"
            raise InputError(f"--label_map {word}={label}: {problem}")
        return canonical

    def example(self, n: int, row: dict) -> Example:
        """The Example of row n. Its id need not be unique, and its text can be empty."""
        if self.authors_format:
            row = self._unpack_output(n, row)
        for name in ("text", "text_b") if self.task.is_pair else ("text",):
            if self.columns[name] not in row and not self.may_lack:
                raise self._error(n, name, f"is missing; {present_columns(row)}")
        label, score = self._label(n, self._value(row, "label")), self._score(n, row)
        rationales = self._rationales(n, row)
        if label is None and score is not None and self.task.ordinal:
            label = self._label(n, math.floor(score + 0.5), "score")  # rounds half up; round() makes 2.5 a 2
        rationale = self._text(n, row, "rationale") or (rationales.get(label) if label is not None else None)
        return Example(
            id=self._id(n, row),
            text=self._text(n, row, "text") or "",
            text_b=self._text(n, row, "text_b"),
            label=label,
            score=score,
            rationale=rationale,
            rationales=rationales,
            place=f"{self.table.short}:{n}",
        )

    def _unpack_output(self, n: int, row: dict) -> dict:
        """A row {instruction, input, output} with text, label and rationale in the columns of `self.columns`."""
        text = self.table.text(n, row, "input")
        row = row | ({"instruction": text} if text else {})
        if "label" not in self.columns:
            return row
        if isinstance(row.get("output"), list):
            raise self._error(n, "label", "is a list: this is ranking data, for preference pairs (load_pairs)")
        output = self.table.text(n, row, "output")
        rationale, label = split_answer(self.task, output or "")
        if label is None:
            return row | {"output": output, "rationale": None}
        return row | {"output": label, "rationale": rationale}

    def _value(self, row: dict, name: str):
        return row.get(self.columns[name]) if name in self.columns else None

    def _text(self, n: int, row: dict, name: str) -> str | None:
        if name not in self.columns:
            return None
        return self.table.text(n, row, name, self.columns[name], self._how_to_ignore(name) if name in IGNORABLE else "")

    def _error(self, n: int, name: str, problem: str) -> InputError:
        return self.table.error(n, name, self.columns.get(name, name), problem)

    def _id(self, n: int, row: dict) -> str:
        """The row's own id, any scalar; else a hash of its texts, which does not depend on the row's place."""
        value = self._value(row, "id")
        if isinstance(value, (list, dict)):
            problem = f"must be one value, got {type(value).__name__} {brief(value)}{self._how_to_ignore('id')}"
            raise self._error(n, "id", problem)
        if isinstance(value, str):
            self.table.text(n, row, "id", self.columns["id"])  # raises the errors for bad text
        written = "" if value is None or value != value else str(value).strip()
        text_b = self._text(n, row, "text_b") if self.task.is_pair else None
        return written or text_hash(self._text(n, row, "text"), text_b)

    def _how_to_ignore(self, name):
        return f"; --columns {name}= leaves this column out"

    def _label(self, n: int, value, name: str = "label") -> str | None:
        """The task's label for a word, a number, or an integer that stands for a ClassLabel's name. None: no label.

        The spelling is compared first, then the number: "1.0" can be a label of the task, or a 1 as pandas writes it.
        """
        names = self.table.class_names.get(self.columns[name], []) if name in self.columns else []
        words = _label_words(value, names)
        if words is None:
            raise self._error(n, name, f"must be a word or a number, got {type(value).__name__} {brief(value)}")
        for word in words:
            if same_word(word) in self.label_map:
                label = self.label_map[same_word(word)]
                if label is None:
                    self._count_missing(word, name)
                return label
        # The first word only: the integer of a ClassLabel's name says nothing about the task's own digits.
        label = self.task.canonical_label(words[0])
        label = self._label_of_number(words[0]) if label is None else label
        if label is not None:
            return label
        if same_word(words[-1]) in NO_LABEL:
            self._count_missing(words[-1], name)
            return None
        theirs = f" (the data set's labels: {', '.join(names)})" if names else ""
        hint = "; is it a score? --columns score=<column>" if self.task.ordinal and isinstance(value, float) else ""
        advice = "map it with --label_map <theirs>=<ours>,... (nothing after the =: no label)"
        ours = f"a label of task {self.task.name}: {', '.join(self.task.labels)}"
        raise self._error(n, name, f"is {brief(words[0])}{theirs}, not {ours}; {advice}{hint}")

    def _count_missing(self, word: str, name: str) -> None:
        if name == "label":
            self.without_label[word.strip()] += 1

    def _label_of_number(self, word: str) -> str | None:
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
        """{label: rationale}. A string is read as JSON, as CSV needs it; a null or empty rationale counts as absent."""
        value = self._value(row, "rationales")
        how_to_ignore = self._how_to_ignore("rationales")
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except (ValueError, RecursionError) as error:
                problem = f"is not valid JSON: {first_line(error)}{how_to_ignore}"
                raise self._error(n, "rationales", problem) from None
        if not isinstance(value, dict | None):
            problem = f"must map labels to texts, got {type(value).__name__} {brief(value)}{how_to_ignore}"
            raise self._error(n, "rationales", problem)
        row_of_texts = value or {}
        texts = {word: self.table.text(n, row_of_texts, "rationales", word) for word in row_of_texts}
        found = ((self._label(n, word, "rationales"), text) for word, text in texts.items() if text and word.strip())
        return {label: text for label, text in found if text and label is not None}


def _label_words(value, names: list[str]) -> list[str] | None:
    """The spellings under which to look a label up, "" for a missing one. None for a value that cannot be a label."""
    if value is None:
        return [""]
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, str):
        return [value]
    if isinstance(value, int) and names:  # hub data sets mark a missing label with -1
        return [names[value], str(value)] if 0 <= value < len(names) else [str(value)]
    if isinstance(value, Number):
        whole = _number(str(value))
        return [str(value)] + ([str(int(whole))] if whole is not None and whole == int(whole) else [])
    return None


def _number(word: str) -> Decimal | None:
    """A word as a finite number; None if it is none."""
    try:
        number = Decimal(word.strip()) if len(word) < 100 else None
    except InvalidOperation:
        return None
    return number if number is not None and number.is_finite() and abs(number.adjusted()) < 100 else None
