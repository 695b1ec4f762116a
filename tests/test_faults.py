"""Faults in the middle of a run: numbers, memory, code, disks. What is saved, what is said, what is no fault; bounds
while running."""

import errno
import json
import math
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from stopping import Killed, assert_same_run, kill_at, poisoned, refused, small_disk, stage_of
from toy_runs import ANSWER, read_metrics, run

import rllr.common.files
import rllr.keeper
import rllr.run.checkpoint
import rllr.run.resume
import rllr.run.run
import rllr.update
import train_ppo
import train_rm
import train_sft
from rllr.common.errors import RunError
from rllr.model.loading import load_policy
from rllr.run.checkpoint import list_checkpoints, problem_with  # fmt: skip

# ---- faults: the state before them is saved, the message names tensor, step and prompts


def test_a_loss_that_is_no_number(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "sft/full", tmp_path / "run")
    monkeypatch.setattr(train_sft, "sft_loss", poisoned(train_sft.sft_loss, 12, lambda loss: loss * math.nan))
    error = refused(capsys, "sft", *flags, code=1)
    path = tmp_path / "run" / "checkpoints" / "step-000006"
    assert (
        "error: step 7: the SFT loss is nan (prompts train.jsonl:" in error
        and f"The state before it is in {path}." in error
    )
    monkeypatch.undo()
    output = run(main, "--resume", tmp_path / "run")
    assert f"resumed from {path}" in output


def test_the_state_before_a_fault_is_the_state_before_the_step(toy, tmp_path, monkeypatch, capsys):
    """The fault comes in the middle of a step, after dropout has drawn: resumed, the run is the one without the
    fault."""
    for name in ("rm/full", "ppo/gold"):
        stage = name[: name.index("/")]
        main, flags = stage_of(toy, name, tmp_path / stage / "whole")
        run(main, *flags)
        main, flags = stage_of(toy, name, tmp_path / stage / "run")
        module, function, call = (train_rm, "rm_loss", 14) if stage == "rm" else (rllr.update, "_losses", 24)
        with monkeypatch.context() as patch:
            harm = lambda result: (_ for _ in ()).throw(RunError("the loss is odd."))  # noqa: E731
            patch.setattr(module, function, poisoned(getattr(module, function), call, harm))
            error = refused(capsys, stage, *flags, code=1)
        assert "The state before it is in" in error or "The newest checkpoint is" in error
        shutil.rmtree(tmp_path / stage / "run" / "last", ignore_errors=True)
        (tmp_path / stage / "run" / "failed_batch.safetensors").unlink(missing_ok=True)
        run(main, *flags, "--resume")
        assert_same_run(tmp_path / stage / "whole", tmp_path / stage / "run")


def nan_in_row(row, value=math.nan):
    def harm(result):
        tensor = result[0] if isinstance(result, tuple) else result
        tensor[row] = value
        return result

    return harm


def test_a_reward_that_is_no_number(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    monkeypatch.setattr(rllr.ppo_models, "gold_reward", poisoned(rllr.ppo_models.gold_reward, 3, nan_in_row(5)))
    error = refused(capsys, "ppo", *flags, code=1)
    found = list_checkpoints(tmp_path / "run")[0]
    assert (
        "error: step 3: the label score is nan (prompt train.jsonl:" in error
        and f"in {found}." in error
        and found.name == "step-000002"
    )
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


@pytest.mark.parametrize("what, words", [
    ("policy", "a sampled token's log-probability is nan"), ("value_model", "the value model's output is"),
])  # fmt: skip
def test_weights_that_explode(toy, tmp_path, monkeypatch, capsys, what, words):
    """Inf in the logits; a value model that explodes: in the fourth step, after three good ones."""
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    plain, calls = rllr.update.improve, []

    def exploding(models, *rest):
        stats = plain(models, *rest)
        calls.append(1)
        if len(calls) == 3:
            weights = {
                "policy": models.policy.base_model.layers[0].self_attn.q_proj.weight,
                "value_model": models.value_model.head.bias,
            }
            weights[what].data.fill_(math.inf)
        return stats

    monkeypatch.setattr(train_ppo, "improve", exploding)
    error = refused(capsys, "ppo", *flags, "--save_every", 2, "--keep_last", 1, "--eval_every", 99, code=1)
    assert f"error: step 4: {words}" in error and "(prompts train.jsonl:" in error and "Traceback" not in error
    # Neither a checkpoint nor a policy with such weights takes the place of a sound one.
    (kept,) = list_checkpoints(tmp_path / "run")
    assert kept.name == "step-000002" and "is not finite" in error and f"The newest checkpoint is {kept}." in error
    saved = [load_file(path) for path in (tmp_path / "run").rglob("*.safetensors")]
    assert all(torch.isfinite(tensor).all() for tensors in saved for tensor in tensors.values())
    assert (tmp_path / "run" / "last").exists() == (what == "value_model")


def test_a_checkpoint_of_unsound_weights_is_not_written(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    plain = train_ppo.improve

    def exploding(models, *rest):
        stats = plain(models, *rest)
        models.value_model.head.bias.data.fill_(math.nan)
        return stats

    monkeypatch.setattr(train_ppo, "improve", exploding)
    error = refused(capsys, "ppo", *flags, "--save_every", 1, code=1)
    assert (
        "a weight of the value_model after step 1 is not finite (head.bias); it is not saved. There is no checkpoint "
        "yet." in error
    )


def test_a_fault_within_an_optimisers_step(toy, tmp_path, monkeypatch, capsys):
    """Some weights have moved: nothing is saved as the state before; the newest checkpoint is named, and leads to the
    same run."""
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "whole")
    run(main, *flags)
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    module, calls = sys.modules["torch.optim.adam"], []
    plain = module.adam  # called once for each group of weights, two of each model

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 42:  # in the sixth step, after the policy's first group
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "adam", failing)
        error = refused(capsys, "ppo", *flags, code=1)
    newest = list_checkpoints(tmp_path / "run")[0]
    assert (
        f"The newest checkpoint is {newest}." in error
        and "The state before it" not in error
        and int(newest.name[-2:]) % 4 == 0
    )
    run(main, "--resume", tmp_path / "run")
    (tmp_path / "run" / "failed_batch.safetensors").unlink(missing_ok=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_own_reward_that_fails(toy, tmp_path, monkeypatch, capsys):
    """In its fourth call: the first scores dev before PPO begins."""
    body = (
        "def score(samples):\n    calls.append(1)\n    if len(calls) == 4:\n        {}\n"
        "    return [1.0] * len(samples.answers)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, failure, words in (
        ("fails", "raise KeyError('price')", "--reward fails:score raised KeyError: 'price' ("),
        ("short", "return [1.0]", "must return 8 numbers"),
    ):  # fmt: skip
        (tmp_path / f"{name}.py").write_text("calls = []\n" + body.format(failure))
        flags = [
            "--policy",
            toy.sft,
            *toy.ppo_flags,
            "--steps",
            5,
            "--reward",
            f"{name}:score",
            "--output_dir",
            tmp_path / name / "run",
        ]
        error = refused(capsys, "ppo", *flags, code=1)
        assert f"error: step 3: --reward {name}:score" in error and words in error and "step-000002" in error
        assert "its reward is code of yours; give --reward" in refused(
            capsys, "ppo", "--resume", tmp_path / name / "run"
        )
        run(train_ppo.main, "--resume", tmp_path / name / "run", "--reward", f"{name}:score")
    (tmp_path / "fails.py").write_text("calls = []\n" + body.format("pass"))
    monkeypatch.delitem(sys.modules, "fails")
    error = refused(capsys, "ppo", "--resume", tmp_path / "fails" / "run", "--reward", "fails:score")
    assert "another run: the reward function holds " in error


def test_a_bug_keeps_its_traceback_but_loses_nothing(toy, tmp_path, monkeypatch):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    monkeypatch.setattr(train_ppo, "gae", poisoned(train_ppo.gae, 6, lambda result: result[7]))
    with pytest.raises(IndexError):
        run(main, *flags)
    assert list_checkpoints(tmp_path / "run")[0].name == "step-000005"


def test_out_of_memory(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    harm = lambda result: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "analyse", poisoned(train_ppo.analyse, 3, harm))
        error = refused(capsys, "ppo", *flags, code=1)
    with monkeypatch.context() as patch:
        patch.setattr(rllr.keeper, "write_answers", poisoned(rllr.keeper.write_answers, 2, harm))
        outside = refused(capsys, "ppo", *flags, "--overwrite", "--save_every", 1, "--eval_every", 3, code=1)
    assert (
        "2 GiB); go on with --resume and a smaller --eval_batch_size. The newest checkpoint is" in outside
        and "step-000002" in outside
    )
    assert (
        "step 3: out of memory (CUDA out of memory. Tried to allocate 2 GiB); go on with --resume and a smaller"
        in error
    )
    assert "step-000002" in error
    assert "resumed from" in run(main, "--resume", tmp_path / "run", "--micro_batch_size", 1)
    with pytest.raises(RuntimeError) as no_room:
        torch.empty(10**15)
    assert rllr.run.run.out_of_memory(no_room.value) and not rllr.run.run.out_of_memory(RuntimeError("shapes differ"))


# ---- what looks like a fault and is none


def test_answers_of_one_token_and_a_batch_without_an_end(toy, tmp_path):
    toy.ppo(tmp_path / "ppo", "--reward", "label", "--label_rm", toy.label_rm, "--max_new_tokens", 1, steps=3)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["act/truncated"] for line in lines] == [1, 1, 1] and [line["act/response_len"] for line in lines] == [
        1,
        1,
        1,
    ]
    assert (
        all(value is not None for line in lines for name, value in line.items()) and lines[0]["judge/score"] <= -1
    )  # cap, penalty


def test_advantages_that_are_all_the_same(toy, tmp_path, monkeypatch):
    """One score for everything, no KL, a zero value model: no advantage, so the policy stays where it is, to the
    bit."""
    (tmp_path / "my_flat_reward.py").write_text("def flat(samples):\n    return [1.0] * len(samples.answers)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = [
        "--reward",
        "my_flat_reward:flat",
        "--kl_coef",
        0,
        "--lam",
        1,
        "--missing_eos_penalty",
        0,
        "--learning_rate",
        1e-2,
    ]
    toy.ppo(tmp_path / "ppo", *flags, steps=1)
    (line,) = read_metrics(tmp_path / "ppo", "judge/score")
    assert (
        line["credit/advantage_std"] < 1e-6
        and line["improve/grad_norm_policy"] < 1e-4
        and line["improve/value_loss"] > 0.1
    )
    before, after = load_policy(toy.sft).state_dict(), load_policy(tmp_path / "ppo" / "last").state_dict()
    assert (
        max((before[name] - after[name]).abs().max() for name in before) < 2e-2
    )  # Adam makes steps of its own size of rounding
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_a_row_of_nothing_but_padding(monkeypatch):
    """A prompt without an answer among the others: no loss, no gradient, nothing for the other rows to notice."""
    from types import SimpleNamespace

    from test_update import learning, policy_model, ppo_config, random_rows, scored_batch

    from rllr.layout import Packed
    from rllr.model.heads import ValueModel
    from rllr.ppo import gae, masked_whiten
    from rllr.rewards import shape_rewards
    from rllr.update import Batch, improve

    monkeypatch.setattr(
        rllr.update, "check_first_ratio", lambda *arguments: 0.0
    )  # these log-probabilities are off on purpose
    weights = []
    for empty in (False, True):
        policy, value_model, config = policy_model(), ValueModel.from_policy(policy_model()), ppo_config()
        batch = scored_batch(policy, value_model, random_rows(8, 1), config)
        if empty:  # row 8: the prompt of row 0 alone

            def more(tensor, value):
                return torch.cat([tensor, torch.full_like(tensor[:1], value)])

            sequences, lens, mask = batch.packed
            packed = Packed(torch.cat([sequences, sequences[:1]]), torch.cat([lens, lens[:1]]), more(mask, False))
            rollout = SimpleNamespace(packed=packed, response_mask=packed.response_mask)
            tensors = (batch.logprobs, batch.ref_logprobs, batch.values, batch.entropy)
            batch = Batch(rollout, [], *(more(tensor, math.nan) for tensor in tensors))
        mask = batch.response_mask
        scores = torch.arange(len(mask), dtype=torch.float64)
        rewards = shape_rewards(scores, batch.logprobs, batch.ref_logprobs - 0.1, mask, 0.1)
        advantages, batch.returns = gae(rewards, batch.values, mask, 1.0, 0.95)
        batch.advantages = masked_whiten(advantages, mask)
        batch.logprobs, batch.values = batch.logprobs.masked_fill(~mask, 0), batch.values.masked_fill(~mask, 0)
        plan = [[[0, 5, 2, 7] + [8] * empty, [1, 3, 4, 6]]]
        improve(learning(policy, value_model), batch, plan, config)
        weights.append(torch.cat([p.detach().flatten() for m in (policy, value_model) for p in m.parameters()]))
    assert torch.isfinite(weights[1]).all() and (weights[0] - weights[1]).abs().max() < 1e-9


# ---- bounds while running


def test_the_policy_may_not_leave_its_reference_too_far(toy, tmp_path, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "stop")
    flags += ["--learning_rate", 3e-2, "--max_ref_kl", 0.5]
    error = refused(capsys, "ppo", *flags, code=1)
    assert (
        "the policy has left the SFT policy: " in error
        and "more than --max_ref_kl 0.5" in error
        and "The state before it is in" in error
    )
    lines = read_metrics(tmp_path / "stop", "judge/score")
    assert all(line["analyse/kl_sequence"] <= 0.5 for line in lines) and len(lines) < 10


def test_or_the_rollouts_beyond_are_skipped(toy, tmp_path, capsys, monkeypatch):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "skip")
    flags += ["--learning_rate", 3e-2, "--max_ref_kl", 0.5, "--on_ref_kl", "skip"]
    run(main, *flags)
    lines = read_metrics(tmp_path / "skip", "judge/score")
    skipped = [line for line in lines if line["analyse/kl_sequence"] > 0.5]
    assert len(lines) == 10 and skipped and all("improve/policy_loss" not in line for line in skipped)
    assert all("improve/policy_loss" in line for line in lines if line not in skipped)
    monkeypatch.setattr(rllr.update, "MOST_SKIPPED", len(skipped))
    error = refused(capsys, "ppo", *flags, "--overwrite", code=1)
    assert f"{len(skipped)} rollouts in a row beyond --max_ref_kl 0.5" in error


def test_a_mask_that_does_not_count_its_tokens(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")

    def harm(rollout):
        rollout.response_mask[3] = False
        return rollout

    monkeypatch.setattr(train_ppo, "generate", poisoned(train_ppo.generate, 2, harm))
    assert "step 2: the response mask of rows [3] does not count their tokens" in refused(capsys, "ppo", *flags, code=1)


def test_a_reference_that_changes(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    plain = train_ppo.improve

    def leaking(models, *rest):
        models.reference.lm_head.weight.data.add_(1e-3)
        return plain(models, *rest)

    monkeypatch.setattr(train_ppo, "improve", leaking)
    assert "the reference policy changed during training" in refused(capsys, "ppo", *flags, code=1)


# ---- a full disk


def test_a_disk_that_fills_up(toy, tmp_path, capsys):
    """A real one: the run stops with what is wrong, the checkpoint before is whole, and with room again the run goes
    on."""
    with small_disk(tmp_path / "disk", 3) as disk:
        main, flags = stage_of(toy, "ppo/gold", disk / "run")
        error = refused(capsys, "ppo", *flags, "--save_every", 1, "--keep_last", 50, code=1)
        assert (
            "cannot be written: " in error
            and "No space left on device" in error
            and "Make room and go on with --resume" in error
        )
        assert "Traceback" not in error and problem_with(list_checkpoints(disk / "run")[0]) is None
        assert not list((disk / "run").rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert "resumed from" in run(main, "--resume", disk / "run", "--keep_last", 2)


@pytest.mark.parametrize("failing, call, words", [
    ("write_safetensors", 2, "checkpoint"), ("force_to_disk", 42, "checkpoint"), ("write_json", 9, "cannot be written"),
])  # fmt: skip
def test_writing_fails(toy, tmp_path, monkeypatch, capsys, failing, call, words):
    """The same by an injected error, wherever it strikes."""
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    place = rllr.common.files if failing == "force_to_disk" else rllr.run.checkpoint
    full = lambda result: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(place, failing, poisoned(getattr(place, failing), call, full))
        error = refused(capsys, "ppo", *flags, "--save_every", 2, code=1)
    assert words in error and "No space left on device" in error
    assert all(problem_with(path) is None for path in list_checkpoints(tmp_path / "run"))
    run(main, "--resume", tmp_path / "run")


def test_the_disk_is_full_when_a_metrics_line_is_written(toy, tmp_path, capsys, monkeypatch):
    """The line stays in the file's buffer, and closing the file tries to write it once more."""
    with small_disk(tmp_path / "disk", 8) as disk:
        main, flags = stage_of(toy, "ppo/gold", disk / "run")

        def fill(stats):
            with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            return stats

        with monkeypatch.context() as patch:
            patch.setattr(train_ppo, "improve", poisoned(train_ppo.improve, 5, fill))
            patch.setattr(rllr.common.log, "json", SimpleNamespace(dumps=lambda line: json.dumps(line) + " " * 20_000))
            error = refused(capsys, "ppo", *flags, code=1)
        assert "metrics.jsonl cannot be written: No space left on device" in error
        (disk / "filler").unlink()
        run(main, "--resume", disk / "run")
        assert [line["step"] for line in read_metrics(disk / "run", "judge/score")] == list(range(1, 11))


def test_what_tokenizers_say_of_a_full_disk(toy):
    """Their own kind of exception, with the system's words in it."""
    from rllr.common.files import disk_faults
    from rllr.model.loading import load_tokenizer

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(RunError, match="model x cannot be written: No space left on device"):
        with disk_faults("model x"):
            load_tokenizer(toy.sft).backend_tokenizer.save("/dev/full")
    with pytest.raises(ZeroDivisionError), disk_faults("model x"):
        1 / 0


def test_overwrite_spares_the_data_too(toy, tmp_path, capsys):
    for stage, source in (
        ("sft", ["--model", toy.base]),
        ("rm", ["--policy", toy.sft]),
        ("ppo", ["--policy", toy.sft, "--reward", "gold"]),
    ):
        directory = tmp_path / stage
        directory.mkdir()
        data = shutil.copy(toy.train, directory / "train.jsonl")
        (directory / "run.json").write_text("{}")
        flags = ["--task", toy.task, "--train_file", data, "--eval_file", toy.dev, *source, *ANSWER]
        assert f"--overwrite would delete {data}" in refused(
            capsys, stage, *flags, "--output_dir", directory, "--overwrite"
        )
        assert Path(data).is_file()


def test_a_reward_model_that_goes_on_has_no_old_statistics_beside_it(toy, undisturbed, tmp_path, monkeypatch):
    """Killed between its new weights and their statistics, it is refused by PPO rather than read in the wrong units."""
    directory = Path(shutil.copytree(undisturbed("rm/full"), tmp_path / "run"))
    monkeypatch.setattr(train_rm, "pairwise_accuracy", lambda chosen, rejected: torch.tensor(2.0))  # better than ever
    kill_at(monkeypatch, train_rm, "show_pairs", 1)
    with pytest.raises(Killed):
        run(train_rm.main, "--resume", directory, "--epochs", 4)
    assert not (directory / "score_statistics.json").exists() and not (directory / "rllr.json").exists()
