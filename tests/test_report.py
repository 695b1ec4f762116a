"""The report page: what it shows is what the runs left, and no text of theirs becomes code."""

import dataclasses
import json
import shutil
from html.parser import HTMLParser

import pytest
from toy_runs import run, write_rows

pytest.importorskip("plotly", reason='the report needs: pip install ".[report]"')
pytest.importorskip("itables", reason='the report needs: pip install ".[report]"')

from rllr import evaluate
from rllr.report import __main__ as report
from rllr.report.collect import Outcome, find_runs, outcome_on_dev, read_evaluation, read_trails
from rllr.report.figures import MOST_POINTS, curves, preview_figure, score_figures
from rllr.report.looks import file_of as look_file
from rllr.report.page import MARK, answer_rows, build, confusion
from rllr.report.trail_format import file_of, read_trail, seal

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>{{7*7}}&lt;b&gt;\"'`${1}"


@pytest.fixture(scope="module")
def home(toy, tmp_path_factory):
    """A directory of runs: two of PPO, with audited rollouts and a look at dev at every step, and an evaluation."""
    home = tmp_path_factory.mktemp("runs")
    flags = ["--eval_every", 1, "--audit", "all", "--learning_rate", 5e-3]
    judges = ["--label_rm", toy.label_rm, "--rationale_rm", toy.rationale_rm]
    toy.ppo(home / "ppo-label", "--reward", "label", *judges[:2], *flags, steps=3)
    toy.ppo(home / "ppo-mixed", "--reward", "mixed", *judges, *flags, steps=2)
    models = [toy.sft, home / "ppo-label" / "last"]
    run(
        evaluate.main,
        "--models",
        *models,
        "--part",
        "eval",
        "--output_dir",
        home / "evaluation",
        *["--max_new_tokens", 12],
    )
    return home


class Reader(HTMLParser):
    """What a browser sees of a page: its elements with their attributes, and the text of its JSON by id."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        kept = tag == "script" and dict(attributes).get("type") == "application/json"
        self.inside = dict(attributes)["id"] if kept else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


def read_page(path):
    reader = Reader(path.read_text(encoding="utf-8"))
    data = {name: json.loads(text) for name, text in reader.texts.items()}
    for number, trail in enumerate(data["data"]["trails"]):
        trail["samples"] = data[f"trail-{number}"]
    return reader, data["data"]


# ---- what it shows ---------------------------------------------------------------------------------------------------


def test_one_run(home, tmp_path):
    output = run(report.main, home / "ppo-label", "--output", tmp_path / "page.html")
    assert "open it in a browser" in output
    reader, data = read_page(tmp_path / "page.html")
    assert [trail["step"] for trail in data["trails"]] == [1, 2, 3]
    titles = [attributes["aria-label"] for tag, attributes in reader.elements if attributes.get("role") == "img"]
    assert len(titles) == len(data["figures"]) > 12
    for wanted in (
        "Metrics on dev",
        "KL to the SFT policy",
        "Entropy",
        "Explained variance",
        "Clipped",
        "Label scores",
    ):
        assert any(title.startswith(wanted) for title in titles), wanted
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    record = json.loads((home / "ppo-label" / "best" / "rllr.json").read_text())
    assert record["handed_back"] in text and MARK in text[:400]


def test_it_needs_no_network(home, tmp_path):
    """No element names another file; the page's own policy forbids it besides."""
    run(report.main, home, "--output", tmp_path / "page.html")
    reader, _ = read_page(tmp_path / "page.html")
    links = [
        value for _, attributes in reader.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert links and all(link.startswith("#") for link in links)
    policy = next(a["content"] for t, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_a_directory_of_runs_lies_over_each_other(home, tmp_path):
    run(report.main, home, "--output", tmp_path / "page.html")
    _, data = read_page(tmp_path / "page.html")
    names = {trace["name"] for figure in data["figures"] for trace in figure["data"]}
    assert {"ppo-label: accuracy", "ppo-mixed: accuracy"} <= names
    assert {trail["run"] for trail in data["trails"]} == {"ppo-label", "ppo-mixed"}


def test_curves_have_the_numbers_of_the_metrics(home):
    found = {figure.title: figure for figure in curves(find_runs([home / "ppo-label"]))}
    lines = [json.loads(line) for line in (home / "ppo-label" / "metrics.jsonl").read_text().splitlines()]
    kl = [(line["step"], line["analyse/kl_sequence"]) for line in lines if "analyse/kl_sequence" in line]
    drawn = found["KL to the SFT policy"].json["data"][0]
    assert list(zip(drawn["x"], drawn["y"])) == kl and len(kl) == 3
    assert f"{kl[-1][1]:.3g} at step 3" in found["KL to the SFT policy"].told


def test_a_long_curve_is_thinned(home):
    found = find_runs([home / "ppo-label"])
    found[0].metrics = [{"step": step, "analyse/entropy": 1.0} for step in range(5 * MOST_POINTS)]
    (figure,) = curves(found)
    steps = figure.json["data"][0]["x"]
    assert steps[:2] == [0, 5] and steps[-2:] == [5 * MOST_POINTS - 5, 5 * MOST_POINTS - 1]  # the last point is there
    found[0].metrics = found[0].metrics[: 4 * MOST_POINTS + 1]
    (figure,) = curves(found)
    assert figure.json["data"][0]["x"][-2:] == [4 * MOST_POINTS - 5, 4 * MOST_POINTS]  # and once


def test_a_name_is_no_markup_and_no_two_of_many_runs_look_alike(home):
    """plotly reads a few tags in names."""
    (run,) = find_runs([home / "ppo-label"])
    many = [dataclasses.replace(run, name=f"<b>{number}</b>") for number in range(12)]
    data = next(figure.json["data"] for figure in curves(many) if figure.title == "Entropy")
    assert data[0]["name"] == "&lt;b&gt;0&lt;/b&gt;: entropy"
    assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in data}) == 12


def test_scores_of_right_and_wrong_answers(home):
    """Every dev row is in one of the two histograms, and the threshold of the mixed reward is drawn."""
    (mixed,) = (found for found in find_runs([home]) if found.name == "ppo-mixed")
    figures = score_figures(mixed, "")
    assert [figure.title for figure in figures] == ["Label scores on dev, the start", "Label scores on dev, step 2"]
    for step, figure in zip((0, 2), figures):
        right = sum(row["right"] for row in mixed.looks[step])
        counts = {trace["name"]: sum(trace["y"]) for trace in figure.json["data"]}
        assert counts == {"right answers": right, "wrong answers": 8 - right}
        assert figure.json["layout"]["shapes"][0]["x0"] == 1.0


def test_the_preview_and_where_ppo_went(home):
    (label,) = (found for found in find_runs([home]) if found.name == "ppo-label")
    (figure,) = preview_figure(label, "")
    best, greedy, ppo = figure.json["data"]
    assert best["y"] == [point["accuracy"] for point in label.preview["curve"]] and best["x"][0] == 0
    assert greedy["y"] == [label.preview["greedy"]] * 2
    accuracies = [line["eval/accuracy"] for line in label.metrics if "eval/accuracy" in line]
    assert ppo["y"] == accuracies and ppo["text"] == [f"step {step}" for step in range(4)] and ppo["x"][0] == 0


def test_the_outcome_on_dev_is_that_of_the_looks(home):
    (label,) = (found for found in find_runs([home]) if found.name == "ppo-label")
    outcome = outcome_on_dev(label)
    start, last = outcome.rows[0], outcome.rows[-1]
    accuracies = {line["step"]: line["eval/accuracy"] for line in label.metrics if "eval/accuracy" in line}
    assert start["value"] == pytest.approx(accuracies[0]) and start["difference"] is None
    if last is not start:
        assert last["difference"] == pytest.approx(last["value"] - start["value"])
    assert all(len(pairs) == 8 for pairs in outcome.answers.values())


def test_a_correlation_is_told_as_closeness(home):
    """No single row has a correlation, and half right is neither right nor wrong."""
    (run,) = find_runs([home / "ppo-label"])
    run.record["task"] = run.record["task"] | {"metric": "pearson"}
    row = run.looks[0][0]
    run.looks = {
        0: [row | {"id": str(n), "right": right, "gold": "10"} for n, right in enumerate((0.5, 0.5, 1.0))],
        3: [row | {"id": str(n), "right": right, "gold": "9"} for n, right in enumerate((0.75, 0.25, 1.0))],
    }
    assert outcome_on_dev(run).metric == "closeness to the gold label"
    assert [own["what"] for own in answer_rows([run])[0]] == ["closer", "farther", "as close"]
    assert not score_figures(run, "")
    assert confusion([("10", "9"), ("9", "9"), ("9", "x")])[:2] == (["9", "10"], ["9", "10", "x"])  # as numbers
    assert "closeness to the gold label" in build([run])


def test_intervals_of_few_rows(home):
    """Of one row nothing is known of the spread; none goes beyond 0 and 1."""
    (run,) = find_runs([home / "ppo-label"])
    row = run.looks[0][0]
    for rights, low, high in (([1.0], 0.2065, 1.0), ([1.0] * 6 + [0.0] * 2, 0.4093, 0.9285), ([1.0] * 8, 0.6756, 1.0)):
        run.looks = {step: [row | {"right": right} for right in rights] for step in (0, 3)}
        outcome = outcome_on_dev(run)
        assert outcome.rows[0]["value"] == sum(rights) / len(rights)
        assert outcome.rows[0]["interval"] == pytest.approx((low, high), abs=2e-4)  # Wilson's, by hand
        assert (outcome.rows[-1]["difference"] is None) == (len(rights) == 1)
        assert build([run])
    run.record["task"] = run.record["task"] | {"metric": "pearson"}
    run.looks = {0: [row | {"right": right} for right in (0.9, 1.0, 1.0)]}
    assert outcome_on_dev(run).rows[0]["interval"][1] == 1.0


def test_a_run_that_goes_on_says_so_far(home):
    (run,) = find_runs([home / "ppo-label"])
    run.record["step"] = 0
    assert outcome_on_dev(run).rows[0]["name"] == "SFT, the start, which is handed back"
    assert "a little too good" not in outcome_on_dev(run).of_what
    run.config = run.config | {"steps": 9}
    assert outcome_on_dev(run).rows[0]["name"] == "SFT, the start, which is handed back so far"
    assert "3 of 9 steps" in build([run])


def test_a_trail_that_was_altered_is_not_shown_without_a_word(home, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(home / "ppo-label", copied)
    path = file_of(copied, 2)
    path.write_text(path.read_text().replace('"token": 1,', '"token": 1, ', 1))
    assert "these numbers are not to be trusted" in build(find_runs([copied]))
    assert "these numbers are not to be trusted" not in build(find_runs([home / "ppo-label"]))


def test_numbers_that_no_page_can_hold(home, tmp_path):
    """The largest of float64 would be rounded to infinity; half a character is none."""
    copied = tmp_path / "run"
    shutil.copytree(home / "ppo-label", copied)
    path = look_file(copied, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, score in zip(lines, (1.7976931348623157e308, 1e308, -1e308)):
        line |= {"score": score, "label_score": score, "label": "\ud800"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(report.main, copied, "--output", tmp_path / "page.html")
    assert "\ufffd" in (tmp_path / "page.html").read_text() or "?" in (tmp_path / "page.html").read_text()


def test_a_look_without_rows_is_no_outcome(home):
    (run,) = find_runs([home / "ppo-label"])
    run.looks = {0: [], 3: []}
    assert outcome_on_dev(run) is None and build([run])


def test_texts_of_answers_stand_in_the_page_once(home, tmp_path):
    run(report.main, home / "ppo-label", "--output", tmp_path / "page.html")
    _, data = read_page(tmp_path / "page.html")
    prompts = {row["prompt"] for row in data["answers"]}
    assert len(data["answers"]) == 24 and len(prompts) == 8 and len(set(data["texts"])) == len(data["texts"])
    looked = [json.loads(line) for line in look_file(home / "ppo-label", 3).read_text().splitlines()]
    shown = [row for row in data["answers"] if row["step"] == 3]
    assert [data["texts"][row["now"]] for row in shown] == [row["answer"] for row in looked]


def test_an_evaluation_is_found_beside_the_run(home, tmp_path):
    run(report.main, home / "ppo-label", "--output", tmp_path / "page.html")
    assert "24 dev rows, of which some trained or chose a policy" in (tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    outcome = read_evaluation(home / "evaluation")
    results = json.loads((home / "evaluation" / "evaluate.json").read_text())
    assert [row["value"] for row in outcome.rows] == [result["accuracy"] for result in results]
    assert outcome.rows[1]["difference_interval"] == results[1]["difference_interval"]
    assert outcome.metric == "accuracy"


def test_a_confusion_matrix_by_hand():
    pairs = [("a", "a"), ("a", "b"), ("a", None), ("b", "b"), ("b", "b"), (None, "a")]
    assert confusion(pairs) == (["a", "b"], ["a", "b", "(no readable label)"], [[1, 1, 1], [0, 2, 0]])
    assert confusion([("none", "none"), ("none", None)]) == (["none"], ["none", "(no readable label)"], [[1, 1]])
    assert confusion([("a", "a"), ("a", "z")]) == (["a"], ["a", "z"], [[1, 1]])  # a label that no row has


def test_answers_before_and_after(home, tmp_path):
    """Four rows: fixed, broken, right and wrong."""
    copied = tmp_path / "ppo-label"
    shutil.copytree(home / "ppo-label", copied)
    row = {"prompt": "p", "gold": "good", "answer": "before", "label": "good", "truncated": False, "score": 0.123456789,
           "label_score": 0.1, "rationale_score": None, "grounded": None}  # fmt: skip
    for step, rights in ((0, (0, 1, 1, 0)), (3, (1, 0, 1, 0))):
        rows = [row | {"id": str(n), "right": float(right)} for n, right in enumerate(rights)]
        write_rows(look_file(copied, step), [own | {"answer": f"at {step}"} for own in rows])
    for step in (1, 2):
        look_file(copied, step).unlink()
    rows, left = answer_rows(find_runs([copied]))
    assert [own["what"] for own in rows] == ["fixed", "broken", "right", "wrong"] and left == 0
    assert {(own["before"], own["now"], own["step"], own["score"]) for own in rows} == {("at 0", "at 3", 3, 0.12346)}


def test_a_look_behind_the_last_step_is_not_shown(home, tmp_path):
    """A resumed run has not come there again."""
    copied = tmp_path / "run"
    shutil.copytree(home / "ppo-label", copied)
    shutil.copy(look_file(copied, 3), look_file(copied, 9))
    assert list(find_runs([copied])[0].looks) == [0, 1, 2, 3]


def test_too_many_tokens_are_left_out_evenly(home):
    (label,) = (found for found in find_runs([home]) if found.name == "ppo-label")
    size = sum(map(len, read_trail(file_of(home / "ppo-label", 1)).tokens))
    for most, steps in ((0, [1]), (2 * size, [1, 3]), (10**6, [1, 2, 3])):
        trails, left = read_trails(label, most)
        assert [trail.step["step"] for trail in trails] == steps and left == 3 - len(steps)


def test_a_run_that_is_still_writing(home, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(home / "ppo-label", copied)
    for name in ("best", "last"):
        shutil.rmtree(copied / name)
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "analyse/kl_seq')
    found = find_runs([copied])
    assert max(line["step"] for line in found[0].metrics) == 3
    assert "3 steps" in build(found)


def test_a_run_without_looks_and_trails(toy, tmp_path):
    """SFT and reward models have curves alone."""
    run(report.main, toy.sft, toy.label_rm, "--output", tmp_path / "page.html")
    _, data = read_page(tmp_path / "page.html")
    assert not data["answers"] and not data["trails"] and len(data["figures"]) >= 4


# ---- hostile texts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(home, tmp_path_factory):
    """A run whose texts would all be code if they could, and its page."""
    copied = tmp_path_factory.mktemp("hostile") / "ppo-label"
    shutil.copytree(home / "ppo-label", copied)
    spoil = {"prompt": HOSTILE, "gold": HOSTILE, "answer": HOSTILE, "label": HOSTILE, "id": HOSTILE, "text": HOSTILE}
    for step in (0, 3):
        lines = [json.loads(line) for line in look_file(copied, step).read_text().splitlines()]
        write_rows(
            look_file(copied, step),
            [line | {k: v for k, v in spoil.items() if k in line and k != "id"} for line in lines],
        )
    path = file_of(copied, 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {k: v for k, v in spoil.items() if k in line} for line in lines if line["kind"] != "end"]
    path.write_text("\n".join(seal({k: v for k, v in line.items() if k != "digest"} for line in lines)) + "\n")
    record = json.loads((copied / "best" / "rllr.json").read_text())
    (copied / "best" / "rllr.json").write_text(json.dumps(record | {"handed_back": HOSTILE, "promise": HOSTILE}))
    settings = json.loads((copied / "run.json").read_text())
    settings["config"]["task"] = HOSTILE
    (copied / "run.json").write_text(json.dumps(settings))
    run(report.main, copied)
    return copied / "report.html"


def test_texts_never_become_elements(home, hostile, tmp_path):
    run(report.main, home / "ppo-label", "--output", tmp_path / "page.html")
    tame, _ = read_page(tmp_path / "page.html")
    reader, data = read_page(hostile)
    count = {tag: sum(own == tag for own, _ in reader.elements) for tag in ("script", "img")}
    assert count == {tag: sum(own == tag for own, _ in tame.elements) for tag in ("script", "img")}
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    assert (
        data["texts"][data["answers"][0]["prompt"]] == HOSTILE
        and data["trails"][0]["samples"][0]["tokens"][0][0] == HOSTILE
    )


# ---- the command -----------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        run(report.main, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_is_no_run(home, tmp_path, capsys):
    assert "no such directory" in refused(capsys, tmp_path / "nowhere")
    assert "holds no run.json" in refused(capsys, tmp_path)
    (tmp_path / "run.json").write_text('{"stage": "cooking"}')
    assert "is not the record of a run" in refused(capsys, tmp_path)
    (tmp_path / "evaluate.json").write_text('{"a": 1}')
    error = refused(capsys, home / "ppo-label", "--evaluation", tmp_path, "--output", tmp_path / "p.html")
    assert "is not what rllr.evaluate writes" in error


def test_a_broken_line_is_named(home, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(home / "ppo-label", copied)
    path = copied / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 1', '{"step" 1', 1))
    assert "metrics.jsonl, line 2: not valid JSON" in refused(capsys, copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl, line 1 has no step"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1 is no object"),
        ("dev/step-000003.jsonl", '{"id": "1"}\n', "step-000003.jsonl, line 1 has no prompt"),
        ("best/rllr.json", "[]", "rllr.json is no object"),
        ("best/rllr.json", '{"task": 3}', "rllr.json has task 3, which is not an object"),
        ("run.json", '{"stage": "ppo", "config": []}', "run.json: its config is no object"),
        ("run.json", '{"stage": "ppo", "config": {"label_rm": 3}}', "has label_rm 3, which is not text or null"),
        ("evaluation/evaluate.json", "[{}]", "evaluate.json: model 0 has no model"),
        ("evaluation/evaluate.json", '[{"model": "a", "rows": 1, "metric": "f", "interval": [], "parse_failures": 0}]',
         "model 0 has no f"),
        ("run.json", '{"stage": "ppo", "config": {"steps": "abc"}}', "config has steps 'abc', which is not a whole"),
        ("evaluation/evaluate.json",
         '[{"model": "a", "rows": 1, "metric": "f", "f": 1, "interval": [0.1], "parse_failures": 0}]', "has no 1"),
        ("evaluation/evaluate.json",
         '[{"model": "a", "rows": 1, "metric": "f", "f": 1, "interval": [0, 1, 2], "parse_failures": 0}]', "3 numbers"),
        ("evaluation/evaluate.json", '[{"model": "a", "rows": 1, "metric": "f", "f": 1, "interval": [0, 1], '
         '"parse_failures": 0, "part": []}]', "has part"),
        ("evaluation/answers-0.jsonl", "3\n", "answers-0.jsonl, line 1 is no object"),
    ],
)  # fmt: skip
def test_a_file_that_another_wrote_is_named(home, tmp_path, capsys, name, content, message):
    copied = tmp_path / "run"
    shutil.copytree(home / "ppo-label", copied)
    shutil.copytree(home / "evaluation", copied / "evaluation")
    (copied / name).write_text(content)
    assert message in refused(capsys, copied)


def test_only_a_page_of_ours_is_replaced(home, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("my notes")
    assert "exists and is no report of rllr" in refused(capsys, home / "ppo-label", "--output", page)
    assert page.read_text() == "my notes"
    page.unlink()
    for _ in range(2):
        run(report.main, home / "ppo-label", "--output", page)
    assert "cannot be written" in refused(capsys, home / "ppo-label", "--output", tmp_path / "no" / "page.html")


def test_without_the_extra(home, monkeypatch, capsys):
    import sys

    for name in [name for name in sys.modules if name.startswith("plotly") or name == "rllr.report.page"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert 'pip install ".[report]"' in refused(capsys, home / "ppo-label")


def test_an_outcome_can_stand_alone(home):
    outcome = Outcome("2 rows", "accuracy", [], {})
    assert "2 rows" in build(find_runs([home / "ppo-label"]), outcome)
