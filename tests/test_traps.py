"""Settings that would waste a run: a schedule that does not fit, groups that are all flat."""

from types import SimpleNamespace

import pytest
import torch

import common
import pretrain
import rl
from data import problems, tokens
from helpers import PRETRAIN, call, flags, lines_of, metrics, refused, same_weights
from model import PRESETS, cosine
from runs import words_of

# ----------------------------------------------------------------------------- the schedule


def pretrain_words(world, out, **changes):
    return flags(*PRETRAIN, data=world.data, out=out, **changes)


def test_a_warm_up_longer_than_the_run_stops_with_the_way_out(world, capsys, tmp_path):
    words = pretrain_words(world, tmp_path / "p", tokens=20 * 1024, warmup=21)
    said = refused(capsys, "pretrain", *words)
    assert "--warmup 2," in said and "--tokens" in said
    assert not (tmp_path / "p").exists()
    call("pretrain", *pretrain_words(world, tmp_path / "q", tokens=2 * 1024, warmup=2))


def test_stop_ends_early_with_the_schedule_of_the_whole(world, tmp_path):
    whole = tmp_path / "whole"
    part = tmp_path / "part"
    call("pretrain", *pretrain_words(world, whole, tokens=6 * 1024, save_steps=4))
    call("pretrain", *pretrain_words(world, part, tokens=6 * 1024, save_steps=2, stop=4))
    assert sorted(path.name for path in part.glob("*.pt")) == ["step2.pt", "step4.pt"]
    assert same_weights(part / "step4.pt", whole / "step4.pt")
    rates = [lr for _, lr in metrics(part / "step4.pt", "lr")]
    assert rates == [cosine(step, 6, pretrain.Config.lr, 2) for step in range(4)]
    meta = common.load(part / "step4.pt")["meta"]
    assert (meta["step"], meta["tokens"]) == (4, 4 * 1024)


def test_a_stop_that_does_not_fit(world, capsys, tmp_path):
    words = pretrain_words(world, tmp_path / "p", tokens=6 * 1024, stop=7)
    assert f"--tokens {7 * 1024}" in refused(capsys, "pretrain", *words)
    words = pretrain_words(world, tmp_path / "p", tokens=6 * 1024, stop=3, save_steps=5)
    assert "outside the run of 3 steps" in refused(capsys, "pretrain", *words)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A1000", 0),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("Quadro P400", 0),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("Tesla T4", 8.1),
        ("Tesla V100-SXM2-16GB", 15.7),
    ],
)
def test_the_peak_of_a_card_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    world = common.World(0, 2, torch.device("cuda"), torch.bfloat16)
    assert pretrain.peak_flops(SimpleNamespace(peak_tflops=0.0), world) == 2e12 * peak
    assert pretrain.peak_flops(SimpleNamespace(peak_tflops=3.0), world) == 6e12


# ------------------------------------------------------------------------------------ --shots


def test_shots_stand_before_the_question_and_weigh_nothing(world):
    settings = dict(shots=2, questions_per_step=4, group=4, max_new=16, device="cpu")
    cfg = rl.Config(init=str(world.taught), **settings)
    run = common.begin(cfg, common.load(world.taught), "rl", shots=2)
    shown = problems.load(world.data / "easy", "shots")[:2]
    encoding = tokens.encoding("toy")
    before = tokens.encode(encoding, problems.few_shot(run.form, shown))
    assert run.prefix == before and len(before) > 20

    batch, numbers = rl.rl_batch(run, rl.Sampler(run.model), 0)
    assert (batch.ids[:, : len(before)] == torch.tensor(before)).all()
    assert not batch.mask[:, : len(before)].any() and not batch.weight[~batch.mask].any()
    assert numbers["prompt_length"] > len(before)
    _, _, _, known = rl.rl_gradients(run, batch, None, None)
    assert known["mismatch"] is None or known["mismatch"] < 1e-4


def test_shots_change_what_is_sampled_and_a_resumed_run_needs_them(world, whole, capsys, tmp_path):
    out = tmp_path / "step6.pt"
    call("rl", *words_of("rl", world, out, shots=1))
    assert not same_weights(out, whole("rl"))
    lines = [line for line in lines_of(out) if "loss" in line]
    assert max(line["mismatch_max"] for line in lines) < 1e-3
    said = refused(capsys, "rl", *words_of("rl", world, out, shots=2), "--resume")
    assert "--shots" in said


def test_shots_that_are_not_there_or_do_not_fit(world, capsys, tmp_path):
    words = words_of("rl", world, tmp_path / "a.pt", shots=99)
    assert "lower --shots" in refused(capsys, "rl", *words)
    words = words_of(
        "rl", world, tmp_path / "a.pt", shots=8, max_new=PRESETS["toy"]["context"] - 100
    )
    said = refused(capsys, "rl", *words)
    assert "context" in said


# ------------------------------------------------------------------------------ all groups flat


def said_of(capsys) -> int:
    return capsys.readouterr().err.count("all groups of the first")


def test_groups_that_are_all_flat_are_told(world, capsys, tmp_path):
    """The base of ten steps never writes an answer."""
    how = dict(questions_per_step=4, group=2, max_new=4, eval_questions=0, compile="false")
    call("rl", init=world.base, out=tmp_path / "a.pt", steps=7, **how)
    err = capsys.readouterr().err
    assert err.count("all groups of the first") == 1
    assert "--shots" in err and "sft.py" in err and "later checkpoint" in err
    call("rl", init=world.base, out=tmp_path / "b.pt", steps=3, **how)
    assert said_of(capsys) == 0


def test_one_group_that_is_not_flat_is_enough(world, capsys, tmp_path):
    call("rl", *words_of("rl", world, tmp_path / "step6.pt"))
    assert said_of(capsys) == 0
