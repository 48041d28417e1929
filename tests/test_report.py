import itertools
import json
import math
import statistics

import numpy as np
import pytest

from data import report

TOKENS = (800_000, 2_800_000, 8_000_000)
LOGIT = {"base": (-4.5, -3.2, -1.6), "rl": (-3.4, -0.5, 1.6), "sft": (-1.8, -1.3, 0.4), "sft->rl": (-1.0, 0.0, 1.7),
         "mix": (-2.4, -0.6, 1.1), "sft-gold": (-1.0, 0.2, 1.2), "sft-gold->rl": (-0.6, 0.8, 1.9)}  # fmt: skip
WIDTH = {"rl": 1.5, "sft->rl": 2.6, "mix": 0.9}  # of the questions' difficulty: wide is a low pass@32 for its pass@1
IDENTITY = {"checkpoint": "x.pt", "config_hash": "0", "model": "toy", "world": "toy-math30", "pretrain_seed": 0, "step": 60}


def rows_of(recipe, index, seed, questions=120, logit=None, split="test", **extra):
    """A pass row and a general row of one cell, drawn from a logistic model with question and seed effects."""
    benchmark, shots = extra.get("benchmark", "easy"), extra.get("shots", 0)
    rng = np.random.default_rng([seed, index, len(recipe), sum(map(ord, recipe + benchmark)), shots])
    difficulty = np.random.default_rng(index).normal(size=questions)  # the same questions in all arms
    logit = (LOGIT[recipe][index] if logit is None else logit) + rng.normal(0, 0 if recipe == "base" else 0.12)
    p = 1 / (1 + np.exp(-logit - WIDTH.get(recipe, 1.4) * difficulty - rng.normal(0, 0.3, questions)))
    correct = rng.binomial(32, p).tolist()
    same = {**IDENTITY, "recipe": recipe, "tokens": TOKENS[index], "seed": seed, "split": split}
    right = (np.random.default_rng(7).random(400) < (0.86 if "sft" in recipe and "rl" not in recipe else 0.95)).astype(int)
    yield {**same, "kind": "pass", "benchmark": benchmark, "shots": shots, "n": 32, "temperature": 0.6,
           "ids": [f"q{i}" for i in range(questions)], "correct": correct, "answers": 5.5,
           "formatted": 0.2 if shots == 0 and recipe == "base" else 0.97, "cut": 0.01, **extra}  # fmt: skip
    if not extra:
        yield {**same, "kind": "general", "benchmark": "facts", "right": right.tolist(), "probability": 0.8}


def matrix(seeds=6, recipes=tuple(LOGIT)):
    rows = []
    for index, seed in itertools.product(range(3), range(seeds)):
        for recipe in recipes:
            rows += rows_of(recipe, index, seed)
        rows += rows_of("base", index, seed, logit=LOGIT["base"][index] + 0.7, shots=8)
    return rows


def save(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verdicts(rows):
    return report.decide(report.Results(sorted(rows, key=lambda row: row["step"])))
