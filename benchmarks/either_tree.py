"""Calls that work in this tree and in older ones, whose functions take other arguments or lie in other files."""

import importlib
import pkgutil
from contextlib import contextmanager

import torch


def find(name, *likely):
    """The function or class of that name: in one of the likely modules, else in whichever module of rllr defines it."""
    import rllr

    every = (module.name for module in pkgutil.walk_packages(rllr.__path__, "rllr.") if "__main__" not in module.name)
    for module_name in (*likely, *every):
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError):
            continue
        if module_name in likely or getattr(found, "__module__", None) == module_name:
            return found
    raise ImportError(f"no module of rllr defines {name}")


@contextmanager
def autocast(device, on=True):
    """bf16 products of fp32 weights within the block, by rllr's own switch where there is one."""
    try:
        from rllr.model.precision import set_precision
    except ImportError:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=on):
            yield
    else:
        set_precision("bf16" if on else "fp32")
        try:
            yield
        finally:
            set_precision("fp32")


def packed_rows(prompts, responses, device):
    """Token ids in the layout that the scoring functions read: sequences, prompt_lens, response_mask."""
    return find("pack_sequences", "rllr.layout")(prompts, responses, 0, device)


def logprobs_of(model, rows, temperature=1.0):
    """`token_logprobs` of rows [sequences, prompt_lens, response_mask]."""
    from rllr.logprobs import token_logprobs

    return token_logprobs(model, *rows, temperature)
