"""Checkpoints: everything a run needs to go on exactly where it stood, whole on disk or not there at all.

    runs/sst2/ppo-label/checkpoints/step-000040/
        state.safetensors   every tensor: trained weights, moments, generators
        state.json          every number: step, schedules, streams, settings
        manifest.json       size and SHA-256 of both

A *part* is an object with a state: a model (of which the trained weights are kept, the frozen ones are where they came
from), an optimiser, a schedule, a random stream, or anything with `state_dict` and `load_state_dict`.
"""

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from ..common import ranks
from ..common.errors import InputError
from ..common.files import (
    disk_faults,
    force_to_disk,
    new_directory,
    read_json,
    read_safetensors,
    sha256_of,
    write_json,
    write_safetensors,
)
from ..model.shards import part_of, whole_tensors

FORMAT = 1
FOLDER, TENSORS, STATE, MANIFEST = "checkpoints", "state.safetensors", "state.json", "manifest.json"
TENSOR, PAIRS = "__tensor__", "__pairs__"  # marks in the JSON of what JSON does not have
WEIGHTY = (torch.nn.Module, torch.optim.Optimizer)  # the parts that only an optimiser step changes


# ---- the state of one part -------------------------------------------------------------------------------------------


def state_of(part):
    """The state of a part as dicts, lists, numbers, strings and tensors (those of a model are the model's own)."""
    if isinstance(part, torch.nn.Module):
        return {name: p.detach() for name, p in part.named_parameters() if p.requires_grad}
    if isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        return {"last_epoch": part.last_epoch}
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, random.Random):
        return part.getstate()
    return part.state_dict() if hasattr(part, "state_dict") else dict(vars(part))


@torch.no_grad()
def restore_part(part, state):
    """Give a part the state that `state_of` took of it."""
    if isinstance(part, torch.nn.Module):
        own = state_of(part)
        if own.keys() != state.keys():
            raise ValueError(f"its weights are other ones: {', '.join(sorted(own.keys() ^ state.keys())[:3])}, ...")
        for name, tensor in own.items():
            if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
                raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(part_of(tensor, state[name]))
    elif isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state | {"state": _own_moments(part, state["state"])})
    elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        _restore_schedule(part, state["last_epoch"])
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, random.Random):
        part.setstate(_python_state(state))
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(state)
    else:
        if vars(part).keys() != state.keys():
            raise ValueError(f"it counts {', '.join(state)}, not {', '.join(vars(part))}")
        for name, own in vars(part).items():
            if own is not None and not isinstance(state[name], (float, int) if isinstance(own, float) else type(own)):
                raise ValueError(f"{name} is a {type(state[name]).__name__}, not a {type(own).__name__}")
        vars(part).update(state)


def _own_moments(optimizer, moments):
    """An optimiser's state by number of its parameter: of sharded weights this rank's part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(parameter, value):
        return part_of(parameter, value) if getattr(value, "shape", None) == parameter.shape else value

    return {i: {name: own(parameters[i], value) for name, value in of.items()} for i, of in moments.items()}


def _restore_schedule(scheduler, steps):
    """The learning rate that this schedule has after so many steps: the recorded one, unless it was changed."""
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    for group, base, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = base * factor(steps)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


class GlobalStreams:
    """The random streams that belong to no object: Python's, NumPy's, torch's on the CPU and on every GPU."""

    def state_dict(self):
        kind, keys, *rest = np.random.get_state(legacy=True)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "python": random.getstate(),
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(),
            "cuda": cuda,
        }

    def load_state_dict(self, state):
        random.setstate(_python_state(state["python"]))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] and len(state["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0):
            torch.cuda.set_rng_state_all(state["cuda"])


def _python_state(state):
    """`random`'s own form of a state that went through JSON."""
    version, numbers, gauss = state
    return version, tuple(numbers), gauss


# ---- states as files -------------------------------------------------------------------------------------------------


def split_tensors(state, tensors, path=""):
    """The state as JSON can hold it: each tensor goes into `tensors` under its path and leaves {TENSOR: path}.

    A dict that has other keys than strings becomes {PAIRS: [[key, value], ...]} (an optimiser counts its parameters).
    """
    if isinstance(state, torch.Tensor):
        tensors[path] = state
        return {TENSOR: path}
    if isinstance(state, dict):
        pairs = [
            (key, split_tensors(value, tensors, f"{path}.{key}" if path else str(key))) for key, value in state.items()
        ]
        plain = all(isinstance(key, str) for key in state) and not state.keys() & {TENSOR, PAIRS}
        return dict(pairs) if plain else {PAIRS: pairs}
    if isinstance(state, (list, tuple)):
        return [split_tensors(value, tensors, f"{path}.{i}") for i, value in enumerate(state)]
    if isinstance(state, (str, int, float, type(None))):
        return state
    raise TypeError(f"{path}: a checkpoint cannot hold a {type(state).__name__}")


def join_tensors(state, tensors):
    """The state that `split_tensors` took apart; tuples come back as lists."""
    if isinstance(state, list):
        return [join_tensors(value, tensors) for value in state]
    if not isinstance(state, dict):
        return state
    if state.keys() == {TENSOR}:
        return tensors[state[TENSOR]]
    if state.keys() == {PAIRS}:
        return {key: join_tensors(value, tensors) for key, value in state[PAIRS]}
    return {key: join_tensors(value, tensors) for key, value in state.items()}


def checkpoint_path(run_directory, step):
    """Where the checkpoint of a step lies in a run's directory."""
    return Path(run_directory) / FOLDER / f"step-{step:06d}"


def write_checkpoint(run_directory, step, state, keep_last):
    """Write a checkpoint, then remove those that are too old, and those of later steps (the run went on from before
    them).

    state: nested dicts and lists with tensors. RunError where the disk refuses; the older checkpoints are untouched
    then. Of several ranks the first writes: all have the same state, or their parts of it (--shard).
    """
    path = checkpoint_path(run_directory, step)
    tensors: dict[str, torch.Tensor] = {}
    plain = split_tensors(state, tensors)
    tensors = whole_tensors(tensors)
    if not ranks.is_first():
        return path
    others = [other for other in list_checkpoints(run_directory) if other != path]
    kept = f"The checkpoint before it is whole: {others[0]}." if others else ""
    with disk_faults(f"checkpoint {path}", kept), new_directory(path) as temporary:
        write_safetensors(tensors, temporary / TENSORS)
        write_json(temporary / STATE, plain)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256_of(temporary / name)}
            for name in (TENSORS, STATE)
        }
        write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": files})
    later = [other for other in others if step_of(other) > step]
    earlier = [other for other in others if step_of(other) < step]
    for old in later + earlier[keep_last - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    force_to_disk(path.parent)
    return path


def read_checkpoint(path):
    """The state that `write_checkpoint` was given. InputError, which says what is wrong, where it is not whole."""
    path = Path(path)
    problem = problem_with(path)
    if problem:
        raise InputError(f"checkpoint {path}: {problem}")
    try:
        return join_tensors(read_json(path / STATE), read_safetensors(path / TENSORS))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"checkpoint {path}: its {STATE} is no state of a run") from None


def run_of(path):
    """The record of the run that a checkpoint belongs to, without its tensors."""
    state = read_json(Path(path) / STATE)
    try:
        return join_tensors(state["run"], {})
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def restore_names(run_directory):
    """Give a checkpoint its name back where a killed run had moved it aside and not yet replaced it."""
    folder = Path(run_directory) / FOLDER
    for old in folder.glob(".step-*.old") if folder.is_dir() else ():
        path = folder / old.name[1 : -len(".old")]
        if not path.exists():
            os.rename(old, path)


def problem_with(path):
    """What is wrong with a checkpoint on disk: its manifest, a size or a hash; None if it is whole."""
    path = Path(path)
    try:
        manifest = read_json(path / MANIFEST)
    except InputError as error:
        return str(error).removeprefix(f"{path}/")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return f"{MANIFEST} is not a manifest"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')!r:.30}; this version of rllr reads format {FORMAT}"
    for name in (TENSORS, STATE):
        listed = manifest["files"].get(name)
        try:
            size = (path / name).stat().st_size
            if not isinstance(listed, dict) or listed.get("bytes") != size:
                return f"{name} has {size} bytes, and not what {MANIFEST} says"
            if listed.get("sha256") != sha256_of(path / name):
                return f"{name} is not the file that was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def list_checkpoints(run_directory):
    """Paths of a run's checkpoints, whole or not, the newest first."""
    folder = Path(run_directory) / FOLDER
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in entries if re.fullmatch(r"step-\d{6,18}", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path):
    return int(Path(path).name.removeprefix("step-"))
