"""Text to shards: the mix, parallel, resumable after kill -9, from files and from the hub, on real
text.
"""

import collections
import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets as hub
import numpy as np
import pytest
import zstandard

from data import corpus, overlap, prepare, problems, tokens
from helpers import DATASETS, ROOT

pytestmark = pytest.mark.skipif(
    not DATASETS.is_dir(), reason=f"no {DATASETS}; set RL_DATASETS to the folder of real data"
)
TWO = "wiki=0.6,math=0.4".split(",")


@pytest.fixture(autouse=True)
def cl100k(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
    return tokens.encoding("cl100k_base")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Real text as DOLMino lays it out: a folder a source, rows packed in three ways, other columns
    in each file.
    """
    folder = tmp_path_factory.mktemp("source")

    def rows(name):
        files = [
            file for file in corpus.local_files(DATASETS / "pretrain_text") if name in file.name
        ]
        raw = [
            (file, number, text)
            for file in files
            for number, text in corpus.documents(file, 0, None)
        ]
        return [
            text if file.prose else corpus.text_of(file.name, number, text)
            for file, number, text in raw
        ]

    wiki, math = rows("wikitext2_valid")[:120], [text[:3000] for text in rows("open_logic")[:180]]
    for path, texts, more in (
        ("wiki/wiki-0000.json.gz", wiki[:70], {"metadata": {"length": 5}}),
        ("wiki/wiki-0001.json.gz", wiki[70:], {"metadata": {"url": "x", "length": "5"}}),
        ("math/gsm8k/main/train.jsonl", math[:30], {}),
        ("math/owm/0000.json.zst", math[30:120], {"id": 3, "attributes": {"a": [[0, 1, 0.5]]}}),
        ("math/tulu_math/b.jsonl.gz", math[120:], {"id": "3", "source": None}),
    ):
        raw = "".join(json.dumps({**more, "text": text}) + "\n" for text in texts).encode()
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(path).suffix, bytes)(
            raw
        )
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(packed)
    return folder


def settings(source, out, **changes):
    return prepare.Dolmino(
        **{
            "source": str(source),
            "out": str(out),
            "tokens": 90_000,
            "mix": tuple(TWO),
            "val_share": 0.05,
            "shard_tokens": 12_000,
            "processes": 2,
        }
        | changes
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def documents(folder, split="train"):
    """The documents of a folder's shards, each as the bytes of its ids."""
    ids = np.concatenate(
        [
            tokens.read_shard(path, "cl100k_base")
            for path in sorted(Path(folder).glob(f"{split}_*.bin"))
        ]
    )
    assert ids[-1] == 100257
    return [part.tobytes() for part in np.split(ids, np.flatnonzero(ids == 100257) + 1)[:-1]]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an uninterrupted run with one process makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
        prepare.make_dolmino(
            settings(source, out := tmp_path_factory.mktemp("whole") / "out", processes=1)
        )
    return out


# ------------------------------------------------------------------------------------------ the mix


def test_mix_has_its_shares_and_each_document_once(source, whole):
    """Each source ends with the document that reaches its budget."""
    world = json.loads((whole / "world.json").read_text())
    assert world["name"] == "dolmino-math40" and world["tokens"] == 90_000
    longest = max(map(len, documents(whole))) // 4
    for name, share in (("wiki", 0.6), ("math", 0.4)):
        assert 0 <= world["sources"][name]["tokens"] - share * 90_000 < longest
    for split, prefix in (("train", ""), ("val", "val_")):
        found = documents(whole, split)
        assert (
            len(set(found))
            == len(found)
            == sum(counts[prefix + "documents"] for counts in world["sources"].values())
        )
        assert sum(map(len, found)) == 4 * sum(
            counts[prefix + "tokens"] for counts in world["sources"].values()
        )
    assert (
        sum(counts["val_tokens"] for counts in world["sources"].values()) < 20_000
    )  # of the read, not of the last chunk
    assert not set(documents(whole)) & set(documents(whole, "val"))
    enc = tokens.encoding("cl100k_base")
    texts = [
        corpus.text_of("", 0, line)
        for file in corpus.local_files(source)
        for line in file.lines(0, None)
    ]
    encoded = {
        np.array([*enc.encode_ordinary(text), enc.eot_token], np.uint32).tobytes() for text in texts
    }
    assert encoded > {*documents(whole), *documents(whole, "val")}
    stream = tokens.Stream(whole, "train", 256, 0)
    assert (
        len(stream.shards) > 5 and stream.shards[0].dtype == np.uint32 and stream.tokens >= 90_000
    )


def test_number_of_processes_changes_nothing(source, whole, tmp_path):
    prepare.make_dolmino(settings(source, tmp_path / "out", processes=3))
    assert contents(tmp_path / "out") == contents(whole)
    prepare.make_dolmino(settings(source, tmp_path / "other", seed=1))
    assert contents(tmp_path / "other")["train_004.bin"] != contents(whole)["train_004.bin"]


def test_extra_tokens_of_a_source(source, tmp_path, capsys):
    """The data study: the mix as it was and more math."""
    prepare.make_dolmino(settings(source, tmp_path / "out", tokens=30_000, extra=("math=40e3",)))
    world = json.loads((tmp_path / "out" / "world.json").read_text())
    assert world["name"] == "dolmino-math74.3"
    assert (
        18_000 <= world["sources"]["wiki"]["tokens"] < 20_000
        and 52_000 <= world["sources"]["math"]["tokens"] < 54_000
    )
    default = prepare.budgets_of(prepare.Dolmino())[0]
    assert (
        default["dclm"] == round(0.472 / 0.999 * 50e9) and sum(default.values()) == 50_000_000_000
    )
    assert list(default) == ["dclm", "flan", "wiki", "pes2o", "stackexchange", "math"]


def test_source_that_ends_early_is_read_again_only_when_asked(source, tmp_path):
    """And then goes on, to what one command with --repeat 2 gives; what was held out stays out of
    the second pass and is held out once.
    """
    with pytest.raises(
        ValueError,
        match="wiki has .* of the 300,000 tokens asked for: the same command with --repeat 2",
    ):
        prepare.make_dolmino(settings(source, tmp_path / "a", tokens=300_000, mix=("wiki=1",)))
    assert not (tmp_path / "a").exists() and (tmp_path / "a.new" / "state.json").exists()
    for name in ("a", "b"):
        prepare.make_dolmino(
            settings(source, tmp_path / name, tokens=300_000, mix=("wiki=1",), repeat=2)
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    world = json.loads((tmp_path / "a" / "world.json").read_text())
    train, val = documents(tmp_path / "a"), documents(tmp_path / "a", "val")
    assert world["sources"]["wiki"]["passes"] == 2 and set(collections.Counter(train).values()) == {
        1,
        2,
    }
    assert not set(train) & set(val) and len(val) == len(set(val)) and len({*train, *val}) == 120


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mix": ("wiki=1", "wiki=2")}, "--mix takes SOURCE=NUMBER"),
        ({"mix": ("wiki",)}, "--mix takes"),
        ({"mix": ("wiki=-1",)}, "--mix takes"),
        ({"mix": ("wiki=nan",)}, "--mix takes"),
        ({"extra": ("math=x",)}, "--extra takes"),
        ({"mix": ("wikis=1",)}, "of wikis at"),
        ({"val_share": 0.0}, "--val_share lies between 0 and 1"),
        ({"val_share": 1e-9}, "no text for val"),
    ],
    ids=str,
)
def test_wrong_mix_is_refused_and_leaves_nothing(source, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare.make_dolmino(
            settings(source, tmp_path / "out", tokens=2000, **{"mix": ("wiki=1",), **change})
        )
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- killed


def killed_at(function, count, config):
    """In a forked process: kill -9 itself before (odd count) or after (even) a call of os.replace,
    which each shard and state ends with, or of os.rename, which the folder ends with: 1 and 2 are
    the first call, 3 and 4 the second.
    """
    calls, real = 0, getattr(os, function)

    def counted(*paths, **names):
        nonlocal calls
        calls += 1
        for side in (1, 0):
            if 2 * calls - side == count:
                os.kill(os.getpid(), signal.SIGKILL)
            if side:
                real(*paths, **names)

    setattr(os, function, counted)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    prepare.make_dolmino(config)


def test_killed_at_every_step_the_shards_are_the_same(source, whole, tmp_path):
    """Before and after the renames of shards, of the state, of the folder.

    Each run goes on from where the one before was killed.
    """
    config = settings(source, tmp_path / "out")
    for function, count in [
        *(("replace", count) for count in range(1, 11)),
        ("rename", 1),
        ("rename", 2),
    ]:
        process = multiprocessing.get_context("fork").Process(
            target=killed_at, args=(function, count, config)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "out" / "state.json").exists()  # killed after its last rename
    prepare.make_dolmino(config)
    assert contents(tmp_path / "out") == contents(whole) and [
        path.name for path in tmp_path.iterdir()
    ] == ["out"]


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):  # a zombie is not: who has to bury it differs from system to system
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_kill_9_of_the_real_command(source, whole, tmp_path):
    """As a user would. Its processes end with it."""
    flags = [
        "--source",
        source,
        "--out",
        tmp_path / "out",
        "--tokens",
        "90000",
        "--mix",
        ",".join(TWO),
        "--val_share",
        "0.05",
        "--shard_tokens",
        "12000",
        "--processes",
        "2",
    ]
    command = [sys.executable, ROOT / "data" / "prepare.py", "dolmino", *flags]
    with open(
        tmp_path / "bar", "w"
    ) as bar:  # not a pipe: processes that are left over would hold it open
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=bar)
    while not (tmp_path / "out.new" / "train_002.bin").exists():
        assert process.poll() is None, (tmp_path / "bar").read_text()
        time.sleep(0.001)
    workers = children(process.pid)
    process.kill()
    assert (
        process.wait() == -signal.SIGKILL
        and len(workers) == 2
        and "wiki" in (tmp_path / "bar").read_text()
    )
    deadline = time.time() + 20
    while any(map(alive, workers)):
        assert time.time() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "out").exists()
    prepare.make_dolmino(settings(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole)


def test_another_command_on_a_folder_that_is_begun_is_refused(source, whole, tmp_path, capsys):
    """Also when the source's files have changed."""
    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", source, copy], check=True)
    (copy / "math" / "owm" / "0000.json.zst").write_bytes(b"not zstandard")
    config = settings(copy, tmp_path / "out")
    with pytest.raises(ValueError, match="0000.json.zst: cannot be read after line 0"):
        prepare.make_dolmino(config)
    before = contents(tmp_path / "out.new")
    assert "state.json" in before and "train_003.bin" in before
    for other, name in (
        (settings(copy, tmp_path / "out", seed=1), "seed was 0, is 1"),
        (settings(source, tmp_path / "out"), "source was"),
    ):
        with pytest.raises(ValueError, match=f"beginning of another command .{name}"):
            prepare.make_dolmino(other)
    with pytest.raises(ValueError, match="beginning of another command .name was dolmino"):
        prepare.make_toy(prepare.Toy(out=str(tmp_path / "out")))
    assert contents(tmp_path / "out.new") == before
    (copy / "math" / "owm" / "0000.json.zst").write_bytes(
        (source / "math" / "owm" / "0000.json.zst").read_bytes()
    )
    with pytest.raises(ValueError, match="beginning of another command .files was"):
        prepare.make_dolmino(config)
    prepare.make_dolmino(settings(copy, tmp_path / "out", overwrite=True, processes=3))
    shards = {name: raw for name, raw in contents(whole).items() if name != "world.json"}
    assert {
        name: raw for name, raw in contents(tmp_path / "out").items() if name != "world.json"
    } == shards
    capsys.readouterr()
    prepare.make_dolmino(config)
    assert f"{tmp_path / 'out'} is finished" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the hub


def serve(monkeypatch, folder, after=None):
    """datasets.load_dataset as it is, but hf://...

    is `folder`; `after` so many rows the connection is lost.
    """
    real, asked = hub.load_dataset, []

    def load_dataset(kind, data_files, **options):
        asked.append((kind, data_files["train"], options))
        path = data_files["train"].replace(
            "hf://datasets/allenai/dolmino-mix-1124@main/data", str(folder)
        )
        stream = real(kind, data_files={"train": path}, **options)
        assert isinstance(stream, hub.IterableDataset)
        if after is not None:
            served = iter(range(after))

            def lost(row):
                if next(served, None) is None:
                    raise OSError("connection reset")
                return row

            stream = stream.map(lost)
        return stream

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    return asked


def test_hub_is_streamed_and_lost_connections_are_made_up_for(source, tmp_path, monkeypatch):
    """The same documents as from the files, whatever other columns they have."""
    asked = serve(monkeypatch, source)
    prepare.make_dolmino(settings("", tmp_path / "a"))
    pattern = "hf://datasets/allenai/dolmino-mix-1124@main/data/wiki/**/*.json*"
    assert asked[0] == ("text", pattern, {"split": "train", "streaming": True}) and len(asked) == 2
    world = json.loads((tmp_path / "a" / "world.json").read_text())
    assert (
        54_000 <= world["sources"]["wiki"]["tokens"]
        and 36_000 <= world["sources"]["math"]["tokens"]
    )
    prepare.make_dolmino(
        settings(source, tmp_path / "local", tokens=10**6, mix=("math=0.4",), repeat=9)
    )
    assert {*documents(tmp_path / "a")} & {*documents(tmp_path / "local")}
    for rows in (0, 25, 45):
        monkeypatch.undo()
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
        serve(monkeypatch, source, after=rows)
        with pytest.raises(OSError, match="connection reset.*goes on from the last shard"):
            prepare.make_dolmino(settings("", tmp_path / "b"))
    assert (tmp_path / "b.new" / "train_001.bin").exists()
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
    serve(monkeypatch, source)
    prepare.make_dolmino(settings("", tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ------------------------------------------------------------------------------- text of any origin


def test_text_that_tokenizers_choke_on(tmp_path, cl100k):
    blanks = " " * 1_000_000 + "x"
    texts = [
        blanks,
        "a\ud800b",
        "<|endoftext|>",
        "\n" * 300_000 + "x",
        "1" * 100_000,
        "\u6f22" * 50_000,
        "\0",
        "plain",
    ]
    lines = [json.dumps({"text": text}) for text in texts] + [
        "",
        '{"text": null}',
        '{"text": "  "}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    prepare.make_text(
        prepare.Text(source=str(tmp_path / "a.jsonl"), out=str(tmp_path / "out"), val_share=0.3)
    )
    found = documents(tmp_path / "out") + documents(tmp_path / "out", "val")
    decoded = sorted(tokens.decode(cl100k, np.frombuffer(raw, np.uint32)[:-1]) for raw in found)
    assert decoded == sorted([*texts[:1], "a\ufffdb", *texts[2:]])
    for text in texts[2:]:
        assert tokens.encode_document(cl100k, text).tolist() == [
            *cl100k.encode_ordinary(text),
            100257,
        ]


@pytest.mark.parametrize(
    "name, raw, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', 'a.jsonl:2: "text" must be text'),
        (
            "a.jsonl",
            b'{"text": "x"}\n' * 3 + b"[" * 100_000 + b"\n",
            'a.jsonl:4: "text" must be text',
        ),
        ("a.json", b'{"text": 3}\n', 'a.json:1: "text" must be text'),
        ("a.txt.gz", b"\x1f\x8b\x08\x00", "a.txt.gz: cannot be read after line 0"),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{"text": "x"}\n' * 9)[:-3],
            "a.jsonl.zst: cannot be read after line",
        ),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt: cannot be read after line 2"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_broken_text_is_named_and_leaves_nothing(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        prepare.make_text(prepare.Text(source=str(tmp_path / name), out=str(tmp_path / "out")))
    (tmp_path / name).unlink()
    assert not list(tmp_path.iterdir())


def test_test_questions_in_the_text_are_counted(tmp_path, capsys):
    """Thirteen words in a row, whatever stands between them."""
    question = "Ann has 3 red apples and 4 green ones; how many apples has she in all?"  # 15 words
    rows = [
        {"id": str(i), "question": text, "answer": "7", "solutions": []}
        for i, text in enumerate((question, "Who?", "x " * 40))
    ]
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    thirteen = " ".join(question.upper().replace(";", " --").split()[:14])
    assert len(overlap.words(thirteen).split()) == 13
    filler = random.Random(0).sample(
        sorted({word for line in open(__file__) for word in line.split()}), 50
    )
    twelve = " ".join(thirteen.split()[:-1])
    for name, text, found in (("yes", thirteen, 1), ("no", twelve, 0)):
        lines = [json.dumps({"text": f"{i} {' '.join(filler)} {text}, {i}"}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        prepare.make_text(
            prepare.Text(
                source=str(tmp_path / f"{name}.jsonl"),
                out=str(tmp_path / name),
                val_share=0.3,
                check=(str(tmp_path / "asked"),),
            )
        )
        assert (
            f"{found} of 3 test questions share 13 words in a row with the text"
            in capsys.readouterr().out
        )
        assert json.loads((tmp_path / name / "world.json").read_text())["test_questions"] == {
            "asked": 3,
            "found": found,
        }
    assert problems.load(tmp_path / "asked", "test")


def test_a_test_question_in_held_out_text_is_not_in_the_text(tmp_path, capsys):
    question = "Ann has 3 red apples and 4 green ones; how many apples has she in all?"
    row = {"id": "a", "question": question, "answer": "7", "solutions": []}
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "test.jsonl").write_text(json.dumps(row) + "\n")
    texts = [question, *(f"nothing to see, number {i}" for i in range(30))]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out = [seed for seed in range(30) if overlap.draw(seed, question) < 0.3]
    trained_on = [seed for seed in range(30) if seed not in held_out]
    for seed, found in ((held_out[0], 0), (trained_on[0], 1)):
        out = tmp_path / str(seed)
        check = (str(tmp_path / "asked"),)
        prepare.make_text(
            prepare.Text(source=str(source), out=str(out), val_share=0.3, check=check, seed=seed)
        )
        assert f"{found} of 1 test questions share" in capsys.readouterr().out


def test_a_mix_of_nothing(source, tmp_path):
    with pytest.raises(ValueError, match="--mix"):
        prepare.make_dolmino(settings(source, tmp_path / "out", mix=(), extra=("wiki=1000",)))


# ------------------------------------------------------------------------- what is searched


def tree(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names_of(folder):
    found, left_out = corpus.search(folder)
    return [str(Path(file.name).relative_to(folder)) for file in found], dict(left_out)


def test_folders_that_are_links_are_searched(tmp_path):
    """Each folder once, even if a link leads back."""
    source = tmp_path / "source"
    tree(tmp_path / "disk", {"b/b.txt": "b\n"})
    tree(source, {"a/a.txt": "a\n"})
    (source / "linked").symlink_to(tmp_path / "disk")
    (source / "a" / "back").symlink_to(source)
    (source / "one.txt").symlink_to(source / "a" / "a.txt")
    (source / "gone.txt").symlink_to(tmp_path / "nothing")
    found, left_out = names_of(source)
    assert found == ["a/a.txt", "linked/b/b.txt", "one.txt"]
    assert sum(left_out.values()) == 2  # the way back, and the link to nothing


def test_endings_are_read_in_any_case_and_hidden_files_not(tmp_path, capsys):
    wanted = {"A.TXT": "a\n", "b.Jsonl": '{"text": "b"}\n', "deep/c.txt": "c\n"}
    others = {".hidden.txt": "x\n", ".cache/d.txt": "x\n", "e.md": "x\n", "f": "x\n"}
    tree(tmp_path, wanted | others)
    (tmp_path / "G.TXT.GZ").write_bytes(gzip.compress(b"g\n"))
    found, left_out = names_of(tmp_path)
    assert found == ["A.TXT", "G.TXT.GZ", "b.Jsonl", "deep/c.txt"]
    assert sorted(left_out.values()) == [1, 1, 2]
    texts = ["".join(file.lines(0, None)) for file in corpus.search(tmp_path)[0]]
    assert texts == ["a\n", "g\n", '{"text": "b"}\n', "c\n"]
    corpus.local_files(tmp_path)
    said = capsys.readouterr().out
    assert all(f"{count} {reason}" in said for reason, count in left_out.items())
    hidden = tmp_path / ".cache"
    assert [Path(file.name).name for file in corpus.search(hidden)[0]] == ["d.txt"]  # if named


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    tree(tmp_path, {"a.txt": "a\n", "closed/b.txt": "b\n"})
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(ValueError, match="closed"):
            corpus.search(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_pointer_among_the_texts_is_refused_and_a_bom_is_no_text(tmp_path, cl100k):
    lines = [json.dumps({"text": f"plain {i}"}) for i in range(40)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    settings = prepare.Text(str(tmp_path / "in"), out=str(tmp_path / "out"), val_share=0.3)
    prepare.make_text(settings)
    ids = [*documents(tmp_path / "out"), *documents(tmp_path / "out", "val")]
    texts = [tokens.decode(cl100k, np.frombuffer(raw, np.uint32)[:-1]) for raw in ids]
    assert sorted(texts) == sorted(f"plain {i}" for i in range(40))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "in" / "big.txt").write_text(pointer)
    settings = prepare.Text(str(tmp_path / "in"), out=str(tmp_path / "other"), val_share=0.3)
    with pytest.raises(ValueError, match="big.txt is a git-lfs pointer"):
        prepare.make_text(settings)


def test_documents_without_text_are_counted(tmp_path, capsys):
    lines = [json.dumps({"text": f"plain {i}"}) for i in range(40)]
    lines += ["", '{"text": null}', '{"text": "  "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    prepare.make_text(prepare.Text(str(tmp_path / "a.jsonl"), out=str(out), val_share=0.3))
    counts = json.loads((out / "world.json").read_text())["sources"]["text"]
    assert counts["empty"] == 3 and counts["documents"] + counts["val_documents"] == 40
    assert "3 documents without text" in capsys.readouterr().out


def test_files_of_no_source_are_counted(source, tmp_path, capsys):
    some = dict(tokens=30_000, mix=("wiki=1",), val_share=0.3)
    prepare.make_dolmino(settings(source, tmp_path / "out", **some))
    assert "3 files are of no source" in capsys.readouterr().out


# ------------------------------------------------------------------------ what was written


def test_folder_lists_its_shards(whole, tmp_path):
    listed = json.loads((whole / "world.json").read_text())["shards"]
    assert [*listed["train"]] == sorted(path.name for path in whole.glob("train_*.bin"))
    assert [*listed["val"]] == sorted(path.name for path in whole.glob("val_*.bin"))
    tokens.verify(whole)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    (copy / "train_001.bin").unlink()
    for use in (tokens.verify, lambda folder: tokens.Stream(folder, "train", 64, 0)):
        with pytest.raises(ValueError, match="train_001.bin"):
            use(copy)


def test_finished_folder_that_lost_a_shard_is_not_finished(source, whole, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    prepare.make_dolmino(settings(source, copy))
    (copy / "train_001.bin").unlink()
    with pytest.raises(ValueError, match="train_001.bin"):
        prepare.make_dolmino(settings(source, copy))


def test_display_that_is_switched_off_changes_nothing(source, whole, tmp_path):
    """TQDM_DISABLE=1: nothing is read from a bar."""
    flags = ["--source", source, "--out", tmp_path / "out", "--tokens", "90000"]
    flags += ["--mix", ",".join(TWO), "--val_share", "0.05", "--shard_tokens", "12000"]
    command = [sys.executable, ROOT / "data" / "prepare.py", "dolmino", *flags]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    subprocess.run(map(str, command), check=True, timeout=120, env=environment, capture_output=True)
    assert contents(tmp_path / "out") == contents(whole)
