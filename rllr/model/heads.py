"""The scalar head of reward and value models, saving and loading."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ..common import ranks
from ..common.files import disk_faults, saving_into, write_json, write_safetensors
from ..layout import Packed, response_places, unflatten
from .backbone import backbone_of, hidden_at, width_of
from .loading import HEAD_BIAS, HEAD_WEIGHT, _require_model_directory, load_backbone, load_merged, read_head
from .peft_format import is_adapter
from .precision import autocast
from .shards import on_whole_weights, whole_tensors


class ScalarHeadModel(nn.Module):
    """A backbone and one linear map to a number. Subclasses say where the number is read and whether it has a bias."""

    has_bias = False

    def __init__(self, backbone, head=None):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        if head is None:
            with autocast(backbone.device):  # in which sharded weights may be put together
                width = on_whole_weights(width_of)(backbone)
            head = nn.Linear(width, 1, bias=self.has_bias, device=backbone.device, dtype=backbone.dtype)
        self.head = head

    def read(self, packed, rows, positions):
        """The head's number at N places (row, position) of packed sequences -> [N], float32 at least."""
        with autocast(self.device):
            return self.scores_at(hidden_at(self, packed, rows, positions))

    def scores_at(self, hidden):
        """The head's number for hidden states [..., H] -> [...], float32 at least (also under autocast)."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            weight, bias = self.head.weight.to(dtype), self.head.bias
            return nn.functional.linear(hidden.to(dtype), weight, None if bias is None else bias.to(dtype)).squeeze(-1)

    @property
    def device(self):
        return self.head.weight.device

    @classmethod
    def from_pretrained(cls, path, *, dtype=torch.float32, device="cpu", base=None):
        """Backbone and head from a directory that `save_pretrained` wrote. InputError where the head is missing."""
        _require_model_directory(path)
        weights = read_head(path)
        if is_adapter(path):
            return cls.with_head(backbone_of(load_merged(path, dtype, device, base)), weights)
        return cls.with_head(load_backbone(path, dtype=dtype, device=device), weights)

    @classmethod
    def with_head(cls, backbone, weights):
        """A backbone and the head `read_head` found; a value model's bias is 0 where the head has none."""
        weight, bias = weights[HEAD_WEIGHT], weights.get(HEAD_BIAS)
        head = nn.Linear(weight.shape[1], 1, bias=cls.has_bias, device=backbone.device, dtype=backbone.dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
            if cls.has_bias:
                head.bias.copy_(bias if bias is not None else torch.zeros(1))
        return cls(backbone, head).eval()

    def save_pretrained(self, path, tokenizer=None, pad_token_id=None):
        """Weights as safetensors, config and tokenizer; of a role on a shared base only its adapter and head (PEFT's
        format).

        The names are those of the family's sequence classifier, so where transformers has that class and the head has
        no bias the directory loads as `AutoModelForSequenceClassification` with equal scores. That class reads the
        last token that is not `pad_token_id`, which therefore must differ from every stop id (`reward_pad_token_id`).
        """
        head = {HEAD_WEIGHT: self.head.weight} | ({HEAD_BIAS: self.head.bias} if self.has_bias else {})
        is_role = hasattr(self.backbone, "save_role")  # on a shared base
        state = whole_tensors(head if is_role else self._classifier_state() | head)
        if not ranks.is_first():
            return
        with disk_faults(f"model {path}"), saving_into(path) as temporary:
            if is_role:
                self.backbone.save_role(temporary, state)
            else:
                self._save_whole(temporary, state, pad_token_id)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)

    def _classifier_state(self):
        """The decoder's weights under the names that they have in a sequence classifier."""
        causal_lm: Any = AutoModelForCausalLM._model_mapping[type(self.config)]
        prefix = causal_lm.base_model_prefix
        return {f"{prefix}.{name}": tensor for name, tensor in self.backbone.state_dict(keep_vars=True).items()}

    def _save_whole(self, path, state, pad_token_id):
        write_safetensors(state, path / "model.safetensors")
        config = self.config.to_dict()
        classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        config |= {
            "architectures": [classes.get(self.config.model_type, type(self).__name__)],
            "pad_token_id": pad_token_id,
        }
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "dtype": "float32"}
        write_json(path / "config.json", config)


class RewardModel(ScalarHeadModel):
    """r(prompt, response): the head at the last response token.

    The head has no bias (Bradley-Terry leaves the zero free) and starts at N(0, 1 / (H + 1)), as in Stiennon et al.
    (arXiv:2009.01325).
    """

    @classmethod
    def from_policy(cls, policy, seed=0):
        """A new reward model on a policy's backbone (the same object, not a copy). The head is drawn from `seed`."""
        model = cls(backbone_of(policy))
        generator = torch.Generator().manual_seed(seed)
        width = model.head.in_features
        with torch.no_grad():
            model.head.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
        return model

    def forward(self, sequences, prompt_lens, response_mask):
        """sequences [B, T], prompt_lens [B], response_mask [B, R] -> scores [B], float32."""
        packed = Packed(sequences, prompt_lens, response_mask)
        last = packed.lengths - 1  # the last response token itself: EOS, or where the answer was cut
        rows = torch.arange(len(sequences), device=sequences.device)
        return self.read(packed, rows, last)

    def span_scores(self, sequences, prompt_lens, response_mask):
        """The head at every response token [B, R], 0 outside the mask; only `--loss span` trains on these."""
        rows, positions = response_places(prompt_lens, response_mask)
        scores = self.read(Packed(sequences, prompt_lens, response_mask), rows, positions + 1)
        return unflatten(scores, response_mask)


class ValueModel(ScalarHeadModel):
    """V(s_t) of every response token, read where it is predicted. The head has a bias and starts at zero."""

    has_bias = True

    @classmethod
    def from_policy(cls, policy):
        """A new value model on a policy's backbone (the same object, not a copy), with a zero head."""
        model = cls(backbone_of(policy))
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model

    def rescale(self, mean, std):
        """From raw to standardised units of the reward: w <- w / std, b <- (b - mean) / std."""
        with torch.no_grad():
            self.head.weight.div_(std)
            self.head.bias.sub_(mean).div_(std)
        return self

    def forward(self, sequences, prompt_lens, response_mask):
        """sequences [B, T], prompt_lens [B], response_mask [B, R] -> values [B, R], float32, 0 outside the mask."""
        rows, positions = response_places(prompt_lens, response_mask)
        return unflatten(self.read(Packed(sequences, prompt_lens, response_mask), rows, positions), response_mask)


def reward_pad_token_id(tokenizer, stop_ids, vocabulary_size):
    """A pad id that is no stop id: the tokenizer's own, an unknown-token or other special id, else None.

    None means a classifier that reads "the last token that is not padding" works on one row at a time only.
    """
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    known = set(tokenizer.get_vocab().values())
    candidates += [i for i in range(vocabulary_size) if i not in known][:1]  # an embedding row no text ever uses
    good = [i for i in candidates if i is not None and i not in stop_ids and 0 <= i < vocabulary_size]
    return next((i for i in good if i != tokenizer.bos_token_id), None)
