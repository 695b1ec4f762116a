"""Loading of causal LMs, backbones, tokenizers, scalar heads and merged adapters; the fingerprint of a model.

A backbone is a Hugging Face decoder without its head (`rllr.model.backbone`). Whatever cannot be loaded, or cannot be
computed exactly by this project, becomes one InputError.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..common.errors import InputError
from ..common.files import RECORD, is_lfs_pointer, path_from_record
from ..common.log import say
from ..engine.cache import eval_mode
from ..engine.limits import text_config
from ..engine.norms import fuse_norms
from ..model.records import read_record
from .backbone import decoder_name, decoder_of, hidden_states, lm_logits
from .lora import merge_adapter
from .peft_format import PREFIX, is_adapter, load_adapter, read_adapter_config
from .shards import whole

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # the errors of transformers
HEAD_WEIGHT, HEAD_BIAS = "score.weight", "score.bias"  # the names in transformers' sequence classifiers


@torch.no_grad()
def _check_logits(model, name):
    """InputError for a model whose head does more than `lm_logits`: training would use slightly wrong numbers."""
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    kind = type(model).__name__
    try:
        with eval_mode(model):
            ours = lm_logits(model, hidden_states(model, ids))
            theirs = model(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # a family that must be called in another way can raise anything
        problem = f"its forward fails on eight tokens ({type(error).__name__}: {_first_line(error):.200})"
        raise InputError(f"{name}: {kind} cannot be used: {problem}") from error
    atol = 1e-3 * max(1.0, float(theirs.abs().max()))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=atol):
        raise InputError(f"{name}: the LM head of {kind} does more than a linear map; rllr does not support it")


# ---- loading ---------------------------------------------------------------------------------------------------------


_remote_code = {"allowed": False}


def allow_remote_code(allowed):
    """Set whether Python code in a model's directory may run (--trust_remote_code). Without this call it may not."""
    _remote_code["allowed"] = bool(allowed)


def _trust():
    return {"trust_remote_code": _remote_code["allowed"]}


def load_policy(name_or_path, *, dtype=torch.float32, device="cpu", base=None):
    """A causal LM by hub name or local directory, in eval mode (no dropout; training stages switch it on).

    An adapter's directory gives its base with the adapter merged in (`base`: the base's directory, if it has moved). A
    multimodal model gives its text part. InputError if there is no such model, no causal LM class for it, if its
    weights are quantised, or if its head does more than a linear map.
    """
    _require_model_directory(name_or_path)
    if is_adapter(name_or_path):
        if _find_head(name_or_path):
            raise InputError(f"{name_or_path}: holds a reward or value model's adapter, not a causal LM's")
        return load_merged(name_or_path, dtype, device, base)
    try:
        config = _read_config(name_or_path)
        has_lm, has_multimodal = (
            type(config) in mapping for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        )
        auto = AutoModelForImageTextToText if has_multimodal and not has_lm else AutoModelForCausalLM
        model, info = _from_pretrained(auto, name_or_path, config, dtype)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(f"{name_or_path}: cannot be loaded as a causal LM: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{name_or_path}: weights are missing ({missing}, ...): this is no causal LM's directory")
    if HEAD_WEIGHT in info["unexpected_keys"]:  # with tied embeddings nothing is missing
        raise InputError(f"{name_or_path}: holds a reward or value model ({HEAD_WEIGHT}), not a causal LM's weights")
    model = placed(_text_part(model, name_or_path), device)
    _check_logits(model, name_or_path)
    return model


def placed(model, device):
    """A loaded model on its device, in eval mode."""
    model = model.to(device).eval()
    if torch.device(device).type == "cuda":
        fuse_norms(model)
    return model


def _from_pretrained(auto: Any, path, config, dtype) -> tuple[PreTrainedModel, dict]:
    """(model, what transformers reports of the loading) from safetensors files."""
    return auto.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **_trust()
    )


def _read_config(name_or_path):
    """A model's configuration. InputError if its weights are quantised."""
    config = AutoConfig.from_pretrained(name_or_path, **_trust())
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        settings = quantised if isinstance(quantised, dict) else vars(quantised)
        method = settings.get("quant_method")
        raise InputError(
            f"{name_or_path}: its weights are quantised ({getattr(method, 'value', method)}), which cannot be trained "
            "here; give the model's own directory or name in float32, bfloat16 or float16"
        )
    return config


def _text_part(model, name):
    """The causal LM inside a multimodal model; any other model is returned as it is."""
    config = text_config(model.config)
    if config is model.config:
        return model
    try:
        with torch.device("meta"):  # without weights; it gets the loaded modules below
            text = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        reason = f"{type(model).__name__} has no text part that is a causal LM: {_first_line(error)}"
        raise InputError(f"{name}: {reason}") from error
    kind = type(decoder_of(text))
    found = next((module for module in model.modules() if type(module) in (type(text), kind)), None)
    if found is None:
        raise InputError(f"{name}: there is no {kind.__name__} inside {type(model).__name__}; give a text model")
    if type(found) is kind:
        setattr(text, decoder_name(text), found)
        text.set_output_embeddings(model.get_output_embeddings())
    else:
        text = found
    text.config.tie_word_embeddings = text.get_output_embeddings().weight is text.get_input_embeddings().weight
    text.generation_config, text.name_or_path = model.generation_config, model.name_or_path
    return text


def load_tokenizer(name_or_path):
    """The tokenizer saved with a model. InputError if there is none."""
    _require_model_directory(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **_trust())
    except LOADING_ERRORS + (TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"{name_or_path}: no tokenizer can be loaded ({_first_line(error)}); put the model's tokenizer files "
            "(tokenizer.json, tokenizer_config.json) beside its weights"
        ) from error


def check_same_tokenizer(theirs, ours, where):
    """InputError unless two tokenizers give the same ids: a reward model reads the very ids that the policy sampled."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        differing = sum(other.get(token) != i for token, i in mine.items()) + len(other.keys() - mine.keys())
        raise InputError(
            f"{where}: its tokenizer differs from the policy's ({differing} tokens have "
            "other ids); train the reward model from this policy"
        )


def _require_model_directory(name_or_path):
    """InputError for a local path without a readable model. Such a path must never be looked up on the hub."""
    name, path = str(name_or_path), Path(name_or_path)
    if path.is_dir():
        _require_whole_files(path)
    elif path.is_file():
        raise InputError(f"{path}: is a file; give the model's directory or a hub name")
    elif "/" in name and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise InputError(f"{name}: no such model directory")


def _require_whole_files(path):
    """InputError if a model's directory holds weights in another format, or git-lfs pointers in place of its files."""
    suffixes = {file.suffix for file in path.iterdir() if file.is_file()}
    if ".gguf" in suffixes and ".safetensors" not in suffixes:
        raise InputError(
            f"{path}: holds GGUF weights only; convert them with transformers: AutoModelForCausalLM.from_pretrained"
            "(DIR, gguf_file=FILE).save_pretrained(OUT), and the same with AutoTokenizer"
        )
    if not (path / "config.json").is_file() and not is_adapter(path):
        raise InputError(f"{path}: no config.json in it, so it is not a saved model")
    pickled = suffixes & {".bin", ".pt", ".pth"}
    if pickled and ".safetensors" not in suffixes:
        raise InputError(
            f"{path}: holds pickled weights only (*{min(pickled)}), which can run code when read; convert them "
            "to safetensors with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json", ".model", ".txt") and is_lfs_pointer(file):
            raise InputError(f"{file}: is a git-lfs pointer, not the file itself; fetch it with: git lfs pull")


def _first_line(error):
    if "trust_remote_code" in str(error):
        return "it contains Python code, which runs with --trust_remote_code only; read that code first"
    if "couldn't connect" in str(error) or "offline" in str(error).lower():
        return "there is no such directory, and no model hub can be reached"
    return str(error).strip().split("\n")[0] or type(error).__name__


# ---- the scalar head -------------------------------------------------------------------------------------------------


def load_backbone(path, *, dtype=torch.float32, device="cpu"):
    """The decoder of a saved causal LM, reward or value model, without its head. InputError if weights are missing."""
    try:
        config = AutoConfig.from_pretrained(path, **_trust())
        config.pad_token_id = None  # with one, the embedding gets no gradient for that id, which need not be padding
        backbone, info = _from_pretrained(AutoModel, path, config, dtype)
    except LOADING_ERRORS as error:
        raise InputError(f"{path}: cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        raise InputError(f"{path}: weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}, ...")
    return placed(backbone, device)


def read_head(path):
    """{"score.weight": [1, H], maybe "score.bias": [1]} of a reward or value model's directory, else InputError."""
    weights = _find_head(path)
    if HEAD_WEIGHT not in weights or weights[HEAD_WEIGHT].shape[0] != 1:
        problem = f"no {HEAD_WEIGHT} of one row among the weights, so it holds no reward or value model"
        raise InputError(f"{path}: {problem} (train_rm.py makes one)")
    return weights


def _find_head(path) -> dict[str, torch.Tensor]:
    """The tensors of a scalar head in a directory; {} if there are none."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                keys = weights.keys()  # the handle is no dict: one cannot iterate over it
                names = {key: key.removeprefix(PREFIX) for key in keys}  # names in adapters have this prefix
                found |= {n: weights.get_tensor(key) for key, n in names.items() if n in (HEAD_WEIGHT, HEAD_BIAS)}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file: {_first_line(error)}") from error
    return found


def fingerprint(model):
    """SHA-256 of a model's weights (names, shapes, values in float32); the file format makes no difference.

    Takes a model or its state_dict. Neither includes adapters, so adapters do not change the fingerprint of their base.
    """
    digest, state = hashlib.sha256(), model if isinstance(model, dict) else model.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(whole(tensor.detach()).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_merged(directory, dtype=torch.float32, device="cpu", base=None):
    """The causal LM that an adapter's directory describes: its base with the adapter merged in, computed in float32.

    base: the base's directory or name; by default the one in PEFT's configuration or, if that is no directory, the one
    in our record.
    """
    named = read_adapter_config(directory).get("base_model_name_or_path")
    recorded = path_from_record(read_record(directory).get("base", {}).get("path"), directory)
    moved = recorded and Path(recorded).is_dir() and not Path(named or "").is_dir()
    name = base or (recorded if moved else named)
    if not name:
        raise InputError(
            f"{directory}/adapter_config.json: names no base (base_model_name_or_path); add it, or give --base DIR"
        )
    try:
        model = load_policy(name, device=device)
    except InputError as error:
        if base:
            raise InputError(f"--base {error}") from None
        where = f"{directory}/adapter_config.json: base_model_name_or_path"
        raise InputError(f"{where}: {error}; if the base has moved, give its new place with --base DIR") from None
    check_base(directory, fingerprint(model), str(directory))
    load_adapter(model, directory, "merged")
    merge_adapter(model, "merged").name_or_path = str(directory)
    if (Path(directory) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return cast_parameters(model.requires_grad_(True), dtype)


def check_base(directory, base_fingerprint, where):
    """InputError unless the adapter in a directory was trained on the base with this fingerprint."""
    recorded = read_record(directory).get("base", {})
    if not recorded.get("fingerprint"):
        say(f"warning: {where}: no {RECORD} says on which weights this adapter was trained")
    elif recorded["fingerprint"] != base_fingerprint:
        path = path_from_record(recorded.get("path"), directory)
        raise InputError(
            f"{where}: this adapter was trained on other weights (those of {path} at that time) than the base has now; "
            "give the base it was trained on, or train it again"
        )


def cast_parameters(model, dtype):
    """Convert parameters to another dtype; buffers (rotary frequencies) keep their precision. Returns the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
