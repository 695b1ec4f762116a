"""Everything that is measured on a GPU, in one call: decoding, updates, the three stages, a 7B iteration, a profile.

    git archive c01a04e | tar x -C /tmp/c01a04e                             # an older tree to compare with, if any
    python benchmarks/gpu.py --old /tmp/c01a04e --out gpu.jsonl             # one GPU, about five minutes
    python benchmarks/gpu.py --device cpu --scale tiny --out /tmp/gpu.jsonl # every row on toy sizes: does it run?

Rows; --only names some of them, the first is always measured:

limits    bandwidth of a copy and rate of a bf16 matrix product: what shares are of
decode    64 rows x 128 new tokens, against transformers' generate
update    forward and backward of 32 sequences, plain and as CUDA graphs (whatever the size)
norms     what one kernel for a norm gives: decoding and update of the smallest shape with and without
casts     rollouts of fp32 weights under autocast, the weights cast once a call and in every step
greedy    872 prompts x 48 tokens, this tree and the older one in turns
scripts   steps of train_sft.py, train_rm.py and train_ppo.py in turns: both trees, this one without CUDA graphs, too
mixed7b   an RLLR-mixed iteration with adapters on a 7B shape: seconds and peak memory per phase
profile   kernels and host operations of decoding steps and of one PPO step; as text beside --out
trl       a PPO step against TRL 1.12.0's, in turns (pip install trl==1.12.0 datasets); see gpu_trl.py
compiled  decode's opponent with a static cache and torch.compile (a minute of compiling per shape)

Weights are random, shapes true. Every result is a line of --out as soon as it is there; a row that fails leaves its
error there, and the next one goes on. --budget_s ends the row it meets.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

# SmolLM2-135M, Qwen2.5-0.5B and -1.5B, Llama-2-7B, all as Llama models (the biases of Qwen's projections are left out).
SHAPES = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
TOY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
       "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True}  # fmt: skip
REAL = SimpleNamespace(
    copy_bytes=2**30, product=8192, turns=20, shapes=("135M", "0.5B", "1.5B", "7B"), rows=64, new_tokens=128,
    shortest=64, longest=128, repeats=3, hf_repeats=2, update_rows=32, answer=48, answer_cap=128,
    labelled=1024, unlabelled=640, eval_rows=64, sft_epochs=(3, 1), rm_pairs=1, statistics=512, ppo_steps=13,
    ppo_prompts=64, rounds=2, learning_rate=1e-3, greedy_prompts=872, greedy_tokens=48, greedy_batch=256,
    mixed_prompts=64, mixed_tokens=256, mixed_micro=8, profile_steps=20, profile_prompts=64, profile_tokens=13,
    trl_steps=6,
)  # fmt: skip
TINY = SimpleNamespace(
    copy_bytes=2**24, product=256, turns=3, shapes=("135M", "7B"), rows=4, new_tokens=8,
    shortest=4, longest=10, repeats=2, hf_repeats=1, update_rows=4, answer=6, answer_cap=12,
    labelled=240, unlabelled=48, eval_rows=16, sft_epochs=(3, 1), rm_pairs=1, statistics=16, ppo_steps=5,
    ppo_prompts=8, rounds=2, learning_rate=1e-2, greedy_prompts=12, greedy_tokens=6, greedy_batch=8,
    mixed_prompts=4, mixed_tokens=6, mixed_micro=2, profile_steps=4, profile_prompts=4, profile_tokens=5,
    trl_steps=2,
)  # fmt: skip
# Seconds that a row may take, at most.
LIMITS_S = {"limits": 60, "decode": 120, "update": 40, "norms": 40, "casts": 40, "greedy": 60, "scripts": 390,
            "mixed7b": 90, "profile": 60, "trl": 75, "compiled": 240}  # fmt: skip
FIRST_STEPS = 3  # of a stage, which record graphs, take memory and so on: left out of its medians


class OutOfTime(BaseException):
    """The row's share of --budget_s is over. No Exception, so that nothing on the way takes it for its own."""


@contextlib.contextmanager
def at_most(seconds):
    """OutOfTime where the block takes longer."""

    def ring(number, frame):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """What the rows share: sizes, the device, measured limits, where results go, the trees' processes."""

    def __init__(self, args):
        self.args, self.size = args, TINY if args.scale == "tiny" else REAL
        self.device, self.start, self.limits, self.workers = args.device, time.monotonic(), {}, {}
        self.precision = "bf16" if self.device == "cuda" else "fp32"  # of the scripts: not every CPU has bf16 products
        self.out = Path(args.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="rllr-gpu-"))

    def left(self):
        return self.args.budget_s - (time.monotonic() - self.start)

    def write(self, row, **values):
        import torch
        import transformers

        card = torch.cuda.get_device_name() if self.device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
        record = {
            "row": row, **values, "card": card, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda, "scale": self.args.scale,
            "at_s": round(time.monotonic() - self.start, 1),
        }  # fmt: skip
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = [f"{name}={str(value)[:400]}" for name, value in values.items() if name not in ("traceback", "top")]
        print(f"[{record['at_s']:6.1f} s] {row}  {'  '.join(shown)}", flush=True)

    def sync(self):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def await_workers(self):
        """Wait until the trees' processes have imported; one that could not is left out."""
        for name, worker in list(self.workers.items()):
            try:
                with at_most(120):
                    worker.ready()
            except (Exception, OutOfTime) as error:
                self.write("start", tree=name, error=str(error)[-3000:])
                worker.close()
                del self.workers[name]

    def clocked(self, run):
        """(seconds, what it returns), the device's work included."""
        self.sync()
        start = time.perf_counter()
        result = run()
        self.sync()
        return time.perf_counter() - start, result

    def model(self, shape, dtype="bfloat16", seed=0, fused=True):
        """A causal LM with random weights, made on the device. transformers' generate knows no end token of it."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from rllr.engine.norms import fuse_norms

        torch.manual_seed(seed)
        settings = SHAPES[shape]
        if self.size is TINY:
            settings = TOY | {"tie_word_embeddings": settings["tie_word_embeddings"]}
        config = LlamaConfig(**settings, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(config).eval()
            assert model.dtype == getattr(torch, dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        if fused and self.device == "cuda":
            fuse_norms(model)  # as a model is loaded
        return model

    def prompts(self, count, vocab, shortest=None, longest=None):
        draw = random.Random("prompts")
        shortest, longest = shortest or self.size.shortest, longest or self.size.longest
        return [[draw.randrange(3, vocab) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]

    def peak_gib(self):
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device == "cuda" else None

    def held_gib(self):
        import torch

        return torch.cuda.memory_allocated() / 2**30 if self.device == "cuda" else 0.0

    def forget(self):
        """Free what a row held, and count peaks anew."""
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def median(values):
    return statistics.median(values) if values else None


def rounded(values, digits=4):
    return [round(value, digits) for value in values]


# ---- limits, decode, update ------------------------------------------------------------------------------------------


def limits(bench):
    """What the card does at best here and now: a copy (bytes read and written), a bf16 product of random matrices."""
    import torch

    size = bench.size
    a = torch.ones(size.copy_bytes, dtype=torch.uint8, device=bench.device)
    b = torch.empty_like(a)
    x = torch.randn(size.product, size.product, device=bench.device, dtype=torch.bfloat16)
    best = {}
    for name, run, work in (
        ("copy", lambda: b.copy_(a), 2 * size.copy_bytes),
        ("product", lambda: x @ x, 2 * size.product**3),
    ):
        for _ in range(3):
            run()
        seconds, _ = bench.clocked(lambda run=run: [run() for _ in range(size.turns)] and None)
        best[name] = work * size.turns / seconds
    bench.limits = best
    bench.write("limits", copy_tb_s=round(best["copy"] / 1e12, 3), product_tflop_s=round(best["product"] / 1e12, 1))


def ours(bench, model, prompts, new_tokens, draw, **more):
    """Our rollout of exactly `new_tokens` tokens a row: the stop id lies beyond the vocabulary."""
    from rllr.rollout import generate

    rollout = generate(
        model, prompts, max_new_tokens=new_tokens, eos_token_id=[model.config.vocab_size], pad_token_id=0,
        generator=draw, **more,
    )  # fmt: skip
    assert rollout.response_lens.tolist() == [new_tokens] * len(prompts), "a row ended early"
    return rollout


def theirs(model, prompts, new_tokens, **more):
    """transformers' generate on the same rows, left-padded, plain sampling from the whole softmax."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    written = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
        pad_token_id=0, **more,
    )  # fmt: skip
    assert written.shape == (len(prompts), width + new_tokens), "generate stopped early"


def floor_s(bench, model, prompts, new_tokens):
    """Seconds that reading takes: each step every weight once (but an input embedding of its own), and every row's keys
    and values once."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel() * model.get_input_embeddings().weight.element_size()
    width = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize
    seen = sum(len(p) + (new_tokens + 1) / 2 for p in prompts)
    return new_tokens * (weights + seen * per_token) / bench.limits["copy"]


def decode(bench):
    """64 rows x 128 tokens, all included, ours and transformers' in turns."""
    for shape in bench.size.shapes:
        decode_shape(bench, shape)
        bench.forget()


def decode_shape(bench, shape):
    import torch

    size, model = bench.size, bench.model(shape)
    prompts, draw = bench.prompts(size.rows, model.config.vocab_size), torch.Generator(bench.device).manual_seed(0)
    tokens, floor = size.rows * size.new_tokens, floor_s(bench, model, prompts, size.new_tokens)
    peers = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    runs = {"ours": lambda: ours(bench, model, prompts, size.new_tokens, draw)}
    runs |= {name: lambda s=settings: theirs(model, prompts, size.new_tokens, **s) for name, settings in peers.items()}
    turns = {"ours": size.repeats, "dynamic": size.hf_repeats, "static": 1}
    first = bench.clocked(runs["ours"])[0]
    bench.clocked(runs["ours"])
    for settings in peers.values():
        theirs(model, prompts, 4, **settings)
    bench.write(
        "decode-first", shape=shape, parameters=sum(p.numel() for p in model.parameters()), first_s=round(first, 3)
    )
    times = {name: [] for name in runs}
    for turn in range(max(turns.values())):
        for name, run in runs.items():
            times[name] += [bench.clocked(run)[0]] if turn < turns[name] else []
    seconds = median(times["ours"])
    bench.write(
        "decode", shape=shape, tokens_per_s=round(tokens / seconds), step_ms=round(1000 * seconds / size.new_tokens, 3),
        share_of_floor=round(floor / seconds, 4), floor_s=round(floor, 4),
        **{f"times_{name}": round(min(times[name]) / seconds, 2) for name in peers},
        **{f"seconds_{name}": rounded(values) for name, values in times.items()}, peak_gib=bench.peak_gib(),
    )  # fmt: skip


def compiled(bench):
    """The opponent at its best: a static cache, the decoding step compiled by transformers."""
    import torch

    for shape in bench.size.shapes:
        compiled_shape(bench, shape)
        torch._dynamo.reset()
        bench.forget()


def compiled_shape(bench, shape):
    import torch

    size, model = bench.size, bench.model(shape)
    prompts, draw = bench.prompts(size.rows, model.config.vocab_size), torch.Generator(bench.device).manual_seed(0)

    def peer():
        theirs(model, prompts, size.new_tokens, cache_implementation="static")

    def own():
        ours(bench, model, prompts, size.new_tokens, draw)

    bench.write("compiled-first", shape=shape, first_s=round(bench.clocked(peer)[0], 2))
    own(), own(), peer()
    times = [(bench.clocked(own)[0], bench.clocked(peer)[0]) for _ in range(size.hf_repeats)]
    mine, its = zip(*times)
    bench.write(
        "compiled", shape=shape, times_compiled=round(min(its) / median(mine), 2),
        seconds_ours=rounded(mine), seconds_compiled=rounded(its),
    )  # fmt: skip


def update(bench):
    """Forward and backward of 32 sequences through `token_logprobs`, bf16 weights."""
    for shape in bench.size.shapes:
        if shape != "7B" or bench.size is TINY:
            update_shape(bench, shape)
            bench.forget()


def update_shape(bench, shape):
    """Products are counted of real tokens alone, the head's of answer tokens alone, attention's not at all."""
    size, model = bench.size, bench.model(shape).train()
    step, rows, written, real = update_step(bench, model)

    def timed():
        bench.forget()
        for _ in range(4):  # the third records
            bench.clocked(step)
        return [bench.clocked(step)[0] for _ in range(5)], bench.peak_gib()

    (times, peak), (recorded, recorded_peak) = timed(), as_graphs(bench, timed)
    passes = vars(model.model).get("_rllr_passes")
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    rate = 6 * (body * real + head * written) / median(times)
    bench.write(
        "update", shape=shape, ms=round(1000 * median(times), 2), tflop_s=round(rate / 1e12, 1),
        share_of_product=round(rate / bench.limits["product"], 4), sequences=size.update_rows, real_tokens=real,
        answer_tokens=written, padded_tokens=rows[0].numel(), seconds=rounded(times), peak_gib=peak,
        ms_graphs=round(1000 * median(recorded), 2), times_graphs=round(median(times) / median(recorded), 2),
        share_graphs=round(rate * median(times) / median(recorded) / bench.limits["product"], 4),
        peak_graphs_gib=recorded_peak, recorded_passes=len(passes.recorded) if passes else 0,
    )  # fmt: skip


def update_step(bench, model):
    """(forward and backward of a batch, its rows, its answer tokens, all its tokens)."""
    from either_tree import logprobs_of, packed_rows

    size, draw, vocab = bench.size, random.Random("answers"), model.config.vocab_size
    prompts = bench.prompts(size.update_rows, vocab)
    lengths = [max(1, min(size.answer_cap, int(draw.expovariate(1 / size.answer)))) for _ in prompts]
    answers = [[draw.randrange(3, vocab) for _ in range(length)] for length in lengths]
    rows, written = packed_rows(prompts, answers, bench.device), sum(lengths)

    def step():
        model.zero_grad(set_to_none=True)
        (-logprobs_of(model, rows).sum() / written).backward()

    return step, rows, written, written + sum(map(len, prompts))


def norms(bench):
    """Decoding and update of the smallest shape with transformers' own norms and with one kernel each, in turns."""
    import torch

    size, shape, times = bench.size, bench.size.shapes[0], {}
    for turn in range(4):  # the first warms up
        for name in ("plain", "fused"):
            model = bench.model(shape, fused=name == "fused")
            prompts = bench.prompts(size.rows, model.config.vocab_size)
            draw = torch.Generator(bench.device).manual_seed(0)
            written = partial(ours, bench, model, prompts, size.new_tokens, draw)
            decoded = [bench.clocked(written)[0] for _ in range(2)]
            step, *_ = update_step(bench, model.train())
            updated = [bench.clocked(step)[0] for _ in range(4)]
            if turn:
                times.setdefault(f"decode_s_{name}", []).append(decoded[1])
                times.setdefault(f"update_s_{name}", []).append(median(updated[1:]))
            del model, step, written
            bench.forget()
    line = {name: round(median(values), 4) for name, values in times.items()}
    gains = {
        f"times_{what}": round(line[f"{what}_s_plain"] / line[f"{what}_s_fused"], 2) for what in ("decode", "update")
    }
    bench.write("norms", shape=shape, **line, **gains)


def casts(bench):
    """Rollouts of fp32 weights under autocast, in turns: weights cast once a call, and in every step. The decoder lives
    on from call to call; of each turn's calls the last one counts."""
    import torch

    from rllr.engine import kept
    from rllr.model.cast_once import CastWeights
    from rllr.model.precision import set_precision

    size, shape, times = bench.size, bench.size.shapes[0], {"once": [], "every_step": []}
    model = bench.model(shape, "float32")
    prompts = bench.prompts(size.rows, model.config.vocab_size)
    set_precision("bf16")
    try:
        for turn in range(4):  # the first warms up
            for name in times:
                kept._kept.clear()
                draw = torch.Generator(bench.device).manual_seed(0)
                written = partial(ours, bench, model, prompts, size.new_tokens, draw)
                room = {} if name == "once" else {"most_bytes": 0}
                with mock.patch("rllr.rollout.CastWeights", lambda model, most, room=room: CastWeights(model, **room)):
                    found = [bench.clocked(written)[0] for _ in range(3)]
                times[name] += found[-1:] * (turn > 0)
    finally:
        set_precision("fp32")
    line = {f"decode_s_{name}": round(median(values), 4) for name, values in times.items()}
    bench.write("casts", shape=shape, **line, times=round(line["decode_s_every_step"] / line["decode_s_once"], 2))


def as_graphs(bench, run):
    """What `run()` gives with recorded passes of any size; without a GPU they are plain ones."""
    from rllr.engine import graphs
    from rllr.model import passes

    worth, graphs.WORTH = graphs.WORTH, float("inf")
    passes.set_recording(True)
    try:
        return run()
    finally:
        passes.set_recording(False)
        graphs.WORTH = worth


# ---- the three scripts, and greedy answers, of both trees ------------------------------------------------------------


class Worker:
    """A tree's own process (gpu_worker.py), which takes one request at a time."""

    def __init__(self, name, tree, folder):
        self.name, self.folder = name, folder / name
        self.folder.mkdir(parents=True)
        self.log = self.folder / "log"
        command = [sys.executable, str(HERE / "gpu_worker.py"), str(tree), str(self.log)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ready(self):
        answer = self.read()
        if not answer.get("ready"):
            raise RuntimeError(f"{self.name}: {answer}")

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended: {self.end_of_log()}")
        return json.loads(line)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']} | {answer.get('traceback') or self.end_of_log()}")
        return answer

    def end_of_log(self):
        return self.log.read_text(errors="replace")[-600:] if self.log.exists() else ""

    def close(self):
        self.process.kill()
        self.process.wait()


def start_workers(bench):
    """A process for each tree, which imports meanwhile. `now` is this tree, `plain` too, with --cuda_graphs never."""
    trees = {"now": ROOT, "plain": ROOT}
    if bench.args.old and Path(bench.args.old).is_dir():
        trees["old"] = Path(bench.args.old).resolve()
    bench.workers = {name: Worker(name, tree, bench.work) for name, tree in trees.items()}


def make_tokenizer(texts):
    """A byte-level BPE tokenizer of these texts: a prompt of the task sst2 then has about 40 tokens, an answer 15."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, min_frequency=2, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*texts, *["Label: negative", "Label: positive", "Sentence: ", "label"] * 2], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=512, padding_side="right"
    )


def make_data(bench):
    """The demo's texts as files for the task sst2, and a random model of SmolLM2's shape with a tokenizer of them."""
    from either_tree import find

    folder, size = bench.work / "data", bench.size
    if folder.exists():
        return folder
    folder.mkdir()
    demo = find("demo_examples", "rllr.data.demo", "rllr.demo")
    train, evaluation = demo("train"), demo("dev")
    for name, rows in (("train", train[: size.labelled + size.unlabelled]), ("eval", evaluation[: size.eval_rows])):
        lines = (json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = make_tokenizer([row.text for row in train[: size.labelled]])
    model = bench.model("135M", "float32")
    assert len(tokenizer) <= model.config.vocab_size
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def step_times(path, name):
    """Medians over a stage's metrics.jsonl, its first steps left out: seconds from one step's line to the next one's
    (not where an evaluation lies between), and the phases of a PPO step."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    key = "loss" if name != "ppo" else "time/update"
    gaps = [b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:]) if key in a and key in b][FIRST_STEPS - 1 :]
    steps = [line for line in lines if key in line]
    found = {"step_s": round(median(gaps), 4) if gaps else None, "steps": len(steps)}
    for phase in ("rollout", "score", "update"):
        values = [line[f"time/{phase}"] for line in steps[FIRST_STEPS:] if f"time/{phase}" in line]
        found |= {f"{phase}_s": round(median(values), 4)} if values else {}
    if name == "ppo":
        found["response_len"] = round(median([line.get("act/response_len", 0) for line in steps]), 1)
        found["truncated"] = round(median([line.get("act/truncated", 0) for line in steps]), 3)
    elif steps:
        found["last_loss"] = round(steps[-1]["loss"], 3)
    return found


def scripts(bench):
    """SFT of 32 rows a step, reward model of 32 pairs (64 sequences), PPO of 64 prompts; autocast, trees in turns.

    The second SFT run is shorter and only timed: reward model and PPO start from the first, in all from this tree's.
    """
    data, found = make_data(bench), {}
    try:
        for turn in range(bench.size.rounds):
            for stage in ("sft", "rm", "ppo"):
                for worker in list(bench.workers.values())[:: -1 if turn % 2 else 1]:
                    run_stage(bench, stage, turn, worker, data, found)
    finally:
        for stage in ("sft", "rm", "ppo"):
            summarise(bench, stage, {name: found.get((stage, name), []) for name in bench.workers})


def run_stage(bench, stage, turn, worker, data, found):
    """One run of a script in one tree. Adds its medians to `found`."""
    size, out, now = bench.size, worker.folder / f"{stage}{turn}", bench.workers["now"]
    argv = {
        "sft": ["--model", data / "model", "--task", "sst2", "--train_file", data / "train.jsonl",
                "--eval_file", data / "eval.jsonl", "--labelled", size.labelled, "--rationales", "evidence",
                "--epochs", size.sft_epochs[min(turn, 1)], "--learning_rate", size.learning_rate, "--show", 0],
        "rm": ["--policy", worker.folder / "sft0", "--pairs", "label", "--epochs", 1, "--pairs_per_row", size.rm_pairs,
               "--batch_size", 32, "--statistics_prompts", size.statistics],
        "ppo": ["--policy", worker.folder / "sft0", "--reward", "label", "--label_rm", worker.folder / "rm0",
                "--steps", size.ppo_steps, "--rollout_prompts", size.ppo_prompts, "--minibatches", 2,
                "--eval_every", 1000, "--show_every", 1000],
    }[stage]  # fmt: skip
    argv += ["--output_dir", out, "--precision", bench.precision, "--seed", 0, "--save_every", 0]
    argv += ["--cuda_graphs", "never"] if worker.name == "plain" else []
    try:
        answer = worker.ask(script=f"train_{stage}", argv=[str(argument) for argument in argv])
        medians = step_times(out / "metrics.jsonl", stage)
        medians |= {name: answer[name] for name in ("wall_s", "peak_gib") if name in answer}
        if worker.name == "now":  # what could not be recorded would be timed as a plain pass
            medians["graphs_off"] = worker.log.read_text(errors="replace").count("--cuda_graphs is off")
        found.setdefault((stage, worker.name), []).append(medians)
        bench.write(stage, tree=worker.name, turn=turn, **medians)
        if stage == "sft" and turn == 0 and worker is not now:  # from here on all have the same policy
            shutil.copy(now.folder / "sft0" / "model.safetensors", worker.folder / "sft0")
    except Exception as error:
        bench.write(stage, tree=worker.name, turn=turn, error=f"{type(error).__name__}: {error}"[-3000:])
        if worker.process.poll() is not None:
            raise


def summarise(bench, stage, found):
    """A stage's medians over the turns, and how many times faster this tree is than the older one, and than
    without CUDA graphs. found: {tree: [medians of a run]}."""
    line = {}
    for field in ("step_s", "rollout_s", "score_s", "update_s"):
        values = {name: median([run[field] for run in runs if run.get(field)]) for name, runs in found.items()}
        line |= {f"{field}_{name}": round(value, 4) for name, value in values.items() if value}
        for name, slow, fast in (("times", "old", "now"), ("times_graphs", "plain", "now")):
            if values.get(slow) and values.get(fast):
                line[f"{name}_{field.removesuffix('_s')}"] = round(values[slow] / values[fast], 2)
    bench.write(f"{stage}-summary", **line)


def greedy(bench):
    """872 prompts answered greedily, 48 tokens each, fp32 weights under autocast, both trees in turns."""
    data, size = make_data(bench), bench.size
    vocab = SHAPES["135M"]["vocab_size"] if size is REAL else TOY["vocab_size"]
    prompts = bench.prompts(size.greedy_prompts, vocab, max(3, size.shortest // 2), max(5, size.longest // 2))
    request = {"model": str(data / "model"), "prompts": prompts, "new_tokens": size.greedy_tokens,
               "batch_size": size.greedy_batch, "repeats": 2, "bf16": bench.device == "cuda"}  # fmt: skip
    times = {}
    for turn in range(2):
        order = [worker for name, worker in bench.workers.items() if name != "plain"]
        for worker in order if turn % 2 == 0 else order[::-1]:
            answer = worker.ask(greedy=request)
            first, *later = answer["answer"]["seconds"]
            times.setdefault(worker.name, []).extend(later)
            peak = answer.get("peak_gib")
            bench.write("greedy", tree=worker.name, turn=turn, first_s=first, seconds=later, peak_gib=peak)
    line = {f"seconds_{name}": median(values) for name, values in times.items()}
    if "old" in times:
        line["times"] = round(median(times["old"]) / median(times["now"]), 2)
    bench.write("greedy-summary", prompts=size.greedy_prompts, new_tokens=size.greedy_tokens, **line)


# ---- whole iterations in this process --------------------------------------------------------------------------------


class Iteration:
    """One PPO iteration's acts by rllr's own functions, on models that are there already. reward_models: one or two."""

    def __init__(self, bench, policy, reference, value_model, reward_models, *, prompts, new_tokens, **settings):
        import torch

        import train_ppo
        from rllr.judge import Judges, RewardModelScorer, ScoreStatistics
        from rllr.run.optimizer import Optimizer
        from rllr.update import PromptStream

        self.bench, self.prompts, self.new_tokens = bench, prompts, new_tokens
        self.config = train_ppo.Config(
            rollout_prompts=len(prompts), precision="bf16", learning_rate=1e-6, value_learning_rate=5e-6, **settings
        )
        self.plans = PromptStream(list(prompts), len(prompts), 0)
        self.models = SimpleNamespace(
            policy=policy, reference=reference, value_model=value_model,
            policy_optimizer=Optimizer(policy, 1e-6, 1000), value_optimizer=Optimizer(value_model, 5e-6, 1000),
        )  # fmt: skip
        stored = ScoreStatistics(mean=0.0, std=1.0, count=512, quantiles=[0.0] * 101)
        scorers = [RewardModelScorer(model, stored) for model in reward_models]
        parts = dict(zip(("label", "rationale"), scorers))
        self.judges = Judges("mixed" if len(parts) > 1 else "label", parts, threshold=1.0)
        self.draw = torch.Generator(bench.device).manual_seed(0)

    def generate(self):
        from either_tree import autocast

        with autocast(self.bench.device):
            self.rollout = ours(self.bench, self.models.policy, self.prompts, self.new_tokens, self.draw)

    def score(self):
        """Acts 2 to 5."""
        import torch
        from either_tree import autocast

        from rllr.judge import Samples
        from rllr.ppo import gae, masked_whiten
        from rllr.rewards import label_sensitive_reward, shape_rewards
        from rllr.update import analyse

        self.plan, rollout = self.plans.minibatch_plan(self.config.ppo_epochs, self.config.minibatches), self.rollout
        texts = [[None] * len(rollout.sequences)] * 4
        with autocast(self.bench.device):
            batch = analyse(self.models, rollout, self.plan, self.config)
            judged = self.judges(Samples(*texts, *rollout.packed, rollout.truncated))
        batch.scores = label_sensitive_reward(
            judged.label_scores, judged.rationale_scores, judged.threshold, judged.mode
        )
        mask = batch.response_mask
        batch.rewards = shape_rewards(batch.scores, batch.logprobs, batch.ref_logprobs, mask, 0.1, "k1")
        raw, batch.returns = gae(batch.rewards, batch.values, mask, 1.0, 0.95)
        batch.advantages = masked_whiten(raw, mask)
        self.batch = batch
        assert torch.isfinite(batch.advantages).all()

    def update(self):
        from either_tree import autocast

        from rllr.update import improve

        with autocast(self.bench.device):
            return improve(self.models, self.batch, self.plan, self.config)


def mixed7b(bench):
    """RLLR-mixed of a 7B shape: one frozen bf16 base, adapters of rank 16 for policy, value and two reward models;
    64 prompts, 256 new tokens, two minibatches, eight answers a forward. Turn 1 counts, turn 0 warms up."""
    import torch
    from either_tree import find

    import train_ppo

    size = bench.size
    config = train_ppo.Config(lora_rank=16, precision="bf16", base_dtype="bf16")
    base = bench.model("7B").requires_grad_(False)
    bench.write("mixed7b-base", gib=bench.peak_gib())
    role, new_role = find("RolePolicy", "rllr.model.roles"), find("new_role", "rllr.model.roles")
    reward_model, value_model = find("RewardModel", "rllr.model.heads"), find("ValueModel", "rllr.model.heads")
    judges = [
        reward_model.from_policy(new_role(base, "label_rm", config, 0), seed=0).eval().requires_grad_(False),
        reward_model.from_policy(new_role(base, "rationale_rm", config, 1), seed=1).eval().requires_grad_(False),
    ]
    policy, value = new_role(base, "policy", config, 2), value_model.from_policy(new_role(base, "value", config, 3))
    iteration = Iteration(
        bench, policy, role(base, None), value.eval(), judges, new_tokens=size.mixed_tokens,
        prompts=bench.prompts(size.mixed_prompts, base.config.vocab_size), lora_rank=16, base_dtype="bf16",
        micro_batch_size=size.mixed_micro, reward="mixed",
    )  # fmt: skip
    for turn in range(2):
        total, peaks = {}, []
        for phase in (iteration.generate, iteration.score, iteration.update):
            if bench.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, peak = round(bench.clocked(phase)[0], 3), bench.peak_gib()
            total |= {f"{phase.__name__}_s": seconds, f"{phase.__name__}_gib": peak}
            peaks.append(peak or 0)
            bench.write("mixed7b-phase", turn=turn, phase=phase.__name__, seconds=seconds, peak_gib=peak)
        bench.write(
            "mixed7b", turn=turn, **total, iteration_s=round(sum(v for k, v in total.items() if k.endswith("_s")), 3),
            peak_gib=max(peaks), prompts=size.mixed_prompts, new_tokens=size.mixed_tokens,
            micro_batch_size=size.mixed_micro,
        )  # fmt: skip


def profile(bench):
    """torch.profiler of a few decoding steps, and of one PPO update, of the 135M shape; in text beside --out."""
    from either_tree import find

    size = bench.size
    value, reward = find("ValueModel", "rllr.model.heads"), find("RewardModel", "rllr.model.heads")
    models = [bench.model("135M", "float32", seed).eval() for seed in range(4)]
    models[1].requires_grad_(False), models[3].requires_grad_(False)
    iteration = Iteration(
        bench, *models[:2], value.from_policy(models[2]).eval(), [reward.from_policy(models[3]).eval()],
        prompts=bench.prompts(size.profile_prompts, models[0].config.vocab_size, size.shortest // 2, size.longest // 2),
        new_tokens=size.profile_steps + 1,
    )  # fmt: skip
    bf16 = bench.model("135M")
    draw = iteration.draw
    for _ in range(3):
        ours(bench, bf16, iteration.prompts, iteration.new_tokens, draw)
    profiled(bench, "decode, bf16 weights", lambda: ours(bench, bf16, iteration.prompts, iteration.new_tokens, draw))
    iteration.new_tokens = size.profile_tokens
    for _ in range(2):
        iteration.generate(), iteration.score(), iteration.update()
    profiled(bench, "rollout, autocast", iteration.generate)
    profiled(bench, "analyse and judge, autocast", iteration.score)
    profiled(bench, "PPO update, autocast", iteration.update)


def profiled(bench, what, run):
    """Write the 15 dearest kernels and host operations of a call, and the share of its time that the GPU computed."""
    import torch
    from torch.profiler import ProfilerActivity

    plain, _ = bench.clocked(run)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device == "cuda")
    with torch.profiler.profile(activities=activities) as prof:
        seconds, _ = bench.clocked(run)
    events = prof.events()
    marks = (
        "Activity Buffer",
        "Optimizer.",
        "ProfilerStep",
        "## Call",
    )  # spans on the GPU's timeline that are no kernels
    kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.name.startswith(marks)
               and not getattr(e, "is_user_annotation", False)]  # fmt: skip
    spans, busy, end = sorted((e.time_range.start, e.time_range.end) for e in kernels), 0.0, 0.0
    for start, stop in spans:  # the union: kernels may overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    averages = prof.key_averages()
    on_host = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:15]
    sums = {}
    for e in kernels:
        total, count = sums.get(e.name, (0.0, 0))
        sums[e.name] = total + e.time_range.end - e.time_range.start, count + 1
    on_gpu = sorted(sums.items(), key=lambda item: -item[1][0])[:15]
    share = busy / 1e6 / plain if kernels else None
    percent = "none" if share is None else f"{100 * share:.1f} %"
    title = (
        f"## {what}: {1000 * plain:.2f} ms ({1000 * seconds:.2f} ms under the profiler), {len(kernels)} kernels, "
        f"GPU busy {busy / 1000:.2f} ms = {percent} of the unprofiled time"
    )
    lines = [title, "", "GPU, ms, calls, kernel"]
    lines += [f"{total / 1000:9.3f} {count:6d}  {name[:150]}" for name, (total, count) in on_gpu]
    lines += ["", "host (self), ms, calls, operation"]
    lines += [f"{e.self_cpu_time_total / 1000:9.3f} {e.count:6d}  {e.key[:150]}" for e in on_host]
    with open(bench.out.with_suffix(".profile.txt"), "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
    bench.write(
        "profile", what=what, ms=round(1000 * plain, 3), profiled_ms=round(1000 * seconds, 3), kernels=len(kernels),
        gpu_busy_ms=round(busy / 1000, 3), gpu_busy_share=share and round(share, 4), top=lines[2:],
    )  # fmt: skip


def trl(bench):
    """Whole PPO steps, ours and TRL's."""
    from gpu_trl import against_trl

    against_trl(bench, Iteration)


ROWS = {"limits": limits, "decode": decode, "update": update, "norms": norms, "casts": casts, "greedy": greedy,
        "scripts": scripts, "mixed7b": mixed7b, "profile": profile, "trl": trl, "compiled": compiled}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, help="these rows alone")
    parser.add_argument("--skip", nargs="+", default=[], choices=ROWS, help="all rows but these")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="real", choices=("real", "tiny"))
    parser.add_argument(
        "--old", default=".gpu/c01a04e", help="an older tree, unpacked; rows go without it where it is missing"
    )
    parser.add_argument("--out", default="gpu.jsonl")
    parser.add_argument("--budget_s", type=float, default=300, help="seconds for everything; what is left out says so")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    bench = Bench(args)
    wanted = [row for row in ROWS if row == "limits" or row in (args.only or ROWS) and row not in args.skip]
    if {"scripts", "greedy"} & set(wanted):
        start_workers(bench)  # they import while this process does
    try:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if args.threads:
            torch.set_num_threads(args.threads)
        import rllr.rollout  # noqa: F401
        import train_ppo  # noqa: F401

        bench.await_workers()  # nobody imports while something is timed
        old = str(args.old) if "old" in bench.workers else "no older tree"
        bench.write("start", rows=wanted, old=old, cores=os.cpu_count(), threads=torch.get_num_threads())
        for row in wanted:
            run_row(bench, row)
    finally:
        for worker in bench.workers.values():
            worker.close()
            if worker.log.exists():  # what the scripts printed
                shutil.copy(worker.log, bench.out.with_name(f"{bench.out.stem}-{worker.name}.log"))
        shutil.rmtree(bench.work, ignore_errors=True)


def run_row(bench, row):
    if row in ("mixed7b", "profile", "trl", "compiled"):
        for worker in bench.workers.values():  # their memory and their kernels are out of the way
            worker.close()
    allowed = min(bench.left(), LIMITS_S[row])
    if allowed < 5:
        bench.write(row, error="left out: the budget is spent")
        return
    from rllr.model.passes import set_recording

    start = time.monotonic()
    try:
        set_recording(row in ("mixed7b", "profile", "trl"))  # as the scripts do
        with at_most(allowed):
            ROWS[row](bench)
    except (Exception, OutOfTime) as error:
        bench.write(row, error=f"{type(error).__name__}: {error}"[-3000:], traceback=traceback.format_exc()[-3000:])
        if bench.args.scale == "tiny":
            traceback.print_exc()
        if isinstance(error, OutOfTime):  # a process may still be at it: its answer would be taken for another's
            for worker in bench.workers.values():
                worker.close()
    bench.write("row-end", of=row, seconds=round(time.monotonic() - start, 1))
    bench.forget()


if __name__ == "__main__":
    main()
