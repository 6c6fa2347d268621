# How models are trained and evaluated at equal terms. Sourced by experiments/*/*.sh after pipeline.sh, directly or by
# baselines.sh. Every model is fine-tuned from the same static model, narrower ones from their own, by the same recipe,
# with the full static model as the teacher.
#
# The script that sources this file sets DATA_SET and SIZE, and for another dataset than Fashion-MNIST RECIPE, and the
# folders TUNING_PART, below $RUNS/data, and TEST_DATA.
SEEDS=${SEEDS:-0 1 2} TUNING_EPOCHS=${TUNING_EPOCHS:-2}
DATA_FLAGS="--data-set $DATA_SET --input-size $SIZE --num_workers 0"
RECIPE=${RECIPE:-"--warmup-epochs 0 --no-model-ema --no-repeated-aug --drop-path 0 --mixup 0 --cutmix 0 --no-aug --batch-size 128 --opt muon"}
HALTING="--distr_prior_alpha 0"

train() {  # STAGE full|subset KIND FLAGS...; KIND is one of baselines.py
  local name=$1 part=$2 kind=$3
  shift 3
  stage "$name" "$PYTHON" -m experiments.baselines "$kind" $DATA_FLAGS $RECIPE --data-path "$RUNS/data/$part" \
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
  stage "$name" "$PYTHON" -m experiments.baselines "$kind" $DATA_FLAGS --batch-size 256 --data-path "${TEST_DATA:-$DATA}" --eval \
    --finetune "$checkpoint" --output_dir "$RUNS/$name" "$@"
}

static_weights() {  # SEED: print the file in the repository, which is in half precision
  echo "$HERE/static_$1.pth"
}

truncated_weights() {  # BLOCKS SEED STAGE: write them, unless STAGE, which starts from them, is recorded
  local file=$RUNS/shallow$1_$2.pth
  [ -e "$OUT/$3.json" ] || once "$file" stages truncate "$(static_weights "$2")" "$1" "$file"
}
