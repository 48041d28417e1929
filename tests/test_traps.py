"""Settings that would waste a run: a schedule that does not fit, groups that are all flat; and
machines that this does not run on. Each stops in one line, which says what to do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import pretrain
import rl
from data import problems, tokens
from helpers import PRETRAIN, ROOT, call, flags, lines_of, metrics, refused, same_weights
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
    run = common.begin(cfg, common.load(world.taught), "rl", max_new=cfg.max_new, shots=cfg.shots)
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
    # by which runs/public.sh knows it
    script = (ROOT / "runs/public.sh").read_text(encoding="utf-8")
    never = re.search(r"grep -q '(.*)'", script)[1]
    first = Path(f"{tmp_path}/b.pt.metrics.jsonl").read_text(encoding="utf-8")
    assert re.search(never, first)


def test_one_group_that_is_not_flat_is_enough(world, capsys, tmp_path):
    call("rl", *words_of("rl", world, tmp_path / "step6.pt"))
    assert said_of(capsys) == 0
    text = Path(f"{tmp_path}/step6.pt.metrics.jsonl").read_text(encoding="utf-8")
    assert '"flat": 0.' in text.splitlines()[1] and '"flat": 1.0' not in text


SMALL = """#!/usr/bin/env bash
case "$*" in
  *prepare.py*) exit 0 ;;
  *rl.py*) small="--questions_per_step 4 --group 2 --max_new 4 --compile false" ;;
esac
while [[ $1 != *.py ]]; do shift; done
exec {python} "$@" $small
"""


def test_a_base_that_never_answers_right_stops_the_public_script(world, tmp_path):
    """The script itself and rl.py itself, on the base of ten steps in place of OLMo2's."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(SMALL.replace("{python}", sys.executable))
        (tmp_path / name).chmod(0o755)
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    shutil.copy(world.base, ckpt / "step1000.pt")
    settings = dict(STEPS="1000", GPUS="1", OUT=str(ckpt), PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(
        ["bash", "runs/public.sh"],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith("public.sh: error: no answer of step1000 is right")
    assert "SHOTS=4" in line and "SFT first" in line
    names = {path.name for path in (ckpt / "first").iterdir()}
    assert names == {"step1000-shots0.pt.metrics.jsonl", "step1000-shots0.pt.answers.jsonl"}


# ------------------------------------------------------------------------------- the machine


def test_an_apple_gpu(world, tmp_path, capsys):
    words = words_of("rl", world, tmp_path / "a.pt")
    for name in ("mps", "mps:0"):
        said = refused(capsys, "rl", *words, "--device", name)
        assert name in said and "--device cpu" in said
    assert "cuda:N" in refused(capsys, "rl", *words, "--device", "metal")


def card(monkeypatch, name, bf16, triton=True):
    """A machine with one GPU of this name, as far as `common.start` looks."""
    known = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        set_device=lambda device: None,
        get_device_name=lambda device: name,
        is_bf16_supported=lambda including_emulation: bf16,
    )
    for attribute, value in known.items():
        monkeypatch.setattr(torch.cuda, attribute, value)
    monkeypatch.setattr(common, "find_spec", lambda package: triton or None)


@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100-SXM2-16GB"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_card_without_bf16(monkeypatch, world, tmp_path, capsys, name, dtype):
    card(monkeypatch, name, bf16=False)
    monkeypatch.setattr(common.plan, "fit", lambda cfg, *_: cfg)
    words = words_of("rl", world, tmp_path / "a.pt", dtype=dtype)
    said = refused(capsys, "rl", *words)
    assert name in said and "--dtype float32" in said
    assert common.start("cuda", "float32").compute == torch.float32


@pytest.mark.parametrize("script", ["pretrain", "rl", "eval", "sample"])
def test_fp16_is_not_offered(capsys, script):
    said = refused(capsys, script, "--dtype", "float16")
    assert "bfloat16 or float32" in said


def test_cuda_without_triton(monkeypatch, world, tmp_path, capsys):
    card(monkeypatch, "NVIDIA H100 80GB HBM3", bf16=True, triton=False)
    monkeypatch.setattr(common.plan, "fit", lambda cfg, *_: cfg)
    said = refused(capsys, "rl", *words_of("rl", world, tmp_path / "a.pt"))
    assert "pip install triton" in said and "--device cpu" in said
    card(monkeypatch, "NVIDIA H100 80GB HBM3", bf16=True)
    assert common.start("cuda").compute == torch.bfloat16
    monkeypatch.setattr(common, "find_spec", lambda package: None)
    assert common.start("cpu").compute == torch.float32  # which needs none


@pytest.mark.parametrize("script", ["pretrain", "rl", "eval", "sample"])
def test_windows_without_wsl(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "platform", "win32")
    words = dict(rl=["--init", "a.pt"], sample=["a.pt"], eval=["a.pt"], pretrain=[])[script]
    assert "wsl --install" in refused(capsys, script, *words)


@pytest.mark.parametrize("version, status", [("3 2", 2), ("4 3", 2), ("4 4", 0), ("5 1", 0)])
def test_an_old_bash(tmp_path, version, status):
    """macOS has 3.2. The version is a constant of the shell: another name stands for it."""
    text = (ROOT / "runs/common.sh").read_text(encoding="utf-8")
    assert text.count("BASH_VERSINFO") == 2
    script = tmp_path / "matrix.sh"
    script.write_text(f"OLD=({version})\n" + text.replace("BASH_VERSINFO", "OLD"))
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == status and len(done.stderr.splitlines()) == (status > 0)
    assert status == 0 or "brew install bash" in done.stderr


def test_every_script_asks_for_the_version_before_anything_an_old_bash_cannot_read():
    """What stands before `source` is read by bash 3.2: no array, no ${x,,}, no [[ -v ]]."""
    for path in [ROOT / "matrix.sh", *(ROOT / "runs").glob("*.sh")]:
        if path.name == "common.sh":
            continue
        before, found, _ = path.read_text(encoding="utf-8").partition("\nsource ")
        assert found, path
        code = [line for line in before.splitlines() if not line.startswith("#")]
        assert not re.search(r"declare|local -|mapfile|,,}|\^\^}|&>>", "\n".join(code)), path
