"""Text becomes token ids here, in one place for all three stages, and becomes text again.

    encode(rendered prompt) + encode(answer, no special tokens) + [end token]

The prompt is rendered once: through the tokenizer's chat template where there is one (then encoded without special
tokens, because the template already holds them), else through a plain template, with BOS once if the tokenizer adds it.
"""

import dataclasses
import functools

from .errors import InputError
from .model import context_length, stop_token_ids

PLAIN_TEMPLATE = "{prompt}\n"
DEFAULT_CONTEXT = 2048  # for architectures without a limit of their own (Bloom)
CHARACTERS_SPARE = 4  # times a token's own length: so many characters of a text it may stand for (normalisation drops some)


class Encoder:
    """Prompts and answers of one model as token ids.

    stop_ids end an answer in rollouts; end_id is the one that SFT teaches: the chat template's end-of-turn token where
    there is a template, else the tokenizer's EOS, else the first stop id.
    """

    def __init__(self, tokenizer, model):
        self.tokenizer = tokenizer
        self.stop_ids = stop_token_ids(model, tokenizer)
        vocabulary_size = model.get_input_embeddings().num_embeddings
        self.end_id = self._end_id(vocabulary_size)
        if self.end_id not in self.stop_ids:
            self.stop_ids.append(self.end_id)
        limits = [context_length(model), getattr(tokenizer, "model_max_length", None)]
        self.context = min([limit for limit in limits if limit and limit < 10**9], default=DEFAULT_CONTEXT)
        pad_id = tokenizer.pad_token_id
        self.pad_id = pad_id if pad_id is not None and pad_id < vocabulary_size else None  # None: any id fills padding
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special_tokens = [
            token for token in dict.fromkeys([*added, *tokenizer.all_special_tokens]) if len(token) > 1
        ]

    def _plain(self, text):
        """A text in which no special token is spelled out: "</s>" in a user's data must not end a turn. A space breaks it."""
        for token in self.special_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _end_id(self, vocabulary_size):
        candidates = [self._end_of_turn(), self.tokenizer.eos_token_id, *self.stop_ids]
        for candidate in candidates:
            if candidate is not None and 0 <= candidate < vocabulary_size:
                return candidate
        raise InputError(
            f"{self.tokenizer.name_or_path}: neither the generation config, the chat template nor the tokenizer names "
            "an end-of-text token; set eos_token in tokenizer_config.json"
        )

    def _end_of_turn(self):
        """The special token that a chat template writes right after an assistant's message, if it writes one."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        marker = "rllr-answer"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
        after = self.tokenizer.encode(rendered.rpartition(marker)[2].strip(), add_special_tokens=False)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return after[0] if after and after[0] in special.union(self.tokenizer.all_special_ids) else None

    @functools.cached_property
    def longest_token(self):
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt as the model is asked it."""
        prompt = self._plain(prompt)
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}]
            rendered = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            return self.tokenizer.encode(rendered, add_special_tokens=False)
        ids = self.tokenizer.encode(PLAIN_TEMPLATE.format(prompt=prompt), add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer.encode("a", add_special_tokens=True)[:1] == [bos]
        return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer with the token that ends it."""
        return self.tokenizer.encode(self._plain(answer), add_special_tokens=False) + [self.end_id]

    def decode(self, response: list[int]) -> str:
        """The text of a response without the stop token that ended it. Special tokens inside it stay visible."""
        if response and response[-1] in self.stop_ids:
            response = response[:-1]
        return self.tokenizer.decode(response, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fit(self, examples, task, reserve, log=print):
        """The examples with texts cut so that prompt and `reserve` tokens of answer fit the context.

        The longer text of a pair loses its end; the template and the answer never do. Cut rows are counted and the first
        few named. Raises InputError where the template alone does not fit.
        """
        budget = self.context - reserve
        empty = len(self.prompt_ids(task.render_prompt("", "")))
        if empty >= budget:
            raise InputError(
                f"task {task.name!r}: the prompt template takes {empty} tokens and the answer {reserve}, more than the "
                f"model's context of {self.context}; shorten the prompt or lower --max_new_tokens"
            )
        fitted = [self._cut(example, task, budget) for example in examples]
        cut = [new.id for new, old in zip(fitted, examples) if new is not old]
        if cut:
            log(
                f"{len(cut)} of {len(examples)} texts were cut to fit the context of {self.context} tokens: {_name(cut)}"
            )
        return fitted

    def _cut(self, example, task, budget):
        # What cannot fit by its mere length is not tokenised first: ten megabytes would take half a minute and gigabytes.
        most = CHARACTERS_SPARE * budget * self.longest_token
        for name in ("text", "text_b"):
            if len(getattr(example, name) or "") > most:
                example = dataclasses.replace(example, **{name: getattr(example, name)[:most]})
        while True:
            excess = len(self.prompt_ids(task.render_prompt(example.text, example.text_b))) - budget
            if excess <= 0:
                return example
            longer = "text_b" if task.is_pair and len(example.text_b or "") > len(example.text) else "text"
            example = dataclasses.replace(example, **{longer: self._shorten(getattr(example, longer), excess)})

    def _shorten(self, text, excess):
        """The text without its last `excess` tokens, and by one character at least."""
        if self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, end in ids["offset_mapping"] if end > start]
            keep = starts[max(0, len(starts) - excess)] if starts else 0
        else:  # no offsets: in proportion
            count = len(self.tokenizer.encode(text, add_special_tokens=False))
            keep = len(text) * max(0, count - excess) // max(1, count)
        return text[: min(keep, len(text) - 1)].rstrip()


def _name(ids, shown=3):
    return ", ".join(map(str, ids[:shown])) + (", ..." if len(ids) > shown else "")
