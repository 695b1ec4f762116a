"""Flags and settings files: values typed by their fields, flags over file, mistakes as InputErrors that name them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sft
from rllr.common.config import Settings, check_divisible, flag, parse_config
from rllr.common.errors import InputError, RunError, command
from rllr.tasks import load_task


@dataclass
class Base(Settings):
    GROUP = "data"
    task: str | None = flag(None, "which task, 100 % of it")


@dataclass
class Config(Base):
    GROUP = "optimisation"
    steps: int = flag(10, "how many steps")
    rate: float = flag(0.5, "learning rate")
    limit: float | None = flag(None, "an upper bound")
    rows: int | None = flag(7, "at most")
    name: str = flag("x", "of the run")
    models: list | None = flag(None, "directories")
    fast: bool = flag(False, "skip the checks")
    maybe: bool | None = flag(None, "decided later")


@dataclass
class Needy:
    output: str = flag(help="where it goes")
    other: int = flag(help="and another")
    extra: int = 1


@dataclass
class Bounded(Settings):
    steps: int = flag(10, above=0)
    rate: float = flag(0.5, at_least=0)
    rows: int | None = flag(7, between=(6, 9))
    name: str | None = flag("x", choices=("x", "y"))


def error(*argv, cls=Config) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(cls, list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(content, suffix=".yaml"):
        path = tmp_path / f"settings{suffix}"
        path.write_text(content)
        return str(path)

    return write


def test_defaults():
    assert parse_config(Config, []) == Config()


def test_flags_are_typed_by_their_field():
    argv = "--steps 3 --rate 1e-4 --limit 2 --name 5 --models a b --fast --no-maybe --task sst2".split()
    config = parse_config(Config, argv)
    assert config == Config("sst2", 3, 1e-4, 2.0, 7, "5", ["a", "b"], True, False)
    assert [type(v) for v in (config.steps, config.rate, config.limit, config.name)] == [int, float, float, str]


@pytest.mark.parametrize("argv, fast", [("--fast", 1), ("--no-fast", 0), ("", 0), ("--no-fast --fast", 1)])
def test_boolean_flags(argv, fast):
    assert parse_config(Config, argv.split()).fast is bool(fast)


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_where_the_field_allows_it(word):
    assert parse_config(Config, ["--rows", word, "--limit", word]).rows is None
    assert "--steps" in error("--steps", word)
    assert parse_config(Config, ["--name", word]).name == word  # a text field that is not optional


def test_a_settings_file(file):
    path = file("rate: 1e-4\nsteps: 20\nmodels: [a, 3]\nfast: true\nrows: null\nlimit: 3\ntask: 7\n")
    config = parse_config(Config, ["--config", path])  # YAML reads 1e-4, without a point, as text
    assert config == Config("7", 20, 1e-4, 3.0, None, "x", ["a", "3"], True, None)
    assert type(config.rate) is float and type(config.limit) is float and type(config.task) is str
    assert parse_config(Config, ["--config", file('{"steps": 4, "models": "one"}', ".json")]) == Config(
        steps=4, models=["one"]
    )


def test_flags_override_the_file(file):
    path = file("steps: 20\nfast: true\nrate: 0.25\n")
    config = parse_config(Config, ["--steps", "3", "--config", path, "--no-fast"])
    assert (config.steps, config.fast, config.rate) == (3, False, 0.25)


def test_a_float_without_fraction_may_stand_for_an_integer(file):
    assert parse_config(Config, ["--config", file("steps: 20.0")]).steps == 20


@pytest.mark.parametrize(
    "content, words",
    [
        ("step: 20", "unknown setting 'step'"),
        ("2: 20", "unknown setting 2"),
        ("config: x", "unknown setting 'config'"),
        ("steps: 2.5", "steps: must be a number of type int, got 2.5"),
        ("steps: many", "steps: must be a number of type int, got 'many'"),
        ("steps: true", "steps: must be a int, got True"),
        ("steps: [1]", "steps: must be a int, got [1]"),
        ("steps: null", "steps: needs a value of type int"),
        ("steps: .inf", "steps: must be"),
        ("steps: 2024-01-02", "steps: must be a number of type int"),
        ("rate: .nan", "rate: must be finite"),
        ("rate: fast", "rate: must be a number of type float"),
        ("fast: 1", "fast: must be true or false, got 1"),
        ("fast: 'yes'", "fast: must be true or false, got 'yes'"),
        ("name: {a: 1}", "name: must be a str"),
        ("steps: [1", "not valid YAML"),
        ("- steps", "must hold a mapping"),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(file, content, words):
    path = file(content)
    message = error("--config", path)
    assert message.startswith(path) and words in message


def test_the_file_is_not_there(tmp_path):
    assert error("--config", f"{tmp_path}/none.yaml") == f"{tmp_path}/none.yaml: no such file"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--unknown", "3"], "--unknown"),
        (["--step", "3"], "--step"),  # no abbreviations
        (["--fas"], "--fas"),
        (["stray"], "stray"),
        (["--steps"], "--steps"),
        (["--steps", "two"], "--steps: must be a number of type int, got 'two'"),
        (["--steps", "2.5"], "--steps: must be a number of type int"),
        (["--rate", "nan"], "--rate: must be finite"),
        (["--rate", "inf"], "--rate: must be finite"),
        (["--limit", "much"], "--limit: must be a number of type float"),
        (["--fast", "true"], "true"),
        (["--models"], "--models"),
    ],
)
def test_what_is_wrong_in_a_flag_names_the_flag(argv, words):
    assert words in error(*argv)


def test_required_fields(file):
    assert error(cls=Needy).startswith("required: --output, --other")
    assert error("--output", "x", cls=Needy).startswith("required: --other")
    assert parse_config(Needy, ["--output", "x", "--config", file("other: 2")]) == Needy("x", 2)


def test_help_holds_the_comments_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, ["--help"], "What it does.\n\n    indented as written")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "What it does.\n\n    indented as written" in shown
    words = " ".join(shown.split())
    assert "--steps INT how many steps (default: 10)" in words
    assert "which task, 100 % of it (default: see text)" in words  # of a base class, with a percent sign
    assert "--fast, --no-fast skip the checks (default: False)" in words
    with pytest.raises(SystemExit):
        parse_config(Needy, ["--help"])
    assert "where it goes (default: required)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "name, good, bad, words",
    [
        ("steps", [1, 10**9], [0, -1], "must be above 0"),
        ("rate", [0.0, 1e9], [-1e-9, -1.0], "must be at least 0"),
        ("rows", [6, 9, None], [5, 10], "must lie between 6 and 9"),
        ("name", ["x", "y", None], ["X", ""], "choose from x, y"),
    ],
)
def test_bounds(file, name, good, bad, words):
    """They hold for a flag, in a file, and for settings that came from elsewhere (a run that is resumed)."""
    for value in good:
        Bounded(**{name: value}).validate()
        assert getattr(parse_config(Bounded, [f"--{name}={value}"]), name) == value
    for value in bad:
        shown = repr(value) if isinstance(value, str) else value
        for wrong in (
            lambda: parse_config(Bounded, [f"--{name}={value}"]),
            lambda: parse_config(Bounded, ["--config", file(f"{name}: {value!r}")]),
            lambda: Bounded(**{name: value}).validate(),
        ):
            with pytest.raises(InputError) as caught:
                wrong()
            assert str(caught.value) == f"--{name} {shown}: {words}"


def test_what_must_be_divisible():
    check_divisible(Config(steps=12, rows=6), "steps", "rows")
    check_divisible(Config(steps=12, rows=0), "steps", "rows")
    with pytest.raises(InputError, match="^--steps 10 cannot be divided by --rows 4; choose a multiple$"):
        check_divisible(Config(steps=10, rows=4), "steps", "rows")


def test_frozen_settings_change_by_one_door():
    config = parse_config(Config, ["--steps", "3"]).freeze()
    with pytest.raises(AttributeError, match="settings are frozen: steps is 3"):
        config.steps = 4
    config.settle(limit=2.5, steps=3)  # what has its value already may be given again
    assert (config.limit, config.steps) == (2.5, 3)
    with pytest.raises(ValueError, match="limit is 2.5 already"):
        config.settle(limit=1.0)


def test_help_is_grouped_by_who_declares_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = capsys.readouterr().out.partition("\ndata:")[2]
    assert text.index("--task STR") < text.index("\noptimisation:") < text.index("--steps INT")


@pytest.mark.parametrize(
    "problem, code, shown",
    [
        (InputError("row 3: no label"), 2, "error: row 3: no label\n"),
        (RunError("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_command_turns_errors_into_exit_codes(capsys, problem, code, shown):
    @command
    def main(argv=None):
        """Doc."""
        raise problem

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == code and capsys.readouterr().err == shown and main.__doc__ == "Doc."


def test_command_leaves_results_and_bugs_alone():
    assert command(lambda a, b=1: a + b)(2, b=3) == 5
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        command(lambda: 1 / 0)()
    with pytest.raises(ValueError, match="^plain$"):

        @command
        def main():
            raise ValueError("plain")

        main()


@pytest.mark.parametrize("text", ["a\\u0000b", "\\ud800", "x\\udfffy"])
def test_texts_that_no_file_system_takes(tmp_path, text):
    (tmp_path / "c.json").write_text(f'{{"policy": "{text}"}}')
    with pytest.raises(InputError, match="c.json: policy: holds a NUL character or a lone surrogate"):
        parse_config(train_ppo.Config, ["--config", str(tmp_path / "c.json")])
    (tmp_path / "t.json").write_text(f'{{"labels": ["a", "b"], "prompt": "{{text}}{text}"}}')
    with pytest.raises(InputError, match="prompt or labels: holds a NUL character or a lone surrogate"):
        load_task(str(tmp_path / "t.json"))


def test_a_flag_that_may_stand_without_a_value():
    bare, named, none = (parse_config(train_ppo.Config, argv) for argv in (["--resume"], ["--resume", "runs/x"], []))
    assert (bare.resume, named.resume, none.resume) == ("newest", "runs/x", None)


def test_what_was_given_is_known(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3\nname: y\n")
    config = parse_config(Config, ["--config", str(tmp_path / "c.yaml"), "--rate", "0.5", "--fast"])
    assert config.given == {"steps", "name", "rate", "fast"} and parse_config(Config, []).given == frozenset()


# ---- files for several scripts ---------------------------------------------------------------------------------------


@dataclass
class OfOneScript(Settings):
    SECTION = "rm"
    steps: int = flag(10)
    rate: float = flag(0.5)


def test_of_a_file_for_several_scripts_each_takes_its_own_part(file):
    path = file("all: {steps: 3, rate: 0.1}\nrm: {rate: 0.2}\nppo: {unknown: 1}\nsft:\n")
    assert parse_config(OfOneScript, ["--config", path]) == OfOneScript(3, 0.2)
    assert parse_config(OfOneScript, ["--config", path, "--steps", "4"]) == OfOneScript(4, 0.2)
    assert parse_config(OfOneScript, ["--config", file("sft: {steps: 3}")]) == OfOneScript()


@pytest.mark.parametrize(
    "content, named",
    [
        ("rm: {steps: 3}\nrate: 1", "rate"),
        ("rm: {steps: 3}\nppo: 4", "ppo"),
        ("rm: {steps: 3}\ndpo: {steps: 4}", "dpo"),
        ("all: {step: 3}", "unknown setting 'step'"),
        ("rm: {steps: many}", "steps: must be a number of type int, got 'many'"),
    ],
)
def test_what_is_wrong_in_a_file_for_several_scripts_is_named(file, content, named):
    with pytest.raises(InputError) as caught:
        parse_config(OfOneScript, ["--config", path := file(content)])
    assert str(caught.value).startswith(path) and named in str(caught.value)


RECIPES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo], ids=lambda script: script.__name__)
def test_the_recipes_are_settings_of_the_scripts(recipe, script):
    needs = ["--policy", "runs/x"] if script is not train_sft else ["--model", "an_llm"] * (recipe.stem != "tiny")
    config = parse_config(script.Config, ["--config", str(recipe), *needs])
    config.validate()
    assert config.given >= {"max_new_tokens"}


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"tiny", "small", "paper"}
