"""Acts 2 and 6 of the PPO loop on batches: scoring passes, minibatches, the two updates."""

import random
from dataclasses import dataclass

import torch

from .common.errors import RunError
from .common.log import say
from .judge import Samples
from .layout import split_rows, trim
from .logprobs import token_logprobs, token_logprobs_and_entropy
from .ppo import kl_estimate, policy_loss, value_loss
from .run.optimizer import clip_gradient, optimizer_step, require_finite
from .tasks import parse_answer

# |ratio - 1| on the first minibatch, where it must be 1: (mean, max) to warn at and to stop at.
RATIO_WARN = {"fp32": (2e-5, 1e-3), "bf16": (2e-2, 0.5)}
RATIO_STOP = {"fp32": (1e-4, 1e-2), "bf16": (2e-1, 5.0)}


# |log-probability recorded while sampling - the scoring pass's|, in nats: (mean, max) to warn at and to stop at. In fp32 both are
# rounding (measured 1e-6 and 2e-6); in bf16 means of 0.007 to 0.015 and maxima of 0.03 to 0.07 were measured on an H200.
GAP_WARN = {"fp32": (1e-4, 1e-2), "bf16": (5e-2, 2.0)}
GAP_STOP = {"fp32": (1e-2, 1.0), "bf16": (3e-1, 10.0)}


class PromptStream:
    """Prompts in epochs of fresh random order, and the minibatch permutations: random streams of their own."""

    def __init__(self, examples, batch_size, seed):
        self.examples, self.batch_size = examples, batch_size
        self.order_rng, self.minibatch_rng = random.Random(f"prompts/{seed}"), random.Random(f"minibatches/{seed}")
        self.queue = []

    def next(self):
        """The next `batch_size` examples; an epoch's end runs into the next one."""
        while len(self.queue) < self.batch_size:
            self.queue += self.order_rng.sample(range(len(self.examples)), len(self.examples))
        taken, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return [self.examples[i] for i in taken]

    def state_dict(self):
        """The prompts that are next; the two random streams are parts of their own (`Run.track`)."""
        return {"queue": list(self.queue)}

    def load_state_dict(self, state):
        self.queue = list(state["queue"])

    def minibatch_plan(self, epochs, minibatches):
        """[epoch][minibatch] -> row indices of the rollout. Settled before scoring, so that old log-probabilities are
        computed in the very rows, order and shapes that the first epoch trains on."""
        size = self.batch_size // minibatches
        plan = []
        for _ in range(epochs):
            order = self.minibatch_rng.sample(range(self.batch_size), self.batch_size)
            plan.append([order[i : i + size] for i in range(0, self.batch_size, size)])
        return plan


@dataclass
class Batch:
    """A rollout, scored. [B, T] sequences; [B, R] everything per token, 0 outside the mask."""

    sequences: torch.Tensor
    prompt_lens: torch.Tensor  # [B]
    mask: torch.Tensor
    logprobs: torch.Tensor  # of the policy that sampled: pi_old, from its own forward pass
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    scores: torch.Tensor | None = None  # [B], of whole answers

    def rows(self, rows):
        """(sequences, prompt_lens, mask) of some rows, trimmed to their own width."""
        return trim(self.sequences[rows], self.prompt_lens[rows], self.mask[rows])

    def micro_batches(self, minibatch, config):
        """A minibatch's rows as lists of rows that go through a model together."""
        lengths = (self.prompt_lens + self.mask.sum(1))[minibatch].tolist() if config.tokens_per_batch else []
        return split_rows(minibatch, lengths, config.micro_batch_size, config.tokens_per_batch)


@torch.no_grad()
def analyse(policy, reference, value_model, rollout, plan, config, autocast, ids=()) -> Batch:
    """Act 2: log-probabilities under policy and reference, values, entropy. All models in eval mode: no dropout.

    RunError, with the `ids` of the prompts, where a number is not finite or a mask does not count its answer's tokens.
    """
    mask = rollout.response_mask
    miscounted = (mask.sum(1) != rollout.response_lens).nonzero().flatten().tolist()
    if miscounted:
        raise RunError(f"the response mask of rows {miscounted[:5]} does not count their tokens; this is a bug.")
    zeros = lambda: torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)  # noqa: E731
    batch = Batch(rollout.sequences, rollout.prompt_lens, mask, zeros(), zeros(), zeros(), zeros())
    for minibatch in plan[0]:
        for rows in batch.micro_batches(minibatch, config):
            packed = batch.rows(rows)
            width = packed[2].shape[1]
            with autocast():
                logprobs, entropy = token_logprobs_and_entropy(policy, *packed, config.temperature)
                batch.logprobs[rows, :width], batch.entropy[rows, :width] = logprobs, entropy
                batch.ref_logprobs[rows, :width] = token_logprobs(reference, *packed, config.temperature)
                batch.values[rows, :width] = value_model(*packed)
    require_finite(rollout.rollout_logprobs, "a sampled token's log-probability", ids)
    for name, what in (("logprobs", "the policy's log-probability"), ("ref_logprobs", "the reference's log-probability"),
                       ("values", "the value model's output")):  # fmt: skip
        require_finite(getattr(batch, name), what, ids)
    return batch


def check_sampler_gap(batch, rollout, precision):
    """Warn, or raise RunError, where what was sampled from is not what is scored: the policy gradient would be of another policy."""
    gap = (batch.logprobs - rollout.rollout_logprobs).abs().masked_fill(~batch.mask, 0.0)
    mean, largest = float(gap.sum() / batch.mask.sum().clamp(min=1)), float(gap.max())
    words = f"log-probabilities recorded while sampling differ from those of the scoring pass by {mean:.2g} (mean), {largest:.2g} (max) nats"
    if mean > GAP_STOP[precision][0] or largest > GAP_STOP[precision][1]:
        raise RunError(
            f"{words}: the model's decoding with a cache does not give the numbers of its own forward; look for an attention window, "
            "own positions or a memory that is no cache of keys and values."
        )
    if mean > GAP_WARN[precision][0] or largest > GAP_WARN[precision][1]:
        say(f"warning: {words}")


def kl_within_bound(batch, config):
    """Whether the rollout's mean KL to the reference, in nats per answer, is within --max_ref_kl. RunError if it is not and
    --on_ref_kl is stop."""
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs).masked_fill(~batch.mask, 0.0).sum(1).mean().item()
    if config.max_ref_kl is None or kl <= config.max_ref_kl:
        return True
    if config.on_ref_kl == "stop":
        raise RunError(
            f"the policy has left the SFT policy: {kl:.4g} nats per answer, more than --max_ref_kl {config.max_ref_kl:g}; take a "
            "larger --kl_coef or a lower --learning_rate."
        )
    return False


def samples_of(rollout, examples, task, encoder, gold) -> Samples:
    """The rollout as text beside its ids. `gold`: {row id: label}, empty where PPO must not know."""
    answers = [encoder.decode(response) for response in rollout.responses()]
    return Samples(
        prompts=[task.render_prompt(example.text, example.text_b) for example in examples],
        answers=answers,
        labels=[parse_answer(task, answer) for answer in answers],
        gold_labels=[gold.get(example.id) for example in examples],
        sequences=rollout.sequences,
        prompt_lens=rollout.prompt_lens,
        response_mask=rollout.response_mask,
        truncated=rollout.truncated,
        ids=[example.id for example in examples],
    )


def improve(policy, value_model, policy_optimizer, value_optimizer, batch, plan, config, autocast, ids=()) -> dict:
    """Act 6: PPO epochs over minibatches; policy and value model each have their optimiser and gradient clip.

    A minibatch's loss is normalised by its token count, so micro-batches add up to the same gradient. Returns the means
    of the statistics over the updates. Raises RunError, with the `ids` of the prompts, before a step whose loss or gradient is
    not finite, and where the first minibatch's ratio is not 1.
    """
    history = []  # one dict of statistics per minibatch
    for minibatch in (minibatch for epoch in plan for minibatch in epoch):
        token_count = batch.mask[minibatch].sum()
        parts = [
            _losses(
                policy,
                value_model,
                batch,
                rows,
                token_count,
                config,
                autocast,
                [ids[row] for row in rows] if ids else (),
            )
            for rows in batch.micro_batches(minibatch, config)
        ]
        stats = {name: _combine(name, [part[name] for part in parts]) for name in parts[0]}
        if not history:
            first_ratio_error = check_first_ratio(stats, config.precision)
        history.append(stats)
        if (
            config.max_update_kl and stats["approx_kl"] > config.max_update_kl
        ):  # far enough from pi_old for this rollout
            policy_optimizer[0].zero_grad(set_to_none=True)
            value_optimizer[0].zero_grad(set_to_none=True)
            break
        # Both gradients are seen to be finite before either model moves.
        stats["grad_norm_policy"] = clip_gradient(policy, config.max_grad_norm)
        stats["grad_norm_value"] = clip_gradient(value_model, config.max_grad_norm)
        optimizer_step(*policy_optimizer)
        optimizer_step(*value_optimizer)
    means = {}
    for name in history[0]:
        if not name.startswith("ratio_error"):
            values = [stats[name] for stats in history if name in stats]
            means[name] = torch.stack(values).max() if name.endswith("_max") else sum(values) / len(values)
    return {**means, "first_ratio_error": first_ratio_error, "lr": policy_optimizer[1].get_last_lr()[0]}


def _combine(name, values):
    """One statistic of a minibatch from its micro-batches': the largest of maxima, the sum of shares of a mean."""
    return torch.stack(values).max() if name.endswith("_max") else torch.stack(values).sum()


def _losses(policy, value_model, batch, rows, token_count, config, autocast, ids=()):
    """Backward of one micro-batch's share of both losses. Returns detached statistics that add up over the minibatch."""
    sequences, prompt_lens, mask = batch.rows(rows)
    width = mask.shape[1]
    old = {name: getattr(batch, name)[rows, :width] for name in ("logprobs", "advantages", "values", "returns")}

    def share(x, mask):  # the minibatch's token mean, of which this micro-batch is a part
        return x.masked_fill(~mask, 0.0).sum() / token_count

    with autocast():
        new_logprobs = token_logprobs(policy, sequences, prompt_lens, mask, config.temperature)
    loss, stats = policy_loss(new_logprobs, old["logprobs"], old["advantages"], mask, config.clip, reduce=share)
    require_finite(loss, "the policy loss", ids)
    loss.backward()
    with autocast():
        new_values = value_model(sequences, prompt_lens, mask)
    critic_loss, critic_stats = value_loss(
        new_values, old["values"], old["returns"], mask, config.value_clip, reduce=share
    )
    require_finite(critic_loss, "the value loss", ids)
    critic_loss.backward()
    with torch.no_grad():
        error = ((new_logprobs - old["logprobs"]).masked_fill(~mask, 0.0).exp() - 1).abs()
    return {
        "policy_loss": loss.detach(), "value_loss": critic_loss.detach(), **stats,
        "value_clipfrac": critic_stats["clipfrac"],
        "ratio_error_mean": share(error, mask), "ratio_error_max": error.masked_fill(~mask, 0.0).max(),
    }  # fmt: skip


def check_first_ratio(stats, precision):
    """|ratio - 1| on the first minibatch, before any update (mean). Warns, or raises RunError, where it is not near 0."""
    mean, largest = float(stats["ratio_error_mean"]), float(stats["ratio_error_max"])
    if mean > RATIO_STOP[precision][0] or largest > RATIO_STOP[precision][1]:
        raise RunError(
            f"the ratio new / old on the first minibatch is off 1 by {mean:.2g} (mean), {largest:.2g} (max): look for dropout "
            "left on, another temperature, or positions that differ between scoring and training."
        )
    if mean > RATIO_WARN[precision][0] or largest > RATIO_WARN[precision][1]:
        say(f"warning: the first minibatch's ratio is off 1 by {mean:.2g} (mean), {largest:.2g} (max)")
    return mean
