"""Runs in a forked child, and what can befall them: a fork has torch already, a process of its own takes seconds to import it."""

import importlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from helpers import ROOT, call

from data import checkpoint, run

SAVING = {"claim", "save", "save_state", "finish", "write_lines", "sync", "close"}  # of data/checkpoint.py and data/run.py
OURS = {str(ROOT / name) for name in ("pretrain.py", "sft.py", "rl.py", "mix.py", "data/run.py", "data/checkpoint.py")}


def fork(action, stderr=os.devnull) -> int:
    """Run action() in a child process; -> its id. Exit status as for a script; 99 and a traceback for anything unforeseen."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started pytest in the background had it ignored
        action()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child, seconds=120) -> int:
    """Its exit status, negative if a signal ended it."""
    for _ in range(seconds * 200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"no end after {seconds} s")


def ran(action) -> int:
    return wait(fork(action))


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def traced(at_line):
    """at_line(function name) before each line of our own scripts, of data/run.py and of data/checkpoint.py."""
    def local(frame, event, _):
        if event == "line":
            at_line(frame.f_code.co_name)
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename in OURS else None)


def lines_of(stage, words) -> tuple[int, list[int]]:
    """A run's number of lines, and which of them belong to saves."""
    seen, saves = [0], []

    def count(name):
        if name in SAVING:
            saves.append(seen[0])
        seen[0] += 1

    importlib.import_module(stage)  # or the lines of its import would be counted, this once
    traced(count)
    try:
        call(stage, *words)
    finally:
        sys.settrace(None)
    return seen[0], saves


def die_at_line(number):
    left = [number]

    def count(_):
        left[0] -= 1
        if left[0] < 0:
            kill_self()

    traced(count)


def die_in_write(number, share):
    """In the middle of the number-th file that is written, when `share` of it is on the disk."""
    left, fsync = [number], os.fsync

    def torn(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".tmp"):
            left[0] -= 1
            if left[0] < 0:
                os.ftruncate(file, int(share * os.fstat(file).st_size))
                kill_self()
        fsync(file)

    os.fsync = torn


KINDS = ("anywhere", "saving", "torn", "clock")


def killed(stage, words, out, kind, seed, plan):
    """A run that kill -9 meets at a seeded moment. plan: seconds, lines, lines of saves, files written of a whole run."""
    seconds, lines, saves, writes = plan
    chance = random.Random(f"{stage} {kind} {seed}")

    def child():
        if kind == "anywhere":
            die_at_line(chance.randrange(lines))
        elif kind == "saving":
            die_at_line(chance.choice(saves))
        elif kind == "torn":
            die_in_write(chance.randrange(writes), chance.random())
        call(stage, *words)

    if kind != "clock":
        assert ran(child) == -signal.SIGKILL
        return
    pause = chance.uniform(0, 0.5) * seconds  # they were measured with each line counted
    while True:
        process = fork(child)
        time.sleep(pause)
        os.kill(process, signal.SIGKILL)
        if wait(process) == -signal.SIGKILL:
            return
        shutil.rmtree(out.parent)  # this time it was faster
        pause /= 2


def unreadable(folder) -> list[str]:
    """Every checkpoint and state that lies in the folder and cannot be loaded; and the metrics."""
    bad = []
    for path in Path(folder).iterdir():
        try:
            if path.suffix in (".pt", ".resume"):
                checkpoint.load(path)
            elif path.name.endswith(".metrics.jsonl"):
                run.read_lines(path)
        except ValueError as error:
            bad.append(str(error))
    return bad


def at_call(module, name, number, action):
    """action() before the number-th call (from 0) of module.name, in this process."""
    module = importlib.import_module(module) if isinstance(module, str) else module
    real, calls = getattr(module, name), [0]

    def counted(*arguments, **more):
        calls[0] += 1
        if calls[0] == number + 1:
            action()
        return real(*arguments, **more)

    setattr(module, name, counted)
