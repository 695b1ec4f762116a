"""Recorded passes of whole sequences, as far as a CPU can tell: their numbers and gradients, shapes, weights, streams.

PyTorch's own `make_graphed_callables` runs here; in place of a CUDA graph there is a tape: the operations that were
recorded, with the very tensors and numbers that they got, done again on the same memory. So Python that a replay does
not run, weights that were cast or have moved, gradients that share memory, and looks at the device show as they would
on a GPU. tests/test_gpu.py records for real.
"""

import contextlib
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import tiny_model
from test_graphs import NoLooks, recordable  # noqa: F401
from test_kept_decoders import Tape, move_weights
from torch import nn
from toy_runs import read_metrics, toy_runs

import rllr.engine.graphs as graphs
import rllr.model.passes as passes
from rllr.common import ranks
from rllr.layout import pack_sequences
from rllr.logprobs import token_logprobs, token_logprobs_and_entropy
from rllr.model.backbone import backbone_of
from rllr.model.dropout import set_dropout
from rllr.model.heads import RewardModel, ValueModel
from rllr.model.lora import add_adapter
from rllr.model.precision import set_precision
from rllr.model.recompute import checkpoint_layers
from rllr.model.roles import RoleBackbone, RolePolicy
from rllr.run.machine import wants_cuda_graphs
from rllr.run.optimizer import Optimizer, gradient_step


class TapedGraph:
    """In place of torch.cuda.CUDAGraph. What is noted of it for the tests does not keep it."""

    made: list = []

    def __init__(self):
        self.tape, self.noted = Tape(), SimpleNamespace(replays=0, operations=[])
        TapedGraph.made.append(self.noted)

    def replay(self):
        self.noted.replays += 1
        self.tape.replay()


@contextlib.contextmanager
def taping(graph, pool=None, **settings):
    """In place of torch.cuda.graph. What is computed while recording is lost, as it is on a GPU."""
    with pytest.MonkeyPatch.context() as capturing, NoLooks(), graph.tape:
        capturing.setattr(transformers.utils.import_utils, "is_cuda_stream_capturing", lambda: True)
        yield
    graph.noted.operations += [str(operation) for operation, *_ in graph.tape.operations]
    for _, _, _, found in graph.tape.operations:
        for tensor in torch.utils._pytree.tree_leaves(found):
            owns = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor._base is None
            if owns and not any(tensor.data_ptr() == given for given in graph.tape.given()):
                tensor.data.fill_(float("nan"))


@pytest.fixture
def recorded(monkeypatch):
    """Passes as on a GPU, on tape; what is noted of the graphs that were made."""

    def given(tape):  # where the inputs are: tensors that an operation took and none had made
        made = {t.data_ptr() for *_, found in tape.operations for t in leaves(found)}
        return {t.data_ptr() for _, args, kwargs, _ in tape.operations for t in leaves((args, kwargs))} - made

    def leaves(tree):
        return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]

    monkeypatch.setattr(Tape, "given", given, raising=False)
    monkeypatch.setattr(TapedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", TapedGraph)
    monkeypatch.setattr(torch.cuda, "graph", taping)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(passes, "records_passes", lambda device: True)
    return TapedGraph.made


def packed(rows=4, width=13, seed=0, vocabulary=61):
    """Rows of mixed length; the longest has `width` tokens, six of them the answer."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [width - 6 - row % 5 for row in range(rows)]
    prompts = [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in lengths]
    answers = [torch.randint(3, vocabulary, (6,), generator=draw).tolist() for _ in range(rows)]
    return pack_sequences(prompts, answers)


def train(model, batches, learning_rate=0.01):
    """Steps of two micro-batches each. Returns what was seen: log-probabilities, and the gradients of the last step."""
    optimizer, seen = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate), []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        for part in (batch.rows([0, 1]), batch.rows([2, 3])):
            logprobs = token_logprobs(model, *part)
            logprobs.sum().backward()
            seen.append(logprobs.detach().clone())
            del logprobs  # a graph that is still there keeps a pass from being recorded
        optimizer.step()
    return seen, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plainly(function, *arguments):
    """What a function gives without recorded passes."""
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(passes, "records_passes", lambda device: False)
        return function(*arguments)


def assert_close(found, expected, atol=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)


# ---- numbers and gradients -------------------------------------------------------------------------------------------


def test_training_by_recorded_passes_is_training(recordable, recorded):  # noqa: F811
    """Values and summed gradients of two micro-batches a step, weights that change in place, six steps, two shapes."""
    model = recordable
    batches = [packed(width=width, seed=width) for width in (13, 13, 30, 13, 30, 13)]
    twin = tiny_model(model.config.model_type).requires_grad_(True)
    model.requires_grad_(True)
    seen, gradients = train(model, batches)
    expected, expected_gradients = plainly(train, twin, batches)
    assert_close(seen, expected)
    assert_close(gradients, expected_gradients, atol=1e-3)
    assert_close(model.parameters(), twin.parameters())
    assert len(recorded) == 4 and all(graph.replays > 1 for graph in recorded)  # forward and backward of two shapes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_scoring_sees_weights_that_changed_in_place(recorded, precision):
    model = tiny_model("llama").requires_grad_(True)
    set_precision(precision)
    try:
        for call in range(6):
            batch = packed(seed=call)
            found = token_logprobs_and_entropy(model, *batch)
            expected = plainly(token_logprobs_and_entropy, model, *batch)
            assert_close(found, expected, atol=1e-5 if precision == "fp32" else 0.3)
            move_weights(model, call)
    finally:
        set_precision("fp32")
    assert recorded[0].replays > 3
    assert len(vars(backbone_of(model))["_rllr_passes"].recorded) == 1


def test_under_autocast_weights_are_cast_at_every_use(recorded):
    """A cast weight that a pass kept would be that of the recording: here weights move far."""
    model = tiny_model("llama").requires_grad_(True)
    set_precision("bf16")
    try:
        for _ in range(5):
            found = token_logprobs(model, *packed())
        with torch.no_grad():
            backbone_of(model).layers[1].mlp.down_proj.weight.neg_()
        moved, expected = token_logprobs(model, *packed()), plainly(token_logprobs, model, *packed())
    finally:
        set_precision("fp32")
    assert (moved - found).abs().max() > 1 and (moved - expected).abs().max() < 0.3


def test_heads_read_recorded_passes(recorded):
    for kind in (RewardModel, ValueModel):
        model = kind.from_policy(tiny_model("llama").requires_grad_(True))
        nn.init.normal_(model.head.weight)
        for call in range(5):
            batch = packed(seed=call)
            assert_close([model(*batch).detach()], [plainly(model, *batch).detach()])
    assert len(recorded) == 4 and recorded[0].replays == recorded[2].replays == 4  # with the comparison


def test_roles_on_one_base_have_passes_of_their_own(recorded):
    base = tiny_model("llama").requires_grad_(False)
    for seed, name in enumerate(("policy", "value")):
        adapter = add_adapter(base, name, 4, 64, seed=seed)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
    policy, reference, value = (
        RolePolicy(base, "policy"),
        RolePolicy(base, None),
        ValueModel(RoleBackbone(base, "value")),
    )
    optimizers = [Optimizer(policy, 1e-2, 100), Optimizer(value, 1e-2, 100)]
    for call in range(6):
        batch = packed(seed=call)
        with torch.no_grad():
            assert_close([token_logprobs(reference, *batch)], [plainly(token_logprobs, reference, *batch)])
        for model, loss, optimizer in zip(
            (policy, value), (lambda m, *b: token_logprobs(m, *b).sum(), lambda m, *b: m(*b).square().sum()), optimizers
        ):
            plainly(lambda m=model, f=loss: f(m, *batch).backward())
            expected = [p.grad.clone() for p in optimizer.parameters]
            optimizer.clear_gradient()
            loss(model, *batch).backward()
            assert_close([p.grad for p in optimizer.parameters], expected, atol=1e-3)
            optimizer.step()
    assert len(recorded) == 6 and all(graph.replays > 2 for graph in recorded[2:])
    assert recorded[1].replays == 0  # the reference's backward


def test_a_pass_waits_for_the_backward_of_the_one_before(recorded):
    """Two forwards, then two backwards: the second forward must not write over what the first one's backward reads."""
    model, twin = (tiny_model("llama").requires_grad_(True) for _ in range(2))
    for _ in range(4):
        token_logprobs(model, *packed()).sum().backward()
    model.zero_grad()

    def both(m):
        first, second = token_logprobs(m, *packed(seed=1)), token_logprobs(m, *packed(seed=2))
        with torch.no_grad():
            token_logprobs(m, *packed(seed=3))
        (first.sum() - 2 * second.sum()).backward()
        return [p.grad for p in m.parameters()]

    before = recorded[0].replays
    assert_close(both(model), plainly(both, twin), atol=1e-3)
    assert recorded[0].replays == before + 1


def test_nothing_is_recorded_while_the_graph_of_a_plain_pass_is_still_there(recorded):
    """Its nodes add gradients up on the stream of that pass, and a recording must not touch another stream."""
    model = tiny_model("llama").requires_grad_(True)
    for _ in range(5):
        loss = token_logprobs(model, *packed()).sum()
        loss.backward()
    assert not recorded
    del loss
    for _ in range(2):
        token_logprobs(model, *packed()).sum().backward()
    assert len(recorded) == 2 and recorded[0].replays == 3  # with the comparison


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_stage_records_while_it_adds_up_micro_batches(recorded, parts):
    """`gradient_step` lets go of each micro-batch's graph before the next one."""
    model = tiny_model("llama").requires_grad_(True)
    optimizer = Optimizer(model, 1e-3, 10)
    for step in range(4):
        micro_batches = [(packed(seed=part), 1.0) for part in range(parts)]
        gradient_step(optimizer, micro_batches, lambda part: token_logprobs(model, *part).sum())
        assert bool(recorded) == ((step + 1) * parts > 2)


def test_a_pass_whose_result_is_thrown_away_is_not_waited_for(recorded):
    model = tiny_model("llama").requires_grad_(True)
    for _ in range(6):
        token_logprobs(model, *packed())
    assert recorded[0].replays == 5  # with the comparison


def test_dropout_draws_what_it_would_draw_before_it_was_recorded(recorded, monkeypatch):
    """A resumed run records anew, so recording must not move the random stream."""
    model = set_dropout(tiny_model("llama").requires_grad_(True), 0.3).train()
    twin = set_dropout(tiny_model("llama").requires_grad_(True), 0.3).train()
    batches = [packed(rows=4, width=16, seed=seed) for seed in range(5)]

    def run(m):
        torch.manual_seed(3)
        return train(m, batches)[0], torch.rand(1)

    found, drawn = run(model)
    monkeypatch.setattr(passes, "MOST", 0)
    expected, expected_draw = run(twin)
    assert torch.equal(drawn, expected_draw)
    assert_close(found, expected)
    assert len(recorded) == 2 and recorded[0].replays > 3


# ---- when passes are recorded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, width, limit, shape",
    [
        (1, 5, None, (1, 16)), (8, 16, None, (8, 16)), (9, 17, None, (9, 32)), (17, 100, None, (18, 112)),
        (31, 128, None, (32, 128)), (33, 129, None, (36, 144)), (64, 250, None, (64, 256)),
        (100, 300, None, (104, 320)), (64, 1000, None, (64, 1024)), (2, 50, 60, (2, 60)), (2, 70, 60, (2, 80)),
    ],
)  # fmt: skip
def test_few_shapes(rows, width, limit, shape):
    assert passes.padded_shape(rows, width, limit) == shape


def test_a_shape_is_recorded_when_it_comes_the_third_time_and_not_more_than_some(recorded, monkeypatch):
    monkeypatch.setattr(passes, "MOST", 2)
    model = tiny_model("llama")
    for width in (13, 30, 45):
        for call in range(5):
            with torch.no_grad():
                token_logprobs(model, *packed(width=width))
            assert len(vars(backbone_of(model))["_rllr_passes"].recorded) == (
                [0, 0, 1, 1, 1] if width == 13 else [1, 1, 2, 2, 2] if width == 30 else [2] * 5
            )[call]  # fmt: skip


def test_with_gradients_or_training_it_is_another_pass(recorded):
    model = tiny_model("llama").requires_grad_(True)
    for mode in (True, False):
        model.train(mode)
        for _ in range(4):
            token_logprobs(model, *packed()).sum().backward()
            token_logprobs_and_entropy(model, *packed())
    assert len(vars(backbone_of(model))["_rllr_passes"].recorded) == 4


def test_passes_are_recorded_anew_where_dropout_changes(recorded):
    model = set_dropout(tiny_model("llama").requires_grad_(True), 0.0).train()
    for _ in range(4):
        found = token_logprobs(model, *packed()).detach()
    set_dropout(model, 0.5)
    drawn = [token_logprobs(model, *packed()).detach() for _ in range(4)]
    assert len(recorded) == 4 and all((one - found).abs().max() > 0.1 for one in drawn)
    assert (drawn[2] - drawn[3]).abs().max() > 0.1


def test_weights_that_lie_elsewhere_or_no_longer_learn_are_recorded_anew(recorded):
    model = tiny_model("llama").requires_grad_(True)
    layer = backbone_of(model).layers[0].mlp.up_proj

    def run():
        for _ in range(4):
            model.zero_grad()
            token_logprobs(model, *packed()).sum().backward()
        found = token_logprobs(model, *packed()).detach()
        assert_close([found], [plainly(token_logprobs, model, *packed()).detach()])

    run()
    layer.weight.data = -layer.weight.data
    run()
    layer.weight.requires_grad_(False)
    run()
    assert layer.weight.grad is None and len(recorded) == 6


def large(model, monkeypatch):
    monkeypatch.setattr(graphs, "WORTH", 1000)


def without_room(model, monkeypatch):
    """Asking costs the allocator's cache, so it is asked once."""
    answers = iter([False])
    monkeypatch.setattr(passes, "has_room", lambda device: next(answers))


def checkpointed(model, monkeypatch):
    token_logprobs(model, *packed())  # passes that there were already
    checkpoint_layers(backbone_of(model))


def switched_by_hand(model, monkeypatch):
    token_logprobs(model, *packed())
    add_adapter(model, "one", 4, 64)


def sharded(model, monkeypatch):
    backbone_of(model).rllr_shards = []


@pytest.mark.parametrize("how", [large, without_room, checkpointed, switched_by_hand, sharded])
def test_passes_that_are_not_recorded(recorded, monkeypatch, how):
    model = tiny_model("llama").requires_grad_(True)
    how(model, monkeypatch)
    for _ in range(5):
        found = token_logprobs(model, *packed()).detach()
    assert not recorded
    assert_close([found], [plainly(token_logprobs, model, *packed()).detach()])


def test_within_a_callers_own_autocast_nothing_is_recorded(recorded):
    model = tiny_model("llama").requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(5):
            token_logprobs(model, *packed())
    assert not recorded


def test_without_the_flag_or_a_gpu_nothing_is_recorded():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    passes.set_recording(False)
    assert not passes.records_passes(cuda)
    passes.set_recording(True)
    try:
        assert passes.records_passes(cuda) and not passes.records_passes(cpu)
    finally:
        passes.set_recording(False)


@pytest.mark.parametrize("fault", ["cannot be recorded", "other numbers"])
def test_a_pass_that_fails_or_gives_other_numbers_is_dropped(recorded, monkeypatch, fault):
    """One warning, no second attempt, the same numbers."""
    model, attempts = tiny_model("llama").requires_grad_(True), []

    def make(forward, sample, **options):
        attempts.append(sample)
        if fault == "cannot be recorded":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda ids: 1.1 * forward(ids)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    words = {"cannot be recorded": "not permitted when stream is capturing$", "other numbers": "off by 0.1 of"}[fault]
    with pytest.warns(UserWarning, match=f"--cuda_graphs is off for LlamaModel: .*{words}") as caught:
        for _ in range(6):
            found = token_logprobs(model, *packed()).detach()
    assert len(attempts) == 1 and len([w for w in caught if "cuda_graphs" in str(w.message)]) == 1
    assert_close([found.detach()], [plainly(token_logprobs, model, *packed()).detach()])


def test_a_recorded_pass_builds_no_mask(recorded):
    """transformers builds one while a GPU records, so that attention would be another one than before."""
    model = tiny_model("llama")
    for _ in range(4):
        token_logprobs_and_entropy(model, *packed())
    names = recorded[0].operations
    assert any("attention" in name for name in names) and not any("cumsum" in name for name in names)


def test_recorded_passes_go_with_their_model(recorded):
    model = tiny_model("llama").requires_grad_(True)
    for _ in range(4):
        token_logprobs(model, *packed()).sum().backward()
    gone = weakref.ref(backbone_of(model))
    del model
    gc.collect()
    assert gone() is None


def test_nothing_is_said_where_all_is_well(recorded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model("llama").requires_grad_(True)
        for _ in range(4):
            token_logprobs(model, *packed()).sum().backward()


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--lora_rank", 4, "--minibatches", 2, "--micro_batch_size", 2]])
def test_ppo_by_recorded_passes_is_ppo(recorded, monkeypatch, tmp_path, flags):
    """Which it is by default; with --cuda_graphs never nothing is recorded."""
    monkeypatch.setattr(passes, "records_passes", lambda device: passes._current["recorded"])
    toy = toy_runs()
    settings = [*flags, "--label_rm", toy.label_rm, "--ppo_epochs", 3]
    toy.ppo(tmp_path / "graphs", *settings, steps=3)
    assert sum(graph.replays for graph in recorded) > 20
    replays = sum(graph.replays for graph in recorded)
    toy.ppo(tmp_path / "plain", *settings, "--cuda_graphs", "never", steps=3)
    assert sum(graph.replays for graph in recorded) == replays
    names = (
        "judge/score",
        "analyse/kl_sequence",
        "improve/policy_loss",
        "improve/value_loss",
        "improve/grad_norm_value",
    )
    found, expected = (read_metrics(tmp_path / name, *names) for name in ("graphs", "plain"))
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=2e-3, abs=2e-5)


def test_a_run_records_unless_it_must_not(monkeypatch):
    def wanted(**settings):
        return wants_cuda_graphs(SimpleNamespace(**{"cuda_graphs": "auto", "deterministic": False} | settings))

    assert wanted() and not wanted(cuda_graphs="never") and not wanted(deterministic=True)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert not wanted()
