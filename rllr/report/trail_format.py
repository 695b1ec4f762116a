"""The audit trail as files: what its lines hold, how they are sealed, and how they are read back.

    runs/sst2/ppo-label/audit/step-000003.jsonl         one file per audited rollout, whole on the disk or not there
        header   format, versions, every setting of the run
        step     what holds for the rollout: beta, threshold, cap, the units of the scores, its minibatches, its metrics
        sample   one answer: prompt, text, label, and its scores from raw to the one that PPO pays
        token    one token of it: every number that went into its gradient
        end      how many lines the file has

A line is a JSON object and ends with `digest`: the first 16 hexadecimal digits of SHA-256 over the digest before it and
the line itself. So a changed, missing or moved line is found. Reading needs neither torch nor a model.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import InputError, brief
from .fields import (
    ABOVE_0,
    COUNT,
    COUNTS,
    FROM_1,
    LARGEST,
    LIST,
    NUMBER,
    OBJECT,
    OR_NULL,
    TEXT,
    YES_OR_NO,
    check_fields,
)

AUDIT_FORMAT = 1  # raised where a field changes its name or its meaning
FOLDER = "audit"  # in a run's directory

# What each kind of line holds: {field: (shape or unit, what it is)}. docs/audit.md shows these tables.
FIELDS = {
    "header": {
        "format": ("number", "of these files, now 1"),
        "versions": ("text by name", "rllr, torch, transformers, python"),
        "task": ("object", "name and labels"),
        "settings": ("object", "every setting in run.json but `output_dir`, `overwrite` and `resume`"),
        "whitening": ("object", "`unbiased` (sum of squares divided by n - 1) and `eps`, of `ppo.masked_whiten`"),
    },
    "step": {
        "step": ("number", "the rollout, from 1"),
        "answers": ("number", "B, answers in the rollout"),
        "kl_coef": ("reward per nat", "beta, which this rollout's rewards used"),
        "mode": ("label, rationale, mixed", "which form of `label_sensitive_reward`"),
        "threshold": ("score", "of the mixed form; else null"),
        "cap": ("score", "the most that an answer without its end or label earns; null: no cap"),
        "missing_eos_penalty": ("score", "taken off an answer that the length limit cut"),
        "missing_label_penalty": ("score", "taken off an answer without a readable label"),
        "scales": ("object by part", "of each reward model: `norm`, `mean`, `variance` of raw scores, `clip`"),
        "minibatches": ("list", "act 6 in order: epoch, minibatch, rows, tokens, applied (did the optimisers move?)"),
        "metrics": ("object", "the step's numbers in metrics.jsonl, without times, tokens per second and dev scores"),
    },
    "sample": {
        "sample": ("number", "the answer's row in the rollout, from 0"),
        "id": ("text", "of the data row"),
        "prompt": ("text", "before the chat template"),
        "prompt_ids": ("token ids", "as the models saw it"),
        "answer": ("text", "without the token that ended it"),
        "label": ("text", "read from the answer; null: parse failure"),
        "gold": ("text", "the gold label, null where PPO does not know it"),
        "tokens": ("number", "of the answer, its end token included"),
        "truncated": ("true or false", "cut by the length limit"),
        "label_raw": ("score", "of the label reward model; null where another function judged"),
        "label_score": (
            "score",
            "clip((label_raw - mean) / sqrt(variance)); norm none: label_raw; another function: its value",
        ),
        "rationale_raw": ("score", "of the rationale reward model; null where another function judged"),
        "rationale_score": ("score", "likewise"),
        "branch": ("text", "label, rationale, mixed: below the threshold, or mixed: at the threshold"),
        "combined_score": ("score", "label_score | rationale_score | min(label_score, threshold) + rationale_score"),
        "rule": ("text", "none, missing eos, missing label, or both; without a cap a missing label is no rule"),
        "score": ("score", "combined_score, or min(combined_score, cap) - penalty where a rule applies"),
        "relative_score": ("score", "score - mean score of the prompt's other answers; alone: score"),
    },
    "token": {
        "step": ("number", "the rollout, from 1"),
        "sample": ("number", "the answer's row in the rollout, from 0"),
        "id": ("text", "of the data row"),
        "token": ("number", "t, its place in the answer, from 0"),
        "position": ("number", "prompt length - 1 + t: the place in the sequence that predicts it"),
        "token_id": ("number", "in the vocabulary"),
        "text": ("text", "its share of the answer's text"),
        "rollout_logprob": ("nats", "log-probability recorded while sampling"),
        "logprob": ("nats", "of the policy that sampled, by the scoring pass: log pi_old"),
        "ref_logprob": ("nats", "of the SFT policy: log pi_ref"),
        "kl": ("nats", "k1: logprob - ref_logprob; k3: exp(x) - 1 - x with x = ref_logprob - logprob"),
        "label_score": ("score", "its answer's"),
        "rationale_score": ("score", "its answer's"),
        "branch": ("text", "its answer's"),
        "combined_score": ("score", "its answer's"),
        "rule": ("text", "its answer's"),
        "score": ("score", "its answer's"),
        "reward": ("reward", "r_t = -kl_coef * kl, on the last token + relative_score"),
        "value": ("reward", "V_t before the update"),
        "advantage": ("reward", "A_t = delta_t + gamma * lam * A_t+1, delta_t = r_t + gamma * V_t+1 - V_t"),
        "whitened_advantage": ("none", "(A_t - mean) / sqrt(variance + eps) over the rollout's tokens"),
        "return": ("reward", "A_t + V_t, the value's target"),
        "updates": ("list", "one object per epoch in which the token was trained on"),
    },
    "update": {
        "epoch": ("number", "from 0"),
        "minibatch": ("number", "of the epoch, from 0"),
        "new_logprob": ("nats", "log pi, before this minibatch's step"),
        "ratio": ("none", "rho = exp(new_logprob - logprob)"),
        "clipped": ("true or false", "whether -A * clip(rho, 1 - clip, 1 + clip) > -A * rho"),
        "new_value": ("reward", "V, before this minibatch's step"),
        "value_clipped": ("true or false", "whether the squared error of the clipped value is the larger one"),
        "policy_loss": ("none", "max(-A * rho, -A * clip(rho)) / the minibatch's tokens"),
        "value_loss": ("reward squared", "max((V - R)^2, (clip(V) - R)^2) / 2 / the minibatch's tokens"),
    },
    "end": {"lines": ("number", "of the file, this one included")},
}


def audited(spec):
    """--audit as a function of the step: N, the first N rollouts; every:K, each K-th; all; None, none."""
    if spec is None:
        return lambda step: False
    if spec == "all":
        return lambda step: True
    number = re.fullmatch(r"(every:)?0*([1-9][0-9]{0,8})", spec)
    if number is None:
        raise InputError(f"--audit {brief(spec)}: give a number of rollouts, all, or every:K")
    count = int(number.group(2))
    return (lambda step: step % count == 0) if number.group(1) else (lambda step: step <= count)


@dataclass
class Trail:
    """One audited rollout, read from its file."""

    path: Path
    header: dict
    step: dict
    samples: list  # of dicts, in the order of the rollout
    tokens: list  # per sample its tokens, in order
    problems: list = field(default_factory=list)  # sentences: lines that are not as they were written


def file_of(directory, step):
    """The file of a rollout in a run's directory."""
    return Path(directory) / FOLDER / f"step-{step:06d}.jsonl"


def step_of(path):
    """The step in the name of a rollout's file; None where the name is no such name."""
    named = re.fullmatch(r"step-([0-9]{6}|[1-9][0-9]{6,})\.jsonl", Path(path).name)
    return int(named.group(1)) if named else None


def seal(objects):
    """The lines of a file, each with its digest; the end line is added."""
    objects = list(objects)
    digest, lines = "", []
    for value in [*objects, {"kind": "end", "lines": len(objects) + 1}]:
        body = json.dumps(value, ensure_ascii=False)
        digest = digest_of(digest, body)
        lines.append(f'{body[:-1]}, "digest": "{digest}"}}')
    return lines


def digest_of(before, body):
    """Of a line without its digest, after the digest of the line before it."""
    return hashlib.sha256(f"{before}{body}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


_DIGEST = re.compile(r', "digest": "([0-9a-f]{16})"\}$')


def read_trail(path) -> Trail:
    """The rollout of a file. InputError where it is none, names what is missing; changed lines become `problems`."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found: dict[str, list] = {kind: [] for kind in ("header", "step", "sample", "token", "end")}
    problems: list[str] = []
    order: list[str] = []  # of the lines' kinds
    before = ""
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        sealed = _DIGEST.search(line)
        value = _object(line, f"{path}, line {number}")
        if sealed is None or digest_of(before, line[: sealed.start()] + "}") != sealed.group(1):
            problems.append(f"{path.name}, line {number} ({_place(value)}): its digest does not fit what it holds")
        before = sealed.group(1) if sealed else before
        found[value["kind"]].append(value)
        order.append(value["kind"])
    for kind in ("header", "step"):
        if len(found[kind]) != 1:
            raise InputError(f"{path}: has {len(found[kind])} lines of kind {kind!r}, not one; it is no audit trail")
    header, step = found["header"][0], found["step"][0]
    if [kind for kind in order if kind not in ("sample", "token")] != ["header", "step", "end"] or order[-1] != "end":
        problems.append(f"{path.name}: its lines are not in order: header, step, the answers, end")
    written = found["end"][0]["lines"] if found["end"] else None
    if written != sum(map(len, found.values())):
        problems.append(f"{path.name}: lines are missing or too many; its end line says {written}")
    samples, tokens = _in_order(path, step, found)
    _check_scores(path, step, samples)
    return Trail(path, header, step, samples, tokens, problems)


def _object(line, where):
    """A line as the object that its kind asks for. InputError, with the field, where it is none."""
    try:
        value = json.loads(line, parse_constant=_not_finite, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in ("header", "step", "sample", "token", "end"):
        raise InputError(f"{where}: is no line of an audit trail; a line has kind header, step, sample, token or end")
    if kind == "header" and value.get("format") != AUDIT_FORMAT:
        read = f"this version of rllr reads format {AUDIT_FORMAT}"
        raise InputError(f"{where}: has audit format {brief(value.get('format'))}; {read}")
    check_fields(value, _kinds(kind), f"{where}: the {kind}")
    if kind == "step":
        check_fields(
            value["metrics"], dict.fromkeys(value["metrics"], NUMBER + OR_NULL), f"{where}: the step's metrics"
        )
    for name, inner in _INSIDE.get(kind, {}).items():
        held = value[name]
        parts = held.values() if name == "scales" else held if isinstance(held, list) else [held]
        for part in parts:
            check_fields(part, inner, f"{where}: the {kind}'s {name}")
    return value


def _whole(digits):
    """A whole number; one that is too large to be exact in float64 as a float, as other readers of JSON take it."""
    number = int(digits)
    return number if abs(number) <= LARGEST else float(digits)


def _not_finite(word):
    raise ValueError(f"{word} is no number")


# What the fields hold, by the unit that FIELDS gives them, and where that does not tell, by their name.
_OF_UNIT = {
    "text": TEXT, "true or false": YES_OR_NO, "text by name": OBJECT, "object": OBJECT, "object by part": OBJECT,
    "list": LIST, "token ids": COUNTS, "label, rationale, mixed": ("label", "rationale", "mixed"),
}  # fmt: skip
_OF_NAME: dict[str, str | tuple] = {
    **dict.fromkeys(("sample", "token", "position", "token_id", "epoch", "minibatch"), COUNT),
    **dict.fromkeys(("format", "step", "answers", "tokens", "lines"), FROM_1),
    **dict.fromkeys(("threshold", "cap", "label_raw", "label_score", "rationale_raw", "rationale_score"),
                    NUMBER + OR_NULL),
    **dict.fromkeys(("label", "gold"), TEXT + OR_NULL),
}  # fmt: skip


def _kinds(line):
    """{field of a kind of line: the kind of its value}."""
    return {name: _OF_NAME.get(name) or _OF_UNIT.get(unit, NUMBER) for name, (unit, _) in FIELDS[line].items()}


_INSIDE: dict[str, dict[str, dict]] = {  # {kind: {field: what the objects in it hold, as far as a replay reads it}}
    "header": {
        "settings": {"gamma": NUMBER, "lam": NUMBER, "clip": NUMBER, "value_clip": NUMBER, "kl_kind": ("k1", "k3"),
                     "answers_per_prompt": FROM_1, "ppo_epochs": FROM_1, "minibatches": FROM_1, "reward": TEXT,
                     "rollout_prompts": FROM_1, "max_new_tokens": FROM_1,
                     "max_update_kl": NUMBER + OR_NULL, "max_ref_kl": NUMBER + OR_NULL, "on_ref_kl": TEXT,
                     "rationale_rm": TEXT + OR_NULL, "audit": TEXT + OR_NULL},
        "whitening": {"unbiased": YES_OR_NO, "eps": ABOVE_0},
    },
    "step": {
        "scales": {"norm": ("stored", "running", "none"), "mean": NUMBER, "variance": ABOVE_0, "clip": ABOVE_0},
        "minibatches": {"epoch": COUNT, "minibatch": COUNT, "rows": COUNTS, "tokens": FROM_1, "applied": YES_OR_NO},
    },
    "token": {"updates": _kinds("update")},
}  # fmt: skip


def _check_scores(path, step, samples):
    """InputError where an answer lacks the score, or the step the threshold, that the step's mode needs."""
    needed = {"mixed": ("label_score", "rationale_score")}.get(step["mode"], (f"{step['mode']}_score",))
    if step["mode"] == "mixed" and step["threshold"] is None:
        raise InputError(f"{path}: the step has mode mixed and no threshold")
    for name in ("label_score", "rationale_score"):
        if len({sample[name] is None for sample in samples}) > 1:
            raise InputError(f"{path}: some of its samples have a {name}, and some have none")
    for sample in samples:
        for name in needed:
            if sample[name] is None:
                raise InputError(f"{path}: sample {sample['sample']} has no {name}, which mode {step['mode']} needs")


def _place(value):
    """What a line is about, for messages."""
    parts = [f"{name} {value[name]}" for name in ("step", "sample", "token") if name in value]
    return ", ".join(parts) if parts and value["kind"] != "step" else f"its {value['kind']} line"


def _in_order(path, step, found):
    """(samples, tokens per sample), in the order of the rollout. InputError where one is missing."""
    samples = sorted(found["sample"], key=lambda sample: sample["sample"])
    numbers = [sample["sample"] for sample in samples]
    if len(numbers) != step["answers"] or numbers != list(range(len(numbers))):
        raise InputError(f"{path}: its samples are not numbered from 0 to {step['answers'] - 1}")
    tokens: list[list] = [[] for _ in samples]
    for token in found["token"]:
        if token["sample"] not in range(len(samples)):
            raise InputError(f"{path}: a token belongs to sample {token['sample']!r:.20}, which is not there")
        tokens[token["sample"]].append(token)
    for sample, own in zip(samples, tokens):
        own.sort(key=lambda token: token["token"])
        if len(own) != sample["tokens"] or [token["token"] for token in own] != list(range(len(own))):
            raise InputError(f"{path}: sample {sample['sample']} does not have tokens 0 to {sample['tokens'] - 1}")
    return samples, tokens


def files_in(path):
    """The files of a trail: the one given, whatever its name, or those of a run's directory or of its audit folder, in
    order. InputError where there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = rollouts_in(path) or rollouts_in(path / FOLDER)
    if not files:
        raise InputError(f"{path}: holds no audit trail; train_ppo.py --audit N writes one")
    return files


def rollouts_in(folder):
    """The files `step-*.jsonl` of a folder, in the order of their steps."""
    found = {step_of(file): file for file in Path(folder).glob("step-*.jsonl") if step_of(file) is not None}
    return [found[step] for step in sorted(found)]
