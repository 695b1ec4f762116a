"""The gain of each technique of the rollout engine: rollouts of 256 prompts, each with one technique switched off.

    python benchmarks/ablation.py --shape S
    python benchmarks/ablation.py --shape M --precision bf16 --adapters --prompts 64

The rows are measured in turns in one process, with the forced answer lengths of rollout.py. Techniques that this
machine does not use (oneDNN on processors that are not AMD's), or this precision, show 1.00.
"""

import argparse
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from common import (
    draw_lengths,
    draw_prompts,
    forced_rollout,
    gemm_rate,
    make_model,
    measure,
    median,
    ratios,
    set_up,
    write_result,
)

CAP = 64


@contextmanager
def decoders_with(**attributes):
    """Within the block, new decoders get these attributes."""
    from rllr.engine.decoder import Decoder

    plain = Decoder.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        vars(self).update(attributes)

    with mock.patch.object(Decoder, "__init__", init):
        yield


def multinomial(logits, uniform):
    """The sampling of most libraries, in place of `inverse_cdf`."""
    probabilities = logits.softmax(-1)
    token = torch.multinomial(probabilities, 1)
    return token.squeeze(1), probabilities.gather(1, token).squeeze(1).log()


@contextmanager
def whole_batches():
    """Within the block, a batch of answers is decoded to the end of its longest one."""
    with no_refill(), mock.patch("rllr.rollout.STEPS_PER_LOOK", {"cpu": CAP}):
        yield


def no_refill():
    return mock.patch("rllr.rollout.ADMIT_SHARE", 1.0)


def without_packed_weights(replacement):
    """rllr's rollout with another context manager for the model's linear layers."""
    return mock.patch("rllr.rollout.packed_linears", replacement)


def weights_cast_by_autocast():
    """Within the block, no weights are cast before a rollout."""
    from rllr.model.cast_once import CastWeights

    return mock.patch("rllr.rollout.CastWeights", lambda model, room: CastWeights(model, 0))


def with_adapters(model):
    """A policy made of adapters of rank 16 on the frozen model."""
    from rllr.model.lora import add_adapter
    from rllr.model.roles import RolePolicy

    add_adapter(model, "policy", 16, 32)
    return RolePolicy(model, "policy")


def techniques():
    """{row of the table: (a function that returns a context manager without the technique, slots)}."""
    from rllr.engine.linear import fast_linears

    return {
        "everything": (nullcontext, 128),
        "64 slots instead of 128": (nullcontext, 64),
        "64 slots, no refill: each batch to its end, finished rows dropped": (no_refill, 64),
        "64 slots, no refill, finished rows kept to the longest one's end": (whole_batches, 64),
        "sampling by torch.multinomial": (lambda: mock.patch("rllr.engine.sampling.inverse_cdf", multinomial), 128),
        "prompts padded instead of packed": (lambda: decoders_with(packs_prompts=False), 128),
        "torch's fused attention to the slots": (lambda: decoders_with(in_pieces=False), 128),
        "transformers' attention to the slots": (lambda: decoders_with(own_attention=False, in_pieces=False), 128),
        "weights cast by autocast, not once a rollout": (weights_cast_by_autocast, 128),
        "oneDNN's products, weights laid out as torch has them": (lambda: without_packed_weights(fast_linears), 128),
        "torch's own matrix products": (lambda: without_packed_weights(lambda model: nullcontext()), 128),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=["S", "M", "L"])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--adapters", action="store_true", help="adapters of rank 16 on a frozen base")
    args = parser.parse_args()
    set_up(args.threads)
    from rllr.model.precision import set_precision

    set_precision(args.precision)
    model = with_adapters(make_model(args.shape)) if args.adapters else make_model(args.shape)
    prompts, lengths = draw_prompts(args.prompts, model.config.vocab_size), draw_lengths(args.prompts)

    def run(without, slots):
        with without():
            forced_rollout(model, prompts, lengths, slots=slots)

    rows = {name: lambda settings=settings: run(*settings) for name, settings in techniques().items()}
    times = measure(rows, args.repeats)
    lines = [
        f"{args.prompts} prompts of 16 to 96 tokens, {sum(lengths)} answer tokens, {args.precision}; median of "
        f"{args.repeats}, in turns; matrix products {gemm_rate():.0f} GFLOP/s.",
        "",
        "| | CPU s | useful tokens/s | times slower than everything |",
        "|---|---|---|---|",
    ]
    for name, ratio in ratios(times, "everything").items():
        cpu = median(times[name])
        lines.append(f"| {name} | {cpu:.2f} | {sum(lengths) / cpu:.0f} | {1 / ratio:.2f} |")
    record = {"shape": args.shape, "prompts": args.prompts, "precision": args.precision, "adapters": args.adapters}
    record |= {"times": times, "ratios": ratios(times, "everything")}
    settings = f"{', bf16 autocast' * (args.precision == 'bf16')}{', adapters on a frozen base' * args.adapters}"
    write_result("ablation", f"{args.shape}, {args.prompts} prompts{settings}", lines, record)


if __name__ == "__main__":
    main()
