"""What stands between a reward model's raw score and the reward: statistics, normalisation, clip, threshold, checks."""

import json
import math
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import tiny_model, toy_tokenizer

from rllr.common.errors import InputError, RunError
from rllr.judge import (
    STATISTICS,
    Judges,
    RewardModelScorer,
    Samples,
    ScoreStatistics,
    gold_reward,
    load_function,
    score_rows,
)
from rllr.layout import pack_sequences
from rllr.model.heads import RewardModel
from rllr.ppo_models import check_same_tokenizer, load_judges
from rllr.report.reward_report import load_statistics, save_statistics


def samples(scores, labels=None, gold=None):
    """Answers of different lengths, each of which `Fake` gives the score wanted."""
    count = len(scores)
    prompts = [[1] * (2 + i % 3) for i in range(count)]
    sequences, prompt_lens, mask = pack_sequences(prompts, [[7] * (1 + i % 4) + [10 + i] for i in range(count)])
    answers, ids = [f"answer {i}" for i in range(count)], [f"row {i}" for i in range(count)]
    return Samples(
        ["p"] * count, answers, labels or [None] * count, gold or [None] * count,
        sequences, prompt_lens, mask, torch.zeros(count, dtype=torch.bool), ids,
    )  # fmt: skip


class Fake:
    """A reward model that knows each answer by its last token, and counts the rows of its calls."""

    def __init__(self, scores):
        self.scores, self.calls = torch.tensor(scores), []

    def __call__(self, sequences, prompt_lens, response_mask):
        self.calls.append(len(sequences))
        last = prompt_lens + response_mask.sum(1) - 1
        return self.scores[sequences.gather(1, last.unsqueeze(1)).squeeze(1) - 10]


def judge(scores, statistics, norm="stored", **options):
    """(what the scorer gives for raw `scores`, the scorer)."""
    scorer = RewardModelScorer(Fake(scores), statistics, norm, **options)
    return scorer(samples(scores)), scorer


def statistics(mean=1.0, std=2.0, count=100, quantiles=None):
    return ScoreStatistics(mean, std, count, quantiles or [i / 10 for i in range(101)])


# ---- statistics


def test_statistics_by_hand():
    """0, 1, 2, 3, 14: mean 4; squares of the deviations 16 + 9 + 4 + 1 + 100 = 130, over 4."""
    found = ScoreStatistics.of(torch.tensor([14.0, 0.0, 3.0, 1.0, 2.0]), truncated=7, temperature=0.5)
    assert (found.mean, found.count, found.truncated, found.temperature) == (4, 5, 7, 0.5)
    assert found.std == pytest.approx(math.sqrt(130 / 4))
    assert len(found.quantiles) == 101 and found.quantiles == sorted(found.quantiles)
    q = found.quantiles
    assert (q[0], q[25], q[50], q[75], q[100]) == (0, 1, 2, 3, 14)
    assert q[90] == pytest.approx(3 + 0.6 * 11)  # 0.9 of the way through 4 gaps: 0.6 into the last


@pytest.mark.parametrize(
    "scores, words",
    [
        ([1.0, 1.0, 1.0], "3 sampled answers have a standard deviation of 0"),
        ([1.0, 1.00005, 1.0001], "standard deviation of 5e-05"),
        ([3.0], "1 sampled answers"),
        ([1.0, float("nan")], "nan"),
        ([1.0, float("inf")], "standard deviation"),
    ],
)
def test_scores_that_tell_nothing_apart(scores, words):
    with pytest.raises(InputError) as caught:
        ScoreStatistics.of(torch.tensor(scores, dtype=torch.float64))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    ScoreStatistics.of(torch.tensor([1.0, 1.0002, 1.0004], dtype=torch.float64))


def test_statistics_are_saved_and_loaded(tmp_path):
    found = ScoreStatistics.of(torch.randn(50), policy_fingerprint="abc")
    save_statistics(found, tmp_path)
    assert load_statistics(tmp_path) == found
    assert [path.name for path in tmp_path.iterdir()] == ["score_statistics.json"]


@pytest.mark.parametrize(
    "change",
    [{"std": 0.0}, {"std": "much"}, {"std": float("nan")}, {"quantiles": [1.0]}, {"quantiles": None}, {"unknown": 1}],
)
def test_damaged_statistics(tmp_path, change):
    content = vars(statistics()) | change
    (tmp_path / STATISTICS).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"^{tmp_path / STATISTICS}: damaged"):
        load_statistics(tmp_path)


def test_unreadable_or_missing_statistics(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path / STATISTICS}: not there; train_rm.py writes it"):
        load_statistics(tmp_path)
    for content in (b"{", b"[]", b"\xff\xfe\x00", b'{"mean": 1}'):
        (tmp_path / STATISTICS).write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_statistics(tmp_path)


# ---- the scorer


def test_score_rows_puts_scores_back_in_order():
    scores = [float(i * i) for i in range(11)]
    batch, model = samples(scores), Fake(scores)
    given = score_rows(model, batch.packed, batch_size=4)
    assert given.tolist() == scores and given.dtype == torch.float32 and model.calls == [4, 4, 3]


def test_score_rows_with_a_real_model_does_not_depend_on_the_batch():
    model = RewardModel.from_policy(tiny_model("llama"))
    prompts, responses = [[5, 6], [7], [8, 9, 10], [11]], [[12, 2], [13, 14, 15, 2], [2], [16, 17, 2]]
    batch = pack_sequences(prompts, responses)
    whole = score_rows(model, batch, batch_size=4)
    assert torch.allclose(score_rows(model, batch, batch_size=1), whole, atol=1e-5)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        with torch.no_grad():
            hidden = model.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
        assert float(model.head(hidden)) == pytest.approx(float(whole[i]), abs=1e-4)


def test_stored_statistics_standardise():
    raw = [1.0, 3.0, -5.0, 2.0]
    given, scorer = judge(raw, statistics(mean=1.0, std=2.0))
    assert given.tolist() == [0.0, 1.0, -3.0, 0.5]
    assert scorer.raw.tolist() == raw and scorer.clipped_share == 0
    scorer(samples(raw))
    assert (scorer.mean, scorer.variance, scorer.count) == (1, 4, 100)  # stored: they stay what they are


def test_scores_are_clipped_and_the_share_counted():
    given, scorer = judge([1.0, 11.0, 11.1, -99.0], statistics(), clip=5.0)
    assert given.tolist() == [0.0, 5.0, 5.0, -5.0] and scorer.clipped_share == 0.5  # 5 itself is not clipped
    given, scorer = judge([1.0, 11.0, 11.1, -99.0], statistics(), clip=2.0)
    assert given.tolist() == [0.0, 2.0, 2.0, -2.0] and scorer.clipped_share == 0.75


def test_raw_scores_pass_without_normalisation_or_clip():
    for stored in (statistics(), None):
        given, scorer = judge([1.0, 500.0, -500.0], stored, norm="none", clip=5.0)
        assert given.tolist() == [1.0, 500.0, -500.0] and scorer.clipped_share == 0


def test_running_statistics_are_those_of_all_scores_seen():
    """Those behind the stored statistics too, to the last digit of a second reader's count."""
    rng = np.random.default_rng(0)
    seen = rng.normal(2, 3, 40)
    stored = ScoreStatistics.of(torch.tensor(seen))
    scorer = RewardModelScorer(None, stored, "running", clip=50.0)
    for size in (5, 1, 16):
        new = rng.normal(-1, 0.5, size).astype(np.float32)
        scorer.model = Fake(new.tolist())
        given = scorer(samples(new.tolist()))
        seen = np.concatenate([seen, new])
        assert (scorer.mean, scorer.count) == (pytest.approx(seen.mean(), rel=1e-9), len(seen))
        assert scorer.variance == pytest.approx(seen.var(ddof=1), rel=1e-9)
        assert given.numpy() == pytest.approx((new - seen.mean()) / seen.std(ddof=1), rel=1e-4, abs=1e-5)
    assert stored == ScoreStatistics.of(torch.tensor(seen[:40]))  # what is stored is left alone


def test_running_statistics_pass_over_what_is_not_finite():
    given, scorer = judge([float("nan"), 1.0, float("inf")], statistics(), norm="running")
    assert scorer.count == 101 and math.isfinite(scorer.mean) and math.isfinite(scorer.variance)
    assert math.isnan(given[0]) and given[2] == 5  # a NaN stays one, for the run to stop at
    given, scorer = judge([float("nan")], statistics(), norm="running")
    assert scorer.count == 100


@pytest.mark.parametrize("norm, q90, q905", [("stored", 4.0, 4.025), ("none", 9.0, 9.05), ("running", 4.0, 4.025)])
def test_thresholds(norm, q90, q905):
    """A number is taken as it is; a quantile is read from the stored raw grid (0, 0.1, ..., 10) and normalised."""
    scorer = RewardModelScorer(Fake([]), statistics(mean=1.0, std=2.0), norm, clip=0.5)
    assert scorer.threshold("1.5") == scorer.threshold(1.5) == 1.5
    assert scorer.threshold("q0.9") == pytest.approx(q90)  # not clipped
    assert scorer.threshold("q0.905") == pytest.approx(q905)
    ends = [scorer.threshold(q) * (1 if norm == "none" else 2) + (0 if norm == "none" else 1) for q in ("q0", "q1")]
    assert ends == [0, 10]


def test_judges_with_a_stored_scale_learn_nothing():
    """Dev is scored on the stored scale, (9 - 1) / 2 and (-3 - 1) / 2, whatever the running one has seen, and leaves it
    alone."""
    scorer = RewardModelScorer(Fake([9.0, -3.0]), statistics(mean=1.0, std=2.0, count=2), "running")
    judges = Judges("label", {"label": scorer})
    judges(samples([9.0, -3.0]))
    learnt = scorer.state_dict()
    steady = judges.with_stored_scale()
    for _ in range(2):
        assert steady(samples([9.0, -3.0])).label_scores.tolist() == [4.0, -2.0]
    assert scorer.state_dict() == learnt != steady.scorers["label"].state_dict()
    own = Judges("label", {"label": gold_reward})
    assert own.with_stored_scale().by_part == own.by_part


def test_a_quantile_threshold_follows_the_running_statistics():
    scorer = RewardModelScorer(Fake([9.0, -3.0]), statistics(mean=1.0, std=2.0, count=2), "running")
    scorer(samples([9.0, -3.0]))  # as if seen: two with mean 1 and variance 4, then 9 and -3
    mean, variance = 2.0, (4 + ((9 - 2) ** 2 + (-3 - 2) ** 2 + 2 * (1 - 2) ** 2)) / 3
    assert scorer.threshold("q0.5") == pytest.approx((5 - mean) / math.sqrt(variance))


def test_a_quantile_threshold_needs_statistics():
    scorer = RewardModelScorer(Fake([]), None, "none")
    assert scorer.threshold("1.5") == 1.5
    with pytest.raises(InputError, match="^--threshold q0.9 needs score_statistics.json"):
        scorer.threshold("q0.9")


# ---- rules and own functions


def test_gold_reward():
    batch = samples([0.0] * 4, ["a", "b", None, "b"], ["a", "a", "a", "b"])
    assert gold_reward(batch).tolist() == [1, 0, 0, 1] and gold_reward(batch).dtype == torch.float32
    batch.gold_labels[2] = None
    with pytest.raises(InputError, match="needs the label of every prompt; row row 2 has none"):
        gold_reward(batch)


@pytest.fixture
def own(monkeypatch):
    """A user's module with reward functions."""
    module = types.ModuleType("own_rewards")
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    return module


def test_an_own_function(own):
    own.length = lambda batch: [len(answer) + 0.5 for answer in batch.answers]
    own.tensor = lambda batch: torch.ones(len(batch.answers), dtype=torch.float64, requires_grad=True) * 2
    scores = load_function("own_rewards:length")(samples([0.0] * 3))
    assert scores.tolist() == [8.5] * 3 and scores.dtype == torch.float32
    scores = load_function("own_rewards:tensor")(samples([0.0] * 3))
    assert scores.tolist() == [2.0] * 3 and scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize("value, shape", [([1.0, 2.0], (2,)), (3.0, ()), ([[1.0], [2.0], [3.0]], (3, 1))])
def test_an_own_function_of_the_wrong_shape(own, value, shape):
    own.reward = lambda batch: value
    with pytest.raises(InputError) as caught:
        load_function("own_rewards:reward")(samples([0.0] * 3))
    assert str(caught.value) == f"--reward own_rewards:reward: must return 3 numbers, returned shape {shape}"


@pytest.mark.parametrize("value", [None, ["a", "b", "c"], [None, 1.0, 2.0]])
def test_an_own_function_that_returns_no_numbers(own, value):
    own.reward = lambda batch: value
    with pytest.raises(InputError, match="^--reward own_rewards:reward: must return 3 numbers"):
        load_function("own_rewards:reward")(samples([0.0] * 3))


def test_an_own_function_that_is_none(own):
    own.weight = 0.5
    with pytest.raises(InputError, match="^--reward own_rewards:weight: is a float, not a function"):
        load_function("own_rewards:weight")


@pytest.mark.parametrize("spec", ["own_rewards:none", "no_such_module_here:reward", "own_rewards:", ":reward"])
def test_an_own_function_that_is_not_there(own, spec):
    with pytest.raises(InputError, match=f"^--reward {spec}: cannot be imported .*give module:function"):
        load_function(spec)


@pytest.mark.parametrize("spec", ["my/rewards.py:short", "./my/rewards.py:short", "my/rewards:short"])
def test_a_file_is_no_module(spec):
    with pytest.raises(InputError, match=r"here my\.rewards:short, with dots and without \.py$"):
        load_function(spec)


# ---- loading


def test_the_same_tokenizer():
    check_same_tokenizer(toy_tokenizer(), toy_tokenizer(), "--label_rm x")
    with pytest.raises(InputError, match=r"^--label_rm x: its tokenizer differs from the policy's \(1 tokens have"):
        theirs = toy_tokenizer()
        theirs.add_tokens(["new"])
        check_same_tokenizer(theirs, toy_tokenizer(), "--label_rm x")
    with pytest.raises(InputError, match=r"\(1 tokens have"):
        ours = toy_tokenizer()
        ours.add_tokens(["new"])
        check_same_tokenizer(toy_tokenizer(), ours, "x")
    with pytest.raises(InputError, match=r"\(257 tokens have"):  # a pad token that shifts all bytes
        check_same_tokenizer(toy_tokenizer("<pad>"), toy_tokenizer(), "x")
    one, other = (types.SimpleNamespace(get_vocab=lambda ids=ids: dict(zip("abc", ids))) for ids in ("012", "021"))
    with pytest.raises(InputError, match=r"\(2 tokens have other ids\)"):  # the same tokens in another order
        check_same_tokenizer(other, one, "x")


def test_load_judges(tmp_path, tokenizer):
    def load(norm="stored", ours=tokenizer):
        config = SimpleNamespace(
            reward="label", label_rm=str(tmp_path), score_norm=norm, score_clip=5.0, eval_batch_size=2, policy="sft",
            threshold=None, missing_eos_penalty=1.0, missing_label_penalty=1.0,
        )  # fmt: skip
        return load_judges(config, ours, "cpu").by_part["label"]

    model = RewardModel.from_policy(tiny_model("llama"))
    model.save_pretrained(tmp_path, tokenizer)
    for norm in ("stored", "running"):
        with pytest.raises(InputError, match="not there; train_rm.py writes it"):
            load(norm)
    with pytest.raises(InputError, match="--score_norm none still needs score_statistics.json"):
        load("none")
    save_statistics(statistics(mean=0.5, std=3.0), tmp_path)
    assert load("none").statistics == statistics(mean=0.5, std=3.0)
    scorer = load()
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters()) and not scorer.model.training
    batch = samples([0.0] * 5)
    with torch.no_grad():
        raw = model(*batch.packed)
    assert torch.allclose(scorer(batch), ((raw - 0.5) / 3).clamp(-5, 5), atol=1e-5)
    other = toy_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(InputError, match=f"^--label_rm {tmp_path}: its tokenizer differs"):
        load(ours=other)


def test_what_incomplete_answers_cost_is_in_the_units_of_the_reward():
    """Standardised: at most 0, penalties as they are. Raw: at most the mean, penalties times the spread; mixed: of the
    sum."""
    one, two = statistics(mean=2.0, std=3.0), statistics(mean=-1.0, std=4.0)

    def judged(mode, norm, threshold=None):
        parts = {"label": one, "rationale": two} if mode == "mixed" else {mode: one}
        scorers = {part: RewardModelScorer(Fake([5.0, 6.0]), stats, norm) for part, stats in parts.items()}
        return Judges(mode, scorers, threshold, (1.0, 0.5))(samples([5.0, 6.0]))

    assert judged("label", "stored")[3:] == (None, 0.0, (1.0, 0.5))
    assert judged("rationale", "none")[3:] == (None, 2.0, (3.0, 1.5))
    assert judged("mixed", "none", "1.5")[3:] == (1.5, 0.5, (5.0, 2.5))  # min(2, 1.5) - 1, and (3^2 + 4^2) ** 0.5
    assert judged("mixed", "none", "9")[4] == 1.0  # the mean itself is below the threshold
    gold = Judges("label", {"label": gold_reward}, penalties=(1.0, 0.5))
    assert gold(samples([1.0], ["a"], ["a"]))[3:] == (None, None, (1.0, 0.5))


def test_judges_give_the_reward_its_arguments():
    scorers = {
        "label": RewardModelScorer(Fake([1.0, 2.0]), statistics(), "none"),
        "rationale": RewardModelScorer(Fake([3.0, math.nan]), statistics(), "none"),
    }
    judged = Judges("mixed", scorers, "0.5")(samples([0.0, 0.0]))
    assert judged.mode == "mixed" and judged.label_scores.tolist() == [1, 2] and judged.rationale_scores[0] == 3
    with pytest.raises(RunError, match=r"^the rationale score is nan \(prompt b\)"):
        judged.require_finite(["a", "b"])
    alone = Judges("rationale", {"rationale": scorers["rationale"]})(samples([0.0, 0.0]))
    assert alone.label_scores is None and list(alone.scores) == ["rationale"]
