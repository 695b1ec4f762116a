"""Peak memory of a PPO update: four full models (policy, reference, value, reward) against adapters on a shared base.

    python benchmarks/memory.py --shape M

Each row is a separate process; its memory after the imports is subtracted. The step scores a batch with all four roles,
then trains policy and value model with AdamW. The adapters have LoRA rank 16 on q_proj and v_proj.
"""

import argparse
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from common import draw_lengths, draw_prompts, forget_peak, make_model, status_mb, write_result

MODES = ("four models", "shared base, LoRA 16")


def make_roles(mode, shape):
    """(policy, reference, value model, reward model)."""
    from rllr.model.heads import RewardModel, ValueModel
    from rllr.model.roles import RolePolicy, new_role

    if mode == MODES[0]:
        policy, reference = make_model(shape), make_model(shape).requires_grad_(False)
        value, reward = ValueModel.from_policy(make_model(shape)), RewardModel.from_policy(make_model(shape))
        return policy, reference, value, reward.requires_grad_(False)
    base = make_model(shape).requires_grad_(False)
    settings = SimpleNamespace(lora_rank=16, lora_alpha=32, lora_targets=None, use_rslora=False)
    policy, value, reward = (new_role(base, name, settings) for name in ("policy", "value", "label_rm"))
    reward_model = RewardModel.from_policy(reward).requires_grad_(False)
    return policy, RolePolicy(base, None), ValueModel.from_policy(value), reward_model


def one(mode, shape, sequences):
    """{net peak in MB, weights in MB, CPU seconds of the second step}."""
    from rllr.layout import pack_sequences
    from rllr.logprobs import token_logprobs
    from rllr.run.optimizer import Optimizer

    imported = status_mb("VmRSS")
    forget_peak()
    policy, reference, value, reward = make_roles(mode, shape)
    weights = status_mb("VmRSS") - imported
    optimizers = [Optimizer(model, 1e-5, 100).adamw for model in (policy, value)]
    prompts, lengths = draw_prompts(sequences, 8000), draw_lengths(sequences)
    packed = pack_sequences(prompts, [[5 + t for t in range(n)] for n in lengths])
    for _ in range(2):
        start = time.process_time()
        with torch.no_grad():
            old = token_logprobs(policy, *packed)
            scored = token_logprobs(reference, *packed), value(*packed), reward(*packed)
        del scored
        (token_logprobs(policy, *packed) - old).exp().sum().backward()
        value(*packed).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.process_time() - start
    return {"peak_mb": status_mb("VmHWM") - imported, "weights_mb": weights, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M", choices=["S", "M", "L"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--one", choices=MODES, help="used by this script itself: one row of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(one(args.one, args.shape, args.sequences[0])))
        return
    rows, header = {}, "| sequences | | net peak, MB | weights, MB | CPU s per step | times smaller |"
    lines = [header, "|---|---|---|---|---|---|"]
    for count in args.sequences:
        for mode in MODES:
            command = [sys.executable, __file__, "--shape", args.shape, "--sequences", str(count), "--one", mode]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows[f"{mode}, {count}"] = row
            smaller = rows[f"{MODES[0]}, {count}"]["peak_mb"] / row["peak_mb"]
            cells = f"{row['peak_mb']:.0f} | {row['weights_mb']:.0f} | {row['seconds']:.2f} | {smaller:.2f}"
            lines.append(f"| {count} | {mode} | {cells} |")
    title = f"{args.shape}, one update of policy and value model"
    write_result("memory", title, lines, {"shape": args.shape, "rows": rows})


if __name__ == "__main__":
    main()
