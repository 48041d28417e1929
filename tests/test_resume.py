"""--resume: it neither replays nor skips a batch, and goes on only with the same run."""

import shutil
import signal
import time
from pathlib import Path

import pytest

import common
from data import problems, tokens
from data.files import write_rows
from faults import not_finite_at, ran, signalled
from helpers import call, files, flags, refused, same_weights, start
from runs import STAGES, goes_on, record, words_of


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def killed(stage, words, out, after):
    """Start the real script and kill it as soon as its metrics show `after` steps."""
    process = start(stage, *words)
    log = Path(f"{out}.metrics.jsonl")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"loss"') >= after:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors


def stopped(stage, words, after=3):
    """A run that a signal stops when `after` steps are done."""
    assert ran(lambda: (signalled(signal.SIGTERM, after - 1), call(stage, *words))) == 143


@pytest.mark.parametrize("stage", [slow("pretrain"), slow("sft"), "rl", slow("mix")])
def test_resume_neither_replays_nor_skips_a_batch(whole, world, tmp_path, stage):
    """N steps equal k steps, kill -9 and --resume: the weights and each line of the metrics.

    Of real processes; test_kill.py does it with forks, for all stages.
    """
    out = tmp_path / "run/step6.pt"
    words = words_of(stage, world, out)
    killed(stage, words, out, after=3)
    state = common.load(f"{out}.resume")
    assert 2 <= state["step"] <= 6 and not out.exists()  # 6 on a busy machine: a step takes ms
    goes_on(stage, whole, world, out)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resume_of_a_compiled_run(world, tmp_path, stage):
    """The same with torch.compile, as the default runs have it; all three are real processes."""
    one = tmp_path / "one/step6.pt"
    two = tmp_path / "two/step6.pt"
    words = [words_of(stage, world, out, compile="true") for out in (one, two)]
    assert start(stage, *words[0]).wait(300) == 0
    killed(stage, words[1], two, after=3)
    assert start(stage, *words[1], "--resume").wait(300) == 0
    assert same_weights(one, two) and record(one) == record(two)


def test_resume_of_a_finished_run_does_nothing(whole, world, capsys):
    out = whole("sft")
    before = files(out.parent)
    with pytest.raises(SystemExit) as stop:
        call("sft", *words_of("sft", world, out), "--resume")
    assert stop.value.code == 0 and str(out) in capsys.readouterr().out
    assert files(out.parent) == before


def test_resume_without_a_state_starts(whole, world, tmp_path):
    """So that a loop may always say --resume."""
    goes_on("sft", whole, world, tmp_path / "run/step6.pt")


def test_resume_with_other_settings(world, tmp_path, capsys):
    words = words_of("sft", world, tmp_path / "a.pt")
    stopped("sft", words)
    before = files(tmp_path)
    for name, value in (("lr", 3e-3), ("steps", 9), ("seed", 1), ("dtype", "float64")):
        message = refused(capsys, "sft", *words, "--resume", f"--{name}", value)
        assert f"--{name}" in message and str(tmp_path / "a.pt") in message
    assert files(tmp_path) == before


def test_how_and_where_a_run_works_may_change(whole, world, tmp_path):
    out = tmp_path / "run/step6.pt"
    words = words_of("sft", world, out)
    stopped("sft", words)
    more = flags("--on_nonfinite", "skip", save_every=1, save_minutes=5, spike=6)
    goes_on("sft", whole, world, out, [*words, *more])


def test_which_checkpoints_are_kept_may_change(whole, world, tmp_path, capsys):
    out = tmp_path / "run/step6.pt"
    words = words_of("pretrain", world, out)
    stopped("pretrain", words)
    longer = words_of("pretrain", world, out, tokens=8 * 1024)
    assert "of another length" in refused(capsys, "pretrain", *longer, "--resume")
    call("pretrain", *words, *flags("--resume", "--verify", "false", save_steps=5))
    assert (tmp_path / "run/step5.pt").exists() and same_weights(out, whole("pretrain"))


# ----------------------------------------------------------- a run is known by what is in its data


@pytest.fixture()
def questions(world, tmp_path):
    """A folder of the world's questions that nothing lists."""
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in ("train.jsonl", "val.jsonl", "prompt.json"):
        if (world.data / "easy" / name).exists():
            shutil.copy(world.data / "easy" / name, folder)
    return folder


@pytest.mark.parametrize("stage", ["sft", "rl", "mix"])
def test_questions_replaced_between_stop_and_resume(world, tmp_path, questions, capsys, stage):
    """Another answer under the same path: the run would go on, half of it on other data."""
    out = tmp_path / "run/step6.pt"
    words = words_of(stage, world, out, questions=questions)
    stopped(stage, words)
    before = files(out.parent)
    rows = problems.load(questions, "train")
    rows[0], rows[1] = rows[1], rows[0]
    write_rows(questions / "train.jsonl", rows)
    message = refused(capsys, stage, *words, "--resume")
    assert "--questions" in message and str(questions) in message
    assert files(out.parent) == before


@pytest.mark.parametrize("stage", ["pretrain", "mix"])
@pytest.mark.parametrize("change", ["replaced", "added"])
def test_shards_changed_between_stop_and_resume(world, tmp_path, capsys, stage, change):
    """Shards of the same length under the same names, and one more."""
    data = tmp_path / "data"
    data.mkdir()
    for path in world.data.glob("*.bin"):
        shutil.copy(path, data)
    out = tmp_path / "run/step6.pt"
    text = {"pretrain": dict(data=data), "mix": dict(text=data)}[stage]
    words = [*words_of(stage, world, out), *flags(**text)]
    stopped(stage, words)
    before = files(out.parent)
    ids = tokens.read_shard(data / "train_000.bin")[::-1].copy()
    tokens.write_shard(data / f"train_00{change == 'added':d}.bin", ids, "toy")
    message = refused(capsys, stage, *words, "--resume")
    (name,) = text
    assert f"--{name}" in message and str(data) in message
    assert files(out.parent) == before


def test_start_replaced_between_stop_and_resume(world, tmp_path, capsys):
    init = tmp_path / "init.pt"
    shutil.copy(world.taught, init)
    words = [*words_of("sft", world, tmp_path / "a.pt"), *flags(init=init)]
    stopped("sft", words)
    shutil.copy(world.base, init)
    assert "--init" in refused(capsys, "sft", *words, "--resume")
    shutil.copy(world.taught, init)
    call("sft", *words, "--resume")


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_moved_folder_goes_on(whole, world, tmp_path, monkeypatch, stage):
    """./ck/step6.pt for ck/step6.pt, then an absolute path in a folder of another name."""
    here = tmp_path / "here"
    (here / "ck").mkdir(parents=True)
    shutil.copytree(world.data, here / "toy")
    shutil.copy(world.taught, here / "init.pt")

    def words(root, out):
        where = {"sft": dict(init=f"{root}init.pt", questions=f"{root}toy/easy", out=out)}
        where["pretrain"] = dict(data=f"{root}toy", out=Path(out).parent)
        return [*words_of(stage, world, out), *flags(**where[stage])]

    monkeypatch.chdir(here)
    stopped(stage, words("", "ck/step6.pt"), after=2)
    stopped(stage, [*words("./", "./ck/step6.pt"), "--resume"], after=2)
    there = tmp_path / "there"
    here.rename(there)
    monkeypatch.chdir("/")
    out = there / "ck/step6.pt"
    goes_on(stage, whole, world, out, words(f"{there}/", out))
    run = common.load(out)["meta"]["run"]
    assert str(there) in run["out"]


def test_overwritten_run_does_not_resume_what_it_replaced(world, tmp_path, monkeypatch, capsys):
    """--resume after an --overwrite that was killed goes on with the new run.

    It is not `finished` because the old result is still there, and it does not go on from the old
    run's state.
    """
    words = words_of("sft", world, tmp_path / "a.pt", eval_questions=0)
    state = tmp_path / "a.pt.resume"

    def stops_at(step, *more):
        with monkeypatch.context() as patch:
            not_finite_at(step, patch)
            refused(capsys, "sft", *words, *more)

    stops_at(2, "--lr", "2e-3")
    stops_at(0, "--overwrite")
    assert not state.exists()
    call("sft", *words, "--lr", "2e-3")
    refused(capsys, "sft", *words, "--overwrite", "--batch", "999")
    assert (tmp_path / "a.pt").exists()  # nothing has begun
    stops_at(0, "--overwrite")
    assert not (tmp_path / "a.pt").exists()
    call("sft", *words, "--resume")
    stops_at(3, "--overwrite")
    assert state.exists()
    call("sft", *words, "--resume")
    call("sft", *words_of("sft", world, tmp_path / "b.pt", eval_questions=0))
    assert same_weights(tmp_path / "a.pt", tmp_path / "b.pt")
