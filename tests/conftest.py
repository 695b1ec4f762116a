"""Shared fixtures. One thread and fixed hypothesis examples: every run of the suite computes the same numbers."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from families import FAMILIES, tiny_model, toy_tokenizer
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

from rllr.model.precision import set_precision

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_FAST = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("rllr", max_examples=40, **_FAST)
settings.register_profile("mutate", max_examples=15, phases=[Phase.explicit, Phase.generate], **_FAST)
settings.load_profile(os.environ.get("RLLR_HYPOTHESIS", "rllr"))


@pytest.fixture(params=FAMILIES)
def family(request):
    """The name of each model family in turn."""
    return request.param


@pytest.fixture
def model(family):
    """A fresh tiny causal LM of each family in turn."""
    return tiny_model(family)


@pytest.fixture
def llama():
    """A fresh tiny Llama, for what does not depend on the family."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """The toy tokenizer without a pad token, like Llama's and GPT-2's. Do not change it in a test."""
    return toy_tokenizer()


@pytest.fixture(scope="session")
def toy():
    """The toy task with its SFT policy and two reward models. Do not change them in a test."""
    from toy_runs import toy_runs  # here: it imports the scripts, which most tests do without

    return toy_runs()


@pytest.fixture(scope="session")
def undisturbed(toy, tmp_path_factory):
    """undisturbed(name) -> directory of a run of `stopping.RUNS` that nobody stops; made once. Do not change it in a
    test."""
    from stopping import stage_of
    from toy_runs import run

    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("undisturbed") / "run"
            main, flags = stage_of(toy, name, made[name])
            run(main, *flags)
        return made[name]

    return make


@pytest.fixture
def rng():
    """A seeded torch generator."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def plain_precision():
    """A script that a test runs sets the precision of the whole process; the next test finds fp32 again."""
    yield
    set_precision("fp32")
