"""Act 3, judge: reward functions. Everything that scores an answer is a callable `reward_fn(samples) -> [B]`.

The reward models, `gold` and a user's own function all have that form. `Judges` asks them, and `train_ppo.py` puts
their scores together in one line, `rewards.label_sensitive_reward`. Here is what comes before that line: raw score ->
standardised -> clipped.
"""

import importlib
import inspect
import math
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .answers import read_answers
from .common import ranks
from .common.errors import InputError, RunError
from .layout import Packed, batches_by_length
from .model.shards import on_whole_weights
from .run.optimizer import require_finite

STATISTICS = "score_statistics.json"
MIN_STD = 1e-4  # a reward model whose scores on real answers spread less than this has learnt nothing
GRID = 101  # quantiles stored: 0, 1, ..., 100 %


@dataclass
class Samples:
    """A batch of answers to judge: as text for people and rules, as token ids for reward models. B rows."""

    prompts: list[str]  # unrendered
    answers: list[str]
    labels: list  # parsed from the answers; None: parse failure
    gold_labels: list  # None where PPO does not know it
    sequences: torch.Tensor  # [B, T]
    prompt_lens: torch.Tensor  # [B]
    response_mask: torch.Tensor  # [B, R] bool
    truncated: torch.Tensor  # [B] bool
    ids: list = field(default_factory=list)  # of the rows the prompts come from
    examples: list = field(default_factory=list)  # these rows

    @property
    def packed(self) -> Packed:
        """Prompts and answers as the models take them."""
        return Packed(self.sequences, self.prompt_lens, self.response_mask)

    @property
    def unlabelled(self):
        """Which answers have no readable label: [B] bool."""
        return torch.tensor([label is None for label in self.labels], device=self.sequences.device)


def read_samples(rollout, examples, task, encoder, gold) -> Samples:
    """The rollout as text beside its ids. `gold`: {row id: label}, empty where PPO must not know."""
    answers = read_answers(rollout, encoder, task)
    return Samples(
        prompts=[task.prompt_of(example) for example in examples],
        answers=[answer.text for answer in answers],
        labels=[answer.label for answer in answers],
        gold_labels=[gold.get(example.id) for example in examples],
        sequences=rollout.sequences,
        prompt_lens=rollout.prompt_lens,
        response_mask=rollout.response_mask,
        truncated=rollout.truncated,
        ids=[example.id for example in examples],
        examples=list(examples),
    )


@dataclass
class ScoreStatistics:
    """Raw scores of a reward model on answers *sampled* by the SFT policy: the unit of its scores, stored with it."""

    mean: float
    std: float
    count: int
    quantiles: list[float]  # GRID of them
    truncated: int = 0  # sampled answers left out because the length limit cut them
    temperature: float = 1.0
    policy_fingerprint: str = ""

    @classmethod
    def of(cls, scores, **more):
        """Statistics of raw scores [N]. InputError where they hardly differ from each other, or are too few."""
        scores = scores.double().cpu()
        std = float(scores.std()) if len(scores) > 1 else 0.0
        if not math.isfinite(std) or std < MIN_STD:
            raise InputError(
                f"the reward model's scores on {len(scores)} sampled answers have a standard "
                f"deviation of {std:.2g}: it tells no answer from another; look at its pair "
                "accuracy, train longer or at another --learning_rate"
            )
        grid = torch.quantile(scores, torch.linspace(0, 1, GRID, dtype=scores.dtype))
        return cls(float(scores.mean()), std, len(scores), [float(q) for q in grid], **more)

    def is_whole(self):
        """Whether these are the statistics of some scores."""
        numbers = (self.mean, self.std, self.count, *self.quantiles)
        finite = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
        return finite and self.std >= MIN_STD and self.count > 0 and len(self.quantiles) == GRID


class RewardModelScorer:
    """reward_fn of a reward model: raw score, standardised by `norm`, clipped to +-clip.

    norm: stored (the model's statistics), running (they go on with every batch of raw scores), none (raw, no clip).
    After a call `raw` [B] holds the scores before normalisation and `clipped_share` the share that met the clip.
    """

    def __init__(self, model, statistics, norm="stored", clip=5.0, batch_size=64):
        self.model, self.statistics, self.norm, self.clip, self.batch_size = model, statistics, norm, clip, batch_size
        if statistics:
            self.mean, self.variance, self.count = statistics.mean, statistics.std**2, statistics.count

    def with_stored_scale(self):
        """A scorer with this model that never learns: `running` becomes `stored`, so that its scores stay
        comparable."""
        norm = "stored" if self.norm == "running" else self.norm
        return RewardModelScorer(self.model, self.statistics, norm, self.clip, self.batch_size)

    def state_dict(self):
        """What `running` has learnt of the scores so far."""
        return {name: getattr(self, name, None) for name in ("mean", "variance", "count")}

    def load_state_dict(self, state):
        self.mean, self.variance, self.count = state["mean"], state["variance"], state["count"]

    @torch.no_grad()
    def __call__(self, samples):
        self.raw = score_rows(self.model, samples.packed, self.batch_size)
        if self.norm == "none":
            self.clipped_share = 0.0
            return self.raw
        if self.norm == "running":
            self._observe(self.raw[torch.isfinite(self.raw)].double())
        standardised = (self.raw - self.mean) / math.sqrt(self.variance)
        self.clipped_share = float((standardised.abs() > self.clip).float().mean())
        return standardised.clamp(-self.clip, self.clip)

    def _observe(self, raw):
        """Chan's update of mean and variance; the stored statistics stand for their `count` of answers."""
        if len(raw) == 0:
            return
        n, total = len(raw), self.count + len(raw)
        shift = float(raw.mean()) - self.mean
        squares = (
            self.variance * (self.count - 1) + float(raw.var(unbiased=False)) * n + shift**2 * self.count * n / total
        )
        self.mean, self.variance, self.count = self.mean + shift * n / total, squares / (total - 1), total

    def threshold(self, spec):
        """A threshold in the units this scorer returns: a number as it is, "q0.9" the stored 0.9 quantile of raw scores
        passed through the same normalisation (without the clip)."""
        if not (isinstance(spec, str) and spec.startswith("q")):
            return float(spec)
        if self.statistics is None:
            raise InputError(
                f"--threshold {spec} needs {STATISTICS} beside the reward model; "
                "train_rm.py writes it, or give a number"
            )
        place = float(spec[1:]) * (GRID - 1)
        low = self.statistics.quantiles[math.floor(place)]
        raw = low + (place - math.floor(place)) * (self.statistics.quantiles[math.ceil(place)] - low)
        return raw if self.norm == "none" else (raw - self.mean) / math.sqrt(self.variance)


@torch.no_grad()
@on_whole_weights
def score_rows(model, packed, batch_size=64):
    """A reward model's raw scores [B] of packed answers, rows of similar length together."""
    scores = torch.zeros(len(packed.sequences), device=packed.sequences.device)
    for rows in ranks.share(batches_by_length(packed.lengths.tolist(), batch_size)):
        scores[rows] = model(*packed.rows(rows)).float()
    ranks.add(scores)  # a row that another rank has scored is 0 here
    return scores


class Judged(NamedTuple):
    """What the judges say of B answers: the arguments of `label_sensitive_reward` and `incomplete_answer_rule`."""

    mode: str  # label, rationale or mixed
    label_scores: torch.Tensor | None  # [B]
    rationale_scores: torch.Tensor | None  # [B]
    threshold: float | None  # mixed: above it a better label pays nothing more
    cap: float | None  # the most that an incomplete answer scores; None: no cap
    penalties: tuple[float, float]  # (missing end, missing label), in the units of the scores

    @property
    def scores(self):
        """{"label" and "rationale", as far as they judged: scores [B]}."""
        both = {"label": self.label_scores, "rationale": self.rationale_scores}
        return {name: scores for name, scores in both.items() if scores is not None}

    def require_finite(self, names):
        """RunError, with the names of the prompts, where a judge gave a score that is not finite."""
        for part, scores in self.scores.items():
            require_finite(scores, f"the {part} score", names)


class Judges:
    """The reward functions of a run, by the part that each plays: {"label": ..., "rationale": ...}.

    `gold` and a user's own function play the label's part. threshold: a number, or a quantile like "q0.9". penalties:
    what an answer without its end, or without a label, costs, in standard deviations of a reward model's scores.
    """

    def __init__(self, mode, by_part, threshold=None, penalties=(0.0, 0.0)):
        self.mode, self.by_part, self.spec, self.penalties = mode, by_part, threshold, penalties
        self.cap_and_unit(
            self.threshold()
        )  # an error in what a cap or a threshold needs comes now, not in the first step

    @property
    def scorers(self):
        """{part: scorer} of those that are reward models."""
        return {part: judge for part, judge in self.by_part.items() if isinstance(judge, RewardModelScorer)}

    def with_stored_scale(self):
        """The same judges on a scale that stays the same: what they score has no effect on these."""
        scorers = {part: scorer.with_stored_scale() for part, scorer in self.scorers.items()}
        return Judges(self.mode, self.by_part | scorers, self.spec, self.penalties)

    def threshold(self):
        """Of the mixed reward, in the units of the label scores; None in the other modes."""
        return self.by_part["label"].threshold(self.spec) if self.mode == "mixed" else None

    def cap_and_unit(self, threshold):
        """(cap, unit) of `incomplete_answer_rule`: mean and spread of the SFT policy's scores, as the reward counts.

        Of reward models alone: a rule beside one, which pays 0 for an answer without a label, does not raise the cap.
        """
        scorers = self.scorers
        if not scorers:
            return None, 1.0  # gold and own functions: no cap
        if any(scorer.norm != "none" for scorer in scorers.values()):
            return 0.0, 1.0
        if any(scorer.statistics is None for scorer in scorers.values()):
            raise InputError(
                f"--score_norm none still needs {STATISTICS} for the missing-EOS rule; run train_rm.py again"
            )
        means = {part: scorer.statistics.mean for part, scorer in scorers.items()}
        if self.mode == "mixed":
            means["label"] = min(means["label"], threshold)
        return sum(means.values()), sum(scorer.statistics.std**2 for scorer in scorers.values()) ** 0.5

    def __call__(self, samples) -> Judged:
        """Every judge's scores of the answers, and what goes with them."""
        scores = {part: judge(samples) for part, judge in self.by_part.items()}
        threshold = self.threshold()
        cap, unit = self.cap_and_unit(threshold)
        penalties = tuple(penalty * unit for penalty in self.penalties)
        return Judged(self.mode, scores.get("label"), scores.get("rationale"), threshold, cap, penalties)

    def clipped_shares(self):
        """{part: share of the last scores that met the clip}."""
        return {part: scorer.clipped_share for part, scorer in self.scorers.items()}


def gold_reward(samples):
    """1 for an answer whose label is the gold one, else 0 (a parse failure, too). An upper bound: it sees labels."""
    unknown = [i for i, label in zip(samples.ids, samples.gold_labels) if label is None]
    if unknown:
        problem = f"row {unknown[0]} has none; --prompts labelled takes the labelled rows alone"
        raise InputError(f"--reward gold needs the label of every prompt; {problem}")
    right = [label == gold for label, gold in zip(samples.labels, samples.gold_labels)]
    return torch.tensor(right, dtype=torch.float32, device=samples.sequences.device)


def load_function(spec):
    """A user's reward function from "module:function", in a wrapper that checks what it returns. Else InputError."""
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        is_file = module_name.endswith(".py") or "/" in module_name
        wanted = Path(module_name.removesuffix(".py")).as_posix().strip("./").replace("/", ".")
        hint = f", here {wanted}:{function_name}, with dots and without .py" if is_file else ""
        raise InputError(
            f"--reward {spec}: cannot be imported ({error}); give module:function from the Python path{hint}"
        ) from None
    if not callable(function):
        raise InputError(f"--reward {spec}: is a {type(function).__name__}, not a function")

    def checked(samples):
        try:
            returned = ranks.from_first(lambda: function(samples))  # one rank asks, so that a paid judge is asked once
        except RunError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RunError(
                f"--reward {spec} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})."
            ) from error
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32, device=samples.sequences.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--reward {spec}: must return {len(samples.answers)} numbers ({error})") from None
        if scores.shape != (len(samples.answers),):
            raise InputError(
                f"--reward {spec}: must return {len(samples.answers)} numbers, returned shape {tuple(scores.shape)}"
            )
        return scores.detach()

    return UserFunction(checked, function)


class UserFunction:
    """A user's reward function, and the source of its module: a resumed run must have the same."""

    def __init__(self, checked, function):
        self.checked, self.source = checked, None
        module = inspect.getmodule(function)
        try:
            self.source = inspect.getsource(module) if module else None
        except (OSError, TypeError):
            pass  # built in, or from no file: there is nothing to compare

    def __call__(self, samples):
        return self.checked(samples)
