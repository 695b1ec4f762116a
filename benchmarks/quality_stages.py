"""Three stages of `quality.py` that no script of the product has; it runs them as processes.

--make rows     unlabelled rows answered by best-of-n, with the labelled rows, as a file for train_sft.py
--make choice   the reward model's own choice: of each row the label whose written answer scores highest
--make tfidf    logistic regression on TF-IDF features of words, trained on the rows that trained SFT

rows writes rows.jsonl, and the SFT policy without its record (with it train_sft.py would leave out the rows that it
knows). The other two write answers-0.jsonl, a line a row, as `rllr.evaluate` does: of the test rows where the policy's
record names some, else of dev.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rllr.answers import Answer, answer_rows
from rllr.best_of import best_answers
from rllr.common.files import RECORD, ROWS
from rllr.data.encoding import Encoder
from rllr.data.inherited import inherit
from rllr.data.splits import DataConfig, load_splits
from rllr.model.heads import RewardModel
from rllr.model.loading import load_policy, load_tokenizer
from rllr.model.records import read_record, resolve_task
from rllr.rationales.factory import make_writer
from rllr.rationales.words import words_of
from rllr.report.reward_report import choose_labels
from rllr.run.machine import set_up
from rllr.tasks import split_answer

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of logistic regression: C, the inverse of its L2 penalty


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", required=True, choices=("rows", "choice", "tfidf"))
    parser.add_argument("--policy", required=True, help="the SFT policy")
    parser.add_argument("--label_rm", required=True)
    parser.add_argument("--answers", type=int, help="rows: sampled answers, --best_of to a row")
    parser.add_argument("--best_of", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    set_up(args.precision, args.seed)
    args.output_dir = Path(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stage = Stage(args)
    {"rows": make_rows, "choice": make_choice, "tfidf": make_tfidf}[args.make](stage, args)


class Stage:
    """The task, rows, models and settings of an SFT policy and its label reward model."""

    def __init__(self, args):
        record = read_record(args.policy)
        data = DataConfig()
        data.given, data.policy = set(), args.policy
        self.task = resolve_task(data, record, args.policy)
        inherit(data, record, args.policy)
        self.splits = load_splits(data, self.task, print, record)
        self.reported = self.splits.test or self.splits.eval
        self.policy = load_policy(args.policy)
        self.encoder = Encoder(load_tokenizer(args.policy), self.policy, record.get("clock"))
        self.reward_model = RewardModel.from_pretrained(args.label_rm).eval()
        self.writer = make_writer(record["config"]["rationales"], self.splits.labelled, self.task)
        self.limits = {"max_new_tokens": record["config"]["max_new_tokens"], "batch_size": 256}

    def fit(self, rows):
        """The rows as the policy reads them, cut where they are too long."""
        return self.encoder.fit(rows, self.task, self.limits["max_new_tokens"], print)


def make_rows(stage, args):
    """Write the labelled rows with their written rationales, and unlabelled ones with the best of sampled answers."""
    prompts, rows = stage.splits.prompts(), []
    count = min(args.answers // args.best_of, len(prompts))
    chosen = random.Random(f"best of/{args.seed}").sample(prompts, count)
    config = SimpleNamespace(**stage.limits, **vars(args), temperature=1.0)
    answers = best_answers(stage.reward_model, stage.policy, stage.encoder, stage.task, stage.fit(chosen), config)
    for row, answer in zip(chosen, answers):
        rationale, label = split_answer(stage.task, answer.text)
        if label and rationale and not answer.truncated:
            rows.append(as_line(row, f"{row.id} best of {args.best_of}", label, rationale))
    print(f"{len(rows)} of {count} rows have a whole answer")
    rows += [as_line(row, row.id, row.label, stage.writer.write(row, row.label)) for row in stage.splits.labelled]
    (args.output_dir / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    policy = args.output_dir / "policy"
    shutil.copytree(args.policy, policy, ignore=shutil.ignore_patterns(RECORD, ROWS, "checkpoints", "base"))


def as_line(row, name, label, rationale):
    """A row as a line of a data file."""
    texts = {"text": row.text} | ({"text_b": row.text_b} if row.text_b else {})
    return json.dumps({"id": name, **texts, "label": label, "rationale": rationale}, ensure_ascii=False) + "\n"


def make_choice(stage, args):
    """Write the reward model's choice of label, as an answer with the rationale that argues for it."""
    rows, task, writer = stage.fit(stage.reported), stage.task, stage.writer
    answers = answer_rows(stage.policy, stage.encoder, task, rows, **stage.limits)
    options = {"writer": writer, "batch_size": stage.limits["batch_size"]}
    labels = choose_labels(stage.reward_model, stage.encoder, task, rows, answers, **options)
    texts = [task.render_answer(label, writer.write(row, label)) for row, label in zip(rows, labels)]
    write_answers(args, stage.reported, [Answer(text, label, False) for text, label in zip(texts, labels)])


def make_tfidf(stage, args):
    """Write the labels of logistic regression. Dev chooses the strength of its penalty, as it chooses SFT's epoch."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = stage.splits
    vectorizer = TfidfVectorizer(analyzer=features, min_df=2, sublinear_tf=True)
    train, dev = vectorizer.fit_transform(splits.labelled), vectorizer.transform(splits.eval)
    labels, gold = [row.label for row in splits.labelled], [row.label for row in splits.eval]
    models = [LogisticRegression(C=strength, max_iter=2000).fit(train, labels) for strength in STRENGTHS]
    best = max(models, key=lambda model: model.score(dev, gold))
    print(f"C {best.C}: {100 * best.score(dev, gold):.1f} % on dev")
    found = best.predict(vectorizer.transform(stage.reported))
    write_answers(args, stage.reported, [Answer("", str(label), False) for label in found])


def features(row):
    """The words of a text and its pairs of neighbours; of two texts also which words both have, and which only one."""
    if row.text_b is None:
        return grams(row.text)
    first, second = set(words_of(row.text)), set(words_of(row.text_b))
    kinds = {"both": first & second, "first": first - second, "second": second - first}
    found = [f"{kind} {word}" for kind, words in kinds.items() for word in words]
    found += [f"{kind} has {min(len(words), 9)}" for kind, words in kinds.items()]
    return found + [f"a {gram}" for gram in grams(row.text)] + [f"b {gram}" for gram in grams(row.text_b)]


def grams(text):
    words = text.casefold().split()
    return words + [" ".join(pair) for pair in zip(words, words[1:])]


def write_answers(args, rows, answers):
    """answers-0.jsonl: a line a row."""
    with open(args.output_dir / "answers-0.jsonl", "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            line = {"id": row.id, "gold": row.label, "label": answer.label, "answer": answer.text}
            file.write(json.dumps(line | {"truncated": answer.truncated}) + "\n")


if __name__ == "__main__":
    main()
