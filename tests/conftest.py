"""The small world that the tests of the stages share; it is made once per process of pytest."""

import os
import pathlib
import sys
from types import SimpleNamespace

# of the processes that tests start; the same bits need one number of threads
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads it when kernels are defined; the processes that tests start need none
    os.environ["TRITON_INTERPRET"] = "1"
    import model  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """data: toy text and 32 questions; base: a checkpoint of 10 steps; taught: one that writes
    answers in format, some right and some wrong, so that groups are not flat and an RL step moves
    the weights."""
    import helpers
    from data import prepare

    folder = tmp_path_factory.mktemp("world")
    data = folder / "toy"
    ckpt = folder / "ckpt"
    sizes = dict(train_questions=32, val_questions=8, test_questions=8, shots=8, task_items=10)
    prepare.make_toy(prepare.Toy(out=str(data), tokens=60_000, val_tokens=5_000, **sizes))
    helpers.call("pretrain", *helpers.PRETRAIN, data=data, out=ckpt, tokens=10 * 1024)
    base = ckpt / "step10.pt"
    taught = ckpt / "taught.pt"
    teach = dict(solutions="all", steps=80, lr=4e-3, eval_questions=0)
    helpers.call("sft", init=base, out=taught, **teach)
    return SimpleNamespace(data=data, ckpt=ckpt, base=base, taught=taught)


@pytest.fixture
def toy():
    from data import tokens

    return tokens.encoding("toy")


@pytest.fixture
def datasets():
    """The folder of real data."""
    from helpers import DATASETS

    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    return DATASETS


@pytest.fixture
def cl100k(datasets, monkeypatch):
    from data import tokens

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(datasets / "tiktoken"))
    return tokens.encoding("cl100k_base")


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """whole(stage): the checkpoint of an uninterrupted run of it."""
    import runs
    from helpers import call

    found = {}

    def get(stage):
        if stage not in found:
            found[stage] = tmp_path_factory.mktemp(stage) / "step6.pt"
            call(stage, *runs.words_of(stage, world, found[stage]))
        return found[stage]

    return get
