"""The report page: one HTML file with everything in it, which opens from the disk without a network.

plotly draws the curves, DataTables (as itables brings it) the table of answers, Jinja2 fills the template. Texts from
data reach the page as text alone: Jinja2 escapes them, and in JSON the characters that HTML reads are escapes.
"""

import base64
import json
import math
from importlib import resources
from pathlib import Path

import itables
import plotly.offline
from jinja2 import Environment
from markupsafe import Markup

from .. import __version__
from ..metrics import CORRELATIONS
from .collect import outcome_on_dev, read_trails
from .figures import curves, preview_figure, score_figures

MARK = '<meta name="generator" content="rllr report">'  # by which a page of ours is known
NO_LABEL = "(no readable label)"
TEXTS = ("prompt", "before", "now")  # of a row of the table of answers
MOST_ANSWERS = 20_000  # rows of the table, the newest looks first
# What the token view gets of each token, after its text, in this order.
TOKEN_NUMBERS = (
    "token_id", "position", "rollout_logprob", "logprob", "ref_logprob", "kl", "reward", "value", "advantage",
    "whitened_advantage", "return",
)  # fmt: skip
UPDATE_NUMBERS = ("epoch", "minibatch", "new_logprob", "ratio", "clipped", "new_value", "policy_loss", "value_loss")
SAMPLE_FACTS = (
    "id", "prompt", "answer", "label", "gold", "label_raw", "label_score", "rationale_raw", "rationale_score", "branch",
    "combined_score", "rule", "score",
)  # fmt: skip


def build(runs, outcome=None, most_tokens=50_000, say=print) -> str:
    """The page of some `collect.FoundRun`s. outcome: an evaluation to show in place of the looks at dev."""
    ppo = [run for run in runs if run.stage == "ppo"]
    outcomes = [("", outcome)] if outcome else []
    outcomes += [(run.name if len(ppo) > 1 else "", found) for run in ppo if (found := outcome_on_dev(run))]
    figures = curves(runs)
    for run in ppo:
        title = f"{run.name}: " if len(ppo) > 1 else ""
        figures += preview_figure(run, title) + score_figures(run, title)
    answers, left = answer_rows(ppo)
    texts = number_texts(answers)
    trails, problems = [], []
    for run in ppo:
        chosen, rest = read_trails(run, most_tokens // len(ppo))
        trails += [packed_trail(run.name, trail) for trail in chosen]
        problems += [f"{run.name}: {problem}" for trail in chosen for problem in trail.problems]
        if rest:
            say(f"{run.name}: {rest} audited rollouts are left out of the page (--audit_rows {most_tokens})")
    groups: dict[str, list] = {}
    for figure in sorted(figures, key=lambda figure: order_of(figure.group)):
        groups.setdefault(figure.group, []).append(figure)
    return template().render(
        mark=Markup(MARK),
        title=title_of(runs),
        version=__version__,
        runs=[facts_of(run) for run in runs],
        outcomes=[outcome_table(name, found) for name, found in outcomes],
        groups=groups,
        answers_left=left,
        has_answers=bool(answers),
        trails=[trail["samples"] for trail in trails],
        problems=problems,
        css=Markup(own_file("page.css")),
        js=Markup(own_file("page.js")),
        plotly=Markup(plotly.offline.get_plotlyjs()) if figures else "",
        tables_js=Markup(encoded("dt_bundle.js")) if answers else "",
        tables_css=Markup(encoded("dt_bundle.css")) if answers else "",
        data={
            "figures": [figure.json for own in groups.values() for figure in own],
            "answers": answers,
            "texts": texts,
            "text_columns": TEXTS,
            "trails": [{"run": trail["run"], "step": trail["step"]} for trail in trails],
            "token_numbers": TOKEN_NUMBERS,
            "update_numbers": UPDATE_NUMBERS,
            "sample_facts": SAMPLE_FACTS,
        },
    )


def template():
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_function"] = dumps
    environment.policies["json.dumps_kwargs"] = {}
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.1f} %"
    return environment.from_string(own_file("page.html"))


def dumps(value):
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def own_file(name):
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def encoded(name):
    """A file of DataTables in base64: it is a module, which a page can only load from a URL."""
    return base64.b64encode((Path(itables.__file__).parent / "html" / name).read_bytes()).decode()


def order_of(group):
    """Groups of figures in order: what counts first, then the acts of a step, then what came before PPO."""
    return ("dev", "1", "2", "3", "4", "5", "6", "reward model", "SFT").index(group if group[0].isalpha() else group[0])


def title_of(runs):
    """Of the page: the run, or the directory that holds them."""
    home = runs[0].directory.resolve()
    for _ in Path(runs[0].name).parts:
        home = home.parent
    return runs[0].name if len(runs) == 1 else f"{home.name}: {', '.join(run.name for run in runs)}"


def facts_of(run):
    """What the head of the page says of a run."""
    chosen = ("reward", "label_rm", "policy", "model", "task", "steps", "epochs", "learning_rate", "kl_coef", "seed")
    settings = {name: run.config[name] for name in chosen if run.config.get(name) is not None}
    sentences = [run.record[name] for name in ("promise", "handed_back") if run.record.get(name)]
    if run.hacked:
        sentences.append(f"The guard saw reward hacking on dev at step {', '.join(map(str, run.hacked))}.")
    return {
        "name": run.name,
        "stage": {"sft": "SFT", "rm": "reward model", "ppo": "PPO"}[run.stage],
        "settings": settings,
        "steps": f"{run.last_step} of {run.config['steps']} steps" if run.is_running else f"{run.last_step} steps",
        "sentences": sentences,
    }


def outcome_table(name, outcome):
    """An outcome as the template shows it, with a confusion matrix per policy."""
    percent = outcome.metric not in CORRELATIONS
    rows = []
    for row in outcome.rows:
        low, high = row["interval"]
        difference = row["difference"]
        told = ""
        if difference is not None:
            bounds = row["difference_interval"]
            told = f"{spelled(difference, percent, '+')} ({' .. '.join(spelled(b, percent, '+') for b in bounds)})"
        rows.append(
            row | {
                "shown": spelled(row["value"], percent) + (" %" if percent else ""),
                "between": f"{spelled(low, percent)} .. {spelled(high, percent)}",
                "told": told,
            }
        )  # fmt: skip
    matrices = [(policy, confusion(answers)) for policy, answers in outcome.answers.items() if answers]
    return {"name": name, "of_what": outcome.of_what, "metric": outcome.metric, "rows": rows, "matrices": matrices}


def spelled(value, percent, sign=""):
    return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.3f}"


def confusion(pairs):
    """(labels, labels given, [gold][given] counts): the last one given is NO_LABEL where an answer had none."""
    gold = sorted({gold for gold, _ in pairs if gold is not None}, key=by_value)
    given = gold + sorted({label for _, label in pairs if label is not None} - set(gold), key=by_value)
    keys = given + [None] * any(label is None for _, label in pairs)  # None is no label that a task could have
    counts = {(g, key): 0 for g in gold for key in keys}
    for g, label in pairs:
        if g is not None:
            counts[g, label] += 1
    columns = [NO_LABEL if key is None else key for key in keys]
    return gold, columns, [[counts[g, key] for key in keys] for g in gold]


def by_value(label):
    """Labels that are numbers in the order of numbers, the others after them in that of texts."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def answer_rows(runs):
    """(rows of the table of answers, how many are left out): each look after the start beside the start's answer."""
    rows = []
    for run in runs:
        start = {row["id"]: row for row in run.looks.get(0, ())}
        for step, look in sorted(run.looks.items(), reverse=True):
            for row in look if step else ():
                before = start.get(row["id"])
                if before:
                    rows.append((step, answer_row(run, step, before, row)))
    rows.sort(key=lambda row: -row[0])
    return [row for _, row in rows[:MOST_ANSWERS]], max(0, len(rows) - MOST_ANSWERS)


def answer_row(run, step, before, now):
    better = now["right"] - before["right"]
    if run.metric in CORRELATIONS:
        what = "closer" if better > 0 else "farther" if better < 0 else "as close"
    else:
        what = "fixed" if better > 0 else "broken" if better < 0 else "right" if now["right"] == 1 else "wrong"
    return {
        "run": run.name,
        "step": step,
        "what": what,
        "prompt": now["prompt"],
        "gold": now["gold"],
        "before": before["answer"],
        "now": now["answer"],
        "score_before": brief(before["score"]),
        "score": brief(now["score"]),
    }


def number_texts(rows):
    """The texts of the table of answers, each once; in the rows stand their numbers. Looks repeat most of them."""
    numbers: dict[str, int] = {}
    for row in rows:
        row |= {name: numbers.setdefault(row[name], len(numbers)) for name in TEXTS}
    return list(numbers)


def packed_trail(name, trail):
    """An audited rollout as the token view takes it: lists in place of objects, numbers of five digits."""
    samples = []
    for sample, tokens in zip(trail.samples, trail.tokens):
        own = [
            [token["text"], *(brief(token[field]) for field in TOKEN_NUMBERS),
             [[brief(update[field]) for field in UPDATE_NUMBERS] for update in token["updates"]]]
            for token in tokens
        ]  # fmt: skip
        samples.append({"facts": [brief(sample[name]) for name in SAMPLE_FACTS], "tokens": own})
    return {"run": name, "step": trail.step["step"], "samples": samples}


def brief(value):
    """A number of five significant digits; anything else as it is."""
    rounded = float(f"{value:.5g}") if isinstance(value, float) else value
    return rounded if not isinstance(rounded, float) or math.isfinite(rounded) else value
