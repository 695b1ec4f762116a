"""A cache for keys and values in slots: each answer that is being written has one slot, with its own write position.

The caches of transformers hold one length for the whole batch, so all rows must end at the same time, or be copied.
Here a row that ends is replaced (another slot moves into its memory, or a new prompt overwrites it) while the others
continue.
"""

import inspect
import weakref
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaModel


def cache_argument(backbone):
    """The name of this decoder's cache argument: `cache`, or `past_key_values` until transformers 5.23."""
    backbone = getattr(backbone, "shared_backbone", backbone)  # a role on a shared base has the arguments of its base
    own = inspect.signature(getattr(backbone, "forward", backbone)).parameters
    names = ("cache", "past_key_values")
    if not any(name in own for name in names):  # this forward passes on whatever it gets
        own = inspect.signature(LlamaModel.forward).parameters
    return next(name for name in names if name in own)


def products_dtype(tensor):
    """The dtype in which products of this tensor are computed: its own, or autocast's."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@contextmanager
def eval_mode(model):
    """Within the block, dropout is off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def bytes_per_token(backbone):
    """Bytes of keys and values that this decoder stores for a token, in the dtype of products: it is given one.

    No name in a configuration tells it of all families: heads differ between layers (Gemma 4), and values from keys
    (multi-head latent attention). The decoder keeps the answer, for every role on it.
    """
    known = getattr(backbone, "shared_backbone", backbone).__dict__.setdefault("_rllr_bytes_per_token", {})
    dtype = products_dtype(backbone.get_input_embeddings().weight)
    if dtype not in known:
        token, cache = torch.zeros(1, 1, dtype=torch.long, device=backbone.device), SlotCache(1, 1)
        cache.write_at(token, token)
        with eval_mode(backbone):
            backbone(input_ids=token, **{cache_argument(backbone): cache, "use_cache": True})
        known[dtype] = cache.nbytes()
    return known[dtype]


class SlotCache(Cache):
    """The cache that a Hugging Face decoder writes its keys and values into.

    Before each forward, `write_at(slots [B, T], columns [B, T], rows, width)` says where: token t of input row b goes
    to that slot and column. With `rows`, the forward attends to `width` columns of the first `rows` slots (decoding).
    Without, it attends to its own input only (a prompt that starts an answer).
    """

    layers: list[Any]  # SlotLayers; transformers' annotation allows layers without keys and values
    _places: tuple[torch.Tensor, torch.Tensor]  # slots, columns
    _index: dict[int, torch.Tensor]  # by the number of heads

    def __init__(self, slots, length):
        super().__init__(layers=[])
        self.slots, self.length, self.rows, self.width = slots, length, None, 0

    def write_at(self, slots, columns, rows=None, width=None):
        self._places, self._index = (slots, columns), {}
        self.rows, self.width = rows, columns.shape[1] if width is None else width

    def index(self, heads):
        """Where the vectors of the tokens go: indices [B * heads * T] of [slots * heads * length, D]."""
        if heads not in self._index:
            slots, columns = self._places
            head = torch.arange(heads, device=slots.device).view(1, heads, 1)
            self._index[heads] = ((slots.unsqueeze(1) * heads + head) * self.length + columns.unsqueeze(1)).flatten()
        return self._index[heads]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def clear(self):
        """Zeros again, as at the first write: nothing of an earlier call is left, a NaN least of all."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_(), layer.values.zero_()

    def nbytes(self):
        """Memory of the keys and values so far."""
        memory = [m for layer in self.layers if layer.is_initialized for m in (layer.keys, layer.values)]
        return sum(m.numel() * m.element_size() for m in memory)

    def move(self, sources, targets, width):
        """Copy `width` columns of some slots over others. Index tensors or lists; no slot is both source and target."""
        for layer in self.layers:
            for memory in (layer.keys, layer.values):
                memory[targets, :, :width] = memory[sources, :, :width]

    # transformers calls the next methods when it builds its mask from a 2-D one. The number of past columns is one less
    # than the width, so that the causal mask hides no column: rows differ, and the 2-D mask alone decides.
    def get_seq_length(self, layer_idx=0):
        return 0 if self.rows is None else self.width - 1

    def get_query_offset(self, layer_idx=0):
        return self.get_seq_length()

    def get_mask_sizes(self, query, layer_idx=0):
        return self.width, 0

    def get_max_length(self, layer_idx=0):
        return self.length

    get_max_cache_shape = get_max_length  # the name in earlier releases

    @property
    def is_compileable(self):
        return self.rows is not None


def _zeros(shape, like):
    """Zeros on the device of `like`, in the dtype of its products. On CPU numpy makes them, which takes memory when it
    is written."""
    dtype = products_dtype(like)
    if like.device.type != "cpu":
        return like.new_zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros((*shape, dtype.itemsize), dtype=np.uint8)).view(dtype).squeeze(-1)


class SlotLayer(CacheLayerMixin):
    """The memory of one decoder layer: keys and values [slots, heads, length, head_dim], allocated at the first write.

    Under autocast rotary embeddings leave keys in float32, and attention casts them: they lie here as it casts them,
    else each step would cast all of them again. The memory starts as zeros: a masked column is still multiplied by the
    softmax's 0, and 0 * NaN would be NaN.
    """

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache):
        super().__init__()
        # A weak reference, because a circle of references would keep the memory until the next garbage collection.
        self.cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states, value_states):
        slots, length = self.cache.slots, self.cache.length
        self.keys = _zeros((slots, key_states.shape[1], length, key_states.shape[-1]), key_states)
        self.values = _zeros((slots, value_states.shape[1], length, value_states.shape[-1]), value_states)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write [B, heads, T, D] where the cache says; returns the keys and values that the forward attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for memory, new in ((self.keys, key_states), (self.values, value_states)):
            heads, head_dim = memory.shape[1], memory.shape[3]
            rows = new.reshape(-1, head_dim).to(memory.dtype)
            memory.view(-1, head_dim).index_copy_(0, self.cache.index(heads), rows)
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
