"""Act 3, judge: reward functions. Everything that scores an answer is a callable `reward_fn(samples) -> [B]`.

The reward models, `gold` and a user's own function all have that form; `train_ppo.py` puts their scores together in one
line, `rewards.label_sensitive_reward`. Here is what comes before that line: raw score -> standardised -> clipped.
"""

import importlib
import inspect
import math
import traceback
from dataclasses import dataclass, field

import torch

from .common.errors import InputError, RunError
from .layout import batches_by_length, trim

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


@dataclass
class ScoreStatistics:
    """Raw scores of a reward model on answers *sampled* by the SFT policy: what a score means, stored with the model."""

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
                f"the reward model's scores on {len(scores)} sampled answers have a standard deviation of {std:.2g}: it tells "
                "no answer from another; look at its pair accuracy, train longer or at another --learning_rate"
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

    def __init__(self, model, statistics, norm="stored", clip=5.0, batch_size=64, autocast=None):
        self.model, self.norm, self.clip, self.batch_size = model, norm, clip, batch_size
        self.statistics, self.autocast = statistics, autocast
        if statistics:
            self.mean, self.variance, self.count = statistics.mean, statistics.std**2, statistics.count

    def state_dict(self):
        """What `running` has learnt of the scores so far."""
        return {name: getattr(self, name, None) for name in ("mean", "variance", "count")}

    def load_state_dict(self, state):
        self.mean, self.variance, self.count = state["mean"], state["variance"], state["count"]

    @torch.no_grad()
    def __call__(self, samples):
        self.raw = score_rows(
            self.model, samples.sequences, samples.prompt_lens, samples.response_mask, self.batch_size, self.autocast
        )
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
                f"--threshold {spec} needs {STATISTICS} beside the reward model; train_rm.py writes it, or give a number"
            )
        place = float(spec[1:]) * (GRID - 1)
        low = self.statistics.quantiles[math.floor(place)]
        raw = low + (place - math.floor(place)) * (self.statistics.quantiles[math.ceil(place)] - low)
        return raw if self.norm == "none" else (raw - self.mean) / math.sqrt(self.variance)


@torch.no_grad()
def score_rows(model, sequences, prompt_lens, response_mask, batch_size=64, autocast=None):
    """A reward model's raw scores [B], rows of similar length together."""
    lengths = (prompt_lens + response_mask.sum(1)).tolist()
    scores = torch.zeros(len(lengths), device=sequences.device)
    for rows in batches_by_length(lengths, batch_size):
        batch = trim(sequences[rows], prompt_lens[rows], response_mask[rows])
        if autocast:
            with autocast():
                scores[rows] = model(*batch).float()
        else:
            scores[rows] = model(*batch).float()
    return scores


def gold_reward(samples):
    """1 for an answer whose parsed label is the gold one, else 0 (a parse failure too). An upper bound: it sees labels."""
    unknown = [i for i, label in zip(samples.ids, samples.gold_labels) if label is None]
    if unknown:
        raise InputError(f"--reward gold needs the label of every prompt; row {unknown[0]} has none")
    right = [label == gold for label, gold in zip(samples.labels, samples.gold_labels)]
    return torch.tensor(right, dtype=torch.float32, device=samples.sequences.device)


def load_function(spec):
    """A user's reward function from "module:function", wrapped so that what it returns is checked. InputError otherwise."""
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise InputError(
            f"--reward {spec}: cannot be imported ({error}); give module:function from the Python path"
        ) from None
    if not callable(function):
        raise InputError(f"--reward {spec}: is a {type(function).__name__}, not a function")

    def checked(samples):
        try:
            returned = function(samples)
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

    try:
        checked.source = inspect.getsource(inspect.getmodule(function))
    except (OSError, TypeError):
        checked.source = None  # built in, or from no file: nothing to compare when a run is gone on with
    return checked
