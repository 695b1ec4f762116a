"""CUDA graphs of the decoding step: recorded once per shape, replayed as one launch.

A step of a small model is hundreds of kernels of microseconds each, and launching them from Python takes longer than they
run. A graph repeats the recorded kernels on the same memory, so whatever a step reads and writes must stand in tensors that
live as long as the graph, its shapes must be fixed, and it must not look at the device from the host. The decoder's step
keeps to that on every device; only recording needs a GPU.
"""

import warnings

import torch


class StepGraphs:
    """Runs a decoder's step: eagerly the first time a shape is met (which warms it up), then recorded and replayed.

    generator: the private generator the step draws from, None for the device's own. The step, always the same, is given
    with each call: kept here, it would keep its decoder and the cache alive in a circle.
    """

    def __init__(self, generator=None):
        self.generator = generator
        self._met, self._graphs, self._memory, self._usable = set(), {}, None, True

    def __call__(self, step, rows, width):
        """`step(rows, width)`."""
        shape = rows, width
        if shape not in self._graphs and shape in self._met and self._usable:
            try:
                self._graphs[shape] = self.record(step, rows, width)
            except RuntimeError as error:  # an operation of this model that cannot be recorded
                self._usable = False
                warnings.warn(f"CUDA graphs are off, decoding goes on without: {error}", stacklevel=2)
        self._met.add(shape)
        if shape in self._graphs:
            self._graphs[shape].replay()
        else:
            step(rows, width)

    def record(self, step, rows, width):
        """What `replay()` is called on. Recording computes nothing. All shapes share one pool of memory."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:  # so that each replay draws new numbers from it
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self._memory):
            step(rows, width)
        self._memory = graph.pool()
        return graph


def shape_for(live, slots, width, length):
    """(rows, width) to compute for `live` of `slots` rows and `width` of `length` columns: few shapes, so few graphs.

    Rows double from an eighth of the slots, columns from 128: at most twice the work, in all but the smallest shapes.
    """
    rows, columns = max(1, -(-slots // 8)), 128
    while rows < live:
        rows *= 2
    while columns < width:
        columns *= 2
    return min(rows, slots), min(columns, length)
