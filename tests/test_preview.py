"""PPO's preview: best-of-n against all subsets one by one, intervals against the slow bootstrap, every verdict."""

import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rllr import metrics
from rllr.preview import best_of_n, kl_bound, mixed_share, pair_accuracy, preview, sentence, table

NAN, INF = float("nan"), float("inf")


def drawn(prompts, samples, levels, seed=0, share=0.5):
    """Scores of so many levels (few: many ties), and who is right, independent of them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (prompts, samples)) / 4 - 1, rng.random((prompts, samples)) < share


# ---- best of n -------------------------------------------------------------------------------------------------------


def slow_best_of_n(scores, right, n):
    """One prompt: over every subset of n, the share of its best-scored samples that are right."""
    chosen = []
    for subset in combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        ties = [i for i in subset if scores[i] == best]
        chosen.append(Fraction(sum(bool(right[i]) for i in ties), len(ties)))
    return float(sum(chosen) / len(chosen))


@pytest.mark.parametrize("levels", [1, 2, 3, 1000])
@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_best_of_n_is_the_mean_over_all_subsets(samples, levels):
    scores, right = drawn(12, samples, levels, seed=samples)
    for n in range(1, samples + 1):
        slow = [slow_best_of_n(s, r, n) for s, r in zip(scores.tolist(), right.tolist())]
        assert best_of_n(scores, right, n) == pytest.approx(slow, abs=1e-12)


def test_best_of_two_by_hand():
    """Samples a 3 right, b 2 wrong, c 2 right, d 1 wrong. ab ac ad: a; bc: half; bd: b; cd: c. (3 + 1/2 + 1) / 6."""
    scores, right = [[3, 2, 2, 1], [1, 2, 2, 3]], [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert best_of_n(scores, right, 2) == pytest.approx([4.5 / 6, 1.5 / 6])  # second row: the other way round


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_where_the_scores_do_not_matter(n):
    scores, right = drawn(20, 6, 5)
    assert best_of_n(scores, np.ones_like(right), n) == pytest.approx(np.ones(20), abs=1e-12)
    assert (best_of_n(scores, np.zeros_like(right), n) == 0).all()
    assert best_of_n(np.full(scores.shape, 0.3), right, n) == pytest.approx(right.mean(1), abs=1e-12)


def test_best_of_one_is_a_sample_and_best_of_all_the_highest():
    scores, right = drawn(30, 7, 10**6)
    assert best_of_n(scores, right, 1) == pytest.approx(right.mean(1))
    assert best_of_n(scores, right, 7) == pytest.approx(right[np.arange(30), scores.argmax(1)].astype(float))


def test_best_of_n_asks_for_the_order_alone():
    """Neither for the scores' scale, which may be infinite, nor for the order in which the samples come."""
    scores, right = drawn(10, 6, 4)
    expected = best_of_n(scores, right, 3)
    assert best_of_n(np.exp(5 * scores) - 9, right, 3) == pytest.approx(expected)
    assert best_of_n(np.where(scores == scores.min(), -INF, scores), right, 3) == pytest.approx(expected)
    turned = np.random.default_rng(1).permutation(6)
    assert best_of_n(scores[:, turned], right[:, turned], 3) == pytest.approx(expected)


def exact_best_of_n(scores, right, n):
    """One prompt without ties, in integers: the sample of rank i (from 0) is best in C(i, n - 1) of C(S, n) subsets."""
    order = np.argsort(scores)
    return float(sum(Fraction(math.comb(i, n - 1)) for i, k in enumerate(order) if right[k]) / math.comb(len(order), n))


@pytest.mark.parametrize("n", [1, 2, 37, 128, 200, 255, 256])
def test_best_of_n_is_exact_for_many_samples(n):
    scores, right = np.random.default_rng(2).normal(size=(4, 256)), drawn(4, 256, 2)[1]
    exact = [exact_best_of_n(s, r, n) for s, r in zip(scores, right)]
    assert best_of_n(scores, right, n) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_best_of_n_refuses_an_n_that_it_cannot_draw(n):
    with pytest.raises(ValueError, match="n must be 1 to 4"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 4), bool), n)


@pytest.mark.parametrize("scores, right, says", [
    ([[0.0, NAN], [NAN, 1.0]], [[0, 1], [1, 0]], "2 of 4 scores are NaN"),
    ([0.0, 1.0], [0, 1], r"\[prompts, samples\]"), (np.zeros((0, 3)), np.zeros((0, 3)), r"\[0, 3\]"),
    (np.zeros((3, 0)), np.zeros((3, 0)), r"\[3, 0\]"), ([[0.0, 1.0]], [[0, 1, 1]], "must have the shape of scores"),
    ([[0.0, 1.0]], [[0.5, 1]], "booleans"), ([[0.0, 1.0]], [[NAN, 1]], "booleans"),
])  # fmt: skip
def test_what_is_no_score_or_no_answer_is_refused(scores, right, says):
    for function in (lambda s, r: best_of_n(s, r, 1), pair_accuracy, lambda s, r: preview(s, r, [1] * len(s))):
        with pytest.raises(ValueError, match=says):
            function(scores, right)


def test_the_bound_of_the_kl():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(0.6931471805599453 - 0.5)
    assert kl_bound(8) == pytest.approx(3 * math.log(2) - 0.875)
    # the best of n continuous scores has the density n u^(n - 1) beside the uniform one: its KL by the midpoint rule
    u = (np.arange(10**6) + 0.5) / 10**6
    assert kl_bound(5) == pytest.approx(float((5 * u**4 * np.log(5 * u**4)).mean()), abs=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        kl_bound(0)


# ---- pairs and labels ------------------------------------------------------------------------------------------------


def slow_pair_accuracy(scores, right):
    shares = []
    for row, kinds in zip(scores, right):
        pairs = [(a, b) for a, good in zip(row, kinds) if good for b, bad in zip(row, kinds) if not bad]
        if pairs:
            shares.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    return sum(shares) / len(shares)


def test_pair_accuracy_by_hand():
    """Right 2 and 1, wrong 1 and 0: 2 > 1, 2 > 0, 1 = 1, 1 > 0: 3.5 of 4. The last two rows have one kind alone."""
    scores, right = [[2, 1, 1, 0], [5, 6, 7, 8], [1, 2, 3, 4]], [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert pair_accuracy(scores, right) == 3.5 / 4
    assert pair_accuracy(scores[1:], right[1:]) is None


def test_each_prompt_weighs_the_same_whatever_its_pairs():
    """First row: 4 pairs, all won; second: 3 pairs, all lost; third: a tie."""
    scores, right = [[3, 4, 1, 2], [1, 2, 3, 4], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert pair_accuracy(scores, right) == pytest.approx((1 + 0 + 0.5) / 3)


@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
def test_pair_accuracy_is_what_counting_the_pairs_gives(levels):
    scores, right = drawn(25, 9, levels, seed=levels, share=0.3)
    slow = slow_pair_accuracy(scores.tolist(), right.tolist())
    assert pair_accuracy(scores, right) == pytest.approx(slow)
    assert pair_accuracy(-scores, right) == pytest.approx(1 - slow)


def test_infinite_scores_can_be_paired():
    assert pair_accuracy([[INF, -INF, INF, 0]], [[1, 0, 0, 1]]) == 2.5 / 4


def test_the_share_of_mixed_prompts():
    assert mixed_share([["a", "b", "a"], ["a", "a"], [None, "b"], [None, None]]) == 0.5
    assert mixed_share([["a"]]) == 0
    with pytest.raises(ValueError, match="no prompts"):
        mixed_share([])


# ---- the preview -----------------------------------------------------------------------------------------------------


def test_the_preview_adds_it_up():
    scores, right = drawn(40, 8, 5, seed=3)
    greedy = np.random.default_rng(4).random(40) < 0.6
    found = preview(scores, right, greedy, ns=(16, 4, 1, 8, 4))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["prompts", "samples", "greedy", "pair_accuracy", "mixed", "curve", "verdict"]
    assert (found["prompts"], found["samples"], found["greedy"]) == (40, 8, greedy.mean())
    assert found["pair_accuracy"] == pair_accuracy(scores, right)
    assert found["mixed"] == mixed_share(right.tolist()) == np.mean([0 < sum(row) < 8 for row in right])
    assert [point["n"] for point in found["curve"]] == [1, 4, 8]  # 16 is left out
    for point in found["curve"]:
        assert list(point) == ["n", "accuracy", "kl", "difference", "low", "high"]
        assert point["accuracy"] == pytest.approx(best_of_n(scores, right, point["n"]).mean())
        assert point["kl"] == kl_bound(point["n"])
        assert point["difference"] == pytest.approx(point["accuracy"] - greedy.mean())
        assert point["low"] < point["difference"] < point["high"]


def test_lists_will_do():
    scores, right = drawn(5, 4, 5)
    assert preview(scores.tolist(), right.tolist(), [1, 0, 1, 1, 0]) == preview(
        scores, right, np.array([1, 0, 1, 1, 0])
    )


def test_the_interval_is_the_paired_bootstrap_with_the_same_rows_for_every_n():
    scores, right = drawn(30, 8, 1000, seed=5)
    greedy = np.random.default_rng(6).random(30) < 0.5
    found = preview(scores, right, greedy, seed=11)
    for point in found["curve"]:
        difference = best_of_n(scores, right, point["n"]) - greedy
        slow = metrics.bootstrap_interval(
            metrics._Statistic(lambda rows, d=difference: d[rows].mean(), len(difference)), seed=11
        )
        assert (point["low"], point["high"]) == pytest.approx(slow)
    assert preview(scores, right, greedy, seed=11) == found != preview(scores, right, greedy, seed=12)
    alone = preview(scores, right, greedy, ns=(4,), seed=11)["curve"][0]
    assert alone == pytest.approx(found["curve"][2])


def test_no_difference_is_no_verdict():
    """Where the best is what greedy is, row by row, and where the rows differ but not their sum."""
    scores, right = drawn(50, 8, 10**6, seed=7)
    best = right[np.arange(50), scores.argmax(1)]
    point = preview(scores, right, best, ns=(8,))["curve"][0]
    assert (point["difference"], point["low"], point["high"]) == pytest.approx((0, 0, 0), abs=1e-12)
    assert preview(scores, right, best, ns=(8,))["verdict"] == "unclear"
    for share in (0, 1):  # rounding must not become a gain or a loss
        for samples in (5, 8, 13, 100):
            right = np.full((50, samples), bool(share))
            found = preview(np.random.default_rng(8).normal(size=right.shape), right, right[:, 0])
            assert found["verdict"] == "unclear" and found["pair_accuracy"] is None and found["mixed"] == 0
    swapped = preview([[0, 1]] * 40, [[0, 1], [1, 0]] * 20, [0, 1] * 20)["curve"][1]
    assert swapped["low"] < 0 < swapped["high"] and swapped["difference"] == 0


# ---- verdicts --------------------------------------------------------------------------------------------------------


def prompts(rows, samples=16):
    """(scores, right): of each row, the ranks of its right samples, 0 for the best-scored one."""
    scores = np.tile(-np.arange(samples), (len(rows), 1))
    right = np.zeros(scores.shape, bool)
    for row, ranks in zip(right, rows):
        row[list(ranks)] = True
    return scores, right


BEST, HALF, NEVER = range(8), range(0, 16, 2), ()  # right where the score is high; in every other rank; nowhere
WORST = range(1, 16)  # all but the best-scored one: over-optimisation in its purest form


def verdict(rows, greedy, **options):
    return preview(*prompts(rows), greedy, **options)["verdict"]


def test_gain():
    assert verdict([BEST] * 40, [1, 0] * 20) == "gain"
    assert verdict([BEST] * 40, [1] * 39 + [0], ns=(1, 16)) == "unclear"  # one row in forty is within chance
    assert verdict([BEST] * 40, [1] * 34 + [0] * 6, ns=(1, 16)) == "gain"
    assert verdict([BEST] * 40, [1] * 40, ns=(1, 16)) == "unclear"


def test_loss_where_an_interval_lies_below_greedy():
    assert verdict([NEVER] * 40, [1, 0] * 20) == "loss"
    found = preview(*prompts([NEVER] * 8 + [BEST] * 32), [1] * 8 + [0] * 4 + [1] * 28, ns=(16,))
    assert found["curve"][0]["difference"] == pytest.approx(-0.1) and found["curve"][0]["high"] > 0  # 4 won, 8 lost
    assert preview(*prompts([NEVER] * 8 + [BEST] * 32), [1] * 40, ns=(16,))["curve"][0]["high"] < 0  # 8 lost
    rows = [NEVER] * 20 + [BEST] * 20  # half of the rows lost and half of them won: nothing is sure
    assert verdict(rows, [1] * 20 + [0] * 20, ns=(16,)) == "unclear"


def test_a_low_start_of_the_curve_is_no_loss():
    """Best-of-2 is below greedy beyond chance, as one sample is; best-of-8 equals it, best-of-16 is above it."""
    found = preview(*prompts([(0,)] * 40), [1] * 20 + [0] * 20)
    curve = {point["n"]: point for point in found["curve"]}
    assert curve[2]["high"] < 0 and curve[16]["low"] > 0
    assert curve[2]["accuracy"] == pytest.approx(2 / 16) and curve[16]["accuracy"] == pytest.approx(1)
    assert found["verdict"] == "unclear" and curve[8]["accuracy"] == pytest.approx(0.5)
    assert preview(*prompts([(0,)] * 40), [1] * 20 + [0] * 20, ns=(1, 16))["verdict"] == "gain"  # n = 1 is no choice
    assert preview(*prompts([(0,)] * 40), [1] * 30 + [0] * 10, ns=(2, 8))["verdict"] == "loss"


def test_loss_where_the_largest_n_is_one_standard_error_below():
    """Best-of-16 is right in a rows that greedy misses, wrong in b that it has: (a - b) / 40 beside its error."""

    def found(a, b):
        rows = [(0,)] * a + [range(1, 16)] * b + [NEVER] * (40 - a - b)
        return preview(*prompts(rows), [0] * a + [1] * b + [0] * (40 - a - b), ns=(16,))

    for a, b, expected in [(4, 7, "unclear"), (4, 8, "loss"), (2, 4, "unclear"), (2, 5, "loss")]:
        differences = np.array([1.0] * a + [-1.0] * b + [0.0] * (40 - a - b))
        error = math.sqrt(((differences - differences.mean()) ** 2).sum() / 39 / 40)
        assert (differences.mean() < -error) == (expected == "loss")
        result = found(a, b)
        assert result["curve"][0]["difference"] == pytest.approx((a - b) / 40)
        assert result["curve"][0]["high"] > 0 and result["verdict"] == expected
    # a single row lost is exactly one standard error of 40 rows (n - 1 in the variance), so not more than one
    assert verdict([NEVER] + [BEST] * 39, [1] * 40, ns=(16,)) == "unclear"


def test_a_gain_that_the_largest_n_loses_again_is_loss():
    """Right but for the best-scored sample: best-of-8 is right in half of the rows, best-of-16 in none."""
    found = preview(*prompts([WORST] * 40), [1] * 4 + [0] * 36)
    curve = {point["n"]: point for point in found["curve"]}
    assert curve[8]["accuracy"] == pytest.approx(0.5) and curve[16]["accuracy"] == pytest.approx(0)
    assert curve[8]["low"] > 0 and curve[16]["high"] < 0 and found["verdict"] == "loss"


def test_gain_is_read_at_eight():
    """Not at 16, where the KL is 1.8 nats and not 1.2; with fewer samples at what there is."""
    rows = [(0,)] * 40
    greedy = [1] * 18 + [0] * 22  # best-of-8 is right in half, best-of-16 always
    found = preview(*prompts(rows), greedy, ns=(8, 16))
    assert found["curve"][0]["low"] < 0 < found["curve"][0]["high"] and found["curve"][1]["low"] > 0
    assert found["verdict"] == "unclear"
    assert verdict(rows, greedy, ns=(16,)) == "gain"
    assert preview(*prompts([(0, 1)] * 40, samples=4), [1, 0] * 20)["verdict"] == "gain"  # best-of-4
    rows = [(0, 1, 2)] * 40  # best-of-2 is right in 62.5 %
    assert preview(*prompts(rows, samples=9), greedy, ns=(2, 9))["verdict"] != "gain"  # at 2
    assert verdict(rows, greedy, ns=(2, 16)) != "gain"


def test_too_little_for_a_verdict():
    assert preview([[1, 0]], [[1, 0]], [0])["verdict"] == "unclear"  # one prompt
    assert preview([[0]] * 40, [[1]] * 40, [0] * 40)["verdict"] == "unclear"  # one sample: nothing to choose from
    assert preview([[0]] * 40, [[0]] * 40, [1] * 40)["verdict"] == "unclear"


@pytest.mark.parametrize("options, greedy, says", [
    ({}, [1, 0], "one entry per prompt, 3"), ({}, [[1], [0], [1]], "one entry per prompt"), ({}, [1, 2, 0], "booleans"),
    ({"ns": (16, 32)}, [1, 0, 1], "no n for 4 samples"), ({"ns": (0, 1)}, [1, 0, 1], "best of 0"),
])  # fmt: skip
def test_a_preview_of_nothing_is_refused(options, greedy, says):
    with pytest.raises(ValueError, match=says):
        preview(*drawn(3, 4, 5), greedy, **options)


# ---- for people ------------------------------------------------------------------------------------------------------


def test_the_sentence_of_a_gain():
    text = sentence(preview(*prompts([BEST] * 40), [1, 0] * 20))
    assert text.startswith(
        "Best-of-8 is right in 100.0 % and the greedy answer in 50.0 % of 40 prompts (+50.0 points, "
    )
    assert text.endswith(
        "so PPO has something to gain from this reward model; rllr.predict --best_of 8 --label_rm DIR has that without "
        "PPO."
    )


def test_the_sentence_of_a_loss():
    text = sentence(preview(*prompts([NEVER] * 40), [1, 0] * 20))
    assert "0.0 % and the greedy answer in 50.0 %" in text and "(-50.0 points" in text
    assert "learn this reward model's mistakes" in text
    assert text.endswith("more labelled rows, on-policy pairs (from the policy's own samples) or another reward model.")
    turned = sentence(preview(*prompts([WORST] * 40), [1] * 4 + [0] * 36))
    assert turned.startswith("Best-of-16 is right in 0.0 %")  # the worst point
    assert "; best-of-8 beats greedy (+40.0 points, " in turned and turned.endswith(
        "so choosing among a few answers helps where training on does not (rllr.predict --best_of 8 --label_rm DIR)."
    )
    rows = [(*range(1, 16),)] * 40  # best-of-16: 0 %, best-of-8: 50 %
    within = sentence(preview(*prompts(rows), [1] * 19 + [0] * 21))
    assert "; best-of-8 beats greedy only within chance (+2.5 points, " in within and "instead of PPO" not in within


def test_the_sentence_of_what_is_unclear():
    text = sentence(preview(*prompts([BEST] * 40), [1] * 39 + [0], ns=(8,)))
    assert "unclear whether PPO can gain" in text and "more labelled rows" in text
    assert text.endswith("; best-of-8 beats greedy only within chance (more prompts would tell).")
    assert sentence(preview(*prompts([BEST] * 40), [1] * 40, ns=(16,))).endswith("another reward model.")
    for little in (preview([[1, 0]], [[1, 0]], [0]), preview([[0]] * 40, [[1]] * 40, [0] * 40)):
        assert sentence(little).endswith("sample at least 2 answers to at least 2 prompts.")


def test_every_sentence_is_one():
    for rows, greedy in [([BEST] * 40, [1, 0] * 20), ([NEVER] * 40, [1, 0] * 20), ([HALF] * 40, [1, 0] * 20)]:
        text = sentence(preview(*prompts(rows), greedy))
        assert not re.search("[.] [A-Z]", text) and text[0].isupper() and text.endswith(".") and "\n" not in text


def test_the_table():
    text = table(preview(*prompts([BEST] * 40), [1, 0] * 20))
    lines = text.split("\n")
    assert len(lines) == 7 and lines[1].split() == ["greedy", "50.0", "%"]
    assert lines[2].startswith("   best of 1    50.0 %       0.00  +0.0 points, ")
    assert lines[5].startswith("   best of 8   100.0 %       1.20  +50.0 points, +3")
    assert len({line.index(" %") for line in lines[1:]}) == 1 and max(map(len, lines)) < 80


def test_it_stands_on_numpy_alone():
    """It can be imported, and its numbers computed, where there is no torch."""
    code = "import sys, rllr.preview; print(*[n for n in sys.modules if n == 'torch' or n.startswith('rllr.')])"
    root = Path(__file__).resolve().parent.parent
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["rllr.preview"]
