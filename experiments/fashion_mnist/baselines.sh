#!/usr/bin/env bash
# Halting against what a user would do instead, on Fashion-MNIST itself: experiments/fashion_mnist/baselines.sh DATA
#
# DATA is the folder with its four *-ubyte.gz files (torchvision fills an empty one). The chain may be stopped at any
# time, and goes on with the same command, see experiments/pipeline.sh.
set -euo pipefail -m
cd "$(dirname "$0")/../.."
DATA=${1:?folder with the four files of Fashion-MNIST}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/fashion_mnist/results/baselines
OUT=$HERE RUNS=experiments/fashion_mnist/results/runs/baselines
TITLE="Fashion-MNIST"
DATA_SET=FMNIST SIZE=28 KEPT=(3:24 3:13 2:8) JITTER=4
STATIC_EPOCHS=${STATIC_EPOCHS:-4}

first_training() {
  :
}

static_training() {  # KIND SUFFIX SEED
  train "static$2_$3" full "$1" --no-halting --seed "$3" --epochs "$STATIC_EPOCHS" --warmup-epochs 1 --lr 0.04
}

. experiments/pipeline.sh
. experiments/baselines.sh
