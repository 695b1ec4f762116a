"""The mathematics of PPO: golden numbers of public implementations, slow loops in plain Python, and properties.

Batch G is two responses of lengths 5 and 3; x marks garbage in padding. Its numbers were produced by running TRL,
OpenRLHF, verl and torchtune, and agree among them.
"""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rllr.ppo
from rllr.ppo import (
    AdaptiveKL,
    FixedKL,
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
)
from rllr.rewards import shape_rewards

F64 = torch.float64
GARBAGE = [0.0, 9.0, -1e30, math.inf, -math.inf, math.nan]


def tensor(rows, dtype=F64):
    return torch.tensor(rows, dtype=dtype)


MASK_G = tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], torch.bool)


def batch_g(dtype=F64, x=9.0):
    """(rewards, V, logp, new logp, new V) of batch G with x in padding; the sums are taken in `dtype`."""
    values = tensor([[0.5, 0.4, 0.3, 0.2, 0.1], [0.1, -0.2, 0.3, x, x]], dtype)
    logp = tensor([[-1, -0.5, -2, -0.1, -0.7], [-0.3, -1.2, -0.6, x, x]], dtype)
    rewards = tensor([[-0.01, 0.01, -0.05, 0, 2.05], [-0.03, 0.02, -1.03, x, x]], dtype)
    new_logp = logp + tensor([[0.10, -0.30, 0.25, 0, -0.05], [0.40, -0.10, 0.05, 3, 3]], dtype)
    new_values = values + tensor([[0.3, -0.1, 0.05, -0.4, 0.2], [-0.25, 0.1, 0.6, 1, 1]], dtype)
    return rewards, values, logp, new_logp, new_values


ADVANTAGES_G = tensor([[1.171675, 1.349131, 1.514875, 1.7525, 1.95], [-1.036325, -0.7435, -1.33, 0, 0]])
RETURNS_G = tensor([[1.671675, 1.749131, 1.814875, 1.9525, 2.05], [-0.936325, -0.9435, -1.03, 0, 0]])
WHITENED_G = tensor([[0.433913, 0.563734, 0.684987, 0.858825, 1.003309], [-1.181382, -0.967162, -1.396224, 0, 0]])
BIASED_G = tensor([[0.463873, 0.602657, 0.732282, 0.918122, 1.072582], [-1.262951, -1.033939, -1.492627, 0, 0]])


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def test_doctests():
    """The worked examples of the docstrings."""
    result = doctest.testmod(rllr.ppo)
    assert result.attempted >= 14 and result.failed == 0


# ---- golden numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [9.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gae_golden(dtype, x):
    """A recursion that runs through padding, returns that come from something else than A + V, a changed dtype."""
    rewards, values, *_ = batch_g(dtype, x)
    advantages, returns = gae(rewards, values, MASK_G)
    assert advantages.dtype == returns.dtype == dtype
    close(advantages, ADVANTAGES_G)
    close(returns, RETURNS_G)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whiten_golden(dtype):
    """Padding that counts in mean, variance or divisor; the wrong divisor."""
    advantages = gae(*batch_g(dtype)[:2], MASK_G)[0]
    whitened = masked_whiten(advantages, MASK_G)
    assert whitened.dtype == dtype
    close(whitened, WHITENED_G)
    close(masked_whiten(advantages, MASK_G, unbiased=False), BIASED_G)


def test_whiten_keeps_the_mean_where_asked():
    """A shift of the rewards, which would change what a longer answer is worth."""
    advantages = gae(*batch_g()[:2], MASK_G)[0]
    mean = ADVANTAGES_G.sum() / 8
    close(masked_whiten(advantages, MASK_G, shift_mean=False), (WHITENED_G + mean) * MASK_G)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_policy_loss_golden(dtype):
    """Sign, clip, mean over tokens, and a clip fraction that counts |ratio - 1| > eps (that would give 0.375)."""
    rewards, values, logp, new_logp, _ = batch_g(dtype)
    advantages = masked_whiten(gae(rewards, values, MASK_G)[0], MASK_G)
    loss, stats = policy_loss(new_logp, logp, advantages, MASK_G)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(0.0716238068, abs=1e-10 if dtype == F64 else 1e-6)
    assert stats["clipfrac"].item() == 0.125
    assert stats["approx_kl"].item() == pytest.approx(0.02109375, abs=1e-7)
    ratios = [math.exp(d) for d in (0.10, -0.30, 0.25, 0, -0.05, 0.40, -0.10, 0.05)]
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / 8, abs=1e-6)
    assert stats["ratio_max"].item() == pytest.approx(math.exp(0.40), abs=1e-6)


def test_policy_loss_golden_with_biased_advantages():
    rewards, values, logp, new_logp, _ = batch_g()
    advantages = masked_whiten(gae(rewards, values, MASK_G)[0], MASK_G, unbiased=False)
    assert policy_loss(new_logp, logp, advantages, MASK_G)[0].item() == pytest.approx(0.0765690702, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_loss_golden(dtype):
    """A missing or doubled one half, a clip around something else than the old value. Token 5 is a tie: not clipped."""
    rewards, values, _, _, new_values = batch_g(dtype)
    loss, stats = value_loss(new_values, values, gae(rewards, values, MASK_G)[1], MASK_G)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(1.1263487406, abs=1e-10 if dtype == F64 else 1e-6)
    assert stats["clipfrac"].item() == 0.25


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("k1", [0.1, -0.1, 0.5, 0, -0.5]),
        ("k2", [0.005, 0.005, 0.125, 0, 0.125]),
        ("k3", [0.004837418036, 0.005170918076, 0.106530659713, 0, 0.148721270700]),
    ],
)
def test_kl_golden(kind, expected):
    """A flipped sign, which in k3 estimates no divergence at all."""
    logp, ref = tensor([-1, -0.5, -2, -0.1, -0.7]), tensor([-1.1, -0.4, -2.5, -0.1, -0.2])
    close(kl_estimate(logp, ref, kind), tensor(expected), atol=1e-12)


def test_kl_unknown_kind():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_k3_near_zero_in_float32():
    """exp(x) - 1 - x cancels to 0 or below for small x; the true value is x^2 / 2."""
    x = torch.full((1,), 1e-4)
    assert kl_estimate(torch.zeros(1), x, "k3").item() == pytest.approx(5e-9, rel=2e-3)


@pytest.mark.parametrize(
    "gamma, lam, bootstrap, expected",
    [
        (1.0, 0.95, None, [0.7139375, 0.64625, 0.575, 0.5]),
        (0.99, 0.95, None, [0.68727438, 0.62761763, 0.56525, 0.5]),
        (1.0, 0.95, 0.6, [1.2283625, 1.18775, 1.145, 1.1]),
        (1.0, 1.0, None, [0.8, 0.7, 0.6, 0.5]),
        (1.0, 0.0, None, [0.1, 0.1, 0.1, 0.5]),
    ],
)
def test_gae_by_hand(gamma, lam, bootstrap, expected):
    """Also with padding behind: the bootstrap value belongs after the last real token, not in the last column."""
    bootstrap = None if bootstrap is None else tensor([bootstrap])
    for padding in (0, 2):
        rewards = tensor([[0, 0, 0, 1] + [math.nan] * padding])
        values = tensor([[0.2, 0.3, 0.4, 0.5] + [math.nan] * padding])
        mask = tensor([[1] * 4 + [0] * padding], torch.bool)
        advantages, _ = gae(rewards, values, mask, gamma, lam, bootstrap)
        close(advantages, tensor([expected + [0] * padding]), atol=1e-8)


def test_gae_defaults_are_gamma_1_lambda_095():
    rewards, values = tensor([[0, 0, 0, 1]]), tensor([[0.2, 0.3, 0.4, 0.5]])
    close(gae(rewards, values, values > 0)[0], tensor([[0.7139375, 0.64625, 0.575, 0.5]]), atol=1e-12)


def test_gae_with_values_equal_to_rewards():
    """torchtune's identity: V = r = [0, 0, 0, 1] gives returns [g^3 l^2, g^2 l, g, 1]."""
    rewards, g, lam = tensor([[0, 0, 0, 1]]), 0.9, 0.95
    _, returns = gae(rewards, rewards, torch.ones(1, 4, dtype=torch.bool), g, lam)
    close(returns, tensor([[g**3 * lam**2, g**2 * lam, g, 1]]), atol=1e-12)


def test_adaptive_kl_golden():
    """Six updates, of which 0, 9 and -2 are clipped at 0.2."""
    controller = AdaptiveKL(0.2, target=6, horizon=10000)
    expected = [0.198976, 0.1979572429, 0.1979572429, 0.1984640134, 0.1994801492, 0.1984588108]
    for observed, value in zip([0, 3, 6, 6.6, 9, -2], expected, strict=True):
        controller.update(observed, 256)
        assert controller.value == pytest.approx(value, abs=1e-10)


def test_fixed_kl_never_moves():
    controller = FixedKL(0.05)
    controller.update(100.0, 256)
    assert controller.value == 0.05


# ---- slow loops ------------------------------------------------------------------------------------------------------


@st.composite
def masks(draw, max_rows=4, max_len=6, min_len=0):
    """Row lengths of a batch; at least one token in all."""
    lengths = draw(st.lists(st.integers(min_len, max_len), min_size=1, max_size=max_rows))
    return lengths if sum(lengths) else [1]


def mask_of(lengths, width=None):
    return torch.arange(width or max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@given(masks(), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_the_double_sum(lengths, seed, gamma, lam, with_bootstrap):
    """Against A_t = sum_k (gamma lambda)^k delta_{t+k}, the definition, one row at a time."""
    mask = mask_of(lengths)
    rewards, values, bootstrap = draw(seed, *mask.shape), draw(seed + 1, *mask.shape), draw(seed + 2, len(lengths))
    advantages, returns = gae(rewards, values, mask, gamma, lam, bootstrap if with_bootstrap else None)
    for b, n in enumerate(lengths):
        r, v = rewards[b].tolist(), values[b].tolist()[:n] + [bootstrap[b].item() if with_bootstrap else 0.0]
        for t in range(mask.shape[1]):
            deltas = [(gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n)]
            assert advantages[b, t].item() == pytest.approx(sum(deltas), abs=1e-9)
            assert returns[b, t].item() == pytest.approx(sum(deltas) + v[t] if t < n else 0, abs=1e-9)


@given(masks(), st.integers(0, 999), st.floats(0.5, 1))
def test_gae_limits(lengths, seed, gamma):
    """lambda = 1, gamma = 1: return-to-go - V. lambda = 0: the TD error."""
    mask = mask_of(lengths)
    rewards, values = draw(seed, *mask.shape), draw(seed + 1, *mask.shape)
    whole, _ = gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    close(whole, (to_go - values) * mask, atol=1e-9)
    one_step, _ = gae(rewards, values, mask, gamma, 0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(mask), 1)], 1)
    close(one_step, (rewards + gamma * following - values) * mask, atol=1e-9)


@given(st.integers(1, 7), st.floats(0.1, 1), st.floats(0.1, 1), st.floats(-3, 3), st.integers(0, 999))
def test_terminal_reward_is_discounted(length, gamma, lam, c, seed):
    """Adding c to the terminal reward moves the advantage at t by c * (gamma * lambda)^(R - 1 - t)."""
    rewards, values, mask = draw(seed, 1, length), draw(seed + 1, 1, length), mask_of([length])
    more = rewards.clone()
    more[0, -1] += c
    moved = gae(more, values, mask, gamma, lam)[0] - gae(rewards, values, mask, gamma, lam)[0]
    close(moved[0], tensor([c * (gamma * lam) ** (length - 1 - t) for t in range(length)]), atol=1e-9)


@given(masks(), st.integers(0, 999), st.floats(0.05, 0.5))
def test_losses_are_the_loops(lengths, seed, clip):
    """Every token one by one: the surrogate, the value loss and what they report."""
    mask = mask_of(lengths)
    new, old, adv, ret = (draw(seed + i, *mask.shape) for i in range(4))
    surrogate = value = approx_kl = clipped = value_clipped = 0.0
    cells = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    for b, t in cells:
        n, o, a, r = (x[b, t].item() for x in (new, old, adv, ret))
        rho = math.exp(n - o)
        branch, bounded = -a * rho, -a * min(max(rho, 1 - clip), 1 + clip)
        surrogate += max(branch, bounded)
        clipped += bounded > branch
        approx_kl += (n - o) ** 2 / 2
        free, held = (n - r) ** 2, (min(max(n, o - clip), o + clip) - r) ** 2
        value += max(free, held) / 2
        value_clipped += held > free
    loss, stats = policy_loss(new, old, adv, mask, clip)
    assert loss.item() == pytest.approx(surrogate / len(cells), abs=1e-9)
    assert stats["clipfrac"].item() == pytest.approx(clipped / len(cells), abs=1e-12)
    assert stats["approx_kl"].item() == pytest.approx(approx_kl / len(cells), abs=1e-9)
    loss, stats = value_loss(new, old, ret, mask, clip)
    assert loss.item() == pytest.approx(value / len(cells), abs=1e-9)
    assert stats["clipfrac"].item() == pytest.approx(value_clipped / len(cells), abs=1e-12)


@given(masks(), st.integers(0, 999))
def test_masked_mean_is_the_loop(lengths, seed):
    """Over everything, along rows and along columns; 0 where the mask is empty."""
    mask = mask_of(lengths)
    x = draw(seed, *mask.shape)
    rows = [[x[b, t].item() for t in range(n)] for b, n in enumerate(lengths)]
    columns = [[row[t] for row in rows if t < len(row)] for t in range(mask.shape[1])]

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else 0.0

    assert masked_mean(x, mask).item() == pytest.approx(mean(sum(rows, [])), abs=1e-12)
    assert masked_mean(x, mask, dim=1).tolist() == pytest.approx([mean(row) for row in rows], abs=1e-12)
    assert masked_mean(x, mask, dim=0).tolist() == pytest.approx([mean(c) for c in columns], abs=1e-12)


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


# ---- padding ---------------------------------------------------------------------------------------------------------

# name: (number of [B, R] inputs, function of them and the mask)
FUNCTIONS = {
    "masked_mean": (1, lambda x, mask: masked_mean(x, mask)),
    "masked_mean_rows": (1, lambda x, mask: masked_mean(x, mask, dim=1)),
    "whiten": (1, lambda x, mask: masked_whiten(x, mask)),
    "whiten_keeping_mean": (1, lambda x, mask: masked_whiten(x, mask, shift_mean=False, unbiased=False)),
    "gae": (2, lambda r, v, mask: torch.stack(gae(r, v, mask, 0.97, 0.9, torch.ones(len(mask), dtype=F64)))),
    "policy_loss": (3, lambda n, o, a, mask: policy_loss(n, o, a, mask)[0]),
    "policy_stats": (3, lambda n, o, a, mask: torch.stack(list(policy_loss(n, o, a, mask)[1].values()))),
    "value_loss": (3, lambda n, o, r, mask: value_loss(n, o, r, mask)[0]),
    "value_stats": (3, lambda n, o, r, mask: value_loss(n, o, r, mask)[1]["clipfrac"]),
    "explained_variance": (2, lambda v, r, mask: explained_variance(v, r, mask).detach()),
    "shape_k1": (2, lambda p, q, mask: shape_rewards(p.new_ones(len(p)), p, q, mask, 0.1, "k1")),
    "shape_k2": (2, lambda p, q, mask: shape_rewards(p.new_ones(len(p)), p, q, mask, 0.1, "k2")),
    "shape_k3": (2, lambda p, q, mask: shape_rewards(p.new_ones(len(p)), p, q, mask, 0.1, "k3")),
}


def value_and_gradients(function, inputs, mask):
    """The function's value, and each input's gradient where it has one (statistics are detached)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = function(*inputs, mask)
    if not result.requires_grad:
        return result, []
    weights = torch.arange(1, result.numel() + 1, dtype=F64).reshape(result.shape)
    return result.detach(), torch.autograd.grad((result * weights).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(masks(), st.integers(0, 99), st.sampled_from(GARBAGE))
def test_content_of_padding_changes_nothing_to_the_bit(name, lengths, seed, garbage):
    """Value and gradient. A NaN or inf that is multiplied by 0 instead of being filled shows here."""
    count, function = FUNCTIONS[name]
    mask = mask_of(lengths)
    inputs = [draw(seed + i, *mask.shape) for i in range(count)]
    clean, clean_gradients = value_and_gradients(function, inputs, mask)
    dirty, gradients = value_and_gradients(function, [x.masked_fill(~mask, garbage) for x in inputs], mask)
    assert torch.equal(clean, dirty)
    assert dirty.shape != mask.shape or dirty[~mask].eq(0).all()
    for before, after in zip(clean_gradients, gradients, strict=True):
        if before is not None:
            assert torch.equal(before, after) and after[~mask].eq(0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
@given(masks(), st.integers(0, 99), st.integers(1, 9))
def test_amount_of_padding_changes_nothing(name, lengths, seed, extra):
    """More columns of NaN. Row by row to the bit; sums over the batch may be added up in another order: 1e-12."""
    count, function = FUNCTIONS[name]
    mask, wide = mask_of(lengths), mask_of(lengths, max(lengths) + extra)
    inputs = [draw(seed + i, *mask.shape) for i in range(count)]
    padding = torch.full((len(lengths), extra), math.nan, dtype=F64)
    before = function(*inputs, mask)
    after = function(*[torch.cat([x, padding], 1) for x in inputs], wide)
    after = after[..., : mask.shape[1]] if after.shape[-1:] == wide.shape[1:] and after.dim() > 1 else after
    torch.testing.assert_close(after, before, rtol=0, atol=0 if name in ("gae", "shape_k1", "shape_k3") else 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(masks(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_results(name, lengths, seed, random):
    """A row must not see its neighbours except through the batch's sums."""
    count, function = FUNCTIONS[name]
    mask = mask_of(lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    inputs = [draw(seed + i, *mask.shape) for i in range(count)]
    before, after = function(*inputs, mask), function(*[x[order] for x in inputs], mask[order])
    if before.dim() == 3:
        before = before[:, order]
    elif before.dim() > 0 and name != "policy_stats":
        before = before[order]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_an_empty_batch_gives_zeros_and_no_nan():
    """Every answer empty: no division by zero."""
    mask, x = torch.zeros(2, 3, dtype=torch.bool), torch.full((2, 3), math.nan)
    for name, (count, function) in FUNCTIONS.items():
        assert function(*[x.double()] * count, mask).eq(0).all(), name


# ---- properties ------------------------------------------------------------------------------------------------------


@given(masks(), st.integers(0, 999))
def test_ratio_one(lengths, seed):
    """Before the first update: nothing is clipped and the loss is -mean(A)."""
    mask = mask_of(lengths)
    logp, advantages = draw(seed, *mask.shape), draw(seed + 1, *mask.shape)
    loss, stats = policy_loss(logp, logp.clone(), advantages, mask)
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=1e-12)
    assert stats["clipfrac"] == 0 and stats["approx_kl"] == 0 and stats["ratio_mean"] == 1 and stats["ratio_max"] == 1


def test_gradient_at_ratio_one_is_the_policy_gradient():
    """d loss / d logp = -A / n: the direction of the step, which no loss value shows."""
    logp = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    advantages = tensor([[1.0, -2.0, 5.0]])
    mask = tensor([[1, 1, 0]], torch.bool)
    policy_loss(logp, logp.detach(), advantages, mask)[0].backward()
    close(logp.grad, tensor([[-0.5, 1.0, 0.0]]), atol=1e-12)


@pytest.mark.parametrize("advantage, log_ratio, moves", [(1, 0.5, 0), (-1, -0.5, 0), (1, -0.5, 1), (-1, 0.5, 1)])
def test_clip_stops_only_the_harmful_direction(advantage, log_ratio, moves):
    """Beyond the clip, a step further out has exactly no gradient; a step back towards the old policy keeps its own."""
    new = tensor([[log_ratio]]).requires_grad_()
    loss, stats = policy_loss(new, tensor([[0.0]]), tensor([[float(advantage)]]), tensor([[1]], torch.bool))
    loss.backward()
    expected = -advantage * math.exp(log_ratio) * moves
    assert new.grad.item() == pytest.approx(expected, abs=1e-12) and (moves or new.grad.item() == 0.0)
    assert stats["clipfrac"].item() == 1 - moves


def test_value_gradient_points_at_the_return():
    new = tensor([[1.0, 0.0]]).requires_grad_()
    value_loss(new, new.detach(), tensor([[3.0, -1.0]]), tensor([[1, 1]], torch.bool))[0].backward()
    close(new.grad, tensor([[-1.0, 0.5]]), atol=1e-12)


def test_value_clip_holds_a_far_step():
    """V_old = 0, R = 3: beyond +0.2 the clipped branch is the larger and gives no gradient."""
    new = tensor([[0.5]]).requires_grad_()
    loss, stats = value_loss(new, tensor([[0.0]]), tensor([[3.0]]), tensor([[1]], torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 2.8**2) and new.grad.item() == 0.0 and stats["clipfrac"] == 1


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_stats_carry_no_graph(loss):
    """A logged tensor that keeps the graph alive fills the memory."""
    x = torch.zeros(1, 2, requires_grad=True)
    _, stats = loss(x, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
@given(lengths=masks(max_rows=6), seed=st.integers(0, 99), size=st.integers(1, 3))
def test_micro_batches_with_a_shared_divisor_add_up(loss, lengths, seed, size):
    """Means of micro-batches, averaged, would weight the tokens of short rows more."""
    mask = mask_of(lengths)
    new, old, target = (draw(seed + i, *mask.shape) for i in range(3))
    count = mask.sum()

    def reduce(x, mask):
        return x.masked_fill(~mask, 0.0).sum() / count

    def gradient(pieces):
        x = new.clone().requires_grad_()
        losses = [loss(x[s], old[s], target[s], mask[s], **reducer) for s, reducer in pieces]
        total = sum(piece[0] for piece in losses)
        total.backward()
        return total.detach(), sum(piece[1]["clipfrac"] for piece in losses), x.grad

    whole = gradient([(slice(None), {})])
    parts = gradient([(slice(i, i + size), {"reduce": reduce}) for i in range(0, len(lengths), size)])
    for a, b in zip(whole, parts, strict=True):
        close(a, b, atol=1e-12)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_reduce_never_sees_padding(loss, garbage):
    """Filled before the products: also a `reduce` that multiplies by the mask gets numbers only."""
    mask = tensor([[1, 1, 0]], torch.bool)
    inputs = [tensor([[0.1, 0.2, garbage]]) + i for i in range(3)]
    result, stats = loss(*inputs, mask, reduce=lambda x, mask: (x * mask).sum() / 2)
    expected, _ = loss(*inputs, mask)
    assert result.item() == pytest.approx(expected.item(), abs=1e-12)
    assert all(value.isfinite() for value in stats.values())


def test_reduce_gets_every_mean():
    """A plain mean left inside a loss would be wrong in micro-batches only."""
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    loss, stats = policy_loss(x, x, x + 1, mask, reduce=lambda x, mask: x.sum() * 0 + 7)
    assert loss == 7 and stats["clipfrac"] == stats["approx_kl"] == stats["ratio_mean"] == 7
    loss, stats = value_loss(x, x, x + 1, mask, reduce=lambda x, mask: x.sum() * 0 + 7)
    assert loss == 3.5 and stats["clipfrac"] == 7


@given(masks(), st.integers(0, 999))
def test_whitened_mean_and_variance_over_the_mask(lengths, seed):
    mask = mask_of(lengths)
    n = int(mask.sum())
    x = 3 + 2 * draw(seed, *mask.shape)
    whitened = masked_whiten(x, mask)[mask]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-9)
    if n >= 2 and x[mask].var() > 1e-2:
        assert whitened.var(unbiased=True).item() == pytest.approx(1, abs=1e-5)
        assert masked_whiten(x, mask, unbiased=False)[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_without_spread(shift_mean, unbiased):
    """0 and 1 valid tokens give 0 (a division by n - 1 gives NaN); 2 give +-1/sqrt(2) or +-1."""
    x = tensor([[3.0, 5.0, math.nan]])
    for valid in (0, 1):
        mask = torch.arange(3).unsqueeze(0) < valid
        assert masked_whiten(x, mask, shift_mean, unbiased).tolist() == [[0.0, 0.0, 0.0]]
    two = masked_whiten(x, tensor([[1, 1, 0]], torch.bool), shift_mean, unbiased)
    side, mean = (math.sqrt(0.5) if unbiased else 1.0), (0.0 if shift_mean else 4.0)
    close(two, tensor([[mean - side, mean + side, 0.0]]))


def test_whitening_of_equal_values_is_finite():
    """eps keeps 0 / 0 away."""
    assert masked_whiten(torch.full((1, 4), 2.5), torch.ones(1, 4, dtype=torch.bool)).tolist() == [[0.0] * 4]


@given(st.integers(0, 999), st.sampled_from(["k1", "k3"]))
def test_kl_expectation_over_an_exact_categorical(seed, kind):
    """E_p[k] = KL(p || q) exactly; with the sign flipped it is another number, which is neither KL."""
    p, q = draw(seed, 7).log_softmax(0), draw(seed + 1, 7).log_softmax(0)
    divergence = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p.exp() * kl_estimate(p, q, kind)).sum().item() == pytest.approx(divergence, abs=1e-10)
    flipped = (p.exp() * kl_estimate(q, p, kind)).sum().item()
    assert abs(flipped - divergence) > 1e-4 * divergence


@given(st.integers(0, 999))
def test_kl_of_a_policy_to_itself(seed):
    logp = draw(seed, 3, 4)
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logp, logp.clone(), kind).eq(0).all()
        assert kind == "k1" or kl_estimate(logp, draw(seed + 1, 3, 4), kind).ge(0).all()


def test_gradcheck():
    """Analytic against numeric derivatives in float64, away from the kinks of the clips."""
    mask = mask_of([4, 2, 0], 4)
    new, old, third = (0.5 * draw(i, 3, 4) for i in range(3))
    x = new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, third, mask)[0], x)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, third, mask)[0], x)
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask), x)
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask, False, False), x)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask, 1), x)
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: kl_estimate(x, old, kind), x)


def test_explained_variance():
    """1 for a perfect critic (also one that is off by a constant), 0 for the mean, below 0 for a harmful one."""
    returns, mask = tensor([[1.0, 2.0, 4.0, 99.0]]), tensor([[1, 1, 1, 0]], torch.bool)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(returns - 5, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 7 / 3), returns, mask).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
    assert explained_variance(0.5 * returns, returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(returns, torch.ones_like(returns), mask).item() == 0


def test_explained_variance_gradient_ignores_padding():
    """The promise of the module's docstring, although nobody trains on this number."""
    values, returns = tensor([[1.0, 2.0, 0.0]]), tensor([[1.0, 4.0, math.inf]]).requires_grad_()
    explained_variance(values, returns, tensor([[1, 1, 0]], torch.bool)).backward()
    assert returns.grad.isfinite().all()
