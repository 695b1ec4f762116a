"""Our functions against those of the last TRL with a PPO trainer (1.12.0), where it is installed; see
benchmarks/results."""

import pytest
import torch
from families import tiny_model
from transformers import AutoModelForSequenceClassification

from rllr.layout import pack_sequences
from rllr.logprobs import token_logprobs, token_logprobs_and_entropy
from rllr.model.heads import RewardModel
from rllr.ppo import masked_mean, masked_whiten

pytest.importorskip("trl", reason="trl is not installed; it is an optional oracle (pip install trl==1.12.0)")
trl_ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="this trl has no PPO trainer; 1.12.0 has")
trl_utils = pytest.importorskip("trl.trainer.utils")


@pytest.fixture
def batch(rng):
    values = torch.randn(7, 11, generator=rng, dtype=torch.float64)
    lengths = torch.tensor([11, 3, 1, 7, 5, 9, 2])
    return values, torch.arange(11) < lengths.unsqueeze(1)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(batch, shift_mean):
    values, mask = batch
    theirs = trl_ppo.masked_whiten(values, mask, shift_mean=shift_mean)
    torch.testing.assert_close(
        masked_whiten(values, mask, shift_mean)[mask], theirs[mask], rtol=1e-6, atol=1e-7
    )  # their n / (n - 1) is float32


def test_masked_mean(batch):
    values, mask = batch
    torch.testing.assert_close(masked_mean(values, mask), trl_ppo.masked_mean(values, mask))
    torch.testing.assert_close(masked_mean(values, mask, 1), trl_ppo.masked_mean(values, mask, axis=1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropy(rng, temperature):
    model = tiny_model("llama", seed=0)
    prompts = [torch.randint(3, 60, (n,), generator=rng).tolist() for n in (4, 9, 1)]
    responses = [torch.randint(3, 60, (n,), generator=rng).tolist() for n in (6, 2, 5)]
    packed = pack_sequences(prompts, responses)
    logprobs, entropy = token_logprobs_and_entropy(model, *packed, temperature)
    torch.testing.assert_close(token_logprobs(model, *packed, temperature), logprobs)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        theirs = trl_ppo.selective_log_softmax(logits, torch.tensor(response))
        torch.testing.assert_close(logprobs[row, : len(response)], theirs, rtol=1e-4, atol=1e-5)
        theirs = trl_utils.entropy_from_logits(logits)
        torch.testing.assert_close(entropy[row, : len(response)], theirs, rtol=1e-4, atol=1e-5)


def test_reward_scores(rng, tmp_path):
    """TRL reads a sequence classifier's score at the last token that is not padding: our saved reward model is one."""
    pad = 60
    model = RewardModel.from_policy(tiny_model("llama", seed=1), seed=0)
    model.save_pretrained(tmp_path, pad_token_id=pad)
    client = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = [torch.randint(3, 60, (5,), generator=rng).tolist() for _ in range(3)]
    responses = [torch.randint(3, 60, (n,), generator=rng).tolist() for n in (6, 2, 4)]
    sequences, prompt_lens, mask = pack_sequences(prompts, responses, pad)
    with torch.no_grad():
        _, theirs, _ = trl_ppo.get_reward(client, sequences, pad, 5)
        ours = model(sequences, prompt_lens, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
