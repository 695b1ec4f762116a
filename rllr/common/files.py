"""Files that are whole or not there: what a killed run or a full disk leaves behind is the old file or the new one.

Everything is written under a temporary name, forced to the disk, and then renamed. The formats are JSON and safetensors:
nothing this project reads can make code run.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import InputError, RunError

PART = ".part"  # ends the name of what is being written
RECORD = "rllr.json"  # beside every model we save: which stage made it, from what, on which rows
PROBE = ".writable"  # made and removed to see whether a directory can be written to
ROWS = "rows.json"  # beside a policy: hashes of the texts that trained and evaluated it
METRICS, RUN = "metrics.jsonl", "run.json"  # of a run's directory: a line per step; its settings and what it reads


def write_json(path, value):
    """A JSON file, whole or not at all."""
    path = Path(path)
    content = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    with _replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_json(path):
    """What a JSON file holds. InputError where it is not there or not JSON."""
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
    """Tensors to one safetensors file, whole or not at all."""
    with _replacing(Path(path)) as temporary:
        save_file({n: tensor.detach().cpu().contiguous() for n, tensor in state.items()}, temporary, {"format": "pt"})


def read_safetensors(path):
    """{name: tensor} of a safetensors file. InputError where it is not there or not whole."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None


@contextmanager
def _replacing(path):
    """A temporary path that takes the place of `path` when the block ends without an exception."""
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
    """A temporary directory whose files move into `directory`, over those of the same name, when the block ends.

    All of them are whole and on the disk before the first one moves; the record moves last, so that a record never speaks
    of weights that are not there yet. An exception leaves `directory` as it was.
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
    """A temporary directory that becomes `path`, whole, when the block ends; in the place of one that is there already."""
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
        if path.exists():  # else the old one is the only one there is
            shutil.rmtree(old, ignore_errors=True)


def force_to_disk(path):
    """Wait until a file's content, or a directory's list of names, is on the disk: a rename alone is not a promise."""
    if os.name != "posix" and Path(path).is_dir():
        return  # only POSIX lets a directory be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_lfs_pointer(path_or_content):
    """Whether a file (a path, or its content) is what git-lfs leaves in the place of one that was not fetched."""
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
    """What the disk refuses (full, gone, read-only) becomes a RunError that says what is safe."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers have errors of their own for what the system said
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        raise RunError(
            f"{what} cannot be written: {reason}. Make room and go on with --resume. {kept}".strip()
        ) from None


# ---- paths in records -----------------------------------------------------------------------------------------------------


def path_for_record(value, directory):
    """How a record in `directory` names a path: from there, beginning with ./ or ../, so that both may be moved together and a later
    stage may run anywhere. What is absolute, or no path here (a hub name), stays as it is."""
    if not value or Path(value).is_absolute() or not Path(value).exists():
        return value
    try:
        relative = Path(os.path.relpath(value, directory)).as_posix()
    except ValueError:  # on another drive
        return str(Path(value).absolute())
    return relative if relative.startswith("..") else f"./{relative}"


def path_from_record(value, directory):
    """The path, from here, that `path_for_record` wrote."""
    if not isinstance(value, str) or not value.startswith(("./", "../")):
        return value
    return os.path.normpath(Path(directory) / value)


# ---- directories of runs ---------------------------------------------------------------------------------------------


def is_empty(path):
    """Whether a directory is not there, or holds nothing but what a run leaves that was killed while it opened it."""
    path = Path(path)
    return not path.is_dir() or all(inside.name == PROBE or inside.name.endswith(PART) for inside in path.iterdir())


def check_run_directory(path, overwrite, inputs=()):
    """The path of a run's output directory, once it is seen to be free; nothing is touched yet.

    InputError where it already holds something, unless `overwrite`. --overwrite replaces a directory only if a run of
    ours made it, and never one that holds an input of this run (`inputs`: the paths it reads from).
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {path}: is a file")
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise InputError(
                f"--output_dir {path}: cannot be written: {ancestor} is no directory that you may write to"
            )
        if not is_empty(path):
            ours = any((path / name).is_file() for name in (RECORD, METRICS, RUN))
            if not overwrite:
                raise InputError(
                    f"--output_dir {path}: already holds "
                    + ("a run; give another, --resume or --overwrite" if ours else "files; give another or --overwrite")
                )
            if not ours:
                raise InputError(f"--output_dir {path}: holds files that no run of rllr wrote; not overwriting them")
            for name in filter(None, inputs):
                if Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
                    raise InputError(
                        f"--output_dir {path}: --overwrite would delete {name}, which this run reads; give another"
                    )
    except OSError as error:
        raise InputError(f"--output_dir {path}: cannot be read: {error.strerror or error}") from None
    return path


def open_run_directory(path, overwrite, inputs=()):
    """Make a run's output directory, empty. InputErrors as `check_run_directory`, and where it cannot be written."""
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
