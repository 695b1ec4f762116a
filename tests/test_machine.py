"""What --deterministic sets up."""

from types import SimpleNamespace

import torch

import rllr.rollout
import rllr.run.machine
from rllr.run.machine import set_up


def test_deterministic_algorithms_and_a_fixed_number_of_slots(monkeypatch):
    """What a GPU needs to repeat itself: deterministic kernels, and as many answers at a time whatever memory is
    free."""
    from rllr.rollout import slots_within

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = SimpleNamespace(device=torch.device("cuda"))
    per_answer = 1000  # bytes of keys and values
    monkeypatch.setattr(rllr.rollout, "bytes_per_slot", lambda model, columns: 100 * columns)
    try:
        counts = []
        for free in (8, 40):
            monkeypatch.setattr(
                torch.cuda, "mem_get_info", lambda device, free=free: (free * per_answer, 80 * per_answer)
            )
            counts.append(slots_within(None, model, 10))
            set_up("fp32", 0, deterministic=True)
            counts.append(slots_within(None, model, 10))
            assert (
                torch.are_deterministic_algorithms_enabled()
                and rllr.run.machine.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            )
            torch.use_deterministic_algorithms(False)
        assert counts == [4, 20, 20, 20]
    finally:
        torch.use_deterministic_algorithms(False)
