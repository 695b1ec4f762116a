"""Decoders that live on between calls, each with its model: their memory and their recorded steps serve the next call.

Recording costs two eager steps a shape, and a rollout of short answers has few more. A kept decoder serves a call that
asks for the same (`spec`): slots, limit of tokens, stop ids, sampling, precision, and weights where they were. Weights
that change in place are read as they are: a recorded step has their addresses. Only decoders that record are kept, and
not everywhere (`may_live`). Under autocast a step that lives on must not read copies that autocast made: it reads those
of `model.cast_once`, which every call fills anew, or casts at every use.
"""

from weakref import WeakKeyDictionary

import torch

KEEP_SHARE = 1 / 16  # of the device's memory: a larger cache is given back, as updates need the room
FREE_SHARE = 1 / 4  # of what is free, for the same reason
COLUMNS = 128  # lengths are rounded up to this many columns, so that calls of similar length share a decoder

_kept: WeakKeyDictionary = WeakKeyDictionary()  # {model: (spec, decoder)}; no decoder here holds its model


def rounded(length, limit=None):
    """The columns of a decoder which records: no more than the model's limit, beyond which attention may change."""
    columns = -(-length // COLUMNS) * COLUMNS
    return columns if limit is None else min(columns, limit)


def may_live(model, backbone, nbytes):
    """Whether a decoder of this model, with so many bytes of keys and values, may outlive the call.

    Not where a caller's autocast keeps cast weights or inference mode marks tensors. Not where adapters are switched by
    hand on a plain model, as no spec tells which one is on. A role (`rllr.model.roles`) has one adapter for good.
    """
    by_hand = not hasattr(model, "shared_model") and (
        hasattr(backbone, "rllr_adapters")
        or getattr(model, "_hf_peft_config_loaded", False)
        or hasattr(model, "peft_config")
    )
    special = torch.is_autocast_enabled(model.device.type) or torch.is_inference_mode_enabled() or by_hand
    return not special and nbytes <= idle_limit(model.device)


def idle_limit(device):
    """Bytes of keys and values that may lie idle."""
    if device.type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    return min(KEEP_SHARE * total, FREE_SHARE * free)


def idle_bytes(model):
    """Bytes that the model's kept decoder holds and the next call may use."""
    return _kept[model][1].cache.nbytes() if model in _kept else 0


def spec_of(model, *settings):
    """What a call asks of a decoder beside its columns: these settings, the precision, where the weights are."""
    parts = {id(part): part for part in (model, getattr(model, "shared_model", model))}
    tensors = [t for part in parts.values() for t in (*part.parameters(), *part.buffers())]
    kind = model.device.type
    precision = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (*settings, precision, tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors))


def take(model, spec, columns):
    """The model's kept decoder, out of the keep while it is used; None where there is none for this call.

    One that does not fit is given up, and with it the memory that `idle_bytes` promised. spec None: none fits.
    """
    found, decoder = _kept.pop(model, (None, None))
    fits = spec is not None and found == spec and len(decoder.columns) >= columns
    return decoder if fits else None


def keep(model, spec, decoder):
    """Keep a decoder that has ended its call."""
    _kept[model] = spec, decoder
