"""A whole PPO iteration, rollout to optimiser steps, against TRL 1.12.0, the last release with a PPO trainer.

    pip install trl==1.12.0 accelerate        # in an environment of its own beside torch, transformers and datasets
    python benchmarks/ppo_iteration.py --shape S

64 answers an iteration, four separate models, one PPO epoch over four minibatches of 16, float32, and as many real optimiser
steps on both sides: TRL runs with a batch of 64 and no accumulation, because with accumulation over the minibatches its
`accelerate` wrapper makes one step of four. Two workloads: every answer 48 tokens long, and answers that end by a real EOS
(lengths geometric, at most 64), where TRL goes on to the longest one in the batch.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from common import EOS, draw_lengths, draw_prompts, force, forced_rollout, make_model, net_peak_mb, set_up, write_result

BATCH, MINIBATCHES = 64, 4


def our_iteration(shape, prompts, lengths):
    """A function that runs one iteration and returns the seconds of CPU time per phase."""
    from rllr.model.heads import RewardModel, ValueModel
    from rllr.ppo import gae, masked_whiten
    from rllr.rewards import shape_rewards
    from rllr.run.optimizer import make_optimizer
    from rllr.update import analyse, improve

    policy, reference = make_model(shape), make_model(shape)
    value_model = ValueModel.from_policy(make_model(shape, seed=1)).eval()
    reward_model = RewardModel.from_policy(make_model(shape, seed=2)).eval()
    optimizers = [make_optimizer(model, 1e-6, 1000) for model in (policy, value_model)]
    config = SimpleNamespace(
        temperature=1.0, clip=0.2, value_clip=0.2, max_grad_norm=1.0, precision="fp32", max_update_kl=None,
        micro_batch_size=0, tokens_per_batch=0,
    )  # fmt: skip
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
        plan = [[order[i : i + size] for i in range(0, BATCH, size)]]
        batch = analyse(policy, reference, value_model, rollout, plan, config, nullcontext)
        with torch.no_grad():
            scores = torch.cat([
                reward_model(*batch.rows(list(range(i, i + size)))) for i in range(0, BATCH, size)
            ])  # fmt: skip
        rewards = shape_rewards(scores, batch.logprobs, batch.ref_logprobs, batch.mask, 0.05)
        advantages, batch.returns = gae(rewards, batch.values, batch.mask)
        batch.advantages = masked_whiten(advantages, batch.mask)
        lap("score")
        improve(policy, value_model, *optimizers, batch, plan, config, nullcontext)
        lap("update")
        return seconds

    return run


def trl_iterations(shape, prompts, max_new_tokens, lengths, repeats):
    """CPU seconds of each of TRL's iterations but the first, and the number of real optimiser steps per iteration."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForSequenceClassification,
        LogitsProcessor,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = make_model(shape), make_model(shape)
    vocab = policy.config.vocab_size
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"w{EOS}", pad_token="w0", padding_side="left"
    )
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = type(policy.config).from_dict(policy.config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
        heads.append(AutoModelForSequenceClassification.from_config(config))
    folder = tempfile.mkdtemp()
    settings = PPOConfig(
        output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=MINIBATCHES,
        num_ppo_epochs=1, total_episodes=BATCH * (repeats + 1), response_length=max_new_tokens, stop_token_id=EOS,
        local_rollout_forward_batch_size=BATCH, temperature=1.0, learning_rate=1e-6, missing_eos_penalty=1.0, report_to=[],
        num_sample_generations=0, bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=10_000,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": prompts * (repeats + 2)})
    by_prompt = {tuple(prompt): length for prompt, length in zip(prompts, lengths)}

    class Force(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if Force.first is None:
                Force.first = input_ids.shape[1]
                Force.lengths = torch.tensor(
                    [by_prompt[tuple(row[(row != 0).nonzero()[0, 0] :].tolist())] for row in input_ids]
                )
            return force(scores, Force.lengths <= input_ids.shape[1] - Force.first + 1)

    real_generate = policy.generate

    def generate(*arguments, **keywords):
        Force.first = None
        return real_generate(*arguments, logits_processor=[Force()], **keywords)

    policy.generate = generate
    ends, steps = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            ends.append(time.process_time())

    trainer = PPOTrainer(
        args=settings, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=heads[0],
        value_model=heads[1], train_dataset=data, eval_dataset=data.select(range(BATCH)), callbacks=[Clock()],
    )  # fmt: skip
    inner = trainer.optimizer.optimizer
    real_step = inner.step
    inner.step = lambda *a, **k: (steps.append(1), real_step(*a, **k))[1]
    trainer.train()
    spent = [after - before for before, after in zip(ends, ends[1:])]
    return spent, len(steps) / len(ends)


def peak_mb(engine, shape, threads, prompts, cap, lengths):
    """Net peak of two iterations, models included, in a process of its own: no engine finds memory that another left."""
    set_up(threads)
    if engine == "TRL":
        import trl.experimental.ppo  # noqa: F401  the libraries themselves do not count

        return net_peak_mb(lambda: trl_iterations(shape, prompts, cap, lengths, 1))
    import rllr.update  # noqa: F401

    def ours():
        run = our_iteration(shape, prompts, lengths)
        run(), run()

    return net_peak_mb(ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=["S", "M"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    args = parser.parse_args()
    set_up(args.threads)
    for workload, cap, lengths in (
        ("48 tokens each", 48, [48] * BATCH),
        ("real EOS, at most 64", 64, draw_lengths(BATCH)),
    ):
        prompts = draw_prompts(BATCH, 8000)
        if args.memory:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peaks = {
                    e: pool.apply(peak_mb, (e, args.shape, args.threads, prompts, cap, lengths))
                    for e in ("TRL", "rllr")
                }
            lines = ["64 answers, 4 optimiser steps; peak of two iterations above the libraries, four models and two optimisers included.", "",
                     "| | MB |", "|---|---|", *(f"| {engine} | {peak:.0f} |" for engine, peak in peaks.items()),
                     f"| times less | {peaks['TRL'] / peaks['rllr']:.2f} |"]  # fmt: skip
            write_result(
                "ppo_iteration",
                f"{args.shape}, {workload}, memory",
                lines,
                {"shape": args.shape, "workload": workload, "peaks_mb": peaks},
            )
            continue
        trl, real_steps = trl_iterations(args.shape, prompts, cap, lengths, args.repeats)
        run = our_iteration(args.shape, prompts, lengths)
        run()
        ours = [run() for _ in range(args.repeats)]
        totals = [sum(seconds.values()) for seconds in ours]
        ratio = statistics.median(trl) / statistics.median(totals)
        phases = ", ".join(f"{name} {statistics.median(s[name] for s in ours):.2f}" for name in ours[0])
        lines = [
            f"64 answers, {sum(lengths)} tokens, {MINIBATCHES} optimiser steps on our side, {real_steps:g} on TRL's; float32; "
            f"median of {args.repeats}.",
            "",
            "| | CPU s per iteration |",
            "|---|---|",
            f"| TRL 1.12.0 | {statistics.median(trl):.2f} |",
            f"| rllr | {statistics.median(totals):.2f} ({phases}) |",
            f"| times faster | {ratio:.2f} |",
        ]
        record = {
            "shape": args.shape,
            "workload": workload,
            "trl": trl,
            "trl_optimizer_steps": real_steps,
            "ours": ours,
            "ratio": ratio,
        }
        write_result("ppo_iteration", f"{args.shape}, {workload}", lines, record)


if __name__ == "__main__":
    main()
