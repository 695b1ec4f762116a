"""The label-sensitive reward, the shaping of a score into per-token rewards, and the loss of the reward models."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rllr.rewards
from rllr.ppo import AdaptiveKL, gae
from rllr.rewards import (
    incomplete_answer_rule,
    label_sensitive_reward,
    pairwise_accuracy,
    pairwise_loss,
    relative_scores,
    shape_rewards,
)

F64 = torch.float64
CHOSEN = torch.tensor([1.2, -0.3, 0.5, 2.0], dtype=F64)
REJECTED = torch.tensor([0.4, 0.1, 0.5, -1.0], dtype=F64)
LOGP = [[-1, -0.5, -2, -0.1, -0.7], [-0.3, -1.2, -0.6]]
REF = [[-1.1, -0.4, -2.5, -0.1, -0.2], [-0.6, -1, -0.9]]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


def padded(rows, x, dtype=F64):
    return torch.tensor([row + [x] * (5 - len(row)) for row in rows], dtype=dtype)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def test_doctests():
    """The worked example of the paper's mixed reward, as printed in the docstring."""
    result = doctest.testmod(rllr.rewards)
    assert result.attempted >= 3 and result.failed == 0


# ---- the reward ------------------------------------------------------------------------------------------------------


def test_modes_take_the_right_model():
    """Label and rationale model mixed up."""
    label, rationale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    assert label_sensitive_reward(label).tolist() == [1.0, -2.0]
    assert label_sensitive_reward(label, rationale, 0.0, "label").tolist() == [1.0, -2.0]
    assert label_sensitive_reward(label, rationale, 0.0, "rationale").tolist() == [0.5, 3.0]


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=6), st.floats(-9, 9))
def test_mixed_is_min_plus_rationale(rows, threshold):
    """min confused with max, or the threshold put on the rationale's score."""
    label, rationale = torch.tensor(rows, dtype=F64).T
    mixed = label_sensitive_reward(label, rationale, threshold, "mixed").tolist()
    assert mixed == pytest.approx([min(a, threshold) + b for a, b in rows], abs=1e-12)


def test_mixed_threshold_of_zero_counts():
    """`if not threshold` would take 0 for missing."""
    assert label_sensitive_reward(torch.tensor([2.0]), torch.tensor([1.0]), 0.0, "mixed").item() == 1.0


@pytest.mark.parametrize(
    "arguments, missing",
    [
        ({"mode": "mixed", "rationale_scores": torch.ones(1)}, "threshold"),
        ({"mode": "mixed", "threshold": 1.0}, "rationale_scores"),
        ({"mode": "rationale"}, "rationale_scores"),
        ({"mode": "both"}, "label, rationale, mixed"),
    ],
)
def test_reward_errors_name_what_is_missing(arguments, missing):
    with pytest.raises(ValueError, match=missing):
        label_sensitive_reward(torch.ones(1), **arguments)


def test_incomplete_answer_rule():
    """By hand: whole, cut, without a label, both; scores above and below the cap; one penalty, the larger one where
    both hold."""
    truncated, unlabelled = (
        torch.tensor(flags).repeat(2) for flags in ([False, True, False, True], [False, False, True, True])
    )
    scores = torch.tensor([2.0, 2.0, 2.0, 2.0, -3.0, -3.0, -3.0, -3.0])
    rule = incomplete_answer_rule(scores, truncated, unlabelled, 1.0, 0.5, cap=0.0)
    assert rule.tolist() == [2.0, -1.0, -0.5, -1.0, -3.0, -4.0, -3.5, -4.0]
    rule = incomplete_answer_rule(scores, truncated, unlabelled, 0.25, 2.0, cap=0.5)
    assert rule.tolist() == [2.0, 0.25, -1.5, -1.5, -3.0, -3.25, -5.0, -5.0]
    rule = incomplete_answer_rule(scores, truncated, unlabelled, 0.0, 0.0, cap=0.5)
    assert rule.tolist() == [2.0, 0.5, 0.5, 0.5, -3.0, -3.0, -3.0, -3.0]


def test_without_a_reward_model_only_the_cut_pays():
    truncated, unlabelled = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])
    scores = torch.tensor([2.0, 2.0, 2.0, -3.0])
    assert incomplete_answer_rule(scores, truncated, unlabelled, 1.0, 5.0).tolist() == [2.0, 1.0, 2.0, -4.0]


# ---- relative to the prompt's other answers -------------------------------------------------------------------------


def test_relative_scores_by_hand():
    """Two prompts of three answers: 6 - (3 + 0) / 2, and so on; a prompt whose answers score alike has nothing left."""
    scores = torch.tensor([6.0, 3.0, 0.0, 100.0, 100.0, 100.0])
    close(relative_scores(scores, 3), [4.5, 0.0, -4.5, 0.0, 0.0, 0.0])
    close(relative_scores(scores, 2), [3.0, -3.0, -100.0, 100.0, 0.0, 0.0])
    assert relative_scores(scores, 1) is scores


@given(st.integers(0, 999), st.integers(2, 5))
def test_relative_scores_forget_the_prompt(seed, answers):
    """A constant of each prompt changes nothing, they add up to 0, and nothing taken off depends on the own score."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4 * answers, generator=generator, dtype=F64).requires_grad_()
    constants = torch.randn(4, generator=generator, dtype=F64).repeat_interleave(answers)
    relative = relative_scores(scores, answers)
    close(relative_scores(scores + constants, answers), relative, atol=1e-12)
    close(relative.view(4, answers).sum(1), [0.0] * 4, atol=1e-12)
    relative[0].backward()
    close(scores.grad, [1.0] + [-1 / (answers - 1)] * (answers - 1) + [0.0] * 3 * answers, atol=1e-12)


# ---- shaping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-5.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shape_rewards_golden(dtype, x):
    """Batch G: the KL's sign, the score on EOS (not one past it), nothing on padding."""
    scores = torch.tensor([2.0, -1.0], dtype=dtype)
    rewards = shape_rewards(scores, padded(LOGP, x, dtype), padded(REF, -1.0, dtype), MASK, 0.1)
    assert rewards.dtype == dtype
    close(rewards, [[-0.01, 0.01, -0.05, 0, 2.05], [-0.03, 0.02, -1.03, 0, 0]])


def test_shape_rewards_kinds():
    """The estimator asked for is the one used."""
    k2 = [[0.005, 0.005, 0.125, 0, 0.125]]
    k3 = [[0.004837418036, 0.005170918076, 0.106530659713, 0, 0.148721270700]]
    arguments = (torch.zeros(1, dtype=F64), padded(LOGP[:1], 0.0), padded(REF[:1], 0.0), MASK[:1], -1.0)
    close(shape_rewards(*arguments, "k2"), k2, atol=1e-12)
    close(shape_rewards(*arguments, "k3"), k3, atol=1e-12)


def test_shape_rewards_rows_of_every_length():
    """A row without tokens gets nothing: index -1 would put its score in the last column."""
    mask = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    zeros = torch.zeros(3, 3)
    rewards = shape_rewards(torch.tensor([7.0, 5.0, 3.0]), zeros, zeros, mask, 0.1)
    assert rewards.tolist() == [[0, 0, 0], [5, 0, 0], [0, 0, 3]]


def test_no_kl_where_policy_is_reference():
    logp = padded(LOGP, math.nan)
    rewards = shape_rewards(torch.zeros(2, dtype=F64), logp, logp.clone(), MASK, 0.7)
    assert rewards.eq(0).all()


def test_scores_of_another_dtype():
    """The rewards have the log-probabilities' dtype, whatever a reward model or a user's function returns."""
    for scores, logprobs in [(torch.bfloat16, F64), (F64, torch.float32), (torch.long, torch.float32)]:
        zeros = torch.zeros(2, 5, dtype=logprobs)
        assert shape_rewards(torch.ones(2, dtype=scores), zeros, zeros, MASK, 0.1).dtype == logprobs


@given(st.integers(0, 999), st.floats(0, 1), st.floats(-2, 2))
def test_rewards_add_up(seed, beta, score):
    """Over a row: the score minus beta times the summed k1."""
    generator = torch.Generator().manual_seed(seed)
    logp, ref = torch.randn(2, 2, 5, generator=generator, dtype=F64)
    rewards = shape_rewards(torch.full((2,), score, dtype=F64), logp, ref, MASK, beta)
    for b, n in enumerate((5, 3)):
        expected = score - beta * sum(logp[b, t].item() - ref[b, t].item() for t in range(n))
        assert rewards[b].sum().item() == pytest.approx(expected, abs=1e-9)


def test_score_reaches_the_first_token():
    """From score to credit in one go: golden raw advantages of batch G out of its scores."""
    values = padded([[0.5, 0.4, 0.3, 0.2, 0.1], [0.1, -0.2, 0.3]], math.nan)
    scores, logp, ref = torch.tensor([2.0, -1.0], dtype=F64), padded(LOGP, math.nan), padded(REF, math.nan)
    advantages, _ = gae(shape_rewards(scores, logp, ref, MASK, 0.1), values, MASK)
    close(advantages, [[1.171675, 1.349131, 1.514875, 1.7525, 1.95], [-1.036325, -0.7435, -1.33, 0, 0]])


def test_adaptive_kl_counts_per_sequence():
    """Twice the target raises beta by the clipped 0.2 * n / horizon."""
    controller = AdaptiveKL(1.0, target=3.0, horizon=100)
    controller.update(6.0, 50)
    assert controller.value == pytest.approx(1.1)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_pairwise_loss_golden():
    """Sign, margin on the right side, and the square of the sum (not of the difference)."""
    assert pairwise_loss(CHOSEN, REJECTED).item() == pytest.approx(0.5064626126, abs=1e-9)
    assert pairwise_loss(CHOSEN, REJECTED, margin=0.5).item() == pytest.approx(0.7121189594, abs=1e-9)
    assert pairwise_loss(CHOSEN, REJECTED, center_coef=0.01).item() == pytest.approx(0.5179626126, abs=1e-9)


def test_pairwise_loss_terms():
    """Each pair's own term, centring included."""
    terms = pairwise_loss(CHOSEN, REJECTED, 0.5, 0.01, reduction="none").tolist()
    rows = zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)
    expected = [math.log1p(math.exp(-(c - r - 0.5))) + 0.01 * (c + r) ** 2 for c, r in rows]
    assert terms == pytest.approx(expected, abs=1e-12)


@given(st.floats(-50, 50))
def test_pairwise_loss_has_no_zero_of_its_own(shift):
    """Bradley-Terry is invariant to a constant; centring is what settles it."""
    plain = pairwise_loss(CHOSEN, REJECTED)
    close(pairwise_loss(CHOSEN + shift, REJECTED + shift), plain, atol=1e-9)


def test_pairwise_loss_of_equal_scores_is_log_2():
    assert pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))


def test_pairwise_loss_does_not_overflow():
    """log(sigmoid(x)) in two steps is -inf here."""
    chosen = torch.tensor([-200.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor([200.0]))
    loss.backward()
    assert loss.item() == 400 and chosen.grad.item() == -1


def test_pairwise_loss_gradcheck():
    inputs = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: pairwise_loss(c, r, 0.3, 0.05), inputs)


def test_pairwise_accuracy_counts_ties_as_half():
    """Strict > gives 0.5, >= gives 0.75."""
    assert pairwise_accuracy(CHOSEN, REJECTED).item() == 0.625
    assert pairwise_accuracy(REJECTED, CHOSEN).item() == 0.375
