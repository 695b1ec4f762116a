"""The house: which room may import which, and how large a function may be. Read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a module imports from its own floor, without a circle, and from the floors below it.
FLOORS = [
    {"common", "layout", "ppo", "engine"},
    {"tasks", "rewards", "pairs"},
    {"model", "data"},
    {"run"},
    {"rollout", "logprobs", "answers", "judge"},
    {"metrics", "grounding", "preview", "guard", "rationales", "update"},
    {"tiny", "ppo_models", "rm_pairs", "cross_fit", "report", "best_of", "evaluate", "predict", "merge", "keeper"},
    {"audit"},
]
TORCH_ONLY = {"layout", "ppo"}  # and rewards, which stands on ppo
PURE = {"rllr.update": {"checkpoint", "files"}, "rllr.judge": {"checkpoint", "files"}}  # core without machinery


def modules():
    """{dotted name: path} of the package, without its __init__ and __main__ files."""
    found = {}
    for path in sorted((ROOT / "rllr").rglob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


MODULES = modules()


def imports_of(name):
    """Dotted names of the package's modules that a module imports, inside its functions, too."""
    package, found = name.split(".")[:-1], set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join(base + ([node.module] if node.module else []))
            names = [target, *(f"{target}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {module for module in names if module in MODULES}
    return found


GRAPH = {name: imports_of(name) for name in MODULES}


def room(name):
    return name.split(".")[1]


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_module_has_a_floor():
    assert {room(name) for name in MODULES} - {"lora"} == set().union(
        *FLOORS
    )  # lora.py only tells a command's new name


def test_no_import_runs_back_up():
    back = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if name != "rllr.lora" and floor(other) > floor(name)
    ]
    assert not back


def test_no_circle():
    """Neither of modules nor of rooms."""
    rooms = {}
    for name, others in GRAPH.items():
        rooms.setdefault(room(name), set()).update(room(other) for other in others)
    for graph in (GRAPH, {name: others - {name} for name, others in rooms.items()}):
        assert not circle_in(graph)


def circle_in(graph):
    """The modules of some circle, in order; [] where there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        found = next(filter(None, (visit(other) for other in sorted(graph[name]))), [])
        path.pop()
        done.add(name)
        return found

    return next(filter(None, (visit(name) for name in sorted(graph))), [])


def test_the_search_for_circles_finds_one():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_engine_and_the_arithmetic_stand_alone():
    for name, others in GRAPH.items():
        if room(name) == "engine":
            assert {room(other) for other in others} <= {"engine"}, name
        if room(name) in TORCH_ONLY:
            assert not others, name
    assert GRAPH["rllr.rewards"] == {"rllr.ppo"}


def test_the_core_is_without_machinery():
    for name, machinery in PURE.items():
        assert not {other.rpartition(".")[2] for other in GRAPH[name]} & machinery, name


def test_the_core_loads_no_machinery():
    """Nor does it come in behind: of everything that these modules import, directly or not."""
    loaded = "import sys, rllr.update, rllr.judge; print(*[name for name in sys.modules if name.startswith('rllr.')])"
    names = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "rllr.rewards" in names or "rllr.ppo" in names
    assert not {"rllr.run.checkpoint", "rllr.run.run", "rllr.run.resume"} & set(names.split())


# ---- functions -------------------------------------------------------------------------------------------------------

SCRIPTS = [ROOT / f"train_{stage}.py" for stage in ("sft", "rm", "ppo")]
LONGEST = 80  # lines of a main, and of any other function
MOST_PARAMETERS = 6  # that can be given by position
ATTENTION = {"packed_attention", "slot_attention"}  # transformers calls them, with its own parameters


def functions():
    """(path, function) of every function and method of the package and of the scripts."""
    for path in [*(ROOT / "rllr").rglob("*.py"), *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_functions_are_short_and_take_few_parameters():
    long, wide = [], []
    for path, node in functions():
        positional = [argument.arg for argument in node.args.posonlyargs + node.args.args]
        given = [name for name in positional if name not in ("self", "cls")]
        if node.end_lineno - node.lineno + 1 > LONGEST:
            long.append((path.name, node.name))
        if len(given) > MOST_PARAMETERS and node.name not in ATTENTION:
            wide.append((path.name, node.name, len(given)))
    assert not long and not wide


@pytest.mark.parametrize("act", ["1 act", "2 analyse", "3 judge", "4 shape", "5 credit", "6 improve"])
def test_all_six_acts_stand_in_the_open(act):
    source = (ROOT / "train_ppo.py").read_text(encoding="utf-8")
    main = source[source.index("def main(") :]
    assert f"# {act}:" in main
