"""RMS norms by one kernel: the numbers and gradients of the model's own, and no other module touched."""

import pytest
import torch
from families import CONFIGS, tiny_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from rllr.engine.norms import fuse_norms
from rllr.model.loading import load_policy

NORMS = {
    "llama": 5,
    "mistral": 5,
    "qwen3": 9,
    "glm": 5,
    "bloom": 0,
    "gpt2": 0,
    "deepseek_v3": 9,
}  # of two layers and the end
IDS = torch.arange(3, 33).view(3, 10)


def gemma(seed=0):
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.dim() > 1 else weight.add_(0.3 * torch.randn_like(weight))
    return model


def numbers(model):
    """Logits, and the gradients of all weights, of a loss in which no place is like another."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("family", [*CONFIGS, "gemma3"])
def test_a_model_has_the_same_numbers_with_fused_norms(family):
    models = [gemma() if family == "gemma3" else tiny_model(family) for _ in range(2)]
    assert fuse_norms(models[0]) == (NORMS | {"gemma3": 13})[family]
    for ours, theirs in zip(*map(numbers, models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_norm_takes_fewer_operations():
    counted = []
    for fuse in (False, True):
        model = tiny_model("llama")
        if fuse:
            fuse_norms(model)
        with torch.profiler.profile() as profile:
            model(input_ids=IDS)
        counted.append([event.key for event in profile.key_averages()])
    assert "aten::rms_norm" not in counted[0] and "aten::rms_norm" in counted[1]


class SquareRMSNorm(nn.Module):
    """Called a norm, computes something else."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.square()


class FullRMSNorm(SquareRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + 1e-9 * self.bias


class GatedRMSNorm(SquareRMSNorm):
    def forward(self, x, gate=None):
        x = x if gate is None else x * gate
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def test_what_computes_something_else_stays_as_it_is():
    assert fuse_norms(nn.Sequential(SquareRMSNorm(), FullRMSNorm(), nn.LayerNorm(8))) == 0


def test_a_second_argument_is_left_to_the_module():
    norm, x = GatedRMSNorm(), torch.randn(2, 8)
    expected = norm(x), norm(x, 2 * x.abs())
    assert fuse_norms(norm) == 1
    for ours, theirs in zip((norm(x), norm(x, 2 * x.abs())), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("x_dtype, weight_dtype", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16",) * 2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_dtypes_come_out_as_the_module_has_them(family, x_dtype, weight_dtype):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(getattr(torch, x_dtype))
    norms = [
        (gemma() if family == "gemma3" else tiny_model(family)).model.norm.to(getattr(torch, weight_dtype))
        for _ in "ab"
    ]
    fuse_norms(norms[0])
    found, expected = norms[0](x), norms[1](x)
    exact = (x_dtype, weight_dtype) != ("bfloat16",) * 2 or family == "gemma3"
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-2)


def test_norms_are_fused_once_and_under_autocast_keep_their_dtype():
    models = [tiny_model("llama") for _ in range(2)]
    assert fuse_norms(models[0]) == 5 and fuse_norms(models[0]) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (model.model(input_ids=IDS).last_hidden_state for model in models)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_the_kernel_gets_bf16_as_it_is(monkeypatch):
    """Autocast would cast it to float32 first, and the result back."""
    norm, plain, given = tiny_model("llama").model.norm.bfloat16(), functional.rms_norm, []
    fuse_norms(norm)

    def noted(x, *more):
        given.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return plain(x, *more)

    monkeypatch.setattr(functional, "rms_norm", noted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
        norm.float()(torch.randn(2, 32))
    assert given == [(torch.bfloat16, False), (torch.float32, True)]


def test_on_a_cpu_a_loaded_model_has_its_own_norms(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert fuse_norms(load_policy(tmp_path)) == 5
