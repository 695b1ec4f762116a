"""Default learning rates: one rule for every model, by the number of weights in its decoder.

    trained in full   peak / sqrt(N)     N: millions of weights, embeddings and LM head left out; at most the peak
    as adapters       10 times that, at most 3 peaks; a policy in PPO 3 times that

Adam moves each weight by about its rate, so what a layer puts out moves with its width: the best rate falls as 1 /
width (Yang et al. 2022, arXiv:2203.03466), and in residual networks as 1 / sqrt(depth) (Yang et al. 2023,
arXiv:2310.02244). N grows as width^2 depth, which makes both one: 1 / sqrt(N). Adapters want about ten times the rate
of full training (Schulman et al. 2025, "LoRA Without Regret").

The peaks are those of the tiny model (N = 0.58). Full training of SmolLM2-135M (N = 106) and the paper's adapters at
7 B (N = 6,476) wanted rates within a factor of 1.7 of the rule's. Full training beyond N = 106 is extrapolated.
docs/models.md has the table, benchmarks/results/rates.md the figures.
"""

from ..engine.graphs import inner_weights
from ..model.backbone import shared_decoder

PEAKS = {"sft": 1e-3, "reward": 5e-4, "policy": 2e-4, "value": 5e-4}  # of a model of at most a million weights
ADAPTERS = {"sft": 10, "reward": 10, "policy": 3, "value": 10}  # times the rate of full training
ADAPTERS_MOST = 3  # times the peak: at ten some tiny reward models collapsed (benchmarks/results/lora.md)
MEASURED = {"full training": 106.3e6, "adapters": 6.5e9}  # weights of the largest decoder whose rate is known


def decoder_weights(model):
    """The number of weights in the decoder of a causal LM, a scalar head or a role, without its token embeddings.

    The LM head, scalar heads and adapters do not count either.
    """
    return inner_weights(shared_decoder(model))


def default_rate(role, weights, adapters=False):
    """The AdamW peak, with two digits, for a decoder of so many weights. role: sft, reward, policy or value."""
    peak = PEAKS[role]
    rate = peak / max(1.0, weights / 1e6) ** 0.5
    if adapters:
        rate = min(rate * ADAPTERS[role], peak * ADAPTERS_MOST)
    return float(f"{rate:.1e}")


def settle_rates(run, **roles):
    """Give the rates that nobody chose their defaults, once the models are there, and say what they rest on.

    roles: {setting: (role of `default_rate`, model)}.
    """
    for setting, (role, model) in roles.items():
        weights, adapters = decoder_weights(model), bool(run.config.lora_rank)
        rate = getattr(run.config, setting) or default_rate(role, weights, adapters)
        run.settle(why(weights, adapters), **{setting: rate})


def why(weights, adapters):
    """What a default rate rests on, for the log."""
    how = "adapters" if adapters else "full training"
    known = weights <= MEASURED[how]
    doubt = "" if known else f"; extrapolated, rates are known up to {millions(MEASURED[how])}"
    return f"{how}, {millions(weights)} weights{doubt}"


def millions(weights):
    """A number of weights, to read: 0.58 M, 106 M, 6,476 M."""
    count = weights / 1e6
    return f"{count:,.0f} M" if count >= 10 else f"{count:.2g} M"
