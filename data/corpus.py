"""Text of any size to token shards, in parallel; a run that was killed resumes to the same bytes.

A file is read line by line in chunks of about a megabyte. Processes tokenise the chunks, and this
one puts the results together in the order of the chunks, so their number changes nothing. Each
finished shard is followed by state.json, which says where the next chunk begins: what was done
after it is done again, to the same bytes.
"""

import collections
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import files, tokens
from data.overlap import GRAM, draw, grams, test_grams

ENCODING = "cl100k_base"
# data/dclm/0000/dclm-0000.json.zst, data/math/gsm8k/..., .json.gz, .jsonl
DOLMINO = "allenai/dolmino-mix-1124"
CHUNK = 1_000_000  # characters: 0.2 s of work, so that sending them is nothing beside it
COUNTS = ("documents", "tokens", "val_documents", "val_tokens", "passes", "empty")
PROSE = (".txt",)  # read as prose; of other files each line is a JSON object with a "text"
ENDINGS = PROSE + (".jsonl", ".json")
PACKED = ("", ".gz", ".zst")

# ------------------------------------------------------------------------------------ files


class File(NamedTuple):
    name: str  # for messages
    prose: bool  # lines of text; otherwise each line is a JSON object with a "text"
    size: int  # bytes on disk
    lines: Callable  # (skip, bar) -> the lines after the first `skip`; a tqdm bar counts the bytes


def local_files(path):
    """The text files of a folder as `search` finds them; the console says what is left out."""
    found, left_out = search(path)
    if left_out:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        print(f"{path}: {len(found):,} files are read; left out: {counts}")
    return found


def search(path) -> tuple[list[File], collections.Counter]:
    """Every .txt, .jsonl and .json (one object a line) of a folder, or one such file.

    Packed as .gz or .zst or not, the ending in any case; folders that are links are searched.
    Hidden files and folders are not read. Also {reason: number} of what was left out.
    """
    path = Path(path)
    paths = [path]
    left_out = collections.Counter()
    if path.is_dir():
        paths = list(paths_below(path, left_out))
    found = []
    for file in sorted(paths):
        name = file.name.lower()
        kinds = [kind for kind in ENDINGS for packed in PACKED if name.endswith(kind + packed)]
        if not file.is_file():
            left_out["links to nothing, or no files"] += file.is_symlink() or file.exists()
        elif not kinds:
            left_out["files of other kinds"] += 1
        else:
            lines = functools.partial(local_lines, file)
            found.append(File(str(file), kinds[0] in PROSE, file.stat().st_size, lines))
    return found, +left_out


def paths_below(folder, left_out):
    """The paths of all files below a folder; left_out counts what is hidden, and folders met twice.

    Links to folders are followed, each folder once: a link to a folder above has no end.
    """

    def refuse(error):
        raise ValueError(f"cannot search {error.filename} ({error.strerror})")

    met = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in met:
            left_out["folders met before"] += 1
            folders.clear()
            continue
        met.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted({*folders} - {*hidden}, key=lambda name: (is_link(here, name), name))
        left_out["hidden folders"] += len(hidden)
        left_out["hidden files"] += sum(name.startswith(".") for name in names)
        yield from (Path(here, name) for name in names if not name.startswith("."))


def is_link(folder, name) -> bool:
    return os.path.islink(os.path.join(folder, name))


def local_lines(path, skip, bar):
    return (line for _, line in itertools.islice(files.lines_of(path, bar), skip, None))


def hub_files(revision, source):
    """The files of one source of DOLMino on the hub, streamed.

    They are read as lines of text: the columns beside "text" differ from file to file, which the
    json loader of `datasets` does not take.
    """
    from datasets import load_dataset  # slow to import

    pattern = f"hf://datasets/{DOLMINO}@{revision}/data/{source}/**/*.json*"
    try:
        stream = load_dataset("text", data_files={"train": pattern}, split="train", streaming=True)
    except Exception as error:  # of whatever library speaks to the hub
        way_out = "--source FOLDER reads a local copy"
        raise ConnectionError(f"cannot list {pattern} ({error}); {way_out}") from error
    names = [f"{DOLMINO}/data/{source}, file {index}" for index in range(stream.num_shards)]
    lines = functools.partial(hub_lines, stream)
    return [
        File(name, False, 0, functools.partial(lines, index, name))
        for index, name in enumerate(names)
    ]


def hub_lines(stream, index, name, skip, _):
    try:
        for row in stream.shard(stream.num_shards, index).skip(skip):
            yield row["text"]
    except Exception as error:
        way_out = "the same command goes on from the last shard"
        raise ConnectionError(f"{name}: lost ({error}); {way_out}") from error


def documents(file, skip, bar):
    """(number of its last line, document) of what a file has after `skip` lines.

    A .txt is divided at the first blank line after each 4,000 characters, so that a part of one
    long file can be held out.
    """
    gathered = []
    size = 0
    number = skip
    for number, line in enumerate(file.lines(skip, bar), skip + 1):
        gathered.append(line)
        size += len(line)
        if not file.prose or size >= 4000 and not line.strip():
            yield number, "".join(gathered)
            gathered = []
            size = 0
    if gathered:
        yield number, "".join(gathered)


def chunks(listed, position, passes, limit, bar):
    """((pass, file, line) to resume from, arguments of encode_chunk) from such a position on."""
    first_pass, first_place, line = position
    if bar is not None:
        bar.update(sum(file.size for file in listed[:first_place]))
    for passed in range(first_pass, passes):
        for place in range(first_place, len(listed)):
            file = listed[place]
            first = line
            held = []
            size = 0
            for line, document in documents(file, first, bar):
                held.append(document)
                size += len(document)
                if size >= limit:
                    yield (passed, place, line), (file.name, file.prose, first, held)
                    first = line
                    held = []
                    size = 0
            if held:
                yield (passed, place, line), (file.name, file.prose, first, held)
            line = 0  # only the first file may begin in the middle, and only the first pass
        first_place = 0


# --------------------------------------------------------------- the processes that tokenise

# of such a process: enc, seed, val_share, and index {13 words: numbers of the test questions}
job = {}


def start(name, seed, val_share, index):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C is enough
    threading.Thread(target=leave_with_parent, daemon=True).start()
    job.update(enc=tokens.encoding(name), seed=seed, val_share=val_share, index=index)


def leave_with_parent():
    """A parent that was killed cannot end its processes: they would wait for work forever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def text_of(name, number, line):
    """The "text" of one JSON row.

    An empty line and "text": null are an empty text, a row without "text" is an error.
    """
    try:
        text = json.loads(line)["text"] if line.strip() else None
        if text is None or type(text) is str:
            return text or ""
    except (ValueError, RecursionError, KeyError, TypeError):  # the second: brackets too deep
        pass
    raise ValueError(f'{name}:{number}: "text" must be text, and each line one JSON object')


class Chunk(NamedTuple):
    """What became of the documents of a chunk."""

    ids: np.ndarray  # of all of them, one after the other
    lengths: np.ndarray  # of each, in ids
    held_out: np.ndarray  # bool, of each
    found: set  # (number of a document, number of a test question in it)
    empty: int  # documents without text, which are left out


def encode_chunk(name, prose, first, held) -> Chunk:
    texts = held
    if not prose:
        texts = [text_of(name, number, line) for number, line in enumerate(held, first + 1)]
    full = [text for text in texts if text.strip()]
    ids = [tokens.encode_document(job["enc"], text) for text in full]
    held_out = [draw(job["seed"], text) < job["val_share"] for text in full]
    index = job["index"]
    found = set()
    for place, text in enumerate(full if index else ()):
        shared = index.keys() & grams(text)
        found |= {(place, number) for gram in shared for number in index[gram]}
    return Chunk(
        np.concatenate([np.empty(0, np.uint32), *ids]),
        np.array([*map(len, ids)], int),
        np.array(held_out, bool),
        found,
        len(texts) - len(full),
    )


def in_order(pool, tasks, ahead):
    """(position, result) of each task, in their order; up to `ahead` of them are in work."""
    waiting = collections.deque()
    try:
        for position, arguments in tasks:
            waiting.append((position, pool.submit(encode_chunk, *arguments)))
            if len(waiting) == ahead:
                position, future = waiting.popleft()
                yield position, future.result()
        for position, future in waiting:
            yield position, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


# -------------------------------------------------------------------------------- the shards


class Shards:
    """What is written of a folder, and what is waiting for the next shard.

    `state` is what state.json keeps of it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.pending = {"train": [], "val": []}
        self.file = folder / "state.json"
        self.state = {
            "source": 0,
            "position": [0, 0, 0],
            "shards": {"train": 0, "val": 0},
            "counts": {},
            "found": [],
        }
        if self.file.exists():
            self.state = files.read_json(self.file, f"remove {folder}, and it begins anew")

    def add(self, name, split, ids, documents):
        prefix = "val_" if split == "val" else ""
        self.state["counts"][name][prefix + "documents"] += int(documents)
        self.state["counts"][name][prefix + "tokens"] += len(ids)
        self.pending[split] += [ids] if documents else []

    def save(self, **changes):
        """Shards first, then the state.

        A run that is killed between the two writes the same shards again.
        """
        for split, parts in self.pending.items():
            if parts:
                path = self.folder / f"{split}_{self.state['shards'][split]:03}.bin"
                tokens.write_shard(path, np.concatenate(parts), ENCODING)
                tokens.verify_shard(path)  # read back what the disk has
                self.state["shards"][split] += 1
                parts.clear()
        self.state.update(changes)
        files.write_json(self.file, self.state)


def write(
    folder, sources, budgets, *, seed, val_share, shard_tokens, processes, repeat=1, check=()
):
    """The documents of sources {name: function that lists its Files} to train_000.bin, val_000.bin.

    An end-of-text id ends each document. budgets: {name: training tokens} or None for all there
    is; a source ends with the document that reaches its budget, after at most `repeat` passes. A
    document and its copies are held out by chance (`val_share`), fixed by the seed, and the files
    of a source come in an order fixed by the seed. Source follows source: training shuffles
    windows of all shards. Resumes from folder/state.json if there is one.

    Returns what world.json should say of it. Raises ValueError if a source has too little, or if
    there is nothing to hold out.
    """
    if not 0 < val_share < 1:
        raise ValueError("--val_share lies between 0 and 1: training watches held-out text")
    index, asked = test_grams(check)
    tokens.encoding(ENCODING)  # here, so that processes that are forked share it
    shards = Shards(folder)
    state = shards.state
    processes = processes or os.cpu_count()
    done = sum(counts["tokens"] for counts in state["counts"].values()) if budgets else 0
    settings = (ENCODING, seed, val_share, index)
    pool = ProcessPoolExecutor(processes, initializer=start, initargs=settings)
    try:
        # forks them before the library that speaks to the hub has threads
        pool.submit(int).result()
        found = {name: list_files() for name, list_files in sources.items()}
        sizes = [file.size for listed in found.values() for file in listed]
        total = sum(budgets.values()) if budgets else sum(sizes)
        unit = " tokens" if budgets else "B"
        with tqdm(total=total, initial=done, unit=unit, unit_scale=True, mininterval=1) as bar:
            for name in list(found)[state["source"] :]:
                bar.set_description(name)
                listed = found[name]
                order = sorted(range(len(listed)), key=lambda i: draw(seed, i))
                ordered = [listed[i] for i in order]
                limit = min(CHUNK, shard_tokens)
                bytes_bar = None if budgets else bar
                tasks = chunks(ordered, state["position"], repeat, limit, bytes_bar)
                results = in_order(pool, tasks, 4 * processes)
                write_source(shards, name, results, budgets and budgets[name], shard_tokens, bar)
                shards.save(source=state["source"] + 1, position=[0, 0, 0])
    except BrokenProcessPool:
        raise ValueError(
            "a tokenising process died (out of memory?): the same command goes on, with fewer "
            "--processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return told(shards, check, asked)


def told(shards, check, asked):
    """Print what was written, and return what world.json says of it.

    Raises ValueError if a split is empty.
    """
    state = shards.state
    for split, prefix in (("train", ""), ("val", "val_")):
        size = sum(counts[prefix + "tokens"] for counts in state["counts"].values())
        texts = sum(counts[prefix + "documents"] for counts in state["counts"].values())
        if not size:
            shards.file.unlink()  # nothing here is worth resuming
            raise ValueError(
                f"no text for {split}: change --val_share or --seed, or take more text"
            )
        number = state["shards"][split]
        print(f"{split:<11} {size:>12,} tokens in {texts:,} documents, {number} shards")
    if empty := sum(counts["empty"] for counts in state["counts"].values()):
        print(f"{empty:,} documents without text are left out")
    facts = {"sources": state["counts"], "shards": tokens.list_shards(shards.folder)}
    if check:
        found = len(state["found"])
        print(f"{found:,} of {asked:,} test questions share {GRAM} words in a row with the text")
        facts["test_questions"] = {"asked": asked, "found": found}
    return facts


def write_source(shards, name, results, budget, shard_tokens, bar):
    """The results of in_order to shards, until `budget` training tokens or the end.

    All but the last shard are saved.
    """
    counts = dict.fromkeys(COUNTS, 0) | shards.state["counts"].get(name, {})
    shards.state["counts"][name] = counts
    for position, chunk in results:
        ids, lengths, held_out, found, empty = chunk
        if budget:
            so_far = np.cumsum(lengths * ~held_out)
            left = budget - counts["tokens"]
            reached = np.searchsorted(so_far, left) + 1  # with the document that reaches it
            lengths = lengths[:reached]
            held_out = held_out[:reached]
            ids = ids[: lengths.sum()]
            bar.update(lengths[~held_out].sum())
        aside = np.repeat(held_out, lengths)
        shards.add(name, "train", ids[~aside], len(held_out) - held_out.sum())
        if position[0] == 0:  # what was held out stays out in a second pass
            shards.add(name, "val", ids[aside], held_out.sum())
            counts["empty"] += empty
        counts["passes"] = position[0] + 1
        shards.state["position"] = position
        trained_on = np.flatnonzero(~held_out)  # of the documents before the budget was reached
        found = {number for place, number in found if place in trained_on}
        if found:
            shards.state["found"] = sorted(found.union(shards.state["found"]))
        if budget and counts["tokens"] >= budget:
            return
        if sum(map(len, shards.pending["train"])) >= shard_tokens:
            shards.save()
    if budget:
        raise ValueError(
            f"{name} has {counts['tokens']:,} of the {budget:,} tokens asked for: the same command "
            f"with --repeat {counts['passes'] + 1} reads it once more and goes on"
        )
