"""Log-probabilities and entropy of response tokens: response-only, chunked, one temperature convention.

The LM head runs on the positions that predict a response token and nowhere else, a chunk of tokens at a time: `[B, T,
V]` logits never exist. Temperature divides the logits here exactly as in sampling (`rllr.rollout`), so the
distribution sampled is the distribution scored.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .layout import Packed, pack, response_places, response_tokens, unflatten
from .model.backbone import hidden_at, lm_logits
from .model.precision import autocast

CHUNK_TOKENS = 4096  # tokens whose logits exist at a time: 4096 x 150k vocabulary x 4 bytes = 2.5 GB


def token_logprobs(model, sequences, prompt_lens, response_mask, temperature=1.0):
    """log softmax(logits / temperature) of each response token.

    sequences [B, T], prompt_lens [B], response_mask [B, R] -> [B, R] float32, 0 outside the mask. Differentiable.
    """
    with autocast(sequences.device):
        return _score(model, Packed(sequences, prompt_lens, response_mask), temperature, _chunk_logprobs)[0]


@torch.no_grad()
def token_logprobs_and_entropy(model, sequences, prompt_lens, response_mask, temperature=1.0):
    """`token_logprobs` and the entropy [B, R] of the same distributions in nats, for the scoring pass (no gradient)."""
    with autocast(sequences.device):
        return _score(model, Packed(sequences, prompt_lens, response_mask), temperature, _chunk_logprobs_and_entropy)


def sft_loss(model, rows, answer_tokens, encoder):
    """-sum log pi(answer | prompt) / answer_tokens: what supervised fine-tuning minimises.

    rows: (prompt ids, answer ids, ...) each. `answer_tokens` counts the whole batch, so that the micro-batches' losses
    add up to the exact token mean whatever the split.
    """
    return -token_logprobs(model, *pack(rows, encoder.pad_id, model.device)).sum() / answer_tokens


def _score(model, packed, temperature, chunk_function):
    """What `chunk_function` gives for every response token: a tuple of [B, R], 0 outside the mask."""
    mask = packed.response_mask
    hidden = hidden_at(model, packed, *response_places(packed.prompt_lens, mask))  # [N, H], N real response tokens
    tokens = response_tokens(*packed)[mask]  # [N]
    pieces = []
    for start in range(0, max(len(tokens), 1), CHUNK_TOKENS):
        chunk = (model, hidden[start : start + CHUNK_TOKENS], tokens[start : start + CHUNK_TOKENS], temperature)
        if len(tokens) > CHUNK_TOKENS and torch.is_grad_enabled():  # recompute a chunk's logits instead of keeping all
            pieces.append(checkpoint(chunk_function, *chunk, use_reentrant=False))
        else:
            pieces.append(chunk_function(*chunk))
    return tuple(unflatten(torch.cat(values), mask) for values in zip(*pieces))


def _chunk_logprobs(model, hidden, tokens, temperature):
    logits = _scale(lm_logits(model, hidden), temperature)  # [n, V], float32 or wider
    return (-F.cross_entropy(logits, tokens, reduction="none"),)  # one fused pass over the logits, forward and backward


def _chunk_logprobs_and_entropy(model, hidden, tokens, temperature):
    logits = _scale(lm_logits(model, hidden), temperature)
    logprobs = -F.cross_entropy(logits, tokens, reduction="none")  # the very numbers of `_chunk_logprobs`
    return logprobs, torch.special.entr(logits.softmax(-1)).sum(-1)


def _scale(logits, temperature):
    return logits if temperature == 1.0 else logits / temperature
