"""Text to token ids, and token ids on disk.

Two encodings: `toy` (the words of data/toy.py, no download) and `cl100k_base` (tiktoken's, which
OLMo2 uses). A shard is one file: a header of 64 bytes, then the ids, little-endian, as uint16
where the vocabulary allows it (toy) and as uint32 elsewhere (cl100k_base). The world.json of a
folder lists its shards, so that a shard that is missing or was added is noticed.
"""

import functools
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from data import files, toy

PAD = "<|pad|>"
# ids that a model may sample; 100277 is OLMo2's padding, unknown to tiktoken
VOCABULARY = {"toy": toy.VOCAB, "cl100k_base": 100278}
MAGIC = b"TOKENS\r\n"  # the \r\n shows a copy that was made as text
VERSION = 1
# magic, version, bytes per id, number of ids, crc32 of the ids, name of the encoding
HEADER = struct.Struct("<8sIIQI36s")
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@functools.cache
def encoding(name):
    """The tiktoken.Encoding of that name.

    cl100k_base is downloaded once, or read from $TIKTOKEN_CACHE_DIR. Raises ValueError if the name
    is unknown or the download fails.
    """
    if name not in VOCABULARY:
        raise ValueError(f"unknown encoding {name!r}: it is one of {', '.join(VOCABULARY)}")
    if name == "toy":
        return toy.encoding()
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        raise ValueError(
            f"cannot download {name}, set TIKTOKEN_CACHE_DIR to a folder that has it ({error})"
        ) from None


def vocab_size(enc):
    """How many ids a model may sample, 0 .. vocab_size - 1.

    Toy ids above it are single bytes of unknown words.
    """
    return VOCABULARY[enc.name]


def pad_id(enc):
    """The id that fills the ends of a batch.

    Masks come from lengths, so it may also occur as a token.
    """
    return enc._special_tokens.get(PAD, VOCABULARY[enc.name] - 1)


def encode(enc, text):
    """Text to ids; a special token spelled out in the text stays text.

    Raises ValueError with the word if the encoding lacks one, as toy may.
    """
    ids = enc.encode_ordinary(text)
    limit = vocab_size(enc)
    if ids and max(ids) >= limit:
        first_bad = next(place for place, i in enumerate(ids) if i >= limit)
        start = enc.decode_with_offsets(ids)[1][first_bad]
        words = re.finditer(r"\s?\S+|\s", text)
        word = next(m.group() for m in words if m.start() <= start < m.end())
        raise ValueError(
            f"the {enc.name} encoding has no {word!r} (its words are written ' word', after one "
            "space)"
        )
    return ids


def encode_document(enc, text):
    """The ids of a text of any origin and the end-of-text id, as uint32 (n,)."""
    try:
        ids = enc.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a UTF-16 pair: tiktoken's encode_ordinary takes it so too
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return encode_document(enc, whole)
    except ValueError:  # a million blanks in a row are too many for tiktoken's regular expression
        parts = [text[i : i + 10**5] for i in range(0, len(text), 10**5)]
        ids = np.concatenate([encode_document(enc, part)[:-1] for part in parts])
    return np.append(ids, np.uint32(enc.eot_token))


@functools.cache
def _bytes_of(enc):
    ranks = enc._mergeable_ranks | {text.encode(): i for text, i in enc._special_tokens.items()}
    return {i: token for token, i in ranks.items()}


def decode(enc, ids):
    """Ids to text. Never fails.

    An id that tiktoken does not know becomes <|id|>, broken UTF-8 becomes replacement marks.
    """
    table = _bytes_of(enc)  # tiktoken's own decode raises on such ids, on some versions it panics
    parts = [table[i] if i in table else b"<|%d|>" % i for i in map(int, ids)]
    return b"".join(parts).decode("utf-8", "replace")


class Header(NamedTuple):
    encoding_name: str
    dtype: np.dtype
    count: int
    crc32: int


def write_shard(path, ids, encoding_name):
    """Write ids (any sequence of int) as one shard, whole or not at all."""
    limit = vocab_size(encoding(encoding_name))
    ids = np.asarray(ids)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= limit:
        raise ValueError(f"{path}: a shard needs at least one id and all of them in 0..{limit - 1}")
    ids = ids.astype(DTYPES[2 if limit <= 2**16 else 4], copy=False)
    checksum = zlib.crc32(ids)
    with files.whole_file(path, "wb") as file:
        name = encoding_name.encode()
        file.write(HEADER.pack(MAGIC, VERSION, ids.itemsize, ids.size, checksum, name))
        ids.tofile(file)


def read_header(path, encoding_name=None):
    """The Header of a shard.

    Raises ValueError if it is not a whole shard, or one of another encoding than asked for.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise ValueError(f"{path}: cannot read it ({error.strerror})") from None
    files.refuse_pointer(raw, path)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise ValueError(f"{path}: not a token shard, make one with data/prepare.py")
    _, version, width, count, crc32, name = HEADER.unpack(raw)
    if version != VERSION or width not in DTYPES:
        raise ValueError(
            f"{path}: shard version {version}, {width} bytes per id; this code reads version "
            f"{VERSION}"
        )
    name = name.rstrip(b"\0").decode("ascii", "replace")
    if encoding_name not in (None, name):
        raise ValueError(f"{path}: its tokens are {name!r}, but {encoding_name!r} is needed")
    claimed = HEADER.size + count * width
    if count == 0 or size != claimed:  # before any memory is taken for what the header claims
        raise ValueError(f"{path}: {size:,} bytes, its header says {claimed:,}: prepare it again")
    return Header(name, DTYPES[width], count, crc32)


def read_shard(path, encoding_name=None):
    """The ids of a shard as a read-only np.memmap; see read_header for what is refused."""
    header = read_header(path, encoding_name)
    return np.memmap(path, header.dtype, "r", offset=HEADER.size, shape=(header.count,))


def verify_shard(path):
    """Read all of a shard; ValueError if its checksum is not the one that was written."""
    if zlib.crc32(read_shard(path)) != read_header(path).crc32:
        raise ValueError(f"{path}: its checksum is wrong, prepare it again")


# ---------------------------------------------------------------------------- folders of shards

SPLITS = ("train", "val")


def shard_paths(folder, split) -> list[Path]:
    return sorted(Path(folder).glob(f"{split}_*.bin"))


def list_shards(folder) -> dict:
    """For world.json: {split: {name: {"count", "crc32"}}} of the shards that are in a folder."""
    listed = {split: {} for split in SPLITS}
    for split in SPLITS:
        for path in shard_paths(folder, split):
            header = read_header(path)
            listed[split][path.name] = {"count": header.count, "crc32": header.crc32}
    return listed


def checked_shards(folder, split) -> dict[Path, Header]:
    """The shards of a split with their headers, in order; {} if there are none, nor listed.

    They are compared with the list in the folder's world.json. Raises ValueError for the first
    that is missing, was added or has another content. In a folder without a list (older, or made
    by other means) a gap in the numbers and two shards of one content are refused.
    """
    headers = {path: read_header(path) for path in shard_paths(folder, split)}
    way_out = "put the folder back as it was, or prepare it again"
    listed = files.read_world(folder).get("shards")
    if listed is None:
        check_numbers(folder, split, headers)
        return headers
    listed = listed.get(split, {})
    for name in sorted({path.name for path in headers} | listed.keys()):
        path = Path(folder) / name
        if path not in headers:
            raise ValueError(f"{path} is missing, {folder}/world.json lists it: {way_out}")
        if name not in listed:
            raise ValueError(f"{path} is not listed in {folder}/world.json: {way_out}")
        header = headers[path]
        if {"count": header.count, "crc32": header.crc32} != listed[name]:
            raise ValueError(f"{path} is not the shard that {folder}/world.json lists: {way_out}")
    return headers


def check_numbers(folder, split, headers):
    """Raises ValueError if numbered shards have a gap, or if a shard is there twice."""
    found = [re.fullmatch(rf"{split}_(\d+)\.bin", path.name) for path in headers]
    numbers = sorted(int(match[1]) for match in found if match)
    if len(numbers) == len(headers) and numbers:
        first = min(numbers[0], 1)  # others count from 1
        missing = sorted({*range(first, numbers[-1])} - {*numbers})
        if missing:
            raise ValueError(
                f"{Path(folder) / f'{split}_{missing[0]:03}.bin'} is missing between the others: "
                "put it back, or number the shards anew"
            )
    seen = {}
    for path, header in headers.items():
        other = seen.setdefault((header.count, header.crc32), path)
        if other != path:
            raise ValueError(f"{path} is a copy of {other.name}: remove one of them")


def verify(folder, rank=0, world=1):
    """Compare all the text of a folder with its checksums, each rank its part of the shards.

    Raises ValueError for the first shard that is damaged, and as `checked_shards` does.
    """
    paths = sorted(path for split in SPLITS for path in checked_shards(folder, split))[rank::world]
    hidden = rank > 0
    title = "checksums of the text"
    for path in tqdm(paths, desc=title, unit="shard", delay=10, leave=False, disable=hidden):
        verify_shard(path)


def ahead(make, first, end):
    """make(first), ..., make(end - 1), each made by a thread while the one before is in use.

    An error of make is raised here.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, first)
        for step in range(first + 1, end + 1):
            made = coming.result()
            coming = thread.submit(make, step) if step < end else None
            yield made


def documents(ids, end):
    """Of each token of `ids` (B, T): its position in its document, and the document's number.

    The id `end` is the last of a document, as `encode_document` has it; a row begins with a
    document, or with what is left of one. Both int64 (B, T).
    """
    first = np.roll(ids == end, 1, axis=1)
    first[:, 0] = True
    place = np.arange(ids.shape[1])
    start = np.maximum.accumulate(np.where(first, place, 0), axis=1)
    return place - start, start


class Stream:
    """The text of a folder in windows of length + 1 ids, one shard {split}_*.bin after the other.

    Windows overlap by one id, so each id but the first is a target once an epoch (an incomplete
    last window is left out). Their order is a permutation of (seed, epoch): a step is the same on
    any number of ranks, after any resume. `seen`: tokens of that order that come before step 0,
    what a run of the same seed and length has read before. Raises ValueError for a folder that
    does not hold what it should, see `checked_shards`.
    """

    def __init__(self, folder, split, length, seed, encoding_name=None, seen=0):
        self.headers = checked_shards(folder, split)
        if not self.headers:
            raise ValueError(
                f"no {split}_*.bin in {folder}: make it with python data/prepare.py toy --out "
                f"{folder}"
            )
        first = next(iter(self.headers))
        self.encoding_name = read_header(first, encoding_name).encoding_name
        self.shards = [read_shard(path, self.encoding_name) for path in self.headers]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])  # and the end
        self.tokens = int(self.starts[-1])
        self.length = length
        self.seed = seed
        self.first = seen // length
        self.windows = (self.tokens - 1) // length
        if self.windows < 1:
            raise ValueError(
                f"{folder}: the {split} text has {self.tokens:,} tokens, one window needs "
                f"{length + 1:,}"
            )
        self.order = functools.lru_cache(2)(self._order)  # a batch may lie across two epochs

    @property
    def fingerprint(self) -> str:
        """Of the shards' headers: what a run is resumed on must be the text it was begun on."""
        return files.fingerprint(
            [[x.encoding_name, x.count, x.crc32] for x in self.headers.values()]
        )

    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.windows)

    def window(self, index):
        """Window `index` in text order, as int64 (length + 1,)."""
        start = index * self.length
        ids = np.empty(0, np.int64)
        while len(ids) <= self.length:  # a window may lie across two shards
            at = start + len(ids)
            shard = int(np.searchsorted(self.starts, at, side="right")) - 1
            offset = at - self.starts[shard]
            ids = np.append(ids, self.shards[shard][offset : offset + self.length + 1 - len(ids)])
        return ids

    def beginning(self, count):
        """The first `count` windows in text order, or all: int64 (windows, length + 1)."""
        return np.stack([self.window(i) for i in range(min(count, self.windows))])

    def chosen(self, step, batch):
        """The indices of the `batch` windows of step `step` (from 0), on all ranks together."""
        first = self.first + step * batch
        places = (divmod(place, self.windows) for place in range(first, first + batch))
        return [int(self.order(epoch)[index]) for epoch, index in places]

    def rows(self, step, batch, part=slice(None)):
        """The rows of step `step` (from 0), or that part of them: int64 (B, length + 1)."""
        return np.stack([self.window(i) for i in self.chosen(step, batch)[part]])
