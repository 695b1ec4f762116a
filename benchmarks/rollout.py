"""Rollouts of rllr against those of transformers, with the same prompts, answer lengths and precision.

    python benchmarks/rollout.py --shape S --prompts 256
    python benchmarks/rollout.py --shape M --prompts 64 --dtype bf16 --peers generate batching

The lengths of the answers are drawn once and forced on every engine (EOS is impossible before the end and certain
there), so all engines do the same work and only useful tokens count. The log-probabilities of rllr are checked against
a full forward in float32.
"""

import argparse

import torch
from common import (
    EOS,
    body_and_head,
    draw_lengths,
    draw_prompts,
    force,
    forced_rollout,
    gemm_rate,
    make_model,
    measure,
    median,
    peak_memory_mb,
    ratios,
    set_up,
    write_result,
)
from transformers import GenerationConfig, LogitsProcessor

SLOTS, CAP = 64, 64


class ForceLengths(LogitsProcessor):
    """Forces EOS at the given length of each row. What finished rows write after it does not matter."""

    def __init__(self, lengths, prompt_width):
        self.lengths, self.prompt_width = torch.tensor(lengths), prompt_width

    def __call__(self, input_ids, scores):
        return force(scores, self.lengths <= input_ids.shape[1] - self.prompt_width + 1)


def hf_generate(model, prompts, lengths, **settings):
    """transformers' `generate` with 64 left-padded prompts at a time; discards the answers."""
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": EOS}
    for start in range(0, len(prompts), SLOTS):
        batch = prompts[start : start + SLOTS]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        forced = [ForceLengths(lengths[start : start + SLOTS], width)]
        inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": CAP, "logits_processor": forced}
        model.generate(**inputs, **sampling, **settings)


def hf_continuous_batching(model, prompts, lengths):
    """transformers' paged continuous batching; each request has its own number of tokens.

    Its pages suffice for 64 requests of the longest length. The defaults reserve gigabytes and take ten times as long.
    """
    from transformers import ContinuousBatchingConfig

    config = GenerationConfig(max_new_tokens=CAP, do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    pages = SLOTS * -(-(max(map(len, prompts)) + CAP) // 32)
    limits = {"max_batch_tokens": 1024, "max_requests_per_batch": SLOTS}
    paging = ContinuousBatchingConfig(page_size=32, num_blocks=pages, **limits)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=paging)
    manager.start()
    try:
        for prompt, length in zip(prompts, lengths):
            manager.add_request(prompt, max_new_tokens=length)
        done = 0
        while done < len(prompts):
            if manager.get_result(timeout=1) is not None:
                done += 1
    finally:
        manager.stop(block=True)


@torch.no_grad()
def worst_logprob_error(model, rollout, rows=16):
    """Largest difference to a float32 forward of each row alone, with EOS forced as in the run."""
    worst, exact = 0.0, model.float() if next(model.parameters()).dtype != torch.float32 else model
    for row in range(min(rows, len(rollout.sequences))):
        start, length = int(rollout.prompt_lens[row]), int(rollout.response_lens[row])
        ids = rollout.sequences[row : row + 1, : start + length]
        logits = exact(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
        logits[:, EOS] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, ids[0, start:].unsqueeze(-1)).squeeze(-1)[: length - 1]
        if length > 1:
            worst = max(worst, float((rollout.rollout_logprobs[row, : length - 1] - expected).abs().max()))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=["S", "M", "L"])
    parser.add_argument("--prompts", type=int, default=256, help="64: one batch; 256: a queue for 64 slots")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--peers", nargs="*", default=["generate"], choices=["generate", "static", "batching"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    set_up(args.threads)
    model = make_model(args.shape, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    prompts, lengths = draw_prompts(args.prompts, model.config.vocab_size), draw_lengths(args.prompts)
    engines = {"rllr": lambda: forced_rollout(model, prompts, lengths)}
    if len(prompts) > SLOTS:
        engines["rllr, 64 slots"] = lambda: forced_rollout(model, prompts, lengths, slots=SLOTS)
    static = {"cache_implementation": "static", "disable_compile": True}
    peers = {
        "generate": ("transformers generate", lambda: hf_generate(model, prompts, lengths)),
        "static": ("generate, static cache", lambda: hf_generate(model, prompts, lengths, **static)),
        "batching": ("continuous batching", lambda: hf_continuous_batching(model, prompts, lengths)),
    }
    engines |= dict(peers[name] for name in args.peers)
    times = measure(engines, args.repeats)
    memory, rate = peak_memory_mb(), gemm_rate()
    rollout = forced_rollout(model, prompts, lengths)
    error = worst_logprob_error(model, rollout)
    useful, base = sum(lengths), next(iter(dict(peers[name] for name in args.peers)), "rllr")
    body, head = body_and_head(model)
    flops = 2 * (sum(map(len, prompts)) * body + useful * (body + head))
    lines = [
        f"{len(prompts)} prompts of 16 to 96 tokens, {useful} answer tokens ({useful / len(prompts):.1f} a row, at "
        f"most {CAP}), {SLOTS} at a time in the peers, {args.dtype}; median of {args.repeats}, in turns. Worst "
        f"log-probability error against a float32 full forward: {error:.1e}. Peak memory of the process: "
        f"{memory:.0f} MB.",
        "",
        f"| engine | useful tokens/s (CPU) | CPU s | wall s | times {base} |",
        "|---|---|---|---|---|",
    ]
    for name, ratio in ratios(times, base).items():
        cpu, wall = median(times[name]), median(times[name], 1)
        lines.append(f"| {name} | {useful / cpu:.0f} | {cpu:.2f} | {wall:.2f} | {ratio:.2f} |")
    if args.dtype == "fp32":
        share = 100 * flops / median(times["rllr"]) / 1e9 / rate
        note = f"rllr reaches {share:.0f} % of this machine's measured matrix product rate ({rate:.0f} GFLOP/s)"
        lines += ["", f"{note}, counting real tokens only."]
    record = {
        "shape": args.shape,
        "prompts": len(prompts),
        "dtype": args.dtype,
        "useful_tokens": useful,
        "times": times,
        "ratios": ratios(times, base),
        "base": base,
        "logprob_error": error,
        "peak_memory_mb": memory,
        "gemm_gflops": rate,
    }
    write_result("rollout", f"{args.shape}, {len(prompts)} prompts, {args.dtype}", lines, record)


if __name__ == "__main__":
    main()
