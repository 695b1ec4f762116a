"""Started by torchrun (test_ranks.py): a script whose sharded layers are put together in bfloat16, which elsewhere only
a GPU does.

    rank_low.py train_ppo.py --shard --precision bf16 ...
"""

import importlib
import sys

from rllr.model import shards

if __name__ == "__main__":
    shards.LOW_ON = ("cuda", "cpu")
    importlib.import_module(sys.argv[1].removesuffix(".py")).main(sys.argv[2:])
