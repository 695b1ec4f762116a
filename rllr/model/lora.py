"""LoRA without a library: named low-rank adapters on one frozen model, switched on and off around forward passes.

    y = W x + (alpha / r) B A x                          Hu et al. 2021 (arXiv:2106.09685), section 4.1
    y = W x + (alpha / sqrt(r)) B A x                    rank-stabilised: Kalajdzievski 2023 (arXiv:2312.03732)

A forward hook adds the second term to the output of a linear module. The model itself does not change: it has the same
modules, names and `state_dict` as the plain Hugging Face model, and its fingerprint covers the base but no adapter.
While all adapters are off, the hook returns at once, so the output is the base's to the bit. `rllr.model.peft_format`
saves and loads adapters; `python -m rllr.merge` merges one into its base.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError
from .backbone import shared_decoder
from .passes import forget_recorded

# Queries and values, the first that a model has. Of multi-head latent attention (DeepSeek) what unfolds the latents.
DEFAULT_TARGETS = (
    ("q_proj", "v_proj"), ("query_key_value",), ("c_attn",), ("qkv_proj",), ("Wqkv",),
    ("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj"),
)  # fmt: skip


class LowRank(nn.Module):
    """scale * B A x for one linear module. A [r, in] and B [out, r] are float32 even if the base is bf16."""

    def __init__(self, A, B, scale):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x):
        """x [..., in] -> [..., out] in the adapter's dtype, under autocast in autocast's."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def delta(self):
        """scale * B A [out, in], which merging adds to a weight."""
        return (self.B @ self.A) * self.scale


class Adapter(nn.Module):
    """One adapter: a `LowRank` pair for each module that it changes. use_rslora: scale alpha / sqrt(rank)."""

    def __init__(self, rank, alpha, use_rslora=False):
        super().__init__()
        self.rank, self.alpha, self.use_rslora, self.pairs = rank, alpha, use_rslora, nn.ModuleDict()

    @property
    def scale(self):
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def put(self, path, A, B, weight):
        """Set the pair of the module at `path`, on the device of its weight, in float32 (float64 if the weight is)."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A, B = (tensor.to(device=weight.device, dtype=dtype) for tensor in (A, B))
        self.pairs[_key(path)] = LowRank(A, B, self.scale)

    def items(self):
        """[(path of a module in the decoder, its pair)]."""
        return [(key.replace("/", "."), pair) for key, pair in self.pairs.items()]


class _Adapters:
    """The adapters of a decoder by name, the one that is on (None: all are off), and the modules that have our hook."""

    def __init__(self):
        self.active: str | None = None
        self.by_name: dict[str, Adapter] = {}
        self.hooked: set[str] = set()


def _key(path):
    return path.replace(".", "/")  # a ModuleDict allows no dots in names


def _adapters(model):
    return getattr(shared_decoder(model), "rllr_adapters", None)


# ---- adding and switching --------------------------------------------------------------------------------------------


def add_adapter(model, name, rank, alpha, *, targets=None, seed=0, use_rslora=False) -> Adapter:
    """Put a new adapter on a model (causal LM or decoder) and freeze the model. It is off until `use_adapter`.

    A is drawn with `seed`, kaiming-uniform with a = sqrt 5, which is U(-1/sqrt(in), 1/sqrt(in)). B is zero, so the
    adapter adds zero at first. targets: module names or dotted ends of them, as in PEFT (None: `default_targets`).
    InputError if a target is no linear module.
    """
    adapter, generator = Adapter(rank, alpha, use_rslora), torch.Generator().manual_seed(seed)
    for path, module in _target_modules(model, targets or default_targets(model)).items():
        outputs, inputs = linear_shape(module)
        A = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=5**0.5, generator=generator)
        adapter.put(path, A, torch.zeros(outputs, rank), module.weight)
    return install(model, name, adapter)


def install(model, name, adapter) -> Adapter:
    """Put an existing adapter on a model under a name, with a hook on each module that has none. Freezes the model."""
    backbone = shared_decoder(model)
    adapters = getattr(backbone, "rllr_adapters", None) or _Adapters()
    if name in adapters.by_name:
        raise ValueError(f"the model already has an adapter {name!r}")
    model.requires_grad_(False)
    forget_recorded(backbone)
    backbone.rllr_adapters, adapters.by_name[name] = adapters, adapter
    for path in {path for path, _ in adapter.items()} - adapters.hooked:
        backbone.get_submodule(path).register_forward_hook(partial(_add_delta, adapters, _key(path)))
        adapters.hooked.add(path)
    return adapter


def _add_delta(adapters, key, module, inputs, output):
    """Forward hook: the output of a linear module plus the active adapter's term. None leaves the output as it is."""
    if adapters.active is None or key not in adapters.by_name[adapters.active].pairs:
        return None
    return output + adapters.by_name[adapters.active].pairs[key](inputs[0]).to(output.dtype)


class use_adapter:
    """`with use_adapter(model, name):` switches this adapter on; the name None switches all off.

    On leaving, also by an exception, the adapter that was on before is on again. Blocks can be nested, and one object
    can be entered several times (activation checkpointing does so when backward runs twice).
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
    """`context_fn` of `torch.utils.checkpoint` for the layers of a model; does nothing for a model without adapters.

    Backward computes the layer again, long after the `use_adapter` block of the forward has ended. Then the adapter
    that is on now must be on:

        checkpoint(layer, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, model))
    """
    adapters = _adapters(model)
    return nullcontext(), use_adapter(model, adapters.active if adapters else None)


def get_adapter(model, name) -> Adapter:
    """The adapter of that name. ValueError if there is none."""
    use_adapter(model, name)  # raises the error
    return _adapters(model).by_name[name]


def adapter_parameters(model, name):
    """The parameters of one adapter only."""
    return list(get_adapter(model, name).parameters())


# ---- targets ---------------------------------------------------------------------------------------------------------


def default_targets(model):
    """Default names of adapted modules, as in the LoRA paper: q_proj and v_proj, or what takes their place."""
    ends = {path.rpartition(".")[2] for path in linear_modules(model)}
    for names in DEFAULT_TARGETS:
        if ends.issuperset(names):
            return list(names)
    raise InputError(f"no default LoRA targets for {type(model).__name__}; give --lora_targets from {_names(ends)}")


def linear_modules(model):
    """{path in the decoder: module} of the modules that can be adapted."""
    modules = shared_decoder(model).named_modules()
    return {path: module for path, module in modules if isinstance(module, (nn.Linear, Conv1D))}


def _target_modules(model, targets):
    """{path: module} of the targets: a target is a whole dotted path or the end of one, as in PEFT."""
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
    """(out, in) of a linear module; Conv1D stores its weight transposed."""
    return tuple(module.weight.shape[::-1]) if isinstance(module, Conv1D) else tuple(module.weight.shape)


# ---- merging ---------------------------------------------------------------------------------------------------------


def weight_deltas(model, name):
    """{name in the model's state_dict: a function that gives what the adapter adds to that weight}."""
    names = {id(module): path for path, module in model.named_modules()}
    modules = ((shared_decoder(model).get_submodule(path), pair) for path, pair in get_adapter(model, name).items())
    return {f"{names[id(module)]}.weight": partial(_stored_delta, module, pair) for module, pair in modules}


def _stored_delta(module, pair):
    """scale * B A as the module stores its weight."""
    return pair.delta().T if isinstance(module, Conv1D) else pair.delta()


@torch.no_grad()
def merged_weights(model, name):
    """{name in the model's state_dict: W + scale * B A, at least float32}; the model does not change."""
    deltas = {weight: delta() for weight, delta in weight_deltas(model, name).items()}
    return {weight: model.get_parameter(weight).to(delta.dtype) + delta for weight, delta in deltas.items()}


def merge_adapter(model, name):
    """Add an adapter to the weights and remove it. ValueError on bf16 weights, whose rounding would lose the change."""
    for weight_name, weight in merged_weights(model, name).items():
        parameter = model.get_parameter(weight_name)
        if parameter.dtype != weight.dtype:
            raise ValueError(f"{weight_name} is {parameter.dtype}: adapters are merged into float32 weights only")
        parameter.data = weight
    del _adapters(model).by_name[name]
    return model
