"""The row `trl` of gpu.py: whole PPO steps of TRL 1.12.0, the last release that has a PPO trainer, beside ours.

Same shape (SmolLM2-135M, random fp32 weights under bf16 autocast), prompts, answer length, passes and optimiser steps.
TRL reads its batch from one rollout of all prompts (`local_rollout_forward_batch_size`), checkpoints no activations,
evaluates, logs and saves nothing. Its own mixed precision would cover the update alone, so autocast covers all of it.
"""

import time
from types import SimpleNamespace


class Clock:
    """The end of every step of TRL's trainer, and the optimiser steps so far."""

    def __init__(self, bench):
        self.bench, self.ends, self.optimiser_steps = bench, [], 0

    def callback(self):
        from transformers import TrainerCallback

        clock = self

        class Ends(TrainerCallback):
            def on_step_end(self, args, state, control, **more):
                clock.tick()

        return Ends()

    def tick(self):
        self.bench.sync()
        self.ends.append(time.perf_counter())

    def count(self, optimizer):
        """Have the optimizer count its real steps: accelerate may swallow some."""
        optimizer.register_step_post_hook(lambda *_: setattr(self, "optimiser_steps", self.optimiser_steps + 1))

    def seconds(self):
        return [after - before for before, after in zip(self.ends, self.ends[1:])]


def trl_trainer(bench, prompts, new_tokens, steps, settings, clock):
    """TRL's trainer over models of that shape. settings: ppo_epochs and minibatches of ours."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = (bench.model("135M", "float32", seed).train() for seed in range(2))
    policy.config.pad_token_id = policy.generation_config.pad_token_id = 0

    def scalar(seed):
        torch.manual_seed(seed)
        config = type(policy.config)(**policy.config.to_dict() | {"num_labels": 1})
        with torch.device(bench.device):
            return LlamaForSequenceClassification(config)

    args = PPOConfig(
        output_dir=tempfile.mkdtemp(dir=bench.work), per_device_train_batch_size=len(prompts),
        gradient_accumulation_steps=1, num_mini_batches=settings.minibatches, num_ppo_epochs=settings.ppo_epochs,
        total_episodes=len(prompts) * steps, response_length=new_tokens, temperature=1.0, learning_rate=1e-6,
        local_rollout_forward_batch_size=len(prompts), num_sample_generations=0, gradient_checkpointing=False,
        bf16=False, report_to="none", save_strategy="no", eval_strategy="no", logging_steps=10**6, disable_tqdm=True,
        seed=0, use_cpu=bench.device == "cpu",
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": prompts})
    trainer = PPOTrainer(
        args=args, processing_class=pad_with_zero(PreTrainedTokenizerFast), model=policy, ref_model=reference,
        reward_model=scalar(3).eval(), value_model=scalar(4), train_dataset=rows, eval_dataset=rows,
        callbacks=[clock.callback()],
    )  # fmt: skip
    clock.count(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    return trainer


def pad_with_zero(fast):
    """A tokenizer that only pads, on the left, with token 0, which no prompt has."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return fast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def ours(bench, iteration, prompts, new_tokens, settings):
    """Our iteration over models of that shape."""
    from either_tree import find

    value, reward = find("ValueModel", "rllr.model.heads"), find("RewardModel", "rllr.model.heads")
    models = [bench.model("135M", "float32", seed).eval() for seed in range(4)]
    models[1].requires_grad_(False), models[3].requires_grad_(False)
    heads = [value.from_policy(models[2]).eval(), [reward.from_policy(models[3]).eval()]]
    return iteration(bench, *models[:2], *heads, prompts=prompts, new_tokens=new_tokens, **vars(settings))


def against_trl(bench, iteration):
    """Seconds of a whole PPO step, ours and TRL's; steps before `first` warm up."""
    from statistics import median

    from either_tree import autocast

    size, first = bench.size, 3
    prompts = bench.prompts(
        size.ppo_prompts, 2048, size.shortest // 2, size.longest // 2
    )  # every scale has 2,048 tokens
    steps, settings = first + size.trl_steps, SimpleNamespace(ppo_epochs=2, minibatches=4)
    acts = ours(bench, iteration, prompts, size.profile_tokens, settings)
    mine = [sum(bench.clocked(act)[0] for act in (acts.generate, acts.score, acts.update))
            for _ in range(steps)]  # fmt: skip
    own_peak = bench.peak_gib()
    bench.write("trl-ours", seconds=[round(value, 4) for value in mine], peak_gib=own_peak)
    del acts
    bench.forget()
    clock = Clock(bench)
    try:
        trainer = trl_trainer(bench, prompts, size.profile_tokens, steps, settings, clock)
    except ImportError as error:
        bench.write("trl", result=f"not measured: {error}")
        return
    with autocast(bench.device):
        clock.tick()
        trainer.train()
    its, own = clock.seconds(), median(mine[first:])
    bench.write(
        "trl", times_trl=round(median(its[first:]) / own, 2), seconds_ours=round(own, 4),
        seconds_trl=[round(value, 4) for value in its], optimiser_steps_ours=settings.ppo_epochs * settings.minibatches,
        optimiser_steps_trl=clock.optimiser_steps / len(its), prompts=len(prompts), new_tokens=size.profile_tokens,
        peak_gib=bench.peak_gib(), own_peak_gib=own_peak,
    )  # fmt: skip
