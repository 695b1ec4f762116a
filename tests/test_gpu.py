"""What only a GPU shows. Skipped without one; the same code runs on a CPU in the other tests."""

import pytest
import torch
import transformers
from families import tiny_model
from test_graphs import MORE
from test_passes import assert_close, packed, train
from test_rollout import naive_greedy

import rllr.engine.kept
import rllr.rollout
from rllr.engine.norms import fuse_norms
from rllr.layout import Packed
from rllr.logprobs import token_logprobs, token_logprobs_and_entropy
from rllr.model.backbone import backbone_of
from rllr.model.cast_once import CastWeights
from rllr.model.loading import load_policy
from rllr.model.lora import add_adapter
from rllr.model.passes import set_recording
from rllr.model.precision import set_precision
from rllr.model.roles import RolePolicy
from rllr.rollout import generate
from rllr.run.optimizer import Optimizer, gradient_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STOPS = list(range(2, 12))


def sample(model, prompts=MORE, seed=0, **arguments):
    draw = torch.Generator("cuda").manual_seed(seed)
    return generate(model, prompts, max_new_tokens=12, eos_token_id=STOPS, generator=draw, batch_size=6, **arguments)


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that were made."""
    made, plain = [], rllr.rollout.Decoder
    monkeypatch.setattr(
        rllr.rollout, "Decoder", lambda *args, **kwargs: made.append(plain(*args, **kwargs)) or made[-1]
    )
    return made


def test_recorded_steps_give_the_answers_of_a_naive_loop_on_the_cpu(family, decoders, recwarn):
    model = tiny_model(family)
    expected = [naive_greedy(model, prompt, set(STOPS), 12) for prompt in MORE]
    assert sample(model.cuda(), greedy=True).responses() == expected
    if family != "bloom" or transformers.__version__ >= "5.23":  # before, Bloom's step cannot be recorded
        assert decoders[0].graphs._graphs and not [w for w in recwarn if "CUDA graphs are off" in str(w.message)]


def test_logprobs_are_those_of_a_full_forward_on_the_cpu(family):
    model = tiny_model(family)
    rollout = sample(model.cuda(), temperature=0.7)
    given = (x.cpu() for x in (rollout.sequences, rollout.prompt_lens, rollout.response_mask))
    scored = token_logprobs(model.cpu(), *given, 0.7).detach()
    torch.testing.assert_close(rollout.rollout_logprobs.cpu(), scored, rtol=0, atol=1e-4)


def test_draws_repeat_with_the_seed_and_differ_between_steps():
    model = tiny_model("llama", scale=1.0).cuda()
    first, again, other = sample(model), sample(model), sample(model, seed=1)
    assert torch.equal(first.sequences, again.sequences) and first.responses() != other.responses()
    tokens = [token for response in first.responses() for token in response]
    assert len(set(tokens)) > 30  # of 61: the flat model hardly repeats itself unless the noise does


def test_autocast_rollouts_agree_with_their_own_scoring():
    """bf16 products in both: small differences, no garbage from a weight cast while recording."""
    model = tiny_model("llama").cuda()
    set_precision("bf16")
    try:
        rollout = sample(model)
        scored = token_logprobs(model, *rollout.packed).detach()
    finally:
        set_precision("fp32")
    plain = token_logprobs(model, *rollout.packed).detach()
    assert (scored - plain).abs().max() > 1e-4  # it was really on
    gap = (rollout.rollout_logprobs - scored.float()).abs()[rollout.response_mask]
    assert gap.mean() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_that_live_on_see_weights_that_changed_in_place(decoders, precision):
    """Four calls, an optimiser's changes between them, other prompts and seeds; beside each a decoder of its own."""
    model, draw = tiny_model("llama").cuda(), torch.Generator("cuda").manual_seed(0)
    set_precision(precision)
    try:
        for call in range(4):
            prompts = MORE[call:] + MORE[:call]
            kept = sample(model, prompts, call)
            if call:
                assert len(decoders) == 1 and decoders[0].graphs._graphs
            living = dict(rllr.engine.kept._kept)
            rllr.engine.kept._kept.clear()
            own = sample(model, prompts, call)
            del decoders[1:]
            rllr.engine.kept._kept.update(living)
            assert kept.responses() == own.responses()
            torch.testing.assert_close(kept.rollout_logprobs, own.rollout_logprobs, rtol=0, atol=1e-4)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.05 * torch.randn(weight.shape, generator=draw, device="cuda"))
        assert decoders[0].graphs.count_of(decoders[0]._read_prompts)  # prompts are recorded, too
    finally:
        set_precision("fp32")
        rllr.engine.kept._kept.clear()


@pytest.mark.parametrize("adapters", [False, True])
def test_weights_that_are_cast_once_give_the_answers_of_autocast(decoders, monkeypatch, adapters):
    model = tiny_model("llama").cuda()
    if adapters:
        add_adapter(model, "one", 4, 64)
        model = RolePolicy(model, "one")
    set_precision("bf16")
    try:
        found = sample(model)
        rllr.engine.kept._kept.clear()
        monkeypatch.setattr(rllr.rollout, "CastWeights", lambda model, room: CastWeights(model, 0))
        expected = sample(model)
    finally:
        set_precision("fp32")
        rllr.engine.kept._kept.clear()
    assert [bool(decoder.weights.nbytes()) for decoder in decoders] == [True, False]
    assert found.responses() == expected.responses()
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=1e-4)


def test_a_kept_decoder_outlives_an_update_and_an_emptied_allocator(decoders):
    model = tiny_model("llama").cuda()
    first = sample(model)
    sample(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    token_logprobs(model, *first.packed).sum().backward()
    optimizer.step(), optimizer.zero_grad()
    torch.cuda.empty_cache()
    assert sample(model).responses() == first.responses() and len(decoders) == 1


def test_a_loaded_model_has_fused_norms_and_the_numbers_of_a_cpu(tmp_path):
    """Logits and gradients."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    model, twin = load_policy(tmp_path, device="cuda"), load_policy(tmp_path)
    assert fuse_norms(model) == 0 and fuse_norms(tiny_model("qwen3").cuda()) == 9
    batch = packed()
    for each, own in ((model, on_gpu(batch)), (twin, batch)):
        token_logprobs(each.requires_grad_(True), *own).sum().backward()
    assert_close([p.grad.cpu() for p in model.parameters()], [p.grad for p in twin.parameters()], atol=1e-2)


# ---- recorded passes of whole sequences (--cuda_graphs) --------------------------------------------------------------


@pytest.fixture
def recording():
    set_recording(True)
    yield
    set_recording(False)


def on_gpu(batch):
    return Packed(*(tensor.cuda() for tensor in batch))


def passes_of(model):
    return vars(backbone_of(model))["_rllr_passes"]


def test_training_by_recorded_passes_is_training_on_the_cpu(family, recording, recwarn):
    """Two micro-batches a step, weights that change in place, two shapes: log-probabilities, gradients, weights."""
    model, twin = (tiny_model(family).requires_grad_(True) for _ in range(2))
    batches = [packed(width=width, seed=width) for width in (13, 13, 30, 13, 30, 13)]
    seen, gradients = train(model.cuda(), [on_gpu(batch) for batch in batches])
    expected, expected_gradients = train(twin, batches)
    assert_close([x.cpu() for x in seen], expected, atol=1e-3)
    assert_close([x.cpu() for x in gradients], expected_gradients, atol=2e-2)
    assert_close([p.detach().cpu() for p in model.parameters()], twin.parameters(), atol=1e-3)
    off = [str(w.message) for w in recwarn if "--cuda_graphs is off" in str(w.message)]
    if family != "bloom" or transformers.__version__ >= "5.23":  # before, Bloom's pass cannot be recorded
        assert len(passes_of(model).recorded) == 2 and not off, off


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_scoring_sees_weights_that_changed_in_place(recording, precision):
    model, draw = tiny_model("llama").cuda().requires_grad_(True), torch.Generator("cuda").manual_seed(0)
    set_precision(precision)
    try:
        for call in range(6):
            batch = on_gpu(packed(seed=call))
            found = token_logprobs_and_entropy(model, *batch)
            set_recording(False)
            expected = token_logprobs_and_entropy(model, *batch)
            set_recording(True)
            assert_close(found, expected, atol=1e-3 if precision == "fp32" else 0.3)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.05 * torch.randn(weight.shape, generator=draw, device="cuda"))
    finally:
        set_precision("fp32")
    assert len(passes_of(model).recorded) == 1


def test_adapters_learn_by_recorded_passes(recording):
    base = tiny_model("llama").cuda().requires_grad_(False)
    add_adapter(base, "policy", 4, 64)
    policy, reference = RolePolicy(base, "policy"), RolePolicy(base, None)
    optimizer = torch.optim.SGD(policy.parameters(), 0.05)
    for call in range(6):
        batch = on_gpu(packed(seed=call))
        gradients = []
        for recorded in (False, True):
            set_recording(recorded)
            optimizer.zero_grad()
            (token_logprobs(policy, *batch) - token_logprobs(reference, *batch).detach()).sum().backward()
            gradients.append([p.grad.clone() for p in policy.parameters()])
        assert_close(*gradients, atol=1e-2)
        optimizer.step()
    assert len(passes_of(policy).recorded) == 1


def test_recording_moves_no_random_stream_and_an_emptied_allocator_no_pass(recording):
    model, batch = tiny_model("llama").cuda().requires_grad_(True), on_gpu(packed())
    torch.cuda.manual_seed(3)
    for _ in range(4):
        logprobs = token_logprobs(model, *batch)
        logprobs.sum().backward()
        found = logprobs.detach().clone()
        del logprobs
    assert len(passes_of(model).recorded) == 1
    drawn = torch.rand(1, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(1, device="cuda"), drawn)
    torch.cuda.empty_cache()
    assert_close([token_logprobs(model, *batch).detach()], [found])


def test_a_pass_that_cannot_be_recorded_leaves_pytorch_as_it_was(recording, monkeypatch):
    """The current stream, and random draws, which torch 2.11 refused after a recording that failed."""
    model, batch, stream = tiny_model("llama").cuda(), on_gpu(packed()), torch.cuda.current_stream()
    layer, plain = backbone_of(model).layers[1], backbone_of(model).layers[1].forward
    monkeypatch.setattr(layer, "forward", lambda *args, **more: plain(*args, **more) if args[0].sum().item() else None)
    with pytest.warns(UserWarning, match="--cuda_graphs is off"):
        for _ in range(4):
            found, _ = token_logprobs_and_entropy(model, *batch)
    assert torch.cuda.current_stream() == stream and torch.rand(2, device="cuda").ne(0).all()
    set_recording(False)
    assert_close([found], [token_logprobs_and_entropy(model, *batch)[0]], atol=1e-3)


def test_the_next_micro_batch_is_recorded_while_a_stage_adds_up_gradients(recording):
    model = tiny_model("llama").cuda().requires_grad_(True)
    optimizer = Optimizer(model, 1e-3, 10)
    for _ in range(3):
        micro_batches = [(on_gpu(packed(seed=part)), 1.0) for part in range(4)]
        gradient_step(optimizer, micro_batches, lambda part: token_logprobs(model, *part).sum())
    assert len(passes_of(model).recorded) == 1
