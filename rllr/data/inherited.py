"""What a stage takes over from the model that it starts from: the data settings, and which part each row plays.

A row that a model has met keeps to its part. What trained or chose a policy evaluates none of its successors, and what
was a test row trains none of them. Each run writes beside its policy what it left out and what stayed as it was
(`rows.json`), so that every later stage on the same rows draws the same splits.
"""

from pathlib import Path

from ..common.errors import InputError
from ..common.files import RECORD, path_from_record
from ..model.records import PATHS, read_record, resolve_task
from ..tasks import load_task
from .met_rows import LEFT_OUT, STILL, hashes_of, recorded_hashes
from .row_reader import text_hash

HELD_OUT_SHARE = 0.1  # of the labelled rows that are left
STANDS_FOR = {"held_out": HELD_OUT_SHARE, "labelled": "all"}  # these flags, where a run did without them
TRAIN_SOURCES = frozenset({"train_file", "dataset", "dataset_config", "train_split"})
SOURCES = TRAIN_SOURCES | frozenset(
    "eval_file test_file eval_split test_split columns label_map delimiter encoding".split()
)
DRAWN_BY = SOURCES | {"labelled", "rationale_rows", "held_out", "data_seed", "test_share", "task"}
MET = {"labelled": "to train on", "held_out": "held out", "eval": "dev", "test": "test"}  # the splits of `rows.json`
FILES = frozenset({"train_file", "eval_file", "test_file"})


def start_of(config):
    """The setting that names the model which a stage starts from: policy, or for SFT model."""
    return getattr(config, "START", "policy")


def inherit(config, record: dict, directory):
    """Fill the data settings that were not given from the record of the model in `directory`; returns the names of
    those that contradict it. An SFT with training data of its own takes all of it, however many rows were used before.

    config: a `splits.DataConfig`.
    """
    recorded, given = record.get("data", {}), set(getattr(config, "given", ()))
    contradictions, origin = [], str(Path(directory or "") / RECORD)
    config.inherited = dict(getattr(config, "inherited", {}))
    fresh = start_of(config) == "model" and TRAIN_SOURCES & given
    own = {"labelled", "rationale_rows"} if fresh else set()
    own |= FILES if "dataset" in given else set()  # a file comes before a data set
    for name in config.data_settings():
        mine, theirs = getattr(config, name), recorded.get(name)
        if mine is None and name in own:
            continue
        theirs = path_from_record(theirs, directory) if name in PATHS else theirs
        if mine is None:
            setattr(config, name, theirs)
            config.inherited |= {name: origin} if theirs is not None else {}
            continue
        theirs = STANDS_FOR.get(name) if theirs is None and recorded else theirs
        others = SOURCES | {"task", "rationale_rows"} | own  # compared by their rows; no row evaluates by it
        if theirs is not None and mine != theirs and name not in others:
            contradictions.append(f"--{name} {mine} (the policy was trained with {theirs})")
    return contradictions


def find_start(config):
    """(record, task) of the model that a stage starts from, which config.START names; fills in --policy.

    InputError where a later stage finds no policy.
    """
    if start_of(config) == "policy":
        config.policy = config.policy or f"runs/{load_task(config.task or 'demo').name}/sft"
        if not Path(config.policy).is_dir() and config.policy.count("/") != 1:  # one slash may be a hub name
            raise InputError(f"--policy {config.policy}: no such directory; train_sft.py makes one")
    start = getattr(config, config.START)
    record = read_record(start)
    if start_of(config) == "policy" and not record and config.task is None:
        raise InputError(
            f"--policy {start}: no run of train_sft.py made it, so nothing says what it is asked; give --task"
        )
    return record, resolve_task(config, record, start)


def source_of(config, part):
    """What a message calls the training or evaluation data: flag, value, and where the value came from."""
    flag = f"{part}_file" if getattr(config, f"{part}_file") else "dataset"
    return f"--{flag} {getattr(config, flag) or 'demo'}{origin_of(config, flag)}"


def origin_of(config, setting):
    """The end of a message: the record that a setting came from, if it was not given."""
    origin = getattr(config, "inherited", {}).get(setting)
    return f" (from {origin})" if origin else ""


def rows_for(config, record, sources, parts, log):
    """({part: rows} without those that must not play it, what `rows.json` is to keep of that).

    Rows that the start's record names are those of its own run, and go through what they went through there. Of other
    rows a later stage takes those that the policy has not met in another part. An SFT that goes on takes all, but its
    start's test rows stay test rows, dev rows dev rows, and so on. sources: {part: digest of the rows as they were
    read}. InputError where the record's rows have changed, and no flag names other data.
    """
    recorded = record.get("rows", {})
    if not recorded or record.get("stage") == "tiny":  # a tiny model read texts, and no labels
        return parts, {}
    other = [name for name, digest in sources.items() if recorded.get(f"read for {name}") != digest]
    changed = [name for name in other if f"read for {name}" in recorded]
    if changed and not SOURCES & set(getattr(config, "given", ())):
        raise InputError("; ".join(
            f"{source_of(config, name)}: its rows are other ones now (digest {sources[name][:12]}) than those that "
            f"the policy was trained with (digest {recorded[f'read for {name}'][:12]})"
            for name in changed
        ) + ". Restore them, or give the data by flag to use it on purpose")  # fmt: skip
    for name in changed:
        log(
            f"warning: {source_of(config, name)}: other rows than those that the policy "
            "was trained with, taken because a flag names them"
        )
    hashes = {name: set(texts) for name, texts in recorded_hashes(getattr(config, start_of(config))).items()}
    if start_of(config) == "model" and DRAWN_BY & set(getattr(config, "given", ())):
        other = [*other, "train"]  # the same rows may be drawn otherwise
    known: dict = {}
    for name in sources:
        known |= (_of_other_rows if name in other else _as_before)(config, hashes, parts, name, log)
    left_out = {name: set(known.get(LEFT_OUT + name, ())) for name in sources}
    return parts | {name: _without(parts[name], texts) for name, texts in left_out.items()}, known


def _as_before(config, hashes, parts, name, log):
    """What the start's own run has written down of these very rows."""
    kept = {key: hashes[key] for key in hashes if key == LEFT_OUT + name or (name == "train" and key.startswith(STILL))}
    return {key: sorted(texts) for key, texts in kept.items() if texts}


def _of_other_rows(config, hashes, parts, name, log):
    """What is to be left out of rows that the start has not read as this part, and which stay what they were."""
    rows, source, still = parts[name], source_of(config, name), {}
    if name == "train" and start_of(config) == "model":
        out, still = _keep_to_their_parts(hashes, parts)
        did = "are test rows of the model that SFT starts from"
    else:
        trained, held_out, dev, test = (hashes.get(split, set()) for split in MET)
        out, did = {
            "train": (trained | held_out | dev | test, "trained or evaluated the policy"),
            "eval": (trained | test, "trained the policy or are its test rows"),
            "test": (trained | held_out | dev, "trained or chose the policy"),
        }[name]
    left = _without(rows, out)
    if len(left) < len(rows):
        log(f"{source}: {len(rows) - len(left)} of {len(rows)} rows {did} and are left out")
    if not left:
        raise InputError(f"{source}: every row of it {did}; give other rows")
    texts = set(hashes_of(rows))
    kept = {LEFT_OUT + name: out & texts} | {STILL + split: known & texts for split, known in still.items()}
    counts = [f"{len(kept[STILL + split])} stay {words}" for split, words in MET.items() if kept.get(STILL + split)]
    if counts:
        log(f"{source}: of the texts that {config.model} has met, {', '.join(counts)}; the other rows are drawn from")
    return {key: sorted(found) for key, found in kept.items() if found}


def _keep_to_their_parts(hashes, parts):
    """(texts that an SFT that goes on must leave out, {split: texts that stay in it}) of its training data.

    A text that was several things counts as what is worst for a figure: it trained. What has data of its own, dev or
    test, takes no rows of the training data; its start's dev rows may train then, and its test rows are left out.
    """
    trained, held_out, dev, test = (hashes.get(split, set()) for split in MET)
    still = {"held_out": held_out - trained, "eval": dev - trained - held_out}
    still["test"] = test - trained - held_out - dev
    if parts.get("eval") is not None:
        still.pop("eval")
    without_label = {text_hash(row.text, row.text_b) for row in parts["train"] if row.label is None}
    out = still.pop("test") if parts.get("test") is not None else still["test"] & without_label
    still["labelled"] = (trained | held_out | dev).difference(*still.values())
    return out, still


def _without(rows, hashes):
    return [row for row in rows if text_hash(row.text, row.text_b) not in hashes] if hashes else rows


def check_same_draw(config, record, digests):
    """InputError where the splits of a later stage are others than its start's, though rows and settings are the same:
    dev and test rows would train. digests: `Splits.digests` of this stage."""
    recorded = record.get("rows", {})
    if record.get("stage") == "tiny" or DRAWN_BY & set(getattr(config, "given", ())):
        return
    other = [name for name in MET if recorded.get(name) != digests.get(name)]
    if any(name in recorded for name in other):
        start = start_of(config)
        raise InputError(
            f"--{start} {getattr(config, start)}: its {', '.join(other)} rows are others than this version of rllr "
            "draws from the same data and settings; train it again, or use the version that trained it"
        )
