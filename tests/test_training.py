"""What the scripts share, and the promise that no split into micro-batches changes a gradient."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from families import EOS, tiny_model, toy_tokenizer
from torch.nn import functional as F

import rllr.common.log
import rllr.run.machine
import rllr.update
from rllr.common.errors import InputError, RunError
from rllr.common.files import RECORD
from rllr.common.log import Clock
from rllr.data.encoding import Encoder
from rllr.data.splits import DataConfig, inherit
from rllr.layout import Packed, micro_batches, pack, pack_sequences, shuffled_batches
from rllr.logprobs import token_logprobs
from rllr.model.heads import RewardModel, ValueModel
from rllr.model.loading import load_policy, load_tokenizer
from rllr.model.records import check_same_task, make_record, read_record, resolve_task, save_policy, task_of_record
from rllr.ppo import policy_loss, value_loss
from rllr.rollout import generate
from rllr.run.machine import set_up
from rllr.run.optimizer import Optimizer, gradient_step, require_finite
from rllr.tasks import TASKS, Task
from rllr.update import Batch, _losses, analyse, improve
from train_rm import PairRow, rm_loss
from train_sft import sft_loss

OWN = Task("own", ("x", "y"), "{text} {instruction}", metric="macro_f1", answer_format="label")


# ---- records and tasks


def test_a_saved_policy_comes_back(tmp_path):
    model, tokenizer = tiny_model("llama", vocab_size=262), toy_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    encoder = Encoder(tokenizer, model)
    record = make_record(
        "sft", OWN, DataConfig(task="own.yaml", labelled=7), tmp_path, tiny=True, eval={"accuracy": 0.5}
    )
    save_policy(model, encoder, tmp_path / "a" / "b", record)
    loaded = load_policy(tmp_path / "a" / "b")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert Encoder(load_tokenizer(tmp_path / "a" / "b"), loaded).stop_ids == [7, 9, EOS]  # with the one that is taught
    again = read_record(tmp_path / "a" / "b")
    assert again == json.loads(json.dumps(record)) and task_of_record(again) == OWN
    assert again["data"] == asdict(DataConfig(task="own.yaml", labelled=7)) and again["tiny"] is True
    encoder.stop_ids = [EOS]
    save_policy(model, encoder, tmp_path / "one", {})
    assert json.loads((tmp_path / "one" / "generation_config.json").read_text())["eos_token_id"] == EOS


def test_records_that_are_not_there_or_damaged(tmp_path):
    assert read_record(tmp_path) == read_record("organisation/model") == {} and task_of_record({}) is None
    task = asdict(OWN)
    for content, words in (
        ("{", "not valid JSON"),
        ("[]", "not a record of rllr"),
        ('{"data": 3}', "not a record of rllr"),
        (json.dumps({"task": {k: v for k, v in task.items() if k != "labels"}}), "not a record of rllr"),
        (json.dumps({"task": task | {"other": 1}}), "not a record of rllr"),
        (json.dumps({"task": "sst2"}), "not a record of rllr"),
    ):
        (tmp_path / RECORD).write_text(content)
        with pytest.raises(InputError, match=f"^{tmp_path / RECORD}: {words}"):
            read_record(tmp_path)


def test_resolve_task():
    record = json.loads(json.dumps(make_record("sft", OWN, DataConfig(task="tasks/own.yaml"), "d")))
    for name in (None, "own", "tasks/own.yaml"):  # a later stage needs no --task, and not the file either
        assert resolve_task(DataConfig(task=name), record, "d") == OWN
    assert resolve_task(DataConfig(answer_format="rationale"), record, "d").answer_format == "rationale"
    assert resolve_task(DataConfig(task="mrpc"), record, "d") == TASKS["mrpc"]
    assert (
        resolve_task(DataConfig(), {}, "d") == TASKS["demo"]
        and resolve_task(DataConfig(), {}, "d", "mr") == TASKS["mr"]
    )
    assert resolve_task(DataConfig(task="sst2", answer_format="label"), {}, "d").answer_format == "label"
    assert resolve_task(DataConfig(), {"task": asdict(OWN)}, "d") == OWN  # a record without data settings
    with pytest.raises(InputError, match="--task 'tasks/other'"):
        resolve_task(DataConfig(task="tasks/other"), record, "d")


def test_check_same_task():
    record = make_record("sft", OWN, DataConfig(), "d")
    check_same_task({}, TASKS["mr"], "--policy x")
    check_same_task(record, Task("renamed", OWN.labels, OWN.prompt), "--policy x")
    for other in (Task("own", ("x", "z"), OWN.prompt), Task("own", OWN.labels, "{text}?")):
        with pytest.raises(InputError, match=r"^--policy x: was trained on task 'own' \(labels x, y\), not on 'own'"):
            check_same_task(record, other, "--policy x")


def test_inherit_fills_what_is_not_given_and_names_contradictions():
    record = {"data": asdict(DataConfig(task="sst2", train_file="a.jsonl", labelled=100, data_seed=0, held_out=0.2))}
    config = DataConfig(train_file="b.jsonl", labelled=100, eval_file="e.jsonl")
    assert inherit(config, record, "runs/sft") == []  # files are compared by what they hold
    assert config == DataConfig(
        task="sst2", train_file="b.jsonl", eval_file="e.jsonl", labelled=100, data_seed=0, held_out=0.2
    )
    assert config.inherited == dict.fromkeys(("task", "data_seed", "held_out"), "runs/sft/rllr.json")
    assert inherit(DataConfig(labelled=3), record, "d") == ["--labelled 3 (the policy was trained with 100)"]
    assert inherit(DataConfig(labelled=3), {}, "d") == []


# ---- the clock


def test_clock(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(rllr.common.log.time, "monotonic", lambda: next(now))
    clock = Clock()
    for name in ("rollout", "score", "rollout"):
        with clock(name):
            pass
    assert clock.take() == {"time/rollout": 2.5, "time/score": 3.0} and clock.take() == {}


# ---- optimisation


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

    loss, norm = gradient_step(optimizer, [[1.0, 2.0], [5.0], [4.0]], loss_of)
    assert (loss, float(norm)) == (2 * 12 / 4, 3.0) and model.weight.item() == 2.0 - 3.0
    before = model.weight.item()
    with pytest.raises(RunError, match=r"^the loss of b is nan \(prompt b\)"):
        gradient_step(
            optimizer, [[1.0], [math.nan]], loss_of, "the loss of b", lambda rows: ["b" if rows != [1.0] else "a"]
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


# ---- batches


def length_rows(count):
    return [([i] * (1 + (7 * i) % 40), [i]) for i in range(count)]


def test_shuffled_batches_hold_every_row_once():
    rows = length_rows(101)
    batches = shuffled_batches(rows, 8, seed=0, epoch=0)
    assert sorted(row[1][0] for batch in batches for row in batch) == list(range(101))
    assert sorted(map(len, batches)) == [5] + [8] * 12
    assert [len(b) for b in shuffled_batches(length_rows(3), 8, 0, 0)] == [3]
    many = shuffled_batches(length_rows(300), 4, 0, 0)  # in more than one pool
    assert sorted(row[1][0] for batch in many for row in batch) == list(range(300)) and len(many) == 75


def test_shuffled_batches_hang_on_seed_and_epoch_alone():
    rows = length_rows(101)
    first = shuffled_batches(rows, 8, seed=1, epoch=2)
    torch.manual_seed(3)
    assert shuffled_batches(rows, 8, seed=1, epoch=2) == first
    assert shuffled_batches(rows, 8, seed=2, epoch=2) != first != shuffled_batches(rows, 8, seed=1, epoch=3)
    epochs = (first, shuffled_batches(rows, 8, seed=1, epoch=3))
    neighbours = [{frozenset(row[1][0] for row in batch) for batch in batches} for batches in epochs]
    assert neighbours[0] != neighbours[1]  # not only another order of the batches


def test_batches_hold_rows_of_similar_length_in_random_order():
    batches = shuffled_batches(length_rows(128), 8, 0, 0)
    widths = [max(len(row[0]) for row in batch) for batch in batches]
    assert sum(8 * width - sum(len(row[0]) for row in batch) for batch, width in zip(batches, widths)) < 200
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_micro_batches_and_pack():
    rows = [([1], [2]), ([3, 4], [5, 6]), ([7], [8, 9, 10])]
    lengths = [2, 4, 4]
    assert micro_batches(rows, lengths) == [rows] and micro_batches(rows, lengths, 2) == [rows[:2], rows[2:]]
    assert micro_batches(rows, lengths, 3) == micro_batches(rows, lengths, 9) == [rows]
    sequences, prompt_lens, mask = pack(rows, 0, "cpu")
    assert sequences.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert prompt_lens.tolist() == [1, 2, 1] and mask.sum(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("size, tokens, expected", [
    (0, 100, ["ebdac"]), (0, 14, ["eb", "da", "c"]), (0, 13, ["e", "bd", "ac"]), (0, 3, list("ebdac")),
    (2, 100, ["eb", "da", "c"]),
    (1, 14, list("ebdac")), (0, 20, ["eb", "dac"]),
])  # fmt: skip
def test_micro_batches_by_tokens(size, tokens, expected):
    """Longest first (ties in their order): the padded size is the first row's length times the rows."""
    assert ["".join(part) for part in micro_batches("abcde", [5, 6, 4, 6, 7], size, tokens)] == expected


# ---- whatever the split into micro-batches, the gradient is the same (float64: what is left is rounding)

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


# ---- --deterministic


def test_deterministic_algorithms_and_a_fixed_number_of_slots(monkeypatch):
    """What a GPU needs to repeat itself: deterministic kernels, and as many answers at a time whatever memory is
    free."""
    from rllr.rollout import slots_within

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=None, hidden_size=64, head_dim=None, num_hidden_layers=2
    )
    model = SimpleNamespace(device=torch.device("cuda"), config=config, parameters=lambda: iter([torch.zeros(1)]))
    per_answer = 2 * 2 * 4 * 16 * 10 * 4  # keys and values, layers, heads, head size, columns, bytes
    try:
        counts = []
        for free in (8, 40):
            monkeypatch.setattr(
                torch.cuda, "mem_get_info", lambda device, free=free: (free * per_answer, 80 * per_answer)
            )
            counts.append(slots_within(None, model, 10))
            set_up("fp32", 0, deterministic=True)
            counts.append(slots_within(None, model, 10))
            assert (
                torch.are_deterministic_algorithms_enabled()
                and rllr.run.machine.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            )
            torch.use_deterministic_algorithms(False)
        assert counts == [4, 20, 20, 20]
    finally:
        torch.use_deterministic_algorithms(False)
