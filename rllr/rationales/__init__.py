"""Writers of rationales: given in the data, evidence words, the demo's own, a language model."""

from .factory import make_writer
from .writers import EvidenceWriter, GivenWriter, RationaleWriter

__all__ = ["EvidenceWriter", "GivenWriter", "RationaleWriter", "make_writer"]
