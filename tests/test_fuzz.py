"""Hostile input, a little of it (`benchmarks/fuzz.py` tries a hundred thousand): a result or our own error, never
anything else."""

import gzip
import json
import random
import tracemalloc

import pytest
from fuzzing import ROWS, TARGETS, Fuzzer, alarm, jsonl, spoil
from hypothesis import given
from hypothesis import strategies as st

from rllr.common.errors import InputError
from rllr.data.encoding import Encoder
from rllr.data.rows import load_examples
from rllr.model.loading import load_policy, load_tokenizer
from rllr.tasks import Task, load_task, parse_answer

SST2 = load_task("sst2")


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory):
    """{name of a target: Fuzzer}, each in a directory of its own."""
    root = tmp_path_factory.mktemp("fuzz")
    return {name: Fuzzer(name, root) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_accepted(fuzzers, name):
    """Otherwise the fuzzers would spoil what is refused anyway."""
    assert [fuzzers[name](seed) for seed in fuzzers[name].seeds] == ["result"] * len(fuzzers[name].seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_seeds(fuzzers, name):
    outcomes, rng = [], random.Random(name)
    for _ in range(60):
        outcomes.append(fuzzers[name](spoil(rng, fuzzers[name].seeds)))
    assert "refused" in outcomes or name == "parse_answer"


@pytest.mark.parametrize("name", TARGETS)
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(fuzzers, name, content):
    fuzzers[name](content)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["positive", "x", "tensor", "a/../b"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
JSON_TARGETS = [name for name in TARGETS if "json" in name or name == "pairs" or name == "rationale cache"]


@pytest.mark.parametrize("name", JSON_TARGETS)
@given(value=VALUES, data=st.data())
def test_any_value_in_any_field(fuzzers, name, value, data):
    """A field of a good file gets another value, or another name, or goes."""
    seed = fuzzers[name].seeds[0]
    lines = seed.decode().splitlines() if "jsonl" in fuzzers[name].path.name else [seed.decode()]
    row = json.loads(lines[0])
    inside = row[0] if isinstance(row, list) else row
    while isinstance(inside, dict) and inside:
        key = data.draw(st.sampled_from(sorted(inside)))
        if not isinstance(inside[key], dict) or not inside[key] or data.draw(st.booleans()):
            break
        inside = inside[key]
    inside[data.draw(st.sampled_from([key, "more"]))] = value
    fuzzers[name]("\n".join([json.dumps(row), *lines[1:]]).encode())


@given(
    text=st.text(max_size=200),
    before=st.sampled_from(["", "because\n", "\u202e", "e\u0301\n", "\x00", "\ufeff", "Label: sports\n"]),
)
def test_parse_answer_knows_labels_only(text, before):
    assert parse_answer(load_task("agnews"), before + text) in (None, *load_task("agnews").labels)


# ---- by hand


def examples_of(tmp_path, content, name="rows.jsonl", task=SST2, **options):
    (tmp_path / name).write_bytes(content)
    return load_examples(str(tmp_path / name), task, log=lambda line: None, **options)


@pytest.mark.parametrize(
    "text",
    [
        "שלום \u202eabc\u202c",
        "e\u0301" * 5,
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "a\x00b",
        "\ufeffa",
        "a\u2028b\u2029c\x85d",
        "ｆｕｌｌ",
        "\x1b[31mred",
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_texts_come_through_as_they_are(tmp_path, text, name):
    content = (
        f'text,label\r\n"{text}",positive\r\n'
        if name.endswith("csv")
        else json.dumps({"text": text, "label": "positive"}, ensure_ascii=False)
    )
    assert examples_of(tmp_path, content.encode(), name)[0].text == text


@pytest.mark.parametrize("escaped", [r"half \ud83d", r"\udc00 half", r"\ude00\ud83d turned round"])
def test_half_a_character_is_refused_with_its_line(tmp_path, escaped):
    content = jsonl(ROWS[:1]) + f'{{"text": "{escaped}", "label": "positive"}}\n'.encode()
    with pytest.raises(InputError, match=r"rows.jsonl:2: field 'text' has a lone surrogate"):
        examples_of(tmp_path, content)
    assert examples_of(tmp_path, rb'{"text": "\ud83d\ude00", "label": "positive"}')[0].text == "😀"


def test_compressed_by_mistake(tmp_path):
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "rows.json"):
        with pytest.raises(InputError, match="is compressed with gzip; unpack it first"):
            examples_of(tmp_path, gzip.compress(jsonl(ROWS)), name)


def test_line_ends_and_byte_order_marks(tmp_path):
    plain = [example.text for example in examples_of(tmp_path, jsonl(ROWS))]
    for content in (
        jsonl(ROWS).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + jsonl(ROWS),
        jsonl(ROWS).replace(b"\n", b"\r"),
        jsonl(ROWS).rstrip(),
        jsonl(ROWS).decode().encode("utf-16"),
    ):
        assert [example.text for example in examples_of(tmp_path, content)] == plain
    with pytest.raises(InputError, match="rows.jsonl:1: not valid JSON|not UTF-8 text"):
        examples_of(tmp_path, jsonl(ROWS).decode().encode("utf-16-le"))


def test_ids_that_come_again_and_labels_in_other_spelling(tmp_path):
    rows = [
        {"id": "a", "text": str(i), "label": label}
        for i, label in enumerate(["positive", " Positive", "POSITIVE\n", "pOsItIvE\t"])
    ]
    found = examples_of(tmp_path, jsonl(rows))
    assert [example.id for example in found] == ["a", "a#2", "a#3", "a#4"] and {example.label for example in found} == {
        "positive"
    }
    with pytest.raises(InputError, match="two labels that differ only in case or space"):
        Task("t", ("yes", "YES "), "{text}")


@pytest.mark.parametrize(
    "text", ["a" * 10_000_000, "the soup was " * 800_000, "😀" * 2_500_000], ids=["one word", "words", "emoji"]
)
def test_a_line_of_ten_megabytes(toy, tmp_path, text):
    """Read, cut to the context and encoded in bounded time and memory; the text's beginning is what is left."""
    encoder, task = Encoder(load_tokenizer(toy.sft), load_policy(toy.sft)), load_task(str(toy.task))
    tracemalloc.start()
    with alarm(20):
        (example,) = examples_of(tmp_path, json.dumps({"text": text, "label": "good"}).encode(), task=task)
        (fitted,) = encoder.fit([example], task, 12, lambda line: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.startswith(fitted.text) and 5 < len(fitted.text) < 1000 and peak < 300e6
    assert len(encoder.prompt_ids(task.render_prompt(fitted.text))) <= encoder.context - 12


def test_a_mapping_that_is_vast_when_written_out(tmp_path):
    """Nine levels of ten references each in 300 bytes of YAML: a message that showed it would take a gigabyte."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)
    ]
    (tmp_path / "t.yaml").write_text("\n".join([*lines, "labels: *a9", "prompt: *a9"]))
    with alarm(20), pytest.raises(InputError, match="unknown field 'a0'"):
        load_task(str(tmp_path / "t.yaml"))
    nested = ", ".join(line.partition(": ")[2] for line in lines)
    (tmp_path / "t.yaml").write_text(f"labels: [a, b]\nprompt: [{nested}]\n")
    with alarm(20), pytest.raises(InputError, match="'prompt' must be text") as refused:
        load_task(str(tmp_path / "t.yaml"))
    assert len(str(refused.value)) < 500
