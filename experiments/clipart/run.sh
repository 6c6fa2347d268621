#!/usr/bin/env bash
# Compare A-ViT with static baselines on real pictures, Open Clip Art: experiments/clipart/run.sh DATA
#
# DATA is the folder `png` of Debian's package openclipart-png, /usr/share/openclipart/png once it is installed. The
# pipeline can be stopped at any time and resumed with the same command, see experiments/pipeline.sh.
set -euo pipefail -m
cd "$(dirname "$0")/../.."
DATA=${1:?missing DATA, the folder png of openclipart-png}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/clipart
OUT=$HERE/results RUNS=$HERE/results/runs
MODEL=avit_mini_patch16_224
DATA_SET=IMNET SIZE=224 TUNING_PART=search TEST_DATA=$RUNS/data/final
RECIPE="--warmup-epochs 1 --no-model-ema --no-repeated-aug --drop-path 0 --mixup 0.2 --cutmix 0 --reprob 0 --batch-size 64 --opt muon"
TUNING_EPOCHS=${TUNING_EPOCHS:-8} PRETRAINING_EPOCHS=${PRETRAINING_EPOCHS:-80} STATIC_EPOCHS=${STATIC_EPOCHS:-24}
BUDGETS=(0.3 0.2 0.5)
# KINDs of these MACs, see baselines.py. STEPS and MERGING were printed by experiments/settings.py.
STEPS=(2:78:4:31:6:13 1:80:2:33:3:14 3:111:6:62:9:35) MERGING=(29:2 53:1 15:7)
BLOCKS="6 4 3 2" OTHER_BUDGETS="0.25 0.3 0.35 0.5 0.65 0.8 1"

prepare_data() {
  "$PYTHON" -m experiments.clipart.prepare "$DATA" "$RUNS/data"
}

. experiments/pipeline.sh
. experiments/recipe.sh

static_weights() {  # SEED: print the file of the one static model, whose training takes hours
  echo "$HERE/static_0.pth"
}

# On pictures of half the size first, which take a quarter of the time.
train pretrain_0 search full --input-size 112 --warmup-epochs 3 --no-halting --seed 0 \
  --epochs "$PRETRAINING_EPOCHS" --lr 0.04
until_fewer_than 1
train static_0 search full --pretrained-path "$RUNS/pretrain_0/checkpoint.pth" --no-halting --seed 0 \
  --epochs "$STATIC_EPOCHS" --lr 0.02
until_fewer_than 1
export_weights static_0 "$(static_weights 0)"

for seed in $SEEDS; do
  static=$(static_weights "$seed")
  tune "full_$seed" full "$static" "$seed" --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]}
    tune "direction${budget}_$seed" full "$static" "$seed" $HALTING --target-macs "$budget"
    tune "fused${budget}_$seed" "fused:${STEPS[index]}" "$static" "$seed" --no-halting
    tune "tome${budget}_$seed" "tome:${MERGING[index]}" "$static" "$seed" --no-halting
  done
  tune_shallower "$seed"
  until_fewer_than 1
  for budget in "${BUDGETS[@]}"; do
    same_counts "$budget" "$seed"
  done
  until_fewer_than 1

  evaluate "test_static_$seed" full "$static" --no-halting
  test_model "full_$seed" full --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]}
    test_model "direction${budget}_$seed" full
    test_model "counts${budget}_$seed" "$(counts_of "$budget" "$seed")"
    test_model "fused${budget}_$seed" "fused:${STEPS[index]}" --no-halting
    test_model "tome${budget}_$seed" "tome:${MERGING[index]}" --no-halting
  done
  test_other_budgets 0.2 "$seed"
  test_shallower "$seed"
  until_fewer_than 1
done
tune_parts still 0.3
until_fewer_than 1
measure_throughput "$TEST_DATA"
"$PYTHON" -m experiments.baselines_report "$OUT" "Open Clip Art"
export_weights "direction0.3_${SEEDS%% *}" "$HERE/avit_mini_clipart.pth"
once "$OUT/adaptivity.png" "$PYTHON" -m experiments.adaptivity "$HERE/avit_mini_clipart.pth" "$OUT/adaptivity.png" \
  --data-set IMNET --data-path "$RUNS/data/search"
once "$OUT/depths/teaser.png" "$PYTHON" main_act.py --model "$MODEL" $DATA_FLAGS --data-path "$RUNS/data/search" \
  --finetune "$HERE/avit_mini_clipart.pth" --output_dir "$RUNS/depths" --demo --demo-by random --demo-dir "$OUT/depths"
echo "pipeline finished in $((SECONDS / 60)) minutes"
