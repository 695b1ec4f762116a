"""Who plays which role in PPO: policy and reference, the value model, the judges.

With --lora_rank the roles are adapters on one frozen base (`rllr.model.roles`), else each is a model of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common.errors import InputError, RunError
from .common.files import RECORD
from .common.log import say
from .data.encoding import Encoder
from .grounding import GroundedReward
from .judge import STATISTICS, Judges, RewardModelScorer, gold_reward, load_function
from .model.backbone import backbone_of
from .model.heads import RewardModel, ValueModel
from .model.loading import check_same_tokenizer, fingerprint, load_backbone, load_policy, load_tokenizer, read_head
from .model.peft_format import is_adapter
from .model.recompute import checkpoint_layers
from .model.records import check_same_task, read_record
from .model.roles import RolePolicy, load_base, load_scalar_role, new_role
from .model.shards import loading_device, shard
from .preview import sentence
from .report.reward_report import load_statistics
from .run.optimizer import Optimizer
from .run.rates import settle_rates

RULE = "grounded"  # as --rationale_rm: no reward model, `grounding.GroundedReward`


@dataclass
class Models:
    """The roles of a PPO run. The policy starts where the reference stays."""

    policy: Any  # a causal LM; learns
    reference: Any  # the SFT policy; frozen
    value_model: ValueModel  # learns
    judges: Judges  # act 3; frozen
    encoder: Encoder
    base: Any  # the causal LM that all adapters share; None where each role is a model of its own
    source: str  # where the SFT policy came from: a directory or a hub name
    fingerprint: str  # of the SFT policy's weights, in float32
    frozen_fingerprint: str  # of the frozen model's weights, as they are in memory
    policy_optimizer: Optimizer
    value_optimizer: Optimizer

    @property
    def frozen(self):
        """The model whose weights must not change: the base of all adapters, or the reference."""
        return self.base if self.base is not None else self.reference

    @property
    def base_record(self):
        """What an adapter's record says of its base; nothing for a model of its own."""
        return {"base": {"path": self.source, "fingerprint": self.fingerprint}} if self.base is not None else {}

    def fingerprints(self, config):
        """{"--flag": fingerprint} of the weights that the run reads."""
        found = {"--policy": self.fingerprint}
        found |= {f"--{part}_rm": fingerprint(scorer.model) for part, scorer in self.judges.scorers.items()}
        found |= {"--rationale_rm": RULE} if is_rule(config, "rationale") else {}
        return found | ({"--value_init": fingerprint(self.value_model)} if config.value_init else {})

    def check_frozen(self):
        """RunError where the weights that must not change have changed."""
        if fingerprint(self.frozen) != self.frozen_fingerprint:
            raise RunError("the reference policy changed during training; this is a bug, do not trust the run")

    def parts(self):
        """What a checkpoint holds of the models (`Run.track`); running score statistics are state, too."""
        return {
            "policy": self.policy,
            **self.policy_optimizer.parts("policy"),
            "value_model": self.value_model,
            **self.value_optimizer.parts("value"),
            **{f"{part}_judge": scorer for part, scorer in self.judges.scorers.items()},
        }


def is_rule(config, part):
    """Whether a rule judges in place of a reward model."""
    return part == "rationale" and config.rationale_rm == RULE


def load_models(run) -> Models:
    """Every model of a PPO run, and the two optimisers. InputError, with the flag, for one that does not fit."""
    config, device = run.config, run.device
    policy, reference, base, policy_fingerprint = load_policy_and_reference(config, device)
    tokenizer = load_tokenizer(config.policy)
    encoder = Encoder(tokenizer, policy, run.clock)
    # Hashing a large model takes long; only a base that was cast to bf16 differs from the policy that was hashed
    # already.
    cast = config.base_dtype != "fp32"
    frozen_fingerprint = fingerprint(base if base is not None else reference) if cast else policy_fingerprint
    run.settle(best_by=config.best_by or default_best_by(config))
    judges = load_judges(config, tokenizer, device, base, policy_fingerprint, run.task)
    value_model = load_value_model(config, device, base, policy_fingerprint, judges)
    for model in (policy, value_model) if config.gradient_checkpointing else ():
        checkpoint_layers(backbone_of(model))
    settle_rates(run, learning_rate=("policy", policy), value_learning_rate=("value", value_model))
    updates, norm = config.steps * config.ppo_epochs * config.minibatches, config.max_grad_norm
    return Models(
        policy,
        reference,
        value_model,
        judges,
        encoder,
        base,
        source=config.policy,
        fingerprint=policy_fingerprint,
        frozen_fingerprint=frozen_fingerprint,
        policy_optimizer=Optimizer(policy, config.learning_rate, updates, warmup=config.warmup, max_grad_norm=norm),
        value_optimizer=Optimizer(value_model, config.value_learning_rate, updates, max_grad_norm=norm),
    )


def load_policy_and_reference(config, device):
    """(policy, reference, base, fingerprint of the SFT policy); base is None where each is a model of its own."""
    if config.lora_rank:
        base, policy_fingerprint = load_base(config.policy, config, device)
        return new_role(base, "policy", config, config.seed), RolePolicy(base, None), base, policy_fingerprint
    device = loading_device(config, device)
    policy = load_policy(config.policy, device=device)
    if config.freeze_embeddings:
        backbone_of(policy).get_input_embeddings().requires_grad_(False)
    policy_fingerprint, policy = fingerprint(policy), shard(policy, config)
    reference = shard(load_policy(config.policy, device=device).requires_grad_(False), config)
    return policy, reference, None, policy_fingerprint


def name_judges(config, task):
    """Fill in --label_rm and --rationale_rm where the reward needs them and nobody gave them.

    InputError for a reward model that is not there, before any model is loaded.
    """
    if task.answer_format == "label" and config.reward in ("rationale", "mixed"):
        raise InputError(f"--reward {config.reward}: the policy's answers are labels alone, without a rationale")
    for part in ("label", "rationale"):
        if config.reward not in (part, "mixed") or is_rule(config, part):
            continue
        directory = getattr(config, f"{part}_rm") or f"runs/{task.name}/rm-{part}"
        if not Path(directory).is_dir():
            needs = f"--reward mixed needs a {part} reward model: " if config.reward == "mixed" else ""
            raise InputError(f"{needs}--{part}_rm {directory}: no such directory; train_rm.py makes one")
        check_same_task(read_record(directory), task, f"--{part}_rm {directory}")
        setattr(config, f"{part}_rm", str(directory))


def default_best_by(config):
    """--best_by where nobody gave it. What a function of the user's own, or a reward model of the user's own pairs,
    asks for need not be the right label."""
    if ":" in config.reward:
        return "score"
    judge = config.rationale_rm if config.reward == "rationale" else config.label_rm
    trained = read_record(judge).get("config", {}) if judge and judge != RULE else {}
    return "metric" if trained.get("pairs", "label") in ("label", "rationale") else "score"


def load_judges(config, tokenizer, device, base=None, policy_fingerprint=None, task=None) -> Judges:
    """What gives `label_sensitive_reward` its scores. `gold` and a user's function stand where the label reward stands.

    On a `base` a reward model that was saved as an adapter becomes a role; one trained in full is a model of its own.
    """
    penalties = (config.missing_eos_penalty, config.missing_label_penalty)
    if config.reward == "gold":
        return Judges("label", {"label": gold_reward}, penalties=penalties)
    if ":" in config.reward:
        return Judges("label", {"label": load_function(config.reward)}, penalties=penalties)
    by_part: dict[str, Any] = {}
    for part in ("label", "rationale"):
        if config.reward not in (part, "mixed"):
            continue
        if is_rule(config, part):
            by_part[part] = GroundedReward(task)
            continue
        directory = getattr(config, f"{part}_rm")  # `name_judges` saw to it
        where = f"--{part}_rm {directory}"
        if base is not None and is_adapter(directory):
            model = load_scalar_role(RewardModel, base, directory, f"{part}_rm", policy_fingerprint, f"--{part}_rm")
        else:
            frozen = RewardModel.from_pretrained(directory, device=loading_device(config, device)).requires_grad_(False)
            model = shard(frozen, config)
        check_same_tokenizer(load_tokenizer(directory), tokenizer, where)
        scorer = by_part[part] = scorer_of(model, directory, config)
        if scorer.statistics and scorer.statistics.policy_fingerprint != policy_fingerprint:
            say(f"warning: the {part} reward model was measured on answers of another policy than {config.policy}")
        elif promise := recorded_preview(directory):
            say(f"preview of PPO, from train_rm.py: {promise}")
    return Judges(config.reward, by_part, config.threshold, penalties)


def recorded_preview(directory) -> str | None:
    """What a reward model's own record promises of PPO (`rllr.preview.sentence`); None where it was not measured."""
    report = read_record(directory).get("report")
    found = report.get("preview") if isinstance(report, dict) else None
    try:
        return found and sentence(found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise InputError(
            f"{Path(directory) / RECORD}: field 'report' is damaged; train the reward model again"
        ) from None


def scorer_of(model, directory, config) -> RewardModelScorer:
    """The scorer of a reward model with the statistics in a directory. InputError where they are missing."""
    is_needed = config.score_norm != "none" or (Path(directory) / STATISTICS).is_file()
    statistics = load_statistics(directory) if is_needed else None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return RewardModelScorer(model, statistics, config.score_norm, config.score_clip, config.eval_batch_size)


def load_value_model(config, device, base=None, policy_fingerprint=None, judges=None):
    """The value model: from the reward model, in the units of the reward; else --value_init; else SFT with a zero head.

    On a `base` it is an adapter: the reward model's, trained on; a new one on the frozen backbone of a reward model
    that was trained in full (the judge's own, where it is one); or a new one on the base.
    """
    of_reward = config.rationale_rm if config.reward == "rationale" else config.label_rm
    own_reward = config.reward == "gold" or ":" in config.reward or of_reward == RULE  # nothing to start from
    loading_on = loading_device(config, device)
    source = config.value_init or (None if own_reward else of_reward)
    if source is None:
        say("value model: SFT backbone with a zero head")
        if base is not None:
            return ValueModel.from_policy(new_role(base, "value", config, config.seed + 1))
        return shard(ValueModel.from_policy(load_policy(config.policy, device=loading_on)), config)
    if base is None:
        value_model = ValueModel.from_pretrained(source, device=loading_on)
    elif is_adapter(source):
        value_model = load_scalar_role(ValueModel, base, source, "value", policy_fingerprint, "value model:")
    else:  # the reward model's weights are the base of this one role
        scorers = judges.scorers if judges else {}
        own = [scorer.model.backbone for part, scorer in scorers.items() if source == getattr(config, f"{part}_rm")]
        backbone = own[0] if own else shard(load_backbone(source, device=loading_on).requires_grad_(False), config)
        role = new_role(backbone, "value", config, config.seed + 1)
        value_model = ValueModel.with_head(backbone_of(role), read_head(source))
    if config.score_norm != "none" and not own_reward:
        statistics = load_statistics(source)
        value_model.rescale(statistics.mean, statistics.std)
    say(f"value model: from {source}")
    return shard(value_model, config) if base is None else value_model
