"""What the benchmarks share: model shapes, seeded workloads, interleaved timing, results with their command and machine."""

import json
import os
import platform
import resource
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EOS = 2
SHAPES = {  # random Llama-like weights: speed does not need trained ones
    "S": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
          "vocab_size": 8192, "tie_word_embeddings": True},
    "M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
          "vocab_size": 32000, "tie_word_embeddings": False},
    "L": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
          "vocab_size": 32000, "tie_word_embeddings": True},
}  # fmt: skip


def set_up(threads):
    """One thread pool, allocator settings as in the scripts (for every engine alike), quiet libraries."""
    from rllr.run.machine import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()


def make_model(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=EOS)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def draw_prompts(count, vocab, shortest=16, longest=96, seed=1):
    """Prompts of 16..96 random tokens, none of them EOS."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(3, vocab, (length,), generator=draw).tolist() for length in lengths]


def draw_lengths(count, mean=24, cap=64, seed=2):
    """Answer lengths: geometric, cut at `cap`, so that every engine writes the very same number of tokens per prompt."""
    draw = torch.Generator().manual_seed(seed)
    return torch.empty(count).geometric_(1 / mean, generator=draw).clamp(1, cap).long().tolist()


def force(logits, at_end):
    """Logits [B, V] under which EOS is certain in the rows `at_end` and impossible in the others."""
    logits[:, EOS] = -torch.inf
    logits[at_end] = -torch.inf
    logits[at_end, EOS] = 0.0
    return logits


@contextmanager
def decoder_forced_to(lengths):
    """Within the block our decoder writes answers of these lengths (one per prompt), by forcing EOS where it samples."""
    from rllr.engine.decoder import Decoder

    plain, target = Decoder._take, torch.tensor(lengths)

    def forced(self, hidden, slots):
        head = self.head
        at_end = target[self.owners[slots]] <= self.counts[slots] + 1
        self.head = lambda x: force(head(x), at_end)
        try:
            plain(self, hidden, slots)
        finally:
            self.head = head

    Decoder._take = forced
    try:
        yield
    finally:
        Decoder._take = plain


def forced_rollout(model, prompts, lengths, draw=None, slots=128):
    """`rllr.rollout.generate` with answers of these lengths; draw: the generator, default a new one. 128 slots are its default."""
    from rllr.rollout import generate

    draw = draw or torch.Generator().manual_seed(0)
    with decoder_forced_to(lengths):
        rollout = generate(
            model, prompts, max_new_tokens=max(lengths), eos_token_id=EOS, generator=draw, batch_size=slots
        )
    assert rollout.response_lens.tolist() == lengths
    return rollout


def measure(engines, repeats):
    """{name: [(CPU seconds, wall seconds)]} of callables run in turns, so that a noisy moment meets all of them.

    CPU time of this process is what is compared on a shared machine; both are reported. One warm-up each.
    """
    for run in engines.values():
        run()
    times = {name: [] for name in engines}
    for _ in range(repeats):
        for name, run in engines.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def median(times, which=0):
    return statistics.median(pair[which] for pair in times)


def ratios(times, base):
    """Median over the repeats of the ratio to the base within each turn."""
    return {name: statistics.median(b[0] / t[0] for b, t in zip(times[base], values)) for name, values in times.items()}


def peak_memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def status_mb(field):
    """VmRSS (memory held now) or VmHWM (its peak) of this process in MB, on Linux."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) / 1024


def forget_peak():
    """Start VmHWM again at what is held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def net_peak_mb(run):
    """Peak memory of this process while `run()` runs, above what it holds before, in MB."""
    before = status_mb("VmRSS")
    forget_peak()
    run()
    return status_mb("VmHWM") - before


def body_and_head(model):
    """(weights of the layers, weights of the head): what each token, and each answer's token, is multiplied with."""
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    return body, model.get_output_embeddings().weight.numel()


def gemm_rate(size=1024):
    """GFLOP/s of a float32 matrix product here, now: the limit that shares of are quoted."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(8):
        start = time.process_time()
        a @ b
        best = max(best, 2 * size**3 / (time.process_time() - start) / 1e9)
    return best


def machine():
    maker = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        maker = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{maker or platform.processor()}, {os.cpu_count()} cores, {device}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def write_result(name, title, lines, record):
    """Append a section to benchmarks/results/<name>.md and a line to <name>.jsonl; print both."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = {"benchmark": name, "command": command, "machine": machine(), **record}
    text = "\n".join([f"## {title}", "", *lines, "", f"    {command}", "", machine(), ""])
    print(text)
    print(json.dumps(record))
    results = ROOT / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    with open(results / f"{name}.md", "a", encoding="utf-8") as file:
        file.write(text + "\n")
    with open(results / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
