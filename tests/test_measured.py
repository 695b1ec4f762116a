"""What a run measures and says of its answers and epochs: too long ones, ties, missing labels, the console, flags and
their help."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from families import toy_tokenizer
from test_encoding import encoder_of
from toy_runs import ANSWER, TRAIN_ROWS, read_metrics, run, write_rows

import train_ppo
import train_rm
import train_sft
from rllr import evaluate, merge, predict, tiny
from rllr.common.config import parse_config
from rllr.common.errors import InputError, any_console
from rllr.metrics import rank
from rllr.model.records import read_record
from rllr.rationales import __main__ as rationales
from rllr.rationales.factory import make_writer
from rllr.rationales.words import words_of
from rllr.rationales.writers import EvidenceWriter
from rllr.tasks import TASKS, Example, Task

TASK = Task("t", ("good", "bad"), "{text}?")
ROOT = Path(__file__).parent.parent


# ---- answers are measured --------------------------------------------------------------------------------------------


def rows_of(rationale, text="x" * 60, reserve=16, context=64):
    """The row that SFT would learn, with the log; the toy tokenizer gives each byte an id."""
    log, encoder = [], encoder_of(toy_tokenizer(), context=context)
    fitted = encoder.fit([Example("a", text, label="good")], TASK, reserve, log.append)
    write = lambda example: TASK.render_answer("good", rationale)  # noqa: E731
    return encoder.rows(fitted, TASK, write, reserve, log.append)[0], log


def test_an_answer_within_the_limit_is_no_matter():
    (prompt, answer, name, _), log = rows_of("ab")
    assert (len(prompt), len(answer), name) == (48, len("ab\nLabel: good") + 1, "a") and len(log) == 1


def test_a_longer_answer_is_counted_and_its_text_cut_for_it():
    """30 tokens of answer in a context of 64 leave 34 for the prompt, where 48 would do for the limit of 16."""
    (prompt, answer, *_), log = rows_of("r" * 17)
    assert (len(prompt), len(answer)) == (34, 30)
    assert log[-1] == (
        "warning: 1 of 1 answers are longer than --max_new_tokens 16: a. The policy would learn to write what is then "
        "cut, without a "
        "label; raise it to 30, or shorten the rationales"
    )
    assert log[-2].startswith("1 of 1 texts were cut to fit the context of 64 tokens")


def test_a_longer_answer_to_a_short_text_cuts_nothing():
    (prompt, answer, *_), log = rows_of("r" * 17, text="x")
    assert (len(prompt), len(answer), len(log)) == (3, 30, 1)


def test_an_answer_that_does_not_fit_alone_is_refused():
    with pytest.raises(
        InputError,
        match="^row a: the prompt template takes 2 tokens and the answer 63, more than the model's context of 64",
    ):
        rows_of("r" * 50)


def test_the_three_cases_in_a_run(toy, tmp_path, capsys):
    """The base has 64 positions: a long rationale is told, one that cannot fit is refused before anything is
    written."""
    rows = [dict(row, rationales={row["label"]: "so " * (1 + i % 2) * 5}) for i, row in enumerate(TRAIN_ROWS)]
    data = [
        "--task",
        toy.task,
        "--train_file",
        write_rows(tmp_path / "rows.jsonl", rows),
        "--model",
        toy.base,
        "--epochs",
        1,
    ]
    output = run(train_sft.main, *data, *ANSWER, "--output_dir", tmp_path / "out")
    assert "answers are longer than --max_new_tokens 12: rows.jsonl:" in output
    rows[7]["rationales"][rows[7]["label"]] = "so " * 70
    data[3] = write_rows(tmp_path / "rows2.jsonl", rows)
    with pytest.raises(SystemExit):
        run(train_sft.main, *data, *ANSWER, "--output_dir", tmp_path / "none")
    assert (
        "error: row rows2.jsonl:8: the prompt template takes " in capsys.readouterr().err
        and not (tmp_path / "none").exists()
    )


# ---- ties ------------------------------------------------------------------------------------------------------------


def test_rank():
    """The metric first, then fewer parse failures, then the other metrics."""
    base = {"accuracy": 0.5, "macro_f1": 0.4, "parse_failures": 0.1}
    order = [
        base | {"accuracy": 0.4, "parse_failures": 0.0}, base | {"parse_failures": 0.2, "macro_f1": 0.9},
        base | {"macro_f1": 0.3}, base,
        base | {"parse_failures": 0.0, "macro_f1": 0.0}, base | {"accuracy": 0.6, "parse_failures": 1.0},
    ]  # fmt: skip
    ranks = [rank(TASKS["sst2"], scores) for scores in order]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)


def scripted(monkeypatch, module, results):
    """Evaluations that come out as told: (accuracy, parse failures)."""
    told = iter(results)
    monkeypatch.setattr(
        module,
        "answer_metrics",
        lambda *given: dict(zip(("accuracy", "parse_failures", "macro_f1"), (*next(told), 0.0))),
    )


@pytest.mark.parametrize("results, best", [
    ([(0, 1), (0, 1), (0, 1)], 3), ([(0.5, 0.1), (0.5, 0.0), (0.5, 0.1)], 2), ([(0.6, 0), (0.5, 0), (0.6, 0)], 3),
    ([(0.6, 0), (0.5, 0), (0.5, 0)], 1),
])  # fmt: skip
def test_of_equal_epochs_the_later_one_is_kept(toy, tmp_path, monkeypatch, results, best):
    scripted(monkeypatch, train_sft, results)
    run(train_sft.main, *toy.data, "--model", toy.base, "--epochs", 3, "--output_dir", tmp_path / "sft", *ANSWER)
    assert read_record(tmp_path / "sft")["eval"]["epoch"] == best


@pytest.mark.parametrize("results, best", [
    ([(0.5, 0.0)] * 4, 0), ([(0.5, 0.1), (0.5, 0.0), (0.5, 0.0), (0.4, 0.0)], 2),
    ([(0.5, 0.0), (0.6, 0.0), (0.6, 0.0), (0.6, 0.0)], 3),
])  # fmt: skip
def test_in_ppo_a_tie_with_the_start_keeps_the_start(toy, tmp_path, monkeypatch, results, best):
    scripted(monkeypatch, train_ppo, results)
    toy.ppo(tmp_path / "ppo", "--reward", "gold", "--eval_every", 1, steps=3)
    assert read_record(tmp_path / "ppo" / "best")["step"] == best


# ---- answers without a label -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["label", "rationale", "mixed", "gold"])
def test_an_answer_without_a_label_earns_nothing(toy, tmp_path, monkeypatch, reward):
    """Every label is lost: with a reward model no score is above the SFT mean minus the penalty; gold has its own
    say."""
    monkeypatch.setattr("rllr.answers.parse_answer", lambda task, answer: None)
    models = {"label": ["--label_rm", toy.label_rm], "rationale": ["--rationale_rm", toy.rationale_rm], "gold": []}
    models["mixed"] = models["label"] + models["rationale"]
    output = toy.ppo(
        tmp_path / "ppo", "--reward", reward, *models[reward], "--missing_label_penalty", 1.5, "--log_every", 1, steps=1
    )
    (line,) = read_metrics(tmp_path / "ppo", "judge/score")
    assert line["act/parse_failures"] == 1.0
    assert (line["judge/score"] <= -1.5) == (reward != "gold") and (reward != "gold" or line["judge/score"] >= -1.0)
    assert "warning: 100 % of the sampled answers have no readable label" in output


def test_sft_and_reward_model_warn_when_most_answers_have_no_label(toy, tmp_path):
    output = run(
        train_sft.main,
        *toy.data,
        "--model",
        toy.base,
        "--epochs",
        1,
        "--learning_rate",
        1e-6,
        "--output_dir",
        tmp_path / "sft",
        *ANSWER,
    )
    assert "warning: 100 % of the answers on dev have no readable label" in output
    assert (
        "no readable label" not in toy.outputs["rm-label"]
        and "no readable label" not in toy.outputs["sft"].splitlines()[-1]
    )
    output = run(
        train_rm.main,
        "--policy",
        toy.base,
        *toy.data,
        "--epochs",
        1,
        "--temperature",
        3,
        "--max_new_tokens",
        30,
        "--output_dir",
        tmp_path / "rm",
    )
    assert "of the answers sampled by the policy have no readable label" in output


# ---- before any model is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "main, flags",
    [(train_sft.main, ["--model", "no/model/here"]), (train_rm.main, []), (train_ppo.main, ["--reward", "gold"])],
)
def test_a_used_directory_is_refused_before_a_model_is_loaded(toy, tmp_path, monkeypatch, capsys, main, flags):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    for name in ("load_policy", "load_policy_and_reference"):
        monkeypatch.setattr(
            sys.modules[main.__module__], name, lambda *given, **named: pytest.fail("a model was loaded"), raising=False
        )
    start = toy.data if main is train_sft.main else ["--policy", toy.sft]
    with pytest.raises(SystemExit) as stop:
        run(main, *start, *flags, "--output_dir", tmp_path / "out")
    assert (
        stop.value.code == 2 and "already holds a run; give another, --resume or --overwrite" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "reward, part",
    [("rationale", "label"), ("gold", "label"), ("gold", "rationale"), ("label", "rationale"), ("os:getcwd", "label")],
)
def test_a_reward_model_that_is_not_used_is_refused(toy, tmp_path, capsys, reward, part):
    with pytest.raises(SystemExit):
        toy.ppo(tmp_path / "out", "--reward", reward, f"--{part}_rm", toy.label_rm)
    assert f"--{part}_rm is not used by --reward '{reward}'; did you mean --reward mixed?" in capsys.readouterr().err


# ---- flags -----------------------------------------------------------------------------------------------------------


CONFIGS = [
    train_sft.Config,
    train_rm.Config,
    train_ppo.Config,
    evaluate.Config,
    predict.Config,
    rationales.Config,
    tiny.Config,
    merge.Config,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__module__)
def test_every_flag_has_its_help(config, capsys):
    with pytest.raises(SystemExit):
        parse_config(config, ["--help"])
    text = " ".join(capsys.readouterr().out.partition("\noptions:")[2].split())
    for field in dataclasses.fields(config):
        found = (
            text[text.index(f"--{field.name} ") :]
            if f"--{field.name} " in text
            else text[text.index(f"--{field.name},") :]
        )
        words = found.partition("(default:")[0].removeprefix(f"--{field.name}").split()
        assert sum(word[0].islower() or word[0].isdigit() for word in words) >= 2, (field.name, words)


def test_a_value_may_begin_with_a_dash():
    for flags in (
        ["--label_map", "-1="],
        ["--label_map=-1="],
        ["--columns", "text=a", "--label_map", "-1=,-2=positive"],
    ):
        assert parse_config(train_sft.Config, flags).label_map.startswith("-1=")
    assert parse_config(train_ppo.Config, ["--seed", "-1"]).seed == -1
    for flags in (["--label_map", "--overwrite"], ["-x"], ["--overwrite", "-1="]):
        with pytest.raises(InputError):
            parse_config(train_sft.Config, flags)


@pytest.mark.slow
def test_python_without_asserts_checks_input_all_the_same(tmp_path):
    """python -O removes assert statements; --threshold q7 must be refused there, too."""
    done = subprocess.run(
        [sys.executable, "-O", ROOT / "train_ppo.py", "--reward", "mixed", "--threshold", "q7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr == "error: --threshold 'q7': give a number, or a quantile like q0.9\n"


def test_the_package_asserts_nothing():
    import ast

    for path in [*ROOT.glob("*.py"), *(ROOT / "rllr").rglob("*.py")]:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path


# ---- the console -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_lacks_a_character_gets_an_escape(toy, tmp_path, monkeypatch, encoding):
    """The first sample is printed before the policy is saved: no run may die there."""
    rows = [dict(row, text="π" + row["text"]) for row in TRAIN_ROWS]
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    data = [
        "--task",
        toy.task,
        "--train_file",
        write_rows(tmp_path / "rows.jsonl", rows),
        "--model",
        toy.base,
        "--epochs",
        1,
        "--show",
        2,
    ]
    train_sft.main([str(flag) for flag in [*data, *ANSWER, "--output_dir", tmp_path / "out"]])
    console.flush()
    assert (
        r"\u03c0the" in console.buffer.getvalue().decode(encoding)
        and (tmp_path / "out" / "model.safetensors").is_file()
    )


def test_streams_that_cannot_be_told_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    any_console()


def test_the_settings_line_is_short():
    """What differs from the defaults, wrapped; the rest is in run.json."""
    out = io.StringIO()
    from contextlib import redirect_stdout

    from rllr.common.log import show_config

    with redirect_stdout(out):
        show_config(
            train_ppo.Config(policy="p" * 30, steps=7, kl_coef=0.2, gamma=1.0, output_dir="o" * 60), "train_ppo"
        )
    lines = out.getvalue().splitlines()
    assert (
        lines[0].startswith("train_ppo: ")
        and f"policy={'p' * 30}" in out.getvalue()
        and all(len(line) <= 120 for line in lines)
    )
    assert "steps=7" in out.getvalue() and "kl_coef=0.2" in out.getvalue() and "gamma" not in out.getvalue()


# ---- evidence words --------------------------------------------------------------------------------------------------


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
