"""The house: which room may import which. Read from the sources, imports inside functions included."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a module imports from its own floor, without a circle, and from the floors below it.
FLOORS = [
    {"common", "layout", "ppo", "engine"},
    {"tasks", "rewards", "pairs"},
    {"run"},
    {"model", "data"},
    {"rollout", "logprobs", "judge"},
    {"answers", "metrics", "rationales", "update"},
    {"tiny", "ppo_models", "reports", "evaluate", "predict", "merge"},
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
    """Dotted names of the package's modules that a module imports."""
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
