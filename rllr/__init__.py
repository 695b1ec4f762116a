"""rllr: reinforcement learning from human feedback in readable PyTorch, with the label-sensitive reward of RLLR."""

__version__ = "0.2.0"
