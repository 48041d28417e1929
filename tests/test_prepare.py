"""What data/prepare.py leaves on disk: all of it, only that, and the same again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import helpers
from data import files, prepare, problems, tokens, toy
from helpers import ROOT, complaint

# ------------------------------------------------------------------------- the toy world

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


def test_toy_world_without_shots(tmp_path):
    prepare.make_toy(prepare.Toy(out=str(tmp_path / "a"), **TOY | {"shots": 0}))
    there = {path.name for path in (tmp_path / "a" / "easy").iterdir()}
    assert there == {"train.jsonl", "val.jsonl", "test.jsonl", "prompt.json"}


def test_toy_world_is_complete_and_deterministic(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare.make_toy(prepare.Toy(out=str(tmp_path / name), seed=seed, **TOY))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    expected = {"train_000.bin", "val_000.bin", "world.json"}
    expected |= {f"tasks/{name}.jsonl" for name in ("facts", "lastword")}
    for level in ("easy", "hard"):
        expected |= {f"{level}/{split}.jsonl" for split in ("train", "val", "test", "shots")}
        expected.add(f"{level}/prompt.json")
    assert set(a) == expected and a == b
    assert {name for name in a if a[name] == c[name]} == {"easy/prompt.json", "hard/prompt.json"}
    world = json.loads(a["world.json"])
    assert world["name"] == "toy-math30"
    assert {*world["contents"]} == {name for name in expected if "/" in name}
    assert {*world["shards"]["train"], *world["shards"]["val"]} == {"train_000.bin", "val_000.bin"}
    stream = tokens.Stream(tmp_path / "a", "train", 128, 0)
    assert 20_000 <= stream.tokens < 20_500
    tokens.verify(tmp_path / "a")
    form = problems.form(tmp_path / "a" / "hard")
    assert form == (toy.PROMPT, "")
    shown = problems.few_shot(form, problems.load(tmp_path / "a" / "hard", "shots"))
    assert tokens.encode(tokens.encoding("toy"), shown)
    row = problems.load(tmp_path / "a" / "easy", "train")[0]
    assert helpers.grade(row["solutions"][0], row["answer"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small toy world; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "world"
    prepare.make_toy(prepare.Toy(out=str(out), **TOY))
    return out


@pytest.fixture
def own(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "world")


def refused(capsys, *words) -> str:
    """`prepare.py words`, which must fail with exit status 2 and one line; -> that line."""
    return complaint(capsys, lambda: prepare.main([str(word) for word in words]))


def toy_flags(**changes):
    return [part for name, value in (TOY | changes).items() for part in (f"--{name}", value)]


def test_same_command_again_finds_the_folder_finished(own, capsys):
    """With status 0, and nothing done."""
    before = contents(own)
    prepare.main([str(word) for word in ("toy", "--out", own, *toy_flags())])
    assert "is finished" in capsys.readouterr().out and contents(own) == before


@pytest.mark.parametrize(
    "name, was, now", [("math_share", "0.3", "0.6"), ("seed", "0", "1"), ("shots", "2", "3")]
)
def test_other_settings_are_named_with_both_values(own, capsys, name, was, now):
    before = contents(own)
    line = refused(capsys, "toy", "--out", own, *toy_flags(**{name: now}))
    assert f"--{name} {was}" in line and now in line and "--overwrite" in line
    assert contents(own) == before
    prepare.main([str(w) for w in ("toy", "--out", own, "--overwrite", *toy_flags(**{name: now}))])
    assert contents(own) != before and not Path(f"{own}.new").exists()


def test_another_spelling_of_the_source_is_the_same_source(tmp_path, capsys, cl100k, monkeypatch):
    """./in for in, or from its own folder."""
    lines = [json.dumps({"text": f"plain {i}"}) for i in range(40)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    for source in ("in", "./in", str(tmp_path / "in")):
        prepare.main(["text", "--source", source, "--out", "out", "--val_share", "0.3"])
    assert capsys.readouterr().out.count("is finished") == 2
    (tmp_path / "in" / "b.txt").write_text("more\n")
    assert "out" in refused(capsys, "text", "--source", "in", "--out", "out", "--val_share", "0.3")


def test_another_command_does_not_take_the_folder_for_its_own(own, tmp_path, capsys):
    before = contents(own)
    (tmp_path / "a.txt").write_text("x\n")
    assert str(own) in refused(capsys, "text", "--source", tmp_path / "a.txt", "--out", own)
    assert contents(own) == before


def test_finished_folder_that_lost_something_is_not_finished(own, capsys):
    for name in ("train_000.bin", "easy/val.jsonl", "tasks/facts.jsonl", "hard/prompt.json"):
        kept = (own / name).read_bytes()
        (own / name).unlink()
        assert name.split("/")[-1] in refused(capsys, "toy", "--out", own, *toy_flags())
        (own / name).write_bytes(kept)
    prepare.main([str(word) for word in ("toy", "--out", own, *toy_flags())])


def test_folder_of_before_the_lists_is_finished_too(own, capsys):
    """Its world.json has neither shards nor contents, and lacks a flag that came later."""
    world = json.loads((own / "world.json").read_text())
    for name in ("shards", "contents", "format_share"):
        del world[name]
    (own / "world.json").write_text(json.dumps(world))
    prepare.main([str(word) for word in ("toy", "--out", own, *toy_flags())])
    assert "is finished" in capsys.readouterr().out
    assert "--format_share" in refused(capsys, "toy", "--out", own, *toy_flags(format_share=0.5))


def test_empty_world_is_named(own, capsys):
    (own / "world.json").write_text("")
    assert "world.json" in refused(capsys, "toy", "--out", own, *toy_flags())


def test_display_that_is_switched_off_changes_nothing(made, tmp_path):
    """TQDM_DISABLE=1."""
    words = ["toy", "--out", tmp_path / "out", *toy_flags()]
    command = [sys.executable, ROOT / "data" / "prepare.py", *words]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    subprocess.run(map(str, command), check=True, timeout=60, env=environment, capture_output=True)
    assert contents(tmp_path / "out") == contents(made)


def test_output_is_not_left_half_written(made, own, tmp_path, monkeypatch):
    settings = prepare.Toy(out=str(own), seed=1, overwrite=True, **TOY)
    monkeypatch.setattr(prepare.toy, "tasks", None)  # stops with a TypeError near the end
    with pytest.raises(TypeError):
        prepare.make_toy(settings)
    assert contents(own) == contents(made) and [p.name for p in tmp_path.iterdir()] == ["world"]
    monkeypatch.undo()
    prepare.make_toy(settings)
    assert contents(own) != contents(made) and [p.name for p in tmp_path.iterdir()] == ["world"]


def test_overwrite_never_removes_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="thesis"):
            settings = prepare.Toy(out=str(tmp_path / "thesis"), overwrite=overwrite, **TOY)
            prepare.make_toy(settings)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_error_names_no_folder_that_is_gone(tmp_path, capsys, monkeypatch):

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    settings = prepare.Toy(out=str(tmp_path / "out"), **TOY)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", lambda *_: None)  # the first file is to be a shard
        with pytest.raises(ValueError, match="out/train_000.bin") as error:
            prepare.make_toy(settings)
    assert "out.new" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, names",
    [
        (["toys"], "'toys'"),
        (["toy", "--tokns", "5"], "--tokens"),
        (["toy", "--math_share", "1.5"], "--math_share"),
        (["toy", "--val_questions", "0"], "--val_questions"),
        (["text", "--source", "absent"], "absent"),
        (["gsm8k", "--source", "."], "train.jsonl"),
        (["tasks", "--source", "."], "lambada/test.jsonl"),
    ],
    ids=lambda value: "-".join(value)[:30] if type(value) is list else "",
)
def test_user_errors_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, words, names):
    monkeypatch.chdir(tmp_path)
    out = ["--out", "x"] if words[0] in prepare.COMMANDS else []
    sizes = toy_flags() if words[0] == "toy" else []
    assert names in refused(capsys, words[0], *out, *sizes, *words[1:])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- easy and hard questions


def test_split_keeps_a_calculation_in_one_part(tmp_path, capsys):
    """Questions that differ in their words alone: val and test have one of them, train has all."""
    folder = tmp_path / "questions"
    folder.mkdir()
    rows = [
        {
            "id": f"{i}-{word}",
            "question": f"{word} {i} ?",
            "answer": f"{i}",
            "solutions": [f"#### {i}"],
            "calculation": f"+{i}",
        }
        for i in range(60)
        for word in ("red", "blue", "green")[: 1 + i % 3]
    ]
    files.write_rows(folder / "train.jsonl", rows)
    files.write_rows(folder / "shots.jsonl", rows[:2])
    problems.write_form(folder, problems.Form("Task: {}\nReply:", "\n"))
    right = [4 * (int(row["answer"]) < 30) for row in rows]
    sample = {"kind": "pass", "n": 4, "checkpoint": "a.pt", "correct": right}
    sample["ids"] = [row["id"] for row in rows]
    files.write_rows(tmp_path / "samples.jsonl", [sample])
    command = ["split", "--questions", folder, "--samples", tmp_path / "samples.jsonl"]
    command += ["--levels", "4,0", "--held_out", "0.2", "--out", tmp_path / "out"]
    prepare.main([str(word) for word in command])
    for level, calculations in (("easy", range(30)), ("hard", range(30, 60))):
        parts = {
            split: problems.load(tmp_path / "out" / f"split-{level}", split)
            for split in ("train", "val", "test")
        }
        used = {split: [row["calculation"] for row in part] for split, part in parts.items()}
        assert sorted(sum(map(list, map(set, used.values())), [])) == sorted(
            f"+{i}" for i in calculations
        ), "one is in two parts, or in none"
        assert len(used["val"]) == len({*used["val"]}) == 6
        assert len(used["test"]) == len({*used["test"]}) == 6
        expected = [row["id"] for row in rows if row["calculation"] in used["train"]]
        assert sorted(row["id"] for row in parts["train"]) == sorted(expected)
    # six hard questions, but of two calculations: too few for three parts
    sample["correct"] = [4 * (row["answer"] not in ("32", "35")) for row in rows]
    files.write_rows(tmp_path / "samples.jsonl", [sample])
    line = refused(capsys, *command[:-1], tmp_path / "other")
    assert "2 of 120 questions are hard" in line and "--levels" in line
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------- text


def test_text_of_all_kinds_becomes_shards(cl100k, datasets, tmp_path):
    """Every document, copies on one side, an end token after each."""
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
        ids = np.concatenate(shards).astype(int)
        whole = tokens.decode(cl100k, np.where(ids == cl100k.eot_token, -1, ids))
        assert whole.endswith("<|-1|>")
        sides[split] = whole.split("<|-1|>")[:-1]
    assert not set(sides["train"]) & set(sides["val"])
    together = sides["train"] + sides["val"]
    assert sorted(text for text in together if text.startswith("Doc")) == sorted(texts + texts)
    assert sum(text.count("line") for text in together) == 2000
