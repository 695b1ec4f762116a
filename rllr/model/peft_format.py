"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter knows its base by name (`base_model_name_or_path`); our record beside it (`rllr.json`) also by fingerprint.
"""

from pathlib import Path

from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError, brief
from ..common.files import read_json, read_safetensors, write_json, write_safetensors
from .backbone import decoder_name
from .lora import Adapter, get_adapter, install, linear_modules, linear_shape

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
HEADS = ("score.weight", "score.bias")  # what may stand beside the pairs: the head of a reward or value model
# What changes an adapter's arithmetic and is not computed here: refused where a file asks for it.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "lora_bias",
               "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
               "arrow_config", "kasa_config", "velora_config", "monteclora_config")  # fmt: skip
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # others (PiSSA, OLoRA, LoftQ) change the base


def is_adapter(path):
    """Whether a directory holds an adapter (and no weights of its base)."""
    return (Path(path) / CONFIG_FILE).is_file()


def save_adapter(model, name, directory, *, base=None, head=None):
    """Write an adapter of a model as PEFT does.

    base: name of the base it belongs to (else the model's own name); head: {"score.weight": tensor} of a scalar head,
    which makes it a sequence classifier's adapter with `modules_to_save = ["score"]`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    adapter, modules, state = get_adapter(model, name), linear_modules(model), {}
    for path, pair in adapter.items():
        stem = f"{PREFIX}{decoder_name(model)}.{path}"
        state |= {f"{stem}.lora_A.weight": pair.A, f"{stem}.lora_B.weight": pair.B}
    state |= {f"{PREFIX}{key}": tensor for key, tensor in (head or {}).items()}
    paths = {path for path, _ in adapter.items()}
    ends = {path.rpartition(".")[2] for path in paths}
    everywhere = paths == {path for path in modules if path.rpartition(".")[2] in ends}
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": str(base or model.name_or_path), "r": adapter.rank, "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "target_modules": sorted(ends if everywhere else paths), "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": any(isinstance(modules[path], Conv1D) for path in paths),
        "modules_to_save": ["score"] if head else None, "inference_mode": True,
    }  # fmt: skip
    write_safetensors(state, directory / WEIGHTS_FILE)
    write_json(directory / CONFIG_FILE, config)


def load_adapter(model, directory, name) -> Adapter:
    """Put a saved adapter, ours or PEFT's, on a model under a name. A head beside it is `rllr.model.loading.read_head`'s.

    InputError where a file is damaged, does not fit the model, or asks for arithmetic that is not plain LoRA.
    """
    config, state = read_adapter_config(directory), read_safetensors(Path(directory) / WEIGHTS_FILE)
    modules, pairs = linear_modules(model), {}
    for key, tensor in state.items():
        path = key.removeprefix(PREFIX)
        if path in HEADS:
            continue
        path, _, which = path.removeprefix(f"{decoder_name(model)}.").rpartition(".lora_")
        if which not in ("A.weight", "B.weight"):
            raise InputError(f"{directory}: holds {key}, which is no part of a plain LoRA adapter of linear modules")
        pairs.setdefault(path, {})[which[0]] = tensor
    adapter = Adapter(config["r"], config["lora_alpha"], bool(config.get("use_rslora")))
    for path, pair in pairs.items():
        if path not in modules:
            raise InputError(
                f"{directory}: adapts {path}, which {type(model).__name__} lacks; give the adapter's own base"
            )
        (outputs, inputs), rank = linear_shape(modules[path]), config["r"]
        shapes = {"A": (rank, inputs), "B": (outputs, rank)}
        for which, shape in shapes.items():
            if which not in pair or tuple(pair[which].shape) != shape:
                found = tuple(pair[which].shape) if which in pair else "missing"
                raise InputError(f"{directory}: {path}.lora_{which} is {found}, but rank and base ask for {shape}")
        adapter.put(path, pair["A"], pair["B"], modules[path].weight)
    return install(model, name, adapter)


def read_adapter_config(directory) -> dict:
    """adapter_config.json, checked. InputError where it is damaged or asks for something else than plain LoRA."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: not there, so {directory} holds no adapter")
    config = read_json(path)
    named = isinstance(config, dict) and isinstance(config.get("base_model_name_or_path") or "", str)
    ranked = (
        named
        and isinstance(config.get("r"), int)
        and config["r"] > 0
        and isinstance(config.get("lora_alpha"), (int, float))
    )
    if not ranked:
        raise InputError(f"{path}: damaged (it must give r and lora_alpha); restore it or train the adapter again")
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{path}: peft_type {brief(config['peft_type'])}; only LORA can be loaded")
    asked = [option for option in UNSUPPORTED if config.get(option)]
    asked += ["bias"] if config.get("bias", "none") != "none" else []
    asked += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_INITS else []
    if asked:
        raise InputError(f"{path}: {', '.join(asked)} set; only plain LoRA can be loaded")
    return config
