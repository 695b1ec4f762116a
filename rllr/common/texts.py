"""Texts: a check for characters that cannot be used, YAML or JSON mappings, and what regular expressions don't know of
the world's scripts."""

import functools
import json
import re
import unicodedata
from pathlib import Path

import yaml

from .errors import InputError, brief

# Scripts without spaces: Thai, Lao, Myanmar, Khmer, kana, Han with its extensions, and their supplements.
UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)

MARKS_END = 0x20000  # combining marks are in the first two planes of Unicode (some variation selectors far beyond)


@functools.cache
def marks() -> str:
    """All marks that combine with a letter, which are no `\\w`, for a pattern's [...]."""
    characters = map(chr, range(0x300, MARKS_END))
    return "".join(re.escape(char) for char in characters if unicodedata.category(char).startswith("M"))


def check_text(text: str, where: str) -> str:
    """The text itself. InputError for NUL and for half of a character, which a JSON escape can spell.

    File systems do not allow NUL, and tokenizers do not allow half a character.
    """
    if "\0" in text or re.search(r"[\ud800-\udfff]", text):
        raise InputError(f"{where}: holds a NUL character or a lone surrogate; remove it (got {brief(text)})")
    return text


def read_mapping(path: Path) -> dict:
    """The mapping in a YAML or JSON file. InputError with the file, the line and what to change."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        mapping = json.loads(content) if path.suffix.lower() == ".json" else yaml.safe_load(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(mapping, dict):
        raise InputError(f"{path}: must hold a mapping of field names to values, got {type(mapping).__name__}")
    return mapping
