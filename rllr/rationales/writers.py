"""The writers of rationales behind one small interface: given in the data, the demo's own, evidence words.

A writer builds a rationale in two steps: it chooses a *basis* (words of the text, a clause, a finished text), and it
phrases that basis for a label. Pairs need the two steps apart: a label-sensitive pair may phrase one basis for both
labels.

    python -m rllr.rationales --task sst2 --train_file train.jsonl --writer evidence --output with_rationales.jsonl
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict

from ..common.errors import InputError
from ..data.demo import phrase_rationale, quote_of
from .words import words_of

SMOOTHING = 0.5  # added to each count of the log-odds: half an occurrence, Jeffreys' prior
NAMED_WORDS = 2  # evidence words that a rationale names
WHO_SAYS = {"both": "both say", "first": "only the first says", "second": "only the second says"}  # of a pair's texts
NO_WORD = "no word stands out"
MANY_ONCE = 0.9  # if a larger share of the words occurs in one row only, evidence means little


FILL_IN = "fill the column 'rationale' or 'rationales', or choose another writer, such as evidence"


def without_rationale(example):
    """The beginning of a message about a row without a rationale for its label."""
    return f"row {example.name}: has no rationale for its label {example.label!r}"


class RationaleWriter(ABC):
    """Writes a rationale for any label of any row.

    basis(example, label)   the basis that best supports this label, right or wrong
    draw(example, rng)      a basis that is chosen without knowing which label is right (`rllr.pairs`)
    phrase(basis, label)    the text of the rationale
    """

    @abstractmethod
    def basis(self, example, label): ...

    @abstractmethod
    def draw(self, example, rng): ...

    @abstractmethod
    def phrase(self, basis, label) -> str: ...

    def write(self, example, label) -> str:
        """The rationale that argues for this label. SFT learns the one for the gold label."""
        return self.phrase(self.basis(example, label), label)

    def can_write(self, example) -> bool:
        """Whether it has a rationale for this row's label. SFT and written pairs are made of rows that have one."""
        return True

    def argues_for_all(self, example) -> bool:
        """Whether each label of this row has its own rationale. If not, having one tells which label is right."""
        return True


class GivenWriter(RationaleWriter):
    """Rationales from the columns `rationale` (for the gold label) and `rationales` ({label: text}).

    If a wrong label has none, both sides of a label-sensitive pair have the same rationale. InputError where no row has
    one for its label.
    """

    def __init__(self, examples, task):
        self.task = task
        self.examples = [example for example in examples if self.can_write(example)]
        if not self.examples:
            raise InputError(f"{without_rationale(examples[0])}, nor has any other row; {FILL_IN}")

    def can_write(self, example):
        return example.label is not None and bool(self._find(example, example.label))

    def _find(self, example, label):
        return (example.rationales or {}).get(label) or example.rationale

    def basis(self, example, label):
        return self._find(example, label) or self._find(example, example.label) or ""

    def draw(self, example, rng):
        source = example if rng.random() < 2 / 3 else rng.choice(self.examples)
        return self.basis(source, rng.choice(self.task.labels))

    def phrase(self, basis, label):
        return basis

    def argues_for_all(self, example):
        return all((example.rationales or {}).get(label) for label in self.task.labels)


class DemoWriter(GivenWriter):
    """The demo generator's rationales: they quote the clause that decides or, for a wrong label, the other clause."""

    def basis(self, example, label):
        return quote_of(super().basis(example, label))

    def phrase(self, basis, label):
        return phrase_rationale(basis, label)


class EvidenceWriter(RationaleWriter):
    """Names the words of a text that best support a label, by log-odds counted on the labelled rows.

        score(w, L) = log p(w | L) - log p(w | other labels)        p: smoothed share of the rows that contain w

    A rationale for a labelled row does not count the words of that row itself: otherwise a word that occurs in one row
    only would always be evidence for that row's label. For pair tasks the features are the words that both texts have
    or that only one of them has, and the numbers of such words.
    """

    def __init__(self, examples, task, log=lambda line: None):
        self.task = task
        self.examples = [example for example in examples if example.label is not None]
        if not self.examples:
            raise InputError("--rationales evidence needs labelled rows to count words on, and there are none")
        self.counts: dict[tuple, Counter] = defaultdict(Counter)  # feature -> {label: rows that have the feature}
        self.rows = Counter(example.label for example in self.examples)
        self.counted = {example.id: example.label for example in self.examples}
        for example in self.examples:
            for feature in self._features(example):
                self.counts[feature][example.label] += 1
        rows = [sum(labels.values()) for (_, word), labels in self.counts.items() if isinstance(word, str)]
        once = sum(number == 1 for number in rows)
        if once > MANY_ONCE * len(rows) or not rows:
            log(
                f"warning: {once} of {len(rows)} words occur in one of the {len(self.examples)} labelled rows only, so "
                "counted evidence says little about other rows; give more rows, or rationales of your own "
                "(--rationales given or model)"
            )

    def _features(self, example):
        """{feature: spelling}. A feature is (kind, lower-case word) or (kind, number of such words, at most 5)."""
        first = words_of(example.text)
        if not self.task.is_pair:
            return {("has", word): spelling for word, spelling in first.items()}
        second = words_of(example.text_b or "")
        kinds = {
            "both": {word: second[word] for word in second if word in first},
            "first": {word: first[word] for word in first if word not in second},
            "second": {word: second[word] for word in second if word not in first},
        }
        features: dict[tuple[str, str | int], str | None] = {}
        for kind, words in kinds.items():
            features[kind, min(len(words), 5)] = None
            features |= {(kind, word): spelling for word, spelling in words.items()}
        return features

    def _score(self, feature, label, own_label):
        """Log-odds of a feature for a label. own_label: the label of the row itself, if the counts include that row."""
        counts = self.counts.get(feature, Counter())
        of_label, of_others = own_label == label, own_label not in (None, label)  # what to take off for the row itself
        with_label, rows = counts[label] - of_label, self.rows[label] - of_label
        with_other = counts.total() - counts[label] - of_others
        other_rows = len(self.examples) - self.rows[label] - of_others
        p_label = (with_label + SMOOTHING) / (rows + 2 * SMOOTHING)
        p_others = (with_other + SMOOTHING) / (other_rows + 2 * SMOOTHING)
        return math.log(p_label) - math.log(p_others)

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
        """Evidence for a random label, random words of the text, or evidence of another text; a third each."""
        source = rng.randrange(3)
        if source == 1:
            features = self._features(example)
            kinds = sorted({kind for kind, word in features if isinstance(word, str)})
            if kinds:
                kind = rng.choice(kinds)
                words = [spelling for (k, word), spelling in features.items() if k == kind and isinstance(word, str)]
                return kind, tuple(rng.sample(words, min(NAMED_WORDS, len(words))))
        if source == 2:
            example = rng.choice(self.examples)
        return self.basis(example, rng.choice(self.task.labels))

    def phrase(self, basis, label):
        kind, words = basis
        named = " and ".join(words)
        several = len(words) > 1
        if not words:
            return f"{NO_WORD}, which suggests {label}"
        if kind == "has":
            return f"the words {named} suggest {label}" if several else f"the word {named} suggests {label}"
        return f"{WHO_SAYS[kind]} {named}, which suggests {label}"


_NAMED = r"(\S+(?: and \S+)*)"  # words have no spaces inside
_EVIDENCE = {"has": re.compile(rf"the words? {_NAMED} suggests? .+", re.IGNORECASE)} | {
    kind: re.compile(rf"{who} {_NAMED}, which suggests .+", re.IGNORECASE) for kind, who in WHO_SAYS.items()
}


def evidence_of(rationale):
    """(kind, words) that a rationale of `EvidenceWriter.phrase` names; None for a text of another form."""
    if rationale.startswith(f"{NO_WORD}, which suggests "):
        return "has", ()
    for kind, form in _EVIDENCE.items():
        if match := form.fullmatch(rationale):
            return kind, tuple(match[1].split(" and "))
    return None
