"""PPO against a judge that is a large language model behind an OpenAI-compatible server.

    pip install ".[endpoint]"                                  # the client library, in the repository's folder
    export JUDGE_URL=http://localhost:8000/v1 JUDGE_MODEL=NAME # JUDGE_KEY, where the server asks for one
    python -m examples.judge_behind_a_server                   # what it says of two answers
    python train_ppo.py --policy runs/sst2/sft --reward examples.judge_behind_a_server:reward \\
        --rollout_prompts 32 --steps 50 --on_hacking ignore

The judge reads the task and the answer and gives a mark from 0 to 10; the reward is a tenth of it. What it has judged
once it is not asked again, so the same answer always pays the same. PPO asks it for thousands of answers, and for those
to dev at each look: a local server, a small --rollout_prompts and --eval_rows keep that affordable.
"""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

AT_ONCE = 16  # requests
QUESTION = (
    "A classifier was asked:\n{prompt}\n\nIt answered:\n{answer}\n\nIs the label right, and does its reason stand in "
    "the text? Give a mark from 0 (wrong, or invented) to 10 (right, and well founded). Write the number alone."
)


def reward(samples):
    """One number for each answer, from 0 to 1; `samples` is an rllr.judge.Samples."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(judged, samples.prompts, samples.answers))


@functools.cache
def judged(prompt, answer):
    """What the judge gives one answer."""
    mark = mark_in(ask(QUESTION.format(prompt=prompt, answer=answer)))
    return mark / 10


def mark_in(text):
    """The first whole number from 0 to 10 in a text; an error, which ends the run, where there is none."""
    found = re.search(r"(?<![\d.])(10|\d)(?![\d.]*\d)", text)
    if found is None:
        raise ValueError(f"the judge gave no mark from 0 to 10 but {text!r:.60}")
    return int(found.group())


def ask(question):
    """The model's answer. The library waits and asks again where the server is busy or out of reach for a while."""
    answer = client().chat.completions.create(
        model=os.environ["JUDGE_MODEL"], messages=[{"role": "user", "content": question}], temperature=0
    )
    return answer.choices[0].message.content or ""


@functools.cache
def client():
    from openai import OpenAI

    return OpenAI(base_url=os.environ["JUDGE_URL"], api_key=os.environ.get("JUDGE_KEY", "none"), max_retries=6)


if __name__ == "__main__":
    prompt = "Sentence: a dull and overlong mess\nNegative or positive? Reason, then label:"
    for answer in ("dull and overlong\nLabel: negative", "it is lovely\nLabel: positive"):
        print(f"{judged(prompt, answer):.1f}  {answer!r}")
