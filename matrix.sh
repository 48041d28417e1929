#!/usr/bin/env bash
# The experiment matrix: pre-train once, then every recipe from every checkpoint, evaluate, report.
#
#   bash matrix.sh                  the default world, 3 checkpoints x 7 recipes x 1 seed, 20 minutes on two cores
#   SEEDS=8 bash matrix.sh          a whole record: 8 seeds and the arms of ALL; what is finished is skipped, what was cut goes on
#   RECORD=2 SEEDS=8 bash matrix.sh     the same on other seeds
#   SCALE=sweep bash matrix.sh      learning rates, on validation questions
#   SCALE=why bash matrix.sh        after a record: what may explain it, on validation questions
#   SCALE=smoke bash matrix.sh      all of it in two minutes, to see that it works
#   SCALE=gsm8k SOURCE=FOLDER ...   real text, GSM8K and the cl100k_base vocabulary, a few steps of everything
#   SCALE=1b bash matrix.sh         the paper's own experiment, on one node of GPUS (8) GPUs
#   SCALE=1b bash matrix.sh --dry_run   (any SCALE) prints each command with its FLOPs, GPU hours and disk, runs nothing
#
# RECORD       the set of seeds (1; 0 but for toy and smoke)       JOBS     cells side by side, one thread each (2)
# SEEDS        post-training seeds from 100 x RECORD on (1)        PYTHON   the interpreter (python)
# PRETRAIN     pre-training seeds from 10 x RECORD on (1, or 2     FINAL    1: the test split, 0: validation (1)
#              from SEEDS=2 on; not 1b); they share the seeds      RESULTS  rows, report.md, figures ($OUT/results)
# OUT          checkpoints, logs (ckpt/$SCALE)                     DATA     prepared data, DATA-p10 ... (data/out/$SCALE)
# ALL          1: hard questions, data against size, 5 and 64 rollouts, shares, excursions inside pre-training (1 from SEEDS=2 on)
# TEXT_FLAGS, PRE_FLAGS, RL_FLAGS, SFT_FLAGS, GOLD_FLAGS (SFT on all solutions), MIX_FLAGS, EVAL_FLAGS    more flags for a stage
set -euo pipefail
cd "$(dirname "$0")"
SCALE=${SCALE:-toy} SEEDS=${SEEDS:-1} JOBS=${JOBS:-2} FINAL=${FINAL:-1} PYTHON=${PYTHON:-python}
if [ "$SCALE" = why ]; then OUT=${OUT:-ckpt/toy} DATA=${DATA:-data/out/toy} RESULTS=${RESULTS:-$OUT/why} PRETRAIN=${PRETRAIN:-2}; fi
OUT=${OUT:-ckpt/$SCALE} DATA=${DATA:-data/out/$SCALE} SOURCE=${SOURCE:-} DRY_RUN=${DRY_RUN:-}
RESULTS=${RESULTS:-$OUT/results} ALL=${ALL:-$((SEEDS > 1))} PRETRAIN=${PRETRAIN:-$((SEEDS > 1 ? 2 : 1))}
case $SCALE in toy | smoke | why) RECORD=${RECORD:-1} ;; *) RECORD=${RECORD:-0} PRETRAIN=1 ;; esac
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
seeds() {  # seeds FROM TO P: the post-training seeds from 100 x RECORD + FROM to before TO that pre-training run P has
  for ((s = $1; s < $2; s++)); do
    if [ $((s % PRETRAIN)) = $((${3:-10 * RECORD} - 10 * RECORD)) ]; then echo -n "$((100 * RECORD + s)),"; fi
  done
  echo ,
}

# Each stage's flags; what is not here is the script's own default for this size of model. STEPS: the checkpoints M_t.
# AFTER: of RL that starts from SFT on all solutions; MORE: of pre-training that goes on; INSIDE: of text beside RL; DRAW, SAMPLES: of eval.py on a base.
TEXT="" PRE="" RL="" SFT="" MIX="" EVAL="" DRAW="--shots 0,1,3" SAMPLES="--shots 0" toy=1 SPLIT_FLAGS=${SPLIT_FLAGS:-}
models=()  # NAME DATA SEED [flags]: what is pre-trained on what
# CHECKPOINT SEEDS RECIPES [QUESTIONS]: a cell for each seed and recipe, RECIPE+FLAG=VALUE for a variant; "wait" where what follows
# reads what is before. sft-rl and sft-gold-rl are SFT and then RL. val and base: the checkpoint itself; draw: the same with the
# shots and the sampling noise of a seed
cells=()
reports=("$RESULTS")
start=("$PYTHON")  # how a cell is started
ranks=1  # of pre-training, whose batch of 16 rows they share
while [ $((ranks * 2)) -le "$JOBS" ] && [ $ranks -lt 8 ]; do ranks=$((ranks * 2)); done
# Of the default world: its checkpoints M_t, 2.8M, 4.9M and 7M tokens; 24 solutions a question are 9,600 examples, where
# --solutions 1 sees 2,000; 5 and 64 rollouts get as many answers, 20,480
FIRST=1367 MIDDLE=2393 LAST=3418 GOLD="--epochs 1 --batch 64 --compile true --lr 4e-3" AFTER="--lr 7.5e-5"
MORE="--tokens 2099200 --lr 1.6e-3 --warmup 20" INSIDE="--sft_lr 1.6e-3 --batch 16"
POOL="--tokens 1000 --train_questions 4800" WIDER="--preset toy-large --lr 2e-3"
N5="--group 5 --questions_per_step 8 --steps 512 --eval_every 64" N64="--group 64 --questions_per_step 8 --steps 40 --eval_every 5"
prepare() { once "$1" toy --seed "$2" $TEXT; }  # prepare FOLDER SEED
toy_world() {  # models and cells of the default world; its checkpoints M_t are the steps FIRST, MIDDLE and LAST
  prepare() {  # the questions of POOL are those that easy and hard ones are chosen from, by what the last checkpoint solves
    case $1 in
      *-math60) once "$1" toy --seed "$2" --math_share 0.6 $TEXT ;;
      *) once "$1" toy --seed "$2" $TEXT && if [ "$ALL" = 1 ]; then once "$1-pool" toy --seed "$2" $TEXT $POOL; fi ;;
    esac
  }
  SPLIT_FLAGS=${SPLIT_FLAGS:-"--levels 6,2 --held_out 0.25"}  # easy: the base solves 6 or more of 64; hard: 2 or fewer
  local p=$((10 * RECORD)) run own few other at data step share last=$((10 * RECORD + PRETRAIN - 1)) gold=() more=() rollouts=() sizes=() open=()
  for run in $(seq $p $last); do  # a world of its own for each
    at=$OUT/p$run/step data=$DATA-p$run
    own=$(seeds 0 "$SEEDS" $run) few=$(seeds 0 $((SEEDS > 4 ? 4 : SEEDS)) $run)
    models+=("p$run $data $run --save_steps $MIDDLE${FIRST:+,$FIRST}")
    for step in $LAST $MIDDLE $FIRST; do
      cells+=("$at$step.pt $own val,draw,rl,sft-rl,mix")
      gold+=("$at$step.pt $few sft-gold-rl")
    done
    for step in $MIDDLE $LAST; do more+=("$at$step.pt $(seeds "$SEEDS" $((2 * SEEDS)) $run) rl"); done  # twice the seeds
    more+=("$at$LAST.pt $own base,rl $data/hard" "$at$LAST.pt $own split $data-pool/easy")
    rollouts+=("$at$LAST.pt $own rl-n5,rl-n64 $data-pool/split/split-easy" "$at$LAST.pt $own rl-n5,rl-n64 $data-pool/split/split-hard")
    for other in math60 large; do sizes+=("$OUT/p$run-$other/step$LAST.pt $own base,rl $data/hard"); done
    open+=("$at$LAST.pt $few sft-rl $data/hard" "$at$MIDDLE.pt $few text,rl-text,mix-text,mix+share=0+share_end=1")
    for share in 0.1 0.25 0.75 0.9; do open+=("$at$MIDDLE.pt $few mix+share=$share"); done
  done
  if [ "$ALL" = 1 ]; then
    for run in $(seq $p $last); do
      models+=("p$run-math60 $DATA-p$run-math60 $run" "p$run-large $DATA-p$run $run $WIDER")
    done
    cells+=("${more[@]}" wait "${rollouts[@]}" wait "${sizes[@]}" wait "${gold[@]}" "${open[@]}")  # what no verdict rests on comes last
  else
    cells+=("${gold[@]}")
  fi
}
case $SCALE in
  toy) toy_world ;;
  sweep)  # on validation questions of two pre-training runs that no result comes from: four tries a recipe at the middle checkpoint of
    # one, and the two best of each once more at the last checkpoint of the other
    FINAL=0 toy=1 models=("p1 $DATA-p1 1 --save_steps $FIRST,$MIDDLE" "p0 $DATA-p0 0 --save_steps $FIRST,$MIDDLE")
    at="$OUT/p1/step$MIDDLE.pt 1," on="$OUT/p0/step$LAST.pt 0,"
    cells=("$at base" "$on base")
    for lr in 1.5e-4 7.5e-5 3e-4 6e-4; do cells+=("$at rl+lr=$lr"); done
    for lr in 2e-3 5e-4 1e-3 4e-3; do cells+=("$at sft+lr=$lr,sft-gold+lr=$lr"); done
    for lr in 1.5e-4 3e-4; do cells+=("$at mix+lr=$lr+sft_lr=1e-3,mix+lr=$lr+sft_lr=2e-3" "$on rl+lr=$lr,mix+lr=$lr+sft_lr=2e-3"); done
    cells+=("$on sft+lr=1e-3,sft+lr=2e-3,sft-gold+lr=2e-3,sft-gold+lr=4e-3" wait)
    for lr in 1.5e-4 7.5e-5 3e-4 6e-4; do cells+=("$at sft-rl+lr=$lr,sft-gold-rl+lr=$lr"); done
    for lr in 1.5e-4 7.5e-5; do cells+=("$on sft-rl+lr=$lr,sft-gold-rl+lr=$lr"); done ;;
  why)  # with seeds that no record has: fewer questions, more steps, a larger model, other rates; and 256 answers of what the
    # record has made
    FINAL=0 toy=1 rates=() sizes=() longer=()
    for run in $(seq $((10 * RECORD)) $((10 * RECORD + PRETRAIN - 1))); do
      at=$OUT/p$run/step own=$(seeds 90 94 $run)
      models+=("p$run $DATA-p$run $run --save_steps $MIDDLE,$FIRST" "p$run-large $DATA-p$run $run $WIDER")
      for step in $LAST $MIDDLE; do
        cells+=("$at$step.pt $own rl,sft,mix,rl+steps=240+recipe=rl-240-steps")
        for count in 50 100 200; do  # as many updates as with 400
          few="+limit=$count" name=$count-questions
          cells+=("$at$step.pt $own rl$few+recipe=rl-$name,sft$few+steps=125+recipe=sft-$name,mix$few+recipe=mix-$name")
          cells+=("$at$step.pt $own sft$few+recipe=sft-$name-5-epochs")
        done
      done
      cells+=("$at$LAST.pt $own mix+lr=6e-4+recipe=mix-lr-6e-4,mix+sft_lr=4e-3+recipe=mix-sft_lr-4e-3")
      for step in $MIDDLE $LAST; do cells+=("$at$step.pt $(seeds 0 4 $run) many"); done
      rates+=("$at$LAST.pt $own rl-n5,rl-n64,rl-n64+lr=3e-4+recipe=rl-lr-3e-4")
      longer+=("$at$LAST.pt $own rl-n64+steps=512+eval_every=64+recipe=rl-512-steps") sizes+=("$OUT/p$run-large/step$LAST.pt $own rl,sft")
    done
    cells+=(wait "${rates[@]}" wait "${sizes[@]}" wait "${longer[@]}") ;;
  smoke)
    FIRST="" MIDDLE=20 LAST=40 SPLIT_FLAGS="--levels 0,64"  # nothing is solved yet
    TEXT="--tokens 100000 --val_tokens 20000 --train_questions 64 --val_questions 16 --test_questions 16 --task_items 50"
    POOL="--tokens 1000 --train_questions 64" WIDER="--preset toy-large" N5="--group 5 --steps 2" N64="--group 64 --steps 1"
    PRE="--tokens 81920 --warmup 5 --compile false --save_every 15" MORE="--tokens 20480 --compile false"
    RL="--steps 2 --questions_per_step 4 --eval_questions 4 --max_new 32 --compile false"
    AFTER="" SFT="--epochs 1 --eval_questions 4 --max_new 32" GOLD="--steps 6 --eval_questions 4 --max_new 32"
    MIX=$RL EVAL="--limit 8 --max_new 32 --compile false"
    toy_world ;;
  gsm8k)
    toy="" models=("p0 $DATA-p0 0 --save_steps 8")
    for step in 8 16; do cells+=("$OUT/p0/step$step.pt $(seeds 0 "$SEEDS") base,sft-gold-rl,sft-rl,mix,rl"); done
    prepare() { once "$1" text --source "$SOURCE/pretrain_text" && once "$1-questions" gsm8k --source "$SOURCE/gsm8k"; }
    PRE="--tokens 32768 --batch_tokens 2048 --length 256 --micro 8 --warmup 2 --questions $DATA-p0-questions --compile false"
    RL="--steps 2 --questions_per_step 4 --group 4 --max_new 48 --eval_questions 0 --micro 8 --compile false"
    SFT="--steps 4 --batch 8 --eval_questions 0 --micro 8 --max_new 48" GOLD=$SFT MIX="$RL --batch 8" AFTER=""
    EVAL="--limit 8 --n 8 --k 1,8 --shots 0 --max_new 48 --compile false" ;;
  1b)
    # The paper's sizes; tests/test_rehearsal.py goes through all of this with small ones. SOURCE=FOLDER: local copies of the
    # data, else from the hub. FEW_SHOT=FOLDER: the shots of Wei et al. and of Minerva, else training questions.
    MODEL=${MODEL:-1b} LARGE=${LARGE:-4b} TOKENS=${TOKENS:-50e9} EXTRA=${EXTRA:-10e9} BOTH=${BOTH:-60e9}  # BOTH: TOKENS + EXTRA
    STEPS=${STEPS:-1000 2000 3000 5000 6000 7000 10000 14000 22000}  # 2, 4, 6, 10, 12, 14, 20, 28 and 44 B tokens
    EARLY=${EARLY:-1000 2000 3000 5000} EARLY_SEEDS=${EARLY_SEEDS:-4}  # where seeds differ most: at least so many
    LAST=${STEPS##* } GPUS=${GPUS:-8} QUESTION_FLAGS=${QUESTION_FLAGS:-} TASK_FLAGS=${TASK_FLAGS:-}
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
    toy="" SAMPLES="--shots 4" AFTER="" N5="--group 5" N64="--group 64"
    models=("$MODEL $DATA/dolmino 0 --preset $MODEL --tokens $TOKENS --save_steps ${STEPS// /,}"
            "$MODEL-math $DATA/dolmino-math 0 --preset $MODEL --tokens $BOTH --save_steps $LAST"  # more math, or
            "$LARGE $DATA/dolmino 0 --preset $LARGE --tokens $TOKENS --save_steps $LAST")  # a larger model
    for step in $STEPS; do
      count=$SEEDS
      if [[ " $EARLY " == *" $step "* ]] && [ "$SEEDS" -lt "$EARLY_SEEDS" ]; then count=$EARLY_SEEDS; fi
      for questions in gsm8k math; do
        cells+=("$OUT/$MODEL/step$step.pt $(seeds 0 "$count") base,sft-gold-rl,sft-rl,mix,rl $DATA/$questions")
      done
    done
    for model in $MODEL-math $LARGE; do cells+=("$OUT/$model/step$LAST.pt $(seeds 0 "$SEEDS") base,sft-rl,rl $DATA/math"); done
    cells+=("$OUT/$MODEL/step$LAST.pt 0, split $DATA/math" wait)  # 5 rollouts against 64, on easy and on hard questions
    for level in easy hard; do
      cells+=("$OUT/$MODEL/step$LAST.pt $(seeds 0 "$SEEDS") rl-n5,rl-n64 $DATA/split/split-$level")
    done
    reports=("$RESULTS"/{gsm8k,math,split-easy,split-hard}) ;;
  *) wrong "no SCALE=$SCALE: toy, sweep, why, smoke, gsm8k or 1b" ;;
esac
TEXT+=" ${TEXT_FLAGS:-}" PRE+=" ${PRE_FLAGS:-}" RL+=" ${RL_FLAGS:-}" SFT+=" ${SFT_FLAGS:-}" GOLD+=" ${GOLD_FLAGS:-}" MIX+=" ${MIX_FLAGS:-}"
if [ "$FINAL" = 1 ]; then EVAL="$EVAL --final"; fi
EVAL+=" ${EVAL_FLAGS:-}"

# One cell: the commands that have to wait for each other.
cell_name() { echo "${1%.pt}${4:+-${4##*/}}-$2-s$3"; }  # of CHECKPOINT RECIPE SEED QUESTIONS
cell_rows() { echo "$RESULTS$([ "$2" != many ] || echo -many)${4:+/${4##*/}}/$(basename "$(dirname "$1")")"; }  # the folder of its rows
chain() {  # CHECKPOINT RECIPE SEED [QUESTIONS]
  set -- "$1" "$2" "$3" "${4:-}"
  local recipe=${2%%+*} more=${2#"${2%%+*}"} questions=${4:+--questions $4} go="--seed $3 --resume" loss="" how="" to rows data sft both
  more=${more//+/ --} more=${more//=/ }  # mix+share=0.1 -> --share 0.1
  to=$(cell_name "$@") rows=$(cell_rows "$@") sft=$(cell_name "$1" "${recipe%-rl}" "$3" "$4")
  data=$DATA-$(basename "$(dirname "$1")") data=${data%-large}
  if [ "$toy" ]; then  # what is measured beside the answers
    loss="--text $data"
    [ -z "$4" ] || loss="--tasks="
    [[ $4 != */hard ]] || questions+=" --max_new 84"
  fi
  measure() { run "${start[@]}" eval.py "$@" --results "$rows" $questions $loss $EVAL $how; }
  case $recipe in
    base) how=${toy:+--shots 0} && measure "$1" ;;
    val) how="$DRAW --final false" && measure "$1" ;;
    draw) how="$DRAW --shot_seed $3" && measure "$1" ;;
    many)  # answers, of the base and of what its cells have made
      to=$(cell_name "$1" rl "$3" "").pt sft=$(cell_name "$1" sft "$3" "").pt both=$(cell_name "$1" sft-rl "$3" "").pt
      [ -f "$to" ] || run "${start[@]}" rl.py --init "$1" --out "$to" $RL $go
      [ -f "$sft" ] || run "${start[@]}" sft.py --init "$1" --out "$sft" $SFT $go
      [ -f "$both" ] || run "${start[@]}" rl.py --init "$sft" --out "$both" $RL $go
      how="--n 256 --k 1,32,256 --limit 100 --tasks=" loss="" && measure "$1" --shots 0,1 && measure "$to" "$sft" "$both" ;;
    split)  # 64 samples to each training question at T = 1
      local folder=${4%/*}
      run "${start[@]}" eval.py "$1" --results "$folder/samples" --questions "$4/train.jsonl" $EVAL --final false --tasks= \
        --limit 0 --n 64 --k 1,64 --temperature 1 $SAMPLES
      run "$PYTHON" data/prepare.py split --questions "$4" --samples "$folder/samples/$(basename "${1%.pt}").jsonl" \
        --out "$folder/split" $SPLIT_FLAGS ;;
    rl | rl-n5 | rl-n64)
      case $recipe in rl-n5) more="$N5$more" ;; rl-n64) more="$N64$more" ;; esac
      run "${start[@]}" rl.py --init "$1" --out "$to.pt" $questions $RL $more $go && measure "$to.pt" ;;
    sft) run "${start[@]}" sft.py --init "$1" --out "$to.pt" $questions $SFT $more $go && measure "$to.pt" ;;
    sft-gold) run "${start[@]}" sft.py --init "$1" --out "$to.pt" --solutions all $questions $GOLD $more $go && measure "$to.pt" ;;
    sft-rl | sft-gold-rl)
      local after=""
      if [ $recipe = sft-rl ]; then run "${start[@]}" sft.py --init "$1" --out "$sft.pt" $questions $SFT $go
      else after=$AFTER && run "${start[@]}" sft.py --init "$1" --out "$sft.pt" --solutions all $questions $GOLD $go; fi
      run "${start[@]}" rl.py --init "$sft.pt" --out "$to.pt" $questions $RL $after $more $go
      measure "$sft.pt" "$to.pt" ;;
    mix) run "${start[@]}" mix.py --init "$1" --out "$to.pt" $questions $MIX $more $go && measure "$to.pt" ;;
    mix-text) run "${start[@]}" mix.py --init "$1" --out "$to.pt" --text "$data" $questions $MIX $INSIDE $more $go && measure "$to.pt" ;;
    text | rl-text)  # pre-training goes on, from the base or from its RL
      local from=$1
      if [ $recipe = rl-text ]; then
        from=$(cell_name "$1" rl "$3" "$4").pt
        [ -f "$from" ] || [ "$DRY_RUN" ] || run "${start[@]}" rl.py --init "$1" --out "$from" $questions $RL $go  # its rows may be all that was kept
      fi
      run "${start[@]}" pretrain.py --init "$from" --data "$data" --out "$to" $MORE $more $go
      rows+=/$(basename "$to")
      measure "$to"/step*.pt ;;
  esac
}
finished() {  # the rows of a cell's last checkpoint exist
  local file rows
  rows=$(cell_rows "$@") file=$(basename "$(cell_name "$@")")
  case ${2%%+*} in
    split) [ -f "${4%/*}/split/world.json" ]; return ;;
    base | val) file=$(basename "${1%.pt}") ;;
    many) file=$(basename "$(cell_name "$1" sft-rl "$3" "")") ;;
    draw) file=$(basename "${1%.pt}")-s$3 ;;
    text | rl-text) compgen -G "$rows/$file/step*.jsonl" > /dev/null; return ;;
  esac
  [ -f "$rows/$file.jsonl" ] && grep -q "\"split\": \"$([ "$FINAL" = 1 ] && [ "$2" != val ] && echo test || echo val)\"" "$rows/$file.jsonl"
}

began=$SECONDS
stop() { echo "matrix.sh: error: $last failed" >&2; exit 1; }
set -m  # each job is a process group of its own, so that nothing of it stays behind when this script ends
end() { for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done; }
trap 'end; trap end INT TERM; wait' EXIT  # trainers end their step and save; a second Ctrl-C stops them at once
job() { trap 'exit 143' TERM; "$@"; }  # with a trap the shell of a job waits for what it runs
trap 'exit 130' INT
trap 'exit 143' TERM
todo=() total=0 wave=()
for line in "${cells[@]}" wait; do  # all cells of the first seed come first
  if [ "$line" != wait ]; then wave+=("$line"); continue; fi
  for ((i = 1, found = 1; found; i++)); do
    found=0
    for cell in "${wave[@]}"; do
      read -r init seeds recipes questions <<< "$cell"
      seed=$(echo "$seeds" | cut -d , -f $i)
      [ "$seed" ] || continue
      found=1
      for recipe in ${recipes//,/ }; do
        [[ $recipe != base && $recipe != val && $recipe != split && $recipe != many ]] || [ $i = 1 ] || continue
        total=$((total + 1))
        finished "$init" "$recipe" "$seed" "$questions" || todo+=("$init $recipe $seed $questions")
      done
    done
  done
  todo+=(wait) wave=()
done
count=0 left=$((${#todo[@]} - $(printf '%s\n' "${todo[@]}" | grep -cx wait)))
echo "$total cells, $((total - left)) finished before, $JOBS side by side"

for model in "${models[@]}"; do
  read -r name data seed flags <<< "$model"
  prepare "$data" "$seed" || stop
done

declare -A started
matrix_began=$SECONDS
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
  running=$((running - 1))
  local seconds=$(((SECONDS - matrix_began) * (left - count) / count))
  echo "$count/$left  ${started[$pid]}  $(((SECONDS - began) / 60)) min in, about $(((seconds + 59) / 60)) min of cells left"
}
running=0 made=""
need() {  # CHECKPOINT: its model is pre-trained before its first cell, alone on the machine
  local model name data seed flags from
  for model in "${models[@]}"; do
    read -r name data seed flags <<< "$model"
    if [[ $1 != "$OUT/$name/"* || "$made " == *" $name "* ]]; then continue; fi
    while [ $running -gt 0 ]; do reap; done
    from=$SECONDS
    [ "$DRY_RUN" ] || mkdir -p "$OUT/$name" "$RESULTS"
    # one process a core and one thread each: on small models two ranks are faster than two threads
    last="pretrain.py --out $OUT/$name"
    job run "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$ranks" pretrain.py --data "$data" --out "$OUT/$name" \
      --resume --seed $seed $flags $PRE &
    wait $! || stop  # a trap is not run before a command ends, but in the middle of `wait`
    made+=" $name" matrix_began=$((matrix_began + SECONDS - from))  # cells alone tell how long cells take
  done
}
for job in "${todo[@]}"; do
  while [ $running -gt 0 ] && { [ "$job" = wait ] || [ $running -ge "$JOBS" ]; }; do reap; done
  [ "$job" != wait ] || continue
  need "$job"
  if [ "$DRY_RUN" ]; then chain $job; continue; fi
  log=$(cell_name $job).log
  echo "start  $job  ($log)"
  job chain $job > "$log" 2>&1 &
  started[$!]=$job
  running=$((running + 1))
done

for folder in "${reports[@]}"; do run "$PYTHON" eval.py --report "$folder"; done
[ "$DRY_RUN" ] || echo "done in $(((SECONDS - began + 59) / 60)) min: ${reports[*]/%//report.md}"
