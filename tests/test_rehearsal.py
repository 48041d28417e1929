"""The paper's commands, SCALE=1b of matrix.sh: what they would cost, and all of them on real data with small numbers in
place of the paper's, a tiny OLMo2 with the cl100k_base vocabulary on two ranks (slow)."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import DATASETS, ROOT, metrics

from data import plan, prepare, problems
from results.findings import decide
from results.rows import RECIPES, Record, read

LINKED = "gsm8k math lambada hellaswag arc piqa openbookqa few_shot".split()
DOLMINO = {"dclm": "tinystories_sample.txt", "flan": "tinyshakespeare.txt", "wiki": "wikitext2_valid.txt",
           "pes2o": "real_analysis.jsonl", "stackexchange": "wikitext2_test.txt", "math": "open_logic.jsonl"}  # fmt: skip
ANSWERS = " --eval_questions 2 --eval_n 2 --max_new 12 --compile false"
SIZES = dict(
    MODEL="toy", LARGE="toy-large", GPUS="2", TOKENS="12288", EXTRA="4096", BOTH="16384", STEPS="2",
    TEXT_FLAGS="--val_share 0.3 --processes 1", QUESTION_FLAGS="--val 4", TASK_FLAGS="--limit 8", SPLIT_FLAGS="--levels 0,64",
    PRE_FLAGS="--batch_tokens 4096 --length 2048 --warmup 1 --eval_rows 2 --compile false",
    SFT_FLAGS="--steps 2 --batch 4" + ANSWERS, GOLD_FLAGS="--steps 2 --batch 4" + ANSWERS,
    RL_FLAGS="--steps 1 --questions_per_step 2 --group 2" + ANSWERS,
    MIX_FLAGS="--steps 1 --questions_per_step 2 --group 2 --batch 4" + ANSWERS,
    EVAL_FLAGS="--limit 4 --n 4 --k 1,4 --max_new 12 --compile false",
)  # fmt: skip


@pytest.fixture
def cl100k(monkeypatch):
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))


def matrix(folder, *words, **sizes):
    env = os.environ | {"SCALE": "1b", "OUT": f"{folder}/ckpt", "DATA": f"{folder}/data", "PYTHON": sys.executable} | sizes
    done = subprocess.run(["bash", "matrix.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def commands(text):
    return [line for line in text.splitlines() if line.startswith("+ ")]


# ---- the plan


def test_plan(tmp_path, monkeypatch):
    """Every command of the paper is there, and three prices by hand: pre-training is 23,842 steps of 2,097,152 tokens at
    9.287 GFLOP (SCALE.md), RL 1000 steps x 128 questions x n answers of 200 tokens after 75, SFT 5 epochs of one solution."""
    told = matrix(tmp_path, "--dry_run")
    assert not any(tmp_path.iterdir()), "a dry run writes nothing"
    lines = commands(told)
    assert "--save_steps 1000,2000,3000,5000,6000,7000,10000,14000,22000" in told and "nproc_per_node 8 pretrain.py" in told
    assert len([line for line in lines if " rl.py" in line and "/gsm8k" in line]) == 3 * (4 * 4 + 5)  # 4 seeds early, then 1
    monkeypatch.setattr(plan, "models", {})
    priced = {line: plan.cost(line)[1] for line in lines}
    assert all(price[1] > 0 for line, price in priced.items() if "data/prepare.py" not in line and "--report" not in line)

    def of(*words):
        return next(price for line, price in priced.items() if all(word in line for word in words))

    flops, hours, disk = of("pretrain.py", "--tokens 50e9", "--preset 1b")
    assert flops == pytest.approx(23842 * 2097152 * 9.287e9, rel=1e-3) and disk == 10 * 4 * 1_484_916_736
    assert hours == pytest.approx(flops / 0.4 / 989e12 / 3600)
    few, many = of("rl.py", "--group 5 ", "easy"), of("rl.py", "--group 64 ", "easy")
    forward = 2 * 1.279e9 + 4 * 16 * 2048 * 275  # FLOPs a token: two a weight outside the embedding, and attention
    assert many[0] == pytest.approx(1000 * 128 * 64 * (3 * 275 + 200) * forward, rel=0.02) and 11 < many[0] / few[0] < 13
    assert of("sft.py", "gsm8k-sft-s0")[0] == pytest.approx(5 * 7000 * 275 * 3 * forward, rel=0.3)  # and 2 validations
    total = next(line for line in told.splitlines() if line.startswith("all "))
    assert float(total.split()[3]) == pytest.approx(sum(price[0] for price in priced.values()), rel=1e-2)


# ---- easy and hard questions


def test_split_by_what_the_base_model_solves(tmp_path, cl100k, capsys):
    rows = [{"id": f"q{i}", "question": f"What is {i}?", "answer": str(i), "solutions": [f"It is.\n#### {i}"]} for i in range(65)]
    folder, samples = tmp_path / "questions", tmp_path / "step9.jsonl"
    folder.mkdir()
    for name, part in (("train", rows), ("shots", rows[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    row = {"kind": "pass", "checkpoint": "step9.pt", "n": 64, "ids": [f"q{i}" for i in range(64, -1, -1)], "correct": [*range(64, -1, -1)]}
    samples.write_text(json.dumps({"kind": "general"}) + "\n" + json.dumps(row) + "\n")

    def split(out, *words):
        prepare.main(["split", "--questions", str(folder), "--samples", str(samples), "--out", str(tmp_path / out), *words])
        return {level: {name: {int(row["id"][1:]) for row in problems.load(tmp_path / out / f"split-{level}", name)}
                        for name in ("train", "val", "test")} for level in ("easy", "hard")}  # fmt: skip

    found = split("split")
    for level, right in (("easy", range(16, 65)), ("hard", range(9))):  # the paper: 16 to 64 of 64, at most 8
        parts = found[level]
        assert set.union(*parts.values()) == set(right) and sum(map(len, parts.values())) == len(right)
        assert len(parts["val"]) == len(parts["test"]) == round(0.1 * len(right))
        assert len(problems.load(tmp_path / "split" / f"split-{level}", "shots")) == 1
    assert split("again") == found and split("other", "--seed", "1") != found
    assert {len(parts["train"]) for parts in split("few", "--most", "9").values()} == {7}
    for words, says in ((["--levels", "65,8"], "0 of 65 questions are easy"), (["--levels", "8"], "takes two counts")):
        with pytest.raises(SystemExit):
            split("none", *words)
        assert says in capsys.readouterr().err and not (tmp_path / "none").exists()
    samples.write_text(json.dumps({**row, "ids": row["ids"][1:], "correct": row["correct"][1:]}) + "\n")
    with pytest.raises(SystemExit):
        split("none")
    assert "no row of all 65 questions" in capsys.readouterr().err


# ---- the rehearsal


def rows_of(path, count):
    with gzip.open(DATASETS / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def write_source(folder):
    """What the hub has, from real files: DOLMino's six sources, OpenMathInstruct-1's columns, test sets, benchmarks."""
    (folder / "dolmino").mkdir(parents=True)
    for source, name in DOLMINO.items():
        (folder / "dolmino" / f"{source}.{name.split('.')[-1]}.gz").symlink_to(DATASETS / "pretrain_text" / f"{name}.gz")
    for name in LINKED:
        (folder / name).symlink_to(DATASETS / name)
    solved = []
    for row in rows_of("gsm8k/train.jsonl.gz", 16):
        reasons, _, answer = re.sub("<<[^<>]*>>", "", row["answer"]).rpartition("\n#### ")
        solved.append(("gsm8k", row["question"], answer, f"{reasons}\nThe answer is \\boxed{{{answer}}}."))
    for row in rows_of("math/train.jsonl.gz", 20):
        solved.append(("math", row["problem"], re.search(r"\\boxed\{(.*)\}", row["solution"])[1], row["solution"]))
    (folder / "openmath").mkdir()
    with open(folder / "openmath" / "train.jsonl", "w") as file:
        for dataset, question, answer, solution in solved:
            row = {"question": question, "expected_answer": answer, "dataset": dataset, "generation_type": "without_reference_solution"}
            written = ((solution, "<not_executed>", True), (f"Let us see. {solution}", "<not_executed>", True),
                       ("By hand: \\boxed{-1}", "<not_executed>", False), (f"<llm-code> {solution}", "", True))  # fmt: skip
            for text, error, right in written:
                file.write(json.dumps({**row, "generated_solution": text, "error_message": error, "is_correct": right}) + "\n")


@pytest.mark.slow
def test_every_line_of_the_papers_branch(tmp_path, cl100k):
    write_source(tmp_path / "source")
    sizes = SIZES | {"SOURCE": f"{tmp_path}/source", "FEW_SHOT": str(DATASETS / "few_shot")}
    planned = matrix(tmp_path, "--dry_run", **sizes)
    expected = {re.search(r"--out (\S+)", line)[1]: plan.cost(line)[1][0] for line in commands(planned) if " pretrain.py " in line}
    done = matrix(tmp_path, **sizes)
    ckpt, data = tmp_path / "ckpt", tmp_path / "data"
    ran = [line for text in (done, *(path.read_text() for path in ckpt.rglob("*.log"))) for line in commands(text)]
    assert sorted(ran) == sorted(commands(planned))

    frames = {name: read(ckpt / "results" / name)[0] for name in ("gsm8k", "math", "split-easy", "split-hard")}
    results = {name: frame.to_dict("records") for name, frame in frames.items()}
    for name, shots in (("gsm8k", 8), ("math", 4)):
        rows = [row for row in results[name] if (row["world"], row["model"]) == ("dolmino-math20.8", "toy")]
        passed = [row for row in rows if row["kind"] == "pass"]
        assert {(row["benchmark"], row["split"]) for row in passed} == {(name, "test")}
        base = {(row["tokens"], row["shots"]) for row in passed if row["recipe"] == "base"}
        assert base == {(8192, 0), (8192, shots)}
        cells = {(row["tokens"], row["seed"], row["recipe"]) for row in passed if row["recipe"] != "base"}
        assert cells == {(8192, 0, recipe) for recipe in [*RECIPES][1:7]}
        for recipe in [*RECIPES][:7]:
            general = {row["benchmark"] for row in rows if row["kind"] == "general" and row["recipe"] == recipe}
            assert general == {"lambada_openai", "hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa"}
    study = {(row["world"], row["model"], row["tokens"]) for row in results["math"] if row["recipe"] == "sft->rl"}
    assert study == {("dolmino-math20.8", "toy", 8192), ("dolmino-math40.6", "toy", 8192), ("dolmino-math20.8", "toy-large", 8192)}
    sample = json.loads((data / "samples/step2.jsonl").read_text().splitlines()[-1])
    assert (sample["n"], sample["temperature"], sample["shots"], sample["ids"]) == (
        64, 1.0, 4, [row["id"] for row in problems.load(data / "math", "train")])  # fmt: skip
    for level in ("split-easy", "split-hard"):
        rows = [row for row in results[level] if row["kind"] == "pass"]
        assert {(row["benchmark"], row["group"], row["recipe"]) for row in rows} == {(level, 5, "rl"), (level, 64, "rl")}
    # the findings that these folders are for lack nothing but seeds, but where the base must solve something first
    for name, finding in (("math", "6"), ("split-easy", "7"), ("split-hard", "7"), ("gsm8k", "4"), ("gsm8k", "9")):
        assert decide(Record(frames[name]))[finding].reason == "1 seed, needs 8", (name, finding)
    for name in results:
        assert (ckpt / "results" / name / "report.md").stat().st_size > 1000

    for folder, last in (("toy", 3), ("toy-math", 4), ("toy-large", 3)):  # what the plan says is what the run counted
        assert metrics(ckpt / folder / f"step{last}.pt", "totals")[-1][1]["flops"] == pytest.approx(expected[str(ckpt / folder)])

    again = matrix(tmp_path, **sizes)
    assert "finished before" in again and "\nstart " not in again
    shutil.rmtree(ckpt)  # gigabytes
