"""Act 1: sampling answers in batches with a KV cache. Knows token ids; nothing of text, tasks or rewards.

The sampled distribution is exactly softmax(logits / temperature): no top-k, no top-p, no repetition penalty, because
the policy gradient is taken of the whole softmax. Log-probabilities are recorded while sampling. Each answer has a
slot of its own in the cache and its own positions, so its numbers do not depend on its neighbours; when it ends, the
slot goes to the next prompt (`rllr.engine`).
"""

import sys
from dataclasses import dataclass

import torch

from .common import ranks
from .engine import decoder as decoding
from .engine import kept
from .engine.attention import can_pack
from .engine.cache import bytes_per_token, eval_mode
from .engine.decoder import Decoder
from .engine.limits import check_cache_support, length_limit
from .engine.linear import packed_linears
from .engine.sampling import Sampler
from .layout import Packed, pack_sequences
from .model.backbone import backbone_of, lm_logits
from .model.cast_once import CastWeights
from .model.precision import autocast
from .model.shards import is_sharded, on_whole_weights

ADMIT_SHARE = 0.125  # share of free slots at which new prompts are let in: in groups, as their forward stops the others
STEPS_PER_LOOK = {"cpu": 1, "other": 8}  # steps between looks at which answers ended: a look waits for a GPU to finish
PREFILL_TOKENS = {"cpu": 4096, "other": 16384}  # prompt tokens, at most, that go through the model together


@dataclass
class Rollout:
    """Sampled answers in the order of the prompts. B rows, T = longest prompt + answer, R = longest answer."""

    sequences: torch.Tensor  # [B, T] long: prompt | response | padding
    prompt_lens: torch.Tensor  # [B] long
    response_lens: torch.Tensor  # [B] long, the stop token included
    response_mask: torch.Tensor  # [B, R] bool
    rollout_logprobs: torch.Tensor  # [B, R] float32, of logits / temperature; 0 outside the mask
    truncated: torch.Tensor  # [B] bool: cut by max_new_tokens, no stop token

    @property
    def packed(self) -> Packed:
        """Prompts and answers as the models take them."""
        return Packed(self.sequences, self.prompt_lens, self.response_mask)

    def responses(self):
        """The answers as lists of token ids, stop token included."""
        spans = zip(self.sequences.tolist(), self.prompt_lens.tolist(), self.response_lens.tolist())
        return [row[start : start + length] for row, start, length in spans]


@torch.no_grad()
@on_whole_weights
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
    batch_size=128,
    answers_per_prompt=1,
    cache_bytes=None,
):
    """Sample (or, greedy, take the likeliest of) answers to prompts; the rows of a prompt's answers stand together.

    prompts: list of token-id lists; eos_token_id: an int or a list, any of which ends an answer and belongs to it. A
    sampled pad id is an ordinary token. At most `batch_size` answers are written at a time, fewer where their keys and
    values would take more than `cache_bytes` (default on a GPU: half of the free memory, or, where algorithms are to
    be deterministic, a quarter of all). Prompts are started longest first, and each runs through the model once for all
    its answers, where as many are written at a time. Dropout is off while sampling. An answer depends on the
    generator's state and on its place among the prompts, not on the batch size or the device (only rounding of the
    logits can change a token).
    """
    if max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature above 0, got {max_new_tokens}, {temperature}"
        )
    if answers_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            f"answers_per_prompt and batch_size must be at least 1, got {answers_per_prompt}, {batch_size}"
        )
    device = model.device
    stop_ids = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), device=device)
    length, records = max(map(len, prompts)) + max_new_tokens, decoding.records_steps(device)
    check_cache_support(model, length)
    columns = kept.rounded(length, length_limit(model)[0]) if records else length
    own = ranks.share(range(len(prompts)))  # of several ranks each writes the answers to its share of the prompts
    slots = max(1, min(batch_size, len(own) * answers_per_prompt, slots_within(cache_bytes, model, columns)))
    backbone, head = backbone_of(model), lambda hidden: lm_logits(model, hidden)
    nbytes = slots * bytes_per_slot(model, columns) if records else 0
    lives = records and not is_sharded(model) and kept.may_live(model, backbone, nbytes)
    sampler = Sampler(temperature, greedy, key=0 if greedy else draw_key(generator))
    # A recorded step that lives on would go on reading what autocast kept when it was recorded.
    with eval_mode(model), autocast(device, cached=not lives):
        spec = None
        if lives:
            settings = slots, max_new_tokens, tuple(stop_ids.tolist()), temperature, greedy
            spec = kept.spec_of(model, *settings, can_pack(backbone, length))
        decoder = kept.take(model, spec, columns) if records else None
        if decoder:
            decoder.begin(backbone, head, sampler, columns)
        else:
            decoder = Decoder(
                backbone, head, sampler, slots=slots, length=length, max_new_tokens=max_new_tokens,
                stop_ids=stop_ids, device=device, columns=columns,
            )  # fmt: skip
            room = 0 if is_sharded(model) else kept.idle_limit(device) - nbytes * lives
            decoder.weights = CastWeights(model, room)
        with decoder.weights.in_use(model), packed_linears(model):
            responses, logprobs = _write_all(decoder, prompts, answers_per_prompt, own)
        decoder.end()
        if lives:
            kept.keep(model, spec, decoder)
    prompts = [prompt for prompt in prompts for _ in range(answers_per_prompt)]
    sequences, prompt_lens, response_mask = pack_sequences(prompts, responses, pad_token_id, device)
    recorded = torch.zeros(response_mask.shape, device=device)
    recorded[response_mask] = torch.cat([scored.to(device) for scored in logprobs])
    stops = set(stop_ids.tolist())
    truncated = torch.tensor([response[-1] not in stops for response in responses], device=device)
    return Rollout(sequences, prompt_lens, response_mask.sum(1), response_mask, recorded, truncated)


def _write_all(decoder, prompts, answers, own):
    """(responses, log-probabilities), lists in the order of the prompts, `answers` of each. own: the prompts that this
    rank answers; the other answers come from the other ranks."""
    responses: list = [None] * len(prompts) * answers
    logprobs: list = [None] * len(prompts) * answers
    copies = answers if answers <= decoder.free else 1  # answers of one prompt that share its forward
    by_length = sorted(own, key=lambda row: len(prompts[row]))  # taken from the end: the longest first
    queue = [(row, first) for row in by_length for first in range(0, answers, copies)]
    admit_at = max(copies, int(ADMIT_SHARE * decoder.free))
    steps_per_look = for_device(STEPS_PER_LOOK, decoder.device)
    while queue or decoder.live:
        if queue and (decoder.free >= admit_at or not decoder.live):
            while queue and decoder.free >= copies:
                group = _next_group(queue, prompts, decoder, copies)
                owners = [row * answers + first + copy for row, first in group for copy in range(copies)]
                decoder.admit([prompts[row] for row, _ in group], owners, copies)
        else:
            for _ in range(steps_per_look):
                decoder.step()
        for owner, response, scored in decoder.harvest():
            responses[owner], logprobs[owner] = response, scored
    if ranks.count() > 1:
        written = [(owner, responses[owner], logprobs[owner].cpu()) for row in own
                   for owner in range(row * answers, (row + 1) * answers)]  # fmt: skip
        for owner, response, scored in (answer for part in ranks.each(written) for answer in part):
            responses[owner], logprobs[owner] = response, scored
    return responses, logprobs


def _next_group(queue, prompts, decoder, copies):
    """Taken off the queue: as many as find free slots, within the budget of prompt tokens; at least one."""
    budget = for_device(PREFILL_TOKENS, decoder.device)
    group: list[tuple[int, int]] = []
    while queue and (len(group) + 1) * copies <= decoder.free:
        length = len(prompts[queue[-1][0]])
        if group and length > budget:
            break
        budget -= length
        group.append(queue.pop())
    return group


def draw_key(generator):
    """64 random bits for one call (None: of torch's default generator): all its random numbers follow from them."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.long, device=device, generator=generator))


def for_device(settings, device):
    """The setting for this kind of device."""
    return settings["cpu" if device.type == "cpu" else "other"]


def slots_within(cache_bytes, model, length):
    """How many answers' keys and values fit into `cache_bytes`; at least one. None on a CPU: no limit."""
    if cache_bytes is None and model.device.type != "cuda":
        return sys.maxsize
    if cache_bytes is None:
        free, total = torch.cuda.mem_get_info(model.device)
        free += kept.idle_bytes(model)
        cache_bytes = total // 4 if torch.are_deterministic_algorithms_enabled() else free // 2
    return max(1, int(cache_bytes // bytes_per_slot(model, length)))


def bytes_per_slot(model, length):
    """Of keys and values, in the dtype of products."""
    with autocast(model.device):
        return length * bytes_per_token(backbone_of(model))
