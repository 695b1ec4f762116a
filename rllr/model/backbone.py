"""Backbones: the two ways, beside rollouts, in which this project calls a model's insides.

A backbone is a Hugging Face decoder without its head. An adapter that switches roles on a shared base has one place to
stand here.
"""

import torch

from ..engine.attention import can_pack, packed_forward
from ..engine.cache import eval_mode
from ..engine.linear import fast_linears
from .passes import recorded_hidden

PACK_BELOW = 0.8  # share of real tokens below which packing beats padding (attention runs per sequence then)


def decoder_name(model):
    """The attribute of a causal LM that holds its decoder; some families (Llama 4's text part) name a wrong one."""
    return model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"


def decoder_of(model):
    """The decoder under a causal LM's head; a decoder itself is returned as it is."""
    return getattr(model, decoder_name(model), model)


def backbone_of(model):
    """The decoder under a causal LM's head, or our scalar head; of a role its own view of it (`model.roles`)."""
    model = getattr(model, "backbone", model)
    return decoder_of(model) if hasattr(model, "base_model_prefix") else getattr(model, "base_model", model)


def shared_decoder(model):
    """The decoder itself under a causal LM, a scalar head or a role; a role's base has it."""
    backbone = backbone_of(model)
    return getattr(backbone, "shared_backbone", backbone)


def hidden_states(model, sequences):
    """Final hidden states [B, T, H] of right-padded sequences [B, T]; no mask is needed (see `rllr.layout`)."""
    backbone = backbone_of(model)
    with fast_linears(backbone):
        return backbone(input_ids=sequences, use_cache=False).last_hidden_state


def hidden_at(model, packed, rows, positions):
    """Final hidden states [N, H] at N places (row, position) of packed sequences (`rllr.layout.Packed`).

    On CPU the padding is not even computed where the model's family allows it: the sequences go through packed, one
    behind the other (`rllr.engine.attention`). On a GPU the pass may be a recorded one (`passes`).
    """
    backbone = backbone_of(model)
    sequences, lengths = packed.sequences, packed.lengths
    little = sequences.device.type == "cpu" and int(lengths.sum()) < PACK_BELOW * sequences.numel()
    if little and can_pack(backbone, int(lengths.max())):
        real = torch.arange(sequences.shape[1]) < lengths.unsqueeze(1)
        with fast_linears(backbone):
            hidden = packed_forward(backbone, sequences[real].unsqueeze(0), lengths.tolist(), use_cache=False)
        return hidden[0, (lengths.cumsum(0) - lengths)[rows] + positions]
    hidden = recorded_hidden(backbone, sequences)
    return (hidden_states(model, sequences) if hidden is None else hidden)[rows, positions]


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
def width_of(backbone):
    """Width of a decoder's final hidden states, which its configuration does not always tell (OPT-350m)."""
    token = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    with eval_mode(backbone):
        return backbone(input_ids=token, use_cache=False).last_hidden_state.shape[-1]
