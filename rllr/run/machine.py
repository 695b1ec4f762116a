"""The machine a run is on: device, autocast, allocator, versions."""

import ctypes
import os
import sys

import torch
import transformers


def machine():
    """What a run's bits hang on beside its settings."""
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def set_up(precision, seed, deterministic=False):
    """Quiet libraries, the device, allocator settings. Returns (device, autocast): use `with autocast():` in forwards.

    deterministic: a GPU computes the same bits every time; an operation that cannot is named in a warning.
    """
    import transformers

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    return device, autocast


def keep_freed_memory():
    """Ask glibc to keep freed blocks instead of giving each large tensor back to the kernel.

    On CPU every step frees and takes the same large blocks; without page faults training ran a third faster here
    (docs). Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, limit = -1, -3, 2**30
    mallopt(M_MMAP_THRESHOLD, limit)
    mallopt(M_TRIM_THRESHOLD, 2 * limit - 1)
