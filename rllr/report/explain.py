"""One token's story: every equation of its path from the judges to the gradient, with its numbers put in."""

import math

from ..common.errors import InputError
from .replay import square, standardised


def explain(trail, sample, token) -> str:
    """The story of one token of one answer. InputError where the rollout has no such answer or token."""
    if sample not in range(len(trail.samples)):
        raise InputError(f"--sample {sample}: step {trail.step['step']} has samples 0 to {len(trail.samples) - 1}")
    own = trail.tokens[sample]
    if token not in range(len(own)):
        raise InputError(f"--token {token}: sample {sample} has tokens 0 to {len(own) - 1}")
    acts = {
        "act": told_act(trail.samples[sample], own, token),
        "analyse": told_analysis(trail, own[token]),
        "judge": told_scores(trail, trail.samples[sample]),
        "shape": told_reward(trail, trail.samples[sample], own, token),
        "credit": told_credit(trail, own, token),
        "improve": told_updates(trail, own[token]),
    }
    row = f"step {trail.step['step']}, sample {sample} (row {trail.samples[sample]['id']!r})"
    lines = [f"{row}, token {token} of {len(own)}: {own[token]['text']!r}", ""]
    for number, (act, told) in enumerate(acts.items(), start=1):
        lines += [f"{f'{number} {act}' if i == 0 else '':10}  {line}" for i, line in enumerate(told)] + [""]
    return "\n".join(lines).rstrip()


def n(value):
    """A number for a person: six significant digits."""
    return f"{value + 0.0:.6g}"  # + 0.0: no minus before a zero


def p(value):
    """The same behind an operator: a negative one in brackets."""
    return f"({n(value)})" if value < 0 else n(value)


def told_act(sample, own, t):
    gold = "" if sample["gold"] is None else f", gold {sample['gold']!r}"
    label = "none can be read" if sample["label"] is None else repr(sample["label"])
    marked = "".join(f"[{token['text']}]" if i == t else token["text"] for i, token in enumerate(own))
    return [
        f"prompt    {sample['prompt']!r}",
        f"answer    {marked!r}",
        f"label     {label}{gold}",
        f"token id  {own[t]['token_id']}, predicted at position {own[t]['position']} = prompt length "
        f"{len(sample['prompt_ids'])} - 1 + {t}",
        f"log-probability while sampling  {n(own[t]['rollout_logprob'])}",
    ]


def told_analysis(trail, token):
    kind = trail.header["settings"]["kl_kind"]
    old, ref = token["logprob"], token["ref_logprob"]
    k1 = f"kl = log pi_old - log pi_ref = {n(old)} - {p(ref)} = {n(token['kl'])} nats"
    k3 = f"kl = exp(x) - 1 - x = {n(token['kl'])} nats, x = log pi_ref - log pi_old = {n(ref)} - {p(old)}"
    return [f"log pi_old = {n(old)}, log pi_ref = {n(ref)}, V = {n(token['value'])}", k1 if kind == "k1" else k3]


def told_scores(trail, sample):
    step, lines = trail.step, []
    for part in ("label", "rationale"):
        raw, scale = sample[f"{part}_raw"], step["scales"].get(part)
        if raw is not None and scale and scale["norm"] != "none":
            plain = standardised(raw, scale | {"clip": math.inf})
            clipped = f", clipped to +-{n(scale['clip'])}: {n(sample[f'{part}_score'])}" * (abs(plain) > scale["clip"])
            lines.append(
                f"{part} score = (raw - mean) / std = ({n(raw)} - {p(scale['mean'])}) / "
                f"{n(math.sqrt(scale['variance']))} = {n(plain)}{clipped}"
            )
        elif sample[f"{part}_score"] is not None:
            lines.append(f"{part} score = {n(sample[f'{part}_score'])}")
    combined = n(sample["combined_score"])
    if step["mode"] == "mixed":
        parts = n(sample["label_score"]), n(step["threshold"]), p(sample["rationale_score"])
        lines.append(f"{sample['branch']}: min(label, threshold) + rationale")
        lines.append(f"    = min({parts[0]}, {parts[1]}) + {parts[2]} = {combined}")
    else:
        reward = trail.header["settings"]["reward"]
        lines.append(f"--reward {reward}: the score is the {step['mode']} score, {combined}")
    if sample["rule"] != "none":
        penalties = [step["missing_eos_penalty"]] * ("eos" in sample["rule"])
        penalties += [step["missing_label_penalty"]] * ("label" in sample["rule"])
        capped = combined if step["cap"] is None else f"min({combined}, cap {n(step['cap'])})"
        lines.append(f"{sample['rule']}: score = {capped} - penalty {n(max(penalties))} = {n(sample['score'])}")
    group = trail.header["settings"]["answers_per_prompt"]
    if group > 1:
        lines.append(
            f"relative score = score - mean of the prompt's {group - 1} other answers = {n(sample['relative_score'])}"
        )
    return lines


def told_reward(trail, sample, own, t):
    token, beta = own[t], n(trail.step["kl_coef"])
    if t < len(own) - 1:
        return [
            f"reward = -beta * kl = -{beta} * {p(token['kl'])} = {n(token['reward'])}   (the last token gets the score)"
        ]
    score = p(sample["relative_score"])
    return [f"reward = -beta * kl + score = -{beta} * {p(token['kl'])} + {score} = {n(token['reward'])}"]


def told_credit(trail, own, t):
    settings, whitening = trail.header["settings"], trail.header["whitening"]
    token, after = own[t], own[t + 1] if t + 1 < len(own) else {"value": 0.0, "advantage": 0.0}
    gamma, lam = settings["gamma"], settings["lam"]
    delta = token["reward"] + gamma * after["value"] - token["value"]
    advantages = [other["advantage"] for tokens in trail.tokens for other in tokens]
    mean = sum(advantages) / len(advantages)
    squares = sum(square(advantage - mean) for advantage in advantages)
    variance = squares / max(1, len(advantages) - whitening["unbiased"])
    lines = [
        f"delta = r + gamma * V_next - V = {n(token['reward'])} + {n(gamma)} * {p(after['value'])} - "
        f"{p(token['value'])} = {n(delta)}",
        f"A = delta + gamma * lam * A_next = {n(delta)} + {n(gamma)} * {n(lam)} * {p(after['advantage'])} = "
        f"{n(token['advantage'])}",
        f"return = A + V = {n(token['advantage'])} + {p(token['value'])} = {n(token['return'])}",
        f"whitened A = (A - mean) / sqrt(variance + eps) = ({n(token['advantage'])} - {p(mean)}) / "
        f"sqrt({n(variance)} + {n(whitening['eps'])}) = {n(token['whitened_advantage'])}   "
        f"(over the rollout's {len(advantages)} tokens)",
    ]
    return lines if t + 1 < len(own) else ["the last token: V_next and A_next are 0", *lines]


def told_updates(trail, token):
    settings = trail.header["settings"]
    counts = {(m["epoch"], m["minibatch"]): m for m in trail.step["minibatches"]}
    lines = []
    for update in token["updates"]:
        minibatch = counts.get((update["epoch"], update["minibatch"]))
        if minibatch is None:
            where = f"epoch {update['epoch']}, minibatch {update['minibatch']}"
            raise InputError(f"{trail.path}: its step line has no {where}, in which this token is; replay the trail")
        lines += told_update(settings, token, update, minibatch)
    return lines or ["no update: the rollout was skipped, or --max_update_kl ended its updates before this token's"]


def told_update(settings, token, update, minibatch):
    clip, value_clip, count = settings["clip"], settings["value_clip"], minibatch["tokens"]
    advantage, ratio, target = token["whitened_advantage"], update["ratio"], token["return"]
    bounded = min(max(ratio, 1 - clip), 1 + clip)
    old, new = token["value"], update["new_value"]
    value = min(max(new, old - value_clip), old + value_clip)
    chosen = ["unclipped", "clipped"]
    moved = "" if minibatch["applied"] else ", not applied: beyond --max_update_kl"
    return [
        f"epoch {update['epoch']}, minibatch {update['minibatch']} of {count} tokens{moved}",
        f"    rho = exp(log pi - log pi_old) = exp({n(update['new_logprob'])} - {p(token['logprob'])}) = {n(ratio)}",
        f"    policy loss: max(-A * rho, -A * clip(rho, {n(1 - clip)}, {n(1 + clip)})) / tokens",
        f"        = max({n(-advantage * ratio)}, {n(-advantage * bounded)}) / {count} = {n(update['policy_loss'])}   "
        f"({chosen[update['clipped']]})",
        f"    value loss: max((V - R)^2, (clip(V, V_old +- {n(value_clip)}) - R)^2) / 2 / tokens",
        f"        = max(({n(new)} - {p(target)})^2, ({n(value)} - {p(target)})^2) / 2 / {count} = "
        f"{n(update['value_loss'])}   ({chosen[update['value_clipped']]})",
    ]
