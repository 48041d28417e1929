#!/usr/bin/env bash
# Everything that a record does, with small numbers: to see that it works. Five minutes on two
# cores; nothing is downloaded.
#
#   bash runs/smoke.sh
#
# It is runs/record.sh with more flags behind each command: the last one of a name counts.
# JOBS, OUT, DATA, RESULTS: as in matrix.sh.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT=${OUT:-ckpt/smoke} DATA=${DATA:-data/out/smoke} KEPT='' MODELS=30 SAVED=(10 20 40)
QUESTIONS=32 MANY=64 FEW=16 SEEDED=1 OTHERS=1

python() {
  local small=()
  case "$1 $2 $*" in
    data/prepare.py\ toy*) small=(--tokens 100000 --val_tokens 20000 --train_questions 64
      --val_questions 16 --test_questions 16 --task_items 50) ;;
    data/prepare.py\ split*) small=(--levels "0,64") ;;  # nothing is solved yet
    sft.py*) small=(--steps 4 --eval_questions 4 --max_new 32 --compile false) ;;
    rl.py* | mix.py*) small=(--steps 2 --questions_per_step 4 --eval_questions 4 --max_new 32
      --compile false)
      [[ $* != *"--steps 600"* ]] || small[1]=3 ;;
    eval.py*--report* | *--k\ 1,64*) ;;  # the samples of all questions
    eval.py*) small=(--limit 8 --n 32 --max_new 32 --compile false) ;;
  esac
  command python "$@" "${small[@]}"
}
torchrun() { command torchrun "$@" --tokens 81920 --warmup 5 --save_every 15 --compile false; }

source runs/record.sh
