"""Whole runs of the four trainers on the small world: resume, kill -9, parallel averaging's two ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import PRETRAIN, ROOT, call, flags, largest_difference, metrics, same_weights, start, weights

from data import checkpoint, ranks

RL = dict(questions_per_step=4, group=8, max_new=32, steps=6, save_every=2, eval_every=3, eval_questions=4, eval_n=2, lr=1e-3,
          compile="false")  # fmt: skip
SFT = dict(batch=8, steps=6, save_every=2, eval_every=3, eval_questions=4, eval_n=2, max_new=24, warmup=2)
MIX = RL | dict(batch=8, sft_warmup=2)
PRE = dict(tokens=6 * 1024, save_every=2, eval_every=3)
STAGES = {"pretrain": PRE, "sft": SFT, "rl": RL, "mix": MIX}
CLOCK = {"seconds", "step_seconds", "sample_seconds", "grade_seconds", "tokens_per_s"}


def words_of(stage, world, out, **changes):
    """The flags of a run of `stage` that writes the checkpoint `out` (step6.pt for pretrain)."""
    settings = STAGES[stage] | changes
    if stage == "pretrain":
        return flags(*PRETRAIN, data=world.data, out=Path(out).parent, **settings)
    return flags(init=world.taught, out=out, **settings)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run of each stage: {stage: its checkpoint}."""
    outs = {}
    for stage in STAGES:
        outs[stage] = tmp_path_factory.mktemp(stage) / "step6.pt"
        call(stage, *words_of(stage, world, outs[stage]))
    return outs


def record(out):
    """A run's metrics without what depends on the clock; the totals of a resumed run go on from the saved ones."""
    def timeless(line):
        return {k: v for k, v in line.items() if k not in CLOCK}

    return [json.loads(line, object_hook=timeless) for line in Path(f"{out}.metrics.jsonl").read_text().splitlines()]


def killed(stage, words, out, after):
    """Start the real script and kill it as soon as its metrics show `after` steps."""
    process = start(stage, *words)
    log, deadline = Path(f"{out}.metrics.jsonl"), time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if log.exists() and sum('"loss"' in line for line in log.read_text().splitlines()) >= after:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize("stage", STAGES)
def test_the_runs_move(whole, world, stage):
    """What follows would show nothing with gradients of 0: in RL, groups that are all flat."""
    out = whole[stage]
    assert not Path(f"{out}.resume").exists()  # finished
    assert [x[0] for x in metrics(out, "loss") if x[1] is not None] == list(range(6))
    assert all(x["gradient_norm"] > 0 for x in record(out) if "loss" in x)
    if stage in ("rl", "mix"):
        assert max(x["flat"] for x in record(out) if "loss" in x) < 1
        assert max(x["mismatch_max"] for x in record(out) if "loss" in x) < 1e-4
    if stage != "pretrain":
        assert largest_difference(out, world.taught) > 1e-4
        assert [x["step"] for x in record(out) if "validation" in x] == [0, 3, 6]


@pytest.mark.parametrize("stage", STAGES)
def test_resume_neither_replays_nor_skips_a_batch(whole, world, tmp_path, stage):
    """N steps equal k steps, kill -9 and --resume: weights bit for bit, and the metrics line by line. Seen to fail with
    `first = state["step"] + 1`, without the optimizer's state, and with the metrics of the lost steps kept."""
    out = tmp_path / "step6.pt"
    words = words_of(stage, world, out)
    killed(stage, words, out, after=3)
    state = checkpoint.load(f"{out}.resume")
    assert 2 <= state["step"] <= 6 and not out.exists()  # 6 on a busy machine: its steps take milliseconds
    call(stage, *words, "--resume")
    assert same_weights(out, whole[stage]) and record(out) == record(whole[stage])
    assert not Path(f"{out}.resume").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resume_of_a_compiled_run(world, tmp_path, stage):
    """The same with torch.compile, as the default runs have it; all three are real processes."""
    outs = [tmp_path / name / "step6.pt" for name in "ab"]
    a, b = (words_of(stage, world, out, compile="true") for out in outs)
    for out in outs:
        out.parent.mkdir()
    assert start(stage, *a).wait(300) == 0
    killed(stage, b, outs[1], after=3)
    assert start(stage, *b, "--resume").wait(300) == 0
    assert same_weights(*outs) and record(outs[0]) == record(outs[1])


def test_resume_of_a_finished_run_does_nothing(whole, world, capsys):
    out = whole["sft"]
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        call("sft", *words_of("sft", world, out), "--resume")
    assert stop.value.code == 0 and "is finished" in capsys.readouterr().out and out.read_bytes() == before


def test_resume_without_a_state_starts(whole, world, tmp_path):
    """So that a loop may always say --resume."""
    call("sft", *words_of("sft", world, tmp_path / "new.pt"), "--resume")
    assert same_weights(tmp_path / "new.pt", whole["sft"])


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_what_never_changes_the_result(whole, world, tmp_path, stage):
    """--rows (answers side by side) and how often the state is saved; --micro up to rounding."""
    call(stage, *words_of(stage, world, tmp_path / "a.pt", rows=5, save_every=1))
    assert largest_difference(tmp_path / "a.pt", whole[stage]) < 1e-5
    call(stage, *words_of(stage, world, tmp_path / "b.pt", micro=3))
    assert largest_difference(tmp_path / "b.pt", whole[stage]) < 5e-5  # Adam makes steps of the rounding of gradients near 0


def test_several_updates_and_a_pull_to_the_start(world, tmp_path):
    """The clipped path, with the state of a killed run: --updates 2 --kl 0.1 run and can be resumed."""
    words = words_of("rl", world, tmp_path / "a.pt", updates=2, kl=0.1)
    call("rl", *words)
    assert all(x["mismatch_max"] < 1e-4 for x in record(tmp_path / "a.pt") if "loss" in x)


def test_kill_between_write_and_rename_keeps_the_old_checkpoint(world, tmp_path):
    """Seen to fail with the checkpoint written in place."""
    path = tmp_path / "a.pt"
    path.write_bytes(world.base.read_bytes())
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from data import checkpoint, ranks
from model import Model, ModelConfig
saved = checkpoint.load({str(path)!r})
model = checkpoint.load_model(saved, Model, ModelConfig, ranks.start("cpu"))
for p in model.parameters():
    p.data.zero_()
os.replace = os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save({str(path)!r}, model, saved["meta"])
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert same_weights(path, world.base) and len(list(tmp_path.iterdir())) == 2  # the old one whole, the new one beside it
    saved = checkpoint.load(path)
    model = checkpoint.load_model(saved, *run_model())
    checkpoint.save(path, model, saved["meta"])  # what was left behind is in nobody's way
    assert same_weights(path, world.base) and len(list(tmp_path.iterdir())) == 1


def run_model():
    from model import Model, ModelConfig

    return Model, ModelConfig, ranks.World(0, 1, torch.device("cpu"), torch.float32)


def test_full_disk_keeps_the_old_checkpoint(world, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(world.base.read_bytes())
    saved = checkpoint.load(path)
    model = checkpoint.load_model(saved, *run_model())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device.*what was saved before is intact"):
        checkpoint.save(path, model, saved["meta"])
    assert same_weights(path, world.base) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share, stage", [(1.0, "rl"), (0.0, "sft")])
def test_share_one_is_rl_and_share_zero_is_sft(whole, world, tmp_path, share, stage):
    """Bit for bit: the other side's update has learning rate 0. --micro is the same in both (its default is not)."""
    shared = dict(weight_decay=0.1, micro=32)
    call("mix", *words_of("mix", world, tmp_path / "mix.pt", share=share, sft_lr=1e-3, **shared))
    call(stage, *words_of(stage, world, tmp_path / "alone.pt", **shared))
    assert same_weights(tmp_path / "mix.pt", tmp_path / "alone.pt")
    assert not same_weights(tmp_path / "mix.pt", whole["mix"])


def test_checkpoints_say_where_they_come_from(whole, world):
    metas = {stage: checkpoint.load(out)["meta"] for stage, out in whole.items()}
    assert [metas[s]["recipe"] for s in STAGES] == ["base", "sft-gold->sft", "sft-gold->rl", "sft-gold->mix"]
    for stage in ("sft", "rl", "mix"):
        meta = metas[stage]
        assert (meta["parent"], meta["stage"], meta["step"]) == (str(world.taught), stage, 6)
        assert (meta["tokens"], meta["encoding"], meta["preset"]) == (10 * 1024, "toy", "toy")
        assert meta["run"]["questions"] == str(world.data / "easy")  # what followed from the parent
    assert checkpoint.recipe("base", "rl") == "rl" and checkpoint.recipe("sft", "rl") == "sft->rl"
    assert {tuple(t.dtype for t in weights(out).values()) for out in whole.values()} == {(torch.float32,) * len(weights(world.base))}


def test_config_hash_ignores_where_and_how():
    meta = {"recipe": "rl", "step": 6, "run": {"lr": 1.0, "out": "a", "init": "b", "rows": 4, "seed": 0}}
    same = {"recipe": "rl", "step": 6, "run": {"lr": 1.0, "out": "c", "init": "d", "rows": 8, "seed": 0}}
    other = {"recipe": "rl", "step": 6, "run": {"lr": 2.0, "out": "a", "init": "b", "rows": 4, "seed": 0}}
    assert checkpoint.config_hash(meta) == checkpoint.config_hash(same) != checkpoint.config_hash(other)
