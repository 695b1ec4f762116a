"""Matrix products of linear layers by oneDNN, where torch's own choice is slow.

On AMD processors torch hands float32 products to a library that is tuned for another maker's; oneDNN, which torch brings
along as well, took 0.5 to 0.9 of the time there (64 to 1,000 rows). Only without gradients: the operator has no backward.
"""

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn


FEW_ROWS = 16  # below, torch's own product is the faster one again,
LARGE_WEIGHT = 4_000_000  # except with very large matrices (an LM head)


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose float32 product on CPU goes through oneDNN. Instances are ordinary layers, lent this class."""

    def forward(self, x):
        small = x.numel() < FEW_ROWS * self.in_features and self.weight.numel() < LARGE_WEIGHT
        if small or x.dtype != torch.float32 or self.weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@contextmanager
def fast_linears(model):
    """Within the block a model's linear layers use the faster product where this machine has one. No gradients then."""
    lent = []
    if isinstance(model, nn.Module) and onednn_is_faster() and not torch.is_grad_enabled():
        lent = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    for module in lent:
        module.__class__ = OneDnnLinear
    try:
        yield
    finally:
        for module in lent:
            module.__class__ = nn.Linear


@cache
def onednn_is_faster():
    """True on AMD processors with a torch that has the operator. By maker, not by timing: runs must repeat to the bit."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
