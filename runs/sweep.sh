#!/usr/bin/env bash
# The learning rates of rl, sft, sft-gold and sft->rl, and how long RL takes to converge, on
# validation questions and on two pre-trained models that the record does not use.
#
#   bash runs/sweep.sh       two hours on two cores
#
# Run it again after a Ctrl-C. JOBS, OUT, DATA, RESULTS: as in matrix.sh.
export OUT=${OUT:-ckpt/sweep} DATA=${DATA:-data/out/sweep} FINAL=false
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source ./matrix.sh
MIDDLE=${SAVED[${#SAVED[@]} / 2]} LAST=${SAVED[-1]}

for run in 0 1; do
  for step in $MIDDLE $LAST; do
    M="p$run/step$step $run"
    tries+=("$M base")
    for lr in 7.5e-5 1.5e-4 3e-4; do tries+=("$M rl --lr $lr --steps 400"); done
    for lr in 5e-4 1e-3 2e-3; do tries+=("$M sft --lr $lr"); done
    for lr in 2e-3 4e-3; do tries+=("$M sft-gold --lr $lr"); done
    tries+=("$M sft-rl --lr 7.5e-5 --steps 400")
    after+=("$M sft-rl --lr 1.5e-4 --steps 400")  # from the same SFT, so not beside it
  done
done

for run in 0 1; do
  run python data/prepare.py toy --seed $run --out "$DATA-p$run"
  pretrain p$run "$DATA-p$run" $run
done
each cell "${tries[@]}"
each cell "${after[@]}"
run python eval.py --report "$RESULTS"
