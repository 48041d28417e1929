"""Metrics of runs as curves: eval.py --curves, and --track."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, call, flags, lines_of, refused, start
from results import curves
from runs import words_of


def test_running_mean_by_hand():
    assert curves.running_mean([3.0, 1.0, 2.0, 6.0], 3).tolist() == [3.0, 2.0, 2.0, 3.0]
    assert len(curves.running_mean([])) == 0


def test_points_of_a_run():
    lines = [
        {"step": 0, "validation": {"pass@1": 0.25, "correct": [1, 0]}},
        {"step": 0, "reward": 0.5, "loss": 0.1, "entropy": None},
        {"step": 1, "reward": 0.7, "loss": 0.1, "entropy": 2.0},
        {"step": 2, "skipped": "loss is nan"},
        {"step": 3, "loss": 5.0},
    ]
    assert curves.points(lines, "validation") == ([0], [0.25])
    assert curves.points(lines, "reward") == ([0, 1], [0.5, 0.7])
    assert curves.points(lines, "entropy") == ([1], [2.0])
    assert curves.points(lines, "loss") == ([3], [5.0])  # that of RL says nothing


def test_runs_of_any_kind_in_one_picture(whole, tmp_path, capsys):
    outs = [whole(stage) for stage in ("rl", "sft", "mix", "pretrain")]
    call("eval", *[f"--curves={outs[0]}.metrics.jsonl"], *map(str, outs[1:]), results=tmp_path)
    said = capsys.readouterr().out
    for panel in curves.PANELS:
        assert panel in said
    picture = np.asarray(Image.open(tmp_path / "runs.png").convert("RGB"))
    assert len({tuple(colour) for colour in picture.reshape(-1, 3)}) > 4


def test_a_run_that_is_still_writing(whole, tmp_path):
    """The last line has no end yet."""
    text = Path(f"{whole('rl')}.metrics.jsonl").read_text()
    path = tmp_path / "now.pt.metrics.jsonl"
    path.write_text(text[: len(text) // 2])
    assert "reward" in curves.draw([tmp_path / "now.pt"], tmp_path / "runs.png")
    path.write_text("")
    with pytest.raises(ValueError, match="no step yet"):
        curves.draw([path], tmp_path / "runs.png")


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert "nothing.pt" in refused(capsys, "eval", curves=tmp_path / "nothing.pt")


def test_two_runs_of_one_name(whole, tmp_path):
    text = Path(f"{whole('sft')}.metrics.jsonl").read_text()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.pt.metrics.jsonl").write_text(text)
    paths = [tmp_path / folder / "x.pt" for folder in ("a", "b")]
    assert len(curves.read_runs(paths)) == 2


# ------------------------------------------------------------------------------------ --track


def numbers_of(line: dict, above="") -> dict:
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{above}{name}/")
        elif isinstance(value, int | float) and above + name != "step":
            found[above + name] = value
    return found


def expected(out) -> dict:
    """{(name, step): value} of a run's metrics."""
    return {
        (name, line["step"]): value
        for line in lines_of(out)
        for name, value in numbers_of(line).items()
    }


def in_tensorboard(out) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(f"{out}.tensorboard", size_guidance={"scalars": 0}).Reload()
    return {
        (name, event.step): event.value
        for name in found.Tags()["scalars"]
        for event in found.Scalars(name)
    }


@pytest.mark.parametrize("stage", ["rl", "pretrain"])
def test_tensorboard_has_the_same_numbers(world, tmp_path, stage):
    pytest.importorskip("tensorboard")
    out = tmp_path / "step6.pt"
    call(stage, *words_of(stage, world, out, track="tensorboard"))
    wanted = expected(out)
    assert len({name for name, _ in wanted}) >= 8
    assert in_tensorboard(out) == pytest.approx(wanted, rel=1e-5)


def test_a_resumed_run_goes_on_in_tensorboard(world, tmp_path):
    """Stopped in step 3 with the state of step 2: what came after it is there once."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "step6.pt"
    words = words_of("sft", world, out, track="tensorboard")
    script = f"""
import common, sft
def stop(run, pairs, step, made=sft.sft_batch):
    if step == 3:
        raise SystemExit(9)
    return made(run, pairs, step)
sft.sft_batch = stop
common.main(sft.main, sft.Config, "", {words!r})
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert process.returncode == 9, process.stderr
    assert max(step for _, step in in_tensorboard(out)) == 3  # the validation before it
    call("sft", *words, "--resume")
    assert in_tensorboard(out) == pytest.approx(expected(out), rel=1e-5)


def test_trackio_has_the_same_numbers(world, tmp_path):
    """Offline, in a folder of the test's."""
    pytest.importorskip("trackio")
    out = tmp_path / "step6.pt"
    words = words_of("sft", world, out, track="trackio")
    where = dict(TRACKIO_DIR=tmp_path / "trackio", HF_HUB_OFFLINE=1)
    process = start("sft", *words, env=where)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO],
        env=dict(TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1", PATH=""),
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(found.stdout.splitlines()[-1])
    kept = {
        (name, row["step"]): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "timestamp")
    }
    wanted = expected(out)
    assert {key: kept.get(key) for key in wanted} == pytest.approx(wanted)


READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("rl-excursions")
print(json.dumps(SQLiteStorage.get_logs("rl-excursions", name), default=str))
"""


@pytest.mark.parametrize("package, known_by", [("wandb", "id"), ("trackio", "name")])
def test_a_tracked_run_is_known_again_and_no_other_is_taken_for_it(
    world, tmp_path, monkeypatch, package, known_by
):
    """Stopped and resumed it is one run; begun anew, or of the same name elsewhere, another."""
    begun = []
    steps = []

    def log(numbers, step):
        steps.append(step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)

    def init(**how):
        begun.append(how)
        return SimpleNamespace(log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, package, SimpleNamespace(init=init))
    (tmp_path / "b").mkdir()
    words = words_of("sft", world, tmp_path / "step6.pt", track=package)
    with pytest.raises(SystemExit):
        call("sft", *words)
    call("sft", *words, "--resume")
    call("sft", *words, "--overwrite")
    call("sft", *words_of("sft", world, tmp_path / "b/step6.pt", track=package))
    stopped, resumed, anew, elsewhere = (how[known_by] for how in begun)
    assert stopped == resumed and len({stopped, anew, elsewhere}) == 3
    assert all(how["name"].startswith("step6") for how in begun)


@pytest.mark.parametrize("package", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_one_line(world, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "a.pt"
    words = words_of("sft", world, out, track=package)
    assert f"pip install {package}" in refused(capsys, "sft", *words)
    out.write_text("a result")
    assert f"pip install {package}" in refused(capsys, "sft", *words, "--overwrite")
    assert out.read_text() == "a result"


def test_nothing_of_them_is_imported_without_the_flag(world, tmp_path):
    words = flags(init=world.taught, out=tmp_path / "a.pt", steps=1, eval_questions=0)
    script = f"""
import sys, common, sft
common.main(sft.main, sft.Config, "", {words!r})
assert not {{"tensorboard", "trackio", "wandb"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
