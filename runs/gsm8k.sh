#!/usr/bin/env bash
# A few steps of every recipe on real text, GSM8K and the cl100k_base vocabulary: it shows that each
# part meets real lengths and a real vocabulary, and claims no accuracy.
#
#   SOURCE=FOLDER bash runs/gsm8k.sh     5 minutes on two cores
#
# FOLDER has pretrain_text/ (.txt or .jsonl, .gz or not) and gsm8k/ (train and test .jsonl).
# cl100k_base is downloaded once; TIKTOKEN_CACHE_DIR names a folder that has it.
# SEED (0), JOBS, OUT, DATA, RESULTS: as in matrix.sh.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source runs/common.sh
OUT=${OUT:-ckpt/gsm8k} DATA=${DATA:-data/out/gsm8k} RESULTS=${RESULTS:-$OUT/results}
SEED=${SEED:-0}
whole SEED
[ -d "${SOURCE:-}/gsm8k" ] || fail "give SOURCE=FOLDER with gsm8k/ and pretrain_text/ in it"

cell() {  # CHECKPOINT SEED RECIPE
  local M=$OUT/$1 to sft
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" "${3%-rl}")
  local train=(--seed "$2" --resume --micro 8 --max_new 48 --eval_questions 0 --compile false)
  local rl=("${train[@]}" --steps 2 --questions_per_step 4 --group 4)
  local eval=(--results "$RESULTS" --limit 8 --n 8 --k "1,8" --max_new 48 --compile false --final)
  case $3 in
    as-is) python eval.py "$M.pt" "${eval[@]}" --shots 0 ;;
    rl) python rl.py --init "$M.pt" --out "$to.pt" "${rl[@]}" &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    mix) python mix.py --init "$M.pt" --out "$to.pt" "${rl[@]}" --batch 8 &&
      python eval.py "$to.pt" "${eval[@]}" ;;
    sft-rl | sft-gold-rl)
      local solutions=1
      [ "$3" = sft-rl ] || solutions=all
      python sft.py --init "$M.pt" --out "$sft.pt" "${train[@]}" --steps 4 --batch 8 \
        --solutions $solutions &&
        python rl.py --init "$sft.pt" --out "$to.pt" "${rl[@]}" &&
        python eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    *) echo "no recipe $3" && return 2 ;;
  esac
}

run python data/prepare.py text --source "$SOURCE/pretrain_text" --out "$DATA/text"
run python data/prepare.py gsm8k --source "$SOURCE/gsm8k" --out "$DATA/gsm8k"
run torchrun --standalone --nproc_per_node "$RANKS" pretrain.py --data "$DATA/text" --out "$OUT" \
  --questions "$DATA/gsm8k" --tokens 32768 --batch_tokens 2048 --length 256 --micro 8 --warmup 2 \
  --save_steps 8 --compile false --resume
for step in 8 16; do
  for recipe in as-is sft-gold-rl sft-rl mix rl; do cells+=("step$step $SEED $recipe"); done
done
each cell "${cells[@]}"
run python eval.py --report "$RESULTS"
