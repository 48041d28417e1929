"""Small models, and the scripts called in this process or started as real ones."""

import ast
import collections
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
from torch.utils._python_dispatch import TorchDispatchMode

import common
from data import grader
from model import Model, ModelConfig

ROOT = Path(__file__).parents[1]
# real data, beside the project
DATASETS = Path(os.environ.get("RL_DATASETS", ROOT.parent / "shared" / "datasets"))
ALONE = common.World(0, 1, torch.device("cpu"), torch.float64)
PRETRAIN = "--batch_tokens 1024 --length 64 --warmup 2 --compile false --eval_rows 4".split()


def small_model(vocab=37, padded_vocab=64, dtype=torch.float64, **shape):
    """Two layers of random weights, so far from zero that every part shows in the output.

    The same weights as ever: golden_tasks.json has lm-eval's scores of them.
    """
    sizes = {"layers": 2, "width": 32, "heads": 4, "ffn": 48, "context": 96} | shape
    config = ModelConfig(**sizes, vocab=vocab, padded_vocab=padded_vocab)
    model = Model(config, dtype).init_weights(0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = p.data * 10
        else:  # a norm's
            p.data = torch.rand(p.shape, generator=generator).to(p) + 0.5
    return model


def next_tokens(model, ids, **how):
    """`Model.forward` on rows of text (B, T + 1): each token is to be predicted from those before.

    how: weight, mask, temperature ..., of the T targets.
    """
    return model(ids[:, :-1], ids[:, 1:], **how)


def setup(cfg, model=None, world=ALONE, **more) -> common.Setup:
    """What a trainer has before its first step, as far as a test needs it."""
    known = dict(cfg=cfg, model=model, world=world, prefix=[]) | more
    return common.Setup(**dict.fromkeys(common.Setup._fields) | known)


def flags(*words, **values) -> list[str]:
    pairs = [part for name, value in values.items() for part in (f"--{name}", value)]
    return [str(part) for part in (*words, *pairs)]


def call(script: str, *words, **values):
    """`python script.py words --name value ...` inside this process.

    A wrong input is SystemExit(2), as for a user.
    """
    module = importlib.import_module(script)
    common.main(module.main, module.Config, module.__doc__, flags(*words, **values))


def start(script: str, *words, env=None, **more) -> subprocess.Popen:
    """The same as a process of its own. env: changes to the environment; None removes a name."""
    changed = os.environ | (env or {})
    changed = {name: str(value) for name, value in changed.items() if value is not None}
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=changed, **pipes | more)


def refused(capsys, script: str, *words, **values) -> str:
    """`call`, which must fail with exit status 2 and one line; -> that line."""
    return complaint(capsys, lambda: call(script, *words, **values))


def complaint(capsys, action) -> str:
    """action() must fail with exit status 2 and one line; -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        action()
    return error_of(capsys.readouterr().err, stop.value.code)


def error_of(said: str, status: int) -> str:
    """What a script that failed with status 2 said on stderr, which must be one line.

    The frames of a progress bar, which end in a carriage return, are no lines.
    """
    assert status == 2, said
    assert "Traceback" not in said
    (line,) = [line for line in re.split(r"[\r\n]", said) if "error:" in line]
    return line.partition("error: ")[2]


def files(folder) -> dict[Path, bytes]:
    """All that a folder holds, to compare it later."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def changed(path, out, **changes):
    """A checkpoint with parts replaced by functions of them; -> its path."""
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {name: change(saved[name]) for name, change in changes.items()}, out)
    return out


def calls_in(paths):
    """(where, name, {keyword: text}, node) of each call in these Python files."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                yield f"{path}:{node.lineno} {name}", name, given, node


def weights(path) -> dict:
    return common.load(path)["model"]


def same_weights(one, other) -> bool:
    """Bit for bit."""
    one = weights(one)
    other = weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one, other) -> float:
    one = weights(one)
    other = weights(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def lines_of(out) -> list[dict]:
    """The lines of a run's metrics."""
    text = Path(f"{out}.metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def metrics(out, *names) -> list[tuple]:
    """The named values of each line of a run's metrics, after its step."""
    return [tuple(line.get(name) for name in ("step", *names)) for line in lines_of(out)]


@functools.cache
def real(name) -> list[dict]:
    """The rows of a file of real data: real("gsm8k/train")."""
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    with gzip.open(DATASETS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do, by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def compare(said, meant) -> tuple[bool, bool]:
    """(is `said` the reference `meant`, can it be read as an answer at all)."""
    return grader.compare_all([(said, meant)])[0]


def grade(text, answer) -> bool:
    """Is the final answer of this text the reference `answer`?"""
    return compare(grader.final_answer(text), answer)[0]
