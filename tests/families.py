"""Tiny random models of every decoder family that rllr is tested on, and a toy tokenizer, all built in code."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB = 61
BOS, EOS = 1, 2
WEIGHT_SCALE = 6.0  # fresh weights give a flat distribution, under which a wrong position or mask hardly shows

_ROPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}


def _llama(**extra):
    return LlamaConfig(**{**_ROPE, **_IDS, **extra})


def _mistral(**extra):
    return MistralConfig(**{**_ROPE, **_IDS, **extra})


def _qwen3(**extra):
    return Qwen3Config(**{**_ROPE, **_IDS, "head_dim": 8, **extra})


def _glm(**extra):
    return GlmConfig(**{**_ROPE, **_IDS, "head_dim": 8, **extra})


def _bloom(**extra):
    return BloomConfig(**{"hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS, **extra})


def _gpt2(**extra):
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS, **off, **extra})


def _deepseek(**extra):
    """Multi-head latent attention, whose values are narrower than its keys; no experts (they know no float64)."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    dense = {"first_k_dense_replace": 9, "num_key_value_heads": 4}
    return DeepseekV3Config(**{**_ROPE, **_IDS, **sizes, **dense, **extra})


CONFIGS = {
    "llama": _llama, "mistral": _mistral, "qwen3": _qwen3, "glm": _glm, "bloom": _bloom, "gpt2": _gpt2,
    "deepseek_v3": _deepseek,
}  # fmt: skip
FAMILIES = list(CONFIGS)


def tiny_model(family, seed=0, dtype=torch.float32, vocab_size=VOCAB, scale=WEIGHT_SCALE, **config):
    """A two-layer, 32-wide random causal LM in eval mode. The global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](vocab_size=vocab_size, **config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
                else:  # biases start at 0 and norms at 1, which would hide one that is left out
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def toy_tokenizer(pad_token=None, chat_template=None):
    """A byte-level BPE tokenizer without merges: 0 <unk>, 1 <s>, 2 </s>, (3 the pad token,) then the 256 bytes."""
    specials = ["<unk>", "<s>", "</s>"] + ([pad_token] if pad_token else [])
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad_token
    )
    tokenizer.chat_template = chat_template
    return tokenizer
