#!/usr/bin/env bash
# Train A-ViT with the paper's recipe on Fashion-MNIST: experiments/fashion_mnist/run.sh DATA [search|trials]
#
# DATA is the folder with its four *-ubyte.gz files; if it is empty, they are downloaded. With `search` the pipeline
# ends after the search of settings. With `trials` it also tries some settings on all images, which takes about an hour
# more. It can be stopped at any time and resumed with the same command, see experiments/pipeline.sh.
set -euo pipefail -m
cd "$(dirname "$0")/../.."
DATA=${1:?missing DATA, the folder with the four files of Fashion-MNIST}
PART=${2:-}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/fashion_mnist
OUT=$HERE/results RUNS=$HERE/results/runs
STATIC=$HERE/avit_micro_fmnist_static.pth ADAPTIVE=$HERE/avit_micro_fmnist.pth

# The recipe. It was chosen on 5,000 held-out training images: the test set of the folders `full` and `subset`.
STATIC_EPOCHS=${STATIC_EPOCHS:-4} TUNING_EPOCHS=${TUNING_EPOCHS:-6} SEARCH_EPOCHS=${SEARCH_EPOCHS:-3}
SCRATCH_EPOCHS=${SCRATCH_EPOCHS:-3} SEEDS=${SEEDS:-0 1 2} ROUNDS=${ROUNDS:-31}
MODEL_FLAGS="--model avit_micro_patch4_32 --data-set FMNIST --input-size 28 --num_workers 0"
RECIPE="--warmup-epochs 1 --no-model-ema --no-repeated-aug --drop-path 0 --mixup 0 --cutmix 0 --no-aug"
FROM_SCRATCH="--batch-size 128 --opt muon --lr 0.04" TUNING="--batch-size 256 --opt muon --lr 0.02" PRIOR=0
# gate scale : gate center : ponder scale. The gate scale is negative because channel 0 of this static model is low
# where an image is empty.
CHOSEN=${CHOSEN:--1:8:0.00035}
SEARCH=${SEARCH:--1:12:0.00035 -1:8:0.00035 -1:8:0.0018 -1:8:0.005 -1:4:0.01 1:8:0.00035}  # must contain CHOSEN
# prior : gate scale : gate center : ponder scale
TRIALS=${TRIALS:-0:-1:8:0.0005 0.0001:-1:8:0.00035 0.001:-1:8:0.0003 0.001:-1:8:0.00045 0.003:-1:8:0.00045 \
  0.01:-1:8:0.001 0.01:-1:8:0.0013 0.01:-1:8:0.0016 0.01:-1:8:0.0018 0.01:-1:8:0.002 0.01:-1:8:0.003}

. experiments/pipeline.sh

train() {  # STAGE full|subset FLAGS...
  local name=$1 part=$2
  shift 2
  stage "$name" "$PYTHON" main_act.py $MODEL_FLAGS $RECIPE --data-path "$RUNS/data/$part" --output_dir "$RUNS/$name" \
    --resume auto "$@"
}

tune() {  # STAGE full|subset EPOCHS FLAGS...: fine-tune the static model
  local name=$1 part=$2 epochs=$3
  shift 3
  train "$name" "$part" --pretrained-path $STATIC --epochs "$epochs" $TUNING "$@"
}

halting_flags() {  # SCALE:CENTER:PONDER PRIOR
  local scale center ponder
  IFS=: read -r scale center ponder <<< "$1"
  echo "--gate_scale $scale --gate_center $center --ponder_token_scale $ponder --distr_prior_alpha $2"
}

evaluate() {  # STAGE DATA CHECKPOINT FLAGS...
  local name=$1 data=$2 checkpoint=$3
  shift 3
  stage "$name" "$PYTHON" main_act.py $MODEL_FLAGS --data-path "$data" --eval --finetune "$checkpoint" \
    --output_dir "$RUNS/$name" "$@"
}

# (a) A static model from scratch. All other models start from its weights, in half precision. An ablation runs at the
# same time: halting from scratch instead of fine-tuning, on a third of the images.
train static full --no-halting --epochs "$STATIC_EPOCHS" $FROM_SCRATCH
train ablation_scratch_static subset --no-halting --epochs "$SCRATCH_EPOCHS" $FROM_SCRATCH
train ablation_scratch_halting subset $(halting_flags "$CHOSEN" $PRIOR) --epochs "$SCRATCH_EPOCHS" $FROM_SCRATCH
until_fewer_than 1
export_weights static $STATIC

# The static model with each gate before fine-tuning; then the search of settings, on a third of the images.
for gate in $(printf '%s\n' $SEARCH | sed 's/:[^:]*$//' | sort -u); do
  evaluate "gate_${gate/:/_}" "$RUNS/data/full" $STATIC --gate_scale "${gate%:*}" --gate_center "${gate#*:}"
done
tune search_static subset "$SEARCH_EPOCHS" --no-halting
for setting in $SEARCH; do
  tune "search_${setting//:/_}" subset "$SEARCH_EPOCHS" $(halting_flags "$setting" $PRIOR)
done
until_fewer_than 1
[ "$PART" != search ] || exit 0

# (b) The control and (c) A-ViT, with the same epochs, data and learning rates.
for seed in $SEEDS; do
  tune "control_$seed" full "$TUNING_EPOCHS" --no-halting --seed "$seed"
  tune "adaptive_$seed" full "$TUNING_EPOCHS" $(halting_flags "$CHOSEN" $PRIOR) --seed "$seed"
done
until_fewer_than 1
export_weights "adaptive_${SEEDS%% *}" $ADAPTIVE

# Trials: other priors and ponder scales, on all images.
if [ "$PART" = trials ]; then
  for trial in $TRIALS; do
    tune "trial_${trial//:/_}" full "$TUNING_EPOCHS" $(halting_flags "${trial#*:}" "${trial%%:*}")
  done
  until_fewer_than 1
fi

# One more epoch of each, at the same time: times of trainings from different days cannot be compared.
train epoch_control full --pretrained-path $STATIC --no-halting --epochs 1 $TUNING
train epoch_adaptive full --pretrained-path $ADAPTIVE $(halting_flags "$CHOSEN" $PRIOR) --epochs 1 $TUNING
until_fewer_than 1
evaluate exported_weights "$RUNS/data/full" $ADAPTIVE

# Ablations, on a third of the images.
tune ablation_prior subset "$SEARCH_EPOCHS" $(halting_flags "$CHOSEN" 0.001)
tune ablation_no_ponder subset "$SEARCH_EPOCHS" $(halting_flags "${CHOSEN%:*}:0" $PRIOR)

# Every model is evaluated on the test images once.
evaluate test_static "$DATA" $STATIC --no-halting
for seed in $SEEDS; do
  evaluate "test_control_$seed" "$DATA" "$RUNS/control_$seed/checkpoint.pth" --no-halting
  evaluate "test_adaptive_$seed" "$DATA" "$RUNS/adaptive_$seed/checkpoint.pth"
done
until_fewer_than 1

# Speed, charts and tables, on held-out images.
HELD_OUT="--data-set FMNIST --data-path $RUNS/data/full"
once $OUT/benchmark.json "$PYTHON" benchmark.py --model avit_micro_patch4_32 --input-size 28 $HELD_OUT \
  --batch-size 64 256 1024 --rounds "$ROUNDS" --finetune $ADAPTIVE --json $OUT/benchmark.json
once $OUT/search/accuracy_macs.png "$PYTHON" visualize.py --curves "$RUNS/search_static" \
  $(for setting in $SEARCH; do echo "$RUNS/search_${setting//:/_}"; done) --output-dir $OUT/search
once $OUT/final/accuracy_macs.png "$PYTHON" visualize.py --curves \
  $(for seed in $SEEDS; do echo "$RUNS/control_$seed" "$RUNS/adaptive_$seed"; done) --output-dir $OUT/final
once $OUT/summary/summary.html "$PYTHON" visualize.py --summary $HELD_OUT --num_workers 0 --finetune $ADAPTIVE \
  --output-dir $OUT/summary
once $OUT/depths/teaser.png "$PYTHON" main_act.py $MODEL_FLAGS --data-path "$RUNS/data/full" --finetune $ADAPTIVE \
  --demo --demo-by random --demo-dir $OUT/depths
"$PYTHON" -m experiments.fashion_mnist.report $OUT $OUT/fashion_mnist.md --chosen="$CHOSEN"
echo "pipeline finished in $((SECONDS / 60)) minutes"
