"""The state of the decoding loop: which answer is in which slot, and one step for all of them.

Live answers always fill the first slots, so a step works on views and computes nothing for empty slots. When an answer
ends, the last live slot moves into its place; when enough slots are free, new prompts are added after the live ones. On
a GPU, steps are recorded and replayed (`graphs`) in a few fixed shapes: some slots beyond the live ones are then
computed as well, but nothing reads their results.
"""

from contextlib import nullcontext
from typing import Any

import torch

from .attention import attending_to_slots, can_pack, packed_forward, takes_our_attention
from .cache import SlotCache, cache_argument, products_dtype
from .graphs import WARM, StepGraphs, has_room, padded_width, shape_for, weights_per_layer, worth_recording
from .linear import products_are_slow

MOST = 8  # shapes of prompts that are recorded
SPAN = 16  # slots whose keys and values are read in one piece: about as much as a core's cache holds


def records_steps(device):
    """Whether decoding steps on this device become CUDA graphs."""
    return device.type == "cuda"


class Decoder:
    """Lets one model write answers in `slots` slots. Nothing here computes gradients.

    head: hidden [n, H] -> logits [n, V]; sampler: (logits, places, counts) -> (token, log-probability). `admit` starts
    answers, `step` gives each live answer its next token, `harvest` returns the answers that have ended and frees
    their slots. length: of the longest answer with its prompt; columns: of each slot, at least as many (as many).
    records: whether steps become CUDA graphs (by default, on a GPU).
    """

    def __init__(
        self, backbone, head, sampler, *, slots, length, max_new_tokens, stop_ids, device, columns=None, records=None
    ):  # fmt: skip
        columns, self.device = columns or length, device
        self.cache = SlotCache(slots, columns)
        self.with_cache = {cache_argument(backbone): self.cache, "use_cache": True}
        self.stop_ids, self.max_new_tokens = stop_ids, max_new_tokens
        long = {"dtype": torch.long, "device": device}
        self.tokens = torch.zeros(slots, **long)  # the newest token of each answer, not yet seen by the model
        self.positions = torch.zeros(slots, **long)  # the position of that token
        self.counts = torch.zeros(slots, **long)  # tokens written so far
        self.places = torch.zeros(slots, **long)  # of each answer: its owner, from which its random numbers follow
        self.answers = torch.zeros(slots, max_new_tokens, **long)
        self.logprobs = torch.zeros(slots, max_new_tokens, device=device)
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)
        self.columns = torch.arange(columns, device=device)
        self.slot_ids = torch.arange(slots, device=device)
        self.prompt_ids = torch.zeros(slots, columns, **long)  # of prompts that go through the model now
        self.prompt_lens, self.prompt_slots = (torch.zeros(slots, **long) for _ in range(2))
        self.last_hidden: Any = None  # [slots, H], of their last tokens
        self.key = torch.zeros((), **long)  # of the sampler, where recorded steps read it
        self.weights: Any = None  # what the caller wants to live as long as the recorded steps, which read it
        self.owners = []  # of each live slot: the owner that `admit` got
        # The positions as Python numbers, so that no step must read them from the device. For an answer that has ended
        # they count on until `harvest`, which only makes the view a little wider.
        self.host_positions = []
        self.graphs = StepGraphs() if (records_steps(device) if records is None else records) else None
        # A 4-D mask from here saves transformers from building one per step. Families that read the 2-D mask themselves
        # (alibi) must get the 2-D one.
        self.ready_mask = takes_our_attention(backbone)
        self.own_attention = can_pack(backbone, length)
        if self.own_attention:
            self.weights_per_layer = weights_per_layer(getattr(backbone, "shared_backbone", backbone))
        self.packs_prompts = self.own_attention and device.type == "cpu" and not self.graphs
        self.in_pieces = self.own_attention and device.type == "cpu" and products_are_slow()
        self.begin(backbone, head, sampler, columns)

    def begin(self, backbone, head, sampler, widest):
        """Get ready for a call, the first or, after `end`, a further one: nothing of an earlier call is left but memory
        and recorded steps. widest: the columns that a step of this call may see, so that what it computes does not
        depend on how many there are."""
        self.backbone, self.head, self.sampler, self.widest = backbone, head, sampler, widest
        if self.own_attention:
            self.bias_dtype = products_dtype(backbone.get_input_embeddings().weight)
        if self.graphs:
            self.key.fill_(sampler.key)
            sampler.key = self.key
        for state in self._per_slot():
            state.zero_()
        self.cache.clear()

    def end(self):
        """Let go of the model, which outlives the call with its weights as they will be then."""
        self.backbone = self.head = self.sampler = None
        self.owners, self.host_positions = [], []

    @property
    def live(self):
        return len(self.owners)

    @property
    def free(self):
        return len(self.slot_ids) - self.live

    @torch.no_grad()
    def admit(self, prompts, owners, copies=1):
        """Run prompts (lists of ids) and sample the first token of `copies` answers to each; every answer takes a slot.

        owners: one number per answer, its place in the call, returned by `harvest`; the copies of one prompt are
        neighbours.
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
        self.places[slots] = torch.tensor(owners, device=self.device)
        self.host_positions += [length for length in lens for _ in range(copies)]
        self.positions[slots] = positions - 1  # `_append_tokens` adds one
        self.counts[slots], self.ended[slots] = 0, False
        self._append_tokens(hidden, slots)

    def _prefill(self, prompts, lens, slots):
        """Hidden states [prompts, H] after the last prompt token; keys and values go to the slots."""
        lengths = torch.tensor(lens, device=self.device)
        if len(prompts) > 1 and self.packs_prompts:
            ids = torch.tensor([token for prompt in prompts for token in prompt]).unsqueeze(0)
            columns = torch.cat([self.columns[:length] for length in lens]).unsqueeze(0)
            self.cache.write_at(slots.repeat_interleave(lengths).unsqueeze(0), columns)
            hidden = packed_forward(self.backbone, ids, lens, **self.with_cache)
            return hidden[0, lengths.cumsum(0) - 1]
        rows, width = len(prompts), padded_width(max(lens), self.widest) if self.graphs else max(lens)
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        self.prompt_ids[:rows, :width] = ids.to(self.device)
        self.prompt_lens[:rows], self.prompt_slots[:rows] = lengths, slots
        read, graphs = self._read_prompts, self.graphs
        if graphs and self.own_attention and worth_recording(self.weights_per_layer, rows * width):
            graphs(read, rows, width, WARM, lambda: graphs.count_of(read) < MOST and has_room(self.device))
        else:
            read(rows, width)
        return self.last_hidden[:rows]

    def _read_prompts(self, rows, width):
        """Run the prompts in `prompt_ids` through the model. As `_step`, it can be recorded; transformers builds a mask
        while it is, and none while it isn't, so that our attention is asked where it can be."""
        ids, columns = self.prompt_ids[:rows, :width], self.columns[:width].expand(rows, -1)
        self.cache.write_at(self.prompt_slots[:rows].unsqueeze(1).expand(-1, width), columns)
        if self.graphs and self.own_attention:
            hidden = packed_forward(self.backbone, ids, [width], **self.with_cache)
        else:
            hidden = self.backbone(input_ids=ids, **self.with_cache).last_hidden_state
        last = hidden[self.slot_ids[:rows], self.prompt_lens[:rows] - 1]
        if self.last_hidden is None:
            self.last_hidden = last.new_zeros(len(self.slot_ids), last.shape[-1])
        self.last_hidden[:rows] = last

    @torch.no_grad()
    def step(self):
        """Write the next token of every live answer."""
        rows, width = self.live, min(max(self.host_positions) + 1, self.widest)
        if self.graphs:
            self.graphs(self._step, *shape_for(rows, len(self.slot_ids), width, self.widest))
        else:
            self._step(rows, width, self._spans() if self.in_pieces else None)
        self.host_positions = [position + 1 for position in self.host_positions]

    def _step(self, rows, width, spans=None):
        """Write one more token in each of the first `rows` slots, which see `width` columns.

        From here on the host reads nothing from the device and all data is in tensors of this decoder, so that the step
        can be recorded as a CUDA graph.
        """
        positions = self.positions[:rows].unsqueeze(1)
        self.cache.write_at(self.slot_ids[:rows].unsqueeze(1), positions, rows=rows, width=width)
        visible = self.columns[:width] <= positions  # [rows, width]
        mask = visible[:, None, None, :] if self.ready_mask else visible.long()
        if self.own_attention and not spans:  # of a bool mask every layer would make this bias for itself
            mask = torch.zeros(mask.shape, dtype=self.bias_dtype, device=self.device).masked_fill_(~mask, -torch.inf)
        ids, options = self.tokens[:rows].unsqueeze(1), {"spans": spans} if spans else {}
        with attending_to_slots(self.backbone) if self.own_attention else nullcontext():
            output = self.backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, **self.with_cache, **options
            )
        self._append_tokens(output.last_hidden_state[:, -1], slice(0, rows))

    def _spans(self):
        """[(first slot, last slot + 1, width)]: the live slots in pieces, each as wide as its longest answer."""
        starts = range(0, self.live, SPAN)
        return [(a, min(a + SPAN, self.live), max(self.host_positions[a : a + SPAN]) + 1) for a in starts]

    def _append_tokens(self, hidden, slots):
        """Sample a token for each slot of a slice and append it to the slot's answer, unless that answer has ended."""
        token, logprob = self.sampler(self.head(hidden), self.places[slots], self.counts[slots])
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
        """[(owner, tokens, log-probabilities [n])] of the answers that have ended; this frees their slots."""
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

    def _per_slot(self):
        """Everything that belongs to a slot, beside its keys and values."""
        return self.tokens, self.positions, self.counts, self.places, self.answers, self.logprobs, self.ended

    def _close_gaps(self, done):
        """Move the last live slots into those that ended, so that the live slots are the first ones again."""
        kept = self.live - len(done)
        gaps = [slot for slot in done if slot < kept]
        movers = [slot for slot in range(kept, self.live) if slot not in done]
        if gaps:
            for state in self._per_slot():
                state[gaps] = state[movers]
            self.cache.move(movers, gaps, max(self.host_positions[slot] for slot in movers))
            for gap, mover in zip(gaps, movers):
                self.owners[gap], self.host_positions[gap] = self.owners[mover], self.host_positions[mover]
        del self.owners[kept:], self.host_positions[kept:]
