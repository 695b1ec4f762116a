"""Texts from files and flags: a check for characters that cannot be used, and YAML or JSON mappings."""

import json
import re
from pathlib import Path

import yaml

from .errors import InputError, brief


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
