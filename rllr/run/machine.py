"""The machine a run is on: device, precision, allocator, versions."""

import ctypes
import os
import sys

import torch
import transformers

from ..common import ranks
from ..model.passes import set_recording
from ..model.precision import set_precision


def machine():
    """What a run's bits hang on beside its settings."""
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "processes": ranks.count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def set_up(precision, seed, deterministic=False, spare_memory=False, cuda_graphs=False):
    """Set the precision of every forward, quiet the libraries, prepare the allocator; returns the device.

    deterministic: a GPU computes the same bits every time; an operation that cannot do so is named in a warning.
    spare_memory: freed memory goes back to the system at once, which is what sharded weights are for; it takes time.
    cuda_graphs: a GPU's passes of whole sequences are recorded (`model.passes`).
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory(2**17 if spare_memory else 2**30)
    torch.manual_seed(seed)
    set_precision(precision)
    set_recording(cuda_graphs)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wants_cuda_graphs(config):
    """Whether passes of whole sequences are recorded where a GPU is. Not if every bit counts, as a recorded kernel may
    add up in another order, and not among several processes, which nobody has tried."""
    return config.cuda_graphs == "auto" and not config.deterministic and ranks.count() == 1


def keep_freed_memory(limit=2**30):
    """Ask glibc to keep freed blocks of up to `limit` bytes instead of giving each large tensor back to the kernel.

    On a CPU every step frees and takes the same large blocks. Without the page faults training ran a third faster
    (docs/performance.md). Without glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_MMAP_THRESHOLD, limit)
    mallopt(M_TRIM_THRESHOLD, 2 * limit - 1)
