"""Whether an object read from a file holds what its fields should: a page and a replay read files that anyone may have
written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from ..common.errors import InputError, brief

# Kinds of values, as a message names them. A tuple of texts is a kind, too: one of them.
NUMBER, ABOVE_0 = "a finite number", "a finite number above 0"
COUNT, FROM_1 = "a whole number from 0", "a whole number from 1"
TEXT, YES_OR_NO, OBJECT, LIST, COUNTS = "text", "true or false", "an object", "a list", "a list of whole numbers from 0"
OR_NULL = " or null"
LARGEST = 2**53  # of whole numbers: beyond it a float would not hold them


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


_TESTS: dict[str, Callable] = {
    NUMBER: is_number,
    ABOVE_0: lambda value: is_number(value) and value > 0,
    COUNT: is_count,
    FROM_1: lambda value: is_count(value) and value > 0,
    TEXT: lambda value: isinstance(value, str),
    YES_OR_NO: lambda value: isinstance(value, bool),
    OBJECT: lambda value: isinstance(value, dict),
    LIST: lambda value: isinstance(value, list),
    COUNTS: lambda value: isinstance(value, list) and all(map(is_count, value)),
}


def fits(value, kind) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, str) and value in kind
    if kind.endswith(OR_NULL):
        return value is None or fits(value, kind.removesuffix(OR_NULL))
    return _TESTS[kind](value)


def check_fields(held, kinds, what, optional=False):
    """InputError where an object lacks one of the fields, or holds something else in it. kinds: {field: its kind}.

    optional: it need not have them.
    """
    if not isinstance(held, dict):
        raise InputError(f"{what} is no object")
    missing = [name for name in kinds if name not in held]
    if missing and not optional:
        raise InputError(f"{what} has no {', '.join(map(str, missing))}")
    for name, kind in kinds.items():
        if name in held and not fits(held[name], kind):
            wanted = f"one of {', '.join(kind)}" if isinstance(kind, tuple) else kind
            raise InputError(f"{what} has {name} {brief(held[name])}, which is not {wanted}")


def read_lines(path, kinds) -> list[dict]:
    """The objects of a JSONL file, without a last line that is not whole: its run may be writing it. [] without a file.
    InputError, with the line, where it is none or lacks one of the fields: `check_fields`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON: {error}") from None
        check_fields(found[-1], kinds, where)
    return found
