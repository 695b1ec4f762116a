"""Best-of-n answers: the choice by hand, the sampling against a slow loop, what is refused, and the two commands."""

import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model, toy_tokenizer
from toy_runs import DEV_ROWS, read_lines, run, write_rows

from rllr import best_of, evaluate, predict
from rllr.answers import Answer
from rllr.best_of import best_answers, best_places, load_chooser
from rllr.common.errors import InputError
from rllr.data.encoding import Encoder
from rllr.tasks import TASKS, Example

WHOLE, CUT, UNREADABLE = Answer("a", "x", False), Answer("a", "x", True), Answer("a", None, False)


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
    assert best_places(answers, scores, n=min(3, len(answers))) == places


def test_the_choice_against_a_slow_loop():
    draw = random.Random(0)
    for _ in range(200):
        n = draw.randint(1, 5)
        answers = draw.choices([WHOLE, CUT, UNREADABLE], k=4 * n)
        scores = [draw.randint(-2, 2) for _ in answers]
        expected = []
        for row in range(4):
            places = list(range(row * n, row * n + n))
            finished = [place for place in places if answers[place] == WHOLE] or places
            highest = max(scores[place] for place in finished)
            best = next(place for place in finished if scores[place] == highest)
            expected.append(best)
        assert best_places(answers, scores, n) == expected


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


def test_a_reward_model_that_does_not_fit(toy, tmp_path):
    def refused(directory, task, tokenizer=None, says=""):
        with pytest.raises(InputError, match=f"--label_rm {directory}: {says}"):
            load_chooser(settings(label_rm=str(directory)), task, [tokenizer] if tokenizer else [], "cpu")

    own = evaluate.load_tokenizer(toy.sft)
    task = evaluate.resolve_task(SimpleNamespace(task=None, answer_format=None), evaluate.read_record(toy.sft), toy.sft)
    refused(tmp_path / "none", task, own, "no such directory; train_rm.py makes one")
    refused(toy.label_rm, TASKS["sst2"], own, "was trained on task 'toy'")
    refused(toy.label_rm, task, toy_tokenizer(), "its tokenizer differs from the policy's")
    with pytest.raises(InputError, match="holds no reward or value model"):
        load_chooser(settings(label_rm=str(toy.sft)), task, [own], "cpu")
    assert load_chooser(settings(label_rm=str(toy.label_rm)), task, [own], "cpu").head.weight.requires_grad is False


# ---- the commands


def test_evaluate_adds_a_row_for_each_model(toy, tmp_path):
    flags = ["--models", toy.sft, toy.sft, "--eval_file", toy.dev, "--max_new_tokens", 12, "--best_of", 8]
    flags[2] = shutil.copytree(toy.sft, tmp_path / "copy")
    output = run(evaluate.main, *flags, "--label_rm", toy.label_rm, "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    names = [str(name) for model in (toy.sft, flags[2]) for name in (model, f"{model} best of 8")]
    assert [row["model"] for row in results] == names
    assert f"24 rows (part eval), greedy answers, and the best of 8 by {toy.label_rm}" in output
    assert results[1]["accuracy"] == results[3]["accuracy"] > 0.7 and results[1]["parse_failures"] == 0
    assert {(row["part"], row["rows_that_trained"], row["rows_that_chose"]) for row in results} == {("eval", 0, 24)}
    assert f"24 of these 24 rows chose {toy.sft}, {flags[2]} (they are" in output and "of 8 (they" not in output
    best, again = (read_lines(tmp_path / "out" / f"answers-{n}.jsonl") for n in (1, 3))
    assert [row["answer"] for row in best] == [row["answer"] for row in again]  # the same weights, seed and places
    predicted = predict_best(toy, tmp_path, "--seed", 0)
    assert [row["answer"] for row in predicted] == [row["answer"] for row in best]
    assert [row["answer"] for row in predict_best(toy, tmp_path, "--seed", 1)] != [row["answer"] for row in best]


def predict_best(toy, tmp_path, *more):
    new, output = write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in DEV_ROWS]), tmp_path / "x.jsonl"
    flags = ["--model", toy.sft, "--input", new, "--output", output, "--overwrite", "--max_new_tokens", 12]
    run(predict.main, *flags, "--best_of", 8, "--label_rm", toy.label_rm, *more)
    return read_lines(output)


def test_an_adapter_chooses_as_its_merged_model_does(toy, tmp_path):
    import train_rm
    from rllr import merge

    flags = ["--policy", toy.sft, *toy.rm_flags, "--epochs", 1, "--lora_rank", 2, "--output_dir", tmp_path / "rm"]
    run(train_rm.main, *flags)
    run(merge.main, "--adapter", tmp_path / "rm", "--output_dir", tmp_path / "merged")
    adapter, merged = (predict_best(toy, tmp_path, "--label_rm", tmp_path / name) for name in ("rm", "merged"))
    assert adapter == merged
    assert best_of.BestOfConfig().best_of is None
