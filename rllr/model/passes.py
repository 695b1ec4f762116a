"""Passes of whole sequences, forward and backward, as CUDA graphs (`--cuda_graphs`).

A pass of a small model is thousands of kernels that take a few microseconds each, and Python launches one after the
other: while a 135M model was scored or trained on an H200, the GPU computed 13 % of the time. A recorded pass is one
launch. PyTorch records it (`torch.cuda.make_graphed_callables`); this file says which passes, pads them to a few
shapes, and sees to what a recorded pass must not do: read weights that were cast or have moved, draw random numbers
that a run without it would not draw, or let the gradients of two micro-batches share memory.

A pass computes the padded shape whether it is recorded yet or not, so what a run computes does not depend on when it
was recorded.
"""

import gc
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from ..engine.attention import can_pack, packed_forward
from ..engine.graphs import WARM, eighth, has_room, padded_width, recording, weights_per_layer, worth_recording
from ..engine.limits import length_limit
from .precision import autocast, casts

MOST = 12  # shapes recorded of one decoder; each keeps a gradient of all weights
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of a recorded pass, relative to the largest number; bf16 5e-2

MARK = "rllr"  # in the metadata of a node of autograd

_current = {"recorded": False}


def set_recording(recorded):
    """Whether passes of whole sequences are recorded on a GPU from here on (`run.machine.set_up`)."""
    _current["recorded"] = recorded
    if recorded:  # the recorded backward adds gradients up on its own stream; PyTorch waits for it, and would say so
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)


def records_passes(device):
    """Whether passes on this device become CUDA graphs."""
    return _current["recorded"] and device.type == "cuda"


def recorded_hidden(backbone, sequences):
    """Final hidden states [B', T', H] of right-padded sequences [B, T], with B' >= B and T' >= T; None where passes
    like this one are not recorded.

    backbone: a decoder, or a role's view of one (`model.roles`). The result may lie in memory that the next pass
    overwrites, so the caller takes from it what it needs.
    """
    if not records_passes(sequences.device):
        return None
    passes = vars(backbone).get("_rllr_passes")
    if passes is None:
        passes = vars(backbone)["_rllr_passes"] = _Passes(backbone)
    return passes(backbone, sequences)


def forget_recorded(backbone):
    """Record a decoder's or role's passes anew: what they compute changes (dropout, checkpointing, adapters)."""
    passes = vars(backbone).pop("_rllr_passes", None)
    if passes is not None:
        passes.drop()


class _Forward(nn.Module):
    """What is recorded: ids [B, T] -> hidden states. Weights are cast at every use, as they change in place.

    Where the family allows it each row is a packed row of one sequence: transformers builds a mask while it records,
    and none while it doesn't, so that another attention would be computed.
    """

    def __init__(self, backbone, width):
        super().__init__()
        self.backbone, self.packs = backbone, can_pack(backbone, width)

    def forward(self, ids):
        with autocast(ids.device, cached=False):
            if self.packs:
                return packed_forward(self.backbone, ids, [ids.shape[1]], use_cache=False)
            return self.backbone(input_ids=ids, use_cache=False).last_hidden_state


class _Passes:
    """The recorded passes of one decoder or role, by shape and mode."""

    def __init__(self, backbone):
        decoder = getattr(backbone, "shared_backbone", backbone)
        self.weights = list({id(w): w for part in (backbone, decoder) for w in part.parameters()}.values())
        self.weights_per_layer = weights_per_layer(decoder)
        self.limit = length_limit(decoder)[0]
        self.never = _never(backbone, decoder)
        self.full = False  # no further pass is recorded: one could not be, or there is no room
        self.begin()

    def begin(self):
        """As before the first pass."""
        self.seen: dict[tuple, int] = {}
        self.recorded: dict[tuple, Any] = {}  # what PyTorch made of the pass
        self.places = self._places()
        self.lent: list = []  # weights whose gradients may lie in the memory of a recorded backward
        self.pool = self.open = None

    def drop(self):
        """Forget what was recorded. It refers to itself in a circle: its memory is free once that is collected."""
        self.begin()
        gc.collect()

    def _places(self):
        """Where the weights are, and which of them learn: what a recorded pass takes for granted."""
        return [(weight.data_ptr(), weight.dtype, weight.requires_grad) for weight in self.weights]

    def __call__(self, backbone, sequences):
        rows, width = padded_shape(len(sequences), sequences.shape[1], self.limit)
        as_asked = torch.is_autocast_enabled(sequences.device.type) == casts()  # not within a caller's own autocast
        if self.never or not as_asked or not worth_recording(self.weights_per_layer, rows * width):
            return None
        if self.places != self._places():
            self.drop()
        ids = sequences.new_zeros(rows, width)
        ids[: sequences.shape[0], : sequences.shape[1]] = sequences
        with_gradient = torch.is_grad_enabled()
        key = (rows, width, with_gradient, backbone.training, casts())
        self.seen[key] = self.seen.get(key, 0) + 1
        waits = self.open is not None and self.open() is not None  # an earlier pass whose backward is still to come
        if key not in self.recorded and not waits and self.seen[key] > WARM and self._may_record(ids.device):
            self._record(key, backbone, ids)
        if key not in self.recorded or waits:
            hidden = _Forward(backbone, width)(ids)
            self._mark_graph(hidden)
            return hidden
        if with_gradient:
            self._free_gradients()
        hidden = self.recorded[key](ids)
        if hidden.requires_grad:
            self.open = weakref.ref(hidden.grad_fn)
            hidden.register_hook(self._close)
        return hidden

    def _close(self, gradient):
        """Backward has come as far as the pass's result."""
        self.open = None

    def _free_gradients(self):
        """Move gradients out of recorded memory, before the next micro-batch's backward writes there: autograd takes
        that memory for the gradient of a weight that has none yet, which spares a stage without micro-batches a copy of
        all weights."""
        lying = [weight for weight in self.lent if weight.grad is not None]
        if lying:
            found = [weight.grad for weight in lying]
            for weight in lying:
                weight.grad = torch.empty_like(weight.grad)
            torch._foreach_copy_([weight.grad for weight in lying], found)
        self.lent = [weight for weight in self.weights if weight.requires_grad and weight.grad is None]

    def _may_record(self, device):
        """Whether one more pass may be recorded now. A GPU that has once been too full is not asked again."""
        if self.full or self._graph_is_alive():
            return False
        self.full = len(self.recorded) >= MOST or not has_room(device)
        return not self.full

    # A plain pass whose graph is still there, as a loss that somebody holds keeps it, has nodes that add up the
    # weights' gradients on the stream of that pass. Autograd would take them for the recorded backward, too, and a
    # recording must not touch another stream. Once a backward is recorded its nodes stay, on the recording's stream.

    def _mark_graph(self, hidden):
        if hidden.requires_grad:
            self._notes_of_last_node()[MARK] = True

    def _graph_is_alive(self):
        has_backward = any(with_gradient for _, _, with_gradient, *_ in self.recorded)
        return not has_backward and MARK in self._notes_of_last_node()

    def _notes_of_last_node(self):
        """What is noted at the node that adds up the gradient of one weight that learns; {} where no weight does."""
        learning = next((weight for weight in self.weights if weight.requires_grad), None)
        return {} if learning is None else torch.autograd.graph.get_gradient_edge(learning).node.metadata

    def _record(self, key, backbone, ids):
        """Record the pass of this shape, unless it cannot be, or gives other numbers than the plain one."""
        plain, forward = (_Forward(backbone, ids.shape[1]) for _ in range(2))
        try:
            with recording(ids.device), autocast(ids.device, cached=False):
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                recorded = torch.cuda.make_graphed_callables(
                    forward, (ids.clone(),), allow_unused_input=True, pool=self.pool
                )
                problem = _difference(plain, recorded, ids)
        except (RuntimeError, AssertionError) as error:  # an operation that cannot be recorded, or no memory for it
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if problem:
            self.drop()
            self.full = True
            warnings.warn(f"--cuda_graphs is off for {type(backbone).__name__}: {problem}", stacklevel=2)
        else:
            self.recorded[key] = recorded


@torch.no_grad()
def _difference(plain, recorded, ids):
    """What is wrong with a recorded pass, in words; "" where it gives the numbers of the plain one."""
    torch.manual_seed(0)  # of dropout; `recording` gives the streams back
    expected = plain(ids).clone()
    torch.manual_seed(0)
    found = recorded(ids)
    tolerance = 5e-2 if casts() else TOLERANCE.get(expected.dtype, 5e-2)
    error = float((found - expected).abs().max() / expected.abs().max())
    return "" if error <= tolerance else f"a recorded pass is off by {error:.2g} of the largest number"


def _never(backbone, decoder):
    """Whether passes of this decoder are never recorded: its weights are put together for each pass, its layers are
    computed again in backward, or its adapters are switched by hand, which no shape tells of."""
    by_hand = backbone is decoder and hasattr(decoder, "rllr_adapters")
    again = any("_rllr_checkpointed" in vars(module) for module in decoder.modules())
    return by_hand or again or hasattr(decoder, "rllr_shards")


def padded_shape(rows, width, limit=None):
    """(rows, columns) to compute for so many rows and columns: few shapes, each at most an eighth (and 15 columns)
    larger than needed. limit: the model's, beyond which its attention may change."""
    return eighth(rows), padded_width(width, limit)
