"""Rationales written by a local language model."""

from ..answers import texts_of, write_answers
from ..model.trial import check_policy
from .cached import CachedWriter, one_line


class ModelWriter(CachedWriter):
    """Rationales by a local causal LM. Our own rollouts write them."""

    def __init__(self, examples, task, model, encoder, cache_file, *, max_new_tokens=64, batch_size=16, log=print):
        question = encoder.prompt_ids(self.INSTRUCTION.format(question="", label=max(task.labels, key=len)))
        fitted = encoder.fit(examples, task, max_new_tokens + len(question), log)
        if fitted:
            check_policy(model, encoder, task, fitted, max_new_tokens=max_new_tokens, name="--rationale_model")
        self.model, self.encoder, self.max_new_tokens, self.batch_size = model, encoder, max_new_tokens, batch_size
        super().__init__(examples, task, cache_file, asked=fitted, source=model.config.name_or_path, log=log)

    def write_missing(self, missing):
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            prompts = [self.encoder.prompt_ids(self.prompt(example, label)) for example, label in batch]
            limits = {"max_new_tokens": self.max_new_tokens, "batch_size": len(prompts)}
            rollout = write_answers(self.model, self.encoder, prompts, **limits)
            for (example, label), text in zip(batch, texts_of(rollout, self.encoder)):
                yield example, label, one_line(text) or "no reason given", {}
