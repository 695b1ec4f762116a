"""The README and the docs name files, flags, commands and functions that exist."""

import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import rllr.audit
import rllr.evaluate
import rllr.merge
import rllr.predict
import rllr.rationales.__main__
import rllr.report.__main__
import rllr.tiny
import train_ppo
import train_rm
import train_sft
from rllr.common.config import parse_config
from rllr.common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
SCRIPTS = {"train_sft.py", "train_rm.py", "train_ppo.py"}
every_page = pytest.mark.parametrize("page", PAGES)


def tree_of(page):
    """The text of the first code block after a page's heading "The files"."""
    return re.split(r"(?m)^##? The files$", PAGES[page])[1].split("```")[1]


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_leads_to_every_page():
    links = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert len(links) > 10
    assert set(PAGES) - {"README.md"} <= links


@every_page
def test_links_to_headings_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", PAGES[page]):
        text = ((ROOT / page).parent / link if link else ROOT / page).read_text(encoding="utf-8")
        headings = re.findall(r"(?m)^#+ (.+)$", text)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_file_tree_is_the_package():
    named = set(re.findall(r"(\w+\.py)", tree_of("docs/files.md")))
    present = {path.name for path in (*ROOT.glob("rllr/**/*.py"), *ROOT.glob("benchmarks/*.py"))} - {"__init__.py"}
    assert present <= named, present - named
    assert named <= present | SCRIPTS | {"mutate.py", "mistakes.py"}


def test_the_readmes_tree_has_every_folder_and_top_level_module():
    tree = tree_of("README.md")
    named, folders = set(re.findall(r"(\w+\.py)", tree)), set(re.findall(r"(?m)^ *(\w+)/", tree))
    modules = {path.name for path in ROOT.glob("rllr/*.py")} - {"__init__.py"}
    assert named == modules | SCRIPTS | {"mutate.py", "mistakes.py"}
    rooms = {path.parent.name for path in ROOT.glob("rllr/**/*.py")}
    assert folders == rooms | {"rllr", "configs", "examples", "tests", "benchmarks", "docs"}


@every_page
def test_files_named_in_the_text_exist(page):
    for name in re.findall(r"`(?:python )?([\w/]+\.py)\b", PAGES[page]):
        places = (ROOT, ROOT / "rllr", ROOT / "tests", ROOT / "benchmarks")
        assert any((place / name).is_file() for place in places), name


@every_page
def test_flags_exist(page):
    stages = (train_sft, train_rm, train_ppo, rllr.evaluate, rllr.predict, rllr.merge, rllr.rationales.__main__)
    known = {field.name for module in stages for field in fields(module.Config)}
    known |= {"help", "config"}  # of every command
    known |= {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "ntasks", "gpus", "nodes"}  # torchrun, SLURM
    known |= {"dev_file", "seeds", "workers", "methods", "no_label_only", "jobs"}  # benchmarks/quality.py
    known |= {"mixed"}  # benchmarks/demo.py
    known |= {"data", "all_labelled", "tune", "run"}  # what benchmarks are given today
    known |= {"budget_s", "at_once", "cell_s", "tasks"}  # benchmarks/quality_cells.py
    known |= {"tiny", "sft", "rm", "ppo", "hidden_size", "heads", "layers"}  # what it hands on, and to whom
    commands = next(action for action in rllr.audit.make_parser()._actions if action.dest == "command").choices
    parsers = [*commands.values(), rllr.report.__main__.make_parser()]
    known |= {action.dest for parser in parsers for action in parser._actions}
    for flag in re.findall(r"--(\w+)", PAGES[page]):
        assert flag in known, flag


def test_the_installed_commands_are_named():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(re.findall(r"`(rllr-\w+)`", README)) == set(scripts)


def test_the_equation_map_names_functions_that_exist():
    import importlib

    rows = re.findall(r"\[`\w+\.(\w+)`\]\((rllr/[\w/]+)\.py\) \| `(test_\w+\.py)`", README)
    assert len(rows) >= 10
    for name, path, test in rows:
        assert hasattr(importlib.import_module(path.replace("/", ".")), name), name
        assert name in (ROOT / "tests" / test).read_text(encoding="utf-8"), (name, test)


@pytest.mark.slow
def test_the_equation_map_names_metrics_that_exist(toy, tmp_path):
    """In the metrics of a run of the stage that has them."""
    from stopping import stage_of
    from toy_runs import read_lines, run

    names = set(re.findall(r"`(\w+/\w+|loss)`", README.split("| metric |")[1].split("\n\n")[0]))
    assert len(names) > 12
    for stage in ("ppo/mixed", "rm/full"):
        main, flags = stage_of(toy, stage, tmp_path / stage.replace("/", "-"))
        run(main, *flags, *["--missing_label_penalty", "1"] * (stage == "ppo/mixed"))
        names -= {name for line in read_lines(tmp_path / stage.replace("/", "-") / "metrics.jsonl") for name in line}
    assert not names


def test_the_label_sensitive_reward_enters_train_ppo_in_one_line():
    source = (ROOT / "train_ppo.py").read_text(encoding="utf-8")
    assert source.count("label_sensitive_reward(") == 1


# ---- commands --------------------------------------------------------------------------------------------------------

PARSERS = {  # command: what takes its arguments
    **{f"{module.__name__}.py": partial(parse_config, module.Config) for module in (train_sft, train_rm, train_ppo)},
    "rllr.evaluate": partial(parse_config, rllr.evaluate.Config),
    "rllr.predict": partial(parse_config, rllr.predict.Config),
    "rllr.merge": partial(parse_config, rllr.merge.Config),
    "rllr.rationales": partial(parse_config, rllr.rationales.__main__.Config),
    "rllr.tiny": partial(parse_config, rllr.tiny.Config),
    "rllr.audit": rllr.audit.make_parser().parse_args,
    "rllr.report": rllr.report.__main__.make_parser().parse_args,
}


def commands_of(page):
    """(command, its arguments) of every line of a code block that calls one of ours."""
    for block in re.findall(r"(?ms)^ *```(?:bash|sh)?\n(.*?)^ *```", PAGES[page]):
        for name, value in re.findall(r"(?m)^(\w+)=\"?(.*?)\"?$", block):  # a variable of the shell
            block = block.replace(f"${name}", value)
        for line in block.replace("\\\n", " ").splitlines():
            called = re.search(r"(?:^|[\s|])python (?:-m )?(train_\w+\.py|rllr\.\w+)((?: .*)?)$", line)
            if called:
                arguments = shlex.split(called.group(2), comments=True)
                yield called.group(1), [a for a in arguments if a not in ("...", "…")]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands_of(page))])
def test_commands_are_taken_by_their_parsers(page):
    for command, arguments in commands_of(page):
        assert command in PARSERS, command
        try:
            PARSERS[command](arguments)
        except (InputError, SystemExit) as error:
            raise AssertionError(f"{command} {' '.join(arguments)}: {error}") from error


def test_most_pages_have_commands():
    assert len([page for page in PAGES if any(commands_of(page))]) > 7
    assert sum(1 for page in PAGES for _ in commands_of(page)) > 30


# ---- Python ----------------------------------------------------------------------------------------------------------


def python_blocks(page):
    """The code of every block of Python that is no doctest (those are run where the page's own tests are)."""
    blocks = re.findall(r"(?ms)^ *```python\n(.*?)^ *```", PAGES[page])
    return [block for block in blocks if not block.lstrip().startswith(">>>")]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_in_the_docs_runs(toy, tmp_path, monkeypatch, capsys, page):
    """In a folder with a policy where the pages say that one is."""
    shutil.copytree(toy.sft, tmp_path / "runs" / "sst2" / "ppo-label" / "best")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)
    if page == "docs/models.md":
        assert capsys.readouterr().out.strip()
    if page == "docs/your-data.md":
        samples = SimpleNamespace(answers=["x" * 10, "y"], labels=["good", None])
        assert names["short_and_readable"](samples) == pytest.approx([0.9, -1.0])


def test_both_pages_with_python_are_found():
    assert {page for page in PAGES if python_blocks(page)} >= {"docs/models.md", "docs/your-data.md"}
