"""What the guard promises, on real answers: a little of it (`benchmarks/guard.py` simulates a thousand runs a cell)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import guard  # noqa: E402  (benchmarks/guard.py)


@pytest.fixture(scope="module")
def rows():
    return guard.Rows(json.loads(guard.ANSWERS.read_text())[guard.BASIS])


def test_simulated_runs_have_the_truth_they_are_given(rows):
    """200,000 rows of which a quarter change: the mean's standard error is 0.1 points."""
    truth = np.linspace(-0.05, 0.03, len(rows.gains))
    differences, gains = rows.simulated(np.random.default_rng(0), 200_000, truth)
    assert differences.shape == gains.shape == (len(truth), 200_000) and set(np.unique(differences)) == {-1, 0, 1}
    assert np.abs(differences.mean(1) - truth).max() < 0.005
    changed = differences != 0
    assert changed[1:][changed[:-1]].mean() == pytest.approx(rows.staying, abs=0.02)


@pytest.mark.parametrize("name, falls", [(name, falls) for name, (falls, _) in guard.truths(2).items()])
def test_the_promise(rows, name, falls):
    """Of 1,000 dev rows and six looks: at most 5 % of healthy runs are stopped, at least 80 % of those that fall by 5
    points; within three standard errors of what 200 runs show."""
    rng, truth = np.random.default_rng(0), guard.truths(6)[name][1]
    stopped = np.mean([guard.is_stopped(*rows.simulated(rng, 1000, truth)) for _ in range(200)])
    assert stopped > 0.80 - 3 * 0.03 if falls else stopped < 0.05 + 3 * 0.015
