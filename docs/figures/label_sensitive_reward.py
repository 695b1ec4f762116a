"""The mixed reward by label score, for a good and a bad rationale, beside the sum: docs/label-sensitive-reward.md.

    python docs/figures/label_sensitive_reward.py [FILE]     # writes docs/figures/label-sensitive-reward.svg, or FILE

Needs matplotlib.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rllr.rewards import label_sensitive_reward  # noqa: E402

THRESHOLD = 1.0
RATIONALES = {"good rationale": 0.5, "bad rationale": -0.5}
COLOURS = {"good rationale": "#0072b2", "bad rationale": "#d55e00"}  # Okabe and Ito, for every kind of eye
# The four answers of the page: label score, rationale, and where its name stands.
ANSWERS = {
    "right, good": (1.5, "good rationale", (-70, 26)),
    "right, bad": (3.0, "bad rationale", (0, -12)),
    "wrong, good": (-1.5, "good rationale", (-30, 4)),
    "wrong, bad": (-2.0, "bad rationale", (30, -8)),
}


def reward(label_scores, rationale):
    """The mixed reward of answers with these label scores."""
    rationales = torch.full((len(label_scores),), RATIONALES[rationale])
    return label_sensitive_reward(torch.tensor(label_scores), rationales, THRESHOLD, "mixed").tolist()


def draw(panel):
    ends, grey = [-3.0, THRESHOLD, 4.0], "#666666"
    for name, worth in RATIONALES.items():
        colour = {"color": COLOURS[name]}
        panel.plot(ends[1:], [end + worth for end in ends[1:]], linestyle="--", linewidth=1.2, **colour)
        panel.plot(ends, reward(ends, name), label=name, linewidth=2, **colour)
    hollow = {"marker": "o", "markersize": 6, "fillstyle": "none"}
    panel.plot([], [], linestyle="--", linewidth=1.2, color=grey, label="plain sum, where it differs", **hollow)
    for name, (label, rationale, offset) in ANSWERS.items():
        (height,) = reward([label], rationale)
        colour = COLOURS[rationale]
        if label > THRESHOLD:
            panel.plot(label, label + RATIONALES[rationale], color=colour, **hollow)
        panel.plot(label, height, "o", color=colour, markersize=6)
        leader = {"arrowstyle": "-", "color": grey, "linewidth": 0.7, "shrinkB": 4} if offset[1] > 10 else None
        near = {"xytext": offset, "textcoords": "offset points", "ha": "center", "fontsize": 8, "arrowprops": leader}
        panel.annotate(name, (label, height), **near)
    panel.axvline(THRESHOLD, color=grey, linewidth=0.9, linestyle=":")
    near = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "fontsize": 8, "color": grey}
    panel.annotate(f"threshold {THRESHOLD:g}", (THRESHOLD, 3.6), **near)
    panel.set(xlim=(-3, 4), ylim=(-3.6, 4.6), xlabel="label score", ylabel="mixed reward")
    panel.legend(frameon=False, loc="lower right")


def main(path):
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "rllr", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained", facecolor="white")
        draw(figure.subplots())
        figure.savefig(path, format="svg", metadata={"Date": None})
    print(f"drawn {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "figures" / "label-sensitive-reward.svg")
