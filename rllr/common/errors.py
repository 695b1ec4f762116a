"""The errors a person is meant to read, and how a script ends on them.

exit code   0    done
            1    the run cannot go on (RunError); what was good is saved
            2    bad input (InputError); nothing was written
            75   stopped by Ctrl-C or SIGTERM, state saved: the same command with --resume goes on
            130  stopped at once by Ctrl-C, a second one or before training began (143: by SIGTERM)
"""

import functools
import reprlib
import sys

import torch


class InputError(ValueError):
    """Bad input. The message names the file, line, field or flag at fault and what to do about it. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, a broken invariant). What was good is saved. Exit code 1."""


class Stopped(Exception):
    """A run that was asked to stop, and has saved its state. Exit code 75 (sysexits.h: try again later)."""


def command(main):
    """Decorator for a script's `main`: the errors above become one line on stderr and an exit code, not a traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        any_console()
        try:
            return main(*args, **kwargs)
        except (InputError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 1)
        except OSError as error:  # what no other place has made a sentence of
            print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
            sys.exit(1)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(75)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def any_console():
    """From now on a character that the console's encoding lacks is written as an escape: no run may die of printing a text."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60
_brief.maxlevel = 2


def brief(value) -> str:
    """A value as a message can show it: 60 characters, however long it is or deep (a small YAML file can hold a vast one)."""
    text = _brief.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def brief_list(values, shown=20) -> str:
    """Names in a message: the first twenty."""
    values = list(values)
    return ", ".join(brief(value) for value in values[:shown]) + (
        f", ... ({len(values)} in all)" if len(values) > shown else ""
    )


def out_of_memory(error):
    """Whether an exception says so: on a CPU torch raises a plain RuntimeError."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or on_cpu
