#!/usr/bin/env bash
# Compare A-ViT with static baselines on cluttered Fashion-MNIST: experiments/cluttered/run.sh DATA
#
# DATA is the folder with Fashion-MNIST's four *-ubyte.gz files; if it is empty, they are downloaded. The pipeline
# can be stopped at any time and resumed with the same command, see experiments/pipeline.sh.
set -euo pipefail -m
cd "$(dirname "$0")/../.."
DATA=${1:?missing DATA, the folder with the four files of Fashion-MNIST}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/cluttered
OUT=$HERE/results RUNS=$HERE/results/runs
TITLE="Cluttered Fashion-MNIST"
DATA_SET=CLUTTERED SIZE=56 PRUNING=(4:97 3:69 2:43) JITTER=4
DIRECTION_BUDGETS=${DIRECTION_BUDGETS:-0.6 0.45 0.3} MERGING=25:4 STEPS=2:95:4:46:6:23
PRETRAINING_EPOCHS=${PRETRAINING_EPOCHS:-2} STATIC_EPOCHS=${STATIC_EPOCHS:-4}

first_training() {  # KIND SUFFIX SEED: on plain Fashion-MNIST, 49 patches
  train "pretrain$2_$3" full "$1" --data-set FMNIST --input-size 28 --no-halting --seed "$3" \
    --epochs "$PRETRAINING_EPOCHS" --warmup-epochs 1 --lr 0.04
}

static_training() {  # KIND SUFFIX SEED
  train "static$2_$3" full "$1" --pretrained-path "$RUNS/pretrain$2_$3/checkpoint.pth" --no-halting --seed "$3" \
    --epochs "$STATIC_EPOCHS" --lr 0.04
}

. experiments/pipeline.sh
. experiments/baselines.sh
export_weights "halting${BUDGETS[-1]}_${SEEDS%% *}" "$HERE/avit_micro_cluttered.pth"
once "$OUT/depths/teaser.png" "$PYTHON" main_act.py --model avit_micro_patch4_32 $DATA_FLAGS \
  --data-path "$RUNS/data/full" --finetune "$HERE/avit_micro_cluttered.pth" --output_dir "$RUNS/depths" \
  --demo --demo-by random --demo-dir "$OUT/depths"
