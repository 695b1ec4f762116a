"""AdamW, schedule, clipping, one gradient step, what must be finite."""

import math

import pytest
import torch

from rllr.common.errors import RunError
from rllr.run.optimizer import Optimizer, gradient_step, require_finite


def learning_rates(steps, taken, **options):
    model = torch.nn.Linear(2, 2)
    optimizer = Optimizer(model, 0.1, steps, **options)
    rates = []
    for _ in range(taken):
        rates.append(optimizer.learning_rate / 0.1)
        optimizer.step()
    return rates


def test_schedules():
    assert learning_rates(4, 6) == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])  # linear, without a warm-up
    warm = {"warmup": 0.2}
    assert learning_rates(10, 11, **warm) == pytest.approx([0.5, 1, 1, *[i / 8 for i in range(7, -1, -1)]])
    cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert learning_rates(10, 12, schedule="cosine", **warm) == pytest.approx([0.5, 1, *cosine, 0])
    assert learning_rates(10, 12, schedule="constant", **warm) == pytest.approx([0.5] + [1] * 11)
    assert learning_rates(1, 2, warmup=1.0) == pytest.approx([1, 1])  # nothing but warm-up
    assert learning_rates(4, 4, warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1])


def test_weight_decay_spares_biases_norms_and_what_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    model[2].weight.requires_grad_(False)
    optimizer = Optimizer(model, 0.1, 10, weight_decay=0.5)
    groups = {group["weight_decay"]: [id(p) for p in group["params"]] for group in optimizer.adamw.param_groups}
    assert groups[0.5] == [id(model[0].weight)]
    assert groups[0.0] == [id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)]


def test_adamw_by_hand():
    """Two steps of decoupled weight decay and bias-corrected moments (arXiv:1711.05101, algorithm 2), under a linear
    schedule."""
    model = torch.nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(0.5), model.bias.fill_(-0.25)
    optimizer = Optimizer(model, 0.1, 4, weight_decay=0.5)
    weights, m, v = {"weight": 0.5, "bias": -0.25}, {"weight": 0.0, "bias": 0.0}, {"weight": 0.0, "bias": 0.0}
    for t, rate in ((1, 0.1), (2, 0.075)):
        for name, gradient in (("weight", 0.3 * t), ("bias", -2.0 + t)):
            getattr(model, name).grad = torch.full_like(getattr(model, name), gradient)
            m[name], v[name] = 0.9 * m[name] + 0.1 * gradient, 0.999 * v[name] + 0.001 * gradient**2
            decay = 0.5 if name == "weight" else 0.0
            weights[name] *= 1 - rate * decay
            weights[name] -= rate * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)) ** 0.5 + 1e-8)
        optimizer.step()
    assert model.weight.item() == pytest.approx(weights["weight"], abs=1e-12)
    assert model.bias.item() == pytest.approx(weights["bias"], abs=1e-12) and model.bias.grad is None


def test_the_gradient_is_clipped_and_its_norm_before_is_returned():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0)
    model.weight.grad = torch.tensor([[-6.0]])
    optimizer = Optimizer(model, 1.0, 2, max_grad_norm=1.5)
    optimizer.adamw = torch.optim.SGD(model.parameters(), lr=1.0)  # whose step shows the gradient itself
    optimizer.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda step: 0.5**step)
    assert float(optimizer.clip_gradient()) == 6
    optimizer.step()
    assert float(model.weight) == pytest.approx(1.5, rel=1e-5) and model.weight.grad is None
    assert optimizer.learning_rate == 0.5
    model.weight.grad = torch.tensor([[-1.0]])
    assert float(optimizer.clip_gradient()) == 1  # below the limit: as it is
    optimizer.step()
    assert float(model.weight) == pytest.approx(2.0, rel=1e-5)
    model.weight.grad = torch.tensor([[math.nan]])
    with pytest.raises(RunError, match="^the gradient's norm is nan; stopped before the update"):
        optimizer.clip_gradient()


def test_a_gradient_step_adds_up_its_micro_batches():
    """w = 2; the loss of a batch x is sum(w x) / 4: gradient sum(x) / 4, by plain SGD at rate 1 unless it is
    clipped."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = Optimizer(model, 1.0, 10, max_grad_norm=100.0)
    optimizer.adamw = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda step: 1.0)

    def loss_of(rows):
        return (model.weight * torch.tensor(rows, dtype=torch.float64)).sum() / 4

    loss, norm = gradient_step(optimizer, [([1.0, 2.0], 1.0), ([5.0], 1.0), ([7.0], 0.0), ([4.0], 1.0)], loss_of)
    assert (loss, float(norm)) == (2 * 12 / 4, 3.0) and model.weight.item() == 2.0 - 3.0
    before = model.weight.item()
    with pytest.raises(RunError, match=r"^the loss of b is nan \(prompt b\)"):
        gradient_step(
            optimizer,
            [([1.0], 1.0), ([math.nan], 1.0)],
            loss_of,
            "the loss of b",
            lambda rows: ["b" if rows != [1.0] else "a"],
        )
    assert model.weight.item() == before


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_is_not_finite_stops_the_run_and_is_named(value, shown):
    require_finite(torch.tensor(3.0), "the loss", ["a"])
    require_finite(torch.ones(2, 3), "the score", ["a", "b"])
    with pytest.raises(RunError, match=f"^the loss is {shown}; stopped before the update.$"):
        require_finite(torch.tensor(value), "the loss")
    with pytest.raises(RunError, match=rf"^the loss is {shown} \(prompts a, b, c, d, e, ... of 7\); stopped"):
        require_finite(torch.tensor(value), "the loss", list("abcdefg"))
    with pytest.raises(RunError, match=rf"^the score is {shown} \(prompt b\); stopped"):
        require_finite(torch.tensor([1.0, value, 2.0]), "the score", ["a", "b", "c"])
    rows = torch.zeros(3, 4)
    rows[0, 3] = rows[2, 1] = value
    with pytest.raises(RunError, match=rf"^the values is {shown} \(prompts a, c\); stopped"):
        require_finite(rows, "the values", ["a", "b", "c"])
