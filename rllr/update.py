"""Acts 2 and 6 of the PPO loop on batches: scoring passes, minibatches, the two updates."""

import random
from dataclasses import dataclass, field
from functools import partial

import torch

from .common import ranks
from .common.errors import RunError
from .common.log import say
from .layout import Packed, micro_batches
from .logprobs import token_logprobs, token_logprobs_and_entropy
from .model.shards import gathered
from .ppo import kl_estimate, policy_loss, value_loss
from .rollout import Rollout
from .run.optimizer import in_step, require_finite

# |ratio - 1| on the first minibatch, where the ratio must be 1: (mean, max) to warn at and to stop at.
RATIO_WARN = {"fp32": (2e-5, 1e-3), "bf16": (2e-2, 0.5)}
RATIO_STOP = {"fp32": (1e-4, 1e-2), "bf16": (2e-1, 5.0)}

# |log-probability recorded while sampling - the scoring pass's|, in nats: (mean, max) to warn at and to stop at. In
# fp32 both are rounding (1e-6 and 2e-6 were measured); in bf16 means of 0.007 to 0.015 and maxima of 0.03 to 0.07 on
# an H200.
GAP_WARN = {"fp32": (1e-4, 1e-2), "bf16": (5e-2, 2.0)}
GAP_STOP = {"fp32": (1e-2, 1.0), "bf16": (3e-1, 10.0)}
MOST_SKIPPED = (
    10  # rollouts in a row whose update --on_ref_kl skip may leave out: the policy does not come back by itself
)


class PromptStream:
    """Prompts in epochs of fresh random order, and the minibatch permutations: random streams of their own.

    batch_size: prompts of a rollout; answers_per_prompt: rows of a rollout that each of them has, one after the other.
    """

    def __init__(self, examples, batch_size, seed, answers_per_prompt=1):
        self.examples, self.batch_size, self.answers_per_prompt = examples, batch_size, answers_per_prompt
        self.order_rng, self.minibatch_rng = random.Random(f"prompts/{seed}"), random.Random(f"minibatches/{seed}")
        self.queue = []

    def next(self):
        """The next `batch_size` examples; an epoch's end runs into the next one."""
        while len(self.queue) < self.batch_size:
            self.queue += self.order_rng.sample(range(len(self.examples)), len(self.examples))
        taken, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return [self.examples[i] for i in taken]

    def of_answers(self, examples):
        """The example of each answer of a rollout, from those of its prompts."""
        return [example for example in examples for _ in range(self.answers_per_prompt)]

    def state_dict(self):
        """The prompts that come next. The two random streams are parts of their own (`parts`)."""
        return {"queue": list(self.queue)}

    def load_state_dict(self, state):
        self.queue = list(state["queue"])

    def parts(self):
        """What a checkpoint holds of the stream (`Run.track`)."""
        return {"stream": self, "prompt_order": self.order_rng, "minibatch_order": self.minibatch_rng}

    def minibatch_plan(self, epochs, minibatches):
        """[epoch][minibatch] -> row indices of the rollout. Settled before scoring, so that old log-probabilities are
        computed in the very rows, order and shapes that the first epoch trains on."""
        answers = self.batch_size * self.answers_per_prompt
        size = answers // minibatches
        plan = []
        for _ in range(epochs):
            order = self.minibatch_rng.sample(range(answers), answers)
            plan.append([order[i : i + size] for i in range(0, answers, size)])
        return plan


@dataclass
class Batch:
    """A rollout of B answers, scored: [B, R] per token, 0 outside the mask. Acts 3 to 5 fill in what is None here."""

    rollout: Rollout
    names: list  # of the B prompts' rows, for messages
    logprobs: torch.Tensor  # [B, R] of the policy that sampled: pi_old, from its own forward pass
    ref_logprobs: torch.Tensor  # [B, R]
    values: torch.Tensor  # [B, R]
    entropy: torch.Tensor  # [B, R]
    scores: torch.Tensor | None = None  # [B] of whole answers (act 3)
    rewards: torch.Tensor | None = None  # [B, R] (act 4)
    advantages: torch.Tensor | None = None  # [B, R] whitened (act 5)
    returns: torch.Tensor | None = None  # [B, R] the value targets (act 5)
    # What act 6 saw, for an audit: of each micro-batch its rows, new log-probabilities and new values [b, r].
    seen: list = field(default_factory=list)

    @property
    def packed(self) -> Packed:
        return self.rollout.packed

    @property
    def response_mask(self):
        return self.rollout.response_mask

    def names_of(self, rows):
        return [self.names[row] for row in rows] if self.names else []

    def micro_batches(self, minibatch, config):
        """This rank's share of a minibatch's rows, as lists of rows that go through a model together."""
        minibatch = ranks.share(minibatch)
        lengths = self.packed.lengths[minibatch].tolist() if config.tokens_per_batch else []
        return micro_batches(minibatch, lengths, config.micro_batch_size, config.tokens_per_batch)


@torch.no_grad()
def analyse(models, rollout, plan, config, names=()) -> Batch:
    """Act 2: log-probabilities under policy and reference, values, entropy. All models in eval mode: no dropout.

    models: policy, reference and value_model (`rllr.ppo_models.Models`). plan: of `PromptStream`; the first epoch's
    minibatches are the rows and shapes of these passes. RunError, with the `names` of the prompts, where a number is
    not finite or a mask does not count its answer's tokens.
    """
    mask = rollout.response_mask
    miscounted = (mask.sum(1) != rollout.response_lens).nonzero().flatten().tolist()
    if miscounted:
        raise RunError(f"the response mask of rows {miscounted[:5]} does not count their tokens; this is a bug.")
    empty = (torch.zeros(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(4))
    logprobs, ref_logprobs, values, entropy = empty
    batch = Batch(rollout, list(names), logprobs, ref_logprobs, values, entropy)

    def fill(model, score, *tensors):
        """This rank's rows of tensors [B, R], with what `score` gives of packed rows: a [b, r] for each of them."""
        with gathered(model):
            for rows in (rows for minibatch in plan[0] for rows in batch.micro_batches(minibatch, config)):
                packed = batch.packed.rows(rows)
                scored = score(*packed)
                for tensor, of_rows in zip(tensors, scored if isinstance(scored, tuple) else (scored,), strict=True):
                    tensor[rows, : of_rows.shape[1]] = of_rows

    of_policy = partial(token_logprobs_and_entropy, models.policy, temperature=config.temperature)
    of_reference = partial(token_logprobs, models.reference, temperature=config.temperature)
    fill(models.policy, of_policy, batch.logprobs, batch.entropy)
    fill(models.reference, of_reference, batch.ref_logprobs)
    fill(models.value_model, models.value_model, batch.values)
    ranks.add(batch.logprobs, batch.ref_logprobs, batch.values, batch.entropy)  # 0 where another rank has scored
    require_finite(rollout.rollout_logprobs, "a sampled token's log-probability", batch.names)
    require_finite(batch.logprobs, "the policy's log-probability", batch.names)
    require_finite(batch.ref_logprobs, "the reference's log-probability", batch.names)
    require_finite(batch.values, "the value model's output", batch.names)
    return batch


def check_sampler_gap(batch, precision):
    """Warn, or raise RunError, where the policy sampled from is not the one scored: the gradient would be wrong."""
    gap = (batch.logprobs - batch.rollout.rollout_logprobs).abs().masked_fill(~batch.response_mask, 0.0)
    mean, largest = float(gap.sum() / batch.response_mask.sum().clamp(min=1)), float(gap.max())
    _warn_or_stop(
        (mean, largest),
        GAP_WARN[precision],
        GAP_STOP[precision],
        f"log-probabilities recorded while sampling differ from those of the scoring pass by {mean:.2g} (mean), "
        f"{largest:.2g} (max) nats",
        "the model's decoding with a cache does not give the numbers of its own forward; look for an attention window, "
        "own positions or a memory that is no cache of keys and values.",
    )


def _warn_or_stop(found, warn_at, stop_at, words, remedy):
    """found, warn_at, stop_at: (mean, max). RunError beyond what stops a run, a warning beyond what is worth one."""
    if any(value > limit for value, limit in zip(found, stop_at)):
        raise RunError(f"{words}: {remedy}")
    if any(value > limit for value, limit in zip(found, warn_at)):
        say(f"warning: {words}")


def kl_within_bound(batch, config, loop):
    """Whether the rollout's mean KL to the reference, in nats per answer, is within --max_ref_kl, so that it may be
    learnt from.

    Beyond it RunError, or, with --on_ref_kl skip, False; RunError then for the last of MOST_SKIPPED rollouts in a row,
    which `loop.skipped` counts.
    """
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs).masked_fill(~batch.response_mask, 0.0).sum(1).mean().item()
    if config.max_ref_kl is None or kl <= config.max_ref_kl:
        loop.skipped = 0
        return True
    if config.on_ref_kl == "stop":
        raise RunError(
            f"the policy has left the SFT policy: {kl:.4g} nats per answer, more than --max_ref_kl "
            f"{config.max_ref_kl:g}; "
            "take a larger --kl_coef or a lower --learning_rate."
        )
    loop.skipped += 1
    if loop.skipped == MOST_SKIPPED:
        raise RunError(f"{loop.skipped} rollouts in a row beyond --max_ref_kl {config.max_ref_kl}.")
    return False


def improve(models, batch, plan, config) -> dict:
    """Act 6: PPO epochs over minibatches; policy and value model each have their optimiser and gradient clip.

    A minibatch's loss is normalised by its token count, so micro-batches add up to the same gradient. Returns
    {"improve/...": mean over the updates}. RunError, with the names of the prompts, before a step whose loss or
    gradient is not finite, and where the first minibatch's ratio is not 1.
    """
    history: list[dict] = []  # one dict of statistics per minibatch
    learning_rate = models.policy_optimizer.learning_rate  # of the first update
    for minibatch in (minibatch for epoch in plan for minibatch in epoch):
        token_count = batch.response_mask[minibatch].sum()
        own = in_step(batch.micro_batches(minibatch, config), minibatch, config)
        parts = [_losses(models, batch, rows, token_count, config, factor) for rows, factor in own]
        stats = _combine_all(parts)
        if not history:
            first_ratio_error = check_first_ratio(stats, config.precision)
        history.append(stats)
        if (
            config.max_update_kl and stats["approx_kl"] > config.max_update_kl
        ):  # far enough from pi_old for this rollout
            models.policy_optimizer.clear_gradient()
            models.value_optimizer.clear_gradient()
            break
        # Both gradients are seen to be finite before either model moves.
        stats["grad_norm_policy"] = models.policy_optimizer.clip_gradient()
        stats["grad_norm_value"] = models.value_optimizer.clip_gradient()
        models.policy_optimizer.step()
        models.value_optimizer.step()
    means = {}
    for name in history[0]:
        if not name.startswith("ratio_error"):
            values = [stats[name] for stats in history if name in stats]
            means[name] = torch.stack(values).max() if name.endswith("_max") else sum(values) / len(values)
    means |= {"first_ratio_error": first_ratio_error, "lr": learning_rate}
    return {f"improve/{name}": value for name, value in means.items()}


def _combine_all(parts):
    """The statistics of a minibatch from those of its micro-batches, on every rank."""
    stats = {name: _combine(name, [part[name] for part in parts]) for name in parts[0]}
    if ranks.count() > 1:
        own = {name: value.cpu() for name, value in stats.items()}
        found = ranks.each(own)
        stats = {name: _combine(name, [other[name] for other in found]).to(value) for name, value in stats.items()}
    return stats


def _combine(name, values):
    """One statistic of a minibatch from its micro-batches': the largest of maxima, the sum of shares of a mean."""
    return torch.stack(values).max() if name.endswith("_max") else torch.stack(values).sum()


def _losses(models, batch: Batch, rows, token_count, config, factor=1.0):
    """Backward of one micro-batch's share of both losses. Returns detached statistics that add up to the whole.

    factor: 0 where this rank only keeps step with the others (`in_step`); its rows count elsewhere.
    """
    packed = batch.packed.rows(rows)
    mask = packed.response_mask
    token_count = token_count / factor  # by 0: a share of infinitely many, so that these rows add nothing
    per_token: list = [batch.logprobs, batch.advantages, batch.values, batch.returns]
    old_logprobs, advantages, old_values, returns = (tensor[rows, : mask.shape[1]] for tensor in per_token)

    def share(x, mask):  # the minibatch's token mean, of which this micro-batch is a part
        return x.masked_fill(~mask, 0.0).sum() / token_count

    new_logprobs = token_logprobs(models.policy, *packed, config.temperature)
    loss, stats = policy_loss(new_logprobs, old_logprobs, advantages, mask, config.clip, reduce=share)
    require_finite(loss, "the policy loss", batch.names_of(rows))
    loss.backward()
    new_values = models.value_model(*packed)
    critic_loss, critic_stats = value_loss(new_values, old_values, returns, mask, config.value_clip, reduce=share)
    require_finite(critic_loss, "the value loss", batch.names_of(rows))
    critic_loss.backward()
    if factor:
        batch.seen.append((rows, new_logprobs.detach(), new_values.detach()))
    with torch.no_grad():
        error = ((new_logprobs - old_logprobs).masked_fill(~mask, 0.0).exp() - 1).abs()
    return {
        "policy_loss": loss.detach(),
        "value_loss": critic_loss.detach(),
        **stats,
        "value_clipfrac": critic_stats["clipfrac"],
        "ratio_error_mean": share(error, mask),
        "ratio_error_max": error.masked_fill(~mask, 0.0).max(),
    }


def check_first_ratio(stats, precision):
    """|ratio - 1| on the first minibatch, before any update (mean). RunError, or a warning, where it is not near 0."""
    mean, largest = float(stats["ratio_error_mean"]), float(stats["ratio_error_max"])
    _warn_or_stop(
        (mean, largest),
        RATIO_WARN[precision],
        RATIO_STOP[precision],
        f"the ratio new / old on the first minibatch is off 1 by {mean:.2g} (mean), {largest:.2g} (max)",
        "look for dropout that is on, another temperature, or positions that differ between scoring and training.",
    )
    return mean
