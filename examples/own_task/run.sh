#!/usr/bin/env bash
# SFT, reward model and PPO on a task, rows and preference pairs of one's own. README.md beside it explains the files.
set -e
cd "$(dirname "$0")/../.." # the repository's folder
data=examples/own_task

python train_sft.py --task $data/task.yaml --train_file $data/messages.jsonl --eval_file $data/dev.jsonl --overwrite \
    --model tiny --tiny_epochs 40 --epochs 30 --batch_size 8 --eval_every 30

python train_rm.py --policy runs/support/sft --pairs $data/pairs.jsonl --overwrite \
    --epochs 10 --batch_size 8 --checks_per_epoch 1

python train_ppo.py --policy runs/support/sft --label_rm runs/support/rm-file --overwrite \
    --steps 30 --rollout_prompts 16 --answers_per_prompt 4
