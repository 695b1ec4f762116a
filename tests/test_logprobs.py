"""Log-probabilities and entropy of response tokens, per family, against one naive full forward per row."""

import math

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model

import rllr.logprobs
from rllr.layout import pack_sequences
from rllr.logprobs import token_logprobs, token_logprobs_and_entropy

PROMPTS = [[5, 6, 7, 8, 9, 10], [3], [11, 12, 13]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 34, 2], [1, 0]]


def naive_logprobs(model, prompts, responses, temperature=1.0):
    """One unpadded row at a time, the model's own forward, one token at a time: a list of lists of scalar tensors."""
    result = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0] / temperature
        result.append([logits[len(prompt) + t - 1].log_softmax(-1)[id] for t, id in enumerate(response)])
    return result


def padded(rows, width):
    zero = rows[0][0] * 0
    return torch.stack([torch.stack(row + [zero] * (width - len(row))) for row in rows])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def weighted(logprobs):
    """A different weight for every token, so that two errors cannot cancel."""
    weights = torch.arange(1.0, logprobs.numel() + 1, dtype=logprobs.dtype).reshape(logprobs.shape)
    return (weights * logprobs).sum() / weights.sum()


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_a_naive_loop(family, temperature):
    """A shift by one, padding that is seen, temperature left out or multiplied; value and every weight's gradient."""
    model = tiny_model(family, dtype=torch.float64)
    atol = 1e-6 if family == "bloom" else 1e-10  # Bloom's softmax is float32 whatever the weights are
    batch = pack_sequences(PROMPTS, RESPONSES, pad_token_id=7)
    ours = token_logprobs(model, *batch, temperature)
    naive = padded(naive_logprobs(model, PROMPTS, RESPONSES, temperature), 6)
    assert ours.dtype == torch.float64 and ours.shape == (3, 6)
    assert ours[~batch[2]].eq(0).all()
    close(ours, naive, atol)
    for a, b in zip(gradients(model, weighted(ours)), gradients(model, weighted(naive)), strict=True):
        close(a, b, atol)


def test_alone_in_a_batch_and_with_more_padding(model):
    """fp32: neighbours and padding move nothing; whatever id fills the padding is never read."""
    batch = pack_sequences(PROMPTS, RESPONSES)
    together = token_logprobs(model, *batch)
    assert together.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = token_logprobs(model, *pack_sequences([prompt], [response]))
        close(together[row, : len(response)], alone[0], 1e-5)
    wide = torch.nn.functional.pad(batch[0], (0, 9)), batch[1], torch.nn.functional.pad(batch[2], (0, 4))
    close(token_logprobs(model, *wide)[:, :6], together, 1e-5)


def test_any_id_may_fill_the_padding(model):
    """To the bit: same shapes, only ids that nobody may read differ. Value and gradient."""
    results = []
    for pad in (0, 2, 20, VOCAB - 1):
        logprobs = token_logprobs(model, *pack_sequences(PROMPTS, RESPONSES, pad_token_id=pad))
        results.append([logprobs.detach(), *gradients(model, weighted(logprobs))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 12])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_chunks_change_nothing(monkeypatch, family, chunk):
    """A last chunk that is lost, doubled or out of order; 11 tokens in all. Value, gradient, entropy."""
    model = tiny_model(family, dtype=torch.float64)
    batch = pack_sequences(PROMPTS, RESPONSES)
    whole = token_logprobs(model, *batch)
    expected = gradients(model, weighted(whole))
    entropy = token_logprobs_and_entropy(model, *batch)[1]
    monkeypatch.setattr(rllr.logprobs, "CHUNK_TOKENS", chunk)
    pieces = token_logprobs(model, *batch)
    close(pieces, whole, 1e-12)
    for a, b in zip(gradients(model, weighted(pieces)), expected, strict=True):
        close(a, b, 1e-12)
    close(token_logprobs_and_entropy(model, *batch)[1], entropy, 1e-12)


def test_no_logits_outside_the_chunk(monkeypatch, llama):
    """[B, T, V] logits never exist: the head sees response tokens only, a chunk at a time."""
    seen = []
    llama.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    with torch.no_grad():
        token_logprobs(llama, *pack_sequences(PROMPTS, RESPONSES))
        monkeypatch.setattr(rllr.logprobs, "CHUNK_TOKENS", 4)
        token_logprobs(llama, *pack_sequences(PROMPTS, RESPONSES))
    assert seen == [11, 4, 4, 3]


def test_a_chunks_logits_are_computed_again_for_the_gradient(monkeypatch, llama):
    """Kept until the backward pass, they would all exist at once after all. One chunk alone is not computed twice."""
    calls = []
    llama.get_output_embeddings().register_forward_hook(lambda module, args, output: calls.append(len(output)))
    token_logprobs(llama, *pack_sequences(PROMPTS, RESPONSES)).sum().backward()
    assert calls == [11]
    monkeypatch.setattr(rllr.logprobs, "CHUNK_TOKENS", 4)
    token_logprobs(llama, *pack_sequences(PROMPTS, RESPONSES)).sum().backward()
    assert sorted(calls) == [3, 3, 4, 4, 4, 4, 11]


def test_entropy_and_logprobs_of_one_pass(model):
    """Entropy by hand, -sum p log p over the vocabulary of a predicting position; the log-probs are the same ones."""
    batch = pack_sequences(PROMPTS, RESPONSES)
    logprobs, entropy = token_logprobs_and_entropy(model, *batch, 1.5)
    close(logprobs, token_logprobs(model, *batch, 1.5).detach(), 1e-5)
    assert not logprobs.requires_grad and entropy[~batch[2]].eq(0).all()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / 1.5
        for t in range(len(response)):
            p = logits[len(prompt) - 1 + t].softmax(-1).tolist()
            assert entropy[row, t].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)


def test_entropy_with_impossible_tokens(llama):
    """0 * log 0 is 0: a token masked to -inf must not make the entropy NaN."""
    head = torch.nn.Linear(32, VOCAB)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.fill_(-math.inf)[:4] = 0.0
    llama.set_output_embeddings(head)
    _, entropy = token_logprobs_and_entropy(llama, *pack_sequences([[5]], [[1, 2]]))
    close(entropy, torch.full((1, 2), math.log(4)), 1e-6)


def test_bf16_scores_in_float32():
    """The log-softmax of a bf16 model is taken in float32."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    logprobs = token_logprobs(model, *pack_sequences(PROMPTS, RESPONSES))
    assert logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, logprobs.bfloat16().float())


def test_a_batch_without_any_response_token(llama):
    """Nothing to score is no error: a shape [B, 0] and [B, R] of an all-False mask."""
    batch = pack_sequences([[5, 6], [7]], [[], []])
    assert token_logprobs(llama, *batch).shape == (2, 0)
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert token_logprobs(llama, batch[0], batch[1], empty).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("scale", ["logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_what_a_head_does_after_the_linear_map(llama, scale):
    """Cohere multiplies, Granite divides, Gemma 2 caps."""
    batch = pack_sequences(PROMPTS, RESPONSES)
    logits = llama(input_ids=batch[0]).logits
    setattr(llama.config, scale, 2.0)
    expected = {
        "logit_scale": logits * 2,
        "logits_scaling": logits / 2,
        "final_logit_softcapping": 2 * torch.tanh(logits / 2),
    }
    first = expected[scale][0, 5].log_softmax(-1)[20]
    close(token_logprobs(llama, *batch)[0, 0], first, 1e-5)


def test_the_ratio_check_passes_when_nothing_is_wrong(model):
    """|ratio - 1| < 1e-5 between two passes, in train mode with dropout 0 and in eval mode."""
    batch = pack_sequences(PROMPTS, RESPONSES)
    old = token_logprobs(model, *batch).detach()
    new = token_logprobs(model.train(), *batch)
    assert ((new - old).exp() - 1).abs().max() < 1e-5


def test_the_ratio_check_sees_dropout():
    """GPT-2 with dropout 0.1 left on while training."""
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    batch = pack_sequences(PROMPTS, RESPONSES)
    old = token_logprobs(model, *batch).detach()
    torch.manual_seed(0)
    new = token_logprobs(model.train(), *batch)
    assert ((new - old).exp() - 1).abs()[batch[2]].mean() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_check_sees_a_shift_by_one(monkeypatch, family):
    """Logits read at the token's own position, which has seen it."""
    model = tiny_model(family)
    batch = pack_sequences(PROMPTS, RESPONSES)
    old = token_logprobs(model, *batch)
    right = rllr.logprobs.response_places
    monkeypatch.setattr(rllr.logprobs, "response_places", lambda lens, mask: right(lens + 1, mask))
    new = token_logprobs(model, *batch)
    assert ((new - old).exp() - 1).abs()[batch[2]].mean() > 1e-3
