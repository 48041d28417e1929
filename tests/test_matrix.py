"""matrix.sh and runs/*.sh with stand-ins for the programs: what is run, skipped, stopped, resumed.

The real programs are run by runs/smoke.sh, in .ci/run.
"""

import contextlib
import importlib
import itertools
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

import common
from data import prepare
from helpers import ROOT


@pytest.fixture
def shell(tmp_path):
    return shell_in(tmp_path)


def shell_in(folder):
    """run(script, **environment) -> (status, stdout, stderr); commands(): what it has called."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    calls.mkdir()
    for name in ("python", "torchrun"):
        path = programs / name
        path.write_text(f"#!{sys.executable} -SE\n{(ROOT / 'tests/stand_in.py').read_text()}")
        path.chmod(0o755)
    folders = {"OUT": folder / "ckpt", "DATA": folder / "data" / "toy"}

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

    return SimpleNamespace(start=start, run=run, commands=commands, folder=folder, calls=calls)


TRAINERS = ("sft", "rl", "mix")


def default(name) -> list[str]:
    """The words of a setting, as the scripts have it: numbers change, what is run does not."""
    text = "".join((ROOT / path).read_text() for path in ("matrix.sh", "runs/record.sh"))
    return re.search(rf"\b{name}=.*?:-([\d ]+)}}", text)[1].split()


SAVED = default("SAVED")  # steps of the checkpoints
LAST, EARLY = default("CHECKPOINTS")
FIRST, MIDDLE = SAVED[0], SAVED[len(SAVED) // 2]
(QUESTIONS,), (MANY,), (FEW,) = default("QUESTIONS"), default("MANY"), default("FEW")


def count(commands) -> dict[str, int]:
    return dict(Counter(script for script, _, _ in commands))


def understood(commands):
    """The real programs know these flags and take their values."""
    for script, words, flags in commands:
        if script == "prepare":
            Config, words = prepare.COMMANDS[words[0]][0], words[1:]
        else:
            Config = importlib.import_module(script).Config
        common.parse_flags(Config, [*words, *(f"--{name}={flags[name]}" for name in flags)])


def models_of(command) -> tuple[str, ...]:
    """The pre-trained models that a command names: p30 -> ("30",)."""
    _, words, flags = command
    return tuple(sorted({*re.findall(r"\bp(\d\d)\b", " ".join([*words, *flags.values()]))}))


# ------------------------------------------------------------------------- what matrix.sh runs


def test_the_default_experiment(shell):
    status, out, err = shell.run("matrix.sh")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert count(commands) == dict(prepare=1, pretrain=1, eval=11, rl=4, sft=2, mix=2)
    assert [
        script for script, _, _ in (*commands[:2], commands[-1])
    ] == "prepare pretrain eval".split()
    assert commands[-1][2] == {"report": str(shell.folder / "ckpt/results")}
    trained = {
        Path(flags["out"]).stem: flags for script, _, flags in commands[2:] if "out" in flags
    }
    steps = (EARLY, LAST)
    names = ("rl", "sft", "sft-rl", "mix")
    assert trained.keys() == {f"step{step}-{name}-s30" for step in steps for name in names}
    assert all(flags["seed"] == "30" and "resume" in flags for flags in trained.values())
    assert {flags["limit"] for flags in trained.values()} == {QUESTIONS}
    for name, flags in trained.items():
        start = name.replace("-rl-s", "-s") if "-sft-rl" in name else name.split("-")[0]
        assert Path(flags["init"]).stem == start
    assert commands[1][2]["save_steps"].split(",") == SAVED and {*steps} <= {*SAVED}
    asked = [(words, flags) for script, words, flags in commands[:-1] if script == "eval"]
    for _, flags in asked:
        validation = flags.get("shots") and "shot_seed" not in flags
        assert flags["final"] == ("false" if validation else "true")
        assert flags["text"] == str(shell.folder / "data/toy-p30")
    evaluated = Counter(Path(path).stem for words, _ in asked for path in words)
    bases = {f"step{step}": 2 for step in steps}  # on validation questions, and with drawn shots
    assert evaluated == Counter(dict.fromkeys(trained, 1) | bases)
    lines = [line for line in out.splitlines() if re.match(r"\d+/8  p30/step", line)]
    assert len(lines) == 8 and "min in, about" in lines[3]


def test_another_run_shares_nothing(shell):
    """Neither text, questions and weights nor the seeds."""
    shell.run("matrix.sh")
    shell.commands()
    status, out, _ = shell.run("matrix.sh", RUN=31)
    assert status == 0 and "8 cells, 0 finished before" in out
    commands = shell.commands()[:-1]
    assert {flags["seed"] for script, _, flags in commands if script != "eval"} == {"31"}
    assert {models_of(command) for command in commands} == {("31",)}


def test_what_is_finished_is_skipped(shell):
    shell.run("matrix.sh")
    shell.commands()
    status, out, _ = shell.run("matrix.sh")
    assert status == 0 and "8 cells, 8 finished before" in out
    assert count(shell.commands()) == dict(prepare=1, pretrain=1, eval=1)
    (shell.folder / f"ckpt/results/p30/step{EARLY}-sft-rl-s30.jsonl").unlink()
    status, out, _ = shell.run("matrix.sh")
    assert status == 0 and "8 cells, 7 finished before" in out
    assert [script for script, _, _ in shell.commands()[2:]] == ["sft", "rl", "eval", "eval"]


def test_without_the_test_questions_a_base_is_measured_once(shell):
    """On validation questions, as all that is tuned: twice would be two rows of one place."""
    status, _, err = shell.run("matrix.sh", FINAL="false")
    assert (status, err) == (0, "")
    asked = [(words, flags) for script, words, flags in shell.commands() if script == "eval"][:-1]
    assert {flags["final"] for _, flags in asked} == {"false"}
    evaluated = Counter(Path(path).stem for words, _ in asked for path in words)
    assert len(evaluated) == 10 and set(evaluated.values()) == {1}


def test_blanks_quotes_and_umlauts_in_paths(shell):
    odd = shell.folder / "a b'c\"d äöü $x"
    folders = dict(OUT=odd / "out", DATA=odd / "data x", RESULTS=odd / "rows *")
    for finished in (0, 8):
        status, out, err = shell.run("matrix.sh", **folders)
        assert (status, err) == (0, "") and f"8 cells, {finished} finished before" in out
    assert len(list((odd / "rows */p30").glob("*.jsonl"))) == 12
    assert {path.name for path in shell.folder.iterdir()} == {"bin", "calls", odd.name}


def test_a_variant_by_flags_is_one_line(shell):
    line = f"p30/step{LAST} 30 rl --std_norm --recipe rl-std"
    script = shell.folder / "mine.sh"
    script.write_text(
        f"source ./matrix.sh\npretrain p30 x 30\neach cell '{line}' 'p30/step{LAST} 30 rl'"
    )
    status, _, err = shell.run(script)
    assert (status, err) == (0, "")
    runs = {flags["out"]: flags for script, _, flags in shell.commands() if script == "rl"}
    assert len(runs) == 2  # none overwrites the other
    variant = next(flags for flags in runs.values() if "std_norm" in flags)
    assert variant["recipe"] == "rl-std" and "finished" not in err


def test_the_last_checkpoint_is_the_end_of_pretraining():
    """And there is text for it."""
    cfg = importlib.import_module("pretrain").Config
    assert int(SAVED[-1]) == round(cfg.tokens / cfg.batch_tokens)
    assert SAVED[-1] == LAST and prepare.Toy.tokens > cfg.tokens


# -------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("recipe", ["rk", "rl-n5"])
def test_an_unknown_recipe_is_an_error(shell, recipe):
    status, out, err = shell.run("-c", f'source ./matrix.sh; each cell "p30/step9 30 {recipe}"')
    assert status == 1 and "1/1" not in out
    assert f"no recipe {recipe}" in err


def test_a_cell_that_fails_stops_the_matrix(shell):
    """So does what runs beside it; the last lines of its log are shown."""
    status, out, err = shell.run("matrix.sh", FAILING="'0,1'", SLOW=f"{LAST}-sft-s30")
    assert status == 1
    assert f"p30/step{LAST} 30 base failed" in err and "eval.py: error: no luck today" in err
    commands = shell.commands()
    assert not any(script == "eval" and "report" in flags for script, _, flags in commands)
    assert not any(f"step{EARLY}-mix" in str(flags) for _, _, flags in commands)
    nothing_is_left(shell, 1)
    status, out, _ = shell.run("matrix.sh")
    assert status == 0 and "8 cells, 2 finished before" in out


@pytest.mark.parametrize("failing", ["prepare", "pretrain", "report"])
def test_a_stage_that_fails_stops_the_matrix(shell, failing):
    status, _, err = shell.run("matrix.sh", FAILING=failing)
    assert status != 0 and "no luck today" in err
    expected = dict(prepare=["prepare"], pretrain=["prepare", "pretrain"]).get(failing)
    assert not expected or list(count(shell.commands())) == expected


@pytest.mark.parametrize(
    "wrong", [{"RUN": "two"}, {"RUN": "-1"}, {"RUN": "08"}, {"JOBS": "0"}, {"JOBS": "two"}]
)
def test_wrong_settings_are_one_line(shell, wrong):
    refused(shell, "matrix.sh", *wrong, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"MODELS": "a[$(touch x)]"},
        {"MODELS": "30,31"},
        {"SEEDED": "two"},
        {"MANY": "*"},
        {"FEW": "x"},
    ],
)
def test_wrong_settings_of_a_record(shell, wrong):
    refused(shell, "runs/record.sh", *wrong, **wrong)


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
@pytest.mark.parametrize("slow, running", [("-rl-s30", 2), ("pretrain", 1)])
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
    assert len(shell.commands()) == (21 if slow == "pretrain" else 19)  # mix was there


def test_a_killed_matrix_goes_on(shell):
    process = shell.start("matrix.sh", SLOW=f"step{LAST}-rl")
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
    finished = int(re.search(r"8 cells, (\d+) finished", out)[1])
    assert status == 0 and 2 <= finished < 8
    assert len(list((shell.folder / "ckpt/results/p30").glob("*.jsonl"))) == 12


# -------------------------------------------------------------------------- runs/


def rows_in(folder) -> set[str]:
    """The lines of all the rows below a folder."""
    return {line for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()}


@pytest.fixture(scope="module")
def record_run(tmp_path_factory):
    """A record of two models, one of them with more seeds: what it has called, and its rows."""
    shell = shell_in(tmp_path_factory.mktemp("record"))
    how = dict(MODELS="30 31", SEEDED=1, KEPT=shell.folder / "kept/rows.jsonl", JOBS=4, LONGER="")
    status, _, err = shell.run("runs/record.sh", **how)
    assert (status, err) == (0, "")
    commands = shell.commands()
    shutil.copytree(shell.folder, copy := tmp_path_factory.mktemp("copy") / "record")
    return SimpleNamespace(how=how, commands=commands, kept=how["KEPT"], shell=shell, copy=copy)


@pytest.fixture
def recorded(record_run):
    """record_run, with its folder as the record left it."""
    shutil.rmtree(record_run.shell.folder)
    shutil.copytree(record_run.copy, record_run.shell.folder)
    return record_run


def test_a_record(recorded):
    """Part by part, model by model: the second part, more seeds, has one model, the others both."""
    shell = recorded.shell
    commands = recorded.commands
    understood(commands)
    runs = [models for models, _ in itertools.groupby(map(models_of, commands[:-1]))]
    assert runs == 5 * [("30",), ("31",)]  # the second part runs into the third
    report = commands[-1]
    assert report[0] == "eval" and report[2] == {"report": str(recorded.kept.parent)}
    trained = Counter(flags["out"] for script, _, flags in commands if script in TRAINERS)
    assert set(trained.values()) == {1}, "two cells make the same checkpoint"
    names = {path.removeprefix(f"{shell.folder}/ckpt/") for path in trained}
    for run in (30, 31):
        for step in SAVED:
            for recipe in ("rl", "sft", "sft-rl", "mix", "sft-gold"):
                assert f"p{run}/step{step}-{recipe}-s{run}.pt" in names
        for step in (MIDDLE, LAST):
            for recipe in ("sft-gold-rl", "sft-many", "sft-rl-many--steps-600"):
                assert f"p{run}/step{step}-{recipe}-s{run}.pt" in names
        for level, count in itertools.product(("easy", "hard"), (5, 64)):
            assert f"p{run}/step{LAST}-rl-n{count}-split-{level}-s{run}.pt" in names
        for model in (f"p{run}", f"p{run}-math60", f"p{run}-large"):
            assert f"{model}/step{LAST}-rl-hard--steps-600-s{run}.pt" in names
    seeds = {name for name in names if f"step{MIDDLE}-rl-s" in name}
    assert seeds == {f"p30/step{MIDDLE}-rl-s{seed}.pt" for seed in (30, *range(3001, 3008))} | {
        f"p31/step{MIDDLE}-rl-s31.pt"
    }
    hard = {flags["questions"] for _, _, flags in commands if "/hard" in str(flags)}
    assert hard == {str(shell.folder / f"data/toy-p{run}/hard") for run in (30, 31)}
    # the name of the SFT comes before that of the RL: "sft-1600-questions->rl-1600-questions"
    recipes = {flags["recipe"] for _, _, flags in commands if "recipe" in flags}
    sizes = {f"{stage}-{FEW}-questions" for stage in ("rl", "sft")}
    assert recipes == {f"{stage}-{MANY}-questions" for stage in TRAINERS} | sizes
    limits = Counter(flags.get("limit", "") for script, _, flags in commands if script in TRAINERS)
    assert limits.keys() == {QUESTIONS, MANY, FEW}
    # two models, two checkpoints, 100 questions: rl, sft; 1,600: rl, sft, sft->rl, mix
    assert (limits[FEW], limits[MANY]) == (2 * 2 * 2, 2 * 2 * 4)
    for flags in (flags for script, _, flags in commands if script in TRAINERS):
        size = re.search(r"\d+", flags.get("recipe", QUESTIONS))[0]
        assert flags["limit"] == size, flags["out"]


def test_a_record_measures_the_base_on_the_questions_that_it_divides(recorded):
    """After they are divided, and before RL on them; its rows are beside those of the base."""
    shell = recorded.shell
    asked = [
        (i, words, flags)
        for i, (script, words, flags) in enumerate(recorded.commands)
        if script == "eval" and "split-easy," in flags.get("questions", "")
    ]
    assert len(asked) == 2
    for (i, words, flags), run in zip(asked, (30, 31), strict=True):
        assert words == [f"{shell.folder}/ckpt/p{run}/step{LAST}.pt"]
        split = f"{shell.folder}/data/toy-p{run}-pool-split"
        assert flags["questions"] == f"{split}/split-easy,{split}/split-hard"
        assert (flags["shots"], flags["shot_seed"], flags["final"]) == ("0", str(run), "true")
        assert flags["tasks"] == "" and flags["results"] == f"{shell.folder}/ckpt/results/p{run}"
        divided, (script, words, _) = (recorded.commands[at] for at in (i - 1, i - 1))
        # a file more in the pool, and prepare.py would refuse it when the record goes on
        pool = Path(divided[2]["questions"]).parent
        assert pool.name == f"toy-p{run}-pool" and pool not in Path(divided[2]["samples"]).parents
        assert divided[2]["out"] == split and (script, words) == ("prepare", ["split"])
        trained = [
            at for at, (_, _, more) in enumerate(recorded.commands)
            if more.get("questions", "").startswith(split) and "init" in more
        ]  # fmt: skip
        assert len(trained) == 4 and min(trained) > i


def test_a_record_that_stopped_between_dividing_and_asking_the_base_asks_it(recorded):
    shell = recorded.shell
    split = f"{shell.folder}/data/toy-p31-pool-split"
    last = f"step{LAST}-rl-n5-split-easy-s31.jsonl"
    (shell.folder / f"ckpt/results/p31/{last}").unlink()
    kept = [line for line in recorded.kept.read_text().splitlines() if last[:-6] not in line]
    recorded.kept.write_text("".join(f"{line}\n" for line in kept))
    Path(split).mkdir(exist_ok=True)
    status, _, err = shell.run("runs/record.sh", **recorded.how)
    assert (status, err) == (0, "")
    asked = [
        flags.get("questions", "") for script, _, flags in shell.commands() if script == "eval"
    ]
    assert f"{split}/split-easy,{split}/split-hard" in asked


def test_what_has_not_converged_goes_on_in_all_models_and_seeds(recorded):
    shell = recorded.shell
    cells = [(MIDDLE, "rl"), (MIDDLE, "sft-rl"), (LAST, "mix --batch 4"), (LAST, "rl"),
             (LAST, "rl-n64-split-hard")]  # fmt: skip
    longer = "; ".join(f"{step} {recipe}" for step, recipe in cells)
    status, _, err = shell.run("runs/record.sh", **recorded.how | dict(LONGER=longer))
    assert (status, err) == (0, "")
    commands = shell.commands()
    understood(commands)
    made = {
        flags["out"].removeprefix(f"{shell.folder}/ckpt/"): (script, flags)
        for script, _, flags in commands
        if script in ("rl", "mix")
    }
    names = [
        f"step{step}-{recipe}".replace(" --", "--").replace(" ", "-") for step, recipe in cells
    ]
    expected = {f"p{m}/{name}--steps-600-s{m}.pt" for m in (30, 31) for name in names}
    expected |= {f"p30/step{MIDDLE}-rl--steps-600-s{seed}.pt" for seed in range(3001, 3008)}
    assert made.keys() == expected
    for script, flags in made.values():
        assert flags["steps"] == "600" and flags.get("batch") == ("4" if script == "mix" else None)
        assert "recipe" not in flags and flags["limit"] == QUESTIONS
    lines = recorded.kept.read_text().splitlines()
    assert {*lines} == rows_in(shell.folder / "ckpt/results")
    status, _, err = shell.run("runs/record.sh", **recorded.how | dict(LONGER=longer))
    assert (status, err) == (0, "") and count(shell.commands()) == dict(eval=1)  # the report
    assert recorded.kept.read_text().splitlines() == lines


def test_a_record_keeps_each_row_once(recorded):
    shell = recorded.shell
    lines = recorded.kept.read_text().splitlines()
    assert lines == sorted({*lines}) and {*lines} == rows_in(shell.folder / "ckpt/results")
    checkpoints = {json.loads(line)["checkpoint"] for line in lines}
    assert len(checkpoints) > 60
    assert [path.name for path in recorded.kept.parent.iterdir()] == [recorded.kept.name]


def test_a_record_runs_only_what_has_no_kept_rows(recorded):
    """On another machine, too, which has the kept rows and nothing else."""
    shell = recorded.shell
    shutil.rmtree(shell.folder / "ckpt")
    lines = recorded.kept.read_text().splitlines()
    status, out, _ = shell.run("runs/record.sh", **recorded.how)
    assert status == 0 and count(shell.commands()) == dict(eval=1)  # the report
    assert recorded.kept.read_text().splitlines() == lines

    def lacks(line):  # the test rows of a base, whose checkpoint names no seed, and of an arm
        row = json.loads(line)
        name = row["checkpoint"].removeprefix(f"{shell.folder}/ckpt/")
        base = (name, row["split"]) == (f"p31/step{FIRST}.pt", "test")
        return base or name == f"p31/step{FIRST}-rl-s31.pt"

    fewer = [line for line in lines if not lacks(line)]
    assert len(fewer) == len(lines) - 2
    recorded.kept.write_text("".join(f"{line}\n" for line in fewer))
    status, out, _ = shell.run("runs/record.sh", **recorded.how)
    commands = shell.commands()
    assert status == 0 and {models_of(command) for command in commands[:-1]} == {("31",)}
    assert count(commands) == dict(prepare=1, pretrain=1, eval=4, rl=1)
    assert f"{5 * len(SAVED)} cells, {5 * len(SAVED) - 2} finished before" in out
    assert recorded.kept.read_text().splitlines() == lines


def test_rows_that_were_left_uncollected_are_kept_by_the_next_run(recorded):
    """Where a run was stopped between its last cell and the collecting."""
    lines = recorded.kept.read_text().splitlines()
    recorded.kept.unlink()
    status, _, err = recorded.shell.run("runs/record.sh", **recorded.how)
    assert (status, err) == (0, "") and count(recorded.shell.commands()) == dict(eval=1)
    assert {*recorded.kept.read_text().splitlines()} == {*lines}


def test_a_record_of_one_model_adds_to_what_is_kept(shell):
    kept = shell.folder / "kept/rows.jsonl"
    kept.parent.mkdir()
    other = '{"checkpoint": "elsewhere/p30/step9.pt", "split": "test"}'
    kept.write_text(f"{other}\n")
    status, _, err = shell.run("runs/record.sh", MODELS="31", KEPT=kept, JOBS=4, LONGER="")
    assert (status, err) == (0, "")
    commands = shell.commands()
    assert {models_of(command) for command in commands[:-1]} == {("31",)}
    assert {*kept.read_text().splitlines()} == {other} | rows_in(shell.folder / "ckpt/results")


def test_a_sweep_opens_no_test_questions(shell):
    status, _, err = shell.run("runs/sweep.sh", JOBS=4)
    commands = shell.commands()
    assert (status, err) == (0, "")
    assert count(commands) == dict(prepare=2, pretrain=2, eval=45, rl=20, sft=28)
    understood(commands)
    assert not any(flags.get("final") == "true" for _, _, flags in commands)
    seeds = {flags["seed"] for script, _, flags in commands if script == "prepare"}
    assert seeds == {"0", "1"}  # not those of a record
    rates = {flags["lr"] for script, _, flags in commands if script == "rl"}
    assert rates == {"7.5e-5", "1.5e-4", "3e-4"}
    # what two tries of sft-rl share is finished before the second one begins
    calls = [(script, flags.get("out"), flags.get("init")) for script, _, flags in commands]
    shared = [out for out, times in Counter(out for _, out, _ in calls).items() if times == 2]
    for out in shared:
        first, second = (i for i, (script, made, _) in enumerate(calls) if made == out)
        assert any(start == out for script, _, start in calls[first:second])
    assert len([out for out in shared if "-sft-s" in out]) == 4


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
    assert text == ["6420000000"]  # not the text of 50B
    assert 3000 * 2_097_152 < 6.42e9
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
    understood(commands)
    assert all(
        int(flags["steps"]) <= 4 for script, _, flags in commands if script in ("rl", "sft", "mix")
    )
    assert all(int(flags["tokens"]) < 1e5 for script, _, flags in commands if script == "pretrain")
    recipes = {
        re.sub(r".*?step\d+-(.*)-s\d+.*", r"\1", flags.get("out", "")) for _, _, flags in commands
    }
    limits = {flags["limit"] for script, _, flags in commands if script in ("rl", "sft", "mix")}
    assert limits == {"16", "32", "64"}  # 100, 400 and 1,600 questions
    expected = "rl-n5-split-easy rl-n64-split-hard sft-gold-rl sft-rl-many--steps-600 mix"
    assert {*expected.split(), "rl-hard--steps-600"} <= recipes
