"""The wheel holds the package and the three scripts, and its commands run where no checkout is near."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = sorted(PROJECT["scripts"])  # rllr-ppo, rllr-rm, rllr-sft
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "rllr")


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources: a `build` folder of an earlier build would lend it files."""
    for name in ("setuptools", "pip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed, and building without isolation needs it")
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for path in [*(ROOT / name for name in SOURCES), *ROOT.glob("train_*.py")]:
        if path.is_dir():
            shutil.copytree(path, sources / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, sources)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, sources)
    [wheel] = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """A folder that holds what the wheel installs, and nothing else."""
    target = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target


@pytest.fixture
def run(target, tmp_path):
    """Runs Python in an empty folder, with the target as the only path beside the libraries."""

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


def test_the_wheel_holds_the_whole_package_and_the_three_scripts(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = {".py", ".html", ".css", ".js"}  # of the package; the others are the report's page
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rllr").rglob("*") if path.suffix in kinds}
    ours |= {"train_sft.py", "train_rm.py", "train_ppo.py"}
    assert {name for name in names if ".dist-info/" not in name} == ours


def test_every_stage_has_its_command():
    assert PROJECT["scripts"] == {f"rllr-{stage}": f"train_{stage}:main" for stage in ("sft", "rm", "ppo")}


def test_what_is_imported_comes_from_the_wheel(run, target):
    modules = ["rllr", "rllr.merge", "train_sft", "train_rm", "train_ppo"]
    done = run("-c", f"import {', '.join(modules)}; print(*({', '.join(f'{m}.__file__' for m in modules)}), sep='\\n')")
    assert done.returncode == 0, done.stderr
    files = [Path(line).resolve() for line in done.stdout.splitlines()]
    assert len(files) == len(modules)
    assert all(file.is_relative_to(target.resolve()) for file in files), files


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tells_its_flags(run, target, tmp_path, name):
    done = run(target / "bin" / name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--output_dir" in done.stdout and "(default: " in done.stdout
    assert not done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_a_bad_flag_in_one_line(run, target, tmp_path, name):
    done = run(target / "bin" / name, "--no_such_flag", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--no_such_flag" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert not list(tmp_path.iterdir())
