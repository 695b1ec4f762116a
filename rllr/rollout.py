"""Act 1: sampling answers in batches with a KV cache. Knows token ids; nothing of text, tasks or rewards.

The sampled distribution is exactly softmax(logits / temperature): no top-k, no top-p, no repetition penalty, because the
policy gradient is taken of the whole softmax. Log-probabilities are recorded while sampling. Each answer has a slot of its
own in the cache and its own positions, so its numbers do not depend on its neighbours; when it ends, the slot goes to the
next prompt (`rllr.engine`).
"""

from dataclasses import dataclass

import torch

from .engine.decoder import Decoder
from .engine.linear import fast_linears
from .engine.sampling import Sampler
from .layout import pack_sequences
from .model import backbone_of, lm_logits

ADMIT_SHARE = 0.125  # share of free slots at which new prompts are let in: in groups, as their forward stops the others
PREFILL_TOKENS = {"cpu": 1024, "other": 16384}  # prompt tokens, at most, that go through the model together


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
    A sampled pad id is an ordinary token. At most `batch_size` answers are written at a time; prompts are started longest
    first. Dropout is off while sampling. The same generator state, prompts and batch_size give the same answers.
    """
    if max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature above 0, got {max_new_tokens}, {temperature}"
        )
    device = model.device
    stop_ids = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), device=device)
    length = max(map(len, prompts)) + max_new_tokens
    check_cache_support(model, length)
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(
            backbone_of(model), lambda hidden: lm_logits(model, hidden), Sampler(temperature, greedy, generator),
            slots=min(batch_size, len(prompts)), length=length, max_new_tokens=max_new_tokens, stop_ids=stop_ids, device=device,
        )  # fmt: skip
        with fast_linears(model):
            responses, logprobs = _run(decoder, prompts)
    finally:
        model.train(was_training)
    sequences, prompt_lens, response_mask = pack_sequences(prompts, responses, pad_token_id, device)
    recorded = torch.zeros(response_mask.shape, device=device)
    recorded[response_mask] = torch.cat(logprobs).to(device)
    stops = set(stop_ids.tolist())
    truncated = torch.tensor([response[-1] not in stops for response in responses], device=device)
    return Rollout(sequences, prompt_lens, response_mask.sum(1), response_mask, recorded, truncated)


def _run(decoder, prompts):
    """(responses, log-probabilities), lists in the order of the prompts."""
    queue = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # taken from the end: the longest first
    responses, logprobs = [None] * len(prompts), [None] * len(prompts)
    admit_at = max(1, int(ADMIT_SHARE * decoder.free))
    while queue or decoder.live:
        if queue and (decoder.free >= admit_at or not decoder.live):
            while queue and decoder.free:
                rows = _next_group(queue, prompts, decoder)
                decoder.admit([prompts[row] for row in rows], rows)
        else:
            decoder.step()
        for row, response, scored in decoder.harvest():
            responses[row], logprobs[row] = response, scored
    return responses, logprobs


def _next_group(queue, prompts, decoder):
    """Rows taken off the queue: as many as there are free slots, within the budget of prompt tokens; at least one."""
    budget, rows = PREFILL_TOKENS["cpu" if decoder.device.type == "cpu" else "other"], []
    while queue and len(rows) < decoder.free and (not rows or len(prompts[queue[-1]]) <= budget):
        budget -= len(prompts[queue[-1]])
        rows.append(queue.pop())
    return rows


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
