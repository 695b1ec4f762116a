"""Check an audit trail, which train_ppo.py --audit N writes, or read the story of one token.

    python -m rllr.audit replay runs/sst2/ppo-label                      # every number computed again, by other code
    python -m rllr.audit replay runs/sst2/ppo-label/audit/step-000003.jsonl
    python -m rllr.audit explain runs/sst2/ppo-label --step 3 --sample 12 --token 4

replay needs nothing but the trail. Exit code 0: every number follows from the others; 1: one does not, or a line is not
as it was written. docs/audit.md says what the trail holds.
"""

import argparse
import sys

from .common.errors import InputError, command
from .report.explain import explain
from .report.replay import QUANTITIES, TOLERANCE, replay
from .report.trail_format import files_in, read_trail, step_of

SHOWN = 10  # findings and problems that are printed


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m rllr.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("replay", help="compute every number again and compare")
    story = commands.add_parser("explain", help="one token: each equation with its numbers put in")
    for part in (check, story):
        part.add_argument("path", help="a run's directory, its audit folder, or one file of it")
    check.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"of a difference; relative above 1 (default: {TOLERANCE:g})"
    )
    for name, of_what in (("step", "the rollout, from 1"), ("sample", "the answer, from 0"), ("token", "from 0")):
        story.add_argument(f"--{name}", type=int, required=name != "step", help=of_what)
    return parser


def tell_replay(found, files):
    """What a replay has found, for people."""
    print(f"{'quantity':20}{'compared':>10}   {'largest difference':20}where")
    for quantity in QUANTITIES:
        if quantity in found.counts:
            difference, where = found.largest.get(quantity, (None, ""))
            told = "equal" if not difference else f"{difference:.1e}"
            print(f"{quantity:20}{found.counts[quantity]:10,}   {told:20}{where if difference else ''}".rstrip())
    compared = f"{sum(found.counts.values()):,} numbers of {len(files)} rollout{'s' * (len(files) != 1)}"
    if found.holds:
        print(f"{compared}: each follows from the others")
        return
    for problem in found.problems[:SHOWN]:
        print(problem, file=sys.stderr)
    first = found.first()
    for finding in first[:SHOWN]:
        print(finding, file=sys.stderr)
    rest = len(found.findings) + len(found.problems) - len(first[:SHOWN]) - len(found.problems[:SHOWN])
    more = f"; {rest} more, which may follow from these" if rest else ""
    print(
        f"{compared}: {len(found.findings)} do not follow from the others, {len(found.problems)} lines are not as "
        f"they were written{more}",
        file=sys.stderr,
    )


@command
def main(argv=None):
    args = make_parser().parse_args(argv)
    files = files_in(args.path)
    if args.command == "replay":
        found = replay(map(read_trail, files), args.tolerance)
        tell_replay(found, files)
        sys.exit(0 if found.holds else 1)
    by_step = {step_of(path): path for path in files}
    step = next(iter(by_step)) if args.step is None and len(files) == 1 else args.step
    if step not in by_step:
        known = ", ".join(map(str, list(by_step)[:20])) + ", ..." * (len(by_step) > 20)
        raise InputError(f"--step {step}: not in this trail, which has steps {known}")
    print(explain(read_trail(by_step[step]), args.sample, args.token))


if __name__ == "__main__":
    main()
