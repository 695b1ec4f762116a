"""CUDA graphs of the decoder's steps: recorded once per shape, replayed as one launch. Also what is asked before a pass
is recorded, here or in `model.passes`.

A step of a small model runs hundreds of kernels of a few microseconds each; launching them from Python takes longer
than running them. A graph repeats the recorded kernels on the same memory. So all that a step reads and writes must be
in tensors that live as long as the graph, the shapes must be fixed, and the host must not read values from the device.
The decoder's step follows these rules on every device; only recording needs a GPU.
"""

import gc
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress

import torch

from .limits import text_config

# A pass is worth recording where launches take about as long as kernels. Forward and backward of 8,000 tokens on an
# H200: 2.0 times as fast at 0.3e11 (135 M weights), 1.25 at 1.2e11 (0.5 B), 1.01 at 3.8e11 (1.5 B).
WORTH = 2e11  # weights of a layer x padded tokens
WARM = 2  # times that a pass of a shape runs without being recorded: it may not come again
FREE_SHARE = 1 / 2  # of the GPU's memory must be free: recorded passes never give theirs back


class StepGraphs:
    """Runs a decoder's steps: eagerly the first times a shape occurs (a warm-up), afterwards recorded and replayed.

    The steps are always the same methods, but each call passes its own: a reference here would form a circle with the
    decoder and keep its cache alive.
    """

    def __init__(self):
        self._seen: Counter = Counter()
        self._off: set[str] = set()  # steps that are not recorded
        self._graphs, self._memory = {}, None

    def __call__(self, step, rows, width, warm=1, may_record=lambda: True):
        """Run `step(rows, width)`, a method of the decoder; eagerly `warm` times. may_record: asked before a recording;
        a step that may not be recorded once never is."""
        name, shape = step.__name__, (step.__name__, rows, width)
        if shape not in self._graphs and self._seen[shape] >= warm and name not in self._off:
            try:
                if may_record():
                    self._graphs[shape] = self.record(step, rows, width)
                else:
                    self._off.add(name)
            except RuntimeError as error:  # an operation of this model that cannot be recorded
                self._off.add(name)
                warnings.warn(f"CUDA graphs are off, decoding continues without them: {error}", stacklevel=2)
        self._seen[shape] += 1
        if shape in self._graphs:
            self._graphs[shape].replay()
        else:
            step(rows, width)

    def count_of(self, step):
        """How many shapes of a step are recorded."""
        return sum(name == step.__name__ for name, *_ in self._graphs)

    def record(self, step, rows, width):
        """The graph, to be run by its `replay()`. Recording computes nothing. All shapes share one pool of memory."""
        graph = torch.cuda.CUDAGraph()
        with recording(torch.device("cuda")), torch.cuda.graph(graph, pool=self._memory):
            step(rows, width)
        self._memory = graph.pool()
        return graph


@contextmanager
def recording(device):
    """A block in which something is recorded: it moves no random stream, and where it fails PyTorch is put right again,
    the current stream and (torch 2.11) a generator that takes every later draw for a part of the recording."""
    on_gpu = device.type == "cuda"
    try:
        with torch.random.fork_rng([device] if on_gpu else []):
            with torch.cuda.stream(torch.cuda.current_stream(device)) if on_gpu else nullcontext():
                yield
    except RuntimeError:
        if on_gpu:
            _record_something(device)
        raise


def _record_something(device):
    """A recording that succeeds ends the one that did not."""
    number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    with suppress(RuntimeError), torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        number.add_(1)


def has_room(device):
    """Whether so much memory is free that a recorded pass may keep some."""
    if device.type != "cuda":
        return True
    gc.collect()  # a model that was given up holds its passes, and they hold it
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free >= FREE_SHARE * total


def worth_recording(weights_per_layer, tokens):
    """Whether a pass of so many tokens is so small that the GPU would wait for its launches."""
    return weights_per_layer * tokens <= WORTH


def inner_weights(decoder):
    """The number of a decoder's weights without its token embeddings."""
    embeddings = decoder.get_input_embeddings().weight
    return sum(weight.numel() for weight in decoder.parameters() if weight is not embeddings)


def weights_per_layer(decoder):
    """Weights of one of a decoder's layers, on average."""
    return inner_weights(decoder) / max(1, getattr(text_config(decoder.config), "num_hidden_layers", 1))


def padded_width(width, limit=None):
    """Columns to compute for so many: few widths, each at most an eighth (and 15 columns) larger than needed. limit:
    the model's, beyond which its attention may change."""
    columns = eighth(width, 16)
    return columns if limit is None or width > limit else min(columns, limit)


def eighth(number, least=1):
    """The next multiple of `least`, or of an eighth of the power of two that is not above the number."""
    step = max(least, 1 << max(0, number.bit_length() - 4))
    return -(-number // step) * step


def shape_for(live, slots, width, length):
    """(rows, width) to compute for `live` of `slots` rows and `width` of `length` columns: few shapes, so few graphs.

    Rows double from an eighth of the slots, columns double from 128. So each grows to less than twice what is needed,
    except in the smallest shapes.
    """
    rows, columns = max(1, -(-slots // 8)), 128
    while rows < live:
        rows *= 2
    while columns < width:
        columns *= 2
    return min(rows, slots), min(columns, length)
