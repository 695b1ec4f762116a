"""Rationales from a server: what is asked, kept and counted, and what happens where the server misbehaves."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toy_runs import ANSWER, run

pytest.importorskip("openai", reason='the endpoint needs: pip install ".[endpoint]"')

from endpoint_server import completion, refusal, serving
from families import tiny_model, toy_tokenizer

import train_rm
import train_sft
from rllr.common.config import parse_config
from rllr.common.errors import InputError, RunError
from rllr.model.records import read_record
from rllr.rationales import __main__ as command
from rllr.rationales import endpoint_writer
from rllr.rationales.cached import read_cache
from rllr.rationales.endpoint_writer import KEY, EndpointConfig, EndpointWriter, at_once, labels_in, problem_with
from rllr.tasks import TASKS, Example

SST2 = TASKS["sst2"]
POS, NEG = "positive", "negative"
ROWS = [Example(f"r{n}", f"film {n}", label=POS if n % 2 else NEG) for n in range(6)]
SECRET = "sk-secret-123456"


def settings(url, **more):
    return EndpointConfig(endpoint_url=url, endpoint_model="m", **{"endpoint_timeout": 5.0} | more)


def quick(monkeypatch, retries=2):
    """From now on the library gives up soon and waits hardly at all."""
    monkeypatch.setattr(endpoint_writer, "RETRIES", retries)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def wanted(request):
    """(text of the row, label asked for) of a request."""
    (message,) = request["messages"]
    found = re.search(r"Sentence: (.*)\n[\s\S]*The answer is (\w+)\.", message["content"])
    return found.group(1), found.group(2)


def write(url, cache, rows=ROWS, told=None, **more):
    log = told.append if told is not None else lambda line: None
    return EndpointWriter(rows, SST2, settings(url, **more), cache, log=log)


# ---- a server that works ---------------------------------------------------------------------------------------------


def test_every_label_of_every_row_is_asked_for_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    told, cache = [], tmp_path / "rationales.jsonl"
    with serving(lambda request, n: completion("because of {} and {}\n".format(*wanted(request)))) as (url, served):
        writer = write(url, cache, told=told, endpoint_requests=3, endpoint_tokens=99)
    assert sorted(map(wanted, served.requests)) == sorted((row.text, label) for row in ROWS for label in (POS, NEG))
    for row in ROWS:
        for label in (POS, NEG):
            assert writer.write(row, label) == f"because of {row.text} and {label}"
        assert writer.argues_for_all(row) and writer.can_write(row)
    (request,) = {json.dumps({k: v for k, v in r.items() if k != "messages"}, sort_keys=True) for r in served.requests}
    assert json.loads(request) == {"model": "m", "max_tokens": 99, "temperature": 0}
    assert {headers["authorization"] for headers in served.headers} == {f"Bearer {SECRET}"}
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(lines) == 12 and all(line["tokens"] == [11, 7] for line in lines)
    assert "12 rationales by m: 132 tokens of prompts and 84 of answers" in told
    assert SECRET not in cache.read_text() + "".join(told)


def test_no_more_at_once_than_asked_for(tmp_path):
    """And as many: each waits until four are there."""
    gate = threading.Barrier(4)

    def reply(request, number):
        gate.wait(timeout=20)
        return completion("so it is")

    with serving(reply) as (url, served):
        write(url, tmp_path / "c.jsonl", endpoint_requests=4, endpoint_timeout=30.0)
    assert served.most == 4 and len(served.requests) == 12


def test_what_is_in_the_cache_is_not_asked_for(tmp_path):
    cache = tmp_path / "rationales.jsonl"
    with serving(lambda request, n: completion("so it is")) as (url, served):
        write(url, cache, ROWS[:2])
        write(url, cache, ROWS[:3])
        assert len(served.requests) == 6
        write(url, cache, [replace(ROWS[0], text="another film")])  # the prompt is another one
        assert len(served.requests) == 8
        EndpointWriter(ROWS[1:2], SST2, replace(settings(url), endpoint_model="other"), cache, log=lambda line: None)
        assert len(served.requests) == 10
    write("http://127.0.0.1:9/v1", cache, ROWS[2:3], told=(told := []))  # nothing is missing: nobody is asked
    assert told == []


def test_what_a_model_thinks_is_no_rationale(tmp_path):
    text = "<think>Is it positive? No, negative.</think>\n\nIt says\n'film'."
    with serving(lambda request, n: completion(text)) as (url, _):
        assert write(url, tmp_path / "c.jsonl", ROWS[:1]).write(ROWS[0], POS) == "It says 'film'."


# ---- answers that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "problem"),
    [
        ("it is dull", NEG, None), ("", NEG, "empty"), ("this is POSITIVE, clearly", NEG, "arguing for another label"),
        ("positive words, yet negative on the whole", NEG, None), ("positively charged", NEG, None),
        ("the positive", POS, None),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_rationale(text, label, problem):
    assert problem_with(text, label, SST2) == problem


def test_of_labels_that_contain_each_other_the_longer_one_is_named():
    task = replace(SST2, labels=("duplicate", "not duplicate", "no"))
    assert labels_in("They are Not Duplicate.", task) == {"not duplicate"}
    assert labels_in("They are not a duplicate; not_equivalent.", TASKS["qqp"]) == {"not_duplicate"}
    assert labels_in("The two are not\nequivalent.", TASKS["mrpc"]) == {"not_equivalent"}
    assert problem_with("the two are not equivalent", "not_equivalent", TASKS["mrpc"]) is None
    assert labels_in("a duplicate, no doubt", task) == {"duplicate"}  # `no` is too short to be looked for
    assert labels_in("the world news", replace(SST2, labels=("world", "world news"))) == {"world news"}
    chinese = replace(SST2, labels=("正面", "负面", "好"))
    assert labels_in("因此这是正面的评价, 好", chinese) == {"正面"}  # one character is too short
    assert labels_in("спортивный интерес", replace(SST2, labels=("спорт", "наука"))) == set()
    assert labels_in("5 of 5", replace(SST2, labels=("4", "5"))) == set()


def test_what_cannot_be_used_is_asked_for_again_with_a_temperature(tmp_path):
    """Twice; then it is left out, counted, and not asked for by the next run."""
    told, cache, seen = [], tmp_path / "c.jsonl", {}

    def reply(request, number):
        text, label = wanted(request)
        tries = seen.setdefault((text, label), [])
        tries.append(request["temperature"])
        if text == "film 0" and label == POS:
            return completion("")
        if text == "film 1":
            return completion("cut in the", "length") if len(tries) < 3 else completion("whole at last")
        return completion(f"it is {NEG if label == POS else POS}") if len(tries) == 1 else completion("fine")

    with serving(reply) as (url, served):
        writer = write(url, cache, ROWS[:3], told=told)
        asked = len(served.requests)
        again = write(url, cache, ROWS[:3])
        assert len(served.requests) == asked
    assert seen["film 0", POS] == [0, 1, 1] and seen["film 1", POS] == [0, 1, 1] and seen["film 2", NEG] == [0, 1]
    assert told[-1].startswith("warning: 1 of them cannot be used and are left out (1 empty); delete their lines")
    for one in (writer, again):
        assert one.write(ROWS[1], NEG) == "whole at last" and one.write(ROWS[2], POS) == "fine"
        assert not one.argues_for_all(ROWS[0]) and one.argues_for_all(ROWS[1]) and one.can_write(ROWS[0])
    assert read_cache(cache)["r0", POS][0] is None
    assert sum(json.loads(line)["tokens"][1] for line in cache.read_text().splitlines()) == 7 * asked


# ---- a server that misbehaves ----------------------------------------------------------------------------------------

FINE = completion("so it is")
BUSY = ({"status": 429, "headers": {"Retry-After": "0.01"}, "text": '{"error": {"message": "slow down"}}'},)
CUT = ({"text": json.dumps(FINE)[:40], "cut": 200},)


@pytest.mark.parametrize("fault", [BUSY, refusal(500), refusal(503), CUT])
def test_what_passes_by_is_waited_for(tmp_path, monkeypatch, fault):
    quick(monkeypatch)
    with serving(lambda request, n: fault if n < 2 else FINE) as (url, served):
        writer = write(url, tmp_path / "c.jsonl", ROWS[:1], endpoint_requests=1)
    assert len(served.requests) == 4 and writer.write(ROWS[0], POS) == "so it is"


HTML = ({"text": "<html><body>Welcome</body></html>", "headers": {"Content-Type": "text/html"}},)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (BUSY, RunError, "answered 429: .*slow down.*what was written is kept, and the same command goes on"),
        (refusal(502, "bad gateway"), RunError, "answered 502: .*bad gateway"),
        (CUT, RunError, "cannot be reached"),
        (({"wait": 1.0, "text": json.dumps(FINE)},), RunError, "no answer within --endpoint_timeout 0.3"),
        (HTML, RunError, "answered what is no chat completion .*is it the base URL"),
        ({"choices": []}, RunError, "answered what is no chat completion"),
        ({"result": "hello"}, RunError, "answered what is no chat completion"),
        ({"choices": [{"message": {"content": ["parts"]}}]}, RunError, "answered what is no chat completion"),
        (({"text": '{"choices": ['},), RunError, "answered what is no answer"),
        (refusal(401, f"bad key {SECRET}"), InputError, f"refused .401.; set the environment variable {KEY}"),
        (refusal(404, "no such model"), InputError, "not found .404.: is it the base URL, .* has the server the model"),
        (refusal(400, f"too long, {SECRET}"), InputError, "answered 400: .*too long"),
    ],
)  # fmt: skip
def test_what_stays_is_told_of_in_one_sentence(tmp_path, monkeypatch, fault, kind, message):
    quick(monkeypatch, retries=1)
    monkeypatch.setenv(KEY, SECRET)
    timeout = 0.3 if kind is RunError and "timeout" in message else 5.0
    with serving(lambda request, n: fault) as (url, _):
        with pytest.raises(kind, match=f"^--endpoint_url {url}: {message}") as error:
            write(url, tmp_path / "c.jsonl", ROWS[:1], endpoint_timeout=timeout)
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    quick(monkeypatch, retries=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunError, match="cannot be reached"):
        write(f"http://127.0.0.1:{port}/v1", tmp_path / "c.jsonl", ROWS[:1])


def test_a_run_that_broke_off_goes_on(tmp_path, monkeypatch):
    """What came before the fault is in the cache, whole, and only the rest is asked for."""
    quick(monkeypatch, retries=0)
    cache = tmp_path / "c.jsonl"
    with serving(lambda request, n: FINE if n < 5 else refusal(500)) as (url, served):
        with pytest.raises(RunError):
            write(url, cache, endpoint_requests=1)
        assert len(cache.read_text().splitlines()) == 5
        served.reply = lambda request, n: FINE
        before = len(served.requests)
        write(url, cache, endpoint_requests=1)
        assert len(served.requests) - before == 7 and len(read_cache(cache)) == 12


def test_parameters_that_a_model_does_not_know_are_left_out(tmp_path):
    """Some models want max_completion_tokens, and no temperature; then they are asked as they want."""

    def reply(request, number):
        for name in ("max_tokens", "temperature"):
            if name in request:
                return refusal(400, f"{name} is not supported", param=name)
        return FINE

    with serving(reply) as (url, served):
        write(url, tmp_path / "c.jsonl", ROWS[:2], endpoint_requests=1, endpoint_tokens=55)
    assert len(served.requests) == 6 and served.requests[-1]["max_completion_tokens"] == 55


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_the_first_that_fails_ends_it():
    begun = []

    def work(job):
        begun.append(job)
        if job == 3:
            raise ValueError("three")
        time.sleep(0.01)
        return job

    with pytest.raises(ValueError, match="three"):
        list(at_once(range(1000), work, 2))
    time.sleep(0.1)
    assert len(begun) < 50


def test_who_stops_need_not_wait():
    """Ctrl-C comes while requests hang: the generator is left, and no further job begins."""
    hanging, begun, before = threading.Event(), [], set(threading.enumerate())

    def work(job):
        begun.append(job)
        if job:
            hanging.wait(timeout=30)
        return job

    results = at_once(range(10), work, 3)
    assert next(results) == 0
    results.close()
    others = set(threading.enumerate()) - before
    assert others and all(thread.daemon for thread in others)
    hanging.set()
    time.sleep(0.1)
    assert len(begun) <= 4


def test_no_job_is_no_thread():
    assert list(at_once([], lambda job: job, 8)) == []


# ---- the scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "--endpoint_url 'localhost:8000': give a URL, such as"),
        ("ftp://host/v1", "give a URL"),
        (f"https://me:{SECRET}@host/v1", f"--endpoint_url https://host/v1: give it without user.*variable {KEY}"),
        (f"https://host/v1?key={SECRET}", "--endpoint_url https://host/v1: give it without user, password or query"),
        (None, "--rationales endpoint needs --endpoint_url"),
    ],
)
def test_what_is_no_url(url, message):
    with pytest.raises(InputError, match=message) as error:
        settings(url).check_endpoint()
    assert SECRET not in str(error.value)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r'pip install "\.\[endpoint\]"'):
        endpoint_writer.require_library()


def test_from_sft_to_the_reward_model(toy, tmp_path, monkeypatch):
    """SFT learns what the server wrote; the reward model goes on with the policy's writer, and asks for what is missing
    alone. No file has the key."""
    monkeypatch.setenv(KEY, SECRET)

    def reply(request, number):
        content = request["messages"][0]["content"]
        return completion(f"because of {content.split()[3]}")  # "the soup was tasty": its last word

    flags = ["--max_new_tokens", 12, "--epochs", 1, "--labelled", 40]
    data = [*toy.data[:-2], *flags]
    with serving(reply) as (url, served):
        told = run(train_sft.main, *data, "--model", toy.base, "--rationales", "endpoint", "--endpoint_url", url,
                   "--endpoint_model", "m", "--show", 0, "--output_dir", tmp_path / "sft")  # fmt: skip
        first = len(served.requests)
        run(train_rm.main, "--policy", tmp_path / "sft", "--epochs", 1, "--output_dir", tmp_path / "rm", *ANSWER)
        second = len(served.requests) - first
    assert "rationales by m: " in told and first == len(set(map(str, served.requests[:first]))) > 40
    assert len(set(map(str, served.requests))) == len(served.requests) and second <= first
    record = read_record(tmp_path / "rm")
    assert record["config"]["rationales"] == "endpoint" and record["config"]["endpoint_url"] == url
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_the_command_writes_a_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in ROWS))
    with serving(lambda request, n: completion(f"because of {wanted(request)[0]}")) as (url, _):
        run(command.main, "--task", "sst2", "--train_file", rows, "--writer", "endpoint", "--endpoint_url", url,
            "--endpoint_model", "m", "--output", tmp_path / "out.jsonl")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["rationale"] for line in lines] == [f"because of {row.text}" for row in ROWS]


# ---- a real server ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_a_real_server(tmp_path):
    """transformers' own, with a tiny model whose words mean nothing."""
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="transformers serve needs transformers[serving]")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = toy_tokenizer("<pad>", template)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*words, "--device", "cpu"], stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(server, port, tmp_path / "log")
            config = settings(f"http://127.0.0.1:{port}/v1", endpoint_timeout=60.0, endpoint_tokens=8)
            config = replace(config, endpoint_model=str(tmp_path / "model"))
            cache = tmp_path / "c.jsonl"
            try:
                EndpointWriter(ROWS[:2], SST2, config, cache, log=lambda line: None)
            except InputError as error:  # every answer of such a model may be cut, and then no row has a rationale
                assert "has no rationale for its label" in str(error)
            lines = [json.loads(line) for line in cache.read_text().splitlines()]
            assert len(lines) == 4 and all(line["tokens"][1] > 0 for line in lines)
            assert all(line["rationale"] or line["problem"] for line in lines)
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for(server, port, log):
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_the_flags_reach_the_scripts():
    flags = [
        "--rationales",
        "endpoint",
        "--endpoint_url",
        "http://h/v1",
        "--endpoint_model",
        "m",
        "--endpoint_requests",
        "3",
    ]
    for script in (train_sft, train_rm):
        config = parse_config(script.Config, [*flags, *(["--policy", "p"] if script is train_rm else [])])
        assert (config.endpoint_url, config.endpoint_model, config.endpoint_requests) == ("http://h/v1", "m", 3)
