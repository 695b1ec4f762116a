"""Breaks the core functions one small edit at a time and demands that a test fails: `python tests/mutate.py [words]`.

Each mutant is a replacement in one function's source. The mutated code is put into the existing function object, so
all importers run it, and the unit tests run in this one process. Exit code 1 if a mutant survives, 2 if the list is
stale (a pattern that no longer occurs exactly once) or the tests fail without any mutation. With words: only mutants
that contain one of them.
"""

import contextlib
import inspect
import io
import os
import sys
import textwrap
import time
from pathlib import Path

os.environ["RLLR_HYPOTHESIS"] = "mutate"
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import pytest  # noqa: E402
from _pytest.runner import runtestprotocol  # noqa: E402

import rllr.best_of  # noqa: E402
import rllr.data.inherited  # noqa: E402
import rllr.data.met_rows  # noqa: E402
import rllr.data.splits  # noqa: E402
import rllr.engine.graphs  # noqa: E402
import rllr.guard  # noqa: E402
import rllr.layout  # noqa: E402
import rllr.logprobs  # noqa: E402
import rllr.model.backbone  # noqa: E402
import rllr.pairs  # noqa: E402
import rllr.ppo  # noqa: E402
import rllr.rewards  # noqa: E402
import rllr.run.rates  # noqa: E402
import rllr.tasks  # noqa: E402

UNITS = "ppo rewards layout logprobs pairs best_of set_aside rates guard"
FILES = [f"test_{name}.py" for name in UNITS.split()]

# (module.function, what stands there, what is put in its place)
MUTANTS = [
    ("ppo._fill", "x.masked_fill(~mask, 0.0)", "x * mask"),
    ("ppo._fill", "~mask", "mask"),
    ("ppo.masked_mean", "total = _fill(x, mask).sum() if", "total = x.sum() if"),
    ("ppo.masked_mean", "else _fill(x, mask).sum(dim)", "else x.sum(dim)"),
    ("ppo.masked_mean", "count = mask.sum() if", "count = torch.tensor(mask.numel()) if"),
    ("ppo.masked_mean", "else mask.sum(dim)", "else mask.sum()"),
    ("ppo.masked_mean", "count.clamp(min=1)", "count"),
    ("ppo.masked_whiten", "count < 2", "count < 1"),
    ("ppo.masked_whiten", "count < 2", "count < 3"),
    ("ppo.masked_whiten", "mean = masked_mean(x, mask)", "mean = x.mean()"),
    ("ppo.masked_whiten", "_fill(x - mean, mask)", "_fill(x, mask) - mean"),
    ("ppo.masked_whiten", "count - 1 if unbiased else count", "count if unbiased else count - 1"),
    ("ppo.masked_whiten", "variance + eps", "variance"),
    ("ppo.masked_whiten", "torch.rsqrt(variance + eps)", "1 / (variance + eps)"),
    ("ppo.masked_whiten", "whitened if shift_mean else", "whitened if not shift_mean else"),
    ("ppo.masked_whiten", "_fill(whitened + mean, mask)", "whitened + mean"),
    ("ppo.masked_whiten", "unbiased=True", "unbiased=False"),
    ("ppo.gae", "rewards, values = _fill(rewards, mask), _fill(values, mask)", "pass"),
    ("ppo.gae", "reversed(range(values.shape[1]))", "range(values.shape[1])"),
    ("ppo.gae", "+ gamma * next_value - values[:, t]", "+ gamma * next_value"),
    ("ppo.gae", "+ gamma * next_value - values[:, t]", "+ next_value - values[:, t]"),
    ("ppo.gae", "+ gamma * next_value - values[:, t]", "- gamma * next_value - values[:, t]"),
    ("ppo.gae", "gamma * lam * next_advantage", "lam * next_advantage"),
    ("ppo.gae", "gamma * lam * next_advantage", "gamma * next_advantage"),
    ("ppo.gae", "torch.where(valid, values[:, t], next_value)", "values[:, t]"),
    ("ppo.gae", "torch.where(valid, advantage, next_advantage)", "advantage"),
    ("ppo.gae", "torch.where(valid, advantage, 0.0)", "advantage"),
    ("ppo.gae", "advantages + values", "advantages + rewards"),
    ("ppo.gae", "if bootstrap is None else bootstrap", "if bootstrap is None else 0 * bootstrap"),
    ("ppo.gae", "lam=0.95", "lam=1.0"),
    ("ppo.policy_loss", "log_ratio = _fill(new_logprobs - logprobs, mask)", "log_ratio = new_logprobs - logprobs"),
    ("ppo.policy_loss", "_fill(new_logprobs - logprobs, mask)", "_fill(logprobs - new_logprobs, mask)"),
    ("ppo.policy_loss", "advantages = _fill(advantages, mask)", "pass"),
    ("ppo.policy_loss", "unclipped = -advantages * ratio", "unclipped = advantages * ratio"),
    ("ppo.policy_loss", "clipped = -advantages * ratio.clamp", "clipped = advantages * ratio.clamp"),
    ("ppo.policy_loss", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 - clip)"),
    ("ppo.policy_loss", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
    ("ppo.policy_loss", "ratio.clamp(1 - clip, 1 + clip)", "log_ratio.clamp(-clip, clip).exp()"),
    ("ppo.policy_loss", "torch.maximum(", "torch.minimum("),
    (
        "ppo.policy_loss",
        "loss = reduce(torch.maximum(unclipped, clipped), mask)",
        "loss = torch.maximum(unclipped, clipped).mean()",
    ),
    ("ppo.policy_loss", "(clipped > unclipped)", "(clipped >= unclipped)"),
    ("ppo.policy_loss", "(clipped > unclipped)", "((ratio - 1).abs() > clip)"),
    ("ppo.policy_loss", "0.5 * log_ratio.square()", "log_ratio.square()"),
    ("ppo.policy_loss", "0.5 * log_ratio.square()", "-log_ratio"),
    ("ppo.policy_loss", "ratio.masked_fill(~mask, 0.0).max()", "ratio.max()"),
    ("ppo.policy_loss", "torch.no_grad()", "torch.enable_grad()"),
    (
        "ppo.value_loss",
        "_fill(new_values, mask), _fill(values, mask), _fill(returns, mask)",
        "new_values, values, returns",
    ),
    ("ppo.value_loss", "values - clip, values + clip)", "returns - clip, returns + clip)"),
    ("ppo.value_loss", "values - clip, values + clip)", "values - clip, values - clip)"),
    ("ppo.value_loss", "0.5 * reduce", "reduce"),
    ("ppo.value_loss", "torch.maximum(", "torch.minimum("),
    ("ppo.value_loss", "(clipped > unclipped)", "(clipped >= unclipped)"),
    ("ppo.kl_estimate", "ref_logprobs - logprobs", "logprobs - ref_logprobs"),
    ("ppo.kl_estimate", "return -x", "return x"),
    ("ppo.kl_estimate", "0.5 * x.square()", "x.square()"),
    ("ppo.kl_estimate", "torch.expm1(x) - x", "torch.expm1(-x) + x"),
    ("ppo.kl_estimate", "torch.expm1(x) - x", "torch.exp(x) - 1 - x"),
    ("ppo.AdaptiveKL.update", "observed / self.target - 1", "1 - observed / self.target"),
    ("ppo.AdaptiveKL.update", "-0.2), 0.2)", "-0.2), 0.5)"),
    ("ppo.AdaptiveKL.update", "-0.2), 0.2)", "-9), 0.2)"),
    ("ppo.AdaptiveKL.update", "error * n / self.horizon", "error / self.horizon"),
    ("ppo.FixedKL.update", "pass", "self.value = observed"),
    ("ppo.explained_variance", "1 - unexplained", "unexplained"),
    ("ppo.explained_variance", "error - masked_mean(error, mask), mask)", "error, mask)"),
    ("ppo.explained_variance", "torch.where(spread > 0, ", "torch.where(spread >= 0, "),
    ("guard.paired", "ddof=1", "ddof=0"),
    ("guard.paired", "~np.isnan(now - start)", "now == now"),
    ("guard.beats", "difference > error", "difference > 0"),
    ("guard.fallen", "- 1  # two", "# two"),
    ("guard.is_reward_hacking", "score > score_error and down", "down"),
    ("guard.is_reward_hacking", "-FLATTERY -", "-"),
    ("guard.is_reward_hacking", ' and beats(start["right"], before["right"])', ""),
    ("guard.is_reward_hacking", ' and not beats(now["right"], before["right"])', ""),
    ("guard.is_less_grounded", "-UNGROUNDED * error", "0"),
    ("guard.Guard.sees_hacking", "not found and ", ""),
    ("guard.Guard.sees_hacking", "looks // 5", "0"),
    ("guard.Guard.sees_less_grounded", "not self.told and ", ""),
    ("rewards.label_sensitive_reward", "clamp(max=threshold)", "clamp(min=threshold)"),
    ("rewards.label_sensitive_reward", "clamp(max=threshold) +", "clamp(max=threshold) -"),
    ("rewards.label_sensitive_reward", "return label_scores\n", "return rationale_scores\n"),
    (
        "rewards.label_sensitive_reward",
        'return _required(rationale_scores, "rationale_scores", mode)\n',
        "return label_scores\n",
    ),
    ("rewards._required", "value is None", "not value"),
    ("rewards._required", "value is None", "False"),
    ("rewards.incomplete_answer_rule", "capped - penalty", "capped + penalty"),
    ("rewards.incomplete_answer_rule", "clamp(max=cap)", "clamp(min=cap)"),
    ("rewards.incomplete_answer_rule", "capped - penalty, scores", "capped - penalty, capped"),
    ("rewards.incomplete_answer_rule", "(truncated | unlabelled", "(truncated & unlabelled"),
    ("rewards.incomplete_answer_rule", "(truncated | unlabelled", "(truncated"),
    ("rewards.incomplete_answer_rule", "(truncated | unlabelled", "(unlabelled"),
    ("rewards.incomplete_answer_rule", "torch.maximum(", "torch.add("),
    ("rewards.incomplete_answer_rule", "torch.maximum(", "torch.minimum("),
    ("rewards.incomplete_answer_rule", "unlabelled * missing_label_penalty", "unlabelled * missing_eos_penalty"),
    ("rewards.incomplete_answer_rule", "truncated * missing_eos_penalty", "truncated * missing_label_penalty"),
    ("rewards.incomplete_answer_rule", "scores if cap is None", "scores if not cap"),
    ("rewards.incomplete_answer_rule", "    if cap is None:\n", "    if cap is not None:\n"),
    ("rewards.relative_scores", "groups - others", "groups - groups.mean(1, keepdim=True)"),
    ("rewards.relative_scores", "(answers_per_prompt - 1)", "answers_per_prompt"),
    ("rewards.relative_scores", "view(-1, answers_per_prompt)", "view(answers_per_prompt, -1)"),
    ("rewards.relative_scores", "groups - others", "others - groups"),
    ("rewards.shape_rewards", "-kl_coef", "kl_coef"),
    ("rewards.shape_rewards", "kl_estimate(logprobs, ref_logprobs, kind)", "kl_estimate(ref_logprobs, logprobs, kind)"),
    ("rewards.shape_rewards", "kl_estimate(logprobs, ref_logprobs, kind)", "kl_estimate(logprobs, ref_logprobs)"),
    (
        "rewards.shape_rewards",
        "logprobs.masked_fill(~mask, 0.0), ref_logprobs.masked_fill(~mask, 0.0)",
        "logprobs, ref_logprobs",
    ),
    ("rewards.shape_rewards", "(lengths - 1)", "lengths"),
    ("rewards.shape_rewards", "mask.sum(1)", "mask.sum(0)"),
    ("rewards.shape_rewards", "(lengths - 1)", "((lengths - 1) % mask.shape[1])"),
    ("rewards.shape_rewards", "scores.to(rewards.dtype)", "scores"),
    ("rewards.pairwise_loss", "chosen - rejected - margin", "rejected - chosen - margin"),
    ("rewards.pairwise_loss", "chosen - rejected - margin", "chosen - rejected + margin"),
    ("rewards.pairwise_loss", "(chosen + rejected)", "(chosen - rejected)"),
    (
        "rewards.pairwise_loss",
        "F.logsigmoid(chosen - rejected - margin)",
        "torch.sigmoid(chosen - rejected - margin).log()",
    ),
    ("rewards.pairwise_loss", "losses.mean()", "losses.sum()"),
    ("rewards.pairwise_accuracy", "chosen > rejected", "chosen < rejected"),
    ("rewards.pairwise_accuracy", "0.5 *", "1.0 *"),
    ("layout.pack_sequences", "[fill] * (width - len(row))", "[fill + 1] * (width - len(row))"),
    ("layout.pack_sequences", "row + [fill] * (width - len(row))", "[fill] * (width - len(row)) + row"),
    ("layout.pack_sequences", "< response_lens", "<= response_lens"),
    ("layout.response_positions", " - 1 + steps", " + steps"),
    ("layout.response_positions", ".masked_fill(~response_mask, 0)", ""),
    ("layout.response_tokens", "response_mask) + 1", "response_mask)"),
    (
        "layout.response_tokens",
        "positions.masked_fill(~response_mask, 0)).masked_fill(~response_mask, 0)",
        "positions)",
    ),
    ("layout.trim", "packed.lengths.max()", "packed.lengths.min()"),
    ("layout.trim", "response_mask[:, :longest_response]", "response_mask"),
    ("layout.batches_by_length", "-lengths[row]", "lengths[row]"),
    ("logprobs.token_logprobs", "response_mask), temperature, _chunk", "response_mask), 1.0, _chunk"),
    (
        "logprobs._score",
        "range(0, max(len(tokens), 1), CHUNK_TOKENS)",
        "range(0, max(len(tokens) - CHUNK_TOKENS, 1), CHUNK_TOKENS)",
    ),
    ("logprobs._score", "len(tokens) > CHUNK_TOKENS", "len(tokens) < 0"),
    ("logprobs._score", "max(len(tokens), 1)", "len(tokens)"),
    ("logprobs._score", "zip(*pieces)", "zip(*pieces[::-1])"),
    ("layout.unflatten", "dtype=values.dtype", "dtype=torch.float32"),
    ("layout.unflatten", "torch.zeros(", "torch.ones("),
    (
        "layout.response_places",
        "rows[response_mask], response_positions",
        "rows[response_mask].flip(0), response_positions",
    ),
    (
        "layout.response_places",
        "response_positions(prompt_lens, response_mask)[response_mask]",
        "response_positions(prompt_lens, response_mask).flatten()[: response_mask.sum()]",
    ),
    ("logprobs._scale", "logits / temperature", "logits * temperature"),
    ("logprobs._scale", "temperature == 1.0", "temperature >= 1.0"),
    ("logprobs._chunk_logprobs", "_scale(lm_logits(model, hidden), temperature)", "lm_logits(model, hidden)"),
    ("logprobs._chunk_logprobs", "-F.cross_entropy", "F.cross_entropy"),
    ("logprobs._chunk_logprobs", "logits, tokens", "logits.detach(), tokens"),
    ("logprobs._chunk_logprobs_and_entropy", "hidden), temperature)", "hidden), 1.0)"),
    ("logprobs._chunk_logprobs_and_entropy", "-F.cross_entropy", "F.cross_entropy"),
    ("logprobs._chunk_logprobs_and_entropy", "logits.softmax(-1)", "logits.softmax(0)"),
    ("logprobs._chunk_logprobs_and_entropy", "torch.special.entr(logits.softmax(-1))", "-logits.log_softmax(-1)"),
    (
        "logprobs._chunk_logprobs_and_entropy",
        "torch.special.entr(logits.softmax(-1))",
        "-(logits.softmax(-1) * logits.log_softmax(-1))",
    ),
    ("best_of.best_places", "(whole[place], scores[place])", "scores[place]"),
    ("best_of.best_places", "and not answer.truncated", ""),
    ("best_of.best_places", "max(places,", "max(reversed(places),"),
    ("best_of.best_places", "(share(place), scores[place])", "scores[place]"),
    ("best_of.best_places", "(share(place), scores[place])", "share(place)"),
    ("best_of.best_places", "answers[place].label == answers[favourite].label", "True"),
    ("best_of.best_places", "if whole[place] and", "if"),
    ("data.splits._set_aside", "aside += test", "pass"),
    ("data.splits._set_aside", "split_holdout(rest, max", "split_holdout(labelled, max"),
    ("data.splits._set_aside", "len(test) + count < FEWEST_TEST_ROWS", "False"),
    ("data.splits._keep_rationales", "if row.id in kept", "if row.id not in kept"),
    ("data.splits._keep_rationales", "select_labelled(explained, count, seed)", "select_labelled(explained, count, 0)"),
    ("data.splits._test_share", 'and "test" not in recorded', "and False"),
    ("data.splits._set_aside", "count, evaluation = round(EVAL_SHARE * len(new))", "count, evaluation = 0"),
    ("data.splits._set_aside", 'stay["test"]', "[]"),
    ("data.splits._hold_out", 'stay["held_out"] + ', ""),
    ("data.splits._hold_out", "split_holdout(new, share", "split_holdout(labelled, share"),
    ("data.inherited._of_other_rows", '"train": (trained | held_out | dev | test, ', '"train": (trained, '),
    ("data.inherited._of_other_rows", '"eval": (trained | test, ', '"eval": (trained, '),
    ("data.inherited._of_other_rows", '"test": (trained | held_out | dev, ', '"test": (trained, '),
    ("data.inherited._keep_to_their_parts", 'still.pop("test")', "set()"),
    ("data.inherited._keep_to_their_parts", "test - trained - held_out - dev", "test"),
    ("data.inherited._keep_to_their_parts", "& without_label", "& set()"),
    ("data.inherited._as_before", "key == LEFT_OUT + name or", ""),
    ("data.inherited._as_before", "key.startswith(STILL)", "False"),
    ("data.inherited.rows_for", 'other = [*other, "train"]', "pass"),
    ("data.inherited.inherit", 'FILES if "dataset" in given', "set() if True"),
    ("data.inherited.check_same_draw", "if any(name in recorded for name in other)", "if False"),
    ("data.met_rows.joined_hashes", "if not name.startswith((LEFT_OUT, STILL))", ""),
    ("data.splits.Splits.prompts", 'self.labelled if kind == "labelled" else', ""),
    ("data.splits.Splits.prompts", "+ self.labelled * self.few_unlabelled", ""),
    ("data.splits.Splits.prompts", "* self.few_unlabelled", ""),
    ("data.met_rows.met_rows", '("held_out", "eval")', '("eval",)'),
    ("pairs._whole", "and not answer.truncated", ""),
    ("pairs.grounded_pairs", "if label == gold", ""),
    ("pairs.grounded_pairs", "[text for text in right if shares", "[text for text in shares if shares"),
    ("pairs.grounded_pairs", "better and rng.random() < SAMPLED_SHARE", "better"),
    ("pairs.grounded_pairs", "if written and shares[written] >= wanted and", "if written and"),
    ("pairs.grounded_pairs", "shares[rejected] + GROUNDED_GAP", "shares[rejected]"),
    ("pairs.on_policy_pairs", "or not written", ""),
    ("pairs.on_policy_pairs", "if sampled or written:", "if True:"),
    ("pairs.on_policy_pairs", "rng.random() < FLIPPED_WHOLE_SHARE", "True"),
    ("pairs.relabelled", "new if found == old", "new if match[0] == old"),
    ("pairs.relabelled", "match.start() < last and", ""),
    ("pairs.relabelled", "numbers or", ""),
    ("pairs.relabelled", "or found in quoted", ""),
    ("pairs.relabelled", "and not CONCLUSION.search(rationale[: match.start()])", ""),
    ("pairs.relabelled", '"_" not in match[0] and', ""),
    ("pairs.relabelled", "match[0] in (old, new)", "True"),
    ("tasks.whole_words", ", reverse=True", ""),
    ("tasks.whole_words", "{ATTACHED}", ""),
    ("tasks.whole_words", "(?<!{letter})", ""),
    ("tasks.whole_words", "(?!{letter}|", "(?!"),
    ("tasks.whole_words", "|[{marks()}]", ""),
    ("pairs._written", "if writer.can_write(example) else None", "if True else None"),
    ("pairs.grounded_pairs", "example, text) or 0.0", "example, text) or 1.0"),
    ("run.rates.default_rate", "max(1.0, weights / 1e6)", "(weights / 1e6)"),
    ("run.rates.default_rate", "** 0.5", "** 0.45"),
    ("run.rates.default_rate", "min(rate * ADAPTERS[role], peak * ADAPTERS_MOST)", "rate * ADAPTERS[role]"),
    ("engine.graphs.inner_weights", "if weight is not embeddings", ""),
    ("run.rates.decoder_weights", "shared_decoder(model)", "model"),
    ("model.backbone.shared_decoder", 'getattr(backbone, "shared_backbone", backbone)', "backbone"),
]


def find(path):
    """'module.name' or 'module.Class.name' -> the plain function object."""
    module, *names = path.split(".")
    found = getattr(rllr, module)
    for name in names:
        found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    return inspect.unwrap(found)


def mutate(function, old, new):
    """The function compiled from its source with one replacement. Raises LookupError unless `old` occurs once."""
    source = textwrap.dedent(inspect.getsource(function))
    while source.startswith("@"):
        source = source.partition("\n")[2]
    # The docstring is no code: a pattern found there would make a mutant that does nothing.
    head, body = source, ""
    if function.__doc__:
        before, _, rest = source.partition('"""')
        doc, _, body = rest.partition('"""')
        head = before
    count = head.count(old) + body.count(old)
    if count != 1:
        raise LookupError(f"{function.__qualname__}: {old!r} occurs {count} times")
    namespace = dict(function.__globals__)
    code = head.replace(old, new) + ('""' + body.replace(old, new) if body else "")
    exec(compile(code, f"<mutant of {function.__qualname__}>", "exec"), namespace)
    return namespace[function.__name__]


@contextlib.contextmanager
def replaced(function, other):
    """`function` runs the code of `other` for a while, whoever imported it."""
    kept = function.__code__, function.__defaults__
    function.__code__, function.__defaults__ = other.__code__, other.__defaults__
    try:
        yield
    finally:
        function.__code__, function.__defaults__ = kept


class Run:
    """A pytest plugin: collects once, runs everything unmutated, then for each mutant the quickest tests first."""

    def __init__(self, mutants):
        self.mutants, self.survivors, self.baseline = mutants, 0, None

    def pytest_runtestloop(self, session):
        seconds = {}
        for item in session.items:
            start = time.perf_counter()
            if self.fails(item):
                self.baseline = item.nodeid
                return True
            seconds[item] = time.perf_counter() - start
        for path, old, new, function, mutant in self.mutants:
            own = f"test_{path.split('.')[0]}.py"
            order = sorted(session.items, key=lambda item: (item.path.name != own, seconds[item]))
            with replaced(function, mutant):
                killer = next((item.nodeid.rpartition("/")[2] for item in order if self.fails(item)), None)
            self.survivors += killer is None
            change = " ".join(f"{old.strip()} -> {new.strip() or '(nothing)'}".split())
            print(f"{path:38} {change[:90]:90} {killer or 'SURVIVED'}", file=sys.__stdout__, flush=True)
        return True

    def fails(self, item):
        return any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def main(words):
    start = time.time()
    chosen = [m for m in MUTANTS if not words or any(word in " ".join(m) for word in words)]
    try:
        mutants = [(path, old, new, find(path), mutate(find(path), old, new)) for path, old, new in chosen]
    except (LookupError, AttributeError, SyntaxError) as error:
        print(f"stale list of mutants: {error}")
        return 2
    run, output = Run(mutants), io.StringIO()
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:randomly", f"--rootdir={TESTS.parent}"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main([str(TESTS / name) for name in FILES] + options, plugins=[run])
    if code != 0 or run.baseline:
        print(f"{output.getvalue()}\npytest ended with code {int(code)}; failing without any mutation: {run.baseline}")
        return 2
    print(f"{len(mutants)} mutants, {run.survivors} survived, {time.time() - start:.0f} s")
    return 1 if run.survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
