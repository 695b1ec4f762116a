"""Check an audit trail, which train_ppo.py --audit N writes, or read the story of one token.

    python -m rllr.audit replay runs/sst2/ppo-label                      # every number computed again, by other code
    python -m rllr.audit replay runs/sst2/ppo-label/audit/step-000003.jsonl
    python -m rllr.audit explain runs/sst2/ppo-label --step 3 --sample 12 --token 4

replay computes from the trail alone; a run's metrics.jsonl says whether rollouts are missing at its end. Exit code 0:
every number follows from the others; 1: one does not, or a line is not as it was written. docs/audit.md says what the
trail holds.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

from .common.errors import InputError, brief_list, command
from .common.files import METRICS, RUN, read_json
from .report.explain import explain
from .report.fields import COUNT, OBJECT, OR_NULL, TEXT, check_fields, read_lines
from .report.replay import QUANTITIES, TOLERANCE, replay
from .report.trail_format import audited, files_in, read_trail, step_of

MOST_MISSING = 20  # rollouts that are named as missing
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


def tell_replay(found):
    """What a replay has found, for people."""
    print(f"{'quantity':20}{'compared':>10}   {'largest difference':20}where")
    for quantity in QUANTITIES:
        if quantity in found.counts:
            difference, where = found.largest.get(quantity, (None, ""))
            told = "equal" if not difference else f"{difference:.1e}"
            print(f"{quantity:20}{found.counts[quantity]:10,}   {told:20}{where if difference else ''}".rstrip())
    steps = list(found.rollouts)
    named = f"rollouts, steps {brief_list(steps)}" if len(steps) > 1 else f"rollout, step {steps[0]}"
    compared = f"{sum(found.counts.values()):,} numbers of {len(steps)} {named}"
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
        f"{compared}: {len(found.findings)} do not follow from the others, {len(found.problems)} other faults{more}",
        file=sys.stderr,
    )


def missing_rollouts(rollouts, last, now):
    """Sentences on rollouts, {step: the --audit of its run}, that a trail should hold from its first one to the step
    `last` of the run, and does not. A resumed run may have another --audit: then those that each of them asks for. now:
    the run's newest; None where it is off, or not known."""
    asked = [audited(spec) for spec in {*rollouts.values(), now} if spec is not None]
    end = max(last if now is not None else 0, max(rollouts))
    steps = (step for step in range(min(rollouts), end + 1) if all(wanted(step) for wanted in asked))
    missing = list(islice((step for step in steps if step not in rollouts), MOST_MISSING)) if asked else []
    named = f"step{'s' * (len(missing) > 1)} {brief_list(missing)}"
    return [f"{named}: --audit asked for it, but its file is not here"] if missing else []


def end_of_run(path):
    """(the last step in the metrics of a run, its --audit), from its directory or its audit folder; (0, None) where
    there is no run."""
    homes = [Path(path), Path(path).parent] if Path(path).is_dir() else []
    home = next((home for home in homes if (home / RUN).is_file()), None)
    if home is None:
        return 0, None
    written = read_json(home / RUN)
    check_fields(written, {"config": OBJECT}, str(home / RUN))
    check_fields(written["config"], {"audit": TEXT + OR_NULL}, f"{home / RUN}: its config", optional=True)
    last = max((line["step"] for line in read_lines(home / METRICS, {"step": COUNT})), default=0)
    return last, written["config"].get("audit")


def chosen_rollout(files, step):
    """The rollout of --step; the only one without it."""
    if len(files) == 1:
        trail = read_trail(files[0])
        if step not in (None, trail.step["step"]):
            raise InputError(f"--step {step}: this trail has step {trail.step['step']} alone")
        return checked(trail, trail.step["step"])
    by_step = {step_of(path): path for path in files}
    if step not in by_step:
        raise InputError(
            f"{f'--step {step}' if step else '--step'}: give one of this trail's steps, {brief_list(by_step)}"
        )
    return checked(read_trail(by_step[step]), step)


def checked(trail, step):
    """A rollout by its name; what is wrong with its lines is told of."""
    if trail.step["step"] != step:
        raise InputError(f"{trail.path}: holds step {trail.step['step']}; replay the trail")
    for problem in trail.problems[:SHOWN]:
        print(f"warning: {problem}", file=sys.stderr)
    return trail


@command
def main(argv=None):
    args = make_parser().parse_args(argv)
    files = files_in(args.path)
    if args.command == "replay":
        found = replay(map(read_trail, files), args.tolerance)
        found.problems += missing_rollouts(found.rollouts, *end_of_run(args.path))
        tell_replay(found)
        sys.exit(0 if found.holds else 1)
    print(explain(chosen_rollout(files, args.step), args.sample, args.token))


if __name__ == "__main__":
    main()
