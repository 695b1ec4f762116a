"""Which rows a policy has met: digests of what was read, and hashes of texts (`rows.json` beside a policy)."""

import hashlib
import json
from pathlib import Path

from ..common.errors import InputError
from ..common.files import ROWS, read_json
from .row_reader import text_hash

LEFT_OUT = "left out of "  # and train, eval or test: texts that a run did without (`rllr.data.inherited`)
STILL = "still "  # and a split: training texts that stayed in it, since the run's start had met them there


def rows_digest(rows):
    """SHA-256 of rows, whatever their order and place."""
    one = (
        json.dumps([e.id, e.text, e.text_b, e.label, e.score, e.rationale, e.rationales], sort_keys=True) for e in rows
    )
    return hashlib.sha256(
        "\n".join(sorted(hashlib.sha256(row.encode()).hexdigest() for row in one)).encode()
    ).hexdigest()


def hashes_of(rows):
    """The rows as `rows.json` knows them."""
    return [text_hash(row.text, row.text_b) for row in rows]


def recorded_hashes(policy):
    """{split: hashes of its texts} that a policy's directory keeps; {} for one that keeps none."""
    path = Path(policy or "") / ROWS
    hashes = read_json(path) if policy and path.is_file() else {}
    if not isinstance(hashes, dict) or not all(isinstance(names, list) for names in hashes.values()):
        raise InputError(f"{path}: damaged; restore it, or train the policy again")
    return hashes


def joined_hashes(known, more):
    """{split: hashes} of both, each once; of what the draw of a run went by, the later run's alone."""
    known = {name: texts for name, texts in known.items() if not name.startswith((LEFT_OUT, STILL))}
    return {name: list(dict.fromkeys([*known.get(name, ()), *more.get(name, ())])) for name in known | more}


def met_rows(models, rows) -> dict:
    """How many of the rows the directories of these models say they have met, by their texts: {"rows_that_trained": as
    labelled rows or as PPO's prompts, "rows_that_chose": as held-out or dev rows}. 0 where they say nothing."""
    hashes, own = [recorded_hashes(model) for model in models], hashes_of(rows)
    parts = {"rows_that_trained": ("labelled", "prompts"), "rows_that_chose": ("held_out", "eval")}
    known = {
        name: {h for met in hashes for split in splits for h in met.get(split, ())} for name, splits in parts.items()
    }
    return {name: sum(h in met for h in own) for name, met in known.items()}
