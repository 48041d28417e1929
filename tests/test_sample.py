"""sample.py: answers as a person sees them, each with its reward."""

import re

import pytest

from data import grader, problems
from helpers import call


@pytest.mark.parametrize("name", ["base", "taught"])
def test_answers_and_their_rewards(world, capsys, name):
    easy = world.data / "easy"
    how = dict(questions=easy, first=2, n=4, max_new=24, device="cpu")
    call("sample", getattr(world, name), **how)
    blocks = capsys.readouterr().out.strip("\n").split("\n\n")
    rewards = []
    for row, block in zip(problems.load(easy, "val")[:2], blocks, strict=True):
        head, *answers = block.split("\n")
        assert head == f" Q : {row['question']} A :   [answer {row['answer']}]"
        assert len(answers) == 4
        for line in answers:
            found = re.fullmatch(r" +([\d.]+) +(-[\d.]+) \|(.*?)( \.\.\.)?", line)
            reward, nats, text, truncated = found.groups()
            (marks,) = grader.grade_all([text], [row["answer"]], [not truncated])
            assert float(reward) == grader.reward(*marks, 0.1)
            assert -8 < float(nats) <= 0
            rewards.append(float(reward))
    assert name == "base" or max(rewards) > 0


@pytest.mark.parametrize("name", ["base", "taught"])
def test_answers_to_a_prompt_of_ones_own(world, capsys, name):
    """With or without the space that words of the toy world begin with, or over two lines."""
    prompt = "Q : sam has 2 apples . he finds 3 . how many now ? A :"
    shown = []
    for typed in (prompt, f" {prompt}", prompt.replace(" how", "\nhow")):
        call("sample", getattr(world, name), prompt=typed, n=3, max_new=8)
        shown.append(capsys.readouterr().out)
    head, *answers = shown[0].strip("\n").split("\n")
    assert head == f" {prompt}" and len(answers) == 3
    assert all(re.match(r" +-[\d.]+ \|", line) for line in answers)
    assert shown[0] == shown[1] == shown[2]
