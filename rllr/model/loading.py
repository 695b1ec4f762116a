"""Backbones, the scalar head of reward and value models, saving and loading.

A backbone is a Hugging Face decoder without its head. `hidden_at` (over `hidden_states`) and `lm_logits` are the only two
ways, beside rollouts, in which this project calls a model's insides, so an adapter that switches roles on a shared base
has one place to stand.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..engine.attention import can_pack, packed_forward
from ..engine.limits import length_limits, text_config
from ..engine.linear import fast_linears
from ..common.errors import InputError
from ..common.files import disk_faults, is_lfs_pointer, saving_into, write_json, write_safetensors
from ..layout import response_places, unflatten
from .lora import decoder_name, decoder_of
from ..common.log import say
from .peft_format import PREFIX, is_adapter

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # what transformers lets through
PACK_BELOW = 0.8  # share of real tokens below which packing beats padding (attention runs per sequence then)
HEAD_WEIGHT, HEAD_BIAS = "score.weight", "score.bias"  # the names transformers' sequence classifiers use


def backbone_of(model):
    """The decoder under a causal LM's head, or under our scalar head."""
    if isinstance(model, ScalarHeadModel):
        return model.backbone
    return decoder_of(model) if hasattr(model, "base_model_prefix") else model.base_model  # a role names its own


def hidden_states(model, sequences):
    """Final hidden states [B, T, H] of right-padded sequences [B, T]; no mask is needed (see `rllr.layout`)."""
    backbone = backbone_of(model)
    with fast_linears(backbone):
        return backbone(input_ids=sequences, use_cache=False).last_hidden_state


def hidden_at(model, sequences, prompt_lens, response_mask, rows, positions):
    """Final hidden states [N, H] at N places (row, position) of right-padded sequences [B, T].

    On CPU the padding is not even computed where the model's family allows it: the sequences go through packed, one
    behind the other (`rllr.engine.attention`).
    """
    backbone = backbone_of(model)
    lengths = prompt_lens + response_mask.sum(1)
    little = sequences.device.type == "cpu" and int(lengths.sum()) < PACK_BELOW * sequences.numel()
    if little and can_pack(backbone, int(lengths.max())):
        real = torch.arange(sequences.shape[1]) < lengths.unsqueeze(1)
        with fast_linears(backbone):
            hidden = packed_forward(backbone, sequences[real].unsqueeze(0), lengths.tolist(), use_cache=False)
        return hidden[0, (lengths.cumsum(0) - lengths)[rows] + positions]
    return hidden_states(model, sequences)[rows, positions]


def lm_logits(model, hidden):
    """Next-token logits [..., V] of hidden states [..., H], float32 at least, as the model's own forward gives them."""
    head = model.get_output_embeddings()
    with fast_linears(head):
        logits = head(hidden)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    config = model.config
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def _check_logits(model, name):
    """Refuse a model whose head does more than `lm_logits` knows, rather than train on slightly wrong numbers."""
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    try:
        ours, theirs = lm_logits(model, hidden_states(model, ids)), model(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # whatever a family raises that is called in another way
        raise InputError(
            f"{name}: {type(model).__name__} cannot be used: its forward fails on eight tokens ({type(error).__name__}: "
            f"{_first_line(error):.200})"
        ) from error
    model.train(was_training)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * max(1.0, float(theirs.abs().max()))):
        raise InputError(
            f"{name}: the LM head of {type(model).__name__} does more than a linear map; rllr does not support it"
        )


# ---- loading ---------------------------------------------------------------------------------------------------------


_remote_code = {"allowed": False}


def allow_remote_code(allowed):
    """Whether Python code that lies beside a model's weights may run (--trust_remote_code). Without this call it may not."""
    _remote_code["allowed"] = bool(allowed)


def _trust():
    return {"trust_remote_code": _remote_code["allowed"]}


def load_policy(name_or_path, *, dtype=torch.float32, device="cpu", base=None):
    """A causal LM by hub name or local directory, in eval mode (dropout off; training stages switch it on).

    An adapter's directory gives its base with the adapter merged in (`base`: where the base lies, if it has moved), a multimodal model
    its text part. Raises InputError where
    there is no such model, no causal LM class for it, quantised weights, or a head we cannot reproduce.
    """
    _require_model_directory(name_or_path)
    if is_adapter(name_or_path):
        if _find_head(name_or_path):
            raise InputError(f"{name_or_path}: holds a reward or value model's adapter, not a causal LM's")
        return _load_merged(name_or_path, dtype, device, base)
    try:
        config = _read_config(name_or_path)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model, info = auto.from_pretrained(
            name_or_path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **_trust()
        )
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(f"{name_or_path}: cannot be loaded as a causal LM: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{name_or_path}: weights are missing ({missing}, ...): not a causal LM's directory")
    if HEAD_WEIGHT in info["unexpected_keys"]:  # with tied embeddings nothing is missing
        raise InputError(f"{name_or_path}: holds a reward or value model ({HEAD_WEIGHT}), not a causal LM's weights")
    model = _text_part(model, name_or_path).to(device).eval()
    _check_logits(model, name_or_path)
    return model


def _read_config(name_or_path):
    """A model's configuration. InputError where it has quantised weights."""
    config = AutoConfig.from_pretrained(name_or_path, **_trust())
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        raise InputError(
            f"{name_or_path}: its weights are quantised ({getattr(method, 'value', method)}), which cannot be trained here; give the "
            "model's own directory or name in float32, bfloat16 or float16"
        )
    return config


def _text_part(model, name):
    """The causal LM of text inside a multimodal model; any other model as it is."""
    config = text_config(model.config)
    if config is model.config:
        return model
    try:
        with torch.device("meta"):  # a shell, which gets the loaded modules
            text = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise InputError(f"{name}: {type(model).__name__} has no text part that is a causal LM: {_first_line(error)}") from error
    kind = type(decoder_of(text))
    found = next((module for module in model.modules() if type(module) in (type(text), kind)), None)
    if found is None:
        raise InputError(f"{name}: no {kind.__name__} inside {type(model).__name__}; give a text model")
    if type(found) is kind:
        setattr(text, decoder_name(text), found)
        text.set_output_embeddings(model.get_output_embeddings())
    else:
        text = found
    text.config.tie_word_embeddings = text.get_output_embeddings().weight is text.get_input_embeddings().weight
    text.generation_config, text.name_or_path = model.generation_config, model.name_or_path
    return text


def _load_merged(path, dtype, device, base):
    from .roles import load_merged  # it stands on this module

    return load_merged(path, dtype, device, base)


def load_tokenizer(name_or_path):
    """The tokenizer saved with a model. Raises InputError where there is none."""
    _require_model_directory(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **_trust())
    except LOADING_ERRORS + (TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"{name_or_path}: no tokenizer can be loaded ({_first_line(error)}); put the model's tokenizer files (tokenizer.json, "
            "tokenizer_config.json) beside its weights"
        ) from error


def _require_model_directory(name_or_path):
    """InputError for a local path that holds no model that can be read; it must not be asked of the hub."""
    path = Path(name_or_path)
    if path.is_dir():
        _require_whole_files(path)
    elif path.is_file():
        raise InputError(f"{path}: is a file; give the model's directory or a hub name")
    elif path.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") != 1:
        if "/" in str(name_or_path):
            raise InputError(f"{name_or_path}: no such model directory")


def _require_whole_files(path):
    """InputError where a model's directory holds weights in another format, or only what git-lfs leaves in a file's place."""
    suffixes = {file.suffix for file in path.iterdir() if file.is_file()}
    if ".gguf" in suffixes and ".safetensors" not in suffixes:
        raise InputError(
            f"{path}: holds GGUF weights only; make a plain directory of them with transformers: AutoModelForCausalLM.from_pretrained"
            "(DIR, gguf_file=FILE).save_pretrained(OUT), and the same with AutoTokenizer"
        )
    if not (path / "config.json").is_file() and not is_adapter(path):
        raise InputError(f"{path}: no config.json in it, so it is not a saved model")
    pickled = suffixes & {".bin", ".pt", ".pth"}
    if pickled and ".safetensors" not in suffixes:
        raise InputError(
            f"{path}: holds pickled weights only (*{min(pickled)}), which can run code when they are read; make safetensors of them with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json", ".model", ".txt") and is_lfs_pointer(file):
            raise InputError(f"{file}: is a git-lfs pointer, not the file itself; fetch it with: git lfs pull")


def _first_line(error):
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which runs with --trust_remote_code only; read that code first"
    if "couldn't connect" in str(error) or "offline" in str(error).lower():
        return "it is no directory here, and no model hub can be reached"
    return str(error).strip().split("\n")[0] or type(error).__name__


def length_limit(model_or_config):
    """(tokens of prompt and answer together that this model takes here, what sets the limit); (None, "") without a limit."""
    return next(iter(length_limits(getattr(model_or_config, "config", model_or_config))), (None, ""))


def stop_token_ids(model, tokenizer):
    """The ids that end an answer: those of the generation config, else the tokenizer's EOS, in order; empty where
    neither names one inside the vocabulary.

    Ids outside the vocabulary (defaults of some configs) are dropped with a warning.
    """
    config = getattr(model, "generation_config", None)
    listed = config.eos_token_id if config else None
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    size = model.get_input_embeddings().num_embeddings
    kept = [i for i in dict.fromkeys(ids) if 0 <= i < size]
    if len(kept) < len(set(ids)):
        say(f"warning: stop ids {sorted(set(ids) - set(kept))} are outside the vocabulary of {size} and are dropped")
    eos = tokenizer.eos_token_id
    return kept or ([eos] if eos is not None and 0 <= eos < size else [])


# ---- the scalar head -------------------------------------------------------------------------------------------------


@torch.no_grad()
def width_of(backbone):
    """Width of a decoder's final hidden states, which neither its configuration nor its embedding always tells (OPT-350m)."""
    was_training = backbone.training
    hidden = backbone.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=backbone.device), use_cache=False).last_hidden_state
    backbone.train(was_training)
    return hidden.shape[-1]


class ScalarHeadModel(nn.Module):
    """A backbone and one linear map to a number. Subclasses say where the number is read and whether it has a bias."""

    has_bias = False

    def __init__(self, backbone, head=None):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        self.head = head or nn.Linear(width_of(backbone), 1, bias=self.has_bias, device=backbone.device, dtype=backbone.dtype)

    def scores_at(self, hidden):
        """The head's number for hidden states [..., H] -> [...], float32 at least (also under autocast)."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            weight, bias = self.head.weight.to(dtype), self.head.bias
            return nn.functional.linear(hidden.to(dtype), weight, None if bias is None else bias.to(dtype)).squeeze(-1)

    @property
    def device(self):
        return self.head.weight.device

    @classmethod
    def from_pretrained(cls, path, *, dtype=torch.float32, device="cpu", base=None):
        """Backbone and head from a directory that `save_pretrained` wrote. A missing head is an InputError, never random."""
        _require_model_directory(path)
        weights = read_head(path)
        if is_adapter(path):
            return cls.with_head(backbone_of(_load_merged(path, dtype, device, base)), weights)
        return cls.with_head(load_backbone(path, dtype=dtype, device=device), weights)

    @classmethod
    def with_head(cls, backbone, weights):
        """A backbone and the head `read_head` found; a value model's bias is 0 where the head has none."""
        weight, bias = weights[HEAD_WEIGHT], weights.get(HEAD_BIAS)
        head = nn.Linear(weight.shape[1], 1, bias=cls.has_bias, device=backbone.device, dtype=backbone.dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
            if cls.has_bias:
                head.bias.copy_(bias if bias is not None else torch.zeros(1))
        return cls(backbone, head).eval()

    def save_pretrained(self, path, tokenizer=None, pad_token_id=None):
        """Weights as safetensors, config and tokenizer; of a role on a shared base only its adapter and head (PEFT's format).

        The names are those of the family's sequence classifier, so where transformers has that class and the head has no
        bias the directory loads as `AutoModelForSequenceClassification` with equal scores. That class reads the last token
        that is not `pad_token_id`, which therefore must differ from every stop id (`reward_pad_token_id`).
        """
        head = {HEAD_WEIGHT: self.head.weight} | ({HEAD_BIAS: self.head.bias} if self.has_bias else {})
        with disk_faults(f"model {path}"), saving_into(path) as temporary:
            if hasattr(self.backbone, "save_role"):  # a role on a shared base
                self.backbone.save_role(temporary, head)
            else:
                self._save_whole(temporary, head, pad_token_id)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)

    def _save_whole(self, path, head, pad_token_id):
        prefix = AutoModelForCausalLM._model_mapping[type(self.config)].base_model_prefix
        state = {f"{prefix}.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        state |= head
        write_safetensors(state, path / "model.safetensors")
        config = self.config.to_dict()
        classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        config |= {
            "architectures": [classes.get(self.config.model_type, type(self).__name__)],
            "pad_token_id": pad_token_id,
        }
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "dtype": "float32"}
        write_json(path / "config.json", config)


class RewardModel(ScalarHeadModel):
    """r(prompt, response): the head at the last response token.

    The head has no bias (Bradley-Terry leaves the zero free) and starts at N(0, 1 / (H + 1)), as in Stiennon et al.
    (arXiv:2009.01325).
    """

    @classmethod
    def from_policy(cls, policy, seed=0):
        """A new reward model on a policy's backbone (the same object, not a copy). The head is drawn from `seed`."""
        model = cls(backbone_of(policy))
        generator = torch.Generator().manual_seed(seed)
        width = model.head.in_features
        with torch.no_grad():
            model.head.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
        return model

    def forward(self, sequences, prompt_lens, response_mask):
        """sequences [B, T], prompt_lens [B], response_mask [B, R] -> scores [B], float32."""
        # The last response token itself: EOS, or where the answer was cut.
        last = prompt_lens + response_mask.sum(1) - 1
        rows = torch.arange(len(sequences), device=sequences.device)
        return self.scores_at(hidden_at(self, sequences, prompt_lens, response_mask, rows, last))

    def span_scores(self, sequences, prompt_lens, response_mask):
        """The head at every response token [B, R], 0 outside the mask; only `--loss span` trains on these."""
        rows, positions = response_places(prompt_lens, response_mask)
        scores = self.scores_at(hidden_at(self, sequences, prompt_lens, response_mask, rows, positions + 1))
        return unflatten(scores, response_mask)


class ValueModel(ScalarHeadModel):
    """V(s_t) for every response token, read at the position that predicts it. The head has a bias and starts at zero."""

    has_bias = True

    @classmethod
    def from_policy(cls, policy):
        """A new value model on a policy's backbone (the same object, not a copy), with a zero head."""
        model = cls(backbone_of(policy))
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model

    def rescale(self, mean, std):
        """From raw to standardised units of the reward: w <- w / std, b <- (b - mean) / std."""
        with torch.no_grad():
            self.head.weight.div_(std)
            self.head.bias.sub_(mean).div_(std)
        return self

    def forward(self, sequences, prompt_lens, response_mask):
        """sequences [B, T], prompt_lens [B], response_mask [B, R] -> values [B, R], float32, 0 outside the mask."""
        rows, positions = response_places(prompt_lens, response_mask)
        values = self.scores_at(hidden_at(self, sequences, prompt_lens, response_mask, rows, positions))
        return unflatten(values, response_mask)


def load_backbone(path, *, dtype=torch.float32, device="cpu"):
    """The decoder of a saved causal LM, reward or value model, without its head. InputError on missing weights."""
    try:
        config = AutoConfig.from_pretrained(path, **_trust())
        config.pad_token_id = None  # ours never pads by id; an embedding would otherwise zero that row's gradient
        backbone, info = AutoModel.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **_trust()
        )
    except LOADING_ERRORS as error:
        raise InputError(f"{path}: cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        raise InputError(f"{path}: weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}, ...")
    return backbone.to(device).eval()


def read_head(path):
    """{"score.weight": [1, H], maybe "score.bias": [1]} of a reward or value model's directory. InputError without."""
    weights = _find_head(path)
    if HEAD_WEIGHT not in weights or weights[HEAD_WEIGHT].shape[0] != 1:
        raise InputError(
            f"{path}: no {HEAD_WEIGHT} of one row among the weights, so it holds no reward or value model (train_rm.py "
            "makes one)"
        )
    return weights


def _find_head(path):
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                names = {key: key.removeprefix(PREFIX) for key in weights.keys()}  # an adapter's are prefixed
                found |= {n: weights.get_tensor(key) for key, n in names.items() if n in (HEAD_WEIGHT, HEAD_BIAS)}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file: {_first_line(error)}") from error
    return found


def reward_pad_token_id(tokenizer, stop_ids, vocabulary_size):
    """A pad id that is no stop id: the tokenizer's own, an unknown-token or other special id, else None.

    None means a classifier that reads "the last token that is not padding" works on one row at a time only.
    """
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    known = set(tokenizer.get_vocab().values())
    candidates += [i for i in range(vocabulary_size) if i not in known][:1]  # an embedding row no text ever uses
    good = [i for i in candidates if i is not None and i not in stop_ids and 0 <= i < vocabulary_size]
    return next((i for i in good if i != tokenizer.bos_token_id), None)


def fingerprint(model):
    """SHA-256 of a model's weights (names, shapes, values in float32): the same model whatever file it came from.

    Takes a model or its state_dict. Adapters are no part of either, so they do not change their base's fingerprint.
    """
    digest, state = hashlib.sha256(), model if isinstance(model, dict) else model.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
