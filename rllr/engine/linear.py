"""Matrix products of linear layers by oneDNN, where torch's own choice is slow.

On AMD processors torch hands float32 products to a library that is tuned for another maker's; oneDNN, which torch brings
along as well, took 0.5 to 0.9 of the time there. Which one is used depends on the processor's maker and on shapes alone,
never on timing: runs must repeat to the bit, and scoring and training must compute the very same numbers.
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
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b and its gradients: dx = g W, dW = g^T x, db = the sum of g over the rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        if ctx.needs_input_grad[1]:
            for_weight = rows.t() @ x.reshape(-1, x.shape[-1])  # here torch's own is as fast
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias


@contextmanager
def fast_linears(model):
    """Within the block a model's linear layers use the faster product where this machine has one."""
    lent = []
    if onednn_is_faster() and isinstance(model, nn.Module):
        layers = getattr(model, "shared_model", model).modules()  # a role's layers are those of its base
        lent = [m for m in layers if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    for module in lent:
        module.__class__ = OneDnnLinear
    try:
        yield
    finally:
        for module in lent:
            module.__class__ = nn.Linear


@cache
def onednn_is_faster():
    """True on AMD processors with a torch that has the operator."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
