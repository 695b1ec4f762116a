"""Forward and backward of one optimiser step: rllr against the plain way, padded batches with full logits.

    python benchmarks/update.py --shape S --sequences 16

Both use the same weights and sequences (prompts of 16 to 96 tokens, answers of 1 to 64) in float32; the norms of the
gradients must agree. Peak memory is measured in a separate process per variant, minus the memory held before the step.
"""

import argparse
import json
import subprocess
import sys

import torch
from common import draw_lengths, draw_prompts, make_model, measure, median, net_peak_mb, ratios, set_up, write_result

BATCHES = 4  # steps per measurement, so that the result does not depend on one draw of lengths


def draw_batches(count, vocab):
    """[(packed tensors, prompts, answers)]: BATCHES batches of `count` sequences."""
    from rllr.layout import pack_sequences

    prompts = draw_prompts(BATCHES * count, vocab)
    lengths = draw_lengths(BATCHES * count)
    answers = [[5 + (row * 7 + t) % (vocab - 5) for t in range(n)] for row, n in enumerate(lengths)]
    cuts = [slice(i * count, (i + 1) * count) for i in range(BATCHES)]
    return [(pack_sequences(prompts[cut], answers[cut]), prompts[cut], answers[cut]) for cut in cuts]


def plain_step(model, packed, rows):
    """Padded rows [B, T] with a mask, logits [B, T, V] and log-softmax of all of them."""
    sequences, prompt_lens, mask = packed
    attention = (torch.arange(sequences.shape[1]) < (prompt_lens + mask.sum(1)).unsqueeze(1)).long()
    logits = model(input_ids=sequences, attention_mask=attention, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, sequences[:, 1:].unsqueeze(-1)).squeeze(-1)
    steps = torch.arange(sequences.shape[1] - 1)
    start, end = prompt_lens.unsqueeze(1) - 1, (prompt_lens + mask.sum(1)).unsqueeze(1) - 1
    (-(logprobs * ((steps >= start) & (steps < end))).sum() / mask.sum()).backward()


def our_step(model, packed, rows, pack_below=None, micro_batch=0, tokens=0):
    """The step with `token_logprobs`; micro-batches add up to the same gradient."""
    import rllr.model.backbone
    from rllr.layout import micro_batches
    from rllr.logprobs import token_logprobs

    before = rllr.model.backbone.PACK_BELOW
    rllr.model.backbone.PACK_BELOW = before if pack_below is None else pack_below
    try:
        count = packed.response_mask.sum()
        for part in micro_batches(rows, packed.lengths.tolist(), micro_batch, tokens):
            (-token_logprobs(model, *packed.rows(part)).sum() / count).backward()
    finally:
        rllr.model.backbone.PACK_BELOW = before


VARIANTS = {
    "padded, full logits": plain_step,
    "padded, response-only": lambda *a: our_step(*a, pack_below=0.0),
    "rllr (packed, response-only)": our_step,
    "rllr, micro-batches of 8": lambda *a: our_step(*a, micro_batch=8),
    "rllr, micro-batches of 4": lambda *a: our_step(*a, micro_batch=4),
    "rllr, 512 tokens per batch": lambda *a: our_step(*a, tokens=512),
}


def one(name, shape, count):
    """{net peak memory in MB, norm of the gradient} of a single step in this new process."""
    model = make_model(shape).train()
    packed = max((batch[0] for batch in draw_batches(count, model.config.vocab_size)), key=lambda p: p[0].numel())
    for parameter in model.parameters():  # gradients exist in every step except the first
        parameter.grad = torch.zeros_like(parameter)
    small = draw_batches(2, model.config.vocab_size)[0][0]
    VARIANTS[name](model, small, [0, 1])  # lets the libraries allocate their buffers
    for parameter in model.parameters():
        parameter.grad.zero_()
    peak = net_peak_mb(lambda: VARIANTS[name](model, packed, list(range(count))))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    return {"peak_mb": peak, "grad_norm": norm}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=["S", "M", "L"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=list(VARIANTS), help="used by this script itself: a variant's peak memory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args.shape, args.sequences)))
        return
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--shape", args.shape, "--sequences", str(args.sequences), "--one", name]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    set_up(args.threads)
    model = make_model(args.shape).train()
    batches = draw_batches(args.sequences, model.config.vocab_size)
    rows = list(range(args.sequences))

    def step(run):
        for packed, _, _ in batches:
            model.zero_grad(set_to_none=True)
            run(model, packed, rows)

    times = measure({name: lambda run=run: step(run) for name, run in VARIANTS.items()}, args.repeats)
    base = next(iter(VARIANTS))
    norms = [entry["grad_norm"] for entry in memory.values()]
    assert max(norms) - min(norms) < 1e-4 * max(norms), norms
    real = sum(len(text) for _, prompts, answers in batches for text in prompts + answers)
    padded = sum(packed[0].numel() for packed, _, _ in batches)
    lines = [
        f"{BATCHES} steps of {args.sequences} sequences, {real} real of {padded} padded tokens, float32; median of "
        f"{args.repeats}, in turns. Gradient norms agree within {(max(norms) - min(norms)) / max(norms):.0e}.",
        "",
        "| variant | CPU s | times faster | peak memory of the largest step, MB | times smaller |",
        "|---|---|---|---|---|",
    ]
    for name, ratio in ratios(times, base).items():
        peak = memory[name]["peak_mb"]
        smaller = memory[base]["peak_mb"] / peak
        lines.append(f"| {name} | {median(times[name]):.3f} | {ratio:.2f} | {peak:.0f} | {smaller:.2f} |")
    record = {"shape": args.shape, "sequences": args.sequences, "times": times}
    record |= {"ratios": ratios(times, base), "memory": memory}
    write_result("update", f"{args.shape}, {args.sequences} sequences", lines, record)


if __name__ == "__main__":
    main()
