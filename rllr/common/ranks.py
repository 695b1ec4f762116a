"""The processes that torchrun has started for one run: data parallel. With one process, the ordinary case, nothing here
does anything.

    torchrun --nproc_per_node 2 train_ppo.py ...

Every rank has the same weights (with --shard its part of them: `model.shards`) and the whole batch, and takes every
decision by itself from the same numbers. What takes time is shared out: each rank answers its share of the prompts
(`rollout.generate`), scores its share of the rows (`judge.score_rows`, `update.analyse`) and goes backward over its
share of a batch; then answers, scores and gradients are put together on every rank. So token means, whitening, KL,
score statistics, guard, metrics and the best policy are those of the whole batch without further ado. Rank 0 alone
prints and writes.
"""

import atexit
import os
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import RunError, may_tell, out_of_memory

LETTING_GO = 0.2  # seconds in which gloo's threads drop their last tensors: once Python has ended, that aborts
OF_COLLECTIVES = ("gloo", "Gloo", "NCCL", "nccl", "Connection closed by peer")  # words of their errors
LONGEST = timedelta(hours=12)  # that a rank waits for another: one of them may write rationales or checkpoints alone


joined = False  # whether this process has met the others; a process group of somebody else's is not ours to use


def count() -> int:
    """How many processes make this run."""
    return dist.get_world_size() if joined else 1


def rank() -> int:
    return dist.get_rank() if joined else 0


def is_first() -> bool:
    return rank() == 0


def start():
    """Meet the other ranks, where torchrun has started this process. Called once, before a run prints or reads
    anything."""
    global joined
    if joined or "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST)
    joined = True
    atexit.register(end)
    may_tell[:] = [first_to_fail]


def end():
    global joined
    if joined:
        joined = False
        time.sleep(LETTING_GO)
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no other rank has failed before this one: what one rank tells of, the others need not repeat."""
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except Exception:  # the rank that keeps the store is gone, and has told of it
        return is_first()


# ---- sharing out, and putting together -------------------------------------------------------------------------------


def share(items):
    """This rank's part of a list: every count()-th, from its own number on."""
    return items[rank() :: count()]


def each(value) -> list:
    """What every rank has, by rank: [its own] with one process."""
    if count() == 1:
        return [value]
    found: list = [None] * count()
    with telling_of_lost_ranks():
        dist.all_gather_object(found, value)
    return found


def from_first(make):
    """make() of rank 0, on every rank."""
    if count() == 1:
        return make()
    box = [make() if is_first() else None]
    with telling_of_lost_ranks():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def add(*tensors):
    """Sum each tensor over the ranks, in place."""
    if count() > 1:
        with telling_of_lost_ranks():
            for tensor in tensors:
                dist.all_reduce(tensor)


def add_gradients(parameters):
    """Sum the gradients over the ranks. A weight that this rank's share did not reach counts 0."""
    if count() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    add(*(parameter.grad for parameter in parameters))


def total(number) -> float:
    """The sum of a number over the ranks."""
    return sum(each(number))


def wait():
    """Until every rank has come here: what one has written, all can read."""
    if count() > 1:
        with telling_of_lost_ranks():
            dist.barrier()


@contextmanager
def own_dropout(seed, step):
    """A random stream for this rank and step alone, so that ranks do not drop the same units of their rows. Without
    effect in one process."""
    if count() == 1:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(hash((seed, step, rank())) % 2**63)  # of numbers, so the same in every process
        yield


@contextmanager
def telling_of_lost_ranks():
    """Within: a rank that is gone is a RunError in words."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunError) or out_of_memory(error):
            raise
        raise _lost(error) from None


def lost_rank(error):
    """The RunError that says so where an exception of FSDP's own collectives means that another rank is gone."""
    ours = isinstance(error, RunError) or not isinstance(error, RuntimeError) or count() == 1
    return _lost(error) if not ours and any(word in str(error) for word in OF_COLLECTIVES) else None


def _lost(error):
    first = (str(error).splitlines() or [""])[0]
    return RunError(f"rank {rank()}: another rank has ended, which says why ({first:.80}).")
