"""Stage 3: proximal policy optimisation against the label-sensitive reward, by hand.

    python train_ppo.py                                   # RLLR on the demo data, from the two former stages' output
    python train_ppo.py --reward mixed                    # RLLR-mixed: min(label, threshold) + rationale
    python train_ppo.py --reward gold                     # upper bound: rewards the gold label itself

Every step has six acts: 1 act, 2 analyse, 3 judge, 4 shape, 5 credit, 6 improve. The README and the metrics use the
same words. Writes runs/<task>/ppo-<reward>/best, the policy that is handed back, /last and metrics.jsonl.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from rllr.common import ranks
from rllr.common.config import Settings, check_divisible, flag
from rllr.common.errors import InputError, brief, command
from rllr.common.log import Clock, progress, say
from rllr.data.splits import DataConfig, load_splits
from rllr.guard import Guard
from rllr.judge import read_samples
from rllr.keeper import Keeper
from rllr.model.roles import LoRAConfig, check_lora
from rllr.model.trial import check_policy
from rllr.ppo import AdaptiveKL, FixedKL, gae, masked_whiten
from rllr.ppo_models import load_models, name_judges
from rllr.report.ppo_step import grounded_metrics, show_rollout, step_metrics, tell_step
from rllr.report.trail import AuditTrail
from rllr.report.trail_format import audited
from rllr.rewards import MODES, incomplete_answer_rule, label_sensitive_reward, relative_scores, shape_rewards
from rllr.rollout import generate
from rllr.run.run import Run, digest, input_fingerprints, is_tiny
from rllr.run.settings import PolicyConfig, TrainingConfig
from rllr.update import PromptStream, analyse, check_sampler_gap, improve, kl_within_bound


@dataclass
class RewardConfig(Settings):
    GROUP = "reward"
    reward: str = flag("label", "label, rationale, mixed, gold, or module:function")
    label_rm: str | None = flag(None, "label-sensitive reward model (runs/<task>/rm-label)")
    rationale_rm: str | None = flag(
        None,
        "rationale-sensitive reward model (runs/<task>/rm-rationale); grounded: the rule whether the words that a "
        "rationale quotes stand in its text (docs/reward-hacking.md)",
    )
    threshold: str | None = flag(None, "mixed: cap of the label reward, a number (1.0) or a quantile of it (q0.9)")
    score_norm: str = flag(
        "stored",
        "scores are standardised by stored statistics, by running ones, or not: none (raw scores, as in the paper)",
        choices=("stored", "running", "none"),
    )
    score_clip: float = flag(5.0, "bound of a standardised score", above=0)
    missing_eos_penalty: float = flag(
        1.0, "taken off an answer that the length limit cut, after capping it at the SFT mean", at_least=0
    )
    missing_label_penalty: float = flag(
        1.0, "the same for an answer without a readable label (not with gold and own functions)", at_least=0
    )


@dataclass
class PPOConfig(Settings):
    GROUP = "PPO"
    prompts: str = flag(
        "auto",
        "auto: the unlabelled rows and, where there are few or none, the labelled ones; labelled: the labelled rows "
        "that trained SFT",
        choices=("auto", "labelled"),
    )
    steps: int | None = flag(None, "rollouts (demo 120; else one pass over the prompts)", above=0)
    rollout_prompts: int = flag(64, "prompts per rollout", above=0)
    answers_per_prompt: int = flag(
        1, "answers to each of them; above 1 a score counts relative to the prompt's other answers", above=0
    )
    ppo_epochs: int = flag(1, "passes over a rollout", above=0)
    minibatches: int = flag(2, "optimiser steps per pass", above=0)
    learning_rate: float | None = flag(
        None, "of the policy (by size, docs/models.md: tiny 2e-4, 135 M 1.9e-5; adapters x 3), linear decay", above=0
    )
    value_learning_rate: float | None = flag(
        None, "of the value model (by size: tiny 5e-4, 135 M 4.9e-5; adapters 1.5e-3, 4.9e-4)", above=0
    )
    warmup: float = flag(
        0.0, "share of the updates in which the policy's rate rises, while the value model learns", between=(0, 1)
    )
    value_init: str | None = flag(
        None, "directory the value model starts from (the reward model; SFT backbone, zero head)"
    )
    freeze_embeddings: bool | None = flag(None, "of the policy (tiny yes, any other model no)")
    kl_coef: float = flag(0.1, "beta: weight of the per-token KL to the SFT policy in the reward", at_least=0)
    kl_kind: str = flag("k1", "estimator of that KL: k1 or k3", choices=("k1", "k3"))
    kl_control: str = flag("fixed", "fixed, or adaptive", choices=("fixed", "adaptive"))
    kl_target: float = flag(
        6.0, "adaptive: nats per sequence; too much for short answers (healthy tiny runs end near 1)", above=0
    )
    kl_horizon: float = flag(10_000.0, "adaptive: sequences", above=0)
    max_update_kl: float | None = flag(
        None, "skip the rest of a rollout's minibatches once new against old policy exceeds it", above=0
    )
    max_ref_kl: float | None = flag(
        100.0, "bound of a rollout's mean KL to the SFT policy, in nats per answer; none: no bound", above=0
    )
    on_ref_kl: str = flag(
        "stop",
        "beyond that bound: stop the run, or skip the rollout's update (ten in a row stop it, too)",
        choices=("stop", "skip"),
    )
    on_hacking: str = flag(
        "stop",
        "where dev shows reward hacking, the score up and accuracy down: stop the run, kl: double beta, or ignore it",
        choices=("stop", "kl", "ignore"),
    )
    gamma: float = flag(1.0, "discount of later rewards", between=(0, 1))
    lam: float = flag(0.95, "lambda of GAE", between=(0, 1))
    clip: float = flag(0.2, "of the probability ratio", above=0)
    value_clip: float = flag(0.2, "of the value's change, in units of the reward", above=0)
    temperature: float = flag(1.0, "of sampling and of every log-probability", above=0)


@dataclass
class Config(RewardConfig, PPOConfig, TrainingConfig, PolicyConfig, LoRAConfig, DataConfig):
    GROUP = "run"
    SECTION = "ppo"
    save_every: int = flag(20, "rollouts between checkpoints; 0: only when asked to stop", at_least=0)
    log_every: int = flag(5, "steps between printed lines; metrics.jsonl has every step", above=0)
    show_every: int = flag(20, "steps between printed samples", above=0)
    eval_every: int = flag(20, "steps between evaluations on dev", above=0)
    best_by: str | None = flag(
        None,
        "what chooses the policy that is handed back: the task's metric on dev, or the score that the run pays there "
        "(score where the reward is your own function or learnt from a file of pairs; else metric)",
        choices=("metric", "score"),
    )
    eval_rows: int = flag(0, "dev rows per evaluation; 0: all", at_least=0)
    audit: str | None = flag(
        None,
        "write every number of every token's gradient (docs/audit.md): of the first N rollouts, of every:K-th, of all",
    )

    def validate(self):
        super().validate()
        check_divisible(self, "rollout_prompts", "minibatches")
        check_lora(self)
        answers = self.rollout_prompts * self.answers_per_prompt // self.minibatches
        if answers < ranks.count():
            raise InputError(
                f"{ranks.count()} processes share {answers} answers of a minibatch; give fewer --minibatches"
            )
        audited(self.audit)
        if self.reward not in (*MODES, "gold") and ":" not in self.reward:
            raise InputError(
                f"--reward {brief(self.reward)}: choose label, rationale, mixed, gold, or give module:function"
            )
        if self.threshold is not None and self.reward != "mixed":
            raise InputError("--threshold caps the label reward in --reward mixed; it means nothing otherwise")
        if self.threshold is not None and not is_threshold(self.threshold):
            raise InputError(f"--threshold {brief(self.threshold)}: give a number, or a quantile like q0.9")
        if self.on_hacking == "kl" and self.kl_coef == 0:
            raise InputError("--on_hacking kl doubles --kl_coef, which is 0; give a --kl_coef above 0")
        fewest = self.rollout_prompts * self.answers_per_prompt / 5  # one step changes beta by a fifth of n / horizon
        if self.kl_control == "adaptive" and self.kl_horizon <= fewest:
            given = f"--kl_horizon {self.kl_horizon:g}"
            raise InputError(f"{given}: one rollout could take beta to 0; give more than {fewest:g}")
        for part in ("label", "rationale"):
            if getattr(self, f"{part}_rm") and self.reward not in (part, "mixed"):
                raise InputError(
                    f"--{part}_rm is not used by --reward {brief(self.reward)}; did you mean --reward mixed?"
                )

    def default_directory(self, task):
        return f"runs/{task.name}/ppo-{self.reward.replace(':', '.').replace('/', '.')}"

    def protected_paths(self):
        models = [self.policy, self.label_rm, self.rationale_rm, self.value_init]
        return [*models, self.task, self.train_file, self.eval_file, self.test_file]

    def resolve(self, task, record):
        tiny = is_tiny(self, record)
        self.freeze_embeddings = tiny if self.freeze_embeddings is None else self.freeze_embeddings
        self.threshold = self.threshold or ("1.0" if self.reward == "mixed" else None)
        name_judges(self, task)


def is_threshold(text):
    """Whether a text is a finite number, or q and a number from 0 to 1."""
    try:
        number = float(text.removeprefix("q"))
    except ValueError:
        return False
    return 0 <= number <= 1 if text.startswith("q") else math.isfinite(number)


def load_prompts(run, splits, models):
    """(prompts, dev rows, gold labels by row id): prompts without their labels, except for --reward gold."""
    config, task, encoder = run.config, run.task, models.encoder
    rows = splits.prompts(config.prompts)
    trained = [row for row in rows if row.label is not None]
    bare = [f"{len(rows) - len(trained)} unlabelled rows"] * (len(trained) < len(rows))
    same = [f"{len(trained)} labelled rows, the same that trained SFT and reward model"] * bool(trained)
    say(f"prompts: {', '.join(bare + same)}")
    prompts = encoder.fit(rows, task, config.max_new_tokens, say)
    dev = encoder.fit(splits.eval[: config.eval_rows or None], task, config.max_new_tokens, say)
    others = [models.reference, models.value_model, *(scorer.model for scorer in models.judges.scorers.values())]
    check_policy(
        models.policy, encoder, task, prompts + dev,
        max_new_tokens=config.max_new_tokens, name=config.policy, log=say, alike=others,
    )  # fmt: skip
    gold = splits.gold if config.reward == "gold" else {row.id: row.label for row in prompts if row.label}
    unknown = [row.name for row in prompts if row.id not in gold]
    if config.reward == "gold" and unknown:
        problem = f"row {unknown[0]} has none; --prompts labelled takes the labelled rows alone"
        raise InputError(f"--reward gold needs the label of every prompt; {problem}")
    return prompts, dev, gold


def fingerprints(run, splits, models):
    """What the run reads, as a resumed run compares it."""
    reward = run.config.reward
    found = input_fingerprints(run.task, splits) | models.fingerprints(run.config)
    found |= {"the gold labels": digest(sorted(splits.gold.items()))} if reward == "gold" else {}
    return found | ({"the reward function": digest(models.judges.by_part["label"].source)} if ":" in reward else {})


def default_steps(config, task, splits):
    """--steps where nobody gave it: one pass over the prompts."""
    if task.name == "demo":
        return 120
    prompts = len(splits.prompts(config.prompts))
    if prompts < 2 * config.rollout_prompts and config.steps is None:
        say(f"warning: {prompts} prompts make one step of --rollout_prompts {config.rollout_prompts}; give --steps")
    return max(1, prompts // config.rollout_prompts)


def kl_controller(config):
    """What sets the KL coefficient of each step."""
    if config.kl_control == "adaptive":
        return AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    return FixedKL(config.kl_coef)


@command
def main(argv=None):
    run = Run.open("ppo", Config, argv, __doc__)
    config, task = run.config, run.task
    splits = load_splits(config, task, say, run.start_record, run.resumed)
    run.settle(steps=config.steps or default_steps(config, task, splits))
    models = load_models(run)
    prompts, dev, gold = load_prompts(run, splits, models)
    run.start(fingerprints(run, splits, models), models.encoder.clock, splits.digests())

    policy, encoder, kl = models.policy, models.encoder, kl_controller(config)
    stream = PromptStream(prompts, config.rollout_prompts, config.seed, config.answers_per_prompt)
    sampling, clock = torch.Generator().manual_seed(config.seed), Clock()
    # step: rollouts done; best: the best policy's step, rank, scores; before: the start's dev scores; stopped: by guard
    loop, guard = SimpleNamespace(step=0, best=None, before=None, promise=None, skipped=0, stopped=False), Guard()
    run.track(config.steps, loop, guard=guard, kl=kl, sampling=sampling, **stream.parts(), **models.parts())
    keeper = Keeper(run, models, dev, loop, guard=guard, kl=kl, splits=splits)
    trail = AuditTrail(run, models, loop.step)
    with run:
        keeper.start()
        steps = range(loop.step + 1, config.steps + 1)
        for step in progress(steps, desc="ppo", initial=loop.step, total=config.steps):
            if loop.stopped:  # by the guard
                break
            batch = None
            with run.step(step, lambda: keeper.rescue(batch)):
                examples = stream.next()

                # 1 act: the policy answers ----------------------------------------------------------------------------
                with clock("rollout"):
                    rollout = generate(
                        policy, encoder.prompts(task, examples),
                        eos_token_id=encoder.stop_ids, pad_token_id=encoder.pad_id,
                        max_new_tokens=config.max_new_tokens, temperature=config.temperature, generator=sampling,
                        answers_per_prompt=config.answers_per_prompt,
                    )  # fmt: skip
                examples = stream.of_answers(examples)  # B of them, as everything from here on

                # 2 analyse: log-probabilities under policy and reference, and values, in the rows that act 6 trains on
                with clock("score"):
                    plan = stream.minibatch_plan(config.ppo_epochs, config.minibatches)
                    batch = analyse(models, rollout, plan, config, [example.name for example in examples])
                    check_sampler_gap(batch, config.precision)
                mask = batch.response_mask  # [B, R], as is everything per token below

                # 3 judge: one score per answer ------------------------------------------------------------------------
                with clock("score"):
                    samples = read_samples(rollout, examples, task, encoder, gold)
                    judged = models.judges(samples)
                    label_scores, rationale_scores = judged.label_scores, judged.rationale_scores  # [B] each, or None
                    # The label-sensitive reward enters here, in this one line:
                    scores = label_sensitive_reward(label_scores, rationale_scores, judged.threshold, judged.mode)
                    incomplete = rollout.truncated, samples.unlabelled  # [B] each: without an end, without a label
                    batch.scores = incomplete_answer_rule(scores, *incomplete, *judged.penalties, judged.cap)
                    judged.require_finite(batch.names)

                # 4 shape: per-token rewards ---------------------------------------------------------------------------
                relative = relative_scores(batch.scores, config.answers_per_prompt)
                logprobs = batch.logprobs, batch.ref_logprobs
                batch.rewards = shape_rewards(relative, *logprobs, mask, kl.value, config.kl_kind)

                # 5 credit: advantages, whitened over the rollout, and value targets -----------------------------------
                advantages, batch.returns = gae(batch.rewards, batch.values, mask, config.gamma, config.lam)
                batch.advantages = masked_whiten(advantages, mask)

                # 6 improve: clipped policy and value losses, minibatch by minibatch -----------------------------------
                line = step_metrics(step, batch, samples, models.judges, judged, kl.value)
                line |= grounded_metrics(task, examples, samples)
                if kl_within_bound(batch, config, loop):
                    with clock("update"):
                        line |= improve(models, batch, plan, config)
                trail.write(step, batch, samples, judged, plan=plan, advantages=advantages, metrics=line)
            kl.update(line["analyse/kl_sequence"].item(), len(examples))
            if step % config.eval_every == 0 and step < config.steps:
                with clock("eval"):
                    line |= keeper.evaluate(step)
            tell_step(run, step, line, clock.take())
            show_rollout(run, step, samples, judged, batch.scores)
            loop.step = step
            run.checkpoint(step, last=step == config.steps, must=loop.stopped)
        keeper.finish()


if __name__ == "__main__":
    main()
