#!/usr/bin/env bash
# The paper's claim, measured on Fashion-MNIST: evidence.sh DATA, the folder with its four *-ubyte.gz files.
#
# A stage is one command; when it has ended there is results/STAGE.json, and it is not run again. So the chain can be
# stopped at any time, and goes on with the same command. Checkpoints and logs lie in results/runs, which later stages
# need; without it, remove results/*.json too, and everything is measured anew.
set -euo pipefail
cd "$(dirname "$0")"
DATA=${1:?folder with the four files of Fashion-MNIST}
PYTHON=${PYTHON:-.venv/bin/python}
OUT=results RUNS=results/runs

# The recipe. All of it was chosen on 5,000 held-out training images (folders `full` and `subset` below).
STATIC_EPOCHS=${STATIC_EPOCHS:-8} TUNING_EPOCHS=${TUNING_EPOCHS:-4} SEARCH_EPOCHS=${SEARCH_EPOCHS:-3}
SEEDS=${SEEDS:-0 1 2}
NETWORK="--model avit_micro_patch4_32 --data-set FMNIST --input-size 28 --num_workers 0"
RECIPE="--batch-size 128 --opt muon --warmup-epochs 1 --no-model-ema --no-repeated-aug --drop-path 0
  --mixup 0 --cutmix 0 --aa none --color-jitter 0 --reprob 0"
FIRST_LR=0.04 TUNING_LR=0.02
CENTER=10 PONDER=0.005 PRIOR=0.001                 # the chosen setting
SEARCH=${SEARCH:-10:0.002 10:0.005 10:0.01 20:0.005 5:0.005}  # gate center : ponder scale

stage() {  # STAGE COMMAND...: runs it, unless it has been
  local name=$1 start=$SECONDS
  shift
  [ -e "$OUT/$name.json" ] && return
  echo "== $name: $*"
  "$@"
  "$PYTHON" evidence.py keep "$RUNS/$name" "$OUT/$name.json" --seconds $((SECONDS - start)) --command "$*"
}

train() {  # STAGE full|subset FLAGS...
  local name=$1 part=$2
  shift 2
  stage "$name" "$PYTHON" main_act.py $NETWORK $RECIPE --data-path "$RUNS/data/$part" --output_dir "$RUNS/$name" \
    --resume auto "$@"
}

tune() {  # STAGE full|subset EPOCHS FLAGS...: on from the static network
  local name=$1 part=$2 epochs=$3
  shift 3
  train "$name" "$part" --pretrained-path "$RUNS/static/checkpoint.pth" --epochs "$epochs" --lr $TUNING_LR "$@"
}

halting() {  # CENTER PONDER PRIOR
  echo "--gate_scale 10 --gate_center $1 --ponder_token_scale $2 --distr_prior_alpha $3"
}

test_once() {  # RUN FLAGS...: on the 10,000 test images
  local run=$1
  shift
  stage "test_$run" "$PYTHON" main_act.py $NETWORK --data-path "$DATA" --eval --finetune "$RUNS/$run/checkpoint.pth" \
    --output_dir "$RUNS/test_$run" "$@"
}

mkdir -p "$OUT" "$RUNS"
[ -d "$RUNS/data" ] || "$PYTHON" evidence.py split "$DATA" "$RUNS/data"

# (a) static, from scratch
train static full --no-halting --epochs "$STATIC_EPOCHS" --lr $FIRST_LR

# which setting: on a third of the images
for setting in $SEARCH; do
  center=${setting%:*} ponder=${setting#*:}
  tune "search_${center}_$ponder" subset "$SEARCH_EPOCHS" $(halting "$center" "$ponder" $PRIOR)
done
tune search_static subset "$SEARCH_EPOCHS" --no-halting

# what each part is for, on the same third
tune ablation_no_prior subset "$SEARCH_EPOCHS" $(halting $CENTER $PONDER 0)
tune ablation_no_ponder subset "$SEARCH_EPOCHS" $(halting $CENTER 0 $PRIOR)
train ablation_from_scratch subset --epochs "$STATIC_EPOCHS" --lr $FIRST_LR $(halting $CENTER $PONDER $PRIOR)

# (b) the control, and (c) A-ViT: the same epochs, data and learning rates
for seed in $SEEDS; do
  tune "control_$seed" full "$TUNING_EPOCHS" --no-halting --seed "$seed"
  tune "adaptive_$seed" full "$TUNING_EPOCHS" $(halting $CENTER $PONDER $PRIOR) --seed "$seed"
done

# the test images, once
test_once static --no-halting
for seed in $SEEDS; do
  test_once "control_$seed" --no-halting
  test_once "adaptive_$seed"
done

# speed; what is kept of the network; pictures of held-out images; the tables
once() {  # FILE COMMAND...: makes it, unless it is there
  local file=$1
  shift
  [ -e "$file" ] || { echo "== $file"; "$@"; }
}
WEIGHTS=checkpoints/avit_micro_fmnist.pth
HELD_OUT="--data-set FMNIST --data-path $RUNS/data/full --num_workers 0 --finetune $WEIGHTS"
mkdir -p checkpoints
once $OUT/benchmark.json "$PYTHON" benchmark.py --model avit_micro_patch4_32 --input-size 28 --data-set FMNIST \
  --data-path "$DATA" --batch-size 128 --finetune "$RUNS/adaptive_0/checkpoint.pth" --json $OUT/benchmark.json
once $WEIGHTS "$PYTHON" evidence.py export "$RUNS/adaptive_0/checkpoint.pth" $WEIGHTS
once $OUT/curves/curves.png "$PYTHON" visualize.py --curves "$RUNS"/{search_*,control_0,adaptive_0} \
  --output-dir $OUT/curves
once $OUT/summary/summary.html "$PYTHON" visualize.py --summary $HELD_OUT --output-dir $OUT/summary
once $OUT/depths/teaser.png "$PYTHON" main_act.py --model avit_micro_patch4_32 --input-size 28 $HELD_OUT \
  --demo --demo-by random --demo-dir $OUT/depths
"$PYTHON" evidence.py report $OUT $OUT/fashion_mnist.md
