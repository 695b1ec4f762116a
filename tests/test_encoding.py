"""Text to ids, id by id: one BOS, one end token, chat templates, stop ids, and texts cut to fit the context.

The toy tokenizer gives each byte an id of its own, so every expected id is written down here without a tokenizer.
"""

import dataclasses

import pytest
from families import tiny_model, toy_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from rllr.common.errors import InputError
from rllr.data.encoding import Encoder
from rllr.tasks import TASKS, Example, Task

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS, IM_START, IM_END = 1, 2, 3, 4
CHAT_OFFSET = 5
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = Task("t", ("a", "b"), "Q {text} E")
PAIR = Task("t", ("a", "b"), "Q {text} M {text_b} E")


def ids(text, offset=3):
    """Ids of printable ASCII, blanks and newlines, a byte each."""
    return [offset + ALPHABET.index({" ": "Ġ", "\n": "Ċ"}.get(c, c)) for c in text]


def with_template(tokenizer, single):
    special = [(piece, i) for piece, i in tokenizer.get_vocab().items() if piece in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=single + " $B", special_tokens=special
    )
    return tokenizer


def chat_tokenizer(template=CHATML, eos="</s>", **named):
    """ChatML's tokens among the special ones; by default neither is the tokenizer's EOS."""
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(specials + ALPHABET)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos, **named
    )
    tokenizer.chat_template = template
    return with_template(tokenizer, "<s> $A </s>")


class SlowTokenizer(PreTrainedTokenizer):
    """One id a character and no offsets, as tokenizers written in Python are."""

    def __init__(self, **named):
        self.characters = {chr(i): i for i in range(32, 127)} | {"\n": 0}
        super().__init__(eos_token="~", **named)

    @property
    def vocab_size(self):
        return 127

    def get_vocab(self):
        return dict(self.characters)

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.characters[token]

    def _convert_id_to_token(self, index):
        return chr(index)


def encoder_of(tokenizer, eos=EOS, vocabulary=262, context=64):
    model = tiny_model("llama", vocab_size=vocabulary, max_position_embeddings=context)
    model.generation_config.eos_token_id = eos
    return Encoder(tokenizer, model)


# ---- prompts


def test_plain_prompt_without_bos():
    assert encoder_of(toy_tokenizer()).prompt_ids("Ab {c}") == ids("Ab {c}\n")


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_plain_prompt_with_one_bos_and_no_eos(single):
    encoder = encoder_of(with_template(toy_tokenizer(), single))
    assert encoder.prompt_ids("Ab") == [BOS, *ids("Ab\n")]
    assert encoder.answer_ids("Label: a") == [*ids("Label: a"), EOS]


def test_plain_prompt_of_a_tokenizer_that_adds_eos_alone():
    assert encoder_of(with_template(toy_tokenizer(), "$A </s>")).prompt_ids("Ab") == ids("Ab\n")


def test_chat_prompt():
    """The template writes BOS itself, and the tokenizer, which would add one as well, must not."""
    encoder = encoder_of(chat_tokenizer(), vocabulary=262)
    asked = ids("user\nAb\n?", CHAT_OFFSET)
    assert encoder.prompt_ids("Ab\n?") == [
        BOS, IM_START, *asked, IM_END, *ids("\n", CHAT_OFFSET), IM_START, *ids("assistant\n", CHAT_OFFSET)
    ]  # fmt: skip


# ---- answers and stop ids


@pytest.mark.parametrize("answer", ["Label: a", "a reason\nLabel: a", "", "ends in a newline\n", "</s"])
def test_an_answer_ends_in_exactly_one_end_token_and_comes_back(answer):
    for encoder, end, offset in ((encoder_of(toy_tokenizer()), EOS, 3), (encoder_of(chat_tokenizer()), IM_END, 5)):
        encoded = encoder.answer_ids(answer)
        assert encoded == [*ids(answer, offset), end]
        assert encoder.decode(encoded) == answer
        assert encoder.decode(encoded[:-1]) == answer  # cut by the length limit: nothing to strip


def test_decode_strips_one_stop_token_and_shows_the_others():
    encoder = encoder_of(chat_tokenizer(), eos=[EOS, IM_END])
    text = ids("Label: a", CHAT_OFFSET)
    assert encoder.decode([*text, EOS]) == encoder.decode([*text, IM_END]) == "Label: a"
    assert encoder.decode([*text, IM_END, EOS]) == "Label: a<|im_end|>"
    assert encoder.decode([EOS, *text]) == "</s>Label: a"
    assert encoder.decode([IM_START, *text, BOS]) == "<|im_start|>Label: a<s>"
    assert encoder.decode([]) == encoder.decode([EOS]) == ""


def test_decode_keeps_blanks_before_punctuation():
    encoder = encoder_of(toy_tokenizer())
    assert encoder.decode(encoder.answer_ids("it is n't , really .")) == "it is n't , really ."


@pytest.mark.parametrize("named", [{}, {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}])
def test_the_template_names_the_end_token(named):
    """Also where the tokenizer's settings list it nowhere but among the added tokens (Phi-3's <|end|>)."""
    encoder = encoder_of(chat_tokenizer(**named), eos=[EOS, 0])
    assert encoder.end_id == IM_END and encoder.stop_ids == [EOS, 0, IM_END]


def test_a_listed_end_token_is_not_added_again():
    assert encoder_of(chat_tokenizer(eos="<|im_end|>"), eos=[IM_END, EOS]).stop_ids == [IM_END, EOS]


def test_a_template_that_writes_no_special_token_leaves_the_eos():
    plain = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    encoder = encoder_of(chat_tokenizer(plain))
    assert encoder.end_id == EOS and encoder.stop_ids == [EOS]


@pytest.mark.parametrize(
    "listed, stop_ids, end_id",
    [
        (2, [2], 2),
        ([7, 2], [7, 2], 2),
        (7, [7, 2], 2),  # the tokenizer's EOS is taught, so it has to stop
        (None, [2], 2),
        ([2, 2, 7], [2, 7], 2),
    ],
)
def test_stop_ids_without_a_template(listed, stop_ids, end_id):
    encoder = encoder_of(toy_tokenizer(), eos=listed)
    assert (encoder.stop_ids, encoder.end_id) == (stop_ids, end_id)


def test_ids_outside_the_vocabulary_are_dropped_with_a_warning(capsys):
    encoder = encoder_of(toy_tokenizer(), eos=[2, 5000])
    assert encoder.stop_ids == [2] and "[5000] are outside the vocabulary of 262" in capsys.readouterr().out
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<pad>"})  # 259, 260: no rows in the embedding
    encoder = encoder_of(tokenizer, eos=[7], vocabulary=259)
    assert encoder.stop_ids == [7] and encoder.end_id == 7 and encoder.pad_id is None
    assert encoder_of(tokenizer, eos=[7], vocabulary=261).pad_id == 260


@pytest.mark.parametrize("listed", [None, [], [5000]])
def test_no_end_token_at_all(listed):
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-text token; set eos_token in tokenizer_config.json"):
        encoder_of(tokenizer, eos=listed)


# ---- fitting


def test_context_is_the_smaller_limit():
    tokenizer = toy_tokenizer()
    assert encoder_of(tokenizer, context=64).context == 64
    tokenizer.model_max_length = 40
    assert encoder_of(tokenizer, context=64).context == 40
    tokenizer.model_max_length = 10**30  # "none" in the tokenizers' files
    assert encoder_of(tokenizer, context=64).context == 64
    assert Encoder(tokenizer, tiny_model("bloom", vocab_size=262)).context == 2048


def test_texts_that_fit_are_the_very_same():
    examples, lines = [Example("a", "x" * 43), Example("b", "short")], []
    fitted = encoder_of(toy_tokenizer()).fit(examples, TINY, reserve=16, log=lines.append)  # 43 + "Q  E\n" = 64 - 16
    assert all(new is old for new, old in zip(fitted, examples)) and lines == []


def test_the_end_of_a_text_is_cut_and_nothing_else():
    text, lines = "".join(chr(97 + i % 26) for i in range(60)), []
    (fitted,) = encoder_of(toy_tokenizer()).fit([Example("a", text, label="b")], TINY, reserve=16, log=lines.append)
    assert fitted == Example("a", text[:43], label="b")
    assert lines == ["1 of 1 texts were cut to fit the context of 64 tokens (its max_position_embeddings of 64): a"]


def test_the_longer_text_of_a_pair_is_cut():
    """'Q  M  E' and the newline are 8 of the 64 - 16 = 48 tokens; 40 are left for the two texts."""
    examples = [
        Example("first", "a" * 50, "b" * 10),
        Example("second", "a" * 10, "b" * 50),
        Example("both", "a" * 50, "b" * 30),
        Example("whole", "a" * 20, "b" * 20),
        Example("equal", "a" * 26, "b" * 26),
    ]
    lines = []
    fitted = encoder_of(toy_tokenizer()).fit(examples, PAIR, reserve=16, log=lines.append)
    lengths = {e.id: (len(e.text), len(e.text_b)) for e in fitted}
    assert lengths == {"first": (30, 10), "second": (10, 30), "both": (10, 30), "whole": (20, 20), "equal": (14, 26)}
    assert lines == [
        "4 of 5 texts were cut to fit the context of 64 tokens (its max_position_embeddings of 64): first, second, "
        "both, ..."
    ]


def checked_fit(encoder, task, examples, reserve):
    """Fit, and see that each prompt has its template whole and leaves room for the answer."""
    fitted = encoder.fit(examples, task, reserve, log=lambda line: None)
    start, end = (part.replace("{instruction}", "Reason, then label:") for part in
                  (task.prompt.partition("{text}")[0], task.prompt.rpartition("}")[2] or "label:"))  # fmt: skip
    for new, old in zip(fitted, examples, strict=True):
        prompt = task.render_prompt(new.text, new.text_b)
        assert prompt.startswith(start) and prompt.endswith(end)
        assert len(encoder.prompt_ids(prompt)) + reserve <= encoder.context
        assert old.text.startswith(new.text) and (old.text_b or "").startswith(new.text_b or "")
        assert dataclasses.replace(new, text=old.text, text_b=old.text_b) == old
        if new is not old:  # no more than needed was cut: a blank at most, and what a byte more would have needed
            assert len(encoder.prompt_ids(prompt)) + reserve >= encoder.context - 8
    return fitted


TEXTS = ["word " * 80, "é" * 90, "🙂 " * 60, "x" * 500, " " * 300 + "end", "a\n" * 100, "fits"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_fitted_prompt_leaves_room_for_the_answer(chat):
    encoder = encoder_of(chat_tokenizer() if chat else toy_tokenizer(), context=160)
    examples = [Example(str(i), text, TEXTS[-1 - i]) for i, text in enumerate(TEXTS)]
    single = [dataclasses.replace(example, text_b=None) for example in examples[:4]]
    single = checked_fit(encoder, TASKS["sst2"], single, reserve=20)
    assert [e.text[:1] for e in single] == ["w", "é", "🙂", "x"]
    checked_fit(encoder, PAIR, [e for e in examples if not e.text.startswith(" ")], reserve=30)


def test_a_text_may_be_cut_to_nothing():
    encoder = encoder_of(toy_tokenizer())
    (fitted,) = encoder.fit([Example("a", " " * 90 + "end")], TINY, reserve=16, log=lambda line: None)
    assert fitted.text == "" and len(encoder.prompt_ids(TINY.render_prompt(""))) == 6 - 1


def test_the_template_alone_does_not_fit():
    encoder = encoder_of(toy_tokenizer())
    assert encoder.fit([Example("a", "x")], TINY, reserve=64 - 6, log=print)[0].text == "x"  # "Q  E\n" and one more
    with pytest.raises(InputError, match="'t': the prompt template takes 5 tokens and the answer 59.*context of 64"):
        encoder.fit([Example("a", "x")], TINY, reserve=64 - 5)


def test_a_tokenizer_without_offsets():
    tokenizer = SlowTokenizer()
    assert not tokenizer.is_fast
    encoder = encoder_of(tokenizer, eos=ord("~"))
    assert encoder.prompt_ids("Ab") == [ord("A"), ord("b"), 0]
    assert encoder.answer_ids("Ab") == [ord("A"), ord("b"), ord("~")]
    examples = [Example("a", "".join(chr(97 + i % 26) for i in range(60))), Example("b", "x" * 900), Example("c", "y")]
    fitted = checked_fit(encoder, TINY, examples, reserve=16)
    assert fitted[0].text == examples[0].text[:43] and fitted[1].text == "x" * 43 and fitted[2] is examples[2]


def test_special_tokens_spelled_out_in_a_text_stay_text(tokenizer):
    """A row that contains the end token's spelling must not end the answer or the turn there."""
    encoder = encoder_of(tokenizer)
    eos = tokenizer.eos_token
    for ids in (encoder.prompt_ids(f"a {eos} b"), encoder.answer_ids(f"a {eos} b")[:-1]):
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "").count(eos) == 1
