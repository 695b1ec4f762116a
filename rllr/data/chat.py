"""A tokenizer's chat template: how the model sees a prompt, the same on every day; else one clear error."""

import re
from datetime import datetime

from ..common.errors import InputError, brief

PROBE = "rllr probe: first line\nand second"  # a template must keep the words of any message
OPEN_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
# Templates can call strftime_now, which gives the time of rendering. This macro, put before the template, replaces it
# and gives one fixed moment: `rllr_clock` holds the value of each `strftime` directive at that moment.
FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set at = namespace(flag=none) -%}{%- for c in format -%}"
    "{%- if at.flag is none and c == '%' -%}{%- set at.flag = '' -%}{%- elif at.flag is none -%}{{ c }}"
    "{%- elif at.flag == '' and c in '-#' -%}{%- set at.flag = c -%}"
    "{%- else -%}{{ rllr_clock.get(at.flag ~ c, '%' ~ at.flag ~ c) }}{%- set at.flag = none -%}{%- endif -%}"
    "{%- endfor -%}{%- endmacro %}\n"
)
DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZfGuVDeFhnrRtT%"
ADVICE = "correct chat_template in the tokenizer's directory, or delete it there for the plain prompt"


class ChatTemplate:
    """Renders a user's message, and what comes before the model's answer, with a tokenizer's chat template.

    clock: the time, as ISO text, for a template that prints the date; now by default. `parts`: whether messages are
    passed as lists of content parts, which some templates require. `notes`: sentences for the log. InputError if the
    template fails or loses the message.
    """

    def __init__(self, tokenizer, clock=None):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path or type(tokenizer).__name__
        self.template = self._find()
        self.clock = datetime.fromisoformat(clock) if clock else datetime.now().replace(microsecond=0)
        self.parts, self.notes = False, []
        self._choose_form()
        self.prints_time = "strftime_now" in self.template and self._shows_another_time()
        if self.prints_time:
            note = f"the chat template prints the time: here and in every later stage it is {self.clock.isoformat()}"
            self.notes.append(note)
        self.closing = ""  # closes a block of thinking that the template opens: the answer must be outside of it
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
        """Set `parts`: plain text if the template keeps it, else content parts."""
        results: list[str | InputError] = []
        for self.parts in (False, True):
            try:
                results.append(self._render([self._message("user", PROBE)], True))
            except InputError as error:
                results.append(error)
                continue
            if squeeze(PROBE) in squeeze(str(results[-1])):
                return
        if isinstance(results[0], InputError):
            raise results[0]
        problem = f"its chat template loses the prompt: {PROBE!r} becomes {results[0]!r:.300}"
        raise InputError(f"{self.name}: {problem}; {ADVICE}")

    def _shows_another_time(self):
        now, clock = self.render(PROBE), self.clock
        year, month, day = clock.year - 1, 1 + clock.month % 12, 1 + clock.day % 28
        self.clock = clock.replace(year=year, month=month, day=day, hour=(clock.hour + 1) % 24)
        other, self.clock = self.render(PROBE), clock
        return now != other

    def _message(self, role, text):
        return {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}

    def _render(self, messages, answer_follows):
        options = {"tokenize": False, "add_generation_prompt": answer_follows, "enable_thinking": False}
        template = self.template
        if "strftime_now" in template:
            template = FROZEN_CLOCK + template
            directives = [flag + letter for flag in ("", "-") for letter in DIRECTIVES]
            options["rllr_clock"] = {directive: _at(self.clock, directive) for directive in directives}
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=template, **options)
        except Exception as error:  # a template is code: Jinja's errors, and anything that its expressions raise
            problem = f"its chat template fails on a user's message: {_line(error)}"
            raise InputError(f"{self.name}: {problem}; {ADVICE}") from None

    def render(self, prompt):
        """The prompt as a user's message, and the text before the answer."""
        rendered = self._render([self._message("user", prompt)], True)
        return rendered + getattr(self, "closing", "")

    def after_answer(self):
        """The text that the template writes after an assistant's message; "" if it takes no such message."""
        marker = "rllr-answer"
        try:
            rendered = self._render([self._message("user", "?"), self._message("assistant", marker)], False)
        except InputError:
            return ""
        return rendered.rpartition(marker)[2]


def squeeze(text):
    """A text without white space, for comparisons that ignore white space."""
    return "".join(text.split())


def _at(clock, directive):
    try:
        return clock.strftime(f"%{directive}")
    except ValueError:  # this platform does not have this flag
        return f"%{directive}"


def _line(error):
    return brief((str(error).strip().splitlines() or [type(error).__name__])[0])
