"""What a PPO step looks like from outside: the metrics of `metrics.jsonl`, a line, two samples."""

import math

import torch

from ..common.files import disk_faults, write_safetensors
from ..common.log import say
from ..grounding import grounded, known_means, means_by_right
from ..metrics import tell_parse_failures
from ..ppo import explained_variance, kl_estimate, masked_mean

# Below both, a rollout's updates are so small that more of them gained (docs/demo.md).
IDLE_CLIPFRAC, IDLE_KL = 1e-3, 3e-4


def step_metrics(step, batch, samples, judges, judged, kl_coef):
    """Acts 1 to 5 in numbers, under the names that the README and the docs use."""
    rollout, mask = batch.rollout, batch.response_mask
    kl_tokens = kl_estimate(batch.logprobs, batch.ref_logprobs)
    advantages = batch.returns - batch.values  # before whitening
    return {
        "step": step,
        "episodes": step * len(samples.answers),
        "act/response_len": rollout.response_lens.float().mean(),
        "act/truncated": rollout.truncated.float().mean(),
        "act/parse_failures": samples.unlabelled.float().mean(),
        "analyse/kl_sequence": kl_tokens.masked_fill(~mask, 0.0).sum(1).mean(),
        "analyse/kl_token": masked_mean(kl_tokens, mask),
        "analyse/entropy": masked_mean(batch.entropy, mask),
        "analyse/logprob_gap": masked_mean((batch.logprobs - rollout.rollout_logprobs).abs(), mask),
        **judge_metrics(judges, judged, samples, batch.scores),
        "shape/kl_coef": kl_coef,
        "shape/reward": batch.rewards.sum(1).mean(),
        "credit/advantage_std": masked_mean((advantages - masked_mean(advantages, mask)).square(), mask).sqrt(),
        "credit/explained_variance": explained_variance(batch.values, batch.returns, mask),
    }


def grounded_metrics(task, examples, samples):
    """How much of the sampled rationales stands in their texts (`rllr.grounding`), all together and, where PPO may know
    gold labels, those of right and of wrong answers; {} where there are none."""
    found = [grounded(task, example, answer) for example, answer in zip(examples, samples.answers, strict=True)]
    if any(label is None for label in samples.gold_labels):
        return known_means({"act/grounded": found})
    right = [label == gold for label, gold in zip(samples.labels, samples.gold_labels, strict=True)]
    return means_by_right("act/grounded", found, right)


def judge_metrics(judges, judged, samples, scores):
    """Act 3 in numbers; accuracy only where PPO may know gold labels. Parse failures' mean score beside the others'."""
    found = {f"judge/{part}_score": part_scores.mean() for part, part_scores in judged.scores.items()}
    found |= {f"judge/{part}_clipped": share for part, share in judges.clipped_shares().items()}
    failed = samples.unlabelled
    found["judge/score"] = scores.mean()
    if failed.any() and not failed.all():
        found |= {"judge/score_parse_failures": scores[failed].mean(), "judge/score_parsed": scores[~failed].mean()}
    if judged.threshold is not None:
        found["judge/at_threshold"] = (judged.label_scores >= judged.threshold).float().mean()
    if all(label is not None for label in samples.gold_labels):
        found["judge/accuracy"] = sum(a == b for a, b in zip(samples.labels, samples.gold_labels)) / len(samples.labels)
    return found


def step_line(step, steps, line):
    """What a person wants to see of a step."""
    shown = {
        "score": "judge/score",
        "label": "judge/label_score",
        "rationale": "judge/rationale_score",
        "kl": "analyse/kl_sequence",
        "entropy": "analyse/entropy",
        "len": "act/response_len",
        "clipfrac": "improve/clipfrac",
        "ev": "credit/explained_variance",
    }
    numbers = "  ".join(f"{name} {float(line[key]):.3g}" for name, key in shown.items() if key in line)
    return f"step {step}/{steps}  {numbers}  parse failures {100 * float(line['act/parse_failures']):.1f} %"


def idle_clip_sentence(line, config) -> str | None:
    """What it means where a step's updates were so small that the clip did not act; None where it did.

    line: the step's metrics. The only update of a rollout always has a ratio of 1, so there it means nothing.
    """
    clipped, moved = float(line.get("improve/clipfrac", 1.0)), float(line.get("improve/approx_kl", 1.0))
    if config.ppo_epochs * config.minibatches == 1 or clipped >= IDLE_CLIPFRAC or moved >= IDLE_KL:
        return None
    return (
        f"hint: this rollout moved the policy by {moved:.1g} nats a token, and the clip met {1000 * clipped:.2g} of "
        "1,000 tokens: it could teach more. --ppo_epochs 2 or 3, more --minibatches (of 8 to 16 answers) or a higher "
        "--learning_rate make more of it"
    )


def first_look_at_full_rate(config):
    """The step of the first look at dev that is not within --warmup, where updates are small on purpose."""
    return config.eval_every * max(1, math.ceil(config.warmup * config.steps / config.eval_every))


def tell_step(run, step, line, times):
    """Write a step's metrics, and a line on the console every --log_every steps. times: seconds (`Clock.take`)."""
    shown = step % run.config.log_every == 0
    tokens = line["act/response_len"] * (line["episodes"] / step)
    line |= {"act/tokens_per_second": tokens / max(times["time/rollout"], 1e-9), **times}
    if shown:
        tell_parse_failures(float(line["act/parse_failures"]), say, "sampled answers")
    run.metrics.write(line, step_line(step, run.config.steps, line) if shown else None)
    if step == first_look_at_full_rate(run.config) and (idle := idle_clip_sentence(line, run.config)):
        say(idle)


def show_rollout(run, step, samples, judged, scores):
    """Every --show_every steps its first two answers, each with its label and its scores."""
    if step % run.config.show_every:
        return
    for i in range(min(2, len(samples.answers))):
        label, gold = samples.labels[i] or "parse failure", samples.gold_labels[i] or "not known here"
        parts = "  ".join(f"{part} {part_scores[i].item():+.2f}" for part, part_scores in judged.scores.items())
        say(f"  prompt  {samples.prompts[i]!r}\n  answer  {samples.answers[i]!r}")
        say(f"  label   {label} (gold: {gold})  {parts}  score {scores[i].item():+.2f}\n")


def write_batch(path, batch):
    """The tensors of a failed step, for whoever looks into it. Returns a sentence that says where they are."""
    packed = {"sequences": batch.packed.sequences, "prompt_lens": batch.packed.prompt_lens}
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    tensors |= packed | {"rollout_logprobs": batch.rollout.rollout_logprobs}
    tensors["response_mask"] = batch.response_mask.to(torch.uint8)
    with disk_faults(str(path)):
        write_safetensors(tensors, path)
    return f"The batch is in {path}."
