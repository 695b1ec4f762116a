"""The row `trl` of gpu.py: whole PPO steps of TRL 1.12.0, the last release that has a PPO trainer, beside ours.

Same shape (SmolLM2-135M, random fp32 weights under bf16 autocast), prompts, answer length, passes and optimiser steps.
TRL reads its batch from one rollout of all prompts (`local_rollout_forward_batch_size`), checkpoints no activations,
evaluates, prints and saves nothing. Its `bf16=True` has no effect: the trainer makes its Accelerator without it, and
accelerate's own switch would cover the update alone. So its forward passes are put under autocast one by one.
"""

import os
import time
from types import SimpleNamespace

WARM = (3, 1)  # untimed steps of the two turns: later ones find an empty allocator, but everything recorded


class Clock:
    """The end of every step of TRL's trainer, optimiser steps so far, and in which dtypes TRL multiplied."""

    def __init__(self, bench):
        self.bench, self.ends, self.optimiser_steps, self.dtypes = bench, [], 0, set()

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

    def watch(self, model):
        """Note the dtype of its first layer's products: an autocast that misses them is seen nowhere else."""
        product = model.base_model.layers[0].mlp.up_proj
        product.register_forward_hook(lambda *call: self.dtypes.add(str(call[-1].dtype).removeprefix("torch.")))

    def turn(self, trainer, steps):
        """Seconds of each of so many steps of TRL's trainer."""
        trainer.args.num_total_batches = steps
        self.ends.clear()
        self.tick()
        trainer.train()
        return [after - before for before, after in zip(self.ends, self.ends[1:])]


def under_autocast(device):
    """TRL's three kinds of forward pass in bf16, their outputs in fp32, as accelerate does it.

    Each enters autocast anew. One around the whole training would keep the weights' bf16 copies, which it makes once,
    over all optimiser steps. So they are made once per call here, a whole generation being one.
    """
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from trl.experimental.ppo import ppo_trainer

    for name in ("batch_generation", "forward", "get_reward"):
        inner = torch.autocast(device, dtype=torch.bfloat16)(getattr(ppo_trainer, name))
        setattr(ppo_trainer, name, convert_outputs_to_fp32(inner))


def trl_trainer(bench, prompts, new_tokens, steps, settings, clock):
    """TRL's trainer over models of that shape. settings: ppo_epochs and minibatches of ours."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, PrinterCallback
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
    rows, reward, value = Dataset.from_dict({"input_ids": prompts}), scalar(3).eval(), scalar(4)
    trainer = PPOTrainer(
        args=args, processing_class=pad_with_zero(PreTrainedTokenizerFast), model=policy, ref_model=reference,
        reward_model=reward, value_model=value, train_dataset=rows, eval_dataset=rows, callbacks=[clock.callback()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    clock.count(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    for model in (policy, reference, reward, value):
        clock.watch(model)
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
    """Seconds of a whole PPO step and peak memory, ours and TRL's in two turns."""
    from statistics import median

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        import datasets  # noqa: F401
        import trl.experimental.ppo  # noqa: F401
    except ImportError as error:
        bench.write("trl", result=f"not measured: {error}")
        return
    size, settings = bench.size, SimpleNamespace(ppo_epochs=2, minibatches=4)
    prompts = bench.prompts(
        size.ppo_prompts, 2048, size.shortest // 2, size.longest // 2
    )  # every scale has 2,048 tokens
    turns = [warm + size.trl_steps // 2 for warm in WARM]
    own, its, trainer = Clock(bench), Clock(bench), None
    acts = ours(bench, iteration, prompts, size.profile_tokens, settings)
    own.count(acts.models.policy_optimizer.adamw)
    times, peaks = {"ours": [], "trl": []}, {}

    def note(name, turn, seconds, held=0.0):
        peak = bench.peak_gib()
        if turn == 0:  # the others' memory at rest is none of its own
            peaks[name] = peak and round(peak - held, 2)
        times[name] += seconds[WARM[turn] :]
        bench.write("trl-turn", of=name, turn=turn, warm=WARM[turn], seconds=[round(value, 4) for value in seconds])
        bench.forget()

    for turn, steps in enumerate(turns):
        note("ours", turn, [bench.clocked(lambda: (acts.generate(), acts.score(), acts.update()))[0]
                            for _ in range(steps)])  # fmt: skip
        held = bench.held_gib()
        if trainer is None:
            under_autocast(bench.device)
            trainer = trl_trainer(bench, prompts, size.profile_tokens, sum(turns), settings, its)
        note("trl", turn, its.turn(trainer, steps), held)
    middle = {name: median(values) for name, values in times.items()}
    bench.write(
        "trl", times_trl=round(middle["trl"] / middle["ours"], 2), seconds_ours=round(middle["ours"], 4),
        seconds_trl=round(middle["trl"], 4), optimiser_steps_ours=own.optimiser_steps / sum(turns),
        optimiser_steps_trl=its.optimiser_steps / sum(turns), dtypes_trl=sorted(its.dtypes),
        prompts=len(prompts), new_tokens=size.profile_tokens, peak_gib_ours=peaks["ours"], peak_gib_trl=peaks["trl"],
    )  # fmt: skip
