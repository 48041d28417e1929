"""Runs in a forked child, and what can befall them.

A fork has torch already; a process of its own takes seconds to import it.
"""

import importlib
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import common
from data.files import read_rows
from helpers import ROOT, call, error_of

# the functions that save
SAVING = {"claim", "save", "save_state", "finish", "write_rows", "whole_file", "flush", "close"}
SCRIPTS = ("pretrain.py", "sft.py", "rl.py", "mix.py", "common.py", "data/files.py")
OURS = {str(ROOT / name) for name in SCRIPTS}


def fork(action, said=os.devnull, redirect=None) -> int:
    """Run action() in a child process; -> its id.

    said: the file of its stderr; redirect(): sets descriptors 1 and 2 in another way. The exit
    status is that of a script; 99 and a traceback for anything unforeseen.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if redirect:
            redirect()
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
        # whoever started pytest in the background had them ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        action()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            status = 120  # Python's own, where the last flush fails
        os._exit(status or 0)


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


def ran(action, said=os.devnull, redirect=None) -> int:
    return wait(fork(action, said, redirect))


def failed(action, said) -> str:
    """action() in a child ends with exit status 2 and one line; -> that line."""
    said.unlink(missing_ok=True)
    status = ran(action, said)
    return error_of(said.read_text(encoding="utf-8"), status)


def last_line(said) -> str:
    """What a process said last on stderr; the frames of a progress bar are left out."""
    text = said.read_text(encoding="utf-8")
    assert "Traceback" not in text, text
    lines = re.split(r"[\r\n]+", text)
    return [line for line in lines if line and not line.rstrip().endswith(" left")][-1]


def kill_self(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def at_call(module, name, number, action):
    """action() before the number-th call (from 0) of module.name, in this process."""
    module = importlib.import_module(module) if isinstance(module, str) else module
    real = getattr(module, name)
    calls = [0]

    def counted(*arguments, **more):
        calls[0] += 1
        if calls[0] == number + 1:
            action()
        return real(*arguments, **more)

    setattr(module, name, counted)


def signalled(number, step, then=lambda: None):
    """This process sends itself a signal when update `step` (from 0) is about to be made."""

    def act():
        kill_self(number)
        then()

    at_call(common.Log, "healthy", step, act)


def not_finite_at(call_number, monkeypatch):
    """A run whose gradient norm is NaN at one call of common.gradients, counted from 0."""
    real = common.gradients
    calls = []

    def gradients(*arguments):
        taken, norm = real(*arguments)
        calls.append(norm)
        return taken, float("nan") if len(calls) == call_number + 1 else norm

    monkeypatch.setattr(common, "gradients", gradients)


# --------------------------------------------------------------------------- kill -9 at a moment


def traced(at_line):
    """at_line(function name) before each line of the trainers, common.py and data/files.py."""

    def local(frame, event, _):
        if event == "line":
            at_line(frame.f_code.co_name)
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename in OURS else None)


def lines_run(stage, words) -> tuple[int, list[int]]:
    """A run's number of lines, and which of them belong to saves."""
    seen = [0]
    saves = []

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
    left = [number]
    fsync = os.fsync

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
    """A run that kill -9 meets at a seeded moment.

    plan: seconds, lines, lines of saves, and files written of a whole run.
    """
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
    """Every checkpoint, state and record in the folder that cannot be loaded."""
    bad = []
    for path in Path(folder).iterdir():
        try:
            if path.suffix in (".pt", ".resume"):
                common.load(path)
            elif path.name.endswith(".metrics.jsonl"):
                read_rows(path)
        except ValueError as error:
            bad.append(str(error))
    return bad
