"""Recorded decoding steps, as far as a CPU can tell: that a step could be recorded, and that replays give the same
answers.

The stand-in for a CUDA graph below computes nothing when it records, reads nothing but tensors when it replays, and
refuses operations that a real one cannot contain. tests/test_gpu.py records for real.
"""

import pytest
import torch
import transformers
from families import VOCAB, tiny_model
from test_rollout import PROMPTS, naive_greedy
from torch.utils._python_dispatch import TorchDispatchMode

import rllr.rollout
from rllr.engine.decoder import Decoder
from rllr.engine.graphs import StepGraphs, shape_for
from rllr.logprobs import token_logprobs
from rllr.rollout import generate

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal.default", "is_nonzero", "lift_fresh")
MORE = PROMPTS + [[row + 20] * (1 + row % 7) for row in range(9)]


class NoLooks(TorchDispatchMode):
    """Fails on operations whose result, or shape, the host has to wait for, or that bring numbers from the host."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        assert not any(look in name for look in LOOKS), f"{name} looks at the device"
        if name.startswith("aten.index"):
            assert all(x.dtype != torch.bool for x in args[1] if torch.is_tensor(x)) if "index_" not in name else True
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def recordable(model):
    """A family's model whose step can be recorded with this transformers."""
    if model.config.model_type == "bloom" and transformers.__version__ < "5.23":
        pytest.skip("here Bloom's alibi is made of Python numbers in every step: it decodes without graphs")
    return model


class FakeGraphs(StepGraphs):
    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.recorded, self.replays = decoder, [], 0

    def _state(self):
        d = self.decoder
        memory = [m for layer in d.cache.layers for m in (layer.keys, layer.values)]
        return [*d._per_slot(), *memory]

    def record(self, step, rows, width):
        before, places = [x.clone() for x in self._state()], [x.data_ptr() for x in self._state()]
        with NoLooks():
            step(rows, width)
        assert [x.data_ptr() for x in self._state()] == places  # a graph would go on writing to the old ones
        for x, old in zip(self._state(), before):
            x.copy_(old)
        if step.__name__ == "_step":
            self.recorded.append((rows, width))
        return Replay(self, step.__name__, rows, width)


class Replay:
    def __init__(self, graphs, name, rows, width):
        self.graphs, self.name, self.shape = graphs, name, (rows, width)

    def replay(self):
        decoder, self.graphs.replays = self.graphs.decoder, self.graphs.replays + 1
        kept = decoder.owners, decoder.host_positions
        decoder.owners = decoder.host_positions = None
        try:
            getattr(decoder, self.name)(*self.shape)
        finally:
            decoder.owners, decoder.host_positions = kept


@pytest.fixture
def graphed(monkeypatch):
    """`generate` as on a GPU, with the stand-in; the list of its decoders' graphs."""
    made = []

    class Graphed(Decoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            assert self.graphs is None  # on a CPU
            self.graphs = FakeGraphs(self)
            made.append(self.graphs)

    monkeypatch.setattr(rllr.rollout, "Decoder", Graphed)
    monkeypatch.setattr(rllr.rollout, "STEPS_PER_LOOK", {"cpu": 3})
    return made


def sample(model, prompts=MORE, seed=0, **arguments):
    draw = torch.Generator().manual_seed(seed)
    return generate(model, prompts, max_new_tokens=12, eos_token_id=list(range(2, 12)), generator=draw, **arguments)


@pytest.mark.parametrize("batch_size", [5, 14])
def test_replays_give_the_answers_of_a_naive_loop(recordable, graphed, batch_size):
    """A step that looks at the host, moves its tensors, or needs Python's lists; idle slots that disturb the others."""
    rollout = sample(recordable, greedy=True, batch_size=batch_size)
    assert rollout.responses() == [naive_greedy(recordable, prompt, set(range(2, 12)), 12) for prompt in MORE]
    assert graphed[0].replays > 8 and len(graphed[0].recorded) < 4


def test_logprobs_of_recorded_steps_are_those_of_a_full_forward(recordable, graphed):
    rollout = sample(recordable, batch_size=6, temperature=0.7, answers_per_prompt=2)
    scored = token_logprobs(recordable, rollout.sequences, rollout.prompt_lens, rollout.response_mask, 0.7)
    torch.testing.assert_close(rollout.rollout_logprobs, scored.detach(), rtol=0, atol=1e-5)
    assert graphed[0].replays > 8


def test_each_replay_draws_anew(graphed):
    """The same noise in every step would make all answers to one prompt's copies alike in a flat model."""
    rollout = sample(tiny_model("llama", scale=1.0), [[5, 6, 7]] * 4, batch_size=4)
    tokens = [token for response in rollout.responses() for token in response]
    assert len(set(tokens)) > len(tokens) / 2 and max(tokens) < VOCAB


@pytest.mark.parametrize(
    "live, slots, width, length, shape",
    [
        (1, 64, 5, 700, (8, 128)), (8, 64, 128, 700, (8, 128)), (9, 64, 129, 700, (16, 256)),
        (33, 64, 257, 700, (64, 512)),
        (64, 64, 513, 700, (64, 700)), (3, 5, 20, 60, (4, 60)), (5, 5, 60, 60, (5, 60)), (1, 1, 1, 4, (1, 4)),
        (13, 100, 1, 128, (13, 128)), (60, 100, 1, 128, (100, 128)),
    ],
)  # fmt: skip
def test_few_shapes(live, slots, width, length, shape):
    assert shape_for(live, slots, width, length) == shape


def test_a_model_that_cannot_be_recorded_decodes_without(graphed, monkeypatch):
    """Of prompts and of the step one warning each, no second attempt, the same answers."""
    attempts = []

    def refuse(self, step, rows, width):
        attempts.append(step.__name__)
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model("llama")
    expected = sample(model, greedy=True, batch_size=5).responses()
    monkeypatch.setattr(FakeGraphs, "record", refuse)
    with pytest.warns(UserWarning, match="CUDA graphs are off.*not permitted") as caught:
        assert sample(model, greedy=True, batch_size=5).responses() == expected
    ours = [warning for warning in caught if "CUDA graphs" in str(warning.message)]
    assert sorted(attempts) == ["_read_prompts", "_step"] and len(ours) == 2


def test_a_shape_runs_eagerly_once_and_is_then_recorded():
    done = []

    class Counting(StepGraphs):
        def record(self, step, rows, width):
            done.append(("record", rows, width))
            return type("Graph", (), {"replay": lambda self: done.append(("replay", rows, width))})()

    run = Counting()
    for shape in ((8, 128), (8, 128), (8, 256), (8, 128)):
        run(lambda rows, width: done.append(("step", rows, width)), *shape)
    assert done == [
        ("step", 8, 128), ("record", 8, 128), ("replay", 8, 128), ("step", 8, 256), ("replay", 8, 128),
    ]  # fmt: skip
