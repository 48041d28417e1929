"""Full and read-only disks, files that are removed, replaced or damaged under a run."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import common
from data import tokens
from faults import at_call, failed, ran, signalled
from helpers import PRETRAIN, call, files, flags, refused, same_weights
from runs import goes_on, record, words_of


@pytest.fixture()
def sft(world, tmp_path):
    """Where an sft run writes its checkpoint, its metrics, and its flags."""
    out = tmp_path / "run/step6.pt"
    return out, Path(f"{out}.metrics.jsonl"), words_of("sft", world, out)


@pytest.mark.parametrize("what", ["state", "metrics"])
def test_full_disk(whole, world, tmp_path, sft, what):
    """The error is the kernel's own; the last good state is intact, and the run goes on later."""
    out, log, words = sft

    def full():
        size = 100_000 if what == "state" else log.stat().st_size + 50
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may grow beyond it

    def child():
        at_call(common.Log, "healthy", 3, full)
        call("sft", *words)

    says = failed(child, tmp_path / "said")
    assert str(log if what == "metrics" else f"{out}.resume") in says
    assert os.strerror(errno.EFBIG) in says
    assert common.load(f"{out}.resume")["step"] == 2 and not list(out.parent.glob("*.tmp"))
    goes_on("sft", whole, world, out)


def mount(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")


def test_disk_without_space(whole, world, tmp_path):
    """A file system that holds one state and not a second."""
    out = tmp_path / "disk/step6.pt"
    mount(out.parent, "size=9m")
    try:
        says = failed(lambda: call("sft", *words_of("sft", world, out)), tmp_path / "said")
        assert os.strerror(errno.ENOSPC) in says and f"{out}.resume" in says
        assert common.load(f"{out}.resume")["step"] == 2 and not list(out.parent.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=50m", out.parent], check=True)
        goes_on("sft", whole, world, out)
    finally:
        subprocess.run(["umount", out.parent], check=True)


@pytest.mark.parametrize("again", [[], ["--resume"], ["--overwrite"]])
def test_read_only_folder(world, tmp_path, again):
    """Said before the first step."""
    folder = tmp_path / "disk"
    mount(folder, "ro,size=1m")
    words = words_of("sft", world, folder / "a.pt")
    try:
        says = failed(lambda: call("sft", *words, *again), tmp_path / "said")
        assert os.strerror(errno.EROFS) in says and str(folder) in says
    finally:
        subprocess.run(["umount", folder], check=True)


def test_folder_that_cannot_be_made(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/none"), tmp_path / "file"):
        assert str(folder) in refused(capsys, "sft", *words_of("sft", world, folder / "a.pt"))


# ------------------------------------------------------------------------------------ the metrics


@pytest.mark.parametrize("owner, name, step", [(common.Log, "healthy", 2), (common, "save", 6)])
def test_metrics_removed_under_the_run(whole, world, tmp_path, sft, owner, name, step):
    """The run stops at the next save; the state before it is intact, and its totals go on.

    In the midst of it, or at the very end, when the checkpoint is to be written.
    """
    out, log, words = sft

    def child():
        at_call(owner, name, 3, log.unlink)
        call("sft", *words)

    assert str(log) in failed(child, tmp_path / "said")
    assert common.load(f"{out}.resume")["step"] == step
    assert ran(lambda: call("sft", *words, "--resume")) == 0
    assert same_weights(out, whole("sft"))
    assert record(out)[-2]["totals"] == record(whole("sft"))[-2]["totals"]


def test_metrics_removed_before_a_resume(whole, world, tmp_path, sft):
    """The run goes on, says so, and keeps the totals."""
    out, log, words = sft
    assert ran(lambda: (signalled(signal.SIGTERM, 3), call("sft", *words))) == 143
    log.unlink()
    said = tmp_path / "said"
    assert ran(lambda: call("sft", *words, "--resume"), said) == 0
    assert str(log) in said.read_text()
    assert same_weights(out, whole("sft"))
    assert record(out)[-2]["totals"] == record(whole("sft"))[-2]["totals"]


def test_folder_removed_under_the_run(world, tmp_path, sft):
    """It ended well, without its metrics; now it stops, and begins again."""
    out, _, words = sft

    def child():
        at_call(common.Log, "healthy", 3, lambda: shutil.rmtree(out.parent))
        call("sft", *words)

    assert str(out) in failed(child, tmp_path / "said")
    assert not out.exists()


def test_two_runs_with_one_name(whole, world, tmp_path, sft):
    """The later one wins; the earlier one notices before it writes over the other's state."""
    out, _, words = sft

    def child():
        at_call(common.Log, "healthy", 3, lambda: call("sft", *words, "--overwrite"))
        call("sft", *words)

    assert str(out) in failed(child, tmp_path / "said")
    goes_on("sft", whole, world, out)


@pytest.mark.parametrize("torn", ['{"step": 4, "loss": 1.', "\0" * 100])
def test_torn_last_line(whole, world, sft, torn):
    """Its writer was killed, or the power cut."""
    out, log, words = sft
    assert ran(lambda: (signalled(signal.SIGTERM, 3), call("sft", *words))) == 143
    log.write_text(log.read_text() + torn)
    goes_on("sft", whole, world, out)


def test_damaged_metrics_are_not_lost(world, capsys, sft):
    """A line in the middle that is no JSON stops --resume, and nothing is touched."""
    out, log, words = sft
    assert ran(lambda: (signalled(signal.SIGTERM, 3), call("sft", *words))) == 143
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    before = files(out.parent)
    assert f"{log}:2" in refused(capsys, "sft", *words, "--resume")
    assert files(out.parent) == before
    assert json.loads(lines[1])


# ------------------------------------------------------------------------------------- the shards


@pytest.mark.parametrize("split", ["train", "val"])
def test_corrupt_shard(world, tmp_path, capsys, split):
    """One bit, in any shard, on any rank; before the first step."""
    data = tmp_path / "toy"
    shutil.copytree(world.data, data)
    path = data / f"{split}_000.bin"
    raw = bytearray(path.read_bytes())
    raw[random.Random(split).randrange(64, len(raw))] ^= 4
    path.write_bytes(raw)
    words = flags(*PRETRAIN, data=data, out=tmp_path / "out", tokens=2048)
    assert str(path) in refused(capsys, "pretrain", *words)
    assert not list(tmp_path.glob("out/*"))
    bad = 0
    for rank in range(3):
        try:
            tokens.verify(data, rank, 3)
        except ValueError:
            bad += 1
    assert bad == 1  # the ranks share the work
    call("pretrain", *words, "--verify", "false")
