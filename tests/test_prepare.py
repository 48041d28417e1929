"""What data/prepare.py leaves on disk: all of it, only that, and the same again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from data import files, grader, prepare, problems, questions, tasks, tokens

# ---- prepare.py

TOY = dict(
    tokens=20_000,
    val_tokens=2_000,
    train_questions=20,
    val_questions=5,
    test_questions=5,
    shots=2,
    task_items=10,
)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_toy_world_is_complete_and_deterministic(tmp_path):
    """Seen to fail with the time in world.json."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare.make_toy(prepare.Toy(out=str(tmp_path / name), seed=seed, **TOY))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    levels = {
        f"{level}/{split}.jsonl"
        for level in ("easy", "hard")
        for split in ("train", "val", "test", "shots")
    }
    assert set(a) == levels | {
        f"tasks/{name}.jsonl" for name in ("facts", "agreement", "lastword")
    } | {"train_000.bin", "val_000.bin", "world.json"}
    assert a == b and all(a[name] != c[name] for name in a)
    assert json.loads(a["world.json"])["name"] == "toy-math30"
    stream = tokens.Stream(tmp_path / "a", "train", 128, 0)
    assert 20_000 <= stream.tokens < 20_500
    tokens.verify_shard(tmp_path / "a" / "train_000.bin")
    enc = tokens.encoding("toy")
    row = problems.load(tmp_path / "a" / "easy", "train")[0]
    assert tokens.encode(
        enc, problems.few_shot("toy", problems.load(tmp_path / "a" / "hard", "shots"))
    )
    assert grader.grade(row["solutions"][0], row["answer"])


def test_output_is_not_overwritten_nor_left_half_written(tmp_path, monkeypatch):
    """Seen to fail with the files made in the final folder."""
    out = tmp_path / "world"
    prepare.make_toy(prepare.Toy(out=str(out), **TOY))
    before = contents(out)
    with pytest.raises(ValueError, match="exists: --overwrite"):
        prepare.make_toy(prepare.Toy(out=str(out), seed=1, **TOY))
    monkeypatch.setattr(prepare.toy, "tasks", None)  # stops with a TypeError near the end
    with pytest.raises(TypeError):
        prepare.make_toy(prepare.Toy(out=str(out), seed=1, overwrite=True, **TOY))
    assert contents(out) == before and [p.name for p in tmp_path.iterdir()] == ["world"]
    monkeypatch.undo()
    prepare.make_toy(prepare.Toy(out=str(out), seed=1, overwrite=True, **TOY))
    assert contents(out) != before and [p.name for p in tmp_path.iterdir()] == ["world"]


def test_overwrite_never_removes_a_folder_of_something_else(tmp_path):
    """Seen to fail without the check for world.json."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not made by prepare.py"):
        prepare.make_toy(prepare.Toy(out=str(tmp_path / "thesis"), overwrite=True, **TOY))
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_user_errors_are_one_line_and_status_2(tmp_path, capsys):
    """Seen to fail with an unknown command looked up without a check."""
    out = str(tmp_path / "x")
    for arguments, message in (
        (["toys"], "'toys' is not a command"),
        (["toy", "--tokns", "5"], "did you mean --tokens"),
        (["text", "--source", str(tmp_path / "absent"), "--out", out], "no .txt"),
        (["gsm8k", "--source", str(tmp_path), "--out", out], "no train.jsonl"),
        (["toy", "--math_share", "1.5", "--out", out], "between 0 and 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            prepare.main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1
        assert not list(tmp_path.iterdir())


def test_text_of_all_kinds_becomes_shards(cl100k, datasets, tmp_path):
    """Every document, copies on one side, an end token after each. Seen to fail with the split drawn by position."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    texts = [f"Document {i} says <|endoftext|> \u00e9\u00e8." for i in range(60)]
    (source / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "extra": 1}) + "\n" for text in texts + texts)
    )
    (source / "deep" / "b.txt").write_text("".join(f"line {i}\n\n" for i in range(2000)))
    (source / "c.md").write_text("not read")
    prepare.make_text(
        prepare.Text(source=str(source), out=str(tmp_path / "out"), val_share=0.3, shard_tokens=500)
    )
    sides = {}
    for split in ("train", "val"):
        paths = sorted((tmp_path / "out").glob(f"{split}_*.bin"))
        shards = [tokens.read_shard(path, "cl100k_base") for path in paths]
        assert shards[0].dtype == np.uint32 and (split == "val" or len(shards) > 1)
        whole = tokens.decode(
            cl100k, [-1 if i == cl100k.eot_token else i for shard in shards for i in shard.tolist()]
        )
        assert whole.endswith("<|-1|>")
        sides[split] = whole.split("<|-1|>")[:-1]
    assert not set(sides["train"]) & set(sides["val"])
    together = sides["train"] + sides["val"]
    assert sorted(text for text in together if text.startswith("Doc")) == sorted(texts + texts)
    assert sum(text.count("line") for text in together) == 2000


def small_gsm8k(folder, shots):
    """Questions 0..39 and 100..109, and 5 in test too, written otherwise."""
    folder.mkdir()
    for split, numbers, mark in (("train", range(40), "?"), ("test", [5, *range(100, 110)], "!")):
        rows = [
            {
                "question": f"What is  {i} plus 0{mark}",
                "answer": f"It is <<{i}+0={i}>>{i}.\n#### {i}",
            }
            for i in numbers
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"question": f"What is {i} plus 0 ?", "target": f"It is {i}. The answer is {i}."}
        for i in shots
    ]
    (folder / "shots.json").write_text(json.dumps(rows))


def test_no_test_question_is_in_train(cl100k, tmp_path, capsys):
    """Case, punctuation and spacing aside. Seen to fail with questions compared as they are written."""
    small_gsm8k(tmp_path / "in", [])
    questions.make_gsm8k(
        questions.Gsm8k(source=str(tmp_path / "in"), out=str(tmp_path / "out"), val=10)
    )
    assert "1 training questions are also in test" in capsys.readouterr().out
    rows = {
        split: problems.load(tmp_path / "out", split) for split in ("train", "val", "test", "shots")
    }
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 21,
        "val": 10,
        "test": 11,
        "shots": 8,
    }
    numbers = [row["answer"] for part in rows.values() for row in part]
    assert len(set(numbers)) == len(numbers) == 50 and "5" in {
        row["answer"] for row in rows["test"]
    }


def test_few_shot_prompts_are_not_drawn_from_the_test_set(cl100k, tmp_path):
    """Nor from what is trained on. Seen to fail without check_apart."""
    small_gsm8k(tmp_path / "in", [7, 200])
    settings = dict(source=str(tmp_path / "in"), val=10, shots=str(tmp_path / "in" / "shots.json"))
    questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "out"), **settings))
    shots = problems.load(tmp_path / "out", "shots")
    assert [shot["solutions"] for shot in shots] == [["It is 7.\n#### 7"], ["It is 200.\n#### 200"]]
    others = [
        row["answer"]
        for split in ("train", "val", "test")
        for row in problems.load(tmp_path / "out", split)
    ]
    assert "7" not in others
    small_gsm8k(tmp_path / "other", [7, 105])
    settings = dict(
        source=str(tmp_path / "other"), val=10, shots=str(tmp_path / "other" / "shots.json")
    )
    with pytest.raises(ValueError, match="of shots is also in test"):
        questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "bad"), **settings))
    (tmp_path / "other" / "shots.json").write_text('[{"question": "What is 7 plus 0 ?"}]')
    with pytest.raises(ValueError, match="shots.json: must be a JSON list"):
        questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "bad"), **settings))
    assert not (tmp_path / "bad").exists()
