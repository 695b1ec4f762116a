r"""PPO against a reward function of your own, without a reward model.

    python -m examples.custom_reward     # what it pays for five answers
    bash examples/own_task/run.sh        # makes a policy to start from; any other will do
    python train_ppo.py --policy runs/support/sft --reward examples.custom_reward:reward \
        --steps 30 --rollout_prompts 16 --answers_per_prompt 4

Run these in the repository's folder. The function pays for a readable label and for a rationale that takes its words
from the text, and takes off for length. In the last lines of PPO's output `score` and `grounded` have risen. The
function does not know which label is right, so accuracy will not rise. PPO hands back the policy with the highest score
on dev that beats the start (`--best_by score`, the default for a function like this one).
"""

import re

LABEL, QUOTED, WORD = 1.0, 2.0, -0.05  # for a readable label; for a rationale of quoted words alone; for each word
NO_LABEL = -1.0  # for an answer without a readable label, whatever else it says
LONG = 3  # letters of a word that is looked up; shorter ones ("is", "a") stand in any text


def reward(samples):
    """One number for each answer; `samples` is an rllr.judge.Samples, with a batch's rows, answers and labels."""
    rows = zip(samples.examples, samples.answers, samples.labels)
    return [score(row.text, answer, label) for row, answer, label in rows]


def score(text, answer, label):
    """What one answer to one text is worth. label: the one that was read from the answer, None if there is none."""
    if label is None:
        return NO_LABEL
    rationale = answer.strip().rpartition("\n")[0]  # the last line is the label's
    looked_up = [word for word in words(rationale) if len(word) >= LONG]
    found = sum(word in words(text) for word in looked_up)
    return LABEL + QUOTED * found / max(1, len(looked_up)) + WORD * len(words(answer))


def words(text):
    return re.findall(r"\w+", text.lower())


TEXT = "although the screen is gorgeous, the battery dies quickly."
ANSWERS = [
    "what decides is that the battery dies quickly, which is negative\nLabel: negative",
    "the battery dies quickly\nLabel: negative",
    "the battery dies quickly\nLabel: positive",
    "the delivery took forever\nLabel: negative",
    "the battery dies quickly",
]


def show():
    """Print what the reward pays for each of these answers."""
    from types import SimpleNamespace

    from rllr.tasks import TASKS, Example, parse_answer

    labels = [parse_answer(TASKS["demo"], answer) for answer in ANSWERS]
    samples = SimpleNamespace(examples=[Example("1", TEXT)] * len(ANSWERS), answers=ANSWERS, labels=labels)
    print(TEXT)
    for answer, value in zip(ANSWERS, reward(samples)):
        print(f"{value:+.2f}  {answer!r}")


if __name__ == "__main__":
    show()
