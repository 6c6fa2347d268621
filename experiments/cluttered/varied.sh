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
BUDGETS=(0.45 0.3 0.2)
# KINDs of these MACs, see baselines.py. STEPS and MERGING were printed by experiments/settings.py.
STEP=(3:69 2:43 1:36) STEPS=(3:108:6:60:9:33 2:95:4:46:6:23 1:99:2:50:3:25) MERGING=(16:3 25:4 42:1)
BLOCKS="5 4 3 2"

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

same_counts() {  # BUDGET SEED: train with the mean counts and the gate of the A-ViT of this budget
  local name=counts$1_$2 from=halting$1_$2 weights=$RUNS/gated$1_$2.pth
  [ ! -e "$OUT/$name.json" ] || return 0  # its KIND follows from a stage that may be missing
  once "$weights" stages regate "$RUNS/$from/checkpoint.pth" "$(static_weights "$2")" "$weights"
  tune "$name" "$(stages counts "$OUT/$from.json" 196)" "$weights" "$2" $HALTING --gate fixed --ponder_token_scale 0
}

for seed in $SEEDS; do
  static=$(static_weights "$seed")
  for budget in "${BUDGETS[@]}"; do
    tune "halting${budget}_$seed" full "$static" "$seed" $HALTING --target-macs "$budget"
    tune "channel${budget}_$seed" full "$static" "$seed" $HALTING --gate channel --target-macs "$budget"
  done
  tune "full_$seed" full "$static" "$seed" --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]}
    tune "fused${budget}_$seed" "fused:${STEPS[index]}" "$static" "$seed" --no-halting
    tune "tome${budget}_$seed" "tome:${MERGING[index]}" "$static" "$seed" --no-halting
    tune "evit${budget}_$seed" "evit:${STEP[index]}" "$static" "$seed" --no-halting
  done
  for blocks in $BLOCKS; do
    truncated_weights "$blocks" "$seed" "shallow${blocks}_$seed"
    tune "shallow${blocks}_$seed" "shallow:$blocks" "$RUNS/shallow${blocks}_$seed.pth" "$seed" --no-halting
  done
  until_fewer_than 1
  for budget in "${BUDGETS[@]}"; do
    same_counts "$budget" "$seed"
  done
done
until_fewer_than 1
