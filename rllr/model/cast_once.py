"""Weights cast once for a whole rollout (`--precision bf16`): what autocast would compute, to the bit.

A decoding step multiplies a few tokens with every weight, so casting a weight takes as long as using it. PyTorch's
autocast keeps the copy of a weight that may learn until the block ends, and casts all others at every use: those of a
frozen base under adapters (a step took twice as long on a CPU), and on a GPU every weight where recorded steps outlive
the block (`rllr.engine.kept`), as copies that it made would be read for ever. Here the copies have memory that lives as
long as the recorded steps, and every call fills it anew.
"""

from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..engine.cache import products_dtype
from .lora import LowRank

PRODUCTS = (nn.Linear, Conv1D, LowRank)  # modules, no subclasses, whose weights are read by products alone


class CastWeights:
    """Copies, in autocast's precision, of a model's float32 weights that products read; none outside of autocast.

    most_bytes: where they would take more, there are none, and autocast goes on as it does.
    """

    def __init__(self, model, most_bytes=float("inf")):
        weights = [weight for weight in _weights(_places(model)) if products_dtype(weight) != weight.dtype]
        fits = sum(weight.numel() * products_dtype(weight).itemsize for weight in weights) <= most_bytes
        self.copies: list[torch.Tensor] = [
            nn.Parameter(torch.empty_like(weight, dtype=products_dtype(weight)), requires_grad=False)
            for weight in weights
            if fits
        ]

    def nbytes(self):
        """Memory of the copies."""
        return sum(copy.numel() * copy.element_size() for copy in self.copies)

    @contextmanager
    def in_use(self, model):
        """Within the block, the model's products read the copies, filled with its weights as they are now.

        The block must not change the weights and must not need gradients. model: the one that the copies were made for.
        """
        if not self.copies:
            yield
            return
        places = _places(model)
        weights = _weights(places)
        with torch.no_grad():
            torch._foreach_copy_(self.copies, weights)
        copy_of = {id(weight): copy for weight, copy in zip(weights, self.copies, strict=True)}
        try:
            for module, name, weight in places:
                module._parameters[name] = copy_of[id(weight)]
            yield
        finally:
            for module, name, weight in places:
                module._parameters[name] = weight


def _places(model):
    """[(module, name, weight)] of a model, or of a role and its base: a weight may stand in several places."""
    parts = (model, getattr(model, "shared_model", model)) if isinstance(model, nn.Module) else ()
    modules = {id(module): module for part in parts for module in part.modules() if type(module) in PRODUCTS}
    return [
        (module, name, weight)
        for module in modules.values()
        for name, weight in module._parameters.items()
        if weight is not None and weight.dtype == torch.float32
    ]


def _weights(places):
    """The weights of these places, each once, always in the same order."""
    return list({id(weight): weight for *_, weight in places}.values())
