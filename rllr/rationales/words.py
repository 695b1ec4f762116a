"""The words of a text in any script. Evidence writers count them.

A word is a sequence of letters, digits and the marks that combine with them (in Hindi, half of the letters are such
marks). Chinese, Japanese, Thai and some other languages do not put spaces between words: there a "word" is a pair of
neighbouring characters.
"""

import functools
import re

from ..common.texts import UNSPACED, marks

JOINERS = "\u200c\u200d"  # between the letters of a word in Indic and Persian writing


@functools.cache
def _patterns():
    """Patterns of a word, of a run of a script without spaces, and of one character of such a run with its marks."""
    letter = rf"[\w{marks()}{JOINERS}]"
    word = re.compile(rf"\w{letter}*(?:['’-]\w{letter}*)*")
    run = re.compile(f"[{UNSPACED}][{UNSPACED}{marks()}]*")
    return word, run, re.compile(f"[{UNSPACED}][{marks()}]*")


def words_of(text):
    """{lower-case word: its first spelling in the text}, in the order of the text."""
    word, run, character = _patterns()
    found: dict[str, str] = {}
    for match in word.finditer(text):
        place = 0
        for unspaced in run.finditer(match.group()):
            _add(found, match.group()[place : unspaced.start()])  # for example a Latin word next to a Han character
            characters = character.findall(unspaced.group())
            for pair in ["".join(pair) for pair in zip(characters, characters[1:])] or characters:
                _add(found, pair)
            place = unspaced.end()
        _add(found, match.group()[place:])
    return found


def _add(found, word):
    if word:
        found.setdefault(word.casefold(), word)
