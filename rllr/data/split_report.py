"""What the log says of the rows: how many serve what, and what makes figures mean less than they seem to."""

from collections import Counter

from ..common.errors import brief

FEW_ROWS = 400  # dev rows below which what they say is shaky: the standard error of an accuracy is above 2.5 points
NAMED_CLASSES = 12  # labels, at most, whose rows a log line counts


def tell_splits(splits, task, log):
    """Rows per split and class, what each split does, and a warning for what makes figures mean less than they seem
    to."""
    unlabelled = "PPO's prompts" if splits.unlabelled else "PPO's prompts are the labelled ones"
    if splits.unlabelled and splits.few_unlabelled:
        unlabelled += ", and as they are few, so are the labelled ones"
    named = {
        "labelled to train on": (splits.labelled, "SFT and the reward models learn from them"),
        "labelled held out": (splits.held_out, "they stop the reward model"),
        "unlabelled": (splits.unlabelled, unlabelled),
        "for evaluation (dev)": (splits.eval, "they choose epoch and step; preview, guard"),
        "for test": (splits.test, "they choose nothing: report figures of these"),
    }  # fmt: skip
    lines = [f"{len(rows)} {name}{_by_label(rows, task)}: {does}" for name, (rows, does) in named.items()]
    log("rows: " + "\n      ".join(lines))
    if len(splits.eval) < FEW_ROWS:
        log(
            f"warning: dev has {len(splits.eval)} rows: preview, guard and the choice of epoch and step are shaky; "
            f"{FEW_ROWS} or more would make them surer"
        )
    learnt = {_texts(row) for row in splits.labelled}
    train = learnt | {_texts(row) for row in splits.held_out + splits.unlabelled}
    seen = train | {_texts(row) for row in splits.eval}
    for name, rows, others, where in (
        ("test", splits.test, seen, "training and evaluation rows"),
        ("evaluation", splits.eval, train, "training rows"), ("held-out", splits.held_out, learnt, "rows to train on"),
    ):  # fmt: skip
        shared = [row for row in rows if _texts(row) in others]
        if shared:
            log(
                f"warning: {len(shared)} of {len(rows)} {name} texts are among the {where} as well "
                f"({', '.join(r.name for r in shared[:3])}"
                f"{', ...' if len(shared) > 3 else ''}): what is measured on them says little about new texts"
            )
    groups = {"rows to train on": splits.labelled, "evaluation rows": splits.eval, "test rows": splits.test}
    for name, rows in groups.items():
        present = {row.label for row in rows}
        if len(present) == 1:
            log(
                f"warning: all {len(rows)} {name} are labelled {present.pop()!r}: "
                "always the same answer is 100 % right there"
            )
    missing = [label for label in task.labels if label not in {row.label for row in splits.labelled}]
    if missing:
        log(
            "warning: no row to train on is labelled "
            f"{', '.join(map(brief, missing))}: the policy cannot learn to say so"
        )


def _by_label(rows, task):
    counts = Counter(row.label for row in rows)
    if not any(label in counts for label in task.labels) or len(task.labels) > NAMED_CLASSES:
        return ""
    return f" ({', '.join(f'{label} {counts[label]}' for label in task.labels)})"


def _texts(row):
    """A row's texts as they are compared: without case and white space."""
    return tuple("".join((text or "").casefold().split()) for text in (row.text, row.text_b))
