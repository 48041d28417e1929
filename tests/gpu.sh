#!/usr/bin/env bash
# The acceptance run on a GPU: what works there, and how fast, in nine minutes.
#
#     bash tests/gpu.sh                  all parts; the figures go to a new folder, or to $OUT
#     bash tests/gpu.sh tree scripts     some of them
#
# METHOD
# Needs one H100 or H200 (80 GB), torch 2.11 or later with triton, numpy, tiktoken and tqdm. Nothing
# is downloaded. Each part is a process of its own with a time limit, the cheapest come first, and
# one that fails does not stop the others. A part prints 15 lines at most, $OUT/log.txt the rest.
#
# What the parts ask, and what a good answer is:
#   facts     what the machine is, and its ceilings: a copy (bytes read and written) and a matrix
#             product in bf16. Times of the other parts are to be read against these two.
#   graphs    do replayed CUDA graphs of the sampler draw what eager steps draw, while rows, lengths
#             and prefix change? "largest_gap" of log-probs is near 1e-6.
#   kernels   errors of the Triton loss head against fp64, as a share of what is allowed: below 1.
#   token     attention of a new token and the draw by Triton kernels: errors against fp64, as a
#             share of what is allowed: below 1; times beside plain and compiled PyTorch, "faster"
#             above 1 is a gain. Ceiling: the TB/s of facts.
#   bf16      |log-prob| between sampler and trainer, a row an answer and a row a question, and
#             fp32: means below 0.03, of which rounded logits alone are some 0.01. --max_mismatch
#             0.1 of rl.py rests on it.
#   sampler   in fp64 the GPU draws the CPU's tokens, compiled or not: any other token is a fault.
#   tree      FlexAttention in compiled blocks against SDPA with the dense mask, forward and
#             backward; a step of RL with 8 answers a row against 1. "faster" above 1 is a gain.
#   scripts   prepare, pretrain, sft, rl with --profile, a kill, --resume, eval, torchrun, mix: all
#             exit as they should. "resume_gap": the largest difference between the losses of a run
#             that was killed and of one that was not: 0 on a CPU, small on a GPU.
#   loss      the loss head at the 1B model's sizes. Ceiling: the TFLOP/s of facts.
#   decode    a token of the 1B model at three lengths of the cache. Ceiling: the TB/s of facts.
#   training  steps of the 1B model. "mfu" is against 989 TFLOP/s, whatever the card.
# What a slow machine did not come to can be run alone: bash tests/gpu.sh training.
# The table at the end has status (well, failed, late, not begun), seconds, and the first figures;
# $OUT/parts.jsonl has one line per part with all of them.
#
# Where a result goes: BENCHMARKS.md, with the date, the card, the versions of torch and triton
# (all in parts.jsonl), and the command. Two runs differ by what the machine does beside: a change
# is shown by both sides in one run.
#
# Without a GPU the same lines run at a toy size, and nothing is measured.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
: >"$OUT/parts.jsonl"
: >"$OUT/log.txt"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
WHOLE=530 # seconds for all parts, of nine minutes: the table takes some
if ! nvidia-smi >/dev/null 2>&1; then
    WHOLE=3000 # a CPU that does other work, too, is no fault
fi

limit() { # seconds that a part may take
    case $1 in
    facts | graphs | bf16) echo $((WHOLE / 12)) ;;
    kernels | token | sampler | loss) echo $((WHOLE / 6)) ;;
    *) echo $((WHOLE / 3)) ;;
    esac
}

record() { # part, status, seconds: the line of a part that could not write its own
    printf '{"part": "%s", "status": "%s", "seconds": %d, "figures": {}}\n' "$@" \
        >>"$OUT/parts.jsonl"
}

if [ $# = 0 ]; then
    set -- facts graphs kernels token bf16 sampler tree scripts loss decode training
fi
for part in "$@"; do
    left=$((WHOLE - SECONDS))
    if [ "$left" -lt 10 ]; then
        record "$part" "not begun" 0
        continue
    fi
    seconds=$(limit "$part")
    [ "$seconds" -lt "$left" ] || seconds=$left
    began=$SECONDS
    printf '\n== %s\n' "$part" | tee -a "$OUT/log.txt"
    timeout -k 5 "$seconds" python tests/gpu_parts.py "$part" "$OUT" \
        >"$OUT/part.txt" 2>"$OUT/part.err"
    status=$?
    tail -n 15 "$OUT/part.txt"
    [ "$status" = 0 ] || tail -n 5 "$OUT/part.err"
    cat "$OUT/part.txt" "$OUT/part.err" >>"$OUT/log.txt"
    if ! grep -q "\"part\": \"$part\"" "$OUT/parts.jsonl"; then
        word=failed
        if [ "$status" = 124 ] || [ "$status" = 137 ]; then
            word=late
        fi
        record "$part" "$word" $((SECONDS - began))
    fi
done
rm -f "$OUT/part.txt" "$OUT/part.err"
python tests/gpu_parts.py table "$OUT"
