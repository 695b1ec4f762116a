"""Weights cast once a rollout: the numbers of autocast to the bit, and no weight cast in a step."""

import pytest
import torch
from families import FAMILIES, tiny_model
from test_kept_decoders import MORE, Tape, move_weights, sample, taped  # noqa: F401 (a fixture)

import rllr.engine.kept
import rllr.rollout
from rllr.model.cast_once import CastWeights
from rllr.model.lora import add_adapter
from rllr.model.precision import autocast, set_precision
from rllr.model.roles import RolePolicy

CPU = torch.device("cpu")


@pytest.fixture
def bf16():
    set_precision("bf16")
    yield
    set_precision("fp32")


def role(name="one", **config):
    """A role on a frozen base, with an adapter that does something."""
    base = tiny_model("llama", **config)
    adapter = add_adapter(base, name, 4, 64)
    for seed, parameter in enumerate(adapter.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    return RolePolicy(base, name)


def without_copies(model, monkeypatch, **settings):
    """The same rollout, each weight cast by autocast itself."""
    with monkeypatch.context() as plain:
        plain.setattr(rllr.rollout, "CastWeights", lambda model, room: CastWeights(model, 0))
        return sample(model, **settings)


def weights_of(model):
    return {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_is_that_of_autocast_to_the_bit(bf16, monkeypatch, family, learns):
    model = tiny_model(family).requires_grad_(learns)
    before = weights_of(model)
    found, expected = sample(model), without_copies(model, monkeypatch)
    assert found.responses() == expected.responses()
    assert torch.equal(found.rollout_logprobs, expected.rollout_logprobs)
    assert weights_of(model) == before


def test_a_role_on_a_frozen_base_answers_as_under_autocast_to_the_bit(bf16, monkeypatch):
    policy = role()
    before = weights_of(policy.shared_model), weights_of(policy)
    found, expected = sample(policy), without_copies(policy, monkeypatch)
    assert found.responses() == expected.responses()
    assert torch.equal(found.rollout_logprobs, expected.rollout_logprobs)
    assert (weights_of(policy.shared_model), weights_of(policy)) == before


@pytest.mark.parametrize("make", [lambda: tiny_model("llama").requires_grad_(True), role])
def test_no_recorded_step_casts_a_weight(taped, bf16, monkeypatch, make):  # noqa: F811
    """Autocast would cast each of them in each step, as it may keep no copy for a step that outlives the call."""

    def casts(tape, model):
        weights = {p.data_ptr() for part in (model, getattr(model, "shared_model", model)) for p in part.parameters()}
        operations = [args[0] for operation, args, *_ in tape.operations if "_to_copy" in str(operation)]
        return sum(tensor.data_ptr() in weights for tensor in operations)

    model = make()
    sample(model, MORE[:6])
    assert [casts(tape, model) for tape in taped[-1]._graphs.values()] == [0] * len(taped[-1]._graphs) != []
    rllr.engine.kept._kept.clear()
    without_copies(model, monkeypatch, prompts=MORE[:6])
    assert all(casts(tape, model) > 10 for tape in taped[-1]._graphs.values())


def test_a_kept_decoder_reads_the_weights_of_each_call(taped, bf16):  # noqa: F811
    """The answers of a decoder that met these weights alone, and not those of the first call's copies. On tape bfloat16
    may round a token another way (with transformers 5.17 it does)."""
    model = tiny_model("llama").requires_grad_(True)
    first = sample(model)
    move_weights(model, 5)
    again = sample(model)
    assert len(taped) == 1
    rllr.engine.kept._kept.clear()
    anew = sample(model)
    same = [sum(a == b for a, b in zip(again.responses(), other.responses())) for other in (anew, first)]
    assert same[0] >= len(MORE) - 2 and same[1] < len(MORE) / 2


def test_the_head_is_cast_and_the_embeddings_that_it_shares_are_not(bf16):
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with autocast(CPU):
        weights = CastWeights(model)
        with weights.in_use(model):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.model.embed_tokens.weight.dtype == torch.float32
            assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight.bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_weights_are_back_after_an_exception(bf16):
    model = tiny_model("llama")
    before = weights_of(model)
    with autocast(CPU), pytest.raises(ZeroDivisionError), CastWeights(model).in_use(model):
        1 / 0
    assert weights_of(model) == before


def test_nothing_is_copied_without_autocast_without_room_or_where_nothing_is_float32(bf16):
    model = tiny_model("llama")
    set_precision("fp32")
    assert CastWeights(model).nbytes() == 0
    set_precision("bf16")
    with autocast(CPU):
        linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert CastWeights(model).nbytes() == CastWeights(model, 2 * linears).nbytes() == 2 * linears
        assert CastWeights(model, 2 * linears - 1).nbytes() == 0
        assert CastWeights(model.double()).nbytes() == CastWeights(model.bfloat16()).nbytes() == 0


def test_a_decoder_that_lives_on_leaves_room_for_others(taped, bf16, monkeypatch):  # noqa: F811
    """Keys, values and copies together stay within what may lie idle."""
    model = tiny_model("llama").requires_grad_(True)
    sample(model)
    ((_, decoder),) = rllr.engine.kept._kept.values()
    cache, copies = decoder.cache.nbytes(), decoder.weights.nbytes()
    assert copies > 0
    for limit, expected in ((cache + copies, copies), (cache + copies - 1, 0)):
        rllr.engine.kept._kept.clear()
        monkeypatch.setattr(rllr.engine.kept, "idle_limit", lambda device, limit=limit: limit)
        sample(model)
        ((_, decoder),) = rllr.engine.kept._kept.values()
        assert decoder.weights.nbytes() == expected
