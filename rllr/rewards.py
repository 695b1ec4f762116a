"""The label-sensitive reward, its mixed form, and how a score becomes per-token rewards. Imports torch and our KL.

This is the paper's idea (RLLR, Liao et al., ACL 2024, arXiv:2405.19763) as arithmetic on [B] tensors. A score is
label-sensitive because of the data that trained its reward model: `rllr.pairs.label_sensitive_pairs`.
"""

import torch
from torch.nn import functional as F

from .ppo import kl_estimate

MODES = ("label", "rationale", "mixed")


def label_sensitive_reward(label_scores, rationale_scores=None, threshold=None, mode="label"):
    """One score per answer from the label-sensitive and the rationale-sensitive reward model.

        label      label_scores                                         RLLR
        rationale  rationale_scores                                     classic RLHF, for comparison
        mixed      min(label_scores, threshold) + rationale_scores      RLLR-mixed (section 3.4 of the paper)

    All [B] -> [B]. A label score above the threshold counts as "the label is right": there, only a better rationale
    increases the reward. Below the threshold the label counts as well, so a good rationale does not hide a wrong label.

    >>> right, wrong, good, bad = 2.0, -2.0, 0.5, -0.5
    >>> label = torch.tensor([right, right, wrong, wrong])
    >>> rationale = torch.tensor([good, bad, good, bad])
    >>> label_sensitive_reward(label, rationale, threshold=1.0, mode="mixed").tolist()
    [1.5, 0.5, -1.5, -2.5]
    """
    if mode == "label":
        return label_scores
    if mode == "rationale":
        return _required(rationale_scores, "rationale_scores", mode)
    if mode == "mixed":
        threshold = _required(threshold, "threshold", mode)
        return label_scores.clamp(max=threshold) + _required(rationale_scores, "rationale_scores", mode)
    raise ValueError(f"unknown reward mode {mode!r}; choose from {', '.join(MODES)}")


def _required(value, name, mode):
    if value is None:
        raise ValueError(f"reward mode {mode!r} needs {name}")
    return value


def incomplete_answer_rule(scores, truncated, unlabelled, missing_eos_penalty, missing_label_penalty, cap=None):
    """Scores in which an answer without its end, or without a readable label, gets at most `cap` minus a penalty.

    scores [B]; truncated, unlabelled [B] bool -> [B]. If both are true, the larger penalty applies. A reward model
    never saw an answer without an end or a label, so its high scores for such answers mean nothing: `cap` is the mean
    score of the SFT policy's answers (0 if scores are standardised). cap None is for a reward that does not come from a
    reward model: it is not capped, and it must itself take care of missing labels.
    """
    if cap is None:
        unlabelled = torch.zeros_like(unlabelled)
    penalty = torch.maximum(truncated * missing_eos_penalty, unlabelled * missing_label_penalty)
    capped = scores if cap is None else scores.clamp(max=cap)
    return torch.where(truncated | unlabelled, capped - penalty, scores)


def relative_scores(scores, answers_per_prompt):
    """Each score minus the mean score of its prompt's *other* answers; of one answer a prompt, the score itself.

        A_i = s_i - 1 / (K - 1) * sum of s_j over j != i          (leave one out, RLOO: arXiv:2402.14740)

    scores [B], the answers_per_prompt = K answers of a prompt one after the other -> [B]. Bradley-Terry fits
    differences between answers to one prompt and leaves each prompt a constant of its own, which says nothing about an
    answer and is gone here. What is taken off does not depend on the answer that it is taken off from, so the gradient
    stays unbiased.
    """
    if answers_per_prompt == 1:
        return scores
    groups = scores.view(-1, answers_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (answers_per_prompt - 1)
    return (groups - others).view(-1)


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, kind="k1"):
    """Per-token rewards: -kl_coef * KL_t on every response token, plus the score on the last one.

        r_t = -beta * KL_t + [t = last] * score        (Ziegler et al., arXiv:1909.08593, eq. 2; KL by `kl_estimate`)

    scores [B]; logprobs, ref_logprobs, mask [B, R] -> [B, R], 0 outside the mask. The last token is EOS or, if the
    length limit cut the answer, the last token before the limit. A row without tokens gets no reward.
    """
    logprobs, ref_logprobs = logprobs.masked_fill(~mask, 0.0), ref_logprobs.masked_fill(~mask, 0.0)
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kind)
    lengths = mask.sum(1)
    last = torch.arange(mask.shape[1], device=mask.device) == (lengths - 1).unsqueeze(1)  # [B, R], all False if empty
    return rewards.masked_fill(~mask, 0.0) + torch.where(last, scores.to(rewards.dtype).unsqueeze(1), 0.0)


def pairwise_loss(chosen, rejected, margin=0.0, center_coef=0.0, reduction="mean"):
    """Bradley-Terry loss of preference pairs: mean of -log sigmoid(chosen - rejected - margin).

    chosen, rejected [B] scores. center_coef adds center_coef * mean((chosen + rejected)^2): it fixes the zero point,
    which Bradley-Terry leaves open (arXiv:2312.09244). reduction "none" gives the [B] terms.
    """
    losses = -F.logsigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected).square()
    return losses.mean() if reduction == "mean" else losses


def pairwise_accuracy(chosen, rejected):
    """Share of pairs whose chosen answer scores higher; a tie counts one half. [B], [B] -> scalar."""
    return ((chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)).mean()
