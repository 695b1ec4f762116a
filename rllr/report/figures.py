"""The curves of the report page, as plotly figures, each with a sentence for people who cannot see it."""

import html
import json
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ..metrics import CORRELATIONS
from .fields import is_number

MOST_DRAWN = 1e300  # beyond it a histogram has no width in float64
MOST_POINTS = 1000  # of a curve; a longer one is thinned
# Distinguishable with every kind of colour blindness, and on light and dark ground (Okabe and Ito's palette).
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
KL = "analyse/kl_sequence"
DASHES = ["solid", "dash", "dot", "dashdot"]


@dataclass
class Figure:
    """A figure of the page. group: the act, or the part of the work, that it belongs to."""

    group: str
    title: str
    told: str  # what it shows, in words and numbers
    json: str


METRICS_ON_DEV = {
    "eval/accuracy": "accuracy", "eval/macro_f1": "macro F1", "eval/pearson": "Pearson", "eval/spearman": "Spearman",
}  # fmt: skip

# {stage: [(group, title, {metric: name in the legend}, what is healthy)]}
CURVES = {
    "ppo": [
        ("dev", "Metrics on dev", METRICS_ON_DEV,
         "Greedy answers. The task's metric is what counts; it should rise above its first point."),
        ("dev", "Score on dev", {"eval/score": "score"},
         "What the judges give the greedy answers. Up while accuracy goes down is reward hacking."),
        ("dev", "Grounded on dev",
         {"eval/grounded": "all", "eval/grounded_right": "right answers", "eval/grounded_wrong": "wrong answers"},
         "How much of the rationales stands in their texts."),
        ("1 act", "Length of answers", {"act/response_len": "tokens"}, "Tokens, the end token included."),
        ("1 act", "Answers without an end or a label",
         {"act/parse_failures": "no readable label", "act/truncated": "cut by the limit"},
         "Shares. Both should stay low."),
        ("2 analyse", "KL to the SFT policy", {"analyse/kl_sequence": "KL"},
         "Nats per answer. It begins at 0; tiny models that stay healthy end near 1."),
        ("2 analyse", "Entropy", {"analyse/entropy": "entropy"},
         "Nats per token. Falling to 0: every prompt gets one answer."),
        ("3 judge", "Reward",
         {"judge/score": "score", "judge/label_score": "label", "judge/rationale_score": "rationale"},
         "Of sampled answers, in the unit of the run's scores (--score_norm). It should rise slowly."),
        ("3 judge", "Label scores at the threshold", {"judge/at_threshold": "share"},
         "Mixed reward: the share of answers that only the rationale still pays."),
        ("4 shape", "Weight of the KL", {"shape/kl_coef": "beta"}, "Reward per nat."),
        ("5 credit", "Explained variance", {"credit/explained_variance": "explained variance"},
         "How much of the returns the value model predicts: 1 is perfect, 0 no better than the mean."),
        ("6 improve", "Clipped", {"improve/clipfrac": "policy ratio", "improve/value_clipfrac": "value"},
         "Shares of tokens. Above 0.3 the updates are too large."),
        ("6 improve", "Gradients", {"improve/grad_norm_policy": "policy", "improve/grad_norm_value": "value model"},
         "Length before they are clipped."),
        ("6 improve", "Value loss", {"improve/value_loss": "value loss"}, "It should fall, then stay."),
    ],
    "rm": [
        ("reward model", "Loss", {"loss": "training", "eval/loss": "held-out pairs"}, "Both should fall."),
        ("reward model", "Accuracy on held-out pairs", {"eval/accuracy": "accuracy"},
         "The share of pairs whose better answer scores higher."),
    ],
    "sft": [
        ("SFT", "Loss", {"loss": "loss"}, "Nats per answer token. It falls quickly, then slowly."),
        ("SFT", "Metrics on dev", METRICS_ON_DEV, "Greedy answers."),
        ("SFT", "Grounded on dev", {"eval/grounded": "grounded"}, "How much of the rationales stands in their texts."),
    ],
}  # fmt: skip


def curves(runs) -> list[Figure]:
    """Every figure of CURVES that some run has numbers for; runs of one stage lie over each other."""
    found = []
    for stage, charts in CURVES.items():
        own = [run for run in runs if run.stage == stage]
        for group, title, names, healthy in charts:
            traces, told = [], []
            for number, run in enumerate(own):
                for kind, (metric, name) in enumerate(names.items()):
                    points = [(line["step"], line[metric]) for line in run.metrics if is_number(line.get(metric))]
                    if points:
                        label = name if len(own) == 1 else f"{run.name}: {name}"
                        traces.append(trace(points, label, (number, kind) if len(own) > 1 else (kind, kind)))
                        told.append(in_words(label, points))
            if traces:
                line = [(own[0].handed_back, "handed back")] if group == "dev" and own[0].handed_back else []
                drawn = figure(traces, "step", lines=line if len(own) == 1 else ())
                found.append(Figure(group, title, f"{healthy} {' '.join(told)}", drawn))
    return found


def trace(points, name, look):
    """A curve. look: (which colour, which dash); beyond the colours the dashes go on."""
    stride = -(-len(points) // MOST_POINTS)
    steps, values = zip(*(points[::stride] + points[-1:] * ((len(points) - 1) % stride > 0)))
    colour, dash = COLOURS[look[0] % len(COLOURS)], DASHES[(look[1] + look[0] // len(COLOURS)) % len(DASHES)]
    name = html.escape(name)  # plotly reads a few tags in names
    mode = "lines+markers" if len(steps) < 40 else "lines"
    return go.Scatter(x=steps, y=values, name=name, mode=mode, line={"color": colour, "dash": dash, "width": 2})


def in_words(name, points):
    """A curve as a sentence."""
    values = [value for _, value in points]
    return (
        f"{name}: {values[0]:.3g} at step {points[0][0]}, {values[-1]:.3g} at step "
        f"{points[-1][0]}, lowest {min(values):.3g}, highest {max(values):.3g}."
    )


def figure(traces, x, y=None, lines=()):
    """Traces as the JSON that the page draws. lines: upright ones, (place, name)."""
    drawn = go.Figure(traces)
    drawn.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 48, "r": 12, "t": 36 if len(traces) > 1 else 12, "b": 40},
        height=280,
        hovermode="x unified" if len(traces) > 1 else "closest",
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}} if y else {},
        barmode="overlay",
    )
    for place, name in lines:
        drawn.add_vline(
            x=place,
            line={"dash": "dash", "width": 2, "color": COLOURS[3]},
            annotation_text=name,
            annotation_position="top left",
        )
    return json.loads(drawn.to_json())


def score_figures(run, title) -> list[Figure]:
    """The label scores of right and wrong answers to dev, at the start and at the last look, with the threshold. title:
    before the titles of the figures."""
    found = []
    for step in sorted({0, max(run.looks, default=0)}):
        rows = [row for row in run.looks.get(step, ()) if row["label_score"] is not None and row["right"] in (0, 1)]
        if not rows or run.config.get("reward") not in ("label", "mixed") or run.metric in CORRELATIONS:
            continue
        scores = {right: [row["label_score"] for row in rows if row["right"] == right] for right in (1, 0)}
        every = np.array([float(row["label_score"]) for row in rows])
        if np.abs(every).max() > MOST_DRAWN:
            continue
        edges = np.histogram_bin_edges(every, bins=40)
        traces, told = [], []
        for own, name, colour in zip(scores.values(), ("right", "wrong"), COLOURS):
            counts, _ = np.histogram(own, edges)
            bars = {"x": edges[:-1].tolist(), "y": counts.tolist(), "width": np.diff(edges).tolist(), "offset": 0}
            traces.append(go.Bar(**bars, name=f"{name} answers", opacity=0.65, marker={"color": colour}))
            told.append(f"{len(own)} {name} answers, mean {np.mean(own):.2f}." if own else f"No {name} answers.")
        threshold = run.config.get("threshold")
        line = [(float(threshold), "threshold")] if is_written_number(threshold) else []
        told += [f"Threshold {threshold}."] if threshold else []
        when = "the start" if step == 0 else f"step {step}"
        unit = "raw" if run.config.get("score_norm") == "none" else "in standard deviations of the SFT policy's"
        drawn = figure(traces, f"label score, {unit}", "answers", line)
        found.append(Figure("3 judge", f"{title}Label scores on dev, {when}", " ".join(told), drawn))
    return found


def is_written_number(text):
    try:
        return text is not None and is_number(float(text))
    except ValueError:  # a quantile
        return False


def preview_figure(run, title) -> list[Figure]:
    """Best-of-n against its KL, and where PPO went on dev; [] without a preview."""
    if not run.preview:
        return []
    curve = run.preview["curve"]
    names = [f"best of {point['n']}" for point in curve]
    best = go.Scatter(
        x=[point["kl"] for point in curve], y=[point["accuracy"] for point in curve], text=names, name="best of n",
        mode="lines+markers", line={"color": COLOURS[0], "width": 2},
    )  # fmt: skip
    ends = [0, max(point["kl"] for point in curve)]
    greedy = go.Scatter(
        x=ends, y=[run.preview["greedy"]] * 2, name="greedy", mode="lines", line={"color": COLOURS[2], "dash": "dash"}
    )
    told = [f"Best-of-n stands at the bound of its KL. Greedy {100 * run.preview['greedy']:.1f} %."]
    told += [f"Best of {point['n']} {100 * point['accuracy']:.1f} %." for point in curve[1:]]
    traces, walked = [best, greedy], way_of(run)
    if walked:
        steps, kls, accuracies = zip(*walked)
        traces.append(
            go.Scatter(x=kls, y=accuracies, text=[f"step {step}" for step in steps], name="PPO on dev",
                       mode="lines+markers", line={"color": COLOURS[1], "width": 2})
        )  # fmt: skip
        told.append(f"PPO went to {100 * accuracies[-1]:.1f} % at step {steps[-1]}, {kls[-1]:.2f} nats away.")
    drawn = figure(traces, "nats from the SFT policy", "accuracy")
    return [Figure("dev", f"{title}What the preview foretold, and where PPO went", " ".join(told), drawn)]


def way_of(run):
    """(step, KL of the nearest step, accuracy) of each look."""
    kls = {line["step"]: line[KL] for line in run.metrics if is_number(line.get(KL))}
    found = []
    for line in run.metrics:
        if is_number(line.get("eval/accuracy")) and (line["step"] in kls or line["step"] == 0):
            found.append((line["step"], kls.get(line["step"], 0.0), line["eval/accuracy"]))
    return found
