"""A tokenizer's chat template: what the model sees of a prompt, the same today and tomorrow, or one error that says why not."""

import re
from datetime import datetime

from ..common.errors import InputError, brief

PROBE = "rllr probe: first line\nand second"  # a template must hand on the words of a message, whichever they are
OPEN_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
# The function of this name that templates find gives the time of rendering. This one, written before the template, gives one
# moment's: `rllr_clock` holds what each directive of `strftime` stands for then.
FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set at = namespace(flag=none) -%}{%- for c in format -%}"
    "{%- if at.flag is none and c == '%' -%}{%- set at.flag = '' -%}{%- elif at.flag is none -%}{{ c }}"
    "{%- elif at.flag == '' and c in '-#' -%}{%- set at.flag = c -%}"
    "{%- else -%}{{ rllr_clock.get(at.flag ~ c, '%' ~ at.flag ~ c) }}{%- set at.flag = none -%}{%- endif -%}"
    "{%- endfor -%}{%- endmacro %}\n"
)
DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZfGuVDeFhnrRtT%"


class ChatTemplate:
    """Renders a user's message, and what stands before the model's answer, through a tokenizer's chat template.

    clock: the moment that a template which prints the date is given, as ISO text; now by default. `parts`: whether messages go
    in as lists of content parts, for templates that want those. `notes`: sentences for the log. InputError where the template
    fails or loses the message.
    """

    def __init__(self, tokenizer, clock=None):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path or type(tokenizer).__name__
        self.template = self._find()
        self.clock = datetime.fromisoformat(clock) if clock else datetime.now().replace(microsecond=0)
        self.parts, self.notes = False, []
        self._choose_form()
        self.prints_time = "strftime_now" in self.template and self._shows_another_time()
        if self.prints_time:
            self.notes.append(
                f"the chat template prints the time: here and in every later stage it is {self.clock.isoformat()}"
            )
        self.closing = ""  # what ends a block of thinking that the template opens: an answer does not belong inside it
        opened = OPEN_THINKING.search(self.render(PROBE))
        if opened:
            self.closing = f"\n</{opened[1]}>\n\n"
            self.notes.append(f"the chat template opens <{opened[1]}> before an answer; the block is closed at once")

    def _find(self):
        try:
            return self.tokenizer.get_chat_template()
        except (ValueError, KeyError) as error:
            raise InputError(f"{self.name}: its chat template cannot be used: {_line(error)}") from None

    def _choose_form(self):
        """Plain text, else content parts; whichever the template hands on."""
        results = []
        for self.parts in (False, True):
            try:
                results.append(self._render([self._message("user", PROBE)], True))
            except InputError as error:
                results.append(error)
                continue
            if squeeze(PROBE) in squeeze(results[-1]):
                return
        if isinstance(results[0], InputError):
            raise results[0]
        raise InputError(
            f"{self.name}: its chat template loses the prompt: {PROBE!r} becomes {results[0]!r:.300}; mend chat_template in the "
            "tokenizer's directory, or delete it there for the plain prompt"
        )

    def _shows_another_time(self):
        now, clock = self.render(PROBE), self.clock
        self.clock = clock.replace(
            year=clock.year - 1, month=1 + clock.month % 12, day=1 + clock.day % 28, hour=(clock.hour + 1) % 24
        )
        other, self.clock = self.render(PROBE), clock
        return now != other

    def _message(self, role, text):
        return {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}

    def _render(self, messages, answer_follows):
        template, more = self.template, {}
        if "strftime_now" in template:
            both = [flag + letter for flag in ("", "-") for letter in DIRECTIVES]
            template = FROZEN_CLOCK + template
            more = {"rllr_clock": {directive: _at(self.clock, directive) for directive in both}}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer_follows,
                enable_thinking=False,
                chat_template=template,
                **more,
            )
        except Exception as error:  # a template is code: Jinja's errors, and whatever its expressions raise
            raise InputError(
                f"{self.name}: its chat template fails on a user's message: {_line(error)}; mend chat_template in the tokenizer's "
                "directory, or delete it there for the plain prompt"
            ) from None

    def render(self, prompt):
        """The prompt as a user's message, and what stands before the answer."""
        rendered = self._render([self._message("user", prompt)], True)
        return rendered + getattr(self, "closing", "")

    def after_answer(self):
        """What the template writes behind an assistant's message; "" where it takes none."""
        marker = "rllr-answer"
        try:
            rendered = self._render([self._message("user", "?"), self._message("assistant", marker)], False)
        except InputError:
            return ""
        return rendered.rpartition(marker)[2]


def squeeze(text):
    """A text without white space, for comparing what may be spaced otherwise."""
    return "".join(text.split())


def _at(clock, directive):
    try:
        return clock.strftime(f"%{directive}")
    except ValueError:  # this platform knows no such flag
        return f"%{directive}"


def _line(error):
    return brief((str(error).strip().splitlines() or [type(error).__name__])[0])
