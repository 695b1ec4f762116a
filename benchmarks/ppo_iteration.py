"""A whole PPO iteration, from rollout to optimiser steps, against TRL 1.12.0, the last release with a PPO trainer.

    pip install trl==1.12.0 accelerate        # in a separate environment with torch, transformers and datasets
    python benchmarks/ppo_iteration.py --shape S

An iteration has 64 answers, four separate models, float32, and one PPO epoch over four minibatches of 16. Both sides
make the same number of real optimiser steps: TRL runs with a batch of 64 and without accumulation, because with
accumulation over the minibatches its `accelerate` wrapper makes only one step out of four. There are two workloads: all
answers have 48 tokens, or answers end by a real EOS (geometric lengths, at most 64) and TRL continues to the longest
one in the batch.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from common import EOS, draw_lengths, draw_prompts, force, forced_rollout, make_model, net_peak_mb, set_up, write_result

BATCH, MINIBATCHES = 64, 4


def our_iteration(shape, prompts, lengths):
    """A function that runs one iteration and returns {phase: CPU seconds}."""
    from rllr.model.heads import RewardModel, ValueModel
    from rllr.ppo import gae, masked_whiten
    from rllr.rewards import shape_rewards
    from rllr.run.optimizer import Optimizer
    from rllr.update import analyse, improve

    policy, reference = make_model(shape), make_model(shape)
    value_model = ValueModel.from_policy(make_model(shape, seed=1)).eval()
    reward_model = RewardModel.from_policy(make_model(shape, seed=2)).eval()
    policy_optimizer, value_optimizer = (Optimizer(model, 1e-6, 1000) for model in (policy, value_model))
    models = SimpleNamespace(
        policy=policy, reference=reference, value_model=value_model,
        policy_optimizer=policy_optimizer, value_optimizer=value_optimizer,
    )  # fmt: skip
    clips = {"clip": 0.2, "value_clip": 0.2, "max_update_kl": None}
    config = SimpleNamespace(temperature=1.0, precision="fp32", micro_batch_size=0, tokens_per_batch=0, **clips)
    draw = torch.Generator().manual_seed(0)

    def run():
        seconds, start = {}, time.process_time()

        def lap(name):
            nonlocal start
            seconds[name], start = time.process_time() - start, time.process_time()

        rollout = forced_rollout(policy, prompts, lengths, draw)
        lap("rollout")
        order = torch.randperm(BATCH, generator=draw).tolist()
        size = BATCH // MINIBATCHES
        parts = [list(range(i, i + size)) for i in range(0, BATCH, size)]
        plan = [[order[i : i + size] for i in range(0, BATCH, size)]]
        batch = analyse(models, rollout, plan, config)
        with torch.no_grad():
            scores = torch.cat([reward_model(*batch.packed.rows(part)) for part in parts])
        mask = batch.response_mask
        rewards = shape_rewards(scores, batch.logprobs, batch.ref_logprobs, mask, 0.05)
        advantages, batch.returns = gae(rewards, batch.values, mask)
        batch.advantages = masked_whiten(advantages, mask)
        lap("score")
        improve(models, batch, plan, config)
        lap("update")
        return seconds

    return run


def trl_iterations(shape, prompts, max_new_tokens, lengths, repeats):
    """CPU seconds of each of TRL's iterations except the first, and its real optimiser steps per iteration."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOTrainer

    policy, reference = make_model(shape), make_model(shape)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = type(policy.config).from_dict(policy.config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
        heads.append(AutoModelForSequenceClassification.from_config(config))
    data = Dataset.from_dict({"input_ids": prompts * (repeats + 2)})
    force_lengths(policy, dict(zip(map(tuple, prompts), lengths)))
    ends, steps = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            ends.append(time.process_time())

    trainer = PPOTrainer(
        args=trl_settings(max_new_tokens, repeats),
        processing_class=trl_tokenizer(policy.config.vocab_size),
        model=policy,
        ref_model=reference,
        reward_model=heads[0],
        value_model=heads[1],
        train_dataset=data,
        eval_dataset=data.select(range(BATCH)),
        callbacks=[Clock()],
    )
    inner = trainer.optimizer.optimizer
    real_step = inner.step
    inner.step = lambda *a, **k: (steps.append(1), real_step(*a, **k))[1]
    trainer.train()
    spent = [after - before for before, after in zip(ends, ends[1:])]
    return spent, len(steps) / len(ends)


def trl_settings(max_new_tokens, repeats):
    from trl.experimental.ppo import PPOConfig

    ppo = {
        "num_mini_batches": MINIBATCHES,
        "num_ppo_epochs": 1,
        "total_episodes": BATCH * (repeats + 1),
        "response_length": max_new_tokens,
        "stop_token_id": EOS,
        "temperature": 1.0,
        "missing_eos_penalty": 1.0,
        "local_rollout_forward_batch_size": BATCH,
        "num_sample_generations": 0,
    }
    trainer = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-6,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10_000,
    }
    return PPOConfig(**ppo, **trainer)


def trl_tokenizer(vocab):
    """A tokenizer with one word per id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    special = {"eos_token": f"w{EOS}", "pad_token": "w0", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def force_lengths(policy, length_of):
    """From now on `policy.generate` writes answers of these lengths. length_of: {prompt as a tuple: length}."""
    from transformers import LogitsProcessor

    class Force(LogitsProcessor):
        def __init__(self):
            self.prompt_width = None

        def __call__(self, input_ids, scores):
            if self.prompt_width is None:
                self.prompt_width = input_ids.shape[1]
                prompts = [row[(row != 0).nonzero()[0, 0] :] for row in input_ids]  # without the padding on the left
                self.lengths = torch.tensor([length_of[tuple(prompt.tolist())] for prompt in prompts])
            return force(scores, self.lengths <= input_ids.shape[1] - self.prompt_width + 1)

    plain_generate = policy.generate

    def generate(*arguments, **keywords):
        return plain_generate(*arguments, logits_processor=[Force()], **keywords)

    policy.generate = generate


def peak_mb(engine, args, prompts, cap, lengths):
    """Net peak of two iterations with their models. Runs in a separate process: no engine may reuse freed memory."""
    shape = args.shape
    set_up(args.threads)
    if engine == "TRL":
        importlib.import_module("trl.experimental.ppo")  # the memory of the libraries does not count
        return net_peak_mb(lambda: trl_iterations(shape, prompts, cap, lengths, 1))
    importlib.import_module("rllr.update")

    def ours():
        run = our_iteration(shape, prompts, lengths)
        run(), run()

    return net_peak_mb(ours)


def compare_memory(args, workload, cap, lengths):
    prompts = draw_prompts(BATCH, 8000)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_mb, (name, args, prompts, cap, lengths)) for name in ("TRL", "rllr")}
    lines = [
        "64 answers, 4 steps; peak of two iterations with four models and two optimisers, minus the libraries.",
        "",
        "| | MB |",
        "|---|---|",
        *(f"| {engine} | {peak:.0f} |" for engine, peak in peaks.items()),
        f"| times less | {peaks['TRL'] / peaks['rllr']:.2f} |",
    ]
    record = {"shape": args.shape, "workload": workload, "peaks_mb": peaks}
    write_result("ppo_iteration", f"{args.shape}, {workload}, memory", lines, record)


def compare_time(args, workload, cap, lengths):
    prompts = draw_prompts(BATCH, 8000)
    trl, real_steps = trl_iterations(args.shape, prompts, cap, lengths, args.repeats)
    run = our_iteration(args.shape, prompts, lengths)
    run()
    ours = [run() for _ in range(args.repeats)]
    totals = [sum(seconds.values()) for seconds in ours]
    ratio = statistics.median(trl) / statistics.median(totals)
    phases = ", ".join(f"{name} {statistics.median(s[name] for s in ours):.2f}" for name in ours[0])
    lines = [
        f"64 answers, {sum(lengths)} tokens, {MINIBATCHES} optimiser steps by rllr, {real_steps:g} by TRL; float32; "
        f"median of {args.repeats}.",
        "",
        "| | CPU s per iteration |",
        "|---|---|",
        f"| TRL 1.12.0 | {statistics.median(trl):.2f} |",
        f"| rllr | {statistics.median(totals):.2f} ({phases}) |",
        f"| times faster | {ratio:.2f} |",
    ]
    record = {"shape": args.shape, "workload": workload, "trl": trl, "trl_optimizer_steps": real_steps}
    write_result("ppo_iteration", f"{args.shape}, {workload}", lines, record | {"ours": ours, "ratio": ratio})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=["S", "M"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.error("needs TRL: pip install trl==1.12.0 accelerate")
    set_up(args.threads)
    workloads = [("48 tokens each", 48, [48] * BATCH), ("real EOS, at most 64", 64, draw_lengths(BATCH))]
    for workload, cap, lengths in workloads:
        compare = compare_memory if args.memory else compare_time
        compare(args, workload, cap, lengths)


if __name__ == "__main__":
    main()
