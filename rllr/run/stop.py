"""Ctrl-C and SIGTERM as a request: the run ends after its step, with its state saved."""

import signal
import sys
import threading

from ..common import ranks


class StopRequest:
    """Ctrl-C and SIGTERM, within the block, as a request: `name` says which came. A second one interrupts at once."""

    def __init__(self):
        self.name, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _asked(self, number, frame):
        if self.name:
            if ranks.count() > 1:  # torchrun passes on what a terminal has sent to every process already
                return
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if ranks.is_first():
            print(f"{self.name}: finishing this step, then saving; once more to stop at once", file=sys.stderr)

    def agree(self):
        """The signal that any rank has had, on all of them, so that they stop after the same step; None if none has.

        `name` stays: a signal that comes while the ranks agree counts the next time.
        """
        return next(filter(None, ranks.each(self.name)), None)

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            # A run that has lost a rank ends in one sentence: torchrun's SIGTERM to the others must not cut it off.
            ending = number == signal.SIGTERM and error is not None and ranks.count() > 1
            signal.signal(number, signal.SIG_IGN if ending else handler)
