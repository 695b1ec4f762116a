"""Nothing that is read can make code run, and no name that is read can point outside the output directory."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from toy_runs import ANSWER, run

import train_sft
from rllr.common.errors import InputError
from rllr.data.rows import load_examples
from rllr.model import loading as model
from rllr.model.heads import RewardModel
from rllr.model.loading import allow_remote_code, load_policy, load_tokenizer
from rllr.model.records import read_record
from rllr.tasks import Task, load_task

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "rllr").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load",
                   "numpy.load", "np.load", "datasets.load_from_disk", "torch.jit.load", "torch.package",
                   "runpy.run_path"}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dotted(node):
    """'torch.load' of the function in a call; '' for what has no plain name."""
    if isinstance(node, ast.Attribute):
        inside = dotted(node.value)
        return f"{inside}.{node.attr}" if inside else ""
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source):
    """What in a source text could run code that stands in a file: [(line, what)]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                (node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES
            ]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append((node.lineno, node.module))
        if not isinstance(node, ast.Call):
            continue
        name, options = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FORBIDDEN_CALLS:
            found.append((node.lineno, name))
        if name == "torch.load" and not (
            isinstance(options.get("weights_only"), ast.Constant) and options["weights_only"].value is True
        ):
            found.append((node.lineno, "torch.load without weights_only=True"))
        if isinstance(options.get("shell"), ast.Constant) and options["shell"].value:
            found.append((node.lineno, f"{name}(shell=True)"))
        if name.endswith(".from_pretrained") and name.startswith(
            "Auto"
        ):  # who loads a model says whether its code may run
            if not any(
                keyword.arg is None and dotted(getattr(keyword.value, "func", None)) == "_trust"
                for keyword in node.keywords
            ):
                found.append((node.lineno, f"{name} without _trust()"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    allowed = {
        "judge.py": {"importlib"},  # --reward module:function, the user's own flag
        "rows.py": {"datasets.load_from_disk"},  # reads Arrow and JSON (since datasets 2.x it pickles nothing)
    }.get(path.name, set())
    assert not [danger for danger in dangers(path.read_text()) if danger[1] not in allowed]


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "eval('1')", "exec(x)", "yaml.load(f)", "torch.load(f)",
    "torch.load(f, weights_only=False)",
    "os.system(x)", "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(p)",
    "AutoModel.from_pretrained(p, trust_remote_code=True)",
    "import cloudpickle as c", "def f():\n    import marshal", "__import__('os')",
])  # fmt: skip
def test_the_walk_sees(source):
    assert dangers(source)


def test_the_walk_lets_pass():
    assert not dangers(
        "model.eval()\nyaml.safe_load(f)\ntorch.load(f, "
        "weights_only=True)\nre.compile(x)\nAutoModel.from_pretrained(p, **_trust())"
    )


# ---- models


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def model_with_code(toy, tmp_path):
    """A copy of the toy policy that brings Python code; (directory, the file that the code makes when it runs)."""
    directory, mark = (
        shutil.copytree(toy.sft, tmp_path / "coded", ignore=shutil.ignore_patterns("checkpoints")),
        tmp_path / "it-ran",
    )
    (directory / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory, mark


def test_a_models_own_code_does_not_run(toy, model_with_code, capsys):
    directory, mark = model_with_code
    for load in (load_policy, RewardModel.from_pretrained, lambda path: model.load_backbone(path)):
        with pytest.raises(InputError):
            load(directory)
    with pytest.raises(InputError, match="contains Python code, which runs with --trust_remote_code only"):
        load_policy(directory)
    assert not mark.exists()
    with pytest.raises(SystemExit):
        run(train_sft.main, *toy.data, "--model", directory, *ANSWER)
    assert "--trust_remote_code only" in capsys.readouterr().err and not mark.exists()


def test_unless_the_flag_says_so(model_with_code, monkeypatch):
    directory, mark = model_with_code
    monkeypatch.setitem(model._remote_code, "allowed", False)
    allow_remote_code(True)
    try:
        load_policy(directory)
    except InputError:
        pass  # what the code then makes of it is its own affair
    assert mark.exists()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def test_weights_are_never_unpickled(toy, tmp_path, monkeypatch):
    """Not even with torch's own guard: a directory with pytorch_model.bin alone holds no weights for us."""
    monkeypatch.chdir(tmp_path)
    directory = shutil.copytree(toy.label_rm, tmp_path / "pickled")
    for file in directory.glob("*.safetensors"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    torch.save(load_policy(toy.sft).state_dict(), directory / "other.bin")
    for load in (load_policy, RewardModel.from_pretrained):
        with pytest.raises(InputError, match="pickled"):
            load(directory)
    assert not Path("bomb-went-off").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_data_files_are_never_unpickled(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(InputError):
        load_examples(name, load_task("sst2"))
    assert not Path("bomb-went-off").exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [bomb-went-off]", "!!python/name:os.system", "!!python/module:os"]
)
def test_task_files_make_no_code_run(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(f"labels: [a, b]\nprompt: {tag}\n")
    with pytest.raises(InputError, match=r"^t.yaml:2: not valid YAML"):
        load_task("t.yaml")
    assert not Path("bomb-went-off").exists()


# ---- names


NAMES = [
    "../../etc",
    "..",
    ".",
    "a/b",
    "/tmp/x",
    "a\\b",
    "nul\0",
    "line\nbreak",
    "",
    " a",
    "a ",
    ".hidden",
    "a.",
    "x" * 81,
    "tab\tb",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_tasks_name_cannot_lead_out_of_the_runs(tmp_path, name):
    with pytest.raises(InputError, match="field 'name' must be letters, digits"):
        Task(name, ("a", "b"), "{text}")
    (tmp_path / "task.json").write_text(json.dumps({"name": name, "labels": ["a", "b"], "prompt": "{text}"}))
    with pytest.raises(InputError):
        load_task(str(tmp_path / "task.json"))
    record = {
        "task": {"name": name, "labels": ["a", "b"], "prompt": "{text}", "metrics": ["accuracy"], "metric": "accuracy"}
    }
    (tmp_path / "rllr.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="not a record of rllr"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["sst2", "my task", "été", "情感", "a.b-c_d", "1"])
def test_ordinary_names_are_fine(name):
    assert Task(name, ("a", "b"), "{text}").name == name


def test_a_run_writes_inside_its_output_directory_alone(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(toy.root.rglob("*"))
    run(
        train_sft.main,
        *toy.data,
        "--model",
        toy.base,
        "--epochs",
        1,
        *ANSWER,
        "--output_dir",
        tmp_path / "runs" / "own" / "sft",
    )
    toy.ppo("runs/own/ppo", "--reward", "gold", "--temperature", 0.9, steps=1)
    assert set(toy.root.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and sorted(os.listdir("runs/own")) == ["ppo", "sft"]


def test_the_tokenizer_needs_no_code_either(toy):
    assert load_tokenizer(toy.sft).eos_token
