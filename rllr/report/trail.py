"""The audit trail: with --audit, every number that went into the gradient of every token, as JSON lines.

The lines and what they hold are in `trail_format`. What is written is what training used: the tensors of the batch, and
for act 6 the terms of `ppo.policy_loss` and `ppo.value_loss` themselves, token by token. `replay` computes them again
by other code.
"""

import platform

import torch
import transformers

from .. import __version__
from ..common import ranks
from ..common.files import PART, disk_faults, write_text
from ..layout import response_positions, response_tokens
from ..ppo import kl_estimate, policy_loss, value_loss
from ..rewards import label_sensitive_reward, relative_scores
from .trail_format import AUDIT_FORMAT, FOLDER, audited, file_of, rollouts_in, seal, step_of

WHITENING = {"unbiased": True, "eps": 1e-8}  # the defaults of `ppo.masked_whiten`, which train_ppo.py takes
NOT_COMPUTED = ("output_dir", "overwrite", "resume")  # settings that say where a run goes, not what it is
NOT_HERE = ("time/", "act/tokens_per_second")  # metrics that no replay could give, and that no two runs share


class AuditTrail:
    """Writes the files of a run's audited rollouts."""

    def __init__(self, run, models, done):
        """done: steps that are done. Files of later ones go: a run that goes on from a checkpoint writes them again."""
        self.run, self.judges, self.encoder = run, models.judges, models.encoder
        self.wanted = audited(run.config.audit)
        if not ranks.is_first():
            return
        for path in rollouts_in(run.directory / FOLDER):
            if step_of(path) > done:
                path.unlink()
        for path in (run.directory / FOLDER).glob(f"*{PART}"):  # a kill left it
            path.unlink()

    def write(self, step, batch, samples, judged, *, plan, advantages, metrics):
        """The file of one rollout, if it is to be audited.

        plan: of `PromptStream`; advantages [B, R]: before whitening; metrics: the step's, with those of `improve`.
        """
        if not self.wanted(step):
            return
        mask = batch.response_mask
        metrics = {name: _number(value) for name, value in metrics.items() if not name.startswith(NOT_HERE)}
        updates, minibatches = act_six(batch, plan, self.run.config, ranks.each(batch.seen))
        if not ranks.is_first():
            return
        answers = answer_columns(samples, judged, batch.scores, self.judges, self.run.config.answers_per_prompt)
        answers["tokens"] = batch.rollout.response_lens.tolist()
        rows = _rows(answers)
        lines = [
            self._header(),
            {
                "kind": "step",
                "step": step,
                "answers": len(rows),
                "kl_coef": metrics["shape/kl_coef"],
                "mode": judged.mode,
                "threshold": judged.threshold,
                "cap": judged.cap,
                "missing_eos_penalty": judged.penalties[0],
                "missing_label_penalty": judged.penalties[1],
                "scales": scales_of(self.judges),
                "minibatches": minibatches,
                "metrics": metrics,
            },
        ]
        kl = kl_estimate(batch.logprobs, batch.ref_logprobs, self.run.config.kl_kind)
        columns = {
            "position": response_positions(batch.packed.prompt_lens, mask),
            "token_id": response_tokens(*batch.packed),
            "rollout_logprob": batch.rollout.rollout_logprobs,
            "logprob": batch.logprobs,
            "ref_logprob": batch.ref_logprobs,
            "kl": kl,
            "reward": batch.rewards,
            "value": batch.values,
            "advantage": advantages,
            "whitened_advantage": batch.advantages,
            "return": batch.returns,
        }
        tokens = [_rows(row) for row in _by_answer(columns, mask)]
        of_answer = ("label_score", "rationale_score", "branch", "combined_score", "rule", "score")
        prompts = [ids[:length] for ids, length in zip(batch.packed.sequences.tolist(), batch.packed.prompt_lens)]
        for number, (row, own, trained) in enumerate(zip(rows, tokens, updates)):
            pieces = pieces_of([token["token_id"] for token in own], self.encoder.tokenizer)
            copied = {name: row[name] for name in of_answer}
            lines.append({"kind": "sample", "sample": number, "prompt_ids": prompts[number], **row})
            for t, (token, piece) in enumerate(zip(own, pieces)):
                place = {"kind": "token", "step": step, "sample": number, "id": row["id"], "token": t, "text": piece}
                lines.append(place | token | copied | {"updates": [epoch[t] for epoch in trained]})
        path = file_of(self.run.directory, step)
        with disk_faults(f"the audit trail {path}"):
            path.parent.mkdir(exist_ok=True)
            write_text(path, "\n".join(seal(lines)) + "\n")

    def _header(self):
        versions = {"rllr": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        task = {"name": self.run.task.name, "labels": list(self.run.task.labels)}
        return {
            "kind": "header",
            "format": AUDIT_FORMAT,
            "versions": versions | {"python": platform.python_version()},
            "task": task,
            "settings": {name: value for name, value in self.run.record["config"].items() if name not in NOT_COMPUTED},
            "whitening": WHITENING,
        }


def scales_of(judges):
    """{part: the unit of a reward model's scores}, as the last scores were given in it."""
    return {
        part: {"norm": scorer.norm, "mean": scorer.mean, "variance": scorer.variance, "clip": scorer.clip}
        for part, scorer in judges.scorers.items()
        if scorer.statistics
    }


def answer_columns(samples, judged, scores, judges, answers_per_prompt):
    """{field of a sample line: list of B}, the scores from raw to relative."""
    truncated, unlabelled = samples.truncated, samples.unlabelled
    columns = {
        "id": samples.ids,
        "prompt": samples.prompts,
        "answer": samples.answers,
        "label": samples.labels,
        "gold": samples.gold_labels,
        "truncated": truncated.tolist(),
    }
    parts = {"label": judged.label_scores, "rationale": judged.rationale_scores}
    for part, given in parts.items():
        scorer = judges.scorers.get(part)
        columns[f"{part}_raw"] = _floats(scorer.raw) if scorer else [None] * len(scores)
        columns[f"{part}_score"] = _floats(given) if given is not None else [None] * len(scores)
    combined = label_sensitive_reward(judged.label_scores, judged.rationale_scores, judged.threshold, judged.mode)
    at = combined.new_zeros(len(scores), dtype=torch.bool)
    if judged.threshold is not None:
        at = judged.label_scores >= judged.threshold
    mixed = ("mixed: below the threshold", "mixed: at the threshold")
    columns["branch"] = [mixed[reached] if judged.mode == "mixed" else judged.mode for reached in at.tolist()]
    columns["combined_score"] = _floats(combined)
    no_label = [missing and judged.cap is not None for missing in unlabelled.tolist()]
    columns["rule"] = [rule_name(*missing) for missing in zip(truncated.tolist(), no_label)]
    columns["score"] = _floats(scores)
    columns["relative_score"] = _floats(relative_scores(scores, answers_per_prompt))
    return columns


def rule_name(no_end, no_label):
    """Which part of `incomplete_answer_rule` applies to an answer."""
    return {(0, 0): "none", (1, 0): "missing eos", (0, 1): "missing label"}.get(
        (no_end, no_label), "missing eos and label"
    )


def act_six(batch, plan, config, seen):
    """(per answer and epoch its tokens' updates, the minibatches in order). seen: of each rank what its updates kept
    (`Batch.seen`).

    The terms of both losses come from the very functions that training called, unreduced.
    """
    mask = batch.response_mask
    lengths = mask.sum(1).tolist()
    updates: list[list] = [[] for _ in lengths]
    minibatches: list[dict] = []
    seen = [list(own) for own in seen]
    for epoch, epoch_plan in enumerate(plan):
        for number, rows in enumerate(epoch_plan):
            if not any(seen):  # the rollout was skipped, or --max_update_kl ended its updates
                return updates, minibatches
            new_logprobs, new_values = torch.zeros_like(batch.logprobs), torch.zeros_like(batch.values)
            for rank, kept in enumerate(seen):
                left = set(rows[rank :: len(seen)])  # `ranks.share`
                while left:
                    own, logprobs, values = kept.pop(0)
                    new_logprobs[own, : logprobs.shape[1]] = logprobs.to(new_logprobs)
                    new_values[own, : values.shape[1]] = values.to(new_values)
                    left -= set(own)
            count = mask[rows].sum()
            terms, loss = loss_terms(batch, rows, new_logprobs[rows], new_values[rows], config)
            terms |= {name: terms[name] / count for name in ("policy_loss", "value_loss")}
            kl = float(loss["approx_kl"].sum() / count)
            applied = config.max_update_kl is None or not kl > config.max_update_kl
            minibatches.append(
                {"epoch": epoch, "minibatch": number, "rows": rows, "tokens": int(count), "applied": applied}
            )
            for row, columns in zip(rows, _by_answer(terms, mask[rows])):
                place = {"epoch": epoch, "minibatch": number}
                updates[row].append([place | values for values in _rows(columns)])
    return updates, minibatches


def loss_terms(batch, rows, new_logprobs, new_values, config):
    """({field of an update: [b, R]}, statistics of `policy_loss`), of some rows: every term before it is averaged."""

    def unreduced(x, mask):
        return x.masked_fill(~mask, 0.0)

    mask = batch.response_mask[rows]
    old = batch.logprobs[rows], batch.advantages[rows], mask
    policy, stats = policy_loss(new_logprobs, *old, config.clip, reduce=unreduced)
    value, value_stats = value_loss(
        new_values, batch.values[rows], batch.returns[rows], mask, config.value_clip, reduce=unreduced
    )
    terms = {
        "new_logprob": new_logprobs,
        "ratio": stats["ratio_mean"],
        "clipped": stats["clipfrac"].bool(),
        "new_value": new_values,
        "value_clipped": value_stats["clipfrac"].bool(),
        "policy_loss": policy,
        "value_loss": value,
    }
    return terms, stats


def pieces_of(ids, tokenizer):
    """The share of each token in the text; together they are the text. A character of several tokens is the last one's.

    One token alone would lose its leading space with some tokenizers, and its bytes with others, so a window of the
    tokens before it is decoded with and without it.
    """

    def text(start, end):
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces, start, done = [], 0, 0  # text(start, done) has been given out
    for end in range(1, len(ids) + 1):
        before, now = text(start, done), text(start, end)
        if now.endswith("\ufffd") and end < len(ids):  # not yet a whole character
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, done = done, end
    return pieces


# ---- tensors to numbers ----------------------------------------------------------------------------------------------


def _number(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def _floats(tensor):
    """Numbers that give back the very float32, in as few digits as that takes."""
    return [float(f"{value:.9g}") for value in tensor.float().tolist()]


def _values(tensor):
    return _floats(tensor) if tensor.is_floating_point() else tensor.tolist()


def _by_answer(columns, mask):
    """Per answer {name: list of its tokens' values}, from {name: [B, R]}."""
    flat = {name: _values(tensor[mask]) for name, tensor in columns.items()}
    start = 0
    for length in mask.sum(1).tolist():
        yield {name: values[start : start + length] for name, values in flat.items()}
        start += length


def _rows(columns):
    """{name: list} as a list of {name: value}."""
    return [dict(zip(columns, row)) for row in zip(*columns.values())]
