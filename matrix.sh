#!/usr/bin/env bash
# The experiment matrix: pre-train once, then every recipe from every checkpoint, evaluate, report.
#
#   bash matrix.sh                  the default world, 3 checkpoints x 7 recipes x 1 seed, 20 minutes on two cores
#   SEEDS=8 bash matrix.sh          more seeds; what is finished is skipped, what was cut goes on
#   SCALE=smoke bash matrix.sh      all of it in two minutes, to see that it works
#   SCALE=gsm8k SOURCE=FOLDER ...   real text, GSM8K and the cl100k_base vocabulary, a few steps of everything
#   SCALE=1b bash matrix.sh         the paper's own experiment, on one node of GPUS (8) GPUs
#   SCALE=1b bash matrix.sh --dry_run   (any SCALE) prints each command with its FLOPs, GPU hours and disk, runs nothing
#
# SEEDS        post-training seeds 0 .. SEEDS-1                    JOBS     cells side by side, one thread each (2)
# PRETRAIN     pre-training seeds 0 .. PRETRAIN-1 (1; not 1b)     PYTHON   the interpreter (python)
# OUT          checkpoints, logs (ckpt/$SCALE)                     RESULTS  rows, report.md, figures ($OUT/results)
# DATA         prepared data, DATA-p0 ... (data/out/$SCALE)        FINAL    1: the test split, 0: validation (1)
# TEXT_FLAGS, PRE_FLAGS, RL_FLAGS, SFT_FLAGS, GOLD_FLAGS (SFT on all solutions), MIX_FLAGS, EVAL_FLAGS    more flags for a stage
set -euo pipefail
cd "$(dirname "$0")"
SCALE=${SCALE:-toy} SEEDS=${SEEDS:-1} PRETRAIN=${PRETRAIN:-1} JOBS=${JOBS:-2} FINAL=${FINAL:-1} PYTHON=${PYTHON:-python}
OUT=${OUT:-ckpt/$SCALE} DATA=${DATA:-data/out/$SCALE} SOURCE=${SOURCE:-} DRY_RUN=${DRY_RUN:-}
RESULTS=${RESULTS:-$OUT/results}
wrong() { echo "matrix.sh: error: $1" >&2; exit 2; }
case ${1:-} in
  "") ;;
  --dry_run) DRY_RUN=1 bash matrix.sh | "$PYTHON" data/plan.py; exit ;;
  *) wrong "no flag $1, there is --dry_run" ;;
esac
[ "$JOBS" -ge 1 ] 2>/dev/null || wrong "JOBS is a number from 1, not '$JOBS'"
if [ "$SCALE" = gsm8k ] && [ ! -d "$SOURCE/gsm8k" ]; then
  wrong "SCALE=gsm8k needs SOURCE=FOLDER with gsm8k/ and pretrain_text/ in it"
fi

run() {  # prints each command, so that a log says what failed
  last=$*
  echo "+ $last"
  [ "$DRY_RUN" ] || OMP_NUM_THREADS=1 "$@"
}
begun=""
once() {  # once FOLDER COMMAND [flags]: what a command of prepare.py makes, if it is not there yet
  local folder=$1
  shift
  if [ -f "$folder/world.json" ] || [[ "$begun " == *" $folder "* ]]; then return; fi
  begun+=" $folder"
  run "$PYTHON" data/prepare.py "$@" --out "$folder"
}

# Each stage's flags; what is not here is the script's own default for this size of model. STEPS: the checkpoints M_t.
TEXT="" PRE="" RL="" SFT="" GOLD="" MIX="" EVAL=""
prepare() { once "$1" toy --seed "$2" $TEXT; }  # prepare FOLDER SEED
ALL=base,sft-gold,sft,mix,rl  # the recipes; RL goes on from each SFT checkpoint
models=() cells=() reports=("$RESULTS")
start=("$PYTHON")  # how a cell is started
ranks=1  # of pre-training, whose batch of 8 rows they share
while [ $((ranks * 2)) -le "$JOBS" ] && [ $ranks -lt 8 ]; do ranks=$((ranks * 2)); done
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
    prepare() { once "$1" text --source "$SOURCE/pretrain_text" && once "$1-questions" gsm8k --source "$SOURCE/gsm8k"; }
    PRE="--tokens 32768 --batch_tokens 2048 --length 256 --micro 8 --warmup 2 --questions $DATA-p0-questions --compile false"
    RL="--steps 2 --questions_per_step 4 --group 4 --max_new 48 --eval_questions 0 --micro 8 --compile false"
    SFT="--steps 4 --batch 8 --eval_questions 0 --micro 8 --max_new 48" GOLD=$SFT MIX="$RL --batch 8"
    EVAL="--limit 8 --n 8 --k 1,8 --shots 0 --max_new 48 --compile false" ;;
  1b)
    # The paper's sizes; tests/test_rehearsal.py goes through all of this with small ones. SOURCE=FOLDER: local copies of the
    # data, else from the hub. FEW_SHOT=FOLDER: the shots of Wei et al. and of Minerva, else training questions.
    MODEL=${MODEL:-1b} LARGE=${LARGE:-4b} TOKENS=${TOKENS:-50e9} EXTRA=${EXTRA:-10e9} BOTH=${BOTH:-60e9}  # BOTH: TOKENS + EXTRA
    STEPS=${STEPS:-1000 2000 3000 5000 6000 7000 10000 14000 22000}  # 2, 4, 6, 10, 12, 14, 20, 28 and 44 B tokens
    EARLY=${EARLY:-1000 2000 3000 5000} EARLY_SEEDS=${EARLY_SEEDS:-4}  # where seeds differ most: at least so many
    LAST=${STEPS##* } GPUS=${GPUS:-8} QUESTION_FLAGS=${QUESTION_FLAGS:-} TASK_FLAGS=${TASK_FLAGS:-} SPLIT_FLAGS=${SPLIT_FLAGS:-}
    JOBS=1 ranks=$GPUS start=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" --)  # that is torchrun
    prepare() {
      local openmath=(openmath $QUESTION_FLAGS ${SOURCE:+--source "$SOURCE/openmath" --tests "$SOURCE"})
      local dolmino=(dolmino $TEXT --tokens "$TOKENS" --check "$DATA/gsm8k,$DATA/math" ${SOURCE:+--source "$SOURCE/dolmino"})
      once "$DATA/gsm8k" "${openmath[@]}" --dataset gsm8k ${FEW_SHOT:+--shots "$FEW_SHOT/gsm8k_cot_8shot.json"} &&
        once "$DATA/math" "${openmath[@]}" ${FEW_SHOT:+--shots "$FEW_SHOT/minerva_math_4shot.json"} &&
        once "$DATA/tasks" tasks $TASK_FLAGS ${SOURCE:+--source "$SOURCE"} &&
        once "$DATA/dolmino" "${dolmino[@]}" && once "$DATA/dolmino-math" "${dolmino[@]}" --extra "math=$EXTRA" --repeat 2
    }
    # so a 4b fits 141 GB, and with --rows 64 80 GB, by data/plan.py memory; none of it changes a result
    PRE="--tasks $DATA/tasks --micro 2 --shard" RL="--micro 8 --rows 256 --shard" SFT=$RL GOLD=$RL MIX=$RL EVAL="--limit 0 --rows 256"
    models=("$MODEL $DATA/dolmino --preset $MODEL --tokens $TOKENS --save_steps ${STEPS// /,}"
            "$MODEL-math $DATA/dolmino-math --preset $MODEL --tokens $BOTH --save_steps $LAST"  # more math, or
            "$LARGE $DATA/dolmino --preset $LARGE --tokens $TOKENS --save_steps $LAST")  # a larger model
    for step in $STEPS; do
      seeds=$SEEDS
      if [[ " $EARLY " == *" $step "* ]] && [ "$SEEDS" -lt "$EARLY_SEEDS" ]; then seeds=$EARLY_SEEDS; fi
      cells+=("$OUT/$MODEL/step$step.pt $seeds $ALL gsm8k" "$OUT/$MODEL/step$step.pt $seeds $ALL math")
    done
    cells+=("$OUT/$MODEL-math/step$LAST.pt $SEEDS base,sft,rl math" "$OUT/$LARGE/step$LAST.pt $SEEDS base,sft,rl math"
            "$OUT/$MODEL/step$LAST.pt 1 split math"  # 5 rollouts against 64, on easy and on hard questions
            "$OUT/$MODEL/step$LAST.pt $SEEDS rl-n5,rl-n64 split/easy" "$OUT/$MODEL/step$LAST.pt $SEEDS rl-n5,rl-n64 split/hard")
    reports=("$RESULTS"/{gsm8k,math,easy,hard}) ;;
  *) wrong "no SCALE=$SCALE: toy, smoke, gsm8k or 1b" ;;
esac
if [ ${#models[@]} = 0 ]; then
  for ((p = 0; p < PRETRAIN; p++)); do  # a world of its own for each pre-training seed
    models+=("p$p $DATA-p$p --save_steps ${STEPS// /,} --seed $p")
    for step in $STEPS; do cells+=("$OUT/p$p/step$step.pt $SEEDS $ALL"); done
  done
fi
TEXT+=" ${TEXT_FLAGS:-}" PRE+=" ${PRE_FLAGS:-}" RL+=" ${RL_FLAGS:-}" SFT+=" ${SFT_FLAGS:-}" GOLD+=" ${GOLD_FLAGS:-}" MIX+=" ${MIX_FLAGS:-}"
if [ "$FINAL" = 1 ]; then EVAL="$EVAL --final"; fi
EVAL+=" ${EVAL_FLAGS:-}"

# One chain of cells: the commands that have to wait for each other. QUESTIONS is a folder in DATA, or nothing: what the
# checkpoint names.
cell_name() { echo "${1%.pt}${4:+-${4##*/}}-$2-s$3"; }  # of CHECKPOINT RECIPE SEED QUESTIONS
cell_rows() { echo "$RESULTS${4:+/${4##*/}}/$(basename "$(dirname "$1")")"; }  # the folder of its rows
chain() {
  local to rows questions=${4:+--questions $DATA/$4} go="--seed $3 --resume"
  to=$(cell_name "$@") rows=$(cell_rows "$@")
  case $2 in
    base) run "${start[@]}" eval.py "$1" --results "$rows" $questions $EVAL; return ;;
    split)  # 64 samples to each training question at T = 1
      run "${start[@]}" eval.py "$1" --results "$DATA/samples" --questions "$DATA/$4/train.jsonl" $EVAL --final false --tasks= \
        --limit 0 --n 64 --k 1,64 --temperature 1 --shots 4
      run "$PYTHON" data/prepare.py split --questions "$DATA/$4" --samples "$DATA/samples/$(basename "${1%.pt}").jsonl" \
        --out "$DATA/split" $SPLIT_FLAGS
      return ;;
    rl) run "${start[@]}" rl.py --init "$1" --out "$to.pt" $questions $RL $go ;;
    rl-n*) run "${start[@]}" rl.py --init "$1" --out "$to.pt" $questions $RL --group "${2#rl-n}" $go ;;
    mix) run "${start[@]}" mix.py --init "$1" --out "$to.pt" $questions $MIX $go ;;
    sft) run "${start[@]}" sft.py --init "$1" --out "$to.pt" $questions $SFT $go ;;
    sft-gold) run "${start[@]}" sft.py --init "$1" --out "$to.pt" --solutions all $questions $GOLD $go ;;
  esac
  if [[ $2 == sft* ]]; then
    run "${start[@]}" rl.py --init "$to.pt" --out "$to-rl.pt" $questions $RL $go
    run "${start[@]}" eval.py "$to.pt" "$to-rl.pt" --results "$rows" $questions $EVAL
  else
    run "${start[@]}" eval.py "$to.pt" --results "$rows" $questions $EVAL
  fi
}
finished() {  # the rows of a chain's last cell exist
  local file
  case $2 in
    split) [ -f "$DATA/split/world.json" ]; return ;;
    base) file=${1%.pt} ;;
    sft*) file=$(cell_name "$@")-rl ;;
    *) file=$(cell_name "$@") ;;
  esac
  file=$(cell_rows "$@")/$(basename "$file").jsonl
  [ -f "$file" ] && grep -q "\"split\": \"$([ "$FINAL" = 1 ] && echo test || echo val)\"" "$file"
}

began=$SECONDS
stop() { echo "matrix.sh: error: $last failed" >&2; exit 1; }
set -m  # each job is a process group of its own, so that nothing of it stays behind when this script ends
end() { for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done; }
trap 'end; trap end INT TERM; wait' EXIT  # trainers end their step and save; a second Ctrl-C stops them at once
job() { trap 'exit 143' TERM; "$@"; }  # with a trap the shell of a job waits for what it runs
trap 'exit 130' INT
trap 'exit 143' TERM
p=0
for model in "${models[@]}"; do
  read -r name data flags <<< "$model"
  prepare "$data" $((p++)) || stop
  [ "$DRY_RUN" ] || mkdir -p "$OUT/$name" "$RESULTS"
  # one process a core and one thread each: on small models two ranks are faster than two threads
  last="pretrain.py --out $OUT/$name"
  job run "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$ranks" pretrain.py --data "$data" --out "$OUT/$name" \
    --resume $flags $PRE &
  wait $! || stop  # a trap is not run before a command ends, but in the middle of `wait`
done

todo=() total=0
for ((seed = 0; seed < SEEDS || seed < ${EARLY_SEEDS:-0}; seed++)); do
  for line in "${cells[@]}"; do
    read -r init seeds recipes questions <<< "$line"
    [ $seed -lt "$seeds" ] || continue
    for recipe in ${recipes//,/ }; do
      [ "$recipe" = base ] && [ "$seed" != 0 ] && continue
      total=$((total + 1))
      finished "$init" "$recipe" "$seed" "$questions" || todo+=("$init $recipe $seed $questions")
    done
  done
done
echo "$total chains of cells, $((total - ${#todo[@]})) finished before, $JOBS side by side"

declare -A started
count=0 matrix_began=$SECONDS
reap() {  # wait for one chain; stop everything if it failed
  local pid status=0
  wait -n -p pid || status=$?
  count=$((count + 1))
  if [ $status != 0 ]; then
    log=$(cell_name ${started[$pid]}).log
    echo "matrix.sh: error: $(grep '^+ ' "$log" | tail -n 1 | cut -c 3-) exited with status $status" >&2
    tr '\r' '\n' < "$log" | grep -v '^+ ' | tail -n 3 >&2
    exit 1
  fi
  local left=$(((SECONDS - matrix_began) * (${#todo[@]} - count) / count))
  echo "$count/${#todo[@]}  ${started[$pid]}  $(((SECONDS - began) / 60)) min in, about $(((left + 59) / 60)) min left"
}
running=0
for job in ${todo[@]+"${todo[@]}"}; do
  if [ "$DRY_RUN" ]; then chain $job; continue; fi
  if [ $running -ge "$JOBS" ]; then reap; running=$((running - 1)); fi
  log=$(cell_name $job).log
  echo "start  $job  ($log)"
  job chain $job > "$log" 2>&1 &
  started[$!]=$job
  running=$((running + 1))
done
while [ $running -gt 0 ]; do reap; running=$((running - 1)); done

for folder in "${reports[@]}"; do run "$PYTHON" eval.py --report "$folder"; done
[ "$DRY_RUN" ] || echo "done in $(((SECONDS - began + 59) / 60)) min: ${reports[*]/%//report.md}"
