"""One kernel for a root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) where a GPU computes.

transformers writes the norm as six operations, and autograd as fourteen more: a third of what a layer of a Llama-like
model launches forward, almost half of its backward, and a small model waits for launches. PyTorch has it as one kernel
each way. On a CPU it has not, and nothing changes there.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch.nn import functional as F

TOLERANCE = 1e-5  # of a norm by one kernel, relative; a larger difference means that the module computes something else


def fuse_norms(model):
    """Let PyTorch's kernel compute each RMS norm of a model from now on; returns their number.

    A module is taken for one by its name, and by its numbers: what computes anything else stays as it is.
    """
    fused = 0
    for module in model.modules():
        offset = _offset_of(module)
        if offset is not None:
            module.forward = partial(_fused_norm, module, module.forward, offset)
            fused += 1
    return fused


def _fused_norm(module, plain, offset, x, *more):
    """x / rms(x) * (weight + offset), in x's dtype. Where x comes in another one than the weight, the module's own
    forward promotes it."""
    weight = module.weight
    if more or x.dtype != weight.dtype or offset and weight.dtype != torch.float32:  # 1 + weight wants more than bf16
        return plain(x, *more)
    with _plain_precision(x):
        return F.rms_norm(x, weight.shape, weight + offset if offset else weight, _epsilon(module))


def _plain_precision(x):
    """Under autocast PyTorch would cast other dtypes to float32 first, though the kernel adds up in float32 anyway."""
    autocast_is_on = x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on else nullcontext()


@torch.no_grad()
def _offset_of(module):
    """What a module adds to its weight if it is an RMS norm (Gemma: 1, most others: 0); None if it is none."""
    known = type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module)
    if not known or [name for name, _ in module.named_parameters()] != ["weight"] or module.weight.dim() != 1:
        return None
    if _epsilon(module) is None or not module.weight.dtype.is_floating_point or module.weight.is_meta:
        return None
    weight = module.weight.float()
    x = torch.linspace(-2, 3, 3 * len(weight), device=weight.device, dtype=torch.float32).view(3, -1)
    expected = module(x).float()
    for offset in (0.0, 1.0):
        found = F.rms_norm(x, weight.shape, weight + offset, _epsilon(module))
        if expected.shape == found.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _epsilon(module):
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
