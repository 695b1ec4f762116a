"""Choose a writer by its name, and check that it has what it needs."""

from dataclasses import dataclass

from ..common.config import flag
from ..common.errors import InputError
from .cached import CACHE
from .endpoint_writer import EndpointConfig, EndpointWriter, require_library
from .writers import DemoWriter, EvidenceWriter, GivenWriter

WRITERS = ("given", "evidence", "demo", "model", "endpoint")


@dataclass
class RationaleConfig(EndpointConfig):
    """Who writes rationales, shared by SFT and the reward model."""

    GROUP = "rationales"
    rationales: str | None = flag(
        None,
        "who writes them: given, evidence, demo, model, endpoint (SFT: by the data, see "
        "docs/real-data.md; RM: the policy's writer)",
        choices=WRITERS,
    )
    rationale_model: str | None = flag(None, "the causal LM that writes them, for --rationales model")


def make_writer(name, examples, task, *, config=None, device="cpu", directory=".", log=print, also=()):
    """The writer of that name for the labelled rows. InputError for an unknown name.

    `also`: further rows that it may have to write about, and that do not count as evidence. For the writer `model`,
    config.rationale_model names the causal LM, for `endpoint` config is an EndpointConfig; <directory>/rationales.jsonl
    is the cache of what they write.
    """
    if name == "endpoint":
        return EndpointWriter([*examples, *also], task, config, f"{directory}/{CACHE}", log=log)
    if name == "model":
        from ..data.encoding import Encoder
        from ..model.loading import load_policy, load_tokenizer
        from .model_writer import ModelWriter

        source = getattr(config, "rationale_model", None)
        if not source:
            raise InputError("--rationales model needs --rationale_model, the causal LM that writes them")
        model = load_policy(source, device=device)
        encoder = Encoder(load_tokenizer(source), model)
        return ModelWriter([*examples, *also], task, model, encoder, f"{directory}/{CACHE}", log=log)
    if name == "evidence":
        return EvidenceWriter(examples, task, log)
    classes = {"given": GivenWriter, "demo": DemoWriter}
    if name not in classes:
        raise InputError(f"--rationales {name!r}: choose from {', '.join(WRITERS)}")
    return classes[name](examples, task)


def check_writer(config, examples, task):
    """InputError if a run's writer lacks what it needs. Called before it writes anything; loads no language model."""
    name = config.rationales
    if config.rationale_rows and name in ("evidence", "model", "endpoint"):
        raise InputError(
            f"--rationale_rows {config.rationale_rows}: is for rationales in the data; --rationales {name} writes one "
            "for every row"
        )
    if name == "endpoint":
        config.check_endpoint()
        require_library()
    elif name != "model":
        make_writer(name, examples, task, log=lambda line: None)
    elif not config.rationale_model:
        raise InputError("--rationales model needs --rationale_model, the causal LM that writes them")


def default_writer(task, examples):
    """The writer's name: demo for the demo data, given if some rows have rationales, else evidence."""
    if task.name == "demo":
        return "demo"
    return "given" if any(example.rationale or example.rationales for example in examples) else "evidence"


def default_label_pairs(writer_name):
    """The default of --label_pairs, which says how label-sensitive pairs draw rationales: see `rllr.pairs`."""
    return {"evidence": "independent", "demo": "drawn"}.get(writer_name, "paper")
