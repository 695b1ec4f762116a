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

from .limits import position_limits, text_config, windows_of

PACKED, SLOTS = "rllr_packed", "rllr_slots"
# What models hand to their attention beside the arguments below, and what does not change its arithmetic.
HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


FORBIDDEN = "forbidden"  # among a backbone's verdicts: packing was found to be wrong


def _refuse_unknown(arguments):
    """NotImplementedError for an argument that may change the arithmetic (a softcap, attention sinks, a bias ...)."""
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in HARMLESS)
    if unknown or arguments.get("is_causal") is False:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'is_causal=False'}")


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    segment_lens=None,
    sliding_window=None,
    **arguments,
):
    """Causal attention within each segment. query [1, heads, N, D], key and value [1, kv heads, N, D] -> [1, N, heads, D].

    segment_lens: the sequences' lengths, which sum to N. sliding_window: a token sees so many, itself included.
    """
    _refuse_unknown(arguments | {"attention_mask": attention_mask, "no segment_lens": None if segment_lens else True})
    grouped, pieces = query.shape[1] != key.shape[1], []
    for q, k, v in zip(*(x.split(segment_lens, dim=2) for x in (query, key, value))):
        mask = (
            _within_window(q.shape[2], sliding_window, q.device)
            if sliding_window and q.shape[2] > sliding_window
            else None
        )
        pieces.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _within_window(length, window, device):
    """Mask [length, length]: a token sees itself and the window - 1 before it."""
    places = torch.arange(length, device=device)
    behind = places.unsqueeze(1) - places
    return (behind >= 0) & (behind < window)


def slot_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, spans=None, sliding_window=None, **arguments
):
    """One query per slot. query [B, heads, 1, D], key and value [B, kv heads, L, D], mask [B, 1, 1, L] -> [B, 1, heads, D].

    The query heads that share a key head become its queries; repeating the keys instead, as transformers did until 5.20 or
    so, copies the whole cache in every layer of every step. spans: [(first slot, last + 1, columns they see at most)], if
    the slots are to be taken in pieces. No sequence is longer than sliding_window (`rollout.check_cache_support` sees to it).
    """
    _refuse_unknown(arguments)
    rows, heads, _, size = query.shape
    if spans is not None and key.shape[1] == heads:
        scaled = query.float() * (size**-0.5 if scaling is None else scaling)
        pieces = [
            _weighted(
                scaled[a:b],
                key[a:b, :, :width].float(),
                value[a:b, :, :width].float(),
                attention_mask[a:b, :, 0, :width],
            )
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
def attention_by(backbone, name):
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
    with attention_by(backbone, PACKED):
        return backbone(
            input_ids=input_ids, position_ids=positions, segment_lens=segment_lens, **arguments
        ).last_hidden_state


def attending_to_slots(backbone):
    """Within the block single tokens attend by `slot_attention`."""
    return attention_by(backbone, SLOTS)


def can_pack(backbone, longest=0):
    """Whether packed rows of at most `longest` tokens give this model the numbers of separate ones.

    Tried out on the model itself: with rows of a few tokens and, where one of its attention windows is shorter than
    `longest`, with a row that is longer than that window. Remembered on the backbone. Touches no random stream.
    """
    verdicts = backbone.__dict__.setdefault("_rllr_can_pack", {})
    if FORBIDDEN in verdicts or not takes_our_attention(backbone):
        return False
    exceeded = _window_exceeded(backbone, longest)
    if exceeded not in verdicts:
        verdicts[exceeded] = _try_packing(backbone, exceeded)
    return verdicts[exceeded]


def remember_packing(backbone, longest, verdict):
    """What another trial, with rows of up to `longest` tokens, has found; if packing was wrong, it is forbidden for good."""
    verdicts = backbone.__dict__.setdefault("_rllr_can_pack", {})
    verdicts |= {_window_exceeded(backbone, longest): True} if verdict else {FORBIDDEN: True}


def _window_exceeded(backbone, longest):
    """The longest of the decoder's attention windows that is shorter than `longest`; 0: none is."""
    return max((window for window in windows_of(backbone.config).values() if window < longest), default=0)


def takes_our_attention(backbone):
    """Whether the model calls its attention through transformers' interface, with masks that it does not read itself."""
    return getattr(backbone, "_supports_attention_backend", False) and backbone.config._attn_implementation == "sdpa"


def _try_packing(backbone, exceeded):
    vocabulary, device = text_config(backbone.config).vocab_size, backbone.device
    positions = min((tokens for tokens, _ in position_limits(backbone.config)), default=exceeded + 7)
    spans = [(3, 5), (7, 2), (1, min(exceeded + 7, positions))]
    rows = [torch.arange(start, start + size, device=device) % vocabulary for start, size in spans]
    with torch.autocast(device.type, enabled=False):  # whose rounding would hide, or look like, a difference
        alone = [backbone_alone(backbone, row) for row in rows]
        return packs_like(backbone, rows, alone)


@torch.no_grad()
def backbone_alone(backbone, row):
    """Final hidden states [n, H] of one row of ids [n] by the model's own forward, dropout off."""
    with _eval_mode(backbone):
        return backbone(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0]


@torch.no_grad()
def packs_like(backbone, rows, alone):
    """Whether rows of ids, packed, give the hidden states [n, H] that they have alone. No, too, where packing raises anything:
    a model that cannot be packed may fail in its own way."""
    try:
        with _eval_mode(backbone):
            packed = packed_forward(
                backbone, torch.cat(rows).unsqueeze(0), [len(row) for row in rows], use_cache=False
            )[0]
    except Exception:
        return False
    alone = torch.cat(alone)
    if not torch.isfinite(alone).all():
        return False
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(packed.dtype, 5e-2)
    return packed.shape == alone.shape and torch.allclose(
        packed, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())
    )


@contextmanager
def _eval_mode(backbone):
    was_training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(was_training)
