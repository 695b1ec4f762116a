"""Merge an adapter into its base: a plain Hugging Face model directory, with the record and statistics beside it.

python -m rllr.merge --adapter runs/sst2/ppo-label --output_dir merged
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from .common.config import Settings, flag, parse_config
from .common.errors import command
from .common.files import RECORD, check_run_directory, open_run_directory, write_json
from .common.log import say
from .data.encoding import Encoder
from .data.met_rows import recorded_hashes
from .model.heads import RewardModel, reward_pad_token_id
from .model.loading import allow_remote_code, fingerprint, load_merged, load_tokenizer
from .model.peft_format import read_adapter_config
from .model.records import moved_record, policy_directory, read_record, save_policy
from .run.machine import set_up


@dataclass
class Config(Settings):
    adapter: str = flag(help="directory of a policy's or reward model's adapter, or of a PPO run: its best policy")
    output_dir: str = flag(help="where the plain Hugging Face model goes")
    base: str | None = flag(None, "where the adapter's base lies now, if it has moved")
    overwrite: bool = flag(False, "replace a model that is already there")
    trust_remote_code: bool = flag(False, "let a model's own Python code run, as some hub models need")


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    allow_remote_code(config.trust_remote_code)
    set_up("fp32", 0)
    adapter = Path(policy_directory(config.adapter, say))
    record = read_record(adapter)
    is_reward = read_adapter_config(adapter).get("task_type") == "SEQ_CLS"
    check_run_directory(config.output_dir, config.overwrite, [adapter])
    tokenizer, model = load_tokenizer(adapter), load_merged(adapter, base=config.base)
    encoder, directory = Encoder(tokenizer, model), open_run_directory(config.output_dir, config.overwrite, [adapter])
    record = moved_record({key: value for key, value in record.items() if key != "base"}, adapter, directory)
    if is_reward:
        pad_id = reward_pad_token_id(tokenizer, encoder.stop_ids, model.config.vocab_size)
        RewardModel.from_pretrained(adapter, base=config.base).save_pretrained(directory, tokenizer, pad_id)
        write_json(directory / RECORD, record)
        for file in adapter.glob("score_statistics.json"):
            shutil.copy(file, directory)
    else:
        record |= {"fingerprint": fingerprint(model)}
        save_policy(model, encoder, directory, record, rows=recorded_hashes(adapter))
    say(f"saved {directory}")


if __name__ == "__main__":
    main()
