#!/usr/bin/env bash
# Excursions from OLMo2's own checkpoints, without pre-training: the 1B has one every 1,000 steps.
# They were trained on olmo-mix-1124 with a schedule for 4T tokens, not on the paper's text.
#
#   PLAN=1 bash runs/public.sh   what each command costs and all of them together; runs nothing
#   bash runs/public.sh          on a node of 8 GPUs of 80 GB; validation questions. Not run yet
#
# Run it again after a Ctrl-C. GPUS (8), STEPS: which checkpoints, SEED (0), OUT, DATA, RESULTS.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source runs/gpus.sh
OUT=${OUT:-ckpt/olmo2} DATA=${DATA:-data/out/openmath} RESULTS=${RESULTS:-$OUT/results}
STEPS=${STEPS:-1000 2000 3000 5000 6000 7000 10000 14000 22000}
SEED=${SEED:-0}
whole SEED

cell() {  # CHECKPOINT SEED RECIPE
  local M=$OUT/$1 to sft
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" sft)
  local train=(--seed "$2" --resume) eval=(--results "$RESULTS")
  case $3 in
    as-is) gpus eval.py "$M.pt" "${eval[@]}" ;;
    rl) gpus rl.py --init "$M.pt" --out "$to.pt" "${train[@]}" &&
      gpus eval.py "$to.pt" "${eval[@]}" ;;
    sft-rl) gpus sft.py --init "$M.pt" --out "$sft.pt" "${train[@]}" &&
      gpus rl.py --init "$sft.pt" --out "$to.pt" "${train[@]}" &&
      gpus eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    mix) gpus mix.py --init "$M.pt" --out "$to.pt" "${train[@]}" &&
      gpus eval.py "$to.pt" "${eval[@]}" ;;
    *) echo "no recipe $3" && return 2 ;;
  esac
}

run python data/prepare.py openmath --out "$DATA"
for step in $STEPS; do
  tokens=$((step * 2097152))
  told=$(((tokens + 999999999) / 1000000000))  # the names are rounded up: step1000-tokens3B is 2.1B
  [ -f "$OUT/step$step.pt" ] ||
    run python data/hf.py import allenai/OLMo-2-0425-1B-early-training "$OUT/step$step.pt" \
      --revision "stage1-step$step-tokens${told}B" --tokens $tokens --questions "$DATA"
  for recipe in as-is rl sft-rl mix; do cells+=("step$step $SEED $recipe"); done
done
each cell "${cells[@]}"
run python eval.py --report "$RESULTS"
total
