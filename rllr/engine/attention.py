"""Attention our own way: over packed rows (several sequences behind one another in one row, no padding computed), and of
one new token per row (no copy of the keys for every query head, and fast on every processor).

transformers lets a model's attention be replaced by name (its attention interface). Ours splits queries, keys and values
into the sequences and attends within each. Only models that take positions from `position_ids` and attention from the
interface can be packed; `can_pack` tries it out on the model itself and compares, because some families swallow the
arguments silently (Bloom's alibi, OPT's positions).
"""

from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED, SLOTS = "rllr_packed", "rllr_slots"


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, segment_lens=None, softcap=None, **kwargs
):
    """Causal attention within each segment. query [1, heads, N, D], key and value [1, kv heads, N, D] -> [1, N, heads, D].

    segment_lens: the sequences' lengths, which sum to N.
    """
    if segment_lens is None or softcap is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention that packing does not know")
    grouped = query.shape[1] != key.shape[1]
    pieces = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*(x.split(segment_lens, dim=2) for x in (query, key, value)))
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def slot_attention(module, query, key, value, attention_mask, scaling=None, spans=None, **kwargs):
    """One query per slot. query [B, heads, 1, D], key and value [B, kv heads, L, D], mask [B, 1, 1, L] -> [B, 1, heads, D].

    The query heads that share a key head become its queries; repeating the keys instead, as transformers did until 5.20 or
    so, copies the whole cache in every layer of every step. spans: [(first slot, last + 1, columns they see at most)], if
    the slots are to be taken in pieces. For models that `can_pack`: others may ask for more than is known here.
    """
    rows, heads, _, size = query.shape
    if spans is not None and key.shape[1] == heads:
        scaled = query.float() * (size**-0.5 if scaling is None else scaling)
        pieces = [
            _weighted(scaled[a:b], key[a:b, :, :width].float(), value[a:b, :, :width].float(), attention_mask[a:b, :, 0, :width])
            for a, b, width in spans
        ]
        return torch.cat(pieces).unsqueeze(1).to(query.dtype), None
    queries = query.reshape(rows, key.shape[1], -1, size)
    out = scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None


def _weighted(query, key, value, mask):
    """Attention of one scaled query [B, heads, 1, D] without a matrix product: [B, heads, D]. mask [B, 1, L].

    With one query a product does not use a number twice; where its library is slow, sums over what fits a cache are faster.
    """
    scores = (key * query).sum(-1).masked_fill_(~mask, -torch.inf)
    return (value * scores.softmax(-1).unsqueeze(-1)).sum(2)


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(SLOTS, slot_attention)


@contextmanager
def _attention(backbone, name):
    """The backbone's attention replaced within the block. No mask is made for a name transformers knows no mask for."""
    config = backbone.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_forward(backbone, input_ids, segment_lens, **arguments):
    """Hidden states [1, N, H] of sequences behind one another. input_ids [1, N]; segment_lens: list of N's parts."""
    positions = torch.cat([torch.arange(length, device=input_ids.device) for length in segment_lens]).unsqueeze(0)
    with _attention(backbone, PACKED):
        return backbone(
            input_ids=input_ids, position_ids=positions, segment_lens=segment_lens, **arguments
        ).last_hidden_state


def attending_to_slots(backbone):
    """Within the block single tokens attend by `slot_attention`."""
    return _attention(backbone, SLOTS)


@torch.no_grad()
def can_pack(backbone):
    """Whether packed rows give this model the numbers of separate ones. Tried once, remembered on the backbone."""
    if not takes_our_attention(backbone):
        return False
    if not hasattr(backbone, "_rllr_can_pack"):
        backbone._rllr_can_pack = _try_packing(backbone)
    return backbone._rllr_can_pack


def takes_our_attention(backbone):
    """Whether the model calls its attention through transformers' interface, with masks that it does not read itself."""
    return getattr(backbone, "_supports_attention_backend", False) and backbone.config._attn_implementation == "sdpa"


def _try_packing(backbone):
    vocabulary, device, was_training = backbone.config.vocab_size, backbone.device, backbone.training
    rows = [torch.arange(start, start + size, device=device) % vocabulary for start, size in ((3, 5), (7, 2), (1, 7))]
    backbone.eval()
    try:
        with torch.autocast(device.type, enabled=False):  # whose rounding would hide, or look like, a difference
            packed = packed_forward(backbone, torch.cat(rows).unsqueeze(0), [len(row) for row in rows], use_cache=False)[0]
            alone = torch.cat([backbone(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0] for row in rows])
    except (NotImplementedError, TypeError):  # another kind of attention, or a forward that takes no further arguments
        return False
    finally:
        backbone.train(was_training)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(packed.dtype, 5e-2)
    return torch.allclose(packed, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max()))
