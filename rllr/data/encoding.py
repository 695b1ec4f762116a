"""Text becomes token ids here, in one place for all three stages, and becomes text again.

    encode(rendered prompt) + encode(answer, no special tokens) + [end token]

The prompt is rendered once: through the tokenizer's chat template where there is one (then encoded without special
tokens, because the template already holds them), else through a plain template, with BOS once if the tokenizer adds it.
"""

import dataclasses
import functools
from array import array
from typing import NamedTuple

from ..common.errors import InputError
from ..common.log import say
from ..engine.limits import length_limit
from ..tasks import parse_answer
from .chat import ChatTemplate, squeeze

PLAIN_TEMPLATE = "{prompt}\n"
DEFAULT_CONTEXT = 2048  # for architectures without a limit of their own (Bloom)
MANY_UNKNOWN = 0.2  # share of a prompt's tokens that the tokenizer does not know, above which a warning is due
CHARACTERS_SPARE = 4  # times a token's length: the most characters of a text it stands for (normalisation drops some)


class AnswerRow(NamedTuple):
    """A prompt and the answer that SFT learns to give to it."""

    prompt_ids: list[int]
    answer_ids: list[int]  # the end token included
    id: str  # of the row
    name: str  # of the row, as messages call it (`Example.name`)

    @property
    def length(self):
        return len(self.prompt_ids) + len(self.answer_ids)


class Encoder:
    """Prompts and answers of one model as token ids.

    stop_ids end an answer in rollouts; end_id is the one that SFT teaches: the chat template's end-of-turn token where
    there is a template, else the tokenizer's EOS, else the first stop id. context: tokens of prompt and answer
    together, the shortest of what the model, its attention windows and the tokenizer allow. clock: the moment that a
    template which prints the date is given (`rllr.data.chat`); None: now. InputError where the tokenizer or its
    template cannot be used.
    """

    def __init__(self, tokenizer, model, clock=None):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path or type(tokenizer).__name__
        self.chat = ChatTemplate(tokenizer, clock) if getattr(tokenizer, "chat_template", None) else None
        self.stop_ids = stop_token_ids(model, tokenizer)
        self.vocabulary_size = model.get_input_embeddings().num_embeddings
        self.end_id = self._end_id()
        if self.end_id not in self.stop_ids:
            self.stop_ids.append(self.end_id)
        own_limit = (getattr(tokenizer, "model_max_length", None), "the tokenizer's model_max_length")
        limits = [(tokens, why) for tokens, why in (length_limit(model), own_limit) if tokens and tokens < 10**9]
        shortest: tuple[int, str] = min(limits, default=(DEFAULT_CONTEXT, "the default"))
        self.context, self.context_reason = shortest
        pad_id = tokenizer.pad_token_id
        known = pad_id is not None and pad_id < self.vocabulary_size
        self.pad_id = pad_id if known else None  # None: any id fills padding
        self.empty_prompts = {}  # task: tokens of its prompt without a text
        self.kept_ids = {}  # {prompt: its ids, as an array: a list of numbers takes nine times the memory}
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special_tokens = [
            token for token in dict.fromkeys([*added, *tokenizer.all_special_tokens]) if len(token) > 1
        ]

    @property
    def clock(self):
        """The moment that this model's template shows, as text for a record; None where it shows none."""
        return self.chat.clock.isoformat() if self.chat and self.chat.prints_time else None

    def _plain(self, text):
        """A text in which a space breaks every special token: "</s>" in a user's data must not end a turn."""
        for token in self.special_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _end_id(self):
        candidates = [self._end_of_turn(), self.tokenizer.eos_token_id, *self.stop_ids]
        for candidate in candidates:
            if candidate is not None and 0 <= candidate < self.vocabulary_size:
                return candidate
        raise InputError(
            f"{self.name}: neither the generation config, the chat template nor the tokenizer names "
            "an end-of-text token; set eos_token in tokenizer_config.json"
        )

    def _end_of_turn(self):
        """The special token that a chat template writes right after an assistant's message, if it writes one."""
        if self.chat is None:
            return None
        after = self.tokenizer.encode(self.chat.after_answer().strip(), add_special_tokens=False)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return after[0] if after and after[0] in special.union(self.tokenizer.all_special_ids) else None

    @functools.cached_property
    def longest_token(self):
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def prompts(self, task, examples) -> list[list[int]]:
        """Ids of the rows' prompts, as the model is asked them. Rows that `fit` returned are not tokenised again."""
        return [self.prompt_ids(task.prompt_of(example)) for example in examples]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of one prompt (`Task.prompt_of`). Those of rows that `fit` has measured are kept, and looked up here."""
        kept = self.kept_ids.get(prompt)
        return self._encode_prompt(prompt) if kept is None else kept.tolist()

    def _encode_prompt(self, prompt):
        prompt = self._plain(prompt)
        if self.chat:
            return self._known(self.tokenizer.encode(self.chat.render(prompt), add_special_tokens=False))
        ids = self.tokenizer.encode(PLAIN_TEMPLATE.format(prompt=prompt), add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer.encode("a", add_special_tokens=True)[:1] == [bos]
        return self._known([bos, *ids] if adds_bos and ids[:1] != [bos] else ids)

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer with the token that ends it."""
        return self._known(self.tokenizer.encode(self._plain(answer), add_special_tokens=False) + [self.end_id])

    def _known(self, ids):
        """The ids themselves. InputError where one has no row in the model's embedding."""
        beyond = max(ids, default=0)
        if beyond >= self.vocabulary_size:
            token = self.tokenizer.convert_ids_to_tokens(beyond)
            raise InputError(
                f"{self.name}: its tokenizer writes {token!r} as id {beyond}, but the model's embedding "
                f"has {self.vocabulary_size} rows: tokens were added without "
                "model.resize_token_embeddings(len(tokenizer)); do that and save the model again"
            )
        return ids

    def decode(self, response: list[int]) -> str:
        """The text of a response without the stop token that ended it. Special tokens inside it stay visible."""
        if response and response[-1] in self.stop_ids:
            response = response[:-1]
        return self.tokenizer.decode(response, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def check(self, task, example, log=None):
        """Show one prompt as the model sees it, and read it and an answer with each label back.

        InputError, with both strings, where the text is not in the prompt, or where a label does not come back from the
        tokenizer: nothing could ever learn it. log gets the prompt and what is to be known of its template.
        """
        prompt = self._plain(task.prompt_of(example))
        ids = self.prompt_ids(prompt)
        seen = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        own = self.tokenizer.decode(
            self.tokenizer.encode(prompt, add_special_tokens=False), clean_up_tokenization_spaces=False
        )
        if squeeze(own) not in squeeze(seen):
            raise InputError(
                f"{self.name}: the prompt {own!r:.300} is lost; the model would "
                f"see {seen!r:.600}; mend its chat_template"
            )
        for label in task.labels:
            answer = task.render_answer(label, "a reason")
            back = self.decode(self.answer_ids(answer))
            if parse_answer(task, back) != label:
                raise InputError(
                    f"{self.name}: its tokenizer turns the answer {answer!r} into {back!r}, from which the "
                    f"label {label!r} cannot be read; rename the label in a task file, take --answer_format "
                    "label where only the line break is lost, or another model"
                )
        if log:
            for note in self.chat.notes if self.chat else ():
                log(note)
            log(f"a prompt as the model sees it ({len(ids)} tokens): {seen!r:.2000}")
            unknown = sum(i == self.tokenizer.unk_token_id for i in ids)
            if unknown > MANY_UNKNOWN * len(ids):
                log(
                    f"warning: {unknown} of its {len(ids)} tokens are unknown to the "
                    "tokenizer, which cannot write these texts"
                )

    def fit(self, examples, task, reserve, log=print):
        """The examples with texts cut so that prompt and `reserve` tokens of answer fit the context.

        The longer text of a pair loses its end; the template and the answer never do. Cut rows are counted and the
        first few named. Raises InputError where the template alone does not fit.
        """
        fitted = [self._cut(example, task, self._budget(task, reserve)) for example in examples]
        self._tell_cut([new.name for new, old in zip(fitted, examples) if new is not old], len(examples), log)
        return fitted

    def _tell_cut(self, cut, total, log):
        if cut:
            log(
                f"{len(cut)} of {total} texts were cut to fit the context of {self.context} tokens "
                f"({self.context_reason}): {_name(cut)}"
            )

    def _budget(self, task, reserve, whose=""):
        """Tokens that a prompt may have. InputError where the template alone has more."""
        empty = self._empty_prompt(task)
        if empty >= self.context - reserve:
            remedy = "shorten the rationale" if whose else "shorten the prompt or lower --max_new_tokens"
            raise InputError(
                f"{whose or f'task {task.name!r}'}: the prompt template takes {empty} tokens and the answer "
                f"{reserve}, more than the "
                f"model's context of {self.context} ({self.context_reason}); {remedy}"
            )
        return self.context - reserve

    def _empty_prompt(self, task):
        if task not in self.empty_prompts:
            self.empty_prompts[task] = len(self.prompt_ids(task.render_prompt("", "")))
        return self.empty_prompts[task]

    def rows(self, examples, task, write, reserve, log=print):
        """[`AnswerRow`] to learn from: `write(example)` gives the answer's text.

        examples: cut so that `reserve` tokens are left for an answer (`fit`). Longer answers are counted and named,
        and their texts cut further, so that each row fits the context. InputError where an answer alone does not fit.
        """
        rows, cut, long = [], [], []
        for example in examples:
            answer, fitted = self.answer_ids(write(example)), example
            if len(answer) > reserve:
                long.append((len(answer), example.name))
                fitted = self._cut(example, task, self._budget(task, len(answer), f"row {example.name}"))
                cut += [example.name] if fitted is not example else []
            rows.append(AnswerRow(self.prompt_ids(task.prompt_of(fitted)), answer, example.id, example.name))
        self._tell_cut(cut, len(examples), log)
        if long:
            log(
                f"warning: {len(long)} of {len(examples)} answers are longer than --max_new_tokens {reserve}: "
                f"{_name([i for _, i in long])}. "
                f"The policy would learn to write what is then cut, without a label; raise it to {max(long)[0]}, or "
                "shorten the rationales"
            )
        return rows

    def _cut(self, example, task, budget):
        # What cannot fit by its mere length is not tokenised first: ten megabytes would take half a minute and
        # gigabytes.
        most = CHARACTERS_SPARE * budget * self.longest_token
        for name in ("text", "text_b"):
            if len(getattr(example, name) or "") > most:
                example = dataclasses.replace(example, **{name: getattr(example, name)[:most]})
        while True:
            prompt = task.prompt_of(example)
            ids = self.prompt_ids(prompt)
            excess = len(ids) - budget
            if excess <= 0:
                self.kept_ids[prompt] = array("i", ids)
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


def stop_token_ids(model, tokenizer):
    """The ids that end an answer: those of the generation config, else the tokenizer's EOS, in order; empty where
    neither names one inside the vocabulary.

    Ids outside the vocabulary (defaults of some configs) are dropped with a warning.
    """
    config = getattr(model, "generation_config", None)
    listed = config.eos_token_id if config else None
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    size = model.get_input_embeddings().num_embeddings
    kept = [i for i in dict.fromkeys(ids) if 0 <= i < size]
    if len(kept) < len(set(ids)):
        say(f"warning: stop ids {sorted(set(ids) - set(kept))} are outside the vocabulary of {size} and are dropped")
    eos = tokenizer.eos_token_id
    return kept or ([eos] if eos is not None and 0 <= eos < size else [])
