"""Files and folders: read with a message that names the line, written whole or not at all."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import zlib
from pathlib import Path

KINDS = {str: "text", int: "a whole number", list: "a list of texts"}

# ---------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """An open file that becomes `path` when the block ends without an error; text is UTF-8.

    It is written beside `path` as PATH.tmp, flushed to the disk and renamed, so that `path` is
    never half written. Raises ValueError if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"could not write {path}: {error}; what was there is intact") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_rows(path, rows):
    """Rows as a jsonl file: one JSON object a line."""
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------- reading


def read_rows(path) -> list[dict]:
    """The rows of a jsonl file of our own.

    A last line without its end is left out: its writer was killed. Any other line that is not
    JSON raises ValueError.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON") from None
    return rows


def unpacked(raw, path):
    """The open file `raw` as it was before it was packed as .gz or .zst, if it was."""
    if path.endswith(".zst"):
        import pyarrow  # comes with `datasets`; notices a truncated file, zstandard does not

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    if path.endswith(".gz"):
        return gzip.open(raw)
    return contextlib.nullcontext(raw)


def lines_of(path, bar=None):
    """(line number, line) of a UTF-8 file, packed as .gz or .zst or not.

    bar: a tqdm that counts the bytes read from the disk. Raises ValueError if the file cannot be
    read to its end.
    """
    number = 0
    try:
        with open(path, "rb") as raw, unpacked(raw, str(path)) as file:
            start = bar.n if bar is not None else 0
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8")
                if bar is not None:
                    bar.update(start + raw.tell() - bar.n)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read after line {number} ({error})") from None


def read_jsonl(path, fields, bar=None):
    """The rows of a .jsonl(.gz, .zst) file that anybody may have written.

    fields: {name: str, int or list (of str)}. Raises ValueError with the file and line at fault.
    """
    number = 0
    for number, line in lines_of(path, bar):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the second: brackets too deep
            raise ValueError(f"{path}:{number}: not one JSON object a line ({error})") from None
        for name, kind in fields.items():
            value = row.get(name) if type(row) is dict else None
            texts = kind is not list or type(value) is list and all(type(x) is str for x in value)
            if type(value) is not kind or not texts:
                found = repr(str(value)[:60])
                raise ValueError(f'{path}:{number}: "{name}" must be {KINDS[kind]}, not {found}')
        yield row
    if not number:
        raise ValueError(f"{path}: the file is empty")


def fingerprint(value) -> str:
    """Twelve hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# ------------------------------------------------- folders that prepare.py makes, with world.json

OPERATIONAL = {"out", "overwrite", "processes", "repeat"}  # may differ when a command resumes


def settings(cfg) -> dict:
    """What shapes the folder, as world.json holds it."""
    shaping = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in OPERATIONAL}
    return json.loads(json.dumps(shaping))


def read_world(folder) -> dict:
    """The settings a folder was made with; empty if it has no world.json."""
    path = Path(folder) / "world.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def note(folder, **facts):
    """Add facts to world.json."""
    world = read_world(folder) | facts
    with whole_file(Path(folder) / "world.json") as file:
        file.write(json.dumps(world, indent=1) + "\n")


@contextlib.contextmanager
def new_folder(cfg, name, **facts):
    """A folder to fill. It becomes cfg.out when all went well; what was there stays until then.

    When something failed the folder is removed, unless it has a state.json: then the same command
    finds it again. Raises ValueError if cfg.out exists and --overwrite was not given, or is no
    folder of prepare.py.
    """
    out = Path(cfg.out)
    new = Path(f"{out}.new")
    old = Path(f"{out}.old")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists: --overwrite replaces it, --out makes another")
    if out.exists() and not read_world(out):
        raise ValueError(
            f"{out} is not replaced, it was not made by prepare.py (it has no world.json)"
        )
    world = {"name": name, **settings(cfg), **facts}
    begun = read_world(new)
    differ = [key for key in world if world[key] != begun.get(key)]
    resumes = (new / "state.json").exists()
    if resumes and differ and not cfg.overwrite:
        key = differ[0]
        raise ValueError(
            f"{new} is the beginning of another command ({key} was {begun.get(key)}, is "
            f"{world[key]}): give that one again to resume it, --overwrite drops it, --out makes "
            "another"
        )
    if differ or not resumes:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        note(new, **world)
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
        (out / "state.json").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if not (new / "state.json").exists():
            shutil.rmtree(new, ignore_errors=True)
