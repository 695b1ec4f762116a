"""The engine's pieces on their own: the product by oneDNN, packed attention. (The decoder: test_rollout.py.)"""

import pytest
import torch
from families import FAMILIES, tiny_model
from torch import nn

import rllr.engine.linear
import rllr.model.backbone
import rllr.model.loading
from rllr.common.errors import InputError
from rllr.engine.attention import can_pack, packed_forward
from rllr.engine.linear import OneDnnLinear, PackedLinear, _has_layout_for, fast_linears, packed_linears
from rllr.layout import pack_sequences
from rllr.logprobs import token_logprobs
from rllr.model.recompute import checkpoint_layers

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN product")


# ---- the product -----------------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 24), (3, 20, 24), (2, 24)])
def test_the_product_and_its_gradients_are_those_of_a_linear_layer(monkeypatch, bias, shape):
    """Every gradient apart, so a frozen weight or input is met as well."""
    monkeypatch.setattr(rllr.engine.linear, "products_are_slow", lambda: True)
    torch.manual_seed(0)
    layer, x, target = nn.Linear(24, 10, bias=bias), torch.randn(shape), torch.randn(*shape[:-1], 10)
    for trained in ("input", "weight", "all"):
        results = []
        for fast in (False, True):
            given = x.clone().requires_grad_(trained in ("input", "all"))
            layer.requires_grad_(trained in ("weight", "all")).zero_grad()
            if fast:
                with fast_linears(layer):
                    assert isinstance(layer, OneDnnLinear)
                    out = layer(given)
            else:
                out = layer(given)
            assert type(layer) is nn.Linear
            (out * target).sum().backward()
            results.append([out.detach(), given.grad, *(p.grad for p in layer.parameters())])
        for plain, fast in zip(*results):
            assert (plain is None) == (fast is None)
            if plain is not None:
                torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_layers_come_back_also_after_an_exception(monkeypatch):
    monkeypatch.setattr(rllr.engine.linear, "products_are_slow", lambda: True)
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(KeyError):
        with fast_linears(layer):
            assert [type(part) for part in layer] == [OneDnnLinear, OneDnnLinear]
            raise KeyError
    assert [type(part) for part in layer] == [nn.Linear, nn.Linear]


def test_other_precisions_are_left_alone(monkeypatch):
    monkeypatch.setattr(rllr.engine.linear, "products_are_slow", lambda: True)
    for dtype in (torch.bfloat16, torch.float64):
        layer, x = nn.Linear(24, 10, dtype=dtype), torch.randn(40, 24, dtype=dtype)
        expected = layer(x)
        with fast_linears(layer):
            assert torch.equal(layer(x), expected)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_product_of_packed_weights_is_that_of_a_linear_layer(monkeypatch, bias, dtype, tolerance):
    """For few rows and many; afterwards the layer is what it was, after an exception too."""
    monkeypatch.setattr(rllr.engine.linear, "products_are_slow", lambda: True)
    torch.manual_seed(0)
    layer = nn.Linear(24, 10, bias=bias, dtype=dtype)
    for shape in ((1, 24), (3, 20, 24), (600, 24)):
        x = torch.randn(shape, dtype=dtype)
        expected = layer(x)
        with torch.no_grad(), packed_linears(layer):
            assert isinstance(layer, PackedLinear) == _has_layout_for(dtype)
            torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = layer(x)
            with packed_linears(layer):
                torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(KeyError), packed_linears(layer):
        raise KeyError
    assert type(layer) is nn.Linear and set(vars(layer)) == set(vars(nn.Linear(1, 1)))


@needs_onednn
def test_a_processor_without_bf16_products_goes_without_them(monkeypatch):
    """AVX2 alone: oneDNN refuses bfloat16 there, so such layers, and float32 ones under autocast, stay what they
    are."""
    monkeypatch.setattr(rllr.engine.linear, "products_are_slow", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    half, single = nn.Linear(24, 10, dtype=torch.bfloat16), nn.Linear(24, 10)
    with packed_linears(half), packed_linears(single):
        assert (type(half), type(single)) == (nn.Linear, PackedLinear)
    with torch.autocast("cpu", torch.bfloat16), packed_linears(single):
        assert type(single) is nn.Linear


@needs_onednn
def test_weights_that_would_take_much_memory_are_not_copied(monkeypatch):
    monkeypatch.setattr(rllr.engine.linear, "products_are_slow", lambda: True)
    monkeypatch.setattr(rllr.engine.linear, "PACKED_BYTES", 2 * 24 * 10 * 4 - 1)
    layers = nn.Sequential(nn.Linear(24, 10), nn.Linear(24, 10))
    with packed_linears(layers):
        assert [type(layer) for layer in layers] == [OneDnnLinear, OneDnnLinear]
    with packed_linears(layers[0]):
        assert type(layers[0]) is PackedLinear


# ---- packed rows -----------------------------------------------------------------------------------------------------


def test_which_families_pack():
    """Bloom's alibi would be wrong in silence; the trial on the model itself finds out."""
    packs = {family: can_pack(tiny_model(family).base_model) for family in FAMILIES}
    assert packs == {family: family != "bloom" for family in FAMILIES}
    assert not can_pack(tiny_model("llama", attn_implementation="eager").base_model)


def test_the_trial_finds_a_model_whose_packed_numbers_differ(monkeypatch):
    """Positions that do not start again with each sequence."""
    plain = rllr.engine.attention.packed_attention
    monkeypatch.setitem(
        rllr.engine.attention.ALL_ATTENTION_FUNCTIONS, rllr.engine.attention.PACKED,
        lambda *a, segment_lens, **k: plain(*a, segment_lens=[sum(segment_lens)], **k),
    )  # fmt: skip
    assert not can_pack(tiny_model("llama").base_model)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_packed_rows_have_the_numbers_and_gradients_of_padded_ones(monkeypatch, family):
    """Each sequence by a forward of its own, and the gradient of all weights."""
    model = tiny_model(family, dtype=torch.float64)
    prompts, responses = [[5, 6, 7], [9], [11, 12, 13, 14, 15]], [[8, 2], [10, 11, 12, 13, 2], [2]]
    batch = pack_sequences(prompts, responses)
    hidden = packed_forward(
        model.base_model,
        torch.tensor([sum((p + r for p, r in zip(prompts, responses)), [])]),
        [5, 6, 6],
        use_cache=False,
    )
    alone = [model.base_model(input_ids=torch.tensor([p + r])).last_hidden_state[0] for p, r in zip(prompts, responses)]
    torch.testing.assert_close(hidden[0], torch.cat(alone), rtol=0, atol=1e-10)
    results = []
    for below in (0.0, 1.1):  # never packed, always packed
        monkeypatch.setattr(rllr.model.backbone, "PACK_BELOW", below)
        model.zero_grad()
        logprobs = token_logprobs(model, *batch, 0.7)
        (logprobs * torch.arange(15).view(3, 5)).sum().backward()
        results.append(
            (logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    torch.testing.assert_close(*[r[0] for r in results], rtol=0, atol=1e-10)
    torch.testing.assert_close(*[r[1] for r in results], rtol=0, atol=1e-8)
    assert results[0][1].abs().max() > 0.1


def test_attention_and_training_mode_come_back_after_packing():
    model = tiny_model("llama").train()
    before = model.config._attn_implementation
    assert can_pack(model.base_model) and model.training
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError):
        packed_forward(model.base_model, torch.tensor([[5, 6, 7]]), [9], use_cache=False)
    assert model.config._attn_implementation == before


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def test_checkpointed_layers_are_computed_again_in_backward(family):
    """Same gradients; each layer's attention runs once more in backward, and not at all more without gradients."""
    model = tiny_model(family, dtype=torch.float64)
    batch = pack_sequences([[5, 6, 7], [9]], [[8, 2], [10, 11, 12, 2]])
    calls, gradients = [], []
    norms = [m for name, m in model.base_model.named_modules() if name.endswith(("input_layernorm", "ln_1"))]
    for norm in norms:
        norm.register_forward_hook(lambda *_: calls.append(1))
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(model.base_model)
            checkpoint_layers(model.base_model)  # asked twice, done once
        model.zero_grad()
        token_logprobs(model, *batch).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        calls.append("end")
    assert calls == [1] * len(norms) + ["end"] + [1] * 2 * len(norms) + ["end"]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    calls.clear()
    with torch.no_grad():
        token_logprobs(model, *batch)
    assert len(calls) == len(norms)


@pytest.mark.parametrize(
    "family, window", [(family, None) for family in FAMILIES if family != "bloom"] + [("mistral", 4)]
)
def test_checkpointed_layers_of_packed_rows(monkeypatch, family, window):
    """Texts of unequal length on a CPU: the layer that backward computes again attends within each row, too, and
    within its window. Gradients of all weights as without checkpointing."""
    monkeypatch.setattr(rllr.model.backbone, "PACK_BELOW", 1.1)
    model = tiny_model(family, dtype=torch.float64, **({"sliding_window": window} if window else {}))
    batch = pack_sequences([[5, 6, 7], [9], [11, 12, 13, 14, 15]], [[8, 2], [10, 11, 12, 13, 2], [2]])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(model.base_model)
        model.zero_grad()
        token_logprobs(model, *batch).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert can_pack(model.base_model, 6)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(InputError, match="--gradient_checkpointing: Linear has no layers"):
        checkpoint_layers(nn.Linear(2, 2))
