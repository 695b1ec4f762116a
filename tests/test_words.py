"""Words of every script, as evidence for a label."""

import pytest

from rllr.rationales.factory import make_writer
from rllr.rationales.words import words_of
from rllr.rationales.writers import EvidenceWriter
from rllr.tasks import Example, Task

TASK = Task("t", ("good", "bad"), "{text}?")


@pytest.mark.parametrize("text, words", [
    ("It's a well-made film, naïve!", ["It's", "a", "well-made", "film", "naïve"]),
    ("यह फिल्म बहुत अच्छी थी", ["यह", "फिल्म", "बहुत", "अच्छी", "थी"]),
    ("质量太差", ["质量", "量太", "太差"]), ("好", ["好"]), ("今天iPhone好用", ["今天", "iPhone", "好用"]),
    ("第0条", ["第", "0", "条"]),
    ("とても面白い。", ["とて", "ても", "も面", "面白", "白い"]), ("ดีมาก", ["ดีม", "มา", "าก"]),
    ("한국어 단어", ["한국어", "단어"]),
    ("می\u200cخواهم", ["می\u200cخواهم"]), ("cafe\u0301 noir", ["cafe\u0301", "noir"]), ("Good good GOOD", ["Good"]),
    ("... !", []),
])  # fmt: skip
def test_words_of_every_script(text, words):
    assert list(words_of(text).values()) == words
    assert list(words_of(text)) == [word.casefold() for word in words]


def test_evidence_in_hindi_and_chinese():
    hindi = [
        Example(f"h{i}", text, label=label)
        for i, (text, label) in enumerate([("फिल्म अच्छी", "good"), ("फिल्म बेकार", "bad")] * 3)
    ]
    assert EvidenceWriter(hindi, TASK).write(Example("n", "कहानी अच्छी"), "good").startswith("the words अच्छी and ")
    chinese = [
        Example(f"c{i}", text, label=label)
        for i, (text, label) in enumerate([("味道很好", "good"), ("质量太差", "bad")] * 3)
    ]
    assert "太差" in EvidenceWriter(chinese, TASK).write(Example("n", "服务太差"), "bad")


def test_a_warning_where_nearly_every_word_occurs_once():
    log, rows = [], [Example(str(i), f"word{i} other{i}", label="good" if i % 2 else "bad") for i in range(20)]
    make_writer("evidence", rows, TASK, log=log.append)
    assert log[0].startswith("warning: 40 of 40 words occur in one of the 20 labelled rows only")
    log.clear()
    make_writer("evidence", [Example(r.id, "the same words", label=r.label) for r in rows], TASK, log=log.append)
    assert log == []
