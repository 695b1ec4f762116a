"""Default learning rates: the rule against a table made by hand, and what it counts."""

import pytest
from families import VOCAB, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from rllr.model.backbone import backbone_of
from rllr.model.heads import RewardModel, ValueModel
from rllr.model.lora import add_adapter
from rllr.model.roles import RolePolicy
from rllr.run.rates import PEAKS, decoder_weights, default_rate, why

# weights of the decoder in millions: rates by hand (sqrt: 1, 2, 10.307, 20, 80.474, 100), two digits.
TABLE = [
    # millions     sft     reward  policy  value  | adapters: sft  reward  policy  value
    (0.001,       (1e-3,   5e-4,   2e-4,   5e-4,      3e-3,   1.5e-3, 6e-4,   1.5e-3)),
    (0.584,       (1e-3,   5e-4,   2e-4,   5e-4,      3e-3,   1.5e-3, 6e-4,   1.5e-3)),  # --model tiny, the demo
    (1,           (1e-3,   5e-4,   2e-4,   5e-4,      3e-3,   1.5e-3, 6e-4,   1.5e-3)),
    (4,           (5e-4,   2.5e-4, 1e-4,   2.5e-4,    3e-3,   1.5e-3, 3e-4,   1.5e-3)),
    (106.2,      (9.7e-5, 4.9e-5, 1.9e-5, 4.9e-5,    9.7e-4, 4.9e-4, 5.8e-5, 4.9e-4)),  # SmolLM2-135M
    (400,         (5e-5,   2.5e-5, 1e-5,   2.5e-5,    5e-4,   2.5e-4, 3e-5,   2.5e-4)),
    (6476,        (1.2e-5, 6.2e-6, 2.5e-6, 6.2e-6,    1.2e-4, 6.2e-5, 7.5e-6, 6.2e-5)),  # Llama 2 7B
    (10_000,      (1e-5,   5e-6,   2e-6,   5e-6,      1e-4,   5e-5,   6e-6,   5e-5)),
]  # fmt: skip
ROLES = ["sft", "reward", "policy", "value"]


@pytest.mark.parametrize("millions, rates", TABLE)
def test_the_rule_against_a_table_made_by_hand(millions, rates):
    found = [default_rate(role, millions * 1e6, adapters) for adapters in (False, True) for role in ROLES]
    assert found == list(rates)


# What was measured, or is the paper's: (role, millions of weights, adapters, lowest and highest good rate).
MEASURED = [
    ("sft", 106.2, False, 1e-4, 1e-4),
    ("reward", 106.2, False, 5e-5, 5e-5),
    ("policy", 106.2, False, 2e-5, 5e-5),
    ("value", 106.2, False, 3e-5, 3e-5),
    ("sft", 6476, True, 2e-4, 2e-4),
    ("reward", 6476, True, 1e-4, 1e-4),
    ("policy", 6476, True, 5e-6, 1e-5),
]


@pytest.mark.parametrize("role, millions, adapters, lowest, highest", MEASURED)
def test_it_fits_what_was_measured_within_a_factor_of_two(role, millions, adapters, lowest, highest):
    assert lowest / 2 < default_rate(role, millions * 1e6, adapters) < highest * 2


@pytest.mark.parametrize("role", ROLES)
def test_a_larger_model_never_gets_a_larger_rate(role):
    sizes = [10 ** (exponent / 20) for exponent in range(60, 240)]
    for adapters in (False, True):
        rates = [default_rate(role, size, adapters) for size in sizes]
        assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(PEAKS[role] * (3 if adapters else 1))
    assert all(default_rate(role, size, True) >= default_rate(role, size) for size in sizes)


def test_what_counts_of_a_llama():
    """Per layer 4 d^2 of attention (fewer heads for keys and values: less), 3 d m of the MLP, 2 norms; a last norm."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    expected = 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40 + 2 * 16) + 16
    model = LlamaForCausalLM(config)
    assert decoder_weights(model) == decoder_weights(backbone_of(model)) == expected == 8176
    config.tie_word_embeddings = True
    assert decoder_weights(LlamaForCausalLM(config)) == expected


def test_every_family_counts_without_its_embeddings(model):
    assert decoder_weights(model) == decoder_weights(ValueModel.from_policy(model))
    rows = tiny_model(model.config.model_type, vocab_size=VOCAB + 40)
    assert decoder_weights(rows) == decoder_weights(model) > 0


def test_adapters_and_heads_do_not_count(llama):
    weights = decoder_weights(llama)
    add_adapter(llama, "a", 4, 8)
    role = RolePolicy(llama, "a")
    assert decoder_weights(role) == decoder_weights(RewardModel.from_policy(role)) == decoder_weights(llama) == weights


def test_frozen_embeddings_still_do_not_count(llama):
    weights = decoder_weights(llama)
    llama.get_input_embeddings().requires_grad_(False)
    assert decoder_weights(llama) == weights


@pytest.mark.parametrize("millions, adapters, text", [
    (0.584, False, "full training, 0.58 M weights"),
    (106.2, True, "adapters, 106 M weights"),
    (106.4, False, "full training, 106 M weights; extrapolated, rates are known up to 106 M"),
    (6476, False, "full training, 6,476 M weights; extrapolated, rates are known up to 106 M"),
    (6476, True, "adapters, 6,476 M weights"),
    (69_000, True, "adapters, 69,000 M weights; extrapolated, rates are known up to 6,500 M"),
])  # fmt: skip
def test_what_the_log_says_of_it(millions, adapters, text):
    assert why(millions * 1e6, adapters) == text
