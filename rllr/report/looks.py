"""What PPO's looks at dev saw, row by row: `dev/step-000025.jsonl` in a run's directory, for the report page.

A line is a dev row: id, prompt, gold, answer, label (null: parse failure), truncated, right (1 or 0; of correlations
the closeness to the gold label), score (what PPO pays, KL apart), label_score, rationale_score, grounded (null where
there is none).
"""

from pathlib import Path

from ..common.files import disk_faults, write_lines

FOLDER = "dev"  # in a run's directory
MOST_ROWS = 1000  # of dev that are kept, the first ones


def file_of(directory, step):
    """The file of a look in a run's directory."""
    return Path(directory) / FOLDER / f"step-{step:06d}.jsonl"


def write_look(directory, step, samples, **columns):
    """Write the first rows of a look. columns: lists in the order of the samples, by the names above, or None."""
    columns = {name: values or [None] * len(samples.ids) for name, values in columns.items()}
    own = {
        "id": samples.ids,
        "prompt": samples.prompts,
        "gold": samples.gold_labels,
        "answer": samples.answers,
        "label": samples.labels,
        "truncated": samples.truncated.tolist(),
    }
    columns = own | columns
    lines = [dict(zip(columns, row)) for row in list(zip(*columns.values(), strict=True))[:MOST_ROWS]]
    path = file_of(directory, step)
    with disk_faults(str(path)):
        path.parent.mkdir(exist_ok=True)
        write_lines(path, lines)
