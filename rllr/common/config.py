"""Settings from a dataclass: one field, one flag, with its help and its bounds in the field itself.

    @dataclass
    class Config(Settings):
        GROUP = "optimisation"                    # the heading in --help
        epochs: int = flag(6, "passes over the labelled rows", above=0)

    config = parse_config(Config)                 # sys.argv, and optionally --config FILE.yaml; flags override the file

transformers' HfArgumentParser does part of this. It does not let flags override a settings file, does not tell which
settings were given (a resumed run must know), knows no bounds, takes `nan`, and ends in usage texts instead of one
line.
"""

import argparse
import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path

from .errors import InputError, brief
from .texts import check_text, read_mapping

SECTIONS = ("all", "sft", "rm", "ppo")  # the parts of a file for several commands: of each of them, of one script


def flag(default=dataclasses.MISSING, help="", *, above=None, at_least=None, between=None, choices=None, bare=None):
    """A dataclass field that is a flag. help: what `--help` says of it.

    above, at_least: a bound that a number must exceed, or reach. between: (lowest, highest) allowed. choices: the
    values allowed. None, where the field allows it, passes all of them. bare: the value of a flag that stands without
    one.
    """
    bounds = {"above": above, "at_least": at_least, "between": between, "choices": choices, "bare": bare}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, **given})


class Settings:
    """Base class of a command's settings. Subclasses are dataclasses; each may name the heading of its own flags."""

    GROUP: typing.ClassVar[str] = "settings"
    SECTION: typing.ClassVar[str | None] = None  # this command's part of a file for several commands
    given: frozenset = frozenset()  # names of the settings that a flag or a file has set
    inherited: dict = {}  # {name: the file that a setting was taken from, when nobody gave it}; replaced, never changed
    _frozen = False

    def validate(self):
        """InputError, with the flag, for a setting out of its bounds. Subclasses add what holds between settings."""
        for field in dataclasses.fields(typing.cast(typing.Any, self)):
            check_bounds(field, getattr(self, field.name))

    def freeze(self):
        """From now on the settings stay what they are: a run computes what its record says."""
        self._frozen = True
        return self

    def settle(self, **late):
        """Give settings that nobody chose their values, once, where data or models decide: the door in `freeze`."""
        for name, value in late.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} is {getattr(self, name)!r} already")
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        if self._frozen:
            raise AttributeError(f"settings are frozen: {name} is {getattr(self, name, None)!r}")
        object.__setattr__(self, name, value)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def parse_config(cls, argv=None, description=None):
    """An instance of the dataclass `cls` from flags and, with --config, a YAML or JSON file under them.

    Such a file holds settings, or parts of settings for several commands: `all`, and one part a script (SECTIONS).
    Flags cannot be abbreviated. Unknown flags, unknown keys of the file, values of the wrong type or out of their
    bounds are InputErrors that name them. A boolean field `x` has --x and --no-x. Fields without a default are
    required. The instance's `given` names the fields that a flag or the file has set.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    flags = vars(_parser(cls, fields, description).parse_args(_joined(sys.argv[1:] if argv is None else argv, fields)))
    values = {}
    config_file = flags.pop("config", None)
    if config_file:
        for key, value in _read_settings(Path(config_file), getattr(cls, "SECTION", None)).items():
            if key not in fields:
                raise InputError(f"{config_file}: unknown setting {brief(key)}; the settings are {', '.join(fields)}")
            values[key] = convert_setting(fields[key], value, f"{config_file}: {key}")
    for key, value in flags.items():
        values[key] = value if isinstance(value, bool) else convert_setting(fields[key], value, f"--{key}")
    for key, value in values.items():
        check_bounds(fields[key], value)
    required = [name for name, field in fields.items() if _is_required(field) and name not in values]
    if required:
        raise InputError(f"required: {', '.join(f'--{name}' for name in required)} (--help lists the flags)")
    config = cls(**values)
    config.given = frozenset(values)
    return config


def _read_settings(path, section):
    """The settings that a file has for the command with this section."""
    mapping = read_mapping(path)
    if not set(SECTIONS) & set(mapping):
        return mapping
    for name, part in mapping.items():
        if name not in SECTIONS or not isinstance(part, dict | types.NoneType):
            raise InputError(
                f"{path}: {brief(name)}: a file for several scripts has parts alone, each with settings of its own: "
                f"{', '.join(SECTIONS)}"
            )
    return (mapping.get("all") or {}) | (mapping.get(section) or {})


def _parser(cls, fields, description):
    """The argument parser: a group of flags per class that declares some."""
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with these settings; flags override it")
    groups: dict = {}
    left = dict(fields)
    for declaring in reversed(cls.__mro__):
        for name in [name for name in inspect.get_annotations(declaring) if name in left]:
            title = vars(declaring).get("GROUP", "settings")
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add_flag(groups[title], left.pop(name))
    return parser


def _add_flag(group, field):
    kind, _ = _type(field)
    default = "required" if _is_required(field) else "see text" if field.default is None else field.default
    text = f"{field.metadata.get('help', '')} (default: {default})".replace("%", "%%").strip()
    options: dict = {"default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is list:
        options["nargs"] = "+"
    else:
        options["metavar"] = kind.__name__.upper()
    if "bare" in field.metadata:
        options |= {"nargs": "?", "const": field.metadata["bare"]}
    group.add_argument(f"--{field.name}", **options)


def _is_required(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check_bounds(field, value):
    """InputError unless a setting's value lies within the bounds that its field names."""
    bounds, shown = field.metadata, f"--{field.name} {brief(value) if isinstance(value, str) else value}"
    if value is None:
        return
    if "choices" in bounds and value not in bounds["choices"]:
        raise InputError(f"{shown}: choose from {', '.join(map(str, bounds['choices']))}")
    if "above" in bounds and not value > bounds["above"]:
        raise InputError(f"{shown}: must be above {bounds['above']}")
    if "at_least" in bounds and not value >= bounds["at_least"]:
        raise InputError(f"{shown}: must be at least {bounds['at_least']}")
    if "between" in bounds and not bounds["between"][0] <= value <= bounds["between"][1]:
        raise InputError(f"{shown}: must lie between {bounds['between'][0]} and {bounds['between'][1]}")


def _joined(argv, fields):
    """The arguments with `--flag -value` as `--flag=-value`: argparse would take the value for a flag."""
    takes_text = {f"--{name}" for name, field in fields.items() if _type(field)[0] is str}
    joined: list[str] = []
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


def check_divisible(config, whole, part):
    if getattr(config, part) and getattr(config, whole) % getattr(config, part):
        raise InputError(
            f"--{whole} {getattr(config, whole)} cannot be divided by --{part} "
            f"{getattr(config, part)}; choose a multiple"
        )
