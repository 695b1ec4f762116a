"""Data files and hub data sets: every format comes back whole, every error names file, line and field."""

import csv
import gzip
import hashlib
import json
import os
import re
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rllr.common.errors import InputError
from rllr.data.row_reader import parse_mapping_flag
from rllr.data.rows import Source, load_examples, load_hub_examples, load_pairs, select_labelled, split_holdout
from rllr.tasks import TASKS, Example

SST2, STSB, MRPC, AGNEWS = TASKS["sst2"], TASKS["stsb"], TASKS["mrpc"], TASKS["agnews"]
ROWS = [
    {"id": "a", "text": "dull, overlong", "label": "negative"},
    {"id": "b", "text": 'a "great" film', "label": "positive"},
    {"id": "c", "text": "two\nlines\tand a tab", "label": "positive"},
    {"id": "d", "text": "NA", "label": "negative"},
]


def write(path: Path, content) -> Path:
    """`content`: bytes, text, or rows for a JSONL file."""
    if not isinstance(content, bytes | str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path: Path, rows: list[dict], delimiter=",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path, task=SST2, **options) -> list[Example]:
    return load_examples(path, task, **{"log": lambda line: None} | options)


def error(call, *args, **options) -> str:
    """The message of the InputError; one line, as a script prints it."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- formats


def write_as(suffix: str, path: Path, rows: list[dict]) -> Path:
    path = path / f"train{suffix}"
    if suffix == ".jsonl":
        return write(path, rows)
    if suffix == ".json":
        return write(path, json.dumps(rows))
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
        return path
    return write_csv(path, rows, "\t" if suffix == ".tsv" else ",")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_each_format_round_trips(tmp_path, suffix):
    examples = read(write_as(suffix, tmp_path, ROWS))
    assert [(e.id, e.text, e.label) for e in examples] == [(r["id"], r["text"], r["label"]) for r in ROWS]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_each_format_carries_pairs_scores_and_rationales(tmp_path, suffix):
    rationales = {"4": "nearly the same", "1": "little in common"}
    row = {
        "text": "A man runs.",
        "text_b": "A man is running.",
        "score": 3.8,
        "rationale": "same act",
        "rationales": json.dumps(rationales) if suffix == ".csv" else rationales,
    }
    (example,) = read(write_as(suffix, tmp_path, [row]), STSB)
    assert example == Example(example.id, row["text"], row["text_b"], "4", 3.8, "same act", rationales)


def test_parquet_with_special_path_class_labels_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "a=b[1]*"
    folder.mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = [{"text": "dull", "label": 0}, {"text": "great", "label": 1}]
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    (tmp_path / "x.parquet").rename(folder / "x.parquet")
    examples = read(folder / "x.parquet")
    assert [(e.place, e.label) for e in examples] == [("x.parquet:1", "negative"), ("x.parquet:2", "positive")]
    assert not (tmp_path / "cache").exists()


def test_json_lines_named_json_and_a_single_object(tmp_path):
    assert len(read(write(tmp_path / "lines.json", ROWS))) == 4
    assert len(read(write(tmp_path / "one.json", json.dumps(ROWS[0], indent=2)))) == 1


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    lines = "".join(json.dumps(row) + "\r\n" for row in ROWS)
    table = 'text,label\r\ndull,negative\r\n\r\n"great\r\nfilm",positive\r\n'
    examples = read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines.encode()))
    assert [e.text for e in examples] == [row["text"] for row in ROWS]
    examples = read(write(tmp_path / "a.csv", b"\xef\xbb\xbf" + table.encode()))
    assert [(e.place, e.text) for e in examples] == [("a.csv:2", "dull"), ("a.csv:4", "great\r\nfilm")]


def test_a_text_may_hold_unicode_line_breaks(tmp_path):
    row = {"text": "one\u2028two\x85three", "label": "positive"}
    (example,) = read(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n"))
    assert example.text == row["text"]


def test_tsv_reads_stray_quotes_as_characters(tmp_path):
    # As GLUE's files have them. Read as CSV, the two quotes would swallow a row without any error.
    lines = ["text\tlabel", '"dull start\tnegative', "fine\tpositive", 'dull end"\tnegative']
    assert [e.text for e in read(write(tmp_path / "a.tsv", "\n".join(lines)))] == ['"dull start', "fine", 'dull end"']
    assert [e.text for e in read(write(tmp_path / "b.tsv", "\n".join(lines[:3])))] == ['"dull start', "fine"]


def test_tsv_unwraps_quotes_that_pair_up(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"a ""great"" film"\tpositive\n')
    assert read(path)[0].text == 'a "great" film'
    path = write(tmp_path / "b.tsv", 'text\n"two\nlines"\n')
    assert [e.text for e in read(path, labels="optional")] == ["two\nlines"]


def test_columns_are_renamed_by_dict_flag_and_source(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"sentence": "dull", "gold": "Negative ", "label": "ignored", "key": 7}])
    columns = {"text": "sentence", "label": "gold", "id": "key"}
    expected = [Example("7", "dull", label="negative")]
    assert read(path, columns=columns) == expected
    assert read(path, columns="text=sentence, label=gold,id=key") == expected
    assert read(Source(path=str(path), columns=columns)) == expected


def test_label_map_renames_labels(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nchips,Sci/Tech\nwar,World\n")
    assert [e.label for e in read(path, AGNEWS, label_map="sci/tech=Technology")] == ["technology", "world"]


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3 ", "3.0"])
def test_an_ordinal_label_may_be_a_number(tmp_path, value):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "text_b": "y", "label": value}])
    assert read(path, STSB)[0].label == "3"


@pytest.mark.parametrize("score, label", [(2.5, "3"), (0.49, "0"), (4.5, "5"), ("1.5", "2"), (0, "0")])
def test_a_score_without_a_label_is_rounded_half_up(tmp_path, score, label):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "text_b": "y", "score": score}])
    assert (read(path, STSB)[0].label, read(path, STSB)[0].score) == (label, float(score))


def test_a_column_mapped_to_score_is_no_longer_the_label(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": "r", "text": "x", "text_b": "y", "label": 3.8}])  # as in GLUE's stsb
    assert read(path, STSB, columns="score=label")[0] == Example("r", "x", "y", "4", 3.8)
    assert "is '3.8', not a label" in (message := error(read, path, STSB))
    assert message.endswith("; is it a score? --columns score=<column>")
    path = write(tmp_path / "a.csv", "id,text,text_b,label,score\nr,x,y,2,\n")
    assert read(path, STSB)[0] == Example("r", "x", "y", "2", None)


def test_rationale_of_the_gold_label_is_found_among_rationales(tmp_path):
    rows = [{"text": "dull", "label": "negative", "rationales": {"Negative": "slow", "positive": None}}]
    (example,) = read(write(tmp_path / "a.jsonl", rows))
    assert (example.rationale, example.rationales) == ("slow", {"negative": "slow"})


def test_the_authors_format(tmp_path):
    rows = [
        {"instruction": "Classify.", "input": "dull", "output": "slow\nno plot\nLabel: Negative"},
        {"instruction": "great", "input": "", "output": "positive"},
        {"instruction": "fine", "output": "Label: positive"},
    ]
    examples = read(write(tmp_path / "sft.json", json.dumps(rows, indent=1)))
    assert [(e.text, e.label, e.rationale) for e in examples] == [
        ("dull", "negative", "slow\nno plot"),
        ("great", "positive", None),
        ("fine", "positive", None),
    ]
    assert examples[1].place == "sft.json:7"  # the line, in a file with one field a line


def test_the_authors_format_with_an_output_that_gives_no_label(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "x", "input": "dull", "output": "I think it is negative"}])
    message = error(read, path)
    assert f"{path}:1: field 'label' (column 'output') is 'I think it is negative', not a label" in message
    path = write(tmp_path / "b.jsonl", [{"instruction": "x", "input": "dull", "output": ["good", "bad"]}])
    assert f"{path}:1: field 'label' (column 'output') is a list: this is ranking data" in error(read, path)


def test_demo_data_by_name(monkeypatch):
    monkeypatch.setattr(
        "rllr.data.demo.demo_examples", lambda split: [Example(split, "x", label="positive")]
    )  # 1 s a call
    assert [read(name, TASKS["demo"])[0].id for name in ("demo", "demo:dev", "demo:test")] == ["train", "dev", "test"]
    assert "demo:train, demo:dev and demo:test" in error(read, "demo:devel", TASKS["demo"])
    assert "not those of task agnews" in error(read, "demo:dev", AGNEWS)


# ---- dropped rows, ids


def test_dropped_rows_are_counted_and_named(tmp_path):
    empty = {"text": " ", "label": "positive"}
    path = write(tmp_path / "a.jsonl", [ROWS[0], empty, {"text": "x"}, {"text": "y", "label": None}, *[empty] * 5])
    log = []
    assert len(read(path, log=log.append)) == 1
    assert log == [
        f"{path}: 9 rows read, 6 dropped (empty text): line 2, line 5, line 6, line 7, line 8, ..., "
        "2 dropped (no label): line 3, line 4"
    ]


@pytest.mark.parametrize("row", [
    {"text": "fine", "label": "splendid", "score": "high", "rationales": 3},
    {"instruction": "fine", "input": "", "output": ["one", "two"]}, {"instruction": "fine", "output": 7.5},
    {"instruction": "fine"},
])  # fmt: skip
def test_ignored_labels_may_be_anything(tmp_path, row):
    (example,) = read(write(tmp_path / "new.jsonl", json.dumps(row)), labels="ignored")
    assert (example.text, example.label, example.score, example.rationales) == ("fine", None, None, {})


def test_unlabelled_rows_are_kept_where_labels_are_not_required(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y", "label": "positive"}])
    assert [e.label for e in read(path, labels="optional")] == [None, "positive"]
    assert [e.label for e in read(write(tmp_path / "b.csv", "text\nx\n"), labels="optional")] == [None]


def test_no_row_left_is_an_error(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n,positive\nfine,\n")
    message = error(read, path)
    assert message == (
        f"{path}: no usable row: 2 rows read, 1 dropped (empty text): line 2, 1 dropped (no label): line 3"
    )


def test_repeated_ids_are_made_unique(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"id": name, "text": "x", "label": "positive"} for name in "aaba"]
        + [{"id": "a#2", "text": "x", "label": "positive"}],
    )
    log = []
    assert [e.id for e in read(path, log=log.append)] == ["a", "a#2", "b", "a#3", "a#2#2"]
    assert "3 repeated ids made unique with #2, #3, ...: line 2, line 4, line 5" in log[0]


def test_a_missing_id_is_a_hash_of_the_texts(tmp_path):
    """So a row keeps its id where it stands elsewhere, or is labelled otherwise; equal texts get running numbers."""
    text = '{"text": "x", "label": "positive"}\n\n{"text": "y", "label": "positive", "id": ""}\n'
    examples = read(write(tmp_path / "a.jsonl", text))
    assert [e.id for e in examples] == [hashlib.sha256(f'["{word}", ""]'.encode()).hexdigest()[:16] for word in "xy"]
    assert [e.place for e in examples] == ["a.jsonl:1", "a.jsonl:3"]
    rows = [{"text": "y", "label": "negative"}, {"text": "x"}, {"text": "y", "label": "positive"}]
    others, log = read(write(tmp_path / "b.json", json.dumps(rows)), labels="optional", log=(log := []).append), log
    assert [e.id for e in others] == [examples[1].id, examples[0].id, examples[1].id + "#2"]
    assert not any("repeated ids" in line for line in log)
    pair = [{"text": "x", "text_b": word, "label": 1} for word in "yz"]
    assert len({e.id for e in read(write(tmp_path / "c.jsonl", pair), STSB)}) == 2


@pytest.mark.parametrize("value, written", [(1.5, "1.5"), (0.0, "0.0"), (7, "7"), (True, "True"), (" q ", "q")])
def test_an_id_is_any_scalar(tmp_path, value, written):
    assert read(write(tmp_path / "a.jsonl", [{"id": value, "text": "x", "label": "positive"}]))[0].id == written


# ---- errors


def test_a_missing_file_a_directory_and_an_unknown_type(tmp_path):
    assert error(read, tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: no such file"
    assert error(read, tmp_path).startswith(f"{tmp_path}: is a directory; give one data file")
    assert "unknown file type '.txt'; the name must end in one of .jsonl" in error(read, write(tmp_path / "a.txt", "x"))
    assert "cannot be read" in error(read, "a\0b.jsonl")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", ""),
        ("a.jsonl", " \n\n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "text,label\n"),
        ("a.tsv", ""),
    ],
)
def test_a_file_without_rows(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert error(read, path) == f"{path}: holds no rows"


GOOD = '{"text": "x", "label": "positive"}\n'


@pytest.mark.parametrize(
    "name, content, line, problem",
    [
        ("a.jsonl", GOOD + '{"text": "x"', 2, "not valid JSON: Expecting ',' delimiter"),
        ("a.jsonl", GOOD + GOOD.strip() + GOOD, 2, "not valid JSON: Extra data"),
        ("a.jsonl", "[\n" + GOOD + "]", 1, "a JSON array belongs in a .json file"),
        ("a.jsonl", GOOD + "[1]\n", 2, "must be a JSON object of fields, got list"),
        ("a.jsonl", GOOD + "\n\n3\n", 4, "must be a JSON object of fields, got int"),
        ("a.jsonl", "[" * 100_000, 1, "JSON"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", 1, "JSON that cannot be read"),
        ("a.json", '[\n{"text": "x"},\n{"text": }\n]', 3, "not valid JSON: Expecting value"),
        ("a.json", "[\n" + GOOD + ",\n\n3\n]", 5, "must be a JSON object of fields, got int"),
        ("a.json", "\n[" + GOOD + ", 3]", 3, "must be a JSON object of fields, got int"),
        ("a.json", GOOD + "oops", 2, "not valid JSON"),
        (
            "a.csv",
            "text,label\nx,positive\na, b,negative\n",
            3,
            "has 3 fields where the header has 2; put quotes around",
        ),
        ("a.csv", 'text,label\n"x\ny",positive\n"z,negative\nv,positive\n', 4, "quotes do not pair up"),
        ("a.csv", "text,text\nx,y\n", 1, "the header names a column twice: 'text', 'text'"),
        ("a.tsv", "text\tlabel\nx\ty\tpositive\n", 2, "has 3 fields where the header has 2"),
    ],
)
def test_broken_files_name_the_line(tmp_path, name, content, line, problem):
    path = write(tmp_path / name, content)
    message = error(read, path)
    assert message.startswith(f"{path}:{line}: ") and problem in message


def test_bytes_that_are_no_text(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD.encode() + '{"text": "café"}'.encode("latin-1"))
    assert error(read, path) == (
        f"{path}:2: not UTF-8 text (byte 49); it looks like cp1252: give --encoding cp1252, or save the file as UTF-8"
    )
    for name in ("c.jsonl", "c.jsonl.gz", "c.parquet"):
        path = write(tmp_path / name, gzip.compress(GOOD.encode()))
        assert error(read, path) == f"{path}: is compressed with gzip; unpack it first (gunzip)"
    path = write(tmp_path / "d.parquet", GOOD)
    assert f"{path}: not a readable Parquet file: " in error(read, path)


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": ["x"], "label": "positive"}, "field 'text' must be text, got list ['x']"),
        ({"text": 3, "label": "positive"}, "field 'text' must be text, got int 3"),
        ({"text": "x", "label": "good"}, "field 'label' is 'good', not a label of task sst2: negative, positive; map"),
        ({"text": "x", "label": ["positive"]}, "field 'label' must be a word or a number, got list ['positive']"),
        ({"text": "x", "label": True}, "field 'label' is 'true', not a label"),
        ({"text": "x", "label": 1}, "field 'label' is '1', not a label of task sst2: negative, positive"),
        ({"label": "positive"}, "field 'text' is missing; the columns are 'label'"),
        ({"text": "x \ud800", "label": "positive"}, "field 'text' has a lone surrogate"),
        ({"text": "x", "label": "positive", "id": "\udc00"}, "field 'id' has a lone surrogate"),
        (
            {"text": "x", "label": "positive", "id": [1]},
            "field 'id' must be one value, got list [1]; --columns id= leaves",
        ),
        ({"text": "x", "label": "positive", "rationale": {}}, "field 'rationale' must be text, got dict {}"),
        (
            {"text": "x", "label": None, "rationales": ["r"]},
            "field 'rationales' must map labels to texts, got list ['r']",
        ),
        (
            {"text": "x", "label": None, "rationales": "{r"},
            "field 'rationales' is not valid JSON: Expecting property name",
        ),
        ({"text": "x", "label": None, "rationales": {"good": "r"}}, "field 'rationales' is 'good', not a label"),
        ({"text": "x", "label": None, "rationales": {"positive": 3}}, "field 'rationales' (column 'positive') must be"),
    ],
)
def test_bad_values_name_line_and_field(tmp_path, row, problem):
    path = write(tmp_path / "a.jsonl", [ROWS[0], row])
    assert error(read, path).startswith(f"{path}:2: {problem}")


def test_a_bad_value_in_a_renamed_column_names_the_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"sentence": 1, "label": "positive"}])
    assert f"{path}:1: field 'text' (column 'sentence') must be text" in error(read, path, columns="text=sentence")


def test_a_bad_score_of_an_ordinal_task(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "text_b": "y", "score": 5.5}])
    assert f"{path}:1: field 'score' is '6', not a label of task stsb: 0, 1, 2, 3, 4, 5" in error(read, path, STSB)


def test_missing_columns_name_those_present_and_the_flag(tmp_path):
    path = write(tmp_path / "a.csv", "sentence,gold\nx,positive\n")
    assert error(read, path) == (
        f"{path}: no column for the field 'text' of task sst2; the columns are 'sentence', 'gold'; "
        "say which it is with --columns text=<column>"
    )
    assert "--columns label=<column>" in error(read, path, columns="text=sentence")
    assert error(read, path, columns="text=Sentence") == (
        f"{path}: no column 'Sentence' (--columns text=Sentence); the columns are 'sentence', 'gold'"
    )


def test_scores_are_no_labels_of_a_task_without_a_scale(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "score": 1}])
    assert "no column for the field 'label' of task sst2" in error(read, path)


def test_a_pair_task_needs_both_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": "equivalent"}])
    assert "no column for the field 'text_b' of task mrpc" in error(read, path, MRPC)
    row = {"text": "x", "label": "equivalent"}
    path = write(tmp_path / "b.jsonl", [row | {"text_b": "y"}, row])
    assert f"{path}:2: field 'text_b' is missing" in error(read, path, MRPC)
    log = []
    path = write(tmp_path / "c.csv", "text,text_b,label\nx,y,equivalent\nx,,equivalent\n")
    assert len(read(path, MRPC, log=log.append)) == 1 and "1 dropped (empty text): line 3" in log[0]


def test_mapping_flags():
    assert parse_mapping_flag("text=sentence, label=gold") == {"text": "sentence", "label": "gold"}
    assert parse_mapping_flag("Sci/Tech=tech,0=bad", "--label_map") == {"Sci/Tech": "tech", "0": "bad"}
    assert parse_mapping_flag({0: "negative"}, "--label_map") == {"0": "negative"}
    assert parse_mapping_flag(None) == parse_mapping_flag("") == {}
    assert parse_mapping_flag("score=, id = ") == {"score": "", "id": ""}
    assert parse_mapping_flag("-1=,good=positive", "--label_map") == {"-1": "", "good": "positive"}
    assert "the field 'text' is needed; only id, score, rationale, rationales" in error(parse_mapping_flag, "text=")
    for value in ("text", "=a", "text=a,,label=b"):
        message = error(parse_mapping_flag, value)
        assert message.startswith(f"--columns {value!r}") and "not of the form name=value" in message
    assert "a name is given twice" in error(parse_mapping_flag, "text=a,text=b")
    assert "unknown field 'txt'" in error(parse_mapping_flag, "txt=a")
    assert "id, text, text_b, label, score, rationale, rationales" in error(parse_mapping_flag, {"txt": "a"})


def test_a_label_map_to_no_label(tmp_path):
    message = error(read, write(tmp_path / "a.jsonl", ROWS), label_map="good=pos")
    assert message == "--label_map good=pos: 'pos' is not a label of task sst2: negative, positive"


def test_a_source_is_a_file_or_a_data_set():
    assert "one of the two" in error(Source)
    assert "one of the two" in error(Source, path="a", dataset="b")


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: `hub(rows, names)` is what load_dataset then returns; `hub.calls`, what it was asked."""

    def serve(rows, names):
        features = Features({key: Value("string") for key in rows[0]} | {"label": ClassLabel(names=names)})
        data = Dataset.from_list(rows, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: serve.calls.append((args, kw)) or data)

    serve.calls = []
    return serve


def test_hub_class_names_become_labels(hub):
    hub([{"sentence": "dull", "label": 0}, {"sentence": "great", "label": 1}], ["negative", "positive"])
    examples = load_hub_examples("glue", SST2, config="sst2", split="dev", columns={"text": "sentence"}, log=print)
    assert [(e.place, e.text, e.label) for e in examples] == [
        ("glue/sst2/dev:1", "dull", "negative"),
        ("glue/sst2/dev:2", "great", "positive"),
    ]
    assert hub.calls == [(("glue", "sst2"), {"split": "dev"})]


def test_hub_names_in_another_order_and_case(hub):
    row = {"text": "a", "text_b": "b"}
    hub([row | {"label": 0}, row | {"label": 1}], ["NOT_equivalent", "equivalent"])
    source = Source(dataset="glue", dataset_config="mrpc")
    assert [e.label for e in read(source, MRPC)] == ["not_equivalent", "equivalent"]


def test_hub_names_that_do_not_fit_need_a_label_map(hub):
    hub([{"text": "war", "label": 0}, {"text": "chips", "label": 3}], ["World", "Sports", "Business", "Sci/Tech"])
    message = error(load_hub_examples, "ag_news", AGNEWS)
    assert message.startswith(
        "ag_news/train: row 2: field 'label' is 'Sci/Tech' (the data set's labels: World, Sports, Business, Sci/Tech), "
        "not a label of task agnews: business, sports, technology, world; map it with --label_map"
    )
    for label_map in ("Sci/Tech=technology", {3: "technology"}):
        examples = read(Source(dataset="ag_news"), AGNEWS, label_map=label_map)
        assert [e.label for e in examples] == ["world", "technology"]


def test_hub_integers_are_not_mistaken_for_the_tasks_digits(hub):
    hub([{"text": "x", "label": 1}], ["1 star", "2 stars"])  # 1 means two stars
    assert "'2 stars'" in error(load_hub_examples, "yelp", TASKS["app_reviews"])


def test_hub_marks_a_missing_label_with_minus_one(hub):
    hub([{"text": "x", "label": -1}, {"text": "y", "label": 1}], ["negative", "positive"])
    log = []
    assert [e.label for e in read(Source(dataset="glue"), SST2, log=log.append)] == ["positive"]
    assert "1 dropped (no label): row 1" in log[0] and log[1].endswith("rows without a label: 1 ('-1': 1)")
    assert [e.label for e in read(Source(dataset="glue"), SST2, labels="optional")] == [None, "positive"]


def test_a_local_directory_laid_out_like_a_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "reviews").mkdir()
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "reviews" / "validation.parquet"))
    name = str(tmp_path / "reviews")
    examples = load_hub_examples(name, SST2, split="validation", log=print)
    assert [e.text for e in examples] == [row["text"] for row in ROWS]
    assert f"--dataset {name}, split 'test': cannot be loaded: " in error(load_hub_examples, name, SST2, split="test")


def test_an_unreachable_data_set(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert error(load_hub_examples, "glue", SST2, config="sst2") == (
        "--dataset glue --dataset_config sst2, split 'train': cannot be loaded: no network"
    )


# ---- preference pairs


def test_pairs_round_trip(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    log = []
    rows = [pair | {"kind": "label"}, pair, pair | {"rejected": " c"}, pair | {"chosen": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    assert load_pairs(path, log=log.append) == [pair | {"kind": "label"}, pair | {"kind": "file"}]
    assert log == [
        f"{path}: 4 rows read, 1 dropped (chosen equals rejected): line 3, "
        "1 dropped (empty prompt, chosen or rejected): line 4"
    ]


def test_pairs_in_the_authors_ranking_format(tmp_path):
    rows = [
        {"instruction": "Which?", "input": "dull", "output": ["good", "bad"]},
        {"instruction": "q", "output": ["a", "b"]},
    ]
    pairs = load_pairs(write(tmp_path / "a.json", json.dumps(rows)), log=print)
    assert pairs == [
        {"prompt": "Which?\ndull", "chosen": "good", "rejected": "bad", "kind": "file"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "kind": "file"},
    ]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "p", "chosen": ["c"], "rejected": "r"}, ":1: field 'chosen' must be text, got list"),
        ({"prompt": "p", "chosen": "c"}, ": no column 'rejected'; a pair has prompt, chosen and rejected"),
        ({"instruction": "p", "output": "ab"}, ":1: field 'output' must be the list [chosen, rejected], got 'ab'"),
        ({"instruction": "p", "output": ["c"]}, ":1: field 'output' must be the list [chosen, rejected], got ['c']"),
        ({"instruction": "p", "output": ["c", 3]}, ":1: field 'rejected' must be text, got int 3"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, ": no usable row: 1 rows read, 1 dropped (chosen equals"),
    ],
)
def test_bad_pairs(tmp_path, row, problem):
    path = write(tmp_path / "a.jsonl", [row])
    assert error(load_pairs, path).startswith(f"{path}{problem}")


# ---- labelled subset, hold-out


def numbered(n: int) -> list[Example]:
    return [Example(f"r{i}", f"text {i}", None, "positive", 1.0, "r", {"positive": "r"}) for i in range(n)]


def test_labelled_subset_is_seeded_nested_and_hides_the_gold():
    examples = numbered(200)
    small, rest = select_labelled(examples, 20, seed=1)
    large, _ = select_labelled(examples, 40, seed=1)
    assert len(small) == 20 and {e.id for e in small} < {e.id for e in large}
    assert small == [e for e in examples if e in small] and select_labelled(examples, 20, seed=1) == (small, rest)
    assert {e.id for e in small} != {e.id for e in select_labelled(examples, 20, seed=2)[0]}
    assert {e.id for e in small} == {e.id for e in select_labelled(examples[::-1], 20, seed=1)[0]}
    assert rest == [Example(e.id, e.text) for e in examples if e not in small]


def test_labelled_subset_counts_only_labelled_rows():
    examples = numbered(3) + [Example("u", "text")]
    assert len(select_labelled(examples, 3, seed=0)[0]) == 3
    message = error(select_labelled, examples, 4, 0)
    assert message == "cannot keep the labels of 4 examples: only 3 have one (the least is 1)"
    assert "of 0 examples" in error(select_labelled, examples, 0, 0)


def test_holdout_by_number_and_share():
    examples = numbered(200)
    kept, held = split_holdout(examples, 50, seed=0)
    assert len(held) == 50 and sorted(kept + held, key=examples.index) == examples
    assert split_holdout(examples, 0.25, seed=0) == (kept, held)
    assert split_holdout(examples, 50, seed=1) != (kept, held)
    assert len(split_holdout(examples, 0.001, seed=0)[1]) == 1
    for amount in (0, -1, 200, 1.5, 1.0 * 300, float("nan")):
        assert f"cannot hold out {amount} of 200 examples" in error(split_holdout, examples, amount, 0)


def test_labelled_and_held_out_rows_are_drawn_by_class():
    """450 a, 45 b, 5 c: every hundredth as in the whole; the first rows drawn show each class; a class of one row is
    kept."""
    examples = [Example(f"r{i}", "", label="a" if i % 100 < 90 else "b" if i % 100 < 99 else "c") for i in range(500)]

    def counts(rows):
        return [sum(e.label == label for e in rows) for label in "abc"]

    for seed in range(3):
        chosen = [counts(select_labelled(examples, n, seed)[0]) for n in (3, 100, 200)]
        assert (
            chosen == [[1, 1, 1], [89, 10, 1], [179, 19, 2]]
            or all(abs(got - share) <= 1 for (got, share) in zip(sum(chosen[1:], []), [90, 9, 1, 180, 18, 2]))
            and chosen[0] == [1, 1, 1]
        )
        assert counts(split_holdout(examples, 0.1, seed)[1]) in ([45, 5, 0], [45, 4, 1], [44, 5, 1], [46, 4, 0])
    alone = examples[:98] + [Example("only", "", label="c")]
    assert all(e.id != "only" for seed in range(9) for e in split_holdout(alone, 0.2, seed)[1])


def test_holdout_and_labelled_subset_are_drawn_independently():
    # One shared order would make the labelled rows exactly the held-out ones, whatever else is drawn.
    examples = numbered(1000)
    held = {e.id for e in split_holdout(examples, 500, seed=0)[1]}
    labelled = {e.id for e in select_labelled(examples, 500, seed=0)[0]}
    assert 200 < len(held & labelled) < 300


# ---- the real data


REAL = Path(os.environ.get("RLLR_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set RLLR_DATA to a directory with <task>/dev.jsonl")
@pytest.mark.parametrize("name", [name for name in TASKS if name != "demo"])
def test_real_data(name):
    path = REAL / name / "dev.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    log = []
    examples = load_examples(path, TASKS[name], log=log.append)
    gold = re.findall(r'"label": "([^"]*)"', path.read_text(encoding="utf-8"))
    assert [e.label for e in examples] == gold and log == [f"{path}: {len(gold)} rows read"]
    if name == "stsb":  # the labels come out the same from the scores alone: the label column is taken for the id
        assert [e.label for e in load_examples(path, TASKS[name], columns="id=label", log=log.append)] == gold
