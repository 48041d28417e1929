"""Signals: the step ends, its state is saved, and --resume goes on to the same bits."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
from faults import at_call, fork, kill_self, last_line, ran, signalled, wait
from helpers import PRETRAIN, ROOT, call, flags, same_weights, start
from runs import goes_on, record, steps_of, words_of


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "stage, number",
    [
        ("pretrain", signal.SIGTERM),
        ("rl", signal.SIGINT),
        ("sft", signal.SIGHUP),
        ("mix", signal.SIGUSR1),
        slow("pretrain", signal.SIGUSR1),
        slow("rl", signal.SIGHUP),
        slow("sft", signal.SIGTERM),
        slow("mix", signal.SIGINT),
    ],
)
def test_signal(whole, world, tmp_path, stage, number):
    """Exit status 128 + number. SIGHUP (a closed terminal) and SIGUSR1 (a scheduler) lost all
    since the last save.
    """
    out = tmp_path / "run/step6.pt"
    said = tmp_path / "said"
    words = words_of(stage, world, out)
    assert ran(lambda: (signalled(number, 2), call(stage, *words)), said) == 128 + number
    assert "--resume" in last_line(said)
    assert signal.Signals(number).name in said.read_text()
    assert common.load(f"{out}.resume")["step"] == 3 and not out.exists()
    assert steps_of(out) == [0, 1, 2]
    goes_on(stage, whole, world, out)


def test_signal_during_the_last_save(whole, world, tmp_path):
    """Not forgotten, though no step is left."""
    out = tmp_path / "run/step6.pt"
    words = words_of("sft", world, out)

    def child():
        at_call(common, "save", 2, lambda: kill_self(signal.SIGTERM))
        call("sft", *words)

    assert ran(child) == 143
    assert common.load(f"{out}.resume")["step"] == 6 and not out.exists()
    goes_on("sft", whole, world, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_second_signal_stops_at_once(whole, world, tmp_path, number):
    """A second later or more: torchrun passes on what a scheduler has sent to all."""
    out = tmp_path / "run/step6.pt"

    def twice(pause):
        def again():
            time.sleep(pause)
            kill_self(number)
            time.sleep(0.01)

        signalled(number, 3, again)
        call("sft", *words_of("sft", world, out))

    assert ran(lambda: twice(1.1)) == -number  # 128 + number in a shell
    assert common.load(f"{out}.resume")["step"] == 2
    shutil.rmtree(out.parent)
    assert ran(lambda: twice(0)) == 128 + number
    assert common.load(f"{out}.resume")["step"] == 4
    goes_on("sft", whole, world, out)


def has_begun(process, log):
    while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.002)


@pytest.mark.parametrize(
    "stage, number",
    [
        ("sft", signal.SIGINT),
        slow("pretrain", signal.SIGTERM),
        slow("rl", signal.SIGINT),
        slow("mix", signal.SIGHUP),
    ],
)
def test_signal_to_a_process_of_its_own(whole, world, tmp_path, stage, number):
    out = tmp_path / "run/step6.pt"
    # tests in the background ignore them, and so would the process

    def preexec():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    process = start(stage, *words_of(stage, world, out), preexec_fn=preexec)
    has_begun(process, Path(f"{out}.metrics.jsonl"))
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number and "Traceback" not in said
    assert common.load(f"{out}.resume")["step"] > 0
    goes_on(stage, whole, world, out)


# ------------------------------------------------------------------------------------ many ranks


def as_rank(rank, port, action):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", **address}
    action()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("stage", ["pretrain", slow("rl")])
def test_signal_to_one_of_two_ranks(world, tmp_path, stage):
    """One rank is told, all stop after the same step; and none leaves while rank 0 writes, or
    torchrun would end that one, too. Then two ranks go on to the same bits.
    """
    whole_run = tmp_path / "whole/step6.pt"
    stopped = tmp_path / "stopped/step6.pt"

    def two(out, *more, prepare=lambda rank: None):
        words = [*words_of(stage, world, out), *more]
        port = free_port()

        def rank(number):
            return fork(
                lambda: as_rank(number, port, lambda: (prepare(number), call(stage, *words)))
            )

        return rank(0), rank(1)

    def slow_to_write(rank):
        if rank == 1:
            return signalled(signal.SIGTERM, 2)
        fsync = os.fsync
        states = []

        def slow_fsync(file):
            if os.readlink(f"/proc/self/fd/{file}").endswith(".resume.tmp"):
                states.append(file)
                time.sleep(1 if len(states) == 2 else 0)
            fsync(file)

        os.fsync = slow_fsync

    assert [wait(child) for child in two(whole_run)] == [0, 0]
    first, second = two(stopped, prepare=slow_to_write)
    assert wait(second) == 143
    assert common.load(f"{stopped}.resume")["step"] == 3
    assert wait(first) == 143
    assert [wait(child) for child in two(stopped, "--resume")] == [0, 0]
    assert same_weights(whole_run, stopped) and record(whole_run) == record(stopped)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun(world, tmp_path, number):
    """It passes the signal on, waits for the ranks and exits with 1; no process is left."""
    whole_run = tmp_path / "whole/step40.pt"
    stopped = tmp_path / "stopped/step40.pt"

    def torchrun(out, *more):
        settings = dict(data=world.data, out=out.parent, tokens=40 * 1024, save_every=50)
        words = flags(*PRETRAIN, *more, eval_every=0, **settings)
        launch = "-m torch.distributed.run --standalone --nproc_per_node 2 pretrain.py".split()
        command = [sys.executable, *launch, *words]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    assert torchrun(whole_run).wait(120) == 0
    process = torchrun(stopped)
    has_begun(process, Path(f"{stopped}.metrics.jsonl"))
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and said.count("--resume goes on") == 1
    assert not running_with(stopped.parent)
    assert 0 < common.load(f"{stopped}.resume")["step"] < 40
    assert torchrun(stopped, "--resume").wait(120) == 0
    assert same_weights(whole_run, stopped) and record(whole_run) == record(stopped)


def running_with(text) -> list[str]:
    """The command lines of running processes that contain a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has just ended
            continue
    return [line for line in found if str(text) in line]


# ---------------------------------------------------------------------------- outside of the steps


@pytest.mark.parametrize(
    "script, module, name, number",
    [
        ("sft", "common", "load", 0),
        ("sft", "eval", "solve", 1),
        ("eval", "eval", "solve", 0),
        ("data.prepare", "data.toy", "text", 1),
    ],
)
def test_ctrl_c_outside_of_the_steps(world, tmp_path, script, module, name, number):
    """While a checkpoint is loaded, in the last validation, in eval.py and prepare.py: status 130
    and no traceback."""
    said = tmp_path / "said"
    prepare = ["toy", *flags(out=tmp_path / "toy", tokens=2000)]

    def child():
        at_call(module, name, number, lambda: kill_self(signal.SIGINT))
        if script == "data.prepare":
            importlib.import_module(script).main(prepare)
        elif script == "eval":
            call("eval", world.base, results=tmp_path)
        else:
            call("sft", *words_of("sft", world, tmp_path / "a.pt"))

    assert ran(child, said) == 130
    assert "Traceback" not in said.read_text()
