"""CUDA graphs of the decoding step: recorded once per shape, replayed as one launch.

A step of a small model runs hundreds of kernels of a few microseconds each; launching them from Python takes longer
than running them. A graph repeats the recorded kernels on the same memory. So all that a step reads and writes must be
in tensors that live as long as the graph, the shapes must be fixed, and the host must not read values from the device.
The decoder's step follows these rules on every device; only recording needs a GPU.
"""

import warnings
from contextlib import contextmanager, nullcontext, suppress

import torch


class StepGraphs:
    """Runs a decoder's step: eagerly the first time a shape occurs (a warm-up), afterwards recorded and replayed.

    The step is always the same, but each call passes it: a reference here would form a circle with the decoder and keep
    its cache alive.
    """

    def __init__(self):
        self._seen, self._graphs, self._memory, self._usable = set(), {}, None, True

    def __call__(self, step, rows, width):
        """Run `step(rows, width)`."""
        shape = rows, width
        if shape not in self._graphs and shape in self._seen and self._usable:
            try:
                self._graphs[shape] = self.record(step, rows, width)
            except RuntimeError as error:  # an operation of this model that cannot be recorded
                self._usable = False
                warnings.warn(f"CUDA graphs are off, decoding continues without them: {error}", stacklevel=2)
        self._seen.add(shape)
        if shape in self._graphs:
            self._graphs[shape].replay()
        else:
            step(rows, width)

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
