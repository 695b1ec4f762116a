"""AdamW with its schedule, one optimiser step for every stage, and what must be finite before a weight moves."""

import math

import torch

from ..common import ranks
from ..common.errors import RunError
from ..layout import micro_batches
from ..model.shards import is_sharded, shards, whole


class Optimizer:
    """AdamW over a model's trainable weights: a learning rate that rises and decays, and a clipped gradient.

    The rate rises linearly over `warmup` (a share of `steps`), then decays linearly to 0, as a cosine to 0, or stays.
    Weight decay spares biases and norms. The fused kernel goes over the weights once, and needs no memory of its own.
    """

    def __init__(
        self, model, learning_rate, steps, *, warmup=0.0, schedule="linear", weight_decay=0.0, max_grad_norm=1.0
    ):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = max_grad_norm
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        fused = bool(self.parameters) and self.parameters[0].device.type in ("cpu", "cuda")
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=fused)
        rising = int(warmup * steps)

        def factor(step):
            if step < rising:
                return (step + 1) / rising
            progress = (step - rising) / max(1, steps - rising)
            if schedule == "constant":
                return 1.0
            return max(0.0, 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1, progress))))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, factor)

    @property
    def learning_rate(self):
        """The rate of the next step."""
        return self.schedule.get_last_lr()[0]

    def parts(self, of=""):
        """What a checkpoint holds of it (`Run.track`): {"<of>_optimizer", "<of>_schedule"}, or the bare names."""
        return {f"{of}_optimizer".lstrip("_"): self.adamw, f"{of}_schedule".lstrip("_"): self.schedule}

    def clip_gradient(self):
        """Add up the ranks' shares of the gradient and scale it down to `max_grad_norm`. Returns the norm before;
        RunError if it is not finite."""
        ranks.add_gradients(p for p in self.parameters if not is_sharded(p))  # those of sharded weights are added up
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not torch.isfinite(norm):
            raise RunError(f"the gradient's norm is {norm.item()}; stopped before the update.")
        return norm

    def step(self):
        """Move the weights and the learning rate, clear the gradient."""
        self.adamw.step()
        self.schedule.step()
        self.clear_gradient()

    def clear_gradient(self):
        self.adamw.zero_grad(set_to_none=True)


def own_micro_batches(rows, settings):
    """This rank's share of a batch, in micro-batches of --micro_batch_size rows or --tokens_per_batch tokens, as
    `in_step` gives them."""
    own = ranks.share(rows)
    if own:  # a last batch may have fewer rows than there are ranks
        lengths = [row.length for row in own]
        own = micro_batches(own, lengths, settings.micro_batch_size, settings.tokens_per_batch)
    return in_step(own, rows, settings)


def in_step(own, rows, settings):
    """[(micro-batch, 1.0)] of this rank's share of a batch's rows; with --shard then (a row, 0.0) until every rank has
    as many.

    All ranks put a sharded layer together at once, so one with less to do goes through the model as often as the
    others. The number is a factor of the loss: what fills up adds nothing.
    """
    most = max(ranks.each(len(own))) if shards(settings) else len(own)
    return [(part, 1.0) for part in own] + [(rows[:1], 0.0)] * (most - len(own))


def gradient_step(optimizer, micro_batches, loss_of, what="the loss", names_of=lambda rows: ()):
    """One optimiser step on a batch that comes in micro-batches: SFT, reward model and the tiny model's warm-up.

    micro_batches: this rank's share of the batch, as `in_step` gives it. loss_of(micro_batch) gives its share of the
    batch's loss, so that any split adds up to the same gradient. Returns (loss, gradient norm before clipping).
    RunError, with the rows' names, before a step whose loss or gradient is not finite.
    """
    batch_loss = 0.0
    for micro_batch, factor in micro_batches:
        loss = loss_of(micro_batch) * factor
        require_finite(loss, what, names_of(micro_batch))
        loss.backward()
        batch_loss += loss.item()
        del loss  # and with it its graph, before the next micro-batch makes its own
    batch_loss, norm = ranks.total(batch_loss), optimizer.clip_gradient()
    optimizer.step()
    return batch_loss, norm


def require_finite(values, what, ids=()):
    """RunError where a loss (a scalar), or one of the rows [B] or [B, R], is not finite, before an optimiser spreads
    it.

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
