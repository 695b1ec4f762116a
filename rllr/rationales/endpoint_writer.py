"""Rationales written by a language model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, a cloud.

    export ENDPOINT_API_KEY=...                    # where the server asks for a key; it is read from nowhere else
    python train_sft.py --rationales endpoint --endpoint_url http://localhost:8000/v1 --endpoint_model NAME ...

The client library `openai` (extra `endpoint`) makes the requests. It waits and asks again where a server is busy (429),
out of order (5xx), out of reach or too slow.
"""

import os
import queue
import re
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from ..common.config import Settings, flag
from ..common.errors import InputError, RunError, brief
from ..tasks import ATTACHED, whole_words, word_found
from .cached import CachedWriter, one_line

KEY = "ENDPOINT_API_KEY"  # the environment variable; never a flag, which a run's record would keep
ASKED_AGAIN = 2  # times that a rationale which cannot be used is asked for again
RETRIES = 6  # of a request that fails; the library waits longer each time, or as long as the server asks for
# Letters; a shorter label ("no", or one Chinese character) stands in too many sentences to be a leak.
LONG_LABEL, SHORT_WORD = 4, re.compile(f"[{ATTACHED}]{{2,}}")


@dataclass
class EndpointConfig(Settings):
    """Where a server is, and how it is asked."""

    GROUP = "rationales"
    endpoint_url: str | None = flag(
        None, "for the writer endpoint: the server's base URL, such as http://localhost:8000/v1"
    )
    endpoint_model: str | None = flag(None, "the model's name there")
    endpoint_requests: int = flag(8, "requests at once", above=0)
    endpoint_timeout: float = flag(60.0, "seconds for one request", above=0)
    endpoint_tokens: int = flag(200, "tokens of a rationale, at most; a model that thinks first needs more", above=0)

    def check_endpoint(self):
        """InputError where something is missing. Nothing is asked."""
        for name in ("endpoint_url", "endpoint_model"):
            if not getattr(self, name):
                raise InputError(
                    f"--rationales endpoint needs --{name}: {self.__dataclass_fields__[name].metadata['help']}"
                )
        parts = urlsplit(self.endpoint_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--endpoint_url {brief(self.endpoint_url)}: give a URL, such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
            raise InputError(
                f"--endpoint_url {bare}: give it without user, password or query: a run's record keeps it; "
                f"a key goes into the environment variable {KEY}"
            )


class EndpointWriter(CachedWriter):
    """Rationales by a model behind a server, many requests at once.

    An answer is used if it is whole, not empty, and does not name another label alone (`problem_with`); else it is
    asked for again, and at last left out, with a line that counts them.
    """

    ranks_share = False

    def __init__(self, examples, task, config, cache_file, *, log=print):
        config.check_endpoint()
        self.config, self.log, self.tokens = config, log, [0, 0]  # of prompts, of answers
        super().__init__(examples, task, cache_file, source=config.endpoint_model, log=log)

    def write_missing(self, missing):
        endpoint = Endpoint(self.config)
        problems: dict[str, int] = {}
        ended = at_once(missing, lambda one: self.ask(endpoint, *one), self.config.endpoint_requests)
        for example, label, text, problem, tokens in tqdm(
            ended, "rationales", len(missing), mininterval=2, disable=None
        ):
            if problem:
                problems[problem] = problems.get(problem, 0) + 1
            self.tokens = [a + b for a, b in zip(self.tokens, tokens)]
            yield example, label, text, {"tokens": tokens} | ({"problem": problem} if problem else {})
        self.log(
            f"{len(missing)} rationales by {self.config.endpoint_model}: {self.tokens[0]:,} tokens of prompts and "
            f"{self.tokens[1]:,} of answers"
        )
        if problems:
            told = ", ".join(f"{count} {problem}" for problem, count in sorted(problems.items()))
            self.log(
                f"warning: {sum(problems.values())} of them cannot be used and are left out ({told}); delete their "
                "lines from the cache to ask for them again"
            )

    def ask(self, endpoint, example, label):
        """(example, label, rationale or None, what is wrong with the last answer or None, [tokens of prompts, tokens of
        answers]) of one label of one row."""
        prompt, tokens = self.prompt(example, label), [0, 0]
        for attempt in range(1 + ASKED_AGAIN):
            # The first answer is the likeliest one; who asks again for that would get the same.
            text, whole, used = endpoint.complete(prompt, temperature=min(attempt, 1))
            tokens = [a + b for a, b in zip(tokens, used)]
            text = one_line(text.rpartition("</think>")[2])
            problem = problem_with(text, label, self.task) if whole else "cut by --endpoint_tokens"
            if problem is None:
                return example, label, text, None, tokens
        return example, label, None, problem, tokens


def problem_with(text, label, task) -> str | None:
    """Why a rationale for a label cannot be used, None if it can."""
    if not text:
        return "empty"
    named = labels_in(text, task)
    if named and label not in named:
        return "arguing for another label"
    return None


def labels_in(text, task):
    """The labels that a text names (`tasks.whole_words`)."""
    words = [one for one in task.labels if len(one) >= LONG_LABEL or re.fullmatch(SHORT_WORD, one)]
    return {word_found(one, words) for one in whole_words(words).findall(text)} if words else set()


def at_once(jobs, work, count):
    """work(job) of every job, as they end, `count` at a time. The first that fails ends it.

    The threads are daemons: whoever stops the program need not wait for the requests that are under way.
    """
    left, lock, over = iter(jobs), threading.Lock(), threading.Event()
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        while not over.is_set():
            with lock:
                job = next(left, None)
            if job is None:
                return
            try:
                ended.put((work(job), None))
            except BaseException as error:
                over.set()
                ended.put((None, error))

    for _ in range(min(count, len(jobs))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(len(jobs)):
            result, error = ended.get()
            if error is not None:
                raise error
            yield result
    finally:
        over.set()


def require_library():
    """The client library. InputError without the extra."""
    try:
        import openai
    except ImportError as error:
        raise InputError(f'--rationales endpoint needs {error.name}: pip install ".[endpoint]"') from None
    return openai


class Endpoint:
    """A server's chat completions. InputError without the extra."""

    def __init__(self, config):
        openai = require_library()
        self.errors, self.config, self.where = openai, config, f"--endpoint_url {config.endpoint_url}"
        self.key = os.environ.get(KEY) or "none"  # the library asks for one; local servers do not look at it
        self.client = openai.OpenAI(
            base_url=config.endpoint_url, api_key=self.key, timeout=config.endpoint_timeout, max_retries=RETRIES
        )
        self.limit, self.has_temperature = "max_tokens", True  # some models want another name, and no temperature

    def complete(self, prompt, temperature=0.0):
        """(text, whether it is whole, [tokens of the prompt, of the answer]) of one request. InputError where the
        server refuses it, RunError where it cannot be had, for all the library's waiting and asking again."""
        limit, options = self.limit, {"temperature": temperature} if self.has_temperature else {}
        try:
            answer = self.client.chat.completions.create(
                model=self.config.endpoint_model,
                messages=[{"role": "user", "content": prompt}],
                **{limit: self.config.endpoint_tokens},
                **options,
            )
        except self.errors.BadRequestError as error:
            if error.param == "max_tokens" and limit == "max_tokens":
                self.limit = "max_completion_tokens"
            elif error.param == "temperature" and options:
                self.has_temperature = False
            else:
                raise self.explained(error) from None
            return self.complete(prompt, temperature)
        except (self.errors.OpenAIError, ValueError) as error:  # ValueError: no JSON
            raise self.explained(error) from None
        return read_completion(answer, self.where)

    def explained(self, error):
        """The error that a user reads: what was wrong, and what to do."""
        kept = "what was written is kept, and the same command goes on"
        status = getattr(error, "status_code", None)
        said = brief(str(getattr(error, "message", error)).replace(self.key, "(key)"))
        if status in (401, 403):
            return InputError(f"{self.where}: refused ({status}); set the environment variable {KEY}")
        if status == 404:
            return InputError(
                f"{self.where}: not found (404): is it the base URL, which mostly ends in /v1, and has the server the "
                f"model {brief(self.config.endpoint_model)}?"
            )
        if isinstance(error, self.errors.APITimeoutError):
            return RunError(
                f"{self.where}: no answer within --endpoint_timeout {self.config.endpoint_timeout:g}; {kept}"
            )
        if isinstance(error, self.errors.APIConnectionError):
            reason = error.__cause__ or error
            return RunError(f"{self.where}: cannot be reached ({type(reason).__name__}: {brief(str(reason))}); {kept}")
        if status is not None:
            kind = RunError if status >= 500 or status == 429 else InputError
            return kind(f"{self.where}: answered {status}: {said}; {kept}")
        return RunError(f"{self.where}: answered what is no answer ({said}); {kept}")


def read_completion(answer, where):
    """What `Endpoint.complete` gives, from the library's object, which checks little of what a server sends."""
    try:
        choice = answer.choices[0]
        text, whole = choice.message.content or "", choice.finish_reason != "length"
        if not isinstance(text, str):
            raise TypeError(type(text).__name__)
    except (AttributeError, IndexError, TypeError):
        raise RunError(
            f"{where}: answered what is no chat completion ({brief(str(answer))}); is it the base URL of an "
            "OpenAI-compatible server, which mostly ends in /v1?"
        ) from None
    used = getattr(answer, "usage", None)
    counts = [getattr(used, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return text, whole, [count if isinstance(count, int) else 0 for count in counts]
