"""Checkpoints: one file each, whole or absent, and never code."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from data import ranks, tokens

FORMAT = "rl-excursions checkpoint 1"


def save(path, model, meta: dict, **more):
    """One file, whole or absent: written beside, fsynced, renamed. `more` is what a resumed run needs beside weights. Every rank
    calls: rank 0 writes, and what is sharded is gathered, tensor by tensor, in its CPU's memory."""
    def gathered(tensor):
        tensor = ranks.whole(tensor)
        return tensor.detach().cpu() if ranks.first() else None

    saved = {"format": FORMAT, "config": dataclasses.asdict(model.config), "meta": meta, "model": dict(model.state_dict()), **more}
    saved = tree_map_only(torch.Tensor, gathered, saved)
    if not ranks.first():
        return
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            beside.unlink()
        raise ValueError(f"could not write {path}: {cause}; what was saved before is intact") from error


def load(path) -> dict:
    """A checkpoint as saved; its tensors stay in the file until they are used. Nothing in it is run, and no memory is taken
    that the file does not fill. Raises ValueError if it is absent, not whole, or not as it was written."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; pretrain.py makes them, --init takes their path")
    try:
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds something else than tensors and numbers: refused, nothing in it was run") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint: refused, nothing in it was run ({error})") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT!r})")
    claimed = sum(math.prod(x.shape) * x.itemsize for x in tree_leaves(saved) if isinstance(x, torch.Tensor))
    if claimed > path.stat().st_size:  # one number repeated without end is a tensor, too
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes and claims {claimed:,} of weights: refused")
    own = saved["meta"].get("run", {}).get("length", saved["config"]["context"])
    saved["meta"].setdefault("length", own)  # tokens a row of pre-training: files from elsewhere and older ones do not say
    return saved


def check_archive(path):
    """Raises an error if a checksum is wrong (torch.load does not look) or the file claims more than it has."""
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims more than it has")
        for entry in tqdm(entries, desc=f"reading {path.name}", delay=5, leave=False, disable=not ranks.first()):
            if entry.filename.endswith("/data.pkl") and b"bytearray" in file.read(entry):  # torch.load makes one of any size
                raise pickle.UnpicklingError
            with file.open(entry) as part:
                while part.read(1 << 20):
                    pass


def load_model(saved: dict, Model, ModelConfig, world: ranks.World):
    """The model of a loaded checkpoint, on the world's device, sharded if the world is."""
    vocab = tokens.vocab_size(tokens.encoding(saved["meta"]["encoding"]))
    try:
        if saved["config"]["layers"] > len(saved["model"]):  # or any number of blocks would be made
            raise ValueError(f"{saved['config']['layers']} layers in {len(saved['model'])} tensors")
        with torch.device("meta"):
            model = Model(ModelConfig(**saved["config"]), world.compute)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # an unknown field; a width beyond all bounds
        raise ValueError(f"the checkpoint is of another model than its config says: {str(error)[:150]}") from None
    if saved["config"]["vocab"] != vocab:
        raise ValueError(f"the checkpoint knows {saved['config']['vocab']} ids, its encoding {saved['meta']['encoding']} has {vocab}")
    return fill_model(model, saved, world)


@torch.no_grad()
def fill_model(model, saved: dict, world: ranks.World):
    """A model of the meta device onto the world's, with a checkpoint's weights; sizes are compared before memory is taken."""
    if saved["config"] != dataclasses.asdict(model.config):
        raise ValueError(f"the checkpoint is of another model: {saved['config']}, here {dataclasses.asdict(model.config)}")
    here, there = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (model.state_dict(), saved["model"]))
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(f"the checkpoint is of another model than its config says: {name} is {there.get(name)}, not {here.get(name)}")
    ranks.place(model, world)
    for name, p in model.named_parameters():
        ranks.put(p, saved["model"][name])
    return model


def recipe(parent: str, stage: str) -> str:  # base -> rl, sft, sft-gold or mix; anything later is parent->stage
    return stage if parent == "base" else f"{parent}->{stage}"


def new_meta(cfg, **meta) -> dict:
    """What a checkpoint says of itself; keyword arguments (stage, recipe, step, ...) come first."""
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {**meta, "run": dataclasses.asdict(cfg), "seed": cfg.seed, "commit": commit or "unknown", "torch": str(torch.__version__)}


def config_hash(meta: dict) -> str:
    """Twelve hex digits of everything that shapes a checkpoint, its parents included; where and how it ran is left out."""
    shaping = {k: v for k, v in meta["run"].items() if k not in OPERATIONAL and k not in ("init", "out")}
    return fingerprint([meta["recipe"], meta["step"], shaping, meta.get("parent_hash")])


def weights_hash(path) -> str:
    """Of a checkpoint's tensors, by their checksums in its zip directory: other code under the same flags is seen by it."""
    with zipfile.ZipFile(path) as file:
        return fingerprint([entry.CRC for entry in file.infolist() if "/data/" in entry.filename])


def fingerprint(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------ outputs and resuming

# may differ when a run is resumed
OPERATIONAL = set("resume overwrite device save_every save_minutes on_nonfinite spike rows micro compile shard verify "
                  "checkpoint_activations profile peak_tflops".split())  # fmt: skip


def claim(out, cfg, others=()) -> dict | None:
    """May this run write `out` (and `others`)? -> the state to continue from, or None for a fresh run. Raises ValueError if
    something would be overwritten or --resume comes with other settings; exits 0 if --resume finds the run finished."""
    out, state = Path(out), Path(f"{out}.resume")
    if (cfg.resume or cfg.overwrite) and ranks.first():
        for path in (out, state, f"{out}.metrics.jsonl", *others):
            Path(f"{path}.tmp").unlink(missing_ok=True)  # a kill while it was written
    if cfg.overwrite:
        state.unlink(missing_ok=True)  # or a later --resume would go on with what was replaced
        return None
    if cfg.resume:
        before = [state] if state.exists() else [path for path in (out, *map(Path, others)) if path.exists()]
        saved = {path: load(path) for path in before}
        for path in before:
            was, now = (json.loads(json.dumps(x)) for x in (saved[path]["meta"]["run"], dataclasses.asdict(cfg)))
            for name in now:
                if name not in OPERATIONAL and was.get(name) != now[name]:
                    raise ValueError(f"{path} was made with --{name} {was.get(name)}, now {now[name]}: keep the setting or --overwrite")
        if out in saved:
            if ranks.first():
                print(f"{out} is finished", flush=True)
            raise SystemExit(0)
        return saved.get(state)
    for path in (out, state, *map(Path, others)):
        if path.exists():
            raise ValueError(f"{path} exists: --resume continues that run, --overwrite replaces it")
    return None


def child_meta(cfg, parent: dict, stage: str, recipe_name: str, step: int) -> dict:
    """The meta of a checkpoint made from another one: where it came from is kept, the rest is new."""
    kept = {k: parent[k] for k in ("tokens", "length", "preset", "encoding", "world", "pretrain_seed", "tasks")}
    kept |= {"parent": cfg.init, "parent_hash": config_hash(parent), "questions": cfg.questions or parent["questions"]}
    return new_meta(cfg, **kept, stage=stage, recipe=recipe(parent["recipe"], recipe_name), step=step)


def save_state(out, model, meta: dict, step: int, optimizers: list, log):
    """What --resume continues from: `step` updates are done. No random state: every draw is a function of the step."""
    removed = log.sync()
    kept = dict(recent=log.recent, skipped=log.skipped, totals=log.totals)
    save(f"{out}.resume", model, meta, step=step, optimizers=[o.state_dict() for o in optimizers], **kept)
    if removed:
        raise ValueError(removed)


@torch.no_grad()
def resume(state: dict | None, *optimizers) -> int:
    """Give each optimizer its moments of a saved state, or this rank's part of them; -> steps done, 0 for a fresh run."""
    if not state:
        return 0
    for optimizer, kept in zip(optimizers, state.pop("optimizers"), strict=True):
        for p, moments in zip(optimizer.param_groups[0]["params"], kept["state"].values(), strict=bool(kept["state"])):
            for name, x in moments.items():
                optimizer.state[p][name] = ranks.put(torch.empty_like(p), x) if x.dim() else x.to(p.device, copy=True)
    state.pop("model")  # the last that holds the file, which is soon replaced and would still fill the disk
    return state["step"]


def finish(out):  # the result is written: the state for resuming is no longer needed
    if ranks.first():
        Path(f"{out}.resume").unlink(missing_ok=True)
