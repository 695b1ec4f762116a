"""A mutation fuzzer over everything that is read: data, pairs, tasks, configs, records, adapters, caches, checkpoints, answers.

    python benchmarks/fuzz.py --inputs 200000

Every input must end in a result or in our own error with the file's name: no other exception, no hang, bounded memory.
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

PATIENCE = 25  # failures shown of one target before it is left alone


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="in all, in equal shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    root, failures, rows, began = Path(tempfile.mkdtemp(prefix="rllr-fuzz-")), [], {}, time.monotonic()
    for name in args.targets:
        fuzzer, rng, count, started = (
            Fuzzer(name, root),
            random.Random(f"{args.seed}/{name}"),
            Counter(),
            time.monotonic(),
        )
        for seed in fuzzer.seeds:
            assert fuzzer(seed) == "result", f"{name}: the seed itself is refused"
        for _ in range(-(-args.inputs // len(args.targets))):
            try:
                count[fuzzer(spoil(rng, fuzzer.seeds))] += 1
            except AssertionError as failure:
                count["failed"] += 1
                failures.append(str(failure))
                print(f"FAILED {failure}", flush=True)
                if count["failed"] == PATIENCE:
                    break
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
        f"{total} inputs, seed {args.seed}, {time.monotonic() - began:.0f} s, {len(failures)} failures. Peak MB: of the process so far, torch "
        "and transformers included.",
        "",
        "| target | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |" for name, row in rows.items()),
    ]
    write_result(
        "fuzz",
        "Mutated inputs",
        lines,
        {"seed": args.seed, "inputs": total, "failures": failures[:20], "targets": rows},
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
