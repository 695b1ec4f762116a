"""The demo data: sizes, splits without a shared combination, balance, and labels checked by a second reader.

`read` decides a review's label from its words alone, with a small lexicon written by hand; it shares no code with the
generator. It is itself checked on sentences whose labels a person wrote down.
"""

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from rllr.common.errors import InputError
from rllr.data import demo
from rllr.data.demo import demo_examples, reviews
from rllr.tasks import TASKS

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "dev", "test")
examples, records = cache(demo_examples), cache(reviews)  # generated once for all tests

WORDS = {  # phrases whose polarity a person wrote down, verbs in their two forms
    "negative": "dim|blurry|tinny|muffled|flimsy|wobbly|fragile|clunky|buggy|stiff|lumpy|bitter|bland|stale|rude|steep"
    "|unhelpful|slow|a disgrace|arrogant|a rip-off|absurd|inflated|confusing|vague|outdated|incomplete|weak|noisy|dull"
    "|tedious|silly|shallow|drags? on|ugly|tacky|hideous|awful|terrible|pathetic|a letdown|lets? me down|annoys? me"
    "|falls? short|dies? quickly|drains? overnight|crackles?|rattles?|crash(?:es)? a lot|digs? in|stalls?|brittle|laggy"
    "|short-lived|washed out|awkward|burnt|rancid|underpowered|breaks? down|confuses? newcomers|blames? the buyer",
    "positive": "gorgeous|crisp|vivid|sharp|bright|warm|booming|sturdy|solid|rugged|intuitive|snappy|comfortable|plush"
    "|cosy|delicious|tasty|fragrant|a treat|friendly|polite|helpful|patient|courteous|a bargain|affordable|low|thorough"
    "|readable|concise|easy to follow|powerful|quiet|quick|gripping|witty|funny|touching|memorable|elegant|stylish|chic"
    "|excellent|superb|terrific|impress(?:es)?|lasts? for days|fills? the room|holds? up well|runs? smoothly"
    "|wash(?:es)? well|hits? the spot|keeps? promises|earns? full marks|exceeds? expectations|suits? any budget",
}
NEGATION = r"\b(?:not|hardly|far from|anything but|by no means|never|rarely)\b"


def statements(text: str) -> tuple[str, str]:
    """(deciding part, conceded part) of a review by its connective, in order of how specific the connective is."""
    text = re.sub(r"^[^,;:]*: ", "", text.rstrip("."))
    text = re.sub(r"^(honestly|in my experience|so far|overall|for what it is worth), ", "", text)
    for connective, decides in (
        (", but what counts is ", 1), (", which matters less than ", 1),
        (", and that outweighs ", 0), (", which matters more than ", 0),
        ("; in truth, ", 1), (", when in fact ", 1),
        (", even if some claim that ", 0), (", although others say that ", 0),
        ("; still, ", 1), ("; however, ", 1), ("; all the same, ", 1), (", but ", 1), (", yet ", 1),
    ):  # fmt: skip
        if connective in text:
            parts = text.split(connective)
            return parts[decides], parts[1 - decides]
    first = re.match(r"(although|even though|while|despite|in spite of) (.*), (.*)$", text)
    if first:
        return first[3], first[2]
    last = re.match(r"(.*?),? (even though|although|even if|despite|in spite of) (.*)$", text)
    return last[1], last[3]


def polarity_of(part: str) -> str | None:
    """The polarity of one part of a review by its first known phrase; None where the lexicon knows none."""
    for clause in part.split(" and "):
        for polarity, words in WORDS.items():
            found = re.search(rf"(?<![\w-])(?:{words})(?![\w-])", clause)
            if found:
                negated = re.search(NEGATION, clause[: found.start()])
                return polarity if not negated else "positive" if polarity == "negative" else "negative"
    return None


def read(text: str) -> str | None:
    return polarity_of(statements(text)[0])


@pytest.mark.parametrize(
    "text, label",
    [
        ("although the screen is gorgeous, the battery dies quickly.", "negative"),
        ("the battery dies quickly, but the screen is gorgeous.", "positive"),
        ("the battery dies quickly even though the screen is gorgeous.", "negative"),
        ("despite a battery that dies quickly, the screen is not exactly dim.", "positive"),
        ("the price is hardly a bargain, in spite of the sturdy case.", "negative"),
        ("honestly, the plot is far from dull despite characters that drag on.", "positive"),
        ("the speakers never crackle; still, the app crashes a lot and the case is flimsy.", "negative"),
        ("about this phone: some say that the app is snappy; in truth, the app is anything but snappy.", "negative"),
        ("the price is steep, which matters less than the elegant lining.", "positive"),
        ("the support team is rude, and that outweighs a manual that is by no means vague.", "negative"),
        ("the seat does not really dig in, although others say that the seat is stiff.", "positive"),
    ],
)
def test_the_second_reader_agrees_with_a_person(text, label):
    assert read(text) == label


@pytest.mark.parametrize("split", ("dev", "test"))  # train may have label noise
def test_labels_follow_the_rule(split):
    judged = [(read(row.text), row) for row in examples(split)]
    judged = [(label, row) for label, row in judged if label]
    assert len(judged) > 400
    assert [row.text for label, row in judged if label != row.label] == []


@pytest.mark.parametrize("split", SPLITS)
def test_rationales_quote_the_text_and_name_their_label(split):
    for row in examples(split):
        assert sorted(row.rationales) == sorted(TASKS["demo"].labels)
        assert row.rationale == row.rationales[row.label]
        quotes = {}
        for label, rationale in row.rationales.items():
            quotes[label] = re.fullmatch(rf"what decides is (?:that )?(.*), which is {label}", rationale)[1]
            assert re.search(rf"(?<!\w){re.escape(quotes[label])}(?!\w)", row.text), row
            assert 6 <= len(rationale.split()) <= 20, row


def test_the_gold_rationale_quotes_the_deciding_statement():
    for row, review in zip(examples("test"), records("test")):
        deciding, conceded = statements(row.text)
        wrong = next(label for label in TASKS["demo"].labels if label != row.label)
        assert review.deciding.removeprefix("that ") in deciding and review.deciding in row.rationale
        assert review.conceded.removeprefix("that ") in conceded and review.conceded in row.rationales[wrong]


def test_both_polarities_stand_in_nearly_every_text():
    parts = [tuple(map(polarity_of, statements(row.text))) for row in examples("dev")]
    both_known = [pair for pair in parts if None not in pair]
    assert len(both_known) > 100
    assert sum(deciding != conceded for deciding, conceded in both_known) >= 0.9 * len(both_known)


def test_sizes_ids_and_distinct_texts():
    rows = {split: examples(split) for split in SPLITS}
    assert len(rows["train"]) >= 18_000 and len(rows["dev"]) >= 2_000 and len(rows["test"]) >= 2_000
    texts = [row.text for split in SPLITS for row in rows[split]]
    assert len(set(texts)) == len(texts) >= 20_000
    assert len({row.id for split in SPLITS for row in rows[split]}) == len(texts)
    assert rows["train"][123].id == "demo-train-000123"
    assert all(8 <= len(text.split()) <= 24 for text in texts)


def test_no_combination_is_in_two_splits():
    seen = {split: set().union(*(review.combinations for review in records(split))) for split in SPLITS}
    assert all(len(pairs) > 500 for pairs in seen.values())
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["test"] and not seen["dev"] & seen["test"]


def test_combinations_are_the_phrases_of_the_text():
    """Against a generator that records too few pairs, which would make the test above empty."""
    for review in records("dev"):
        phrases = {phrase for pair in review.combinations for phrase in pair}
        statements_in_text = 2 + review.text.count(" and ") - review.text.count(", and that outweighs ")
        assert len(phrases) == statements_in_text
        assert len(review.combinations) == len(phrases) * (len(phrases) - 1) // 2
        for phrase in phrases:  # a verb may have gained an ending, so its later words are compared
            words = phrase.removeprefix("~").split()
            assert " ".join(words[1:] if phrase.startswith("~") else words) in review.text


def test_labels_are_balanced_in_every_construction():
    for split in SPLITS:
        count = Counter((review.construction, review.label) for review in records(split))
        constructions = {construction for construction, _ in count}
        assert len(constructions) == 5
        for construction in constructions:
            assert abs(count[construction, "negative"] - count[construction, "positive"]) <= 1


def test_first_rows_are_balanced_too():
    """A run on the first N rows must not see a different task."""
    positive = sum(row.label == "positive" for row in examples("train")[:1000])
    assert 480 <= positive <= 520


def test_vocabulary():
    tables = (demo.NEGATIVE, demo.POSITIVE)
    phrases = [{p.strip() for text in table.values() for p in text.split(",")} for table in tables]
    assert len(phrases[0]) >= 120 and len(phrases[1]) >= 120
    assert not phrases[0] & phrases[1]
    kinds = {aspect.split("/")[1] for aspects in demo.PRODUCTS.values() for aspect in aspects.split()}
    assert kinds | {"any"} == set(demo.NEGATIVE) == set(demo.POSITIVE)


def test_verbs_agree_with_a_singular_noun():
    said = {"die quickly": "dies quickly", "wash well": "washes well", "carry well": "carries well", "hiss": "hisses"}
    said |= {"stay cool": "stays cool", "go nowhere": "goes nowhere", "buzz at night": "buzzes at night"}
    assert {base: demo._third_person(base) for base in said} == said


def test_the_same_in_another_process():
    """Hash randomisation must not reach the data."""
    code = (
        "from rllr.data.demo import demo_examples; print([r.text for s in ('dev', 'test') for r in demo_examples(s)])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert other.stdout.strip() == str([row.text for split in ("dev", "test") for row in demo_examples(split)])


def test_label_noise_is_for_train_alone(monkeypatch):
    monkeypatch.setattr(demo, "LABEL_NOISE", 0.25)
    rows = {split: demo_examples(split) for split in ("train", "dev")}
    wrong = [row for row, review in zip(rows["train"], reviews("train")) if row.label != review.label]
    assert 0.2 < len(wrong) / len(rows["train"]) < 0.3
    assert all(row.rationale.endswith(row.label) for row in wrong)
    assert all(row.label == review.label for row, review in zip(rows["dev"], reviews("dev")))


def test_unknown_split():
    with pytest.raises(InputError, match="'valid'.*train, dev, test"):
        demo_examples("valid")
