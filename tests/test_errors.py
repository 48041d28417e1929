"""Questions, text and sizes that do not fit, and outputs that are there already.

One line on stderr that names what is wrong, exit status 2, and nothing is lost or overwritten.
"""

import functools
import re
import subprocess
import sys

import pytest
import torch

import common
import helpers
from data import problems
from data.files import write_rows
from helpers import PRETRAIN, ROOT, call, files, flags, lines_of

SFT = dict(batch=8, steps=4, save_every=1, eval_questions=0, warmup=1)
RL = dict(
    questions_per_step=4,
    group=4,
    max_new=24,
    steps=4,
    save_every=1,
    eval_questions=0,
    compile="false",
)
TRAINERS = {"sft": SFT, "rl": RL, "mix": RL | {"batch": 8}}


@pytest.fixture()
def refused(capsys):
    return functools.partial(helpers.refused, capsys)


def test_a_real_process_says_one_line(tmp_path):
    """What the other tests see in this process, once as a user sees it."""
    command = [sys.executable, "sft.py", "--init", str(tmp_path / "none.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.split("\n")[-2:-1]
    assert done.stderr.strip() == line
    assert line.startswith("sft.py: error: ") and f"{tmp_path}/none.pt" in line


# ---------------------------------------------------------------------------- prompts, questions


def test_prompt_with_an_unknown_word(refused, world):
    assert "zebra" in refused("sample", world.base, prompt=" Q : sam has 2 zebra")
    assert "toy" in refused("sample", world.base, prompt=" Q : é €")


def test_prompt_that_is_too_long(refused, world):
    assert "512" in refused("sample", world.base, prompt=" Q" * 500)


@pytest.mark.parametrize("script", TRAINERS)
def test_the_quick_try_of_the_readme(world, tmp_path, script):
    words = re.search("A trainer's quick try: `(.*?)`", (ROOT / "README.md").read_text())[1].split()
    out = tmp_path / "a.pt"
    call(
        script, *words, "--compile", "false", init=world.base, out=out, max_new=16, eval_questions=4
    )
    assert out.exists()


@pytest.mark.parametrize("script", TRAINERS)
def test_batch_of_more_than_there_is(refused, world, tmp_path, script):
    """Said before anything is sampled: validation would come first."""
    start = dict(init=world.base, out=tmp_path / "a.pt", limit=2)
    message = refused(script, **start, **TRAINERS[script] | {"eval_questions": 4})
    flag = "--batch 8" if script == "sft" else "--questions_per_step 4"
    assert f"{flag} is more than the 2 " in message
    assert not list(tmp_path.iterdir())


GOOD = '{"id": "a", "question": " sam ?", "answer": "1", "solutions": ["#### 1"]}'


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        '{"id": "b", "question": "x"}',
        '{"id": "b", "question": " ", "answer": "1", "solutions": []}',
        '{"id": "b", "question": "sam ?", "answer": "1 8", "solutions": []}',
    ],
)
def test_malformed_questions_name_the_line(refused, world, tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    out = tmp_path / "a.pt"
    message = refused("rl", init=world.base, questions=tmp_path, out=out, **RL)
    assert f"{path}:2: " in message
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", TRAINERS)
def test_no_questions(refused, world, tmp_path, script):
    start = dict(init=world.base, questions=tmp_path, out=tmp_path / "a.pt", **TRAINERS[script])
    path = tmp_path / "train.jsonl"
    assert str(path) in refused(script, **start)
    path.write_text("")
    assert str(path) in refused(script, **start)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_file_of_questions_is_not_validated_on_itself(refused, world, tmp_path, script):
    questions = world.data / "easy/train.jsonl"
    start = dict(init=world.base, questions=questions, out=tmp_path / "a.pt")
    message = refused(script, **start, **TRAINERS[script] | {"eval_questions": 2})
    assert str(questions) in message and "--eval_questions 0" in message


def test_no_text(refused, tmp_path):
    assert str(tmp_path) in refused("pretrain", *PRETRAIN, data=tmp_path, out=tmp_path / "ckpt")


# ------------------------------------------------------------------ what does not fit the context


def long_question(row):
    return row | {"question": row["question"] + " sam has 2 apples ." * 120}


def unknown_word(row):
    return row | {"question": row["question"] + " zebra"}


def long_solution(row):
    first = row["solutions"][0]
    return row | {"solutions": [" sam has 2 apples ." * 120 + " " + first]}


TOO_LONG = {"question": long_question, "word": unknown_word, "solution": long_solution}


@pytest.fixture()
def misfit(world, tmp_path):
    """A folder of questions of which the last does not fit; -> (folder, id of that question)."""

    def make(kind, split="train"):
        folder = tmp_path / "questions"
        for name in ("train", "val"):
            rows = problems.load(world.data / "easy", name)
            if name == split:
                rows[-1] = TOO_LONG[kind](rows[-1] | {"id": "the long one"})
            write_rows(folder / f"{name}.jsonl", rows)
        problems.write_form(folder, problems.form(world.data / "easy"))
        return folder

    return make


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize("kind", TOO_LONG)
def test_question_that_does_not_fit_is_named_before_the_first_step(
    refused, world, tmp_path, misfit, script, kind
):
    """It stopped a run when it was drawn, and again at each --resume.

    RL reads no solution: one that is too long does not concern it.
    """
    folder = misfit(kind)
    out = tmp_path / "a.pt"
    start = dict(init=world.base, questions=folder, out=out, **TRAINERS[script])
    if (script, kind) == ("rl", "solution"):
        call(script, **start | {"steps": 1})
        return
    message = refused(script, **start)
    assert "the long one" in message and str(folder) in message and "--skip_long" in message
    assert kind != "word" or "zebra" in message
    assert not list(tmp_path.glob("a.pt*"))


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize("kind", TOO_LONG)
def test_skip_long_leaves_such_questions_out_and_says_how_many(
    world, tmp_path, misfit, capsys, script, kind
):
    folder = misfit(kind)
    call(
        script,
        "--skip_long",
        init=world.base,
        questions=folder,
        out=tmp_path / "a.pt",
        **TRAINERS[script] | {"steps": 1},
    )
    said = capsys.readouterr().err
    if (script, kind) == ("rl", "solution"):
        assert str(folder) not in said
    else:
        assert str(folder / "train.jsonl") in said and "1 of 32" in said
    assert len(lines_of(tmp_path / "a.pt")) == 1


def test_validation_question_that_does_not_fit(refused, world, tmp_path, misfit):
    folder = misfit("question", split="val")
    for script, settings in TRAINERS.items():
        settings = settings | {"eval_questions": 8}
        out = tmp_path / "a.pt"
        message = refused(script, init=world.base, questions=folder, out=out, **settings)
        assert "the long one" in message and not list(tmp_path.glob("a.pt*"))


def test_answers_longer_than_the_context(refused, world, tmp_path):
    """--max_new that no question leaves room for."""
    settings = RL | {"max_new": 512}
    message = refused("rl", init=world.base, out=tmp_path / "a.pt", **settings)
    assert "--max_new" in message and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- sizes


def test_batch_that_does_not_divide(refused, world, tmp_path):
    words = flags("--compile", "false", data=world.data, out=tmp_path, length=64)
    message = refused("pretrain", *words, batch_tokens=1000)
    assert all(x in message for x in ("--batch_tokens 1000", "960", "1024"))
    four = common.World(0, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="--batch 10 .* 8 or 12 would"):
        four.share(10, "--batch")
    with pytest.raises(ValueError, match="--batch 3 .* 4 or 8 would"):
        four.share(3, "--batch")


def test_batch_of_more_than_there_are(refused, world, tmp_path):
    out = tmp_path / "a.pt"
    message = refused("sft", init=world.base, out=out, **SFT | {"batch": 64})
    assert "--batch" in message and "32" in message
    assert not out.exists()


def test_checkpoint_outside_the_run(refused, world, tmp_path):
    for words in (["--save_steps", "5"], ["--save_tokens", "9k"]):
        start = dict(data=world.data, out=tmp_path, tokens=2048)
        assert words[0] in refused("pretrain", *PRETRAIN, *words, **start)


def test_unknown_preset(refused, world, tmp_path):
    message = refused("pretrain", preset="2b", data=world.data, out=tmp_path)
    assert "'2b'" in message and "toy, toy-large, 190m, 1b, 4b" in message


# ------------------------------------------------------------------------ what is there already


@pytest.mark.parametrize("script", ["pretrain", *TRAINERS])
@pytest.mark.parametrize("what", ["step4.pt", "step4.pt.resume"])
def test_output_that_exists_is_not_overwritten(refused, world, tmp_path, script, what):
    """A finished run, or the state of one that was killed."""
    (tmp_path / what).write_bytes(b"precious")
    (tmp_path / "step4.pt.metrics.jsonl").write_bytes(b"{}\n")
    before = files(tmp_path)
    words = flags(init=world.base, out=tmp_path / "step4.pt", **TRAINERS.get(script, {}))
    if script == "pretrain":
        words = flags(*PRETRAIN, data=world.data, out=tmp_path, tokens=4096)
    message = refused(script, *words)
    assert str(tmp_path / what) in message
    assert "--resume" in message and "--overwrite" in message
    assert files(tmp_path) == before


def test_checkpoint_on_the_way_is_not_overwritten(refused, world, tmp_path):
    """Not only the last one: M_t of another run, too."""
    (tmp_path / "step2.pt").write_bytes(b"precious")
    before = files(tmp_path)
    start = dict(data=world.data, out=tmp_path, tokens=4096, save_steps=2)
    assert str(tmp_path / "step2.pt") in refused("pretrain", *PRETRAIN, **start)
    assert files(tmp_path) == before


# ------------------------------------------------------------------------ two streams, other text


def test_settings_that_exclude_each_other(refused, world, tmp_path):
    text = flags(*PRETRAIN, init=world.taught, data=world.data, out=tmp_path / "ckpt", tokens=1024)
    for words in (["--preset", "toy-large"], ["--embed_std", "0.1"]):
        assert words[0] in refused("pretrain", *text, *words)
    both = flags(init=world.taught, out=tmp_path / "a.pt", **TRAINERS["mix"])
    assert "--solutions" in refused("mix", *both, text=world.data, solutions="all")
    assert not list(tmp_path.iterdir())


def test_text_of_another_encoding(refused, world, tmp_path):
    shard = (world.data / "train_000.bin").read_bytes()
    path = tmp_path / "train_000.bin"
    path.write_bytes(shard[:28] + b"cl100k_base".ljust(36, b"\0") + shard[64:])
    start = flags(init=world.taught, out=tmp_path / "a.pt")
    for script, name in (("pretrain", "data"), ("mix", "text")):
        message = refused(script, *start, f"--{name}", tmp_path)
        assert "cl100k_base" in message and "toy" in message and str(tmp_path) in message
    assert list(tmp_path.iterdir()) == [path]
