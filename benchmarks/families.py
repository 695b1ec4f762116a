"""Find the causal LM families of transformers from which rllr samples exactly, with a tiny random model of each.

Those it samples from at all write a rollout in both precisions, too.

python benchmarks/families.py                    # one or two minutes; writes benchmarks/results/families.md
python benchmarks/families.py llama gpt_neo      # only these families; prints the results
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
from rllr.model.precision import PRECISIONS, set_precision
from rllr.model.trial import try_model
from rllr.rollout import bytes_per_slot, generate

LARGEST = 30_000_000  # parameters; families that the settings below cannot make smaller are left out
PROMPTS = [[5 + i % 50 for i in range(length)] for length in (40, 6)]
# {size: the names that families use for it}
NAMES = {
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_experts_per_tok expand",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts rotary_dim mamba_n_heads",
    8: "head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state "
    "head_size",
    16: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head",
    32: "hidden_size d_model n_embd dim attention_hidden_size word_embed_proj_dim embedding_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner",
    64: "vocab_size d_inner",
    128: "max_position_embeddings n_positions max_seq_len",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
SIZES |= {"n_group": 1, "topk_group": 1, "bos_token_id": 1, "eos_token_id": 2}
# build() takes the first variant that can be built and run.
VARIANTS = [
    {"num_key_value_heads": 2, "sliding_window": None, "pad_token_id": None},
    {"num_key_value_heads": 2, "sliding_window": 64, "pad_token_id": None},
    {"num_key_value_heads": 4, "sliding_window": None, "pad_token_id": None},
    {"num_key_value_heads": 4, "sliding_window": 64, "pad_token_id": 0},
    {"attention_types": [[["global", "local"], 1]], "window_size": 64, "pad_token_id": None},
    {"num_heads": 4, "head_dim": 16, "pad_token_id": 0},
]
# The kinds of reasons for which a family is refused; each is part of a message.
REASONS = (
    "layers that store only keys and values",
    "nats off those of its own forward",
    "the LM head",
    "decoding it token by token failed",
    "its forward fails",
)


def settings(config_class, wanted):
    """The wanted settings that a configuration has."""
    known = set(inspect.signature(config_class.__init__).parameters)
    for attribute in ("__dataclass_fields__", "attribute_map"):
        known |= set(getattr(config_class, attribute, {}))
    return {name: value for name, value in wanted.items() if name in known}


def build(family):
    """A tiny random model, if possible one that runs; None if no variant can be built."""
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
        except Exception:  # any error of a family for which these sizes do not fit
            continue
        break
    with torch.no_grad():
        for parameter in model.parameters() if model is not None else ():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # the initial weights give a flat distribution, which would hide differences
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
    for precision in PRECISIONS:
        set_precision(precision)
        try:
            bytes_per_slot(model, 48)  # what a GPU asks first
            generate(model, PROMPTS, max_new_tokens=8, eos_token_id=2)
        except Exception as error:
            return f"fails in {precision}", f"{type(error).__name__}: {error}"
        finally:
            set_precision("fp32")
    return ("exact, packs" if can_pack(backbone_of(model), 48) else "exact"), ""


def short(reason):
    """The kind of reason, without the numbers of this family."""
    return next((words for words in REASONS if words in reason), reason)


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
        f"{len(families)} causal LM families of transformers, tiny random models, prompts of 40 and 6 tokens, answers "
        "of 8.",
        "",
    ]
    for (kind, reason), names in sorted(found.items()):
        lines += [f"**{kind}{f' ({reason})' if reason else ''}: {len(names)}.** {', '.join(sorted(names))}", ""]
    text = "\n".join([*lines, "    python benchmarks/families.py", "", machine(), ""])
    (ROOT / "benchmarks" / "results" / "families.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
