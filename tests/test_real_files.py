"""Tables as people have them: spreadsheets' CSV, other encodings, other words for a missing label, columns that share
a name."""

import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from test_data import STSB, error, read, write

from rllr.common.errors import InputError
from rllr.data.rows import NoSuchSplit, Source, load_examples
from rllr.tasks import TASKS, Example, Task, load_task

SST2 = TASKS["sst2"]
SPAM = Task("spam", ("ham", "spam"), "Message: {text}")
TWO = [("dull", "negative"), ("great", "positive")]


def texts_and_labels(*arguments, **named):
    return [(e.text, e.label) for e in read(*arguments, **named)]


# ---- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("semicolon.csv", "\ufefftext;label\ndull;negative\ngreat;positive\n"),
        ("tab.csv", "text\tlabel\ndull\tnegative\ngreat\tpositive\n"),
        ("pipe.csv", "text|label\ndull|negative\ngreat|positive\n"),
        ("said.csv", "sep=;\r\ntext;label\r\ndull;negative\r\ngreat;positive\r\n"),
        ("said2.csv", "sep=,\ntext,label\ndull,negative\ngreat,positive\n"),
        ("said3.csv", '"sep=\t"\ntext\tlabel\ndull\tnegative\ngreat\tpositive\n'),
    ],
)
def test_delimiters_are_recognised(tmp_path, name, content):
    assert texts_and_labels(write(tmp_path / name, content)) == TWO


def test_a_comma_that_splits_the_header_is_the_delimiter(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label,a;b;c;d;e\n"dull; slow",negative,\n')
    assert texts_and_labels(path) == [("dull; slow", "negative")]


def test_delimiter_and_encoding_by_flag(tmp_path):
    """The header alone would say comma; the bytes are no UTF-8."""
    content = "text~label, as given\nun café très agréable~positive\n".encode("cp1252")
    path = write(tmp_path / "a.csv", content)
    source = Source(path=str(path), delimiter="~", encoding="cp1252", columns={"label": "label, as given"})
    assert texts_and_labels(source) == [("un café très agréable", "positive")]
    for delimiter in ("tab", "\\t", "\t"):
        tabs = write(tmp_path / "b.csv", "text,\tlabel\ndull\tnegative\n")
        assert texts_and_labels(Source(path=str(tabs), delimiter=delimiter, columns={"text": "text,"})) == TWO[:1]
    assert error(read, Source(path=str(path), delimiter="<>", encoding="cp1252")).startswith(
        "--delimiter '<>': give one character"
    )
    assert error(read, Source(path=str(path), encoding="klingon")).startswith("--encoding 'klingon': no such encoding")
    assert f"{path}:2: not gb18030 text" in error(read, Source(path=str(path), encoding="gb18030"))


def test_utf16_with_its_mark(tmp_path):
    path = write(tmp_path / "b.csv", "text,label\ndull,negative\ngreat,positive\n".encode("utf-16"))
    assert texts_and_labels(path) == TWO


def test_bytes_that_have_no_meaning_in_cp1252(tmp_path):
    assert "it looks like latin-1: give --encoding latin-1" in error(
        read, write(tmp_path / "a.csv", b"text,label\n\x81,x\n")
    )


def test_a_field_of_any_length(tmp_path):
    long = "word " * 40_000
    assert texts_and_labels(write(tmp_path / "a.csv", f"text,label\n{long},negative\n")) == [(long, "negative")]


def test_columns_without_a_name_are_left_out(tmp_path):
    path = write(tmp_path / "a.csv", "v1,v2,,,\nspam,win,x,,\nham,hello,,,\n")
    assert texts_and_labels(path, SPAM, columns="text=v2,label=v1") == [("win", "spam"), ("hello", "ham")]
    assert "the columns are 'v1', 'v2';" in error(read, path, SPAM)


def test_a_missing_header_is_told(tmp_path):
    path = write(tmp_path / "a.csv", '"negative","awful music, no plot"\n"positive","lovely"\n')
    for columns in ("", "text=sentence"):
        assert error(read, path, columns=columns) == (
            f"{path}: has no header: its first line is a row ('negative', 'awful music, no plot'); write the columns' "
            "names above it, "
            "for example text,label"
        )
    # a column that is called like a label beside real ones
    assert "no column for the field 'label'" in error(read, write(tmp_path / "b.csv", "text,positive\nx,1\n"))


@pytest.mark.parametrize(
    "content", ['{"text": ["a", "b"], "label": [0, 1]}', '{"text": {"0": "a"}, "label": {"0": 1}}']
)
def test_column_wise_json_is_told(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    assert error(read, path).startswith(
        f"{path}: is column-wise JSON, as pandas writes it by default; write a row per line: df.to_json"
    )


def test_a_git_lfs_pointer_is_told(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert "is a git-lfs pointer, not the file itself; fetch it with: git lfs pull" in error(
            read, write(tmp_path / name, pointer)
        )


# ---- columns that share a name ---------------------------------------------------------------------------------------


def test_score_is_read_where_there_is_a_scale(tmp_path):
    path = write(tmp_path / "a.csv", "text,label,score\ndull,negative,high\n")
    assert read(path)[0].score is None
    pair = write(tmp_path / "b.csv", "text,text_b,label,score\nx,y,2,high\n")
    assert "field 'score' must be a finite number, got 'high'" in error(read, pair, STSB)
    assert read(pair, STSB, columns="score=")[0].score is None
    for value in ("nan", "inf", "true"):
        assert "must be a finite number" in error(
            read, write(tmp_path / "c.csv", f"text,text_b,label,score\nx,y,2,{value}\n"), STSB
        )


@pytest.mark.parametrize(
    "field, value", [("rationale", 0), ("rationales", ["one", "two"]), ("rationales", "{"), ("id", ["a"])]
)
def test_a_column_can_be_left_out(tmp_path, field, value):
    path = write(tmp_path / "a.jsonl", [{"text": "dull", "label": "negative", field: value}])
    assert error(read, path).endswith(f"; --columns {field}= leaves this column out")
    assert texts_and_labels(path, columns=f"{field}=") == TWO[:1]


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, -1.0, "-1", None, "", " ", float("nan"), "nan", "NaN", "None", "null", "<NA>"])
def test_ways_to_say_that_there_is_no_label(tmp_path, value):
    path = write(tmp_path / "a.jsonl", [{"text": "dull", "label": value}, {"text": "great", "label": "positive"}])
    log = []
    assert texts_and_labels(path, labels="optional", log=log.append) == [("dull", None), ("great", "positive")]
    assert "rows without a label: 1 (" in log[1]
    assert texts_and_labels(path) == TWO[1:]


def test_unless_the_task_has_such_a_label(tmp_path):
    task = Task("t", ("-1", "0", "none"), "{text}")
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in (-1, "None", 0, -1.0)])
    assert [e.label for e in read(path, task)] == ["-1", "none", "0", "-1"]


def test_a_word_may_be_mapped_to_nothing(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "dull", "label": "?"}, {"text": "great", "label": "positive"}])
    assert "nothing after the =: no label" in error(read, path)
    assert texts_and_labels(path, labels="optional", label_map="?=") == [("dull", None), ("great", "positive")]


def test_numbers_of_every_type(tmp_path):
    labels = ["1", "2"]
    task = Task("t", tuple(labels), "{text}")
    table = pyarrow.table(
        {"text": ["a", "b"], "label": pyarrow.array([decimal.Decimal("1.00"), decimal.Decimal("2.00")])}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [e.label for e in read(tmp_path / "a.parquet", task)] == labels
    rows = [{"text": "x", "label": value} for value in (1, 1.0, "1", "1.0", " 1.00 ", "01", "1e0")]
    assert {e.label for e in read(write(tmp_path / "b.jsonl", rows), task)} == {"1"}
    for value in (1.5, "1.5", 11, "1x"):
        assert "not a label of task t" in error(
            read, write(tmp_path / "c.jsonl", [{"text": "x", "label": value}]), task
        )


def test_as_written_first_then_as_a_number(tmp_path):
    task = Task("t", ("1.0", "2.0", "10"), "{text}")
    rows = [{"text": "x", "label": value} for value in ("1.0", 1.0, 1, "2", "10.0", 10)]
    assert [e.label for e in read(write(tmp_path / "a.jsonl", rows), task)] == ["1.0", "1.0", "1.0", "2.0", "10", "10"]
    both = Task("t", ("1", "1.0"), "{text}")
    rows = [{"text": "x", "label": value} for value in ("1.0", "1", 1, 1.0)]
    assert [e.label for e in read(write(tmp_path / "b.jsonl", rows), both)] == ["1.0", "1", "1", "1.0"]


def test_one_letter_written_in_two_ways(tmp_path):
    task = Task("t", ("caf\u00e9", "the"), "{text}")
    rows = [{"text": "x", "label": "cafe\u0301"}, {"text": "y", "label": "CAFE\u0301"}]
    assert [e.label for e in read(write(tmp_path / "a.jsonl", rows), task)] == ["caf\u00e9"] * 2
    assert (
        read(write(tmp_path / "b.jsonl", [{"text": "x", "label": "no"}]), task, label_map="no=cafe\u0301")[0].label
        == "caf\u00e9"
    )
    with pytest.raises(InputError, match="differ only in case or space"):
        Task("t", ("caf\u00e9", "cafe\u0301"), "{text}")


@pytest.mark.parametrize(
    "written, meant",
    [
        ("010", "8"),
        ("0x1F", "31"),
        ("1_000", "1000"),
        ("1.10", "1.1"),
        ("1e3", None),
        ("1.0", None),
        ("2024-01-01", None),
    ],
)
def test_yaml_reads_some_words_as_other_numbers(tmp_path, written, meant):
    path = write(tmp_path / "t.yaml", f"labels: [{written}, other]\nprompt: '{{text}}'\n")
    if meant is None:
        assert load_task(str(path)).labels == (written, "other")
    else:
        assert f"{path}: field 'labels': YAML reads {written} as {meant}; put it in quotes" in error(
            load_task, str(path)
        )
    assert (
        load_task(str(write(tmp_path / "u.yaml", f"labels: ['{written}', other]\nprompt: '{{text}}'\n"))).labels[0]
        == written
    )


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_what_save_to_disk_wrote(tmp_path):
    rows = Dataset.from_list([{"text": text, "label": label} for text, label in TWO])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "several")
    assert texts_and_labels(Source(dataset=str(tmp_path / "one"))) == TWO
    assert texts_and_labels(Source(dataset=str(tmp_path / "several"), split="test")) == TWO[1:]
    for name, problem in (("one", "without splits"), ("several", "has no split 'validation'; it has 'train', 'test'")):
        with pytest.raises(NoSuchSplit, match=problem):
            load_examples(Source(dataset=str(tmp_path / name), split="validation"), SST2)
    assert error(read, tmp_path / "one").endswith(
        f"is a data set that `datasets` saved; give it as --dataset {tmp_path / 'one'}"
    )


def test_a_layout_of_the_hub_without_such_a_split(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [{"text": text, "label": label} for text, label in TWO])
    with pytest.raises(NoSuchSplit):
        load_examples(Source(dataset=str(tmp_path / "set"), split="validation"), SST2)


def test_examples_are_equal_wherever_they_stand(tmp_path):
    assert Example("a", "x", place="f:1") == Example("a", "x", place="g:2")
    rows = [
        json.loads(line) for line in (write(tmp_path / "a.jsonl", [{"id": "r", "text": "x"}])).read_text().splitlines()
    ]
    (example,) = read(write(tmp_path / "b.jsonl", rows), labels="optional")
    assert example == Example("r", "x") and example.name == "r (b.jsonl:1)" and Example("r", "x").name == "r"
    assert [e.name for e in read(write(tmp_path / "c.csv", "text\nx\nx\n"), labels="optional")] == [
        "c.csv:2",
        "c.csv:3",
    ]
