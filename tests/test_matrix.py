"""The whole experiment at SCALE=smoke: every stage as a user starts it, twice."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from results.rows import RECIPES, read


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")

    def matrix(**more):
        env = os.environ | {"SCALE": "smoke", "OUT": str(folder / "ckpt"), "DATA": str(folder / "data"), "PYTHON": sys.executable} | more
        return subprocess.run(["bash", "matrix.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)

    done = matrix()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, matrix, done.stdout


def test_every_cell_has_its_rows(smoke):
    folder, _, told = smoke
    frame, torn = read(folder / "ckpt/results")
    rows = frame.to_dict("records")
    assert not torn
    assert {row["recipe"] for row in rows} == set([*RECIPES][:7]) and len({row["tokens"] for row in rows}) == 2
    recipes = 7
    for kind, count in (("pass", recipes + 2), ("general", 3 * recipes), ("text", recipes)):  # the base has 0, 1 and 3 shots
        assert sum(row["kind"] == kind and row["split"] == "test" for row in rows) == 2 * count
    assert {row["recipe"] for row in rows if row["kind"] == "pass" and row["split"] == "val"} == {"base"}
    assert {(row["pretrain_seed"], row["seed"]) for row in rows if row["split"] == "test"} == {(10, 100)}
    page = (folder / "ckpt/results/report.md").read_text()
    for name in ("pass1.png", "recipes.png", "curves.png"):
        assert name in page and (folder / "ckpt/results" / name).stat().st_size > 5000
    assert page.count("not tested") >= 9 and "min of cells left" in told


def test_the_last_line_of_the_report_is_json(smoke):
    command = [sys.executable, "eval.py", "--report", smoke[0] / "ckpt/results", "--json"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(told.splitlines()[-1])["findings"] == {str(number): "not tested" for number in range(1, 10)}


def test_what_is_finished_is_skipped_and_what_failed_is_named(smoke):
    folder, matrix, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in (folder / "ckpt").rglob("*.pt")}
    (folder / "ckpt/results/p10/step40-rl-s100.jsonl").unlink()
    again = matrix()
    assert again.returncode == 0 and "12 cells, 11 finished before" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "ckpt").rglob("*.pt")}
    (folder / "ckpt/results/p10/step40-rl-s100.jsonl").unlink()
    (folder / "ckpt/p10/step40-rl-s100.pt").write_bytes(b"not a checkpoint")
    broken = matrix()
    assert broken.returncode == 1 and "rl.py --init" in broken.stderr and "is truncated or not a checkpoint" in broken.stderr


@pytest.mark.parametrize("more, says", [({"SCALE": "huge"}, "no SCALE=huge"), ({"JOBS": "none"}, "JOBS is a number"),
                                        ({"SCALE": "gsm8k", "SOURCE": ""}, "needs SOURCE=FOLDER")])  # fmt: skip
def test_wrong_settings(more, says):
    done = subprocess.run(["bash", "matrix.sh"], cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_wrong_flag():
    done = subprocess.run(["bash", "matrix.sh", "--dryrun"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "no flag --dryrun, there is --dry_run" in done.stderr


def test_flags_of_a_variant_come_last():
    """argparse takes the last one: rl-n64+steps=7 is 7 steps, not the 40 that 64 rollouts have. Seen to fail in the other order."""
    script = """source <(sed -n '/^chain()/,/^}/p' matrix.sh)
        run() { echo "$@"; }; cell_name() { echo cell; }; cell_rows() { echo rows; }
        start=(python) toy="" DATA=d RL="--steps 60" N64="--group 64 --steps 40" EVAL=""
        chain ckpt/p0/step1.pt rl-n64+steps=7+lr=1e-4 0"""
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, timeout=20)
    words = done.stdout.splitlines()[0].split()
    assert done.returncode == 0 and words[:2] == ["python", "rl.py"]
    assert {name: words[len(words) - words[::-1].index(name)] for name in ("--steps", "--group", "--lr")} == {
        "--steps": "7", "--group": "64", "--lr": "1e-4"}  # fmt: skip


@pytest.mark.parametrize("scale, count", [("smoke", 27), ("gsm8k", 26)])
def test_dry_run_prices_every_command_and_runs_none(tmp_path, scale, count):
    (tmp_path / "gsm8k").mkdir()
    folders = {"OUT": f"{tmp_path}/ckpt", "DATA": f"{tmp_path}/data", "SOURCE": str(tmp_path)}
    env = os.environ | folders | {"SCALE": scale, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "matrix.sh", "--dry_run"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    priced = [i for i, line in enumerate(lines) if line.startswith("+ ")]
    assert len(priced) == count and all("FLOPs" in lines[i + 1] and "GB" in lines[i + 1] for i in priced)
    assert lines[-1].startswith("all ") and int(lines[-1].split()[1]) == count
    assert [path.name for path in tmp_path.iterdir()] == ["gsm8k"]
