"""Decoders that live on between calls: what they compute is what a new one computes, for weights as they are now.

The stand-in for a CUDA graph is a tape: the operations of a step with the very tensors and numbers that they got, done
again on the same memory. So a number that changes from call to call, weights that were cast or have moved, and state
that a call leaves behind show here as they would on a GPU.
"""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from families import tiny_model
from test_rollout import PROMPTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import rllr.engine.decoder
import rllr.engine.kept
import rllr.rollout
from rllr.engine.graphs import StepGraphs
from rllr.logprobs import token_logprobs
from rllr.model.lora import add_adapter, use_adapter
from rllr.model.precision import set_precision
from rllr.model.roles import RolePolicy
from rllr.rollout import bytes_per_slot, generate

MORE = PROMPTS + [[row + 20] * (1 + row % 7) for row in range(9)]
STOPS = list(range(2, 12))


class Tape(TorchDispatchMode):
    """Notes every operation with its arguments and what it returned."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, found))
        return found

    def replay(self):
        for operation, args, kwargs, before in self.operations:
            for old, new in zip(tree_flatten(before)[0], tree_flatten(operation(*args, **kwargs))[0]):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapedGraphs(StepGraphs):
    made: list = []

    def __init__(self):
        super().__init__()
        self.recorded, self.prompts, self.decoder = [], [], None
        TapedGraphs.made.append(self)

    def record(self, step, rows, width):
        decoder = step.__self__
        memory = [m for layer in decoder.cache.layers for m in (layer.keys, layer.values)]
        state = [*decoder._per_slot(), *memory]
        before = [x.clone() for x in state]
        with Tape() as tape:
            step(rows, width)
        for x, old in zip(state, before):
            x.copy_(old)
        (self.recorded if step.__name__ == "_step" else self.prompts).append((rows, width))
        return tape


@pytest.fixture
def taped(monkeypatch):
    """`generate` as on a GPU, steps on tape; the graphs of every decoder that is made."""
    monkeypatch.setattr(rllr.engine.decoder, "records_steps", lambda device: True)
    monkeypatch.setattr(rllr.engine.decoder, "StepGraphs", TapedGraphs)
    monkeypatch.setattr(rllr.rollout, "STEPS_PER_LOOK", {"cpu": 3})
    monkeypatch.setattr(rllr.rollout, "packed_linears", nullcontext)  # a CPU's copies of the weights, made in each call
    monkeypatch.setattr(TapedGraphs, "made", [])
    yield TapedGraphs.made
    rllr.engine.kept._kept.clear()


def sample(model, prompts=MORE, seed=0, **settings):
    draw = torch.Generator().manual_seed(seed)
    settings = {"max_new_tokens": 12, "batch_size": 6} | settings
    return generate(model, prompts, eos_token_id=STOPS, generator=draw, **settings)


def anew(model, *args, monkeypatch, **settings):
    """The same call by a decoder of its own, without recorded steps."""
    with monkeypatch.context() as plain:
        plain.setattr(rllr.engine.decoder, "records_steps", lambda device: False)
        return sample(model, *args, **settings)


def assert_same(found, expected):
    assert found.responses() == expected.responses()
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=2e-6)


def move_weights(model, seed):
    """Change all weights in place, as an optimiser does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))


def test_one_decoder_serves_many_calls_with_changing_weights_prompts_and_seeds(taped, monkeypatch):
    model = tiny_model("llama")
    for call in range(4):
        prompts = MORE[call:] + MORE[:call]
        assert_same(sample(model, prompts, call), anew(model, prompts, call, monkeypatch=monkeypatch))
        move_weights(model, call)
    assert len(taped) == 1
    assert len(taped[0].recorded) == len(set(taped[0].recorded)) < 5  # each shape once, in the first calls
    assert len(taped[0].prompts) == len(set(taped[0].prompts)) and (6, 16) in taped[0].prompts


def test_prompts_of_a_shape_are_recorded_when_they_come_the_third_time(taped, monkeypatch):
    """Other prompts of other lengths, weights that move; not many shapes; none where the GPU has no room."""
    model = tiny_model("llama")
    for call in range(5):
        prompts = [prompt[call % 2 :] or [7] for prompt in MORE[:6]]
        assert_same(sample(model, prompts, call), anew(model, prompts, call, monkeypatch=monkeypatch))
        assert taped[0].prompts == [(6, 16)] * (call > 1)
        move_weights(model, call)
    monkeypatch.setattr(rllr.engine.decoder, "MOST", 1)
    for _ in range(4):
        sample(model, [[9] * 20] * 6)
    assert len(taped) == 1 and taped[0].prompts == [(6, 16)]
    rllr.engine.kept._kept.clear()
    monkeypatch.setattr(rllr.engine.decoder, "has_room", lambda device: False)
    for _ in range(4):
        sample(model, MORE[:6])
    assert len(taped) == 2 and not taped[1].prompts and taped[1].recorded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_steps_of_a_kept_decoder_see_weights_that_changed_in_place(taped, monkeypatch, precision):
    """Under autocast PyTorch casts a weight once and keeps the copy, which a recorded step would read for ever."""
    model = tiny_model("llama").requires_grad_(True)
    set_precision(precision)
    try:
        sample(model), sample(model)
        move_weights(model, 5)
        found, expected = sample(model, greedy=False), anew(model, monkeypatch=monkeypatch)
    finally:
        set_precision("fp32")
    assert len(taped) == 1
    same = [a == b for a, b in zip(found.responses(), expected.responses())]
    assert all(same) if precision == "fp32" else sum(same) >= len(same) - 2  # bf16 rounds by shape


def test_under_autocast_keys_lie_as_attention_casts_them(taped):
    """Rotary embeddings leave them in float32; each step would cast the whole cache."""
    model = tiny_model("llama").requires_grad_(True)
    full = bytes_per_slot(model, 128)
    set_precision("bf16")
    try:
        rollout = sample(model)
        ((_, decoder),) = rllr.engine.kept._kept.values()
        slots = len(decoder.slot_ids)
        assert decoder.cache.nbytes() == slots * bytes_per_slot(model, len(decoder.columns))
        assert bytes_per_slot(model, 128) == full / 2 == 2 * 2 * 2 * 8 * 128 * 2  # keys and values, layers, heads, wide
        scored = token_logprobs(model, *rollout.packed).detach()
    finally:
        set_precision("fp32")
    assert {memory.dtype for layer in decoder.cache.layers for memory in (layer.keys, layer.values)} == {torch.bfloat16}
    assert (rollout.rollout_logprobs - scored)[rollout.response_mask].abs().mean() < 0.1


def test_a_step_makes_its_mask_once_and_not_in_every_layer(taped):
    """Of a bool mask each layer would make a bias of its own."""
    counts = []
    for layers in (1, 3):
        sample(tiny_model("llama", num_hidden_layers=layers))
        operations = [str(operation) for operation, *_ in next(iter(taped[-1]._graphs.values())).operations]
        counts.append(sum("where" in name or "masked_fill" in name for name in operations))
    assert counts[0] == counts[1] > 0


def test_under_autocast_no_layer_casts_the_mask(taped):
    """Queries are float32 after rotary embeddings, attention computes in bfloat16: the mask comes in that."""
    set_precision("bf16")
    try:
        sample(tiny_model("llama"), MORE[:6])
    finally:
        set_precision("fp32")
    for (_, rows, width), tape in taped[-1]._graphs.items():
        casts = [args[0].shape for operation, args, *_ in tape.operations if "_to_copy" in str(operation)]
        assert casts and not [shape for shape in casts if tuple(shape) == (rows, 1, 1, width)]


def test_bytes_of_a_slot_are_known_of_a_role_without_weights_of_its_own():
    """The reference of a reward model with adapters; on a GPU its slots are counted."""
    base = tiny_model("llama")
    add_adapter(base, "one", 4, 64)
    assert bytes_per_slot(RolePolicy(base, None), 10) == bytes_per_slot(base, 10) == 2 * 2 * 2 * 8 * 10 * 4


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5}, {"greedy": True}, {"max_new_tokens": 5}, {"batch_size": 5},
        {"prompts": [[9] * 150, *MORE]},  # longer than there are columns
    ],
)  # fmt: skip
def test_a_call_that_asks_for_another_thing_gets_a_decoder_of_its_own(taped, monkeypatch, change):
    model = tiny_model("llama", max_position_embeddings=256)
    sample(model), sample(model)
    assert_same(sample(model, **change), anew(model, **change, monkeypatch=monkeypatch))
    assert len(taped) == 2


def test_other_stop_ids_are_another_thing(taped):
    model = tiny_model("llama")
    sample(model), sample(model)
    draw = torch.Generator().manual_seed(0)
    found = generate(model, MORE, max_new_tokens=12, batch_size=6, eos_token_id=[3], generator=draw)
    assert len(taped) == 2 and all(3 not in response[:-1] for response in found.responses())


def test_weights_that_lie_elsewhere_are_another_thing(taped, monkeypatch):
    """Recorded steps would read the old memory."""
    model = tiny_model("llama")
    sample(model), sample(model)
    model.lm_head.weight.data = 1.5 * model.lm_head.weight.data
    assert_same(sample(model), anew(model, monkeypatch=monkeypatch))
    assert len(taped) == 2


def test_a_shorter_call_computes_what_it_would_without_the_longer_one_before(taped):
    model = tiny_model("llama", max_position_embeddings=1024)
    shorter, longer = ([[token] * length for token in range(20, 26)] for length in (270, 600))
    alone = sample(model, shorter, 1)
    rllr.engine.kept._kept.clear()
    sample(model, longer, 0)
    after = sample(model, shorter, 1)
    assert len(taped) == 2  # the longer call's decoder served the shorter one
    assert after.responses() == alone.responses()
    assert torch.equal(after.rollout_logprobs, alone.rollout_logprobs)
    # 384 columns, as many as it has, where the longer call's would be 512
    steps, more_steps = ({width for name, _, width in graphs._seen if name == "_step"} for graphs in taped)
    assert steps == {384} and more_steps == {384, 640}


def test_nothing_of_a_call_is_left_a_nan_least_of_all(taped, monkeypatch):
    model = tiny_model("llama")
    sample(model), sample(model)
    ((_, decoder),) = rllr.engine.kept._kept.values()
    for layer in decoder.cache.layers:
        layer.keys.fill_(float("nan")), layer.values.fill_(float("nan"))
    decoder.ended.fill_(True), decoder.counts.fill_(7)
    assert_same(sample(model), anew(model, monkeypatch=monkeypatch))
    assert len(taped) == 1


def test_a_call_that_fails_keeps_no_decoder(taped, monkeypatch):
    model = tiny_model("llama")
    sample(model)
    with monkeypatch.context() as broken:
        broken.setattr(rllr.engine.decoder.Decoder, "harvest", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(model)
    assert len(rllr.engine.kept._kept) == 0
    sample(model)
    assert len(taped) == 2


def test_a_decoder_goes_with_its_model(taped):
    model = tiny_model("llama")
    sample(model)
    ((_, decoder),) = rllr.engine.kept._kept.values()
    gone = weakref.ref(decoder)
    del model, decoder
    taped.clear()
    gc.collect()
    assert gone() is None and len(rllr.engine.kept._kept) == 0


def test_a_cache_that_is_too_large_to_lie_idle_is_given_back(taped, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(rllr.engine.kept, "idle_limit", lambda device: 1000)
    sample(model), sample(model)
    assert len(taped) == 2 and len(rllr.engine.kept._kept) == 0


def test_within_a_callers_own_autocast_nothing_is_kept(taped):
    model = tiny_model("llama").requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(model), sample(model)
    assert len(taped) == 2 and len(rllr.engine.kept._kept) == 0


def test_on_a_cpu_every_call_has_a_decoder_of_its_own():
    model = tiny_model("llama")
    sample(model)
    assert len(rllr.engine.kept._kept) == 0


def test_a_call_that_keeps_nothing_gives_up_what_was_kept(taped, monkeypatch):
    """Its memory was counted as free for this call."""
    model = tiny_model("llama")
    sample(model)
    assert rllr.engine.kept.idle_bytes(model) > 0
    monkeypatch.setattr(rllr.engine.kept, "idle_limit", lambda device: 0)
    sample(model)
    assert len(taped) == 2 and rllr.engine.kept.idle_bytes(model) == 0


def test_under_inference_mode_nothing_is_kept(taped):
    """Its tensors cannot be changed in place later."""
    model = tiny_model("llama")
    with torch.inference_mode():
        sample(model)
    sample(model)
    assert len(taped) == 2 and len(rllr.engine.kept._kept) == 1


def test_where_adapters_are_switched_by_hand_nothing_is_kept(taped, monkeypatch):
    model = tiny_model("llama")
    for seed, name in enumerate("ab"):
        adapter = add_adapter(model, name, 4, 64, seed=seed)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    answers = []
    for name in "ab":
        with use_adapter(model, name):
            answers.append(sample(model, greedy=True).responses())
            assert answers[-1] == anew(model, greedy=True, monkeypatch=monkeypatch).responses()
    assert answers[0] != answers[1] and len(rllr.engine.kept._kept) == 0


def test_there_are_no_more_columns_than_the_model_has_positions(taped):
    model = tiny_model("llama", max_position_embeddings=64)
    sample(model)
    ((_, decoder),) = rllr.engine.kept._kept.values()
    assert len(decoder.columns) == 64
    assert [rllr.engine.kept.rounded(length) for length in (1, 128, 129)] == [128, 128, 256]
