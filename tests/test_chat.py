"""sample.py on a terminal: questions one after the other."""

import builtins
import os
import pty
import subprocess
import sys

import pytest

import sample
from helpers import ROOT, call, refused


@pytest.fixture
def typed(monkeypatch):
    """typed(lines): what a person at a terminal types; then Ctrl-D."""

    def type_lines(*lines):
        left = list(lines)

        def answer(_):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr(sample, "on_terminal", lambda: True)
        monkeypatch.setattr(builtins, "input", answer)
        return left

    return type_lines


def test_each_question_gets_its_answers(world, typed, capsys):
    typed("sam has 2 apples . how many now ?", "max has 3 beads . how many now ?")
    call("sample", world.taught, n=3, max_new=8)
    assert capsys.readouterr().out.count(" |") == 6


def test_questions_that_are_not_there(world, typed, capsys, tmp_path):
    """The form of a question is in their folder."""
    typed("sam has 2 apples . how many now ?")
    message = refused(capsys, "sample", world.taught, questions=tmp_path / "gone")
    assert f"no folder {tmp_path / 'gone'} of questions" in message


def test_an_empty_line_ends(world, typed, capsys):
    left = typed("", "max has 3 beads . how many now ?")
    call("sample", world.taught)
    assert " |" not in capsys.readouterr().out and len(left) == 1


def test_the_same_question_again_gets_other_answers(world, typed, capsys):
    typed(*["sam has 2 apples . how many now ?"] * 2)
    call("sample", world.base, n=2, max_new=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if " |" in line]
    assert lines[:2] != lines[2:]


def test_an_unknown_word_does_not_end_it(world, typed, capsys):
    typed("what is a whale ?", "sam has 2 apples . how many now ?")
    call("sample", world.taught, n=1, max_new=8)
    out = capsys.readouterr().out
    assert "' what'" in out and out.count(" |") == 1


@pytest.mark.parametrize("flags", [dict(first=2), dict(prompt=" Q : sam A :"), dict(split="val")])
def test_flags_of_what_to_show_are_as_before(world, typed, capsys, flags):
    typed()
    call("sample", world.taught, n=1, max_new=4, **flags)
    assert capsys.readouterr().out.count(" |") == {"first": 2, "prompt": 1, "split": 4}[[*flags][0]]


def test_without_a_terminal_it_is_as_before(world, capsys):
    call("sample", world.taught, n=1, max_new=4)
    out = capsys.readouterr().out
    assert out.count(" |") == 4 and out.count("[answer") == 4


def test_a_real_terminal(world):
    ours, theirs = pty.openpty()
    command = [sys.executable, "sample.py", str(world.taught), "--n", "1", "--max_new", "8"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"sam has 2 apples . how many now ?\n\n")
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0 and said.count(b" |") == 1
