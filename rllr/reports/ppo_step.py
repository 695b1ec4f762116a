"""What a PPO step looks like from outside: the metrics of `metrics.jsonl`, a line, two samples."""

import torch

from ..common.files import disk_faults, write_safetensors
from ..common.log import say
from ..ppo import explained_variance, kl_estimate, masked_mean


def step_metrics(
    step, config, rollout, batch, samples, judges, judged, scores, rewards, raw_advantages, stats, threshold, kl_coef
):
    """Every act in numbers, under the names that the README and the docs use."""
    kl_tokens = kl_estimate(batch.logprobs, batch.ref_logprobs)
    spread = (raw_advantages - masked_mean(raw_advantages, batch.mask)).square()
    return {
        "step": step,
        "episodes": step * config.rollout_prompts,
        "act/response_len": rollout.response_lens.float().mean(),
        "act/truncated": rollout.truncated.float().mean(),
        "act/parse_failures": sum(label is None for label in samples.labels) / len(samples.labels),
        "analyse/kl_sequence": kl_tokens.masked_fill(~batch.mask, 0.0).sum(1).mean(),
        "analyse/kl_token": masked_mean(kl_tokens, batch.mask),
        "analyse/entropy": masked_mean(batch.entropy, batch.mask),
        "analyse/logprob_gap": masked_mean((batch.logprobs - rollout.rollout_logprobs).abs(), batch.mask),
        **judge_metrics(judges, judged, samples, scores, threshold),
        "shape/kl_coef": kl_coef,
        "shape/reward": rewards.sum(1).mean(),
        "credit/advantage_std": masked_mean(spread, batch.mask).sqrt(),
        "credit/explained_variance": explained_variance(batch.values, batch.returns, batch.mask),
        **{f"improve/{name}": value for name, value in stats.items()},
    }


def judge_metrics(judges, judged, samples, scores, threshold):
    """Act 3 in numbers; accuracy only where PPO may know gold labels. Parse failures' mean score beside the others'."""
    found = {f"judge/{name}_score": values.mean() for name, values in judged.items()}
    found |= {
        f"judge/{name}_clipped": judge.clipped_share
        for name, judge in judges.items()
        if hasattr(judge, "clipped_share")
    }
    failed = torch.tensor([label is None for label in samples.labels], device=scores.device)
    found |= {"judge/score": scores.mean()}
    if failed.any() and not failed.all():
        found |= {"judge/score_parse_failures": scores[failed].mean(), "judge/score_parsed": scores[~failed].mean()}
    if threshold is not None:
        found["judge/at_threshold"] = (judged["label"] >= threshold).float().mean()
    if all(label is not None for label in samples.gold_labels):
        found["judge/accuracy"] = sum(a == b for a, b in zip(samples.labels, samples.gold_labels)) / len(samples.labels)
    return found


def step_line(step, config, line):
    """What a person wants to see of a step."""
    shown = {
        "score": "judge/score", "label": "judge/label_score", "rationale": "judge/rationale_score",
        "kl": "analyse/kl_sequence", "entropy": "analyse/entropy", "len": "act/response_len",
        "clipfrac": "improve/clipfrac", "ev": "credit/explained_variance",
    }  # fmt: skip
    numbers = "  ".join(f"{name} {float(line[key]):.3g}" for name, key in shown.items() if key in line)
    return f"step {step}/{config.steps}  {numbers}  parse failures {100 * line['act/parse_failures']:.1f} %"


def show_rollout(samples, judged, scores, count=2):
    for i in range(min(count, len(samples.answers))):
        parts = "  ".join(f"{name} {values[i].item():+.2f}" for name, values in judged.items())
        say(f"  prompt  {samples.prompts[i]!r}\n  answer  {samples.answers[i]!r}")
        say(
            f"  label   {samples.labels[i] or 'parse failure'} (gold: {samples.gold_labels[i] or 'not known here'})  {parts}  score {scores[i].item():+.2f}\n"
        )


def write_batch(path, rollout, batch):
    """The tensors of a failed step, for whoever looks into it. Returns a sentence that says where they are."""
    tensors = {name: value for name, value in vars(batch).items() if value is not None}
    tensors |= {"rollout_logprobs": rollout.rollout_logprobs, "response_mask": tensors.pop("mask").to(torch.uint8)}
    with disk_faults(str(path)):
        write_safetensors(tensors, path)
    return f"The batch is in {path}."
