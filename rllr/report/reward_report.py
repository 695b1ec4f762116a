"""What a reward model is worth before PPO spends hours on it: pairs by kind, its choice of label, its spread."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..answers import named_generator, read_answers, write_answers
from ..common.errors import InputError
from ..common.files import read_json, write_json
from ..common.log import say
from ..data.split_report import FEW_ROWS
from ..judge import STATISTICS, ScoreStatistics, score_rows
from ..layout import Packed, pack
from ..metrics import accuracy, tell_parse_failures, wilson_interval
from ..preview import preview, sentence, table
from ..rewards import incomplete_answer_rule
from ..tasks import split_answer

PREVIEW_ROWS, PREVIEW_SAMPLES = 400, 16  # dev rows of a preview, at most, and answers sampled to each
MIN_PROMPTS = 512  # sampled answers wanted behind the stored statistics


@dataclass
class SampledAnswers:
    """Answers that the SFT policy sampled at PPO's temperature."""

    packed: Packed
    truncated: int  # answers left out because the length limit cut them


def sample_answers(policy, encoder, task, examples, config) -> SampledAnswers:
    """Sample an answer for each of at most config.statistics_prompts rows that trained no stage."""
    count = min(len(examples), config.statistics_prompts)
    examples = random.Random(f"statistics/{config.seed}").sample(examples, count)
    if count < MIN_PROMPTS:
        say(
            f"warning: score statistics rest on {count} prompts, fewer than "
            f"{MIN_PROMPTS}; more unlabelled rows would help"
        )
    prompts, generator = encoder.prompts(task, examples), torch.Generator().manual_seed(config.seed)
    rollout = _sample(policy, encoder, prompts, config, generator)
    answers, responses = read_answers(rollout, encoder, task), rollout.responses()
    rows = [(prompt, ids) for prompt, ids, answer in zip(prompts, responses, answers) if not answer.truncated]
    cut = count - len(rows)
    if cut:
        say(f"{cut} of {count} sampled answers were cut at {config.max_new_tokens} tokens and left out")
    failures = sum(answer.label is None for answer in answers) / count
    tell_parse_failures(failures, say, "answers sampled by the policy")
    if len(rows) < 2:
        raise InputError(
            f"only {len(rows)} of {count} answers sampled by the policy ended within --max_new_tokens "
            f"{config.max_new_tokens}, too few for the statistics of its scores; raise it, or train the policy longer"
        )
    return SampledAnswers(pack(rows, encoder.pad_id, policy.device), cut)


def sample_rows(policy, encoder, task, examples, name, config) -> dict:
    """{row id: `samples_per_row` answers}, sampled at PPO's temperature. name: of the random stream."""
    prompts, count = encoder.prompts(task, examples), config.samples_per_row
    rollout = _sample(policy, encoder, prompts, config, named_generator(name), count)
    answers = _in_rows(read_answers(rollout, encoder, task), count)
    return {row.id: own for row, own in zip(examples, answers, strict=True)}


def _sample(policy, encoder, prompts, config, generator, count=1):
    """The rollout of `count` answers to each prompt (ids), sampled as PPO samples."""
    options = {"temperature": config.temperature, "generator": generator, "answers_per_prompt": count}
    return write_answers(policy, encoder, prompts, **options, **config.answer_limits)


def _in_rows(values, count):
    """A flat list as rows of `count`."""
    return [values[i : i + count] for i in range(0, len(values), count)]


def pair_report(pairs, chosen, rejected) -> dict:
    """{kind or "all": {pairs, accuracy, interval, margin}}: ties one half, 95 %, mean score difference. Printed."""
    margins, report = (chosen - rejected).double().cpu(), {}
    kinds = sorted({pair.kind for pair in pairs})
    for kind in [*(kinds if len(kinds) > 1 else []), "all"]:
        margin = margins[[kind in ("all", pair.kind) for pair in pairs]]
        share = float(((margin > 0).double() + 0.5 * (margin == 0).double()).mean())
        low, high = wilson_interval(share, len(margin))
        report[kind] = {
            "pairs": len(margin),
            "accuracy": share,
            "interval": [low, high],
            "margin": float(margin.mean()),
        }
        say(
            f"held-out pairs  {kind:26}  n {len(margin):5}  accuracy {100 * share:5.1f} % "
            f"({100 * low:.1f} .. {100 * high:.1f})  margin {float(margin.mean()):+.3f}"
        )
    return report


def show_pairs(pairs, chosen, rejected, count=2):
    """The first held-out pairs with the scores of both sides."""
    for pair, high, low in list(zip(pairs, chosen.tolist(), rejected.tolist()))[:count]:
        say(
            f"  prompt    {pair.prompt!r}\n  chosen    {high:+.2f}  "
            f"{pair.chosen!r}\n  rejected  {low:+.2f}  {pair.rejected!r}\n"
        )


def classifier_report(model, models, task, parts, writer, config) -> dict:
    """{part: {rows, reward_model, policy}}: accuracy of the best-scored label beside the policy's greedy accuracy.

    models: the policy and its encoder. parts: {name: (rows, the policy's greedy answers to them)}. The gap between the
    two accuracies is what PPO can gain. Printed.
    """
    report = {}
    for part, (examples, answers) in parts.items():
        options = {"writer": writer, "batch_size": config.eval_batch_size}
        chosen = choose_labels(model, models.encoder, task, examples, answers, **options)
        gold = [example.label for example in examples]
        judged, greedy = accuracy(gold, chosen), accuracy(gold, [answer.label for answer in answers])
        report[part] = {"rows": len(examples), "reward_model": judged, "policy": greedy}
        say(
            f"as a classifier  {part:26}  n {len(examples):5}  reward model {100 * judged:.1f} %  "
            f"policy {100 * greedy:.1f} %  to harvest {100 * (judged - greedy):+.1f} points"
        )
    return report


def choose_labels(model, encoder, task, examples, answers, *, writer, batch_size) -> list[str]:
    """Of each example the label whose answer the reward model scores highest; of equals the task's first.

    Each label is scored with a rationale that argues for it, by the writer; where the writer has none for every label,
    with the rationale of the policy's own answer.
    """
    rows = []
    for example, prompt, answer in zip(examples, encoder.prompts(task, examples), answers):
        own = split_answer(task, answer.text)[0]
        for label in task.labels:
            rationale = writer.write(example, label) if writer and writer.argues_for_all(example) else own
            rows.append((prompt, encoder.answer_ids(task.render_answer(label, rationale))))
    scores = score_rows(model, pack(rows, encoder.pad_id, model.device), batch_size)
    return [task.labels[i] for i in scores.view(len(examples), len(task.labels)).argmax(1).tolist()]


def preview_report(
    model, models, task, answered, statistics, config, *, most=PREVIEW_ROWS, count=PREVIEW_SAMPLES
) -> dict:
    """PPO's preview (`rllr.preview`) on `most` dev rows: best-of-n of `count` samples a row beside greedy. Printed.

    answered: (dev rows, the policy's greedy answers to them). An answer that PPO would call incomplete scores what PPO
    would give it (`rewards.incomplete_answer_rule`), before a PPO run is known by its default penalties.
    """
    rows = list(zip(*answered, strict=True))
    rows = random.Random(f"preview/{config.seed}").sample(rows, min(len(rows), most))
    gold, encoder = [row.label for row, _ in rows], models.encoder
    prompts = encoder.prompts(task, [row for row, _ in rows])
    rollout = _sample(models.policy, encoder, prompts, config, named_generator(f"preview/{config.seed}"), count)
    labels = [answer.label for answer in read_answers(rollout, encoder, task)]
    unlabelled = torch.tensor([label is None for label in labels], device=rollout.truncated.device)
    scores = score_rows(model, rollout.packed, config.eval_batch_size)
    no_end, no_label = (  # in standard deviations of the scores
        statistics.std * getattr(config, f"missing_{what}_penalty", 1.0) for what in ("eos", "label")
    )
    scores = incomplete_answer_rule(scores, rollout.truncated, unlabelled, no_end, no_label, statistics.mean)
    right = [[label == own for label in sampled] for own, sampled in zip(gold, _in_rows(labels, count))]
    greedy_right = [own == answer.label for own, (_, answer) in zip(gold, rows)]
    found = preview(_in_rows(scores.tolist(), count), right, greedy_right, seed=config.seed)
    say(f"preview of PPO, on {len(rows)} dev rows:\n{table(found)}\n{sentence(found)}")
    if len(rows) < FEW_ROWS:
        say(f"warning: the preview rests on {len(rows)} dev rows; {FEW_ROWS} or more would make it surer")
    return found


def save_statistics(statistics, directory):
    """Write a reward model's score statistics beside it."""
    write_json(Path(directory) / STATISTICS, asdict(statistics))


def load_statistics(directory) -> ScoreStatistics:
    """The score statistics beside a reward model. InputError where there are none, or damaged ones."""
    path = Path(directory) / STATISTICS
    if not path.is_file():
        raise InputError(f"{path}: not there; train_rm.py writes it beside the reward model (or use --score_norm none)")
    try:
        statistics = ScoreStatistics(**read_json(path))
        whole = statistics.is_whole()
    except (InputError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise InputError(f"{path}: damaged; train the reward model again (or use --score_norm none)")
    return statistics
