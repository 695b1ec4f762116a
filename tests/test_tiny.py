"""What the tiny model warms up on: how many texts, and the copying exercise behind each."""

from types import SimpleNamespace

import pytest

from rllr import tiny
from rllr.tasks import TASKS, Example
from rllr.tiny import COPIES, TEXTS, _exercises, _texts_to_read

EOS = -1


class Words:
    """An encoder for which every word is a token, and so is the end of a line."""

    def __init__(self, context):
        self.context = context

    def prompts(self, task, examples):
        return [task.prompt_of(example).split() for example in examples]

    def answer_ids(self, text):
        return text.replace("\n", " \n ").split(" ") + [EOS]


def rows(text, context=200, seeds=range(20)):
    """The exercises of one text, with several seeds: [lines of words], each without the end token."""
    found = []
    for seed in seeds:
        (first, rest), = _exercises(Words(context), [Example("a", text)], TASKS["demo"], seed)  # fmt: skip
        prompt = TASKS["demo"].prompt_of(Example("a", text)).split()
        assert first + rest[: len(prompt) - 1] == prompt and rest[-1] == EOS
        assert len(first + rest) <= max(context, len(prompt) + 17)
        found.append(" ".join(rest[len(prompt) - 1 : -1]).split(" \n "))
    return found


def test_every_line_is_a_stretch_of_the_text_or_two_of_its_words():
    text = " ".join(f"w{i}" for i in range(30))
    lines = [line for found in rows(text) for line in found]
    pairs = [line for line in lines if line.count(" ") == 2 and " and " in line]
    stretches = [line for line in lines if line not in pairs]
    assert all(f"{line} " in f"{text} " for line in stretches)
    assert {len(line.split()) for line in stretches} == set(range(8, 17))  # each length from 8 to 16
    assert len(lines) == 20 * COPIES and 8 <= len(pairs) <= 36  # one in four of 80
    assert all(set(pair.split(" and ")) <= set(text.split()) for pair in pairs)


def test_as_many_lines_as_the_context_holds_and_at_least_one():
    text = " ".join(f"w{i}" for i in range(8))  # a stretch is the whole text: 9 tokens with what ends its line
    prompt = len(TASKS["demo"].prompt_of(Example("a", text)).split())
    for context, lines in ((4 * 9, 4), (4 * 9 - 1, 3), (2 * 9, 2), (2 * 9 - 1, 1), (9, 1), (0, 1)):
        found = rows(text, prompt + context, seeds=range(300))
        whole = [row for row in found if all(line == text for line in row)]
        assert len(whole) > 5 and {len(row) for row in whole} == {lines}


def test_a_short_text_is_not_copied_whole_in_every_line():
    lines = [line for found in rows("one two three four") for line in found]
    stretches = [line for line in lines if " and " not in line]
    assert all(line in "one two three four" for line in stretches)
    assert {len(line.split()) for line in stretches} == {2, 3, 4}  # from half of it on
    assert {line for found in rows("one") for line in found} == {"one"}


@pytest.mark.parametrize(
    ("texts", "epochs", "expected"),
    [
        (TEXTS + 1, None, (TEXTS, 1)),  # a part of more
        (TEXTS, None, (TEXTS, 1)),
        (TEXTS // 4, None, (TEXTS // 4, 4)),  # whole passes over fewer
        (TEXTS // 4 + 1, None, (TEXTS // 4 + 1, 4)),
        (TEXTS // 4 - 1, None, (TEXTS // 4 - 1, 5)),
        (30, None, (30, 10)),  # but not hundreds
        (TEXTS + 1, 2, (TEXTS + 1, 2)),
        (30, 2, (30, 2)),
    ],
)
def test_how_many_texts_are_read(texts, epochs, expected):
    found, passes = _texts_to_read(list(range(texts)), epochs, seed=0)
    assert (len(found), passes) == expected and len(set(found)) == len(found)


def test_a_part_of_the_texts_is_another_one_with_another_seed():
    texts = list(range(2 * TEXTS))
    assert _texts_to_read(texts, None, 0) == _texts_to_read(texts, None, 0) != _texts_to_read(texts, None, 1)


def test_the_passes_of_the_warm_up_are_those_that_were_chosen(monkeypatch):
    seen = []
    monkeypatch.setattr(tiny, "_warm_up", lambda *given: seen.append(given))
    monkeypatch.setattr(tiny, "TEXTS", 40)
    texts = [Example(str(i), f"text {i} is here and it is long enough to be copied") for i in range(12)]
    splits = SimpleNamespace(labelled=texts[:4], held_out=texts[4:6], unlabelled=texts[6:])
    for epochs, passes in ((None, 4), (2, 2)):
        config = tiny.TinyConfig(hidden_size=16, heads=2, layers=1, vocabulary=300, context=256, epochs=epochs)
        tiny.build_tiny(splits, TASKS["demo"], config, 0, "cpu")
        _, _, read, found, *_ = seen.pop()
        assert (len(read), found) == (12, passes)
