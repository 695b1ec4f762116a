"""The trial of a model before a run, what it refuses, and the limits of length that are read from configurations."""

import pytest
import torch
import transformers
from families import FAMILIES, tiny_model, toy_tokenizer
from test_encoding import encoder_of
from test_rollout import naive_greedy
from toy_runs import ANSWER, run

import rllr.engine.attention
import rllr.engine.limits
import rllr.model.trial
import train_sft
from rllr.common.errors import InputError
from rllr.data.encoding import Encoder
from rllr.engine.attention import (
    attention_by,
    can_pack,
    packed_attention,
    packed_forward,
    remember_packing,
    slot_attention,
)
from rllr.engine.decoder import Decoder
from rllr.engine.limits import length_limits, windows_of
from rllr.model.backbone import width_of
from rllr.model.trial import try_model
from rllr.rollout import generate

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = [[5 + i % 40 for i in range(length)] for length in (40, 25, 6)]


def built(config_class, scale=6.0, **config):
    """A tiny random causal LM of any family, with weights that make a distribution worth comparing."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SMALL, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def gpt_neo(window):
    layers = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": window}
    return built(transformers.GPTNeoConfig, max_position_embeddings=128, **layers)


# ---- the trial -------------------------------------------------------------------------------------------------------


def test_every_tested_family_passes(family):
    model = tiny_model(family)
    before = torch.random.get_rng_state()
    try_model(model.train(), PROMPTS, 8, family)
    assert torch.equal(before, torch.random.get_rng_state()) and model.training


@pytest.mark.parametrize("kind, config, reason", [
    (transformers.RwkvConfig, {"attention_hidden_size": 32}, "nats off those of its own forward"),
    (transformers.MambaConfig, {"state_size": 8}, "MambaForCausalLM"),
    (transformers.BartConfig, {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48, "pad_token_id": 0},
     "nats off those of its own forward"),
    (transformers.OpenAIGPTConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4}, "decoding it token by token failed"),
])  # fmt: skip
def test_families_that_cannot_run(kind, config, reason):
    """Recurrent, state-space, looking at what follows, without a cache: one error with the family's name."""
    model = built(kind, **config)
    with pytest.raises(InputError, match=f"^some/model: {type(model).__name__} cannot be used: ") as error:
        try_model(model, PROMPTS, 8, "some/model")
    assert reason in str(error.value)


def test_a_window_that_no_argument_tells_of(monkeypatch):
    """GPT-Neo's local layers, which count from the end of the memory: right within the window, found out beyond it."""
    model = gpt_neo(16)
    assert length_limits(model.config)[0] == (16, "its window size of 16")
    try_model(model, [[5, 6, 7], [9] * 8], 8, "neo")
    assert generate(model, [[5, 6, 7], [9] * 8], max_new_tokens=8, eos_token_id=2, greedy=True).responses() == [
        naive_greedy(model, prompt, {2}, 8) for prompt in ([5, 6, 7], [9] * 8)
    ]
    with pytest.raises(
        InputError,
        match="neo: GPTNeoForCausalLM cannot be used: prompt and answer take 48 tokens, more than its window size of "
        "16",
    ):
        try_model(model, PROMPTS, 8, "neo")
    monkeypatch.setattr(rllr.engine.limits, "length_limits", lambda config: [])  # a configuration that does not name it
    with pytest.raises(
        InputError, match="with rows of 14 to 48 tokens side by side, its distributions are .* nats off"
    ):
        try_model(model, PROMPTS, 8, "neo")
    try_model(model, [[5, 6, 7]], 8, "neo")


def test_weights_that_are_no_numbers():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(InputError, match="nan nats off"):
        try_model(model, PROMPTS, 8, "x")


def test_the_trial_is_not_recorded(monkeypatch):
    """On a GPU decoders record their steps; a recorded step would not call the trial's stand-in for a sampler."""

    class OnGPU(Decoder):
        def __init__(self, *given, records=None, **named):
            super().__init__(*given, records=True if records is None else records, **named)

    monkeypatch.setattr(rllr.model.trial, "Decoder", OnGPU)
    try_model(tiny_model("llama"), PROMPTS, 8, "x")


def test_packing_that_is_wrong_for_this_runs_lengths_is_forbidden(monkeypatch):
    """Also for the other models of the run; without packing all is well."""
    plain = rllr.engine.attention.packed_attention

    def short_sighted(*arguments, segment_lens, **named):
        if max(segment_lens) > 20:
            segment_lens = [sum(segment_lens)]
        return plain(*arguments, segment_lens=segment_lens, **named)

    monkeypatch.setitem(rllr.engine.attention.ALL_ATTENTION_FUNCTIONS, rllr.engine.attention.PACKED, short_sighted)
    model, other, third = (tiny_model("llama") for _ in range(3))
    assert can_pack(model.base_model, 48)  # a few tokens alone do not show it
    try_model(model, PROMPTS, 8, "x", alike=[other])
    assert not can_pack(model.base_model, 9) and not can_pack(other.base_model, 48) and can_pack(third.base_model, 48)


def test_out_of_memory_is_not_called_unusable(monkeypatch):
    def starve(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rllr.model.trial, "backbone_alone", starve)
    with pytest.raises(torch.OutOfMemoryError):
        try_model(tiny_model("llama"), PROMPTS, 8, "x")


def test_a_stage_refuses_before_it_writes_anything(toy, tmp_path, capsys):
    model = built(transformers.RwkvConfig, attention_hidden_size=32, vocab_size=259)
    model.save_pretrained(tmp_path / "rwkv")
    toy_tokenizer().save_pretrained(tmp_path / "rwkv")
    with pytest.raises(SystemExit) as stop:
        run(train_sft.main, *toy.data, "--model", tmp_path / "rwkv", "--output_dir", tmp_path / "out", *ANSWER)
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert f"error: {tmp_path / 'rwkv'}: RwkvForCausalLM cannot be used: " in capsys.readouterr().err


def test_texts_are_cut_to_the_window(toy, tmp_path):
    model = tiny_model("mistral", vocab_size=259, sliding_window=40, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "mistral")
    toy_tokenizer().save_pretrained(tmp_path / "mistral")
    data = [*toy.data, "--answer_format", "label", "--max_new_tokens", 24, "--epochs", 1]
    output = run(train_sft.main, *data, "--model", tmp_path / "mistral", "--output_dir", tmp_path / "out")
    assert "texts were cut to fit the context of 40 tokens (its sliding window of 40)" in output


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, limits", [
    (transformers.LlamaConfig(max_position_embeddings=99), [99]),
    (transformers.GPT2Config(n_positions=77), [77]),
    (transformers.BloomConfig(), []),
    (transformers.MistralConfig(max_position_embeddings=99, sliding_window=32), [32, 99]),
    (transformers.MistralConfig(max_position_embeddings=99, sliding_window=None), [99]),
    (transformers.Qwen2Config(max_position_embeddings=99, sliding_window=32, use_sliding_window=False), [99]),
    (transformers.Qwen2Config(max_position_embeddings=99, sliding_window=32, use_sliding_window=True,
        max_window_layers=1), [32, 99]),
    (transformers.Gemma3TextConfig(max_position_embeddings=99, sliding_window=32), [32, 99]),
    (transformers.Gemma3Config(text_config={"max_position_embeddings": 99, "sliding_window": 32}), [32, 99]),
    (transformers.Llama4TextConfig(max_position_embeddings=99, attention_chunk_size=16), [16, 99]),
    (transformers.GPTNeoConfig(max_position_embeddings=99, window_size=24), [24, 99]),
    (transformers.GPTNeoConfig(max_position_embeddings=99, num_layers=2, attention_types=[[["global"], 2]],
        window_size=24), [99]),
])  # fmt: skip
def test_limits_of_length(config, limits):
    assert [tokens for tokens, _ in length_limits(config)] == limits


def rotary(kind, **more):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32, **more}


@pytest.mark.parametrize("kind, parameters", [
    ("longrope", rotary("longrope", short_factor=[1.0] * 4, long_factor=[3.0] * 4)), ("dynamic", rotary("dynamic")),
])  # fmt: skip
def test_rotary_embeddings_below_their_original_length(kind, parameters):
    """Phi-3.5's kind: within the original 32 tokens the answers of a naive loop, beyond it refused, texts cut to it."""
    model = tiny_model("llama", vocab_size=259, rope_parameters=parameters, max_position_embeddings=64)
    prompts = [[5, 6, 7], [9] * 20, [11, 12]]
    answers = generate(model, prompts, max_new_tokens=12, eos_token_id=2, greedy=True).responses()
    assert answers == [naive_greedy(model, prompt, {2}, 12) for prompt in prompts]
    with pytest.raises(ValueError, match=f"rotary embeddings of type {kind}"):
        generate(model, prompts, max_new_tokens=13, eos_token_id=2)
    encoder = Encoder(toy_tokenizer(), model)
    assert encoder.context == 32 and f"rotary embeddings of type {kind}" in encoder.context_reason


def test_the_tokenizers_limit_says_so():
    tokenizer = toy_tokenizer()
    tokenizer.model_max_length = 40
    assert encoder_of(tokenizer).context_reason == "the tokenizer's model_max_length"


# ---- packed attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, config", [
    (transformers.MistralConfig, {"sliding_window": 8}),
    (transformers.Qwen2Config, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    (transformers.Gemma3TextConfig, {"sliding_window": 8, "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"]}),
])  # fmt: skip
def test_a_window_is_masked_in_packed_rows(kind, config):
    """Rows longer than the window, packed, have the numbers that they have alone."""
    model = built(kind, num_key_value_heads=2, max_position_embeddings=128, **config).double()
    rows = [torch.tensor(prompt) for prompt in (PROMPTS[1], PROMPTS[2], PROMPTS[0])]
    with torch.no_grad():
        packed = packed_forward(
            model.base_model, torch.cat(rows).unsqueeze(0), [len(row) for row in rows], use_cache=False
        )[0]
        alone = torch.cat(
            [model.base_model(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0] for row in rows]
        )
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-8)
    assert can_pack(model.base_model, 40) and set(model.base_model._rllr_can_pack) == {8}


def test_a_window_that_packing_would_drop_is_found(monkeypatch):
    """Within it packing is right, beyond it the trial with a longer row says no."""
    plain = rllr.engine.attention.packed_attention
    monkeypatch.setitem(
        rllr.engine.attention.ALL_ATTENTION_FUNCTIONS, rllr.engine.attention.PACKED,
        lambda *given, sliding_window=None, **named: plain(*given, **named),
    )  # fmt: skip
    backbone = tiny_model("mistral", sliding_window=20).base_model
    assert can_pack(backbone, 20) and not can_pack(backbone, 21) and can_pack(backbone, 7)
    assert windows_of(backbone.config) == {"sliding_window": 20}


@pytest.mark.parametrize(
    "name, value",
    [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("position_bias", 1), ("is_causal", False), ("novelty", 0)],
)
def test_arguments_that_change_the_arithmetic_are_not_dropped(name, value):
    x, mask = torch.zeros(1, 4, 3, 8), torch.ones(1, 1, 1, 3, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=name):
        packed_attention(None, x, x, x, None, segment_lens=[3], **{name: value})
    with pytest.raises(NotImplementedError, match=name):
        slot_attention(None, x[:, :, :1], x, x, mask, **{name: value})
    packed_attention(None, x, x, x, None, segment_lens=[3], **{name: None}, position_ids=1, use_cache=True)


def test_a_mask_or_no_lengths_are_not_ignored():
    x = torch.zeros(1, 4, 3, 8)
    with pytest.raises(NotImplementedError, match="attention_mask"):
        packed_attention(None, x, x, x, torch.ones(1), segment_lens=[3])
    with pytest.raises(NotImplementedError, match="no segment_lens"):
        packed_attention(None, x, x, x, None)


@pytest.mark.parametrize("error", [RuntimeError, IndexError, AttributeError])
def test_whatever_packing_raises_means_no_packing(monkeypatch, error):
    """Mixtures of experts fail in ways of their own."""

    def fail(*arguments, **named):
        raise error("of this family")

    monkeypatch.setitem(rllr.engine.attention.ALL_ATTENTION_FUNCTIONS, rllr.engine.attention.PACKED, fail)
    model = tiny_model("llama")
    assert not can_pack(model.base_model)
    assert generate(model, PROMPTS, max_new_tokens=4, eos_token_id=2, greedy=True).responses() == [
        naive_greedy(model, prompt, {2}, 4) for prompt in PROMPTS
    ]


def test_forbidden_stays_forbidden():
    backbone = tiny_model("llama").base_model
    remember_packing(backbone, 9, True)
    assert backbone._rllr_can_pack == {0: True}
    remember_packing(backbone, 9, False)
    assert not can_pack(backbone) and not can_pack(backbone, 99)
    with attention_by(backbone, "eager"):
        assert backbone.config._attn_implementation == "eager"
    assert backbone.config._attn_implementation == "sdpa"


# ---- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_width_of_the_tested_families(family):
    assert width_of(tiny_model(family).base_model) == 32


def test_width_of_a_decoder_with_projections():
    """OPT-350m: embeddings and final hidden states are half as wide as the layers between them."""
    model = built(
        transformers.OPTConfig,
        ffn_dim=48,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        max_position_embeddings=128,
    )
    assert model.config.hidden_size == 32 and width_of(model.base_model) == 16
    try_model(model, PROMPTS, 8, "opt")
