"""OUT.answers.jsonl: questions with their answers, as a run goes on; and sample.py --log."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import common
from data import problems
from helpers import ROOT, call, refused
from runs import words_of

RUNS = {"sft": [0, 3, 6], "rl": [0, 0, 3, 3, 6], "mix": [0, 0, 3, 3, 6]}


def shown(out) -> list[dict]:
    text = Path(f"{out}.answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("stage", RUNS)
def test_each_validation_shows_the_same_questions(whole, world, stage):
    rows = shown(whole(stage))
    held_out = problems.load(world.data / "easy", "val")[:4]
    asked = [row for row in rows if row["split"] == "val"]
    assert [row["step"] for row in asked] == [step for step in (0, 3, 6) for _ in range(4)]
    assert [row["id"] for row in asked] == [row["id"] for row in held_out] * 3
    for row in asked:
        assert [set(answer) for answer in row["answers"]] == [
            {"text", "correct", "formatted", "truncated", "reward"}
        ] * 2
        for answer in row["answers"]:
            assert (answer["reward"] == 1) == answer["correct"]


@pytest.mark.parametrize("stage", RUNS)
def test_right_answers_are_as_many_as_the_metrics_count(whole, stage):
    out = whole(stage)
    text = Path(f"{out}.metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    counted = [line["validation"]["correct"] for line in lines if "validation" in line]
    rows = [row for row in shown(out) if row["split"] == "val"]
    right = [sum(answer["correct"] for answer in row["answers"]) for row in rows]
    assert right == [count for counts in counted for count in counts]


@pytest.mark.parametrize("stage", ["rl", "mix"])
def test_groups_come_with_their_rewards_and_advantages(whole, stage):
    rows = [row for row in shown(whole(stage)) if row["split"] == "train"]
    assert [row["step"] for row in rows] == [0] * 4 + [3] * 4
    for row in rows:
        rewards = [answer["reward"] for answer in row["answers"]]
        mean = sum(rewards) / 8
        assert len(rewards) == 8
        advantages = [answer["advantage"] for answer in row["answers"]]
        assert advantages == pytest.approx([reward - mean for reward in rewards], abs=1e-6)
    assert len({answer["reward"] for row in rows for answer in row["answers"]}) > 1


def test_a_long_step_is_shown_in_part():
    rows = [{"id": str(i), "question": "q", "answer": "1"} for i in range(9)]
    kept = common.examples(rows, [{"text": str(i)} for i in range(90)])
    assert [row["id"] for row in kept] == ["0", "1", "2", "3"]
    assert [answer["text"] for answer in kept[1]["answers"]] == [str(i) for i in range(10, 18)]


def test_a_resumed_run_has_each_line_once(whole, world, tmp_path):
    """Stopped in step 3, after its validation; the state is that of step 2. An older log goes."""
    out = tmp_path / "step6.pt"
    Path(f"{out}.answers.jsonl").write_text('{"step": 5, "split": "val"}\n')
    script = f"""
import common, rl, sys
sys.path.insert(0, "tests")
checked = rl.check_mismatch
def stop(step, *more):
    if step == 3:
        raise SystemExit(9)
    checked(step, *more)
rl.check_mismatch = stop
common.main(rl.main, rl.Config, "", {words_of("rl", world, out)!r})
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert process.returncode == 9, process.stderr
    assert shown(out) == shown(whole("rl"))[:16]
    call("rl", *words_of("rl", world, out), "--resume")
    assert shown(out) == shown(whole("rl"))


def test_the_log_of_one_question(whole, capsys):
    out = whole("rl")
    call("sample", log=out)
    said = capsys.readouterr().out
    rows = [row for row in shown(out) if row["split"] == "val"]
    first = [row for row in rows if row["id"] == rows[0]["id"]]
    assert said.count(rows[0]["question"]) == 1
    assert [line.strip() for line in said.splitlines() if "step" in line] == [
        "step 0",
        "step 3",
        "step 6",
    ]
    for row in first:
        assert all(answer["text"] in said for answer in row["answers"])
    call("sample", log=out, id=rows[1]["id"], n=1)
    said = capsys.readouterr().out
    assert rows[1]["question"] in said and said.count("|") == 3


def test_the_log_of_training(whole, capsys):
    out = whole("rl")
    call("sample", log=f"{out}.answers.jsonl", split="train")
    said = capsys.readouterr().out
    for row in shown(out):
        assert (row["question"] in said) >= (row["split"] == "train")


def test_flags_that_a_log_does_not_read(whole, world, capsys):
    message = refused(capsys, "sample", log=whole("rl"), first=2)
    assert "--first does not go with --log" in message
    assert "--id goes only with --log" in refused(capsys, "sample", world.base, id="a")


def test_no_log_and_no_such_question(whole, world, capsys):
    assert str(world.base) in refused(capsys, "sample", log=world.base)
    message = refused(capsys, "sample", log=whole("rl"), id="nobody")
    said = {
        split: {row["id"] for row in shown(whole("rl")) if row["split"] == split}
        for split in ("train", "val")
    }
    assert "no such val question" in message and said["train"] - said["val"]
    assert {name.strip() for name in message.rpartition("has ")[2].split(",")} == said["val"]
