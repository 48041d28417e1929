#!/usr/bin/env bash
# The learning rates of every recipe, by four tries each on validation questions.
#
#   bash runs/sweep.sh       two hours on two cores
#
# On two pre-trained models that no result comes from: all tries at the middle checkpoint of one,
# and the two best of each once more at the last checkpoint of the other. Run it again after a
# Ctrl-C. JOBS, OUT, DATA, RESULTS: as in matrix.sh.
export OUT=${OUT:-ckpt/sweep} DATA=${DATA:-data/out/sweep} FINAL=false
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source ./matrix.sh
middle="p1/step$MIDDLE 1" last="p0/step$LAST 0"

tries=("$middle val" "$last val")
for lr in 1.5e-4 7.5e-5 3e-4 6e-4; do tries+=("$middle rl --lr $lr"); done
for lr in 2e-3 5e-4 1e-3 4e-3; do
  tries+=("$middle sft --lr $lr" "$middle sft-gold --lr $lr")
done
for lr in 1.5e-4 3e-4; do
  for sft_lr in 1e-3 2e-3; do tries+=("$middle mix --lr $lr --sft_lr $sft_lr"); done
  tries+=("$last rl --lr $lr" "$last mix --lr $lr --sft_lr 2e-3")
done
tries+=("$last sft --lr 1e-3" "$last sft --lr 2e-3")
tries+=("$last sft-gold --lr 2e-3" "$last sft-gold --lr 4e-3")
for start in sft sft-gold; do  # what the next ones share, once
  starts+=("$middle $start-rl --lr 1.5e-4" "$last $start-rl --lr 1.5e-4")
  for lr in 7.5e-5 3e-4 6e-4; do after+=("$middle $start-rl --lr $lr"); done
  after+=("$last $start-rl --lr 7.5e-5")
done

for seed in 1 0; do
  run python data/prepare.py toy --seed $seed --out "$DATA-p$seed"
  pretrain p$seed "$DATA-p$seed" $seed --save_steps "$MIDDLE,$FIRST"
done
each cell "${tries[@]}" "${starts[@]}"
each cell "${after[@]}"
run python eval.py --report "$RESULTS"
