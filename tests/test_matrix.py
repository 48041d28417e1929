"""matrix.sh and runs/*.sh with stand-ins for the programs: what is run, skipped, stopped, resumed.

The real programs are run by runs/smoke.sh, in .ci/run.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import ROOT


@pytest.fixture
def shell(tmp_path):
    """run(script, **environment) -> (status, stdout, stderr); commands(): what it has called."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.mkdir()
    for name in ("python", "torchrun"):
        path = programs / name
        path.write_text(f"#!{sys.executable} -SE\n{(ROOT / 'tests/stand_in.py').read_text()}")
        path.chmod(0o755)
    folders = {"OUT": tmp_path / "ckpt", "DATA": tmp_path / "data" / "toy"}

    def start(*command, **more):
        env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": calls}
        env = {name: str(value) for name, value in (env | folders | more).items()}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(["bash", *command], cwd=ROOT, env=env, **pipes)

    def run(*command, **more):
        process = start(*command, **more)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def commands():
        """(script, words, flags) of each call since the last time, in order."""
        found = []
        for path in sorted(calls.glob("*.json")):
            script, words, flags, threads = json.loads(path.read_text())
            assert threads == "1"
            found.append((script, words, flags))
            path.unlink()
        return found

    return SimpleNamespace(start=start, run=run, commands=commands, folder=tmp_path, calls=calls)


def count(commands) -> dict[str, int]:
    return dict(Counter(script for script, _, _ in commands))


# ------------------------------------------------------------------------- what matrix.sh runs


def test_the_default_experiment(shell):
    status, out, err = shell.run("matrix.sh")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=1, pretrain=1, eval=19, rl=9, sft=6, mix=3)
    assert [
        script for script, _, _ in (*commands[:2], commands[-1])
    ] == "prepare pretrain eval".split()
    assert commands[-1][2] == {"report": str(shell.folder / "ckpt/results")}
    trained = {
        Path(flags["out"]).stem: flags for script, _, flags in commands[2:] if "out" in flags
    }
    expected = ("rl", "sft", "sft-rl", "sft-gold", "sft-gold-rl", "mix")
    steps = (1367, 2393, 3418)
    assert trained.keys() == {f"step{step}-{name}-s100" for step in steps for name in expected}
    assert all(flags["seed"] == "100" and "resume" in flags for flags in trained.values())
    for name, flags in trained.items():
        start = (
            name.replace("-rl-s", "-s") if "sft" in name and "-rl" in name else name.split("-")[0]
        )
        assert Path(flags["init"]).stem == start
        assert flags.get("lr") == {"sft-gold": "4e-3", "sft-gold-rl": "7.5e-5"}.get(name[9:-5])
    asked = [(words, flags) for script, words, flags in commands[:-1] if script == "eval"]
    for _, flags in asked:
        validation = flags.get("shots") and "shot_seed" not in flags
        assert flags["final"] == ("false" if validation else "true")
        assert flags["text"] == str(shell.folder / "data/toy-p10")
    evaluated = Counter(Path(path).stem for words, _ in asked for path in words)
    bases = {f"step{step}": 2 for step in steps}  # on validation questions, and with drawn shots
    assert evaluated == Counter(dict.fromkeys(trained, 1) | bases)
    lines = [line for line in out.splitlines() if re.match(r"\d+/18  p10/step", line)]
    assert len(lines) == 18 and "min in, about" in lines[3]


def test_another_seed_shares_the_pretraining(shell):
    shell.run("matrix.sh")
    shell.commands()
    status, out, _ = shell.run("matrix.sh", SEED=102)
    assert status == 0 and "18 cells, 3 finished before" in out  # val
    outs = [flags["out"] for script, _, flags in shell.commands() if script == "rl"]
    assert len(outs) == 9 and all(out.endswith("-s102.pt") for out in outs)


def test_what_is_finished_is_skipped(shell):
    shell.run("matrix.sh")
    shell.commands()
    status, out, _ = shell.run("matrix.sh")
    assert status == 0 and "18 cells, 18 finished before" in out
    assert count(shell.commands()) == dict(prepare=1, pretrain=1, eval=1)
    (shell.folder / "ckpt/results/p10/step2393-sft-rl-s100.jsonl").unlink()
    status, out, _ = shell.run("matrix.sh")
    assert status == 0 and "18 cells, 17 finished before" in out
    assert [script for script, _, _ in shell.commands()[2:]] == ["sft", "rl", "eval", "eval"]


def test_blanks_quotes_and_umlauts_in_paths(shell):
    odd = shell.folder / "a b'c\"d äöü $x"
    folders = dict(OUT=odd / "out", DATA=odd / "data x", RESULTS=odd / "rows *")
    for finished in (0, 18):
        status, out, err = shell.run("matrix.sh", **folders)
        assert (status, err) == (0, "") and f"18 cells, {finished} finished before" in out
    assert len(list((odd / "rows */p10").glob("*.jsonl"))) == 24
    assert {path.name for path in shell.folder.iterdir()} == {"bin", "calls", odd.name}


def test_a_variant_by_flags_is_one_line(shell):
    line = "p10/step3418 100 rl --std_norm --recipe rl-std"
    script = shell.folder / "mine.sh"
    script.write_text(
        f"source ./matrix.sh\npretrain p10 x 10\neach cell '{line}' 'p10/step3418 100 rl'"
    )
    status, _, err = shell.run(script)
    assert (status, err) == (0, "")
    runs = {flags["out"]: flags for script, _, flags in shell.commands() if script == "rl"}
    assert len(runs) == 2  # none overwrites the other
    variant = next(flags for flags in runs.values() if "std_norm" in flags)
    assert variant["recipe"] == "rl-std" and "finished" not in err


# -------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("recipe", ["rk", "rl-n5"])
def test_an_unknown_recipe_is_an_error(shell, recipe):
    status, out, err = shell.run("-c", f'source ./matrix.sh; each cell "p10/step9 100 {recipe}"')
    assert status == 1 and "1/1" not in out
    assert f"no recipe {recipe}" in err


def test_a_cell_that_fails_stops_the_matrix(shell):
    """So does what runs beside it; the last lines of its log are shown."""
    status, out, err = shell.run("matrix.sh", FAILING="mix", SLOW="3418-sft-s100")
    assert status == 1
    assert "p10/step3418 100 mix failed" in err and "mix.py: error: no luck today" in err
    commands = shell.commands()
    assert not any(script == "eval" and "report" in flags for script, _, flags in commands)
    assert not any("step2393-rl" in str(flags) for _, _, flags in commands)
    nothing_is_left(shell, 1)
    status, out, _ = shell.run("matrix.sh")
    assert status == 0 and "18 cells, 3 finished before" in out


@pytest.mark.parametrize("failing", ["prepare", "pretrain", "report"])
def test_a_stage_that_fails_stops_the_matrix(shell, failing):
    status, _, err = shell.run("matrix.sh", FAILING=failing)
    assert status != 0 and "no luck today" in err
    expected = dict(prepare=["prepare"], pretrain=["prepare", "pretrain"]).get(failing)
    assert not expected or list(count(shell.commands())) == expected


@pytest.mark.parametrize(
    "wrong", [{"SEED": "two"}, {"SEED": "-1"}, {"SEED": "08"}, {"JOBS": "0"}, {"JOBS": "two"}]
)
def test_wrong_settings_are_one_line(shell, wrong):
    refused(shell, "matrix.sh", *wrong, **wrong)


@pytest.mark.parametrize("script", ["record", "explain"])
def test_wrong_settings_of_the_other_scripts(shell, script):
    refused(shell, f"runs/{script}.sh", "RECORD", RECORD="a[$(touch x)]")


def test_gsm8k_wants_its_source(shell):
    refused(shell, "runs/gsm8k.sh", "SOURCE")


def refused(shell, script, *named, **more):
    status, out, err = shell.run(script, **more)
    assert status == 2 and not out and len(err.splitlines()) == 1
    assert all(name in err for name in (Path(script).name, *named))
    assert not shell.commands()


def test_no_python(shell):
    programs = shell.folder / "few"
    programs.mkdir()
    for name in ("bash", "dirname", "basename"):
        (programs / name).symlink_to(shutil.which(name))
    refused(shell, "matrix.sh", "python", PATH=programs)


# -------------------------------------------------------------------------- signals


def nothing_is_left(shell, saved: int):
    """All stand-ins that were at work have had the time to save, and are gone."""
    for path in shell.calls.glob("slow-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.partition("-")[2]), 0)
    assert len(list(shell.calls.glob("saved-*"))) == len(list(shell.calls.glob("slow-*"))) == saved


@pytest.mark.parametrize("number, status", [("INT", 130), ("TERM", 143), ("HUP", 129)])
@pytest.mark.parametrize("slow, running", [("-rl-s100", 2), ("pretrain", 1)])
def test_a_signal_leaves_nothing_running(shell, number, status, slow, running):
    process = shell.start("matrix.sh", SLOW=slow)
    for _ in range(600):
        if len(list(shell.calls.glob("slow-*"))) == running:
            break
        time.sleep(0.05)
    process.send_signal(getattr(signal, f"SIG{number}"))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, "")
    nothing_is_left(shell, running)
    shell.commands()
    status, out, err = shell.run("matrix.sh")
    assert (status, err) == (0, "")
    assert len(shell.commands()) == (39 if slow == "pretrain" else 37)  # val and base were there


def test_a_killed_matrix_goes_on(shell):
    process = shell.start("matrix.sh", SLOW="step2393-mix")
    for _ in range(600):
        if any(shell.calls.glob("slow-*")):
            break
        time.sleep(0.05)
    process.kill()
    for path in shell.calls.glob("slow-*"):  # what SIGKILL leaves behind
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name.partition("-")[2]), signal.SIGKILL)
        path.unlink()
    process.communicate()  # ends with the last of its cells, which hold the pipes
    shell.commands()
    status, out, _ = shell.run("matrix.sh")
    finished = int(re.search(r"18 cells, (\d+) finished", out)[1])
    assert status == 0 and 6 <= finished < 18
    assert len(list((shell.folder / "ckpt/results/p10").glob("*.jsonl"))) == 24


# -------------------------------------------------------------------------- runs/


def test_a_record(shell):
    status, out, err = shell.run("runs/record.sh", JOBS=4)
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=8, pretrain=14, eval=231, rl=140, sft=40, mix=48)
    rows = {path.stem for path in (shell.folder / "ckpt/results").rglob("*.jsonl")}
    for run, seeds in (("p10", range(100, 116, 2)), ("p11", range(101, 116, 2))):
        found = {path.stem for path in (shell.folder / "ckpt/results" / run).glob("*.jsonl")}
        for step in (2393, 3418):  # twice the seeds of the others
            assert {f"step{step}-rl-s{seed}" for seed in seeds} <= found
    for name in ("rl-hard", "rl-n5-split-easy", "rl-n64-split-hard", "mix-text", "sft-gold"):
        assert f"step2393-{name}-s100" in rows or f"step3418-{name}-s100" in rows
    hard = [flags for script, _, flags in commands if flags.get("max_new") == "84"]
    assert {flags["questions"] for flags in hard} == {
        str(shell.folder / f"data/toy-p{run}/hard") for run in (10, 11)
    }  # those of the other worlds and sizes, too
    status, out, _ = shell.run("runs/record.sh")
    assert status == 0 and {script for script, _, _ in shell.commands()} == {
        "prepare",
        "pretrain",
        "eval",
    }
    assert out.count(" finished before") == 4 and not re.search(r"\n\d+/\d+ ", out)


def test_the_second_record_has_other_seeds_models_and_questions(shell):
    status, _, _ = shell.run("runs/record.sh", RECORD=2, SEEDS=2, JOBS=4)
    commands = shell.commands()
    assert status == 0 and {
        int(flags["seed"]) for script, _, flags in commands if script in ("rl", "sft", "mix")
    } == {200, 201, 202, 203}
    assert {
        flags["seed"] for script, _, flags in commands if script == "prepare" and "seed" in flags
    } == {"20", "21"}


def test_a_sweep_opens_no_test_questions(shell):
    status, _, err = shell.run("runs/sweep.sh", JOBS=4)
    commands = shell.commands()
    assert (status, err) == (0, "")
    assert count(commands) == dict(prepare=2, pretrain=2, eval=39, rl=18, sft=24, mix=6)
    assert not any(flags.get("final") == "true" for _, _, flags in commands)
    rates = {flags.get("lr") for script, _, flags in commands if script == "rl"}
    assert rates == {"1.5e-4", "7.5e-5", "3e-4", "6e-4"}


def test_what_explains_a_record(shell):
    status, _, err = shell.run("runs/explain.sh", JOBS=4)
    commands = shell.commands()
    assert (status, err) == (0, "")
    assert not any(flags.get("final") == "true" for _, _, flags in commands)
    assert {
        flags["limit"] for script, _, flags in commands if script == "rl" and "limit" in flags
    } == {"50", "100", "200"}
    assert len([1 for script, _, flags in commands if flags.get("n") == "256"]) == 8
    assert shell.run("runs/explain.sh")[1].count("100% ") == 0
    assert {script for script, _, _ in shell.commands()} == {"prepare", "pretrain", "eval"}


def test_gsm8k(shell):
    (shell.folder / "source x/gsm8k").mkdir(parents=True)
    status, _, err = shell.run("runs/gsm8k.sh", SOURCE=shell.folder / "source x")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=2, pretrain=1, eval=11, rl=6, sft=4, mix=2)


def test_the_paper(shell):
    """All of its commands are in its plan, in test_rehearsal.py; here are two checkpoints."""
    more = dict(SOURCE="s p", FEW_SHOT="f s", STEPS="1000 22000")
    status, _, err = shell.run("runs/paper.sh", **more)
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=6, pretrain=3, eval=59, rl=38, sft=22, mix=10)
    read = [flags["questions"] for script, _, flags in commands if script == "rl"]
    assert sum(path.endswith("gsm8k") for path in read) == 3 * (4 + 1)  # 4 seeds early, then 1
    rows = shell.folder / "ckpt/results"
    assert {path.name for path in rows.iterdir()} == {"gsm8k", "math", "split-easy", "split-hard"}
    status, out, _ = shell.run("runs/paper.sh", **more)
    assert status == 0 and not re.search(r"\n\d+/\d+ ", out)


def test_parts_of_the_paper_that_are_not_asked_for_are_not_run(shell):
    off = dict(MATH="0", MORE_MATH="0", LARGER="0", ROLLOUTS="0")
    status, _, err = shell.run("runs/paper.sh", STEPS="1000", EARLY_SEEDS="1", **off)
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=3, pretrain=1, eval=6, rl=3, sft=2, mix=1)
    told = str(commands)
    assert "4b" not in told and "dolmino-math" not in told and "'math'" not in told
    status, _, err = shell.run("runs/paper.sh", MATH="0")
    assert status == 2 and "ROLLOUTS" in err and len(err.splitlines()) == 1


def test_less_text_is_less_math_text(shell):
    shell.run("runs/paper.sh", STEPS="1000", TOKENS="2500000000", LARGER="0", ROLLOUTS="0")
    commands = shell.commands()
    assert [flags["extra"] for _, _, flags in commands if "extra" in flags] == ["math=500000000"]
    tokens = [flags["tokens"] for script, _, flags in commands if script == "pretrain"]
    assert tokens == ["2500000000", "3000000000"]


def test_the_speedrun(shell):
    status, out, err = shell.run("runs/speedrun.sh")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=3, pretrain=1, eval=13, rl=6, sft=3, mix=3)
    (whole,) = [flags for script, _, flags in commands if script == "pretrain"]
    assert (whole["tokens"], whole["stop"]) == ("50000000000", "3000")
    assert (whole["preset"], whole["save_steps"]) == ("1b", "1000,2000,3000")
    text = [flags["tokens"] for script, _, flags in commands[:3] if "tokens" in flags]
    assert text == ["6400000000"]  # not the text of 50B
    assert 3000 * 2_097_152 < 6.4e9
    for script, _, flags in commands:
        if script in ("rl", "mix"):
            assert (flags["group"], flags["steps"]) == ("5", "600")
    assert "3.8         15.6   19.9" in out
    assert shell.run("runs/speedrun.sh")[0] == 0
    assert count(shell.commands()) == dict(prepare=3, pretrain=1, eval=1)


def test_the_switches_of_the_speedrun(shell):
    status, _, err = shell.run("runs/speedrun.sh", MORE_MATH="1", LARGER="1", STEPS="1000")
    assert (status, err) == (0, "")
    pretrained = [flags for script, _, flags in shell.commands() if script == "pretrain"]
    assert [flags["stop"] for flags in pretrained] == ["1000"] * 3
    assert [flags["preset"] for flags in pretrained] == ["1b", "1b", "4b"]


def test_public_checkpoints(shell):
    status, _, err = shell.run("runs/public.sh", STEPS="1000 2000")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=2, hf=2, eval=9, rl=6, sft=2, mix=2)
    assert commands[2][2]["revision"] == "stage1-step1000-tokens3B"
    first = [flags for script, _, flags in commands[:6] if script == "rl"]
    assert [(flags["steps"], flags["eval_questions"]) for flags in first] == [("1", "0")] * 2
    assert not any(Path(flags["out"]).exists() for flags in first)  # 6 GB each
    assert shell.run("runs/public.sh", STEPS="1000 2000")[0] == 0
    assert count(shell.commands()) == dict(prepare=2, eval=1)


def test_a_public_checkpoint_that_is_never_right_stops_the_script(shell):
    """Before anything that takes hours, with the ways out; which then work."""
    status, out, err = shell.run("runs/public.sh", STEPS="1000 2000", CORRECT="0.0")
    assert status == 2 and len(err.splitlines()) == 1 and "public.sh: error: " in err
    assert "step1000" in err and "SHOTS=4" in err and "sft-rl" in err and "sample.py --log" in err
    assert count(shell.commands()) == dict(prepare=2, hf=1, rl=1)
    again, _, same = shell.run("runs/public.sh", STEPS="1000 2000", CORRECT="0.0")
    assert (again, same) == (2, err)
    assert count(shell.commands()) == dict(prepare=2)  # what is known is not sampled again
    how = dict(STEPS="1000", RECIPES="as-is sft-rl mix", CORRECT="0.0")
    assert shell.run("runs/public.sh", **how)[::2] == (0, "")
    assert count(shell.commands()) == dict(prepare=2, eval=4, sft=1, rl=1, mix=1)
    assert shell.run("runs/public.sh", STEPS="1000", SHOTS="4")[::2] == (0, "")
    shots = [flags.get("shots") for script, _, flags in shell.commands() if script == "rl"]
    assert shots == ["4", "4"]


def test_first_answers_that_could_not_be_sampled_stop_the_script(shell):
    status, _, err = shell.run("runs/public.sh", STEPS="1000", FAILING="('steps', '1')")
    assert status == 1 and "no luck today" in err
    assert "rl" in count(shell.commands()) and not list(shell.folder.rglob("*mix*"))


def test_smoke_is_a_record_with_small_numbers(shell):
    status, _, err = shell.run("runs/smoke.sh")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert {"prepare", "pretrain", "eval", "rl", "sft", "mix"} == count(commands).keys()
    assert all(
        int(flags["steps"]) <= 4 for script, _, flags in commands if script in ("rl", "sft", "mix")
    )
    assert all(int(flags["tokens"]) < 1e5 for script, _, flags in commands if script == "pretrain")
    recipes = {
        re.sub(r".*?step\d+-(.*)-s\d+.*", r"\1", flags.get("out", "")) for _, _, flags in commands
    }
    assert {
        "rl-n5-split-easy",
        "text",
        "rl-text",
        "mix-text",
        "sft-gold-rl",
        "mix--share-0.1",
    } <= recipes
