"""--shard: of several processes each keeps a part of every weight, by PyTorch's FSDP2 (`fully_shard`).

Where gradients are taken, each layer's weights are put together for its forward and its backward, and the gradients are
added up into the parts. Everything without gradients (rollouts, scores) puts a model together once, for as long as that
takes (`gathered`): it is then the plain model that the engine knows. Files hold whole weights, as those of any run do.

ZeRO stage 3: Rajbhandari et al. 2020 (arXiv:1910.02054); FSDP: Zhao et al. 2023 (arXiv:2304.11277).
"""

import functools
from collections import OrderedDict
from contextlib import ExitStack, contextmanager

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common import ranks
from ..common.log import say
from ..engine.attention import can_pack
from ..engine.limits import windows_of
from .backbone import shared_decoder

LOW_ON = ("cuda",)  # devices that may put layers together in bfloat16: on a CPU a norm takes no such weights


def shards(config):
    """Whether this run's models are sharded: with --shard, of several processes."""
    return ranks.count() > 1 and config.shard


def loading_device(config, device):
    """Where a model is loaded that `shard` cuts: in main memory, so that no GPU has to hold all of it."""
    return torch.device("cpu") if shards(config) else device


def shard(model, config):
    """Keep this rank's part of a model's weights: a causal LM, a decoder with a scalar head or without. Returns the
    model.

    Weights that are to be frozen, or of another dtype, must be so before. With --precision bf16 on a GPU layers are put
    together in bfloat16; embeddings, the last norm and the head stay float32. Without effect where the run does not
    shard.
    """
    if not shards(config):
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    decoder = shared_decoder(model)
    mesh = _mesh()
    windows = windows_of(decoder.config).values() if mesh.device_type == "cpu" else ()  # a GPU does not pack long rows
    for window in (0, *windows):  # tried now: no rank may go through a layer alone later
        can_pack(decoder, window + 1 if window else 0)
    is_decoder = decoder is model
    head = model.head if hasattr(model, "backbone") else None if is_decoder else model.get_output_embeddings()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        say(f"warning: --shard: {type(decoder).__name__} has no layers known here; an update puts all of it together")
    low = torch.bfloat16 if config.precision == "bf16" and mesh.device_type in LOW_ON else None
    in_layers = MixedPrecisionPolicy(low, torch.float32 if low else None, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=in_layers)
    decoder.rllr_head = head  # for a moment, so that its weights, which may be the embeddings', go with the decoder's
    fully_shard(decoder, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    del decoder.rllr_head
    for part in (decoder, *layers):
        part.set_gradient_divide_factor(1.0)  # a sum: each rank's loss is its share of the whole batch's mean
        part.set_force_sum_reduction_for_comms(True)
    decoder.rllr_shards, decoder.rllr_gathered, decoder.rllr_low = [decoder, *layers], 0, low is not None
    return model


@functools.cache
def _mesh():
    """All ranks, in one dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks.count(),))


@contextmanager
def gathered(*models):
    """Within the block these models have whole weights and are plain modules: any rank may use them at its own pace.

    For passes without gradients. All ranks must enter it. Nothing happens to a model that is not sharded.
    """
    with ExitStack() as stack:
        for model in models:
            decoder = shared_decoder(model)
            if hasattr(decoder, "rllr_shards"):
                stack.enter_context(_gathered(decoder))
        yield


@contextmanager
def _gathered(decoder):
    parts = decoder.rllr_shards if not decoder.rllr_gathered else []  # a block within a block changes nothing
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    with ranks.telling_of_lost_ranks():
        for part in parts:
            part.unshard()
    for part in parts:  # FSDP's own hooks, which wait for the other ranks
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    decoder.rllr_gathered += 1
    try:
        yield
    finally:
        decoder.rllr_gathered -= 1
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def on_whole_weights(function):
    """Decorator of a function of a model and more: it runs within `gathered`."""

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with gathered(model):
            return function(model, *args, **kwargs)

    return run


# ---- tensors ---------------------------------------------------------------------------------------------------------


def is_sharded(what):
    """Whether a tensor is a rank's part of one, or a model's weights are."""
    if isinstance(what, torch.nn.Module):
        return hasattr(shared_decoder(what), "rllr_shards")
    return hasattr(what, "full_tensor")


def whole(tensor):
    """All of a tensor, on every rank; of one that is not sharded the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with ranks.telling_of_lost_ranks():
        return tensor.full_tensor()


def whole_tensors(tensors):
    """{name: tensor} with all of each, in the main memory of the first rank; the others get what is not sharded.

    A tensor that has two names (tied weights) has two names there, too.
    """
    found: dict[str, torch.Tensor] = {}
    known: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            found[name] = tensor
        elif id(tensor) in known:
            found |= {name: found[known[id(tensor)]]} if ranks.is_first() else {}
        else:
            known[id(tensor)], all_of_it = name, whole(tensor.detach())
            found |= {name: all_of_it.cpu()} if ranks.is_first() else {}
    return found


def part_of(own, tensor):
    """This rank's part of a whole tensor, as `own` is a part; the tensor itself where `own` is none."""
    if not is_sharded(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
