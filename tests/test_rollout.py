"""Sampling with a cache, per family: against full forwards, a scripted model and an exact distribution."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import EOS, VOCAB, tiny_model

import rllr.engine.decoder
import rllr.rollout
from rllr.engine.cache import SlotLayer
from rllr.engine.limits import check_cache_support
from rllr.engine.sampling import Sampler, inverse_cdf, uniforms
from rllr.logprobs import token_logprobs
from rllr.rollout import bytes_per_slot, generate, slots_within

PROMPTS = [[5, 6, 7], [3], [11, 12, 13, 14, 15, 16], [9, 8], [40, 41, 42, 43]]


def sample(model, prompts=PROMPTS, seed=0, **arguments):
    defaults = {"max_new_tokens": 12, "eos_token_id": EOS, "generator": torch.Generator().manual_seed(seed)}
    return generate(model, prompts, **{**defaults, **arguments})


@torch.no_grad()
def naive_greedy(model, prompt, stops, max_new_tokens):
    """A full forward of the unpadded row for every token, no cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


# ---- per family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_a_full_forward(model, temperature):
    """A cache, mask or position that is off by one, and a temperature forgotten on one side. Rows end at any time."""
    rollout = sample(model, eos_token_id=list(range(2, 12)), temperature=temperature)
    assert len(set(rollout.response_lens.tolist())) > 1
    scored = token_logprobs(model, rollout.sequences, rollout.prompt_lens, rollout.response_mask, temperature)
    torch.testing.assert_close(rollout.rollout_logprobs, scored.detach(), rtol=0, atol=1e-5)
    assert rollout.rollout_logprobs[~rollout.response_mask].eq(0).all()


def test_greedy_equals_a_naive_loop(model):
    """Independent of the cache, in the order of the prompts."""
    stops = set(range(2, 12))
    rollout = sample(model, greedy=True, eos_token_id=sorted(stops))
    assert rollout.responses() == [naive_greedy(model, prompt, stops, 12) for prompt in PROMPTS]


def test_slots_and_groups_change_nothing_under_greedy(model, monkeypatch):
    """Slots that are moved or refilled with the wrong index, and neighbours or former owners that are seen."""
    stops, prompts = list(range(2, 12)), PROMPTS + [[row + 20] * (1 + row % 7) for row in range(9)]
    expected = [naive_greedy(model, prompt, set(stops), 12) for prompt in prompts]
    assert len(set(map(len, expected))) > 1
    first = sample(model, prompts, greedy=True, eos_token_id=stops, batch_size=14)
    for share, batch_size, tokens, look in [
        (0.1, 5, 1024, 1), (1.0, 5, 1024, 3), (0.1, 1, 1024, 1), (0.5, 2, 1024, 8), (0.3, 4, 3, 5), (0.1, 14, 1024, 40),
    ]:  # fmt: skip
        monkeypatch.setattr(rllr.rollout, "ADMIT_SHARE", share)
        monkeypatch.setattr(rllr.rollout, "STEPS_PER_LOOK", {"cpu": look})
        monkeypatch.setattr(rllr.rollout, "PREFILL_TOKENS", {"cpu": tokens})
        other = sample(model, prompts, greedy=True, eos_token_id=stops, batch_size=batch_size)
        assert other.responses() == first.responses() == expected
        torch.testing.assert_close(other.rollout_logprobs, first.rollout_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("span", [1, 3, 16])
@pytest.mark.parametrize("slow", [True, False])
def test_attention_in_pieces_changes_nothing(monkeypatch, slow, span, dtype, tolerance):
    """As on processors where products of one row are slow, and as on the others; pieces of different widths."""
    monkeypatch.setattr(rllr.engine.decoder, "products_are_slow", lambda: slow)
    monkeypatch.setattr(rllr.engine.decoder, "SPAN", span)
    model = tiny_model("llama", num_key_value_heads=4, scale=3.0)
    rollout = sample(model.to(dtype), PROMPTS * 2, eos_token_id=list(range(2, 12)), batch_size=7)
    given = rollout.sequences, rollout.prompt_lens, rollout.response_mask
    scored = token_logprobs(model.float(), *given).detach()
    torch.testing.assert_close(rollout.rollout_logprobs, scored, rtol=0, atol=tolerance)


# ---- what a rollout is -----------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """A causal LM without weights: after token i comes i + 1, with near certainty. It records how it is called."""

    def __init__(self, vocab=VOCAB, sure=100.0):
        super().__init__()
        self.vocab, self.sure, self.device, self.calls = vocab, sure, torch.device("cpu"), []
        self.config = SimpleNamespace()

    @property
    def base_model(self):
        return self.backbone

    def backbone(self, input_ids, **arguments):
        seen = {name: x.clone() if torch.is_tensor(x) else x for name, x in arguments.items()}
        self.calls.append({"input_ids": input_ids, "training": self.training, **seen})
        following = torch.nn.functional.one_hot((input_ids + 1) % self.vocab, self.vocab).float()
        return SimpleNamespace(last_hidden_state=self.sure * following)

    def get_output_embeddings(self):
        return torch.nn.Identity()


def test_scripted_model():
    """Stop ids end a row and belong to it; a row without one is cut and flagged; padding takes the pad id."""
    rollout = sample(Scripted(), [[10], [3, 20, 4], [30, 31]], eos_token_id=[6, 13], max_new_tokens=4, pad_token_id=60)
    assert rollout.responses() == [[11, 12, 13], [5, 6], [32, 33, 34, 35]]
    assert rollout.sequences.tolist() == [[10, 11, 12, 13, 60, 60], [3, 20, 4, 5, 6, 60], [30, 31, 32, 33, 34, 35]]
    assert rollout.truncated.tolist() == [False, False, True]
    assert rollout.prompt_lens.tolist() == [1, 3, 2] and rollout.response_lens.tolist() == [3, 2, 4]
    assert rollout.response_mask.sum(1).tolist() == [3, 2, 4]
    assert rollout.sequences.dtype == torch.long
    assert rollout.response_mask.dtype == rollout.truncated.dtype == torch.bool
    assert rollout.rollout_logprobs.dtype == torch.float32


def test_a_stop_id_in_the_prompt_ends_nothing():
    assert sample(Scripted(), [[2, 2, 20]], eos_token_id=2, max_new_tokens=2).responses() == [[21, 22]]


def test_a_stop_id_as_the_very_last_token_is_no_truncation():
    rollout = sample(Scripted(), [[10], [11]], eos_token_id=13, max_new_tokens=3)
    assert rollout.responses() == [[11, 12, 13], [12, 13]] and rollout.truncated.tolist() == [False, False]


def test_a_sampled_pad_id_is_an_ordinary_token():
    """An end re-derived from ids would stop at 12."""
    rollout = sample(Scripted(), [[10]], eos_token_id=14, max_new_tokens=9, pad_token_id=12)
    assert rollout.responses() == [[11, 12, 13, 14]] and rollout.response_mask.tolist() == [[True] * 4]


def test_pad_may_be_eos():
    rollout = sample(Scripted(), [[10], [5]], eos_token_id=12, pad_token_id=12, max_new_tokens=4)
    assert rollout.responses() == [[11, 12], [6, 7, 8, 9]] and rollout.truncated.tolist() == [False, True]


def test_one_new_token():
    rollout = sample(Scripted(), [[10], [12, 20]], eos_token_id=11, max_new_tokens=1)
    assert rollout.responses() == [[11], [21]] and rollout.truncated.tolist() == [False, True]


def test_positions_and_mask_given_to_the_model():
    """A row's positions go on from its own prompt; the mask hides what lies behind its newest token."""
    model = Scripted()
    sample(model, [[10], [3, 20, 40]], eos_token_id=60, max_new_tokens=3)
    first, second, third = model.calls
    assert first["input_ids"].tolist() == [[3, 20, 40], [10, 0, 0]]  # longest first
    assert second["position_ids"].tolist() == [[3], [1]] and third["position_ids"].tolist() == [[4], [2]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert third["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_no_work_after_the_last_token():
    """max_new_tokens=3 takes the prompt's pass and two more; a finished batch takes none."""
    model = Scripted()
    sample(model, [[10]], eos_token_id=60, max_new_tokens=3)
    assert len(model.calls) == 3
    model.calls.clear()
    sample(model, [[10]], eos_token_id=11, max_new_tokens=50)
    assert len(model.calls) == 1


def test_finished_rows_leave_the_batch():
    """Four rows end after 1, 2, 3 and 9 tokens: the batch shrinks as they do."""
    model = Scripted()
    rollout = sample(model, [[18], [17], [16], [10]], eos_token_id=19, max_new_tokens=20)
    assert rollout.response_lens.tolist() == [1, 2, 3, 9]
    assert [len(call["input_ids"]) for call in model.calls] == [4, 3, 2] + [1] * 6


@pytest.mark.parametrize("batch_size", [64, 6, 4, 2])
def test_several_answers_per_prompt(model, batch_size):
    """They stand together in the order of the prompts, each as if its prompt had been run for it alone; 2 slots are too
    few for three answers to share a forward."""
    stops = list(range(2, 12))
    rollout = sample(model, eos_token_id=stops, answers_per_prompt=3, batch_size=batch_size)
    assert rollout.prompt_lens.tolist() == [len(prompt) for prompt in PROMPTS for _ in range(3)]
    assert [row[: len(p)] for row, p in zip(rollout.sequences[::3].tolist(), PROMPTS)] == PROMPTS
    assert len({tuple(response) for response in rollout.responses()}) > len(PROMPTS)
    scored = token_logprobs(model, rollout.sequences, rollout.prompt_lens, rollout.response_mask)
    torch.testing.assert_close(rollout.rollout_logprobs, scored.detach(), rtol=0, atol=1e-5)


def test_answers_of_a_prompt_share_its_forward():
    model = Scripted()
    rollout = sample(model, [[10], [20, 30]], eos_token_id=60, max_new_tokens=2, answers_per_prompt=4)
    assert rollout.responses() == [[11, 12]] * 4 + [[31, 32]] * 4
    assert [len(call["input_ids"]) for call in model.calls] == [2, 8]


def test_bytes_of_a_slot_are_those_that_a_rollout_takes(model, monkeypatch):
    """Of every family, whatever its layers store: multi-head latent attention keeps less than its keys and values."""
    made, make = [], rllr.rollout.Decoder
    monkeypatch.setattr(
        rllr.rollout, "Decoder", lambda *args, **options: made.append(make(*args, **options)) or made[0]
    )
    sample(model)
    cache, before = made[0].cache, torch.get_rng_state()
    assert cache.nbytes() == cache.slots * bytes_per_slot(model.train(), cache.length) > 0
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_bytes_of_a_slot_where_layers_have_heads_of_their_own():
    """Gemma 4: no `head_dim` holds for all layers."""
    if not hasattr(transformers, "Gemma4UnifiedTextConfig"):
        pytest.skip("this transformers has no Gemma 4 of one stack")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Gemma4UnifiedTextConfig(
        **sizes, vocab_size=61, num_hidden_layers=2, head_dim=8, global_head_dim=24,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert bytes_per_slot(model, 10) == 10 * 2 * 2 * (8 + 24) * 4


def test_a_memory_limit_lowers_the_number_of_slots(llama):
    """Two layers of two key-value heads of 8 numbers, keys and values, 4 bytes: 256 bytes a token."""
    assert [slots_within(limit, llama, 10) for limit in (0, 2560, 5119, 5120, 25600)] == [1, 1, 1, 2, 10]
    assert slots_within(2560, llama.bfloat16(), 10) == 2
    seen, llama = [], tiny_model("llama")
    llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sample(llama, [[5, 6]] * 6, max_new_tokens=8, cache_bytes=2 * 2560)
    assert max(seen) == 2


def test_the_memory_is_free_again_at_once(llama, monkeypatch):
    """Keys and values must not wait for Python's next collection: the update needs the room."""
    seen, plain = [], SlotLayer.lazy_initialization
    monkeypatch.setattr(
        SlotLayer, "lazy_initialization", lambda self, *kv: seen.append(weakref.ref(self)) or plain(self, *kv)
    )
    gc.disable()
    try:
        rollout = sample(llama)
        assert len(rollout.responses()) == len(PROMPTS) and len(seen) == 2 and [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_batch_size_is_a_limit():
    model = Scripted()
    sample(model, [[10]] * 5, eos_token_id=11, batch_size=2)
    assert [len(call["input_ids"]) for call in model.calls] == [2, 2, 1]


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="max_new_tokens"):
        sample(Scripted(), **arguments)


def test_dropout_is_off_while_sampling_and_the_mode_comes_back():
    """Also when the model raises in the middle."""
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = sample(model, greedy=True)
    assert not model.training
    rollout = sample(model.train(), greedy=True)
    assert model.training and rollout.responses() == expected.responses()
    scripted = Scripted().train()
    sample(scripted, max_new_tokens=2)
    assert scripted.training and not any(call["training"] for call in scripted.calls)
    scripted.get_output_embeddings = None
    with pytest.raises(TypeError):
        sample(scripted)
    assert scripted.training


def test_no_gradient_and_no_change_of_the_global_random_state(llama):
    """Prompt order, sampling and minibatches are separate streams."""
    before = torch.get_rng_state()
    rollout = sample(llama)
    assert not rollout.rollout_logprobs.requires_grad
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_answers_draw_no_random_number(llama):
    """A run's evaluations would otherwise change the dropout of the steps after them."""
    before = torch.get_rng_state()
    generate(llama, PROMPTS, max_new_tokens=3, eos_token_id=EOS, greedy=True)
    assert torch.equal(torch.get_rng_state(), before)
    generate(llama, PROMPTS, max_new_tokens=3, eos_token_id=EOS)  # sampled, without a generator: of torch's own
    assert not torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_answers(llama):
    """And another seed, others."""
    first, again, other = sample(llama), sample(llama), sample(llama, seed=1)
    assert torch.equal(first.sequences, again.sequences)
    assert torch.equal(first.rollout_logprobs, again.rollout_logprobs)
    assert first.responses() != other.responses()


# ---- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_exact_distribution(temperature):
    """Chi-square of 20,000 draws against softmax(logits / temperature); impossible tokens never come."""
    logits = torch.tensor([-torch.inf, 0.5, -1.0, -torch.inf, 1.5, 0.0, -2.0, 1.0, -torch.inf])
    p = (logits.double() / temperature).softmax(-1)
    draws = 20_000
    sampler = Sampler(temperature, key=3)
    tokens, logprobs = sampler(logits.expand(draws, -1), torch.arange(draws), torch.zeros(draws, dtype=torch.long))
    counts = torch.bincount(tokens, minlength=len(p)).double()
    possible = p > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - draws * p).square() / (draws * p))[possible].sum().item()
    assert statistic < 22.5  # 99.9 % quantile with 5 degrees of freedom is 20.5
    torch.testing.assert_close(logprobs.double(), p.log()[tokens], rtol=0, atol=1e-6)


def test_first_tokens_follow_the_models_distribution(llama):
    """The same through `generate`: one step, 4,000 copies of one prompt."""
    logits = llama(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].detach()
    p = (logits.double() / 0.6).softmax(-1)
    rollout = sample(llama, [[5, 6, 7]] * 4000, max_new_tokens=1, temperature=0.6, batch_size=4000)
    counts = torch.bincount(rollout.sequences[:, 3], minlength=VOCAB).double()
    common = 4000 * p >= 5
    statistic = ((counts - 4000 * p).square() / (4000 * p))[common].sum().item()
    degrees = int(common.sum())
    assert degrees > 10 and statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("uniform, expected", [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_uniform_draw(uniform, expected):
    """0 must not give the impossible first token, nor the largest draw one past the last possible token."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert inverse_cdf(logits, torch.tensor([[uniform]], dtype=torch.float64))[0].item() == expected


def splitmix64(seed, count):
    """The first outputs of the published generator, by Python's own integers."""
    found, mask = [], 2**64 - 1
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_the_random_numbers_are_those_of_splitmix64():
    """The published outputs for seed 1234567; then our draws: the key's stream gives each place a stream of its own."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for key in (0, 1234567, 2**63 + 5, -1):
        streams = splitmix64(key, 5)
        places, counts = torch.tensor([0, 0, 4, 4]), torch.tensor([0, 6, 0, 2])
        expected = [(splitmix64(streams[p], 7)[t] >> 11) / 2**53 for p, t in zip(places.tolist(), counts.tolist())]
        given = uniforms(Sampler(1.0, key=key).key, places, counts)
        assert given.tolist() == expected and given.dtype == torch.float64


def test_random_numbers_are_uniform_along_answers_and_across_them():
    """Chi-squared over 50 cells; neighbours in either direction are not correlated (0 +- 4 / sqrt n)."""
    places, counts = (x.flatten() for x in torch.meshgrid(torch.arange(300), torch.arange(200), indexing="ij"))
    draws = uniforms(5, places, counts).view(300, 200)
    cells = torch.bincount((draws.flatten() * 50).long(), minlength=50).double()
    assert ((cells - 1200).square() / 1200).sum() < 49 + 4 * 98**0.5
    for first, second in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        r = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(r) < 4 / first.numel() ** 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_do_not_depend_on_slots_and_neighbours(model, batch_size):
    """Nor on what else is asked: an answer follows from the key and from its prompt's place."""
    stops = list(range(2, 12))
    whole = sample(model, PROMPTS, eos_token_id=stops, batch_size=7, answers_per_prompt=2).responses()
    assert sample(model, PROMPTS, eos_token_id=stops, batch_size=batch_size, answers_per_prompt=2).responses() == whole
    first = sample(model, PROMPTS[:2], eos_token_id=stops, batch_size=batch_size, answers_per_prompt=2).responses()
    assert first == whole[:4]
    assert whole[0] != whole[1] or whole[2] != whole[3]  # copies draw numbers of their own


def test_greedy_records_the_logprob_at_temperature():
    none = torch.zeros(1, dtype=torch.long)
    token, logprob = Sampler(0.5, greedy=True)(torch.tensor([[0.0, 1.0]]), none, none)
    assert token.item() == 1
    assert logprob.item() == pytest.approx(torch.tensor([0.0, 2.0]).log_softmax(0)[1].item(), abs=1e-6)


# ---- what the cache cannot do ----------------------------------------------------------------------------------------


def test_a_sliding_window_shorter_than_the_sequence_is_refused():
    """Mistral's window of 8; exactly as long is fine."""
    model = tiny_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding window of 8"):
        sample(model, [[5, 6, 7]], max_new_tokens=6)
    sample(model, [[5, 6, 7]], max_new_tokens=5)


def fake(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize("kinds", [["full_attention", "linear_attention"], ["mamba"]])
def test_recurrent_layers_are_refused(kinds):
    with pytest.raises(ValueError, match="layers that store only keys and values"):
        check_cache_support(fake(layer_types=kinds), 4)


@pytest.mark.parametrize(
    "kind, refused", [("dynamic", True), ("longrope", True), ("linear", False), ("default", False)]
)
def test_rotary_embeddings_that_depend_on_the_longest_row_are_refused(kind, refused):
    config = fake(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    if refused:
        with pytest.raises(ValueError, match=kind):
            check_cache_support(config, 9)
    else:
        check_cache_support(config, 9)
    for inside in ({"original_max_position_embeddings": 9}, {}):  # in the scaling, or beside it, as Phi-3 had it
        scaling = {"rope_type": kind, "factor": 2.0, **inside}
        check_cache_support(
            fake(rope_scaling=scaling, original_max_position_embeddings=9, max_position_embeddings=99), 9
        )


@pytest.mark.parametrize(
    "config, refused",
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, True),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}, False),
        ({"layer_types": ["full_attention"], "sliding_window": 8}, False),
        ({"layer_types": None, "sliding_window": 8}, True),
        ({"layer_types": None, "sliding_window": 8, "use_sliding_window": False}, False),
        ({"layer_types": None, "sliding_window": None}, False),
        ({}, False),
    ],
)
def test_which_windows_count(config, refused):
    """Nine tokens in all."""
    if refused:
        with pytest.raises(ValueError, match="sliding window"):
            check_cache_support(fake(**config), 9)
    else:
        check_cache_support(fake(**config), 9)
