"""The quality benchmark: halves of dev, seeds that tune, and tables of hand-made cells against figures by hand."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality
import quality_cells
import quality_tables
import stages
from quality_tables import compare, grouped, page, promise, right, sharing

import train_ppo
import train_rm
import train_sft
from rllr.common.config import parse_config

# ---- halves, seeds, commands -----------------------------------------------------------------------------------------


def test_every_dev_row_is_in_one_half_by_its_id_alone(tmp_path):
    rows = [json.dumps({"id": f"dev-{n}", "text": str(n)}) for n in range(200)]
    (tmp_path / "dev.jsonl").write_text("\n".join(rows) + "\n")
    choose, report = (path.read_text().splitlines() for path in quality.halve(tmp_path / "dev.jsonl", tmp_path))
    assert sorted(choose + report) == sorted(rows) and not set(choose) & set(report)
    assert 70 < len(choose) < 130
    (tmp_path / "dev.jsonl").write_text("\n".join(reversed(rows[:100])) + "\n")
    again = quality.halve(tmp_path / "dev.jsonl", tmp_path)[0].read_text().splitlines()
    assert set(again) == set(choose) & set(rows[:100])


def test_the_halves_are_those_of_the_first_byte_of_sha256(tmp_path):
    # echo -n a | sha256sum: ca978112..., b: 3e23e816..., c: 2e7d2c03..., f: 252f10c8..., i: de7d1b72...
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps({"id": name}) + "\n" for name in "abcfi"))
    choose, report = (path.read_text() for path in quality.halve(tmp_path / "dev.jsonl", tmp_path))
    assert [json.loads(line)["id"] for line in choose.splitlines()] == ["a", "b", "c", "i"]
    assert [json.loads(line)["id"] for line in report.splitlines()] == ["f"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "sst2" / f"{name}.jsonl").write_text('{"id": "a", "text": "b", "label": "negative"}\n')
    return ["--data", str(tmp_path), "--task", "sst2", "--quick", "--runs", str(tmp_path / "runs")]


@pytest.mark.parametrize(
    "flags", [["--seed", "99", "--tune"], ["--seed", "100"], ["--seed", "0", "--ppo", "--steps 2"]]
)
def test_tuning_and_reporting_share_no_seed_and_no_settings(data, flags, capsys):
    with pytest.raises(SystemExit):
        quality.parse([*data, *flags])
    assert "--tune" in capsys.readouterr().err


def test_a_missing_file_is_named(data, capsys):
    with pytest.raises(SystemExit):
        quality.parse([*data, "--task", "mr", "--seed", "0"])
    assert str(Path("mr") / "train.jsonl") in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--seed", "0"], ["--seed", "100", "--tune"]])
def test_where_settings_are_tuned_no_stage_is_told_of_the_reporting_half(data, flags, monkeypatch):
    built = []
    monkeypatch.setattr(quality.Cell, "stage", lambda cell, directory, *words: built.extend(map(str, words)))
    of_stages, _ = quality.prepare(quality.Cell(quality.parse([*data, *flags])))
    told = " ".join([*built, *map(str, of_stages)])
    assert told.count("dev_choose.jsonl") == 2 and ("dev_report.jsonl" in told) is ("--tune" not in flags)


def test_a_command_is_kept_without_this_machines_paths(data, tmp_path):
    cell = quality.Cell(quality.parse([*data, "--seed", "0"]))
    words = [str(ROOT / "train_sft.py"), "--train_file", str(tmp_path / "sst2" / "train.jsonl")]
    words += ["--output_dir", str(cell.directory / "sft")]
    typed = "python train_sft.py --train_file data/sst2/train.jsonl --output_dir runs/sst2-quick/sst2-tiny-0/sft"
    assert cell.as_typed(words) == typed


STAGES = {  # of some methods: which run, and that each follows what it reads
    ("sft", "ppo-label"): ["sft", "rm-label", "ppo-label", "evaluation"],
    ("sft", "ppo-label", "ppo-mixed", "best-of"): [
        "sft", "rm-label", "rm-rationale", "ppo-label", "ppo-mixed", "evaluation", "best-of",
    ],
}  # fmt: skip


@pytest.mark.parametrize("methods", list(STAGES))
def test_only_what_the_methods_need_runs(data, methods, monkeypatch):
    ran = []

    def stage(cell, directory, *words):
        ran.append(directory.name)
        cell.stages[directory.name] = {}
        if directory.name == "evaluation":
            assert [Path(word).name for word in words[words.index("--models") + 1 :] if "ppo" not in str(word)] == [
                "sft"
            ]

    monkeypatch.setattr(quality.Cell, "stage", stage)
    model = ["--model", "a_model", "--precision", "bf16"]
    quality.run_stages(quality.Cell(quality.parse([*data, "--seed", "0", *model, "--methods", *methods])))
    assert ran == STAGES[methods]


def test_stages_that_need_nothing_of_each_other_run_at_once(data):
    cell = quality.Cell(quality.parse([*data, "--seed", "0", "--jobs", "2"]))
    both = threading.Barrier(2, timeout=30)  # neither call returns before the other has begun
    cell.together(both.wait, both.wait)

    def fails():
        sys.exit("a stage failed")

    with pytest.raises(SystemExit, match="a stage failed"):
        cell.together(fails, both.abort)


def test_a_cell_that_would_lose_methods_is_refused_before_anything_runs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "run_stages", lambda cell: pytest.fail("stages run"))
    (tmp_path / "runs" / "cells").mkdir(parents=True)
    file = tmp_path / "runs" / "cells" / "sst2-tiny-0-quick.json"
    file.write_text(json.dumps({"methods": {"sft": {}, "ppo-label/best": {}, "ppo-gold/best": {}, "tfidf": {}}}))
    with pytest.raises(SystemExit, match="this run has not: ppo-gold, tfidf; run with them"):
        quality.main([*data, "--seed", "0", "--methods", "sft", "ppo-label"])


def test_after_a_stage_that_failed_no_other_begins(data):
    cell, begun = quality.Cell(quality.parse([*data, "--seed", "0"])), []
    with pytest.raises(ZeroDivisionError):
        cell.together(lambda: 1 / 0, *[lambda: (begun.append(1), time.sleep(0.2))] * 5)
    assert len(begun) <= 1  # the next one may be on its way


def test_a_stage_runs_once_and_its_own_processor_time_is_kept(tmp_path):
    script = tmp_path / "work.py"
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[2]).mkdir()\nsum(range(3_000_000))\n")
    runs = stages.Stages(tmp_path, ["rllr"])
    for _ in range(2):  # a second time it would fail: the directory is there
        runs.stage(tmp_path / "made", script)
    assert 0 < runs.cpu("made") < 30
    with pytest.raises(SystemExit, match="made.*other flags"):
        runs.stage(tmp_path / "made", script, "--more")
    with pytest.raises(SystemExit, match="failed, see .*again.log"):
        runs.stage(tmp_path / "again", tmp_path / "none.py")


def test_an_sft_as_long_as_all_stages_has_their_time_and_as_many_looks_at_dev(data):
    cell = quality.Cell(quality.parse([*data, "--seed", "0"]))
    cell.stages = {"sft": {"cpu_seconds": 50}, "rm-label": {"cpu_seconds": 60}, "ppo-label": {"cpu_seconds": 40}}
    flags = ["--epochs", "2", "--eval_every", "4", "--epochs", "8"]  # the last one counts, as in the scripts
    longer = stages.longer_sft(flags, cell, start=10)
    assert longer == ["--epochs", 28, "--eval_every", 14]  # 3.5 times 40 seconds of passes; two looks as before
    assert stages.longer_sft(["--epochs", "3"], cell) == ["--epochs", 9, "--eval_every", 3]


@pytest.mark.parametrize("script, flags", [(train_sft, "sft"), (train_rm, "rm"), (train_ppo, "ppo")])
def test_a_pretrained_models_cells_have_the_settings_of_the_recipe(script, flags):
    recipe = parse_config(script.Config, ["--config", str(ROOT / "configs" / "small.yaml")])
    cell = parse_config(script.Config, getattr(quality.LLM, flags).split())
    every = {"precision", "max_new_tokens"}  # of every stage, given elsewhere
    assert recipe.given - every <= cell.given
    assert all(getattr(recipe, name) == getattr(cell, name) for name in recipe.given - every)
    assert "--max_new_tokens 40" in quality.EVERY_STAGE and recipe.max_new_tokens == 40


@pytest.mark.parametrize("methods, named", [(["sft"], "ppo-label"), (["sft", "ppo-label", "dpo"], "dpo")])
def test_methods_that_no_table_can_show_are_refused(data, methods, named, capsys):
    with pytest.raises(SystemExit):
        quality.parse([*data, "--seed", "0", "--methods", *methods])
    assert named in capsys.readouterr().err


# ---- tables ----------------------------------------------------------------------------------------------------------


def make_cell(task="sst2", seed=0, gold="0101" * 10, verdict="unclear", commit="aaaaaaa", prefix=None, **methods):
    """A cell whose methods are right except in the given numbers of rows, the last ones."""
    flip = {"0": "1", "1": "0"}
    given = {
        name.replace("_best", "/best").replace("_last", "/last").replace("_", "-"): {
            "labels": gold[: len(gold) - wrong] + "".join(flip[label] for label in gold[len(gold) - wrong :]),
            "accuracy": 1 - wrong / len(gold), "macro_f1": 0.5, "parse_failures": 0.0,
        }
        for name, wrong in methods.items()
    }  # fmt: skip
    curve = [{"n": n, "difference": n / 1000} for n in (1, 2, 4, 8, 16)]
    return {
        "task": task, "model": "tiny", "seed": seed, "all_labelled": False, "labelled": 40,
        "part": "the reporting half", "labels": ["negative", "positive"], "gold": gold,
        "texts": " ".join(f"{prefix or task}{n}" for n in range(len(gold))), "methods": given,
        "preview": {"verdict": verdict, "curve": curve},
        "reward_models": {k: {"pairs_seen": 9600, "pairs": {"all": {"accuracy": 0.7}}} for k in ("label", "rationale")},
        "ppo": {"ppo-label": {"steps": 40, "planned": 80, "handed_back": 0, "hacking": [40]}},
        "stages": {"tiny": {"cpu_seconds": 600.0}, "sft": {"cpu_seconds": 90.0}, "ppo-label": {"cpu_seconds": 150.0}},
        "commit": commit, "machine": {"processor": "a processor", "versions": {"python": "3.11"}},
    }  # fmt: skip


FULL = {"ppo_label_best": 8, "ppo_label_last": 6, "ppo_gold_best": 4, "ppo_gold_last": 4}


def test_differences_are_the_means_over_rows_seeds_and_tasks():
    cells = [
        make_cell(sft=10, ppo_label_best=8), make_cell(seed=1, sft=12, ppo_label_best=14),  # +5, -5 points of 40 rows
        make_cell("agnews", sft=10, ppo_label_best=4),  # +15
    ]  # fmt: skip
    (by_task,) = grouped(cells).values()
    row = compare(by_task)["ppo-label/best"]
    assert row["sst2"][:2] == pytest.approx((100 * (32 + 26) / 80, 0.0))
    assert row["agnews"][:2] == pytest.approx((90.0, 15.0))
    assert row["mean"][:2] == pytest.approx(((72.5 + 90) / 2, 7.5))
    low, high = row["agnews"][
        2:
    ]  # 6 of 40 rows: their number in a draw is binomial, its 2.5 and 97.5 % points 2 and 11
    assert (low, high) == (pytest.approx(100 * 2 / 40, abs=0.01), pytest.approx(100 * 11 / 40, abs=0.01))
    low, high = row["sst2"][2:]  # two seeds of +5 and -5: one alone is drawn half of the time
    assert low < -5 and high > 5


def test_a_parse_failure_is_wrong():
    cell = make_cell(sft=0)
    cell["methods"]["sft"]["labels"] = "--" + cell["gold"][2:]
    assert right(cell, "sft").sum() == 38


def test_tasks_with_a_text_in_common_are_drawn_together():
    def interval(prefix):
        cells = [
            make_cell("mr", sft=10, ppo_label_best=0, prefix=prefix),  # + where
            make_cell("sst2", sft=0, ppo_label_best=10, prefix=prefix),  # - is in the same texts
        ]
        (by_task,) = grouped(cells).values()
        assert [sorted(group) for group in sharing(by_task)] == ([["mr", "sst2"]] if prefix else [["mr"], ["sst2"]])
        return compare(by_task)["ppo-label/best"]["mean"]

    assert interval("shared")[1:] == pytest.approx((0, 0, 0))  # whatever is drawn, the two differences cancel
    _, centre, low, high = interval(None)
    assert centre == pytest.approx(0) and low < -5 and high > 5


@pytest.mark.parametrize(
    ("verdict", "best", "gold", "false", "missed"),
    [
        ("gain", 10, 4, True, False),  # promised, handed back the start
        ("gain", 9, 4, False, False),
        ("unclear", 10, 4, False, True),  # not promised, and gold gained 15 points
        ("loss", 10, 10, False, False),
    ],
)
def test_false_promises_and_missed_gains(verdict, best, gold, false, missed):
    cell = make_cell(verdict=verdict, sft=10, ppo_label_best=best, ppo_label_last=12, ppo_gold_best=gold)
    found = promise(cell)
    assert (found["false"], found["missed"]) == (false, missed)
    assert found["predicted"] == pytest.approx(0.8) and found["last"] == pytest.approx(-5)
    assert found["gold"] == pytest.approx(2.5 * (10 - gold))


def test_a_gain_of_the_gold_reward_below_the_bound_is_not_missed():
    gold = "01" * 100
    for wrong, missed in ((98, False), (97, True)):  # +1.0 and +1.5 points of 200 rows
        found = promise(make_cell(gold=gold, sft=100, ppo_label_best=100, ppo_label_last=100, ppo_gold_best=wrong))
        assert found["missed"] is missed


def test_a_cell_without_the_gold_reward_misses_no_gain_and_has_its_place_on_the_page():
    cell = make_cell(sft=10, ppo_label_best=8, ppo_label_last=6)
    del cell["reward_models"]["rationale"]
    cell["machine"]["card"] = "a card"
    assert promise(cell)["gold"] is None and promise(cell)["missed"] is False
    text = page([cell], "aaaaaaa")
    assert "| sst2 tiny 0 | unclear | +0.8 | +10.0 | +5.0 |  |  |" in text
    assert "| 9,600, 70.0 % |  | label: the start" in text and "a processor and one a card; one thread" in text


def test_the_page_counts_marks_and_tells_what_is_reached():
    cells = [
        make_cell(verdict="gain", sft=10, **FULL),
        make_cell("mr", verdict="gain", commit="bbbbbbb", sft=4, **(FULL | {"ppo_label_best": 6})),
        make_cell("agnews", sft=10, **(FULL | {"ppo_label_best": 10})),
    ]
    text = page(cells, "aaaaaaa")
    pairs = "9,600, 70.0 % | 9,600, 70.0 %"
    ppo = "label: the start, stopped at 40, hacking seen at 40"
    assert f"| mr tiny 0 (commit bbbbbbb) | 40 | 40 | 4 | {pairs} | {ppo} |" in text
    assert "| sst2 tiny 0 | 40 | 40 |" in text  # of today's commit: no mark
    assert "False promises: 1 of 2 promised gains. Missed gains: 1 of 1" in text
    # RLLR: +5, -5, 0; gold: +15, 0, +15
    assert "RLLR gains +0.00 and the gold reward +10.00 points: 0 % of it" in text
    assert "interval that lies below -0.5: nothing." in text  # 2 of 40 rows: the interval reaches 0


def test_a_policy_that_is_handed_back_and_loses_is_named():
    cells = [make_cell(sft=4, **(FULL | {"ppo_label_best": 30}))]
    assert "interval that lies below -0.5: RLLR, handed back on sst2." in page(cells, "aaaaaaa")


def test_correlation_of_what_was_predicted_with_what_came():
    cells = [make_cell(seed=n, sft=10, **(FULL | {"ppo_label_last": 10 - n, "ppo_label_best": 10})) for n in range(3)]
    for n, cell in enumerate(cells):
        cell["preview"]["curve"][3]["difference"] = (0.0, 0.1, 0.1)[n]  # against 0, 1, 2: r = 0.866 by hand
    assert "with what RLLR gained: 0.87 (last), unknown" in page(cells, "aaaaaaa")


def test_cells_of_one_task_with_other_rows_are_refused():
    with pytest.raises(SystemExit, match="have other rows"):
        grouped([make_cell(sft=1), make_cell(seed=1, sft=1, prefix="other")])


def test_no_cells_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality_tables.main(["--cells", str(tmp_path)])
    assert "no cells there" in capsys.readouterr().err


# ---- many cells within a budget --------------------------------------------------------------------------------------


class Clock:
    """A clock that a run moves on."""

    now = 100.0

    def __call__(self):
        return self.now


def test_no_cell_is_begun_that_cannot_end_in_time():
    """By the longest cell so far; a shorter one behind it may not be begun either, since nobody knows that it is."""
    clock, needed, begun = Clock(), {"a": 10, "b": 30, "c": 10, "d": 10}, []

    def run(cell):
        begun.append(cell)
        clock.now += needed[cell]
        return 0

    found = quality_cells.run_cells("abcd", run, 1, 79, clock=clock)  # 50 are gone after c, and d might take 30
    assert begun == ["a", "b", "c"] and found == {"done": ["a", "b", "c"], "failed": [], "left": ["d"]}
    assert quality_cells.run_cells("abcd", run, 1, 80, clock=Clock())["left"] == []
    assert quality_cells.run_cells("ab", run, 1, 50, cell_s=60, clock=clock)["left"] == ["a", "b"]


def test_a_cell_that_fails_ends_no_other():
    found = quality_cells.run_cells("abc", lambda cell: int(cell == "b"), 2, 10)
    assert sorted(found["done"]) == ["a", "c"] and found["failed"] == ["b"] and not found["left"]


def test_two_cells_run_at_once():
    """Each waits until both have begun."""
    both = threading.Barrier(2)
    found = quality_cells.run_cells("ab", lambda cell: both.wait(timeout=30) * 0, 2, 60)
    assert sorted(found["done"]) == ["a", "b"]


def test_cells_that_are_there_are_left_out(data, tmp_path, monkeypatch):
    data = [word for word in data if word not in ("--task", "sst2", "--quick")]
    monkeypatch.setattr(quality, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(quality.util, "find_spec", lambda name: True)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "sst2-tiny-1.json").write_text("{}")
    args = quality_cells.parse(["--budget_s", "5", "--tasks", "sst2", "--seeds", "0", "1", "2", "--", *data])
    assert quality_cells.missing_cells(args) == [("sst2", 0), ("sst2", 2)]


def test_only_the_methods_that_need_it_ask_for_scikit_learn(data, monkeypatch, capsys):
    data = [word for word in data if word != "--quick"]
    monkeypatch.setattr(quality.util, "find_spec", lambda name: None)
    quality.parse([*data, "--seed", "0", "--methods", "sft", "ppo-label"])
    with pytest.raises(SystemExit):
        quality.parse([*data, "--seed", "0"])
    assert "--methods tfidf needs scikit-learn" in capsys.readouterr().err
