"""A model's trial before a run begins: do sampling and packing give the numbers of the model's own forward?

Some families keep a memory that is no cache of keys and values, place tokens by themselves, or see a window of the
text that neither argument nor mask tells of. They would run through all stages and answer nonsense. So a few rows, the
run's longest among them, are decoded token by token here, and compared.
"""

from contextlib import nullcontext

import torch

from ..common.errors import InputError, out_of_memory
from ..engine.attention import backbone_alone, packs_like, remember_packing, takes_our_attention
from ..engine.cache import eval_mode
from ..engine.decoder import Decoder
from ..engine.limits import check_cache_support
from ..engine.linear import packed_linears
from .backbone import backbone_of, lm_logits, shared_decoder
from .precision import autocast
from .shards import gathered

DECODED = 4  # tokens of each row that are decoded one by one
# KL divergence, in nats, of the sampled distribution from the forward's: what rounding gives is 1e-9 and 1e-3 at most.
MOST_KL = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.1}
LONGEST = 32  # texts, the longest in characters, that are looked at for the longest in tokens
LOWEST = -1e4  # stands for the log-probability of a token that a model rules out


class _Teacher:
    """In the sampler's place: writes down what would be sampled from, and gives the tokens that are to come."""

    def __init__(self, tokens):
        self.tokens, self.logprobs = tokens, []  # [rows, DECODED]; [rows, V] a step

    def __call__(self, logits, places, counts):
        token = self.tokens[:, len(self.logprobs)]
        self.logprobs.append(logits.log_softmax(-1))
        return token, torch.zeros(len(token), device=token.device)


def check_policy(model, encoder, task, examples, *, max_new_tokens, name, log=None, alike=()):
    """What every stage asks of a policy before it begins: the prompts reach it, its answers can be read
    (`Encoder.check`), and sampling from it is exact (`try_model`). InputError where that is not so. log gets one
    prompt as the model sees it."""
    encoder.check(task, examples[0], log)
    by_size = sorted(examples, key=lambda e: len(e.text) + len(e.text_b or ""))
    few = by_size[:1] + by_size[-LONGEST:]  # the longest in tokens is among the longest in characters
    try_model(model, encoder.prompts(task, few), max_new_tokens, name, alike)


def try_model(model, prompts, max_new_tokens, name, alike=()):
    """InputError, which names the family and the reason, where this model cannot be sampled from exactly.

    prompts: the run's, as lists of ids; the longest and the shortest are tried, with answers of max_new_tokens.
    alike: models of the same kind that follow its verdict about packing. Touches no random stream.
    """
    family = f"{name}: {type(model).__name__}"
    rows = [_filled(prompt, len(prompt) + max_new_tokens) for prompt in _few(prompts)]
    try:
        check_cache_support(model, max(map(len, rows)))
    except ValueError as error:
        raise InputError(f"{family} cannot be used: {error}") from None
    # Layers that are put together in bfloat16 need autocast: they are tried in the precision of the run.
    low = getattr(shared_decoder(model), "rllr_low", False)
    try:
        exact = nullcontext() if low else torch.autocast(model.device.type, enabled=False)
        with torch.no_grad(), eval_mode(model), gathered(model), autocast(model.device), exact:
            divergence = _try(model, [torch.tensor(row, device=model.device) for row in rows], alike)
    except Exception as error:
        if out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{family} cannot be used: decoding it token by token failed ({type(error).__name__}: {first:.200}); "
            "rollouts need a decoder that takes input_ids, position_ids and a cache of keys and values"
        ) from error
    if not divergence <= MOST_KL.get(torch.bfloat16 if low else model.get_input_embeddings().weight.dtype, 0.1):
        raise InputError(
            f"{family} cannot be used: decoded token by token, with rows of {min(map(len, rows))} to "
            f"{max(map(len, rows))} tokens side by side, its distributions are {divergence:.2g} nats off those "
            "of its own forward. State-space and recurrent layers, own masks and own positions do that; take "
            "another model, or shorter texts where it is a window"
        )


def _few(prompts):
    """The longest prompt and the shortest: rows of mixed length."""
    return [max(prompts, key=len), min(prompts, key=len)]


def _filled(prompt, length):
    """A row of that many tokens: the prompt's, again and again, so that they are such as the model knows."""
    return (prompt * (length // len(prompt) + 1))[:length]


def _try(model, rows, alike):
    """The largest KL, in nats, between decoding and forward. Forbids packing where it gives other numbers."""
    backbone = backbone_of(model)
    alone = [backbone_alone(backbone, row) for row in rows]
    if model.device.type == "cpu" and takes_our_attention(backbone):
        verdict = packs_like(backbone, rows, alone)
        for other in (model, *alike):
            remember_packing(backbone_of(other), max(map(len, rows)), verdict)
    decoded = min(DECODED, min(map(len, rows)) - 1)
    teacher = _Teacher(torch.stack([row[-decoded:] for row in rows]))
    none = torch.zeros(0, dtype=torch.long, device=model.device)
    decoder = Decoder(
        backbone, lambda hidden: lm_logits(model, hidden), teacher,
        slots=len(rows), length=max(map(len, rows)), max_new_tokens=decoded, stop_ids=none, device=model.device,
        records=False,  # a recorded step would not call the teacher
    )  # fmt: skip
    with packed_linears(model):
        decoder.admit([row[:-decoded].tolist() for row in rows], list(range(len(rows))))
        for _ in range(decoded - 1):
            decoder.step()
    divergences = []
    for step, sampled in enumerate(teacher.logprobs):
        places = [len(row) - decoded - 1 + step for row in rows]
        expected = lm_logits(model, torch.stack([hidden[place] for hidden, place in zip(alone, places)])).log_softmax(
            -1
        )
        expected, sampled = expected.clamp(min=LOWEST), sampled.clamp(min=LOWEST)
        divergences.append((expected.exp() * (expected - sampled)).sum(-1))
    return float(torch.stack(divergences).double().max())
