"""Several processes by torchrun: the same run as one process makes, and what happens where a rank ends."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ANSWER, read_metrics

from rllr.common import ranks
from rllr.common.errors import RunError
from rllr.report.replay import replay
from rllr.report.trail_format import files_in, read_trail
from rllr.run.optimizer import in_step
from rllr.run.stop import StopRequest

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def command(processes, script, *flags):
    start = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
    return [*start, str(ROOT / script), *map(str, flags)]


def environment():
    keep = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    return keep | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def launch(processes, script, *flags):
    """A finished run: (exit code, stdout, stderr)."""
    ended = subprocess.run(
        command(processes, script, *flags), capture_output=True, text=True, env=environment(), timeout=300
    )
    return ended.returncode, ended.stdout, ended.stderr


def stages(toy):
    """{script: flags}, with batches that no number of ranks divides, and a last one smaller than three."""
    sft = [*toy.data, "--model", toy.base, "--epochs", 3, "--batch_size", 7, "--learning_rate", 1e-3, "--dropout", 0,
           "--show", 0, *ANSWER]  # fmt: skip
    rm = ["--policy", toy.sft, "--epochs", 2, "--learning_rate", 1e-3, "--dropout", 0, "--batch_size", 9, *ANSWER]
    ppo = ["--policy", toy.sft, "--label_rm", toy.label_rm, "--steps", 3, "--rollout_prompts", 10, "--eval_rows", 8,
           "--audit", "all", "--learning_rate", 1e-3, "--ppo_epochs", 2, "--answers_per_prompt", 2, "--temperature", 2,
           "--micro_batch_size", 2, *ANSWER]  # fmt: skip
    return {"train_sft.py": sft, "train_rm.py": rm, "train_ppo.py": ppo}


def comparable(directory):
    skipped = ("time/", "seconds", "act/tokens_per_second")
    return [{k: v for k, v in line.items() if not k.startswith(skipped)} for line in read_metrics(directory)]


def distance(first, second):
    """The largest difference of two models' weights."""
    names = [path.name for path in sorted(first.glob("*.safetensors"))]
    assert names == [path.name for path in sorted(second.glob("*.safetensors"))] != []
    first, second = ({k: v for name in names for k, v in load_file(path / name).items()} for path in (first, second))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    """A function of the script and further flags: (the directory of its run in one process, what it printed)."""
    home = tmp_path_factory.mktemp("alone")

    @functools.cache
    def run_of(script, more=""):
        directory = home / f"{script}{more}"
        code, output, error = launch(1, script, *stages(toy)[script], *more.split(), "--output_dir", directory)
        assert code == 0, error
        return directory, output

    return run_of


SLOW = pytest.mark.slow


SHARD, LORA = "--shard", "--lora_rank 4"
# The gradients of every stage, with 2 and 3 processes, are `rank_gradients.py`'s; here are whole runs.
CASES = [
    *((2, "train_ppo.py", ""), (3, "train_sft.py", ""), (3, "train_rm.py", "")),
    *((2, "train_ppo.py", SHARD), (3, "train_ppo.py", SHARD), (2, "train_sft.py", SHARD), (2, "train_rm.py", SHARD)),
    *((2, script, f"{SHARD} {LORA}") for script in ("train_sft.py", "train_rm.py", "train_ppo.py")),
]
FAST = ((2, "train_ppo.py", ""), (2, "train_ppo.py", SHARD))


@pytest.mark.parametrize(
    ("processes", "script", "more"), [case if case in FAST else pytest.param(*case, marks=SLOW) for case in CASES]
)  # fmt: skip
def test_several_processes_make_the_run_of_one(toy, alone, tmp_path, processes, script, more):
    """The same answers, metrics and weights, but for rounding; and all of it printed and written once."""
    code, output, error = launch(
        processes, script, *stages(toy)[script], *more.split(), "--output_dir", tmp_path / "run"
    )
    assert code == 0, error
    one, printed = alone(script, more.removeprefix(SHARD))
    kept = {"train_ppo.py": "last"}.get(script, ".")
    assert distance(one / kept, tmp_path / "run" / kept) < 1e-4
    ours, theirs = comparable(one), comparable(tmp_path / "run")
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-4)
    assert abs(len(output.splitlines()) - len(printed.splitlines())) < 4  # of other paths, settings fill other lines
    names = {path.relative_to(one) for path in one.rglob("*")}
    assert names == {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")}
    if script == "train_rm.py":
        assert (one / "pairs.jsonl").read_bytes() == (tmp_path / "run" / "pairs.jsonl").read_bytes()
    if script == "train_ppo.py":
        trails = [[read_trail(path) for path in files_in(directory)] for directory in (one, tmp_path / "run")]
        answers = [[[sample["answer"] for sample in trail.samples] for trail in own] for own in trails]
        assert answers[0] == answers[1] and replay(trails[1]).holds


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", LORA])
def test_layers_that_are_put_together_in_bfloat16(toy, tmp_path, more):
    """As on a GPU: the stages run, and sampling, scoring and training agree as far as bfloat16 goes."""
    flags = [SHARD, "--precision", "bf16", *more.split(), "--output_dir"]
    for script, directory in (("train_rm.py", "rm"), ("train_ppo.py", "ppo")):
        given = [script, *stages(toy)[script], *flags, tmp_path / directory]
        code, output, error = launch(2, "tests/rank_low.py", *given)
        assert code == 0, error
    one = launch(1, "train_rm.py", *stages(toy)["train_rm.py"], *flags[1:], tmp_path / "one")
    assert one[0] == 0, one[2]
    losses = [[line["eval/loss"] for line in read_metrics(tmp_path / name, "eval/loss")] for name in ("rm", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0][0] != losses[1][0]
    step = read_metrics(tmp_path / "ppo", "improve/first_ratio_error")[0]
    assert step["improve/first_ratio_error"] < 0.02 and step["analyse/logprob_gap"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_gradient_is_that_of_the_whole_batch(processes):
    """To rounding, in float64, of every loss, with --shard and without: see `rank_gradients.py`."""
    code, output, error = launch(processes, "tests/rank_gradients.py")
    assert code == 0 and "192 gradients agree" in output, error


# ---- stopped, killed, resumed ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(processes, script, *flags):
    """A run that goes on while the block runs."""
    started = subprocess.Popen(
        command(processes, script, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def pid_of(parent, rank):
    """The process of a rank, by its environment."""
    wanted = f"RANK={rank}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (path / "status").read_text()
            if f"PPid:\t{parent}\n" in status and wanted in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def until(met, started, seconds=120):
    for _ in range(int(seconds / 0.05)):
        if met():
            return
        assert started.poll() is None, started.stderr.read()[-2000:]
        time.sleep(0.05)
    raise AssertionError("nothing came")


def steps_done(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("shape/reward") if path.exists() else 0


def long_run(toy, directory, steps):
    return ["--policy", toy.sft, "--reward", "gold", "--steps", steps, "--rollout_prompts", 8, "--eval_rows", 8,
            "--save_every", 2, "--log_every", 1, "--show_every", 999, *ANSWER, "--output_dir", directory]  # fmt: skip


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_in_one_sentence_and_it_goes_on(toy, tmp_path):
    """Within a minute, without a hang; resumed on as many ranks, it is the run that nobody killed, to the bit."""
    steps = 24
    with running(2, "train_ppo.py", *long_run(toy, tmp_path / "run", steps)) as started:
        until(lambda: steps_done(tmp_path / "run") >= 5, started)
        os.kill(pid_of(started.pid, 1), signal.SIGKILL)
        output, error = started.communicate(timeout=60)
    assert started.returncode != 0 and steps_done(tmp_path / "run") < steps
    assert error.count("another rank has ended") == 1 and "rllr" not in error.partition("Traceback")[2]
    code, output, error = launch(2, "train_ppo.py", "--resume", tmp_path / "run")
    assert code == 0, error
    code, _, error = launch(2, "train_ppo.py", *long_run(toy, tmp_path / "whole", steps))
    assert code == 0, error
    assert distance(tmp_path / "run" / "last", tmp_path / "whole" / "last") == 0
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


@pytest.mark.slow
def test_a_stop_stops_all_after_the_same_step_and_another_number_goes_on(toy, tmp_path):
    with running(2, "train_ppo.py", *long_run(toy, tmp_path / "run", 400)) as started:
        until(lambda: steps_done(tmp_path / "run") >= 3, started)
        os.kill(started.pid, signal.SIGTERM)
        output, error = started.communicate(timeout=60)
    done = steps_done(tmp_path / "run")
    assert error.count("finishing this step, then saving") == 1 and error.count(f"stopped after step {done}") == 1
    code, output, error = launch(1, "train_ppo.py", "--resume", tmp_path / "run", "--steps", done + 2)
    assert code == 0, error
    assert "warning: processes 1, the run began with 2: equal to rounding from here on" in output


@pytest.mark.slow
def test_a_sharded_run_goes_on_to_the_bit_and_in_one_process_to_rounding(toy, tmp_path):
    """Checkpoints and models hold whole weights, whoever wrote them."""
    whole, again, alone = (tmp_path / name for name in ("whole", "again", "alone"))
    flags = long_run(toy, whole, 5)
    code, _, error = launch(2, "train_ppo.py", *flags, SHARD)
    assert code == 0, error
    for copy in (again, alone):
        shutil.copytree(whole, copy)
        newest = sorted((copy / "checkpoints").iterdir())[-1]
        shutil.rmtree(newest)
        shutil.rmtree(copy / "last")
    code, output, error = launch(2, "train_ppo.py", "--resume", again)
    assert code == 0 and "resumed from" in output and ": 4 of 5 steps are done" in output, error
    assert distance(again / "last", whole / "last") == 0 and comparable(again) == comparable(whole)
    code, output, error = launch(1, "train_ppo.py", "--resume", alone)
    assert code == 0 and "warning: processes 1, the run began with 2: equal to rounding" in output, error
    assert "warning: --shard without several processes" in output
    assert distance(alone / "last", whole / "last") < 1e-5


@pytest.mark.slow
def test_a_killed_rank_of_a_sharded_run(toy, tmp_path):
    """In the middle of FSDP's own collectives: one sentence, and the newest checkpoint goes on."""
    with running(2, "train_ppo.py", *long_run(toy, tmp_path / "run", 400), SHARD) as started:
        until(lambda: steps_done(tmp_path / "run") >= 5, started)
        os.kill(pid_of(started.pid, 1), signal.SIGKILL)
        output, error = started.communicate(timeout=60)
    assert started.returncode != 0
    assert error.count("another rank has ended") == 1 and "rllr" not in error.partition("Traceback")[2]
    done = steps_done(tmp_path / "run")
    code, output, error = launch(2, "train_ppo.py", "--resume", tmp_path / "run", "--steps", done + 1)
    assert code == 0 and steps_done(tmp_path / "run") == done + 1, error


@pytest.mark.slow
def test_an_error_that_all_ranks_have_is_told_once(toy, tmp_path):
    flags = long_run(toy, tmp_path / "run", 2)
    code, output, error = launch(2, "train_ppo.py", *flags, "--minibatches", 8)
    assert code != 0 and error.count("error: 2 processes share 1 answers of a minibatch; give fewer --minibatches") == 1
    assert not (tmp_path / "run").exists()


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_of_one_process_nothing_changes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # which some clusters set for every job
    ranks.start()
    assert ranks.count() == 1 and ranks.rank() == 0 and ranks.is_first()
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.each("a") == ["a"] and ranks.from_first(lambda: 3) == 3
    tensor = torch.ones(2)
    ranks.add(tensor)
    ranks.wait()
    assert tensor.tolist() == [1, 1] and ranks.total(2.5) == 2.5
    state = torch.get_rng_state()
    with ranks.own_dropout(0, 1):
        assert torch.equal(torch.get_rng_state(), state)


def test_shares_are_apart_and_make_the_whole(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        found.append(ranks.share(list(range(8))))
    assert found == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_signal_that_comes_while_the_ranks_agree_counts_the_next_time(monkeypatch):
    """Rank 0 has told the others that it was asked nothing, then the signal comes: all go on, and stop after the next
    step."""
    request = StopRequest()
    monkeypatch.setattr(ranks, "count", lambda: 2)

    def told(own):
        if own is None:
            request._asked(signal.SIGTERM, None)
        return [own, None]

    monkeypatch.setattr(ranks, "each", told)
    assert request.agree() is None
    assert request.agree() == request.agree() == "SIGTERM"
    monkeypatch.setattr(ranks, "each", lambda own: [own, "SIGINT"])
    assert StopRequest().agree() == "SIGINT"


@pytest.mark.parametrize(
    ("ranks_of_run", "fails", "kept"), [(2, True, signal.SIG_IGN), (2, False, None), (1, True, None)]
)
def test_torchrun_cannot_cut_off_the_sentence_of_a_rank_that_lost_another(monkeypatch, ranks_of_run, fails, kept):
    """On its way out of a failed run, a rank is sent SIGTERM: without effect, in a run of several processes alone."""
    monkeypatch.setattr(ranks, "count", lambda: ranks_of_run)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with contextlib.suppress(RunError), StopRequest():
            if fails:
                raise RunError("another rank has ended")
        assert signal.getsignal(signal.SIGTERM) == (kept or before[0]) and signal.getsignal(signal.SIGINT) == before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_a_rank_with_less_to_do_keeps_step_where_weights_are_sharded(monkeypatch):
    """Three ranks with two, one and no micro-batches: all go through the model twice, what fills up counts 0."""
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr(ranks, "each", lambda value: [2, 1, 0])
    rows, sharded = ["a", "b", "c"], SimpleNamespace(shard=True)
    assert in_step([["a"], ["b"]], rows, sharded) == [(["a"], 1.0), (["b"], 1.0)]
    assert in_step([["c"]], rows, sharded) == [(["c"], 1.0), (["a"], 0.0)]
    assert in_step([], rows, sharded) == [(["a"], 0.0), (["a"], 0.0)]
    assert in_step([["c"]], rows, SimpleNamespace(shard=False)) == [(["c"], 1.0)]
    assert in_step([], rows, SimpleNamespace(shard=False)) == []


def test_each_rank_and_step_has_dropout_of_its_own(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    drawn, before = set(), torch.get_rng_state()
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        for step in (1, 2):
            for _ in range(2):  # the same again
                with ranks.own_dropout(7, step):
                    drawn.add((rank, step, float(torch.rand(()))))
    assert len(drawn) == 4 and torch.equal(torch.get_rng_state(), before)
