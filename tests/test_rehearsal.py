"""The paper's experiment, runs/paper.sh, and its beginning, runs/speedrun.sh: their plans, and all
of them with small numbers.

The rehearsal takes real data, a tiny OLMo2 with the cl100k_base vocabulary, and two ranks (slow).
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import problems
from helpers import DATASETS, ROOT, metrics
from model import cosine
from results.findings import decide
from results.rows import RECIPES, Record, read

LINKED = "gsm8k math lambada hellaswag arc piqa openbookqa few_shot".split()
DOLMINO = {
    "dclm": "tinystories_sample.txt",
    "flan": "tinyshakespeare.txt",
    "wiki": "wikitext2_valid.txt",
    "pes2o": "real_analysis.jsonl",
    "stackexchange": "wikitext2_test.txt",
    "math": "open_logic.jsonl",
}
SIZES = dict(MODEL="toy", LARGE="toy-large", GPUS="2", TOKENS="12288", EXTRA="4096", STEPS="2")
# python and torchrun, with more flags behind each command: the last one of a name counts
SMALLER = """#!/usr/bin/env bash
answers="--eval_questions 2 --eval_n 2 --max_new 12 --compile false"
rl="--steps 1 --questions_per_step 2 --group 2"
case "$*" in
  *prepare.py\\ dolmino*) small="--val_share 0.3 --processes 1" ;;
  *prepare.py\\ openmath*) small="--val 4" ;;
  *prepare.py\\ tasks*) small="--limit 8" ;;
  *prepare.py\\ split*) small="--levels 0,64" ;;
  *pretrain.py*) small="--batch_tokens 4096 --length 2048 --warmup 1 --eval_rows 2"
    small+=" --lr 4e-3 --compile false" ;;
  *sft.py*) small="--steps 2 --batch 4 $answers" ;;
  *rl.py*--group\\ *) small="--steps 1 --questions_per_step 2 $answers" ;;
  *rl.py*) small="$rl $answers" ;;
  *mix.py*) small="$rl --batch 4 $answers" ;;
  *eval.py*--report*) small="" ;;
  *eval.py*--n\\ 64*) small="--max_new 12 --compile false" ;;
  *eval.py*) small="--limit 4 --n 4 --k 1,4 --max_new 12 --compile false" ;;
  *) small="" ;;
esac
exec {program} "$@" $small
"""


@pytest.fixture
def cl100k(monkeypatch):
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))


def paper(folder, script="paper", **more) -> str:
    folders = {"OUT": f"{folder}/ckpt", "DATA": f"{folder}/data"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", f"runs/{script}.sh"],
        cwd=ROOT,
        env=os.environ | folders | {"PATH": path} | more,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_plan_runs_nothing_and_adds_up(tmp_path):
    told = paper(tmp_path, PLAN="1")
    assert not any(tmp_path.iterdir())
    lines = told.splitlines()
    commands = [line for line in lines if ".py " in line]
    assert len(commands) == 3 + 197 + 86 + 134 + 42
    assert any("--save_steps 1000,2000,3000,5000,6000" in line for line in commands)
    rl = [line for line in commands if line.startswith("rl.py") and "/gsm8k " in line]
    assert len(rl) == 3 * (4 * 4 + 5)  # 4 seeds early, then 1
    priced = [line for line in lines if "FLOPs" in line]
    each, (total,) = priced[: len(commands)], priced[-1:]
    assert total.split()[:2] == ["all", str(len(commands))]
    flops = sum(float(line.split()[0]) for line in each)
    assert float(total.split()[3]) == pytest.approx(flops, rel=0.01)
    assert float(total.split()[3]) == pytest.approx(6.38e21, rel=0.01)
    assert float(total.split()[5]) == pytest.approx(8320, rel=0.01)


def test_the_plan_of_the_speedrun(tmp_path):
    """60 GPU hours: 7.5 on eight GPUs, $180 at $3 each."""
    lines = paper(tmp_path, "speedrun", PLAN="1").splitlines()
    assert not any(tmp_path.iterdir())
    commands = [line for line in lines if ".py " in line]
    assert len(commands) == 1 + 3 * (1 + 3 + 2 + 2)
    assert not any("4b" in line or "/math" in line for line in commands)
    (pretrained,) = [line for line in commands if line.startswith("pretrain.py")]
    assert "--stop 3000" in pretrained and "--tokens 50000000000" in pretrained
    (total,) = [line for line in lines if line.startswith("all ")]
    assert float(total.split()[5]) == pytest.approx(60, rel=0.01)
    assert lines[-1].split() == ["rl", "3.8", "15.6", "19.9"]


def test_the_plan_of_an_evening_with_public_checkpoints(tmp_path):
    """With the settings at the top of the script, less than 6 hours of one GPU."""
    text = (ROOT / "runs/public.sh").read_text(encoding="utf-8")
    found = re.findall(r'(GPUS|ONLY|STEPS|RL)=("[^"]+"|\w+)', text.partition("\ncd ")[0])
    settings = {name: value.strip('"') for name, value in found}
    assert settings.keys() == {"GPUS", "ONLY", "STEPS", "RL"}
    lines = paper(tmp_path, "public", PLAN="1", **settings).splitlines()
    commands = [line for line in lines if ".py " in line]
    assert len(commands) == 5 * (1 + 1 + 2 + 3 + 2)  # first answers, base, rl, sft->rl, mix
    (total,) = [line for line in lines if line.startswith("all ")]
    assert 5 < float(total.split()[5]) < 6
    assert not any(tmp_path.iterdir())


# ---- the rehearsal


def rows_of(path, count):
    with gzip.open(DATASETS / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def write_source(folder):
    """What the hub has, from real files.

    DOLMino's six sources, OpenMathInstruct-1's columns, test sets, benchmarks.
    """
    (folder / "dolmino").mkdir(parents=True)
    for source, name in DOLMINO.items():
        link = folder / "dolmino" / f"{source}.{name.split('.')[-1]}.gz"
        link.symlink_to(DATASETS / "pretrain_text" / f"{name}.gz")
    for name in LINKED:
        (folder / name).symlink_to(DATASETS / name)
    solved = []
    for row in rows_of("gsm8k/train.jsonl.gz", 16):
        reasons, _, answer = re.sub("<<[^<>]*>>", "", row["answer"]).rpartition("\n#### ")
        solution = f"{reasons}\nThe answer is \\boxed{{{answer}}}."
        solved.append(("gsm8k", row["question"], answer, solution))
    for row in rows_of("math/train.jsonl.gz", 20):
        answer = re.search(r"\\boxed\{(.*)\}", row["solution"])[1]
        solved.append(("math", row["problem"], answer, row["solution"]))
    (folder / "openmath").mkdir()
    with open(folder / "openmath" / "train.jsonl", "w", encoding="utf-8") as file:
        for row in solved:
            file.writelines(json.dumps(line) + "\n" for line in openmath_rows(*row))


def openmath_rows(dataset, question, answer, solution):
    """Four rows of OpenMathInstruct-1, of which the last two are no right text solutions."""
    row = {"question": question, "expected_answer": answer, "dataset": dataset}
    row["generation_type"] = "without_reference_solution"
    for text, error, right in (
        (solution, "<not_executed>", True),
        (f"Let us see. {solution}", "<not_executed>", True),
        ("By hand: \\boxed{-1}", "<not_executed>", False),
        (f"<llm-code> {solution}", "", True),
    ):
        yield row | {"generated_solution": text, "error_message": error, "is_correct": right}


@pytest.fixture
def sizes(tmp_path, cl100k) -> dict:
    """The environment of a rehearsal: real data, and programs that do little."""
    write_source(tmp_path / "source")
    programs = tmp_path / "bin"
    programs.mkdir()
    module = f"{sys.executable} -m torch.distributed.run"
    for name, program in (("python", sys.executable), ("torchrun", module)):
        (programs / name).write_text(SMALLER.replace("{program}", program))
        (programs / name).chmod(0o755)
    sizes = SIZES | {"SOURCE": f"{tmp_path}/source", "FEW_SHOT": str(DATASETS / "few_shot")}
    sizes["EARLY_SEEDS"] = "1"
    sizes["PATH"] = f"{programs}:{os.environ['PATH']}"
    return sizes


@pytest.mark.slow
def test_all_of_the_speedrun_with_small_numbers(tmp_path, sizes):
    """Stopped after step 2 of 5, with the learning rates of the five."""
    sizes |= dict(TOKENS=str(5 * 4096), TEXT="12288")
    told = paper(tmp_path, "speedrun", **sizes)
    ckpt = tmp_path / "ckpt"
    assert "3.8         15.6   19.9" in told
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"gsm8k", "tasks", "dolmino"}
    assert {path.name for path in ckpt.iterdir()} == {"toy", "results"}

    rates = [lr for _, lr in metrics(ckpt / "toy/step2.pt", "lr") if lr is not None]
    assert rates == [cosine(step, 5, 4e-3, 1) for step in range(2)]
    frame = read(ckpt / "results/gsm8k")[0]
    passed = frame[frame.kind == "pass"]
    assert set(passed.recipe) == {"base", "sft", "sft->rl", "rl", "mix"}
    assert set(passed.tokens) == {8192} and set(passed.benchmark) == {"gsm8k"}
    assert set(passed.split) == {"test"}
    for recipe in set(passed.recipe):
        general = frame[(frame.kind == "general") & (frame.recipe == recipe)]
        assert len(set(general.benchmark)) == 6
    groups = passed[passed.recipe.isin(["rl", "sft->rl"])].group
    assert set(groups) == {5}
    assert (ckpt / "results/gsm8k/report.md").stat().st_size > 1000

    before = {path: path.stat().st_mtime_ns for path in ckpt.rglob("*.pt")}
    (counts,) = re.findall(
        r"(\d+) cells, (\d+) finished before", paper(tmp_path, "speedrun", **sizes)
    )
    assert counts == ("4", "4")
    assert {path: path.stat().st_mtime_ns for path in ckpt.rglob("*.pt")} == before
    shutil.rmtree(ckpt)


@pytest.mark.slow
def test_all_of_the_paper_with_small_numbers(tmp_path, sizes):
    paper(tmp_path, **sizes)
    ckpt, data = tmp_path / "ckpt", tmp_path / "data"

    names = ("gsm8k", "math", "split-easy", "split-hard")
    frames = {name: read(ckpt / "results" / name)[0] for name in names}
    recipes = [*RECIPES][:7]
    for name, shots in (("gsm8k", 8), ("math", 4)):
        frame = frames[name]
        rows = frame[(frame.world == "dolmino-math20.8") & (frame.model == "toy")]
        passed = rows[rows.kind == "pass"]
        assert set(passed.benchmark) == {name} and set(passed.split) == {"test"}
        assert set(passed.shots[passed.recipe == "base"]) == {0, shots}
        trained = passed[passed.recipe != "base"]
        assert set(trained.recipe) == set(recipes[1:])
        assert set(trained.tokens) == {8192} and set(trained.seed) == {0}
        for recipe in recipes:
            general = rows[(rows.kind == "general") & (rows.recipe == recipe)]
            expected = "lambada_openai hellaswag arc_easy arc_challenge piqa openbookqa"
            assert set(general.benchmark) == set(expected.split())
    math = frames["math"][frames["math"].recipe == "sft->rl"]
    study = set(zip(math.world, math.model, math.tokens, strict=True))
    mixed = ("dolmino-math20.8", "dolmino-math40.6")
    assert study == {
        (mixed[0], "toy", 8192),
        (mixed[1], "toy", 8192),
        (mixed[0], "toy-large", 8192),
    }
    sample = json.loads((data / "samples/step2.jsonl").read_text().splitlines()[-1])
    assert (sample["n"], sample["temperature"], sample["shots"]) == (64, 1.0, 4)
    assert sample["ids"] == [row["id"] for row in problems.load(data / "math", "train")]
    for level in ("split-easy", "split-hard"):
        rows = frames[level][frames[level].kind == "pass"]
        assert set(rows.benchmark) == {level} and set(rows.recipe) == {"rl"}
        assert set(rows.group) == {5, 64}
    # the findings that these folders are for lack nothing but models, and a base that solves some
    for name, finding, lacks in (
        ("math", "6", "1 model, needs 8"),
        ("split-easy", "7", "1 model, needs 8"),
        ("split-hard", "7", "1 model, needs 8"),
        ("gsm8k", "4", "no checkpoint with base pass@32 of 20%"),
    ):
        assert decide(Record(frames[name]))[finding].reason == lacks, name
    for name in names:
        assert (ckpt / "results" / name / "report.md").stat().st_size > 1000

    # what the plan says is what the run counted
    for folder, last in (("toy", 3), ("toy-math", 4), ("toy-large", 3)):
        run = metrics(ckpt / folder / f"step{last}.pt", "totals")[-1][1]
        assert run["flops"] == pytest.approx(planned(ckpt, data, folder, last), rel=1e-6)

    before = {path: path.stat().st_mtime_ns for path in ckpt.rglob("*.pt")}
    counts = re.findall(r"(\d+) cells, (\d+) finished before", paper(tmp_path, **sizes))
    assert len(counts) == 5 and all(cells == finished for cells, finished in counts)
    assert {path: path.stat().st_mtime_ns for path in ckpt.rglob("*.pt")} == before
    shutil.rmtree(ckpt)  # gigabytes


def planned(ckpt, data, folder, steps) -> float:
    import plan

    text = data / ("dolmino-math" if folder == "toy-math" else "dolmino")
    preset = folder.removesuffix("-math")
    words = f"--tokens {4096 * steps} --batch_tokens 4096 --length 2048 --plan {preset}"
    command = ["pretrain.py", "--data", str(text), *words.split()]
    return plan.cost_of_command(command).flops
