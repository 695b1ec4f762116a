"""Models: backbones and heads, loading, adapters, the roles they play."""

from .loading import RewardModel, ValueModel, backbone_of, fingerprint, load_policy, load_tokenizer

__all__ = ["RewardModel", "ValueModel", "backbone_of", "fingerprint", "load_policy", "load_tokenizer"]
