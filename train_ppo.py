"""Stage 3: proximal policy optimisation against the label-sensitive reward, by hand.

    python train_ppo.py                                   # RLLR on the demo data, from the two former stages' output
    python train_ppo.py --reward mixed                    # RLLR-mixed: min(label, threshold) + rationale
    python train_ppo.py --reward gold                     # upper bound: rewards the gold label itself

Every step has six acts: 1 act, 2 analyse, 3 judge, 4 shape, 5 credit, 6 improve. The README and the metrics use the same
words. Writes runs/<task>/ppo-<reward>/last and /best (by the dev metric), metrics.jsonl and samples.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from rllr.config import check_choice, check_divisible, check_positive, check_range, parse_config
from rllr.encoding import Encoder
from rllr.errors import InputError, RunError, command
from rllr.evaluate import answer_rows, metric_line, score_answers, show_samples
from rllr.judge import ScoreStatistics, gold_reward, load_function, load_scorer
from rllr.model import ValueModel, backbone_of, fingerprint, load_policy, load_tokenizer
from rllr.ppo import AdaptiveKL, FixedKL, explained_variance, gae, kl_estimate, masked_mean, masked_whiten
from rllr.rewards import label_sensitive_reward, missing_eos_rule, shape_rewards
from rllr.rollout import generate
from rllr.splits import DataConfig, gold_labels, inherit, load_splits
from rllr.training import (
    RECORD, Clock, MetricsLog, check_same_task, make_optimizer, make_record, open_run_directory, read_record,
    resolve_task, save_policy, say, set_up, show_config,
)  # fmt: skip
from rllr.update import PromptStream, analyse, improve, samples_of, write_batch


@dataclass
class Config(DataConfig):
    policy: str | None = None  # the SFT policy: start and reference (runs/<task>/sft)
    reward: str = "label"  # label, rationale, mixed, gold, or module:function
    label_rm: str | None = None  # label-sensitive reward model (runs/<task>/rm-label)
    rationale_rm: str | None = None  # rationale-sensitive reward model (runs/<task>/rm-rationale)
    threshold: str | None = None  # mixed: cap of the label reward, a number (1.0) or a quantile of it (q0.9)
    score_norm: str = "stored"  # stored statistics, running ones, or none (raw scores, as in the paper)
    score_clip: float = 5.0  # bound of a standardised score
    missing_eos_penalty: float = 1.0  # taken off an answer that the length limit cut
    output_dir: str | None = None  # where the run goes (runs/<task>/ppo-<reward>)
    overwrite: bool = False  # replace a run that is already there
    steps: int | None = None  # rollouts (demo 120; else one pass over the prompts)
    rollout_prompts: int = 64  # prompts per rollout, one answer each
    ppo_epochs: int = 1  # passes over a rollout
    minibatches: int = 2  # optimiser steps per pass
    micro_batch_size: int = 0  # answers per forward; 0: the whole minibatch. Does not change the gradient
    learning_rate: float | None = None  # of the policy (tiny 2e-4, any other model 1e-6), linear decay to 0
    value_learning_rate: float | None = None  # of the value model (tiny 5e-4, any other model 5e-6), linear decay
    value_init: str | None = None  # directory the value model starts from (the reward model; SFT backbone, zero head)
    kl_coef: float = 0.1  # beta: weight of the per-token KL to the SFT policy in the reward
    kl_kind: str = "k1"  # estimator of that KL: k1 or k3
    kl_control: str = "fixed"  # fixed, or adaptive
    kl_target: float = 6.0  # adaptive: nats per sequence; too loose for short answers (healthy tiny runs end near 1)
    kl_horizon: float = 10_000  # adaptive: sequences
    max_update_kl: float | None = None  # skip the rest of a rollout's minibatches once new against old policy exceeds it
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of GAE
    clip: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the value's change, in units of the reward
    max_grad_norm: float = 1.0  # clipping, policy and value each
    freeze_embeddings: bool | None = None  # of the policy (tiny yes, any other model no)
    temperature: float = 1.0  # of sampling and of every log-probability
    max_new_tokens: int = 48  # of an answer (256 in the paper)
    eval_every: int = 20  # steps between evaluations on dev
    eval_rows: int = 0  # dev rows per evaluation on the way; 0: all
    eval_batch_size: int = 256  # prompts decoded together
    show_every: int = 20  # steps between printed samples
    precision: str = "fp32"  # fp32, or bf16 for autocast (GPU)
    seed: int = 0  # prompt order, sampling and minibatches: a stream of its own each

    def validate(self):
        check_positive(self, "rollout_prompts", "ppo_epochs", "minibatches", "learning_rate", "value_learning_rate", "steps",
                       "score_clip", "kl_target", "kl_horizon", "max_update_kl", "max_grad_norm", "temperature", "clip",
                       "value_clip", "max_new_tokens", "eval_every", "eval_batch_size", "show_every")  # fmt: skip
        check_positive(self, "kl_coef", "missing_eos_penalty", "micro_batch_size", "eval_rows", zero=True)
        check_range(self, "gamma", 0, 1)
        check_range(self, "lam", 0, 1)
        check_choice(self, "score_norm", ("stored", "running", "none"))
        check_choice(self, "kl_kind", ("k1", "k3"))
        check_choice(self, "kl_control", ("fixed", "adaptive"))
        check_choice(self, "precision", ("fp32", "bf16"))
        check_divisible(self, "rollout_prompts", "minibatches")
        if self.reward not in ("label", "rationale", "mixed", "gold") and ":" not in self.reward:
            raise InputError(f"--reward {self.reward!r}: choose label, rationale, mixed, gold, or give module:function")
        if self.threshold is not None and self.reward != "mixed":
            raise InputError("--threshold caps the label reward in --reward mixed; it means nothing otherwise")
        if self.reward != "mixed" and self.rationale_rm and self.reward != "rationale":
            raise InputError(f"--rationale_rm is not used by --reward {self.reward}; did you mean --reward mixed?")
        self.threshold = self.threshold or "1.0"
        try:
            number = float(self.threshold.removeprefix("q"))
            assert not self.threshold.startswith("q") or 0 <= number <= 1
        except (ValueError, AssertionError):
            raise InputError(f"--threshold {self.threshold!r}: give a number, or a quantile like q0.9") from None


def load_judges(config, tokenizer, device, autocast):
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
            directory = getattr(config, f"{part}_rm") or f"runs/{config.task}/rm-{part}"
            if config.reward == "mixed" and not Path(directory).is_dir():
                raise InputError(f"--reward mixed needs a {part} reward model: --{part}_rm {directory} is not there")
            judges[part] = load_scorer(
                directory, tokenizer, config.score_norm, config.score_clip, config.eval_batch_size, device, autocast, f"--{part}_rm"
            )
            setattr(config, f"{part}_rm", str(directory))
    return config.reward, judges


def load_value_model(config, device):
    """The value model: from the reward model, in the units of the reward; else --value_init; else SFT with a zero head."""
    own_reward = config.reward == "gold" or ":" in config.reward
    source = config.value_init or (None if own_reward else config.rationale_rm if config.reward == "rationale" else config.label_rm)
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
        raise InputError("--score_norm none still needs score_statistics.json for the missing-EOS rule; run train_rm.py again")
    means = {name: judge.statistics.mean for name, judge in judges.items()}
    if mode == "mixed":
        means["label"] = min(means["label"], threshold)
    return sum(means.values()), sum(s.std**2 for s in statistics) ** 0.5


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    config.validate()
    config.policy = config.policy or f"runs/{config.task or 'demo'}/sft"
    if not Path(config.policy).is_dir() and config.policy.count("/") != 1:
        raise InputError(f"--policy {config.policy}: no such directory; train_sft.py makes one")
    record = read_record(config.policy)
    task = resolve_task(config, record)
    for contradiction in inherit(config, record):
        say(f"warning: {contradiction}")
    check_same_task(record, task, f"--policy {config.policy}")
    config.task, tiny = config.task or task.name, record.get("tiny", False)
    config.learning_rate = config.learning_rate or (2e-4 if tiny else 1e-6)
    config.value_learning_rate = config.value_learning_rate or (5e-4 if tiny else 5e-6)
    config.freeze_embeddings = tiny if config.freeze_embeddings is None else config.freeze_embeddings
    device, autocast = set_up(config.precision, config.seed)

    # Models: four separate copies. The policy starts where the reference stays.
    policy, tokenizer = load_policy(config.policy, device=device), load_tokenizer(config.policy)
    reference = load_policy(config.policy, device=device).requires_grad_(False)
    encoder, policy_fingerprint = Encoder(tokenizer, policy), fingerprint(policy)
    mode, judges = load_judges(config, tokenizer, device, autocast)
    for name, judge in judges.items():
        stored = getattr(judge, "statistics", None)
        if stored and stored.policy_fingerprint != policy_fingerprint:
            say(f"warning: the {name} reward model was measured on answers of another policy than {config.policy}")
        directory_record = read_record(getattr(config, f"{name}_rm") or ".")
        if stored:
            check_same_task(directory_record, task, f"--{name}_rm")
    value_model = load_value_model(config, device)
    if config.freeze_embeddings:
        backbone_of(policy).get_input_embeddings().requires_grad_(False)

    # Data: prompts, never their labels, except for `gold`.
    splits = load_splits(config, task, say)
    prompts = splits.unlabelled or splits.labelled
    say(f"prompts: {len(prompts)} " + ("unlabelled rows" if splits.unlabelled else "labelled rows, the same that trained SFT and reward model"))
    prompts = encoder.fit(prompts, task, config.max_new_tokens, say)
    evaluation = encoder.fit(splits.eval, task, config.max_new_tokens, say)
    gold = gold_labels(config, task) if config.reward == "gold" else {e.id: e.label for e in prompts if e.label}
    config.steps = config.steps or (120 if task.name == "demo" else max(1, len(prompts) // config.rollout_prompts))
    directory = open_run_directory(
        config.output_dir or f"runs/{task.name}/ppo-{config.reward.replace(':', '.').replace('/', '.')}", config.overwrite
    )
    show_config(config, "train_ppo")

    stream = PromptStream(prompts, config.rollout_prompts, config.seed)
    sampling = torch.Generator(device).manual_seed(config.seed)
    updates = config.steps * config.ppo_epochs * config.minibatches
    policy_optimizer = make_optimizer(policy, config.learning_rate, updates)
    value_optimizer = make_optimizer(value_model, config.value_learning_rate, updates)
    kl = FixedKL(config.kl_coef)
    if config.kl_control == "adaptive":
        kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    metrics, clock, best = MetricsLog(directory), Clock(), None

    def save(name, **more):
        save_policy(policy, encoder, directory / name, make_record("ppo", task, config, tiny=tiny, **more))
        return f"The last good policy is in {directory / name}."

    def evaluate(step, rows):
        nonlocal best
        answers = answer_rows(policy, encoder, task, rows, config.max_new_tokens, config.eval_batch_size, autocast)
        scores = score_answers(task, rows, answers)
        say(f"step {step}/{config.steps}  dev {metric_line(scores)}")
        if len(rows) == len(evaluation) or config.eval_rows:
            if best is None or scores[task.metric] > best:
                best = scores[task.metric]
                save("best", step=step, eval=scores)
        return scores, answers

    eval_subset = evaluation[: config.eval_rows or None]
    scores_before, _ = evaluate(0, eval_subset)
    metrics.write({"step": 0, **{f"eval/{name}": value for name, value in scores_before.items()}})

    for step in tqdm(range(1, config.steps + 1), desc="ppo", mininterval=2, disable=None):
        examples = stream.next()

        # 1 act: the policy answers ------------------------------------------------------------------------------------
        with clock("rollout"), autocast():
            rollout = generate(
                policy, [encoder.prompt_ids(task.render_prompt(e.text, e.text_b)) for e in examples],
                max_new_tokens=config.max_new_tokens, eos_token_id=encoder.stop_ids, pad_token_id=encoder.pad_id,
                temperature=config.temperature, generator=sampling,
            )  # fmt: skip

        # 2 analyse: log-probabilities under policy and reference, values; in the first minibatch's rows and shapes -----
        with clock("score"):
            plan = stream.minibatch_plan(config.ppo_epochs, config.minibatches)
            batch = analyse(policy, reference, value_model, rollout, plan, config, autocast)

        # 3 judge: one score per answer --------------------------------------------------------------------------------
        with clock("score"):
            samples = samples_of(rollout, examples, task, encoder, gold)
            judged = {name: reward_fn(samples) for name, reward_fn in judges.items()}  # [B] each
            threshold = judges["label"].threshold(config.threshold) if mode == "mixed" else None
            # The label-sensitive reward enters here, in this one line:
            scores = label_sensitive_reward(judged.get("label"), judged.get("rationale"), threshold, mode)  # [B]
            cap, unit = eos_cap(config, judges, mode, threshold)
            scores = missing_eos_rule(scores, rollout.truncated, config.missing_eos_penalty * unit, cap)

        # 4 shape: per-token rewards -----------------------------------------------------------------------------------
        rewards = shape_rewards(scores, batch.logprobs, batch.ref_logprobs, batch.mask, kl.value, config.kl_kind)  # [B, R]

        # 5 credit: advantages, whitened over the rollout, and value targets -------------------------------------------
        raw_advantages, batch.returns = gae(rewards, batch.values, batch.mask, config.gamma, config.lam)
        batch.advantages = masked_whiten(raw_advantages, batch.mask)

        # 6 improve: clipped policy and value losses, minibatch by minibatch --------------------------------------------
        with clock("update"):
            try:
                stats = improve(policy, value_model, policy_optimizer, value_optimizer, batch, plan, config, autocast)
            except RunError as error:
                write_batch(directory / "failed_batch.safetensors", rollout, batch, scores)
                raise RunError(f"step {step}: {error} {save('last', step=step - 1)} The batch is in {directory}.") from None
        sequence_kl = kl_estimate(batch.logprobs, batch.ref_logprobs).masked_fill(~batch.mask, 0.0).sum(1)
        line = {
            "step": step, "episodes": step * config.rollout_prompts,
            "act/response_len": rollout.response_lens.float().mean(), "act/truncated": rollout.truncated.float().mean(),
            "act/parse_failures": sum(label is None for label in samples.labels) / len(samples.labels),
            "analyse/kl_sequence": sequence_kl.mean(), "analyse/entropy": masked_mean(batch.entropy, batch.mask),
            "analyse/kl_token": masked_mean(kl_estimate(batch.logprobs, batch.ref_logprobs), batch.mask),
            "analyse/logprob_gap": masked_mean((batch.logprobs - rollout.rollout_logprobs).abs(), batch.mask),
            **judge_metrics(judges, judged, samples, scores, threshold, gold),
            "shape/kl_coef": kl.value, "shape/reward": rewards.sum(1).mean(),
            "credit/advantage_std": masked_mean(
                (raw_advantages - masked_mean(raw_advantages, batch.mask)).square(), batch.mask).sqrt(),
            "credit/explained_variance": explained_variance(batch.values, batch.returns, batch.mask),
            **{f"improve/{name}": value for name, value in stats.items()},
        }  # fmt: skip
        kl.update(sequence_kl.mean().item(), len(examples))
        if step % config.eval_every == 0 and step < config.steps:
            with clock("eval"):
                line |= {f"eval/{name}": value for name, value in evaluate(step, eval_subset)[0].items()}
        times = clock.take()
        line["act/tokens_per_second"] = rollout.response_lens.sum() / max(times["time/rollout"], 1e-9)
        metrics.write(line | times, step_line(step, config, line))
        if step % config.show_every == 0:
            show_rollout(samples, judged, scores)

    scores_after, answers = evaluate(config.steps, evaluation)
    save("last", step=config.steps, eval=scores_after)
    metrics.write({"step": config.steps, **{f"eval/{name}": value for name, value in scores_after.items()}})
    if fingerprint(reference) != policy_fingerprint:
        raise RunError("the reference policy changed during training; this is a bug, do not trust the run")
    show_samples(task, evaluation, answers, 2)
    say(f"before  dev {metric_line(scores_before)}\nafter   dev {metric_line(scores_after)}\nsaved {directory}/last and {directory}/best")


def judge_metrics(judges, judged, samples, scores, threshold, gold):
    """Act 3 in numbers; accuracy only where PPO may know gold labels. Parse failures' mean score beside the others'."""
    found = {f"judge/{name}_score": values.mean() for name, values in judged.items()}
    found |= {
        f"judge/{name}_clipped": judge.clipped_share for name, judge in judges.items() if hasattr(judge, "clipped_share")
    }
    failed = torch.tensor([label is None for label in samples.labels], device=scores.device)
    found |= {"judge/score": scores.mean()}
    if failed.any() and not failed.all():
        found |= {"judge/score_parse_failures": scores[failed].mean(), "judge/score_parsed": scores[~failed].mean()}
    if threshold is not None:
        found["judge/at_threshold"] = (judged["label"] >= threshold).float().mean()
    if gold and all(label is not None for label in samples.gold_labels):
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
        say(f"  label   {samples.labels[i] or 'parse failure'} (gold: {samples.gold_labels[i] or 'not known here'})  {parts}  score {scores[i].item():+.2f}\n")


if __name__ == "__main__":
    main()
