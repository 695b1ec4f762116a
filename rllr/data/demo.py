"""The built-in `demo` data: short product reviews from a grammar with a seed, so a run needs no file and no network.

    text       "although the screen is gorgeous, the battery dies quickly."
    label      negative
    rationale  "what decides is that the battery dies quickly, which is negative"

The rule. A review contains two statements of opposite polarity, and its construction says which one decides:

    X, but Y.    although X, Y.    Y, although X.    despite X, Y.    Y, and that outweighs X.

In all of them Y decides and X is conceded. The label is the polarity of Y: the polarity of its opinion phrase, reversed
by a negation ("is far from dull" and "never lets me down" are positive). "Really", "rather" and similar words change
nothing. Some reviews join a second statement of the same polarity to Y, or to X, with "and". So most words are about as
common under both labels: a reader must know which statement decides *and* what its words mean.

The rationale for the gold label quotes the (first) statement of Y word for word; the one for the wrong label quotes X.

Splits. A *combination* is an unordered pair of opinion phrases that occur in one text ("die quickly", "gorgeous"). The
product, the aspect, the construction, the order and the negation do not matter. Every combination belongs to one split,
so no pair of phrases in dev occurs together in train or test. The splits share the single phrases, of which most are
rare (Zipf).
"""

import random
import zlib
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations

from ..common.errors import InputError
from ..tasks import Example
from .demo_words import (
    ADJECTIVE_MODIFIERS,
    ADJECTIVE_NEGATIONS,
    CONSTRUCTIONS,
    NEGATIVE,
    OPENERS,
    POSITIVE,
    PRODUCTS,
    VERB_MODIFIERS,
    VERB_NEGATIONS,
)

# Settings, read at the first call. More phrases, a larger exponent, more negation, less support or more decoys make the
# task harder.
SEED = 19763
SIZES = {"train": 20_000, "dev": 2_000, "test": 2_000}
PAIR_SHARES = {"dev": 0.2, "test": 0.2}  # shares of all combinations; train has the others
PHRASES_PER_KIND = 4  # of each polarity, for each of the 13 kinds of aspect; 16 would be all
GENERIC_SHARE = 0.12  # statements with a phrase that fits every aspect ("excellent", "lets me down")
ZIPF_TRAIN = 1.0  # the phrase of rank r has weight r ** -exponent; with 0 all phrases of a kind are equally common
ZIPF_HELD_OUT = 1.0  # the same for dev and test; a smaller value asks more about the phrases that are rare in train
NEGATION_SHARE = 0.06  # statements with a negated phrase
MODIFIER_SHARE = 0.1  # statements with "really", "rather", "usually" ..., of those without a negation
SUPPORT_SHARE = 0.55  # texts with a second statement on the deciding side, which helps a bag-of-words model
DECOY_SHARE = 0.03  # texts with a second statement on the conceded side, which misleads a bag-of-words model
OPENER_SHARE = 0.1  # texts that begin with a filler
LABEL_NOISE = 0.0  # train rows with the wrong label, and with the rationale for it
MIN_WORDS, MAX_WORDS = 8, 24

LABELS = ("negative", "positive")

RATIONALE_START, RATIONALE_LINK = "what decides is ", ", which is "


@dataclass(frozen=True)
class Review:
    """A generated text and how it was made. `deciding` and `conceded` are the words that a rationale quotes."""

    text: str
    label: str  # by the rule, before any label noise
    construction: str
    combinations: frozenset[tuple[str, str]]  # every pair of opinion phrases in the text, each pair sorted
    deciding: str
    conceded: str


def demo_examples(split: str) -> list[Example]:
    """The rows of "train", "dev" or "test", the same in every run, each with a rationale for either label."""
    noise = random.Random(f"{SEED}-{split}-noise")
    rows = []
    for number, review in enumerate(reviews(split)):
        wrong = LABELS[1 - LABELS.index(review.label)]
        quotes = {review.label: review.deciding, wrong: review.conceded}
        rationales = {label: phrase_rationale(quotes[label], label) for label in LABELS}
        label = wrong if split == "train" and noise.random() < LABEL_NOISE else review.label
        name = f"demo-{split}-{number:06d}"
        rows.append(Example(name, review.text, label=label, rationale=rationales[label], rationales=rationales))
    return rows


def phrase_rationale(quote: str, label: str) -> str:
    """The rationale that quotes a statement and argues for a label."""
    return f"{RATIONALE_START}{quote}{RATIONALE_LINK}{label}"


def quote_of(rationale: str) -> str:
    """The statement that a rationale of `phrase_rationale` quotes."""
    return rationale.removeprefix(RATIONALE_START).rpartition(RATIONALE_LINK)[0]


def reviews(split: str) -> list[Review]:
    """The reviews of a split. All texts differ, and in each construction both labels are equally common."""
    if split not in SIZES:
        raise InputError(f"the demo task has no split {split!r}; choose from {', '.join(SIZES)}")
    rng = random.Random(f"{SEED}-{split}")
    rows: list[Review] = []
    seen, turns = set(), dict.fromkeys(CONSTRUCTIONS, 0)  # the texts so far; the number of reviews of each construction
    while len(rows) < SIZES[split]:
        name = rng.choice(list(CONSTRUCTIONS))
        draw = rng.random()
        sides = "DCD" if draw < SUPPORT_SHARE else "DCC" if draw < SUPPORT_SHARE + DECOY_SHARE else "DC"
        review = None
        while review is None or review.text in seen or not MIN_WORDS <= len(review.text.split()) <= MAX_WORDS:
            review = _review(rng, split, name, sides, polarity=turns[name] % 2)
        turns[name] += 1  # the next review of this construction has the other label
        seen.add(review.text)
        rows.append(review)
    return rows


def _review(rng: random.Random, split: str, construction: str, sides: str, polarity: int) -> Review | None:
    """One text with label LABELS[polarity]; None if no combination of the split was found.

    `sides` has a letter for each statement: D for the deciding side, C for the conceded side.
    """
    product = rng.choice(list(PRODUCTS))
    aspects = rng.sample(PRODUCTS[product].split(), len(sides))
    polarities = [polarity if side == "D" else 1 - polarity for side in sides]
    opinions = _opinions(rng, split, aspects, polarities)
    if opinions is None:
        return None

    clauses: dict[str, list[str]] = {"D": [], "C": []}
    noun_phrases: dict[str, list[str]] = {"D": [], "C": []}
    for side, aspect, (phrase, negated) in zip(sides, aspects, opinions):
        clause, noun_phrase = _render(rng, aspect, phrase, negated)
        clauses[side].append(clause)
        noun_phrases[side].append(noun_phrase)
    template = CONSTRUCTIONS[construction]
    slots, quotes = {}, {}
    for side in "DC":
        slots[side], slots[f"{side}n"] = " and ".join(clauses[side]), " and ".join(noun_phrases[side])
        quotes[side] = noun_phrases[side][0] if f"{{{side}n}}" in template else f"that {clauses[side][0]}"
    opener = rng.choice(OPENERS).format(product) if rng.random() < OPENER_SHARE else ""
    phrases = [phrase for phrase, _ in opinions]
    return Review(
        text=f"{opener}{template.format(**slots)}.",
        label=LABELS[polarity],
        construction=construction,
        combinations=frozenset(tuple(sorted(pair)) for pair in combinations(phrases, 2)),
        deciding=quotes["D"],
        conceded=quotes["C"],
    )


def _opinions(rng: random.Random, split: str, aspects: list[str], polarities: list[int]) -> list | None:
    """(phrase, negated) for each aspect, or None if none was found.

    After the negation the phrases have these polarities, and any two of them are a combination of the split.
    """
    chosen: list[tuple[str, bool]] = []
    for aspect, polarity in zip(aspects, polarities):
        negated = rng.random() < NEGATION_SHARE
        kind = "any" if rng.random() < GENERIC_SHARE else aspect.split("/")[1]
        phrases, weights = _ranked_phrases(kind, polarity ^ negated, split)
        for _ in range(20):
            phrase = phrases[bisect(weights, rng.random() * weights[-1])]
            if all(_split_of(phrase, other) == split for other, _ in chosen):
                chosen.append((phrase, negated))
                break
        else:
            return None
    return chosen


@cache
def _ranked_phrases(kind: str, polarity: int, split: str) -> tuple[list[str], list[float]]:
    """The phrases of one kind and polarity, the most frequent first, and their cumulative Zipf weights."""
    phrases = [phrase.strip() for phrase in (NEGATIVE, POSITIVE)[polarity][kind].split(",")]
    random.Random(f"{SEED}-{kind}-{polarity}").shuffle(phrases)  # the word lists have adjectives before verbs
    phrases = phrases[:PHRASES_PER_KIND]
    exponent = ZIPF_TRAIN if split == "train" else ZIPF_HELD_OUT
    return phrases, list(accumulate(rank**-exponent for rank in range(1, len(phrases) + 1)))


@cache
def _split_of(phrase: str, other: str) -> str | None:
    """The split of this combination, by a hash that is the same in every run; None for a phrase with itself."""
    if phrase == other:
        return None
    draw = zlib.crc32(" ".join((str(SEED), *sorted((phrase, other)))).encode()) / 2**32
    for split, share in PAIR_SHARES.items():
        if draw < share:
            return split
        draw -= share
    return "train"


def _render(rng: random.Random, aspect: str, phrase: str, negated: bool) -> tuple[str, str]:
    """One opinion as a clause, "the battery dies quickly", and as a noun phrase, "a battery that dies quickly"."""
    noun = aspect.split("/")[0].replace("_", " ")
    plural, uncountable = noun.endswith("*"), noun.endswith("-")
    noun = noun.rstrip("*-")
    is_verb, words = phrase.startswith("~"), phrase.lstrip("~")
    pattern = "{verb}" if is_verb else "{}"
    if negated:
        pattern = rng.choice(VERB_NEGATIONS if is_verb else ADJECTIVE_NEGATIONS)
    elif rng.random() < MODIFIER_SHARE and (is_verb or " " not in words):
        pattern = rng.choice(VERB_MODIFIERS if is_verb else ADJECTIVE_MODIFIERS)
    if is_verb:
        said = pattern.format(base=words, verb=words if plural else _third_person(words), do="do" if plural else "does")
        predicate = said
    else:
        said = pattern.format(words)
        predicate = f"{'are' if plural else 'is'} {said}"
    if not (is_verb or negated or " " in words):
        noun_phrase = f"the {said} {noun}"  # "the really gorgeous screen"
    else:
        article = "" if plural or uncountable else "an " if noun[0] in "aeiou" else "a "
        noun_phrase = f"{article}{noun} that {predicate}"
    return f"the {noun} {predicate}", noun_phrase


def _third_person(words: str) -> str:
    """ "die quickly" -> "dies quickly"."""
    verb, _, rest = words.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = f"{verb[:-1]}ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()
