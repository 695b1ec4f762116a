"""The precision of a run's forward passes, given in one place: `run.machine.set_up` sets it from --precision.

Rollouts, log-probabilities, reward and value models enter `autocast` themselves, so no caller hands it on. A model's
trial (`rllr.model.trial`) runs without it. Weights stay in the dtype that they were loaded in.
"""

from contextlib import nullcontext

import torch

PRECISIONS = ("fp32", "bf16")
_current = {"precision": "fp32"}


def set_precision(precision):
    """fp32: forwards in the weights' own dtype. bf16: matrix products in bfloat16 from here on (torch.autocast)."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    _current["precision"] = precision


def casts():
    """Whether forwards compute their products in bfloat16."""
    return _current["precision"] == "bf16"


def autocast(device, cached=True):
    """The context of one forward pass on that device. With fp32 a caller's own autocast, if there is one, stays on.

    cached: whether a weight is cast once for the whole context, as PyTorch does it, or at every use.
    """
    if not casts():
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cached)
