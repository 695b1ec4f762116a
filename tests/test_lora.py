"""Adapters: arithmetic against dense weights, switching, PEFT's format both ways, roles on one base, the scripts."""

import copy
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from families import VOCAB, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from toy_runs import ANSWER, read_metrics, run, typed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import train_ppo
import train_rm
import train_sft
from rllr import evaluate, merge, predict
from rllr import ppo_models as roles
from rllr.common.errors import InputError
from rllr.layout import pack_sequences
from rllr.logprobs import token_logprobs
from rllr.model.heads import RewardModel, ValueModel
from rllr.model.loading import fingerprint, load_policy, load_tokenizer, read_head
from rllr.model.lora import (
    adapter_parameters,
    add_adapter,
    checkpoint_contexts,
    default_targets,
    get_adapter,
    merge_adapter,
    merged_weights,
    use_adapter,
)  # fmt: skip
from rllr.model.peft_format import load_adapter, save_adapter
from rllr.model.records import read_record
from rllr.model.roles import RoleBackbone, RolePolicy, load_scalar_role
from rllr.rollout import generate

TARGETS = {"bloom": ["query_key_value"], "gpt2": ["c_attn"], "deepseek_v3": ["q_b_proj", "kv_b_proj"]}
IDS = torch.arange(3, 27).view(2, 12) % VOCAB


def targets_of(family):
    return TARGETS.get(family, ["q_proj", "v_proj"])


def adapted(family, *names, rank=3, alpha=7, **model):
    """A tiny model with adapters whose B is not zero, so that they do something."""
    model = tiny_model(family, **model)
    for seed, name in enumerate(names):
        add_adapter(model, name, rank, alpha, seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for _, pair in get_adapter(model, name).items():
                pair.B.copy_(0.1 * torch.randn(pair.B.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, name=None, ids=IDS):
    with use_adapter(model, name):
        return model(input_ids=ids, use_cache=False).logits


def dense(family, model, name, scale):
    """The model that W + scale * BA amounts to, computed here from the adapter's tensors, matrix by matrix."""
    plain = tiny_model(family)
    for path, pair in get_adapter(model, name).items():
        module = plain.base_model.get_submodule(path)
        delta = scale * torch.einsum("or,ri->oi", pair.B.detach(), pair.A.detach())
        with torch.no_grad():
            module.weight.copy_(module.weight + (delta.T if isinstance(module, Conv1D) else delta))
    return plain


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_pair_by_hand():
    model = tiny_model("llama")
    add_adapter(model, "a", rank=2, alpha=6, targets=["layers.1.self_attn.q_proj"])
    ((path, pair),) = get_adapter(model, "a").items()
    assert path == "layers.1.self_attn.q_proj" and pair.A.shape == (2, 32) and pair.B.shape == (32, 2)
    with torch.no_grad():
        pair.A.zero_()[0, 5], pair.A[1, 7] = 2.0, 1.0
        pair.B.zero_()[3, 0], pair.B[4, 1] = 0.5, -1.0
    module, x = model.model.layers[1].self_attn.q_proj, torch.arange(32.0)
    with use_adapter(model, "a"):
        added = module(x) - torch.nn.functional.linear(x, module.weight)
    expected = torch.zeros(32)
    expected[3], expected[4] = 3 * 0.5 * 2 * 5, 3 * -1 * 1 * 7  # scale 6 / 2
    torch.testing.assert_close(added, expected, atol=1e-4, rtol=0)


def test_default_targets_and_dense_computation(family):
    model = adapted(family, "a")
    assert default_targets(model) == targets_of(family)
    assert len(get_adapter(model, "a").pairs) == 2 * len(targets_of(family))
    expected = logits(dense(family, model, "a", 7 / 3))
    assert (logits(model, "a") - logits(model)).abs().max() > 0.05
    torch.testing.assert_close(logits(model, "a"), expected, atol=1e-5, rtol=1e-5)


def test_off_and_untrained_are_the_base_to_the_bit(family):
    base, model = tiny_model(family), adapted(family, "a", "b")
    add_adapter(model, "fresh", 4, 8)
    expected = logits(base)
    assert torch.equal(logits(model), expected)
    with use_adapter(model, "a"):
        assert torch.equal(logits(model, None), expected)
    assert torch.equal(logits(model, "fresh"), expected)
    assert model.state_dict().keys() == base.state_dict().keys() and fingerprint(model) == fingerprint(base)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "a"):
            parameter.fill_(float("nan"))
    assert torch.equal(logits(model), expected)  # off means not computed, not multiplied by 0


def test_first_weights_are_kaiming_uniform_from_the_seed():
    model = tiny_model("llama")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        add_adapter(model, name, 16, 32, seed=seed)
    (a, b, c) = ([p.clone() for p in adapter_parameters(model, name)] for name in "abc")
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not all(torch.equal(x, y) for x, y in zip(a, c))
    values = torch.cat([tensor.flatten() for tensor in a[::2]])
    bound = 32**-0.5  # kaiming-uniform with a = sqrt 5: sqrt(6 / (1 + 5) / in)
    assert values.abs().max() <= bound and values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.cat([tensor.flatten() for tensor in a[1::2]]).any()


@pytest.mark.parametrize("mode", ["bf16 base", "autocast"])
def test_reduced_precision_keeps_adapters_in_float32(family, mode):
    expected = logits(adapted(family, "a", scale=1.0), "a")
    model = adapted(family, "a", scale=1.0, dtype=torch.bfloat16 if mode == "bf16 base" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        on, off = logits(model, "a"), logits(model)
    assert {p.dtype for p in adapter_parameters(model, "a")} == {torch.float32}
    effect = (expected - logits(adapted(family, "a", scale=1.0))).abs().max()
    assert (on.float() - expected).abs().max() < 0.1 * max(effect, expected.abs().max())
    assert not torch.equal(on, off)


def test_gradient_of_a_bf16_base_is_float32_and_right():
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted("llama", "a", scale=1.0, dtype=dtype)
        with use_adapter(model, "a"):
            model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model, "a")]))
    assert grads[1].dtype == torch.float32 and torch.cosine_similarity(*grads, dim=0) > 0.98


def test_gradient_flows_to_the_active_adapter_only(family):
    model = adapted(family, "a", "b")
    with use_adapter(model, "b"):
        model(input_ids=IDS).logits.square().sum().backward()
    assert all(p.grad is None for p in [*model.parameters(), *adapter_parameters(model, "a")])
    assert all(p.grad.abs().sum() > 0 for p in adapter_parameters(model, "b"))


# ---- switching -------------------------------------------------------------------------------------------------------


def test_nested_and_restored_after_an_exception():
    model = adapted("llama", "a", "b")
    a, b, off = logits(model, "a"), logits(model, "b"), logits(model)
    plain = lambda: model(input_ids=IDS, use_cache=False).logits.detach()  # noqa: E731
    with use_adapter(model, "a"):
        assert torch.equal(plain(), a)
        with pytest.raises(ZeroDivisionError), use_adapter(model, "b"):
            assert torch.equal(plain(), b)
            with use_adapter(model, None):
                assert torch.equal(plain(), off)
            1 / 0
        assert torch.equal(plain(), a)
    assert torch.equal(plain(), off)
    with pytest.raises(ValueError, match=r"no adapter 'c'; there are \['a', 'b'\]"):
        use_adapter(model, "c")
    with pytest.raises(ValueError, match="already has"):
        add_adapter(model, "a", 1, 1)
    with use_adapter(tiny_model("llama"), None):  # a model that never had one
        pass


def test_a_role_restores_after_an_exception():
    model = adapted("llama", "a", "b")
    role, off = RolePolicy(model, "a"), logits(model)
    with pytest.raises(IndexError), use_adapter(model, "b"):
        role.base_model(input_ids=torch.tensor([[VOCAB + 5]]))
    assert torch.equal(logits(model, "b"), RolePolicy(model, "b")(input_ids=IDS, use_cache=False).logits)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, off)


def gradients(model, name, contexts):
    """Gradients of an adapter with every decoder layer under activation checkpointing, or without where None."""
    layers = [layer.forward for layer in model.model.layers]
    for layer, forward in zip(model.model.layers, layers):
        if contexts:
            layer.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
    with use_adapter(model, name):
        loss = model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum()
    loss.backward(retain_graph=True)  # outside: no adapter is on while layers are recomputed
    loss.backward()
    return [p.grad for p in adapter_parameters(model, name)]


def test_checkpointing_recomputes_with_the_adapter_of_the_forward():
    expected = gradients(adapted("llama", "a", "b"), "b", None)
    model = adapted("llama", "a", "b")
    found = gradients(model, "b", partial(checkpoint_contexts, model))
    assert all(torch.equal(x, y) for x, y in zip(expected, found))
    assert checkpoint_contexts(tiny_model("llama"))  # without adapters it does nothing
    model = adapted("llama", "a", "b")
    with pytest.raises(Exception):  # without it: torch sees other tensors in the recomputation, or the gradient differs
        found = gradients(model, "b", lambda: checkpoint_contexts(tiny_model("llama")))
        assert all(torch.equal(x, y) for x, y in zip(expected, found))


def test_a_copy_has_its_own_adapters():
    model = adapted("llama", "a")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapter_parameters(twin, "a"):
            parameter.zero_()
    assert torch.equal(logits(twin, "a"), logits(twin)) and not torch.equal(logits(model, "a"), logits(model))


def test_unknown_targets_list_the_names():
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(InputError, match=f"--lora_targets query,self_attn: no such linear module; there are {names}"):
        add_adapter(tiny_model("llama"), "a", 2, 4, targets=["q_proj", "query", "self_attn"])
    model = tiny_model("llama")
    for module in ("q_proj", "v_proj"):
        for layer in model.model.layers:
            setattr(layer.self_attn, f"odd_{module}", layer.self_attn._modules.pop(module))
    with pytest.raises(InputError, match="no default LoRA targets for LlamaForCausalLM; give --lora_targets .*odd_q"):
        default_targets(model)


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_merged_equals_unmerged(family):
    model = adapted(family, "a", "b", scale=1.0)
    expected, before = logits(model, "b"), fingerprint(model)
    assert merged_weights(model, "b").keys() <= model.state_dict().keys() and fingerprint(model) == before
    merge_adapter(model, "b")
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no adapter 'b'"):
        use_adapter(model, "b")


def test_never_merged_into_bf16():
    with pytest.raises(ValueError, match="float32 weights only"):
        merge_adapter(adapted("llama", "a", dtype=torch.bfloat16), "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_merged_leaves_the_base_alone(family, tmp_path, dtype):
    model = adapted(family, "a", scale=1.0, dtype=dtype)
    before, role = fingerprint(model), RolePolicy(model, "a")
    role.save_merged(tmp_path)
    assert fingerprint(model) == before
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32 and fingerprint(plain) == fingerprint(role.merged_state()) != before
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(plain), logits(model, "a").float(), atol=tolerance, rtol=tolerance)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def test_peft_loads_ours(family, tmp_path):
    model = adapted(family, "a")
    save_adapter(model, "a", tmp_path, base="somewhere")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits.detach(), logits(model, "a"), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets_of(family)) and config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] == (family == "gpt2") and config["base_model_name_or_path"] == "somewhere"


def peft_model(model, family, task="CAUSAL_LM", **options):
    options = {"r": 5, "lora_alpha": 9, "target_modules": targets_of(family), "init_lora_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(model, peft.LoraConfig(task_type=task, **options)).eval()


def test_we_load_pefts(family, tmp_path):
    theirs = peft_model(tiny_model(family), family)
    theirs.save_pretrained(tmp_path)
    model = tiny_model(family)
    load_adapter(model, tmp_path, "theirs")
    expected = theirs(input_ids=IDS).logits.detach()
    assert (expected - logits(model)).abs().max() > 0.05
    torch.testing.assert_close(logits(model, "theirs"), expected, atol=1e-5, rtol=1e-5)


def test_some_layers_only_go_through_peft(tmp_path):
    model = tiny_model("llama")
    add_adapter(model, "a", 2, 4, targets=["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"])
    with torch.no_grad():
        for _, pair in get_adapter(model, "a").items():
            pair.B.fill_(0.1)
    save_adapter(model, "a", tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 2
    torch.testing.assert_close(theirs(input_ids=IDS).logits.detach(), logits(model, "a"), atol=1e-5, rtol=1e-5)


def classifier_of(model, tmp_path):
    """The base of a causal LM as transformers' sequence classifier with a random head."""
    model.save_pretrained(tmp_path / "base")
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0).eval()


def answers():
    """[B, T] sequences whose padding (id 0) no answer ends with, and how `RewardModel` and a classifier read them."""
    sequences, prompt_lens, mask = pack_sequences([[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12, 13]], 0, "cpu")
    attention = torch.arange(sequences.shape[1]) < (prompt_lens + mask.sum(1)).unsqueeze(1)
    return (sequences, prompt_lens, mask), {"input_ids": sequences, "attention_mask": attention.long()}


@torch.no_grad()
def test_peft_classifier_loads_as_reward_adapter(family, tmp_path):
    model = tiny_model(family)
    theirs = peft_model(classifier_of(model, tmp_path), family, task="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "adapter")
    ours, read = answers()
    expected = theirs(**read).logits.squeeze(1)
    role = load_scalar_role(RewardModel, model, tmp_path / "adapter", "reward")
    torch.testing.assert_close(role(*ours), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), logits(tiny_model(family)))


@torch.no_grad()
def test_our_reward_adapter_loads_in_peft(family, tmp_path):
    model = adapted(family, "reward")
    classifier = classifier_of(tiny_model(family), tmp_path)
    role = RewardModel.from_policy(RolePolicy(model, "reward"), seed=4)
    role.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(classifier, tmp_path / "adapter").eval()
    ours, read = answers()
    torch.testing.assert_close(theirs(**read).logits.squeeze(1), role(*ours), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"


def damaged_config(directory, config):
    (directory / "adapter_config.json").write_text('{"r": 5, ')


def no_rank(directory, config):
    del config["r"]


def other_rank(directory, config):
    config["r"] = 4


def dora(directory, config):
    config["use_dora"] = True


def pissa(directory, config):
    config["init_lora_weights"] = "pissa"


def ia3(directory, config):
    config["peft_type"] = "IA3"


def no_weights(directory, config):
    (directory / "adapter_model.safetensors").unlink()


def cut_weights(directory, config):
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def foreign_tensor(directory, config):
    file = directory / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.zeros(2)}, file)


def half_a_pair(directory, config):
    file = directory / "adapter_model.safetensors"
    state = load_file(file)
    state.pop(next(key for key in state if "lora_B" in key))
    save_file(state, file)


DAMAGES = {
    damaged_config: r"adapter_config\.json: not valid JSON",
    no_rank: r"adapter_config\.json: damaged",
    other_rank: r"q_proj\.lora_A is \(3, 32\), but rank and base ask for \(4, 32\)",
    dora: r"adapter_config\.json: use_dora set; only plain LoRA",
    pissa: r"adapter_config\.json: init_lora_weights set",
    ia3: r"adapter_config\.json: peft_type 'IA3'; only LORA",
    no_weights: r"adapter_model\.safetensors: no such file",
    cut_weights: r"adapter_model\.safetensors: not a whole safetensors file",
    foreign_tensor: r"holds base_model\.model\.lm_head\.weight, which is no part",
    half_a_pair: r"lora_B is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_adapters_are_refused(tmp_path, damage):
    save_adapter(adapted("llama", "a"), "a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text("")
    damage(tmp_path, config)
    if damage is not damaged_config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=DAMAGES[damage]):
        load_adapter(tiny_model("llama"), tmp_path, "a")


def test_an_adapter_of_another_family_is_refused(tmp_path):
    save_adapter(adapted("gpt2", "a"), "a", tmp_path)
    with pytest.raises(InputError, match="adapts transformer.h.0.attn.c_attn, which LlamaForCausalLM lacks"):
        load_adapter(tiny_model("llama"), tmp_path, "a")


# ---- roles -----------------------------------------------------------------------------------------------------------


def test_a_role_is_its_adapter_and_head(family):
    model = adapted(family, "policy", "value")
    policy, value = RolePolicy(model, "policy"), ValueModel.from_policy(RolePolicy(model, "value"))
    assert list(map(id, policy.parameters())) == list(map(id, adapter_parameters(model, "policy")))
    expected = {id(p) for p in [*adapter_parameters(model, "value"), value.head.weight, value.head.bias]}
    assert {id(p) for p in value.parameters()} == expected and not list(RolePolicy(model, None).parameters())
    assert policy.config is model.config and policy.device == model.device and value.head.weight.dtype == torch.float32
    assert not value.backbone.training  # roles start as `load_policy` gives models: dropout off
    policy.train()
    assert policy.base_model.training and not value.backbone.training


def test_roles_give_the_numbers_of_separate_models(family):
    model = adapted(family, "policy", "value")
    ours, _ = answers()
    policy, reference = RolePolicy(model, "policy"), RolePolicy(model, None)
    value = ValueModel.from_policy(RolePolicy(model, "value"))
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    alone = ValueModel(dense(family, model, "value", 7 / 3).base_model, copy.deepcopy(value.head))
    torch.testing.assert_close(value(*ours), alone(*ours), atol=2e-5, rtol=1e-5)
    separate = token_logprobs(dense(family, model, "policy", 7 / 3), *ours)
    torch.testing.assert_close(token_logprobs(policy, *ours), separate, atol=2e-5, rtol=1e-5)
    assert torch.equal(token_logprobs(reference, *ours), token_logprobs(tiny_model(family), *ours))


def test_rollouts_of_a_role(family):
    model = adapted(family, "policy")
    settings = {"max_new_tokens": 6, "eos_token_id": 2, "generator": torch.Generator().manual_seed(0)}
    role = RolePolicy(model, "policy")
    rollout = generate(role, [[3, 4, 5], [6, 7]], **settings)
    assert not role.training and not role.base_model.training  # as before: no dropout from here on
    scored = token_logprobs(role, rollout.sequences, rollout.prompt_lens, rollout.response_mask)
    torch.testing.assert_close(rollout.rollout_logprobs, scored.detach(), atol=1e-4, rtol=1e-4)


def test_the_mode_is_the_roles_own():
    model = adapted("gpt2", "a", resid_pdrop=0.5)
    training, quiet = RoleBackbone(model, "a").train(), RoleBackbone(model, "a").eval()
    expected = quiet(input_ids=IDS).last_hidden_state
    assert not torch.equal(training(input_ids=IDS).last_hidden_state, expected)
    assert torch.equal(quiet(input_ids=IDS).last_hidden_state, expected)


def test_a_step_moves_one_role_and_nothing_else():
    model = adapted("llama", "policy", "value")
    before, others = fingerprint(model), [p.clone() for p in adapter_parameters(model, "value")]
    policy = RolePolicy(model, "policy")
    was = [p.clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    (-token_logprobs(policy, *answers()[0]).sum()).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(was, policy.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(others, adapter_parameters(model, "value")))
    assert fingerprint(model) == before


# ---- the scripts -----------------------------------------------------------------------------------------------------

LORA = ["--lora_rank", 4, "--lora_alpha", 8]


@pytest.fixture(scope="session")
def rm(toy, tmp_path_factory):
    """A label-sensitive reward adapter on the toy policy."""
    directory = tmp_path_factory.mktemp("lora") / "rm"
    run(train_rm.main, "--policy", toy.sft, *toy.rm_flags, *LORA, "--output_dir", directory)
    return directory


@pytest.fixture(scope="session")
def ppo(toy, rm, tmp_path_factory):
    """PPO with adapters in every role, against that reward and a rationale-sensitive one trained in full."""
    directory = tmp_path_factory.mktemp("lora") / "ppo"
    flags = ["--reward", "mixed", "--label_rm", rm, "--rationale_rm", toy.rationale_rm]
    return directory, toy.ppo(directory, *flags, *LORA)


def test_sft_saves_adapter_and_merged_model(toy, tmp_path):
    out = tmp_path / "sft"
    output = run(train_sft.main, *toy.data, *toy.sft_flags, "--epochs", 4, "--dropout", 0, *LORA, "--model", toy.sft,
                 "--learning_rate", 2e-3, "--output_dir", out)  # fmt: skip
    assert "lora_rank=4" in output
    losses = [line["loss"] for line in read_metrics(out, "loss")]
    assert sum(losses[len(losses) // 2 :]) < sum(losses[: len(losses) // 2])
    merged, rebuilt = AutoModelForCausalLM.from_pretrained(out), load_policy(out / "adapter")
    assert fingerprint(merged) == read_record(out)["fingerprint"] == fingerprint(rebuilt)
    before = read_record(out / "adapter")["base"]["fingerprint"]
    assert fingerprint(merged) != before == fingerprint(load_policy(toy.sft))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy.sft), out / "adapter")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, merged(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def test_reward_adapter_is_small_and_learns(toy, rm):
    assert not (rm / "model.safetensors").exists() and (rm / "score_statistics.json").is_file()
    record = read_record(rm)
    losses = [line["loss"] for line in read_metrics(rm, "loss")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]) and record["report"]["pairs"]["all"]["margin"] > 0
    assert record["base"] == {"path": str(toy.sft), "fingerprint": read_record(toy.sft)["fingerprint"]}
    ours, _ = answers()
    merged, role = RewardModel.from_pretrained(rm), load_scalar_role(RewardModel, load_policy(toy.sft), rm, "r")
    torch.testing.assert_close(merged(*ours), role(*ours), atol=1e-5, rtol=1e-5)
    assert torch.equal(read_head(rm)["score.weight"], role.head.weight)


def test_ppo_on_one_base(toy, rm, ppo):
    directory, output = ppo
    assert f"value model: from {rm}" in output
    lines = read_metrics(directory, "judge/score")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["analyse/kl_sequence"] == pytest.approx(0, abs=1e-5)
    assert all(line["improve/first_ratio_error"] < 1e-5 and line["improve/grad_norm_value"] > 0 for line in lines)
    assert lines[1]["analyse/kl_sequence"] != 0
    for name in ("last", "best"):
        assert (directory / name / "adapter_model.safetensors").is_file()
        assert not (directory / name / "model.safetensors").exists()
    last = load_policy(directory / "last")
    base = AutoModelForCausalLM.from_pretrained(toy.sft)
    theirs = peft.PeftModel.from_pretrained(base, directory / "last")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, last(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert fingerprint(last) != fingerprint(load_policy(toy.sft))


def test_adapters_score_like_the_same_models_merged(toy, rm, tmp_path):
    """The first rollout of a run on adapters is that of a run on whole models: same answers, same scores."""
    full = ["--label_rm", rm]
    toy.ppo(tmp_path / "adapters", *full, *LORA, steps=1)
    toy.ppo(tmp_path / "whole", *full, steps=1)
    for name in ("judge/score", "analyse/entropy", "credit/explained_variance", "shape/reward"):
        a, b = (read_metrics(tmp_path / d, name)[0][name] for d in ("adapters", "whole"))
        assert a == pytest.approx(b, rel=1e-5, abs=1e-4), name  # the explained variance is in the hundreds


FROM = (["--reward", "gold"], ["--label_rm", "full"], ["--label_rm", "full", "--value_init", "rm"])


@pytest.mark.parametrize("flags", FROM)
def test_value_adapters_from_elsewhere(toy, rm, tmp_path, flags):
    named = {"full": toy.label_rm, "rm": rm}
    toy.ppo(tmp_path / "ppo", *LORA, *(named.get(flag, flag) for flag in flags), steps=1)
    assert read_metrics(tmp_path / "ppo", "improve/grad_norm_value")[0]["improve/grad_norm_value"] > 0


def test_a_value_adapter_starts_from_the_reward_model(toy, rm):
    ours, base = answers()[0], load_policy(toy.sft)
    for source in (rm, toy.label_rm):
        config = train_ppo.Config(policy=str(toy.sft), label_rm=str(source), lora_rank=4)
        found, tokenizer = fingerprint(base), load_tokenizer(toy.sft)
        base = load_policy(toy.sft)
        judges = roles.load_judges(config, tokenizer, "cpu", base, found)
        value = roles.load_value_model(config, "cpu", base, found, judges)
        statistics = judges.by_part["label"].statistics
        expected = ValueModel.from_pretrained(source).rescale(statistics.mean, statistics.std)
        torch.testing.assert_close(value(*ours), expected(*ours), atol=1e-4, rtol=1e-4)
        assert value.backbone.shared_backbone is (
            base.base_model if source == rm else judges.by_part["label"].model.backbone
        )
        assert len(list(value.parameters())) == 2 * 4 + 2 and all(p.requires_grad for p in value.parameters())


def test_bf16_base(toy, rm, tmp_path):
    toy.ppo(tmp_path / "ppo", "--label_rm", rm, *LORA, "--precision", "bf16", "--base_dtype", "bf16")
    state = load_file(tmp_path / "ppo" / "last" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert load_policy(tmp_path / "ppo" / "last").dtype == torch.float32


def test_stop_ids_are_saved_with_an_adapter(toy, tmp_path):
    model = load_policy(toy.sft)
    add_adapter(model, "policy", 2, 4)
    model.generation_config.eos_token_id = [7, 8]
    RolePolicy(model, "policy").save_pretrained(tmp_path)
    assert load_policy(tmp_path).generation_config.eos_token_id == [7, 8]


def test_merge_command(toy, rm, ppo, tmp_path):
    directory, _ = ppo
    run(merge.main, "--adapter", directory / "last", "--output_dir", tmp_path / "policy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert fingerprint(plain) == fingerprint(load_policy(directory / "last"))
    assert plain.generation_config.eos_token_id == load_policy(toy.sft).generation_config.eos_token_id
    table = run(evaluate.main, "--models", directory / "last", tmp_path / "policy", *ANSWER)
    assert "+0.0 (+0.0 .. +0.0)" in table
    deep = tmp_path / "further" / "down" / "policy"  # its record still leads to the data
    run(merge.main, "--adapter", directory / "last", "--output_dir", deep)
    assert "+0.0 (+0.0 .. +0.0)" in run(evaluate.main, "--models", deep, tmp_path / "policy", *ANSWER)
    run(merge.main, "--adapter", rm, "--output_dir", tmp_path / "rm")
    ours, read = answers()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    alone = {key: value[:1, :5] for key, value in read.items()}
    one = RewardModel.from_pretrained(rm)(ours[0][:1, :5], ours[1][:1], ours[2][:1, :2])
    torch.testing.assert_close(classifier(**alone).logits.squeeze(1), one, atol=1e-4, rtol=1e-4)
    toy.ppo(tmp_path / "ppo", "--label_rm", tmp_path / "rm", steps=1)  # a model like any other


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, main, *arguments):
    """The one line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return [line for line in lines if line.startswith("error: ")][-1]


def test_another_base_is_refused(toy, rm, tmp_path, capsys):
    run(train_sft.main, *toy.data, *toy.sft_flags, "--epochs", 1, "--model", toy.sft, "--output_dir", tmp_path / "sft")
    ppo = ["--policy", tmp_path / "sft", "--label_rm", rm, *toy.ppo_flags, "--output_dir", tmp_path / "ppo"]
    line = refused(capsys, train_ppo.main, *ppo, *LORA)
    assert f"--label_rm {rm}: this adapter was trained on other weights (those of {toy.sft}" in line
    assert not (tmp_path / "ppo").exists()


def test_a_changed_base_is_refused(toy, rm, tmp_path, capsys):
    shutil.copytree(toy.sft, tmp_path / "sft")
    state = load_file(tmp_path / "sft" / "model.safetensors")
    key = next(name for name in state if "q_proj" in name)
    save_file(state | {key: state[key] + 1e-3}, tmp_path / "sft" / "model.safetensors", {"format": "pt"})
    flags = [*toy.ppo_flags, *LORA, "--reward", "gold", "--output_dir", tmp_path / "ppo"]
    line = refused(capsys, train_ppo.main, "--policy", tmp_path / "sft", *flags)
    assert "its weights are not those that its rllr.json records" in line
    shutil.copytree(rm, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "sft")
    (tmp_path / "rm" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trained on other weights"):
        RewardModel.from_pretrained(tmp_path / "rm")
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "rm" / "adapter_config.json").write_text(json.dumps(config))
    assert fingerprint(RewardModel.from_pretrained(tmp_path / "rm")) == fingerprint(
        RewardModel.from_pretrained(rm)
    )  # by our record
    record = json.loads((tmp_path / "rm" / "rllr.json").read_text())
    record["base"]["path"] = "../gone"
    (tmp_path / "rm" / "rllr.json").write_text(json.dumps(record))
    with pytest.raises(
        InputError, match="base_model_name_or_path: .*gone: no such model directory; if the base has moved.*--base DIR"
    ):
        RewardModel.from_pretrained(tmp_path / "rm")
    assert fingerprint(RewardModel.from_pretrained(tmp_path / "rm", base=toy.sft)) == fingerprint(
        RewardModel.from_pretrained(rm)
    )
    with pytest.raises(InputError, match="--base .*nowhere/at/all: no such model directory"):
        RewardModel.from_pretrained(tmp_path / "rm", base="nowhere/at/all")
    with pytest.raises(InputError, match="trained on other weights"):
        RewardModel.from_pretrained(tmp_path / "rm", base=tmp_path / "sft")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rank_stabilised_adapters(tmp_path, family):
    """alpha / sqrt(r), written and read, ours by peft and peft's by us: the same outputs."""
    model = tiny_model(family)
    adapter = add_adapter(model, "x", 4, 8, use_rslora=True)
    plain = add_adapter(model, "y", 4, 8)
    assert (adapter.scale, plain.scale) == (4.0, 2.0)
    for pair in adapter.pairs.values():
        torch.nn.init.normal_(pair.B, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 12).unsqueeze(0)
    with use_adapter(model, "x"), torch.no_grad():
        expected = model(input_ids=ids).logits
    save_adapter(model, "x", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_rslora"] is True
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model(family)
    assert load_adapter(again, tmp_path / "theirs", "z").use_rslora
    with use_adapter(again, "z"), torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    merged = merge_adapter(again, "z")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_evaluate_and_predict_find_a_moved_base(toy, ppo, tmp_path, monkeypatch, capsys):
    """An adapter whose base lies elsewhere now: --base says where."""
    adapter, base = shutil.copytree(ppo[0] / "last", tmp_path / "adapter"), shutil.copytree(toy.sft, tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/away/model"}))
    record = json.loads((adapter / "rllr.json").read_text())
    record["base"]["path"] = "./gone"
    (adapter / "rllr.json").write_text(json.dumps(record))
    assert "--base DIR" in refused(capsys, evaluate.main, "--models", adapter, "--eval_file", toy.dev)
    assert "accuracy" in run(
        evaluate.main, "--models", adapter, "--eval_file", toy.dev, "--base", base, "--max_new_tokens", 12
    )
    monkeypatch.setattr("sys.stdin", typed("the soup was fresh\n"))
    assert '"text": "the soup was fresh"' in run(
        predict.main, "--model", adapter, "--base", base, "--max_new_tokens", 12
    )
    run(merge.main, "--adapter", adapter, "--base", base, "--output_dir", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_flags_that_contradict_each_other(toy, rm, tmp_path, capsys):
    start = ["--policy", toy.sft, "--output_dir", tmp_path / "out"]
    for flags, fragment in (
        (["--lora_rank", -1], "--lora_rank -1"),
        (["--lora_targets", "q_proj"], "--lora_targets q_proj: is for adapters; give --lora_rank"),
        (["--base_dtype", "bf16"], "--base_dtype bf16: is for adapters"),
        ([*LORA, "--base_dtype", "bf16"], "needs --precision bf16"),
        ([*LORA, "--lora_targets", "q_proj, query"], "--lora_targets query: no such linear module; there are"),
    ):
        assert fragment in refused(capsys, train_rm.main, *start, *flags)
    assert "nothing to adapt" in refused(capsys, train_sft.main, *toy.data, *LORA)
    assert "reward or value model's adapter" in refused(capsys, evaluate.main, "--models", rm)
    assert not (tmp_path / "out").exists()


def test_the_old_name_of_the_merge_command_tells_the_new_one():
    command = [sys.executable, "-m", "rllr.lora", "merge", "--adapter", "a", "--output_dir", "b"]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert ended.returncode == 1 and "is python -m rllr.merge now" in ended.stderr and "Traceback" not in ended.stderr
