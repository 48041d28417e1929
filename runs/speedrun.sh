#!/usr/bin/env bash
# The paper's first finding at its own size, RL works early: a 1B on DOLMino, stopped after 6.3B
# tokens; then rl, sft, sft->rl and mix from steps 1000, 2000 and 3000, on GSM8K's test questions.
#
#   PLAN=1 bash runs/speedrun.sh    what each command costs and all of them together; runs nothing
#   bash runs/speedrun.sh           7 hours on a node of 8 H100 or H200. Not run yet
#
# Cost: 60 GPU hours by the plan, 41 of them pre-training; about $180 at $3 per GPU hour; 120 GB of
# disk. Downloading and tokenising 6.4B tokens comes before, and needs no GPU.
#
# Warm-up and cosine are those of the 50B run, as if it went on: step 3000 here is step 3000 there.
# RL has 5 answers per question and 600 steps, the least that the paper names.
#
# It can show whether RL raises pass@1 at 2B, 4B and 6B tokens, by how much beside the paper, and
# how rl stands to sft, sft->rl and mix. It cannot show what comes after 6B tokens, nor anything of
# MATH, nor a difference of a few points: it is one seed.
#
# Off unless set to 1: MORE_MATH (the data study: a second text), LARGER (a 4B on the same text),
# MATH (its questions, too). Otherwise it is runs/paper.sh with these settings:
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT=${OUT:-ckpt/speedrun} DATA=${DATA:-data/out/speedrun}
STEPS=${STEPS:-1000 2000 3000} STOP=${STOP:-${STEPS##* }}
TEXT=${TEXT:-$((STOP * 2140000))}  # tokens to prepare: a little more than a step reads
EXTRA_TEXT=${EXTRA_TEXT:-$((TEXT / 5))}
RECIPES=${RECIPES:-sft-rl mix rl} EARLY_SEEDS=${EARLY_SEEDS:-1}
RL=${RL:---group 5 --steps 600}
MATH=${MATH:-0} MORE_MATH=${MORE_MATH:-0} LARGER=${LARGER:-0} ROLLOUTS=${ROLLOUTS:-0}
source runs/paper.sh
cat << END

The paper, 1B, GSM8K, pass@1 in %:   2B tokens   4B     6B
  base                               1.4         1.8    2.4
  rl                                 3.8         15.6   19.9
END
