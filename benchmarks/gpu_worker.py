"""One tree's process for gpu.py: it imports torch and that tree once, then runs what it is told, one JSON line each.

    python benchmarks/gpu_worker.py TREE LOG      # started by gpu.py, in the tree; what the scripts print goes to LOG

Asked {"script": "train_sft", "argv": [...]}: runs the script's own main. Asked {"greedy": {...}}: answers greedily.
"""

import gc
import json
import os
import sys
import time
import traceback


def main():
    tree, log = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    here = sys.path[0]
    sys.path[0] = tree  # the tree's scripts and its rllr, and after everything else this folder's helpers
    sys.path.append(here)
    import torch

    import train_ppo
    import train_rm
    import train_sft

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    scripts = {"train_sft": train_sft, "train_rm": train_rm, "train_ppo": train_ppo}

    def reply(answer):
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    reply({"ready": os.path.dirname(os.path.abspath(train_ppo.__file__))})
    for line in sys.stdin:
        asked, start = json.loads(line), time.perf_counter()
        try:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            answer = greedy(**asked["greedy"]) if "greedy" in asked else scripts[asked["script"]].main(asked["argv"])
            answer = {"answer": answer}
        except SystemExit as end:
            answer = {"error": f"exit code {end.code}; see {log}"} if end.code else {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
        sys.stdout.flush(), sys.stderr.flush()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            answer["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        reply(answer | {"wall_s": round(time.perf_counter() - start, 3)})


def greedy(model, prompts, new_tokens, batch_size, repeats, bf16=True):
    """Seconds of `repeats` + 1 calls, the first of which warms up: fp32 weights under autocast, as in the scripts.

    No token ends an answer: the stop id lies beyond the vocabulary.
    """
    import torch
    from either_tree import autocast, find

    from rllr.rollout import generate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = find("load_policy", "rllr.model.loading", "rllr.model")(model, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with autocast(device, bf16):
            rollout = generate(
                model, prompts, max_new_tokens=new_tokens, eos_token_id=[model.config.vocab_size], pad_token_id=0,
                greedy=True, batch_size=batch_size,
            )  # fmt: skip
        assert rollout.response_lens.tolist() == [new_tokens] * len(prompts)
        seconds.append(round(time.perf_counter() - start, 4))
    return {"seconds": seconds}


if __name__ == "__main__":
    main()
