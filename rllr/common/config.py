"""Flags from a dataclass: one field, one flag, one comment that is also its help text.

config = parse_config(PPOConfig)          # sys.argv, optionally --config file.yaml|json; flags override the file
"""

import argparse
import dataclasses
import functools
import inspect
import sys
import types
import typing
from pathlib import Path

from .errors import InputError, brief
from .texts import check_text, read_mapping


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def parse_config(cls, argv=None, description=None):
    """An instance of the dataclass `cls` from flags and, with --config, a YAML or JSON file under them.

    Flags cannot be abbreviated; unknown ones, unknown file keys and values of the wrong type are InputErrors that name
    them. A boolean field `x` has --x and --no-x, one with metadata {"bare": value} may stand without a value. Fields
    without a default are required. The instance's `given` names the fields that a flag or the file has set.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    comments = _comments(cls)
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with these settings; flags override it")
    for name, field in fields.items():
        kind, optional = _type(field)
        help_text = f"{comments.get(name, '')} (default: {_show(field.default)})".replace("%", "%%").strip()
        if kind is bool:
            parser.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
            )
        elif _is_list(field):
            parser.add_argument(f"--{name}", nargs="+", default=argparse.SUPPRESS, help=help_text)
        else:
            bare = {"nargs": "?", "const": field.metadata["bare"]} if "bare" in field.metadata else {}
            metavar = kind.__name__.upper()
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=metavar, help=help_text, **bare)
    flags = vars(parser.parse_args(_joined(sys.argv[1:] if argv is None else argv, fields)))
    values = {}
    config_file = flags.pop("config", None)
    if config_file:
        for key, value in read_mapping(Path(config_file)).items():
            if key not in fields:
                raise InputError(f"{config_file}: unknown setting {brief(key)}; the settings are {', '.join(fields)}")
            values[key] = convert_setting(fields[key], value, f"{config_file}: {key}")
    for key, value in flags.items():
        values[key] = value if isinstance(value, bool) else convert_setting(fields[key], value, f"--{key}")
    missing = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [f"--{name}" for name in missing if name not in values]
    if missing:
        raise InputError(f"required: {', '.join(missing)} (--help lists the flags)")
    config = cls(**values)
    config.given = frozenset(values)
    return config


def _joined(argv, fields):
    """The arguments with `--flag -value` as `--flag=-value`: argparse takes what begins with a dash for a flag (--label_map -1=)."""
    takes_text, joined = {f"--{name}" for name, field in fields.items() if _type(field)[0] is str}, []
    for argument in argv:
        if joined and joined[-1] in takes_text and argument.startswith("-") and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _type(field):
    """(the plain type, whether None is allowed) of `int`, `float | None` and the like."""
    annotation = field.type
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0], True
    return (typing.get_origin(annotation) or annotation), False


def _is_list(field):
    return _type(field)[0] is list


def convert_setting(field, value, where):
    """A value as its field's type, from a flag's text or a file. InputError that begins with `where`."""
    kind, optional = _type(field)
    if isinstance(value, str):
        check_text(value, where)
    if value is None or (optional and isinstance(value, str) and value.lower() == "none"):
        if optional:
            return None
        raise InputError(f"{where}: needs a value of type {kind.__name__}")
    if kind is list:
        items = [str(item) for item in (value if isinstance(value, list) else [value])]
        return [check_text(item, where) for item in items]
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise InputError(f"{where}: must be true or false, got {brief(value)}")
    if isinstance(value, (bool, list, dict)):
        raise InputError(f"{where}: must be a {kind.__name__}, got {brief(value)}")
    try:
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: must be a number of type {kind.__name__}, got {brief(value)}") from None
    if kind is float and converted != converted or converted in (float("inf"), float("-inf")):
        raise InputError(f"{where}: must be finite, got {brief(value)}")
    return converted


def _show(default):
    if default is dataclasses.MISSING:
        return "required"
    return "see text" if default is None else default


@functools.cache
def _comments(cls):
    """{field: the comment that follows it in the source}, base classes included."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            lines = inspect.getsource(base).splitlines()
        except OSError:
            continue
        for line in lines:
            code, _, comment = line.partition("  # ")
            name = code.split(":")[0].strip()
            if comment and name.isidentifier():
                found[name] = comment.strip()
    return found


def check_positive(config, *names, zero=False):
    """InputError for a numeric setting that is not above 0 (or, zero=True, is below it). None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (value < 0 or (value == 0 and not zero)):
            raise InputError(f"--{name} {value}: must be {'at least' if zero else 'above'} 0")


def check_range(config, name, low, high):
    """InputError unless low <= setting <= high."""
    value = getattr(config, name)
    if value is not None and not low <= value <= high:
        raise InputError(f"--{name} {value}: must lie between {low} and {high}")


def check_choice(config, name, choices):
    value = getattr(config, name)
    if value not in choices:
        raise InputError(f"--{name} {brief(value)}: choose from {', '.join(map(str, choices))}")


def check_divisible(config, whole, part):
    if getattr(config, part) and getattr(config, whole) % getattr(config, part):
        raise InputError(
            f"--{whole} {getattr(config, whole)} cannot be divided by --{part} {getattr(config, part)}; choose a multiple"
        )
