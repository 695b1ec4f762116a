"""The mathematics of PPO as pure tensor functions: one equation, one function. Imports torch and nothing else.

Shapes: B rows, R response positions. A mask is boolean, True on real response tokens (EOS included). Nothing outside
the mask influences a result or a gradient, not even a NaN: masked inputs are filled *before* exp, square and product.
Every function keeps the floating dtype of its input (float64 in, float64 out).
"""

import torch

__all__ = [
    "masked_mean",
    "masked_whiten",
    "gae",
    "policy_loss",
    "value_loss",
    "kl_estimate",
    "FixedKL",
    "AdaptiveKL",
    "explained_variance",
]


def _fill(x, mask):
    """x with zeros outside the mask. Multiplying by 0 would keep a NaN, in the value and in the gradient."""
    return x.masked_fill(~mask, 0.0)


def masked_mean(x, mask, dim=None):
    """Sum of x over the mask / number of True cells; 0 where the mask is empty.

    x, mask: the same shape, usually [B, R]. dim None gives a scalar, else the mean along that dimension.
    """
    total = _fill(x, mask).sum() if dim is None else _fill(x, mask).sum(dim)
    count = mask.sum() if dim is None else mask.sum(dim)
    return total / count.clamp(min=1)


def masked_whiten(x, mask, shift_mean=True, unbiased=True, eps=1e-8):
    """(x - mean) * rsqrt(var + eps), with mean and variance over the mask; 0 outside it.

    shift_mean=False adds the mean back, so only the scale changes. Use it for rewards: a shift would change the value
    of a longer answer. unbiased=True divides by n - 1 in the variance, as TRL and verl do; OpenAI's code divides by n.
    With 0 or 1 valid elements the variance is not defined, and the result is 0.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> masked_whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), mask).tolist()  # mean 2, variance (1 + 0 + 1) / 2
    [[-1.0, 0.0, 1.0, 0.0]]
    """
    count = mask.sum()
    if count < 2:
        return torch.zeros_like(x)
    mean = masked_mean(x, mask)
    centred = _fill(x - mean, mask)
    variance = centred.square().sum() / (count - 1 if unbiased else count)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else _fill(whitened + mean, mask)


def gae(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=None):
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) and the value targets.

        delta_t = r_t + gamma * V_{t+1} - V_t          A_t = delta_t + gamma * lam * A_{t+1}          returns = A + V

    rewards, values, mask: [B, R]; each row's mask is True up to some position and False after it. bootstrap [B]: the
    value after the last token, None for 0. It is 0 for an answer that ended; we use 0 also for one that the length
    limit cut, as all public implementations except one do. Returns (advantages, returns), both [B, R], 0 outside the
    mask, not whitened.

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    >>> advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), lam=0.5)
    >>> advantages.tolist(), returns.tolist()  # delta is 0, 0, 0.5: the last one comes back halved at each step
    ([[0.125, 0.25, 0.5]], [[0.625, 0.75, 1.0]])
    """
    rewards, values = _fill(rewards, mask), _fill(values, mask)
    advantages = torch.zeros_like(values)
    after_end = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values.dtype)
    next_value, next_advantage = after_end, torch.zeros_like(after_end)
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # On padding, next_value and next_advantage do not change, so the recursion starts at the last real token.
        next_value = torch.where(valid, values[:, t], next_value)
        next_advantage = torch.where(valid, advantage, next_advantage)
        advantages[:, t] = torch.where(valid, advantage, 0.0)
    return advantages, advantages + values


def policy_loss(new_logprobs, logprobs, advantages, mask, clip=0.2, reduce=masked_mean):
    """Clipped surrogate, PPO (arXiv:1707.06347) eq. 7, as a loss: E[max(-A * rho, -A * clip(rho, 1 - eps, 1 + eps))].

    rho = exp(new_logprobs - logprobs). All inputs are [B, R]; the loss is the mean over the tokens in the mask. When a
    minibatch is split into micro-batches, these must share one divisor, and `reduce(x, mask)` replaces that mean.
    Returns (loss, stats), stats without gradient: clipfrac (share of tokens whose clipped branch is strictly larger),
    approx_kl (mean of half the squared log-ratio), ratio_mean, ratio_max.

    >>> twice, once = torch.tensor([[2.0, 2.0]]).log(), torch.zeros(1, 2)  # both ratios are 2, beyond 1 + clip
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> loss, stats = policy_loss(twice, once, torch.tensor([[1.0, -1.0]]), mask, clip=0.5)
    >>> round(loss.item(), 4), stats["clipfrac"].item()  # (max(-2, -1.5) + max(2, 1.5)) / 2; only A > 0 is clipped
    (0.25, 0.5)
    """
    log_ratio = _fill(new_logprobs - logprobs, mask)
    advantages = _fill(advantages, mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = reduce(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        stats = {
            "clipfrac": reduce((clipped > unclipped).to(ratio.dtype), mask),
            "approx_kl": reduce(0.5 * log_ratio.square(), mask),
            "ratio_mean": reduce(ratio, mask),
            "ratio_max": ratio.masked_fill(~mask, 0.0).max() if mask.any() else ratio.new_zeros(()),
        }
    return loss, stats


def value_loss(new_values, values, returns, mask, clip=0.2, reduce=masked_mean):
    """Clipped value loss: half the mean of max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    new_values, values (computed once, after the rollout), returns, mask: [B, R]. This loss is in the authors' code of
    PPO, not in the paper. Returns (loss, stats), stats: clipfrac (share of tokens whose clipped branch is strictly
    larger).

    >>> new, old, target = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]])
    >>> loss, stats = value_loss(new, old, target, torch.tensor([[True]]), clip=0.5)
    >>> loss.item(), stats["clipfrac"].item()  # max((1 - 2)^2, (0.5 - 2)^2) / 2
    (1.125, 1.0)
    """
    new_values, values, returns = _fill(new_values, mask), _fill(values, mask), _fill(returns, mask)
    clipped_values = torch.clamp(new_values, values - clip, values + clip)
    unclipped = (new_values - returns).square()
    clipped = (clipped_values - returns).square()
    loss = 0.5 * reduce(torch.maximum(unclipped, clipped), mask)
    return loss, {"clipfrac": reduce((clipped > unclipped).to(values.dtype), mask).detach()}


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Per-token estimate of KL(policy || reference) at the sampled tokens (J. Schulman, "Approximating KL divergence").

    With x = ref_logprobs - logprobs:  k1 = -x (unbiased),  k2 = x^2 / 2 (low variance, biased),
    k3 = exp(x) - 1 - x (unbiased, never negative; expm1 avoids the cancellation near 0). Any shape.

    >>> logprob, ref_logprob = torch.tensor(0.5).log(), torch.tensor(0.25).log()  # x = -log 2
    >>> [round(kl_estimate(logprob, ref_logprob, kind).item(), 4) for kind in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    x = ref_logprobs - logprobs
    if kind == "k1":
        return -x
    if kind == "k2":
        return 0.5 * x.square()
    if kind == "k3":
        return torch.expm1(x) - x
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2 or k3")


class FixedKL:
    """A KL coefficient beta that never changes."""

    def __init__(self, value):
        self.value = value

    def update(self, observed, n):
        pass


class AdaptiveKL:
    """Proportional controller for beta (Ziegler et al., arXiv:1909.08593, section 2.2).

    target: the desired KL in nats per *sequence*; some other code gives it per token, which is smaller by the length of
    the answer. horizon: in sequences; beta stays positive where it is above a fifth of an update's.
    """

    def __init__(self, init, target, horizon):
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, observed, n):
        """observed: mean over sequences of the summed k1; n: number of sequences it was observed on."""
        error = min(max(observed / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant mean."""
    spread = masked_mean(_fill(returns - masked_mean(returns, mask), mask).square(), mask)
    error = _fill(returns - values, mask)
    unexplained = masked_mean(_fill(error - masked_mean(error, mask), mask).square(), mask)
    return torch.where(spread > 0, 1 - unexplained / spread.clamp(min=1e-12), torch.zeros_like(spread))
