"""The words of a text in any script. Evidence writers count them.

A word is a sequence of letters, digits and the marks that combine with them (in Hindi, half of the letters are such
marks). Chinese, Japanese, Thai and some other languages do not put spaces between words: there a "word" is a pair of
neighbouring characters.
"""

import functools
import re
import unicodedata

MARKS_END = 0x20000  # combining marks are in the first two planes of Unicode (some variation selectors far beyond)
# Scripts without spaces: Thai, Lao, Myanmar, Khmer, kana, Han with its extensions, and their supplements.
UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
JOINERS = "\u200c\u200d"  # between the letters of a word in Indic and Persian writing


@functools.cache
def _patterns():
    """Patterns of a word, of a run of a script without spaces, and of one character of such a run with its marks."""
    characters = map(chr, range(0x300, MARKS_END))
    marks = "".join(re.escape(char) for char in characters if unicodedata.category(char).startswith("M"))
    letter = rf"[\w{marks}{JOINERS}]"
    word = re.compile(rf"\w{letter}*(?:['’-]\w{letter}*)*")
    run = re.compile(f"[{UNSPACED}][{UNSPACED}{marks}]*")
    return word, run, re.compile(f"[{UNSPACED}][{marks}]*")


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
