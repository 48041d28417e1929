"""Encodings, shards, the order of the text, questions, batches, tasks, and what data/prepare.py leaves on disk."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATASETS

from data import grader, prepare, problems, tasks, tokens


@pytest.fixture
def toy():
    return tokens.encoding("toy")


@pytest.fixture
def datasets():
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    return DATASETS


@pytest.fixture
def cl100k(datasets, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(datasets / "tiktoken"))
    return tokens.encoding("cl100k_base")


# ---- encodings

def test_unknown_word_is_named(toy):
    """Seen to fail without the check of the largest id: single bytes went to the model as ids it has no row for."""
    for text, word in ((" sam has 3 zebras .", "' zebras'"), (" sam  has", "' '"), ("sam has", "'sam'"),
                       (" caf\u00e9", "' caf\u00e9'"), (" sam\nhas", r"'\nhas'"),
                       (" A <|endoftext|>", "' <|endoftext|>'")):
        with pytest.raises(ValueError) as error:
            tokens.encode(toy, text)
        assert f"has no {word} " in str(error.value)
    with pytest.raises(ValueError, match="unknown encoding 'gpt9': it is one of toy, cl100k_base"):
        tokens.encoding("gpt9")


def test_toy_ids_of_the_vocabulary_are_all_there_is_to_sample(toy):
    """Seen to fail with vocab_size one too large: its last id was the byte of an unknown word."""
    text = " Q : sam has 18 apples . he finds 5 . how many now ? A : 18 + 5 = 23 . #### 23"
    assert tokens.decode(toy, tokens.encode(toy, text)) == text
    limit = tokens.vocab_size(toy)
    assert sorted([toy.eot_token, tokens.pad_id(toy)]) == [limit - 2, limit - 1]
    for i in range(limit):
        word = tokens.decode(toy, [i])
        assert word.startswith((" ", "<|")) or word.isdigit()


def test_decoding_never_fails(toy):
    """Seen to fail with tiktoken's own decode."""
    strange = [-1, -(10**30), 10**30, 2**31, 2**32, 2**63, 100256, 100261, 100275, 100277, 100351, np.int64(7)]
    assert tokens.decode(toy, [-1, 10**30]) == f"<|-1|><|{10**30}|>"
    assert tokens.decode(toy, [*range(tokens.vocab_size(toy) + 300), *strange])
    assert tokens.decode(toy, torch.tensor([-1, 3])) == "<|-1|>3" and tokens.decode(toy, []) == ""


def test_decoding_never_fails_cl100k(cl100k):
    """Seen to fail with tiktoken's own decode, which raises on the padding id 100277."""
    assert tokens.vocab_size(cl100k) == 100278 and tokens.pad_id(cl100k) == 100277 and cl100k.eot_token == 100257
    assert tokens.decode(cl100k, [9906, 100277, 100256, -1]) == "Hello<|100277|><|100256|><|-1|>"
    assert "\ufffd" in tokens.decode(cl100k, tokens.encode(cl100k, "\U0001f9ee")[:1])  # the half of a character
    assert tokens.decode(cl100k, range(100200, 100360))


def test_special_token_spelled_in_a_text_is_text(cl100k):
    """Seen to fail with enc.encode(text, allowed_special="all"): a web page could then end its own document."""
    ids = tokens.encode(cl100k, "a <|endoftext|> b")
    assert cl100k.eot_token not in ids and tokens.decode(cl100k, ids) == "a <|endoftext|> b"


# ---- shards

def test_shard_of_another_encoding_is_refused(tmp_path):
    """Seen to fail without the comparison of the names."""
    tokens.write_shard(tmp_path / "a.bin", range(50), "toy")
    assert tokens.read_shard(tmp_path / "a.bin", "toy").tolist() == list(range(50))
    with pytest.raises(ValueError, match="its tokens are 'toy', but 'cl100k_base' is needed"):
        tokens.read_shard(tmp_path / "a.bin", "cl100k_base")


def test_header_that_claims_a_terabyte_is_refused_before_allocation(tmp_path, monkeypatch):
    """Seen to fail without the comparison with the size of the file."""
    path = tmp_path / "a.bin"
    path.write_bytes(tokens.HEADER.pack(tokens.MAGIC, tokens.VERSION, 2, 2**39, 0, b"toy") + bytes(100))
    monkeypatch.setattr(np, "memmap", None)  # an attempt to map it would be a TypeError
    with pytest.raises(ValueError, match="its header says 1,099,511,627,840"):
        tokens.read_shard(path)


@pytest.mark.parametrize("damage", ["magic", "version", "width", "cut", "longer", "header", "empty", "name", "absent"])
def test_corrupt_shard_is_refused(tmp_path, damage):
    """Seen to fail without the check of magic, of version, and of the size."""
    path = tmp_path / "a.bin"
    tokens.write_shard(path, range(50), "toy")
    raw = path.read_bytes()
    path.write_bytes({
        "magic": b"X" + raw[1:], "version": raw[:8] + b"\x09" + raw[9:], "width": raw[:12] + b"\x03" + raw[13:],
        "cut": raw[:-1], "longer": raw + b"\0", "header": raw[:40], "empty": b"",
        "name": raw[:28] + b"\xff" * 36 + raw[64:], "absent": b"",
    }[damage])
    if damage == "absent":
        path.unlink()
    with pytest.raises(ValueError, match="a.bin: ") as error:
        tokens.read_shard(path, "toy")
    assert "\n" not in str(error.value)


def test_flipped_bit_is_found(tmp_path):
    """Seen to fail with verify_shard comparing nothing."""
    path = tmp_path / "a.bin"
    tokens.write_shard(path, range(50), "toy")
    tokens.verify_shard(path)
    raw = bytearray(path.read_bytes())
    raw[80] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        tokens.verify_shard(path)


def test_write_that_fails_keeps_the_old_shard(tmp_path, monkeypatch):
    """Seen to fail with the ids written to the final name."""
    path = tmp_path / "a.bin"
    tokens.write_shard(path, range(50), "toy")
    with pytest.raises(ValueError, match="in 0.."):
        tokens.write_shard(path, [1, tokens.vocab_size(tokens.encoding("toy"))], "toy")

    def full(*_):
        raise OSError("no space left")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        tokens.write_shard(path, range(10), "toy")
    assert len(tokens.read_shard(path)) == 50 and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def stream_of(folder, sizes, length, seed=0):
    """A Stream over the ids 0, 1, 2, ... (below the toy vocabulary) in shards of these sizes."""
    start = 0
    for index, size in enumerate(sizes):
        tokens.write_shard(folder / f"train_{index:03}.bin", np.arange(start, start + size), "toy")
        start += size
    return tokens.Stream(folder, "train", length, seed)


def test_each_token_is_a_target_once_an_epoch(tmp_path):
    """Also where a window lies across shards. Seen to fail with windows length + 1 apart."""
    stream = stream_of(tmp_path, [40, 1, 3, 57], length=10)
    assert stream.tokens == 101 and stream.windows == 10 and stream.encoding_name == "toy"
    rows = np.concatenate([stream.rows(step, 2) for step in range(5)])
    assert rows.dtype == np.int64 and rows.shape == (10, 11)
    assert sorted(rows[:, 1:].ravel()) == list(range(1, 101))
    assert (np.diff(rows) == 1).all()


def test_step_is_the_same_on_any_number_of_ranks(tmp_path):
    """Seen to fail with rank r taking the rows r, r + world, ..."""
    stream = stream_of(tmp_path, [101], length=10)
    for step in (0, 1, 7):  # a batch of 6 crosses the end of the epoch
        whole = stream.rows(step, 6)
        for world in (2, 3):
            assert (np.concatenate([stream.rows(step, 6, rank, world) for rank in range(world)]) == whole).all()
    with pytest.raises(ValueError, match="does not divide over 4 ranks, take 4 or 8"):
        stream.rows(0, 6, 0, 4)


def test_order_is_a_function_of_seed_and_step(tmp_path):
    """Seen to fail with the epoch left out of the permutation's seed."""
    stream = stream_of(tmp_path, [101], length=10)
    again, other = tokens.Stream(tmp_path, "train", 10, 0), tokens.Stream(tmp_path, "train", 10, 1)
    late = stream.rows(3, 5).copy()
    assert (again.rows(3, 5) == late).all()
    assert (stream.rows(0, 10) != stream.rows(1, 10)).any() and (stream.rows(0, 10) != other.rows(0, 10)).any()
    with pytest.raises(ValueError, match="has 101 tokens, one window needs 102"):
        tokens.Stream(tmp_path, "train", 101, 0)
    with pytest.raises(ValueError, match="no val_.*bin"):
        tokens.Stream(tmp_path, "val", 10, 0)


# ---- batches

def test_mask_comes_from_lengths():
    """The ids that mean padding and end of text occur in prompt and answer. Seen to fail with mask = target != pad."""
    pad, end = 0, 1
    batch = problems.make_batch([[0, 5, 1, 0], [7]], [[0, 1, 0, end], [9, end]], [1.0, 1.0], pad)
    assert batch.ids.tolist() == [[0, 5, 1, 0, 0, 1, 0, 1], [7, 9, 1, 0, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]
    assert batch.ids.dtype == torch.int64 and batch.mask.dtype == torch.bool and batch.weight.dtype == torch.float32


def test_stop_token_is_trained(toy):
    """Seen to fail without the end token in answer_ids, and with the last target left out of the mask."""
    answer = problems.answer_ids(toy, "9 * 2 = 18 . #### 18")
    assert answer[-1] == toy.eot_token and tokens.decode(toy, answer[:-1]) == " 9 * 2 = 18 . #### 18"
    batch = problems.make_batch([[4, 4]], [answer], [1.0], tokens.pad_id(toy))
    assert batch.ids[:, 1:][batch.mask].tolist() == answer
    assert batch.weight[batch.mask].tolist() == [1.0] * len(answer)


def test_weights_and_log_probs_stand_at_their_targets():
    """One to the left of the token's own place. Seen to fail without that shift."""
    batch = problems.make_batch([[3, 3, 3], [3]], [[7, 8], [9]], [[0.5, -0.5], -2], 0, [[-1.0, -2.0], [-3.0]])
    assert batch.ids.shape == (2, 8) and batch.weight.shape == batch.logp.shape == (2, 7)
    for values, expected in ((batch.weight, {7: 0.5, 8: -0.5, 9: -2.0}), (batch.logp, {7: -1.0, 8: -2.0, 9: -3.0})):
        assert dict(zip(batch.ids[:, 1:][batch.mask].tolist(), values[batch.mask].tolist(), strict=True)) == expected
        assert not values[~batch.mask].any()
    assert problems.make_batch([[1]], [[2]], [1.0], 0).logp is None


# ---- questions

ROW = {"id": "a", "question": "how many ?", "answer": "18", "solutions": ["9 + 9 = 18 . #### 18"]}


@pytest.mark.parametrize("line, message", [
    ("", "not one JSON object"), ("{", "not one JSON object"), ("[" * 10**5, "not one JSON object"),
    ("[1]", '"id" must be text'),
    (json.dumps(ROW | {"answer": 18}), '"answer" must be text, not \'18\''),
    (json.dumps({"id": "b", "answer": "18"}), '"question" must be text'),
    (json.dumps(ROW | {"solutions": "18"}), '"solutions" must be a list of texts'),
    (json.dumps(ROW | {"solutions": [18]}), '"solutions" must be a list of texts'),
    (json.dumps(ROW), "id 'a' is also on line 1"),
    (json.dumps(ROW | {"id": "b", "question": " "}), "the question is empty"),
    (json.dumps(ROW | {"id": "b", "answer": "1 8"}), "must be a number, or one line of LaTeX, not '1 8'"),
    (json.dumps(ROW | {"id": "b", "answer": " "}), "must be a number, or one line of LaTeX, not ''"),
    (json.dumps(ROW | {"id": "b", "answer": "18\n19"}), "must be a number, or one line of LaTeX"),
    (json.dumps(ROW | {"id": "b", "answer": "\\sqrt{2}", "solutions": ["#### \\sqrt{3}"]}), "must end in '#### \\sqrt{2}'"),
    (json.dumps(ROW | {"id": "b", "solutions": ["#### 17"]}), "must end in '#### 18', not '#### 17'"),
    (json.dumps(ROW | {"id": "b", "solutions": ["The answer is 18."]}), "must end in '#### 18'"),
], ids=lambda text: text[:40])
def test_malformed_question_is_named_with_its_line(tmp_path, line, message):
    """Seen to fail with each check left out, and with line numbers from 0."""
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW | {'id': 'c'})}\n")
    with pytest.raises(ValueError) as error:
        problems.load(path, "train")
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_questions_file_that_is_empty_absent_or_not_text(tmp_path):
    """Seen to fail without the check for no rows."""
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "val.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n\xff\n")
    for split, message in (("train", "the file is empty"), ("val", "after line 2"), ("test", "cannot be read")):
        with pytest.raises(ValueError, match=f"{split}.jsonl: .*{message}|{split}.jsonl: {message}"):
            problems.load(tmp_path, split)


def test_one_solution_is_fixed_by_seed_and_question():
    """Seen to fail with one random.Random(seed) for all questions: a choice then changed with the questions before."""
    rows = [{"id": f"q{i}", "question": f"{i} ?", "solutions": [f"{j} #### {i}" for j in range(20)]} for i in range(50)]
    once = problems.solution_pairs(rows, "1", 0)
    assert len(once) == 50 and once[7:] == problems.solution_pairs(rows[7:], "1", 0)
    assert once != problems.solution_pairs(rows, "1", 1) and len({text.split()[0] for _, text in once}) > 10
    assert len(problems.solution_pairs(rows, "3", 0)) == 150
    assert len(set(problems.solution_pairs(rows, "all", 0))) == 1000
    with pytest.raises(ValueError, match="'x' has no solution"):
        problems.solution_pairs([{"id": "x", "question": "?", "solutions": []}], "1", 0)


# ---- tasks

def test_task_score_by_hand(toy):
    """Seen to fail with the label compared with the choice of the lowest log-prob."""
    items = [{"context": " sam has a", "choices": [" cat", " dog"], "label": 1},
             {"context": " ann has a", "choices": [" red", " blue", " green"], "label": 0}]
    table = {" cat": 0.1, " dog": 0.3, " red": 0.1, " blue": 0.2, " green": 0.1}

    def logprob(pairs, single):
        assert [tokens.decode(toy, context) for context, _ in pairs] == [" sam has a"] * 2 + [" ann has a"] * 3
        return [(float(np.log(table[tokens.decode(toy, choice)])), single) for _, choice in pairs]
    score = tasks.score(items, toy, logprob)
    assert score["right"] == [1, 0] and score["accuracy"] == 0.5 and score["se"] == 0.5
    assert score["probability"] == pytest.approx((0.75 + 0.25) / 2)
    lower = tasks.score(items, toy, lambda *args: [(x - 1000, greedy) for x, greedy in logprob(*args)])
    assert lower["probability"] == pytest.approx(0.5)


@pytest.mark.parametrize("change", [{"label": 2}, {"label": -1}, {"label": True}, {"choices": [" a"]}, {"context": None},
                                    {"choices": [" a", ""]}], ids=str)
def test_malformed_task_is_named_with_its_line(tmp_path, change):
    """Seen to fail without the check of label and choices."""
    item = {"context": " sam has a", "choices": [" cat", " dog"], "label": 1}
    (tmp_path / "facts.jsonl").write_text(json.dumps(item) + "\n" + json.dumps(item | change) + "\n")
    with pytest.raises(ValueError, match="facts.jsonl:2: "):
        tasks.load(tmp_path)
    (tmp_path / "facts.jsonl").write_text(json.dumps(item) + "\n")
    assert tasks.load(tmp_path) == {"facts": [item]}


# ---- prepare.py

TOY = dict(tokens=20_000, val_tokens=2_000, train_questions=20, val_questions=5, test_questions=5, shots=2,
           task_items=10)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_toy_world_is_complete_and_deterministic(tmp_path):
    """Seen to fail with the time in world.json."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare.make_toy(prepare.Toy(out=str(tmp_path / name), seed=seed, **TOY))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    levels = {f"{level}/{split}.jsonl" for level in ("easy", "hard") for split in ("train", "val", "test", "shots")}
    assert set(a) == levels | {f"tasks/{name}.jsonl" for name in ("facts", "agreement", "lastword")} | {
        "train_000.bin", "val_000.bin", "world.json"}
    assert a == b and all(a[name] != c[name] for name in a)
    assert json.loads(a["world.json"])["name"] == "toy-math30"
    stream = tokens.Stream(tmp_path / "a", "train", 128, 0)
    assert 20_000 <= stream.tokens < 20_500
    tokens.verify_shard(tmp_path / "a" / "train_000.bin")
    enc = tokens.encoding("toy")
    row = problems.load(tmp_path / "a" / "easy", "train")[0]
    assert tokens.encode(enc, problems.few_shot("toy", problems.load(tmp_path / "a" / "hard", "shots")))
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
    for arguments, message in ((["toys"], "'toys' is not a command"),
                               (["toy", "--tokns", "5"], "did you mean --tokens"),
                               (["text", "--source", str(tmp_path / "absent"), "--out", out], "no .txt"),
                               (["gsm8k", "--source", str(tmp_path), "--out", out], "no train.jsonl"),
                               (["toy", "--math_share", "1.5", "--out", out], "between 0 and 1")):
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
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text, "extra": 1}) + "\n" for text in texts + texts))
    (source / "deep" / "b.txt").write_text("".join(f"line {i}\n\n" for i in range(2000)))
    (source / "c.md").write_text("not read")
    prepare.make_text(prepare.Text(source=str(source), out=str(tmp_path / "out"), val_share=0.3, shard_tokens=500))
    sides = {}
    for split in ("train", "val"):
        paths = sorted((tmp_path / "out").glob(f"{split}_*.bin"))
        shards = [tokens.read_shard(path, "cl100k_base") for path in paths]
        assert shards[0].dtype == np.uint32 and (split == "val" or len(shards) > 1)
        whole = tokens.decode(cl100k, [-1 if i == cl100k.eot_token else i for shard in shards for i in shard.tolist()])
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
        rows = [{"question": f"What is  {i} plus 0{mark}", "answer": f"It is <<{i}+0={i}>>{i}.\n#### {i}"}
                for i in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"What is {i} plus 0 ?", "target": f"It is {i}. The answer is {i}."} for i in shots]
    (folder / "shots.json").write_text(json.dumps(rows))


def test_no_test_question_is_in_train(cl100k, tmp_path, capsys):
    """Case, punctuation and spacing aside. Seen to fail with questions compared as they are written."""
    small_gsm8k(tmp_path / "in", [])
    prepare.make_gsm8k(prepare.Gsm8k(source=str(tmp_path / "in"), out=str(tmp_path / "out"), val=10))
    assert "1 training questions are also in test" in capsys.readouterr().out
    rows = {split: problems.load(tmp_path / "out", split) for split in ("train", "val", "test", "shots")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 21, "val": 10, "test": 11, "shots": 8}
    numbers = [row["answer"] for part in rows.values() for row in part]
    assert len(set(numbers)) == len(numbers) == 50 and "5" in {row["answer"] for row in rows["test"]}


def test_few_shot_prompts_are_not_drawn_from_the_test_set(cl100k, tmp_path):
    """Nor from what is trained on. Seen to fail without check_apart."""
    small_gsm8k(tmp_path / "in", [7, 200])
    settings = dict(source=str(tmp_path / "in"), val=10, shots=str(tmp_path / "in" / "shots.json"))
    prepare.make_gsm8k(prepare.Gsm8k(out=str(tmp_path / "out"), **settings))
    shots = problems.load(tmp_path / "out", "shots")
    assert [shot["solutions"] for shot in shots] == [["It is 7.\n#### 7"], ["It is 200.\n#### 200"]]
    others = [row["answer"] for split in ("train", "val", "test") for row in problems.load(tmp_path / "out", split)]
    assert "7" not in others
    small_gsm8k(tmp_path / "other", [7, 105])
    settings = dict(source=str(tmp_path / "other"), val=10, shots=str(tmp_path / "other" / "shots.json"))
    with pytest.raises(ValueError, match="of shots is also in test"):
        prepare.make_gsm8k(prepare.Gsm8k(out=str(tmp_path / "bad"), **settings))
    (tmp_path / "other" / "shots.json").write_text('[{"question": "What is 7 plus 0 ?"}]')
    with pytest.raises(ValueError, match="shots.json: must be a JSON list"):
        prepare.make_gsm8k(prepare.Gsm8k(out=str(tmp_path / "bad"), **settings))
    assert not (tmp_path / "bad").exists()
