"""rl.py --reward FILE: a reward of one's own, in a process that may be killed."""

import json
import time
from pathlib import Path

import pytest

from data import algebra, grader
from helpers import ROOT, call, refused, same_weights
from runs import words_of

SHORT = """
def reward(question, answer, text):
    return -len(text) / 10
"""


@pytest.fixture
def own(tmp_path):
    """own(source): a file my_reward.py with this source; the workers are new."""

    def write(source):
        path = tmp_path / "my_reward.py"
        path.write_text(source)
        return path

    algebra.idle.cache_clear()
    yield write
    algebra.idle.cache_clear()


def answers_of(out) -> list[dict]:
    text = Path(f"{out}.answers.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [answer for row in rows if row["split"] == "train" for answer in row["answers"]]


def test_it_sees_question_answer_and_text(own):
    path = own("def reward(question, answer, text):\n    return len(question + answer) + len(text)")
    assert grader.own_rewards(path, [("ab", "1", "text"), ("", "", "")] * 2) == [7.0, 0.0] * 2


@pytest.mark.parametrize("stage", ["rl", "mix"])
def test_it_is_what_is_trained_on(own, world, tmp_path, stage):
    out = tmp_path / "step6.pt"
    call(stage, *words_of(stage, world, out, reward=own(SHORT), steps=1))
    shown = answers_of(out)
    assert len({answer["reward"] for answer in shown}) > 4
    for answer in shown:
        expected = 0.0 if answer["truncated"] else -len(answer["text"]) / 10
        assert answer["reward"] == pytest.approx(expected)


def test_the_usual_reward_as_ones_own_gives_the_same_bits(own, whole, world, tmp_path):
    source = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data import grader
def reward(question, answer, text):
    ((correct, well_formed),) = grader.grade_all([text], [answer], [True])
    return grader.reward(correct, well_formed, 0.1)
"""
    out = tmp_path / "step6.pt"
    call("rl", *words_of("rl", world, out, reward=own(source)))
    assert same_weights(out, whole("rl"))


ELSEWHERE = """def reward(question, answer, text):
    return ask(text)
def ask(text):
    return text.x
"""
FAULTS = {
    "def reward(question, answer, text):\n    n = 0\n    return 1 / n": (3, "ZeroDivisionError"),
    ELSEWHERE: (4, "AttributeError"),
    "def reward(question, answer)\n    return 1": (1, "SyntaxError"),
    "import nothing_of_this_name\n": (1, "ModuleNotFoundError"),
    "import sys\n\nsys.exit(3)": (3, "SystemExit"),
}


@pytest.mark.parametrize("source", FAULTS)
def test_an_error_is_one_line_with_its_place(own, world, capsys, tmp_path, source):
    """And nothing is left of the run but its log."""
    line, name = FAULTS[source]
    path = own(source)
    said = refused(capsys, "rl", *words_of("rl", world, tmp_path / "a.pt", reward=path))
    assert f"my_reward.py:{line}: {name}" in said
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("value", ["None", "'1'", "float('nan')", "[1]"])
def test_what_is_no_number_is_an_error(own, value):
    path = own(f"def reward(question, answer, text):\n    return {value}")
    with pytest.raises(ValueError, match="my_reward.py.*not a finite number.*in the reward of"):
        grader.own_rewards(path, [("q", "1", "text")])


def test_a_process_that_ends_itself_is_an_error(own):
    """And does not count as too slow."""
    with pytest.raises(ValueError, match="my_reward.py: its process ended while it was loaded"):
        grader.check_own_reward(own("import os\n\nos._exit(1)"))
    path = own("import os\n\ndef reward(question, answer, text):\n    os._exit(1)")
    with pytest.raises(ValueError, match="process ended .1. on the text 'text'"):
        grader.own_rewards(path, [("q", "1", "text")])


def test_a_reward_may_start_programs_and_have_dataclasses(own):
    source = """from __future__ import annotations
import subprocess
from dataclasses import dataclass
@dataclass
class Seen:
    text: str
def reward(question, answer, text):
    subprocess.run(["cat"])  # all of its input, which is none of the questions
    subprocess.run(["echo", "hello"])
    return len(Seen(text).text)
"""
    asked = [("q", "1", "a" * i) for i in range(1, 6)]
    assert grader.own_rewards(own(source), asked) == [1, 2, 3, 4, 5]


def test_what_a_reward_prints_is_seen_at_once(own, capfd):
    path = own("def reward(question, answer, text):\n    print('seen', text)\n    return 1")
    assert grader.own_rewards(path, [("q", "1", "text")]) == [1]
    assert "seen text" in capfd.readouterr().err


def test_no_file_and_no_function(own, world, capsys, tmp_path):
    words = words_of("rl", world, tmp_path / "a.pt")
    missing = tmp_path / "missing.py"
    assert f"--reward {missing}" in refused(capsys, "rl", *words, reward=missing)
    assert "no function reward" in refused(capsys, "rl", *words, reward=own("score = 1"))


@pytest.mark.parametrize("hang", ["while True: pass", "import time; time.sleep(1000)"])
def test_one_that_hangs_is_killed(own, monkeypatch, hang):
    """In a second of processor time, or in five on the clock; the others are not lost."""
    monkeypatch.setattr(algebra, "SECONDS", 1)
    path = own(
        f"def reward(question, answer, text):\n    if text == 'slow':\n        {hang}\n    return 2"
    )
    began = time.monotonic()
    found = grader.own_rewards(path, [("q", "1", "fast"), ("q", "1", "slow"), ("q", "2", "fast")])
    assert found == [2.0, None, 2.0]
    assert time.monotonic() - began < 12


def test_one_that_takes_all_memory_is_an_error(own, monkeypatch):
    monkeypatch.setattr(algebra, "MEMORY", 2**28)
    path = own("def reward(question, answer, text):\n    return len(bytearray(2**30))")
    with pytest.raises(ValueError, match="my_reward.py:2: MemoryError"):
        grader.own_rewards(path, [("q", "1", "text")])


def test_late_answers_have_reward_0_and_are_counted(own, world, monkeypatch, tmp_path):
    monkeypatch.setattr(algebra, "SECONDS", 0.2)
    path = own(
        "def reward(question, answer, text):\n    while '7' in text:\n        pass\n    return 1"
    )
    out = tmp_path / "a.pt"
    words = dict(steps=1, reward=path, questions_per_step=1, eval_questions=0)
    call("rl", *words_of("rl", world, out, **words))
    line = json.loads(Path(f"{out}.metrics.jsonl").read_text().splitlines()[0])
    shown = answers_of(out)
    late = [answer for answer in shown if "7" in answer["text"] and not answer["truncated"]]
    assert late and line["late"] == len(late) / len(shown)
    assert all(answer["reward"] == 0 for answer in late)


def test_a_resumed_run_needs_the_same_content(own, world, capsys, tmp_path):
    words = words_of("rl", world, tmp_path / "a.pt", reward=own(SHORT), steps=1, eval_questions=0)
    call("rl", *words)
    own(SHORT + "\n# another")
    assert "--reward" in refused(capsys, "rl", *words, "--resume")
    own(SHORT)
    with pytest.raises(SystemExit) as stop:
        call("rl", *words, "--resume")
    assert stop.value.code == 0
    without = words_of("rl", world, tmp_path / "a.pt", steps=1, eval_questions=0)
    assert "--reward" in refused(capsys, "rl", *without, "--resume")
