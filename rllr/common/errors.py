"""The errors that users read, and the exit codes of the scripts.

exit code   0    done
            1    the run cannot continue (RunError); the good results so far are saved
            2    bad input (InputError); nothing was written
            75   stopped by Ctrl-C or SIGTERM, state saved: the same command with --resume continues
            130  stopped at once by a second Ctrl-C, or by one before training began (143: by SIGTERM)
"""

import functools
import reprlib
import sys


class InputError(ValueError):
    """Bad input. The message names the file, line, field or flag that is wrong, and how to correct it. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot continue (a loss that is not finite, a broken invariant). Good results are saved. Exit code 1."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state. Exit code 75 (EX_TEMPFAIL in sysexits.h: try again later)."""


def command(main):
    """Decorator for a script's `main`: turns the errors above into one line on stderr and an exit code."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        any_console()
        try:
            return main(*args, **kwargs)
        except (InputError, RunError) as error:
            tell(f"error: {error}")
            sys.exit(2 if isinstance(error, InputError) else 1)
        except OSError as error:  # an error that no other code has explained
            tell(f"error: {error.filename or 'output'}: {error.strerror or error}")
            sys.exit(1)
        except Stopped as stopped:
            tell(stopped)
            sys.exit(75)
        except KeyboardInterrupt:
            tell("interrupted")
            sys.exit(130)

    return run


# Whether this process tells of the error that ends it. Of several ranks one does (`ranks.start` puts it in here).
may_tell = [lambda: True]


def tell(message):
    """A line on stderr."""
    if all(asked() for asked in may_tell):
        print(message, file=sys.stderr)


def any_console():
    """From now on, print characters that the console's encoding lacks as escapes: printing must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60
_brief.maxlevel = 2


def brief(value) -> str:
    """A value for a message: at most 60 characters. (A small YAML file can hold a huge value.)"""
    text = _brief.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def brief_list(values, shown=20) -> str:
    """Names for a message: the first `shown` of them."""
    values = list(values)
    rest = f", ... ({len(values)} in all)" if len(values) > shown else ""
    return ", ".join(brief(value) for value in values[:shown]) + rest


def out_of_memory(error):
    """Whether an exception means that memory ran out. On a CPU, torch raises a plain RuntimeError."""
    import torch  # only here: a replay reads errors and no tensors, and torch takes a second to load

    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or on_cpu
