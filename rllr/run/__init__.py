"""The life of a run: begun, checkpointed, stopped, resumed; its records and its optimiser."""

from .run import Run

__all__ = ["Run"]
