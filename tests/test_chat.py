"""Chat templates as people have them: content parts, dates, thinking, trimming, and errors. Expected strings are
written by hand."""

import json
from datetime import datetime

import pytest
from families import tiny_model, toy_tokenizer
from test_encoding import CHATML, chat_tokenizer, encoder_of
from tokenizers import normalizers, pre_tokenizers
from toy_runs import ANSWER, run

import train_ppo
import train_rm
import train_sft
from rllr.common.errors import InputError
from rllr.data.chat import ChatTemplate
from rllr.data.encoding import Encoder
from rllr.tasks import Example, Task

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% "
    "endif %}{% endfor %}\n"
    "{% endfor %}"
)
DATED = (
    "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y, %H:%M 100%% %-d %?') %}{% endif %}\n  "
    "Today: {{ today }}\n" + PLAIN
)
CLOCK = "2024-03-05T07:08:09"
TASK = Task("t", ("good", "bad"), "{text}?")


def template_of(text, clock=CLOCK):
    return ChatTemplate(toy_tokenizer(chat_template=text), clock)


# ---- what reaches the model ------------------------------------------------------------------------------------------


def test_plain_text_and_content_parts():
    assert template_of(PLAIN).render("Hi {x}") == "[user]Hi {x}\n[assistant]"
    assert template_of(PARTS).render("Hi {x}") == "[user]Hi {x}"
    assert (template_of(PLAIN).parts, template_of(PARTS).parts) == (False, True)
    both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}parts{% endif %}{% endfor %}"
    assert template_of(both).render("Hi") == "Hi"


@pytest.mark.parametrize("text", [
    "{% for m in messages %}{{ m['content'][:8] }}{% endfor %}",
    "{% for m in messages %}{{ m['content'].split('\n')[0] }}{% endfor %}",
    "{% for m in messages %}{{ m['text'] }}{% endfor %}", "no message at all",
])  # fmt: skip
def test_a_template_that_loses_the_prompt_is_refused(text):
    """With both strings: what goes in and what comes out."""
    with pytest.raises(InputError, match="its chat template loses the prompt: 'rllr probe: first line.*' becomes '"):
        template_of(text)


def test_trimming_outer_space_is_no_loss():
    assert template_of("{{ messages[0]['content'] | trim }}").render(" Hi\nyou ") == "Hi\nyou"


@pytest.mark.parametrize("text, reason", [
    ("{{ raise_exception('only system messages') }}", "only system messages"),
    ("{{ nobody.knows.me }}", "'nobody' is undefined"),
    ("{{ messages[0]['content'] | no_such_filter }}", "No filter named"), ("{% if %}", "Expected an expression"),
    ("{{ messages[7]['content'] + 1 }}", ""), ("{{ 1 / 0 }}", "division by zero"),
])  # fmt: skip
def test_a_template_that_fails_is_one_sentence(text, reason):
    with pytest.raises(
        InputError, match="its chat template fails on a user's message: .*; correct chat_template in the"
    ) as error:
        template_of(text)
    assert reason in str(error.value)


def test_a_template_that_takes_one_turn_only():
    """What follows an answer cannot be asked of it; the tokenizer's end token is taught."""
    text = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}"
    assert template_of(text).after_answer() == ""
    assert template_of(PLAIN).after_answer() == "\n"
    assert encoder_of(chat_tokenizer(text)).end_id == 2


@pytest.mark.parametrize("opening, closed", [
    ("<think>", "<think>\n</think>\n\n"), ("<think>\n", "<think>\n\n</think>\n\n"),
    ("<reasoning> ", "<reasoning> \n</reasoning>\n\n"),
    ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"), ("<b>", "<b>"),
])  # fmt: skip
def test_thinking_that_a_template_opens_is_closed(opening, closed):
    """Else the answer, label and all, would be taught inside the block."""
    template = template_of(
        "{{ messages[0].content }}{% if add_generation_prompt %}" + opening.replace("\n", "{{ '\n' }}") + "{% endif %}"
    )
    assert template.render("Q") == "Q" + closed
    assert len(template.notes) == (opening != closed)


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_the_time_stands_still():
    template = template_of(DATED)
    moment = datetime.fromisoformat(CLOCK)
    expected = f"  Today: {moment.strftime('%d %b %Y, %H:%M 100%% %-d')} %?\n[user]Q\n[assistant]"
    assert template.render("Q") == expected == "  Today: 05 Mar 2024, 07:08 100% 5 %?\n[user]Q\n[assistant]"
    assert template.prints_time and "2024-03-05T07:08:09" in template.notes[0]
    assert f"{datetime.now().year}" in template_of(DATED, None).render("Q")


def test_the_directives_are_those_of_strftime():
    for directive in "aAbBdHIjmMpSwyYfUWFTu":
        template = template_of("{{ strftime_now('%" + directive + "') }} {{ messages[0].content }}")
        assert template.render("Q") == f"{datetime.fromisoformat(CLOCK).strftime('%' + directive)} Q"


def test_what_stands_before_a_template_changes_nothing():
    """White space at its beginning, and the trimming of blocks, as without the frozen clock."""
    for start in ("", "\n", "  ", "  {% if true %}x{% endif %}\n", "\n\n  y"):
        text = start + "{# strftime_now #}" + PLAIN
        plain = toy_tokenizer(chat_template=text).apply_chat_template(
            [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
        )
        assert template_of(text).render("Q") == plain


@pytest.mark.parametrize("text", [PLAIN, "{# strftime_now is not called #}" + PLAIN])
def test_a_template_without_a_date_has_no_clock(text):
    assert not template_of(text).prints_time and template_of(text).notes == []
    assert Encoder(toy_tokenizer(chat_template=text), tiny_model("llama", vocab_size=262)).clock is None


def dated_policy(toy, path):
    """The toy policy with a chat template that prints the second."""
    from rllr.model.loading import load_policy, load_tokenizer

    model, tokenizer = load_policy(toy.base), load_tokenizer(toy.base)
    tokenizer.chat_template = "{{ strftime_now('%H%M%S') }}{{ messages[0].content }}\n"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_all_stages_and_a_resumed_run_see_the_first_moment(toy, tmp_path, monkeypatch):
    """Another day: the frozen clock comes from the record, so no stage sees other prompts and --resume is not
    refused."""
    moments = iter([datetime(2024, 1, 1, 10, 20, second) for second in range(30)])

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return next(moments)

    monkeypatch.setattr("rllr.data.chat.datetime", Clock)
    model = dated_policy(toy, tmp_path / "dated")
    sft = [
        "--model",
        model,
        "--output_dir",
        tmp_path / "sft",
        "--save_every",
        4,
        "--epochs",
        1,
        "--batch_size",
        8,
        *ANSWER,
    ]
    output = run(train_sft.main, *toy.data, *sft)
    clock = json.loads((tmp_path / "sft" / "rllr.json").read_text())["clock"]
    assert clock.startswith("2024-01-01T10:20:0") and f"every later stage it is {clock}" in output
    shown = next(line for line in output.splitlines() if line.startswith("a prompt as the model sees it"))
    assert f"'{clock[11:].replace(':', '')}the" in shown
    assert "resumed from" in run(train_sft.main, *toy.data, *sft, "--resume")
    rm = run(train_rm.main, "--policy", tmp_path / "sft", "--epochs", 1, "--output_dir", tmp_path / "rm", *ANSWER)
    flags = [
        "--policy",
        tmp_path / "sft",
        "--label_rm",
        tmp_path / "rm",
        "--output_dir",
        tmp_path / "ppo",
        *toy.ppo_flags,
    ]
    ppo = run(train_ppo.main, *flags)
    for output in (rm, ppo):
        assert f"'{clock[11:].replace(':', '')}the" in output
    assert json.loads((tmp_path / "ppo" / "last" / "rllr.json").read_text())["clock"] == clock


# ---- what a tokenizer keeps ------------------------------------------------------------------------------------------


def test_a_prompt_as_the_model_sees_it():
    log = []
    encoder_of(chat_tokenizer(CHATML)).check(TASK, Example("a", "so </s> fine"), log.append)
    assert log == [
        "a prompt as the model sees it (34 tokens): '<s><|im_start|>user\\nso < /s> "
        "fine?<|im_end|>\\n<|im_start|>assistant\\n'"
    ]


def test_a_tokenizer_that_changes_the_text_is_compared_with_itself():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    encoder_of(tokenizer).check(TASK, Example("a", "SHOUTED"))


def test_a_prompt_that_the_template_loses_later():
    """The probe passes; the question behind a certain word does not."""
    tokenizer = toy_tokenizer(chat_template="{{ messages[0].content.split('Question')[0] }}")
    with pytest.raises(InputError, match="the prompt 'fine. Question: what.' is lost; the model would see 'fine. '"):
        encoder_of(tokenizer).check(Task("t", ("good", "bad"), "{text} Question: what?"), Example("a", "fine."))


def test_a_tokenizer_that_drops_line_breaks():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", " ")
    encoder = encoder_of(tokenizer)
    with pytest.raises(
        InputError,
        match=r"turns the answer 'a reason\\nLabel: good' into 'a reason Label: good', from which the label 'good'",
    ):
        encoder.check(TASK, Example("a", "x"))
    encoder.check(Task("t", ("good", "bad"), "{text}?", answer_format="label"), Example("a", "x"))  # needs none


def test_a_label_without_a_piece():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("é", "e")
    with pytest.raises(InputError, match="from which the label 'café' cannot be read; rename the label in a task file"):
        encoder_of(tokenizer).check(Task("t", ("the", "café"), "{text}?"), Example("a", "x"))


def test_texts_that_the_tokenizer_cannot_write():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyzL:? \n"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    encoder, log = encoder_of(tokenizer, eos=1), []
    encoder.check(TASK, Example("a", "fine"), log.append)
    assert len(log) == 1
    encoder.check(TASK, Example("a", "Все хорошо"), log.append)
    assert "warning: 9 of its 12 tokens are unknown to the tokenizer" in log[-1]


def test_ids_without_a_row_in_the_embedding():
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<new>"])
    encoder = encoder_of(tokenizer, vocabulary=259)
    with pytest.raises(
        InputError, match=r"writes '<new>' as id 259, but the model's embedding has 259 rows.*resize_token_embeddings"
    ):
        encoder.prompt_ids("a <new> word")
    with pytest.raises(InputError, match="'<new>' as id 259"):
        encoder.answer_ids("<new>")
    encoder_of(tokenizer, vocabulary=260).prompt_ids("a <new> word")
