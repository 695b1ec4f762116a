"""Model directories as people have them: multimodal, other formats, half fetched, quantised, without a tokenizer."""

import json

import pytest
import torch
import transformers
from families import tiny_model, toy_tokenizer
from test_trial import PROMPTS, built

from rllr.common.errors import InputError
from rllr.model.heads import RewardModel
from rllr.model.loading import load_policy, load_tokenizer
from rllr.model.trial import try_model
from rllr.rollout import generate

TEXT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture
def saved(tmp_path):
    """A sound model's directory, to be spoilt."""
    tiny_model("llama", vocab_size=259).save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def why(load, path):
    with pytest.raises(InputError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- multimodal models -----------------------------------------------------------------------------------------------


def gemma3(**more):
    text = {**TEXT, "sliding_window": 64}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
        **more,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llama4():
    text = {
        **TEXT,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 64,
        "interleave_moe_layer_step": 2,
    }
    return transformers.Llama4ForConditionalGeneration(transformers.Llama4Config(
        text_config=text, vision_config={**VISION, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16, "num_channels": 3},
        image_token_index=60, boi_token_index=58, eoi_token_index=59,
    ))  # fmt: skip


def gemma3_untied():
    """The head's own weights; the text part's configuration says nothing of it."""
    return gemma3(tie_word_embeddings=False)


@pytest.mark.parametrize(
    "make, kind", [(gemma3, "Gemma3ForCausalLM"), (gemma3_untied, "Gemma3ForCausalLM"), (llama4, "Llama4ForCausalLM")]
)
def test_a_multimodal_model_gives_its_text_part(tmp_path, make, kind):
    """The same logits as the whole model has for text; saved and loaded as a plain causal LM; a reward model on it."""
    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path / "whole")
    model = load_policy(tmp_path / "whole")
    assert type(model).__name__ == kind
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        expected = (whole.language_model if make is llama4 else whole)(
            input_ids=ids
        ).logits  # Llama 4's own forward wants an image
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / "text")
        torch.testing.assert_close(load_policy(tmp_path / "text")(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    try_model(model, PROMPTS, 8, "x")
    head = RewardModel.from_policy(model)
    assert head.backbone is not model and head.head.in_features == 32


def test_the_text_part_of_llama_4():
    """Its decoder stands under another name than the one that the family gives."""
    model = built(
        transformers.Llama4TextConfig, **{**TEXT, "pad_token_id": None}, intermediate_size_mlp=48, num_local_experts=2
    )
    try_model(model, PROMPTS, 8, "x")
    assert generate(model, PROMPTS, max_new_tokens=3, eos_token_id=2, greedy=True).responses()


# ---- other formats, half a model -------------------------------------------------------------------------------------


def test_gguf_alone(saved):
    (saved / "model.safetensors").rename(saved / "model.Q4_K_M.gguf")
    message = why(load_policy, saved)
    assert (
        message.startswith(f"{saved}: holds GGUF weights only; convert them with transformers: ")
        and "gguf_file=FILE" in message
    )
    (saved / "config.json").unlink()
    assert why(load_policy, saved) == message == why(load_tokenizer, saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_alone(saved, name):
    (saved / "model.safetensors").rename(saved / name)
    message = why(load_policy, saved)
    assert "holds pickled weights only (*" in message and "save_pretrained(OUT)" in message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer(saved, name):
    (saved / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    for load in (load_policy, load_tokenizer):
        assert (
            why(load, saved)
            == f"{saved / name}: is a git-lfs pointer, not the file itself; fetch it with: git lfs pull"
        )


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "awq", "fp8"])
def test_quantised_weights(saved, method):
    config = json.loads((saved / "config.json").read_text())
    details = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4}
    (saved / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, **details}})
    )
    assert why(load_policy, saved) == (
        f"{saved}: its weights are quantised ({method}), which cannot be trained here; give the model's own directory "
        "or name in float32, "
        "bfloat16 or float16"
    )


def test_no_tokenizer(saved):
    for file in saved.glob("tokenizer*"):
        file.unlink()
    for file in saved.glob("special_tokens*"):
        file.unlink()
    message = why(load_tokenizer, saved)
    assert message.startswith(f"{saved}: no tokenizer can be loaded (") and "put the model's tokenizer files" in message


def test_a_name_that_is_no_directory_without_a_hub(monkeypatch):
    for load in (load_policy, load_tokenizer):
        message = why(load, "organisation/no-such-model")
        assert (
            message.startswith("organisation/no-such-model: ")
            and "there is no such directory, and no model hub can be reached" in message
        )


def test_a_forward_that_fails_is_one_sentence(saved, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more")

    monkeypatch.setattr(transformers.LlamaModel, "forward", fail)
    assert why(load_policy, saved) == (
        f"{saved}: LlamaForCausalLM cannot be used: its forward fails on eight tokens (RuntimeError: mat1 and mat2 "
        "shapes cannot be multiplied)"
    )
