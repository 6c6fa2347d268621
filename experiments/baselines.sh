# Stages that compare A-ViT with static baselines at equal MACs. Sourced by experiments/*/*.sh after pipeline.sh.
#
# The script that sources this file sets:
#   DATA_SET, SIZE                   the dataset
#   first_training, static_training  how static models are trained: functions of KIND SUFFIX SEED, run in this order
#   PRUNING                          K:N for each budget: N patches are kept after block K, see baselines.py
#   DIRECTION_BUDGETS                budgets of A-ViT with the gate by direction, the smallest last; none if unset
#   MERGING, STEPS                   settings of ToMe and of EViT in steps at the smallest budget, see baselines.py; none
#                                    if unset
#
# MERGING and STEPS were printed by experiments/settings.py. The other settings were chosen on 5,000 held-out training
# images, which are the test set of the folders `full` and `subset`.
ROUNDS=${ROUNDS:-31} STEP_ROUNDS=${STEP_ROUNDS:-7}
read -ra BUDGETS <<< "${BUDGETS:-0.6 0.45 0.3}"
BLOCKS=${BLOCKS:-7 5 4 3} WIDTHS=${WIDTHS:-36 27 21}
# Fractions of the MACs of the first seven blocks, which have 0.585 of the full model's: 0.45 and 0.3 of the full model.
SHALLOW_BUDGETS=${SHALLOW_BUDGETS:-0.77 0.51}
. experiments/recipe.sh
read -ra DIRECTION_BUDGETS <<< "${DIRECTION_BUDGETS:-}"
CHANNEL="$HALTING --gate channel" MERGING=${MERGING:-} STEPS=${STEPS:-}

train_static() {  # KIND SUFFIX: train a static model of every seed
  local seed
  for seed in $SEEDS; do
    first_training "$1" "$2" "$seed"
  done
  until_fewer_than 1
  for seed in $SEEDS; do
    static_training "$1" "$2" "$seed"
  done
  until_fewer_than 1
}

train_static full ""
for seed in $SEEDS; do
  export_weights "static_$seed" "$(static_weights "$seed")"
done

for seed in $SEEDS; do
  static=$(static_weights "$seed")
  tune "full_$seed" full "$static" "$seed" --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]} pruning=${PRUNING[index]}
    for rule in evit random; do
      tune "$rule${budget}_$seed" "$rule:$pruning" "$static" "$seed" --no-halting
    done
  done
  tune_shallower "$seed"
done
for seed in $SEEDS; do
  static=$(static_weights "$seed")
  for budget in "${BUDGETS[@]}"; do
    tune "halting${budget}_$seed" full "$static" "$seed" $CHANNEL --target-macs "$budget"
  done
  for budget in "${DIRECTION_BUDGETS[@]}"; do
    tune "direction${budget}_$seed" full "$static" "$seed" $HALTING --target-macs "$budget"
  done
  [ -z "$MERGING" ] || tune "tome${BUDGETS[-1]}_$seed" "tome:$MERGING" "$static" "$seed" --no-halting
  [ -z "$STEPS" ] || tune "fused${BUDGETS[-1]}_$seed" "fused:$STEPS" "$static" "$seed" --no-halting
  for budget in $SHALLOW_BUDGETS; do
    truncated_weights 7 "$seed" "shallowhalting${budget}_$seed"
    tune "shallowhalting${budget}_$seed" shallow:7 "$RUNS/shallow7_$seed.pth" "$seed" $CHANNEL --target-macs "$budget"
  done
  tune "anybudget_$seed" full "$static" "$seed" $CHANNEL --target-macs 0.45 --gate-jitter "$JITTER"
done
for width in $WIDTHS; do
  train_static "narrow:$width" "_narrow$width"
done
for seed in $SEEDS; do
  for width in $WIDTHS; do
    tune "narrow${width}_$seed" "narrow:$width" "$RUNS/static_narrow${width}_$seed/checkpoint.pth" "$seed" --no-halting
  done
done
until_fewer_than 1

# Ablations, on the held-out images.
seed=${SEEDS%% *}
static=$(static_weights "$seed")
tune ablation_prior full "$static" "$seed" --distr_prior_alpha 0.01 --gate channel --target-macs 0.45
tune ablation_fixed_weight full "$static" "$seed" $HALTING --gate auto --ponder_token_scale 0.001
tune ablation_no_ponder full "$static" "$seed" $HALTING --gate auto --ponder_token_scale 0
tune ablation_paper_gate full "$static" "$seed" $HALTING --gate fixed --target-macs 0.45
tune ablation_no_teacher full "$static" "$seed" $CHANNEL --target-macs 0.45 --distillation-type none
train ablation_scratch subset full --seed "$seed" --epochs "$TUNING_EPOCHS" --lr 0.04 $HALTING --target-macs 0.45
train ablation_scratch_static subset full --seed "$seed" --epochs "$TUNING_EPOCHS" --lr 0.04 --no-halting
until_fewer_than 1

for seed in $SEEDS; do
  test_model "full_$seed" full --no-halting
  for index in "${!BUDGETS[@]}"; do
    budget=${BUDGETS[index]}
    test_model "halting${budget}_$seed" full
    evaluate "test_anybudget${budget}_$seed" full "$RUNS/anybudget_$seed/checkpoint.pth" --budget "$budget"
    for rule in evit random; do
      kind=$rule:${PRUNING[index]}
      test_model "$rule${budget}_$seed" "$kind" --no-halting
    done
  done
  for budget in "${DIRECTION_BUDGETS[@]}"; do
    test_model "direction${budget}_$seed" full
  done
  [ -z "$MERGING" ] || test_model "tome${BUDGETS[-1]}_$seed" "tome:$MERGING" --no-halting
  [ -z "$STEPS" ] || test_model "fused${BUDGETS[-1]}_$seed" "fused:$STEPS" --no-halting
  [ "${#DIRECTION_BUDGETS[@]}" = 0 ] || test_other_budgets "${DIRECTION_BUDGETS[-1]}" "$seed"
  test_shallower "$seed"
  for budget in $SHALLOW_BUDGETS; do
    test_model "shallowhalting${budget}_$seed" shallow:7
  done
  for width in $WIDTHS; do
    test_model "narrow${width}_$seed" "narrow:$width" --no-halting
  done
done
until_fewer_than 1
measure_throughput "$RUNS/data/full"
for budget in "${BUDGETS[@]}"; do  # time of a training step, without the teacher
  once "$OUT/step_$budget.json" "$PYTHON" benchmark.py --train --model avit_micro_patch4_32 --data-set "$DATA_SET" \
    --data-path "$RUNS/data/full" --input-size "$SIZE" --batch-size 128 --rounds "$STEP_ROUNDS" \
    --finetune "$RUNS/halting${budget}_${SEEDS%% *}/checkpoint.pth" --json "$OUT/step_$budget.json"
done
"$PYTHON" -m experiments.baselines_report "$OUT" "$TITLE"
echo "pipeline finished in $((SECONDS / 60)) minutes"
