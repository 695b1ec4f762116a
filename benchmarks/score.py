"""Scoring a rollout without gradient: old and reference log-probabilities, values and rewards of 64 answers.

    python benchmarks/score.py --shape S

rllr against the plain way of TRL 1.12: one padded batch, full logits, log-softmax of all of them, and the hidden states
of every layer kept for the value head. Both use the same four models and sequences, and the numbers must agree.
"""

import argparse

import torch
from common import (
    body_and_head,
    draw_lengths,
    draw_prompts,
    gemm_rate,
    make_model,
    measure,
    median,
    ratios,
    set_up,
    write_result,
)

SEQUENCES = 64


@torch.no_grad()
def plain(models, packed):
    """(log-probabilities, the reference's log-probabilities, values [B, T - 1], scores [B]) of padded rows."""
    policy, reference, value_model, reward_model = models
    sequences, prompt_lens, mask = packed
    lengths = prompt_lens + mask.sum(1)
    attention = (torch.arange(sequences.shape[1]) < lengths.unsqueeze(1)).long()
    results = []
    for model in (policy, reference):
        logits = model(input_ids=sequences, attention_mask=attention, use_cache=False).logits[:, :-1]
        results.append(logits.log_softmax(-1).gather(-1, sequences[:, 1:].unsqueeze(-1)).squeeze(-1))
    for model in (value_model, reward_model):
        hidden = model.backbone(
            input_ids=sequences, attention_mask=attention, use_cache=False, output_hidden_states=True
        ).hidden_states[-1]
        results.append(model.scores_at(hidden))
    return results[0], results[1], results[2], results[3][torch.arange(len(sequences)), lengths - 1]


@torch.no_grad()
def ours(models, packed, tokens_per_batch):
    """The same numbers by rllr, the first three as [B, R]."""
    from rllr.layout import micro_batches
    from rllr.logprobs import token_logprobs, token_logprobs_and_entropy

    policy, reference, value_model, reward_model = models
    logprobs, ref_logprobs, values = (torch.zeros(packed.response_mask.shape) for _ in range(3))
    scores = torch.zeros(len(packed.sequences))
    lengths = packed.lengths.tolist()
    for rows in micro_batches(list(range(len(lengths))), lengths, tokens=tokens_per_batch):
        part = packed.rows(rows)
        width = part.response_mask.shape[1]
        logprobs[rows, :width], _ = token_logprobs_and_entropy(policy, *part)
        ref_logprobs[rows, :width] = token_logprobs(reference, *part)
        values[rows, :width], scores[rows] = value_model(*part), reward_model(*part)
    return logprobs, ref_logprobs, values, scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=["S", "M", "L"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    set_up(args.threads)
    from rllr.layout import pack_sequences, response_places
    from rllr.model.heads import RewardModel, ValueModel

    policy, reference = make_model(args.shape), make_model(args.shape, seed=3)
    value_model = ValueModel.from_policy(make_model(args.shape, seed=1))
    torch.nn.init.normal_(value_model.head.weight, std=0.02)
    models = policy, reference, value_model, RewardModel.from_policy(make_model(args.shape, seed=2))
    prompts, lengths = draw_prompts(SEQUENCES, policy.config.vocab_size), draw_lengths(SEQUENCES)
    packed = pack_sequences(prompts, [[5 + (row + t) % 1000 for t in range(n)] for row, n in enumerate(lengths)])
    engines = {
        "padded, full logits": lambda: plain(models, packed),
        "rllr, all at once": lambda: ours(models, packed, 0),
        "rllr, 2048 tokens per batch": lambda: ours(models, packed, 2048),
    }
    places = response_places(*packed[1:])
    expected = plain(models, packed)
    found = ours(models, packed, 2048)
    error = max(float((found[i][packed[2]] - expected[i][places]).abs().max()) for i in range(3))
    error = max(error, float((found[3] - expected[3]).abs().max()))
    assert error < 1e-4, error
    times = measure(engines, args.repeats)
    real, base = sum(map(len, prompts)) + sum(lengths), next(iter(engines))
    body, head = body_and_head(policy)
    flops = 2 * (4 * real * body + 2 * sum(lengths) * head)
    rate = gemm_rate()
    lines = [
        f"{SEQUENCES} sequences, {real} real of {packed[0].numel()} padded tokens, {sum(lengths)} of them answers, "
        f"float32; median of {args.repeats}, in turns. Largest difference of any number: {error:.0e}.",
        "",
        f"| variant | CPU s | times faster | share of the matrix product rate ({rate:.0f} GFLOP/s), real tokens |",
        "|---|---|---|---|",
    ]
    for name, ratio in ratios(times, base).items():
        cpu = median(times[name])
        lines.append(f"| {name} | {cpu:.3f} | {ratio:.2f} | {100 * flops / cpu / 1e9 / rate:.0f} % |")
    record = {"shape": args.shape, "times": times, "ratios": ratios(times, base), "error": error, "gemm_gflops": rate}
    write_result("score", f"{args.shape}, {SEQUENCES} sequences, four models", lines, record)


if __name__ == "__main__":
    main()
