"""Best-of-n answers: the choice by hand and against a slow loop, what is sampled, which flags go together."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model, toy_tokenizer

import rllr.best_of
from rllr.answers import Answer
from rllr.best_of import best_answers, best_places, load_chooser
from rllr.common.errors import InputError
from rllr.data.encoding import Encoder
from rllr.tasks import TASKS, Example

WHOLE, CUT, UNREADABLE, OTHER = (
    Answer("a", "x", False), Answer("a", "x", True), Answer("a", None, False), Answer("a", "y", False)
)  # fmt: skip


# ---- the choice


@pytest.mark.parametrize("answers, scores, places", [
    ([WHOLE] * 6, [1, 3, 2, 9, 7, 8], [1, 3]),
    ([WHOLE] * 6, [2, 2, 1, 0, 5, 5], [0, 4]),  # of equals the first
    ([WHOLE] * 3, [-3, -2, -4], [1]),
    ([CUT, WHOLE, UNREADABLE], [9, -5, 9], [1]),  # no score makes up for a missing end or label
    ([CUT, UNREADABLE, CUT], [1, 3, 3], [1]),  # none is whole
    ([WHOLE, CUT], [1, 2], [0]),
])  # fmt: skip
def test_the_best_scored_whole_answer(answers, scores, places):
    assert best_places(answers, scores, lambda place: 0.0, n=min(3, len(answers))) == places


@pytest.mark.parametrize("answers, scores, shares, place", [
    ([WHOLE, WHOLE, WHOLE], [1, 3, 2], [0.5, 0.0, 1.0], 2),  # all say x: the one that stands in the text
    ([WHOLE, OTHER, WHOLE], [1, 3, 2], [1.0, 0.0, 1.0], 1),  # the score says y, and no rationale changes that
    ([OTHER, WHOLE, OTHER], [1, 2, 3], [1.0, 1.0, 0.0], 0),
    ([WHOLE, WHOLE, WHOLE], [1, 3, 2], [1.0, 0.5, 1.0], 2),  # equally well: the higher score
    ([WHOLE, CUT, WHOLE], [3, 2, 1], [0.0, 1.0, 0.0], 0),  # what was cut is no choice
    ([CUT, UNREADABLE, CUT], [1, 3, 2], [1.0, 0.0, 1.0], 1),
])  # fmt: skip
def test_of_the_answers_with_the_best_ones_label_the_best_grounded(answers, scores, shares, place):
    assert best_places(answers, scores, shares.__getitem__, n=3) == [place]


def test_the_choice_against_a_slow_loop():
    draw = random.Random(0)
    for _ in range(400):
        n = draw.randint(1, 5)
        answers = draw.choices([WHOLE, CUT, UNREADABLE, OTHER], k=4 * n)
        scores, shares = ([draw.randint(-2, 2) for _ in answers] for _ in "ab")
        expected = []
        for row in range(4):
            places = list(range(row * n, row * n + n))
            finished = [place for place in places if answers[place] in (WHOLE, OTHER)]
            highest = max(scores[place] for place in finished or places)
            best = next(place for place in finished or places if scores[place] == highest)
            if finished:
                same = [place for place in finished if answers[place].label == answers[best].label]
                most = max(shares[place] for place in same)
                same = [place for place in same if shares[place] == most]
                highest = max(scores[place] for place in same)
                best = next(place for place in same if scores[place] == highest)
            expected.append(best)
        assert best_places(answers, scores, shares.__getitem__, n) == expected


# ---- sampling


class Judge:
    """A reward model that scores an answer by its ids: the sum of them, weighted by their places."""

    def __init__(self):
        self.seen = []

    def __call__(self, sequences, prompt_lens, response_mask):
        scores = []
        for row, start, length in zip(sequences.tolist(), prompt_lens.tolist(), response_mask.sum(1).tolist()):
            self.seen.append((tuple(row[:start]), tuple(row[start : start + length])))
            scores.append(self.score(row[start : start + length]))
        return torch.tensor(scores)

    @staticmethod
    def score(ids):
        return sum(i * (place + 1) for place, i in enumerate(ids)) % 101 - 50.0


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=262, max_position_embeddings=256, scale=1.0)
    return model, Encoder(toy_tokenizer(), model)


def settings(**more):
    limits = {"temperature": 1.0, "max_new_tokens": 6, "batch_size": 64}
    return SimpleNamespace(**{"best_of": 4, "label_rm": "rm", "base": None, "seed": 3} | limits | more)


EXAMPLES = [Example(str(i), "so " + "good " * i) for i in range(5)]


def test_each_rows_best_of_its_own_samples(policy):
    """What the judge saw is four answers a row, and the chosen one is the highest-scored of them."""
    judge, task = Judge(), TASKS["sst2"]
    chosen = best_answers(judge, *policy, task, EXAMPLES, settings())
    prompts = [tuple(ids) for ids in policy[1].prompts(task, EXAMPLES)]
    assert len(judge.seen) == 20 and {prompt for prompt, _ in judge.seen} == set(prompts)
    for prompt, answer in zip(prompts, chosen, strict=True):
        own = [ids for seen, ids in judge.seen if seen == prompt]
        assert len(own) == 4
        best = max(map(judge.score, own))  # all are cut, so that the score alone decides
        assert answer.text in {policy[1].decode(list(ids)) for ids in own if judge.score(ids) == best}


def test_rationales_are_looked_up_in_the_text_of_their_own_row(policy, monkeypatch):
    """Three answers a row, all with one label; the judge likes the one that invents."""
    texts = ["a dull film", "a warm song"]
    said = [["warm", "warm", "dull"], ["warm", "dull", "dull"]]  # quoted by the sampled answers, in their order
    answers = [
        Answer(f"The word {word} suggests positive.\nLabel: positive", "positive", False)
        for row in said
        for word in row
    ]
    monkeypatch.setattr(rllr.best_of, "read_answers", lambda *_: answers)
    examples = [Example(str(row), text) for row, text in enumerate(texts)]
    chosen = best_answers(Judge(), *policy, TASKS["sst2"], examples, settings(best_of=3))
    assert [answer is answers[place] for answer, place in zip(chosen, (2, 3))] == [True, True]


def test_seed_and_place_decide_what_is_drawn(policy):
    def answers(**more):
        return best_answers(Judge(), *policy, TASKS["sst2"], EXAMPLES, settings(**more))

    assert answers() == answers() == answers(batch_size=3)
    assert answers() != answers(seed=4) and answers() != answers(temperature=5.0)
    assert len(answers(best_of=1)) == 5


def test_scores_that_are_no_numbers(policy):
    class Broken(Judge):
        score = staticmethod(lambda ids: math.nan)

    with pytest.raises(InputError, match="--label_rm rm: some of its scores are not finite"):
        best_answers(Broken(), *policy, TASKS["sst2"], EXAMPLES, settings())


# ---- what is refused


def test_one_flag_alone():
    flags = {"label_rm": None, "best_of": None}
    assert load_chooser(settings(**flags), TASKS["sst2"], [], "cpu") is None
    with pytest.raises(InputError, match="--best_of 8: give the reward model that chooses as --label_rm DIR"):
        load_chooser(settings(**flags | {"best_of": 8}), TASKS["sst2"], [], "cpu")
    with pytest.raises(InputError, match="--label_rm rm: chooses among sampled answers; say how many with --best_of 8"):
        load_chooser(settings(**flags | {"label_rm": "rm"}), TASKS["sst2"], [], "cpu")
