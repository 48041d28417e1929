"""kill -9 at any moment: every file is whole or absent, and --resume ends in the same bits."""

import signal
import time
from pathlib import Path

import pytest

import common
import faults
from faults import KINDS, at_call, kill_self, ran
from helpers import call, same_weights
from runs import STAGES, goes_on, words_of


@pytest.fixture(scope="module")
def plan(world, tmp_path_factory):
    """plan(stage): seconds, lines, lines of saves, files written of an uninterrupted run."""
    found = {}

    def get(stage):
        if stage not in found:
            out = tmp_path_factory.mktemp(stage) / "step6.pt"
            began = time.monotonic()
            lines, saves = faults.lines_run(stage, words_of(stage, world, out))
            files = 5  # the metrics, three states, the checkpoint
            found[stage] = time.monotonic() - began, lines, saves, files
        return found[stage]

    return get


def survives(stage, kind, seed, plan, whole, world, out):
    faults.killed(stage, words_of(stage, world, out), out, kind, seed, plan(stage))
    out.parent.mkdir(exist_ok=True)
    assert not faults.unreadable(out.parent)
    goes_on(stage, whole, world, out)


TWO_EACH = [(stage, KINDS[(i + j) % 4]) for i, stage in enumerate(STAGES) for j in (1, 2)]


@pytest.mark.parametrize("stage, kind", TWO_EACH)
def test_kill(plan, whole, world, tmp_path, stage, kind):
    """anywhere: at a seeded line of the trainer, common.py or data/files.py. saving: at a line of
    what saves. torn: in the middle of a file, as after a power cut. clock: at a seeded time.
    """
    survives(stage, kind, 0, plan, whole, world, tmp_path / "run/step6.pt")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_64_kills(plan, whole, world, tmp_path, stage, kind, seed):
    survives(stage, kind, seed, plan, whole, world, tmp_path / "run/step6.pt")


def test_kill_between_the_last_save_and_finish(whole, world, tmp_path):
    out = tmp_path / "run/step6.pt"
    words = words_of("sft", world, out)
    assert (
        ran(lambda: (at_call(common, "finish", 0, kill_self), call("sft", *words)))
        == -signal.SIGKILL
    )
    assert common.load(f"{out}.resume")["step"] == 6
    goes_on("sft", whole, world, out)


def test_kill_in_finish_leaves_a_whole_checkpoint(whole, world, tmp_path):
    """Between the result and the removal of the state."""
    out = tmp_path / "run/step6.pt"
    words = words_of("sft", world, out)
    assert (
        ran(lambda: (at_call(common.Log, "close", 0, kill_self), call("sft", *words)))
        == -signal.SIGKILL
    )
    assert same_weights(out, whole("sft"))
    goes_on("sft", whole, world, out)


@pytest.mark.parametrize("again", ["--resume", "--overwrite"])
def test_half_written_files_of_a_kill_go(whole, world, tmp_path, again):
    """A .tmp of this run's own files, when it goes on; not what belongs to others."""
    out = tmp_path / "step6.pt"
    other = tmp_path / "other.pt.tmp"
    other.write_bytes(b"precious")
    for name in ("", ".resume", ".metrics.jsonl"):
        Path(f"{out}{name}.tmp").write_bytes(b"half")
    assert ran(lambda: call("sft", *words_of("sft", world, out), again)) == 0
    there = sorted(path.name for path in tmp_path.iterdir())
    kept = ["step6.pt", "step6.pt.answers.jsonl", "step6.pt.metrics.jsonl"]
    assert there == ["other.pt.tmp", *kept]
    assert same_weights(out, whole("sft")) and other.read_bytes() == b"precious"
