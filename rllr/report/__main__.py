"""A page that shows runs: curves, the outcome, scores, the preview, answers before and after, and tokens.

    python -m rllr.report runs/demo/ppo-label             # writes runs/demo/ppo-label/report.html
    python -m rllr.report runs/demo                       # every run in there, and runs/demo/evaluation
    python -m rllr.report runs/a/ppo-label runs/b/ppo-label --output compared.html

One file, which opens from the disk in any browser, without a network. It needs: pip install ".[report]". Audited
rollouts (train_ppo.py --audit) can be read token by token.
"""

import argparse
from pathlib import Path

from ..common.errors import InputError, command
from ..common.files import disk_faults, write_text
from ..common.log import say
from .collect import EVALUATION, find_runs, read_evaluation

REPORT = "report.html"


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m rllr.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs, or a directory that holds some")
    parser.add_argument("--output", metavar="FILE", help=f"where the page goes (default: {REPORT} in the first RUN)")
    parser.add_argument(
        "--evaluation",
        metavar="DIR",
        help=f"--output_dir of rllr.evaluate (default: {EVALUATION} in the first RUN or beside it, where there is one)",
    )
    parser.add_argument(
        "--audit_rows", type=int, default=50_000, help="tokens of audited rollouts in the page (default: 50000)"
    )
    return parser


def find_evaluation(args):
    """The evaluation to show, None where there is none."""
    if args.evaluation:
        return read_evaluation(args.evaluation)
    first = Path(args.runs[0])
    places = (first / EVALUATION, first.parent / EVALUATION)
    found = next((place for place in places if (place / "evaluate.json").is_file()), None)
    return read_evaluation(found) if found else None


def check_output(path):
    """InputError where the page would replace a file that is no page of ours."""
    from .page import MARK

    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--output {path}: cannot be written; name a file in a directory that is there")
    if path.exists() and MARK.encode() not in path.read_bytes()[:2000]:
        raise InputError(f"--output {path}: exists and is no report of rllr; give another name")


@command
def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        from .page import build
    except ImportError as error:
        raise InputError(f'the report needs {error.name}: pip install ".[report]"') from None
    runs = find_runs(args.runs)
    outcome = find_evaluation(args)
    path = Path(args.output) if args.output else Path(args.runs[0]) / REPORT
    check_output(path)
    page = build(runs, outcome, args.audit_rows, say)
    with disk_faults(f"--output {path}"):
        write_text(path, page.encode("utf-8", "replace").decode())  # half a character, which JSON can hold, is none
    say(f"{', '.join(run.name for run in runs)}: {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")


if __name__ == "__main__":
    main()
