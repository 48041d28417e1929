"""Checkpoints: one file each, whole or absent, and never code."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import torch

from data import ranks, tokens

FORMAT = "rl-excursions checkpoint 1"


def save(path, model, meta: dict, **more):
    """One file, whole or absent: written beside, fsynced, renamed. `more` is what a resumed run needs beside weights."""
    if not ranks.first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    beside = path.with_name(path.name + ".tmp")
    saved = {"format": FORMAT, "config": dataclasses.asdict(model.config), "meta": meta, "model": weights, **more}
    try:
        with open(beside, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        raise ValueError(f"could not write {path}: {error}; what was saved before is intact") from error


def load(path) -> dict:
    """A checkpoint as saved, on the CPU. Never runs code from the file. Raises ValueError if it is absent or not whole."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; pretrain.py makes them, --init takes their path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds something else than tensors and numbers: refused, nothing in it was run") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT!r})")
    return saved


def load_model(saved: dict, Model, ModelConfig, world: ranks.World):
    """The model of a loaded checkpoint, on the world's device."""
    vocab = tokens.vocab_size(tokens.encoding(saved["meta"]["encoding"]))
    try:
        model = ranks.place(Model(ModelConfig(**saved["config"]), world.compute), world)  # first, or fp64 weights lose digits
        fill_model(model, saved)
    except (TypeError, RuntimeError) as error:  # an unknown field; tensors of another shape
        raise ValueError(f"the checkpoint is of another model than its config says: {str(error)[:150]}") from None
    if saved["config"]["vocab"] != vocab:
        raise ValueError(f"the checkpoint knows {saved['config']['vocab']} ids, its encoding {saved['meta']['encoding']} has {vocab}")
    return model


def fill_model(model, saved: dict):
    if saved["config"] != dataclasses.asdict(model.config):
        raise ValueError(f"the checkpoint is of another model: {saved['config']}, here {dataclasses.asdict(model.config)}")
    model.load_state_dict(saved["model"], strict=True)


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


def fingerprint(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------ outputs and resuming

# may differ when a run is resumed
OPERATIONAL = set("resume overwrite device save_every save_minutes on_nonfinite spike rows micro compile".split())


def claim(out, cfg, others=()) -> dict | None:
    """May this run write `out` (and `others`)? -> the state to continue from, or None for a fresh run. Raises ValueError if
    something would be overwritten or --resume comes with other settings; exits 0 if --resume finds the run finished."""
    out, state = Path(out), Path(f"{out}.resume")
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
    kept = {k: parent[k] for k in ("tokens", "preset", "encoding", "world", "pretrain_seed", "tasks")}
    kept |= {"parent": cfg.init, "parent_hash": config_hash(parent), "questions": cfg.questions}
    return new_meta(cfg, **kept, stage=stage, recipe=recipe(parent["recipe"], recipe_name), step=step)


def save_state(out, model, meta: dict, step: int, optimizers: list, log):
    """What --resume continues from: `step` updates are done. No random state: every draw is a function of the step."""
    save(f"{out}.resume", model, meta, step=step, optimizers=[o.state_dict() for o in optimizers], recent=log.recent, skipped=log.skipped)


def finish(out):  # the result is written: the state for resuming is no longer needed
    if ranks.first():
        Path(f"{out}.resume").unlink(missing_ok=True)
