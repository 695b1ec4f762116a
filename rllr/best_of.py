"""Best-of-n: of n sampled answers the one that a reward model scores highest, in place of the greedy answer.

It needs no training and costs n answers and n scores a row. Where PPO's preview says that best-of-n beats greedy, this
has the gain without PPO (Stiennon et al. 2020, arXiv:2009.01325; Gao et al. 2023, arXiv:2210.10760). The highest score
says which label; of the answers with this label the one that is best grounded in its text is taken. So the labels are
those of plain best-of-n, and the explanation invents least.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .answers import Answer, named_generator, read_answers, write_answers
from .common.config import Settings, flag
from .common.errors import InputError
from .grounding import grounded
from .judge import score_rows
from .model.heads import RewardModel
from .model.loading import check_same_tokenizer, load_tokenizer
from .model.records import check_same_task, read_record


@dataclass
class BestOfConfig(Settings):
    """Of the commands that only ask a model."""

    GROUP = "best of n"
    best_of: int | None = flag(None, "answers sampled to each row, of which the best one is taken", above=0)
    label_rm: str | None = flag(None, "the reward model that chooses the label, a directory of train_rm.py")
    temperature: float = flag(1.0, "of the sampled answers", above=0)
    seed: int = flag(0, "of the sampled answers")


def load_chooser(config, task, tokenizers, device):
    """The reward model of --label_rm; None without --best_of. An adapter is merged into its base.

    tokenizers: those of the policies that it is to choose for. InputError where one of the two flags stands alone, or
    the reward model is not there, was trained for another task, or reads other token ids than a policy writes.
    """
    if config.best_of and not config.label_rm:
        raise InputError(f"--best_of {config.best_of}: give the reward model that chooses as --label_rm DIR")
    if config.label_rm and not config.best_of:
        raise InputError(f"--label_rm {config.label_rm}: chooses among sampled answers; say how many with --best_of 8")
    if not config.best_of:
        return None
    where = f"--label_rm {config.label_rm}"
    if not Path(config.label_rm).is_dir():
        raise InputError(f"{where}: no such directory; train_rm.py makes one")
    check_same_task(read_record(config.label_rm), task, where)
    own = load_tokenizer(config.label_rm)
    for tokenizer in tokenizers:
        check_same_tokenizer(own, tokenizer, where)
    return RewardModel.from_pretrained(config.label_rm, device=device, base=config.base).requires_grad_(False)


def best_answers(chooser, model, encoder, task, examples, config) -> list[Answer]:
    """Of --best_of answers that the model samples to each example the best one (`best_places`), in the examples' order.

    Sampled at --temperature; --seed and a row's place among the examples decide what is drawn, the batch size does not.
    InputError where a score is not finite.
    """
    n = config.best_of
    rollout = write_answers(
        model, encoder, encoder.prompts(task, examples), max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size, temperature=config.temperature, answers_per_prompt=n,
        generator=named_generator(f"best of {n}/{config.seed}"),
    )  # fmt: skip
    answers = read_answers(rollout, encoder, task)
    scores = score_rows(chooser, rollout.packed, config.batch_size)
    if not torch.isfinite(scores).all():
        raise InputError(f"--label_rm {config.label_rm}: some of its scores are not finite; train it again")

    def share(place):
        return grounded(task, examples[place // n], answers[place].text) or 0.0

    return [answers[place] for place in best_places(answers, scores.tolist(), share, n)]


def best_places(answers, scores, share, n) -> list[int]:
    """Of each n neighbours the place of the best one.

    The label is that of the answer with the highest score; a whole answer, with its end and a readable label, is before
    every other. Of the whole ones with this label the largest share(place) of a grounded rationale decides, then the
    score, then the place: of equals the first.
    """
    whole = [answer.label is not None and not answer.truncated for answer in answers]
    best = []
    for start in range(0, len(answers), n):
        places = range(start, start + n)
        favourite = max(places, key=lambda place: (whole[place], scores[place]))
        alike = [place for place in places if whole[place] and answers[place].label == answers[favourite].label]
        best.append(max(alike or [favourite], key=lambda place: (share(place), scores[place])))
    return best
