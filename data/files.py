"""Files and folders: read with a message that names the line, written whole or not at all."""

import contextlib
import dataclasses
import decimal
import gzip
import hashlib
import io
import json
import os
import shutil
import zlib
from pathlib import Path

KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list of texts"}
POINTER = b"version https://git-lfs.github.com/spec/"  # how a git-lfs pointer begins
BOM = "\ufeff"

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
    """Rows as a jsonl file: one JSON object a line. Raises ValueError as whole_file does."""
    rows = list(rows)  # an error while they are made is none of writing
    with whole_file(path) as file:
        for number, row in enumerate(rows, 1):
            line = json.dumps(row, ensure_ascii=False)
            refuse_surrogates(line, f"row {number} for {path}")
            file.write(line + "\n")


def write_json(path, content: dict):
    """One JSON object as a file, for people to read."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


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


def read_json(path, way_out="make it again") -> dict:
    """The one JSON object of a file. Raises ValueError with the path and the way out."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}): {way_out}") from None
    refuse_pointer(raw, path)
    try:
        content = json.loads(raw.decode("utf-8").removeprefix(BOM))
    except (ValueError, RecursionError) as error:  # the last: brackets too deep
        told = error if raw.strip() else "it is empty"
        raise ValueError(f"cannot read {path} ({told}): {way_out}") from None
    if type(content) is not dict:
        raise ValueError(f"{path} is not one JSON object: {way_out}")
    return content


def refuse_pointer(beginning: bytes, path):
    """Raises ValueError if a file that begins so is not the file but git-lfs's pointer to it."""
    if beginning.startswith(POINTER):
        raise ValueError(
            f"{path} is a git-lfs pointer, not the file itself: `git lfs pull` gets it"
        )


def refuse_surrogates(text: str, where: str):
    """Raises ValueError if a text has half a surrogate pair: no file can hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where}: {half} is half of a character, write it whole") from None


def unpacked(raw, path):
    """The open file `raw` as it was before it was packed as .gz or .zst, if it was."""
    if path.lower().endswith(".zst"):
        import pyarrow  # comes with `datasets`; notices a truncated file, zstandard does not

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    if path.lower().endswith(".gz"):
        return gzip.open(raw)
    return contextlib.nullcontext(raw)


def lines_of(path, bar=None):
    """(line number, line) of a UTF-8 file, packed as .gz or .zst or not; without a BOM.

    bar: a tqdm that counts the bytes read from the disk. Raises ValueError if the file cannot be
    read to its end, or is a git-lfs pointer.
    """
    number = 0
    read = 0  # bytes; a bar may be switched off, so nothing is read from it
    try:
        with open(path, "rb") as raw:
            refuse_pointer(raw.peek(len(POINTER)), path)
            with unpacked(raw, str(path)) as file:
                for number, line in enumerate(file, 1):
                    text = line.decode("utf-8")
                    yield number, text.removeprefix(BOM) if number == 1 else text
                    if bar is not None:
                        bar.update(raw.tell() - read)
                        read = raw.tell()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read after line {number} ({error})") from None


def read_jsonl(path, fields, bar=None):
    """The rows of a .jsonl(.gz, .zst) file that anybody may have written.

    fields: {name: str, int or list (of str)}; a number where text is wanted becomes its text.
    Raises ValueError with the file and line at fault.
    """
    for _, row in numbered_jsonl(path, fields, bar):
        yield row


def numbered_jsonl(path, fields, bar=None):
    """The rows of `read_jsonl`, each with its "FILE:LINE" for messages: (where, row)."""
    number = 0
    for number, line in lines_of(path, bar):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the second: brackets too deep
            raise ValueError(f"{where}: not one JSON object a line ({error})") from None
        check_row(row, fields, where)
        yield where, row
    if not number:
        raise ValueError(f"{path}: the file is empty")


def table(source, stem: str, sets, fields):
    """(where, row) of {stem}.jsonl or .jsonl.gz in the folder `source`, or, without one, of sets
    of the hub, [(repository, configuration, split), ...]."""
    if source:
        paths = (Path(source, f"{stem}.jsonl"), Path(source, f"{stem}.jsonl.gz"))
        path = next(filter(Path.exists, paths), None)
        if path is None:
            raise ValueError(f"no {stem}.jsonl or {stem}.jsonl.gz in {source}")
        yield from numbered_jsonl(path, fields)
        return
    from datasets import load_dataset  # slow to import

    for repository, config, split in sets:
        rows = load_dataset(repository, config, split=split)
        for number, row in enumerate(rows, 1):
            yield f"row {number} of {repository}, {config or 'default'}, {split}", row


def check_row(row, fields, where: str):
    """Raises ValueError if `row` is no dict with these fields; numbers become texts in place."""
    if type(row) is not dict:
        kind = {list: "an array", str: "a text"}.get(type(row)) or json.dumps(row)
        raise ValueError(f"{where}: {kind} where a JSON object is needed: {{{example(fields)}}}")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f'{where}: "{name}" must be {KINDS[kind]}, and it is missing')
        value = row[name]
        if kind is str and type(value) in (int, float):
            value = row[name] = number_text(value)
        texts = kind is not list or type(value) is list and all(type(x) is str for x in value)
        if type(value) is not kind or not texts:
            kinds = {dict: "an object", list: "an array", type(None): "null"}
            found = f"{kinds.get(type(value), type(value).__name__)} {str(value)[:60]!r}"
            raise ValueError(f'{where}: "{name}" must be {KINDS[kind]}, not {found}')
        for text in value if kind is list else [value] if kind is str else ():
            refuse_surrogates(text, f'{where}: "{name}"')


def example(fields) -> str:
    shown = {str: "...", int: 0, bool: True, list: ["..."]}
    return ", ".join(
        f"{json.dumps(name)}: {json.dumps(shown[kind])}" for name, kind in fields.items()
    )


def number_text(value: int | float):
    """A JSON number as a person writes it: 18, 0.5, 0.00001; NaN and infinity stay as they are."""
    if type(value) is int or not abs(value) < float("inf"):
        return str(value) if type(value) is int else value
    return format(decimal.Decimal(repr(value)), "f")


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
    if not path.is_file():
        return {}
    return read_json(path, "remove the folder and prepare it again")


def note(folder, **facts):
    """Add facts to world.json."""
    write_json(Path(folder) / "world.json", read_world(folder) | facts)


def finished(cfg, name, **facts) -> bool:
    """Whether cfg.out was made by this very command, which then has nothing to do.

    False too if there is nothing at cfg.out, or with --overwrite. Raises ValueError if cfg.out
    was made with other settings, or by something else than prepare.py.
    """
    out = Path(cfg.out)
    if cfg.overwrite or not out.exists():
        return False
    made = read_world(out)
    way_out = "--overwrite replaces it, --out makes another"
    if not made:
        raise ValueError(f"{out} exists, and has no world.json of prepare.py: --out makes another")
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    wanted = {**settings(cfg), **facts}
    for key, value in wanted.items():
        if key not in defaults and key not in made:
            continue  # an older folder does not say it
        was = made.get(key, json.loads(json.dumps(defaults.get(key), default=str)))
        if not same_setting(was, value):
            what = f"--{key}" if key in defaults else f"other {key.replace('_', ' ')}:"
            change = f"{what} {shown(was)}, not {shown(value)}"
            raise ValueError(f"{out} was made with {change}: {way_out}")
    if made.get("name") != name:
        raise ValueError(f"{out} is {made.get('name')!r}, not {name!r}: {way_out}")
    check_listed(out)
    print(f"{out} is finished")
    return True


def same_setting(one, other) -> bool:
    """Whether two values of a setting mean the same: equal, or two spellings of one path."""
    if type(one) is list and type(other) is list and len(one) == len(other):
        return all(map(same_setting, one, other))
    if one == other or type(one) is not str or type(other) is not str:
        return one == other
    paths = [os.path.realpath(text) for text in (one, other)]
    return paths[0] == paths[1] and os.path.exists(paths[0])


def shown(value) -> str:
    return ",".join(map(str, value)) if type(value) is list else json.dumps(value)


@contextlib.contextmanager
def new_folder(cfg, name, **facts):
    """A folder to fill. It becomes cfg.out when all went well; what was there stays until then.

    Its world.json says how it was made and lists its rows and prompts. When something failed the
    folder is removed, unless it has a state.json: then the same command finds it again. Raises
    ValueError if cfg.out exists and --overwrite was not given, or is no folder of prepare.py.
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
    resumes = (new / "state.json").exists()
    begun = read_world(new) if resumes else {}
    differ = [key for key in world if not same_setting(begun.get(key), world[key])]
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
        write_json(new / "world.json", world)
    try:
        yield new
        if contents := listing(new):
            note(new, contents=contents)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
        (out / "state.json").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    except ValueError as error:
        told = str(error)
        if str(new) not in told or (new / "state.json").exists():
            raise
        raise ValueError(told.replace(str(new), str(out))) from error  # `new` will be gone
    finally:
        if not (new / "state.json").exists():
            shutil.rmtree(new, ignore_errors=True)


def checksum(path) -> dict:
    """What world.json says of a file: its lines and the CRC-32 of its bytes."""
    raw = Path(path).read_bytes()
    return {"lines": raw.count(b"\n"), "crc32": zlib.crc32(raw)}


def listing(folder) -> dict:
    """{name: checksum} of the .jsonl and prompt.json files of a folder, those below it too."""
    paths = [*Path(folder).rglob("[!.]*.jsonl"), *Path(folder).rglob("prompt.json")]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(paths)}


def listed_in(folder, path) -> dict[str, dict]:
    """{name: checksum} of what a folder's world.json lists at `path` or below it."""
    listed = read_world(folder).get("contents", {})
    here = path.relative_to(folder)
    return {name: facts for name, facts in listed.items() if Path(name).is_relative_to(here)}


def check_listed(path):
    """Compare a file, or the files of a folder, with the list in the world.json beside or above.

    Raises ValueError for the first that is missing, was added or has another content. What no
    world.json lists (it is older, or was made by other means) is taken as it is.
    """
    path = Path(path).absolute()
    for folder in (path, path.parent, path.parent.parent):
        listed = listed_in(folder, path)
        if not listed:
            continue
        found = listing(path) if path.is_dir() else {}
        names = {(path / name).relative_to(folder).as_posix() for name in found}
        for name in sorted(names | listed.keys()):
            check_one(folder, name, listed.get(name))
        return


def check_one(folder, name, was):
    path = folder / name
    way_out = "prepare the folder again, or keep files of your own in another folder"
    if was is None:
        raise ValueError(f"{path} is not listed in {folder}/world.json: {way_out}")
    if not path.is_file():
        raise ValueError(f"{path} is missing, {folder}/world.json lists it: {way_out}")
    now = checksum(path)
    if was != now:
        change = f"{was['lines']} lines then, {now['lines']} now"
        raise ValueError(f"{path} is not what prepare.py wrote ({change}): {way_out}")
