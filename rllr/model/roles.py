"""Roles as thin views on one frozen base: policy, reference, value and reward models are an adapter (and a head) each.

A role looks like the model it stands for, switches its adapter on for its own forward passes and restores what was on,
after an exception too. Its `parameters()` are its adapter and its head; the base belongs to no role. The reference is
the role without an adapter: the base itself, to the bit.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..common import ranks
from ..common.config import Settings, flag
from ..common.errors import InputError
from ..common.files import RECORD, write_json
from ..model.records import read_record
from .backbone import decoder_of
from .loading import cast_parameters, check_base, fingerprint, load_policy, read_head
from .lora import add_adapter, get_adapter, use_adapter, weight_deltas
from .peft_format import load_adapter, save_adapter
from .shards import loading_device, shard, whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class LoRAConfig(Settings):
    """Settings of the adapters, shared by the three scripts."""

    GROUP = "adapters"
    lora_rank: int = flag(
        0, "train adapters of this rank (16 is usual) on one frozen base; 0: train all weights", at_least=0
    )
    lora_alpha: int = flag(32, "adapters are scaled by alpha / rank", above=0)
    use_rslora: bool = flag(False, "scale adapters by alpha / sqrt(rank): large ranks then learn as fast as small ones")
    lora_targets: str | None = flag(
        None, "adapted modules: comma list (q_proj,v_proj; Bloom query_key_value; GPT-2 c_attn)"
    )
    base_dtype: str = flag(
        "fp32",
        "the frozen base in memory: fp32 or, with --precision bf16, bf16; adapters stay fp32",
        choices=tuple(DTYPES),
    )


def check_lora(config):
    """InputError where the settings of the adapters contradict each other."""
    for name, default in (("lora_targets", None), ("base_dtype", "fp32"), ("use_rslora", False)):
        if not config.lora_rank and getattr(config, name) != default:
            raise InputError(f"--{name} {getattr(config, name)}: is for adapters; give --lora_rank 16, too")
    if config.base_dtype == "bf16" and config.precision != "bf16":
        raise InputError("--base_dtype bf16: needs --precision bf16")


class RoleBackbone(nn.Module):
    """The decoder of a shared base as one role sees it. `role`: the name of its adapter, None for the base itself."""

    def __init__(self, model, role):
        super().__init__()
        self.role, self._model = role, (model,)  # in a tuple, so that the base's weights are no parameters of the role
        self.adapter = get_adapter(model, role) if role else None
        self.eval()

    @property
    def shared_model(self):
        return self._model[0]

    @property
    def shared_backbone(self):
        return decoder_of(self.shared_model)

    @property
    def config(self):
        return self.shared_model.config

    @property
    def device(self):
        return self.shared_model.device

    @property
    def dtype(self):
        return torch.promote_types(self.shared_model.dtype, torch.float32)  # of what is trained: heads and adapters

    @property
    def _supports_attention_backend(self):  # what the engine asks of a decoder
        return getattr(self.shared_backbone, "_supports_attention_backend", False)

    def get_input_embeddings(self):
        return self.shared_model.get_input_embeddings()

    def forward(self, **inputs):
        """What the decoder returns, under this role's adapter and train/eval mode."""
        backbone = self.shared_backbone
        if backbone.training != self.training:
            backbone.train(self.training)
        with use_adapter(backbone, self.role):
            return backbone(**inputs)

    def save_role(self, path, head=None):
        """The adapter, and a scalar head's {name: tensor} beside it, in PEFT's format."""
        save_adapter(self.shared_model, self.role, path, head=head)


class RolePolicy(nn.Module):
    """A causal LM made of a shared base and one adapter (None: the reference)."""

    def __init__(self, model, role):
        super().__init__()
        self.base_model = RoleBackbone(model, role)
        self.eval()

    @property
    def shared_model(self):
        return self.base_model.shared_model

    @property
    def config(self):
        return self.shared_model.config

    @property
    def generation_config(self):
        return self.shared_model.generation_config

    @property
    def device(self):
        return self.shared_model.device

    def get_input_embeddings(self):
        return self.shared_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.shared_model.get_output_embeddings()

    def forward(self, **inputs):
        """What the causal LM returns, under this role's adapter."""
        with use_adapter(self.shared_model, self.base_model.role):
            return self.shared_model(**inputs)

    def save_pretrained(self, path, state_dict=None):
        """The adapter in PEFT's format, with the stop ids."""
        self.base_model.save_role(path)
        self.generation_config.save_pretrained(path)

    @torch.no_grad()
    def merged_state(self):
        """The state_dict of the plain model that base and adapter amount to: on the CPU, float32. Of several ranks,
        which must all call it, the first has it, the others nothing."""
        deltas = weight_deltas(self.shared_model, self.base_model.role)
        merged: dict[str, torch.Tensor] = {}
        first_names: dict[int, str] = {}
        for name, weight in self.shared_model.state_dict(keep_vars=True).items():  # one at a time: each is whole now
            tied_to = first_names.setdefault(id(weight), name)
            if name != tied_to and name not in deltas:
                merged |= {name: merged[tied_to]} if ranks.is_first() else {}
                continue
            full = whole(weight.detach())
            if name in deltas:
                delta = deltas[name]()
                full = full.to(delta.dtype) + delta
            merged |= {name: full.float().cpu()} if ranks.is_first() else {}
        return merged

    def save_merged(self, path, state_dict=None):
        """The plain Hugging Face model that base and adapter amount to, merged in float32; the base stays as it is.

        state_dict: `merged_state()`, where that was made already."""
        self.shared_model.save_pretrained(path, state_dict=state_dict or self.merged_state())
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        write_json(Path(path) / "config.json", config | {"dtype": "float32"})  # whatever the base has in memory


# ---- the base and what may stand on it -------------------------------------------------------------------------------


def load_base(path, config, device):
    """(causal LM with frozen weights in --base_dtype, fingerprint of its float32 weights).

    InputError where its record names other weights than lie there now.
    """
    model = load_policy(path, device=loading_device(config, device)).requires_grad_(False)
    found, recorded = fingerprint(model), read_record(path).get("fingerprint")
    if recorded not in (None, found):
        raise InputError(f"--policy {path}: its weights are not those that its {RECORD} records; train it again")
    return shard(cast_parameters(model, DTYPES[config.base_dtype]), config), found


def new_role(model, role, config, seed=0):
    """A policy that is `model` and a new adapter of that name, as the flags say."""
    targets = [target.strip() for target in config.lora_targets.split(",")] if config.lora_targets else None
    add_adapter(
        model, role, config.lora_rank, config.lora_alpha, targets=targets, seed=seed, use_rslora=config.use_rslora
    )
    return RolePolicy(model, role)


def load_scalar_role(kind, model, directory, role, base_fingerprint=None, flag=""):
    """The reward or value model (`kind`: the class) whose adapter and head lie in a directory, on a base that is there.

    InputError where the adapter was trained on another base than the one with this fingerprint (None: not asked).
    """
    if base_fingerprint:
        check_base(directory, base_fingerprint, f"{flag} {directory}".strip())
    head = read_head(directory)
    load_adapter(model, directory, role)
    return kind.with_head(RoleBackbone(model, role), head)
