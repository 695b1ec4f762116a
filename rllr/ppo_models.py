"""Who plays which role in PPO: policy and reference, the judges, the value model, the rule for answers that were cut.

With --lora_rank the roles are adapters on one frozen base (`rllr.model.roles`), else each is a model of its own.
"""

from functools import partial
from pathlib import Path

from .common.errors import InputError
from .common.log import say
from .judge import STATISTICS, RewardModelScorer, gold_reward, load_function
from .model.backbone import backbone_of
from .model.heads import RewardModel, ValueModel
from .model.loading import fingerprint, load_backbone, load_policy, read_head
from .model.peft_format import is_adapter
from .model.roles import RolePolicy, load_base, load_scalar_role, new_role
from .reports.reward_report import load_statistics
from .run.records import check_same_task, read_record


def load_policy_and_reference(config, device):
    """(policy, reference, frozen, fingerprint of the SFT policy): the policy starts where the reference stays.

    `frozen` is the model whose weights must not change: the reference, or the base that all adapters share.
    """
    if config.lora_rank:
        base, policy_fingerprint = load_base(config.policy, config, device)
        return new_role(base, "policy", config, config.seed), RolePolicy(base, None), base, policy_fingerprint
    policy = load_policy(config.policy, device=device)
    reference = load_policy(config.policy, device=device).requires_grad_(False)
    return policy, reference, reference, fingerprint(policy)


def name_judges(config, task):
    """Fill --label_rm and --rationale_rm, as far as the reward needs them, where they were not given. InputError for one that is not
    there, before any model is loaded."""
    for part in ("label", "rationale"):
        if config.reward not in (part, "mixed"):
            continue
        directory = getattr(config, f"{part}_rm") or f"runs/{task.name}/rm-{part}"
        if not Path(directory).is_dir():
            needs = f"--reward mixed needs a {part} reward model: " if config.reward == "mixed" else ""
            raise InputError(f"{needs}--{part}_rm {directory}: no such directory; train_rm.py makes one")
        check_same_task(read_record(directory), task, f"--{part}_rm {directory}")
        setattr(config, f"{part}_rm", str(directory))


def load_judges(config, tokenizer, policy_fingerprint, device, autocast, base=None):
    """(mode, {"label": reward_fn, "rationale": reward_fn}): what `label_sensitive_reward` puts together.

    `gold` and a user's function stand where the label reward stands. On a `base` a reward model saved as an adapter
    becomes a role; one trained in full is a model of its own.
    """
    if config.reward == "gold":
        return "label", {"label": gold_reward}
    if ":" in config.reward:
        return "label", {"label": load_function(config.reward)}
    judges = {}
    for part in ("label", "rationale"):
        if config.reward in (part, "mixed"):
            directory = getattr(config, f"{part}_rm")  # `name_judges` saw to it
            judges[part] = load_scorer(
                directory,
                tokenizer,
                config.score_norm,
                config.score_clip,
                config.eval_batch_size,
                device,
                autocast,
                f"--{part}_rm",
                load=partial(_load_judge, base, part, policy_fingerprint) if base and is_adapter(directory) else None,
            )
            stored = judges[part].statistics
            if stored and stored.policy_fingerprint != policy_fingerprint:
                say(f"warning: the {part} reward model was measured on answers of another policy than {config.policy}")
    # What a threshold or the missing-EOS rule lacks is said now, before the run writes anything.
    eos_cap(
        config, judges, config.reward, judges["label"].threshold(config.threshold) if config.reward == "mixed" else None
    )
    return config.reward, judges


def _load_judge(base, part, policy_fingerprint, directory, flag):
    return load_scalar_role(RewardModel, base, directory, f"{part}_rm", policy_fingerprint, flag)


def load_value_model(config, device, base=None, policy_fingerprint=None, judges=None):
    """The value model: from the reward model, in the units of the reward; else --value_init; else SFT with a zero head.

    On a `base` it is an adapter: the reward model's, trained on; a new one on the frozen backbone of a reward model
    that was trained in full (the judge's own, where it is one); or a new one on the base.
    """
    own_reward = config.reward == "gold" or ":" in config.reward
    source = config.value_init or (
        None if own_reward else config.rationale_rm if config.reward == "rationale" else config.label_rm
    )
    if source is None:
        say("value model: SFT backbone with a zero head")
        policy = new_role(base, "value", config, config.seed + 1) if base else load_policy(config.policy, device=device)
        return ValueModel.from_policy(policy)
    if base and is_adapter(source):
        value_model = load_scalar_role(ValueModel, base, source, "value", policy_fingerprint, "value model:")
    elif base:  # the reward model's weights are the base of this one role
        own = [judge.model.backbone for part, judge in judges.items() if source == getattr(config, f"{part}_rm")]
        backbone = own[0] if own else load_backbone(source, device=device)
        role = new_role(backbone, "value", config, config.seed + 1)
        value_model = ValueModel.with_head(backbone_of(role), read_head(source))
    else:
        value_model = ValueModel.from_pretrained(source, device=device)
    if config.score_norm != "none" and not own_reward:
        statistics = load_statistics(source)
        value_model.rescale(statistics.mean, statistics.std)
    say(f"value model: from {source}")
    return value_model


def eos_cap(config, judges, mode, threshold):
    """(cap, penalty unit) of the missing-EOS rule, in the units of the reward: the SFT policy's mean score and spread."""
    statistics = [judge.statistics for judge in judges.values() if hasattr(judge, "statistics")]
    if not statistics:
        return None, 1.0  # gold and own functions: no cap
    if config.score_norm != "none":
        return 0.0, 1.0
    if None in statistics:
        raise InputError(
            "--score_norm none still needs score_statistics.json for the missing-EOS rule; run train_rm.py again"
        )
    means = {name: judge.statistics.mean for name, judge in judges.items()}
    if mode == "mixed":
        means["label"] = min(means["label"], threshold)
    return sum(means.values()), sum(s.std**2 for s in statistics) ** 0.5


def load_scorer(directory, tokenizer, norm, clip, batch_size, device, autocast, flag, load=None):
    """The scorer of a reward model directory, once its tokenizer is seen to be the policy's. InputErrors name the flag.

    load(directory, flag) makes the model where it is not one of its own but an adapter on a shared base.
    """
    from .model.heads import RewardModel
    from .model.loading import load_tokenizer

    if not Path(directory).is_dir():
        raise InputError(f"{flag} {directory}: no such directory; train_rm.py makes one")
    model = load(directory, flag) if load else RewardModel.from_pretrained(directory, device=device)
    check_same_tokenizer(load_tokenizer(directory), tokenizer, f"{flag} {directory}")
    statistics = load_statistics(directory) if norm != "none" or (Path(directory) / STATISTICS).is_file() else None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return RewardModelScorer(model, statistics, norm, clip, batch_size, autocast)


def check_same_tokenizer(theirs, ours, where):
    """InputError unless two tokenizers give the same ids: a reward model reads the very ids that the policy sampled."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        differing = sum(other.get(token) != i for token, i in mine.items()) + len(other.keys() - mine.keys())
        raise InputError(
            f"{where}: its tokenizer differs from the policy's ({differing} tokens have other ids); train the reward model "
            "from this policy"
        )
