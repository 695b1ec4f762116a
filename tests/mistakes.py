"""Mistakes that people make in PPO, made on purpose: what a run looks like with one, beside the same run without it.

    python tests/mistakes.py                    # their names
    python tests/mistakes.py whitening          # a short PPO run, right and with the mistake, and the metrics that tell

A mistake is a replacement in one function's source, as in mutate.py. The run is PPO on the toy task of the tests, a few
seconds on a CPU. docs/details.md explains each of them.
"""

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from mutate import find, mutate, replaced  # noqa: E402
from toy_runs import toy_runs  # noqa: E402

import rllr.update  # noqa: E402, F401  (`find` looks functions up in it)
from rllr.report.replay import replay  # noqa: E402
from rllr.report.trail_format import files_in, read_trail  # noqa: E402

STEPS = 12


@dataclass(frozen=True)
class Mistake:
    """A replacement of `old` by `new` in a function; the metrics in which it shows, and flags under which it does."""

    path: str  # module.function
    old: str
    new: str
    shows: tuple  # names in metrics.jsonl
    flags: tuple = field(default=())


MISTAKES = {
    "index_shift": Mistake(
        "layout.response_tokens", "response_positions(prompt_lens, response_mask) + 1",
        "response_positions(prompt_lens, response_mask)", ("analyse/logprob_gap",),
    ),
    "eos_mask": Mistake(
        "update._losses", "mask = packed.response_mask",
        "mask = packed.response_mask & packed.response_mask.roll(-1, 1).index_fill(1, torch.tensor([-1]), False)",
        ("improve/policy_loss", "act/response_len", "act/truncated"), ("--missing_eos_penalty", "0"),
    ),
    "whitening": Mistake(
        "ppo.masked_whiten", "mean = masked_mean(x, mask)", "mean = _fill(x, mask).mean()", ("improve/policy_loss",)
    ),
    "first_ratio": Mistake(
        "update._losses", "new_logprobs = token_logprobs(models.policy, *packed, config.temperature)",
        "new_logprobs = token_logprobs(models.policy, *packed, 1.0)", ("improve/first_ratio_error",),
        ("--temperature", "1.3"),
    ),
    "score_position": Mistake(
        "rewards.shape_rewards", "(lengths - 1).unsqueeze(1)", "mask.shape[1] - 1",
        ("credit/advantage_std", "credit/explained_variance"),
    ),
    "truncation": Mistake(
        "rewards.incomplete_answer_rule", "torch.where(truncated | unlabelled, capped - penalty, scores)", "scores",
        ("judge/score", "act/parse_failures", "act/truncated"), ("--temperature", "1.4"),
    ),
    "token_mean": Mistake(
        "update._losses", "x.masked_fill(~mask, 0.0).sum() / token_count",
        "x.masked_fill(~mask, 0.0).sum() / mask.sum()",
        ("improve/grad_norm_policy", "improve/grad_norm_value"), ("--micro_batch_size", "2"),
    ),
    "kl_sign": Mistake(
        "rewards.shape_rewards", "rewards = -kl_coef * kl_estimate", "rewards = kl_coef * kl_estimate",
        ("analyse/kl_sequence", "analyse/entropy"),
    ),
}  # fmt: skip


def toy_run(flags, directory):
    """(metrics of a short PPO run, what ended it or what a replay of its trail says, None where all is well)."""
    toy, told = toy_runs(), io.StringIO()
    rates = ["--learning_rate", 3e-3, "--value_learning_rate", 3e-3, "--rollout_prompts", 16, "--eval_every", 99]
    judge = ["--reward", "label", "--label_rm", toy.label_rm]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            toy.ppo(directory, *judge, *rates, *flags, "--audit", "all", steps=STEPS)
            found = replay(map(read_trail, files_in(directory)))
            said = f"replay: {found.first()[0]}" if found.findings else None
        except SystemExit:
            said = f"stopped: {told.getvalue().strip().splitlines()[-1].partition(': ')[2].partition('. The')[0]}"
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "shape/reward" in line], said


def compare(mistake):
    """{which: (metrics, what was said of it)} of a run as it is and one with the mistake."""
    function = find(mistake.path)
    wrong = mutate(function, mistake.old, mistake.new)
    with tempfile.TemporaryDirectory() as home:
        right = toy_run(mistake.flags, f"{home}/right")
        with replaced(function, wrong):
            return {"right": right, "mistake": toy_run(mistake.flags, f"{home}/mistake")}


def main(names):
    torch.set_num_threads(1)
    if not names:
        print(
            "\n".join(
                f"{name:16}{mistake.path}: {mistake.old}  ->  {mistake.new}" for name, mistake in MISTAKES.items()
            )
        )
        return 0
    unknown = [name for name in names if name not in MISTAKES]
    if unknown:
        print(f"no such mistake: {', '.join(unknown)}; there are {', '.join(MISTAKES)}")
        return 2
    for name in names:
        mistake = MISTAKES[name]
        print(f"{name}: in {mistake.path}\n    {mistake.old}\n->  {mistake.new}")
        found = compare(mistake)
        for metric in mistake.shows:
            for which, (lines, _) in found.items():
                values = [f"{line[metric]:11.3g}" for line in lines if line.get(metric) is not None][::3]
                print(f"  {metric:26}{which:8}" + "".join(values))
        for which, (_, said) in found.items():
            if said:
                print(f"  {which}: {said}")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
