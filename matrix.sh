#!/usr/bin/env bash
# The experiment matrix: pre-train once, then every recipe from every checkpoint, evaluate, report.
#
#   bash matrix.sh                  the default world, 3 checkpoints x 7 recipes x 1 seed, 20 minutes on two cores
#   SEEDS=8 bash matrix.sh          more seeds; what is finished is skipped, what was cut goes on
#   SCALE=smoke bash matrix.sh      all of it in two minutes, to see that it works
#   SCALE=gsm8k SOURCE=FOLDER ...   real text, GSM8K and the cl100k_base vocabulary, a few steps of everything
#   SCALE=1b bash matrix.sh         prints the paper's commands
#
# SEEDS        post-training seeds 0 .. SEEDS-1                    JOBS     cells side by side, one thread each (2)
# PRETRAIN     pre-training seeds 0 .. PRETRAIN-1 (1)              PYTHON   the interpreter (python)
# OUT          checkpoints, logs (ckpt/$SCALE)                     RESULTS  rows, report.md, figures ($OUT/results)
# DATA         prepared data, DATA-p0 ... (data/out/$SCALE)        FINAL    1: the test split, 0: validation (1)
set -euo pipefail
cd "$(dirname "$0")"
SCALE=${SCALE:-toy} SEEDS=${SEEDS:-1} PRETRAIN=${PRETRAIN:-1} JOBS=${JOBS:-2} FINAL=${FINAL:-1} PYTHON=${PYTHON:-python}
OUT=${OUT:-ckpt/$SCALE} DATA=${DATA:-data/out/$SCALE}
RESULTS=${RESULTS:-$OUT/results}

# Each stage's flags; what is not here is the script's own default for this size of model. STEPS: the checkpoints M_t.
prepare() { [ -f "$1/world.json" ] || "$PYTHON" data/prepare.py toy --out "$1" --seed "$2" $TEXT; }
TEXT="" PRE="" RL="" SFT="" GOLD="" MIX="" EVAL=""
case $SCALE in
  toy)
    STEPS="1367 2051 2734"  # 2.8M, 4.2M and 5.6M tokens
    GOLD="--epochs 1 --batch 64 --compile true" ;;  # 24 solutions a question: 9,600 examples, where --solutions 1 sees 2,000
  smoke)
    STEPS="20 40"
    TEXT="--tokens 150000 --train_questions 64 --val_questions 16 --test_questions 16 --task_items 50"
    PRE="--tokens 102400 --warmup 5 --compile false --save_every 15"
    RL="--steps 2 --questions_per_step 4 --eval_questions 4 --max_new 32 --compile false"
    SFT="--epochs 1 --eval_questions 4 --max_new 32" GOLD="--steps 6 --eval_questions 4 --max_new 32"
    MIX=$RL EVAL="--limit 8 --max_new 32 --compile false" ;;
  gsm8k)
    STEPS="8 16"
    prepare() {
      { [ -f "$1/world.json" ] || "$PYTHON" data/prepare.py text --source "$SOURCE/pretrain_text" --out "$1"; } &&
        { [ -f "$1-questions/world.json" ] || "$PYTHON" data/prepare.py gsm8k --source "$SOURCE/gsm8k" --out "$1-questions"; }
    }
    PRE="--tokens 32768 --batch_tokens 2048 --length 256 --micro 8 --warmup 2 --questions $DATA-p0-questions --compile false"
    RL="--steps 2 --questions_per_step 4 --group 4 --max_new 48 --eval_questions 0 --micro 8 --compile false"
    SFT="--steps 4 --batch 8 --eval_questions 0 --micro 8 --max_new 48" GOLD=$SFT MIX="$RL --batch 8"
    EVAL="--limit 8 --n 8 --k 1,8 --shots 0 --max_new 48 --compile false" ;;
  1b)
    cat <<'TEXT'
# The paper's scale, on one node of 8 GPUs. The loaders for DOLMino, OpenMathInstruct-1 and the six benchmarks are not in
# this repository yet: bring your own shards (data/tokens.py) and questions (data/problems.py) in the folders named here.
torchrun --nproc_per_node 8 pretrain.py --preset 1b --data data/out/dolmino --questions data/out/openmath --out ckpt/1b \
    --tokens 50e9 --save_steps 1000,2000,3000,5000,6000,7000,10000,14000,22000
for M in 1000 2000 3000 5000 6000 7000 10000 14000 22000; do
  torchrun --nproc_per_node 8 rl.py  --init ckpt/1b/step$M.pt
  torchrun --nproc_per_node 8 sft.py --init ckpt/1b/step$M.pt
  torchrun --nproc_per_node 8 rl.py  --init ckpt/1b/step$M-sft.pt
  torchrun --nproc_per_node 8 sft.py --init ckpt/1b/step$M.pt --solutions all
  torchrun --nproc_per_node 8 rl.py  --init ckpt/1b/step$M-sft-gold.pt
  torchrun --nproc_per_node 8 mix.py --init ckpt/1b/step$M.pt
  torchrun --nproc_per_node 8 eval.py ckpt/1b/step$M.pt ckpt/1b/step$M-*.pt --questions data/out/gsm8k,data/out/math --limit 0 --final --results results/1b
done
python eval.py --report results/1b
TEXT
    exit 0 ;;
  *) echo "matrix.sh: error: no SCALE=$SCALE: toy, smoke, gsm8k or 1b" >&2; exit 2 ;;
esac
if [ "$SCALE" = gsm8k ] && [ ! -d "${SOURCE:-/nowhere}/gsm8k" ]; then
  echo "matrix.sh: error: SCALE=gsm8k needs SOURCE=FOLDER with gsm8k/ and pretrain_text/ in it" >&2; exit 2
fi
if [ "$FINAL" = 1 ]; then EVAL="$EVAL --final"; fi
if ! [ "$JOBS" -ge 1 ] 2>/dev/null; then echo "matrix.sh: error: JOBS is a number from 1, not '$JOBS'" >&2; exit 2; fi

# One chain of cells: the commands that have to wait for each other. Prints each command, so that a log says what failed.
run() { echo "+ $*"; OMP_NUM_THREADS=1 "$@"; }
chain() {  # chain CHECKPOINT RECIPE SEED
  local from=${1%.pt} recipe=$2 seed=$3
  local to="$from-$recipe-s$seed" rows; rows=$RESULTS/$(basename "$(dirname "$from")")
  local go="--seed $seed --resume"
  case $recipe in
    base) run "$PYTHON" eval.py "$1" --results "$rows" $EVAL; return ;;
    rl) run "$PYTHON" rl.py --init "$1" --out "$to.pt" $RL $go ;;
    mix) run "$PYTHON" mix.py --init "$1" --out "$to.pt" $MIX $go ;;
    sft) run "$PYTHON" sft.py --init "$1" --out "$to.pt" $SFT $go ;;
    sft-gold) run "$PYTHON" sft.py --init "$1" --out "$to.pt" --solutions all $GOLD $go ;;
  esac
  if [[ $recipe == sft* ]]; then
    run "$PYTHON" rl.py --init "$to.pt" --out "$to-rl.pt" $RL $go
    run "$PYTHON" eval.py "$to.pt" "$to-rl.pt" --results "$rows" $EVAL
  else
    run "$PYTHON" eval.py "$to.pt" --results "$rows" $EVAL
  fi
}
finished() {  # the rows of a chain's last cell exist
  local stem=${1%.pt}; local rows; rows=$RESULTS/$(basename "$(dirname "$stem")"); stem=$(basename "$stem")
  case $2 in base) ;; sft*) stem=$stem-$2-s$3-rl ;; *) stem=$stem-$2-s$3 ;; esac
  [ -f "$rows/$stem.jsonl" ] && grep -q "\"split\": \"$([ "$FINAL" = 1 ] && echo test || echo val)\"" "$rows/$stem.jsonl"
}

ranks=1  # for pre-training, whose batch of 8 rows they share
while [ $((ranks * 2)) -le "$JOBS" ] && [ $ranks -lt 8 ]; do ranks=$((ranks * 2)); done
began=$SECONDS
stop() { echo "matrix.sh: error: $1 failed" >&2; exit 1; }
set -m  # each chain is a process group of its own, so that nothing of it stays behind when this script ends
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((p = 0; p < PRETRAIN; p++)); do
  folder=$OUT/p$p
  mkdir -p "$folder" "$RESULTS"
  data=$DATA-p$p  # a world of its own for each pre-training seed
  prepare "$data" "$p" || stop "data/prepare.py (seed $p, into $data)"
  # one process a core and one thread each: on small models two ranks are faster than two threads
  OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node $ranks pretrain.py --data "$data" \
    --out "$folder" --save_steps "${STEPS// /,}" --seed "$p" --resume $PRE \
    || stop "pretrain.py --data $data --out $folder --save_steps ${STEPS// /,} --seed $p --resume $PRE"
done

todo=() total=0
for ((seed = 0; seed < SEEDS; seed++)); do
  for ((p = 0; p < PRETRAIN; p++)); do
    for step in $STEPS; do
      for recipe in base sft-gold sft mix rl; do
        [ "$recipe" = base ] && [ "$seed" != 0 ] && continue
        total=$((total + 1))
        finished "$OUT/p$p/step$step.pt" "$recipe" "$seed" || todo+=("$OUT/p$p/step$step.pt $recipe $seed")
      done
    done
  done
done
echo "$total chains of cells, $((total - ${#todo[@]})) finished before, $JOBS side by side"

declare -A cell
count=0 matrix_began=$SECONDS
reap() {  # wait for one chain; stop everything if it failed
  local pid status=0
  wait -n -p pid || status=$?
  count=$((count + 1))
  if [ $status != 0 ]; then
    read -r init recipe seed <<< "${cell[$pid]}"
    log=${init%.pt}-$recipe-s$seed.log
    echo "matrix.sh: error: $(grep '^+ ' "$log" | tail -n 1 | cut -c 3-) exited with status $status" >&2
    tr '\r' '\n' < "$log" | grep -v '^+ ' | tail -n 3 >&2
    exit 1
  fi
  local left=$(((SECONDS - matrix_began) * (${#todo[@]} - count) / count))
  echo "$count/${#todo[@]}  ${cell[$pid]}  $(((SECONDS - began) / 60)) min in, about $(((left + 59) / 60)) min left"
}
running=0
for job in ${todo[@]+"${todo[@]}"}; do
  if [ $running -ge "$JOBS" ]; then reap; running=$((running - 1)); fi
  read -r init recipe seed <<< "$job"
  echo "start  $init $recipe $seed  (${init%.pt}-$recipe-s$seed.log)"
  chain "$init" "$recipe" "$seed" > "${init%.pt}-$recipe-s$seed.log" 2>&1 &
  cell[$!]=$job
  running=$((running + 1))
done
while [ $running -gt 0 ]; do reap; running=$((running - 1)); done

"$PYTHON" eval.py --report "$RESULTS"
echo "done in $(((SECONDS - began + 59) / 60)) min: $RESULTS/report.md"
