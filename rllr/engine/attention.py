"""Two attention functions that replace a model's own.

- `packed_attention`: a packed row holds several sequences one after another, so nothing is computed for padding.
- `slot_attention`: one new token per row. It does not copy the keys for each query head and is fast on all processors.

transformers lets us replace a model's attention by name (its attention interface). `packed_attention` splits queries,
keys and values into the sequences and attends within each. A model can be packed only if it takes positions from
`position_ids` and attention from the interface. Some families ignore these arguments silently (Bloom's alibi, OPT's
positions), so `can_pack` tries packing on the model itself and compares the results.
"""

from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import eval_mode, products_dtype
from .limits import position_limits, text_config, windows_of

PACKED, SLOTS = "rllr_packed", "rllr_slots"
# Models pass these arguments to their attention as well; they do not change the arithmetic.
HARMLESS = set(
    "position_ids cache_position use_cache is_causal output_attentions output_hidden_states return_dict".split()
)
FORBIDDEN = "forbidden"  # among a backbone's verdicts: a trial found packing to be wrong


def _refuse_unknown(arguments):
    """Raise NotImplementedError for an argument that may change the arithmetic (softcap, attention sinks, bias ...)."""
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in HARMLESS)
    if unknown or arguments.get("is_causal") is False:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'is_causal=False'}")


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, segment_lens=None, sliding_window=None, **rest
):
    """Causal attention within each segment.

    query [B, heads, N, D], key [B, kv heads, N, D], value [B, kv heads, N, D'] -> ([B, N, heads, D'], None).
    segment_lens: the lengths of the sequences, which sum to N. sliding_window: the number of tokens that a token sees,
    including itself.
    """
    _refuse_unknown(rest | {"attention_mask": attention_mask, "no segment_lens": None if segment_lens else True})
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    pieces = []
    for q, k, v in zip(*(x.split(segment_lens, dim=2) for x in (query, key, value))):
        length = q.shape[2]
        mask = _within_window(length, sliding_window, q.device) if sliding_window and length > sliding_window else None
        pieces.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _within_window(length, window, device):
    """Mask [length, length]: a token sees itself and the window - 1 tokens before it."""
    places = torch.arange(length, device=device)
    behind = places.unsqueeze(1) - places
    return (behind >= 0) & (behind < window)


def slot_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, spans=None, sliding_window=None, **rest
):
    """Attention of one query per slot.

    query [B, heads, 1, D], key [B, kv heads, L, D], value [B, kv heads, L, D'] -> ([B, 1, heads, D'], None); D' is not
    D in multi-head latent attention. The mask [B, 1, 1, L] is a bias, or bool; where there are spans, bool.

    The query heads that share a key head become queries of that one head. transformers (until about 5.20) repeated the
    keys instead, which copies the whole cache in every layer of every step. spans: [(first slot, last slot + 1, largest
    number of columns that these slots see)] where the slots are computed in pieces. No sequence is longer than
    sliding_window; `limits.check_cache_support` makes sure of that.
    """
    _refuse_unknown(rest)
    rows, heads, _, size = query.shape
    if spans is not None and key.shape[1] == heads:
        scaled = query.float() * (size**-0.5 if scaling is None else scaling)
        pieces = []
        for first, end, width in spans:
            k, v = key[first:end, :, :width].float(), value[first:end, :, :width].float()
            pieces.append(_one_query_attention(scaled[first:end], k, v, attention_mask[first:end, :, 0, :width]))
        return torch.cat(pieces).unsqueeze(1).to(query.dtype), None
    queries = query.reshape(rows, key.shape[1], -1, size)
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(products_dtype(query))
    out = scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def _one_query_attention(query, key, value, mask):
    """Attention of one scaled query [B, heads, 1, D] without a matrix product: [B, heads, D']. mask [B, 1, L].

    With one query, a matrix product uses each number only once. Where the library for products is slow, plain sums over
    data that fits into the processor's cache are faster.
    """
    scores = (key * query).sum(-1).masked_fill_(~mask, -torch.inf)
    return (value * scores.softmax(-1).unsqueeze(-1)).sum(2)


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(SLOTS, slot_attention)


@contextmanager
def attention_by(backbone, name):
    """Replace the backbone's attention within the block. transformers builds no mask for names it does not know."""
    config = backbone.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_forward(backbone, input_ids, segment_lens, **arguments):
    """Hidden states [B, N, H] of packed rows of ids [B, N]. segment_lens: the sequences' lengths, which sum to N, the
    same in every row."""
    positions = torch.cat([torch.arange(length, device=input_ids.device) for length in segment_lens]).unsqueeze(0)
    with attention_by(backbone, PACKED):
        output = backbone(input_ids=input_ids, position_ids=positions, segment_lens=segment_lens, **arguments)
    return output.last_hidden_state


def attending_to_slots(backbone):
    """Within the block, the backbone attends by `slot_attention`."""
    return attention_by(backbone, SLOTS)


def can_pack(backbone, longest=0):
    """Whether this model computes the same numbers for packed rows as for separate ones, up to `longest` tokens a row.

    The function tries this on the model itself: with rows of a few tokens and, if an attention window is shorter than
    `longest`, with a row that is longer than that window. The backbone keeps the verdict, for every role on it. No
    random stream is used.
    """
    verdicts = _verdicts(backbone)
    if FORBIDDEN in verdicts or not takes_our_attention(backbone):
        return False
    exceeded = _window_exceeded(backbone, longest)
    if exceeded not in verdicts:
        verdicts[exceeded] = _try_packing(backbone, exceeded)
    return verdicts[exceeded]


def remember_packing(backbone, longest, verdict):
    """Store the verdict of another trial with rows of up to `longest` tokens. False forbids packing for good."""
    verdicts = _verdicts(backbone)
    verdicts |= {_window_exceeded(backbone, longest): True} if verdict else {FORBIDDEN: True}


def _verdicts(backbone):
    return getattr(backbone, "shared_backbone", backbone).__dict__.setdefault("_rllr_can_pack", {})


def _window_exceeded(backbone, longest):
    """The longest of the decoder's attention windows that is shorter than `longest`; 0 if there is none."""
    return max((window for window in windows_of(backbone.config).values() if window < longest), default=0)


def takes_our_attention(backbone):
    """Whether the model calls its attention through transformers' interface and does not read the mask itself."""
    return getattr(backbone, "_supports_attention_backend", False) and backbone.config._attn_implementation == "sdpa"


def _try_packing(backbone, exceeded):
    vocabulary, device = text_config(backbone.config).vocab_size, backbone.device
    positions = min((tokens for tokens, _ in position_limits(backbone.config)), default=exceeded + 7)
    spans = [(3, 5), (7, 2), (1, min(exceeded + 7, positions))]
    rows = [torch.arange(start, start + size, device=device) % vocabulary for start, size in spans]
    # The rounding of autocast would hide a difference, or look like one.
    with torch.autocast(device.type, enabled=False):
        alone = [backbone_alone(backbone, row) for row in rows]
        return packs_like(backbone, rows, alone)


@torch.no_grad()
def backbone_alone(backbone, row):
    """Final hidden states [n, H] of one row of ids [n] by the model's own forward, without dropout."""
    with eval_mode(backbone):
        return backbone(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0]


@torch.no_grad()
def packs_like(backbone, rows, alone):
    """Whether rows of ids, when packed, give the hidden states [n, H] that they have alone.

    False also where packing raises an exception: a model that cannot be packed may fail with any error.
    """
    lengths = [len(row) for row in rows]
    try:
        with eval_mode(backbone):
            packed = packed_forward(backbone, torch.cat(rows).unsqueeze(0), lengths, use_cache=False)[0]
    except Exception:
        return False
    alone = torch.cat(alone)
    if not torch.isfinite(alone).all():
        return False
    rtol = {torch.float32: 1e-4, torch.float64: 1e-8}.get(packed.dtype, 5e-2)
    atol = rtol * float(alone.abs().max())
    return packed.shape == alone.shape and torch.allclose(packed, alone, rtol=rtol, atol=atol)
