"""Shared code of the benchmarks: model shapes, seeded workloads, timing in turns, results with command and machine."""

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


def llama_shape(hidden, intermediate, layers, heads, vocab, tied):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# Llama-like models with random weights: speed does not depend on the values.
SHAPES = {
    "S": llama_shape(256, 688, 4, 4, 8192, True),
    "M": llama_shape(512, 1376, 6, 8, 32000, False),
    "L": llama_shape(768, 2048, 12, 12, 32000, True),
}


def set_up(threads):
    """Set the number of threads, the scripts' allocator settings (for all engines), and quiet libraries."""
    from rllr.run.machine import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()


def make_model(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=EOS)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def draw_prompts(count, vocab, shortest=16, longest=96, seed=1):
    """Prompts of `shortest` to `longest` random tokens, none of them EOS."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(3, vocab, (length,), generator=draw).tolist() for length in lengths]


def draw_lengths(count, mean=24, cap=64, seed=2):
    """Answer lengths from a geometric distribution, at most `cap`; every engine writes exactly these many tokens."""
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
    """Within the block, our decoder writes answers of these lengths (one per prompt): EOS is forced when it samples."""
    from rllr.engine.decoder import Decoder

    plain, target = Decoder._append_tokens, torch.tensor(lengths)

    def forced(self, hidden, slots):
        head = self.head
        at_end = target[self.owners[slots]] <= self.counts[slots] + 1
        self.head = lambda x: force(head(x), at_end)
        try:
            plain(self, hidden, slots)
        finally:
            self.head = head

    Decoder._append_tokens = forced
    try:
        yield
    finally:
        Decoder._append_tokens = plain


def forced_rollout(model, prompts, lengths, draw=None, slots=128):
    """`rllr.rollout.generate` with answers of these lengths. draw: the generator; by default a new one."""
    from rllr.rollout import generate

    options = {"generator": draw or torch.Generator().manual_seed(0), "batch_size": slots}
    with decoder_forced_to(lengths):
        rollout = generate(model, prompts, max_new_tokens=max(lengths), eos_token_id=EOS, **options)
    assert rollout.response_lens.tolist() == lengths
    return rollout


def measure(engines, repeats):
    """{name: [(CPU seconds, wall seconds)]} of functions that run in turns, so that noise affects all of them.

    On a shared machine we compare the CPU time of this process; both times are reported. Each function has one warm-up.
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
    """{name: how many times faster than the base}: the median over the repeats of the ratio within each turn."""
    return {name: statistics.median(b[0] / t[0] for b, t in zip(times[base], values)) for name, values in times.items()}


def peak_memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def status_mb(field):
    """VmRSS (memory held now) or VmHWM (its peak) of this process in MB, on Linux."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) / 1024


def forget_peak():
    """Reset VmHWM to the memory held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def net_peak_mb(run):
    """Peak memory in MB of this process during `run()`, minus the memory held before."""
    before = status_mb("VmRSS")
    forget_peak()
    run()
    return status_mb("VmHWM") - before


def body_and_head(model):
    """(weights of the layers, weights of the head). Every token uses the former, tokens of answers also the latter."""
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    return body, model.get_output_embeddings().weight.numel()


def gemm_rate(size=1024):
    """GFLOP/s of a float32 matrix product on this machine: the upper limit, of which results give a share."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(8):
        start = time.process_time()
        a @ b
        best = max(best, 2 * size**3 / (time.process_time() - start) / 1e9)
    return best


def machine():
    """One line that describes processor, device and versions."""
    maker = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        maker = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{maker or platform.processor()}, {os.cpu_count()} cores, {device}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def step_times(directory):
    """Seconds of each step, from the second on."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if "shape/reward" in line}
    return {step: seconds[step] - seconds[step - 1] for step in seconds if step - 1 in seconds}


def write_result(name, title, lines, record):
    """Append a section to benchmarks/results/<name>.md and a line to <name>.jsonl, and print both."""
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
