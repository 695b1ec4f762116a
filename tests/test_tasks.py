"""Tasks: prompts and answers to the letter, what parse_answer takes, the paper's eight, what a task file may hold."""

import json

import pytest

from rllr.common.errors import InputError
from rllr.tasks import TASKS, Task, load_task, parse_answer, split_answer

SST2, MRPC, APPS = TASKS["sst2"], TASKS["mrpc"], TASKS["app_reviews"]
OWN = {"labels": ["cat", "dog"], "prompt": "{text}\nCat or dog? {instruction}"}


def error(call, *args, **options) -> str:
    """The message of the InputError; one line, as a script prints it."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# ---- answers


@pytest.mark.parametrize(
    "text, label",
    [
        ("Label: positive", "positive"),
        ("the word dull suggests negative\nLabel: negative", "negative"),
        ("a reason\n\n  label:   POSITIVE \n\n", "positive"),
        ("LABEL: Negative\r\n", "negative"),
        ("Label:positive", "positive"),
        ("Label: positive\nLabel: negative", "negative"),  # the last line counts
        ("Label: positive\nbecause it is great", None),  # text after the label line
        ("Label: positive because it is great", None),
        ("Label: positive.", None),
        ("Label: 'positive'", None),
        ("Label: positive negative", None),
        ("Label: positive or negative", None),
        ("Label: neutral", None),
        ("Label: pos", None),
        ("Label:", None),
        ("Label", None),
        ("positive", None),
        ("The answer is Label: positive", None),
        ("My label: positive", None),
        ("this is positive\nno label line here", None),
        ("", None),
        (" \n\n\t", None),
    ],
)
def test_parse_answer(text, label):
    assert parse_answer(SST2, text) == label


@pytest.mark.parametrize("label", ["equivalent", "not_equivalent"])
def test_a_label_inside_another_is_not_taken_for_it(label):
    assert parse_answer(MRPC, f"both say it\nLabel: {label}") == label
    assert parse_answer(MRPC, "Label: not equivalent") is None
    assert parse_answer(MRPC, f"Label: nearly {label}") is None


def test_labels_that_are_numbers():
    assert [parse_answer(APPS, f"Label: {n}") for n in ("1", "5", "0", "10", "4.0")] == ["1", "5", None, None, None]


def test_the_tasks_own_spelling_comes_back():
    task = Task("t", ("North", "south"), "{text}")
    assert parse_answer(task, "LABEL: NORTH") == "North" and task.canonical_label(" SOUTH ") == "south"
    assert task.canonical_label("west") is None and task.canonical_label("") is None


def test_render_answer_in_both_formats():
    plain = Task("t", ("a", "b"), "{text}", answer_format="label")
    assert SST2.render_answer("negative", "it is dull") == "it is dull\nLabel: negative"
    assert SST2.render_answer("negative") == SST2.render_answer("negative", "") == "Label: negative"
    assert plain.render_answer("b", "it is dull") == "Label: b"


@pytest.mark.parametrize(
    "rationale", ["it is dull", "two\nlines", "Label: positive is what some would say", "a\nLabel: b"]
)
def test_what_is_rendered_is_read_back(rationale):
    answer = SST2.render_answer("negative", rationale)
    assert split_answer(SST2, answer) == (rationale, "negative")
    assert split_answer(SST2, answer + "\n and more ") == (f"{answer}\n and more", None)


def test_wrong_labels():
    assert TASKS["mnli"].wrong_labels("entailment") == ["contradiction", "neutral"]


# ---- prompts


def test_render_prompt_to_the_letter():
    assert SST2.render_prompt("a dull mess") == "Sentence: a dull mess\nNegative or positive? Reason, then label:"
    plain = load_task("mrpc", "label")
    assert plain.render_prompt("One.", "Two.") == (
        "First sentence: One.\nSecond sentence: Two.\nEquivalent or not_equivalent in meaning? Label:"
    )
    assert plain.labels == MRPC.labels and MRPC.answer_format == "rationale"  # the built-in task is left as it was


def test_braces_and_backslashes_in_texts_are_left_alone():
    first, second = "{text_b} {instruction} {0} {} {", r"\1 \g<0> {text} }}"
    assert MRPC.render_prompt(first, second) == (
        f"First sentence: {first}\nSecond sentence: {second}\n"
        "Equivalent or not_equivalent in meaning? Reason, then label:"
    )
    own = Task("t", ("a", "b"), 'Give {"json": 1} for {text}')
    assert own.render_prompt("x") == 'Give {"json": 1} for x'


# ---- the paper's eight

STARS, DEGREES = tuple("12345"), tuple("012345")


@pytest.mark.parametrize(
    "name, labels, is_pair, metric, metrics",
    [
        ("mr", ("negative", "positive"), False, "accuracy", {"accuracy", "macro_f1"}),
        ("app_reviews", STARS, False, "accuracy", {"accuracy", "macro_f1", "pearson"}),
        ("sst2", ("negative", "positive"), False, "accuracy", {"accuracy", "macro_f1"}),
        ("stsb", DEGREES, True, "pearson", {"accuracy", "pearson", "spearman"}),
        ("mrpc", ("equivalent", "not_equivalent"), True, "accuracy", {"accuracy", "macro_f1"}),
        ("qqp", ("duplicate", "not_duplicate"), True, "accuracy", {"accuracy", "macro_f1"}),
        ("mnli", ("contradiction", "entailment", "neutral"), True, "accuracy", {"accuracy", "macro_f1"}),
        ("agnews", ("business", "sports", "technology", "world"), False, "accuracy", {"accuracy", "macro_f1"}),
    ],
)
def test_the_papers_tasks(name, labels, is_pair, metric, metrics):
    task = load_task(name)
    assert task is TASKS[name] and task.name == name and task.answer_format == "rationale"
    assert sorted(task.labels) == sorted(labels) and task.is_pair == is_pair
    assert task.metric == metric and set(task.metrics) == metrics
    assert task.ordinal == (name in ("app_reviews", "stsb"))
    prompt = task.render_prompt("TEXT", "OTHER")
    assert "TEXT" in prompt and ("OTHER" in prompt) == is_pair and "{" not in prompt


# ---- own tasks


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_an_own_task_from_a_file(tmp_path, suffix):
    path = tmp_path / f"pets{suffix}"
    if suffix == ".json":
        write(path, OWN | {"metric": "macro_f1", "answer_format": "label"})
    else:
        prompt = 'prompt: "{text}\\nCat or dog? {instruction}"'
        write(path, f"labels: [cat, dog]\n{prompt}\nmetric: macro_f1\nanswer_format: label\n")
    task = load_task(str(path))
    assert (task.name, task.labels, task.metric, task.answer_format) == ("pets", ("cat", "dog"), "macro_f1", "label")
    assert set(task.metrics) == {"accuracy", "macro_f1"} and not task.is_pair
    assert task.render_prompt("it barks") == "it barks\nCat or dog? Label:"
    assert load_task(str(path), "rationale").render_prompt("it barks") == "it barks\nCat or dog? Reason, then label:"


def test_numbers_as_labels_and_what_ordinal_adds(tmp_path):
    content = "labels: [0, 1, 2]\nprompt: '{text} {text_b}'\nordinal: true\nname: own"
    task = load_task(write(tmp_path / "t.yaml", content))
    assert task.name == "own" and task.labels == ("0", "1", "2") and task.is_pair
    assert task.metrics == ("accuracy", "macro_f1", "pearson")


def test_an_unknown_field_names_the_file_and_the_field(tmp_path):
    path = write(tmp_path / "t.json", OWN | {"lables": ["a"]})
    message = error(load_task, path)
    assert message.startswith(f"{path}: unknown field 'lables'") and "labels" in message


@pytest.mark.parametrize("field", ["labels", "prompt"])
def test_a_missing_field(tmp_path, field):
    path = write(tmp_path / "t.json", {name: value for name, value in OWN.items() if name != field})
    assert error(load_task, path) == f"{path}: field {field!r} is missing"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": ["Cat", "cat "]}, "two labels that differ only in case or space"),
        ({"labels": ["cat"]}, "at least two labels"),
        ({"labels": []}, "at least two labels"),
        ({"labels": ["cat", " "]}, "empty"),
        ({"labels": ["cat", "a\nb"]}, "one of several lines"),
        ({"labels": "cat, dog"}, "'labels' must be a list"),
        ({"labels": ["cat", None]}, "'labels' must be a list of words"),
        ({"labels": [True, False]}, "quote yes, no"),
        ({"prompt": "Cat or dog?"}, "must contain {text}"),
        ({"prompt": ["{text}"]}, "'prompt' must be text"),
        ({"metric": "f1"}, "unknown metric 'f1'; choose from accuracy, macro_f1, pearson, spearman"),
        ({"metrics": ["accuracy", "bleu"]}, "unknown metric 'bleu'"),
        ({"metric": "macro_f1", "metrics": ["accuracy"]}, "not among 'metrics'"),
        ({"metric": "pearson"}, "need integer labels, got 'cat'"),
        ({"metrics": ["accuracy", "spearman"]}, "need integer labels, got 'cat'"),
        ({"ordinal": True}, "need integer labels, got 'cat'"),
        ({"labels": ["1", "--2"], "ordinal": True}, "need integer labels, got '--2'"),
        ({"labels": ["1", "²"], "ordinal": True}, "need integer labels, got '²'"),
        ({"labels": [1, 2.5], "ordinal": True}, "need integer labels, got '2.5'"),
        ({"ordinal": "yes"}, "'ordinal' must be true or false"),
        ({"answer_format": "json"}, "'json'; choose from rationale, label"),
        ({"answer_format": None}, "'answer_format' must be text"),
        ({"name": 3}, "'name' must be text"),
    ],
)
def test_a_field_at_fault_is_named(tmp_path, change, words):
    message = error(load_task, write(tmp_path / "pets.json", OWN | change))
    assert words in message and "pets" in message


def test_yaml_reads_yes_and_no_as_booleans_and_the_error_says_so(tmp_path):
    path = write(tmp_path / "t.yaml", "labels: [yes, no]\nprompt: '{text}'")
    assert error(load_task, path).startswith(f"{path}: field 'labels' must be a list of words (quote yes, no, on")
    assert load_task(write(tmp_path / "q.yaml", "labels: ['yes', 'no']\nprompt: '{text}'")).labels == ("yes", "no")


def test_broken_files_name_file_and_line(tmp_path):
    path = write(tmp_path / "t.yaml", "labels: [a, b]\nprompt: '{text}'\nmetric: [accuracy\n")
    assert error(load_task, path).startswith(f"{path}:4: not valid YAML: ")
    path = write(tmp_path / "t.json", '{"labels": ["a", "b"],\n "prompt": }')
    assert error(load_task, path).startswith(f"{path}:2: not valid JSON: ")
    assert "must hold a mapping" in error(load_task, write(tmp_path / "list.yaml", "- a\n- b\n"))
    assert "must hold a mapping" in error(load_task, write(tmp_path / "empty.yaml", ""))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error(load_task, str(tmp_path / "bytes.yaml"))
    assert error(load_task, str(tmp_path / "none.yaml")) == f"{tmp_path / 'none.yaml'}: no such file"


def test_an_unknown_name_lists_the_tasks():
    message = error(load_task, "sst3")
    assert message.startswith("--task 'sst3'") and all(name in message for name in TASKS)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Sentence: a dull\nmess\nNegative or positive? Reason, then label:", True),
        ("Sentence: a dull mess\nNegative or positive? Reason, then label: ", True),  # spaces around it do not matter
        ("a dull mess", False),
        ("Sentence: a dull mess", False),
        ("Review: a dull mess\nNegative or positive? Reason, then label:", False),
    ],
)
def test_what_can_be_a_prompt_of_the_task(text, is_one):
    assert TASKS["sst2"].is_prompt(text) == is_one


def test_every_task_knows_its_own_prompts():
    for task in TASKS.values():
        assert task.is_prompt(task.render_prompt("a (text) [of] {text_b} ^$", "another"))
