"""Ranks and shards: two ranks do what one process does, all under torchrun with gloo.

A rank that dies takes the others with it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import common
from data import problems
from data.files import read_rows
from helpers import PRETRAIN, ROOT, call, flags, largest_difference, metrics

# runs -> their script
STAGES = {stage: stage for stage in ("pretrain", "sft", "rl", "mix")}
STAGES |= {"text": "pretrain", "mix-text": "mix", "rl-flat": "rl", "rl-again": "rl"}
SHARDED = ("pretrain", "rl", "mix-text", "rl-flat")  # by two ranks; all of them by four
STEPS = 6
VALUES = "loss sft_loss reward tokens length flat mismatch mismatch_max entropy held_out".split()
VALUES += ["gradient_norm"]
EVAL = dict(n=4, k="1,4", limit=7, max_new=16, dtype="float64", compile="false")


def words(stage, world, *more, **changes):
    """The flags of a run, whose outputs lie in the folder it works in.

    In fp64: sampled ids cannot flip there. In fp32, Adam turns the rounding of a gradient near 0,
    another one for each order of summing, into a step of the learning rate's size.
    """
    # so few rows a pass that ranks have different numbers of passes
    shared = dict(micro=4, dtype="float64", save_every=STEPS // 2, eval_every=STEPS // 2)
    if STAGES[stage] == "pretrain":
        sizes = dict(data=world.data, out=stage, batch_tokens=512, tokens=512 * STEPS)
        sizes |= dict(eval_rows=17)
        sizes |= dict(init=world.taught) if stage == "text" else {}
        return flags(*PRETRAIN, *more, **shared | sizes | changes)
    out = f"{stage}/step{STEPS}.pt"
    sizes = dict(init=world.taught, out=out, steps=STEPS, max_new=16, eval_questions=3, eval_n=2)
    if STAGES[stage] != "rl":
        sizes |= dict(batch=8)
    if stage != "sft":
        sizes |= dict(questions_per_step=4, group=4, lr=1e-3, compile="false")
    if stage == "rl-flat":
        sizes |= dict(max_new=1)  # no answer ends, every reward is 0
    if stage == "rl-again":
        sizes |= dict(updates=2, kl=0.1)
    if stage == "mix-text":
        sizes |= dict(text=world.data, share_end=1)
    return flags(*more, **shared | sizes | changes)


def torchrun(count, *plan):
    """(folder, what, words) one after the other in `count` processes, see in_ranks.py."""
    for folder, *_ in plan:
        folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(count), "tests/in_ranks.py"]
    command.append(json.dumps([(str(folder), *rest) for folder, *rest in plan]))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def ended(process, timeout):
    """What it said on stderr. If it hangs it is stopped, and torchrun stops its processes."""
    try:
        return process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        raise


def finished(process):
    errors = ended(process, 900)  # compiling takes minutes on a busy machine
    assert process.returncode == 0, errors[-4000:]


def alone(folder, plan):
    """The same plan in this process."""
    here = os.getcwd()
    for _, script, line in plan:
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        try:
            call(script, *line)
        finally:
            os.chdir(here)


def same(one, other):
    """Weights, losses and the rest to 1e-6, step by step; validations in every count."""
    assert largest_difference(one, other) < 1e-6
    lines = metrics(one, *VALUES, "validation")
    assert sum(line[1] is not None for line in lines) == STEPS
    others = metrics(other, *VALUES, "validation")
    for (*a, before), (*b, after) in zip(lines, others, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
        assert (before or {}).get("correct") == (after or {}).get("correct")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Every stage and an evaluation: by one process, and by two ranks. -> the folders of both."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = folder / "1", folder / "2"
    how = {stage: ["--shard"] if stage in SHARDED else [] for stage in STAGES}
    plan = [(two, STAGES[stage], words(stage, world, *how[stage])) for stage in STAGES]
    evaluation = flags(world.base, world.taught, results="rows", text=world.data, **EVAL)
    parts = [(folder, "parts", [dtype]) for dtype in ("float32", "bfloat16")]
    finished(torchrun(2, *parts, *plan, (two, "eval", evaluation)))
    plan = [(one, STAGES[stage], words(stage, world)) for stage in STAGES]
    alone(one, [*plan, (one, "eval", evaluation)])
    return SimpleNamespace(one=one, two=two)


def path_of(stage):
    return f"{stage}/step{STEPS}.pt"


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_do_what_one_does(runs, stage):
    same(runs.one / path_of(stage), runs.two / path_of(stage))


def test_two_ranks_measure_what_one_does(runs, world):
    for name in ("step10", "taught"):
        rows = [read_rows(folder / f"rows/{name}.jsonl") for folder in (runs.one, runs.two)]
        assert {"pass", "general", "text"} <= {row["kind"] for row in rows[0]}
        for one, two in zip(*rows, strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                near = isinstance(value, float) or key == "losses"
                assert two[key] == (pytest.approx(value, abs=1e-5) if near else value), key


@pytest.mark.parametrize("stage", ["sft", "mix-text"])
def test_what_two_ranks_began_goes_on_in_one_process(runs, world, tmp_path, stage):
    begun_elsewhere(runs.two, tmp_path, stage)
    alone(tmp_path, [(tmp_path, STAGES[stage], words(stage, world, "--resume"))])
    same(runs.one / path_of(stage), tmp_path / path_of(stage))


def begun_elsewhere(folder, here, stage):
    """The state after half of the steps, and the log."""
    (here / stage).mkdir()
    shutil.copy(folder / f"{path_of(stage)}.{STEPS // 2}", here / f"{path_of(stage)}.resume")
    shutil.copy(folder / f"{path_of(stage)}.metrics.jsonl", here / stage)


def test_uneven_batches_were_among_them(runs):
    """A rank has two groups a step. Where both are flat it has nothing to train on.

    17 rows of held-out text are 9 and 8.
    """
    for stage in ("rl", "mix"):
        flat = [x for _, x in metrics(runs.two / path_of(stage), "flat") if x is not None]
        assert any(0 < x < 1 for x in flat)
    assert {x for _, x in metrics(runs.two / path_of("rl-flat"), "flat")} >= {1.0}


def test_idle_pieces_weigh_nothing():
    """A rank with one piece where another has three."""
    logp = [torch.ones(2), torch.ones(1)]
    batch = problems.make_batch([[1, 2], [3]], [[4, 5], [6]], [0.5, 0.0], 9, logp)
    cpu = torch.device("cpu")
    ranks = SimpleNamespace(shard=True, device=cpu, max=lambda count: [3.0])
    real, *idle = problems.micro_batches(batch, 1, ranks)
    assert len(real.ids) == 1 and len(idle) == 2
    for piece in idle:
        assert piece.ids.shape == (1, 8) and not piece.mask.any() and not piece.weight.any()
        assert [x.dtype for x in piece[:-1]] == [x.dtype for x in real[:-1]]
    assert len(list(problems.micro_batches(batch, 1, ranks, keep_flat=True))) == 3


@pytest.mark.parametrize("how", ["killed", "full disk"])
def test_rank_that_dies_stops_the_others(world, tmp_path, how):
    """kill -9 in the middle of a step, and an error of one rank alone: nothing stays behind."""
    line = words("pretrain", world, "--shard", save_every=2)
    process = torchrun(2, (tmp_path, "dies", [how, "pretrain", *line]))
    errors = ended(process, 240)
    assert process.returncode != 0
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"process{rank}").read_text()), 0)
    state = f"{path_of('pretrain')}.resume"
    if how == "full disk":
        assert f"error: could not write {state}" in errors
    else:
        assert common.load(tmp_path / state)["step"] == 2  # and goes on from there


# ------------------------------------------------------------------------- more ranks, slowly


@pytest.mark.slow
@pytest.mark.parametrize("count, shard", [(1, ["--shard"]), (2, ["--shard"]), (4, [])])
def test_other_numbers_of_ranks(runs, world, tmp_path, count, shard):
    plan = [(tmp_path, STAGES[stage], words(stage, world, *shard)) for stage in STAGES]
    finished(torchrun(count, *plan))
    for stage in STAGES:
        same(runs.one / path_of(stage), tmp_path / path_of(stage))


@pytest.mark.slow
def test_four_ranks_share_the_weights_and_two_go_on(runs, world, tmp_path):
    four, two = tmp_path / "4", tmp_path / "4 to 2"
    plan = [(four, STAGES[stage], words(stage, world, "--shard")) for stage in STAGES]
    finished(torchrun(4, (tmp_path, "parts", ["float32"]), *plan))
    two.mkdir()
    for stage in STAGES:
        begun_elsewhere(four, two, stage)
    how = {stage: ["--resume", *(["--shard"] if stage in SHARDED else [])] for stage in STAGES}
    finished(torchrun(2, *((two, STAGES[x], words(x, world, *how[x])) for x in STAGES)))
    for stage in STAGES:
        same(runs.one / path_of(stage), four / path_of(stage))
        same(runs.one / path_of(stage), two / path_of(stage))


@pytest.mark.slow
def test_compiled_shards(world, tmp_path):
    """With torch.compile, for one shape and for any, while each block's weights come and go.

    Activations are made again.
    """
    more = dict(compile="true", checkpoint_activations="true")
    plan = [("pretrain", words("pretrain", world, **more))]
    plan += [("sft", words("sft", world, **more, eval_questions=0))]
    finished(torchrun(2, *((tmp_path / "2", stage, [*line, "--shard"]) for stage, line in plan)))
    finished(torchrun(1, *((tmp_path / "1", stage, line) for stage, line in plan)))
    for stage, _ in plan:
        same(tmp_path / "1" / path_of(stage), tmp_path / "2" / path_of(stage))
