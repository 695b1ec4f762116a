"""Label new text with a trained policy: rationale and label per row, no gold labels needed.

    python -m rllr.predict --model runs/sst2/ppo-label --input new.jsonl --output labelled.jsonl
    echo '{"text": "a dull and overlong mess"}' | python -m rllr.predict --model runs/sst2/ppo-label

Of a PPO run's directory the policy that it hands back is taken, runs/sst2/ppo-label/best.
From standard input (no --input, or --input -) a line is a JSON object with `text` (and `text_b`), or plain text. Every
row that goes in comes out: one without a text with label null and the reason. With --best_of N --label_rm DIR the
answer is the best of N sampled ones: a reward model chooses the label, and of the answers with this label the one whose
explanation stands in the text is taken.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from .answers import answer_rows
from .best_of import BestOfConfig, best_answers, load_chooser
from .common.config import flag, parse_config
from .common.errors import InputError, command
from .data.encoding import Encoder
from .data.row_reader import parse_mapping_flag
from .data.rows import Source, load_examples
from .data.splits import FileConfig
from .data.tables import Table, check_output, decode
from .model.loading import allow_remote_code, load_policy, load_tokenizer
from .model.records import check_same_task, policy_directory, read_record, resolve_task
from .model.trial import check_policy
from .run.machine import set_up
from .run.settings import DecodingConfig
from .tasks import split_answer


@dataclass(kw_only=True)
class Config(DecodingConfig, BestOfConfig, FileConfig):
    GROUP = "prediction"
    model: str = flag(help="directory of a trained policy, or of a PPO run: its best policy")
    base: str | None = flag(None, "where the base of a model that is an adapter lies now, if it has moved")
    task: str | None = flag(None, "a built-in task's name or a task file; without it the model's own")
    input: str | None = flag(None, "JSONL, JSON, CSV, TSV or Parquet; without it, or with -, standard input")
    output: str | None = flag(None, "JSONL; without it standard output")
    answer_format: str | None = flag(None, "rationale or label; without it the model's own")
    overwrite: bool = flag(False, "replace an output file that is already there")


def read_stdin(stream, encoding=None) -> Table:
    """Lines of a stream of bytes as rows: JSON objects, or plain texts (blank ones too). InputError with the line."""
    lines, rows = decode("standard input", stream.read(), encoding).rstrip().split("\n"), []
    if lines[0].lstrip().startswith("[{"):
        raise InputError("standard input: is a JSON array; give an object per line, or --input FILE.json")
    for number, line in enumerate(map(str.strip, lines if any(lines) else ()), start=1):
        try:
            rows.append((number, json.loads(line) if line.startswith("{") else {"text": line}))
        except (ValueError, RecursionError) as error:
            raise InputError(f"standard input, line {number}: begins with {{ but is not valid JSON: {error}") from None
    if not rows:
        raise InputError("standard input: is empty; give a text or a JSON object per line, or --input FILE")
    return Table("standard input", "stdin", rows)


def answer_line(example, answer, task):
    """What comes out for a row; answer None: it has no text."""
    row = {"id": example.id, "text": example.text} | ({"text_b": example.text_b} if task.is_pair else {})
    if answer is None:
        return row | {"label": None, "rationale": None, "answer": None, "reason": "empty text"}
    row |= {
        "label": answer.label,
        "rationale": split_answer(task, answer.text)[0] if answer.label else None,
        "answer": answer.text,
    }
    if answer.label is None:
        row |= {"reason": "cut at --max_new_tokens" if answer.truncated else "no readable label"}
    return row


def print_lines(lines):
    """JSON lines on standard output; in ASCII, which JSON can spell, where its encoding lacks a character."""
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = "\n".join(json.dumps(line) for line in lines)
    print(text)


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    allow_remote_code(config.trust_remote_code)
    if config.output:
        check_output(config.output, config.overwrite, config.input)

    def log(line):  # standard output may carry the result
        print(line, file=sys.stderr)

    config.model = policy_directory(config.model, log)
    record = read_record(config.model)
    task = resolve_task(config, record, config.model)
    check_same_task(record, task, f"--model {config.model}")
    device = set_up(config.precision, config.seed)

    columns, tokenizer = parse_mapping_flag(config.columns, "--columns"), load_tokenizer(config.model)
    source: Table | Source
    if config.input in (None, "-"):
        if config.delimiter:
            raise InputError("--delimiter is of CSV files: give --input FILE; standard input has a row per line")
        source = read_stdin(sys.stdin.buffer, config.encoding)
    else:
        source = Source(path=config.input, delimiter=config.delimiter, encoding=config.encoding)
    with contextlib.redirect_stdout(sys.stderr):  # warnings
        chooser = load_chooser(config, task, [tokenizer], device)
    examples = load_examples(source, task, labels="ignored", columns=columns, empty="keep", log=log)
    asked = [example for example in examples if example.text and (example.text_b or not task.is_pair)]
    with contextlib.redirect_stdout(sys.stderr):
        model = load_policy(config.model, device=device, base=config.base)
    encoder = Encoder(tokenizer, model, record.get("clock"))
    answers = []
    if asked:
        fitted = encoder.fit(asked, task, config.max_new_tokens, log)
        limits = {"max_new_tokens": config.max_new_tokens}
        check_policy(model, encoder, task, fitted, name=config.model, alike=[chooser] if chooser else (), **limits)
        if chooser:
            answers = best_answers(chooser, model, encoder, task, fitted, config)
        else:
            answers = answer_rows(model, encoder, task, fitted, batch_size=config.batch_size, **limits)
    given = dict(zip((example.id for example in asked), answers))
    lines = [answer_line(example, given.get(example.id), task) for example in examples]
    failures = sum(line["label"] is None for line in lines)
    try:
        if config.output:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            Path(config.output).write_text(text, encoding="utf-8")
        else:
            print_lines(lines)
    except OSError as error:
        raise InputError(f"--output {config.output}: cannot be written: {error.strerror or error}") from None
    log(f"{len(lines)} rows, {failures} of them without a label (label null, with the reason)")


if __name__ == "__main__":
    main()
