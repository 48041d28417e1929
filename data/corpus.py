"""Text of any size to token shards, in parallel, so that a run that was killed goes on as if nothing had happened.

A file is read line by line in chunks of about a megabyte. Processes tokenise the chunks, and this one puts the results
together in the order of the chunks, so their number changes nothing. Each finished shard is followed by state.json,
which says where the next chunk begins: what was done after it is done again, to the same bytes.
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

from data import problems, tokens
from data.overlap import GRAM, draw, grams, test_grams

ENCODING = "cl100k_base"
DOLMINO = "allenai/dolmino-mix-1124"  # data/dclm/0000/dclm-0000.json.zst, data/math/gsm8k/..., .json.gz, .jsonl
CHUNK = 1_000_000  # characters: 0.2 s of work, so that sending them is nothing beside it
COUNTS = ("documents", "tokens", "val_documents", "val_tokens", "passes")
PROSE, ROWS = (".txt",), (".jsonl", ".json")
PACKED = ("", ".gz", ".zst")

# ---- files


class File(NamedTuple):
    name: str  # for messages
    prose: bool  # lines of text; otherwise each line is a JSON object with a "text"
    size: int  # bytes on disk
    lines: Callable  # (skip, bar) -> the lines after the first `skip`; a tqdm bar, if any, counts the bytes


def local_files(path):
    """Every .txt, .jsonl and .json (one object a line) of a folder, or one such file; packed as .gz or .zst or not."""
    path = Path(path)
    files = []
    for found in sorted([path, *path.rglob("*")]):
        endings = {kind + packed: kind for kind in PROSE + ROWS for packed in PACKED}
        ending = next((ending for ending in endings if found.name.endswith(ending)), None)
        if ending and found.is_file():
            lines = functools.partial(local_lines, found)
            files.append(File(str(found), endings[ending] in PROSE, found.stat().st_size, lines))
    return files


def local_lines(path, skip, bar):
    return (line for _, line in itertools.islice(problems.lines_of(path, bar), skip, None))


def hub_files(revision, source):
    """The files of one source of DOLMino on the hub, streamed. They are read as lines of text: the columns beside "text"
    differ from file to file, which the json loader of `datasets` does not take."""
    from datasets import load_dataset  # slow to import

    pattern = f"hf://datasets/{DOLMINO}@{revision}/data/{source}/**/*.json*"
    try:
        stream = load_dataset("text", data_files={"train": pattern}, split="train", streaming=True)
    except Exception as error:  # of whatever library speaks to the hub
        raise ConnectionError(f"cannot list {pattern} ({error}); --source FOLDER reads a local copy") from error
    names = [f"{DOLMINO}/data/{source}, file {index}" for index in range(stream.num_shards)]
    return [File(name, False, 0, functools.partial(hub_lines, stream, index, name)) for index, name in enumerate(names)]


def hub_lines(stream, index, name, skip, _):
    try:
        for row in stream.shard(stream.num_shards, index).skip(skip):
            yield row["text"]
    except Exception as error:
        raise ConnectionError(f"{name}: lost ({error}); the same command goes on from the last shard") from error


def documents(file, skip, bar):
    """(number of its last line, document) of what a file has after `skip` lines. A .txt is cut at the first blank line
    after each 4,000 characters, so that a part of one long file can be held out."""
    gathered, size, number = [], 0, skip
    for number, line in enumerate(file.lines(skip, bar), skip + 1):
        gathered.append(line)
        size += len(line)
        if not file.prose or size >= 4000 and not line.strip():
            yield number, "".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield number, "".join(gathered)


def chunks(files, position, passes, limit, bar):
    """((pass, file, line) to go on from, arguments of encode_chunk) from such a position on."""
    passed, place, line = position
    if bar is not None:
        bar.update(sum(file.size for file in files[:place]))
    while passed < passes:
        for place, file in enumerate(files[place:], place):  # noqa: B020 (only the first pass may begin in the middle)
            first, held, size = line, [], 0
            for line, document in documents(file, first, bar):
                held.append(document)
                size += len(document)
                if size >= limit:
                    yield (passed, place, line), (file.name, file.prose, first, held)
                    first, held, size = line, [], 0
            if held:
                yield (passed, place, line), (file.name, file.prose, first, held)
            line = 0
        passed, place = passed + 1, 0


# ---- the processes that tokenise

job = {}  # of such a process: enc, seed, val_share, and index {13 words: numbers of the test questions that have them}


def start(name, seed, val_share, index):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C is enough
    threading.Thread(target=leave_with_parent, daemon=True).start()
    job.update(enc=tokens.encoding(name), seed=seed, val_share=val_share, index=index)


def leave_with_parent():
    """A parent that was killed cannot end its processes: they would wait for work forever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def text_of(name, number, line):
    """The "text" of one JSON row. An empty line or text: null is an empty text, a row without it an error."""
    try:
        text = json.loads(line)["text"] if line.strip() else None
        if text is None or type(text) is str:
            return text or ""
    except (ValueError, RecursionError, KeyError, TypeError):  # the second: brackets too deep
        pass
    raise ValueError(f'{name}:{number}: "text" must be text, and each line one JSON object')


def encode_chunk(name, prose, first, held):
    """-> ids of its documents one after the other, their lengths, which are held out, test questions found."""
    texts = held if prose else [text_of(name, number, line) for number, line in enumerate(held, first + 1)]
    texts = [text for text in texts if text.strip()]
    ids = [tokens.encode_document(job["enc"], text) for text in texts]
    held_out = [draw(job["seed"], text) < job["val_share"] for text in texts]
    grams_found = (gram for text in texts for gram in job["index"].keys() & grams(text)) if job["index"] else ()
    found = {number for gram in grams_found for number in job["index"][gram]}
    return np.concatenate([np.empty(0, np.uint32), *ids]), np.array([*map(len, ids)], int), np.array(held_out, bool), found


def in_order(pool, tasks, ahead):
    """(position, result) of each task, in their order; up to `ahead` of them are in work at a time."""
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


# ---- the shards


class Shards:
    """What is written of a folder, and what is waiting for the next shard. `state` is what state.json keeps of it."""

    def __init__(self, folder):
        self.folder, self.pending = folder, {"train": [], "val": []}
        self.file = folder / "state.json"
        fresh = {"source": 0, "position": [0, 0, 0], "shards": {"train": 0, "val": 0}, "counts": {}, "found": []}
        self.state = json.loads(self.file.read_text()) if self.file.exists() else fresh

    def add(self, name, split, ids, documents):
        prefix = "val_" if split == "val" else ""
        self.state["counts"][name][prefix + "documents"] += int(documents)
        self.state["counts"][name][prefix + "tokens"] += len(ids)
        self.pending[split] += [ids] if documents else []

    def save(self, **changes):
        """Shards first, then the state: a run that is killed between the two writes the same shards again."""
        for split, parts in self.pending.items():
            if parts:
                path = self.folder / f"{split}_{self.state['shards'][split]:03}.bin"
                tokens.write_shard(path, np.concatenate(parts), ENCODING)
                tokens.verify_shard(path)  # read back what the disk has
                self.state["shards"][split] += 1
                parts.clear()
        self.state.update(changes)
        beside = self.folder / "state.json.tmp"
        with open(beside, "w") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.file)


def write(folder, sources, budgets, *, seed, val_share, shard_tokens, processes, repeat=1, check=()):
    """The documents of sources {name: function that lists its Files} to train_000.bin, ..., val_000.bin, ...; an
    end-of-text id ends each.

    budgets {name: training tokens} or None for all there is: a source ends with the document that reaches its budget,
    after at most `repeat` passes. A document and its copies are held out by chance (`val_share`), fixed by the seed, and
    the files of a source come in an order fixed by the seed. Source follows source: training shuffles windows of all
    shards. Goes on from folder/state.json if there is one. Returns what world.json should say of it. Raises ValueError
    if a source has too little, or if there is nothing to hold out.
    """
    if not 0 < val_share < 1:
        raise ValueError("--val_share lies between 0 and 1: training watches the loss of held-out text")
    index, asked = test_grams(check)
    tokens.encoding(ENCODING)  # here, so that processes that are forked share it
    shards, processes = Shards(folder), processes or os.cpu_count()
    state = shards.state
    done = sum(counts["tokens"] for counts in state["counts"].values()) if budgets else 0
    pool = ProcessPoolExecutor(processes, initializer=start, initargs=(ENCODING, seed, val_share, index))
    try:
        pool.submit(int).result()  # forks them before the library that speaks to the hub has threads
        sources = {name: files() for name, files in sources.items()}
        total = sum(budgets.values()) if budgets else sum(file.size for files in sources.values() for file in files)
        with tqdm(total=total, initial=done, unit=" tokens" if budgets else "B", unit_scale=True, mininterval=1) as bar:
            for name in list(sources)[state["source"]:]:
                bar.set_description(name)
                files = [sources[name][i] for i in sorted(range(len(sources[name])), key=lambda i: draw(seed, i))]
                tasks = chunks(files, state["position"], repeat, min(CHUNK, shard_tokens), None if budgets else bar)
                results = in_order(pool, tasks, 4 * processes)
                write_source(shards, name, results, budgets and budgets[name], shard_tokens, bar)
                shards.save(source=state["source"] + 1, position=[0, 0, 0])
    except BrokenProcessPool:
        raise ValueError("a tokenising process died (out of memory?): the same command goes on, with fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)
    for split, prefix in (("train", ""), ("val", "val_")):
        size, texts = (sum(counts[prefix + key] for counts in state["counts"].values()) for key in ("tokens", "documents"))
        if not size:
            shards.file.unlink()  # nothing here is worth going on with
            raise ValueError(f"no text for {split}: change --val_share or --seed, or take more text")
        print(f"{split:<11} {size:>12,} tokens in {texts:,} documents, {state['shards'][split]} shards")
    facts = {"sources": state["counts"]}
    if check:
        print(f"{len(state['found']):,} of {asked:,} test questions share {GRAM} words in a row with the text")
        facts["test_questions"] = {"asked": asked, "found": len(state["found"])}
    return facts


def write_source(shards, name, results, budget, shard_tokens, bar):
    """The results of in_order to shards, until `budget` training tokens or the end. All but the last shard are saved."""
    counts = shards.state["counts"].setdefault(name, dict.fromkeys(COUNTS, 0))
    for position, (ids, lengths, held_out, found) in results:
        if budget:
            reached = np.searchsorted(np.cumsum(lengths * ~held_out), budget - counts["tokens"]) + 1  # with that document
            lengths, held_out = lengths[:reached], held_out[:reached]
            ids = ids[:lengths.sum()]
            bar.update(lengths[~held_out].sum())
        aside = np.repeat(held_out, lengths)
        shards.add(name, "train", ids[~aside], len(held_out) - held_out.sum())
        if position[0] == 0:  # what was held out stays out in a second pass
            shards.add(name, "val", ids[aside], held_out.sum())
        counts["passes"] = position[0] + 1
        shards.state["position"] = position
        shards.state["found"] = sorted(found.union(shards.state["found"])) if found else shards.state["found"]
        if budget and counts["tokens"] >= budget:
            return
        if sum(map(len, shards.pending["train"])) >= shard_tokens:
            shards.save()
    if budget:
        raise ValueError(f"{name} has {counts['tokens']:,} of the {budget:,} tokens asked for: the same command with "
                         f"--repeat {counts['passes'] + 1} reads it once more and goes on")
