"""A loss, gradient or weight that is NaN, and spikes: stop before the update, or skip it."""

import json
import math
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import model as network
from data import problems, tokens
from faults import at_call, kill_self, not_finite_at, ran
from helpers import PRETRAIN, call, flags, refused, same_weights
from runs import STAGES, goes_on, record, steps_of, words_of


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture()
def saves(monkeypatch):
    """Time, step, weights, moments and history of each state that is saved."""
    seen = []
    real = common.save_state

    def save_state(cfg, model, meta, optimizers, log, step):
        moments = [
            {name: value.clone() for name, value in state.items()}
            for optimizer in optimizers
            for state in optimizer.state_dict()["state"].values()
        ]
        seen.append(
            SimpleNamespace(
                time=time.monotonic(),
                step=step,
                weights=[p.detach().clone() for p in model.parameters()],
                moments=moments,
                recent=json.loads(json.dumps(log.recent)),
                skipped=log.skipped,
            )
        )
        real(cfg, model, meta, optimizers, log, step)

    monkeypatch.setattr(common, "save_state", save_state)
    return seen


def test_saves_by_steps_and_by_minutes(world, tmp_path, saves, monkeypatch):
    def run(name, **settings):
        saves.clear()
        words = words_of("sft", world, tmp_path / name, eval_questions=0, **settings)
        call("sft", *words)
        return [saved.step for saved in saves]

    assert run("a.pt", save_every=4) == [4, 6]  # and after the last
    assert run("b.pt", save_every=1000, save_minutes=5) == [6]
    healthy = common.Log.healthy
    monkeypatch.setattr(
        common.Log, "healthy", lambda *a, **k: (time.sleep(0.05), healthy(*a, **k))[1]
    )
    steps = run("c.pt", save_every=1000, save_minutes=0.06 / 60)
    assert 3 <= len(steps) and steps[-1] == 6
    assert saves[1].time - saves[0].time > 0.06  # the last comes in any case
    assert same_weights(tmp_path / "a.pt", tmp_path / "c.pt")


# ------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("stage", STAGES)
def test_nan_stops_before_the_update(whole, world, tmp_path, monkeypatch, capsys, stage):
    """The last saved state is the good one before, and the run goes on from it."""
    out = tmp_path / "run/step6.pt"
    words = words_of(stage, world, out)
    with monkeypatch.context() as patch:
        not_finite_at(2 * 2 if stage == "mix" else 2, patch)  # mix has two gradients a step
        message = refused(capsys, stage, *words)
    assert "gradient_norm is nan at step 2" in message
    assert "--on_nonfinite skip" in message and "--lr" in message
    assert not out.exists() and common.load(f"{out}.resume")["step"] == 2
    (line,) = [line for line in record(out) if "skipped" in line]
    assert line["step"] == 2 and line["rows"]
    goes_on(stage, whole, world, out)


def test_learning_rate_that_explodes(world, tmp_path, capsys):
    """No trick: the second step meets weights of 1e30 and stops."""
    words = words_of("sft", world, tmp_path / "a.pt", lr=1e30, eval_questions=0)
    assert "--lr" in refused(capsys, "sft", *words)
    assert not (tmp_path / "a.pt").exists()


def test_loss_that_is_infinite(world, tmp_path, monkeypatch, capsys):
    real = network.Model.forward

    def forward(*arguments, **more):
        loss, *rest = real(*arguments, **more)
        return loss * math.inf, *rest

    monkeypatch.setattr(network.Model, "forward", forward)
    words = words_of("sft", world, tmp_path / "a.pt", eval_questions=0)
    assert "loss is inf at step 0" in refused(capsys, "sft", *words)


@pytest.mark.parametrize("script", ["rl", "mix"])
def test_sampler_of_another_policy_stops_the_run(world, tmp_path, monkeypatch, capsys, script):
    """Log-probs that are off by 0.5, though the ratio of one update is 1 in any case."""
    real = network.Sampler.__call__

    def off(*arguments, **more):
        samples = real(*arguments, **more)
        return samples._replace(logp=samples.logp - 0.5)

    monkeypatch.setattr(network.Sampler, "__call__", off)
    words = words_of(script, world, tmp_path / "a.pt", eval_questions=0)
    message = refused(capsys, script, *words)
    assert "differ by 0.5" in message and "step 0" in message and "--max_mismatch" in message
    assert not (tmp_path / "a.pt").exists()


# ------------------------------------------------------------------------------------------- skip


def poisoned(monkeypatch, calls):
    """The gradient is NaN at these calls of common.gradients.

    -> the rows that went forward, call by call: their ids, and the last target.
    """
    real = common.gradients
    forward = network.Model.forward
    seen = [[]]

    def gradients(*arguments):
        taken, norm = real(*arguments)
        seen.append([])
        if len(seen) - 2 in calls:
            return [g * math.nan for g in taken], math.nan
        return taken, norm

    def recorded(self, ids, target, **more):
        if more.get("weight") is not None and torch.is_grad_enabled():
            seen[-1] += torch.cat([ids, target[:, -1:]], 1).tolist()
        return forward(self, ids, target, **more)

    monkeypatch.setattr(common, "gradients", gradients)
    monkeypatch.setattr(network.Model, "forward", recorded)
    return seen


def questions_by_hand(world, places) -> list[dict]:
    lines = (world.data / "easy/train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[place]) for place in places]


def encoded(texts) -> list[list[int]]:
    return [tokens.encode(tokens.encoding("toy"), text) for text in texts]


def rows_by_hand(stage, world, line) -> list[list[int]]:
    """What the row numbers in the log stand for, as ids; read without the trainers' code."""
    if stage == "pretrain":
        text = np.fromfile(world.data / "train_000.bin", "<u2", offset=64).astype(int)
        return [text[64 * row : 64 * row + 65].tolist() for row in line["rows"]]
    rows = questions_by_hand(world, line["rows"]["sft"] if stage == "mix" else line["rows"])
    prompts = [f" Q : {row['question']} A :" for row in rows]
    if stage == "rl":
        return encoded(prompts)
    chosen = [problems.solution_pairs([row], "1", 0)[0][1] for row in rows]
    return encoded(f"{prompt} {text}" for prompt, text in zip(prompts, chosen, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_step(world, tmp_path, monkeypatch, saves, stage):
    """Weights and moments stay, bit for bit; the log names the batch; the next step is made."""
    bad = 2 * 2 + 1 if stage == "mix" else 2  # mix has two gradients a step
    seen = poisoned(monkeypatch, {bad})
    sampled = []
    real = network.Sampler.__call__
    monkeypatch.setattr(
        network.Sampler, "__call__", lambda *a, **k: (sampled.append(a[1]), real(*a, **k))[1]
    )
    out = tmp_path / "step6.pt"
    quiet = dict(eval_every=0) if stage == "pretrain" else dict(eval_questions=0)
    call(stage, *words_of(stage, world, out, save_every=1, on_nonfinite="skip", **quiet))

    before, skipped, after = saves[1:4]
    assert (before.step, skipped.step, after.step) == (2, 3, 4)
    assert [saved.skipped for saved in saves] == [0, 0, 1, 0, 0, 0]
    assert all(map(torch.equal, before.weights, skipped.weights))
    assert not all(map(torch.equal, before.weights, after.weights))
    for one, other in zip(before.moments, skipped.moments, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert before.recent == skipped.recent

    (line,) = [line for line in record(out) if "skipped" in line]
    assert line["step"] == 2 and "gradient_norm is nan" in line["skipped"]
    assert steps_of(out) == list(range(6))
    wanted = rows_by_hand(stage, world, line)
    if stage == "rl":
        assert sampled[2] == wanted
        return
    assert len(seen[bad]) == len(wanted) == (16 if stage == "pretrain" else 8)
    for ids in wanted:  # the last id may be no input, only a target
        assert any(row[: len(ids)] == ids[: len(row)] for row in seen[bad])
    if stage == "mix":
        asked = questions_by_hand(world, line["rows"]["rl"])
        assert sampled[2] == encoded(f" Q : {row['question']} A :" for row in asked)


def test_resume_across_a_skipped_step(world, tmp_path, monkeypatch, saves):
    """Also what spikes are measured against comes back exactly."""
    monkeypatch.setattr(common.Log, "WINDOW", 3)
    whole_run = tmp_path / "whole/step6.pt"
    killed = tmp_path / "killed/step6.pt"
    settings = dict(on_nonfinite="skip", spike=50, save_every=1)
    words = [words_of("sft", world, out, **settings) for out in (whole_run, killed)]
    with monkeypatch.context() as patch:
        poisoned(patch, {2})
        call("sft", *words[0])

    def child():
        poisoned(monkeypatch, {2})
        at_call(common, "save_state", 3, kill_self)
        call("sft", *words[1])

    assert ran(child) == -signal.SIGKILL
    state = common.load(f"{killed}.resume")
    assert state["step"] == 3 and state["skipped"] == 1
    assert state["recent"] == saves[2].recent and len(state["recent"]["loss"]) == 2
    assert list(saves[5].recent) == ["loss", "gradient_norm"]
    call("sft", *words[1], "--resume")
    assert same_weights(whole_run, killed) and record(whole_run) == record(killed)
    assert [saved.recent for saved in saves[6:]] == [saved.recent for saved in saves[3:6]]


@pytest.mark.parametrize("stage", ["pretrain", slow("sft"), slow("rl"), slow("mix")])
def test_skipping_ends_after_many_in_a_row(world, tmp_path, monkeypatch, capsys, stage):
    first = 2 if stage == "mix" else 1  # mix has two gradients a step
    longer = dict(steps=20, eval_questions=0)
    if stage == "pretrain":
        longer = dict(tokens=20 * 1024, eval_every=0)
    out = tmp_path / "step20.pt"
    poisoned(monkeypatch, set(range(first, 100)))
    words = words_of(stage, world, out, save_every=1, on_nonfinite="skip", **longer)
    message = refused(capsys, stage, *words)
    assert f"is nan at step {1 + common.Log.IN_A_ROW}" in message
    assert len([line for line in record(out) if "skipped" in line]) == 11
    assert common.load(f"{out}.resume")["step"] == 11


# ----------------------------------------------------------------------------------------- spikes


def test_text_of_random_ids_is_a_spike(world, tmp_path, monkeypatch, capsys):
    """Text with a block of noise in one batch: that step stops or is skipped, and no other one."""
    bad = 24
    data = tmp_path / "toy"
    data.mkdir()
    shutil.copy(world.data / "val_000.bin", data)
    ids = np.fromfile(world.data / "train_000.bin", "<u2", offset=64)
    order = np.random.default_rng([0, 0]).permutation((len(ids) - 1) // 64)
    windows = order[16 * bad : 16 * bad + 16]
    for window in windows:
        noise = np.random.default_rng(window).integers(0, tokens.VOCABULARY["toy"], 63)
        ids[64 * window + 1 : 64 * window + 64] = noise
    tokens.write_shard(data / "train_000.bin", ids, "toy")
    monkeypatch.setattr(common.Log, "WINDOW", 16)
    settings = dict(data=data, out=tmp_path / "out", tokens=28 * 1024, eval_every=0)
    words = flags(*PRETRAIN, spike=6, save_every=20, **settings)
    message = refused(capsys, "pretrain", *words)
    assert re.match(rf"loss is [\d.]+ .* at step {bad}: ", message)
    call("pretrain", *words, "--resume", "--on_nonfinite", "skip")
    skipped = [line for line in record(tmp_path / "out/step28.pt") if "skipped" in line]
    assert [line["step"] for line in skipped] == [bad]
    assert sorted(skipped[0]["rows"]) == sorted(windows.tolist())


def log_of(tmp_path, **settings):
    flags_given = dict(init="", out=str(tmp_path / "a.pt"), spike=6.0, on_nonfinite="skip")
    cfg = common.PostTraining(**flags_given | settings)
    return common.Log(cfg, common.start("cpu"), 1000, None, "")


def test_where_a_spike_begins(tmp_path):
    """128 steps of 1, 3, 1, 3, ...: mean 2, standard deviation 1, and 8 is the last good value."""
    log = log_of(tmp_path)
    for step in range(127):
        assert log.healthy(step, list, dict(loss=1.0 + 2 * (step % 2)))
    assert log.healthy(127, list, dict(loss=3.0))  # not before 128 steps
    assert not log.healthy(128, list, dict(loss=8.01))
    assert not log.healthy(129, list, dict(loss=math.nan))
    assert len(log.recent["loss"]) == 128  # neither counts as a step
    assert log.healthy(130, list, dict(loss=8.0))


def test_no_spikes_without_the_flag(tmp_path):
    log = log_of(tmp_path, spike=0.0)
    assert all(log.healthy(step, list, dict(loss=1.0)) for step in range(200))
    assert log.healthy(200, list, dict(loss=99.0))


def test_first_right_answer_is_no_spike(tmp_path):
    """RL far from any reward: every group is flat, the gradient is 0, and then it is not.

    The loss is about 0 and of either sign, so that its size says nothing.
    """
    log = log_of(tmp_path)
    for step in range(300):
        assert log.healthy(step, list, dict(gradient_norm=0.0), loss=0.0)
    assert log.healthy(300, list, dict(gradient_norm=0.4), loss=-5.0)
    assert log.recent == {"gradient_norm": [0.4]}
    assert not log.healthy(301, list, dict(gradient_norm=0.4), loss=math.nan)
