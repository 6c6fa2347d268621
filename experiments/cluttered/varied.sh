#!/usr/bin/env bash
# Compare A-ViT with static baselines on cluttered images of varied content: experiments/cluttered/varied.sh DATA
#
# DATA is the folder with Fashion-MNIST's four *-ubyte.gz files; if it is empty, they are downloaded. The pipeline
# can be stopped at any time and resumed with the same command, see experiments/pipeline.sh. It starts from the static
# models of run.sh, which are in the repository.
set -euo pipefail -m
cd "$(dirname "$0")/../.."
DATA=${1:?missing DATA, the folder with the four files of Fashion-MNIST}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=experiments/cluttered/varied
OUT=$HERE RUNS=experiments/cluttered/results/runs/varied
DATA_SET=CLUTTERED_VARIED SIZE=56
BUDGETS=(0.3 0.2 0.45)
# KINDs of these MACs, see baselines.py. STEPS and MERGING were printed by experiments/settings.py.
STEP=(2:43 1:36 3:69) STEPS=(2:95:4:46:6:23 1:99:2:50:3:25 3:108:6:60:9:33) MERGING=(25:4 42:1 16:3)
BLOCKS="5 4 3 2" WIDTHS=${WIDTHS:-21 15}

. experiments/pipeline.sh
. experiments/recipe.sh

for seed in $SEEDS; do
  train "static_$seed" full full --pretrained-path "experiments/cluttered/static_$seed.pth" --no-halting \
    --seed "$seed" --epochs 1 --lr 0.04
done
until_fewer_than 1
for seed in $SEEDS; do
  export_weights "static_$seed" "$(static_weights "$seed")"
done

each_narrower() {  # STAGE FROM FLAGS...: train narrower models of all seeds, from those of stage FROM unless it is ""
  local stage=$1 from=$2 width seed
  for width in $WIDTHS; do
    for seed in $SEEDS; do
      train "${stage}_narrow${width}_$seed" full "narrow:$width" --no-halting --seed "$seed" --lr 0.04 "${@:3}" \
        ${from:+--pretrained-path "$RUNS/${from}_narrow${width}_$seed/checkpoint.pth"}
    done
  done
  until_fewer_than 1
}

# As the full model, on plain Fashion-MNIST first, then on cluttered and on varied images.
each_narrower pretrain "" --data-set FMNIST --input-size 28 --epochs 2 --warmup-epochs 1
each_narrower cluttered pretrain --data-set CLUTTERED --epochs 4
each_narrower static cluttered --epochs 1

for seed in $SEEDS; do
  static=$(static_weights "$seed")
  for width in $WIDTHS; do
    tune "narrow${width}_$seed" "narrow:$width" "$RUNS/static_narrow${width}_$seed/checkpoint.pth" "$seed" --no-halting
  done
  for budget in "${BUDGETS[@]}"; do
    tune "direction${budget}_$seed" full "$static" "$seed" $HALTING --target-macs "$budget"
    tune "halting${budget}_$seed" full "$static" "$seed" $HALTING --gate channel --target-macs "$budget"
  done
  tune "full_$seed" full "$static" "$seed" --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]}
    tune "fused${budget}_$seed" "fused:${STEPS[index]}" "$static" "$seed" --no-halting
    tune "tome${budget}_$seed" "tome:${MERGING[index]}" "$static" "$seed" --no-halting
    tune "evit${budget}_$seed" "evit:${STEP[index]}" "$static" "$seed" --no-halting
  done
  tune_shallower "$seed"
  until_fewer_than 1
  for budget in "${BUDGETS[@]}"; do
    same_counts "$budget" "$seed"
  done
  until_fewer_than 1

  test_model "full_$seed" full --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]}
    test_model "direction${budget}_$seed" full
    test_model "halting${budget}_$seed" full
    test_model "counts${budget}_$seed" "$(counts_of "$budget" "$seed")"
    test_model "fused${budget}_$seed" "fused:${STEPS[index]}" --no-halting
    test_model "tome${budget}_$seed" "tome:${MERGING[index]}" --no-halting
    test_model "evit${budget}_$seed" "evit:${STEP[index]}" --no-halting
  done
  for width in $WIDTHS; do
    test_model "narrow${width}_$seed" "narrow:$width" --no-halting
  done
  test_other_budgets 0.2 "$seed"
  test_shallower "$seed"
  until_fewer_than 1
done
for budget in 0.2 0.3; do
  for parts in stays center stays,center; do
    tune_parts "$parts" "$budget" --gate channel
  done
  tune_parts still "$budget"
done
until_fewer_than 1
measure_throughput "$RUNS/data/full"
"$PYTHON" -m experiments.baselines_report "$OUT" "Cluttered Fashion-MNIST of varied content"
once "$OUT/adaptivity.png" "$PYTHON" -m experiments.adaptivity "$RUNS/direction0.3_${SEEDS%% *}/checkpoint.pth" \
  "$OUT/adaptivity.png" --data-set "$DATA_SET" --data-path "$RUNS/data/full"
echo "pipeline finished in $((SECONDS / 60)) minutes"
