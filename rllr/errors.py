"""The two errors a person is meant to read, and how a script ends on them."""

import functools
import sys


class InputError(ValueError):
    """Bad input. The message names the file, line, field or flag at fault and what to do about it. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, a broken invariant). What was good is saved. Exit code 1."""


def command(main):
    """Decorator for a script's `main`: the two errors become one line on stderr and an exit code, not a traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (InputError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
