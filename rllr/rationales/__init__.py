"""Who writes rationales."""

from .writers import EvidenceWriter, GivenWriter, RationaleWriter, make_writer

__all__ = ["EvidenceWriter", "GivenWriter", "RationaleWriter", "make_writer"]
