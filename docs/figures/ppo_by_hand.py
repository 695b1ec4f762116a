"""Reward, value and advantage of the four tokens of docs/ppo-by-hand.md: how the score at the end flows back.

python docs/figures/ppo_by_hand.py [FILE]     # writes docs/figures/ppo-by-hand.svg, or FILE; needs matplotlib
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rllr.ppo import gae  # noqa: E402
from rllr.rewards import shape_rewards  # noqa: E402

WORDS = (("negative", "<eos>"), ("positive", "<eos>"))
SCORES = (1.0, -1.0)
POLICY, REFERENCE = ((1 / 2, 1 / 2), (1 / 4, 1 / 2)), ((1 / 4, 1 / 2), (1 / 2, 1 / 4))  # probabilities of the tokens
VALUES = ((0.2, 0.6), (0.2, -0.2))
GAMMA, LAM, BETA = 1.0, 0.95, 0.1
# Okabe and Ito, for every kind of eye
COLOURS = {"reward": "#e69f00", "value": "#999999", "delta": "#0072b2", "from the next token": "#56b4e9"}
WIDTH = 0.26  # of a bar, in tokens


def numbers():
    """{name: [of answer a, of answer b]}: rewards, values, delta and advantages of each token."""
    as_tensor = {"dtype": torch.float64}
    logprobs, ref_logprobs = (torch.tensor(table, **as_tensor).log() for table in (POLICY, REFERENCE))
    values, mask = torch.tensor(VALUES, **as_tensor), torch.ones(2, 2, dtype=torch.bool)
    rewards = shape_rewards(torch.tensor(SCORES, **as_tensor), logprobs, ref_logprobs, mask, BETA)
    found = {"r": rewards, "V": values}
    found["delta"] = gae(rewards, values, mask, GAMMA, 0.0)[0]  # with lambda 0 nothing comes from the next token
    found["A"] = gae(rewards, values, mask, GAMMA, LAM)[0]
    return {name: tensor.tolist() for name, tensor in found.items()}


def bar(panel, place, height, bottom=0.0, kind="reward", text=""):
    panel.bar(place, height, WIDTH, bottom=bottom, color=COLOURS[kind], label=kind)
    if text:
        end = bottom + height
        above = {"xytext": (0, 3 if end >= 0 else -3), "textcoords": "offset points", "fontsize": 8}
        panel.annotate(text, (place, end), ha="center", va="bottom" if end >= 0 else "top", **above)


def draw_answer(panel, answer, found):
    """The two tokens of an answer, with an arrow from the last advantage to its share in the first.

    Within a token the reward stands on the right and the advantage on the left, so that all flows from right to left.
    """
    rewards, values, deltas, advantages = (found[name][answer] for name in ("r", "V", "delta", "A"))
    for t in range(2):
        bar(panel, t + WIDTH, rewards[t], kind="reward", text=f"r {rewards[t]:.2f}")
        bar(panel, t, values[t], kind="value", text=f"V {values[t]:.1f}")
        carried = advantages[t] - deltas[t]
        bar(panel, t - WIDTH, deltas[t], kind="delta", text="" if carried else f"A {advantages[t]:.2f}")
        if carried:
            bar(panel, t - WIDTH, carried, deltas[t], "from the next token", f"A {advantages[t]:.2f}")
    start, end = (1 - 1.5 * WIDTH, advantages[1] / 2), (-WIDTH / 2, (deltas[0] + advantages[0]) / 2)
    bend = f"arc3,rad={0.15 if answer == 0 else -0.15}"
    arrow = {"arrowstyle": "-|>", "color": "#333333", "connectionstyle": bend, "shrinkA": 1, "shrinkB": 1}
    panel.annotate("", end, start, arrowprops=arrow)
    panel.axhline(0, color="#333333", linewidth=0.8)
    panel.set_xticks([0, 1], [f"{'ab'[answer]}{t}: {word}" for t, word in enumerate(WORDS[answer])])
    panel.set(xlim=(-0.6, 1.6), title=f"answer {'ab'[answer]}, score {SCORES[answer]:+.0f}")


def main(path):
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "rllr", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained", facecolor="white")
        panels = figure.subplots(1, 2, sharey=True)
        found = numbers()
        for answer, panel in enumerate(panels):
            draw_answer(panel, answer, found)
        panels[0].set(ylim=(-1.45, 1.35), ylabel="units of the score")
        legend = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
        names = {"delta": "advantage: delta", "from the next token": f"advantage: {LAM:g} · A of the next token"}
        labels = [names.get(label, label) for label in legend]
        figure.legend(legend.values(), labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
    print(f"drawn {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "figures" / "ppo-by-hand.svg")
