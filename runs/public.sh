#!/usr/bin/env bash
# Excursions from OLMo2's own checkpoints, without pre-training: the 1B has one every 1,000 steps.
# They were trained on olmo-mix-1124 with a schedule for 4T tokens, not on the paper's text.
#
#   PLAN=1 bash runs/public.sh   what each command costs and all of them together; runs nothing
#   bash runs/public.sh          on a node of 8 GPUs of 80 GB; validation questions. Not run yet
#
# An evening on one H100, 6 hours by the plan; a card of 24 GB fits all but mix (SCALE.md, Memory):
#
#   GPUS=1 ONLY=gsm8k STEPS="1000 2000 3000 5000 7000" \
#     RL="--group 8 --questions_per_step 32 --steps 200" bash runs/public.sh
#
# It shows what each recipe makes of a checkpoint that somebody else trained. It cannot show the
# paper's numbers: the text is another, and 200 steps of RL are fewer than the paper's 600.
#
# First a step of RL without validation, for each checkpoint: if none of its 4,096 answers is right,
# RL would learn nothing, and the script stops and says what to do. SHOTS=4: solved questions before
# those that RL samples from a base. RECIPES: of as-is, rl, sft-rl and mix.
#
# Run it again after a Ctrl-C. GPUS (8), STEPS: which checkpoints, SEED (0), ONLY: math or gsm8k,
# else both, RL: more flags of rl.py and mix.py, OUT, DATA, RESULTS.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source runs/gpus.sh
OUT=${OUT:-ckpt/olmo2} DATA=${DATA:-data/out/openmath} RESULTS=${RESULTS:-$OUT/results}
STEPS=${STEPS:-1000 2000 3000 5000 6000 7000 10000 14000 22000}
SEED=${SEED:-0} SHOTS=${SHOTS:-0} RECIPES=${RECIPES:-as-is rl sft-rl mix} ONLY=${ONLY:-all}
whole SEED && whole SHOTS
read -r -a rl <<< "${RL:-}"
read -r -a recipes <<< "$RECIPES"

cell() {  # CHECKPOINT SEED RECIPE
  local M=$OUT/$1 to sft
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" sft)
  local train=(--seed "$2" --resume) eval=(--results "$RESULTS")
  case $3 in
    as-is) gpus eval.py "$M.pt" "${eval[@]}" ;;
    rl) gpus rl.py --init "$M.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" --shots "$SHOTS" &&
      gpus eval.py "$to.pt" "${eval[@]}" ;;
    sft-rl) gpus sft.py --init "$M.pt" --out "$sft.pt" "${train[@]}" &&
      gpus rl.py --init "$sft.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" &&
      gpus eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    mix) gpus mix.py --init "$M.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" &&
      gpus eval.py "$to.pt" "${eval[@]}" ;;
    *) echo "no recipe $3" && return 2 ;;
  esac
}
never_right() {  # CHECKPOINT: none of its first answers, as rl.py samples and grades them
  local to=$OUT/first/$1-shots$SHOTS.pt
  grep -qs '"correct"' "$to.metrics.jsonl" ||
    run gpus rl.py --init "$OUT/$1.pt" --out "$to" --overwrite --steps 1 --group 64 \
      --questions_per_step 64 --shots "$SHOTS" --eval_questions 0 --seed "$SEED" || exit 1
  [ ! "$PLAN" ] || return 1
  rm -f "$to"  # the metrics and the answers stay
  grep -q '"correct": 0.0,' "$to.metrics.jsonl"
}

run python data/prepare.py openmath --out "$DATA" --dataset "$ONLY"
run python data/prepare.py tasks --out "$DATA-tasks"
for step in $STEPS; do
  tokens=$((step * 2097152))
  told=$(((tokens + 999999999) / 1000000000))  # the names are rounded up: step1000-tokens3B is 2.1B
  [ -f "$OUT/step$step.pt" ] ||
    run python data/hf.py import allenai/OLMo-2-0425-1B-early-training "$OUT/step$step.pt" \
      --revision "stage1-step$step-tokens${told}B" --tokens $tokens --questions "$DATA" \
      --tasks "$DATA-tasks"
  if [[ " $RECIPES " == *" rl "* ]] && never_right "step$step"; then
    fail "no answer of step$step is right, RL would learn nothing from it: give SHOTS=4 (solved\
 questions while sampling), later STEPS, or RECIPES='as-is sft-rl mix' (SFT first); to read the\
 answers: python sample.py --log $OUT/first/step$step-shots$SHOTS.pt --split train"
  fi
  for recipe in "${recipes[@]}"; do cells+=("step$step $SEED $recipe"); done
done
each cell "${cells[@]}"
run python eval.py --report "$RESULTS"
total
