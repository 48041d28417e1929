"""The folder that a command of prepare.py makes: whole or absent, with its settings in world.json."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

OPERATIONAL = {"out", "overwrite", "processes", "repeat"}  # they may differ when a command goes on


def settings(cfg):
    """What shapes the folder, as world.json holds it."""
    return json.loads(json.dumps({key: value for key, value in dataclasses.asdict(cfg).items() if key not in OPERATIONAL}))


def read_world(folder):
    path = Path(folder) / "world.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note(folder, **facts):
    """Add to world.json, whole or not at all."""
    beside = folder / "world.json.tmp"
    beside.write_text(json.dumps(read_world(folder) | facts, indent=1) + "\n")
    beside.replace(folder / "world.json")


@contextlib.contextmanager
def new_folder(cfg, name, **facts):
    """A folder to fill. It becomes cfg.out when all went well; what was there stays until then. When it did not go well
    the folder is removed, unless it has a state.json: then the same command finds it again."""
    out = Path(cfg.out)
    new, old = Path(f"{out}.new"), Path(f"{out}.old")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists: --overwrite replaces it, --out makes another")
    if out.exists() and not read_world(out):
        raise ValueError(f"{out} is not replaced, it was not made by prepare.py (it has no world.json)")
    world, begun = {"name": name, **settings(cfg), **facts}, read_world(new)
    differ = [key for key in world if world[key] != begun.get(key)]
    if (new / "state.json").exists() and differ and not cfg.overwrite:
        raise ValueError(f"{new} is the beginning of another command ({differ[0]} was {begun.get(differ[0])}, is "
                         f"{world[differ[0]]}): give that one again to go on with it, --overwrite drops it, --out makes another")
    if differ or not (new / "state.json").exists():
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


def write_rows(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
