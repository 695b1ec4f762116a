"""Started by torchrun (test_ranks.py): the gradient of a batch that ranks share is that of the whole batch, in float64.

Each process computes the whole batch's gradient by itself, with a model that knows nothing of ranks, and compares. With
the data parallel way and --shard, the losses of all three stages, families with tied and with own LM heads, adapters,
batches that the ranks do not divide and answers of all lengths.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from families import tiny_model
from test_update import FAKE_ENCODER, random_rows

from rllr.common import ranks
from rllr.layout import pack_sequences
from rllr.logprobs import sft_loss, token_logprobs
from rllr.model.backbone import backbone_of
from rllr.model.heads import RewardModel, ValueModel
from rllr.model.roles import new_role
from rllr.model.shards import gathered, is_sharded, shard, whole
from rllr.ppo import policy_loss, value_loss
from rllr.rm_pairs import PairRow
from rllr.run.optimizer import Optimizer, gradient_step, own_micro_batches
from rllr.update import Batch, improve
from train_rm import rm_loss

CLOSE = 1e-10  # of the largest gradient
ROWS = (7, 1)  # of a batch: no number of ranks divides the first, the second has less than one each
RM = SimpleNamespace(loss="eos", margin=0.0, center_coef=0.01)


class Row(NamedTuple):
    prompt_ids: list
    answer_ids: list

    @property
    def length(self):
        return len(self.prompt_ids) + len(self.answer_ids)


class Caught(Optimizer):
    """Does not move the weights: keeps the gradient that a step would take, whole."""

    def __init__(self, model):
        super().__init__(model, 1e-3, 10, max_grad_norm=1e9)
        self.model = model

    def step(self):
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.caught = {name: whole(gradient).clone() for name, gradient in named.items()}
        self.clear_gradient()


def policy_of(family, lora):
    name, _, tied = family.partition(" ")
    model = tiny_model(name, dtype=torch.float64, **({"tie_word_embeddings": tied == "tied"} if tied else {}))
    return model.requires_grad_(not lora)


def role_of(model, lora, seed=0):
    """The model itself, or an adapter on it whose B is not zero."""
    if not lora:
        return model
    settings = SimpleNamespace(lora_rank=2, lora_alpha=4, lora_targets=None, use_rslora=False)
    role = new_role(model, f"role{seed}", settings, seed)
    with torch.no_grad():
        for number, parameter in enumerate(role.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            parameter.copy_(0.1 * drawn)
    return role


def gradient_of(model, loss):
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def compare(what, found, expected):
    assert found.keys() == expected.keys() and expected, what
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        off = float((found[name] - gradient).abs().max())
        assert largest > 1e-4 and off < CLOSE * largest, (what, name, off, largest)


def pair(family, lora, settings, kind=None):
    """(a model of this rank alone, the same one as the ranks have it), a policy or with a scalar head (`kind`)."""
    models = []
    for shared in (False, True):
        base = policy_of(family, lora)
        if shared and lora:
            shard(base, settings)
        model = role_of(base, lora)
        if kind is not None:
            model = kind.from_policy(model)
            with torch.no_grad():  # a value model's head begins at 0
                drawn = torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(5))
                model.head.weight.copy_(drawn)
        if shared and not lora:
            shard(model, settings)
        models.append(model)
    return models


def check_supervised(family, lora, settings, count):
    rows = [Row(prompt, answer) for prompt, answer in random_rows(count, 1, seed=count)]
    tokens = sum(len(row.answer_ids) for row in rows)
    plain, shared = pair(family, lora, settings)
    expected = gradient_of(plain, sft_loss(plain, rows, tokens, FAKE_ENCODER))
    optimizer = Caught(shared)
    loss, _ = gradient_step(
        optimizer, own_micro_batches(rows, settings), lambda part: sft_loss(shared, part, tokens, FAKE_ENCODER)
    )
    compare(("sft", family, lora, settings.shard, count), optimizer.caught, expected)
    pairs = [PairRow(*row, name="") for row in random_rows(count, 2, seed=count)]
    plain, shared = pair(family, lora, settings, RewardModel)
    expected = gradient_of(plain, rm_loss(plain, pairs, count, FAKE_ENCODER, RM))
    optimizer = Caught(shared)
    gradient_step(
        optimizer, own_micro_batches(pairs, settings), lambda part: rm_loss(shared, part, count, FAKE_ENCODER, RM)
    )
    compare(("rm", family, lora, settings.shard, count), optimizer.caught, expected)


def check_ppo(family, lora, settings, count):
    prompts, answers = zip(*random_rows(count, 1, seed=count))
    packed = pack_sequences(prompts, answers)
    mask, draw = packed.response_mask, torch.Generator().manual_seed(7)
    plain, shared = pair(family, lora, settings)
    plain_value, shared_value = pair(family, lora, settings, ValueModel)
    old_values, returns, advantages = (
        torch.randn(mask.shape, generator=draw, dtype=torch.float64).masked_fill(~mask, 0.0) for _ in range(3)
    )
    new_logprobs = token_logprobs(plain, *packed)
    loss, _ = policy_loss(new_logprobs, new_logprobs.detach(), advantages, mask, 0.2)
    expected = gradient_of(plain, loss)
    loss, _ = value_loss(plain_value(*packed), old_values, returns, mask, 0.2)
    expected_value = gradient_of(plain_value, loss)
    rollout = SimpleNamespace(packed=packed, response_mask=mask)
    batch = Batch(rollout, [], new_logprobs.detach(), None, old_values, None)
    batch.advantages, batch.returns = advantages, returns
    models = SimpleNamespace(
        policy=shared, value_model=shared_value,
        policy_optimizer=Caught(shared), value_optimizer=Caught(shared_value),
    )  # fmt: skip
    improve(models, batch, [[list(range(count))]], settings)
    compare(("policy", family, lora, settings.shard, count), models.policy_optimizer.caught, expected)
    compare(("value", family, lora, settings.shard, count), models.value_optimizer.caught, expected_value)
    assert sorted(row for rows in ranks.each([row for seen in batch.seen for row in seen[0]]) for row in rows) == [
        *range(count)
    ]


def check_whole(family, settings):
    """A sharded model is the plain one within `gathered`, on one rank alone, and a part of it afterwards."""
    plain, shared = pair(family, False, settings)
    weight = backbone_of(shared).get_input_embeddings()
    with torch.no_grad(), gathered(shared):
        with gathered(shared):
            assert not is_sharded(weight.weight)
        if ranks.is_first():  # no other rank helps
            ids = torch.arange(3, 11).unsqueeze(0)
            for _ in range(2):  # once more: FSDP's own hook would have given the weights back
                ours, theirs = (model(input_ids=ids).logits for model in (shared, plain))
                assert torch.equal(ours, theirs)
    assert is_sharded(weight.weight) and len(weight.weight.to_local()) < len(weight.weight)


def main():
    ranks.start()
    common = {"precision": "fp32", "clip": 0.2, "value_clip": 0.2, "temperature": 1.0, "max_update_kl": None}
    done = 0
    for family in ("llama tied", "llama untied", "gpt2"):
        for sharded in (False, True):
            for lora in (False, True):
                for count in ROWS:
                    for limits in ({"micro_batch_size": 2, "tokens_per_batch": 0},
                                   {"micro_batch_size": 0, "tokens_per_batch": 14}):  # fmt: skip
                        settings = SimpleNamespace(shard=sharded, **common, **limits)
                        check_supervised(family, lora, settings, count)
                        check_ppo(family, lora, settings, max(count, ranks.count()))
                        done += 4
        check_whole(family, SimpleNamespace(shard=True, precision="fp32"))
    if ranks.is_first():
        print(f"{done} gradients agree")


if __name__ == "__main__":
    main()
