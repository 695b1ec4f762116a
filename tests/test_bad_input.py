"""Bad input ends in one line on stderr that names the file or flag and what to do, exit code 2, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import toy_tokenizer
from toy_runs import TRAIN_ROWS, run, write_rows

import train_ppo
import train_rm
import train_sft
from rllr import evaluate, predict, tiny
from rllr.rationales import __main__ as rationales

ROOT = Path(__file__).parent.parent
MAINS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo, "tiny": tiny, "evaluate": evaluate, "predict": predict,
         "rationales": rationales}  # fmt: skip


# ---- what is put in the way ------------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a case happens: `tmp` is the test's own directory, `out` inside it the output directory."""

    tmp: Path
    toy: object

    def rows(self, rows, name="rows.jsonl"):
        write_rows(self.tmp / name, rows)

    def text(self, content, name="rows.jsonl"):
        (self.tmp / name).parent.mkdir(exist_ok=True)
        (self.tmp / name).write_text(content)

    def copy(self, what, name="copy"):
        shutil.copytree(getattr(self.toy, what), self.tmp / name)
        return self.tmp / name


def empty_file(place):
    place.text("")


def broken_json(place):
    place.rows(TRAIN_ROWS[:3])
    place.text((place.tmp / "rows.jsonl").read_text() + '{"text": "the tea was rude", "label"\n')


def no_text_column(place):
    place.rows([{"sentence": row["text"], "label": row["label"]} for row in TRAIN_ROWS])


def no_label_column(place):
    place.rows([{"text": row["text"]} for row in TRAIN_ROWS])


def unknown_label(place):
    place.rows([*TRAIN_ROWS[:6], {"text": "the tea was so-so", "label": "neutral"}, *TRAIN_ROWS[6:]])


def no_text_at_all(place):
    place.rows([{"text": " ", "label": "good"}, {"text": "", "label": "bad"}])


def few_rows(place):
    place.rows(TRAIN_ROWS[:6])


def rows_without_rationales(place, but=0):
    place.rows([{k: v for k, v in row.items() if i < but or k != "rationales"} for i, row in enumerate(TRAIN_ROWS)])


def no_gold(place):
    place.rows([{"text": "the view was odd"}, *TRAIN_ROWS])


def not_utf8(place):
    (place.tmp / "rows.jsonl").write_bytes(b'{"text": "caf\xe9", "label": "good"}\n')


def long_template(place):
    place.text("labels: [good, bad]\nprompt: '" + "the waiter was rude " * 30 + "{text}'\n", "long.yaml")
    (place.copy("base") / "rllr.json").unlink()  # as from elsewhere: a model of no task


def other_labels(place):
    place.text('labels: [wet, dry]\nprompt: "{text}"\n', "other.yaml")


def bad_yaml(place):
    place.text("labels: [good, bad\nprompt: x\n", "bad.yaml")


def unknown_setting(place):
    place.text("policy: x\nrollout_promts: 8\n", "config.yaml")


def wrong_setting(place):
    place.text('{"steps": "many"}', "config.json")


def rm_with_other_tokenizer(place):
    toy_tokenizer().save_pretrained(place.copy("label_rm"))


def rm_of_other_task(place):
    record = place.copy("label_rm") / "rllr.json"
    content = json.loads(record.read_text())
    content["task"] |= {"name": "weather", "labels": ["sun", "rain"]}
    record.write_text(json.dumps(content))


def rm_without_statistics(place):
    (place.copy("label_rm") / "score_statistics.json").unlink()


def rm_with_broken_statistics(place):
    (place.copy("label_rm") / "score_statistics.json").write_text('{"mean": 1}')


def policy_with_broken_record(place):
    (place.copy("sft") / "rllr.json").write_text('{"stage": ')


def policy_with_odd_record(place):
    (place.copy("sft") / "rllr.json").write_text('{"task": {"colour": 1}, "data": {}}')


def policy_cut_short(place):
    weights = place.copy("sft") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def policy_without_tokenizer(place):
    for file in place.copy("sft").glob("token*"):
        file.unlink()


def no_config_json(place):
    place.text("{}", "hollow/notes.json")


def a_run_is_there(place):
    place.text("kept\n", "out/notes.txt")
    place.text("{}\n", "out/metrics.jsonl")


def foreign_files(place):
    place.text("the only copy\n", "out/thesis.txt")


def out_is_a_file(place):
    place.text("kept\n", "out")


def file_in_the_way(place):
    place.text("kept\n", "blocker")


def result_is_there(place):
    place.text("kept\n", "result.jsonl")


def own_rewards(place):
    functions = "def matrix(samples):\n    return [[1.0, 2.0]]\n\ndef words(samples):\n    return ['good'] * 8\n"
    place.text(f"answer = 42\n\n{functions}", "bad_rewards.py")


def broken_rewards(place):
    place.text("def reward(samples:\n", "broken_rewards.py")


def one_pair(place):
    place.rows([{"prompt": "p", "chosen": "a", "rejected": "b"}], "pairs.jsonl")


def equal_pairs(place):
    place.rows([{"prompt": "p", "chosen": "a", "rejected": "a"}] * 3, "pairs.jsonl")


def pairs_without_column(place):
    place.rows([{"prompt": "p", "chosen": "a", "worse": "b"}] * 3, "pairs.jsonl")


# ---- the table -------------------------------------------------------------------------------------------------------

SFT = "--task {toy.task} --train_file {toy.train} --eval_file {toy.dev} --model {toy.base} --output_dir {out}"
SFT_ROWS = SFT.replace("{toy.train}", "{tmp}/rows.jsonl")
RM = "--policy {toy.sft} --max_new_tokens 12 --output_dir {out}"
ONE_STEP = "--policy {toy.sft} --steps 1 --rollout_prompts 8 --max_new_tokens 12 --output_dir {out}"
PPO = ONE_STEP + " --label_rm {toy.label_rm}"
GOLD = ONE_STEP + " --reward gold"
MIXED = PPO + " --reward mixed"
TINY = "--task {toy.task} --train_file {toy.train} --epochs 1 --hidden_size 16 --heads 2 --layers 1 --output_dir {out}"
PREDICT = "--model {toy.sft} --input {tmp}/rows.jsonl --output {tmp}/result.jsonl"
RATIONALES = "--task {toy.task} --train_file {tmp}/rows.jsonl --output {tmp}/result.jsonl"
LABELS = "good, bad"


def fine_rows(place):
    place.rows(TRAIN_ROWS)


# name: (script, arguments, what is put in the way or None, fragments that the message must have)
CASES = {
    # data files
    "missing file": ("sft", SFT_ROWS, None, ["{tmp}/rows.jsonl", "no such file"]),
    "missing eval file": ("sft", SFT + " --eval_file {tmp}/dev.jsonl", None, ["{tmp}/dev.jsonl", "no such file"]),
    "missing test file": ("sft", SFT + " --test_file {tmp}/test.jsonl", None, ["{tmp}/test.jsonl", "no such file"]),
    "test share of all": ("sft", SFT + " --test_share 0.9", None, ["--test_share 0.9", "between 0 and 0.5"]),
    "a directory as file": ("sft", SFT + " --train_file {tmp}", None, ["{tmp}", "is a directory", ".jsonl"]),
    "unknown file type": ("sft", SFT + " --train_file {toy.task}", None,
        ["toy.yaml", "unknown file type '.yaml'", ".csv"]),
    "empty file": ("sft", SFT_ROWS, empty_file, ["{tmp}/rows.jsonl", "holds no rows"]),
    "broken JSON": ("sft", SFT_ROWS, broken_json, ["{tmp}/rows.jsonl:4", "not valid JSON"]),
    "not UTF-8": ("sft", SFT_ROWS, not_utf8, ["{tmp}/rows.jsonl:1", "UTF-8"]),
    "missing text column": ("sft", SFT_ROWS, no_text_column, ["rows.jsonl", "'text'", "'sentence'", "--columns text="]),
    "column that is not there": ("sft", SFT + " --columns text=phrase", None,
        ["no column 'phrase'", "--columns text=phrase"]),
    "column of no field": ("sft", SFT + " --columns txt=text", None, ["--columns", "unknown field 'txt'", "rationale"]),
    "columns not of the form": ("sft", SFT + " --columns text", None, ["--columns", "name=value"]),
    "no label column": ("sft", SFT_ROWS, no_label_column, ["rows.jsonl", "no row has a label", "--columns label="]),
    "no label column in eval": (
        "sft", SFT + " --eval_file {tmp}/rows.jsonl", no_label_column, ["rows.jsonl", "'label'", "--columns label="]),
    "unknown label": ("sft", SFT_ROWS, unknown_label, ["rows.jsonl:7", "'neutral'", LABELS, "--label_map"]),
    "label map to no label": ("sft", SFT + " --label_map 1=great", None, ["--label_map", "'great'", LABELS]),
    "all rows dropped": ("sft", SFT_ROWS, no_text_at_all,
        ["rows.jsonl", "no usable row", "2 dropped (empty text)", "line 1"]),
    "too few rows": ("sft", SFT_ROWS, few_rows, ["6 labelled rows", "at least 10"]),
    "labelled above the data": ("sft", SFT + " --labelled 1000", None, ["--labelled 1000", "52"]),
    "labelled below 0": ("sft", SFT + " --labelled -1", None, ["--labelled -1"]),
    "labelled in the rm": ("rm", RM + " --labelled 1000", None, ["--labelled 1000", "52"]),
    "held_out above 1": ("sft", SFT + " --held_out 1.5", None, ["--held_out 1.5", "between"]),
    "held_out in the rm": ("rm", RM + " --held_out 1.5", None, ["--held_out 1.5", "between 0.001 and 0.9"]),
    "no data for a task": ("sft", "--task sst2 --output_dir {out}", None, ["'sst2'", "--train_file"]),
    "rows without rationales": ("sft", SFT_ROWS + " --rationales given", rows_without_rationales,
        ["rows.jsonl:", "nor has any other row", "evidence"]),
    "too few rationales": ("sft", SFT_ROWS, lambda place: rows_without_rationales(place, but=9),
        ["labelled rows with a rationale: too few", "at least 10", "--rationales evidence"]),
    "more rationales than there are": ("sft", SFT_ROWS + " --rationale_rows 12",
        lambda place: rows_without_rationales(place, but=11), ["--rationale_rows 12", "11 labelled rows"]),
    "rationale rows for a writer of all": ("sft", SFT + " --rationale_rows 12 --rationales evidence", None,
        ["--rationale_rows 12", "--rationales evidence"]),
    "rationales by no model": ("sft", SFT + " --rationales model", None, ["--rationale_model"]),
    "template longer than the context": (
        "sft", SFT + " --task {tmp}/long.yaml --model {tmp}/copy", long_template,
        ["'long'", "context of 64", "shorten the prompt"]),
    "answer longer than the context": ("sft", SFT + " --max_new_tokens 64", None,
        ["context of 64", "--max_new_tokens"]),
    # tasks and config files
    "unknown task": ("sft", SFT + " --task sst3", None, ["--task 'sst3'", "sst2", ".yaml"]),
    "broken task file": ("sft", SFT + " --task {tmp}/bad.yaml", bad_yaml, ["bad.yaml:2", "not valid YAML"]),
    "data of another task": ("sft", SFT + " --task {tmp}/other.yaml", other_labels, ["task 'toy'", "not on 'other'"]),
    "unknown answer format": ("sft", SFT + " --answer_format essay", None, ["'essay'", "rationale, label"]),
    "missing config file": ("ppo", "--config {tmp}/config.yaml", None, ["{tmp}/config.yaml", "no such file"]),
    "unknown setting": ("ppo", "--config {tmp}/config.yaml", unknown_setting,
        ["config.yaml", "'rollout_promts'", "rollout_prompts"]),
    "setting of a wrong type": ("ppo", "--config {tmp}/config.json", wrong_setting, ["config.json: steps", "'many'"]),
    # flags
    "unknown flag": ("sft", SFT + " --optimizer sgd", None, ["--optimizer", "--help"]),
    "abbreviated flag": ("sft", SFT + " --over", None, ["--over", "--help"]),
    "flag without a value": ("sft", SFT + " --epochs", None, ["--epochs", "expected one argument"]),
    "word for a number": ("sft", SFT + " --epochs three", None, ["--epochs", "'three'", "int"]),
    "fraction for a whole number": ("sft", SFT + " --epochs 1.5", None, ["--epochs", "'1.5'"]),
    "not a finite number": ("sft", SFT + " --learning_rate nan", None, ["--learning_rate", "finite"]),
    "negative learning rate": ("sft", SFT + " --learning_rate -0.001", None, ["--learning_rate -0.001", "above 0"]),
    "no epochs": ("sft", SFT + " --epochs 0", None, ["--epochs 0", "above 0"]),
    "dropout of 1": ("sft", SFT + " --dropout 1", None, ["--dropout 1.0", "between 0 and 0.9"]),
    "unknown schedule": ("sft", SFT + " --schedule step", None, ["--schedule 'step'", "cosine"]),
    "unknown precision": ("sft", SFT + " --precision fp16", None, ["--precision 'fp16'", "bf16"]),
    "unknown writer": ("sft", SFT + " --rationales gpt", None, ["--rationales 'gpt'", "evidence"]),
    "batch not divisible": ("sft", SFT + " --batch_size 32 --micro_batch_size 5", None,
        ["--batch_size 32", "--micro_batch_size 5"]),
    "rm batch not divisible": ("rm", RM + " --batch_size 32 --micro_batch_size 5", None,
        ["--batch_size 32", "--micro_batch_size 5"]),
    "rm unknown loss": ("rm", RM + " --loss hinge", None, ["--loss 'hinge'", "eos, span"]),
    "rm no temperature": ("rm", RM + " --temperature 0", None, ["--temperature 0", "above 0"]),
    "rm unknown negatives": ("rm", RM + " --negatives two", None, ["--negatives 'two'", "one, all"]),
    "rollout not divisible": ("ppo", PPO + " --minibatches 3", None, ["--rollout_prompts 8", "--minibatches 3"]),
    "ppo negative learning rate": ("ppo", PPO + " --learning_rate -1", None, ["--learning_rate -1", "above 0"]),
    "ppo no steps": ("ppo", PPO + " --steps 0", None, ["--steps 0", "above 0"]),
    "lam above 1": ("ppo", PPO + " --lam 1.5", None, ["--lam 1.5", "between 0 and 1"]),
    "gamma below 0": ("ppo", PPO + " --gamma -0.1", None, ["--gamma -0.1", "between 0 and 1"]),
    "unknown score_norm": ("ppo", PPO + " --score_norm batch", None, ["--score_norm 'batch'", "stored, running, none"]),
    "unknown kl_kind": ("ppo", PPO + " --kl_kind k2", None, ["--kl_kind 'k2'", "k1, k3"]),
    "unknown kl_control": ("ppo", PPO + " --kl_control pid", None, ["--kl_control 'pid'", "adaptive"]),
    "threshold without mixed": ("ppo", PPO + " --threshold 1", None, ["--threshold", "--reward mixed"]),
    "threshold no number": ("ppo", MIXED + " --threshold abc", None, ["--threshold 'abc'", "q0.9"]),
    "threshold no quantile": ("ppo", MIXED + " --threshold q1.5", None, ["--threshold 'q1.5'", "q0.9"]),
    "threshold not finite": ("ppo", MIXED + " --threshold nan", None, ["--threshold 'nan'", "q0.9"]),
    "grounded pairs beside a file": ("rm", RM + " --pairs {toy.train} --grounded_pairs", None,
        ["--grounded_pairs", "--pairs label or rationale"]),
    "rationale pairs of labels alone": ("rm", RM + " --answer_format label --pairs rationale", None,
                                        ["--pairs rationale", "labels alone", "--pairs label"]),
    "no sampler": ("rm", RM + " --sampler {toy.root}/none", None, ["--sampler", "none", "no such directory"]),
    "sampler without samples": ("rm", RM + " --label_pairs paper --sampler {toy.sft}", None,
                                ["--sampler", "this run makes none"]),
    "folds without samples": ("rm", RM + " --label_pairs paper --cross_fit always", None,
                              ["--cross_fit always", "this run makes none"]),
    "other test rows": ("rm", RM + " --test_share 0.3", None, ["--test_share 0.3", "has set its rows aside"]),
    "grounded pairs of labels alone": ("rm", RM + " --answer_format label --grounded_pairs", None,
        ["--grounded_pairs", "without a rationale"]),
    "rationale rm without mixed": ("ppo", PPO + " --rationale_rm {toy.rationale_rm}", None,
        ["--rationale_rm", "--reward mixed"]),
    # rewards and reward models
    "unknown reward": ("ppo", PPO + " --reward gpt", None, ["--reward 'gpt'", "gold", "module:function"]),
    "reward module missing": ("ppo", GOLD + " --reward no_such:reward", None,
        ["--reward no_such:reward", "cannot be imported"]),
    "reward function missing": ("ppo", GOLD + " --reward bad_rewards:no", own_rewards,
        ["--reward bad_rewards:no", "'no'"]),
    "reward without module": ("ppo", GOLD + " --reward :reward", None, ["--reward :reward", "module:function"]),
    "reward of a relative module": ("ppo", GOLD + " --reward .x:reward", None,
        ["--reward .x:reward", "module:function"]),
    "reward no function": ("ppo", GOLD + " --reward bad_rewards:answer", own_rewards,
        ["--reward bad_rewards:answer", "int"]),
    "reward module broken": ("ppo", GOLD + " --reward broken_rewards:reward", broken_rewards,
        ["--reward broken_rewards", "imported"]),
    "gold without labels": ("ppo", GOLD + " --train_file {tmp}/rows.jsonl --labelled 10", no_gold,
        ["--reward gold", "rows.jsonl:1"]),
    "mixed without a rationale rm": ("ppo", MIXED, None, ["--reward mixed", "--rationale_rm"]),
    "label rm not there": ("ppo", PPO + " --label_rm {tmp}/rm", None, ["--label_rm {tmp}/rm", "train_rm.py"]),
    "label rm without head": ("ppo", PPO + " --label_rm {toy.sft}", None, ["{toy.sft}", "score.weight", "train_rm.py"]),
    "rm with another tokenizer": ("ppo", PPO + " --label_rm {tmp}/copy", rm_with_other_tokenizer,
        ["--label_rm {tmp}/copy", "tokenizer"]),
    "rm of another task": ("ppo", PPO + " --label_rm {tmp}/copy", rm_of_other_task,
        ["--label_rm {tmp}/copy", "'weather'", "'toy'"]),
    "rm without statistics": (
        "ppo", PPO + " --label_rm {tmp}/copy", rm_without_statistics,
        ["score_statistics.json", "not there", "--score_norm none"]),
    "rm with broken statistics": ("ppo", PPO + " --label_rm {tmp}/copy", rm_with_broken_statistics,
        ["score_statistics.json", "damaged"]),
    "quantile without statistics": (
        "ppo", MIXED + " --label_rm {tmp}/copy --rationale_rm {toy.rationale_rm} --score_norm none --threshold q0.9",
        rm_without_statistics, ["score_statistics.json"]),
    "raw scores without statistics": (
        "ppo", PPO + " --label_rm {tmp}/copy --score_norm none", rm_without_statistics,
        ["--score_norm none", "score_statistics.json"]),
    "value_init without head": ("ppo", PPO + " --value_init {toy.sft}", None, ["{toy.sft}", "score.weight"]),
    "value_init not there": ("ppo", PPO + " --value_init {tmp}/value/model", None, ["{tmp}/value/model", "no such"]),
    # pairs
    "unknown pairs": ("rm", RM + " --pairs labels", None, ["labels", "no such file"]),
    "pairs without a column": ("rm", RM + " --pairs {tmp}/pairs.jsonl", pairs_without_column,
        ["pairs.jsonl", "'rejected'", "'worse'"]),
    "pairs that are equal": ("rm", RM + " --pairs {tmp}/pairs.jsonl", equal_pairs,
        ["pairs.jsonl", "chosen equals rejected", "line 1"]),
    "one pair": ("rm", RM + " --pairs {tmp}/pairs.jsonl", one_pair, ["--pairs", "at least two"]),
    # models
    "policy not there": ("rm", RM + " --policy {tmp}/sft", None, ["--policy {tmp}/sft", "train_sft.py"]),
    "ppo policy not there": ("ppo", PPO + " --policy runs/no/sft", None, ["--policy runs/no/sft", "train_sft.py"]),
    "model not there": ("sft", SFT + " --model {tmp}/qwen", None, ["{tmp}/qwen", "no such model directory"]),
    "model is a file": ("sft", SFT + " --model {toy.task}", None, ["{toy.task}", "is a file"]),
    "no config.json": ("sft", SFT + " --model {tmp}/hollow", no_config_json, ["{tmp}/hollow", "config.json"]),
    "ppo no config.json": ("ppo", GOLD + " --policy {tmp}/hollow --task {toy.task} --train_file {toy.train}",
        no_config_json, ["{tmp}/hollow", "config.json"]),
    "a reward model as the policy": ("ppo", GOLD + " --policy {toy.label_rm}", None,
        ["{toy.label_rm}", "holds a reward", "not a causal LM"]),
    "weights cut short": ("rm", RM + " --policy {tmp}/copy", policy_cut_short, ["{tmp}/copy", "cannot be loaded"]),
    "no tokenizer": ("rm", RM + " --policy {tmp}/copy", policy_without_tokenizer, ["{tmp}/copy", "tokenizer"]),
    "broken record": ("rm", RM + " --policy {tmp}/copy", policy_with_broken_record,
        ["copy/rllr.json", "not valid JSON"]),
    "odd record": ("rm", RM + " --policy {tmp}/copy", policy_with_odd_record,
        ["copy/rllr.json", "not a record of rllr"]),
    "policy of another task": ("ppo", PPO + " --task {tmp}/other.yaml", other_labels,
        ["--policy {toy.sft}", "'toy'", "'other'"]),
    # output directories
    "sft run is there": ("sft", SFT, a_run_is_there, ["--output_dir {out}", "already holds a run", "--overwrite"]),
    "rm run is there": ("rm", RM, a_run_is_there, ["--output_dir {out}", "already holds a run", "--overwrite"]),
    "ppo run is there": ("ppo", PPO, a_run_is_there, ["--output_dir {out}", "already holds a run", "--overwrite"]),
    "tiny run is there": ("tiny", TINY, a_run_is_there, ["--output_dir {out}", "already holds a run", "--overwrite"]),
    "foreign files": ("ppo", PPO, foreign_files, ["--output_dir {out}", "already holds files"]),
    "foreign files, overwrite": ("ppo", PPO + " --overwrite", foreign_files,
        ["--output_dir {out}", "no run of rllr wrote"]),
    "foreign files, sft overwrite": ("sft", SFT + " --overwrite", foreign_files,
        ["--output_dir {out}", "no run of rllr wrote"]),
    "output is a file": ("rm", RM, out_is_a_file, ["--output_dir {out}", "is a file"]),
    "output under a file": ("rm", RM + " --output_dir {tmp}/blocker/rm", file_in_the_way,
        ["--output_dir {tmp}/blocker/rm", "cannot be written"]),
    "bad rows leave the old run": ("sft", SFT_ROWS + " --overwrite --rationales given",
        lambda place: (a_run_is_there(place), rows_without_rationales(place)), ["rows.jsonl:"]),
    # the other programs
    "evaluate nothing": ("evaluate", "--task {toy.task}", None, ["--models"]),
    "evaluate missing model": ("evaluate", "--models {toy.sft} {tmp}/ppo", None, ["{tmp}/ppo", "no such model"]),
    "evaluate other task": ("evaluate", "--models {toy.sft} --task {tmp}/other.yaml --eval_file {toy.dev}",
        other_labels, ["--models {toy.sft}", "'toy'", "'other'"]),
    "evaluate test part": ("evaluate", "--models {toy.sft} --part test", None, ["--part test", "--test_file"]),
    "evaluate missing test file": ("evaluate", "--models {toy.sft} --test_file {tmp}/test.csv", None,
        ["{tmp}/test.csv", "no such file"]),
    "evaluate best of none": ("evaluate", "--models {toy.sft} --best_of 0", None, ["--best_of 0", "above 0"]),
    "evaluate best of by nobody": ("evaluate", "--models {toy.sft} --best_of 8", None,
        ["--best_of 8", "--label_rm DIR"]),
    "evaluate unknown part": ("evaluate", "--models {toy.sft} --part dev", None, ["--part 'dev'", "eval, test"]),
    "evaluate missing file": ("evaluate", "--models {toy.sft} --eval_file {tmp}/dev.csv", None,
        ["{tmp}/dev.csv", "no such file"]),
    "evaluate into a file": ("evaluate", "--models {toy.sft} --output_dir {out}", out_is_a_file,
        ["--output_dir {out}", "cannot be written"]),
    "predict without model": ("predict", "--input x.jsonl", None, ["required: --model"]),
    "predict missing model": ("predict", PREDICT + " --model {tmp}/ppo", fine_rows, ["{tmp}/ppo", "no such model"]),
    "predict missing file": ("predict", PREDICT, None, ["{tmp}/rows.jsonl", "no such file"]),
    "predict broken JSON": ("predict", PREDICT, broken_json, ["{tmp}/rows.jsonl:4", "not valid JSON"]),
    "predict without text": ("predict", PREDICT, no_text_column, ["'text'", "--columns text="]),
    "predict result is there": ("predict", PREDICT, result_is_there, ["--output {tmp}/result.jsonl", "--overwrite"]),
    "predict into nowhere": ("predict", PREDICT + " --output {tmp}/no/result.jsonl", fine_rows,
        ["--output {tmp}/no/result.jsonl", "cannot be written"]),
    "predict with a reward model": ("predict", PREDICT + " --model {toy.label_rm}", fine_rows,
        ["{toy.label_rm}", "not a causal LM"]),
    "predict best of by a policy": ("predict", PREDICT + " --best_of 8 --label_rm {toy.sft}", fine_rows,
        ["{toy.sft}", "no reward or value model", "train_rm.py"]),
    "predict best of by no one there": ("predict", PREDICT + " --best_of 8 --label_rm {tmp}/rm", fine_rows,
        ["--label_rm {tmp}/rm", "no such directory"]),
    "predict a reward model alone": ("predict", PREDICT + " --label_rm {toy.label_rm}", fine_rows,
        ["--label_rm {toy.label_rm}", "--best_of 8"]),
    "rationales without output": ("rationales", "--task {toy.task}", None, ["required: --output"]),
    "rationales without data": ("rationales", "--task {toy.task} --output {tmp}/result.jsonl", None, ["--train_file"]),
    "rationales unknown writer": ("rationales", RATIONALES + " --writer gpt", fine_rows,
        ["--writer 'gpt'", "evidence"]),
    "rationales missing": ("rationales", RATIONALES + " --writer given",
        lambda place: rows_without_rationales(place, but=20),
        ["rows.jsonl:21", "rationale"]),
    "rationales result is there": ("rationales", RATIONALES, result_is_there,
        ["--output {tmp}/result.jsonl", "--overwrite"]),
    "rationales into nowhere": ("rationales", RATIONALES + " --output {tmp}/no/x.jsonl", fine_rows,
        ["--output {tmp}/no/x.jsonl", "cannot be written"]),
    "rationales into a directory": ("rationales", RATIONALES + " --output {tmp} --overwrite", fine_rows,
        ["--output {tmp}", "cannot be written"]),
    "tiny odd heads": ("tiny", TINY + " --heads 3", None, ["--hidden_size 16", "--heads 3"]),
    "tiny no layers": ("tiny", TINY + " --layers 0", None, ["--layers 0", "above 0"]),
    "tiny unknown precision": ("tiny", TINY + " --precision fp16", None, ["--precision 'fp16'", "bf16"]),
    "tiny dropout": ("tiny", TINY + " --dropout 2", None, ["--dropout 2.0", "between 0 and 0.9"]),
    "tiny short context": ("tiny", TINY + " --context 40", None, ["context of 40"]),
}  # fmt: skip


def snapshot(directory):
    """{path: content} of everything below; None for directories."""
    return {path.relative_to(directory): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
            if "__pycache__" not in path.parts}  # fmt: skip


def error_line(capsys, stop, notes=0):
    """The line on stderr, once it is seen to be one, and the exit code to be 2. `notes`: lines allowed before it."""
    lines = capsys.readouterr().err.splitlines(keepends=True)
    message = "".join(lines[min(notes, len(lines) - 1) :])
    assert stop.value.code == 2, message
    assert message.startswith("error: ") and message.endswith("\n") and message.count("\n") == 1, message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("name", CASES)
def test_bad_input(toy, tmp_path, monkeypatch, capsys, name):
    script, arguments, put_in_the_way, fragments = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"tmp": tmp_path, "out": tmp_path / "out", "toy": toy}
    if put_in_the_way:
        put_in_the_way(Place(tmp_path, toy))
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(MAINS[script].main, *arguments.format(**names).split())
    message = error_line(capsys, stop, notes=1 if script == "predict" else 0)  # predict says on stderr what it has read
    for fragment in fragments:
        assert fragment.format(**names) in message
    assert snapshot(tmp_path) == before


def test_every_script_is_in_the_table():
    assert {script for script, *_ in CASES.values()} == set(MAINS)


def test_the_cases_begin_from_commands_that_work(toy, tmp_path, monkeypatch):
    """Each base command of the table succeeds as it stands, so a case fails for its own reason."""
    names = {"tmp": tmp_path, "out": tmp_path / "out", "toy": toy}
    monkeypatch.chdir(tmp_path)
    fine_rows(Place(tmp_path, toy))
    short = {"sft": " --epochs 1", "rm": " --epochs 1"}
    commands = [
        ("sft", SFT_ROWS), ("rm", RM), ("ppo", PPO), ("ppo", GOLD),
        ("ppo", MIXED + " --rationale_rm {toy.rationale_rm}"),
        ("tiny", TINY), ("predict", PREDICT), ("rationales", RATIONALES.replace("result", "other")),
    ]  # fmt: skip
    for script, arguments in commands:
        run(MAINS[script].main, *(arguments + short.get(script, "")).format(**names).split())
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


# ---- what does not fit the table -------------------------------------------------------------------------------------


def test_rows_with_an_empty_text_are_dropped_and_named(toy, tmp_path):
    rows = [*TRAIN_ROWS[:4], {"text": "  ", "label": "good"}, *TRAIN_ROWS[4:], {"text": "", "label": "bad"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    output = run(train_sft.main, "--task", toy.task, "--train_file", data, "--eval_file", toy.dev, "--model", toy.base,
                 "--epochs", 1, "--output_dir", tmp_path / "out")  # fmt: skip
    assert f"{data}: 54 rows read, 2 dropped (empty text): line 5, line 54" in output


@pytest.mark.parametrize("method", ["mkdir", "touch"])
@pytest.mark.parametrize("script", ["sft", "rm", "ppo"])
def test_no_write_permission(toy, tmp_path, monkeypatch, capsys, method, script):
    """The tests may run as root, whom no permission stops; so the refusal is put on."""

    def refuse(self, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, method, refuse)
    arguments = {"sft": SFT, "rm": RM, "ppo": PPO}[script].format(toy=toy, tmp=tmp_path, out=tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run(MAINS[script].main, *arguments.split())
    message = error_line(capsys, stop)
    assert f"--output_dir {tmp_path / 'out'}: cannot be written: Permission denied" in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("script", ["sft", "rm", "ppo"])
def test_no_write_permission_is_seen_before_the_work(toy, tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != tmp_path)
    arguments = {"sft": SFT, "rm": RM, "ppo": PPO}[script].format(toy=toy, tmp=tmp_path, out=tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run(MAINS[script].main, *arguments.split())
    assert f"--output_dir {tmp_path / 'out'}: cannot be written: {tmp_path}" in error_line(capsys, stop)
    assert not list(tmp_path.iterdir())


READS = [("sft", "--model"), ("rm", "--policy"), ("ppo", "--policy"), ("ppo", "--value_init")]


@pytest.mark.parametrize("script, source", READS)
def test_overwrite_never_deletes_what_the_run_reads(toy, tmp_path, capsys, script, source):
    """--overwrite on the very directory, or one around it, that the run starts from."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    shutil.copytree(toy.label_rm if source == "--value_init" else toy.sft, tmp_path / "run" / "best")
    arguments = {"sft": SFT, "rm": RM, "ppo": PPO}[script].format(toy=toy, tmp=tmp_path, out="{out}").split()
    before = snapshot(tmp_path)
    for out in (tmp_path / "run", tmp_path / "run" / "best"):
        flags = [argument.format(out=out) for argument in arguments]
        flags += [source, tmp_path / "run" / "best", "--overwrite"]
        with pytest.raises(SystemExit) as stop:
            run(MAINS[script].main, *flags)
        assert f"--output_dir {out}: --overwrite would delete {tmp_path / 'run' / 'best'}" in error_line(capsys, stop)
        assert snapshot(tmp_path) == before


RETURNED = [("matrix", "returned shape (1, 2)"), ("words", "must return 24 numbers")]


@pytest.mark.parametrize("function, fragment", RETURNED)
def test_what_a_reward_function_returns_is_checked(toy, tmp_path, monkeypatch, capsys, function, fragment):
    monkeypatch.syspath_prepend(tmp_path)
    own_rewards(Place(tmp_path, toy))
    with pytest.raises(SystemExit) as stop:
        run(train_ppo.main, *(GOLD + f" --reward bad_rewards:{function}").format(toy=toy, out=tmp_path / "out").split())
    message = capsys.readouterr().err  # found on dev before the first step: exit code 1
    assert stop.value.code == 1 and message.count("\n") == 1
    assert f"error: dev at step 0: --reward bad_rewards:{function}" in message and fragment in message


def test_policy_whose_answers_never_end_is_named(toy, tmp_path, capsys):
    """No answer ends within two tokens, so there would be no score statistics: said before the training, not after."""
    with pytest.raises(SystemExit) as stop:
        run(train_rm.main, *(RM + " --max_new_tokens 2 --epochs 1").format(toy=toy, out=tmp_path / "out").split())
    message = error_line(capsys, stop)
    assert "--max_new_tokens 2" in message and "of 12 answers sampled" in message


def test_predict_from_an_empty_standard_input(toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", open(os.devnull, encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        run(predict.main, "--model", toy.sft)
    assert "standard input: is empty" in error_line(capsys, stop)


@pytest.mark.parametrize(
    "command, fragments",
    [
        ([ROOT / "train_sft.py", "--train_file", "no.jsonl", "--task", "sst2"], ["no.jsonl", "no such file"]),
        (["-m", "rllr.evaluate", "--models", "runs/no/sft"], ["runs/no/sft"]),
    ],
)
def test_as_a_process_no_traceback_leaks(tmp_path, command, fragments):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(fragment in done.stderr for fragment in fragments)
    assert not list(tmp_path.iterdir())
