"""Models: backbones and heads, loading, adapters, the roles they play."""

from .backbone import backbone_of, lm_logits
from .heads import RewardModel, ValueModel
from .loading import allow_remote_code, fingerprint, load_policy, load_tokenizer

__all__ = [
    "RewardModel",
    "ValueModel",
    "allow_remote_code",
    "backbone_of",
    "fingerprint",
    "lm_logits",
    "load_policy",
    "load_tokenizer",
]
