"""Encodings, shards, folders of shards, and the order of the text."""

import os
import shutil

import numpy as np
import pytest
import torch

from data import files, tokens

# -------------------------------------------------------------------------------- encodings


def test_unknown_word_is_named(toy):
    """Single bytes went to the model as ids that it has no row for."""
    for text, word in (
        (" sam has 3 zebras .", "' zebras'"),
        (" sam  has", "' '"),
        ("sam has", "'sam'"),
        (" caf\u00e9", "' caf\u00e9'"),
        (" sam\nhas", r"'\nhas'"),
        (" A <|endoftext|>", "' <|endoftext|>'"),
    ):
        with pytest.raises(ValueError) as error:
            tokens.encode(toy, text)
        assert f"has no {word} " in str(error.value)
    with pytest.raises(ValueError, match="unknown encoding 'gpt9': it is one of toy, cl100k_base"):
        tokens.encoding("gpt9")


def test_toy_ids_of_the_vocabulary_are_all_there_is_to_sample(toy):
    text = " Q : sam has 18 apples . he finds 5 . how many now ? A : 18 + 5 = 23 . #### 23"
    assert tokens.decode(toy, tokens.encode(toy, text)) == text
    limit = tokens.vocab_size(toy)
    assert sorted([toy.eot_token, tokens.pad_id(toy)]) == [limit - 2, limit - 1]
    for i in range(limit):
        word = tokens.decode(toy, [i])
        assert word.startswith((" ", "<|")) or word.isdigit()


def test_decoding_never_fails(toy):
    strange = [
        -1,
        -(10**30),
        10**30,
        2**31,
        2**32,
        2**63,
        100256,
        100261,
        100275,
        100277,
        100351,
        np.int64(7),
    ]
    assert tokens.decode(toy, [-1, 10**30]) == f"<|-1|><|{10**30}|>"
    assert tokens.decode(toy, [*range(tokens.vocab_size(toy) + 300), *strange])
    assert tokens.decode(toy, torch.tensor([-1, 3])) == "<|-1|>3" and tokens.decode(toy, []) == ""


def test_decoding_never_fails_cl100k(cl100k):
    assert (
        tokens.vocab_size(cl100k) == 100278
        and tokens.pad_id(cl100k) == 100277
        and cl100k.eot_token == 100257
    )
    assert tokens.decode(cl100k, [9906, 100277, 100256, -1]) == "Hello<|100277|><|100256|><|-1|>"
    assert "\ufffd" in tokens.decode(
        cl100k, tokens.encode(cl100k, "\U0001f9ee")[:1]
    )  # the half of a character
    assert tokens.decode(cl100k, range(100200, 100360))


def test_special_token_spelled_in_a_text_is_text(cl100k):
    """A web page could then end its own document."""
    ids = tokens.encode(cl100k, "a <|endoftext|> b")
    assert cl100k.eot_token not in ids and tokens.decode(cl100k, ids) == "a <|endoftext|> b"


# ----------------------------------------------------------------------------------- shards


def test_shard_of_another_encoding_is_refused(tmp_path):
    tokens.write_shard(tmp_path / "a.bin", range(50), "toy")
    assert tokens.read_shard(tmp_path / "a.bin", "toy").tolist() == list(range(50))
    with pytest.raises(ValueError, match="its tokens are 'toy', but 'cl100k_base' is needed"):
        tokens.read_shard(tmp_path / "a.bin", "cl100k_base")


def test_header_that_claims_a_terabyte_is_refused_before_allocation(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(
        tokens.HEADER.pack(tokens.MAGIC, tokens.VERSION, 2, 2**39, 0, b"toy") + bytes(100)
    )
    monkeypatch.setattr(np, "memmap", None)  # an attempt to map it would be a TypeError
    with pytest.raises(ValueError, match="its header says 1,099,511,627,840"):
        tokens.read_shard(path)


@pytest.mark.parametrize(
    "damage", ["magic", "version", "width", "cut", "longer", "header", "empty", "name", "absent"]
)
def test_corrupt_shard_is_refused(tmp_path, damage):
    path = tmp_path / "a.bin"
    tokens.write_shard(path, range(50), "toy")
    raw = path.read_bytes()
    path.write_bytes(
        {
            "magic": b"X" + raw[1:],
            "version": raw[:8] + b"\x09" + raw[9:],
            "width": raw[:12] + b"\x03" + raw[13:],
            "cut": raw[:-1],
            "longer": raw + b"\0",
            "header": raw[:40],
            "empty": b"",
            "name": raw[:28] + b"\xff" * 36 + raw[64:],
            "absent": b"",
        }[damage]
    )
    if damage == "absent":
        path.unlink()
    with pytest.raises(ValueError, match="a.bin: ") as error:
        tokens.read_shard(path, "toy")
    assert "\n" not in str(error.value)


def test_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.bin"
    tokens.write_shard(path, range(50), "toy")
    tokens.verify_shard(path)
    raw = bytearray(path.read_bytes())
    raw[80] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        tokens.verify_shard(path)


def test_write_that_fails_keeps_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    tokens.write_shard(path, range(50), "toy")
    with pytest.raises(ValueError, match="in 0.."):
        tokens.write_shard(path, [1, tokens.vocab_size(tokens.encoding("toy"))], "toy")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="a.bin"):
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
    """Also where a window lies across shards."""
    stream = stream_of(tmp_path, [40, 1, 3, 57], length=10)
    assert stream.tokens == 101 and stream.windows == 10 and stream.encoding_name == "toy"
    rows = np.concatenate([stream.rows(step, 2) for step in range(5)])
    assert rows.dtype == np.int64 and rows.shape == (10, 11)
    assert sorted(rows[:, 1:].ravel()) == list(range(1, 101))
    assert (np.diff(rows) == 1).all()


def test_step_is_the_same_on_any_number_of_ranks(tmp_path):
    stream = stream_of(tmp_path, [101], length=10)
    for step in (0, 1, 7):  # a batch of 6 crosses the end of the epoch
        whole = stream.rows(step, 6)
        for world in (2, 3):
            assert (
                np.concatenate(
                    [
                        stream.rows(step, 6, slice(start, start + 6 // world))
                        for start in range(0, 6, 6 // world)
                    ]
                )
                == whole
            ).all()


def test_order_is_a_function_of_seed_and_step(tmp_path):
    stream = stream_of(tmp_path, [101], length=10)
    again, other = tokens.Stream(tmp_path, "train", 10, 0), tokens.Stream(tmp_path, "train", 10, 1)
    late = stream.rows(3, 5).copy()
    assert (again.rows(3, 5) == late).all()
    assert (stream.rows(0, 10) != stream.rows(1, 10)).any() and (
        stream.rows(0, 10) != other.rows(0, 10)
    ).any()
    with pytest.raises(ValueError, match="has 101 tokens, one window needs 102"):
        tokens.Stream(tmp_path, "train", 101, 0)
    with pytest.raises(ValueError, match="no val_.*bin"):
        tokens.Stream(tmp_path, "val", 10, 0)


# ------------------------------------------------------------------ what a folder should hold


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards and one held out, listed as prepare.py does it."""
    for index in range(3):
        tokens.write_shard(tmp_path / f"train_{index:03}.bin", np.arange(40) + index, "toy")
    tokens.write_shard(tmp_path / "val_000.bin", range(30), "toy")
    files.note(tmp_path, name="x", shards=tokens.list_shards(tmp_path))
    return tmp_path


def read(folder):
    return tokens.Stream(folder, "train", 10, 0)


def test_shards_are_as_they_were_listed(shards):
    assert read(shards).tokens == 120
    tokens.verify(shards)


@pytest.mark.parametrize("use", [read, tokens.verify])
@pytest.mark.parametrize("name", ["train_000.bin", "train_001.bin", "train_002.bin"])
def test_missing_shard_is_refused(shards, use, name):
    (shards / name).unlink()
    with pytest.raises(ValueError, match=name):
        use(shards)


@pytest.mark.parametrize("use", [read, tokens.verify])
@pytest.mark.parametrize("name", ["train_003.bin", "train_001 (copy).bin"])
def test_added_shard_is_refused(shards, use, name):
    shutil.copy(shards / "train_001.bin", shards / name)
    with pytest.raises(ValueError, match="train_00") as error:
        use(shards)
    assert name in str(error.value)


@pytest.mark.parametrize("use", [read, tokens.verify])
def test_shard_of_another_content_is_refused(shards, use):
    """It is whole in itself: of another folder."""
    tokens.write_shard(shards / "train_001.bin", np.arange(40) + 7, "toy")
    with pytest.raises(ValueError, match="train_001.bin"):
        use(shards)


def test_held_out_shard_that_is_missing_is_found_by_verify(shards):
    (shards / "val_000.bin").unlink()
    with pytest.raises(ValueError, match="val_000.bin"):
        tokens.verify(shards)


def test_folder_without_a_list_is_read_but_not_with_a_gap_or_a_copy(shards):
    """Older folders, and those made by other means."""
    (shards / "world.json").unlink()
    assert read(shards).tokens == 120
    (shards / "train_000.bin").rename(shards / "train_003.bin")  # others count from 1
    assert read(shards).tokens == 120
    (shards / "train_002.bin").rename(shards / "kept")
    for use in (read, tokens.verify):
        with pytest.raises(ValueError, match="train_002.bin"):
            use(shards)
    (shards / "kept").rename(shards / "train_002.bin")
    shutil.copy(shards / "train_001.bin", shards / "train_004.bin")
    with pytest.raises(ValueError, match="train_004.bin.*train_001.bin"):
        read(shards)


def test_text_made_by_other_means_has_any_names(tmp_path):
    tokens.write_shard(tmp_path / "train_wiki.bin", range(30), "toy")
    tokens.write_shard(tmp_path / "train_books.bin", range(20), "toy")
    assert read(tmp_path).tokens == 50


def test_fingerprint_tells_one_text_from_another(shards):
    """From the headers alone."""
    first = read(shards).fingerprint
    assert first == read(shards).fingerprint == tokens.Stream(shards, "train", 5, 1).fingerprint
    assert first != tokens.Stream(shards, "val", 10, 0).fingerprint
    moved = shutil.copytree(shards, shards / "moved", ignore=lambda *_: ["moved"])
    assert read(moved).fingerprint == first
    (shards / "world.json").unlink()
    tokens.write_shard(shards / "train_001.bin", np.arange(40) + 7, "toy")
    assert read(shards).fingerprint != first


def test_git_lfs_pointer_is_no_shard(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "train_000.bin").write_text(pointer)
    with pytest.raises(ValueError, match="train_000.bin is a git-lfs pointer"):
        read(tmp_path)
