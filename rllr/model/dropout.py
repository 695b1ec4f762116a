"""Set a model's dropout probability: in its own dropout modules or, if it has none, in the residual stream."""

from torch import nn

from .backbone import backbone_of
from .passes import forget_recorded


def set_dropout(model, p):
    """Set the dropout probability of a model's dropout modules and attention (0: no dropout); returns the model.

    Llama-like decoders have dropout only in attention. For them, hooks drop parts of what enters the residual stream.
    On CPU they then have no dropout of attention weights: the fused attention does not offer it there, and the plain
    one takes a fifth more time per step and memory that grows with the square of the length.
    """
    backbone = backbone_of(model)
    by_hooks = not any(isinstance(module, nn.Dropout) for module in backbone.modules())
    p_of = {"attention_dropout": 0.0 if by_hooks and model.device.type == "cpu" else p, "hidden_dropout": p}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name, value in p_of.items():  # plain numbers that a forward reads (Llama, Bloom)
            if isinstance(getattr(module, name, None), (int, float)):
                setattr(module, name, value)
    _set_residual_dropout(backbone, p if by_hooks else 0.0)
    forget_recorded(backbone)
    return model


def _set_residual_dropout(backbone, p):
    for handle in getattr(backbone, "_rllr_dropout_hooks", []):
        handle.remove()
    backbone._rllr_dropout_hooks = []
    if p == 0:
        return
    targets = [backbone.get_input_embeddings()]
    targets += [m for name, m in backbone.named_modules() if name.endswith(("o_proj", "down_proj"))]

    def drop(module, inputs, output):
        return nn.functional.dropout(output, p, module.training)

    backbone._rllr_dropout_hooks = [module.register_forward_hook(drop) for module in targets]
