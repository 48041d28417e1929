"""What a run takes from outside: a compiler, a clock, whoever reads its output, a locale, names in
the environment. None of it loses a state, makes a wrong number or a file in two encodings."""

import ast
import fcntl
import importlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import termios
import time
from pathlib import Path

import pytest
import torch
import torch._inductor.config

import common
import faults
from data import problems
from data.files import read_rows, write_rows
from faults import at_call, fork, ran, wait
from helpers import ROOT, call, calls_in, flags, lines_of, same_weights, start
from runs import goes_on, steps_of, words_of
from test_checkpoints import sources

# ------------------------------------------------------------- torch.compile that cannot work


def no_compiler():
    os.environ["PATH"] = ""


def broken_compiler():
    torch._inductor.config.cpp.cxx = (None, "/bin/false")  # $CXX when torch was imported


def blank_in_the_path():
    folder = tempfile.mkdtemp(prefix="a blank ")
    os.environ["TMPDIR"] = folder
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    tempfile.tempdir = None


def no_headers():
    real = sysconfig.get_path
    sysconfig.get_path = lambda name, *more, **how: (
        "/nonexistent" if name == "include" else real(name, *more, **how)
    )


@pytest.mark.parametrize(
    "broken",
    [
        blank_in_the_path,
        no_compiler,
        pytest.param(no_headers, marks=pytest.mark.slow),
        pytest.param(broken_compiler, marks=pytest.mark.slow),
    ],
)
def test_compiler_that_does_not_work(world, tmp_path, broken):
    """One line with the cause, no page of traceback, and the run goes on.

    In a process of its own: one that has compiled before needs no compiler for the same again.
    """
    out = tmp_path / "a.pt"
    words = words_of("rl", world, out, compile="true", steps=1, eval_questions=0)
    script = (
        "import sys\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "import helpers, test_environment\n"
        f"test_environment.{broken.__name__}()\n"
        "helpers.call('rl', *sys.argv[3:])\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, here, here.parent, *words]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, encoding="utf-8"
    )
    text = ran.stderr
    assert ran.returncode == 0, text
    lines = [
        line for line in re.split(r"[\r\n]+", text) if line and not line.rstrip().endswith(" left")
    ]
    (told,) = lines
    assert "torch.compile" in told and len(told) < 350
    assert "g++" in told and "python3-dev" in told
    assert steps_of(out) == [0]


# ----------------------------------------------------------------------------------- the clock


def test_no_difference_of_times_of_day():
    """They go back when a clock is set; time.monotonic does not."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("time.time", "datetime.now", "datetime.utcnow"), path


def test_clock_that_goes_back(whole, world, tmp_path):
    """By an hour at each look, the progress bar's too: no negative seconds, the same bits."""
    out = tmp_path / "run/step6.pt"

    def child():
        hours = iter(range(10**6, 0, -1))
        time.time = lambda: 3600.0 * next(hours)
        import tqdm.std

        tqdm.std.time = time.time
        call("rl", *words_of("rl", world, out))

    assert ran(child) == 0
    assert same_weights(out, whole("rl"))
    updates = [line for line in lines_of(out) if "loss" in line]
    for line in updates:
        assert 0 < line["totals"]["seconds"] < 600
        assert 0 <= line["sample_seconds"] < 600 and 0 <= line["grade_seconds"] < 600


# ----------------------------------------------------------------- an output nobody reads any more


@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_output_that_nobody_reads(whole, world, tmp_path, stage):
    """`2>&1 | head -1`: both ends of the pipe are closed from the beginning; the run goes on."""
    out = tmp_path / "run/step6.pt"

    def closed_pipe():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)

    words = words_of(stage, world, out)
    assert ran(lambda: call(stage, *words), redirect=closed_pipe) == 0
    assert same_weights(out, whole(stage))


def test_head_of_a_real_run(whole, world, tmp_path):
    """`python sft.py ... 2>&1 | head -1`."""
    out = tmp_path / "run/step6.pt"
    process = start("sft", *words_of("sft", world, out), stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert same_weights(out, whole("sft"))


def test_error_on_a_full_disk(tmp_path):
    """Its exit status says that it failed, whether or not the message could be written."""

    def closed():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(1, 2)

    assert ran(lambda: call("sft", init=tmp_path / "none.pt"), redirect=closed) == 2


def test_terminal_that_goes_away(whole, world, tmp_path):
    """A window is closed: its programs get SIGHUP and can write no more. The state is saved."""
    out = tmp_path / "run/step6.pt"
    ours, theirs = os.openpty()

    def terminal():
        os.close(ours)
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)

    def child():
        at_call(common.Log, "healthy", 2, lambda: (print("now", flush=True), time.sleep(0.5)))
        call("sft", *words_of("sft", world, out))

    process = fork(child, redirect=terminal)
    os.close(theirs)
    seen = b""
    while b"now" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert wait(process) == 128 + signal.SIGHUP
    assert common.load(f"{out}.resume")["step"] == 3
    goes_on("sft", whole, world, out)


def test_nohup_outlives_the_terminal(whole, world, tmp_path):
    """A SIGHUP that somebody had ignored stays ignored."""
    out = tmp_path / "run/step6.pt"

    def child():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        faults.signalled(signal.SIGHUP, 2)
        call("sft", *words_of("sft", world, out))

    assert ran(child) == 0
    assert same_weights(out, whole("sft"))


# ------------------------------------------------------------------------------------ the locale

C_LOCALE = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LANG=None)


def test_files_are_utf8_whatever_the_locale(world, tmp_path):
    """Umlauts in a question's id and in a folder's name, characters beyond ASCII in the output."""
    folder = tmp_path / "Übung"
    for split in ("train", "val", "shots"):
        rows = problems.load(world.data / "easy", split)
        write_rows(folder / f"{split}.jsonl", [row | {"id": f"ü{row['id']}"} for row in rows])
    problems.write_form(folder, problems.form(world.data / "easy"))
    out = tmp_path / "Ö.pt"
    call("sft", *words_of("sft", world, out, questions=folder, steps=1))
    where = flags(questions=folder, results=folder / "Ä")
    measure = ["--n", 2, "--k", "1", "--shots", "0", "--tasks=", "--compile", "false"]
    process = start("eval", out, *where, *measure, env=C_LOCALE, encoding="utf-8")
    told, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "pass@1" in told and "±" in told
    (row,) = [row for row in read_rows(folder / "Ä/Ö.jsonl") if row["kind"] == "pass"]
    assert row["ids"][0].startswith("ü") and row["checkpoint"] == str(out)


def test_every_file_is_opened_as_utf8():
    """No text file is read or written in the encoding of the locale."""
    for script in ("pretrain", "sft", "rl", "mix", "eval", "sample"):
        importlib.import_module(script)
    files = [getattr(module, "__file__", None) or "/" for module in list(sys.modules.values())]
    files = [Path(file) for file in files if file.startswith(f"{ROOT}/")]
    ours = [file for file in files if file.parent.name != "tests"]
    for where, name, given, node in calls_in(ours):
        if name.endswith((".read_text", ".write_text")):
            assert "utf-8" in given.get("encoding", ""), where
        if name in ("open", "io.open", "os.fdopen", "gzip.open"):
            words = [ast.unparse(x) for x in node.args] + [*given.values()]
            binary = name == "gzip.open" or any("b'" in x or "'rb" in x for x in words)
            binary = binary or any(re.fullmatch(r"'[rwa]\+?b'", x) for x in words)
            plain = any("os.devnull" in x or "/proc/" in x for x in words)
            assert binary or plain or "encoding" in given, where


# ------------------------------------------------------------------------ names in the environment


def test_leftover_rank_is_said(world, tmp_path):
    """RANK and WORLD_SIZE of an earlier torchrun: the run waits for ranks that nobody starts."""
    said = tmp_path / "said"

    def child():
        os.environ |= dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29871")
        call("sft", *words_of("sft", world, tmp_path / "a.pt"))

    process = fork(child, said)
    deadline = time.monotonic() + 60
    while not said.exists() or "RANK" not in said.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL
    assert "unset RANK" in said.read_text()


@pytest.mark.parametrize("names", [dict(RANK="0"), dict(RANK="0", WORLD_SIZE="2")])
def test_rank_without_the_rest_is_an_error(world, tmp_path, names):
    def child():
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update(names)
        call("sft", *words_of("sft", world, tmp_path / "a.pt"))

    assert "RANK" in faults.failed(child, tmp_path / "said")
    assert not list(tmp_path.glob("a.pt*"))


@pytest.mark.parametrize("value, shown", [("false", False), ("0", False), ("1", True)])
def test_debug_shows_a_traceback_where_it_is_on(tmp_path, monkeypatch, value, shown):
    monkeypatch.setenv("DEBUG", value)
    error = ValueError if shown else SystemExit
    with pytest.raises(error):
        call("sft", init=tmp_path / "none.pt")


def test_error_begins_a_line_of_its_own(world, tmp_path):
    """Not glued to the end of a progress bar."""
    said = tmp_path / "said"
    words = words_of("sft", world, tmp_path / "a.pt")

    def broken():
        raise ValueError("boom")

    assert ran(lambda: (at_call(common.Log, "healthy", 3, broken), call("sft", *words)), said) == 2
    assert re.search(r"\n\S+: error: boom\n", said.read_text())
