"""Whole runs of the four trainers on the small world: they move, what never changes the result,
and parallel averaging's two ends."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import rl
from data import problems
from helpers import call, largest_difference, metrics, same_weights, weights
from runs import STAGES, record, steps_of, words_of


@pytest.mark.parametrize("stage", STAGES)
def test_the_runs_move(whole, world, stage):
    """Gradients of 0 would show nothing in other tests: in RL, groups that are all flat."""
    out = whole(stage)
    assert not Path(f"{out}.resume").exists()  # finished
    assert steps_of(out) == list(range(6))
    updates = [line for line in record(out) if "loss" in line]
    assert all(line["gradient_norm"] > 0 for line in updates)
    if stage in ("rl", "mix"):
        assert max(line["flat"] for line in updates) < 1
        assert max(line["mismatch_max"] for line in updates) < 1e-4
        assert {"reward", "correct", "formatted", "truncated", "length"} <= updates[0].keys()
    if stage != "pretrain":
        assert largest_difference(out, world.taught) > 1e-4
        assert [line["step"] for line in record(out) if "validation" in line] == [0, 3, 6]


@pytest.mark.parametrize("stage", ["sft", "rl", "mix"])
def test_training_never_opens_the_test_questions(world, tmp_path, monkeypatch, stage):
    opened = []
    load = problems.load
    monkeypatch.setattr(
        problems, "load", lambda path, split: opened.append(split) or load(path, split)
    )
    easy = world.data / "easy"
    assert (easy / "test.jsonl").is_file()
    call(stage, *words_of(stage, world, tmp_path / "a.pt", questions=easy))
    assert {"train", "val"} <= {*opened} and "test" not in opened


def test_flat_groups_cost_nothing_but_with_a_pull_to_the_start():
    numbers = dict(length=10, prompt_length=6, sampled_tokens=1280, flat=1.0)
    model = SimpleNamespace(flops_per_token=lambda length: 1.0)
    free, pulled = (
        rl.rl_costs(model, numbers, rl.Config(init="x", kl=kl), 0.0)["flops"] for kl in (0.0, 0.1)
    )
    sampled = 1280 + 16 * 6
    assert free == pytest.approx(sampled / 3)
    # one row per question; the pull takes a forward pass of the start more
    assert pulled == pytest.approx(sampled / 3 + sampled * (1 + 1 / 3))


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_what_never_changes_the_result(whole, world, tmp_path, stage):
    """--rows and how often the state is saved; --micro up to rounding."""
    call(stage, *words_of(stage, world, tmp_path / "a.pt", rows=5, save_every=1))
    assert largest_difference(tmp_path / "a.pt", whole(stage)) < 1e-5
    call(stage, *words_of(stage, world, tmp_path / "b.pt", micro=3))
    # Adam makes steps of the rounding of gradients near 0
    assert largest_difference(tmp_path / "b.pt", whole(stage)) < 5e-5


def test_several_updates_and_a_pull_to_the_start(world, tmp_path):
    """The clipped path: sampler and trainer agree at the first update of each batch."""
    call("rl", *words_of("rl", world, tmp_path / "a.pt", updates=2, kl=0.1))
    updates = [line for line in record(tmp_path / "a.pt") if "loss" in line]
    assert all(line["mismatch_max"] < 1e-4 for line in updates)


@pytest.mark.parametrize("share, stage", [(1.0, "rl"), (0.0, "sft")])
def test_share_one_is_rl_and_share_zero_is_sft(whole, world, tmp_path, share, stage):
    """Bit for bit: the other side's update has learning rate 0.

    --micro is the same in both runs (its default is not).
    """
    shared = dict(weight_decay=0.1, micro=32)
    call("mix", *words_of("mix", world, tmp_path / "mix.pt", share=share, sft_lr=1e-3, **shared))
    call(stage, *words_of(stage, world, tmp_path / "alone.pt", **shared))
    assert same_weights(tmp_path / "mix.pt", tmp_path / "alone.pt")
    assert not same_weights(tmp_path / "mix.pt", whole("mix"))


def test_checkpoints_say_where_they_come_from(whole, world):
    metas = {stage: common.load(whole(stage))["meta"] for stage in STAGES}
    recipes = [metas[stage]["recipe"] for stage in STAGES]
    assert recipes == ["base", "sft-gold->sft", "sft-gold->rl", "sft-gold->mix"]
    for stage in ("sft", "rl", "mix"):
        meta = metas[stage]
        assert (meta["parent"], meta["stage"], meta["step"]) == (str(world.taught), stage, 6)
        assert (meta["tokens"], meta["encoding"], meta["preset"]) == (10 * 1024, "toy", "toy")
        assert meta["run"]["questions"] == str(world.data / "easy")  # what followed from the parent
        assert {"init", "questions"} <= meta["contents"].keys()
    dtypes = {tensor.dtype for stage in STAGES for tensor in weights(whole(stage)).values()}
    assert dtypes == {torch.float32}


def test_profile_writes_a_trace(world, tmp_path, capsys):
    call("sft", *words_of("sft", world, tmp_path / "a.pt", steps=7, profile=2, eval_questions=0))
    assert (tmp_path / "a.pt.trace.json").stat().st_size > 1000
    told = capsys.readouterr().out
    assert "a.pt.trace.json" in told and "backward" in told
    assert len(metrics(tmp_path / "a.pt", "loss")) == 7
