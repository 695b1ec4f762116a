"""Replay: every derived number of an audit trail, computed again from the trail alone.

Plain Python in float64, loop by loop, by other code than the run's: nothing here imports `rllr.ppo`, `rllr.rewards` or
torch. What the run computed in float32 must agree to rounding. Quantities are compared in the order in which they
follow from each other, so a wrong number shows in the first quantity that is derived from it.
"""

import math
import re
from dataclasses import dataclass, field

TOLERANCE = 1e-5  # of a difference, absolute below 1 and relative above
ROUNDINGS = 50  # of float32 that the tolerance is wide: what is made of numbers above 50 may be off by theirs
NEAR_BOUND = 1e-6  # a decision this near to its bound, relative above 1, may fall on either side of it
# Settings that a resumed run may change (`run.resume.FREE`, `ROUNDING`, `BY_CONTENT`; a test compares).
MAY_CHANGE = set(
    "save_every keep_last steps epochs log_every show show_every max_ref_kl on_ref_kl on_hacking audit tensorboard "
    "wandb endpoint_url endpoint_requests endpoint_timeout micro_batch_size tokens_per_batch gradient_checkpointing "
    "eval_batch_size shard cuda_graphs task train_file eval_file test_file dataset delimiter encoding model policy "
    "label_rm rationale_rm value_init".split()
)

# In the order of derivation: {quantity: how it follows}.
QUANTITIES = {
    "copies": "a token's scores are its answer's; positions count from the prompt's length",
    "label_score": "clip((label_raw - mean) / sqrt(variance), -clip, clip)",
    "rationale_score": "clip((rationale_raw - mean) / sqrt(variance), -clip, clip)",
    "branch": "label | rationale | mixed: at the threshold where label_score >= threshold",
    "combined_score": "label_score | rationale_score | min(label_score, threshold) + rationale_score",
    "rule": "missing eos where truncated; missing label where label is null and a cap is set",
    "score": "combined_score; where a rule applies min(combined_score, cap) - the larger penalty",
    "relative_score": "score - mean score of the prompt's other answers",
    "kl": "k1: logprob - ref_logprob; k3: exp(x) - 1 - x, x = ref_logprob - logprob",
    "reward": "-kl_coef * kl, plus relative_score on the last token",
    "advantage": "A_t = delta_t + gamma * lam * A_t+1, delta_t = r_t + gamma * V_t+1 - V_t",
    "return": "A_t + V_t",
    "whitened_advantage": "(A_t - mean) / sqrt(variance + eps) over the rollout",
    "minibatches": "every answer once per epoch, for ppo_epochs epochs or until mean (log ratio)^2 / 2 > max_update_kl",
    "ratio": "exp(new_logprob - logprob)",
    "clipped": "-A * clip(ratio, 1 - clip, 1 + clip) > -A * ratio",
    "policy_loss": "max(-A * ratio, -A * clip(ratio, 1 - clip, 1 + clip)) / tokens of the minibatch",
    "value_clipped": "(clip(V, V_old - value_clip, V_old + value_clip) - R)^2 > (V - R)^2",
    "value_loss": "max((V - R)^2, (clip(V) - R)^2) / 2 / tokens of the minibatch",
    "metrics": "means over the rollout's answers and tokens, and over its minibatches",
}


@dataclass
class Finding:
    """A logged number that does not follow from the others."""

    quantity: str
    where: str  # step, sample, token, epoch
    logged: object
    computed: object

    def __str__(self):
        return (
            f"{self.quantity} of {self.where}: the trail says {shown(self.logged)}, but "
            f"{shown(self.computed)} follows ({QUANTITIES[self.quantity]})"
        )


@dataclass
class Replay:
    """What a replay has found. largest: {quantity: (difference, where)}; counts: {quantity: numbers compared}."""

    tolerance: float = TOLERANCE
    rollouts: dict = field(default_factory=dict)  # {step: the --audit of its run}
    settings: dict | None = None  # of the first rollout
    largest: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)
    findings: list = field(default_factory=list)
    problems: list = field(default_factory=list)  # sentences: changed lines, and what is missing or contradicts itself

    def compare(self, quantity, where, logged, computed, *, of=(), unit=1.0, excused=False):
        """Note the difference of two numbers, or whether two other values are equal.

        of: the numbers that it is a sum of; their own rounding stays where they cancel. unit: the size of a number that
        the tolerance is meant for. excused: it may be either way.
        """
        self.counts[quantity] = self.counts.get(quantity, 0) + 1
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (logged, computed))
        if numbers:
            difference = abs(logged - computed)
            if difference > self.largest.get(quantity, (-1.0, ""))[0]:
                self.largest[quantity] = difference, where
            size = max(unit, abs(computed), sum(map(abs, of)) / ROUNDINGS)
            right = math.isfinite(difference) and difference <= self.tolerance * size
        else:
            right = excused or logged == computed
        if not right:
            self.findings.append(Finding(quantity, where, logged, computed))

    def first(self):
        """The findings of the quantity that comes first in the order of derivation."""
        order = list(QUANTITIES)
        least = min((order.index(finding.quantity) for finding in self.findings), default=None)
        return [finding for finding in self.findings if order.index(finding.quantity) == least]

    @property
    def holds(self):
        return not self.findings and not self.problems


def shown(value):
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def square(x):
    return x * x  # infinite, where ** 2 raises an error


def exp(x):
    """e to the x; infinite, which agrees with nothing, where float64 ends."""
    return math.exp(x) if x < 709 else math.inf


def near(value, bound):
    """Whether rounding decides on which side of its bound a number lies."""
    return abs(value - bound) <= NEAR_BOUND * max(1.0, abs(bound))


def replay(trails, tolerance=TOLERANCE) -> Replay:
    """Compute everything of some `trail_format.Trail`s again."""
    found = Replay(tolerance)
    for trail in trails:
        check_file(trail, found)
        found.problems += trail.problems
        replay_scores(trail, found)
        replay_rewards(trail, found)
        replay_advantages(trail, found)
        replay_updates(trail, found)
        replay_metrics(trail, found)
    return found


def check_file(trail, found):
    """One file beside those before it: its name, its step, and settings that make it the same run."""
    step, settings = trail.step["step"], trail.header["settings"]
    named = step_in(trail.path)
    if named not in (None, step):
        found.problems.append(f"{trail.path.name}: holds step {step}")
    if step in found.rollouts:
        found.problems.append(f"{trail.path.name}: holds step {step}, as another file does")
    if found.settings is None:
        found.settings = settings
    for name in sorted(settings.keys() | found.settings.keys()):
        if settings.get(name) != found.settings.get(name) and name not in MAY_CHANGE:
            found.problems.append(
                f"{trail.path.name}: --{name} is {settings.get(name)!r:.40}, in the files before it "
                f"{found.settings.get(name)!r:.40}: another run's"
            )
    found.rollouts[step] = settings["audit"]


def step_in(path):
    """The step in a file's name, None where it has none."""
    named = re.fullmatch(r"step-([0-9]{6}|[1-9][0-9]{6,})\.jsonl", path.name)
    return int(named.group(1)) if named else None


def place(trail, sample, token=None, update=None):
    """Where a number stands, for a message."""
    words = f"step {trail.step['step']}, sample {sample}"
    words += "" if token is None else f", token {token}"
    return words + ("" if update is None else f", epoch {update['epoch']}, minibatch {update['minibatch']}")


# ---- acts 3 to 5 -----------------------------------------------------------------------------------------------------


def standardised(raw, scale):
    """A raw score in the unit of its reward model's scores."""
    if scale["norm"] == "none":
        return raw
    value = (raw - scale["mean"]) / math.sqrt(scale["variance"])
    return min(max(value, -scale["clip"]), scale["clip"])


def mixed_by(step, label, rationale):
    """(branch, score) of the label-sensitive reward."""
    if step["mode"] == "label":
        return "label", label
    if step["mode"] == "rationale":
        return "rationale", rationale
    if label >= step["threshold"]:
        return "mixed: at the threshold", step["threshold"] + rationale
    return "mixed: below the threshold", label + rationale


def ruled(step, sample, score):
    """(rule, score) after the rule for answers without an end or a label."""
    no_end = sample["truncated"]
    no_label = sample["label"] is None and step["cap"] is not None
    if not no_end and not no_label:
        return "none", score
    rule = "missing eos and label" if no_end and no_label else "missing eos" if no_end else "missing label"
    penalty = max(step["missing_eos_penalty"] if no_end else 0, step["missing_label_penalty"] if no_label else 0)
    return rule, (score if step["cap"] is None else min(score, step["cap"])) - penalty


def replay_scores(trail, found):
    """Act 3: from raw scores to the relative ones."""
    step, group = trail.step, trail.header["settings"]["answers_per_prompt"]
    reward = trail.header["settings"]["reward"]
    if step["mode"] != (reward if reward in ("label", "rationale", "mixed") else "label"):
        found.problems.append(f"step {step['step']}: its mode is {step['mode']}, its run's --reward is {reward}")
    check_settings(trail, found)
    judges = {"label"} & {reward, "label" * (reward == "mixed")}
    if reward == "rationale" or reward == "mixed":
        judges |= set() if trail.header["settings"]["rationale_rm"] == "grounded" else {"rationale"}
    if judges != step["scales"].keys():
        found.problems.append(
            f"step {step['step']}: has the scales of {sorted(step['scales'])}, not of {sorted(judges)}"
        )
    for number, sample in enumerate(trail.samples):
        where = place(trail, number)
        for part in ("label", "rationale"):
            raw, scale = sample[f"{part}_raw"], step["scales"].get(part, {"norm": "none"})
            if raw is None and part in step["scales"]:
                found.problems.append(f"{where}: a reward model gave its {part}_score, but {part}_raw is null")
            elif raw is not None and scale["norm"] == "none":
                found.compare(f"{part}_score", where, sample[f"{part}_score"], raw)
            elif raw is not None:
                parts = [x / math.sqrt(scale["variance"]) for x in (raw, scale["mean"])]
                beyond = abs(standardised(raw, scale | {"clip": math.inf})) - scale["clip"]
                if beyond > found.tolerance * sum(map(abs, parts)) / ROUNDINGS:
                    parts = []  # the clip binds whatever rounding does
                found.compare(f"{part}_score", where, sample[f"{part}_score"], standardised(raw, scale), of=parts)
        of_both = sample["label_score"], sample["rationale_score"]
        branch, score = mixed_by(step, *of_both)
        either = step["mode"] == "mixed" and near(sample["label_score"], step["threshold"])
        either = either and sample["branch"].startswith("mixed: ")
        found.compare("branch", where, sample["branch"], branch, excused=either)
        found.compare(
            "combined_score", where, sample["combined_score"], score, of=[x for x in of_both if x is not None]
        )
        rule, score = ruled(step, sample, sample["combined_score"])
        found.compare("rule", where, sample["rule"], rule)
        found.compare("score", where, sample["score"], score, of=[sample["combined_score"]])
        relative, others = sample["score"], []
        if group > 1:
            first = number - number % group
            others = [other["score"] for other in trail.samples[first : first + group] if other is not sample]
            relative -= sum(others) / max(1, len(others))
        found.compare("relative_score", where, sample["relative_score"], relative, of=[sample["score"], *others])
        for token in trail.tokens[number]:
            at = place(trail, number, token["token"])
            for name in ("id", "label_score", "rationale_score", "branch", "combined_score", "rule", "score"):
                found.compare("copies", f"{at} ({name})", token[name], sample[name])
            found.compare(
                "copies", f"{at} (position)", token["position"], len(sample["prompt_ids"]) - 1 + token["token"]
            )
            found.compare("copies", f"{at} (step)", token["step"], step["step"])


def check_settings(trail, found):
    """What the settings say of the rollout's shape, and that a prompt's answers stand together."""
    settings, step = trail.header["settings"], f"step {trail.step['step']}"
    group = settings["answers_per_prompt"]
    if len(trail.samples) != settings["rollout_prompts"] * group:
        found.problems.append(f"{step}: has {len(trail.samples)} answers, not rollout_prompts * answers_per_prompt")
    for number, sample in enumerate(trail.samples):
        first = trail.samples[number - number % group]
        if any(sample[name] != first[name] for name in ("id", "prompt", "prompt_ids")):
            found.problems.append(f"{place(trail, number)}: its prompt is not that of its group's first answer")
        if sample["tokens"] > settings["max_new_tokens"]:
            found.problems.append(f"{place(trail, number)}: has {sample['tokens']} tokens, more than max_new_tokens")
    whole = trail.step["minibatches"] and trail.step["minibatches"][-1]["applied"]
    if whole and len(trail.step["minibatches"]) != settings["ppo_epochs"] * settings["minibatches"]:
        found.problems.append(f"{step}: has {len(trail.step['minibatches'])} minibatches, not ppo_epochs * minibatches")


def replay_rewards(trail, found):
    """Act 4: the KL of each token, and its reward."""
    kind, beta = trail.header["settings"]["kl_kind"], trail.step["kl_coef"]
    for number, tokens in enumerate(trail.tokens):
        for token in tokens:
            where = place(trail, number, token["token"])
            x = token["ref_logprob"] - token["logprob"]
            parts = token["ref_logprob"], token["logprob"]
            found.compare("kl", where, token["kl"], -x if kind == "k1" else exp(x) - 1 - x, of=parts)
            last = token["token"] == len(tokens) - 1
            score = trail.samples[number]["relative_score"] if last else 0.0
            parts = beta * token["kl"], score
            found.compare("reward", where, token["reward"], -beta * token["kl"] + score, of=parts)


def replay_advantages(trail, found):
    """Act 5: generalised advantage estimation from the last token to the first, then whitening over the rollout."""
    settings, whitening = trail.header["settings"], trail.header["whitening"]
    for number, tokens in enumerate(trail.tokens):
        next_value, next_advantage = 0.0, 0.0
        for token in reversed(tokens):
            where = place(trail, number, token["token"])
            delta = token["reward"] + settings["gamma"] * next_value - token["value"]
            advantage = delta + settings["gamma"] * settings["lam"] * next_advantage
            parts = token["reward"], next_value, token["value"], next_advantage
            found.compare("advantage", where, token["advantage"], advantage, of=parts)
            both = token["advantage"], token["value"]
            found.compare("return", where, token["return"], sum(both), of=both)
            next_value, next_advantage = token["value"], token["advantage"]
    advantages = [token["advantage"] for tokens in trail.tokens for token in tokens]
    if len(advantages) > 1:
        mean = sum(advantages) / len(advantages)
        squares = sum(square(advantage - mean) for advantage in advantages)
        variance = squares / (len(advantages) - whitening["unbiased"])
        scale = 1 / math.sqrt(variance + whitening["eps"])
    else:
        mean, scale = 0.0, 0.0  # the variance of one number is not defined
    unit = max(1.0, scale * max(map(abs, advantages)) / ROUNDINGS)  # where all are nearly equal, rounding is magnified
    for number, tokens in enumerate(trail.tokens):
        for token in tokens:
            whitened = (token["advantage"] - mean) * scale
            where = place(trail, number, token["token"])
            found.compare("whitened_advantage", where, token["whitened_advantage"], whitened, unit=unit)


# ---- act 6 -----------------------------------------------------------------------------------------------------------


def replay_updates(trail, found):
    """The terms of both losses, per epoch and minibatch."""
    minibatches = {(m["epoch"], m["minibatch"]): m for m in trail.step["minibatches"]}
    check_minibatches(trail, found)
    for number, tokens in enumerate(trail.tokens):
        planned = sorted(place for place, minibatch in minibatches.items() if number in minibatch["rows"])
        for token in tokens:
            trained = [(update["epoch"], update["minibatch"]) for update in token["updates"]]
            found.compare("minibatches", place(trail, number, token["token"]), trained, planned)
            for update in token["updates"]:
                if (update["epoch"], update["minibatch"]) in minibatches:
                    count = minibatches[update["epoch"], update["minibatch"]]["tokens"]
                    where = place(trail, number, token["token"], update)
                    replay_update(trail.header["settings"], token, update, count, (where, found))


def check_minibatches(trail, found):
    """The minibatches in order: every epoch, each of them all answers once, unless an update went too far, which ends
    them; none at all where the rollout itself was too far from the reference."""
    step, settings = trail.step, trail.header["settings"]
    lengths = [len(tokens) for tokens in trail.tokens]
    kls = update_sums(trail, lambda token, update: square(update["new_logprob"] - token["logprob"]) / 2)
    kl = mean(sum(token["logprob"] - token["ref_logprob"] for token in own) for own in trail.tokens)
    most, rollout = settings["max_ref_kl"], f"step {step['step']}"
    learnt = most is None or kl <= most or settings["on_ref_kl"] != "skip"
    excused = most is not None and near(kl, most) and settings["on_ref_kl"] == "skip"
    found.compare("minibatches", f"{rollout} (any)", bool(step["minibatches"]), learnt, excused=excused)
    if not step["minibatches"]:
        return
    epochs: dict[int, list] = {}
    for minibatch in step["minibatches"]:
        at = minibatch["epoch"], minibatch["minibatch"]
        where = f"{rollout}, epoch {at[0]}, minibatch {at[1]}"
        own = epochs.setdefault(at[0], [])
        known = [row for row in minibatch["rows"] if row < len(lengths)]
        found.compare("minibatches", where, minibatch["tokens"], sum(lengths[row] for row in known))
        found.compare("minibatches", f"{where} (its place)", at, (len(epochs) - 1, len(own)))
        own.append(minibatch["rows"])
        kl, most = kls.get(at, 0.0) / minibatch["tokens"], settings["max_update_kl"]
        excused = most is not None and near(kl, most)
        found.compare(
            "minibatches", f"{where} (applied)", minibatch["applied"], most is None or kl <= most, excused=excused
        )
        last = minibatch is step["minibatches"][-1]
        found.compare("minibatches", f"{where} (the last)", minibatch["applied"] or last, True)
    ended_early = not step["minibatches"][-1]["applied"]
    for epoch, parts in epochs.items():
        rows = sorted(row for part in parts for row in part)
        missing = ended_early and epoch == max(epochs)
        whole = set(rows) <= set(range(len(lengths))) if missing else rows == list(range(len(lengths)))
        found.compare("minibatches", f"{rollout}, epoch {epoch}", whole and len(set(rows)) == len(rows), True)
    found.compare("minibatches", f"{rollout} (epochs)", ended_early or len(epochs) == settings["ppo_epochs"], True)


def update_sums(trail, share):
    """{(epoch, minibatch): the sum of share(token, update) over its tokens}."""
    sums: dict[tuple, float] = {}
    for token in (token for tokens in trail.tokens for token in tokens):
        for update in token["updates"]:
            at = update["epoch"], update["minibatch"]
            sums[at] = sums.get(at, 0.0) + share(token, update)
    return sums


def replay_update(settings, token, update, count, noted):
    """One token in one minibatch. noted: (where, the `Replay`)."""
    where, found = noted
    clip, value_clip = settings["clip"], settings["value_clip"]
    ratio = exp(update["new_logprob"] - token["logprob"])
    found.compare("ratio", where, update["ratio"], ratio)
    advantage = token["whitened_advantage"]
    bounded = min(max(ratio, 1 - clip), 1 + clip)
    unclipped, clipped = -advantage * ratio, -advantage * bounded
    either = near(ratio, 1 - clip) or near(ratio, 1 + clip)
    found.compare("clipped", where, update["clipped"], clipped > unclipped, excused=either)
    found.compare("policy_loss", where, update["policy_loss"], max(unclipped, clipped) / count, unit=1 / count)

    old, new, target = token["value"], update["new_value"], token["return"]
    bounded = min(max(new, old - value_clip), old + value_clip)
    unclipped, clipped = square(new - target), square(bounded - target)
    size = max(1.0, abs(old), abs(new), abs(target))
    beyond = abs(new - old) - value_clip
    either = abs(beyond) < NEAR_BOUND * size
    either = either or beyond > 0 and abs(abs(new - target) - abs(bounded - target)) < NEAR_BOUND * size
    found.compare("value_clipped", where, update["value_clipped"], clipped > unclipped, excused=either)
    largest = max(unclipped, clipped)
    unit = max(1.0, math.sqrt(largest) * size / ROUNDINGS) / count
    found.compare("value_loss", where, update["value_loss"], largest / 2 / count, unit=unit)


# ---- the step's metrics ----------------------------------------------------------------------------------------------


def replay_metrics(trail, found):
    """What metrics.jsonl says of the step, as far as it is made of these numbers."""
    logged, where = trail.step["metrics"], f"step {trail.step['step']}"
    every = [number for tokens in trail.tokens for token in tokens for number in (token["reward"], token["return"])]
    size = max(abs(number) for number in every + [sample["score"] for sample in trail.samples])
    computed = rollout_metrics(trail) | update_metrics(trail)
    for name, value in computed.items():
        if name in logged:
            unit = 1.0 if name.startswith(("act/", "improve/clip")) else max(1.0, size / ROUNDINGS)
            if name == "credit/explained_variance":  # 1 minus a ratio of spreads, which are small beside the returns
                spread = variance(token["return"] for tokens in trail.tokens for token in tokens)
                unit = max(1.0, abs(value)) * max(1.0, size / ROUNDINGS / math.sqrt(spread))
            found.compare("metrics", f"{where} ({name})", logged[name], value, unit=unit)
        else:
            found.problems.append(f"{where}: its metrics have no {name}")
    moved = any(minibatch["applied"] for minibatch in trail.step["minibatches"])
    given = (
        {"analyse/entropy"} | set(["improve/lr"] if trail.step["minibatches"] else []) | set(GRADIENTS if moved else ())
    )
    found.problems += [f"{where}: its metrics have no {name}" for name in sorted(given - logged.keys())]
    for name in sorted(logged.keys() - computed.keys() - given):
        if name.startswith(("improve/", "judge/")):
            found.problems.append(f"{where}: its metrics have {name}, which does not follow from its numbers")


# Metrics of a step, beside entropy and learning rate, that only the run's models know.
GRADIENTS = ("improve/grad_norm_policy", "improve/grad_norm_value")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def variance(values):
    values = list(values)
    middle = mean(values)
    return mean(square(value - middle) for value in values)


def rollout_metrics(trail):
    """Metrics of acts 1 to 5."""
    samples, tokens = trail.samples, [token for tokens in trail.tokens for token in tokens]
    k1 = [[token["logprob"] - token["ref_logprob"] for token in own] for own in trail.tokens]
    found = {
        "step": trail.step["step"],
        "episodes": trail.step["step"] * len(samples),
        "act/response_len": mean(sample["tokens"] for sample in samples),
        "act/truncated": mean(sample["truncated"] for sample in samples),
        "act/parse_failures": mean(sample["label"] is None for sample in samples),
        "analyse/kl_sequence": mean(sum(own) for own in k1),
        "analyse/kl_token": mean(kl for own in k1 for kl in own),
        "analyse/logprob_gap": mean(abs(token["logprob"] - token["rollout_logprob"]) for token in tokens),
        "judge/score": mean(sample["score"] for sample in samples),
        "shape/kl_coef": trail.step["kl_coef"],
        "shape/reward": mean(sum(token["reward"] for token in own) for own in trail.tokens),
        "credit/advantage_std": math.sqrt(variance(token["advantage"] for token in tokens)),
    }
    spread = variance(token["return"] for token in tokens)
    if spread > NEAR_BOUND:
        unexplained = variance(token["return"] - token["value"] for token in tokens)
        found["credit/explained_variance"] = 1 - unexplained / spread
    parsed = {name: [s["score"] for s in samples if (s["label"] is None) == missing]
              for name, missing in (("judge/score_parsed", False), ("judge/score_parse_failures", True))}  # fmt: skip
    if all(parsed.values()):
        found |= {name: mean(scores) for name, scores in parsed.items()}
    for part, scale in trail.step["scales"].items():
        within = [abs(standardised(s[f"{part}_raw"], scale | {"clip": math.inf})) <= scale["clip"] for s in samples
                  if s[f"{part}_raw"] is not None]  # fmt: skip
        found[f"judge/{part}_clipped"] = 0.0 if scale["norm"] == "none" else 1 - sum(within) / len(samples)
    for part in ("label", "rationale"):
        if samples[0][f"{part}_score"] is not None:
            found[f"judge/{part}_score"] = mean(sample[f"{part}_score"] for sample in samples)
    if trail.step["mode"] == "mixed":
        found["judge/at_threshold"] = mean(sample["branch"] == "mixed: at the threshold" for sample in samples)
    if all(sample["gold"] is not None for sample in samples):
        found["judge/accuracy"] = mean(sample["label"] == sample["gold"] for sample in samples)
    return found


def update_metrics(trail):
    """Metrics of act 6: a minibatch's are sums of its tokens' shares; the step's their mean, or their maximum."""
    counts = {(m["epoch"], m["minibatch"]): m["tokens"] for m in trail.step["minibatches"]}
    if not counts:
        return {}
    summed = {
        "policy_loss": lambda token, update: update["policy_loss"],
        "value_loss": lambda token, update: update["value_loss"],
    }
    averaged = {
        "clipfrac": lambda token, update: update["clipped"],
        "value_clipfrac": lambda token, update: update["value_clipped"],
        "approx_kl": lambda token, update: square(update["new_logprob"] - token["logprob"]) / 2,
        "ratio_mean": lambda token, update: update["ratio"],
    }
    found = {}
    for name, share in (summed | averaged).items():
        sums = update_sums(trail, share)
        parts = [sums.get(at, 0.0) / (count if name in averaged else 1) for at, count in counts.items()]
        found[f"improve/{name}"] = mean(parts)
    first = update_sums(trail, lambda token, update: abs(update["ratio"] - 1)).get((0, 0), 0.0)
    found["improve/first_ratio_error"] = first / counts[0, 0] if (0, 0) in counts else 0.0
    ratios = [update["ratio"] for tokens in trail.tokens for token in tokens for update in token["updates"]]
    return found | {"improve/ratio_max": max(ratios, default=0.0)}
