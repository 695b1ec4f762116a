"""Rollouts against transformers' own engines: the same prompts, the same number of tokens per answer, the same precision.

    python benchmarks/rollout.py --shape S --prompts 256
    python benchmarks/rollout.py --shape M --prompts 64 --dtype bf16 --peers generate batching

The answers' lengths are drawn once and forced on every engine (EOS forbidden before, certain at the end), so that all do
identical work and only useful tokens count. Log-probabilities of ours are checked against a float32 full forward.
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
    """EOS never before a row's length is reached, and surely then; finished rows may write what they like."""

    def __init__(self, lengths, prompt_width):
        self.lengths, self.prompt_width = torch.tensor(lengths), prompt_width

    def __call__(self, input_ids, scores):
        return force(scores, self.lengths <= input_ids.shape[1] - self.prompt_width + 1)


def hf_generate(model, prompts, lengths, **settings):
    """transformers' generate, 64 left-padded prompts at a time. Returns nothing but does all the work."""
    for start in range(0, len(prompts), SLOTS):
        batch = prompts[start : start + SLOTS]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=CAP, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0,
            eos_token_id=EOS, logits_processor=[ForceLengths(lengths[start : start + SLOTS], width)], **settings,
        )  # fmt: skip


def hf_continuous_batching(model, prompts, lengths):
    """transformers' paged continuous batching; each request has its own number of tokens.

    Its pages are sized for 64 requests of this length: with the defaults it reserves gigabytes and takes ten times as long.
    """
    from transformers import ContinuousBatchingConfig

    config = GenerationConfig(max_new_tokens=CAP, do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    pages = SLOTS * -(-(max(map(len, prompts)) + CAP) // 32)
    paging = ContinuousBatchingConfig(
        page_size=32, num_blocks=pages, max_batch_tokens=1024, max_requests_per_batch=SLOTS
    )
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
    """Against a float32 full forward of each row alone, with EOS forced as in the run."""
    worst, exact = 0.0, model.float() if next(model.parameters()).dtype != torch.float32 else model
    for row in range(min(rows, len(rollout.sequences))):
        start, length = int(rollout.prompt_lens[row]), int(rollout.response_lens[row])
        ids = rollout.sequences[row : row + 1, : start + length]
        logits = exact(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
        logits[:, EOS] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, ids[0, start:].unsqueeze(-1)).squeeze(-1)[: length - 1]
        worst = max(worst, float((rollout.rollout_logprobs[row, : length - 1] - expected).abs().max())
                    if length > 1 else 0.0)  # fmt: skip
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
    peers = {
        "generate": ("transformers generate", lambda: hf_generate(model, prompts, lengths)),
        "static": ("generate, static cache", lambda: hf_generate(
            model, prompts, lengths, cache_implementation="static", disable_compile=True)),
        "batching": ("continuous batching", lambda: hf_continuous_batching(model, prompts, lengths)),
    }  # fmt: skip
    engines |= dict(peers[name] for name in args.peers)
    times = measure(engines, args.repeats)
    memory, rate = peak_memory_mb(), gemm_rate()
    rollout = forced_rollout(model, prompts, lengths)
    error = worst_logprob_error(model, rollout)
    useful, base = sum(lengths), next(iter(dict(peers[name] for name in args.peers)), "rllr")
    body, head = body_and_head(model)
    flops = 2 * (sum(map(len, prompts)) * body + useful * (body + head))
    lines = [
        f"{len(prompts)} prompts of 16 to 96 tokens, {useful} answer tokens ({useful / len(prompts):.1f} a row, at most {CAP}), "
        f"{SLOTS} at a time in the peers, {args.dtype}; median of {args.repeats}, in turns. Worst log-probability error against a float32 "
        f"full forward: {error:.1e}. Peak memory of the process: {memory:.0f} MB.",
        "",
        f"| engine | useful tokens/s (CPU) | CPU s | wall s | times {base} |",
        "|---|---|---|---|---|",
    ]
    for name, ratio in ratios(times, base).items():
        cpu, wall = median(times[name]), median(times[name], 1)
        lines.append(f"| {name} | {useful / cpu:.0f} | {cpu:.2f} | {wall:.2f} | {ratio:.2f} |")
    if args.dtype == "fp32":
        lines += ["", f"Ours reaches {100 * flops / median(times['rllr']) / 1e9 / rate:.0f} % of this machine's measured matrix "
                      f"product rate ({rate:.0f} GFLOP/s), counting real tokens only."]  # fmt: skip
    record = {
        "shape": args.shape, "prompts": len(prompts), "dtype": args.dtype, "useful_tokens": useful, "times": times,
        "ratios": ratios(times, base), "base": base, "logprob_error": error, "peak_memory_mb": memory, "gemm_gflops": rate,
    }  # fmt: skip
    write_result("rollout", f"{args.shape}, {len(prompts)} prompts, {args.dtype}", lines, record)


if __name__ == "__main__":
    main()
