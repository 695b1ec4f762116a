"""The life of a run: it begins, writes checkpoints, stops, goes on; its settings, its machine and its optimiser."""


def __getattr__(name):  # on demand: whoever needs the optimiser alone does not load checkpoints and file writing
    if name == "Run":
        from .run import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
