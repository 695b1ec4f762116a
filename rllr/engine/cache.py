"""Keys and values in slots: one row of memory per answer being written, every row with a write position of its own.

transformers' caches hold one length for the whole batch, so rows must end together or be copied. Here a row that ends is
replaced by another (its memory is moved, or a new prompt is written over it) while its neighbours go on.
"""

import inspect
import weakref

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaModel


def cache_argument(backbone):
    """What this decoder's forward calls its cache: `cache`, or `past_key_values` as until transformers 5.23."""
    backbone = getattr(backbone, "shared_backbone", backbone)  # a role on a shared base takes what its base takes
    own = inspect.signature(getattr(backbone, "forward", backbone)).parameters
    library = inspect.signature(LlamaModel.forward).parameters  # for a forward that hands on whatever it is given
    return next(
        name for name in ("cache", "past_key_values") if name in own or name in library and "past_key_values" not in own
    )


class SlotCache(Cache):
    """What a Hugging Face decoder writes its keys and values into. Before each forward the decoder says where:

    `write_at(slots [B, T], columns [B, T], rows, width)`: token t of input row b goes to that slot and column. With `rows`
    the forward attends to the first `rows` slots, `width` columns of them (decoding); without, to its own input alone
    (a prompt that starts an answer).
    """

    def __init__(self, slots, length):
        super().__init__(layers=[])
        self.slots, self.length, self.rows, self.width = slots, length, None, 0
        self._places, self._index = None, {}

    def write_at(self, slots, columns, rows=None, width=None):
        self._places, self._index = (slots, columns), {}
        self.rows, self.width = rows, columns.shape[1] if width is None else width

    def index(self, heads):
        """Where the tokens' [B, heads, T] vectors go in a layer's memory, as rows of [slots * heads * length, D]."""
        if heads not in self._index:
            slots, columns = self._places
            head = torch.arange(heads, device=slots.device).view(1, heads, 1)
            self._index[heads] = ((slots.unsqueeze(1) * heads + head) * self.length + columns.unsqueeze(1)).flatten()
        return self._index[heads]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def move(self, sources, targets, width):
        """Copy slots over others, `width` columns of them. Index tensors or lists; no slot is both source and target."""
        for layer in self.layers:
            for memory in (layer.keys, layer.values):
                memory[targets, :, :width] = memory[sources, :, :width]

    # What transformers asks when it builds a mask from a 2-D one. The number of past columns is one less than the width,
    # so that causality leaves every column visible: the mask alone decides, as rows differ.
    def get_seq_length(self, layer_idx=0):
        return 0 if self.rows is None else self.width - 1

    def get_query_offset(self, layer_idx=0):
        return self.get_seq_length()

    def get_mask_sizes(self, query, layer_idx=0):
        return self.width, 0

    def get_max_length(self, layer_idx=0):
        return self.length

    get_max_cache_shape = get_max_length  # its name in earlier releases

    @property
    def is_compileable(self):
        return self.rows is not None


def _zeros(shape, like):
    """Zeros of like's dtype and device. On CPU by way of numpy, whose zeros the kernel hands out when they are touched."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros((*shape, like.element_size()), dtype=np.uint8)).view(like.dtype).squeeze(-1)


class SlotLayer(CacheLayerMixin):
    """One decoder layer's memory: keys and values [slots, heads, length, head_dim], allocated at the first write.

    Zeros, not whatever was there: a masked column still meets the softmax's 0, and 0 * NaN is NaN.
    """

    is_sliding = False

    def __init__(self, cache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # no circle: the memory is to go with the cache, not with the next collection

    def lazy_initialization(self, key_states, value_states):
        slots, length = self.cache.slots, self.cache.length
        self.keys, self.values = (
            _zeros((slots, x.shape[1], length, x.shape[-1]), x) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write [B, heads, T, D] where the cache says; returns what the forward attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for memory, new in ((self.keys, key_states), (self.values, value_states)):
            heads, head_dim = memory.shape[1], memory.shape[3]
            memory.view(-1, head_dim).index_copy_(0, self.cache.index(heads), new.reshape(-1, head_dim))
        if self.cache.rows is None:
            return key_states, value_states
        rows, width = self.cache.rows, self.cache.width
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_mask_sizes(self, query):
        return self.cache.get_mask_sizes(query)

    def get_seq_length(self):
        return self.cache.get_seq_length()

    def get_max_length(self):
        return self.cache.length

    get_max_cache_shape = get_max_length
