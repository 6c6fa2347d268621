# How models are trained and evaluated at equal terms. Sourced by experiments/*/*.sh after pipeline.sh, directly or by
# baselines.sh. Every model is fine-tuned from the same static model, narrower ones from their own, by the same recipe,
# with the full static model as the teacher.
#
# The script that sources this file sets DATA_SET and SIZE. For images that are not made of Fashion-MNIST, it also sets
# the full model MODEL, RECIPE, and the folders TUNING_PART, below $RUNS/data, and TEST_DATA.
SEEDS=${SEEDS:-0 1 2} TUNING_EPOCHS=${TUNING_EPOCHS:-2}
DATA_FLAGS="--data-set $DATA_SET --input-size $SIZE --num_workers 0"
RECIPE=${RECIPE:-"--warmup-epochs 0 --no-model-ema --no-repeated-aug --drop-path 0 --mixup 0 --cutmix 0 --no-aug --batch-size 128 --opt muon"}
HALTING="--distr_prior_alpha 0"
OTHER_BUDGETS=${OTHER_BUDGETS:-0.2 0.25 0.3 0.35 0.45 0.6 0.8 1}
KIND_PREFIX=${MODEL:+$MODEL/}
PROGRAM=experiments.baselines  # a function may set another one locally

train() {  # STAGE full|subset KIND FLAGS...; KIND is one of baselines.py
  local name=$1 part=$2 kind=$3
  shift 3
  stage "$name" "$PYTHON" -m $PROGRAM "$KIND_PREFIX$kind" $DATA_FLAGS $RECIPE --data-path "$RUNS/data/$part" \
    --output_dir "$RUNS/$name" --resume auto "$@"
}

tune() {  # STAGE KIND WEIGHTS SEED FLAGS...: fine-tune these weights with the static model of that seed as teacher
  local name=$1 kind=$2 weights=$3 seed=$4
  shift 4
  train "$name" "${TUNING_PART:-subset}" "$kind" --pretrained-path "$weights" --seed "$seed" --epochs "$TUNING_EPOCHS" --lr 0.02 \
    --distillation-type self --teacher-path "$(static_weights "$seed")" "$@"
}

evaluate() {  # STAGE KIND CHECKPOINT FLAGS...: evaluate on the test images
  local name=$1 kind=$2 checkpoint=$3
  shift 3
  stage "$name" "$PYTHON" -m experiments.baselines "$KIND_PREFIX$kind" $DATA_FLAGS --batch-size 256 --data-path "${TEST_DATA:-$DATA}" --eval \
    --finetune "$checkpoint" --output_dir "$RUNS/$name" "$@"
}

tune_parts() {  # PARTS BUDGET FLAGS...: fine-tune with these PARTS of gate_parts.py, first seed
  local seed=${SEEDS%% *} PROGRAM="experiments.gate_parts $1"
  tune "ablation_${1/,/_}$2" full "$(static_weights "$seed")" "$seed" $HALTING --target-macs "$2" "${@:3}"
}

static_weights() {  # SEED: print the file in the repository, which is in half precision
  echo "$HERE/static_$1.pth"
}

truncated_weights() {  # BLOCKS SEED STAGE: write them, unless STAGE, which starts from them, is recorded
  local file=$RUNS/shallow$1_$2.pth
  [ -e "$OUT/$3.json" ] || once "$file" stages truncate "$(static_weights "$2")" "$1" "$file"
}

tune_shallower() {  # SEED: fine-tune the first BLOCKS of the static model, for each of these numbers
  local blocks
  for blocks in $BLOCKS; do
    truncated_weights "$blocks" "$1" "shallow${blocks}_$1"
    tune "shallow${blocks}_$1" "shallow:$blocks" "$RUNS/shallow${blocks}_$1.pth" "$1" --no-halting
  done
}

counts_of() {  # BUDGET SEED: print the KIND with the mean counts of the A-ViT of this budget, which has been trained
  stages counts "$OUT/direction$1_$2.json" 196
}

same_counts() {  # BUDGET SEED: train with the mean counts and the gate of the A-ViT of this budget
  local weights=$RUNS/gated$1_$2.pth
  [ -e "$OUT/counts$1_$2.json" ] ||
    once "$weights" stages regate "$RUNS/direction$1_$2/checkpoint.pth" "$(static_weights "$2")" "$weights"
  tune "counts$1_$2" "$(counts_of "$1" "$2")" "$weights" "$2" $HALTING --gate fixed --ponder_token_scale 0
}

# Every model is evaluated on the test images once. Throughput is measured with the models of the first seed.
models=()
test_model() {  # STAGE KIND FLAGS...: evaluate the model of a training stage, whose name ends with its seed
  [ "${1##*_}" != "${SEEDS%% *}" ] || models+=("${1%_*}=$KIND_PREFIX$2=$RUNS/$1/checkpoint.pth")
  evaluate "test_$1" "$2" "$RUNS/$1/checkpoint.pth" "${@:3}"
}

test_shallower() {  # SEED
  local blocks
  for blocks in $BLOCKS; do
    test_model "shallow${blocks}_$1" "shallow:$blocks" --no-halting
  done
}

test_other_budgets() {  # BUDGET SEED: evaluate the A-ViT of this budget at others
  local budget
  for budget in $OTHER_BUDGETS; do
    [ "$budget" = "$1" ] || evaluate "test_otherbudget${budget}_$2" full "$RUNS/direction$1_$2/checkpoint.pth" --budget "$budget"
  done
}

measure_throughput() {  # FOLDER: measure images/s on the images of this folder, once
  once "$OUT/throughput.json" "$PYTHON" -m experiments.throughput --data-set "$DATA_SET" --data-path "$1" \
    --input-size "$SIZE" --rounds "${ROUNDS:-31}" --output "$OUT/throughput.json" "${models[@]}"
}
