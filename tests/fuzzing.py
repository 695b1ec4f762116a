"""Hostile input: readers, seeds they accept, and ways to spoil a seed. `test_fuzz.py` tries some, `benchmarks/fuzz.py`
many.

Every input must end in a result or in an InputError that names the file; no other exception, no hang, bounded memory.
"""

import csv
import io
import json
import signal
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch

import train_ppo
import train_rm
import train_sft
from rllr.common.config import parse_config
from rllr.common.errors import InputError
from rllr.common.files import read_safetensors, sha256_of
from rllr.data.rows import load_examples, load_pairs
from rllr.model.peft_format import read_adapter_config
from rllr.model.records import RECORD_FORMAT, read_record
from rllr.ppo import AdaptiveKL
from rllr.rationales.cached import read_cache
from rllr.report.reward_report import load_statistics
from rllr.run.checkpoint import MANIFEST, STATE, TENSORS, GlobalStreams, state_of, write_checkpoint
from rllr.run.optimizer import Optimizer
from rllr.run.resume import RUN_FORMAT, find_run_to_resume
from rllr.run.run import Run
from rllr.tasks import load_task, parse_answer, split_answer
from rllr.update import PromptStream

SECONDS = 20  # an input that takes longer hangs

ROWS = [
    {
        "id": "a",
        "text": "a fine film",
        "label": "positive",
        "rationale": "fine",
        "rationales": {"negative": "film"},
        "score": 1.5,
    },
    {"id": 7, "text": 'dull, "overlong"\nand sad', "label": "NEGATIVE ", "rationales": '{"negative": "dull"}'},
    {"text": "שלום \u202e e\u0301 😀 naïve", "label": "positive"},
]
PAIRS = [
    {"prompt": "p", "chosen": "a\nLabel: x", "rejected": "b\nLabel: y", "kind": "mine"},
    {"prompt": "q", "chosen": "c", "rejected": "d"},
]
TASK = {
    "name": "own",
    "labels": ["good", "bad"],
    "prompt": "{text} {instruction}",
    "metric": "accuracy",
    "metrics": ["accuracy", "macro_f1"],
}
RECORD = {"format": RECORD_FORMAT, "stage": "sft", "task": TASK | {"ordinal": False, "answer_format": "rationale"},
    "data": {"task": "own", "labelled": 40},
          "config": {"rationales": "given"}, "tiny": True, "base": {"path": "x", "fingerprint": "ab"}}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "base_model_name_or_path": "base",
    "target_modules": ["q_proj"],
    "bias": "none",
}
SETTINGS = (
    "policy: runs/x\nsteps: 20\nkl_coef: 0.05\nfreeze_embeddings: false\n"
    "reward: mixed\nthreshold: q0.9\nmax_ref_kl: none\n"
)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_of(rows, delimiter):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(
        [("text", "label"), *((row["text"], row["label"]) for row in rows)]
    )
    return buffer.getvalue().encode()


def parquet():
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a fine film", "dull"], "label": ["positive", "negative"]}), buffer
    )
    return buffer.getvalue()


def safetensors_bytes():
    from safetensors.torch import save

    return save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.uint8)})


class Checkpoint:
    """A checkpoint with one file replaced; `rehashed`: by somebody who mends the manifest, too."""

    def __init__(self, name, rehashed=False):
        self.name, self.rehashed = name, rehashed

    def parts(self):
        """A small state of every kind of part; the first step is taken, so that the optimiser has moments."""
        model = torch.nn.ParameterDict({"w": torch.ones(3)})
        optimizer = Optimizer(model, 0.1, 10)
        model["w"].grad = torch.ones(3)
        optimizer.step()
        return {"model": model, **optimizer.parts(), "kl": AdaptiveKL(0.1, 6, 100),
                "stream": PromptStream(["a", "b", "c"], 2, 0),
                "sampling": torch.Generator().manual_seed(1)}  # fmt: skip

    def seed(self, root):
        folder = root / "seed"
        settings = {
            "steps": 3,
            "policy": "runs/x",
            "seed": 0,
            "learning_rate": 1e-3,
            "reward": "gold",
            "threshold": None,
            "save_every": 20,
        }
        run = {
            "format": RUN_FORMAT,
            "given": ["policy"],
            "stage": "ppo",
            "config": settings,
            "reads": {"--policy": "ab"},
            "machine": {"device": "cpu", "threads": 1},
            "steps": 9,
        }
        parts = self.parts() | {"streams": GlobalStreams()}
        state = {name: state_of(part) for name, part in parts.items()}
        state |= {
            "loop": {"step": 3, "best": {"step": 0}, "before": {"accuracy": 0.4}, "skipped": 0, "stopped": False},
            "metrics": {"bytes": 12, "seconds": 1.5},
        }
        path = write_checkpoint(folder, 3, {"step": 3, "run": run, "parts": state}, 2)
        (folder / "run.json").write_text(json.dumps(run))
        self.files = {name: (path / name).read_bytes() for name in (TENSORS, STATE, MANIFEST)} | {
            "run.json": (folder / "run.json").read_bytes()
        }
        return [self.files[self.name]]

    def __call__(self, path, content):
        """All that `--resume` does with it, on a run of a few small parts."""
        folder = path.parent / "run"
        checkpoint = folder / "checkpoints" / "step-000003"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4, "lo')
        for name, good in self.files.items():
            ((folder if name == "run.json" else checkpoint) / name).write_bytes(content if name == self.name else good)
        if self.rehashed:
            manifest = json.loads(self.files[MANIFEST])
            manifest["files"][self.name] = {"bytes": len(content), "sha256": sha256_of(checkpoint / self.name)}
            (checkpoint / MANIFEST).write_text(json.dumps(manifest))
        if self.name == "run.json":  # read where there is no checkpoint
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
            (folder / "metrics.jsonl").unlink()
        config = parse_config(train_ppo.Config, ["--resume", str(folder)])
        resumed = find_run_to_resume("ppo", config, lambda: "runs/none")
        config.validate()
        run = Run("ppo", config, folder, resumed=resumed)
        run.start({"--policy": "ab"})
        try:
            run.track(9, SimpleNamespace(step=0, best=None, before=None, skipped=0, stopped=False), **self.parts())
        finally:
            run.metrics.close()


def usable(result):
    """Every text in a result can be printed, and tokenised: it has no half characters. The result itself is handed
    on."""
    parts = result if isinstance(result, (list, tuple)) else [result]
    for part in parts:
        fields = vars(part) if hasattr(part, "__dict__") else part if isinstance(part, dict) else {}
        for value in fields.values():
            for text in (
                value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            ):
                assert not isinstance(text, str) or text.encode() is not None
    return result


def answer(path, content):
    text, task = content.decode("utf-8", "surrogateescape"), load_task("agnews")
    label = parse_answer(task, text)
    assert label is None or label in task.labels
    rationale, again = split_answer(task, text)
    assert again == label and isinstance(rationale, str)


def config_of(script):
    def read(path):
        config = parse_config(script.Config, ["--config", str(path)])
        config.validate()
        usable(config)

    return read


def examples(labels, task="sst2", **options):
    return lambda path: usable(
        load_examples(str(path), load_task(task), labels=labels, log=lambda line: None, **options)
    )


TARGETS = {  # name -> (reader of a path, file name, seeds)
    "data.jsonl": (examples("required"), "rows.jsonl", [jsonl(ROWS), jsonl(ROWS).replace(b"\n", b"\r\n")]),
    "data.jsonl, optional labels": (examples("optional"), "rows.jsonl", [jsonl(ROWS)]),
    "data.jsonl, ordinal": (examples("optional", "stsb"), "rows.jsonl",
        [jsonl([{"text": "a", "text_b": "b", "score": 2.5, "label": "3"}])]),
    "data.json": (examples("required"), "rows.json",
        [json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1).encode(), jsonl(ROWS)]),
    "authors' format": (examples("required"), "rows.json",
                        [json.dumps([{"instruction": "i", "input": "t", "output": "fine\nLabel: positive"}]).encode()]),
    "data.csv": (examples("required"), "rows.csv", [csv_of(ROWS, ","), b"\xef\xbb\xbf" + csv_of(ROWS, ",")]),
    "data.tsv": (examples("required"), "rows.tsv", [csv_of(ROWS, "\t")]),
    "data.parquet": (examples("required"), "rows.parquet", [parquet()]),
    "pairs": (lambda path: usable(load_pairs(str(path), lambda line: None)), "pairs.jsonl", [jsonl(PAIRS)]),
    "task.yaml": (lambda path: usable(load_task(str(path))), "task.yaml",
                  [b'name: own\nlabels: [good, bad]\nprompt: "{text}\\n{instruction}"\n'
                   b'ordinal: false\nmetrics: [accuracy]\n']),
    "task.json": (lambda path: usable(load_task(str(path))), "task.json", [json.dumps(TASK).encode()]),
    "config.yaml, ppo": (config_of(train_ppo), "config.yaml", [SETTINGS.encode()]),
    "config.json, sft": (config_of(train_sft), "config.json",
        [b'{"epochs": 3, "learning_rate": 1e-3, "dropout": null, "resume": "newest"}']),
    "config.yaml, rm": (config_of(train_rm), "config.yaml",
        [b"pairs: rationale\nepochs: 2\nloss: span\ncolumns: text=a,label=b\n"]),
    "rllr.json": (lambda path: read_record(path.parent), "rllr.json", [json.dumps(RECORD).encode()]),
    "adapter_config.json": (lambda path: read_adapter_config(path.parent), "adapter_config.json",
        [json.dumps(ADAPTER).encode()]),
    "score_statistics.json": (lambda path: load_statistics(path.parent), "score_statistics.json",
        [json.dumps({"mean": 0.1, "std": 1.5, "count": 600, "quantiles": [i / 100 for i in range(101)]}).encode()]),
    "rationale cache": (read_cache, "rationales.jsonl",
        [jsonl([{"id": "a", "label": "x", "rationale": "r", "asked": "ab"}])]),
    "weights": (read_safetensors, "w.safetensors", [safetensors_bytes()]),
    "state.json": (Checkpoint(STATE), "state.json", None),
    "state.json, rehashed": (Checkpoint(STATE, rehashed=True), "state.json", None),
    "state.safetensors, rehashed": (Checkpoint(TENSORS, rehashed=True), "state.safetensors", None),
    "manifest.json": (Checkpoint(MANIFEST), "manifest.json", None),
    "run.json": (Checkpoint("run.json"), "run.json", None),
    "parse_answer": (answer, "answer.txt", [b"because\nLabel: sports\n", "ein Grund\u2028Label: Welt".encode(),
        b"Label:world\r\n\r\n"]),
}  # fmt: skip

TOKENS = [
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n\n", b"\x1f\x8b", b"\xe2\x80\xa8", b"\xe2\x80\xae",
    b"\xcc\x81", "😀".encode(),
    b"\\ud800", b"\\udc00", b"\\u0000", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN",
    b"Infinity", b"-1",
    b"1e999", b"9" * 400, b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"{text}", b"Label:", b"label", b"text", b"id",
    b"&a", b"*a",
    b"!!python/object:os.system", b"!!binary", b"<<", b"---", b"2001-99-99", b"0x", b"\t", b"../../", b"tensor",
    b"pairs", b"%s", b"",
    b"-0", b"1_000", b"=", b"\\", b"\xc3\x28", b"a" * 3000,
]  # fmt: skip


def spoil(rng, seeds):
    """A seed with one to eight random changes: bits, bytes, tokens, cuts, doubled, moved or foreign stretches."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        what = rng.randrange(8)
        if what == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at:at] = rng.choice(TOKENS)
        elif what == 2:
            data[at : min(end, at + 12)] = rng.choice(TOKENS)
        elif what == 3:
            del data[at : min(end, at + rng.choice((1, 4, 30)))]
        elif what == 4:
            del data[at:]
        elif what == 5:
            data[at:at] = data[at:end] * rng.choice((1, 2, 7))
        elif what == 6:
            other = rng.choice(seeds)
            data[at:end] = other[rng.randrange(len(other) + 1) :]
        else:
            data[at:at] = rng.randbytes(rng.choice((1, 3, 20)))
        del data[1 << 20 :]
    return bytes(data)


@contextmanager
def alarm(seconds):
    """TimeoutError in the main thread if the block takes longer."""

    def ring(number, frame):
        raise TimeoutError(f"hangs: more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """Feeds contents to a target in a directory of its own."""

    def __init__(self, name, root):
        self.name, (self.read, file, self.seeds) = name, TARGETS[name]
        self.path = Path(root) / name.replace(" ", "_").replace(",", "").replace("'", "") / file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.seeds is None:
            self.seeds = self.read.seed(self.path.parent)

    def __call__(self, content):
        """ "result" or "refused"; AssertionError for what is neither."""
        wants_content = isinstance(self.read, Checkpoint) or self.read is answer
        if not wants_content:
            self.path.write_bytes(content)
        try:
            with alarm(SECONDS), redirect_stdout(io.StringIO()):
                self.read(self.path, content) if wants_content else self.read(self.path)
            return "result"
        except InputError as error:
            message = str(error)
            named = str(self.path.parent) in message or message.startswith(
                ("task ", "--")
            )  # the file, the task, or the flag
            assert named and len(message) < 5000, (
                f"{self.name}: {message[:300]!r} does not name the file, or is too long"
            )
            return "refused"
        except Exception as error:
            raise AssertionError(
                f"{self.name}: {type(error).__name__}: {str(error)[:300]}\n{content[:2000]!r}"
            ) from error
