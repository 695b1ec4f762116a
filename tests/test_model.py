"""Reward and value models: where they read, how they are saved; dropout switches, stop ids, fingerprints."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from families import EOS, FAMILIES, VOCAB, tiny_model, toy_tokenizer
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rllr.common.errors import InputError
from rllr.data.encoding import stop_token_ids
from rllr.engine.limits import length_limit
from rllr.layout import pack_sequences
from rllr.logprobs import token_logprobs
from rllr.model.backbone import hidden_states
from rllr.model.dropout import set_dropout
from rllr.model.heads import RewardModel, ValueModel, reward_pad_token_id
from rllr.model.loading import fingerprint, load_policy, load_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10], [3], [11, 12, 13]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 34, 2], [1, 17]]
PAD = VOCAB - 1


@pytest.fixture
def batch():
    return pack_sequences(PROMPTS, RESPONSES, pad_token_id=PAD)


def value_model(model, seed=0):
    """A value model whose head is not zero."""
    value = ValueModel.from_policy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        value.head.weight.copy_(torch.randn(1, 32, generator=generator))
        value.head.bias.fill_(0.3)
    return value


def naive_hidden(model, row):
    """Final hidden states [T, H] of one unpadded row, by the model's own forward."""
    ids = torch.tensor([PROMPTS[row] + RESPONSES[row]])
    return model.base_model(input_ids=ids).last_hidden_state[0].detach()


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- where they read -------------------------------------------------------------------------------------------------


def test_reward_is_read_at_the_last_response_token(model, batch):
    """One row at a time, also the row that does not end in EOS; neighbours and padding move nothing."""
    reward = RewardModel.from_policy(model)
    scores = reward(*batch)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for row in range(3):
        close(scores[row], naive_hidden(model, row)[-1] @ reward.head.weight[0])
        close(reward(*pack_sequences(PROMPTS[row : row + 1], RESPONSES[row : row + 1]))[0], scores[row])
    wide = torch.nn.functional.pad(batch[0], (0, 7)), batch[1], torch.nn.functional.pad(batch[2], (0, 3))
    close(reward(*wide), scores)
    assert torch.equal(reward(*pack_sequences(PROMPTS, RESPONSES, pad_token_id=EOS)), scores)


def test_values_are_read_where_the_token_is_predicted(model, batch):
    """At the token's own position V would see the action; that looks fine in every loss curve."""
    value = value_model(model)
    values = value(*batch)
    assert values.dtype == torch.float32 and values[~batch[2]].eq(0).all()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        hidden = naive_hidden(model, row)
        for t in range(len(response)):
            close(values[row, t], hidden[len(prompt) - 1 + t] @ value.head.weight[0] + 0.3)
    wide = torch.nn.functional.pad(batch[0], (0, 7)), batch[1], torch.nn.functional.pad(batch[2], (0, 3))
    close(value(*wide)[:, :6], values)


def test_values_do_not_see_the_token_they_judge(llama, batch):
    """Another last token leaves every value as it was, to the bit, and changes the reward."""
    other = batch[0].clone()
    other[0, 8] = 44
    reward, value = RewardModel.from_policy(llama), value_model(llama)
    assert torch.equal(value(*batch)[0], value(other, *batch[1:])[0])
    assert reward(*batch)[0] != reward(other, *batch[1:])[0]


def test_span_scores(llama, batch):
    """The head at every response token; the last one is the score."""
    reward = RewardModel.from_policy(llama)
    spans = reward.span_scores(*batch)
    assert spans[~batch[2]].eq(0).all()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        close(spans[row, : len(response)], naive_hidden(llama, row)[len(prompt) :] @ reward.head.weight[0])
    close(spans.gather(1, batch[2].sum(1, keepdim=True) - 1).squeeze(1), reward(*batch))


def test_padding_gets_no_gradient(llama, batch):
    """Neither the embedding of the padding id nor a hidden state behind the end."""
    for head in (RewardModel.from_policy(llama), value_model(llama)):
        llama.zero_grad()
        head(*batch).sum().backward()
        assert llama.get_input_embeddings().weight.grad[PAD].eq(0).all()


def test_rescale_is_the_same_value_in_standardised_units(llama, batch):
    """w / std and (b - mean) / std: by hand on the hidden state that predicts the last token."""
    value = value_model(llama)
    raw, mask = value(*batch).detach(), batch[2]
    weight = value.head.weight[0].clone()
    assert value.rescale(1.5, 4.0) is value
    close(value(*batch)[mask], ((raw - 1.5) / 4.0)[mask])
    hidden = naive_hidden(llama, 0)[len(PROMPTS[0]) + len(RESPONSES[0]) - 2]
    close(value(*batch)[0, 2], hidden @ (weight / 4.0) + (0.3 - 1.5) / 4.0)


def test_value_from_a_reward_model_reads_its_weights_and_no_bias(tmp_path, llama, batch):
    """A critic that starts from the reward model: the same line, one position earlier; rescaled by -mean/std."""
    reward = RewardModel.from_policy(llama)
    reward.save_pretrained(tmp_path)
    value = ValueModel.from_pretrained(tmp_path).rescale(2.0, 0.5)
    assert value.head.bias.item() == -4.0
    assert torch.equal(value.head.weight, reward.head.weight / 0.5)
    earlier = [row[:-1] for row in RESPONSES]
    close(value(*batch)[torch.arange(3), batch[2].sum(1) - 1], (reward(*pack_sequences(PROMPTS, earlier)) - 2.0) / 0.5)


def test_new_heads():
    """Reward head: N(0, 1 / (H + 1)), without bias, from its seed alone. Value head: zero."""
    model = tiny_model("llama", hidden_size=1024, intermediate_size=8, num_hidden_layers=1)
    torch.manual_seed(5)
    first = RewardModel.from_policy(model, seed=3).head
    torch.manual_seed(6)
    assert torch.equal(first.weight, RewardModel.from_policy(model, seed=3).head.weight)
    assert not torch.equal(first.weight, RewardModel.from_policy(model, seed=4).head.weight)
    assert first.bias is None
    assert first.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    value = ValueModel.from_policy(model).head
    assert value.weight.eq(0).all() and value.bias.eq(0).all()


def test_heads_share_the_backbone(llama):
    """The same object, not a copy: what a shared trunk stands on."""
    assert RewardModel.from_policy(llama).backbone is llama.model
    assert ValueModel.from_policy(llama).backbone is llama.model


def test_scores_are_float32_under_autocast_and_in_bf16(batch):
    """The score's last step in bf16 would create ties."""
    reward = RewardModel.from_policy(tiny_model("llama", dtype=torch.bfloat16))
    assert reward(*batch).dtype == torch.float32
    reward = RewardModel.from_policy(tiny_model("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(*batch).dtype == torch.float32
    assert RewardModel.from_policy(tiny_model("llama", dtype=torch.float64))(*batch).dtype == torch.float64


# ---- saving and loading ----------------------------------------------------------------------------------------------


def test_save_and_load_give_equal_numbers(tmp_path, model, batch):
    """Reward and value model, to the bit; the loaded one is in eval mode."""
    for head in (RewardModel.from_policy(model), value_model(model)):
        head.save_pretrained(tmp_path / "saved")
        loaded = type(head).from_pretrained(tmp_path / "saved")
        assert not loaded.training
        assert torch.equal(loaded(*batch), head(*batch))
        assert fingerprint(loaded) == fingerprint(head)
    assert not list((tmp_path / "saved").glob("*.part"))


def test_a_loaded_model_has_the_dtype_asked_for(tmp_path):
    """Without it transformers takes the file's: a bf16 critic on CPU."""
    RewardModel.from_policy(tiny_model("llama", dtype=torch.bfloat16)).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float64):
        loaded = RewardModel.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_the_saved_pad_id_is_an_ordinary_token_when_loaded(tmp_path, llama, batch):
    """An embedding with a padding_idx gives that id's row no gradient, also where it stands in a text."""
    RewardModel.from_policy(llama).save_pretrained(tmp_path, pad_token_id=20)
    loaded = RewardModel.from_pretrained(tmp_path)
    loaded(*batch).sum().backward()
    assert loaded.backbone.get_input_embeddings().weight.grad[20].ne(0).any()


def test_loads_as_a_sequence_classifier_with_equal_scores(tmp_path, model, batch):
    """With right padding by an id that is no stop id; the attention mask may be left out or given."""
    if model.config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        pytest.skip("transformers has no sequence classifier for this family")
    reward = RewardModel.from_policy(model)
    reward.save_pretrained(tmp_path, pad_token_id=PAD)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    sequences = batch[0]
    for mask in (None, (sequences != PAD).long()):
        logits = classifier(input_ids=sequences, attention_mask=mask).logits
        assert logits.shape == (3, 1)
        close(logits[:, 0], reward(*batch))


def test_every_tested_family_but_none_has_a_sequence_classifier():
    """So the test above skips nothing unnoticed."""
    types = {tiny_model(family).config.model_type for family in FAMILIES}
    assert types <= set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def test_policy_saved_and_loaded(tmp_path, family, model, batch):
    """The same log-probabilities, in the dtype asked for whatever the file holds, in eval mode."""
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    loaded = load_policy(str(tmp_path))
    assert loaded.dtype == torch.float32 and not loaded.training
    close(token_logprobs(loaded, *batch), token_logprobs(model, *batch))


@pytest.mark.parametrize("load", [RewardModel.from_pretrained, ValueModel.from_pretrained])
def test_a_directory_without_a_head(tmp_path, llama, load):
    """A random head in its place would be found out after hours, or never."""
    llama.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="score.weight"):
        load(tmp_path)


def drop_weight(path, name):
    """Take one tensor out of a saved model."""
    from safetensors.torch import load_file, save_file

    state = load_file(path / "model.safetensors")
    del state[name]
    save_file(state, path / "model.safetensors", {"format": "pt"})


def test_missing_weights(tmp_path, llama):
    """transformers fills them with random numbers and a log line."""
    RewardModel.from_policy(llama).save_pretrained(tmp_path / "rm")
    drop_weight(tmp_path / "rm", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match="up_proj"):
        RewardModel.from_pretrained(tmp_path / "rm")
    llama.save_pretrained(tmp_path / "lm")
    drop_weight(tmp_path / "lm", "lm_head.weight")
    with pytest.raises(InputError, match="lm_head"):
        load_policy(tmp_path / "lm")


def test_a_truncated_file(tmp_path, llama):
    """What a full disk leaves behind."""
    RewardModel.from_policy(llama).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="model.safetensors"):
        RewardModel.from_pretrained(tmp_path)


def test_a_truncated_policy_file(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError):
        load_policy(tmp_path)


@pytest.mark.parametrize("load", [RewardModel.from_pretrained, ValueModel.from_pretrained, load_policy, load_tokenizer])
def test_no_such_model(tmp_path, load):
    """No directory, a directory that holds no model, a file: never asked of the hub."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in [("absent", "no such"), ("empty", "config.json"), ("file", "is a file")]:
        with pytest.raises(InputError, match=message):
            load(str(tmp_path / name))


def test_a_head_we_cannot_reproduce_is_refused(tmp_path, monkeypatch, llama):
    """Slightly wrong log-probabilities would train on without a sign."""
    llama.save_pretrained(tmp_path)
    forward = type(llama).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(type(llama), "forward", scaled)
    with pytest.raises(InputError, match="LM head"):
        load_policy(tmp_path)


def test_config_names_what_was_saved(tmp_path, llama):
    RewardModel.from_policy(llama).save_pretrained(tmp_path, toy_tokenizer(), pad_token_id=PAD)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 1 and config["pad_token_id"] == PAD
    assert load_tokenizer(tmp_path).eos_token_id == EOS


def test_fingerprint(llama):
    """One weight changed in its last place shows; the object, the mode and the dtype of the file do not."""
    first = fingerprint(llama)
    assert fingerprint(tiny_model("llama").train()) == first
    assert fingerprint(tiny_model("llama", dtype=torch.float64)) == first
    assert fingerprint(tiny_model("llama", seed=1)) != first
    with torch.no_grad():
        weight = llama.model.layers[0].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert fingerprint(llama) != first


# ---- dropout ---------------------------------------------------------------------------------------------------------


def varies(model, batch):
    """Whether two passes differ."""
    torch.manual_seed(0)
    first, second = hidden_states(model, batch[0]), hidden_states(model, batch[0])
    return not torch.equal(first, second)


def test_set_dropout_and_back(model, batch):
    """Every family: on in train mode, no trace in eval mode (to the bit), off again at 0, also when set twice."""
    plain = hidden_states(model, batch[0])
    assert not varies(model.train(), batch)
    set_dropout(set_dropout(model, 0.1), 0.2)
    assert varies(model.train(), batch)
    assert torch.equal(hidden_states(model.eval(), batch[0]), plain)
    assert set_dropout(model, 0) is model
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(hidden_states(model.train(), batch[0]), plain)


@pytest.mark.parametrize(
    "family, config",
    [
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
        pytest.param("bloom", {"hidden_dropout": 0.1}),
    ],
)
def test_dropout_of_the_config_is_switched_off(family, config, batch):
    """A family's own way of dropping out that the switch does not reach."""
    model = tiny_model(family, **config).train()
    assert varies(model, batch)
    assert not varies(set_dropout(model, 0), batch)


def test_dropout_of_a_whole_number():
    """`hidden_dropout: 0` in a config.json, or a 0 that was set before."""
    model = set_dropout(set_dropout(tiny_model("bloom"), 0), 0.1)
    assert model.transformer.h[0].self_attention.hidden_dropout == 0.1


def test_attention_weights_are_not_dropped_on_cpu():
    """Where hooks drop in the residual stream; a config's own attention dropout goes, too."""
    model = set_dropout(tiny_model("llama", attention_dropout=0.3), 0.1)
    assert model.model.layers[0].self_attn.attention_dropout == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_through_a_reward_model(family, batch):
    """Also where the backbone sits under our head."""
    reward = set_dropout(RewardModel.from_policy(tiny_model(family)), 0.2)
    assert varies(reward.train(), batch)
    assert not varies(set_dropout(reward, 0), batch)


def test_residual_dropout_drops_with_its_probability(llama, batch):
    """At p = 0.5 half of the embedding's numbers are zero and the others doubled."""
    embedded = llama.get_input_embeddings()(batch[0])
    torch.manual_seed(0)
    dropped = set_dropout(llama, 0.5).train().get_input_embeddings()(batch[0])
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    close(dropped[kept], 2 * embedded[kept])


# ---- ids and limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed, expected", [([5, 2, 5], [5, 2]), (7, [7]), (0, [0]), (None, [EOS]), ([5, 999], [5]), ([2, 61], [2])]
)
def test_stop_token_ids(capsys, llama, listed, expected):
    """A list, one id (0 is one), none (the tokenizer's EOS); what lies outside the vocabulary is dropped and named."""
    llama.generation_config.eos_token_id = listed
    assert stop_token_ids(llama, toy_tokenizer()) == expected
    dropped = [i for i in (listed if isinstance(listed, list) else []) if i >= VOCAB]
    printed = capsys.readouterr().out
    assert all(str(i) in printed for i in dropped) and bool(printed) == bool(dropped)


def test_stop_token_ids_without_a_generation_config(llama):
    llama.generation_config = None
    assert stop_token_ids(llama, toy_tokenizer()) == [EOS]


def test_stop_token_ids_is_never_empty(llama):
    """The default of GPT-2's config in a small vocabulary: the tokenizer's EOS is left."""
    llama.generation_config.eos_token_id = 50256
    assert stop_token_ids(llama, toy_tokenizer()) == [EOS]


def test_reward_pad_token_id():
    """Never a stop id, never BOS, never outside the vocabulary; a row no text uses if nothing else is left."""
    plain, padded = toy_tokenizer(), toy_tokenizer(pad_token="<pad>")
    size = len(padded.get_vocab())
    assert reward_pad_token_id(padded, [2], size) == 3
    assert reward_pad_token_id(padded, [2, 3], size) == 0  # the unknown token
    assert reward_pad_token_id(plain, [2], len(plain.get_vocab())) == 0
    assert reward_pad_token_id(plain, [0, 2], len(plain.get_vocab())) is None
    assert reward_pad_token_id(plain, [0, 2], len(plain.get_vocab()) + 5) == len(plain.get_vocab())


def test_length_limit():
    """GPT-2's own name for it; Bloom has no limit; a bare config will do."""
    assert length_limit(tiny_model("llama"))[0] == 64 and length_limit(tiny_model("gpt2").config)[0] == 64
    assert length_limit(tiny_model("bloom")) == (None, "")
    assert length_limit(SimpleNamespace(n_positions=8)) == (8, "its n_positions of 8")
    assert length_limit(tiny_model("mistral", sliding_window=8)) == (8, "its sliding window of 8")
