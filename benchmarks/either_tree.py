"""Calls that work in this tree and in older ones, whose functions take other arguments or lie in other files."""

import importlib
import inspect
import pkgutil
from contextlib import contextmanager, nullcontext

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


def by_name(function, **values):
    """function(...) with those of the values that it has parameters for."""
    parameters = inspect.signature(function).parameters
    return function(**{name: value for name, value in values.items() if name in parameters})


@contextmanager
def autocast(device, on=True):
    """bf16 products of fp32 weights within the block, by rllr's own switch where there is one."""
    try:
        from rllr.model.backbone import set_autocast
    except ImportError:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=on):
            yield
    else:
        set_autocast(on)
        try:
            yield
        finally:
            set_autocast(False)


def autocast_of_acts(device):
    """(context to be in, argument `autocast`) for `analyse`, `improve` and judges: older ones take the argument, for
    newer ones the switch above is on."""
    try:
        from rllr.model.backbone import set_autocast  # noqa: F401
    except ImportError:
        return nullcontext, lambda: torch.autocast(device, dtype=torch.bfloat16)
    return lambda: autocast(device), nullcontext


def packed_rows(prompts, responses, device):
    """Token ids in the layout that the scoring functions read: sequences, prompt_lens, response_mask."""
    return find("pack_sequences", "rllr.layout")(prompts, responses, 0, device)


def logprobs_of(model, rows, temperature=1.0):
    """`token_logprobs` of rows [sequences, prompt_lens, response_mask]."""
    from rllr.logprobs import token_logprobs

    try:
        from rllr.layout import Packed
    except ImportError:
        return token_logprobs(model, *rows, temperature)
    return token_logprobs(model, Packed(*rows), temperature)


def rows_of(rollout):
    """(sequences, prompt_lens, response_mask) of a rollout."""
    packed = getattr(rollout, "packed", None)
    return tuple(packed) if packed is not None else (rollout.sequences, rollout.prompt_lens, rollout.response_mask)
