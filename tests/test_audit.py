"""The audit trail: what it holds is what trained, a replay by other code agrees, and a changed number is found."""

import copy
import json
import math
import re
import shutil
import sys

import pytest
import torch
from stopping import Killed, assert_same_run, kill_at, stage_of
from test_architecture import GRAPH, ROOT
from tokenizers import Tokenizer, decoders, models
from toy_runs import run
from transformers import PreTrainedTokenizerFast

import rllr.update
import train_ppo
from rllr import audit
from rllr.common.errors import InputError
from rllr.ppo import gae, value_loss
from rllr.report.explain import explain
from rllr.report.replay import MAY_CHANGE, QUANTITIES, replay
from rllr.report.trail import pieces_of
from rllr.report.trail_format import FIELDS, audited, file_of, files_in, read_trail, seal
from rllr.run.resume import BY_CONTENT, FREE, ROUNDING

RATES = ["--learning_rate", 5e-3, "--value_learning_rate", 5e-3]


@pytest.fixture(scope="module")
def mixed(toy, tmp_path_factory):
    """A run with everything: the mixed reward on running scales, two answers a prompt, two epochs, micro-batches, a KL
    of kind k3, answers that the limit cuts and answers without a label."""
    directory = tmp_path_factory.mktemp("audit") / "mixed"
    judges = ["--reward", "mixed", "--label_rm", toy.label_rm, "--rationale_rm", toy.rationale_rm]
    toy.ppo(
        directory, *judges, "--audit", "all", "--ppo_epochs", 2, "--micro_batch_size", 2, "--answers_per_prompt", 2,
        "--score_norm", "running", "--threshold", "q0.5", "--kl_kind", "k3", "--gamma", 0.98, "--max_new_tokens", 7,
        "--temperature", 1.3, "--score_clip", 1.2, *RATES, steps=2,
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def gold(toy, tmp_path_factory):
    """A run whose updates end early, on the gold reward, of which every second rollout is audited."""
    directory = tmp_path_factory.mktemp("audit") / "gold"
    flags = ["--reward", "gold", "--audit", "every:2", "--max_update_kl", 1e-6, "--ppo_epochs", 2, "--minibatches", 4]
    flags += ["--temperature", 1.6]  # some answers have no label, which this reward does not cap
    toy.ppo(directory, *flags, *RATES, steps=4)
    return directory


@pytest.fixture(scope="module")
def second(mixed):
    """The second rollout of the mixed run: its policy has left the reference."""
    return read_trail(file_of(mixed, 2))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- what is written -------------------------------------------------------------------------------------------------


def test_every_line_has_its_fields_and_no_other(mixed, gold):
    for directory in (mixed, gold):
        for path in files_in(directory):
            lines = lines_of(path)
            assert [line["kind"] for line in lines[:3]] == ["header", "step", "sample"] and lines[-1]["kind"] == "end"
            for line in lines:
                assert line.keys() - {"kind", "digest"} == FIELDS[line["kind"]].keys()
                for update in line.get("updates", ()):
                    assert update.keys() == FIELDS["update"].keys()


def test_the_runs_have_all_cases(mixed, gold):
    """So that what follows looks at each of them."""
    samples = [line for path in files_in(mixed) for line in lines_of(path) if line["kind"] == "sample"]
    assert {sample["branch"] for sample in samples} == {"mixed: below the threshold", "mixed: at the threshold"}
    assert {sample["rule"] for sample in samples} >= {"none", "missing label", "missing eos and label"}
    answers = [line for path in files_in(gold) for line in lines_of(path) if line["kind"] == "sample"]
    assert any(answer["label"] is None and answer["rule"] == "none" for answer in answers)
    updates = [u for path in files_in(mixed) for line in lines_of(path) for u in line.get("updates", ())]
    assert {update["clipped"] for update in updates} == {update["value_clipped"] for update in updates} == {True, False}


def test_off_by_default_and_without_effect(toy, tmp_path):
    """A run with a trail computes what the same run computes without one."""
    flags = ["--reward", "label", "--label_rm", toy.label_rm, "--micro_batch_size", 4]
    for name, more in (("plain", []), ("audited", ["--audit", "3"])):
        toy.ppo(tmp_path / name, *flags, *more, steps=6)
    assert not (tmp_path / "plain" / "audit").exists()
    assert [path.name for path in files_in(tmp_path / "audited")] == [f"step-00000{n}.jsonl" for n in (1, 2, 3)]
    for path in (tmp_path / "audited").rglob("rllr.json"):
        record = json.loads(path.read_text())
        record["config"]["audit"] = None
        path.write_text(json.dumps(record))
    assert_same_run(tmp_path / "plain", tmp_path / "audited")


def test_the_numbers_are_those_of_the_batch(toy, tmp_path, monkeypatch):
    """Token by token what the run's own tensors hold, and the losses what training's backward began from."""
    kept, losses = [], []
    plain_improve, plain_losses = train_ppo.improve, rllr.update._losses

    def improve(models, batch, plan, config):
        kept.append(batch)
        return plain_improve(models, batch, plan, config)

    def _losses(models, batch, rows, token_count, config, factor):
        found = plain_losses(models, batch, rows, token_count, config, factor)
        losses.append((rows, float(found["policy_loss"]), float(found["value_loss"]), float(found["clipfrac"])))
        return found

    monkeypatch.setattr(train_ppo, "improve", improve)
    monkeypatch.setattr(rllr.update, "_losses", _losses)
    flags = ["--reward", "label", "--label_rm", toy.label_rm, "--micro_batch_size", 3, "--audit", "1"]
    toy.ppo(tmp_path / "run", *flags, *RATES, steps=1)
    trail, batch = read_trail(file_of(tmp_path / "run", 1)), kept[0]
    tensors = {
        "logprob": batch.logprobs, "ref_logprob": batch.ref_logprobs, "value": batch.values, "reward": batch.rewards,
        "whitened_advantage": batch.advantages, "return": batch.returns, "advantage": batch.returns - batch.values,
        "rollout_logprob": batch.rollout.rollout_logprobs,
    }  # fmt: skip
    for row, tokens in enumerate(trail.tokens):
        assert len(tokens) == int(batch.rollout.response_lens[row])
        for t, token in enumerate(tokens):
            for name, tensor in tensors.items():
                assert token[name] == pytest.approx(tensor[row, t].item(), rel=1e-6, abs=2e-7), (name, row, t)
            assert token["token_id"] == batch.packed.sequences[row, token["position"] + 1].item()
    for rows, policy, value, clipped in losses:
        updates = [(update, trail.tokens[row]) for row in rows for token in trail.tokens[row]
                   for update in token["updates"]]  # fmt: skip
        counts = {m["minibatch"]: m["tokens"] for m in trail.step["minibatches"]}
        assert sum(update["policy_loss"] for update, _ in updates) == pytest.approx(policy, abs=1e-6)
        assert sum(update["value_loss"] for update, _ in updates) == pytest.approx(value, abs=1e-6)
        share = sum(update["clipped"] / counts[update["minibatch"]] for update, _ in updates)
        assert share == pytest.approx(clipped, abs=1e-6)


def test_texts_are_those_of_the_samples(second):
    for sample, tokens in zip(second.samples, second.tokens):
        text = "".join(token["text"] for token in tokens)
        assert text.removesuffix("<eos>") == sample["answer"]


def test_float32_survives(mixed):
    """A number in the file is the very float32, not one near it."""
    token = read_trail(file_of(mixed, 1)).tokens[0][0]
    number = torch.tensor(token["logprob"], dtype=torch.float32)
    assert json.loads(json.dumps(float(f"{number.item():.9g}"))) == token["logprob"]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [(None, []), ("2", [1, 2]), ("all", [1, 2, 3, 4, 5, 6, 7]), ("every:3", [3, 6]), ("03", [1, 2, 3])],
)
def test_which_rollouts(spec, wanted):
    assert [step for step in range(1, 8) if audited(spec)(step)] == wanted


@pytest.mark.parametrize("spec", ["0", "-1", "every:0", "every", "some", "1.5", "every:x", ""])
def test_no_such_rollouts(spec):
    with pytest.raises(InputError, match="--audit .*: give a number of rollouts, all, or every:K"):
        audited(spec)


# ---- the text of tokens ----------------------------------------------------------------------------------------------


def tokenizer_of(vocabulary, decoder):
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="?"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_leading_space_is_kept():
    """Alone such a token would be decoded without it."""
    tokens = tokenizer_of({"?": 0, "▁the": 1, "▁sou": 2, "p": 3}, decoders.Metaspace())
    assert pieces_of([1, 2, 3, 1], tokens) == ["the", " sou", "p", " the"]


def test_a_character_of_several_tokens_is_its_last_one():
    """é is two bytes; each of them alone is no text."""
    tokens = tokenizer_of({"?": 0, "Ã": 1, "©": 2, "a": 3, "Ġb": 4}, decoders.ByteLevel())
    assert pieces_of([3, 1, 2, 4], tokens) == ["a", "", "é", " b"]
    assert "".join(pieces_of([3, 1], tokens)) == tokens.decode([3, 1])  # an answer that ends within one


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_replay_agrees(mixed, gold, capsys):
    for directory, steps in ((mixed, "1, 2"), (gold, "2, 4")):
        with pytest.raises(SystemExit) as ended:
            audit.main(["replay", str(directory)])
        output = capsys.readouterr().out
        assert ended.value.code == 0 and f"numbers of 2 rollouts, steps {steps}: each follows" in output
    found = replay([read_trail(path) for path in files_in(mixed)])
    assert set(found.counts) == set(QUANTITIES) and max(difference for difference, _ in found.largest.values()) < 2e-6
    assert found.counts["kl"] > 100 and found.counts["policy_loss"] == 2 * found.counts["kl"]


def test_updates_that_ended_early_are_in_the_trail(gold):
    step = read_trail(file_of(gold, 4)).step
    assert 1 < len(step["minibatches"]) < 8  # of two epochs of four
    assert [minibatch["applied"] for minibatch in step["minibatches"]][-2:] == [True, False]


def test_replay_is_other_code():
    """It imports nothing of the run's mathematics, nor does what it imports."""
    seen, left = set(), ["rllr.report.replay"]
    while left:
        name = left.pop()
        seen.add(name)
        left += [other for other in GRAPH[name] if other not in seen]
    assert seen == {"rllr.report.replay"}
    assert GRAPH["rllr.report.trail_format"] == {"rllr.common.errors", "rllr.report.fields"}
    assert GRAPH["rllr.report.fields"] == {"rllr.common.errors"}


# {kind: {field: where an altered number is first seen}}; DIGEST: nothing is derived from it, only its digest tells.
DIGEST = None
FIRST = {
    "settings": {
        "gamma": "advantage", "lam": "advantage", "clip": "clipped", "value_clip": "value_clipped",
        "answers_per_prompt": "relative_score", "seed": DIGEST, "temperature": DIGEST,
    },
    "whitening": {"eps": "whitened_advantage"},
    "step": {
        "kl_coef": "reward", "threshold": "branch", "cap": "score", "missing_eos_penalty": "score",
        "missing_label_penalty": "score",
    },
    "scale": {"mean": "label_score", "variance": "label_score", "clip": "label_score"},
    "minibatch": {"tokens": "minibatches", "epoch": "minibatches", "minibatch": "minibatches"},
    "sample": {
        "label_raw": "label_score", "label_score": "copies", "rationale_raw": "rationale_score",
        "rationale_score": "copies", "combined_score": "copies", "score": "copies", "relative_score": "relative_score",
    },
    "token": {
        "position": "copies", "token_id": DIGEST, "rollout_logprob": "metrics", "logprob": "kl", "ref_logprob": "kl",
        "kl": "kl", "label_score": "copies", "rationale_score": "copies", "combined_score": "copies",
        "score": "copies", "reward": "reward", "value": "advantage", "advantage": "advantage",
        "whitened_advantage": "whitened_advantage", "return": "return", "step": "copies",
    },
    "update": {
        "epoch": "minibatches", "minibatch": "minibatches", "new_logprob": "ratio", "ratio": "ratio",
        "new_value": "value_clipped", "policy_loss": "policy_loss", "value_loss": "value_loss",
    },
}  # fmt: skip
METRICS = [
    "act/response_len", "act/truncated", "act/parse_failures", "analyse/kl_sequence", "analyse/kl_token",
    "analyse/logprob_gap", "judge/score", "judge/label_score", "judge/rationale_score", "judge/at_threshold",
    "judge/accuracy", "shape/kl_coef", "shape/reward", "credit/advantage_std", "credit/explained_variance",
    "improve/policy_loss", "improve/value_loss", "improve/clipfrac", "improve/value_clipfrac", "improve/approx_kl",
    "improve/ratio_mean", "improve/ratio_max",
]  # fmt: skip


def chosen(trail):
    """(sample, token) to alter: of an answer with several tokens that no rule and no clip touches."""
    for number, sample in enumerate(trail.samples):
        inside = all(
            abs(sample[f"{part}_score"]) < 0.99 * scale["clip"] for part, scale in trail.step["scales"].items()
        )
        if sample["rule"] == "none" and inside and sample["tokens"] > 3:
            for token in trail.tokens[number][1:-1]:
                if not any(update["clipped"] or update["value_clipped"] for update in token["updates"]):
                    return number, token["token"]
    raise AssertionError("the run has no such answer")


def part_of(trail, kind, sample, token):
    """The object that holds the fields of a kind."""
    of_token = trail.tokens[sample][token]
    return {
        "settings": trail.header["settings"], "whitening": trail.header["whitening"], "step": trail.step,
        "scale": trail.step["scales"]["label"], "minibatch": trail.step["minibatches"][1],
        "sample": trail.samples[sample], "token": of_token, "update": of_token["updates"][0],
    }[kind]  # fmt: skip


def write_trail(trail, path):
    """A trail as a whole file with right digests, as one writes it who wants to deceive."""
    lines = [trail.header, trail.step]
    for sample, tokens in zip(trail.samples, trail.tokens):
        lines += [sample, *tokens]
    path.write_text(
        "\n".join(seal({k: v for k, v in line.items() if k != "digest"} for line in lines)) + "\n", encoding="utf-8"
    )
    return path


def test_a_trail_that_is_written_again_is_the_same_file(mixed, tmp_path):
    source = file_of(mixed, 2)
    assert write_trail(read_trail(source), tmp_path / "step-000002.jsonl").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in FIRST.items() for name in fields])
def test_an_altered_number_is_found(second, tmp_path, kind, name):
    """In the first quantity that is derived from it, with step, sample and token; or, by its digest, as a line."""
    forged = copy.deepcopy(second)
    sample, token = chosen(forged)
    held = part_of(forged, kind, sample, token)
    whole = isinstance(held[name], int) and not isinstance(held[name], bool)
    held[name] += -100.0 if name == "cap" else 1 if whole else 0.37  # a cap binds where it is below the score
    found = replay([read_trail(write_trail(forged, tmp_path / "step-000002.jsonl"))])
    expected = FIRST[kind][name]
    if expected is DIGEST:
        assert found.holds  # so the digest must tell, below
    else:
        assert name == "answers_per_prompt" or not found.problems
        assert {finding.quantity for finding in found.first()} == {expected}
        places = [finding.where for finding in found.first()]
        if kind == "sample":
            assert all(where.startswith(f"step 2, sample {sample}") for where in places)
        if kind in ("token", "update") and expected not in ("metrics", "advantage"):
            assert all(where.startswith(f"step 2, sample {sample}, token {token}") for where in places)
        if name in ("value", "advantage"):  # a value is in the advantage of its own token and of the one before
            assert places[0].startswith(f"step 2, sample {sample}, token ")
            assert f"step 2, sample {sample}, token {token}" in places


@pytest.mark.parametrize("name", METRICS)
def test_an_altered_metric_is_found(second, gold, tmp_path, name):
    forged = read_trail(file_of(gold, 2)) if name == "judge/accuracy" else copy.deepcopy(second)
    forged.step["metrics"][name] += 0.01
    found = replay([read_trail(write_trail(forged, tmp_path / "step-000002.jsonl"))])
    assert [finding.where for finding in found.first()] == [f"step 2 ({name})"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_agrees_with_nothing(second, value):
    """Infinity is within every tolerance of infinity."""
    forged = copy.deepcopy(second)
    sample, token = chosen(forged)
    forged.tokens[sample][token]["ref_logprob"] = value
    assert "kl" in {finding.quantity for finding in replay([forged]).findings}


@pytest.mark.parametrize("name", ["clipped", "value_clipped"])
def test_an_altered_decision_is_found(second, tmp_path, name):
    forged = copy.deepcopy(second)
    sample, token = chosen(forged)
    update = forged.tokens[sample][token]["updates"][-1]
    update[name] = not update[name]
    found = replay([read_trail(write_trail(forged, tmp_path / "step-000002.jsonl"))])
    assert [finding.quantity for finding in found.first()] == [name]


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_a_share_of_a_loss_is_small_and_so_is_what_is_allowed(second, tmp_path, name):
    """A share is divided by the minibatch's tokens: a twentieth of it more is found."""
    forged = copy.deepcopy(second)
    sample, token = chosen(forged)
    update = max(forged.tokens[sample][token]["updates"], key=lambda update: abs(update[name]))
    minibatch = next(
        m for m in forged.step["minibatches"]
        if (m["epoch"], m["minibatch"]) == (update["epoch"], update["minibatch"])
    )  # fmt: skip
    update[name] += 1e-4 / minibatch["tokens"]
    found = replay([read_trail(write_trail(forged, tmp_path / "step-000002.jsonl"))])
    assert [finding.quantity for finding in found.first()] == [name]


def test_a_row_that_no_minibatch_has_is_found(second, tmp_path):
    """Neither in the plan nor in its tokens: only the count of all rows tells."""
    forged = copy.deepcopy(second)
    for minibatch in forged.step["minibatches"]:
        if 3 in minibatch["rows"]:
            minibatch["rows"].remove(3)
            minibatch["tokens"] -= len(forged.tokens[3])
    for token in forged.tokens[3]:
        token["updates"] = []
    found = replay([read_trail(write_trail(forged, tmp_path / "step-000002.jsonl"))])
    assert {finding.where for finding in found.first()} == {"step 2, epoch 0", "step 2, epoch 1"}


@pytest.mark.parametrize("name", ["branch", "rule", "label", "truncated"])
def test_an_altered_word_is_found(second, tmp_path, name):
    forged = copy.deepcopy(second)
    sample, _ = chosen(forged)
    forged.samples[sample][name] = {"truncated": True, "label": None}.get(name, "missing eos")
    found = replay([read_trail(write_trail(forged, tmp_path / "step-000002.jsonl"))])
    assert {finding.quantity for finding in found.first()} <= {"copies", "rule", name}
    assert all(f"sample {sample}" in finding.where for finding in found.first())


def test_a_difference_within_rounding_of_a_bound_is_no_finding(second):
    """A ratio that stands on its bound may count as clipped or not."""
    trail = copy.deepcopy(second)
    clip = trail.header["settings"]["clip"]
    token = next(t for own in trail.tokens for t in own if t["whitened_advantage"] > 0.1)
    update = token["updates"][0]
    update["new_logprob"] = token["logprob"] + math.log(1 + clip) + 1e-8
    update["ratio"] = math.exp(update["new_logprob"] - token["logprob"])
    for decision in (True, False):
        update["clipped"] = decision
        assert "clipped" not in {finding.quantity for finding in replay([trail]).findings}


# ---- forgeries with right digests, and what is no forgery ------------------------------------------------------------


def no_second_epoch(trail):
    trail.step["minibatches"] = [m for m in trail.step["minibatches"] if m["epoch"] == 0]
    for token in (token for tokens in trail.tokens for token in tokens):
        token["updates"] = [update for update in token["updates"] if update["epoch"] == 0]


def no_updates(trail):
    trail.step["minibatches"] = []
    for token in (token for tokens in trail.tokens for token in tokens):
        token["updates"] = []


def no_raw_scores(trail):
    for sample in trail.samples:
        sample["label_raw"] = None


def no_scales(trail):
    trail.step["scales"] = {}
    for sample in trail.samples:
        sample["label_raw"] = sample["rationale_raw"] = None


@pytest.mark.parametrize("value", [1e7, -1e9, 1e12])
def test_no_altered_number_widens_its_own_tolerance(second, value):
    """A raw score of 1e7 is clipped, whatever its rounding, so the score is the clip."""
    forged = copy.deepcopy(second)
    sample, _ = chosen(forged)
    forged.samples[sample]["label_raw"] = value
    assert [finding.quantity for finding in replay([forged]).first()] == ["label_score"]
    forged = copy.deepcopy(second)
    forged.step["scales"]["label"]["mean"] = value
    assert {finding.quantity for finding in replay([forged]).first()} == {"label_score"}


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (no_second_epoch, "minibatches of step 2 (epochs)"),
        (no_updates, "minibatches of step 2 (any)"),
        (no_raw_scores, "a reward model gave its label_score, but label_raw is null"),
        (lambda trail: trail.step["minibatches"][-1].update(applied=False), "epoch 1, minibatch 1 (applied)"),
        (lambda trail: trail.step["minibatches"][0].update(applied=False), "minibatch 0 (the last)"),
        (lambda trail: trail.step["minibatches"].reverse(), "(its place)"),
        (lambda trail: trail.step["metrics"].pop("judge/score"), "step 2: its metrics have no judge/score"),
        (lambda trail: trail.header["settings"].update(reward="label"), "its mode is mixed, its run's --reward is lab"),
        (lambda trail: trail.header["settings"].update(minibatches=8), "has 4 minibatches, not ppo_epochs * minib"),
        (lambda trail: trail.header["settings"].update(rollout_prompts=64), "has 16 answers, not rollout_prompts * "),
        (lambda trail: trail.header["settings"].update(max_new_tokens=2), "tokens, more than max_new_tokens"),
        (lambda trail: trail.samples[1].update(prompt="another"), "its prompt is not that of its group's first"),
        (lambda trail: trail.step["metrics"].update(episodes=5), "(episodes)"),
        (lambda trail: trail.step["metrics"].update({"judge/score_parsed": 1e300}), "(judge/score_parsed)"),
        (lambda trail: trail.step["metrics"].update({"judge/label_clipped": 0.9}), "(judge/label_clipped)"),
        (lambda trail: trail.step["metrics"].update({"improve/first_ratio_error": 0.1}), "first_ratio_error)"),
        (lambda trail: trail.step["metrics"].update({"judge/accuracy": 1.0}), "judge/accuracy, which does not follow"),
        (lambda trail: trail.step["metrics"].pop("analyse/entropy"), "its metrics have no analyse/entropy"),
        (lambda trail: trail.step["metrics"].pop("improve/grad_norm_value"), "have no improve/grad_norm_value"),
        (no_scales, "has the scales of [], not of ['label', 'rationale']"),
    ],
)  # fmt: skip
def test_what_a_forger_leaves_out_is_found(second, tmp_path, capsys, harm, told):
    forged = copy.deepcopy(second)
    harm(forged)
    path = write_trail(forged, tmp_path / "step-000002.jsonl")
    with pytest.raises(SystemExit) as ended:
        audit.main(["replay", str(path)])
    assert ended.value.code == 1 and told in capsys.readouterr().err


def test_where_the_updates_ended_follows_from_the_tokens(gold):
    """The run stops its updates beyond --max_update_kl 1e-6."""
    forged = copy.deepcopy(read_trail(file_of(gold, 4)))
    forged.step["minibatches"][-1]["applied"] = True
    assert {finding.where.rpartition(" ")[2] for finding in replay([forged]).first()} >= {"(applied)", "(epochs)"}


def test_a_missing_rollout_is_found(mixed, gold, tmp_path, capsys):
    """As far as the trail and the run's metrics say that there was one."""
    for source, gone, steps in ((mixed, 2, "step 2"), (gold, 4, "step 4")):
        copied = tmp_path / source.name
        shutil.copytree(source, copied)
        file_of(copied, gone).unlink()
        with pytest.raises(SystemExit) as ended:
            audit.main(["replay", str(copied)])
        error = capsys.readouterr().err
        assert ended.value.code == 1 and f"{steps}: --audit asked for it, but its file is not here" in error
        (copied / "metrics.jsonl").unlink()  # then nobody knows that the run went so far
        with pytest.raises(SystemExit) as ended:
            audit.main(["replay", str(copied / "audit")])
        assert ended.value.code == 0
        capsys.readouterr()


def test_which_rollouts_are_missing():
    (told,) = audit.missing_rollouts({1: "all", 3: "all"}, 0, None)
    assert told == "step 2: --audit asked for it, but its file is not here"
    assert not audit.missing_rollouts({1: "2", 2: "2"}, 9, "2")
    assert not audit.missing_rollouts({10: "every:5", 1: "2", 2: "2", 15: "every:5"}, 16, "every:5")  # resumed
    assert not audit.missing_rollouts({4: "all"}, 0, None)  # resumed from step 3 with --audit
    assert not audit.missing_rollouts({1: "all", 2: "all"}, 9, None)  # resumed without it
    assert not audit.missing_rollouts({1: "all", 2: "all"}, 9, "every:50")
    (told,) = audit.missing_rollouts({1: "all"}, 4 * 10**9, "all")  # a line that somebody made up
    assert told.startswith("steps 2, 3, 4, ")


def test_files_of_other_runs_and_other_names_are_found(mixed, gold, tmp_path, capsys):
    folder = tmp_path / "audit"
    folder.mkdir()
    one, two = file_of(mixed, 1), file_of(mixed, 2)

    def told(*pairs):
        for path in folder.iterdir():
            path.unlink()
        for source, step in pairs:
            shutil.copy(source, folder / f"step-{step:06d}.jsonl")
        with pytest.raises(SystemExit) as ended:
            audit.main(["replay", str(folder)])
        return ended.value.code, capsys.readouterr().err

    assert told((one, 1), (two, 2)) == (0, "")
    code, error = told((one, 2), (two, 1))  # names swapped
    assert code == 1 and "step-000001.jsonl: holds step 2" in error
    with pytest.raises(SystemExit):
        audit.main(["explain", str(folder), "--step", "1", "--sample", "0", "--token", "0"])
    assert "holds step 2; replay the trail" in capsys.readouterr().err
    code, error = told((one, 1), (file_of(gold, 2), 2))  # of another run
    assert code == 1 and "--reward is 'gold', in the files before it 'mixed': another run's" in error


def test_what_a_resumed_run_may_change_is_what_resume_says():
    assert MAY_CHANGE == FREE | ROUNDING | BY_CONTENT


def test_an_audit_that_is_turned_off_on_resume_is_no_alarm(toy, tmp_path, capsys):
    toy.ppo(tmp_path / "run", "--reward", "gold", "--save_every", 1, "--audit", "all", steps=2)
    run(train_ppo.main, "--resume", tmp_path / "run", "--steps", 3, "--audit", "none")
    with pytest.raises(SystemExit) as ended:
        audit.main(["replay", str(tmp_path / "run")])
    assert ended.value.code == 0, capsys.readouterr().err


def test_nearly_equal_returns_make_no_false_alarm(toy, tmp_path, monkeypatch):
    """All scores are 1000: the returns' spread is small beside them, and float32 loses much of it."""
    (tmp_path / "same_reward.py").write_text("def same(samples):\n    return [1000.0 for _ in samples.answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--reward", "same_reward:same", "--audit", "all", "--gamma", 1, "--lam", 1, "--ppo_epochs", 2, *RATES]
    toy.ppo(tmp_path / "run", *flags, steps=3)
    found = replay([read_trail(path) for path in files_in(tmp_path / "run")])
    assert found.holds, found.findings[:2]


def test_a_skipped_rollout_has_no_minibatches(toy, tmp_path):
    judge = ["--reward", "label", "--label_rm", toy.label_rm]
    toy.ppo(tmp_path / "run", *judge, "--audit", "all", "--max_ref_kl", 1e-9, "--on_ref_kl", "skip", *RATES, steps=2)
    trail = read_trail(file_of(tmp_path / "run", 2))
    assert not trail.step["minibatches"] and replay([trail]).holds
    trail.step["metrics"]["improve/policy_loss"] = 0.5
    assert "improve/policy_loss, which does not follow" in replay([trail]).problems[0]
    del trail.step["metrics"]["improve/policy_loss"]
    trail.header["settings"]["on_ref_kl"] = "stop"  # under which no run goes on without learning
    assert not replay([trail]).holds


def test_explain_says_what_is_wrong_with_the_lines(mixed, tmp_path, capsys):
    path = tmp_path / "step-000002.jsonl"
    path.write_text(file_of(mixed, 2).read_text(encoding="utf-8").replace('"token": 1,', '"token": 1, ', 1))
    audit.main(["explain", str(path), "--sample", "0", "--token", "0"])
    assert "its digest does not fit" in capsys.readouterr().err


def test_one_file_by_any_name(mixed, tmp_path, capsys):
    shutil.copy(file_of(mixed, 2), tmp_path / "mine.jsonl")
    (tmp_path / "step-last.jsonl").write_text("notes")
    with pytest.raises(SystemExit) as ended:
        audit.main(["replay", str(tmp_path / "mine.jsonl")])
    assert ended.value.code == 0
    audit.main(["explain", str(tmp_path / "mine.jsonl"), "--sample", "0", "--token", "0"])
    assert "step 2, sample 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        audit.main(["explain", str(tmp_path / "mine.jsonl"), "--step", "1", "--sample", "0", "--token", "0"])
    assert "--step 1: this trail has step 2 alone" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds no audit trail"):
        files_in(tmp_path)


@pytest.mark.parametrize("scale", [0.01, 30.0, 1e4])
def test_large_rewards_make_no_false_alarm(toy, tmp_path, monkeypatch, scale):
    """Rounding grows with the numbers; and in a run of large ones, an error of theirs is still found."""
    reward = f"def paid(samples):\n    return [{scale} * (3 + len(answer) % 5) for answer in samples.answers]\n"
    (tmp_path / "large_reward.py").write_text(reward)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "large_reward", raising=False)
    flags = ["--reward", "large_reward:paid", "--audit", "all", "--answers_per_prompt", 2, "--ppo_epochs", 2]
    toy.ppo(tmp_path / "run", *flags, *RATES, steps=3)
    trails = [read_trail(path) for path in files_in(tmp_path / "run")]
    found = replay(trails)
    assert not found.findings and not found.problems
    trails[-1].tokens[0][0]["advantage"] += 1e-3 * scale
    assert replay(trails).findings


def test_large_numbers_that_cancel_make_no_false_alarm(second):
    """Values of 10,000 whose differences are small keep the rounding of 10,000: in float32 0.001."""
    trail = copy.deepcopy(second)
    trail.header["settings"]["gamma"] = 1.0
    noise = torch.Generator().manual_seed(0)
    for own in trail.tokens:
        rewards, values = torch.randn(2, 1, len(own), generator=noise)
        values = values * 3 + 1e4
        rewards[0, -1] += 1e4
        mask = torch.ones_like(values).bool()
        advantages, returns = gae(rewards, values, mask, **{k: trail.header["settings"][k] for k in ("gamma", "lam")})
        columns = {"reward": rewards, "value": values, "advantage": advantages, "return": returns}
        for name, column in columns.items():
            for token, value in zip(own, column[0].tolist()):
                token[name] = value
        for epoch in range(2):
            new = values + torch.randn(values.shape, generator=noise) * 0.3
            for t, token in enumerate(own):
                update, at = token["updates"][epoch], (slice(None), slice(t, t + 1))
                old = values[at], returns[at], mask[at]
                loss, stats = value_loss(new[at], *old, trail.header["settings"]["value_clip"])
                sizes = [m["tokens"] for m in trail.step["minibatches"]
                         if (m["epoch"], m["minibatch"]) == (update["epoch"], update["minibatch"])]  # fmt: skip
                update["new_value"], update["value_loss"] = new[at].item(), float(loss) / sizes[0]
                update["value_clipped"] = bool(stats["clipfrac"])
    of_values = {"advantage", "return", "value_loss", "value_clipped"}
    assert not [finding for finding in replay([trail]).findings if finding.quantity in of_values]


def test_a_score_on_the_threshold_may_be_on_either_side(second):
    """The run compares in float32: 0.7 is 0.699999988 there."""
    trail = copy.deepcopy(second)
    sample, _ = chosen(trail)
    own = trail.samples[sample]
    own["label_score"], trail.step["threshold"] = 0.699999988, 0.7
    for branch in ("mixed: at the threshold", "mixed: below the threshold", "label"):
        own["branch"] = branch
        wrong = [finding for finding in replay([trail]).findings if finding.where == f"step 2, sample {sample}"]
        assert ("branch" in {finding.quantity for finding in wrong}) == (branch == "label")


def test_numbers_beyond_all_bounds_are_findings(second):
    """And no error from the depths."""
    for kind, names in FIRST.items():
        for name in names:
            forged = copy.deepcopy(second)
            held = part_of(forged, kind, *chosen(forged))
            for value in (1e300, -1e300, 800.0) if isinstance(held[name], float) else ():
                held[name] = value
                if value > 0 or name not in ("variance", "eps"):  # which the reader refuses
                    replay([forged])


# ---- digests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ['"token_id": ', '"position": ', '"prompt_ids": [', '"seed": ', '"lines": '])
def test_a_changed_line_is_found_by_its_digest(mixed, tmp_path, capsys, old):
    path = tmp_path / "step-000002.jsonl"
    text = file_of(mixed, 2).read_text(encoding="utf-8")
    at = text.index(old) + len(old)
    path.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :], encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        audit.main(["replay", str(path)])
    number = text[:at].count("\n") + 1
    error = capsys.readouterr().err
    assert ended.value.code == 1 and f"line {number} (" in error and "its digest does not fit" in error
    if "token_id" in old:
        assert "(step 2, sample 0, token 0)" in error


def test_missing_and_moved_lines_are_found(mixed, tmp_path):
    lines = file_of(mixed, 2).read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "step-000002.jsonl"
    for changed in (lines[:-1], [*lines[:4], lines[5], lines[4], *lines[6:]]):
        path.write_text("".join(changed), encoding="utf-8")
        assert read_trail(path).problems


def changed(line, name, value=None):
    """A line with another value in a field."""
    return json.dumps(json.loads(line) | {name: value}) + "\n"


def changed_setting(line, name, value):
    return changed(line, "settings", json.loads(line)["settings"] | {name: value})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda lines: ["nonsense\n"], r"line 1: not valid JSON"),
        (lambda lines: ['{"loss": 1}\n'], r"line 1: is no line of an audit trail; a line has kind header"),
        (lambda lines: lines[1:], r"has 0 lines of kind 'header', not one"),
        (lambda lines: [*lines[:2], *lines[3:]], r"its samples are not numbered from 0 to 15"),
        (lambda lines: [*lines[:3], *lines[4:]], r"sample 0 does not have tokens 0 to"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 99'), *lines[1:]], "has audit format 99; this"),
        (lambda lines: [lines[0], lines[1].replace('"kl_coef"', '"beta"', 1), *lines[2:]], "the step has no kl_coef"),
        (lambda lines: [], r"has 0 lines of kind 'header'"),
        (lambda lines: ['{"kind": []}\n'], r"is no line of an audit trail"),
        (lambda lines: [changed(lines[0], "settings"), *lines[1:]], "header has settings None, which is not an obj"),
        (lambda lines: [lines[0], changed(lines[1], "kl_coef", "x"), *lines[2:]], "kl_coef 'x', which is not a finite"),
        (lambda lines: [lines[0], changed(lines[1], "answers", 10**12), *lines[2:]], "its samples are not numbered"),
        (lambda lines: [lines[0], changed(lines[1], "minibatches", [{}]), *lines[2:]], "minibatches has no epoch"),
        (lambda lines: [*lines[:3], changed(lines[3], "value", math.nan), *lines[4:]], "NaN is no number"),
        (lambda lines: [*lines[:3], changed(lines[3], "updates", [1]), *lines[4:]], "updates is no object"),
        (lambda lines: [lines[0], changed(lines[1], "mode", "best"), *lines[2:]], "mode 'best', which is not one of"),
        (lambda lines: [lines[0], changed(lines[1], "threshold"), *lines[2:]], "mode mixed and no threshold"),
        (lambda lines: [*lines[:2], changed(lines[2], "label_score"), *lines[3:]], "some of its samples have a label"),
        (lambda lines: [lines[0], changed(lines[1], "kl_coef", 10**400), *lines[2:]], "which is not a finite number"),
        (lambda lines: ["[" * 100_000 + "\n"], "not valid JSON"),
        (lambda lines: ["1" * 5000 + "\n"], "not valid JSON"),
        (lambda lines: [lines[0], changed(lines[1], "metrics", {"a": 10**400}), *lines[2:]], "which is not a finite"),
        (lambda lines: [lines[0], changed(lines[1], "metrics", {"a": []}), *lines[2:]], "which is not a finite"),
        (lambda lines: [*lines[:2], changed(lines[2], "rationale_score"), *lines[3:]], "and some have none"),
        (lambda lines: [changed_setting(lines[0], "audit", []), *lines[1:]], "has audit .*not text or null"),
    ],
)  # fmt: skip
def test_what_is_no_trail(mixed, tmp_path, harm, message):
    path = tmp_path / "step-000002.jsonl"
    path.write_text("".join(harm(file_of(mixed, 2).read_text(encoding="utf-8").splitlines(keepends=True))))
    with pytest.raises(InputError, match=message):
        read_trail(path)


def test_no_trail_at_all(toy, tmp_path, capsys):
    for arguments, message in (
        (["replay", str(toy.sft)], "holds no audit trail; train_ppo.py --audit N writes one"),
        (["replay", str(tmp_path / "nowhere")], "holds no audit trail"),
    ):
        with pytest.raises(SystemExit) as ended:
            audit.main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err


# ---- explain ---------------------------------------------------------------------------------------------------------


def evaluated(formula):
    """The value of a printed formula: its words are functions of this test, ^ is a power."""
    names = {"exp": math.exp, "sqrt": math.sqrt, "max": max, "min": min}
    return eval(formula.replace("^", "**").replace("cap ", ""), {"__builtins__": {}}, names)


def test_every_printed_equation_holds(mixed):
    """The numbers put into an equation give the number behind it, whatever the token."""
    checked = set()
    for path in files_in(mixed):
        trail = read_trail(path)
        for sample, tokens in enumerate(trail.tokens):
            for token in range(len(tokens)):
                for line in explain(trail, sample, token).splitlines():
                    formula, _, result = line.split("   (")[0].rpartition(" = ")
                    formula = formula.rpartition("= ")[2]
                    if re.fullmatch(r"(exp|max|min|sqrt|cap |[-+*/^(),. 0-9e])+", formula):
                        number = float(result.split(",")[0].removesuffix(" nats"))
                        assert evaluated(formula) == pytest.approx(number, rel=1e-3, abs=3e-5), line
                        checked.add(line.strip().partition(" ")[0] + line.count("=") * "=")
    assert len(checked) > 8


def test_explain_names_what_it_is_about(mixed, capsys):
    audit.main(["explain", str(mixed), "--step", "2", "--sample", "1", "--token", "0"])
    told = capsys.readouterr().out
    for act in ("1 act", "2 analyse", "3 judge", "4 shape", "5 credit", "6 improve"):
        assert act in told
    assert "epoch 0, minibatch" in told and "epoch 1, minibatch" in told and told.startswith("step 2, sample 1 (row ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "9", "--sample", "0", "--token", "0"], "--step 9: give one of this trail's steps, 1, 2"),
        (["--step", "1", "--sample", "16", "--token", "0"], "--sample 16: step 1 has samples 0 to 15"),
        (["--step", "1", "--sample", "0", "--token", "99"], "--token 99: sample 0 has tokens 0 to "),
        (["--sample", "0", "--token", "0"], "--step: give one of this trail's steps, 1, 2"),
    ],
)
def test_explain_of_what_is_not_there(mixed, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        audit.main(["explain", str(mixed), *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# ---- resume ----------------------------------------------------------------------------------------------------------


def trail_bytes(directory):
    return {path.name: path.read_bytes() for path in files_in(directory)}


def test_a_killed_run_goes_on_to_the_same_bytes(toy, tmp_path, monkeypatch):
    """Killed in its seventh step, after a checkpoint of the fourth: the files of steps 5 and 6 are written again."""
    main, flags = stage_of(toy, "ppo/mixed", tmp_path / "whole")
    run(main, *flags, "--audit", "all")
    main, flags = stage_of(toy, "ppo/mixed", tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at(patch, rllr.update, "_losses", 50)
        with pytest.raises(Killed):
            run(main, *flags, "--audit", "all")
    names = [path.name for path in files_in(tmp_path / "killed")]
    assert names == [f"step-{step:06d}.jsonl" for step in range(1, len(names) + 1)] and len(names) > 4
    later = file_of(tmp_path / "killed", len(names))
    later.write_text("spoilt")  # what is behind the checkpoint is not read, but written anew
    run(main, *flags, "--audit", "all", "--resume")
    assert trail_bytes(tmp_path / "whole") == trail_bytes(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_an_older_checkpoint_cuts_the_trail(toy, tmp_path):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    run(main, *flags, "--audit", "every:2")
    before = trail_bytes(tmp_path / "run")
    assert [*before] == [f"step-{step:06d}.jsonl" for step in (2, 4, 6, 8, 10)]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000008"
    assert checkpoint.is_dir()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000010")
    for step in (9, 10):  # the ninth would not be written anew
        file_of(tmp_path / "run", step).write_text("of another life\n")
    run(main, "--resume", checkpoint)  # --audit is the run's own
    assert trail_bytes(tmp_path / "run") == before
    run(main, "--resume", tmp_path / "run", "--steps", 12, "--audit", "all")  # from here on all of them
    assert [*trail_bytes(tmp_path / "run")][-3:] == [f"step-{step:06d}.jsonl" for step in (10, 11, 12)]


def test_a_disk_that_refuses_ends_the_run_with_a_sentence(toy, tmp_path, monkeypatch, capsys):
    import rllr.report.trail

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rllr.report.trail, "write_text", full)
    with pytest.raises(SystemExit) as ended:
        toy.ppo(tmp_path / "run", "--reward", "gold", "--audit", "1")
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "step 1: the audit trail" in error and "No space left on device" in error


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_every_field_as_the_format_has_it():
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = {
        tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in page.splitlines() if line[:1] == "|"
    }
    wanted = {
        (f"`{name}`", unit, what.replace("|", "or"))
        for fields in FIELDS.values()
        for name, (unit, what) in fields.items()
    }
    assert wanted == rows - {("field", "unit", "what it is"), ("---|---|---",)}
