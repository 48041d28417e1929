"""What is the same in every script: flags, the torchrun world, checkpoints in and out, resume, the metrics log.

    @dataclass(frozen=True)
    class Config:
        lr: float = 3e-4  # peak learning rate; the comment is what --help shows

    def main(cfg): ...

    if __name__ == "__main__":
        run.main(main, Config, __doc__)

Errors for the user are ValueErrors with one line that says what to do; `main` prints that line and exits with status 2
(DEBUG=1 shows the traceback).
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import tokens

# ------------------------------------------------------------------------------------------------------------- flags

# no whole number is negative, and these are not 0 either
COUNTS = set("tokens batch_tokens length batch questions_per_step group updates micro rows max_new n k save_every".split())


def configure(Config, argv: list[str], doc: str = ""):
    """`--field value` or `--field=value` for every field of the dataclass Config (`--flag` alone for a bool).

    Integers may be 2000, 50e9 or 2.8M; tuples 1000,2000. Words without a flag go to the first field if that is a tuple of
    str (eval.py ckpt/*.pt). Raises ValueError for what is not a field or has the wrong type; --help exits 0."""
    hints, values, rest = typing.get_type_hints(Config), {}, list(argv)
    if "--help" in rest or "-h" in rest:
        print((doc or "").strip() + "\n\nflags:")
        comments = dict(re.findall(r"^    (\w+): [^#\n]*?#\s*(.*)$", inspect.getsource(Config), re.M))
        for field in dataclasses.fields(Config):
            default = "" if field.default is dataclasses.MISSING else f" [{field.default}]"
            print(f"  --{field.name:<18} {comments.get(field.name, '')}{default}")
        raise SystemExit(0)
    first = dataclasses.fields(Config)[0].name
    words = hints[first] == tuple[str, ...]
    while rest:
        if words and not rest[0].startswith("--"):
            values[first] = (*values.get(first, ()), rest.pop(0))
            continue
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            raise ValueError(f"unknown flag {flag}" + (f", did you mean --{near[0]}?" if near else "; --help lists them"))
        if not equals:
            if hints[name] is bool and (not rest or rest[0].startswith("--") or words and rest[0] not in ("true", "false")):
                value = "true"
            elif not rest:
                raise ValueError(f"--{name} needs a value")
            else:
                value = rest.pop(0)
        values[name] = _parse(name, value, hints[name])
    missing = [f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(f"--{missing[0]} is needed; --help says what it is")
    return Config(**values)


def _parse(name: str, text: str, kind):
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(name, part, typing.get_args(kind)[0]) for part in text.split(",") if part)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1)
            value = int(text) if scale == 1 and text.lstrip("-").isdigit() else float(text[:-1] if scale > 1 else text) * scale
            if value != round(value) or value < int(name in COUNTS):
                raise ValueError
            return round(value)
        if (value := kind(text)) != value:  # a learning rate of nan would only show after the update
            raise ValueError
        return value
    except (ValueError, KeyError, OverflowError):
        want = {bool: "true or false", int: f"a whole number from {int(name in COUNTS)}", float: "a number"}.get(kind, kind.__name__)
        raise ValueError(f"--{name} takes {want}, not {text!r}") from None


def fill(cfg, defaults: dict):
    """Replace the fields that are None by what `defaults` says: settings that depend on the checkpoint."""
    unset = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) is None}
    return dataclasses.replace(cfg, **{k: v for k, v in defaults.items() if k in unset})


def main(script, Config, doc: str, argv: list[str] | None = None):
    """Parse the flags, run script(cfg), turn the user's errors into one line and exit status 2."""
    try:
        script(configure(Config, sys.argv[1:] if argv is None else argv, doc))
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while rank 0 still writes can take the others down with it
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if os.environ.get("DEBUG"):
            raise
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- world


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    compute: torch.dtype  # of activations and products; weights are fp32, or fp64 when this is

    def share(self, count: int, what: str) -> slice:
        """This rank's part of a batch. Raises ValueError with the nearest counts that divide."""
        if count % self.size:
            near = count // self.size * self.size or self.size
            raise ValueError(f"{what} {count} does not divide over {self.size} ranks: {near} or {near + self.size} would")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def max(self, value: float) -> float:
        most = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()


def start(device: str = "auto", dtype: str = "auto") -> World:
    """Join torchrun's world if there is one. device: auto, cpu or cuda; dtype: auto (bf16 on CUDA, else fp32),
    bfloat16, float32, float64."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    known = {"auto": torch.bfloat16 if device.startswith("cuda") else torch.float32}
    known |= {name: getattr(torch, name) for name in ("bfloat16", "float32", "float64")}
    if dtype not in known:
        raise ValueError(f"--dtype takes auto, bfloat16, float32 or float64, not {dtype!r}")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(rank, size, torch.device(device), known[dtype])


def gradients(model, world: World, clip: float) -> tuple[list, float]:
    """The one place where gradients are summed over ranks, clipped and checked. -> gradients (taken out of the model),
    norm before clipping, which `check_finite` is to see before anything is updated."""
    for p in model.parameters():
        if p.grad is None:  # a rank whose rows had nothing to train on still takes part
            p.grad = torch.zeros_like(p)
    if world.size > 1:  # one message for many small tensors: forty of them took longer than the step
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in model.parameters()])
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    taken = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken, norm


def check_finite(step: int, **values: float):
    """Raises ValueError, before the update, if a loss or a gradient norm is not a number."""
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ValueError(f"{name} is {value} at step {step}: stopped before the update, the last saved state is intact; lower --lr")


# ------------------------------------------------------------------------------------------------------- checkpoints

FORMAT = "rl-excursions checkpoint 1"


def save(path, model, meta: dict, **more):
    """One file, whole or absent: written beside, fsynced, renamed. `more` is what a resumed run needs beside weights."""
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


def load_model(saved: dict, Model, ModelConfig, world: World):
    """The model of a loaded checkpoint, on the world's device."""
    vocab = tokens.vocab_size(tokens.encoding(saved["meta"]["encoding"]))
    try:
        model = place(Model(ModelConfig(**saved["config"]), world.compute), world)  # first, or fp64 weights lose digits
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


def place(model, world: World):  # weights are fp32 masters, fp64 only when everything is
    return model.to(world.device, torch.float64 if world.compute == torch.float64 else torch.float32)


def can_compile(world: World) -> bool:
    found = world.device.type != "cpu" or bool(shutil.which(os.environ.get("CXX", "g++")))
    return found or bool(print("no C++ compiler (g++ or $CXX): running without --compile", file=sys.stderr))


def compile_blocks(model, dynamic: bool = True):  # in place: parameter names stay; all blocks share one code
    for block in model.blocks:
        block.compile(dynamic=dynamic)


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


# ------------------------------------------------------------------------------------- outputs, resume, metrics log

OPERATIONAL = {"resume", "overwrite", "device", "save_every", "rows", "micro", "compile"}  # may differ when a run is resumed


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
            if os.environ.get("RANK", "0") == "0":
                print(f"{out} is finished", flush=True)
            raise SystemExit(0)
        return saved.get(state)
    for path in (out, state, *map(Path, others)):
        if path.exists():
            raise ValueError(f"{path} exists: --resume continues that run, --overwrite replaces it")
    return None


def begin(cfg, stage: str, sizes: dict, Model, ModelConfig):
    """What a trainer that starts from --init does first: join the world, load the parent (or the saved state of this
    run), take over what the flags leave open from `sizes` ({"toy": ..., "paper": ...}) and from the parent's meta.

    -> cfg, world, model, the parent's meta, state (None for a fresh run)."""
    world = start(cfg.device, cfg.dtype)
    parent = load(cfg.init)
    meta = parent["meta"]
    named = {"questions": meta["questions"], "out": str(Path(cfg.init).with_suffix("")) + f"-{stage}.pt"}
    cfg = fill(cfg, named | sizes["toy" if meta["preset"].startswith("toy") else "paper"])
    state = claim(cfg.out, cfg)
    return cfg, world, load_model(state or parent, Model, ModelConfig, world), meta, state


def child_meta(cfg, parent: dict, stage: str, recipe_name: str, step: int) -> dict:
    """The meta of a checkpoint made from another one: where it came from is kept, the rest is new."""
    kept = {k: parent[k] for k in ("tokens", "preset", "encoding", "world", "pretrain_seed", "tasks")}
    kept |= {"parent": cfg.init, "parent_hash": config_hash(parent), "questions": cfg.questions}
    return new_meta(cfg, **kept, stage=stage, recipe=recipe(parent["recipe"], recipe_name), step=step)


class Log:
    """One JSON line a step in `<out>.metrics.jsonl`, and a progress bar that shows some of them. Rank 0 only."""

    def __init__(self, out, world: World, steps: int, first: int, shown: str):
        self.path, self.shown, self.active, self.totals = Path(f"{out}.metrics.jsonl"), shown.split(), world.rank == 0, {}
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_lines(self.path) if first and self.path.exists() else []
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] < first]  # steps after the saved state are done again
        self.path.write_text("".join(kept))
        self.totals = next((line["totals"] for line in reversed(lines) if line["step"] < first and "totals" in line), {})
        self.file = open(self.path, "a", buffering=1)
        pace = 0.5 if sys.stderr.isatty() else 20  # seconds between refreshes
        self.bar = tqdm(desc=Path(out).name, total=steps, initial=first, mininterval=pace, bar_format="{desc}  |  {remaining} left")

    def __call__(self, step: int, costs: dict, **values):
        """Record update `step` (from 0). `costs` (flops, seconds, questions, sampled_tokens ...) of this step are summed
        over the run, resumes included, and written as "totals"."""
        if not self.active:
            return
        self.totals = {name: self.totals.get(name, 0) + cost for name, cost in costs.items()}
        self.file.write(json.dumps({"step": step, **values, "totals": self.totals}) + "\n")
        shown = "  ".join(f"{name} {values[name]:.3g}" for name in self.shown if name in values)
        name = self.path.name.removesuffix(".metrics.jsonl")
        self.bar.set_description_str(f"{name}: {step + 1}/{self.bar.total}  {shown}", refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def add(self, step: int, **values):
        """A line beside the steps (a validation, say): `step` updates were done."""
        if self.active:
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self):
        if self.active:
            self.bar.close()
            self.file.close()


def read_lines(path) -> list[dict]:
    """The rows of a jsonl file; a torn last line (the writer was killed) is left out, any other bad line is an error."""
    lines, rows = Path(path).read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON") from None
    return rows


def save_state(out, model, meta: dict, step: int, optimizers: list):
    """What --resume continues from: `step` updates are done. No random state: every draw is a function of the step."""
    save(f"{out}.resume", model, meta, step=step, optimizers=[o.state_dict() for o in optimizers])


def finish(out):  # the result is written: the state for resuming is no longer needed
    Path(f"{out}.resume").unlink(missing_ok=True)
