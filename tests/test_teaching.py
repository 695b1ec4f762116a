"""The pages that teach: doctests run, numbers are computed again, and figures are what their scripts draw."""

import doctest
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import train_ppo
from rllr.rewards import label_sensitive_reward

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
PAGE = (ROOT / "docs" / "label-sensitive-reward.md").read_text(encoding="utf-8")


def run_doctests(page, least):
    """The names that the doctests of a page leave behind. AssertionError where one prints something else."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    assert all(block.startswith(">>> ") for block in blocks)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, page, 0)
    told = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=told.append, clear_globs=False)
    assert result.failed == 0, "".join(told)
    assert result.attempted >= least
    return test.globs


# ---- docs/label-sensitive-reward.md ----------------------------------------------------------------------------------


def four_answers():
    """[(name, label score, rationale score, {column: reward})] of the page's table."""
    head, _, *rows = (line.strip("| ").split(" | ") for line in re.findall(r"(?m)^\|.*$", PAGE))
    assert head[:3] == ["answer", "label score", "rationale score"]
    return [(row[0], float(row[1]), float(row[2]), dict(zip(head[3:], map(float, row[3:])))) for row in rows]


def test_the_doctests_of_the_label_page():
    """Pairs and rewards are what the page shows, and its tensors are its table."""
    names = run_doctests("label-sensitive-reward.md", 18)
    answers = four_answers()
    assert names["label"].tolist() == [label for _, label, _, _ in answers]
    assert names["rationale"].tolist() == [rationale for _, _, rationale, _ in answers]


def test_the_table_of_four_answers():
    """min left out, or a threshold that is not the column's."""
    answers = four_answers()
    assert [name for name, *_ in answers] == ["right, good", "right, bad", "wrong, good", "wrong, bad"]
    label, rationale = (torch.tensor([row[i] for row in answers], dtype=torch.float64) for i in (1, 2))
    for column in answers[0][3]:
        cells = [row[3][column] for row in answers]
        threshold = float(column.removeprefix("threshold ")) if column != "sum" else float("inf")
        assert cells == [min(row[1], threshold) + row[2] for row in answers], column
        assert cells == label_sensitive_reward(label, rationale, threshold, "mixed").tolist(), column


def test_what_the_page_says_of_the_thresholds():
    """Which answer wins under which rule, where the two ties are, and that no other decimal stands in the text."""
    rewards = {column: [row[3][column] for row in four_answers()] for column in four_answers()[0][3]}
    plain, good, low, high = (rewards[name] for name in ("sum", "threshold 1", "threshold -2", "threshold 4"))
    assert max(plain) == plain[1]
    assert max(good) == good[0] and min(good[:2]) > max(good[2:])
    assert low[0] == low[2] == max(low) and len({low[i] - row[2] for i, row in enumerate(four_answers())}) == 1
    assert high == plain

    (right_good, right_bad, wrong_good, _) = [(label, rationale) for _, label, rationale, _ in four_answers()]

    def reward(answer, threshold):
        return min(answer[0], threshold) + answer[1]

    for bound, above, below in ((-0.5, right_bad, wrong_good), (2.5, right_bad, right_good)):
        assert reward(above, bound) == reward(below, bound)
        assert reward(above, bound + 0.1) > reward(below, bound + 0.1)
        assert reward(above, bound - 0.1) < reward(below, bound - 0.1)
    text = re.sub(r"(?ms)^```.*?^```|^\|.*?$|\]\([^)]*\)", "", PAGE)
    default = train_ppo.Config.__dataclass_fields__["threshold"].metadata["help"]
    assert "1.0" in default
    assert re.findall(r"-?\d+\.\d+", text) == ["3.2", "3.4", "-0.5", "2.5", "1.0", "0.9"]
    assert re.findall(r"\bat (-?\d+)\b", text) == [column.split()[-1] for column in list(rewards)[1:]]


def test_the_line_of_train_ppo():
    (line,) = re.findall(r"(?ms)^```text\n(.*?)\n```", PAGE)
    assert (ROOT / "train_ppo.py").read_text(encoding="utf-8").count(line) == 1


def test_the_figure_shows_the_tables_answers():
    script = runpy.run_path(str(FIGURES / "label_sensitive_reward.py"))
    assert f"threshold {script['THRESHOLD']:g}" in four_answers()[0][3]
    for name, label, rationale, rewards in four_answers():
        drawn, kind, _ = script["ANSWERS"][name]
        assert (drawn, script["RATIONALES"][kind]) == (label, rationale)
        assert script["reward"]([drawn], kind) == [rewards[f"threshold {script['THRESHOLD']:g}"]]


# ---- figures ---------------------------------------------------------------------------------------------------------

SCRIPTS = sorted(FIGURES.glob("*.py"))
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


def drawing(svg):
    """(what is drawn, without its numbers; the numbers) of an SVG, without its metadata and its hashed names."""
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    svg = re.sub(r"\b([mp])[0-9a-f]{10}\b", r"\1", svg)
    return re.sub(NUMBER, "0", svg), [float(number) for number in re.findall(NUMBER, svg)]


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_figures_are_what_their_scripts_draw(tmp_path, monkeypatch, script):
    """A figure that was not drawn again; another matplotlib may draw the same in other commands."""
    matplotlib = pytest.importorskip("matplotlib", reason="the figures are drawn with matplotlib")
    committed = script.with_name(script.stem.replace("_", "-") + ".svg").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "figure.svg")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(script), run_name="__main__")
    drawn = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and "<dc:date>" not in drawn + committed
    assert len(committed) < 60_000
    version = re.search(r"Matplotlib v([\w.]+)", committed)[1]
    if version == matplotlib.__version__:
        (shape, numbers), (kept, before) = drawing(drawn), drawing(committed)
        assert shape == kept
        assert numbers == pytest.approx(before, abs=1e-3)


def test_every_figure_has_its_script():
    names = {path.stem.replace("-", "_") for path in FIGURES.glob("*.svg")}
    assert names == {script.stem for script in SCRIPTS} == {"ppo_by_hand", "label_sensitive_reward"}
