"""Activation checkpointing: keep only each decoder layer's input and compute the layer again in backward.

A third more time for a fraction of the memory. By hand rather than by transformers' switch, which acts in training mode
only; PPO trains with dropout off, in eval mode.
"""

from contextlib import ExitStack
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.errors import InputError
from ..engine.attention import attention_by
from ..engine.linear import OneDnnLinear, fast_linears
from .lora import checkpoint_contexts


def checkpoint_layers(backbone):
    """Checkpoint every layer of a Hugging Face decoder from now on, where gradients are taken and no cache is filled.

    A role on a shared base stands for its base; several roles may ask. InputError for a model without such layers.
    """
    backbone = getattr(backbone, "shared_backbone", backbone)
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"--gradient_checkpointing: {type(backbone).__name__} has no layers that can be checkpointed")
    for layer in layers:
        if not hasattr(layer, "_rllr_checkpointed"):
            layer._rllr_checkpointed = True
            layer.forward = partial(_forward, layer, layer.forward, backbone)


def _forward(layer, plain, backbone, *arguments, **keywords):
    if not torch.is_grad_enabled() or keywords.get("use_cache"):
        return plain(*arguments, **keywords)
    lent = any(type(module) is OneDnnLinear for module in layer.modules())
    attention = backbone.config._attn_implementation  # packed rows have one of their own

    def contexts():  # the layer is computed again when what was switched on for its forward has long been switched off
        forward, adapter = checkpoint_contexts(backbone)
        switches = [lambda: adapter, partial(attention_by, backbone, attention)]
        return forward, _Again(switches + ([partial(fast_linears, layer)] if lent else []))

    return checkpoint(plain, *arguments, use_reentrant=False, context_fn=contexts, **keywords)


class _Again:
    """What was switched on for the forward: the adapter, the attention, the faster product. May be entered more than once."""

    def __init__(self, switches):
        self.switches, self.stacks = switches, []

    def __enter__(self):
        stack = ExitStack()
        for switch in self.switches:
            stack.enter_context(switch())
        self.stacks.append(stack)

    def __exit__(self, *exception):
        self.stacks.pop().close()
