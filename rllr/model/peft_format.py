"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The configuration names the adapter's base (`base_model_name_or_path`); our record `rllr.json` has its fingerprint.
"""

from pathlib import Path

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError, brief
from ..common.files import read_json, read_safetensors, write_json, write_safetensors
from .backbone import decoder_name
from .lora import Adapter, get_adapter, install, linear_modules, linear_shape

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
HEADS = ("score.weight", "score.bias")  # the head of a reward or value model may be in the same file
# Options that change the arithmetic of an adapter. We do not compute them, so a file that uses one is refused.
UNSUPPORTED = (
    "use_dora use_qalora use_bdlora rank_pattern alpha_pattern lora_bias layer_replication target_parameters "
    "trainable_token_indices alora_invocation_tokens arrow_config kasa_config velora_config monteclora_config"
).split()
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # others (PiSSA, OLoRA, LoftQ) change the base


def is_adapter(path):
    """Whether a directory holds an adapter (and no weights of its base)."""
    return (Path(path) / CONFIG_FILE).is_file()


def save_adapter(model, name, directory, *, base=None, head=None):
    """Write an adapter of a model in PEFT's format.

    base: name of the adapter's base (None: the model's own name). head: {"score.weight": tensor} of a scalar head; with
    it the files are a sequence classifier's adapter with `modules_to_save = ["score"]`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    adapter, modules = get_adapter(model, name), linear_modules(model)
    state = {f"{PREFIX}{key}": tensor for key, tensor in (head or {}).items()}
    for path, pair in adapter.items():
        stem = f"{PREFIX}{decoder_name(model)}.{path}"
        state |= {f"{stem}.lora_A.weight": pair.A, f"{stem}.lora_B.weight": pair.B}
    paths = {path for path, _ in adapter.items()}
    ends = {path.rpartition(".")[2] for path in paths}
    everywhere = paths == {path for path in modules if path.rpartition(".")[2] in ends}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": str(base or model.name_or_path),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "target_modules": sorted(ends if everywhere else paths),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(isinstance(modules[path], Conv1D) for path in paths),
        "modules_to_save": ["score"] if head else None,
        "inference_mode": True,
    }
    write_safetensors(state, directory / WEIGHTS_FILE)
    write_json(directory / CONFIG_FILE, config)


def load_adapter(model, directory, name) -> Adapter:
    """Put a saved adapter, ours or PEFT's, on a model under a name. Does not read a head.

    InputError if a file is damaged, does not fit the model, or asks for arithmetic that is not plain LoRA.
    """
    config, state = read_adapter_config(directory), read_safetensors(Path(directory) / WEIGHTS_FILE)
    modules = linear_modules(model)
    pairs: dict[str, dict[str, Tensor]] = {}  # {path: {"A": tensor, "B": tensor}}
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
            kind = type(model).__name__
            raise InputError(f"{directory}: adapts {path}, which {kind} lacks; give the adapter's own base")
        (outputs, inputs), rank = linear_shape(modules[path]), config["r"]
        shapes = {"A": (rank, inputs), "B": (outputs, rank)}
        for which, shape in shapes.items():
            if which not in pair or tuple(pair[which].shape) != shape:
                found = tuple(pair[which].shape) if which in pair else "missing"
                raise InputError(f"{directory}: {path}.lora_{which} is {found}, but rank and base ask for {shape}")
        adapter.put(path, pair["A"], pair["B"], modules[path].weight)
    return install(model, name, adapter)


def read_adapter_config(directory) -> dict:
    """adapter_config.json, checked. InputError if it is damaged or asks for something else than plain LoRA."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, so {directory} holds no adapter")
    config = read_json(path)
    fields = config if isinstance(config, dict) else {}
    rank, alpha, base = (fields.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    numbers = isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float))
    if not numbers or not isinstance(base or "", str):
        raise InputError(f"{path}: damaged (it must give r and lora_alpha); restore it or train the adapter again")
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{path}: peft_type {brief(config['peft_type'])}; only LORA can be loaded")
    asked = [option for option in UNSUPPORTED if config.get(option)]
    asked += ["bias"] if config.get("bias", "none") != "none" else []
    asked += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_INITS else []
    if asked:
        raise InputError(f"{path}: {', '.join(asked)} set; only plain LoRA can be loaded")
    return config
