"""LoRA by hand: named low-rank adapters on one frozen model, switched on and off around forward passes.

    y = W x + (alpha / r) B A x                          Hu et al. 2021 (arXiv:2106.09685), section 4.1
    y = W x + (alpha / sqrt(r)) B A x                    rank-stabilised: Kalajdzievski 2023 (arXiv:2312.03732)

A forward hook adds the second term to the output of a linear module, so the model itself is untouched: its modules,
names and `state_dict` stay those of the plain Hugging Face model, its fingerprint covers the base and no adapter, and
while all adapters are off the hook returns at once: the base's output to the bit. On disk: `rllr.model.peft_format`.

    python -m rllr.lora merge --adapter runs/sst2/ppo-label/last --output_dir merged      # a plain Hugging Face model
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError
from .backbone import backbone_of

DEFAULT_TARGETS = (("q_proj", "v_proj"), ("query_key_value",), ("c_attn",), ("qkv_proj",))  # the first that exists


class LowRank(nn.Module):
    """scale * B A x for one linear module. A [r, in] and B [out, r] are float32 even where the base is bf16."""

    def __init__(self, A, B, scale):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x):
        """x [..., in] -> [..., out] in the adapter's dtype; under autocast in autocast's."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def delta(self):
        """scale * B A [out, in], what merging adds to a weight."""
        return (self.B @ self.A) * self.scale


class Adapter(nn.Module):
    """One named adapter: a `LowRank` pair for each module it changes. use_rslora: scaled by alpha / sqrt(rank), not alpha / rank."""

    def __init__(self, rank, alpha, use_rslora=False):
        super().__init__()
        self.rank, self.alpha, self.use_rslora, self.pairs = rank, alpha, use_rslora, nn.ModuleDict()

    @property
    def scale(self):
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def put(self, path, A, B, weight):
        """The pair of the module at `path`, on the device of its weight; float64 only where the weight is."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A, B = (tensor.to(device=weight.device, dtype=dtype) for tensor in (A, B))
        self.pairs[_key(path)] = LowRank(A, B, self.scale)

    def items(self):
        """(path of a module in the decoder, its pair), one after the other."""
        return [(key.replace("/", "."), pair) for key, pair in self.pairs.items()]


class _Adapters:
    """What hangs on a decoder that has adapters: them by name, and which one is on (None: all off)."""

    def __init__(self):
        self.active, self.by_name, self.hooked = None, {}, set()


def _key(path):
    return path.replace(".", "/")  # ModuleDict takes no dots


def _backbone(model):
    """The decoder itself under a causal LM, a role or a scalar head."""
    backbone = backbone_of(model)
    return getattr(backbone, "shared_backbone", backbone)


def _adapters(model):
    return getattr(_backbone(model), "rllr_adapters", None)


# ---- adding and switching --------------------------------------------------------------------------------------------


def add_adapter(model, name, rank, alpha, targets=None, seed=0, use_rslora=False) -> Adapter:
    """A new adapter on a model (causal LM or decoder), which is frozen. Off until `use_adapter`; at first it adds zero.

    A is kaiming-uniform with a = sqrt 5 (that is U(-1/sqrt(in), 1/sqrt(in))) drawn from `seed`, B zero. targets: module
    names or dotted ends of them, as in PEFT (`default_targets`). InputError where a target is no linear module.
    """
    adapter, generator = Adapter(rank, alpha, use_rslora), torch.Generator().manual_seed(seed)
    for path, module in _target_modules(model, targets or default_targets(model)).items():
        outputs, inputs = linear_shape(module)
        A = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=5**0.5, generator=generator)
        adapter.put(path, A, torch.zeros(outputs, rank), module.weight)
    return install(model, name, adapter)


def install(model, name, adapter) -> Adapter:
    """Hang a finished adapter on a model under a name, with a hook on each module that has none yet; freezes the model."""
    backbone = _backbone(model)
    adapters = getattr(backbone, "rllr_adapters", None) or _Adapters()
    if name in adapters.by_name:
        raise ValueError(f"the model already has an adapter {name!r}")
    model.requires_grad_(False)
    backbone.rllr_adapters, adapters.by_name[name] = adapters, adapter
    for path in {path for path, _ in adapter.items()} - adapters.hooked:
        backbone.get_submodule(path).register_forward_hook(partial(_add_delta, adapters, _key(path)))
        adapters.hooked.add(path)
    return adapter


def _add_delta(adapters, key, module, inputs, output):
    """Forward hook: the output of a linear module plus what the active adapter adds to it. None: output as it is."""
    if adapters.active is None or key not in adapters.by_name[adapters.active].pairs:
        return None
    return output + adapters.by_name[adapters.active].pairs[key](inputs[0]).to(output.dtype)


class use_adapter:
    """`with use_adapter(model, name):` this adapter is on, None: none is. Restores what was on, after an exception too.

    Nests, and can be entered again (activation checkpointing does, when backward runs twice).
    """

    def __init__(self, model, name):
        self.adapters, self.name, self.before = _adapters(model), name, []
        if name is not None and (self.adapters is None or name not in self.adapters.by_name):
            raise ValueError(f"no adapter {name!r}; there are {sorted(self.adapters.by_name) if self.adapters else []}")

    def __enter__(self):
        if self.adapters is not None:
            self.before.append(self.adapters.active)
            self.adapters.active = self.name

    def __exit__(self, *exception):
        if self.adapters is not None:
            self.adapters.active = self.before.pop()


def checkpoint_contexts(model):
    """`context_fn` of `torch.utils.checkpoint` for layers of a model with adapters (or without: then it does nothing).

    Backward computes the layer once more, long after the forward's `use_adapter` has ended; this gives it the adapter
    that is on now: `checkpoint(layer, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, model))`.
    """
    adapters = _adapters(model)
    return nullcontext(), use_adapter(model, adapters.active if adapters else None)


def get_adapter(model, name) -> Adapter:
    """The adapter of that name."""
    use_adapter(model, name)  # for its error
    return _adapters(model).by_name[name]


def adapter_parameters(model, name):
    """The parameters of one adapter, and of nothing else."""
    return list(get_adapter(model, name).parameters())


# ---- targets ---------------------------------------------------------------------------------------------------------


def default_targets(model):
    """Names of the adapted modules, as in the paper: q_proj and v_proj, or the family's fused projection."""
    ends = {path.rpartition(".")[2] for path in linear_modules(model)}
    for names in DEFAULT_TARGETS:
        if ends.issuperset(names):
            return list(names)
    raise InputError(f"no default LoRA targets for {type(model).__name__}; give --lora_targets from {_names(ends)}")


def linear_modules(model):
    modules = _backbone(model).named_modules()
    return {path: module for path, module in modules if isinstance(module, (nn.Linear, Conv1D))}


def _target_modules(model, targets):
    """{path: module}: a target matches a whole dotted path or the end of one, as in PEFT."""
    modules = linear_modules(model)
    found = {target: [p for p in modules if p == target or p.endswith(f".{target}")] for target in targets}
    unknown = [target for target, paths in found.items() if not paths]
    if unknown:
        ends = {path.rpartition(".")[2] for path in modules}
        raise InputError(f"--lora_targets {','.join(unknown)}: no such linear module; there are {_names(ends)}")
    chosen = {path for paths in found.values() for path in paths}
    return {path: module for path, module in modules.items() if path in chosen}


def _names(names):
    return ", ".join(sorted(names))


def linear_shape(module):
    """(out, in) of a linear module; Conv1D keeps its weight the other way round."""
    return tuple(module.weight.shape[::-1]) if isinstance(module, Conv1D) else tuple(module.weight.shape)


# ---- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_weights(model, name):
    """{name in the model's state_dict: W + scale * B A, float32 at least}; the model is left as it is."""
    names = {id(module): path for path, module in model.named_modules()}
    merged = {}
    for path, pair in get_adapter(model, name).items():
        module = _backbone(model).get_submodule(path)
        delta = pair.delta().T if isinstance(module, Conv1D) else pair.delta()
        merged[f"{names[id(module)]}.weight"] = module.weight.to(delta.dtype) + delta
    return merged


def merge_adapter(model, name):
    """Add an adapter to the weights for good and forget it. ValueError on bf16 weights, which would round it away."""
    for weight_name, weight in merged_weights(model, name).items():
        parameter = model.get_parameter(weight_name)
        if parameter.dtype != weight.dtype:
            raise ValueError(f"{weight_name} is {parameter.dtype}: adapters are merged into float32 weights only")
        parameter.data = weight
    del _adapters(model).by_name[name]
    return model
