"""Act 1: sampling answers in batches with a KV cache. Knows token ids; nothing of text, tasks or rewards.

The sampled distribution is exactly softmax(logits / temperature): no top-k, no top-p, no repetition penalty, because the
policy gradient is taken of the whole softmax. Log-probabilities are recorded while sampling. Prompts are right-padded;
each row's new tokens are written behind the padding, under a mask that skips it and with positions that continue the row's
own count, so a row's numbers do not depend on its neighbours. Finished rows leave the batch and the cache.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from .layout import batches_by_length, pack_sequences
from .model import backbone_of, lm_logits

COMPACT_SHARE = 0.25  # share of finished rows at which they are dropped from the cache (moving it costs a copy)


@dataclass
class Rollout:
    """Sampled answers in the order of the prompts. B rows, T = longest prompt + answer, R = longest answer."""

    sequences: torch.Tensor  # [B, T] long: prompt | response | padding
    prompt_lens: torch.Tensor  # [B] long
    response_lens: torch.Tensor  # [B] long, the stop token included
    response_mask: torch.Tensor  # [B, R] bool
    rollout_logprobs: torch.Tensor  # [B, R] float32, of logits / temperature; 0 outside the mask
    truncated: torch.Tensor  # [B] bool: cut by max_new_tokens, no stop token

    def responses(self):
        """The answers as lists of token ids, stop token included."""
        spans = zip(self.sequences.tolist(), self.prompt_lens.tolist(), self.response_lens.tolist())
        return [row[start : start + length] for row, start, length in spans]


@torch.no_grad()
def generate(
    model,
    prompts,
    *,
    max_new_tokens,
    eos_token_id,
    pad_token_id=None,
    temperature=1.0,
    greedy=False,
    generator=None,
    batch_size=64,
):
    """Sample (or, greedy, take the likeliest of) one answer per prompt.

    prompts: list of token-id lists; eos_token_id: an int or a list, any of which ends an answer and belongs to it.
    A sampled pad id is an ordinary token. At most `batch_size` prompts are decoded together, longest first. Dropout is
    off while sampling. The same generator state, prompts and batch_size give the same answers.
    """
    if max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature above 0, got {max_new_tokens}, {temperature}"
        )
    stop_ids = torch.tensor(
        [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), device=model.device
    )
    check_cache_support(model, max(map(len, prompts)) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        responses, logprobs = [None] * len(prompts), [None] * len(prompts)
        for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            pick = _Sampler(temperature, greedy, generator)
            for row, tokens, token_logprobs in _decode(
                [prompts[r] for r in rows], model, stop_ids, max_new_tokens, pick
            ):
                responses[rows[row]], logprobs[rows[row]] = tokens, token_logprobs
    finally:
        model.train(was_training)
    sequences, prompt_lens, response_mask = pack_sequences(prompts, responses, pad_token_id, model.device)
    recorded = torch.zeros(response_mask.shape, device=model.device)
    recorded[response_mask] = torch.cat(logprobs).to(model.device)
    stops = set(stop_ids.tolist())
    truncated = torch.tensor([response[-1] not in stops for response in responses], device=model.device)
    return Rollout(sequences, prompt_lens, response_mask.sum(1), response_mask, recorded, truncated)


def _decode(prompts, model, stop_ids, max_new_tokens, pick):
    """Yields (row, tokens, log-probabilities) of each row when it ends: at a stop id or at max_new_tokens."""
    backbone, cache = backbone_of(model), DynamicCache()
    ids, lens, _ = pack_sequences(prompts, [[0]] * len(prompts), device=model.device)
    ids = ids[:, : int(lens.max())]
    visible = torch.arange(ids.shape[1], device=ids.device) < lens.unsqueeze(1)  # [B, P]: which cached columns are real
    hidden = backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    hidden = hidden[torch.arange(len(prompts), device=ids.device), lens - 1]  # [B, H]
    rows = list(range(len(prompts)))  # which prompt each batch row holds
    tokens, logprobs = [], []  # one [B] tensor per step
    live = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    for step in range(max_new_tokens):
        token, logprob = pick(lm_logits(model, hidden))
        tokens.append(token)
        logprobs.append(logprob)
        ended = live & (torch.isin(token, stop_ids) | (step + 1 == max_new_tokens))
        if ended.any():
            taken, scored = torch.stack(tokens, 1), torch.stack(logprobs, 1)
            for i in ended.nonzero().flatten().tolist():
                yield rows[i], taken[i].tolist(), scored[i]
            live &= ~ended
            if not live.any():
                return
            if live.sum() <= (1 - COMPACT_SHARE) * len(rows):
                keep = live.nonzero().flatten()
                cache.batch_select_indices(keep)
                rows = [rows[i] for i in keep.tolist()]
                tokens, logprobs = [t[keep] for t in tokens], [p[keep] for p in logprobs]
                token, lens, visible, live = token[keep], lens[keep], visible[keep], live[keep]
        visible = torch.cat([visible, visible.new_ones(len(rows), 1)], 1)
        hidden = backbone(
            input_ids=token.unsqueeze(1),
            attention_mask=visible.long(),
            position_ids=(lens + step).unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class _Sampler:
    """logits [B, V] -> (token [B], its log-probability [B]) under softmax(logits / temperature)."""

    def __init__(self, temperature, greedy, generator):
        self.temperature, self.greedy, self.generator = temperature, greedy, generator

    def __call__(self, logits):
        logprobs = (logits if self.temperature == 1.0 else logits / self.temperature).log_softmax(-1)
        token = logprobs.argmax(-1) if self.greedy else self._draw(logprobs)
        return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1).float()

    def _draw(self, logprobs):
        """Inverse of the cumulative distribution at a uniform draw: on CPU many times cheaper than `torch.multinomial`."""
        cumulative = logprobs.double().exp().cumsum(-1)
        uniform = torch.rand(len(logprobs), 1, dtype=torch.float64, device=logprobs.device, generator=self.generator)
        # right=True: the first token whose cumulative probability exceeds the draw, so never one of probability 0.
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)


def check_cache_support(model, length):
    """Refuse what this cache cannot do exactly: a sliding window shorter than the sequence, recurrent layers."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"rollouts need attention layers only; {type(model).__name__} has {sorted(kinds)}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (getattr(config, "layer_types", None) is None and window)
    if slides and window and getattr(config, "use_sliding_window", True) and window < length:
        raise ValueError(
            f"sliding window of {window} tokens is shorter than prompt + answer ({length}): shorten the prompt"
        )
