"""Stage 3: proximal policy optimisation against the label-sensitive reward, by hand.

    python train_ppo.py                                   # RLLR on the demo data, from the two former stages' output
    python train_ppo.py --reward mixed                    # RLLR-mixed: min(label, threshold) + rationale
    python train_ppo.py --reward gold                     # upper bound: rewards the gold label itself

Every step has six acts: 1 act, 2 analyse, 3 judge, 4 shape, 5 credit, 6 improve. The README and the metrics use the same
words. Writes runs/<task>/ppo-<reward>/last and /best (by the dev metric), metrics.jsonl and samples.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tqdm import tqdm

from rllr.answers import answer_rows
from rllr.common.config import check_choice, check_divisible, check_positive, check_range, parse_config
from rllr.common.errors import InputError, RunError, brief, command
from rllr.common.files import check_run_directory
from rllr.common.log import Clock, say, show_config
from rllr.data.encoding import Encoder
from rllr.data.splits import DataConfig, find_policy, gold_labels, load_splits, recorded_hashes, take_over
from rllr.evaluate import show_samples
from rllr.metrics import metric_line, rank, score_answers, tell_parse_failures
from rllr.model.backbone import backbone_of
from rllr.model.loading import allow_remote_code, fingerprint, load_tokenizer
from rllr.model.recompute import checkpoint_layers
from rllr.model.roles import LoRAConfig, check_lora, rate_factor
from rllr.model.trial import check_policy
from rllr.ppo import AdaptiveKL, FixedKL, gae, masked_whiten
from rllr.ppo_models import eos_cap, load_judges, load_policy_and_reference, load_value_model, name_judges
from rllr.reports.ppo_step import show_rollout, step_line, step_metrics, write_batch
from rllr.rewards import incomplete_answer_rule, label_sensitive_reward, shape_rewards
from rllr.rollout import generate
from rllr.run.machine import set_up
from rllr.run.optimizer import make_optimizer, require_finite
from rllr.run.records import make_record, save_policy
from rllr.run.resume import RunConfig, take_up
from rllr.run.run import Run, digest, reads_of, require_finite_weights
from rllr.update import PromptStream, analyse, check_sampler_gap, improve, kl_within_bound, samples_of

MOST_SKIPPED = (
    10  # rollouts in a row whose update --on_ref_kl skip may leave out: the policy does not come back by itself
)


@dataclass
class Config(RunConfig, LoRAConfig, DataConfig):
    policy: str | None = None  # the SFT policy: start and reference (runs/<task>/sft)
    reward: str = "label"  # label, rationale, mixed, gold, or module:function
    label_rm: str | None = None  # label-sensitive reward model (runs/<task>/rm-label)
    rationale_rm: str | None = None  # rationale-sensitive reward model (runs/<task>/rm-rationale)
    threshold: str | None = None  # mixed: cap of the label reward, a number (1.0) or a quantile of it (q0.9)
    score_norm: str = "stored"  # stored statistics, running ones, or none (raw scores, as in the paper)
    score_clip: float = 5.0  # bound of a standardised score
    missing_eos_penalty: float = 1.0  # taken off an answer that the length limit cut, after capping it at the SFT mean
    missing_label_penalty: float = (
        1.0  # the same for an answer without a readable label (not with gold and own functions)
    )
    output_dir: str | None = None  # where the run goes (runs/<task>/ppo-<reward>)
    save_every: int = 20  # rollouts between checkpoints; 0: none but when asked to stop
    steps: int | None = None  # rollouts (demo 120; else one pass over the prompts)
    rollout_prompts: int = 64  # prompts per rollout, one answer each
    ppo_epochs: int = 1  # passes over a rollout
    minibatches: int = 2  # optimiser steps per pass
    micro_batch_size: int = 0  # answers per forward; 0: the whole minibatch. Does not change the gradient
    tokens_per_batch: int = 0  # padded tokens per forward; 0: no limit. Does not change the gradient either
    gradient_checkpointing: bool = False  # compute layers again in backward instead of keeping their activations
    learning_rate: float | None = (
        None  # of the policy (tiny 2e-4, others 1e-6; adapters x 10, tiny ones x 3), linear decay
    )
    value_learning_rate: float | None = (
        None  # of the value model (tiny 5e-4, others 5e-6; adapters x 10, tiny ones x 3)
    )
    warmup: float = (
        0.0  # share of the updates in which the policy's learning rate rises; the value model learns meanwhile
    )
    value_init: str | None = None  # directory the value model starts from (the reward model; SFT backbone, zero head)
    kl_coef: float = 0.1  # beta: weight of the per-token KL to the SFT policy in the reward
    kl_kind: str = "k1"  # estimator of that KL: k1 or k3
    kl_control: str = "fixed"  # fixed, or adaptive
    kl_target: float = 6.0  # adaptive: nats per sequence; too loose for short answers (healthy tiny runs end near 1)
    kl_horizon: float = 10_000  # adaptive: sequences
    max_update_kl: float | None = (
        None  # skip the rest of a rollout's minibatches once new against old policy exceeds it
    )
    max_ref_kl: float | None = (
        100.0  # bound of a rollout's mean KL to the SFT policy, in nats per answer; none: no bound
    )
    on_ref_kl: str = "stop"  # beyond that bound: stop the run, or skip the rollout's update (ten in a row stop it, too)
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of GAE
    clip: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the value's change, in units of the reward
    max_grad_norm: float = 1.0  # clipping, policy and value each
    freeze_embeddings: bool | None = None  # of the policy (tiny yes, any other model no)
    temperature: float = 1.0  # of sampling and of every log-probability
    max_new_tokens: int = 48  # of an answer (256 in the paper)
    eval_every: int = 20  # steps between evaluations on dev
    eval_rows: int = 0  # dev rows per evaluation; 0: all
    eval_batch_size: int = 256  # prompts decoded together
    log_every: int = 5  # steps between printed lines; metrics.jsonl has every step
    show_every: int = 20  # steps between printed samples
    precision: str = "fp32"  # fp32, or bf16 for autocast (GPU)
    seed: int = 0  # prompt order, sampling and minibatches: a stream of its own each

    def validate(self):
        check_positive(self, "rollout_prompts", "ppo_epochs", "minibatches", "learning_rate", "value_learning_rate", "steps",
                       "score_clip", "kl_target", "kl_horizon", "max_update_kl", "max_grad_norm", "temperature", "clip",
                       "value_clip", "max_new_tokens", "eval_every", "eval_batch_size", "log_every", "show_every",
                       "max_ref_kl", "keep_last")  # fmt: skip
        check_positive(self, "kl_coef", "missing_eos_penalty", "missing_label_penalty", "micro_batch_size", "tokens_per_batch", "eval_rows",
                       "save_every", zero=True)  # fmt: skip
        check_range(self, "warmup", 0, 1)
        check_range(self, "gamma", 0, 1)
        check_range(self, "lam", 0, 1)
        check_choice(self, "score_norm", ("stored", "running", "none"))
        check_choice(self, "kl_kind", ("k1", "k3"))
        check_choice(self, "kl_control", ("fixed", "adaptive"))
        check_choice(self, "on_ref_kl", ("stop", "skip"))
        check_choice(self, "precision", ("fp32", "bf16"))
        check_divisible(self, "rollout_prompts", "minibatches")
        check_lora(self)
        if self.reward not in ("label", "rationale", "mixed", "gold") and ":" not in self.reward:
            raise InputError(
                f"--reward {brief(self.reward)}: choose label, rationale, mixed, gold, or give module:function"
            )
        if self.threshold is not None and self.reward != "mixed":
            raise InputError("--threshold caps the label reward in --reward mixed; it means nothing otherwise")
        for part in ("label", "rationale"):
            if getattr(self, f"{part}_rm") and self.reward not in (part, "mixed"):
                raise InputError(
                    f"--{part}_rm is not used by --reward {brief(self.reward)}; did you mean --reward mixed?"
                )
        if self.reward == "mixed":
            self.threshold = self.threshold or "1.0"
            if not is_threshold(self.threshold):
                raise InputError(f"--threshold {brief(self.threshold)}: give a number, or a quantile like q0.9")


def is_threshold(text):
    """Whether a text is a finite number, or q and a number from 0 to 1."""
    try:
        number = float(text.removeprefix("q"))
    except ValueError:
        return False
    return 0 <= number <= 1 if text.startswith("q") else math.isfinite(number)


def default_directory(config):
    """Where the run goes without --output_dir."""
    return f"runs/{find_policy(config)[1].name}/ppo-{config.reward.replace(':', '.').replace('/', '.')}"


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    taken_up = take_up("ppo", config, default_directory)
    config.validate()
    allow_remote_code(config.trust_remote_code)
    record, task, contradictions = take_over(config)
    for contradiction in contradictions:
        say(f"warning: {contradiction}")
    config.task, tiny = config.task or task.name, record.get("tiny", False)
    config.learning_rate = config.learning_rate or (2e-4 if tiny else 1e-6) * rate_factor(config, tiny)
    config.value_learning_rate = config.value_learning_rate or (5e-4 if tiny else 5e-6) * rate_factor(config, tiny)
    config.freeze_embeddings = tiny if config.freeze_embeddings is None else config.freeze_embeddings
    name_judges(config, task)
    directory = config.output_dir or default_directory(config)
    inputs = [
        config.policy,
        config.label_rm,
        config.rationale_rm,
        config.value_init,
        config.task,
        config.train_file,
        config.eval_file,
    ]
    if not taken_up:
        check_run_directory(directory, config.overwrite, inputs)
    device, autocast = set_up(config.precision, config.seed, config.deterministic)

    # Models: four separate copies or, with --lora_rank, four roles on one frozen base. The policy starts where the
    # reference stays.
    policy, reference, frozen, policy_fingerprint = load_policy_and_reference(config, device)
    tokenizer, base = load_tokenizer(config.policy), frozen if config.lora_rank else None
    encoder = Encoder(tokenizer, policy, record.get("clock") or (taken_up and taken_up.recorded.get("clock")))
    # Hashing a large model takes long; only a base that was cast to bf16 differs from the policy that was hashed already.
    frozen_fingerprint = policy_fingerprint if config.base_dtype == "fp32" else fingerprint(frozen)
    mode, judges = load_judges(config, tokenizer, policy_fingerprint, device, autocast, base)
    value_model = load_value_model(config, device, base, policy_fingerprint, judges)
    for model in (policy, value_model) if config.gradient_checkpointing else ():
        checkpoint_layers(backbone_of(model))
    if config.freeze_embeddings:
        backbone_of(policy).get_input_embeddings().requires_grad_(False)

    # Data: prompts, never their labels, except for `gold`.
    splits = load_splits(config, task, say, record, taken_up)
    prompts = splits.unlabelled or splits.labelled
    say(
        f"prompts: {len(prompts)} "
        + ("unlabelled rows" if splits.unlabelled else "labelled rows, the same that trained SFT and reward model")
    )
    prompts = encoder.fit(prompts, task, config.max_new_tokens, say)
    evaluation = encoder.fit(splits.eval[: config.eval_rows or None], task, config.max_new_tokens, say)
    others = [reference, value_model, *(judge.model for judge in judges.values() if hasattr(judge, "model"))]
    check_policy(policy, encoder, task, prompts + evaluation, config.max_new_tokens, config.policy, say, alike=others)
    gold = gold_labels(config, task) if config.reward == "gold" else {e.id: e.label for e in prompts if e.label}
    unknown = [example.name for example in prompts if example.id not in gold]
    if config.reward == "gold" and unknown:
        raise InputError(f"--reward gold needs the label of every prompt; row {unknown[0]} has none")
    config.steps = config.steps or (120 if task.name == "demo" else max(1, len(prompts) // config.rollout_prompts))
    reads = reads_of(task, splits) | {"--policy": policy_fingerprint}
    reads |= {"the gold labels": digest(sorted(gold.items()))} if config.reward == "gold" else {}
    reads |= {f"--{part}_rm": fingerprint(judge.model) for part, judge in judges.items() if hasattr(judge, "model")}
    reads |= {"--value_init": fingerprint(value_model)} if config.value_init else {}
    reads |= {"the reward function": digest(judges["label"].source)} if ":" in config.reward else {}
    run = Run("ppo", config, directory, reads, taken_up, inputs, encoder.clock)
    directory, metrics = run.directory, run.metrics
    show_config(config, "train_ppo")

    stream = PromptStream(prompts, config.rollout_prompts, config.seed)
    sampling = torch.Generator(device).manual_seed(config.seed)
    updates = config.steps * config.ppo_epochs * config.minibatches
    policy_optimizer = make_optimizer(policy, config.learning_rate, updates, warmup_share=config.warmup)
    value_optimizer = make_optimizer(value_model, config.value_learning_rate, updates)
    kl = FixedKL(config.kl_coef)
    if config.kl_control == "adaptive":
        kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    clock = Clock()
    # step: rollouts done; best: how the best policy ranks, and after which step; before: the dev scores of the start
    at = SimpleNamespace(step=0, best=None, best_step=0, before=None, skipped=0)
    run.track(
        config.steps, at, policy=policy, policy_optimizer=policy_optimizer[0], policy_schedule=policy_optimizer[1],
        value_model=value_model, value_optimizer=value_optimizer[0], value_schedule=value_optimizer[1],
        kl=kl, stream=stream, prompt_order=stream.order_rng, minibatch_order=stream.minibatch_rng, sampling=sampling,
        **{f"{name}_judge": judge for name, judge in judges.items() if hasattr(judge, "state_dict")},
    )  # fmt: skip

    def save(name, **more):
        on = {"base": {"path": config.policy, "fingerprint": policy_fingerprint}} if base else {}
        kept = {"tiny": tiny, "clock": encoder.clock, "rows": splits.digests()}
        record = make_record("ppo", task, config, directory / name, **kept, **on, **more)
        save_policy(policy, encoder, directory / name, record, rows=recorded_hashes(config.policy))
        return f"The policy as it stood then is in {directory / name}."

    def evaluate(step):
        answers = answer_rows(
            policy, encoder, task, evaluation, config.max_new_tokens, config.eval_batch_size, autocast
        )
        scores = score_answers(task, evaluation, answers)
        say(f"step {step}/{config.steps}  dev {metric_line(scores)}")
        tell_parse_failures(scores["parse_failures"], say)
        ranked = list(rank(task, scores))
        # Of equals the later one, but nothing that only equals the start takes its place.
        if at.best is None or ranked > at.best or ranked == at.best and at.best_step > 0:
            at.best, at.best_step = ranked, step
            save("best", step=step, eval=scores)
        return scores, answers

    def rescue():
        """What a failed step leaves behind beside a checkpoint: the policy as it stood, if it is sound, and its own tensors."""
        require_finite_weights(policy, "the policy")
        saved = save("last", step=at.step)
        return f"{saved} {write_batch(directory / 'failed_batch.safetensors', rollout, batch)}" if batch else saved

    with run:
        if at.before is None:
            at.before, _ = evaluate(0)
            metrics.write({"step": 0, **{f"eval/{name}": value for name, value in at.before.items()}})

        steps = range(at.step + 1, config.steps + 1)
        for step in tqdm(steps, desc="ppo", initial=at.step, total=config.steps, mininterval=2, disable=None):
            batch = None
            with run.step(step, rescue):
                examples = stream.next()
                ids = [example.name for example in examples]

                # 1 act: the policy answers ----------------------------------------------------------------------------
                with clock("rollout"), autocast():
                    rollout = generate(
                        policy, [encoder.prompt_ids(task.render_prompt(e.text, e.text_b)) for e in examples],
                        max_new_tokens=config.max_new_tokens, eos_token_id=encoder.stop_ids, pad_token_id=encoder.pad_id,
                        temperature=config.temperature, generator=sampling,
                    )  # fmt: skip

                # 2 analyse: log-probabilities under policy and reference, values; in the first minibatch's rows and shapes
                with clock("score"):
                    plan = stream.minibatch_plan(config.ppo_epochs, config.minibatches)
                    batch = analyse(policy, reference, value_model, rollout, plan, config, autocast, ids)
                    check_sampler_gap(batch, rollout, config.precision)

                # 3 judge: one score per answer ------------------------------------------------------------------------
                with clock("score"):
                    samples = samples_of(rollout, examples, task, encoder, gold)
                    judged = {name: reward_fn(samples) for name, reward_fn in judges.items()}  # [B] each
                    threshold = judges["label"].threshold(config.threshold) if mode == "mixed" else None
                    # The label-sensitive reward enters here, in this one line:
                    scores = label_sensitive_reward(
                        judged.get("label"), judged.get("rationale"), threshold, mode
                    )  # [B]
                    cap, unit = eos_cap(config, judges, mode, threshold)
                    unlabelled = torch.tensor([label is None for label in samples.labels], device=device)
                    penalties = config.missing_eos_penalty * unit, config.missing_label_penalty * unit
                    scores = incomplete_answer_rule(scores, rollout.truncated, unlabelled, *penalties, cap)
                    batch.scores = scores
                    for name, scored in judged.items():
                        require_finite(scored, f"the {name} score", ids)

                # 4 shape: per-token rewards ---------------------------------------------------------------------------
                rewards = shape_rewards(
                    scores, batch.logprobs, batch.ref_logprobs, batch.mask, kl.value, config.kl_kind
                )  # [B, R]

                # 5 credit: advantages, whitened over the rollout, and value targets -----------------------------------
                raw_advantages, batch.returns = gae(rewards, batch.values, batch.mask, config.gamma, config.lam)
                batch.advantages = masked_whiten(raw_advantages, batch.mask)

                # 6 improve: clipped policy and value losses, minibatch by minibatch ------------------------------------
                stats, within = {}, kl_within_bound(batch, config)
                at.skipped = 0 if within else at.skipped + 1
                if within:
                    with clock("update"):
                        stats = improve(
                            policy, value_model, policy_optimizer, value_optimizer, batch, plan, config, autocast, ids
                        )
                elif at.skipped == MOST_SKIPPED:
                    raise RunError(f"{at.skipped} rollouts in a row beyond --max_ref_kl {config.max_ref_kl}.")
            line = step_metrics(
                step,
                config,
                rollout,
                batch,
                samples,
                judges,
                judged,
                scores,
                rewards,
                raw_advantages,
                stats,
                threshold,
                kl.value,
            )
            kl.update(line["analyse/kl_sequence"].item(), len(examples))
            if step % config.eval_every == 0 and step < config.steps:
                with clock("eval"):
                    line |= {f"eval/{name}": value for name, value in evaluate(step)[0].items()}
            times = clock.take()
            line["act/tokens_per_second"] = rollout.response_lens.sum() / max(times["time/rollout"], 1e-9)
            if step % config.log_every == 0:
                tell_parse_failures(line["act/parse_failures"], say, "sampled answers")
            metrics.write(line | times, step_line(step, config, line) if step % config.log_every == 0 else None)
            if step % config.show_every == 0:
                show_rollout(samples, judged, scores)
            at.step = step
            run.checkpoint(step, last=step == config.steps)

        scores_after, answers = evaluate(config.steps)
        save("last", step=config.steps, eval=scores_after)
        metrics.write({"step": config.steps, **{f"eval/{name}": value for name, value in scores_after.items()}})
        if fingerprint(frozen) != frozen_fingerprint:
            raise RunError("the reference policy changed during training; this is a bug, do not trust the run")
        show_samples(task, evaluation, answers, 2)
        say(f"before  dev {metric_line(at.before)}\nafter   dev {metric_line(scores_after)}")
        say(f"saved {directory}/last and {directory}/best")


if __name__ == "__main__":
    main()
