#!/usr/bin/env bash
# The paper's experiment in miniature: pre-train once, then each recipe from each checkpoint,
# evaluate on the test questions, report.
#
#   bash matrix.sh               2 checkpoints x 4 recipes: 20 minutes on two cores
#   RUN=31 bash matrix.sh        the same on another seed: text, facts, questions, weights, answers
#
# Run it again after a Ctrl-C: what is finished is skipped, what was interrupted goes on. A cell
# that has rows is skipped even if the code, QUESTIONS or FINAL changed: give another OUT then.
# JOBS: cells side by side (2). OUT, DATA, RESULTS: folders. The larger experiments are in runs/.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit
source runs/common.sh
OUT=${OUT:-ckpt/toy} DATA=${DATA:-data/out/toy} RESULTS=${RESULTS:-$OUT/results}
RUN=${RUN:-30} FINAL=${FINAL:-true}  # FINAL=false: on validation questions
SAVED=(${SAVED[@]:-1172 2344 3516 4688 5859})  # steps: 2.4 to 12 million tokens
CHECKPOINTS=${CHECKPOINTS:-5859 2344}
QUESTIONS=${QUESTIONS:-400}  # that RL and SFT train on
whole RUN

# The recipes. What can be changed by flags needs no line here: see `recipes` below.
cell() {  # CHECKPOINT SEED RECIPE [FLAGS of its last training]: train, then evaluate
  local M=$OUT/$1 run=${1%/*} go=(--seed "$2" --resume --limit "$QUESTIONS") to sft eval
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" "${3%-rl}")
  eval=(--results "$RESULTS/$run" --text "$DATA-${run%-large}" --n 64 --final "$FINAL")
  local gold=(--solutions all --epochs 1 --batch 64 --lr 4e-3)
  case $3 in
    base)  # validation questions, too: they say which checkpoint is "early"
      { [ "$FINAL" = false ] || python eval.py "$M.pt" "${eval[@]}" --shots 0,1 --final false; } &&
        python eval.py "$M.pt" "${eval[@]}" --shots 0,1 --shot_seed "$2" ;;
    rl | sft | mix) python "$3.py" --init "$M.pt" --out "$to.pt" "${go[@]}" "${@:4}" &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    sft-gold) python sft.py --init "$M.pt" --out "$to.pt" "${go[@]}" "${gold[@]}" "${@:4}" &&
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
    --seed "$3" --resume --save_steps "$(IFS=,; echo "${SAVED[*]}")" "${@:4}"
}
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0  # runs/*.sh take what is above

# sft-rl has sft in it, sft-gold-rl has sft-gold; a variant: "rl --std_norm --recipe rl-std". The
# longest come first, so that the last two cells end together.
recipes=(mix sft-rl rl base)
run python data/prepare.py toy --seed "$RUN" --out "$DATA-p$RUN"
pretrain "p$RUN" "$DATA-p$RUN" "$RUN"
for step in $CHECKPOINTS; do
  for recipe in "${recipes[@]}"; do cells+=("p$RUN/step$step $RUN $recipe"); done
done
each cell "${cells[@]}"
run python eval.py --report "$RESULTS"
