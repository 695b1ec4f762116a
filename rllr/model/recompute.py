"""Activation checkpointing: keep only the input of each decoder layer and compute the layer again in backward.

It takes a third more time and a fraction of the memory. We do not use transformers' own switch: it works in training
mode only, but PPO trains without dropout, in eval mode.
"""

from contextlib import ExitStack
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.errors import InputError
from ..engine.attention import attention_by
from ..engine.linear import OneDnnLinear, fast_linears
from .backbone import shared_decoder
from .lora import checkpoint_contexts
from .passes import forget_recorded


def checkpoint_layers(backbone):
    """Checkpoint every layer of a Hugging Face decoder from now on, in forwards with gradients and without a cache.

    For a role on a shared base this sets the layers of the base; several roles may ask for it. InputError for a model
    without such layers.
    """
    forget_recorded(backbone)
    backbone = shared_decoder(backbone)
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"--gradient_checkpointing: {type(backbone).__name__} has no layers that can be checkpointed")
    for layer in layers:
        if "_rllr_checkpointed" not in vars(layer):
            vars(layer)["_rllr_checkpointed"] = True
            layer.forward = partial(_checkpointed_forward, layer, layer.forward, backbone)


def _checkpointed_forward(layer, plain_forward, backbone, *arguments, **keywords):
    if not torch.is_grad_enabled() or keywords.get("use_cache"):
        return plain_forward(*arguments, **keywords)
    fast = any(type(module) is OneDnnLinear for module in layer.modules())
    attention = backbone.config._attn_implementation  # packed rows use their own

    # Backward computes the layer again after the forward's context managers have ended, so it must enter them again.
    def contexts():
        forward, adapter = checkpoint_contexts(backbone)
        managers = [lambda: adapter, partial(attention_by, backbone, attention)]
        return forward, _Reentered(managers + ([partial(fast_linears, layer)] if fast else []))

    return checkpoint(plain_forward, *arguments, use_reentrant=False, context_fn=contexts, **keywords)


class _Reentered:
    """Enters the context managers of the forward: adapter, attention, faster product. Can be entered several times.

    managers: functions that return a context manager each.
    """

    def __init__(self, managers):
        self.managers, self.stacks = managers, []

    def __enter__(self):
        stack = ExitStack()
        for manager in self.managers:
            stack.enter_context(manager())
        self.stacks.append(stack)

    def __exit__(self, *exception):
        self.stacks.pop().close()
