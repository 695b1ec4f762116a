"""Label new text with a trained policy: rationale and label per row, no gold labels needed.

    python -m rllr.predict --model runs/sst2/ppo-label/last --input new.jsonl --output labelled.jsonl
    echo '{"text": "a dull and overlong mess"}' | python -m rllr.predict --model runs/sst2/ppo-label/last

From standard input a line is a JSON object with `text` (and `text_b`), or plain text.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .config import check_choice, check_positive, parse_config
from .data import load_examples, parse_mapping_flag
from .encoding import Encoder
from .errors import InputError, command
from .evaluate import answer_rows
from .model import allow_remote_code, load_policy, load_tokenizer
from .tasks import split_answer
from .training import check_same_task, read_record, resolve_task, set_up


@dataclass
class Config:
    model: str  # directory of a trained policy
    task: str | None = None  # a built-in task's name or a task file; without it the model's own
    input: str | None = None  # JSONL, JSON, CSV, TSV or Parquet; without it standard input
    output: str | None = None  # JSONL; without it standard output
    columns: str | None = None  # other column names: text=sentence
    answer_format: str | None = None  # rationale or label; without it the model's own
    overwrite: bool = False  # replace an output file that is already there
    max_new_tokens: int = 48  # of an answer
    batch_size: int = 256  # prompts decoded together
    precision: str = "fp32"  # fp32, or bf16 for autocast (GPU)
    trust_remote_code: bool = False  # let a model's own Python code run, as some hub models need


def read_stdin(stream):
    """Lines of standard input as a temporary JSONL file's content: JSON objects as they are, other lines as texts."""
    rows = []
    for line in stream:
        if line.strip():
            rows.append(line.strip() if line.lstrip().startswith("{") else json.dumps({"text": line.strip()}))
    if not rows:
        raise InputError("standard input: is empty; give a text or a JSON object per line, or --input FILE")
    return "\n".join(rows) + "\n"


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    allow_remote_code(config.trust_remote_code)
    check_positive(config, "max_new_tokens", "batch_size")
    check_choice(config, "precision", ("fp32", "bf16"))
    if config.output and Path(config.output).exists() and not config.overwrite:
        raise InputError(f"--output {config.output}: exists; give another name or --overwrite")
    if config.output and (Path(config.output).is_dir() or not Path(config.output).parent.is_dir()):
        raise InputError(f"--output {config.output}: cannot be written; name a file in a directory that is there")
    record = read_record(config.model)
    task = resolve_task(config, record)
    check_same_task(record, task, f"--model {config.model}")
    device, autocast = set_up(config.precision, seed=0)

    def log(line):  # standard output may carry the result
        print(line, file=sys.stderr)

    columns, tokenizer = parse_mapping_flag(config.columns, "--columns"), load_tokenizer(config.model)
    if config.input:
        examples = load_examples(config.input, task, labels="ignored", columns=columns, log=log)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stdin.jsonl"
            file.write_text(read_stdin(sys.stdin), encoding="utf-8")
            examples = load_examples(file, task, labels="ignored", columns=columns, log=log)
    model = load_policy(config.model, device=device)
    encoder = Encoder(tokenizer, model)
    fitted = encoder.fit(examples, task, config.max_new_tokens, log)
    answers = answer_rows(model, encoder, task, fitted, config.max_new_tokens, config.batch_size, autocast)
    lines = []
    for example, answer in zip(examples, answers):
        row = {"id": example.id, "text": example.text} | ({"text_b": example.text_b} if task.is_pair else {})
        row |= {"label": answer.label, "rationale": split_answer(task, answer.text)[0] if answer.label else None}
        lines.append(json.dumps(row | {"answer": answer.text}, ensure_ascii=False))
    failures = sum(answer.label is None for answer in answers)
    try:
        if config.output:
            Path(config.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            print("\n".join(lines))
    except OSError as error:
        raise InputError(f"--output {config.output}: cannot be written: {error.strerror or error}") from None
    log(f"{len(answers)} rows labelled, {failures} without a readable label (label null)")


if __name__ == "__main__":
    main()
