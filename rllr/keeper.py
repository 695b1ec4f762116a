"""What a PPO run keeps: looks at dev every --eval_every steps, the guard's verdict, the policy that is handed back.

start      the first look; `best` is the policy that PPO starts from
evaluate   a look: `best` is replaced where the policy beats the start, and the guard judges (`rllr.guard`)
finish     the last look; `last` is saved, and one sentence says what is handed back
"""

import math

from .answers import Answer, write_answers
from .common.errors import InputError, RunError
from .common.log import say
from .data.met_rows import hashes_of, joined_hashes, recorded_hashes
from .data.split_report import FEW_ROWS
from .evaluate import show_samples
from .grounding import grounded
from .guard import REMEDIES, beats, grounded_sentence, hacking_sentence, leaning_sentence, paired
from .judge import read_samples
from .metrics import CORRELATIONS, answer_metrics, metric_line, rank, row_values, tell_parse_failures
from .model.records import BEST, save_policy
from .ppo_models import is_rule, recorded_preview
from .preview import sentence
from .report.looks import write_look
from .report.ppo_step import write_batch
from .report.reward_report import preview_report
from .rewards import incomplete_answer_rule, label_sensitive_reward
from .run.run import require_finite_weights

KL_RAISE = 2.0  # by which --on_hacking kl multiplies beta


class Keeper:
    """Evaluates the policy on dev; keeps the one to hand back in <run>/best, and the last, or a failed one, in
    <run>/last.

    loop: the place in the loop (`train_ppo.main`), with the rank and the step of the best policy, and whether the guard
    has stopped the run. guard: what it remembers. kl: the controller whose beta --on_hacking kl raises.
    """

    def __init__(self, run, models, dev, loop, *, guard, kl, splits):
        self.run, self.models, self.dev, self.loop, self.guard, self.kl = run, models, dev, loop, guard, kl
        self.looks = math.ceil(run.config.steps / run.config.eval_every)  # at dev, the start's apart
        self.scores: dict = {}  # of the last look
        self.judges = models.judges.with_stored_scale()
        met = {"prompts": splits.prompts(run.config.prompts), "eval": splits.eval, "test": splits.test}
        met = {name: hashes_of(rows) for name, rows in met.items()} | splits.known
        self.known_texts = joined_hashes(recorded_hashes(run.config.policy), met)  # of all that this policy has met

    def start(self):
        """Look at the policy before its first step; a resumed run has done so, and may have been stopped by the
        guard."""
        if self.loop.before is not None:
            self.go_on()
            return
        if len(self.dev) < FEW_ROWS:
            say(f"warning: {len(self.dev)} dev rows: below {FEW_ROWS} the guard misses most falls of 5 points")
        scores, look = self.look(0)
        self.loop.promise = self.promise()
        self.guard.start = look
        self.keep_best(0, scores, look)
        self.loop.before = {f"eval/{name}": value for name, value in scores.items()}
        self.run.metrics.write({"step": 0, **self.loop.before})

    def promise(self):
        """What the preview says of this start, in one sentence: the label reward model's own record, or, where that is
        of another policy, a preview made anew beside the greedy answers of the last look. None without a preview."""
        judge, config = self.models.judges.scorers.get("label"), self.run.config
        if judge is None:
            return None
        if judge.statistics is None or judge.statistics.policy_fingerprint == self.models.fingerprint:
            return recorded_preview(config.label_rm)
        answered = self.dev, self.answers
        return sentence(preview_report(judge.model, self.models, self.run.task, answered, judge.statistics, config))

    def go_on(self):
        """A run that the guard has stopped goes on only where another --on_hacking is given."""
        if not self.loop.stopped:
            return
        asked, where = self.run.config.on_hacking, f"the guard stopped this run at step {self.loop.step}"
        if asked == "stop":
            say(f"{where}: it ends there again; --on_hacking kl or ignore goes on")
        else:
            self.loop.stopped = False
            say(f"{where}: it goes on (--on_hacking {asked}){self.raise_beta()}")

    def evaluate(self, step):
        """The dev scores {"eval/...": value} of greedy answers; keeps the policy where it is the best, and does what
        --on_hacking says where the guard finds reward hacking."""
        scores, look = self.look(step)
        self.keep_best(step, scores, look)
        before = self.guard.last
        if self.guard.sees_hacking(step, look, self.looks):
            found = hacking_sentence(self.guard.start, before, look, self.name_of_rows)
            say(f"step {step}: {found}{self.react(step)}; what helps is {REMEDIES}")
        if self.guard.sees_less_grounded(look):
            paid = is_rule(self.run.config, "rationale")
            say(f"step {step}: {grounded_sentence(self.guard.start, look, paid)}")
        return {f"eval/{name}": value for name, value in scores.items()}

    def react(self, step):
        """Do what --on_hacking says; the end of the sentence that tells of it."""
        config = self.run.config
        if step == config.steps:
            return ""
        self.loop.stopped = config.on_hacking == "stop"
        if self.loop.stopped:
            return "; the run stops here (--on_hacking stop)"
        return f"; the run goes on (--on_hacking {config.on_hacking}){self.raise_beta()}"

    def raise_beta(self):
        """Multiply beta with --on_hacking kl; says so."""
        if self.run.config.on_hacking != "kl":
            return ""
        self.kl.value *= KL_RAISE
        return f" with beta {self.kl.value:g}"

    def look(self, step):
        """(dev scores, look) of the policy's greedy answers; `rllr.guard` says what a look is."""
        run, models, task = self.run, self.models, self.run.task
        prompts = models.encoder.prompts(task, self.dev)
        rollout = write_answers(models.policy, models.encoder, prompts, **run.config.answer_limits)
        samples = read_samples(rollout, self.dev, task, models.encoder, {row.id: row.label for row in self.dev})
        self.answers = [
            Answer(*given) for given in zip(samples.answers, samples.labels, samples.truncated.tolist(), strict=True)
        ]
        right = row_values(task, self.dev, self.answers)
        paid, parts = (right, {}) if run.config.reward == "gold" else self.judge(samples, step)
        words = [grounded(task, row, answer.text) for row, answer in zip(self.dev, self.answers)]
        scores = answer_metrics(task, self.dev, self.answers) | {"score": sum(paid) / len(paid)}
        self.scores = scores
        by_part = {f"{part}_score": parts.get(part) for part in ("label", "rationale")}
        write_look(run.directory, step, samples, right=right, score=paid, **by_part, grounded=words)
        say(f"step {step}/{run.config.steps}  dev {metric_line(scores)}")
        tell_parse_failures(scores["parse_failures"], say)
        return scores, {"right": right, "scores": paid, "grounded": words}

    def judge(self, samples, step):
        """(what PPO pays for the answers, KL apart, on a scale that stays the same throughout the run: [N] floats; the
        same of each judge by itself, by part)."""
        try:
            judged = self.judges(samples)
            judged.require_finite([row.name for row in self.dev])
        except (InputError, RunError) as error:  # of a reward function of the user's own
            raise RunError(f"dev at step {step}: {error}") from None
        scores = label_sensitive_reward(judged.label_scores, judged.rationale_scores, judged.threshold, judged.mode)
        no_end, no_label = judged.penalties
        scores = incomplete_answer_rule(scores, samples.truncated, samples.unlabelled, no_end, no_label, judged.cap)
        return scores.tolist(), {part: own.tolist() for part, own in judged.scores.items()}

    def keep_best(self, step, scores, look):
        """Save the policy in <run>/best where it is the best so far: it beats the start, row by row, by more than one
        paired standard error (`guard.beats`), and ranks at least as high as the best before it (`metrics.rank`).

        The error is that of `metrics.row_values`: of accuracy, where accuracy or F1 is the task's metric; for
        correlations of the answers' closeness to the gold label. With --best_by score the rows' scores are compared,
        and their mean ranks.
        """
        by_score = self.run.config.best_by == "score"
        compared = "scores" if by_score else "right"
        loop, ranked = self.loop, [scores["score"]] if by_score else list(rank(self.run.task, scores))
        if step == 0:
            loop.best = {"step": 0, "rank": ranked}
            self.save(BEST, step, scores, handed_back=self.handed_back(), promise=loop.promise)
        elif ranked >= loop.best["rank"] and beats(look[compared], self.guard.start[compared]):
            difference, error = paired(look[compared], self.guard.start[compared])
            against = {"difference": difference, "standard_error": error, "start": self.before(), "rows": len(self.dev)}
            loop.best = {"step": step, "rank": ranked, "scores": scores, **against}
            told = {"handed_back": self.handed_back(), "promise": loop.promise}
            self.save(BEST, step, scores, against_start=against, **told)

    def finish(self):
        """Look at the policy after its last step and save it; say what it was before, and what is handed back."""
        run, step = self.run, self.loop.step
        if not self.loop.stopped:
            run.metrics.write({"step": step, **self.evaluate(step)})
        elif not self.scores:  # the guard stopped this run, and it is resumed
            self.look(step)
        self.save("last", step, self.scores, hacking=self.guard.hacked)
        self.models.check_frozen()
        show_samples(run.task, self.dev, self.answers, 2)
        say(f"before  dev {metric_line(self.before())}\nafter   dev {metric_line(self.scores)}")
        say(f"saved {run.directory}/last and {run.directory}/{BEST}\n{self.handed_back()}")
        leaning = leaning_sentence(self.before(), self.loop.best.get("scores", self.before()))
        if leaning:
            say(leaning)

    def handed_back(self):
        """Which policy is in <run>/best, and why, in one sentence."""
        best, metric = self.loop.best, self.run.task.metric
        by_score = self.run.config.best_by == "score"
        if best["step"] == 0:
            whose = "no step's score" if by_score else "no step"
            return f"{whose} beats the start by more than one standard error: best is the policy that PPO started from"
        if by_score:
            now, start = best["scores"]["score"], best["start"]["score"]
            gain = f"{best['difference']:+.3g}, standard error {best['standard_error']:.2g}"
            return f"best: step {best['step']}, dev score {now:.3g} against {start:.3g} at the start ({gain})"
        now, start = (metric_line({metric: scores[metric]}) for scores in (best["scores"], best["start"]))
        gain = f"{100 * best['difference']:+.1f} points, standard error {100 * best['standard_error']:.1f}"
        gain = gain if metric == "accuracy" else f"{self.name_of_rows} {gain}"
        return f"best: step {best['step']}, dev {now} against {start.removeprefix(f'{metric} ')} at the start ({gain})"

    def before(self):
        """The dev scores of the start."""
        return {name.removeprefix("eval/"): value for name, value in self.loop.before.items()}

    @property
    def name_of_rows(self):
        """What `metrics.row_values` is the mean of."""
        return "closeness to the gold label" if self.run.task.metric in CORRELATIONS else "accuracy"

    def save(self, name, step, scores=None, **more):
        """The policy as it stands now; says where."""
        directory = self.run.directory / name
        more |= {"eval": scores} if scores else {}
        record = self.run.model_record(directory, step=step, **self.models.base_record, **more)
        save_policy(self.models.policy, self.models.encoder, directory, record, rows=self.known_texts)
        return f"The policy as it stood then is in {directory}."

    def rescue(self, batch):
        """What a failed step leaves beside a checkpoint: the policy, if it is sound, and the step's own tensors."""
        require_finite_weights(self.models.policy, "the policy")
        saved = self.save("last", self.loop.step)
        return f"{saved} {write_batch(self.run.directory / 'failed_batch.safetensors', batch)}" if batch else saved
