#!/usr/bin/env bash
# Compare A-ViT with static baselines on plain Fashion-MNIST: experiments/fashion_mnist/baselines.sh DATA
#
# DATA is the folder with its four *-ubyte.gz files; if it is empty, they are downloaded. The pipeline can be stopped at
# any time and resumed with the same command, see experiments/pipeline.sh.
set -euo pipefail -m
cd "$(dirname "$0")/../.."
DATA=${1:?missing DATA, the folder with the four files of Fashion-MNIST}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/fashion_mnist/results/baselines
OUT=$HERE RUNS=experiments/fashion_mnist/results/runs/baselines
TITLE="Fashion-MNIST"
DATA_SET=FMNIST SIZE=28 PRUNING=(3:24 3:13 2:8) JITTER=4
DIRECTION_BUDGETS=${DIRECTION_BUDGETS:-0.6 0.45 0.3}
STATIC_EPOCHS=${STATIC_EPOCHS:-4}

first_training() {
  :  # none
}

static_training() {  # KIND SUFFIX SEED
  train "static$2_$3" full "$1" --no-halting --seed "$3" --epochs "$STATIC_EPOCHS" --warmup-epochs 1 --lr 0.04
}

. experiments/pipeline.sh
. experiments/baselines.sh
