"""A mutation fuzzer for all inputs: data, pairs, tasks, configs, records, adapters, caches, checkpoints, answers.

    python benchmarks/fuzz.py --inputs 200000

Every input must give a result or our own error with the file's name: no other exception, no hang, bounded memory.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests"))

from fuzzing import TARGETS, Fuzzer, spoil  # noqa: E402

PATIENCE = 25  # failures after which a target is not tested further


def fuzz(name, root, inputs, seed):
    """(counts of results, refusals and failures; messages of the failures) of one target."""
    fuzzer, rng, count, failures = Fuzzer(name, root), random.Random(f"{seed}/{name}"), Counter(), []
    for valid in fuzzer.seeds:
        assert fuzzer(valid) == "result", f"{name}: the unchanged input is refused"
    for _ in range(inputs):
        try:
            count[fuzzer(spoil(rng, fuzzer.seeds))] += 1
        except AssertionError as failure:
            count["failed"] += 1
            failures.append(str(failure))
            print(f"FAILED {failure}", flush=True)
            if count["failed"] == PATIENCE:
                break
    return count, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="in all, in equal shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    root, failures, rows, began = Path(tempfile.mkdtemp(prefix="rllr-fuzz-")), [], {}, time.monotonic()
    for name in args.targets:
        started = time.monotonic()
        count, failed = fuzz(name, root, -(-args.inputs // len(args.targets)), args.seed)
        failures += failed
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows[name] = {
            **{k: count[k] for k in ("result", "refused", "failed")},
            "seconds": round(time.monotonic() - started, 1),
            "peak MB": round(memory),
        }
        print(name, rows[name], flush=True)
    total = sum(row["result"] + row["refused"] + row["failed"] for row in rows.values())
    columns = ("result", "refused", "failed", "seconds", "peak MB")
    lines = [
        f"{total} inputs, seed {args.seed}, {time.monotonic() - began:.0f} s, {len(failures)} failures. Peak MB: of "
        "the process so far, with torch and transformers.",
        "",
        "| target | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |" for name, row in rows.items()),
    ]
    record = {"seed": args.seed, "inputs": total, "failures": failures[:20], "targets": rows}
    write_result("fuzz", "Mutated inputs", lines, record)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
