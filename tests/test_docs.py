"""The README names files, flags and functions that exist."""

import re
from dataclasses import fields
from pathlib import Path

import train_ppo
import train_rm
import train_sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_file_tree_is_the_package():
    tree = README.split("## The files")[1].split("```")[1]
    named = set(re.findall(r"(\w+\.py)", tree))
    present = {path.name for path in (*ROOT.glob("rllr/**/*.py"), *ROOT.glob("benchmarks/*.py"))} - {"__init__.py"}
    assert present <= named, present - named
    assert named <= present | {"train_sft.py", "train_rm.py", "train_ppo.py", "mutate.py"}


def test_flags_in_the_readme_exist():
    known = {field.name for module in (train_sft, train_rm, train_ppo) for field in fields(module.Config)}
    known |= {"help", "config", "models", "input", "output", "writer"}  # every command, evaluate, predict, rationales
    known |= {"adapter"}  # python -m rllr.lora merge
    known |= {"dev_file", "seeds"}  # benchmarks/quality.py
    for flag in re.findall(r"--(\w+)", README):
        assert flag in known, flag


def test_the_equation_map_names_functions_that_exist():
    import importlib

    rows = re.findall(r"\[`\w+\.(\w+)`\]\((rllr/[\w/]+)\.py\) \| `(test_\w+\.py)`", README)
    assert len(rows) >= 10
    for name, path, test in rows:
        assert hasattr(importlib.import_module(path.replace("/", ".")), name), name
        assert name in (ROOT / "tests" / test).read_text(encoding="utf-8"), (name, test)


def test_the_label_sensitive_reward_enters_train_ppo_in_one_line():
    source = (ROOT / "train_ppo.py").read_text(encoding="utf-8")
    assert source.count("label_sensitive_reward(") == 1
