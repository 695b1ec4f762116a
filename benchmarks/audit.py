"""What the audit trail costs: PPO steps with and without it, in turn, in one run.

    python benchmarks/audit.py --policy runs/demo/sft --label_rm runs/demo/rm-label      # after `make demo`

With --audit every:2 each second step is audited. A step's time is the difference of `seconds` in metrics.jsonl; the
first pair of steps is left out.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from common import step_times, write_result

import train_ppo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--label_rm", required=True)
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--rollout_prompts", type=int, default=128)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="rllr-audit-")) / "run"
    never = str(args.steps + 1)
    train_ppo.main(
        ["--policy", args.policy, "--label_rm", args.label_rm, "--output_dir", str(directory), "--audit", "every:2",
         "--steps", str(args.steps), "--rollout_prompts", str(args.rollout_prompts), "--eval_rows", "20",
         "--save_every", "0", "--log_every", never, "--show_every", never, "--eval_every", never]
    )  # fmt: skip
    times = step_times(directory)
    pairs = [(times[step], times[step - 1]) for step in sorted(times) if step % 2 == 0 and step > 2]
    sizes = [path.stat().st_size / 1e6 for path in sorted((directory / "audit").glob("*.jsonl"))]
    shutil.rmtree(directory.parent)
    audited, plain = (statistics.median(column) for column in zip(*pairs))
    ratios = sorted(audited / plain for audited, plain in pairs)
    record = {
        "answers": args.rollout_prompts,
        "plain_s": round(plain, 3),
        "audited_s": round(audited, 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "megabytes": round(statistics.median(sizes), 2),
    }
    lines = [
        f"{len(pairs)} pairs of steps of {args.rollout_prompts} answers, medians: {plain:.2f} s, with a trail "
        f"{audited:.2f} s;",
        f"ratio pair by pair {record['ratio']:.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f}). A rollout's file: "
        f"{record['megabytes']:.1f} MB.",
    ]
    write_result("audit", "what the audit trail costs", lines, record)


if __name__ == "__main__":
    main()
