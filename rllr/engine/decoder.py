"""The decoding loop's state: which answer is in which slot, and one step for all of them.

Live answers always fill the first slots, so a step works on views and computes nothing for empty ones. When an answer
ends, the last live slot moves into its place; when enough slots are free, new prompts are written behind. On a GPU steps are
recorded and replayed (`graphs`), in a few fixed shapes: slots beyond the live ones are computed as well, within the same
limits, and never harvested.
"""

from contextlib import nullcontext

import torch

from .attention import attending_to_slots, can_pack, packed_forward, takes_our_attention
from .cache import SlotCache, cache_argument
from .graphs import StepGraphs, shape_for
from .linear import products_are_slow

SPAN = 16  # slots whose keys and values are read together: about what fits a core's cache


class Decoder:
    """Answers being written by one model in `slots` slots of `length` columns.

    head: hidden [n, H] -> logits [n, V]; sampler: logits -> (token, log-probability). `admit` starts answers, `step` gives
    each live answer its next token, `harvest` hands out those that ended. All without gradient.
    """

    def __init__(self, backbone, head, sampler, *, slots, length, max_new_tokens, stop_ids, device):
        self.backbone, self.head, self.sampler, self.device = backbone, head, sampler, device
        self.cache = SlotCache(slots, length)
        self.with_cache = {cache_argument(backbone): self.cache, "use_cache": True}
        self.stop_ids, self.max_new_tokens = stop_ids, max_new_tokens
        long = {"dtype": torch.long, "device": device}
        self.tokens = torch.zeros(slots, **long)  # the newest token of each answer, not yet seen by the model
        self.positions = torch.zeros(slots, **long)  # where that token stands
        self.counts = torch.zeros(slots, **long)  # tokens written so far
        self.answers = torch.zeros(slots, max_new_tokens, **long)
        self.logprobs = torch.zeros(slots, max_new_tokens, device=device)
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)
        self.columns = torch.arange(length, device=device)
        self.slot_ids = torch.arange(slots, device=device)
        self.owners = []  # of each live slot: what `admit` was told
        # The same positions as Python numbers, so that no step needs to ask the device for them; those of an answer that has
        # ended go on until it is harvested, which only makes the view a little wider.
        self.reach = []
        self.graphs = StepGraphs(sampler.generator) if device.type == "cuda" else None
        # A ready-made mask saves building one per step; families that read the 2-D mask themselves (alibi) must get that.
        self.ready_mask = takes_our_attention(backbone)
        self.own_attention = can_pack(backbone, length)
        self.packs_prompts = self.own_attention and device.type == "cpu"
        self.in_pieces = self.own_attention and device.type == "cpu" and products_are_slow()

    @property
    def live(self):
        return len(self.owners)

    @property
    def free(self):
        return len(self.slot_ids) - self.live

    @torch.no_grad()
    def admit(self, prompts, owners, copies=1):
        """Run prompts (lists of ids) and sample the first token of `copies` answers each, in as many free slots.

        owners: one per answer, handed back by `harvest`; the copies of a prompt stand together.
        """
        lens = [len(prompt) for prompt in prompts]
        slots = slice(self.live, self.live + len(prompts) * copies)
        ids = self.slot_ids[slots]
        hidden = self._prefill(prompts, lens, ids[::copies])  # [prompts, H]
        if copies > 1:
            for copy in range(1, copies):
                self.cache.move(ids[::copies], ids[copy::copies], max(lens))
            hidden = hidden.repeat_interleave(copies, 0)
        positions = torch.tensor(lens, device=self.device).repeat_interleave(copies)
        self.owners += owners
        self.reach += [length for length in lens for _ in range(copies)]
        self.positions[slots] = positions - 1  # `_take` moves on by one
        self.counts[slots], self.ended[slots] = 0, False
        self._take(hidden, slots)

    def _prefill(self, prompts, lens, slots):
        """Hidden states [prompts, H] after the last prompt token; keys and values go to the slots."""
        lengths = torch.tensor(lens, device=self.device)
        if len(prompts) > 1 and self.packs_prompts:
            ids = torch.tensor([token for prompt in prompts for token in prompt]).unsqueeze(0)
            columns = torch.cat([self.columns[:length] for length in lens]).unsqueeze(0)
            self.cache.write_at(slots.repeat_interleave(lengths).unsqueeze(0), columns)
            hidden = packed_forward(self.backbone, ids, lens, **self.with_cache)
            return hidden[0, lengths.cumsum(0) - 1]
        width = max(lens)
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=self.device)
        columns = self.columns[:width].expand(len(prompts), -1)
        self.cache.write_at(slots.unsqueeze(1).expand(-1, width), columns)
        hidden = self.backbone(input_ids=ids, **self.with_cache).last_hidden_state
        return hidden[torch.arange(len(prompts), device=self.device), lengths - 1]

    @torch.no_grad()
    def step(self):
        """The next token of every live answer."""
        rows, width = self.live, min(max(self.reach) + 1, len(self.columns))
        if self.graphs:
            self.graphs(self._step, *shape_for(rows, len(self.slot_ids), width, len(self.columns)))
        else:
            self._step(rows, width, self._spans() if self.in_pieces else None)
        self.reach = [position + 1 for position in self.reach]

    def _step(self, rows, width, spans=None):
        """One token more in the first `rows` slots, of which `width` columns are seen. No look at the device from here on:
        what it needs is in this decoder's own tensors, so it can be recorded."""
        positions = self.positions[:rows].unsqueeze(1)
        self.cache.write_at(self.slot_ids[:rows].unsqueeze(1), positions, rows=rows, width=width)
        mask = self.columns[:width] <= positions  # [rows, width]
        with attending_to_slots(self.backbone) if self.own_attention else nullcontext():
            hidden = self.backbone(
                input_ids=self.tokens[:rows].unsqueeze(1),
                attention_mask=mask[:, None, None, :] if self.ready_mask else mask.long(),
                position_ids=positions,
                **self.with_cache,
                **({"spans": spans} if spans else {}),
            ).last_hidden_state[:, -1]
        self._take(hidden, slice(0, rows))

    def _spans(self):
        """The live slots in pieces, each as wide as its longest answer."""
        starts = range(0, self.live, SPAN)
        return [(a, min(a + SPAN, self.live), max(self.reach[a : a + SPAN]) + 1) for a in starts]

    def _take(self, hidden, slots):
        """Sample a token per slot (a slice) and write it down; an answer that has ended stands still."""
        token, logprob = self.sampler(self.head(hidden))
        going = ~self.ended[slots]
        place = self.counts[slots].clamp(max=self.max_new_tokens - 1).unsqueeze(1)
        for written, new in ((self.answers[slots], token), (self.logprobs[slots], logprob)):
            written.scatter_(1, place, torch.where(going, new, written.gather(1, place).squeeze(1)).unsqueeze(1))
        self.tokens[slots] = torch.where(going, token, self.tokens[slots])
        self.counts[slots] += going
        self.positions[slots] += going
        stopped = (token.unsqueeze(1) == self.stop_ids).any(1)
        self.ended[slots] = ~going | stopped | (self.counts[slots] == self.max_new_tokens)

    def harvest(self):
        """[(owner, tokens, log-probabilities [n])] of the answers that have ended; their slots are free again."""
        ended = self.ended[: self.live].tolist()
        if not any(ended):
            return []
        done = [slot for slot, end in enumerate(ended) if end]
        counts = self.counts[done].tolist()
        answers, logprobs = self.answers[done].tolist(), self.logprobs[done]
        results = [
            (self.owners[slot], answer[:count], logprob[:count])
            for slot, count, answer, logprob in zip(done, counts, answers, logprobs)
        ]
        self._close_gaps(done)
        return results

    def _close_gaps(self, done):
        """Move the last live slots into those that ended, so that the live ones are the first again."""
        kept = self.live - len(done)
        gaps = [slot for slot in done if slot < kept]
        movers = [slot for slot in range(kept, self.live) if slot not in done]
        if gaps:
            for state in (self.tokens, self.positions, self.counts, self.answers, self.logprobs, self.ended):
                state[gaps] = state[movers]
            self.cache.move(movers, gaps, max(self.reach[slot] for slot in movers))
            for gap, mover in zip(gaps, movers):
                self.owners[gap], self.reach[gap] = self.owners[mover], self.reach[mover]
        del self.owners[kept:], self.reach[kept:]
