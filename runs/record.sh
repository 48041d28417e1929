#!/usr/bin/env bash
# The record that RESULTS.md rests on: eight pre-trained models, each with text, questions and
# seeds of its own, five checkpoints of each, RL of 300 steps (LONGER: 600 where that is too few).
#
#   KEPT= bash runs/record.sh     all of it anew: twenty-two hours on two cores with AVX-512
#   bash runs/record.sh           what results/record-3/rows.jsonl lacks, and the report beside it
#   MODELS="30 31" KEPT= bash runs/record.sh    only these models
#
# Models come one after the other, and what most claims rest on comes first, so a record that is not
# finished is one of fewer models. KEPT: a file that collects the rows; what has rows there is not
# run again. Without it they are in RESULTS alone, and the report, too. Run it again after a Ctrl-C.
# JOBS, OUT, DATA, RESULTS: as in matrix.sh, whose run is part of the first model's.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source ./matrix.sh
MODELS=${MODELS:-30 31 32 33 34 35 36 37} KEPT=${KEPT-results/record-3/rows.jsonl}
MIDDLE=${SAVED[${#SAVED[@]} / 2]} LAST=${SAVED[-1]}
MANY=${MANY:-1600} FEW=${FEW:-100}  # questions, beside QUESTIONS
SEEDED=${SEEDED:-2} BRITTLE=${BRITTLE:-$MIDDLE}  # claim 8: models with 8 seeds, and where
OTHERS=${OTHERS:-1 2 3 4 5 6 7}
# what has not converged after 300 steps has 600 in all models: "STEP RECIPE [FLAGS]; ..." (mix with
# 4 solutions a step and not 7: about as many epochs)
longer=$(for step in "${SAVED[@]:2}"; do echo -n "$step rl; $step sft-rl; $step mix --batch 4; "; done)
LONGER=${LONGER-$longer}
[[ $MODELS =~ ^[1-9][0-9]*(\ [1-9][0-9]*)*$ ]] || fail "MODELS takes whole numbers, not '$MODELS'"
whole MANY && whole FEW && whole SEEDED
BRITTLE_MODELS=$(head -n "$SEEDED" <<< "${MODELS// /$'\n'}" | tr '\n' ' ')

arm() {  # CHECKPOINT SEED RECIPE [FLAGS]: the arms that the matrix has not
  local M=$OUT/$1 run=${1%/*} go=(--seed "$2" --resume --limit "$QUESTIONS") to sft data
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" sft-many)
  data=$DATA-${run%-*}  # p30-math60 and p30-large have the questions of p30
  local eval=(--results "$RESULTS/$run" --n 64 --final "$FINAL") pool=$DATA-${run%-*}-pool
  # beside the pool, not in it: prepare.py knows a folder again by the files that it has listed
  local samples=$pool-samples split=$pool-split
  local hard=(--questions "$data/hard") level=$split/${3#rl-n*-}
  case $3 in
    sft-rl-many) python sft.py --init "$M.pt" --out "$sft.pt" "${go[@]}" --limit "$MANY" \
        --recipe "sft-$MANY-questions" &&
      python rl.py --init "$sft.pt" --out "$to.pt" "${go[@]}" --limit "$MANY" \
        --recipe "rl-$MANY-questions" "${@:4}" &&
      python eval.py "$sft.pt" "$to.pt" "${eval[@]}" --text "$data" ;;
    rl-hard) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${hard[@]}" "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" "${hard[@]}" --tasks= ;;
    split)  # easy: the base solves 6 or more of 64 at T = 1; hard: 2 or fewer
      python eval.py "$M.pt" --results "$samples" --tasks= --limit 0 --n 64 --k 1,64 \
        --questions "$pool/easy/train.jsonl" --temperature 1 --shots 0 &&
      python data/prepare.py split --questions "$pool/easy" --levels 6,2 --held_out 0.25 \
        --samples "$samples/$(basename "$M").jsonl" --out "$split" &&
      python eval.py "$M.pt" "${eval[@]}" --tasks= --shots 0 --shot_seed "$2" \
        --questions "$split/split-easy,$split/split-hard" ;;
    rl-n5-split-*) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" --questions "$level" \
        --group 5 --questions_per_step 8 --steps 600 "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" --questions "$level" --tasks= ;;
    rl-n64-split-*) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" --questions "$level" \
        --group 64 --questions_per_step 8 "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" --questions "$level" --tasks= ;;
    *) cell "$@" ;;
  esac
}
world() {  # SUFFIX [FLAGS]: the text and questions of the model `run`
  run python data/prepare.py toy --seed "$seed" --out "$DATA-$run$1" "${@:2}"
}
keep() {  # the rows so far, each once
  [[ $KEPT && -d $RESULTS ]] || return 0
  mkdir -p "$(dirname "$KEPT")" && touch "$KEPT"
  find "$RESULTS" -name '*.jsonl' -exec cat {} + | cat "$KEPT" - |
    LC_ALL=C sort -u > "$KEPT.new"
  mv "$KEPT.new" "$KEPT"
}

finish() {  # [COMMAND]: of the model `run` its checkpoints, what COMMAND makes, and its cells
  [ "$(unfinished "${cells[@]}")" ] || return 0
  world ""
  pretrain "$run" "$DATA-$run" "$seed"
  "$@"
  each arm "${cells[@]}"
  keep
}
splits() {  # easy and hard questions for `run`; what is there already is kept
  world -pool --tokens 1000 --train_questions 4800
  each arm "$run/step$LAST $seed split"
}
relatives() {  # more math in the text of `run`, or more weights
  world -math60 --math_share 0.6
  pretrain "$run-math60" "$DATA-$run-math60" "$seed"
  pretrain "$run-large" "$DATA-$run" "$seed" --preset toy-large --lr 2e-3
}

for seed in $MODELS; do  # what most claims are about
  run=p$seed cells=()
  for step in "${SAVED[@]}"; do
    gold=sft-gold
    [[ $step != "$MIDDLE" && $step != "$LAST" ]] || gold+=-rl  # which has the rows of both
    for recipe in base rl sft-rl mix $gold; do cells+=("$run/step$step $seed $recipe"); done
  done
  finish
done
for seed in $MODELS; do  # twice the steps
  run=p$seed cells=()
  while read -r step recipe; do
    [ ! "$step" ] || cells+=("$run/step$step $seed $recipe --steps 600")
  done <<< "${LONGER//; /$'\n'}"
  finish
done
for seed in $BRITTLE_MODELS; do  # eight seeds of one model
  run=p$seed cells=() steps=""
  [[ "; $LONGER;" != *"; $BRITTLE rl;"* ]] || steps="--steps 600"
  for other in $OTHERS; do cells+=("$run/step$BRITTLE ${seed}0$other rl $steps"); done
  finish
done
for seed in $MODELS; do  # four times the questions; 400 were not through with 300 steps here
  run=p$seed cells=() more="--limit $MANY --steps 600"
  for step in $MIDDLE $LAST; do
    cells+=("$run/step$step $seed rl $more --recipe rl-$MANY-questions")
    cells+=("$run/step$step $seed sft-rl-many --steps 600")
    cells+=("$run/step$step $seed mix $more --batch 14 --recipe mix-$MANY-questions")
  done
  finish
done
for seed in $MODELS; do  # 5 and 64 answers
  run=p$seed cells=()
  for level in easy hard; do
    for n in 5 64; do cells+=("$run/step$LAST $seed rl-n$n-split-$level"); done
  done
  finish splits
done
for seed in $MODELS; do  # a quarter of the questions
  run=p$seed cells=()
  for step in $MIDDLE $LAST; do
    cells+=("$run/step$step $seed rl --limit $FEW --steps 600 --recipe rl-$FEW-questions")
    cells+=("$run/step$step $seed sft --limit $FEW --recipe sft-$FEW-questions")
  done
  finish
done
for seed in $MODELS; do  # hard questions
  run=p$seed cells=()
  for model in "$run-math60" "$run-large" "$run"; do
    cells+=("$model/step$LAST $seed rl-hard --steps 600")
  done
  finish relatives
done
keep
[ "$KEPT" ] && RESULTS=$(dirname "$KEPT")
run python eval.py --report "$RESULTS"
