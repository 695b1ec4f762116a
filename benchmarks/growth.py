"""Measure how time and memory grow with the number of prompts, the length of answers, the batch and the model.

    python benchmarks/growth.py

Each row is a separate process: a rollout, the scoring of its answers without gradient, and the forward and backward of
one optimiser step over `batch` of them. Work is counted in floating-point operations of real tokens (prompts through
the layers, answers through layers and head; three times that in the update). So a constant rate means that the time
grows in proportion to the work.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time

import torch
from common import SHAPES, body_and_head, draw_prompts, forced_rollout, make_model, net_peak_mb, set_up, write_result

DEFAULT = {"shape": "S", "prompts": 64, "answer": 32, "batch": 16}
AXES = {
    "prompts": [64, 128, 256, 512],
    "answer": [16, 32, 64, 128, 256],
    "batch": [4, 16, 64],
    "shape": ["S", "M", "L"],
}
PHASES = ("rollout", "score", "update")


def one(setting):
    """{phase: [GFLOP, CPU seconds, net peak MB]} of the second run of each phase, in this fresh process."""
    from rllr.logprobs import token_logprobs

    set_up(1)
    model = make_model(setting["shape"])
    prompts = draw_prompts(setting["prompts"], SHAPES[setting["shape"]]["vocab_size"])
    lengths = [setting["answer"]] * len(prompts)
    body, head = body_and_head(model)
    state = {}

    def rollout():
        state["packed"] = forced_rollout(model, prompts, lengths).packed

    def rows_of(count):
        return state["packed"].rows(slice(count))

    def score():
        with torch.no_grad():
            for start in range(0, len(prompts), 16):
                token_logprobs(model, *state["packed"].rows(slice(start, start + 16)))

    def update():
        token_logprobs(model, *rows_of(setting["batch"])).sum().backward()

    def work(count):
        return 2e-9 * (body * (sum(map(len, prompts[:count])) + sum(lengths[:count])) + head * sum(lengths[:count]))

    gflop = {"rollout": work(None), "score": work(None), "update": 3 * work(setting["batch"])}
    results = {}
    for name, run in zip(PHASES, (rollout, score, update)):
        run()
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # returns the memory that the first run freed, so that the peak counts it
        start = time.process_time()
        peak = net_peak_mb(run)
        results[name] = [gflop[name], time.process_time() - start, max(0.0, peak)]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="used by this script itself: a row's settings as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    lines = [
        f"From {DEFAULT}, one setting changed at a time; every answer has the full length. One thread, float32, the "
        "second run of each phase. MB: peak minus the memory held before (weights, gradients, sequences).",
        "",
        "| | rollout s | GFLOP/s | MB | score s | GFLOP/s | MB | update s | GFLOP/s | MB |",
        "|---|" + "---|" * 9,
    ]
    rows = []
    for axis, values in AXES.items():
        for value in values:
            setting = DEFAULT | {axis: value}
            command = [sys.executable, __file__, "--one", json.dumps(setting)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [f"{seconds:.2f} | {gflop / seconds:.0f} | {peak:.0f}" for gflop, seconds, peak in found.values()]
            lines.append(f"| {axis} {value} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
            rows.append({**setting, "phases": found})
    write_result("growth", "time and memory", lines, {"rows": rows})


if __name__ == "__main__":
    main()
