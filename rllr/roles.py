"""Who plays which role in PPO besides the policy: the judges, the value model, the rule for answers that were cut."""

from pathlib import Path

from .errors import InputError
from .judge import ScoreStatistics, gold_reward, load_function, load_scorer
from .model import ValueModel, load_policy
from .training import check_same_task, read_record, say


def load_judges(config, task, tokenizer, policy_fingerprint, device, autocast):
    """(mode, {"label": reward_fn, "rationale": reward_fn}): what `label_sensitive_reward` puts together.

    `gold` and a user's function stand where the label reward stands.
    """
    if config.reward == "gold":
        return "label", {"label": gold_reward}
    if ":" in config.reward:
        return "label", {"label": load_function(config.reward)}
    judges = {}
    for part in ("label", "rationale"):
        if config.reward in (part, "mixed"):
            directory = getattr(config, f"{part}_rm") or f"runs/{task.name}/rm-{part}"
            if config.reward == "mixed" and not Path(directory).is_dir():
                raise InputError(f"--reward mixed needs a {part} reward model: --{part}_rm {directory} is not there")
            check_same_task(read_record(directory), task, f"--{part}_rm {directory}")
            judges[part] = load_scorer(
                directory,
                tokenizer,
                config.score_norm,
                config.score_clip,
                config.eval_batch_size,
                device,
                autocast,
                f"--{part}_rm",
            )
            setattr(config, f"{part}_rm", str(directory))  # the resolved config names what was used
            stored = judges[part].statistics
            if stored and stored.policy_fingerprint != policy_fingerprint:
                say(f"warning: the {part} reward model was measured on answers of another policy than {config.policy}")
    # What a threshold or the missing-EOS rule lacks is said now, before the run writes anything.
    eos_cap(
        config, judges, config.reward, judges["label"].threshold(config.threshold) if config.reward == "mixed" else None
    )
    return config.reward, judges


def load_value_model(config, device):
    """The value model: from the reward model, in the units of the reward; else --value_init; else SFT with a zero head."""
    own_reward = config.reward == "gold" or ":" in config.reward
    source = config.value_init or (
        None if own_reward else config.rationale_rm if config.reward == "rationale" else config.label_rm
    )
    if source is None:
        say("value model: SFT backbone with a zero head")
        return ValueModel.from_policy(load_policy(config.policy, device=device))
    value_model = ValueModel.from_pretrained(source, device=device)
    if config.score_norm != "none" and not own_reward:
        statistics = ScoreStatistics.load(source)
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
