#!/usr/bin/env bash
# A record: what the verdicts of RESULTS.md rest on, 8 seeds of every arm on two pre-trained models.
#
#   bash runs/record.sh              a night on two cores; three hours on two fast ones
#   RECORD=2 bash runs/record.sh     the same on other seeds, models and questions
#
# It shares its folders with matrix.sh, whose run is the first seed of the first record. Run it
# again after a Ctrl-C. SEEDS: how many (8). RECORD: which (1). JOBS, OUT, DATA, RESULTS: as there.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source ./matrix.sh
RECORD=${RECORD:-1} SEEDS=${SEEDS:-8} SHARES=${SHARES:-0.1 0.25 0.75 0.9}
whole RECORD && whole SEEDS
RUNS=$((SEEDS > 1 ? 2 : 1)) FEW=$((SEEDS < 4 ? SEEDS : 4))  # FEW: seeds where no verdict is asked
runs=() base=() main=() rollouts=() sizes=() others=()

arm() {  # CHECKPOINT SEED RECIPE [FLAGS]: the arms that the matrix has not
  local M=$OUT/$1 run=${1%/*} go=(--seed "$2" --resume) to sft rl data
  local hard more=(--tokens 2099200 --lr 1.6e-3 --warmup 20)  # more: of pre-training that goes on
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" sft-hard) rl=$OUT/$(name "$1" "$2" rl)
  data=$DATA-${run%-*}  # p10-math60 and p10-large have the questions of p10
  hard=(--questions "$data/hard" --max_new 84)
  local eval=(--results "$RESULTS/$run" --final "$FINAL")
  local level=$data-pool/split/${3#rl-n*-}
  case $3 in
    base-hard) python eval.py "$M.pt" --results "$RESULTS/$(name "$@")" --final "$FINAL" \
      "${hard[@]}" --tasks= --shots 0 ;;
    rl-hard) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${hard[@]}" &&
      python eval.py "$to.pt" "${eval[@]}" "${hard[@]}" --tasks= ;;
    sft-rl-hard) python sft.py --init "$M.pt" --out "$sft.pt" "${go[@]}" "${hard[@]}" &&
      python rl.py --init "$sft.pt" --out "$to.pt" "${go[@]}" "${hard[@]}" &&
      python eval.py "$sft.pt" "$to.pt" "${eval[@]}" "${hard[@]}" --tasks= ;;
    split)  # easy: the base solves 6 or more of 64 at T = 1; hard: 2 or fewer
      python eval.py "$M.pt" --results "$data-pool/samples" --tasks= --limit 0 --n 64 --k 1,64 \
        --questions "$data-pool/easy/train.jsonl" --temperature 1 --shots 0 &&
      python data/prepare.py split --questions "$data-pool/easy" --levels 6,2 --held_out 0.25 \
        --samples "$data-pool/samples/$(basename "$M").jsonl" --out "$data-pool/split" ;;
    rl-n5-split-*) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" --questions "$level" \
        --group 5 --questions_per_step 8 --steps 512 --eval_every 64 &&
      python eval.py "$to.pt" "${eval[@]}" --questions "$level" --tasks= ;;
    rl-n64-split-*) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" --questions "$level" \
        --group 64 --questions_per_step 8 --steps 40 --eval_every 5 &&
      python eval.py "$to.pt" "${eval[@]}" --questions "$level" --tasks= ;;
    text) python pretrain.py --init "$M.pt" --data "$data" --out "$to" "${more[@]}" "${go[@]}" &&
      python eval.py "$to"/step*.pt --results "$RESULTS/$(name "$@")" --text "$data" --final ;;
    rl-text) python rl.py --init "$M.pt" --out "$rl.pt" "${go[@]}" &&
      python pretrain.py --init "$rl.pt" --data "$data" --out "$to" "${more[@]}" "${go[@]}" &&
      python eval.py "$to"/step*.pt --results "$RESULTS/$(name "$@")" --text "$data" --final ;;
    mix-text) python mix.py --init "$M.pt" --out "$to.pt" "${go[@]}" \
        --text "$data" --sft_lr 1.6e-3 --batch 16 &&
      python eval.py "$to.pt" "${eval[@]}" --text "$data" ;;
    *) cell "$@" ;;
  esac
}

# The arms, seed by seed. The pre-training runs share the seeds: one has the even, one the odd ones.
for ((s = 0; s < 2 * SEEDS; s++)); do
  run=p$((10 * RECORD + s % RUNS)) seed=$((100 * RECORD + s))
  if [ $s -lt $RUNS ]; then
    runs+=("$run")
    for step in $LAST $MIDDLE $FIRST; do base+=("$run/step$step $seed val"); done
    base+=("$run/step$LAST $seed base-hard")
    [ -d "$DATA-$run-pool/split" ] || base+=("$run/step$LAST $seed split")
    sizes+=("$run-math60/step$LAST $seed base-hard" "$run-large/step$LAST $seed base-hard")
  fi
  if [ $s -ge "$SEEDS" ]; then  # finding 8 takes twice the seeds
    main+=("$run/step$MIDDLE $seed rl" "$run/step$LAST $seed rl")
    continue
  fi
  for step in $LAST $MIDDLE $FIRST; do
    for recipe in base rl sft-rl mix; do main+=("$run/step$step $seed $recipe"); done
    [ $s -ge $FEW ] || others+=("$run/step$step $seed sft-gold-rl")
  done
  main+=("$run/step$LAST $seed rl-hard")
  for level in easy hard; do
    for n in 5 64; do rollouts+=("$run/step$LAST $seed rl-n$n-split-$level"); done
  done
  sizes+=("$run-math60/step$LAST $seed rl-hard" "$run-large/step$LAST $seed rl-hard")
  [ $s -lt $FEW ] || continue
  others+=("$run/step$LAST $seed sft-rl-hard" "$run/step$MIDDLE $seed text")
  others+=("$run/step$MIDDLE $seed rl-text" "$run/step$MIDDLE $seed mix-text")
  others+=("$run/step$MIDDLE $seed mix --share 0 --share_end 1")
  for share in $SHARES; do others+=("$run/step$MIDDLE $seed mix --share $share"); done
done

for run in "${runs[@]}"; do  # a world of its own for each
  run python data/prepare.py toy --seed "${run#p}" --out "$DATA-$run"
  # the questions that easy and hard ones are chosen from, by what the last checkpoint solves
  run python data/prepare.py toy --seed "${run#p}" --out "$DATA-$run-pool" \
    --tokens 1000 --train_questions 4800
  pretrain "$run" "$DATA-$run" "${run#p}" --save_steps "$MIDDLE,$FIRST"
done
each arm "${base[@]}" "${main[@]}"
each arm "${rollouts[@]}"
for run in "${runs[@]}"; do  # more math in the text, or a larger model
  run python data/prepare.py toy --seed "${run#p}" --out "$DATA-$run-math60" --math_share 0.6
  pretrain "$run-math60" "$DATA-$run-math60" "${run#p}"
  pretrain "$run-large" "$DATA-$run" "${run#p}" --preset toy-large --lr 2e-3
done
each arm "${sizes[@]}"
each arm "${others[@]}"  # what no verdict rests on
run python eval.py --report "$RESULTS"
