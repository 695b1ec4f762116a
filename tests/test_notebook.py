"""docs/one-step.ipynb runs from top to bottom, and what it prints is what stands in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "docs" / "one-step.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def printed():
    """What the notebook shows of its prints."""
    outputs = [output for cell in CODE for output in cell["outputs"] if output["output_type"] == "stream"]
    assert all(output["name"] == "stdout" for output in outputs)
    return "".join("".join(output["text"]) for output in outputs)


def test_it_was_run_and_shows_its_pictures():
    kinds = [output["output_type"] for cell in CODE for output in cell["outputs"]]
    assert "error" not in kinds and kinds.count("display_data") == 3
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_it_names_no_place():
    assert not re.search(r"/(tmp|home|work|root)\b", json.dumps(NOTEBOOK))


@pytest.mark.slow
def test_it_runs(tmp_path):
    """In a process of its own, from the folder that it lies in."""
    pytest.importorskip("matplotlib", reason="the notebook draws with matplotlib")
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in CODE), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT / "docs", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]

    first = [line for line in printed().splitlines() if line][:2]
    assert done.stdout.splitlines()[:1] == first[:1]  # the roles do not depend on versions, what is sampled may
    ours, theirs = (text.count("score") for text in (printed(), done.stdout))
    assert ours == theirs == 8
    assert re.search(r"first_ratio_error\s+0\n", done.stdout)
