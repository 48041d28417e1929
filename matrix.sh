#!/usr/bin/env bash
# The paper's experiment in miniature: pre-train once, then each recipe from each checkpoint,
# evaluate on the test questions, report.
#
#   bash matrix.sh               3 checkpoints x 7 recipes, one seed: 20 minutes on two cores
#   SEED=102 bash matrix.sh      another seed of the same
#
# Run it again after a Ctrl-C: what is finished is skipped, what was interrupted goes on.
# JOBS: cells side by side (2). OUT, DATA, RESULTS: folders. The larger experiments are in runs/.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit
source runs/common.sh
OUT=${OUT:-ckpt/toy} DATA=${DATA:-data/out/toy} RESULTS=${RESULTS:-$OUT/results}
SEED=${SEED:-100} FINAL=${FINAL:-true}  # FINAL=false: on validation questions
FIRST=${FIRST-1367} MIDDLE=${MIDDLE:-2393} LAST=${LAST:-3418}  # steps: 2.8M, 4.9M and 7M tokens
whole SEED

# The recipes. What can be changed by flags needs no line here: see `recipes` below.
cell() {  # CHECKPOINT SEED RECIPE [FLAGS of its last training]: train, then evaluate
  local M=$OUT/$1 run=${1%/*} go=(--seed "$2" --resume) to sft eval
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" "${3%-rl}")
  eval=(--results "$RESULTS/$run" --text "$DATA-${run%-large}" --final "$FINAL")
  local gold=(--solutions all --epochs 1 --batch 64 --compile true --lr 4e-3)
  case $3 in
    val)  # validation questions of the base
      python eval.py "$M.pt" "${eval[@]}" --shots 0,1,3 --final false ;;
    base) python eval.py "$M.pt" "${eval[@]}" --shots 0,1,3 --shot_seed "$2" ;;
    rl) python rl.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    sft) python sft.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    sft-gold) python sft.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${gold[@]}" "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    mix) python mix.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    sft-rl) python sft.py --init "$M.pt" --out "$sft.pt" "${go[@]}" &&
      python rl.py --init "$sft.pt" --out "$to.pt" "${go[@]}" "${@:4}" &&
      python eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    sft-gold-rl) python sft.py --init "$M.pt" --out "$sft.pt" "${go[@]}" "${gold[@]}" &&
      python rl.py --init "$sft.pt" --out "$to.pt" "${go[@]}" --lr 7.5e-5 "${@:4}" &&
      python eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    *) echo "no recipe $3" && return 2 ;;
  esac
}
pretrain() {  # NAME DATA SEED [FLAGS]: the checkpoints OUT/NAME/step*.pt
  run torchrun --standalone --nproc_per_node "$RANKS" pretrain.py --data "$2" --out "$OUT/$1" \
    --seed "$3" --resume "${@:4}"
}
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0  # runs/*.sh take what is above

recipes=(val base rl sft-rl mix sft-gold-rl)  # a variant: "rl --std_norm --recipe rl-std"
run python data/prepare.py toy --seed 10 --out "$DATA-p10"
pretrain p10 "$DATA-p10" 10 --save_steps "$MIDDLE,$FIRST"
for step in $LAST $MIDDLE $FIRST; do
  for recipe in "${recipes[@]}"; do cells+=("p10/step$step $SEED $recipe"); done
done
each cell "${cells[@]}"
run python eval.py --report "$RESULTS"
