"""Write a data file with a rationale for every label of every row.

python -m rllr.rationales --task sst2 --train_file train.jsonl --writer evidence --output with_rationales.jsonl
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.config import flag, parse_config
from ..common.errors import InputError, command
from ..data.row_reader import parse_mapping_flag
from ..data.rows import Source, load_examples
from ..data.splits import FileConfig
from ..data.tables import check_output
from ..run.settings import ModelConfig
from ..tasks import load_task
from .endpoint_writer import EndpointConfig
from .factory import WRITERS, make_writer
from .writers import FILL_IN, without_rationale


@dataclass(kw_only=True)
class Config(EndpointConfig, ModelConfig, FileConfig):
    GROUP = "rationales"
    output: str = flag(help="JSONL: the rows with the columns rationale (gold label) and rationales (every label)")
    writer: str = flag("evidence", "given, evidence, demo, model or endpoint", choices=WRITERS)
    task: str = flag("demo", "a built-in task's name or a task file")
    train_file: str | None = flag(None, "labelled rows; without it the demo data")
    label_map: str | None = flag(None, "other label words: Sci/Tech=technology")
    rationale_model: str | None = flag(None, "the causal LM, for --writer model")
    overwrite: bool = flag(False, "replace an output file that is already there")


@command
def main(argv=None):
    """Write a data file with a rationale for every label of every row."""
    from ..common.log import say
    from ..model.loading import allow_remote_code
    from ..run.machine import set_up

    config = parse_config(Config, argv, __doc__)
    allow_remote_code(config.trust_remote_code)
    output = Path(config.output)
    check_output(output, config.overwrite, config.train_file)
    task = load_task(config.task)
    if not config.train_file and task.name != "demo":
        raise InputError("--train_file: give the labelled rows to write rationales for")
    device = set_up(config.precision, seed=0)
    source = Source(
        config.train_file or "demo:train",
        columns=parse_mapping_flag(config.columns, "--columns"),
        label_map=parse_mapping_flag(config.label_map, "--label_map"),
        delimiter=config.delimiter,
        encoding=config.encoding,
    )
    rows = load_examples(source, task, labels="optional", log=say)
    examples = [row for row in rows if row.label is not None]
    if not examples:
        raise InputError(f"--train_file {config.train_file}: no row has a label")
    writer = make_writer(config.writer, examples, task, config=config, device=device, directory=output.parent, log=say)
    missing = [example for example in examples if not writer.can_write(example)]
    if missing:
        raise InputError(f"{without_rationale(missing[0])}; {FILL_IN}")
    with open(output, "w", encoding="utf-8") as file:
        for example in rows:
            row: dict[str, Any] = {"id": example.id, "text": example.text, "label": example.label}
            row |= {"text_b": example.text_b} if task.is_pair else {}
            row |= {"score": example.score} if example.score is not None else {}
            if example.label is not None:
                row |= {"rationale": writer.write(example, example.label)}
                row |= {"rationales": {label: writer.write(example, label) for label in task.labels}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    without = f", {len(rows) - len(examples)} of them as they were, without a label" * (len(rows) > len(examples))
    say(f"{len(rows)} rows written to {output}{without}")


if __name__ == "__main__":
    main()
