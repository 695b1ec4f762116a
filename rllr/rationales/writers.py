"""Who writes rationales. Behind one small interface: given in the data, evidence words, the demo's own, a language model.

A writer splits a rationale into what it rests on (a *basis*: words of the text, a clause, a finished text) and how that is
worded for a label. Pairs need the two apart: a label-sensitive pair may put the same basis under both labels.

    python -m rllr.rationales --task sst2 --train_file train.jsonl --writer evidence --output with_rationales.jsonl
"""

import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict

from ..common.errors import InputError
from ..data.demo import quote_of, word_rationale
from .words import words_of

SMOOTHING = 0.5  # added to each count of the log-odds (half an occurrence: Jeffreys' prior)
NAMED_WORDS = 2  # evidence words a rationale names
MANY_ONCE = 0.9  # share of words that occur in one row only, above which evidence means little


class RationaleWriter(ABC):
    """A rationale for any label of any row.

    basis(example, label)   what best supports this label, right or wrong
    draw(example, rng)      a basis chosen without looking at which label is right (`rllr.pairs`)
    word(basis, label)      the rationale's text
    """

    @abstractmethod
    def basis(self, example, label): ...

    @abstractmethod
    def draw(self, example, rng): ...

    @abstractmethod
    def word(self, basis, label) -> str: ...

    def write(self, example, label) -> str:
        """The rationale that argues for this label: what SFT learns for the gold label."""
        return self.word(self.basis(example, label), label)

    def argues_for_all(self, example) -> bool:
        """Whether each label of this row has a rationale of its own, so that having one does not give the label away."""
        return True


class GivenWriter(RationaleWriter):
    """Rationales from the columns `rationale` (for the gold label) and `rationales` ({label: text}).

    Where a wrong label has none, both sides of a label-sensitive pair carry the same text.
    """

    def __init__(self, examples, task):
        self.examples, self.task = list(examples), task
        self.check(self.examples)

    def check(self, examples):
        """InputError for a labelled row without a rationale for its label."""
        for example in examples:
            if example.label is not None and not self._find(example, example.label):
                raise InputError(
                    f"row {example.name}: has no rationale for its label {example.label!r}; fill the column 'rationale' or "
                    "'rationales', or choose --rationales evidence"
                )

    def _find(self, example, label):
        return (example.rationales or {}).get(label) or example.rationale

    def basis(self, example, label):
        return self._find(example, label) or self._find(example, example.label) or ""

    def draw(self, example, rng):
        source = example if rng.random() < 2 / 3 else rng.choice(self.examples)
        return self.basis(source, rng.choice(self.task.labels))

    def word(self, basis, label):
        return basis

    def argues_for_all(self, example):
        return all((example.rationales or {}).get(label) for label in self.task.labels)


class DemoWriter(GivenWriter):
    """The demo generator's rationales: the clause that decides, or for a wrong label the other clause."""

    def basis(self, example, label):
        return quote_of(super().basis(example, label))

    def word(self, basis, label):
        return word_rationale(basis, label)


class EvidenceWriter(RationaleWriter):
    """Names the words of a text that best support a label, by log-odds counted on the labelled rows.

        score(w, L) = log p(w | L) - log p(w | other labels)        p from the rows that contain w, smoothed

    A labelled row's own words are left out of the counts when it is written about: otherwise a word that occurs in one
    row only would always be evidence for that row's label. For pair tasks the features are words that the two texts
    share or that only one of them has, and how many of them there are.
    """

    def __init__(self, examples, task, log=lambda line: None):
        self.task = task
        self.examples = [example for example in examples if example.label is not None]
        if not self.examples:
            raise InputError("--rationales evidence needs labelled rows to count words on, and there are none")
        self.counts = defaultdict(Counter)  # feature -> {label: rows that have it}
        self.rows = Counter(example.label for example in self.examples)
        self.counted = {example.id: example.label for example in self.examples}
        for example in self.examples:
            for feature in self._features(example):
                self.counts[feature][example.label] += 1
        rows = [sum(labels.values()) for (_, word), labels in self.counts.items() if isinstance(word, str)]
        once = sum(number == 1 for number in rows)
        if once > MANY_ONCE * len(rows) or not rows:
            log(
                f"warning: {once} of {len(rows)} words occur in one of the {len(self.examples)} labelled rows only, so counted evidence says "
                "little about other rows; give more rows, or rationales of your own (--rationales given or model)"
            )

    def _features(self, example):
        """{feature: surface form}. Feature: (kind, lower-case word) or (kind, number of such words, 5 at most)."""
        first = words_of(example.text)
        if not self.task.is_pair:
            return {("has", word): surface for word, surface in first.items()}
        second, features = words_of(example.text_b or ""), {}
        kinds = {
            "both": {word: second[word] for word in second if word in first},
            "first": {word: first[word] for word in first if word not in second},
            "second": {word: second[word] for word in second if word not in first},
        }
        for kind, words in kinds.items():
            features[kind, min(len(words), 5)] = None
            features |= {(kind, word): surface for word, surface in words.items()}
        return features

    def _score(self, feature, label, own_label):
        """Log-odds of a feature for a label; own_label is that of the row written about, if it was counted."""
        having = self.counts.get(feature, {})
        with_label = having.get(label, 0) - (own_label == label)
        with_other = sum(having.values()) - having.get(label, 0) - (own_label not in (None, label))
        rows = self.rows[label] - (own_label == label)
        other_rows = len(self.examples) - self.rows[label] - (own_label not in (None, label))
        return math.log((with_label + SMOOTHING) / (rows + 2 * SMOOTHING)) - math.log(
            (with_other + SMOOTHING) / (other_rows + 2 * SMOOTHING)
        )

    def basis(self, example, label):
        """(kind, words): the kind is "has" for single texts, else "both", "first" or "second"."""
        own = self.counted.get(example.id)
        features = self._features(example)
        counts = {kind: self._score((kind, n), label, own) for kind, n in features if isinstance(n, int)}
        scored = sorted(
            (-self._score((kind, word), label, own) - counts.get(kind, 0.0), kind, word)
            for kind, word in features
            if isinstance(word, str)
        )
        if not scored:
            return "has", ()
        kind = scored[0][1]
        return kind, tuple([features[kind, word] for _, k, word in scored if k == kind][:NAMED_WORDS])

    def draw(self, example, rng):
        """Evidence for any label, random words of the text, or words of another text, a third each."""
        source = rng.randrange(3)
        if source == 1:
            features = self._features(example)
            kinds = sorted({kind for kind, word in features if isinstance(word, str)})
            if kinds:
                kind = rng.choice(kinds)
                words = [surface for (k, word), surface in features.items() if k == kind and isinstance(word, str)]
                return kind, tuple(rng.sample(words, min(NAMED_WORDS, len(words))))
        if source == 2:
            example = rng.choice(self.examples)
        return self.basis(example, rng.choice(self.task.labels))

    def word(self, basis, label):
        kind, words = basis
        named = " and ".join(words)
        several = len(words) > 1
        if not words:
            return f"no word stands out, which suggests {label}"
        if kind == "has":
            return f"the words {named} suggest {label}" if several else f"the word {named} suggests {label}"
        who = {"both": "both say", "first": "only the first says", "second": "only the second says"}[kind]
        return f"{who} {named}, which suggests {label}"


# ---- python -m rllr.rationales ---------------------------------------------------------------------------------------
