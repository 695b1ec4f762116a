"""Gradients and scores do not depend on the split into micro-batches (float64: what is left is rounding)."""

import math
from types import SimpleNamespace

import pytest
import torch
from families import EOS, tiny_model
from torch.nn import functional as F

import rllr.update
from rllr.layout import Packed, micro_batches, pack_sequences
from rllr.logprobs import sft_loss, token_logprobs
from rllr.model.heads import RewardModel, ValueModel
from rllr.ppo import policy_loss, value_loss
from rllr.rm_pairs import PairRow
from rllr.rollout import generate
from rllr.run.optimizer import Optimizer
from rllr.update import Batch, _losses, analyse, improve
from train_rm import rm_loss

SPLITS = (1, 3, -20, 0)  # rows; negative: tokens; 0: all in one
FAKE_ENCODER = SimpleNamespace(pad_id=None)


def policy_model():
    return tiny_model("llama", dtype=torch.float64)


def random_rows(count, answers, seed=0):
    """(prompt, answer, ...) with lengths that all differ."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, 61, (length,), generator=draw).tolist()

    return [(ids(1, 9), *[[*ids(1, 9), EOS] for _ in range(answers)]) for _ in range(count)]


def gradients(*models):
    found = [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]
    for model in models:
        model.zero_grad(set_to_none=True)
    return torch.cat([grad.flatten() for grad in found])


def cut(rows, lengths, size):
    """Micro-batches of `size` rows, or, where it is negative, of that many tokens."""
    return micro_batches(rows, lengths, max(size, 0), max(-size, 0))


def assert_split_invariant(run):
    """`run(size)` -> (loss, gradient) with micro-batches as `cut` makes them."""
    expected_loss, expected = run(0)
    assert expected.abs().max() > 1e-3
    for size in SPLITS[:-1]:
        loss, gradient = run(size)
        assert loss == pytest.approx(expected_loss, abs=1e-9)
        assert (gradient - expected).abs().max() < 1e-9 * expected.abs().max()


def test_sft_gradient_does_not_depend_on_the_split():
    model, rows = policy_model(), random_rows(8, 1)
    tokens = sum(len(answer) for _, answer in rows)

    def run(size):
        total = 0.0
        for part in cut(rows, [len(prompt) + len(answer) for prompt, answer in rows], size):
            loss = sft_loss(model, part, tokens, FAKE_ENCODER)
            loss.backward()
            total += loss.item()
        return total, gradients(model)

    assert_split_invariant(run)
    nll = 0.0
    with torch.no_grad():
        for prompt, answer in rows:  # the mean over tokens, not over rows
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            nll += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    assert run(0)[0] == pytest.approx(nll / tokens, rel=1e-9)


@pytest.mark.parametrize("loss_name", ["eos", "span"])
def test_rm_gradient_does_not_depend_on_the_split(loss_name):
    model = RewardModel.from_policy(policy_model())
    rows = [(*row, "a name") for row in random_rows(8, 2)]
    rows[0] = (rows[0][0], [5, 6, 7, EOS], [5, 6, 8, EOS], "a name")  # differ late
    rows[1] = (rows[1][0], [5, 6, EOS], [5, 6, EOS, EOS], "a name")  # one is the other's beginning
    rows = [PairRow(*row) for row in rows]
    config = SimpleNamespace(loss=loss_name, margin=0.3, center_coef=0.01)

    def run(size):
        total = 0.0
        for part in cut(rows, [sum(map(len, row[:3])) for row in rows], size):
            loss = rm_loss(model, part, len(rows), FAKE_ENCODER, config)
            loss.backward()
            total += loss.item()
        return total, gradients(model)

    assert_split_invariant(run)
    expected = 0.0
    for prompt, chosen, rejected, _ in rows:
        scores = []
        for answer in (chosen, rejected):
            with torch.no_grad():
                hidden = model.backbone(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) :]
            scores.append(model.head(hidden).squeeze(1).tolist())
        short = min(len(chosen), len(rejected))
        places = [(len(chosen) - 1, len(rejected) - 1)]
        if loss_name == "span":
            first = [a != b for a, b in zip(chosen, rejected)]
            first = first.index(True) if True in first else short - 1
            places = [(t, t) for t in range(first, short)]
        terms = []
        for a, b in places:
            c, r = scores[0][a], scores[1][b]
            terms.append(math.log1p(math.exp(-(c - r - 0.3))) + 0.01 * (c + r) ** 2)
        expected += sum(terms) / len(terms) / len(rows)
    assert run(0)[0] == pytest.approx(expected, rel=1e-9)


def ppo_config(**more):
    return SimpleNamespace(
        **{"temperature": 0.7, "clip": 0.2, "value_clip": 0.2, "max_grad_norm": 1.0, "precision": "fp32",
           "max_update_kl": None, "micro_batch_size": 0, "tokens_per_batch": 0} | more
    )  # fmt: skip


def learning(policy, value_model):
    """The models as `improve` takes them, each with an optimiser."""
    optimizers = [Optimizer(model, 1e-3, 10) for model in (policy, value_model)]
    return SimpleNamespace(
        policy=policy, value_model=value_model, policy_optimizer=optimizers[0], value_optimizer=optimizers[1]
    )


def scored_batch(policy, value_model, rows, config):
    """A batch with old log-probabilities and values some way off, so that both clips act on some tokens."""
    draw = torch.Generator().manual_seed(1)
    packed = pack_sequences(*zip(*rows))
    mask = packed[2]

    def noise(scale):
        return (scale * torch.randn(mask.shape, generator=draw, dtype=torch.float64)).masked_fill(~mask, 0.0)

    with torch.no_grad():
        logprobs = token_logprobs(policy, *packed, config.temperature) + noise(0.2)
        values = value_model(*packed) + noise(0.3)
    rollout = SimpleNamespace(packed=packed, response_mask=mask)
    return Batch(rollout, [], logprobs, logprobs, values, noise(0), advantages=noise(1.0), returns=noise(1.0))


def test_ppo_gradients_do_not_depend_on_the_split():
    policy, value_model, config = policy_model(), ValueModel.from_policy(policy_model()), ppo_config()
    batch = scored_batch(policy, value_model, random_rows(12, 1), config)
    minibatch = [11, 2, 5, 0, 7, 9, 4, 3]  # of a rollout of twelve
    models = SimpleNamespace(policy=policy, value_model=value_model)
    tokens = batch.response_mask[minibatch].sum()

    def run(size):
        totals = {}
        for rows in cut(minibatch, batch.packed.lengths[minibatch].tolist(), size):
            for name, value in _losses(models, batch, rows, tokens, config).items():
                assert not value.requires_grad
                totals[name] = totals.get(name, 0.0) + value.item()
        both = totals["policy_loss"] + 1000 * totals["value_loss"]
        return both, gradients(policy, value_model), totals

    assert_split_invariant(lambda size: run(size)[:2])
    whole, parts = run(0)[2], run(3)[2]
    for name in ("clipfrac", "value_clipfrac", "approx_kl", "ratio_mean", "ratio_error_mean"):
        assert 0 < parts[name] == pytest.approx(whole[name], abs=1e-12)
    # The whole minibatch at once by the equations, over the minibatch's own tokens.
    packed = Packed(*(tensor[minibatch] for tensor in batch.packed))
    mask = packed[2]
    new = token_logprobs(policy, *packed, config.temperature)
    loss, _ = policy_loss(new, batch.logprobs[minibatch], batch.advantages[minibatch], mask)
    critic, _ = value_loss(value_model(*packed), batch.values[minibatch], batch.returns[minibatch], mask)
    assert whole["policy_loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert whole["value_loss"] == pytest.approx(critic.item(), rel=1e-9)
    (loss + critic).backward()
    assert (gradients(policy, value_model) - run(3)[1]).abs().max() < 1e-9


def test_a_whole_update_does_not_depend_on_the_split(monkeypatch):
    """Two epochs of two minibatches: the same weights, and a ratio of 1 at first, for every split."""
    largest = []

    def watched(*args):
        part = _losses(*args)
        largest.append(part["ratio_max"].item())
        return part

    monkeypatch.setattr(rllr.update, "_losses", watched)
    plan = [[[0, 5, 2, 7], [1, 3, 4, 6]], [[6, 5, 4, 3], [2, 1, 0, 7]]]
    start, weights, statistics = policy_model(), [], []
    for size in (0, 1, 2, -12):
        policy, value_model = policy_model(), ValueModel.from_policy(policy_model())
        config = ppo_config(**({"tokens_per_batch": -size} if size < 0 else {"micro_batch_size": size}))
        batch = scored_batch(policy, value_model, random_rows(8, 1), config)
        batch.logprobs = token_logprobs(policy, *batch.packed, config.temperature).detach()
        stats = improve(learning(policy, value_model), batch, plan, config)
        stats = {name.removeprefix("improve/"): value for name, value in stats.items()}
        assert stats["first_ratio_error"] < 1e-12 and stats["approx_kl"] > 1e-4  # of the later minibatches
        assert stats["ratio_mean"] == pytest.approx(1, abs=0.1) and stats["ratio_max"] > stats["ratio_mean"]
        parts = 4 * (4 // size if size else 1)
        assert stats["ratio_max"] == max(largest) and (len(largest) == parts if size >= 0 else 4 < len(largest) < 16)
        largest.clear()
        statistics.append({name: float(value) for name, value in stats.items()})
        weights.append(torch.cat([p.detach().flatten() for m in (policy, value_model) for p in m.parameters()]))
    unchanged = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert (weights[0][: len(unchanged)] - unchanged).abs().max() > 1e-3
    for other, stats in zip(weights[1:], statistics[1:]):
        assert (other - weights[0]).abs().max() < 1e-6
        assert stats == pytest.approx(statistics[0], abs=1e-6)


def test_scoring_does_not_depend_on_the_split():
    policy, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    value_model = ValueModel(tiny_model("llama", seed=2).base_model)
    prompts = [[3 + i] * (1 + i % 4) for i in range(7)]
    rollout = generate(
        policy, prompts, max_new_tokens=6, eos_token_id=list(range(30)), generator=torch.Generator().manual_seed(0)
    )
    assert len(set(rollout.response_lens.tolist())) > 2
    packed = rollout.packed
    for size in SPLITS:
        config = ppo_config(**({"tokens_per_batch": -size} if size < 0 else {"micro_batch_size": size}))
        models = SimpleNamespace(policy=policy, reference=reference, value_model=value_model)
        batch = analyse(models, rollout, [[[6, 1, 3, 5], [0, 2, 4]]], config)
        with torch.no_grad():
            assert torch.allclose(batch.logprobs, token_logprobs(policy, *packed, 0.7), atol=1e-4)
            assert torch.allclose(batch.ref_logprobs, token_logprobs(reference, *packed, 0.7), atol=1e-4)
            assert torch.allclose(batch.values, value_model(*packed), atol=1e-4)
        assert (batch.entropy > 0).equal(batch.response_mask) and not batch.logprobs.requires_grad
