"""Cross-fitting: rows that a policy knows by heart are answered by policies that never saw their labels.

On-policy pairs need the policy's own mistakes. On the rows that trained it a small SFT policy hardly makes any, and so
says little of what it will write to PPO's prompts. The labelled rows are therefore cut into folds, and the rows of each
fold are answered by a policy that SFT has made anew, with the same settings, of all other folds. (Cross-fitting as in
Chernozhukov et al., arXiv 1608.00060; out-of-fold predictions as in Wolpert 1992, stacked generalization.)
"""

import gc
import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch

from .common.errors import InputError
from .common.files import BASE, path_from_record
from .common.log import progress, say
from .layout import shuffled_batches
from .logprobs import sft_loss
from .model.backbone import backbone_of
from .model.dropout import set_dropout
from .model.loading import cast_parameters, fingerprint, load_policy
from .model.recompute import checkpoint_layers
from .model.records import read_record
from .model.roles import DTYPES, new_role
from .model.shards import loading_device, shard
from .run.optimizer import Optimizer, gradient_step, own_micro_batches

SETTINGS = frozenset(  # of an SFT run, which `fine_tune` reads
    "model seed epochs batch_size learning_rate schedule warmup weight_decay max_grad_norm dropout lora_rank "
    "lora_alpha lora_targets use_rslora base_dtype gradient_checkpointing micro_batch_size tokens_per_batch".split()
)


def folds_of(rows, count):
    """The rows as `count` lists of nearly equal size, each row by a hash of its id and whatever the order of the rows.

    Rows of one label are dealt out in turn, so that every fold has its share of each label. InputError for fewer rows
    than folds.
    """
    if len(rows) < count:
        raise InputError(f"--folds {count}: there are only {len(rows)} labelled rows to train on; give fewer folds")
    order = sorted(rows, key=lambda row: (row.label, hashlib.sha256(str(row.id).encode()).digest()))
    return [order[first::count] for first in range(count)]


def sft_recipe(policy, record):
    """How a policy was fine-tuned: its SFT run's settings, `model` being where its base lies now.

    InputError, which begins with the flag, where no fold can be trained alike: the record does not say how, the base is
    gone, or it is a model that has learnt labels before.
    """
    where, settings = f"--policy {policy}", record.get("config")
    if record.get("stage") != "sft" or not isinstance(settings, dict) or SETTINGS - settings.keys():
        raise InputError(f"{where}: has no record of train_sft.py that says how its folds are to be fine-tuned")
    recorded = settings["model"]
    base = str(Path(policy) / BASE) if recorded == "tiny" else path_from_record(recorded, policy)
    if not Path(base).is_dir() and (base != recorded or Path(base).is_absolute()):  # else the name of a hub's model
        raise InputError(f"{where}: the folds are fine-tuned from its base, {base}, which is not there; restore it")
    if read_record(base).get("stage", "tiny") != "tiny":
        raise InputError(f"{where}: its base, {base}, has learnt labels before, so no fold would be new to it")
    return SimpleNamespace(**settings | {"model": base, "base_fingerprint": record.get("base_fingerprint")})


def fine_tune(rows, encoder, settings, device, name=""):
    """A policy from the base that `settings.model` names, fine-tuned on encoded rows as `train_sft.py` does it.

    settings: of the SFT run (`sft_recipe`). The policy of the last epoch is taken: no dev row chooses one. The global
    random stream, which dropout draws from, is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        base = load_policy(settings.model, device=loading_device(settings, device))
        if settings.base_fingerprint not in (None, fingerprint(base)):
            raise InputError(f"{settings.model}: not the weights that the policy was fine-tuned from; restore them")
        model = base = shard(cast_parameters(base, DTYPES[settings.base_dtype]), settings)
        if settings.lora_rank:
            model = new_role(base, "sft", settings, settings.seed)
        set_dropout(base, settings.dropout)
        if settings.gradient_checkpointing:
            checkpoint_layers(backbone_of(model))
        steps = settings.epochs * len(shuffled_batches(rows, settings.batch_size, settings.seed, 0))
        optimizer = Optimizer(
            model, settings.learning_rate, steps,
            warmup=settings.warmup, schedule=settings.schedule,
            weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
        )  # fmt: skip
        model.train()
        with progress(total=steps, desc=name) as bar:
            for epoch in range(settings.epochs):
                for batch in shuffled_batches(rows, settings.batch_size, settings.seed, epoch):
                    tokens = sum(len(row.answer_ids) for row in batch)
                    gradient_step(
                        optimizer,
                        own_micro_batches(batch, settings),
                        lambda part, tokens=tokens: sft_loss(model, part, tokens, encoder),
                        "the SFT loss",
                        lambda part: [row.name for row in part],
                    )
                    bar.update()
    return model.eval()


def share_right(rows, answers):
    """The share of all answers, {row id: answers}, that have their row's label."""
    right = [answer.label == row.label for row in rows for answer in answers[row.id]]
    return sum(right) / len(right)


def cross_fitted_answers(run, encoder, rows, writer, ask):
    """{row id: answers} of rows, each answered by a policy that was fine-tuned on the folds without it.

    ask(policy, rows, name) -> {row id: answers} samples them. writer: of the gold rationales. Says how each fold went.
    """
    config, task = run.config, run.task
    settings, folds = sft_recipe(config.policy, run.start_record), folds_of(rows, config.folds)
    settings.shard, settings.precision = config.shard, config.precision  # of this run, not of the SFT run
    answers: dict[str, list] = {}
    for number, fold in enumerate(folds, start=1):
        others = [row for other in folds if other is not fold for row in other if writer.can_write(row)]
        if not others:
            raise InputError(f"--folds {config.folds}: a fold leaves no row with a rationale; use --cross_fit never")
        encoded = encoder.rows(
            others, task, lambda row: task.render_answer(row.label, writer.write(row, row.label)), config.max_new_tokens
        )
        policy = fine_tune(encoded, encoder, settings, run.device, f"fold {number}/{config.folds}")
        found = ask(policy, fold, f"fold {number}")
        say(
            f"fold {number}/{config.folds}: SFT on {len(others)} rows, {settings.epochs} epochs; "
            f"{100 * share_right(fold, found):.1f} % of its samples on the other {len(fold)} rows are right"
        )
        answers |= found
        del policy
        gc.collect()  # what FSDP knows of a sharded model refers to itself
    return answers
