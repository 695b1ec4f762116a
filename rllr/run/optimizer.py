"""AdamW and its schedule, and what must be finite before it moves a weight."""

import math

import torch

from ..common.errors import RunError


def make_optimizer(model, learning_rate, steps, *, warmup_share=0.0, schedule="linear", weight_decay=0.0):
    """(AdamW, scheduler): linear warm-up over a share of the steps, then linear decay to 0, cosine to 0, or constant.

    Weight decay spares biases and norms. The fused kernel goes over the weights once, and takes no memory of its own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = bool(parameters) and parameters[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=fused)
    warmup = int(warmup_share * steps)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * min(1, progress))), "constant": 1.0}[
            schedule
        ]

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, factor(step)))


def clip_gradient(model, max_grad_norm):
    """Scale a gradient down to this norm. Returns the norm before; RunError if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    if not torch.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm.item()}; stopped before the update.")
    return norm


def optimizer_step(optimizer, scheduler):
    """Step optimiser and learning rate, clear the gradient."""
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)


def require_finite(values, what, ids=()):
    """Stop a run whose loss (a scalar), or one of whose rows [B] or [B, R], is not finite, before an optimiser spreads it.

    ids: of the prompts, one per row of `values` or all that a loss is of.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return
    if values.dim():
        bad = (~finite.flatten(1).all(1) if values.dim() > 1 else ~finite).nonzero().flatten().tolist()
        ids, values = [ids[i] for i in bad] if ids else bad, values[bad[0]][~finite[bad[0]]].flatten()[0]
    raise RunError(f"{what} is {values.item()}{name_ids(ids)}; stopped before the update.")


def name_ids(ids, shown=5):
    """What an error says of the rows it is about: (prompts a, b, ... of 12) after a space; nothing for no ids."""
    named = ", ".join(map(str, ids[:shown])) + (f", ... of {len(ids)}" if len(ids) > shown else "")
    return f" (prompt{'s' if len(ids) > 1 else ''} {named})" if ids else ""
