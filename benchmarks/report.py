"""How fast the report page opens with many audited tokens: seconds in headless Chromium until it can be used.

    python benchmarks/report.py --run runs/demo/ppo-label [--tokens 50000]     # a run with an audit trail

The run's audited rollouts are repeated until there are so many tokens. From the start of navigation to: the curves in
sight drawn, the table of answers filled, the first token's numbers shown. Median of five visits. Needs playwright and
chromium.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from common import write_result
from playwright.sync_api import sync_playwright

from rllr.report.collect import find_runs
from rllr.report.page import build
from rllr.report.trail_format import read_trail

USABLE = """() => {
  const ready = document.body.dataset, table = document.getElementById("answer-table");
  return ready.page === "ready" && ready.curves === "ready" && (!table || ready.answers === "ready")
    && document.querySelector("#token-numbers dd");
}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--tokens", type=int, default=50_000)
    args = parser.parse_args()
    (run,) = find_runs([args.run])
    size = sum(sum(map(len, read_trail(path).tokens)) for path in run.trails) / len(run.trails)
    run.trails = (run.trails * (1 + args.tokens))[: max(1, round(args.tokens / size))]
    page_file = Path(tempfile.mkdtemp(prefix="rllr-report-")) / "report.html"
    page_file.write_text(build([run], most_tokens=10 * args.tokens), encoding="utf-8")
    times = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(6):
            page = browser.new_page(viewport={"width": 1300, "height": 900})
            page.goto(page_file.as_uri(), wait_until="commit")
            page.wait_for_function(USABLE)
            times.append(page.evaluate("performance.now()") / 1000)
            page.close()
        browser.close()
    times = times[1:]  # the first one starts the browser
    megabytes = page_file.stat().st_size / 1e6
    shutil.rmtree(page_file.parent)
    rows = round(size * len(run.trails))
    record = {"tokens": rows, "megabytes": round(megabytes, 1), "seconds": [round(t, 2) for t in times]}
    lines = [
        f"{rows:,} audited tokens, {megabytes:.1f} MB: {statistics.median(times):.2f} s from opening to usable "
        f"(median of five visits, {min(times):.2f} .. {max(times):.2f})."
    ]
    write_result("report", "how fast the report page opens", lines, record)


if __name__ == "__main__":
    main()
