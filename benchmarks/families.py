"""Which of transformers' causal LM families rllr can sample from exactly: a tiny random model of each goes through the trial.

python benchmarks/families.py                    # a minute or two; writes benchmarks/results/families.md
python benchmarks/families.py llama gpt_neo      # these alone, printed
"""

import inspect
import sys
from collections import defaultdict

import torch
import transformers
from common import ROOT, machine
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rllr.common.errors import InputError
from rllr.engine.attention import can_pack
from rllr.model.backbone import backbone_of
from rllr.model.loading import _check_logits
from rllr.model.trial import try_model

LARGEST = 30_000_000  # parameters; a family whose configuration cannot be made smaller by these names is left out
PROMPTS = [[5 + i % 50 for i in range(length)] for length in (40, 6)]
# Every name under which a family may keep its size.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "attention_hidden_size", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    "vocab_size": 64, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "d_inner": 64, "expand": 2, "rotary_dim": 4,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "head_size": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VARIANTS = [  # tried in turn until one can be built and run
    {"num_key_value_heads": 2, "sliding_window": None, "pad_token_id": None}, {"num_key_value_heads": 2, "sliding_window": 64, "pad_token_id": None},
    {"num_key_value_heads": 4, "sliding_window": None, "pad_token_id": None}, {"num_key_value_heads": 4, "sliding_window": 64, "pad_token_id": 0},
    {"attention_types": [[["global", "local"], 1]], "window_size": 64, "pad_token_id": None}, {"num_heads": 4, "head_dim": 16, "pad_token_id": 0},
]  # fmt: skip


def settings(config_class, wanted):
    """Those of the wanted settings that a configuration has."""
    known = set(inspect.signature(config_class.__init__).parameters) | set(
        getattr(config_class, "__dataclass_fields__", {})
    )
    return {
        name: value for name, value in wanted.items() if name in known | set(getattr(config_class, "attribute_map", {}))
    }


def build(family):
    """A tiny random model; None where no configuration of ours gives one. One that does not run is better than none."""
    config_class, model = CONFIG_MAPPING[family], None
    for variant in VARIANTS:
        wanted = SIZES | variant
        try:
            own = settings(config_class, wanted)
            for name, part in (config_class.sub_configs or {}).items():
                if name.startswith("text") and inspect.isclass(part):
                    own[name] = settings(part, wanted)
            config = config_class(**own)
            with torch.device("meta"):
                if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > LARGEST:
                    return None
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=torch.arange(3, 9).unsqueeze(0))
        except Exception:  # whatever a family says of sizes that do not go together
            continue
        break
    with torch.no_grad():
        for parameter in model.parameters() if model is not None else ():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # fresh weights give a flat distribution, in which nothing shows
    return model


def verdict(family):
    """("exact, packs" | "exact" | "refused" | "not built", the reason)."""
    model = build(family)
    if model is None:
        return "not built", ""
    try:
        _check_logits(model, family)
        try_model(model, PROMPTS, 8, family)
    except InputError as error:
        return "refused", str(error).partition("cannot be used: ")[2] or str(error).partition(": ")[2]
    return ("exact, packs" if can_pack(backbone_of(model), 48) else "exact"), ""


def short(reason):
    """The kind of reason, without this family's numbers."""
    for words in ("layers that keep keys and values alone", "nats off those of its own forward", "the LM head", "decoding it token by token failed",
                  "its forward fails"):  # fmt: skip
        if words in reason:
            return words
    return reason


def main():
    transformers.logging.set_verbosity_error()
    families, found = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), defaultdict(list)
    for family in families:
        kind, reason = verdict(family)
        found[kind, short(reason)].append(family)
        print(f"{family:28} {kind:14} {reason[:160]}", flush=True)
    if sys.argv[1:]:
        return
    lines = [
        "# Families",
        "",
        f"{len(families)} causal LM families of transformers, tiny random models, prompts of 40 and 6 tokens, answers of 8.",
        "",
    ]
    for (kind, reason), names in sorted(found.items()):
        lines += [f"**{kind}{f' ({reason})' if reason else ''}: {len(names)}.** {', '.join(sorted(names))}", ""]
    text = "\n".join([*lines, "    python benchmarks/families.py", "", machine(), ""])
    (ROOT / "benchmarks" / "results" / "families.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
