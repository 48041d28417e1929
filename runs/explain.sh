#!/usr/bin/env bash
# What may explain a record, on validation questions and with seeds that no record has: fewer
# questions, more steps, other rates, a larger model, and 256 answers of what the record has made.
#
#   bash runs/record.sh && bash runs/explain.sh      two hours more on two cores
#   RECORD=2 bash runs/explain.sh                    of the second record
#
# Run it again after a Ctrl-C. JOBS, OUT, DATA: as in matrix.sh; RESULTS, and RESULTS-many.
export FINAL=false RESULTS=${RESULTS:-${OUT:-ckpt/toy}/why}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source ./matrix.sh
RECORD=${RECORD:-1}
whole RECORD
few="--group 5 --questions_per_step 8 --steps 512 --eval_every 64"
many="--group 64 --questions_per_step 8 --steps 40 --eval_every 5"

answers() {  # CHECKPOINT SEED sft-rl: 256 answers of a base and of what the record made of it
  local M=$OUT/$1 go=(--seed "$2" --resume) rl sft both how
  rl=$OUT/$(name "$1" "$2" rl) sft=$OUT/$(name "$1" "$2" sft) both=$OUT/$(name "$@")
  how=(--results "$RESULTS/${1%/*}" --n 256 --k "1,32,256" --limit 100 --tasks=)
  python rl.py --init "$M.pt" --out "$rl.pt" "${go[@]}" &&
    python sft.py --init "$M.pt" --out "$sft.pt" "${go[@]}" &&
    python rl.py --init "$sft.pt" --out "$both.pt" "${go[@]}" &&
    python eval.py "$M.pt" "${how[@]}" --shots 0,1 &&
    python eval.py "$rl.pt" "$sft.pt" "$both.pt" "${how[@]}"
}

for ((s = 0; s < 4; s++)); do
  run=p$((10 * RECORD + s % 2)) seed=$((100 * RECORD + 90 + s))
  for step in $LAST $MIDDLE; do
    M="$run/step$step $seed"
    cells+=("$M rl" "$M sft" "$M mix" "$M rl --steps 240 --recipe rl-240-steps")
    for count in 50 100 200; do  # as many updates as with 400, or as many epochs
      cells+=("$M rl --limit $count --recipe rl-$count-questions")
      cells+=("$M sft --limit $count --steps 125 --recipe sft-$count-questions")
      cells+=("$M mix --limit $count --recipe mix-$count-questions")
      cells+=("$M sft --limit $count --recipe sft-$count-questions-5-epochs")
    done
    [ $s -gt 1 ] || known+=("$run/step$step $((100 * RECORD + s)) sft-rl")
  done
  M="$run/step$LAST $seed"
  cells+=("$M mix --lr 6e-4 --recipe mix-lr-6e-4" "$M mix --sft_lr 4e-3 --recipe mix-sft_lr-4e-3")
  rates+=("$M rl $few" "$M rl $many" "$M rl $many --lr 3e-4 --recipe rl-lr-3e-4")
  sizes+=("$run-large/step$LAST $seed rl" "$run-large/step$LAST $seed sft")
  longer+=("$M rl $many --steps 512 --eval_every 64 --recipe rl-512-steps")
done

for run in $((10 * RECORD)) $((10 * RECORD + 1)); do
  run python data/prepare.py toy --seed $run --out "$DATA-p$run"
  pretrain p$run "$DATA-p$run" $run --save_steps "$MIDDLE,$FIRST"
  pretrain p$run-large "$DATA-p$run" $run --preset toy-large --lr 2e-3
done
each cell "${cells[@]}" "${rates[@]}" "${sizes[@]}" "${longer[@]}"
RESULTS=$RESULTS-many each answers "${known[@]}"
run python eval.py --report "$RESULTS"
