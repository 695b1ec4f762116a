"""Matrix products of linear layers by oneDNN, where torch's own choice is slow.

On AMD processors torch gives float32 products to a library that is tuned for another maker's processors. oneDNN, which
is part of torch as well, took 0.5 to 0.9 of that time. With the weights copied into oneDNN's own layout it took 0.5 to
0.8 of its time without; the copy pays while the weights do not change: in rollouts.

The choice depends only on the processor's maker and on shapes, never on measured time: runs must repeat to the bit, and
scoring and training must compute the same numbers.
"""

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

FEW_ROWS = 16  # with fewer rows of input torch's own product is faster,
LARGE_WEIGHT = 4_000_000  # except for weights of at least this many numbers (an LM head)
LAYOUT_ROWS = 64  # the number of input rows that oneDNN chooses its layout for; with 1 or 600 the speed was the same
PACKED_BYTES = 2 << 30  # larger models are not copied into oneDNN's layout


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose float32 product on CPU goes through oneDNN. `fast_linears` lends it to ordinary layers."""

    def forward(self, x):
        small = x.numel() < FEW_ROWS * self.in_features and self.weight.numel() < LARGE_WEIGHT
        if small or x.dtype != torch.float32 or self.weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias)


class PackedLinear(nn.Linear):
    """`nn.Linear` without gradient whose product reads a copy of the weights in oneDNN's layout (`rllr_packed`)."""

    rllr_packed: torch.Tensor
    rllr_bias: torch.Tensor | None

    def forward(self, x):
        return _onednn(x.to(self.rllr_packed.dtype), self.rllr_packed, self.rllr_bias)


def _onednn(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """x W^T + b and its gradients: dx = g W, dW = g^T x, db = sum of g over the rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _onednn(gradient, weight.t(), None)
        if ctx.needs_input_grad[1]:
            for_weight = rows.t() @ x.reshape(-1, x.shape[-1])  # torch's own product is as fast here
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias


@contextmanager
def fast_linears(model):
    """Within the block, a model's linear layers use the faster product if this machine has one."""
    with _as_class(_cpu_linears(model), OneDnnLinear):
        yield


@contextmanager
def packed_linears(model):
    """Within the block, a model's linear layers use copies of their weights in oneDNN's layout.

    The block must not change the weights and must not need gradients. Under autocast the copies have autocast's
    precision. Large models are not copied; they get `fast_linears`.
    """
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    layers = [m for m in _cpu_linears(model) if _has_layout_for(autocast or m.weight.dtype)]
    if sum(m.weight.numel() * m.weight.element_size() for m in layers) > PACKED_BYTES:
        with fast_linears(model):
            yield
        return
    for module in layers:
        weight = module.weight.detach().to(autocast or module.weight.dtype)
        module.rllr_packed = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
        module.rllr_bias = None if module.bias is None else module.bias.detach().to(weight.dtype)
    try:
        with _as_class(layers, PackedLinear):
            yield
    finally:
        for module in layers:
            del module.rllr_packed, module.rllr_bias


def _has_layout_for(dtype):
    """Whether oneDNN multiplies in this precision on this processor: bfloat16 needs AVX-512 or better."""
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _cpu_linears(model):
    """The plain linear layers for which this machine has a faster product."""
    if not (products_are_slow() and isinstance(model, nn.Module)):
        return []
    layers = getattr(model, "shared_model", model).modules()  # the layers of a role are those of its base
    return [m for m in layers if type(m) is nn.Linear and m.weight.device.type == "cpu"]


@contextmanager
def _as_class(modules, kind):
    """Replace the class of these `nn.Linear` modules within the block."""
    for module in modules:
        module.__class__ = kind
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Linear


@cache
def products_are_slow():
    """Whether oneDNN's products are faster than torch's own: on AMD processors, if torch has the operators."""
    operators = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
