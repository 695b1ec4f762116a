"""Decoders that live on between calls, each with its model: their memory and their recorded steps serve the next call.

Recording costs two eager steps a shape, and a rollout of short answers has few more. A kept decoder serves a call that
asks for the same (`spec`): slots, limit of tokens, stop ids, sampling, precision, and weights where they were. Weights
that change in place are read as they are: a recorded step has their addresses. Only decoders that record are kept.
"""

from weakref import WeakKeyDictionary

import torch

KEEP_SHARE = 1 / 16  # of the device's memory: a larger cache is given back, as updates need the room
COLUMNS = 128  # lengths are rounded up to this many columns, so that calls of similar length share a decoder

_kept: WeakKeyDictionary = WeakKeyDictionary()  # {model: (spec, decoder)}; no decoder here holds its model


def rounded(length):
    """The length that a decoder which records is made for."""
    return -(-length // COLUMNS) * COLUMNS


def spec_of(model, *settings):
    """What a call asks of a decoder beside its columns: these settings, the precision, where the weights are."""
    parts = {id(part): part for part in (model, getattr(model, "shared_model", model))}
    tensors = [t for part in parts.values() for t in (*part.parameters(), *part.buffers())]
    kind = model.device.type
    precision = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (*settings, precision, tuple(tensor.data_ptr() for tensor in tensors))


def take(model, spec, columns):
    """The model's kept decoder, out of the keep while it is used; None where there is none for this call."""
    found, decoder = _kept.pop(model, (None, None))
    return decoder if found == spec and len(decoder.columns) >= columns else None


def keep(model, spec, decoder):
    """Keep a decoder that has ended its call, unless its memory is too large to lie idle."""
    if decoder.cache.nbytes() <= idle_limit(decoder.device):
        _kept[model] = spec, decoder


def idle_limit(device):
    """Bytes of keys and values that may lie idle."""
    return KEEP_SHARE * torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")
