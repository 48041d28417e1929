# shellcheck shell=bash
# What the scripts for a node of GPUs share: they source it. With PLAN=1 nothing runs.
JOBS=1
source runs/common.sh
GPUS=${GPUS:-8} PLAN=${PLAN:-}
whole GPUS
preset=1b  # of the model that a command is about, for PLAN=1

if [ ! "$PLAN" ]; then
  gpus() { torchrun --standalone --nproc_per_node "$GPUS" -- "$@"; }  # SCRIPT [FLAGS]
  total() { :; }
else
  gpus() { planned+=(+ "$@" --plan "$preset"); }
  run() { if [ "$1" = gpus ]; then "$@"; fi; }
  each() {
    local cell words
    for cell in "${@:2}"; do
      read -r -a words <<< "$cell"
      "$1" "${words[@]}"
    done
  }
  total() { WORLD_SIZE=$GPUS python plan.py "${planned[@]:1}"; }  # what all of it costs
fi
