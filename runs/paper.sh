#!/usr/bin/env bash
# The paper's experiment at its sizes: a 1B on 50B tokens, every recipe from nine checkpoints on
# GSM8K and on MATH; more math in the text against a 4B; 5 against 64 rollouts. Not run yet.
#
#   PLAN=1 bash runs/paper.sh    what each command costs and all of them together; runs nothing
#   bash runs/paper.sh           43 days on a node of 8 H200, 2.1 TB of disk
#
# Run it again after a Ctrl-C. Micro-batches and sharding follow from the memory of the GPUs.
# GPUS (8), STEPS: checkpoints, SEEDS (1), EARLY_SEEDS (4): up to step 5000, where they differ most.
# SOURCE=FOLDER: local copies of the data, else from the hub. FEW_SHOT=FOLDER: the shots of Wei et
# al. and of Minerva, else training questions. MODEL, LARGE, TOKENS, EXTRA: for a rehearsal.
#
# What is not asked for is neither run nor prepared. MATH=0: no questions of MATH. MORE_MATH=0: no
# second text. LARGER=0: no 4B. ROLLOUTS=0: not 5 against 64. RECIPES: those wanted. RL: more flags
# of rl.py and mix.py. STOP: end pre-training after this step of the schedule of TOKENS; TEXT and
# EXTRA_TEXT are then the tokens to prepare. runs/speedrun.sh is this script with some of them set.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source runs/gpus.sh
OUT=${OUT:-ckpt/paper} DATA=${DATA:-data/out/paper} RESULTS=${RESULTS:-$OUT/results}
MODEL=${MODEL:-1b} LARGE=${LARGE:-4b} TOKENS=${TOKENS:-50000000000}
whole TOKENS
EXTRA=${EXTRA:-$((TOKENS / 5))} STOP=${STOP:-0} TEXT=${TEXT:-$TOKENS}  # paper: 10B of math more
EXTRA_TEXT=${EXTRA_TEXT:-$EXTRA}
STEPS=${STEPS:-1000 2000 3000 5000 6000 7000 10000 14000 22000}  # 2 to 44 B tokens
RECIPES=${RECIPES:-sft-gold-rl sft-rl mix rl}
MATH=${MATH:-1} MORE_MATH=${MORE_MATH:-1} LARGER=${LARGER:-1} ROLLOUTS=${ROLLOUTS:-1}
SEEDS=${SEEDS:-1} EARLY_SEEDS=${EARLY_SEEDS:-4} LAST=${STEPS##* }
for setting in EXTRA STOP TEXT EXTRA_TEXT MATH MORE_MATH LARGER ROLLOUTS SEEDS EARLY_SEEDS; do
  whole $setting
done
on() { [ "${!1}" != 0 ]; }  # NAME: is this part asked for?
if on ROLLOUTS && ! on MATH; then fail "ROLLOUTS=1 asks questions of MATH: give MATH=1 with it"; fi
read -r -a rl <<< "${RL:-}"
read -r -a recipes <<< "$RECIPES"
gsm8k=() math=() more=() easy=() hard=()

cell() {  # CHECKPOINT SEED RECIPE QUESTIONS
  local M=$OUT/$1 run=${1%/*} data=$DATA/$4 preset to sft
  [[ $4 != split-* ]] || data=$DATA/split/$4
  to=$OUT/$(name "$@") sft=$OUT/$(name "$1" "$2" "${3%-rl}" "$4") preset=${run%-math}
  local train=(--questions "$data" --seed "$2" --resume)
  local eval=(--results "$RESULTS/$run" --questions "$data" --limit 0 --final)
  case $3 in
    as-is) gpus eval.py "$M.pt" "${eval[@]}" ;;
    rl | mix) gpus "$3.py" --init "$M.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" &&
      gpus eval.py "$to.pt" "${eval[@]}" ;;
    rl-n5 | rl-n64) gpus rl.py --init "$M.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" \
        --group "${3#rl-n}" &&
      gpus eval.py "$to.pt" "${eval[@]}" ;;
    sft-rl) gpus sft.py --init "$M.pt" --out "$sft.pt" "${train[@]}" &&
      gpus rl.py --init "$sft.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" &&
      gpus eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    sft-gold-rl) gpus sft.py --init "$M.pt" --out "$sft.pt" "${train[@]}" --solutions all &&
      gpus rl.py --init "$sft.pt" --out "$to.pt" "${train[@]}" "${rl[@]}" &&
      gpus eval.py "$sft.pt" "$to.pt" "${eval[@]}" ;;
    *) echo "no recipe $3" && return 2 ;;
  esac
}
pretrain() {  # NAME PRESET TEXT TOKENS STEPS: the checkpoints OUT/NAME/step*.pt
  local preset=$2
  run gpus pretrain.py --preset "$2" --data "$DATA/$3" --out "$OUT/$1" --tokens "$4" \
    --save_steps "${5// /,}" --stop "$STOP" --tasks "$DATA/tasks" --resume
}

# 1. Questions, benchmarks and text
openmath=(openmath ${SOURCE:+--source "$SOURCE/openmath" --tests "$SOURCE"})
check=$DATA/gsm8k
if on MATH; then check+=,$DATA/math; fi
dolmino=(dolmino --tokens "$TEXT" --check "$check")
dolmino+=(${SOURCE:+--source "$SOURCE/dolmino"})
run python data/prepare.py "${openmath[@]}" --out "$DATA/gsm8k" --dataset gsm8k \
  ${FEW_SHOT:+--shots "$FEW_SHOT/gsm8k_cot_8shot.json"}
if on MATH; then
  run python data/prepare.py "${openmath[@]}" --out "$DATA/math" \
    ${FEW_SHOT:+--shots "$FEW_SHOT/minerva_math_4shot.json"}
fi
run python data/prepare.py tasks --out "$DATA/tasks" ${SOURCE:+--source "$SOURCE"}
run python data/prepare.py "${dolmino[@]}" --out "$DATA/dolmino"
if on MORE_MATH; then
  run python data/prepare.py "${dolmino[@]}" --out "$DATA/dolmino-math" \
    --extra "math=$EXTRA_TEXT" --repeat 2
fi

# 2. Every recipe from every checkpoint
pretrain "$MODEL" "$MODEL" dolmino "$TOKENS" "$STEPS"
for step in $STEPS; do
  seeds=$SEEDS
  if [ "$step" -le 5000 ] && [ "$SEEDS" -lt "$EARLY_SEEDS" ]; then seeds=$EARLY_SEEDS; fi
  M=$MODEL/step$step
  gsm8k+=("$M 0 as-is gsm8k") math+=("$M 0 as-is math")
  for ((seed = 0; seed < seeds; seed++)); do
    for recipe in "${recipes[@]}"; do
      gsm8k+=("$M $seed $recipe gsm8k") math+=("$M $seed $recipe math")
    done
  done
done
RESULTS=$RESULTS/gsm8k each cell "${gsm8k[@]}"
if on MATH; then RESULTS=$RESULTS/math each cell "${math[@]}"; fi

# 3. More math in the text, or a larger model
others=() asked=gsm8k
if on MATH; then asked=math; fi
if on MORE_MATH; then
  pretrain "$MODEL-math" "$MODEL" dolmino-math $((TOKENS + EXTRA)) "$LAST"
  others+=("$MODEL-math/step$LAST")
fi
if on LARGER; then
  pretrain "$LARGE" "$LARGE" dolmino "$TOKENS" "$LAST"
  others+=("$LARGE/step$LAST")
fi
for M in "${others[@]}"; do
  more+=("$M 0 as-is $asked")
  for ((seed = 0; seed < SEEDS; seed++)); do
    more+=("$M $seed sft-rl $asked" "$M $seed rl $asked")
  done
done
if [ ${#more[@]} -gt 0 ]; then RESULTS=$RESULTS/$asked each cell "${more[@]}"; fi

# 4. 5 or 64 rollouts, on easy and on hard questions
sets=(gsm8k)
if on MATH; then sets+=(math); fi
if on ROLLOUTS; then
  sets+=(split-easy split-hard)
  M=$MODEL/step$LAST preset=$MODEL
  if [ ! -d "$DATA/split" ]; then
    run gpus eval.py "$OUT/$M.pt" --results "$DATA/samples" --questions "$DATA/math/train.jsonl" \
      --tasks= --limit 0 --n 64 --k 1,64 --temperature 1 --shots 4
    run python data/prepare.py split --questions "$DATA/math" \
      --samples "$DATA/samples/step$LAST.jsonl" --out "$DATA/split"
  fi
  for ((seed = 0; seed < SEEDS; seed++)); do
    for n in 5 64; do
      easy+=("$M $seed rl-n$n split-easy") hard+=("$M $seed rl-n$n split-hard")
    done
  done
  RESULTS=$RESULTS/split-easy each cell "${easy[@]}"
  RESULTS=$RESULTS/split-hard each cell "${hard[@]}"
fi

for set in "${sets[@]}"; do run python eval.py --report "$RESULTS/$set"; done
total
