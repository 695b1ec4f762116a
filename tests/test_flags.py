"""The flags of every command: help, values that begin with a dash, what is refused before a model is loaded."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import run

import train_ppo
import train_rm
import train_sft
from rllr import evaluate, merge, predict, tiny
from rllr.common.config import parse_config
from rllr.common.errors import InputError
from rllr.rationales import __main__ as rationales

ROOT = Path(__file__).parent.parent


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
