"""Seconds per phase."""

import rllr.common.log
from rllr.common.log import Clock


def test_clock(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(rllr.common.log.time, "monotonic", lambda: next(now))
    clock = Clock()
    for name in ("rollout", "score", "rollout"):
        with clock(name):
            pass
    assert clock.take() == {"time/rollout": 2.5, "time/score": 3.0} and clock.take() == {}
