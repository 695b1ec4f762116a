"""Write files completely or not at all: after a kill or with a full disk, there is the old file or the new one.

Every file is written under a temporary name, forced to the disk, and then renamed. The formats are JSON and
safetensors: reading them cannot run code.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import ranks
from .errors import InputError, RunError

PART = ".part"  # the end of a temporary name
RECORD = "rllr.json"  # in the directory of every saved model: which stage made it, from which inputs, on which rows
PROBE = ".writable"  # created and removed to test whether a directory is writable
BASE = "base"  # in an SFT run's directory: the model that --model tiny built
ROWS = "rows.json"  # in a policy's directory: hashes of the texts that trained and evaluated it
METRICS, RUN = "metrics.jsonl", "run.json"  # in a run's directory: a line per step; its settings and inputs


def write_json(path, value):
    """Write a JSON file completely or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_lines(path, values):
    """Write a JSONL file, a value per line, completely or not at all."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_text(path, content):
    """Write a text file completely or not at all. Of several ranks the first alone writes."""
    if not ranks.is_first():
        return
    with _replacing(Path(path)) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_json(path):
    """The content of a JSON file. InputError if there is no such file or it is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def write_safetensors(state, path):
    """Write {name: tensor} to a safetensors file completely or not at all. Of several ranks the first alone writes."""
    if not ranks.is_first():
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def read_safetensors(path):
    """{name: tensor} of a safetensors file. InputError if there is no such file or it is incomplete."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None


@contextmanager
def _replacing(path):
    """A temporary path, renamed to `path` when the block ends without an exception."""
    temporary = path.with_name(path.name + PART)
    try:
        yield temporary
        force_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    force_to_disk(path.parent)


@contextmanager
def saving_into(directory):
    """A temporary directory. When the block ends, its files move into `directory` and replace those of the same name.

    All files are complete and on the disk before the first one moves. The record moves last, so that it never describes
    weights that are not there yet. An exception leaves `directory` as it was.
    """
    directory = Path(directory)
    temporary = directory / PART
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        for file in files:
            force_to_disk(file)
        for file in sorted(files, key=lambda file: file.name == RECORD):
            target = directory / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        force_to_disk(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_directory(path):
    """A temporary directory. When the block ends, it is renamed to `path` and replaces an existing directory."""
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}{end}") for end in (PART, ".old"))
    for leftover in (temporary, *([old] if path.exists() else ())):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            force_to_disk(file)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        force_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():  # if not, the old directory is the only one left
            shutil.rmtree(old, ignore_errors=True)


def force_to_disk(path):
    """Wait until a file's content, or a directory's list of names, is on the disk. A rename does not wait for that."""
    if os.name != "posix" and Path(path).is_dir():
        return  # only POSIX can open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_lfs_pointer(path_or_content):
    """Whether a file (a path, or its content) is a pointer that git-lfs puts in place of a file it has not fetched."""
    start = b"version https://git-lfs.github.com/spec/"
    if isinstance(path_or_content, bytes):
        return path_or_content.startswith(start)
    with open(path_or_content, "rb") as file:
        return file.read(len(start)) == start


def sha256_of(path):
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def disk_faults(what, kept=""):
    """Turn errors of the disk (full, gone, read-only) into a RunError. what: is being written; kept: what is safe."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers wrap the system's error in errors of their own
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        message = f"{what} cannot be written: {reason}. Make room and go on with --resume. {kept}"
        raise RunError(message.strip()) from None


# ---- paths in records ------------------------------------------------------------------------------------------------


def relative_path(path, start=None):
    """The path as seen from `start` (the working directory); the absolute one where it lies on another drive."""
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return str(Path(path).absolute())


def path_for_record(value, directory):
    """A path as a record in `directory` names it: relative to that directory, with ./ or ../ at its beginning.

    So both can be moved together, and a later stage can run anywhere. An absolute path, or a name that is no existing
    path (a hub name), stays as it is.
    """
    if not value or Path(value).is_absolute() or not Path(value).exists():
        return value
    relative = relative_path(value, directory)
    return relative if relative.startswith("..") or Path(relative).is_absolute() else f"./{relative}"


def path_from_record(value, directory):
    """The path, relative to the working directory, that `path_for_record` wrote into a record in `directory`."""
    if not isinstance(value, str) or not value.startswith(("./", "../")):
        return value
    return os.path.normpath(Path(directory) / value)


# ---- directories of runs ---------------------------------------------------------------------------------------------


def is_empty(path):
    """Whether a directory does not exist, or holds only what is left by a run that was killed while it opened it."""
    path = Path(path)
    return not path.is_dir() or all(inside.name == PROBE or inside.name.endswith(PART) for inside in path.iterdir())


def check_run_directory(path, overwrite, inputs=()):
    """The path of a run's output directory, after a check that the run may use it. Changes nothing.

    InputError if the directory already holds something, unless `overwrite`. --overwrite replaces a directory only if a
    run of ours made it, and never one that holds an input of this run (`inputs`: the paths that it reads).
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {path}: is a file")
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            problem = f"cannot be written: {ancestor} is no directory that you may write to"
            raise InputError(f"--output_dir {path}: {problem}")
        if not is_empty(path):
            _check_overwriting(path, overwrite, inputs)
    except OSError as error:
        raise InputError(f"--output_dir {path}: cannot be read: {error.strerror or error}") from None
    return path


def _check_overwriting(path, overwrite, inputs):
    """InputError if `check_run_directory` does not allow a run to replace this directory, which is not empty."""
    ours = any((path / name).is_file() for name in (RECORD, METRICS, RUN))
    if not overwrite:
        held = "a run; give another, --resume or --overwrite" if ours else "files; give another or --overwrite"
        raise InputError(f"--output_dir {path}: already holds {held}")
    if not ours:
        raise InputError(f"--output_dir {path}: holds files that no run of rllr wrote; not overwriting them")
    for name in filter(None, inputs):
        if Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            raise InputError(
                f"--output_dir {path}: --overwrite would delete {name}, which this run reads; give another"
            )


def open_run_directory(path, overwrite, inputs=()):
    """Create a run's output directory, empty. InputErrors of `check_run_directory`, and if it cannot be written."""
    path = check_run_directory(path, overwrite, inputs)
    try:
        if path.is_dir():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / PROBE).touch()
        (path / PROBE).unlink()
    except OSError as error:
        raise InputError(f"--output_dir {path}: cannot be written: {error.strerror or error}") from None
    return path
