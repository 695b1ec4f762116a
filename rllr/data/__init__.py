"""Files become rows, rows become splits, texts become ids."""

from .row_reader import parse_mapping_flag
from .rows import Source, load_examples, load_hub_examples, load_pairs, select_labelled, split_holdout

__all__ = [
    "Source",
    "load_examples",
    "load_hub_examples",
    "load_pairs",
    "parse_mapping_flag",
    "select_labelled",
    "split_holdout",
]
