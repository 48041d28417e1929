"""Small models, and the scripts called in this process or started as real ones."""

import functools
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import checkpoint, run
from model import Model, ModelConfig

ROOT = Path(__file__).parents[1]
DATASETS = Path(os.environ.get("RL_DATASETS", ROOT.parent / "shared" / "datasets"))  # real data, beside the project
PRETRAIN = "--batch_tokens 1024 --length 64 --warmup 2 --compile false --eval_rows 4".split()


def small_model(vocab=37, padded_vocab=64, dtype=torch.float64, **shape):
    """Two layers of random weights, far enough from zero that every part of the network shows in the output."""
    sizes = {"layers": 2, "width": 32, "heads": 4, "ffn": 48, "context": 96} | shape
    model = Model(ModelConfig(**sizes, vocab=vocab, padded_vocab=padded_vocab), dtype).init_weights(0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = p.data * 10 if p.dim() > 1 else torch.rand(p.shape, generator=generator).to(p) + 0.5
    return model


def flags(*words, **values) -> list[str]:
    return [*words, *(str(part) for name, value in values.items() for part in (f"--{name}", value))]


def call(script: str, *words, **values):
    """`python script.py words --name value ...` inside this process; a wrong input is SystemExit(2), as for a user."""
    module = importlib.import_module(script)
    run.main(module.main, module.Config, module.__doc__, flags(*map(str, words), **values))


def start(script: str, *words, **values) -> subprocess.Popen:
    """The same as a process of its own."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags(*map(str, words), **values)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ))


def refused(capsys, script: str, *words, **values) -> str:
    """`call`, which must fail with exit status 2 and one line; -> that line. Bars before it end in a carriage return."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, *words, **values)
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "error:" in line or "Traceback" in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0].partition("error: ")[2]


def weights(path) -> dict:
    return checkpoint.load(path)["model"]


def same_weights(one, other) -> bool:
    """Bit for bit."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one, other) -> float:
    one, other = weights(one), weights(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def metrics(out, *names) -> list[tuple]:
    """The named values of each step in a run's metrics; what says how fast it was is left to the caller to leave out."""
    lines = [json.loads(line) for line in Path(f"{out}.metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in ("step", *names)) for line in lines]


@functools.cache
def real(name) -> list[dict]:
    """The rows of a file of real data: real("gsm8k/train")."""
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    with gzip.open(DATASETS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
