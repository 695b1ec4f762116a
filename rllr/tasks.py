"""Tasks: labels, prompt, answer format and metric. The paper's eight tasks are data in this file.

A task turns a labelled text into the two strings that everything else works on:

    prompt   "Sentence: a dull and overlong mess\\nNegative or positive? Reason, then label:"
    answer   "the words dull and overlong suggest negative\\nLabel: negative"

and it reads an answer back: only `parse_answer` decides which label a generated text gives.
"""

import re
import unicodedata
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from .common.errors import InputError, brief
from .common.texts import UNSPACED, check_text, marks, read_mapping

LABEL_PREFIX = "Label:"
ANSWER_FORMATS = ("rationale", "label")  # rationale and label line (default); label line only (the paper's plain SFT)
INSTRUCTIONS = {"rationale": "Reason, then label:", "label": "Label:"}  # replaces {instruction}
METRICS = ("accuracy", "macro_f1", "pearson", "spearman")


def same_word(word: str) -> str:
    """A word in the form in which words are compared: NFC, without case and without space around it."""
    return unicodedata.normalize("NFC", word).strip().casefold()


# Letters beside which a word may stand: those of scripts without spaces, and Hangul, whose nouns end in particles.
ATTACHED = UNSPACED + "\uac00-\ud7a3"


GAP = r"(?:_|\s+(?:an?\s+)?)"  # for a label's _ in a sentence: "not a duplicate" is not_duplicate


def _as_written(word):
    return GAP.join(map(re.escape, word.split("_")))


def whole_words(words) -> re.Pattern:
    """What finds these words, of any case, where they stand alone; of words that contain each other ("not_duplicate",
    "duplicate") the longer one."""
    longest_first = "|".join(map(_as_written, sorted(words, key=len, reverse=True)))
    letter = rf"[^\W{ATTACHED}]"
    return re.compile(f"(?<!{letter})(?:{longest_first})(?!{letter}|[{marks()}])", re.IGNORECASE)


def word_found(text, words):
    """Which of the words a text stands for that `whole_words` found."""
    return next(word for word in words if re.fullmatch(_as_written(word), text, re.IGNORECASE))


@dataclass(frozen=True)
class Example:
    """One row of data: a text (or pair), its label if it is known, and its rationales.

    `rationale` is the one for the gold label; `rationales` maps labels, also wrong ones, to a rationale for each.
    `score` is the gold number of an ordinal task (stsb's similarity). `place` is the row's file and line, for messages;
    rows that differ only in their place are equal.
    """

    id: str
    text: str
    text_b: str | None = None
    label: str | None = None
    score: float | None = None
    rationale: str | None = None
    rationales: dict[str, str] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def name(self):
        """The name of this row in messages: its id and its place, or only its place if the id is a hash of its text."""
        if self.place and re.fullmatch(r"[0-9a-f]{16}(#[0-9]+)?", self.id):
            return self.place
        return f"{self.id} ({self.place})" if self.place else self.id


@dataclass(frozen=True)
class Task:
    """One text-understanding task.

    `prompt` contains `{text}`, for pair tasks also `{text_b}`, and `{instruction}` in the place of the instruction of
    the answer format ("Reason, then label:"). `metric` names the metric that chooses epochs and checkpoints (higher is
    better); `metrics` are the ones that are reported. An `ordinal` task has integer labels on a scale, so Pearson and
    Spearman apply; they compare with the `score` of a row if it has one.
    """

    name: str
    labels: tuple[str, ...]
    prompt: str
    metric: str = "accuracy"
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    ordinal: bool = False
    answer_format: str = "rationale"

    def __post_init__(self):
        name = self.name if isinstance(self.name, str) else ""
        if not re.fullmatch(r"\w[\w .+-]{0,79}", name) or name.endswith((" ", ".")):  # directories get this name
            rule = "must be letters, digits, spaces, and . _ + - inside, at most 80 of them"
            raise InputError(f"task {self.name!r:.90}: field 'name' {rule}")
        where, given = f"task {self.name!r}", brief(list(self.labels))
        check_text("\n".join((self.prompt, *self.labels)), f"{where}: prompt or labels")
        labels = [label.strip() for label in self.labels]
        object.__setattr__(self, "labels", tuple(labels))  # the dataclass is frozen
        if len(labels) < 2:
            raise InputError(f"{where}: field 'labels' needs at least two labels, got {given}")
        if any(not label or "\n" in label for label in labels):
            raise InputError(f"{where}: field 'labels' has an empty label or one of several lines: {given}")
        if len({same_word(label) for label in labels}) < len(labels):
            raise InputError(f"{where}: field 'labels' has two labels that differ only in case or space: {given}")
        if "{text}" not in self.prompt:
            raise InputError(f"{where}: field 'prompt' must contain {{text}} (and {{text_b}} for a pair task)")
        for name in (self.metric, *self.metrics):
            if name not in METRICS:
                raise InputError(f"{where}: unknown metric {brief(name)}; choose from {', '.join(METRICS)}")
        if self.metric not in self.metrics:
            problem = f"is {brief(self.metric)}, which is not among 'metrics' {brief(list(self.metrics))}"
            raise InputError(f"{where}: field 'metric' {problem}")
        if self.ordinal or {"pearson", "spearman"} & set(self.metrics):
            for label in labels:
                if not re.fullmatch(r"-?[0-9]+", label):
                    raise InputError(f"{where}: Pearson and Spearman need integer labels, got {brief(label)}")
        if self.answer_format not in ANSWER_FORMATS:
            choices = f"choose from {', '.join(ANSWER_FORMATS)}"
            raise InputError(f"{where}: answer_format {brief(self.answer_format)}; {choices}")

    @property
    def is_pair(self) -> bool:
        return "{text_b}" in self.prompt

    def render_prompt(self, text: str, text_b: str | None = None) -> str:
        """The prompt of one text (or pair), without chat template. Braces inside the texts do not change."""
        values = {"{text}": text, "{text_b}": text_b or "", "{instruction}": INSTRUCTIONS[self.answer_format]}
        return re.sub(r"\{(text|text_b|instruction)\}", lambda match: values[match.group()], self.prompt)

    def prompt_of(self, example: Example) -> str:
        """The prompt of one row."""
        return self.render_prompt(example.text, example.text_b)

    def is_prompt(self, text: str) -> bool:
        """Whether a text can be the prompt of some row."""
        pattern = re.escape(self.render_prompt("\0", "\0")).replace(re.escape("\0"), ".*")
        return re.fullmatch(pattern, text.strip(), re.DOTALL) is not None

    def render_answer(self, label: str, rationale: str | None = None) -> str:
        """The answer with this label: rationale, newline, `Label: <label>`; only the label line for format 'label'."""
        line = f"{LABEL_PREFIX} {label}"
        if self.answer_format == "label" or not rationale:
            return line
        return f"{rationale}\n{line}"

    def canonical_label(self, text: str) -> str | None:
        """The task's spelling of a label; case, outer space and Unicode form may differ. None if it is no label."""
        wanted = same_word(text)
        return next((label for label in self.labels if same_word(label) == wanted), None)

    def wrong_labels(self, label: str) -> list[str]:
        return [other for other in self.labels if other != label]


def parse_answer(task: Task, text: str) -> str | None:
    """The label that an answer gives, or None: a *parse failure*, which is counted and is a wrong answer.

    The last non-empty line must be exactly `Label: <label>` with one of the task's labels; case and outer space are
    ignored. We guess nothing: a label inside a sentence, two labels on the line, or text after the label is a failure.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines or not lines[-1].casefold().startswith(LABEL_PREFIX.casefold()):
        return None
    return task.canonical_label(lines[-1][len(LABEL_PREFIX) :])


def split_answer(task: Task, text: str) -> tuple[str, str | None]:
    """(rationale, label) of an answer; (whole text, None) on a parse failure."""
    label = parse_answer(task, text)
    if label is None:
        return text.strip(), None
    return "\n".join(text.rstrip().split("\n")[:-1]).strip(), label


_SENTIMENT = "{kind}: {{text}}\nNegative or positive? {{instruction}}"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("demo", ("negative", "positive"), _SENTIMENT.format(kind="Product review")),
        Task("mr", ("negative", "positive"), _SENTIMENT.format(kind="Movie review")),
        Task("sst2", ("negative", "positive"), _SENTIMENT.format(kind="Sentence")),
        Task(
            "app_reviews",
            ("1", "2", "3", "4", "5"),
            "App review: {text}\nHow many stars, 1 to 5? {instruction}",
            metrics=("accuracy", "macro_f1", "pearson"),
            ordinal=True,
        ),
        Task(
            "stsb",
            ("0", "1", "2", "3", "4", "5"),
            "First sentence: {text}\nSecond sentence: {text_b}\nHow similar in meaning, 0 to 5? {instruction}",
            metric="pearson",
            metrics=("pearson", "spearman", "accuracy"),
            ordinal=True,
        ),
        Task(
            "mrpc",
            ("equivalent", "not_equivalent"),
            "First sentence: {text}\nSecond sentence: {text_b}\nEquivalent or not_equivalent in meaning? {instruction}",
        ),
        Task(
            "qqp",
            ("duplicate", "not_duplicate"),
            "First question: {text}\nSecond question: {text_b}\nDuplicate or not_duplicate? {instruction}",
        ),
        Task(
            "mnli",
            ("contradiction", "entailment", "neutral"),
            "Premise: {text}\nHypothesis: {text_b}\nContradiction, entailment or neutral? {instruction}",
        ),
        Task(
            "agnews",
            ("business", "sports", "technology", "world"),
            "News: {text}\nBusiness, sports, technology or world? {instruction}",
        ),
    )
}


def load_task(name_or_path: str, answer_format: str | None = None) -> Task:
    """A built-in task by name, or a user's task from a YAML or JSON file with the fields of `Task`.

    InputError for an unknown name, an unreadable file, an unknown or missing field, or a field of the wrong type.
    """
    path = Path(name_or_path)
    if name_or_path in TASKS:
        task = TASKS[name_or_path]
    elif path.suffix.lower() in (".yaml", ".yml", ".json"):
        task = _task_from_file(path)
    else:
        known = ", ".join(TASKS)
        raise InputError(f"--task {name_or_path!r} is neither a built-in task ({known}) nor a .yaml or .json task file")
    return replace(task, answer_format=answer_format) if answer_format else task


def _refuse_reread_words(path: Path, labels: list):
    """InputError for a label that YAML reads as a number with another spelling: 010 is octal, 1_000 a thousand."""
    # The nodes of the document have every scalar as it is written.
    document = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    written = next(node for key, node in document.value if key.value == "labels").value
    for value, word in zip(labels, (node.value for node in written)):
        if type(value) in (int, float) and str(value) != word:
            raise InputError(f"{path}: field 'labels': YAML reads {word} as {value}; put it in quotes")


def _task_from_file(path: Path) -> Task:
    """A user's task. Checks the types of the fields; `Task` itself checks their values."""
    mapping = read_mapping(path)
    mapping.setdefault("name", path.stem)
    known = {f.name for f in fields(Task)}
    for key in mapping:
        if key not in known:
            raise InputError(f"{path}: unknown field {brief(key)}; a task has {', '.join(sorted(known))}")
    for key in ("labels", "prompt"):
        if key not in mapping:
            raise InputError(f"{path}: field {brief(key)} is missing")
    if path.suffix.lower() != ".json" and isinstance(mapping["labels"], list):
        _refuse_reread_words(path, mapping["labels"])
    for key in ("labels", "metrics"):
        if key in mapping:
            no_words = (list, dict, bool, type(None))
            if not isinstance(mapping[key], list) or any(isinstance(value, no_words) for value in mapping[key]):
                rule = "must be a list of words (quote yes, no, on and off in YAML)"
                raise InputError(f"{path}: field {brief(key)} {rule}")
            mapping[key] = tuple(str(value) for value in mapping[key])
    for key in ("name", "prompt", "metric", "answer_format"):
        if key in mapping and not isinstance(mapping[key], str):
            raise InputError(f"{path}: field {brief(key)} must be text, got {brief(mapping[key])}")
    if not isinstance(mapping.get("ordinal", False), bool):
        raise InputError(f"{path}: field 'ordinal' must be true or false")
    if mapping.get("ordinal") and "metrics" not in mapping:
        mapping["metrics"] = ("accuracy", "macro_f1", "pearson")
    if "metric" in mapping and "metrics" not in mapping:
        mapping["metrics"] = tuple(dict.fromkeys((mapping["metric"], "accuracy", "macro_f1")))
    return Task(**mapping)
