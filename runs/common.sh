# shellcheck shell=bash
# What matrix.sh and the scripts of runs/ share: checks, cells side by side, and an orderly end.
set -euo pipefail
fail() { echo "$(basename "$0"): error: $1" >&2; exit 2; }
[ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -ge 44 ] ||
  fail "bash $BASH_VERSION is too old, it takes 4.4: brew install bash (macOS), then start it anew"
command -v python > /dev/null ||
  fail "no python on the PATH: activate the environment that has requirements.txt"
[ $# = 0 ] || fail "there is no '$1': settings are variables, see the first lines of the script"
whole() {  # NAME: a setting that is a whole number
  [[ ${!1} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$1 takes a whole number, not '${!1}'"
}
JOBS=${JOBS:-2}
whole JOBS
[ "$JOBS" -gt 0 ] || fail "JOBS takes a whole number from 1, not 0"
RANKS=1  # of pre-training, whose batch of 16 rows they share
while [ $((2 * RANKS)) -le "$JOBS" ] && [ $RANKS -lt 8 ]; do RANKS=$((2 * RANKS)); done
export OMP_NUM_THREADS=1  # a process for each core is faster than threads, on small models

# Whatever ends a script ends what it has started: trainers finish their step, save and leave.
# A second Ctrl-C stops them at once.
set -m  # each job in the background is a process group, which a signal reaches as a whole
stop() {
  local group
  for group in $(jobs -p); do kill -TERM -- "-$group" 2> /dev/null || true; done
}
trap 'stop; trap stop INT TERM HUP; until wait; do :; done' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
job() {  # COMMAND: with a trap its shell waits for what it runs
  trap 'exit 143' TERM
  "$@"
}
run() {  # COMMAND: alone on the machine; a trap is run during `wait`, not during a command
  echo "$*"
  job "$@" &
  wait $!
}

name() {  # CHECKPOINT SEED RECIPE [FLAGS] -> p30/step3516-rl--lr-3e-4-s30, what a cell makes
  local recipe="${*:3}"
  recipe=${recipe// --/--}
  case $3 in  # eval.py names the rows of a base after the checkpoint and its --shot_seed
    as-is) echo "$1" ;;
    base) echo "$1-s$2" ;;
    *) echo "$1-${recipe// /-}-s$2" ;;
  esac
}
has_rows() {  # CELL: are the rows of its last checkpoint there?
  local kept
  kept=$(name "$@")
  [ ! -f "$RESULTS/$kept.jsonl" ] || return 0
  [ "$3" != base ] || kept=$1
  grep -qs "\"$OUT/$kept.pt\".*\"split\": \"test\"" "${KEPT:-}"
}
unfinished() {  # CELL...: those that have no rows yet, a line each
  local cell words
  for cell in "$@"; do
    read -r -a words <<< "$cell"
    has_rows "${words[@]}" || echo "$cell"
  done
}
logged() {  # FUNCTION CELL: what it prints goes to a log; if it fails, the end of it is shown
  local log
  log=$OUT/$(name "${@:2}").log
  mkdir -p "$(dirname "$log")"
  if ! "$@" > "$log" 2>&1; then
    { echo "$(basename "$0"): error: ${*:2} failed, see $log"
      tr '\r' '\n' < "$log" | tail -n 3; } >&2
    exit 1
  fi
}
each() {  # FUNCTION CELL...: the function for each cell that has no rows yet, JOBS side by side
  local todo=() words=() started=0 finished=0 began=$SECONDS pid left
  local -A running=()
  left=$(unfinished "${@:2}")
  [ ! "$left" ] || mapfile -t todo <<< "$left"
  echo "$(($# - 1)) cells, $(($# - 1 - ${#todo[@]})) finished before, $JOBS side by side"
  while [ $finished -lt ${#todo[@]} ]; do
    if [ $started -lt ${#todo[@]} ] && [ ${#running[@]} -lt "$JOBS" ]; then
      read -r -a words <<< "${todo[started]}"
      job logged "$1" "${words[@]}" &
      running[$!]=${todo[started]} started=$((started + 1))
      continue
    fi
    wait -n || exit 1
    for pid in "${!running[@]}"; do kill -0 "$pid" 2> /dev/null || break; done  # which one is gone
    finished=$((finished + 1)) left=$((${#todo[@]} - finished))
    left=$(((SECONDS - began) * left / finished / 60 + 1))
    [ $finished -lt ${#todo[@]} ] || left=0
    echo "$finished/${#todo[@]}  ${running[$pid]}" \
      " $(((SECONDS - began) / 60)) min in, about $left min left"
    unset "running[$pid]"
  done
}
