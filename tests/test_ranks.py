"""Ranks and shards: what one process does, 2 and 4 do, sharded or not; a checkpoint of 4 goes on on 1 and on 2; and a rank
that dies takes the others with it. All under torchrun with gloo."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import PRETRAIN, ROOT, call, flags, largest_difference, metrics

from data import checkpoint, problems

STAGES = {stage: stage for stage in ("pretrain", "sft", "rl", "mix")}  # -> its script
STAGES |= {"text": "pretrain", "mix-text": "mix", "rl-flat": "rl"}
MICRO = 4  # rows a pass: so few that ranks have different numbers of passes


def words(stage, world, steps, *more, **changes):
    """The flags of a run, whose outputs lie in the folder it works in. In fp64: sampled ids cannot flip there, and Adam does
    not turn the rounding of a gradient near 0, another one for each order of summing, into a step of the learning rate's
    size, as it does in fp32 (2e-4 apart)."""
    shared = dict(micro=MICRO, dtype="float64", save_every=steps // 2, eval_every=steps // 2)
    if STAGES[stage] == "pretrain":
        sizes = dict(data=world.data, out=stage, batch_tokens=512, tokens=512 * steps, eval_rows=17, save_steps=steps)
        sizes |= dict(init=world.taught) if stage == "text" else {}
        return flags(*PRETRAIN, *more, **shared | sizes | changes)
    sizes = dict(init=world.taught, out=f"{stage}/step{steps}.pt", steps=steps, max_new=16, eval_questions=3, eval_n=2)
    sizes |= {} if STAGES[stage] == "rl" else dict(batch=8)
    sizes |= dict(max_new=1) if stage == "rl-flat" else {}  # no answer ends, every reward is 0
    sizes |= dict(text=world.data, share_end=1) if stage == "mix-text" else {}
    sizes |= {} if stage == "sft" else dict(questions_per_step=4, group=4, lr=1e-3, compile="false")
    return flags(*more, **shared | sizes | changes)


def torchrun(count, *plan):
    """(folder, what, words) one after the other in `count` processes, see in_ranks.py; -> the started torchrun."""
    for folder, *_ in plan:
        folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "tests/in_ranks.py"]
    command.append(json.dumps([(str(folder), *rest) for folder, *rest in plan]))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


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


@pytest.fixture(scope="module", params=[6, pytest.param(20, marks=pytest.mark.slow)])
def runs(request, world, tmp_path_factory):
    """Every stage: by one process; by 4 that share the weights; and what these did from the middle on, again by 2, half of
    the stages sharded, and by one. -> {how: {stage: checkpoint}}, steps."""
    folder, here, steps = tmp_path_factory.mktemp("ranks"), os.getcwd(), request.param
    made = {how: {stage: folder / how / stage / f"step{steps}.pt" for stage in STAGES} for how in ("1", "4 sharded", "4 to 2", "4 to 1")}
    for how in made:
        (folder / how).mkdir()
    parts = [(folder, "parts", [dtype]) for dtype in ("float32", "bfloat16")]
    plan = [(folder / "4 sharded", script, words(stage, world, steps, "--shard")) for stage, script in STAGES.items()]
    finished(torchrun(4, *parts, *plan))
    for stage, out in made["4 sharded"].items():
        for how in ("4 to 2", "4 to 1"):
            (folder / how / stage).mkdir()
            shutil.copy(f"{out}.{steps // 2}", f"{made[how][stage]}.resume")
            shutil.copy(f"{out}.metrics.jsonl", folder / how / stage)
    again = {stage: ["--resume", *(["--shard"] if stage in ("pretrain", "mix") else [])] for stage in STAGES}
    finished(torchrun(2, *((folder / "4 to 2", STAGES[stage], words(stage, world, steps, *again[stage])) for stage in STAGES)))
    for how, more in (("1", []), ("4 to 1", ["--resume"])):
        os.chdir(folder / how)
        for stage, script in STAGES.items():
            call(script, *words(stage, world, steps, *more))
    os.chdir(here)
    return made, steps


def same(one, other, steps):
    """Weights, losses and the rest to 1e-6, step by step; validations in every count."""
    assert largest_difference(one, other) < 1e-6
    names = ("loss", "sft_loss", "reward", "tokens", "length", "flat", "mismatch", "mismatch_max", "entropy", "held_out", "gradient_norm")
    lines = metrics(one, *names, "validation")
    assert sum(line[1] is not None for line in lines) == steps
    for (*a, before), (*b, after) in zip(lines, metrics(other, *names, "validation"), strict=True):
        assert a == pytest.approx(b, abs=1e-6) and (before or {}).get("correct") == (after or {}).get("correct")


@pytest.mark.parametrize("how", ["4 sharded", "4 to 2", "4 to 1"])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_and_shards_change_nothing(runs, how, stage):
    """Seen to fail with gradients averaged over the ranks, sharded or not, with n counted on each rank, with noise seeded by
    the place in the rank's own rows, without a rank's part of the moments."""
    made, steps = runs
    same(made["1"][stage], made[how][stage], steps)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [20], indirect=True)
@pytest.mark.parametrize("count, shard", [(1, ["--shard"]), (2, []), (2, ["--shard"]), (4, [])])
def test_other_numbers_of_ranks(runs, world, tmp_path, count, shard):
    made, steps = runs
    finished(torchrun(count, *((tmp_path, script, words(stage, world, steps, *shard)) for stage, script in STAGES.items())))
    for stage in STAGES:
        same(made["1"][stage], tmp_path / stage / "step20.pt", steps)


def test_uneven_batches_were_among_them(runs):
    """In the runs above a rank has one group a step: where some are flat, it has nothing to train on and the others do, and
    where all are, nobody has. 17 rows of held-out text are 5 and 4. Seen to hang without the idle pieces, and with places
    past the last window left out."""
    for stage in ("rl", "mix"):
        flat = [x for _, x in metrics(runs[0]["4 sharded"][stage], "flat") if x is not None]
        assert any(0 < x < 1 for x in flat)
    assert {x for _, x in metrics(runs[0]["4 sharded"]["rl-flat"], "flat")} >= {1.0}


def test_idle_pieces_weigh_nothing():
    """A rank with one piece where another has three."""
    batch = problems.make_batch([[1, 2], [3]], [[4, 5], [6]], [0.5, 0.0], 9, [torch.ones(2), torch.ones(1)])
    world = SimpleNamespace(shard=True, device=torch.device("cpu"), max=lambda count: [3.0])
    real, *idle = problems.micro_batches(batch, 1, world)
    assert len(real.ids) == 1 and len(idle) == 2
    for piece in idle:
        assert piece.ids.shape == (1, 8) and not piece.mask.any() and not piece.weight.any() and not piece.logp.any()
        assert [x.dtype for x in piece] == [x.dtype for x in real]
    assert len(list(problems.micro_batches(batch, 1, world, idle=True))) == 3


@pytest.mark.slow
def test_compiled_shards(world, tmp_path):
    """With torch.compile, for one shape and for any, while every block's weights come and go; activations are made again."""
    more = dict(compile="true", checkpoint_activations="true")
    plan = [("pretrain", words("pretrain", world, 6, **more)), ("sft", words("sft", world, 6, **more, eval_questions=0))]
    finished(torchrun(2, *((tmp_path / "2", stage, [*line, "--shard"]) for stage, line in plan)))
    finished(torchrun(1, *((tmp_path / "1", stage, line) for stage, line in plan)))
    for stage, _ in plan:
        same(tmp_path / "1" / stage / "step6.pt", tmp_path / "2" / stage / "step6.pt", 6)


@pytest.mark.parametrize("how", ["killed", "full disk"])
def test_rank_that_dies_stops_the_others(world, tmp_path, how):
    """kill -9 in the middle of a step, and an error of one rank alone: torchrun ends what is left, and nothing of ours stays
    behind. Seen to fail (to hang) with the process group taken down after an error."""
    process = torchrun(2, (tmp_path, "dies", [how, "pretrain", *words("pretrain", world, 20, "--shard", save_every=2)]))
    errors = ended(process, 240)
    assert process.returncode != 0
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"process{rank}").read_text()), 0)
    if how == "full disk":
        assert "error: could not write pretrain/step20.pt.resume: [Errno 28] No space left on device" in errors
    else:
        assert checkpoint.load(tmp_path / "pretrain/step20.pt.resume")["step"] == 2  # and goes on from there
