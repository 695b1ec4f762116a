"""Many cells of the quality benchmark, several at once, within a budget of time: no cell is begun that can't end in it.

    python benchmarks/quality_cells.py --budget_s 3600 --at_once 2 --tasks sst2 agnews --seeds 0 1 -- --data data
    python benchmarks/quality_cells.py --budget_s 500 --at_once 3 --cell_s 230 -- --data data --model DIR --jobs 2

What stands behind `--` goes to quality.py. Cells that are there already are left out; the first seed of every task
comes before the second. A cell is taken to need as long as the longest one that has ended in this call, and at least
--cell_s. What a cell leaves that did not end (it failed, or the machine went away) its next run goes on with.
"""

import argparse
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import quality
from stages import ROOT


def run_cells(cells, run, at_once, budget_s, cell_s=0.0, clock=time.monotonic):
    """Run(cell) -> exit status for one cell after the other, some at once. {"done", "failed", "left": cells}.

    cell_s: seconds that a cell is taken to need until one has needed longer.
    """
    found: dict[str, list] = {"done": [], "failed": [], "left": []}
    waiting, lock, begun, longest = list(cells), threading.Lock(), clock(), cell_s

    def work():
        nonlocal longest
        while True:
            with lock:
                if not waiting:
                    return
                cell = waiting.pop(0)
                start = clock()
                if start - begun + longest > budget_s:
                    found["left"].append(cell)
                    continue
            status = run(cell)
            with lock:
                longest = max(longest, clock() - start) if status == 0 else longest
                found["failed" if status else "done"].append(cell)

    with ThreadPoolExecutor(at_once) as pool:
        for worker in [pool.submit(work) for _ in range(at_once)]:
            worker.result()
    return found


def parse(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=quality.TASKS, default=list(quality.TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--at_once", type=int, default=1, help="cells that run at once")
    parser.add_argument("--budget_s", type=float, required=True, help="seconds for all of them")
    parser.add_argument("--cell_s", type=float, default=0.0, help="seconds that a cell is known to need")
    args = parser.parse_args(own)
    if args.at_once < 1:
        parser.error("--at_once: at least 1")
    args.rest = rest
    return args


def missing_cells(args):
    """(task, seed) of every cell that is not there yet, in order; quality.py's own parser sees to the other flags."""
    found = []
    for seed in args.seeds:
        for task in args.tasks:
            cell = quality.Cell(quality.parse([*args.rest, "--task", task, "--seed", str(seed)]))
            if not quality.file_of(cell).exists():
                found.append((task, seed))
    return found


def main(argv=None):
    args = parse(argv)

    def run(cell):
        task, seed = cell
        own = ["--task", task, "--seed", str(seed)]
        command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), *args.rest, *own]
        start = time.monotonic()
        status = subprocess.run(command).returncode
        print(f"{task} {seed}: {'failed' if status else 'done'} after {time.monotonic() - start:.0f} s", flush=True)
        return status

    found = run_cells(missing_cells(args), run, args.at_once, args.budget_s, args.cell_s)
    for name, cells in found.items():
        print(f"{name}: {', '.join(f'{task} {seed}' for task, seed in cells) or 'none'}")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
