"""Settings that several commands share, each declared once: of a run, of training, of decoding."""

from dataclasses import dataclass

from ..common.config import Settings, flag
from ..model.precision import PRECISIONS

NEWEST = "newest"  # what --resume means without a value


@dataclass
class ModelConfig(Settings):
    """How models are loaded and computed with."""

    GROUP = "models"
    precision: str = flag("fp32", "fp32, or bf16 for autocast (GPU)", choices=PRECISIONS)
    trust_remote_code: bool = flag(False, "let a model's own Python code run, as some hub models need")


@dataclass
class PolicyConfig(Settings):
    """Of the stages that start from an SFT policy."""

    GROUP = "models"
    START = "policy"  # the setting that names the model which the stage starts from
    policy: str | None = flag(None, "the SFT policy's directory (runs/<task>/sft); in PPO the reference, too")


@dataclass
class DecodingConfig(ModelConfig):
    """Of the commands that only ask a model."""

    max_new_tokens: int = flag(48, "longest answer, in tokens", above=0)
    batch_size: int = flag(256, "prompts decoded together", above=0)


@dataclass
class RunConfig(Settings):
    """Where a run goes, what it keeps, and how it goes on."""

    GROUP = "run"
    output_dir: str | None = flag(None, "where the run goes (runs/<task>/<stage>)")
    overwrite: bool = flag(False, "replace a run that is already there")
    resume: str | None = flag(None, "go on from the newest whole checkpoint, or from this one", bare=NEWEST)
    save_every: int = flag(100, "optimiser steps between checkpoints; 0: only when asked to stop", at_least=0)
    keep_last: int = flag(2, "checkpoints kept, the newest ones", above=0)
    log_every: int = flag(20, "steps between printed lines; metrics.jsonl has every step", above=0)
    tensorboard: bool = flag(False, 'event files in the run\'s directory (pip install ".[tensorboard]")')
    wandb: str | None = flag(
        None, 'metrics to this project of Weights & Biases, by default rllr (pip install ".[wandb]")', bare="rllr"
    )
    deterministic: bool = flag(
        False, "on a GPU: deterministic kernels only, so that a resumed run is the same to the bit"
    )


@dataclass
class TrainingConfig(RunConfig, ModelConfig):
    """What SFT, the reward model and PPO have in common."""

    GROUP = "optimisation"
    seed: int = flag(0, "every random choice of this stage")
    max_grad_norm: float = flag(1.0, "the gradient is scaled down to this norm", above=0)
    micro_batch_size: int = flag(0, "rows per forward; 0: the whole batch. It does not change the gradient", at_least=0)
    tokens_per_batch: int = flag(
        0, "padded tokens per forward; 0: no limit. It does not change the gradient either", at_least=0
    )
    shard: bool = flag(
        False, "under torchrun: each process keeps a part of every weight (FSDP), so that larger models fit"
    )
    cuda_graphs: str = flag(
        "auto", "on a GPU: scoring and training of small models as CUDA graphs, too", choices=("auto", "never")
    )
    gradient_checkpointing: bool = flag(False, "compute layers again in backward instead of keeping their activations")
    max_new_tokens: int = flag(48, "longest answer, in tokens (256 in the paper)", above=0)
    eval_batch_size: int = flag(256, "prompts decoded, or rows scored, together", above=0)

    @property
    def answer_limits(self):
        """What `answers.write_answers` and `answer_rows` are given."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.eval_batch_size}


@dataclass
class SupervisedConfig(TrainingConfig):
    """What SFT and the reward model have in common."""

    GROUP = "optimisation"
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", between=(0, 1))
    weight_decay: float = flag(0.01, "of AdamW; biases and norms are spared", at_least=0)
    dropout: float | None = flag(
        None, "while training (tiny 0.2, any other model 0); off in every other pass", between=(0, 0.9)
    )
