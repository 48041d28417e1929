"""What every script shares: flags, ranks, checkpoints, and the loop of a run with its log.

    @dataclass(frozen=True, kw_only=True)
    class Config(common.Shared):
        lr: Positive = 3e-4  # peak learning rate; the comment is what --help shows

    def main(given: dict): ...  # the flags that were given, by name

    if __name__ == "__main__":
        common.main(main, Config, __doc__)

A ValueError is an error of the user: one line that says what to do, exit status 2 (DEBUG=1 shows
the traceback). So are a full disk and memory that does not suffice. Ctrl-C exits with 130, and a
trainer that a signal stops saves its state and exits with 128 + the signal's number.
"""

import atexit
import bisect
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import typing
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import profile, schedule
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

import plan
from data import problems, tokens
from data.files import fingerprint, read_rows, whole_file, write_rows
from model import Model, ModelConfig, OffloadedAdam, paper_size

# --------------------------------------------------------------------------------------- flags


class Range(NamedTuple):
    """The legal values of a number: from `least` (or above it) to `most`."""

    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is not legal

    def __contains__(self, value):
        return (value > self.least if self.above else value >= self.least) and value <= self.most

    def __str__(self):
        low = f"{'above' if self.above else 'from'} {self.least:g}"
        return low if self.most == math.inf else f"{low} to {self.most:g}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Flags of all trainers: where and how a run works.

    None changes what is learned, except --dtype, and updates that --on_nonfinite or --spike skip.
    """

    micro: Count = 64  # rows of text, or answers, per forward pass; never changes the result
    compile: bool = True  # torch.compile the blocks: seconds at the start, more the first time
    # keep only the inputs of the blocks, and run each again in the backward pass
    checkpoint_activations: bool = False  # less memory, slower
    shard: bool = False  # split weights, gradients and moments over the ranks (FSDP2)
    # Adam's moments in the CPU's memory: 8 bytes per weight less on the GPU (mix.py: 16)
    offload: bool = False  # never changes the result; instead of --shard
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on CUDA
    on_nonfinite: Literal["stop", "skip"] = "stop"  # at a NaN or a spike: stop, or skip the update
    # what counts as a spike, in standard deviations above the last 128 steps
    spike: NonNegative = 0.0  # 0: nothing does; OLMo2: 6
    save_every: Count = 100  # steps between saved states, from which --resume goes on
    save_minutes: Positive = 30.0  # the most minutes between two; a signal saves one, too
    # write the metrics there, too (its package has to be installed)
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    profile: Whole = 0  # profile so many steps: shares of a step's time, and OUT.trace.json
    plan: str = ""  # a preset (toy, 190m, 1b, 4b): print what this run would cost with it, and exit
    resume: bool = False  # go on from the last saved state, or begin if there is none
    overwrite: bool = False  # replace what is there

    def __post_init__(self):
        if self.offload and self.shard:
            raise ValueError(
                "--offload and --shard do not go together: --shard for several GPUs, --offload "
                "for GPUs that hold all the weights"
            )


@dataclass(frozen=True, kw_only=True)
class PostTraining(Shared):
    """Flags of sft.py, rl.py and mix.py, which start from a checkpoint and read questions."""

    init: str  # checkpoint to start from
    out: str = ""  # checkpoint to write (default: INIT-RECIPE.pt, with a --seed -sSEED.pt)
    recipe: str = ""  # name in files, rows and reports; a variant of a recipe needs one of its own
    questions: str = ""  # folder with train.jsonl and val.jsonl (default: the checkpoint's)
    limit: Whole = 0  # use only the first so many training questions (0: all)
    skip_long: bool = False  # leave out questions that do not fit the context, instead of stopping
    max_new: Count = 84  # tokens of the longest answer; a longer one is truncated
    eval_every: Whole = 25  # steps between validations (0: only before and after)
    eval_questions: Whole = 200  # validation questions (0: no validation)
    eval_n: Count = 4  # answers to each
    rows: Count = 512  # answers sampled side by side; never changes the result
    # answers that share a row of training, and so the work for their prompt (--micro at most)
    answers_per_row: Count = 8  # never changes the result
    seed: Whole = 0  # of the order of the questions and of the sampling

    @property
    def per_row(self) -> int:
        return min(self.answers_per_row, self.micro)


# what a resumed run may change: where and how it works, and how paths are spelled
OPERATIONAL = {field.name for field in dataclasses.fields(Shared)} - {"dtype"}
OPERATIONAL |= {"init", "out", "questions", "data", "text", "tasks", "rows", "peak_tflops"}
OPERATIONAL |= {"answers_per_row", "eval_every", "eval_questions", "eval_n", "eval_rows"}


def parse_flags(Config, argv: list[str], doc: str = "") -> dict:
    """`--field value` or `--field=value` for every field of the dataclass Config -> {field: value}.

    `--flag` alone is true. Integers may be 2000, 50e9 or 2.8M; tuples are 1000,2000. Words without
    a flag go to the field `checkpoints`, if there is one. Raises ValueError for an unknown flag, a
    wrong type or a number outside its range; --help prints all of them and exits 0.
    """
    hints = typing.get_type_hints(Config, include_extras=True)
    given: dict = {}
    rest = list(argv)
    if "--help" in rest or "-h" in rest:
        print_help(Config, doc)
        raise SystemExit(0)
    while rest:
        if "checkpoints" in hints and not rest[0].startswith("--"):
            given["checkpoints"] = (*given.get("checkpoints", ()), rest.pop(0))
            continue
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f", did you mean --{near[0]}?" if near else "; --help lists them"
            raise ValueError(f"unknown flag {flag}{hint}")
        if not equals:
            alone = not rest or rest[0].startswith("--") or rest[0].endswith(".pt")
            if alone and hints[name] is bool:
                value = "true"
            elif not rest or rest[0].startswith("--"):  # $OUT, say, which is not set
                raise ValueError(f"--{name} needs a value")
            else:
                value = rest.pop(0)
        given[name] = parse_value(name, value, hints[name])
    for field in dataclasses.fields(Config):
        needed = field.default is dataclasses.MISSING and not given.get("plan")
        if needed and field.name not in given:
            raise ValueError(f"--{field.name} is needed; --help says what it is")
    return given


def parse_value(name: str, text: str, kind):
    """The value of a flag, of the type and in the range that its declaration gives."""
    if type(None) in typing.get_args(kind):  # X | None
        kind = typing.get_args(kind)[0]
    legal = None
    if typing.get_origin(kind) is Annotated:
        kind, legal = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise ValueError(f"--{name} takes {' or '.join(choices)}, not {text!r}")
        return text
    if typing.get_origin(kind) is tuple:
        parts = [part for part in text.split(",") if part]
        if not parts and typing.get_args(kind)[0] is not str:
            raise ValueError(f"--{name} takes one number or more, separated by commas")
        return tuple(parse_value(name, part, typing.get_args(kind)[0]) for part in parts)
    try:
        value = READERS[kind](text)
        if legal and value not in legal or kind is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        wanted += f" {legal}" if legal else ""
        raise ValueError(f"--{name} takes {wanted}, not {text!r}") from None
    return value


def read_int(text: str) -> int:
    if text.lstrip("-").isdigit():
        return int(text)
    power = {"k": "e3", "m": "e6", "b": "e9"}.get(text[-1:].lower(), "")
    value = float(text[:-1] + power if power else text)
    if value != round(value):
        raise ValueError
    return round(value)


READERS = {
    str: str,
    float: float,
    int: read_int,
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
}


def print_help(Config, doc: str):
    """The fields of Config with their comments and defaults: its own first, then inherited ones."""
    classes = Config.__mro__[:-1]
    comments: dict = {}
    for cls in classes[::-1]:  # a field that is declared again keeps its comment, or has a new one
        for name, text in read_comments(cls):
            comments[name] = text or comments.get(name, "")
    width = max(map(len, comments))
    lines = [(doc or "").strip()]
    told = set()
    for cls in classes:
        lines += ["", "flags:" if cls is Config else (cls.__doc__ or "").strip().splitlines()[0]]
        for name, _ in read_comments(cls):
            if name not in told:
                line = f"  --{name:<{width}} {comments[name]} {shown_values(Config, name)}"
                lines.append(line.rstrip())
            told.add(name)
    print("\n".join(lines), flush=True)


def shown_values(Config, name: str) -> str:
    """The default of a flag, what the paper's sizes have instead, and its legal values."""
    default = Config.__dataclass_fields__[name].default
    paper = vars(sys.modules[Config.__module__]).get("PAPER", {})
    kind = typing.get_type_hints(Config, include_extras=True)[name]
    parts = [] if default in (dataclasses.MISSING, "", (), None) else [str(default)]
    parts += [f"paper's sizes: {paper[name]}"] if name in paper else []
    while typing.get_origin(kind) not in (None, Annotated, Literal):
        kind = typing.get_args(kind)[0]  # of X | None, or of a tuple
    if typing.get_origin(kind) is Literal:
        parts.append(" or ".join(typing.get_args(kind)))
    if typing.get_origin(kind) is Annotated:
        parts.append(str(typing.get_args(kind)[1]))
    return f"[{'; '.join(parts)}]" if parts else ""


def read_comments(cls) -> list[tuple[str, str]]:
    """(field, comment) of a dataclass's own fields: the lines above it and the one beside it."""
    found = []
    above = []
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"    (\w+): [^#]+?(?:  # (.*))?$", line):
            name, beside = match.groups()
            found.append((name, "; ".join(filter(None, [" ".join(above), beside]))))
        above = [*above, line[6:]] if line.startswith("    # ") else []
    return found


class LenientStream:
    """A stream that a script may always write to: what cannot be written is left out.

    Nobody may read it any more (`rl.py 2>&1 | head -1`), its terminal may be gone or its disk full:
    none of this ends a run. A character that its encoding lacks is written as \\xb1.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed from the beginning
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text) -> int:
        with self.guard():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self.guard():
            self.stream.flush()

    @contextlib.contextmanager
    def guard(self):
        try:
            yield
        except OSError:  # what is left in the buffer would fail again, at the latest at the exit
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def main(script, Config, doc: str, argv: list[str] | None = None):
    """Parse the flags, run script(given), turn an error of the user into one line and status 2."""
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        # begin again: a path with an umlaut is no text in such a locale, and rows are UTF-8
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    out = LenientStream(sys.stdout)
    err = LenientStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            guarded(script, Config, doc, sys.argv[1:] if argv is None else argv)
        finally:
            out.flush()
            err.flush()


def commands(table: dict, doc: str, argv: list[str], placed: int = 0):
    """`main` for a program of several commands, {name: (Config, script)}: argv is the command and
    its flags. placed: so many values may stand before the flags, of the first fields of Config."""
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(doc.strip())
        return
    name, *rest = argv
    if name not in table:
        told = f"{name!r} is not a command: {', '.join(table)} are"
        print(f"{Path(sys.argv[0]).name}: error: {told}", file=sys.stderr)
        raise SystemExit(2)
    Config, script = table[name]
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), rest[:placed])]
    fields = [f"--{field.name}" for field in dataclasses.fields(Config)][: len(words)]
    named = [part for pair in zip(fields, words, strict=True) for part in pair]
    argv = named + rest[len(words) :]
    main(lambda given: script(Config(**given)), Config, script.__doc__, argv)


def guarded(script, Config, doc: str, argv: list[str]):
    given: dict = {}
    try:
        given = parse_flags(Config, argv, doc)
        if sys.platform == "win32":
            raise ValueError(
                "this takes Linux or macOS: on Windows run `wsl --install`, then all of it in WSL"
            )
        script(given)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while rank 0 writes can take the others down
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, RuntimeError):
            if not out_of_memory(error):
                raise
            message = memory_message(error, Config, given)
        say(f"\n{Path(sys.argv[0]).name}: error: {' '.join(message.split())}")
        if os.environ.get("DEBUG", "").lower() in ("1", "true"):
            raise
        raise SystemExit(2) from None
    if dist.is_initialized():  # not after an error: it would wait for ranks that wait for this one
        dist.destroy_process_group()


def out_of_memory(error: RuntimeError) -> bool:
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def memory_message(error: RuntimeError, Config, given: dict) -> str:
    """One line with the flags that take less memory, with the values that were given."""
    wanted = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    ways = []
    for name in ("micro", "answers_per_row", "rows", "max_new"):
        if name in Config.__dataclass_fields__:
            ways.append(f"a lower --{name}" + (f" (now {given[name]})" if name in given else ""))
    on_gpu = "CPU" not in str(error)  # whose allocator says so; there are no moments to offload
    for name in ("checkpoint_activations", *(("offload", "shard") if on_gpu else ())):
        other = {"offload": "shard", "shard": "offload"}.get(name)  # the two exclude each other
        if name in Config.__dataclass_fields__ and not given.get(name) and not given.get(other):
            ways.append(f"--{name}")
    more = f" ({wanted[1]} more)" if wanted else ""
    return f"out of memory{more}: try {', '.join(ways)}{' or more GPUs' * on_gpu}"


def say(text: str):
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- ranks


class World(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    size: int
    device: torch.device
    compute: torch.dtype  # of activations and products; weights are fp32, or fp64 when this is
    shard: bool = False  # whether the ranks share one copy of weights, gradients and moments

    def share(self, count: int, what: str) -> slice:
        """This rank's part of a batch. Raises ValueError with the nearest counts that divide."""
        if count % self.size:
            near = count // self.size * self.size or self.size
            raise ValueError(
                f"{what} {count} does not divide over {self.size} ranks: "
                f"{near} or {near + self.size} would"
            )
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def wait(self):
        """For all ranks, which call it together."""
        if self.size > 1:
            dist.barrier()

    def sum(self, *values) -> list[float]:
        """Sums over the ranks, in fp64, of numbers and tensors of one element. All ranks call."""
        total = self.stack(values)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def max(self, *values) -> list[float]:
        """The largest over the ranks, of numbers and tensors of one element. All ranks call."""
        if self.size == 1:
            return [float(x) for x in values]  # numbers of the host stay there
        most = self.stack(values)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def stack(self, values) -> torch.Tensor:
        """fp64 (len(values),) on the device; numbers travel together, in one copy."""
        if any(isinstance(x, torch.Tensor) for x in values):
            like = dict(dtype=torch.float64, device=self.device)
            return torch.stack([torch.as_tensor(x, **like) for x in values])
        return torch.tensor(values, dtype=torch.float64).to(self.device)


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def device_of(device: str) -> str:
    """auto, cpu, cuda or cuda:N -> cpu or cuda:N. Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.split(":")[0] == "mps":
        raise ValueError(
            f"--device {device}: Apple's GPUs have no fp64, in which sums are taken here: leave it "
            "out or give --device cpu"
        )
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise ValueError(f"--device takes auto, cpu, cuda or cuda:N, not {device!r}")
    if device != "cpu" and int(device[5:]) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
    return device


def start(device: str = "auto", dtype: str = "auto", shard: bool = False) -> World:
    """Join torchrun's world if there is one. Raises ValueError for a device that does not fit.

    device: see `device_of`. dtype: auto (bfloat16 on CUDA, else float32) or a name.
    """
    device = device_of(device)
    on_gpu = device != "cpu"
    if on_gpu:
        if find_spec("triton") is None:  # the loss head would hold many times the logits
            raise ValueError(
                f"--device {device} takes Triton, which is not installed: pip install triton, or "
                "give --device cpu"
            )
        torch.cuda.set_device(device)  # Triton launches on the current device
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    if on_gpu and dtype == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"{name} has no bfloat16: give --dtype float32 (fp16 would give NaN)")
    if "RANK" in os.environ and not dist.is_initialized():
        join_ranks("nccl" if on_gpu else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    return World(rank, size, torch.device(device), getattr(torch, dtype), shard and size > 1)


def join_ranks(backend: str):
    missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise ValueError(
            f"RANK is set and {min(missing)} is not: start with torchrun, or unset RANK"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        size = os.environ["WORLD_SIZE"]
        say(f"RANK is set: waiting for {size} processes; unset RANK to run as one")
    # rank 0 may write a large state, or grade slowly, while the others wait
    dist.init_process_group(backend, timeout=timedelta(hours=2))


@torch.profiler.record_function("reduce")
def gradients(model, world: World, clip: float) -> tuple[list, float]:
    """The one place where gradients are summed over ranks and clipped.

    -> the gradients, taken out of the model, and the norm of the whole before clipping. Those of a
    sharded model were summed in the backward pass; here each rank has its part, as DTensors.
    """
    for p in model.parameters():
        if p.grad is None:  # a rank whose rows had nothing to train on still takes part
            p.grad = torch.zeros_like(p)
    if world.size > 1 and not world.shard:  # one message: forty took longer than a step of the toy
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in model.parameters()])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    taken = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken, float(whole_tensor(norm))


def materialize(model, world: World):
    """A model of the meta device onto the world's, sharded if the world is; weights to be set."""
    master = torch.float64 if world.compute == torch.float64 else torch.float32
    model.to(master)
    if world.shard:
        shard_model(model, world, master)
    return model.to_empty(device=world.device)


def shard_model(model, world: World, master: torch.dtype):
    """FSDP2: a block's weights travel in the compute dtype, embedding and head in fp32."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # on the group that is there, whose timeout is long: a group of the mesh's own would have gloo's
    mesh = dist.device_mesh.DeviceMesh.from_group(dist.group.WORLD, world.device.type)
    policy = MixedPrecisionPolicy(
        param_dtype=world.compute,
        reduce_dtype=master,
        cast_forward_inputs=False,  # cos and sin stay in fp32
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    # embedding and head stay whole for the backward pass; where none follows, shard them again
    model.register_forward_hook(
        lambda model, *_: None if torch.is_grad_enabled() else model.reshard()
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum: the loss has one denominator over all ranks
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply by 1


def put(tensor, source):
    """Copy `source`, which is whole, into `tensor` or into the part of it that this rank has."""
    if hasattr(tensor, "full_tensor"):  # a DTensor
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements
        # src_data_rank None: every rank has the source, nothing is sent
        source = distribute_tensor(source, mesh, placements, src_data_rank=None)
    return tensor.copy_(source)


def whole_tensor(tensor):
    """The tensor itself, or gathered from its shards: then all ranks have to ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def can_compile(cfg, world: World) -> bool:
    """Whether to torch.compile: --compile was asked for, and a small function can be compiled.

    Without a compiler or Python's headers, one line says why and the run goes on without.
    """
    if not cfg.compile:
        return False
    try:
        x = torch.ones(8, device=world.device)
        torch.compile(lambda x: (x * 2).sin(), dynamic=False)(x)
    except Exception as error:  # compilers fail in many ways, none of which should stop a run
        lines = str(error).splitlines() or [type(error).__name__]
        cause = next((line for line in lines if "error: " in line), lines[0])
        if is_first():
            need = "a C compiler" if world.device.type == "cuda" else "g++"
            say(
                f"torch.compile does not work here ({cause.strip()[:150]}): running without, which "
                f"is slower; it takes {need} and Python's headers (apt install g++ python3-dev)"
            )
        torch._dynamo.reset()
        return False
    return True


def compile_blocks(model, dynamic: bool = True):
    """In place, so that parameters keep their names; all blocks share one code.

    dynamic: one code for all numbers of rows and tokens. It is still compiled anew for one row and
    for several, for one block of FlexAttention's mask and for several, with gradients and without,
    with a layout and without, and now and then for sizes that happen to be equal. After eight times
    PyTorch would go on with uncompiled blocks, which with a layout on a GPU take many times the
    memory.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        block.compile(dynamic=dynamic)
    model.compiled = True


# --------------------------------------------------------------------------------- checkpoints

FORMAT = "rl-excursions checkpoint 1"


def save(path, model, meta: dict, **more):
    """Write a checkpoint, whole or not at all. All ranks call it together, rank 0 writes.

    more: what a resumed run needs beside the weights. Sharded tensors are gathered one by one in
    the memory of rank 0's CPU. Raises ValueError if the disk is full.
    """

    def gathered(tensor):
        tensor = whole_tensor(tensor)
        return tensor.detach().cpu() if is_first() else None

    saved = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "meta": meta,
        "model": dict(model.state_dict()),
        **more,
    }
    saved = tree_map_only(torch.Tensor, gathered, saved)
    if not is_first():
        return
    with whole_file(path, "wb") as file:
        try:
            torch.save(saved, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error.__context__ or error)) from error


# what zipfile and torch.load raise for a file that is not what it should be
BROKEN = (OSError, EOFError, RuntimeError, KeyError, ValueError, MemoryError, zipfile.BadZipFile)


def check_there(path):
    """Raises ValueError if there is no such checkpoint."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}; pretrain.py makes them, as step*.pt")


def load(path) -> dict:
    """A checkpoint as saved; its tensors stay in the file until they are used.

    Nothing in the file is run, and no memory is taken that the file does not fill. Raises
    ValueError if it is absent, truncated, changed since it was written, or something else.
    """
    path = Path(path)
    check_there(path)
    try:
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and numbers: refused, nothing in it was run"
        ) from None
    except BROKEN as error:
        raise ValueError(f"{path} is truncated or not a checkpoint ({error})") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT!r})")
    tensors = [x for x in tree_leaves(saved) if isinstance(x, torch.Tensor)]
    claimed = sum(math.prod(x.shape) * x.itemsize for x in tensors)
    if claimed > path.stat().st_size:  # one number repeated without end is a tensor, too
        raise ValueError(f"{path} claims {claimed:,} bytes of weights and has fewer: refused")
    saved["path"] = str(path)  # for messages
    meta = saved["meta"]
    # tokens in a row of pre-training: files from elsewhere and older ones do not say
    meta.setdefault("length", meta.get("run", {}).get("length", saved["config"]["context"]))
    return saved


def check_archive(path: Path):
    """Raises an error if a checksum is wrong (torch.load does not look) or sizes do not fit."""
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims more than it has")
        hidden = not is_first()
        bar = tqdm(entries, desc=f"reading {path.name}", delay=5, leave=False, disable=hidden)
        for entry in bar:
            # torch.load makes a bytearray of any size
            if entry.filename.endswith("/data.pkl") and b"bytearray" in file.read(entry):
                raise pickle.UnpicklingError
            with file.open(entry) as part:
                while part.read(1 << 20):
                    pass


@torch.no_grad()
def load_model(saved: dict, world: World) -> Model:
    """The model of a loaded checkpoint, on the world's device, sharded if the world is.

    Raises ValueError if tensors and config do not fit each other, or a weight is NaN or infinite.
    """
    config, weights = saved["config"], saved["model"]
    try:
        if config["layers"] > len(weights):  # or any number of blocks would be made
            raise ValueError(f"{config['layers']} layers in {len(weights)} tensors")
        with torch.device("meta"):
            model = Model(ModelConfig(**config), world.compute)
        here = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        there = {name: tuple(x.shape) for name, x in weights.items()}
        for name in here | there:  # before memory is taken
            if here.get(name) != there.get(name):
                raise ValueError(f"{name} is {there.get(name)}, not {here.get(name)}")
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"{saved['path']} is of another model than its config says: {str(error)[:150]}"
        ) from None
    materialize(model, world)
    for name, p in model.named_parameters():
        source = weights[name]
        if not source.isfinite().all():
            raise ValueError(f"{saved['path']} has weights that are NaN or infinite, in {name}")
        put(p, source)
    return model


def encoding_of(saved: dict):
    """The tiktoken encoding of a checkpoint. Raises ValueError if its model has other ids."""
    encoding = tokens.encoding(saved["meta"]["encoding"])
    known = saved["config"]["vocab"]
    vocab = tokens.vocab_size(encoding)
    if vocab != known:
        raise ValueError(
            f"{saved['path']} knows {known} ids, its encoding {encoding.name} has {vocab}"
        )
    return encoding


def longest(meta: dict) -> int:
    """Tokens of the longest answer a checkpoint was trained to give, or that its size gets."""
    return meta["run"].get("max_new") or (512 if paper_size(meta["preset"]) else 84)


def new_meta(cfg, contents: dict, **meta) -> dict:
    """What a checkpoint says of itself: stage, recipe, step ... and how it was made.

    contents: fingerprints of what it was trained on, by flag.
    """
    commit = ""
    if shutil.which("git"):
        ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    return {
        **meta,
        "run": dataclasses.asdict(cfg),
        "contents": contents,
        "seed": cfg.seed,
        "commit": commit or "unknown",
        "torch": str(torch.__version__),
    }


def child_meta(cfg, contents: dict, parent: dict, stage: str, step: int) -> dict:
    """The meta of a checkpoint made from another: recipe `rl` of a `sft` parent is `sft->rl`."""
    names = ("tokens", "length", "preset", "encoding", "world", "pretrain_seed", "tasks")
    before = "" if parent["recipe"] == "base" else f"{parent['recipe']}->"
    return new_meta(
        cfg,
        contents,
        **{name: parent[name] for name in names},
        stage=stage,
        step=step,
        recipe=before + cfg.recipe,
        questions=cfg.questions or parent["questions"],
        parent=cfg.init,
        parent_hash=config_hash(parent),
    )


def config_hash(meta: dict) -> str:
    """Twelve hex digits of everything that shapes a checkpoint, its parents included."""
    shaping = {k: v for k, v in meta["run"].items() if k not in OPERATIONAL}
    return fingerprint([meta["recipe"], meta["step"], shaping, meta.get("parent_hash")])


def weights_hash(path) -> str:
    """Twelve hex digits of a checkpoint's tensors, from the checksums in its zip directory."""
    with zipfile.ZipFile(path) as file:
        return fingerprint([entry.CRC for entry in file.infolist() if "/data/" in entry.filename])


# --------------------------------------------------------------------------------------- a run


class Setup(NamedTuple):
    """What a trainer that starts from --init has before its first step."""

    cfg: PostTraining
    world: World
    model: Model
    parent: dict  # meta of the checkpoint it starts from
    state: dict | None  # a saved state to resume
    contents: dict  # fingerprints of the start and the questions
    encoding: object
    form: problems.Form  # how a question is put before the model
    train: list[dict]
    held_out: list[dict]
    prefix: list[int] = []  # ids of the shots before each training question


def configure(Config, given: dict, paper: dict, check, job_of):
    """The Config of a run from --init, and the checkpoint (None with --plan).

    A flag that was not given has the value that Config declares, or, from a checkpoint of the
    paper's sizes, the one in `paper`; on a GPU, what decides about memory is chosen to fit it.
    check(cfg): raises ValueError for flags that do not fit. job_of(cfg): what the run will do, a
    plan.Job.
    """
    given = {"init": "", **given}  # --plan needs none
    before = None if given.get("plan") else load(given["init"])
    preset = given.get("plan") or before["meta"]["preset"]
    defaults = paper if paper_size(preset) else {}
    cfg = Config(**(defaults | given))
    check(cfg)
    if cfg.plan:
        return cfg, None
    return plan.fit(cfg, given, job_of(cfg), preset, device_of(cfg.device)), before


def begin(
    cfg, before: dict, recipe: str, *, max_new=0, shots=0, solutions=None, text=None
) -> Setup:
    """What sft.py, rl.py and mix.py do first: join the ranks, read questions, claim the output.

    before: the checkpoint of --init. recipe: the name of the result. What a training question has
    to have room for in the context: max_new sampled tokens, shots before it, its solutions ("1",
    "all"). text: the tokens.Stream that is trained on, if there is one. Raises ValueError if
    something does not fit.
    """
    world = start(cfg.device, cfg.dtype, cfg.shard)
    parent = before["meta"]
    seed = f"-s{cfg.seed}" if cfg.seed else ""
    cfg = dataclasses.replace(
        cfg,
        recipe=recipe,
        questions=cfg.questions or parent["questions"],
        out=cfg.out or f"{Path(cfg.init).with_suffix('')}-{recipe}{seed}.pt",
    )
    if not cfg.questions:
        raise ValueError(f"{cfg.init} names no questions: give --questions FOLDER")
    problems.refuse_test(cfg.questions)
    if cfg.eval_questions and cfg.questions.endswith(".jsonl"):
        raise ValueError(
            f"{cfg.questions} is all for training: give --eval_questions 0, or a folder that has "
            "val.jsonl beside train.jsonl"
        )
    encoding = encoding_of(before)
    form = problems.form(cfg.questions)
    context = before["config"]["context"]
    shown = []
    if shots:
        shown = problems.shots(cfg.questions, shots, problems.load(cfg.questions, "train"))
    prefix = tokens.encode(encoding, problems.few_shot(form, shown))
    room = problems.Room(context, max_new, len(prefix), solutions, cfg.seed)
    train = questions_of(cfg, "train", cfg.limit or None, encoding, form, room)
    held_out = []
    if cfg.eval_questions:
        room = problems.Room(context, cfg.max_new)
        held_out = questions_of(cfg, "val", cfg.eval_questions, encoding, form, room)
    contents = {"init": weights_hash(cfg.init), "questions": fingerprint(train)}
    if text:
        contents["text"] = text.fingerprint
    if shown:
        contents["shots"] = fingerprint(shown)
    if getattr(cfg, "reward", ""):
        contents["reward"] = fingerprint(Path(cfg.reward).read_text(encoding="utf-8"))
    state = claim(cfg, contents)
    model = load_model(state or before, world)
    model.checkpoint_activations = cfg.checkpoint_activations
    return Setup(
        cfg, world, model, parent, state, contents, encoding, form, train, held_out, prefix
    )


def check_batch(world: World, flag: str, batch: int, count: int):
    """Raises ValueError if a batch, set by `flag`, is more than the `count` there are to train on,
    or does not divide over the ranks."""
    world.share(batch, flag)
    if batch > count:
        raise ValueError(
            f"{flag} {batch} is more than the {count} questions or solutions to train on: lower "
            "it, or raise --limit"
        )


def questions_of(cfg, split: str, count: int | None, encoding, form, room) -> list[dict]:
    """The first `count` questions of a split (None: all), those that fit into `room`.

    Raises ValueError, with the question's file and id, for one that does not; with --skip_long it
    is left out, and one line says how many are.
    """
    rows = problems.load(cfg.questions, split)[:count]
    path = problems.split_path(cfg.questions, split)
    rows, left_out = problems.check_lengths(rows, path, encoding, form, room, cfg.skip_long)
    if left_out and is_first():
        say(left_out)
    return rows


def claim(cfg, contents: dict, others=()) -> dict | None:
    """May this run write cfg.out (and `others`)? -> the state to resume, or None for a fresh run.

    contents: fingerprints of what is trained on, by flag: a run is known by them and by its
    settings, not by how a path is spelled. Raises ValueError if something would be overwritten, or
    if --resume comes with other settings or other data. Exits 0 if the run is finished.
    """
    out = Path(cfg.out)
    state = Path(f"{out}.resume")
    if cfg.overwrite:
        if cfg.init and Path(cfg.init).resolve() in {Path(x).resolve() for x in (out, *others)}:
            raise ValueError(f"--init {cfg.init} would be overwritten: give another --out")
        return None
    there = [path for path in (out, state, *map(Path, others)) if path.exists()]
    if there and not cfg.resume:
        raise ValueError(f"{there[0]} exists: --resume continues that run, --overwrite replaces it")
    if state in there:
        found = load(state)
        check_same_run(state, found["meta"], cfg, contents)
        return found
    for path in there:
        check_same_run(path, load(path)["meta"], cfg, contents)
    if out in there:
        if is_first():
            print(f"{out} is finished", flush=True)
        raise SystemExit(0)
    return None


def check_same_run(path, meta: dict, cfg, contents: dict):
    """Raises ValueError if the checkpoint at `path` was made with other settings or other data."""
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    # a flag that has been added since had its default then
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    was = json.loads(json.dumps(defaults | meta["run"], default=str))
    # the last three shape no weights, but are in the hashes of checkpoints that exist
    free = OPERATIONAL | {"verify", "save_steps", "save_tokens"}
    for name, value in now.items():
        if name not in free and was[name] != value:
            raise ValueError(
                f"{path} was made with --{name} {was[name]}, now {value}: "
                "keep the setting or --overwrite"
            )
    for name, value in contents.items():
        if meta.get("contents", {}).get(name, value) != value:
            raise ValueError(
                f"{path} was made from other contents of --{name} ({getattr(cfg, name)}): "
                "put them back, or --overwrite"
            )


def save_state(cfg, model, meta, optimizers: list, log, step: int):
    """What --resume continues from: `step` updates are done. meta: a function of the step.

    No random state is kept: every draw is a function of the seed and the step.
    """
    log.flush()
    moments = [optimizer.state_dict() for optimizer in optimizers]
    kept = dict(recent=log.recent, skipped=log.skipped, totals=log.totals, run_id=log.run_id)
    save(f"{cfg.out}.resume", model, meta(step), step=step, optimizers=moments, **kept)


@torch.no_grad()
def resume(state: dict | None, *optimizers) -> int:
    """Give each optimizer the moments of a saved state; -> steps done, 0 for a fresh run."""
    if not state:
        return 0
    for optimizer, kept in zip(optimizers, state.pop("optimizers"), strict=True):
        parameters = optimizer.param_groups[0]["params"]
        moments = kept["state"].values()
        for p, values in zip(parameters, moments, strict=bool(moments)):
            for name, x in values.items():
                mine = put(torch.empty_like(p), x) if x.dim() else x.to(p.device, copy=True)
                optimizer.state[p][name] = mine
            if isinstance(optimizer, OffloadedAdam):
                optimizer.put_away(p, {})
    state.pop("model")  # it holds the file, which is soon replaced and would still fill the disk
    return state["step"]


def finish(cfg, model, meta: dict, log):
    """Write the result; the state for resuming is no longer needed."""
    save(cfg.out, model, meta)
    log.close()
    if is_first():
        Path(f"{cfg.out}.resume").unlink(missing_ok=True)


def loop(first: int, steps: int, cfg, world: World, save):
    """The steps first, ..., steps - 1 of a run; save(steps done) is called between them.

    That is every cfg.save_every steps, after cfg.save_minutes minutes, after the last step (what
    follows it may still fail), and when a signal comes to any rank: the step ends, all ranks save
    and leave with status 128 + its number. A second signal, a second later or more, stops at once.
    """
    asked = []
    saved = time.monotonic()

    def ask(number, _):
        if not asked:
            asked.append((number, time.monotonic()))
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # print would fail in the middle of another print
                os.write(2, f"\n{name}: stopping after this step, again to stop at once\n".encode())
        elif time.monotonic() - asked[0][1] > 1:  # torchrun passes on what all ranks have already
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # a closed terminal sends SIGHUP, a scheduler SIGUSR1 before the time is up
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: the run is to outlive it
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        for step in profiled(range(first, steps), cfg, world):
            yield step
            done = step + 1
            late = time.monotonic() - saved > 60 * cfg.save_minutes
            late, stop = world.max(late, asked[0][0] if asked else 0)  # one decision for all ranks
            if late or stop or done % cfg.save_every == 0 or done == steps:
                save(done)
                saved = time.monotonic()
                (stop,) = world.max(asked[0][0] if asked else 0)  # it may have come meanwhile
            if stop:
                if world.rank == 0:
                    say(f"\nstopped after {done} steps, the state is saved: --resume goes on")
                raise SystemExit(128 + int(stop))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def validates(cfg, step: int) -> bool:
    """Whether the validation questions are answered before this step."""
    return step == 0 or bool(cfg.eval_every) and step % cfg.eval_every == 0


def validations(cfg, steps: int) -> int:
    """How often a trainer answers the validation questions: before, after, and in between."""
    return 2 + ((steps - 1) // cfg.eval_every if cfg.eval_every else 0)


SHOWN_QUESTIONS = 4  # in OUT.answers.jsonl at each validation
SHOWN_ANSWERS = 8  # to each of them


def examples(rows: list[dict], answers: list[dict]) -> list[dict]:
    """Some questions of `rows`, each with some of its answers, for Log.add_answers.

    answers: as many to each row, question by question; what is said of each, its text first.
    """
    group = len(answers) // max(1, len(rows))
    kept = []
    for place, row in enumerate(rows[:SHOWN_QUESTIONS]):
        shown = answers[place * group :][: min(group, SHOWN_ANSWERS)]
        kept.append({name: row[name] for name in ("id", "question", "answer")} | {"answers": shown})
    return kept


@contextlib.contextmanager
def writing(path):
    """Raises ValueError, and says how to go on, for what cannot be written to a file of the run."""
    try:
        yield
    except OSError as error:
        message = f"could not write {path}: {error}; --resume goes on from the last saved state"
        raise ValueError(message) from error


class Log:
    """One JSON line per step in OUT.metrics.jsonl, and a progress bar that shows some of them.

    Beside it OUT.answers.jsonl has a few questions with their answers, to be read. Rank 0 writes,
    and its answers are those shown. state: what `save_state` saved, or None, for a run that begins:
    it removes what was at OUT; lines of steps after it are dropped, since these steps are done
    again. shown: names of what the progress bar shows.
    """

    WINDOW = 128  # steps that a spike is measured against (OLMo-core, SkipStepOptimizer)
    IN_A_ROW = 10  # more skipped updates than this stop a run

    def __init__(self, cfg, world: World, steps: int, state: dict | None, shown: str):
        self.cfg = cfg
        self.path = Path(f"{cfg.out}.metrics.jsonl")
        self.answers = Path(f"{cfg.out}.answers.jsonl")
        self.shown = shown.split()
        self.active = world.rank == 0
        first = state["step"] if state else 0
        self.recent = state["recent"] if state else {}
        self.skipped = state["skipped"] if state else 0
        self.totals = state["totals"] if state else {}
        fresh = fingerprint([str(Path(cfg.out).resolve()), time.time_ns()])
        self.run_id = (state or {}).get("run_id", fresh)  # by which --track knows the run again
        if not self.active:
            return
        self.track, self.end_track = tracker(cfg, first, self.run_id)
        if not state:  # what --overwrite replaces: a later --resume would take it for this run's
            for path in (Path(cfg.out), Path(f"{cfg.out}.resume")):
                path.unlink(missing_ok=True)
        kept = lines_before(first, self.path)
        if first and not kept:
            kept = [{"step": first - 1, "totals": self.totals}]
            say(f"{self.path} is gone: the record begins again at step {first}")
        write_rows(self.path, kept)
        if kept := lines_before(first, self.answers):
            write_rows(self.answers, kept)
        else:
            self.answers.unlink(missing_ok=True)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        self.bar = tqdm(
            desc=self.path.name.removesuffix(".metrics.jsonl"),
            total=steps,
            initial=first,
            mininterval=0.5 if sys.stderr.isatty() else 20,  # seconds between refreshes
            bar_format="{desc}  |  {remaining} left",
        )

    def __call__(self, step: int, costs: dict, **values):
        """Record update `step` (from 0).

        costs of this step (flops, seconds, questions, sampled_tokens ...) are summed over the run,
        resumed ones included, and written as "totals". What is not finite is written as null.
        """
        if not self.active:
            return
        self.totals = {name: self.totals.get(name, 0) + cost for name, cost in costs.items()}
        for name, x in values.items():
            if isinstance(x, float) and not math.isfinite(x):
                values[name] = None  # JSON has no NaN
        self.add(step, **values, totals=self.totals)
        known = [name for name in self.shown if values.get(name) is not None]
        told = "  ".join(f"{name} {values[name]:.3g}" for name in known)
        name = self.path.name.removesuffix(".metrics.jsonl")
        self.bar.set_description_str(f"{name}: {step + 1}/{self.bar.total}  {told}", False)
        self.bar.update(step + 1 - self.bar.n)

    def doing(self, what: str):
        """Say on the progress bar what is at work where a step takes no part."""
        if self.active:
            self.bar.set_description_str(f"{self.bar.desc.split(':')[0]}: {what}")

    def add(self, step: int, **values):
        """A line beside the steps (a validation, say): `step` updates were done."""
        if not self.active:
            return
        self.track(step, dict(numbers_in(values)))
        with writing(self.path):
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    def add_answers(self, step: int, split: str, rows: list[dict]):
        """Questions of a split with their answers (see `examples`): `step` updates were done."""
        if not self.active:
            return
        lines = [json.dumps({"step": step, "split": split, **row}) + "\n" for row in rows]
        with writing(self.answers), open(self.answers, "a", encoding="utf-8") as file:
            file.writelines(lines)

    def healthy(self, step: int, rows, watched: dict[str, float], **others: float) -> bool:
        """Whether the update of this step may be made: all values are finite, and no spike.

        watched: gradient norms and negative log-likelihoods, compared with the last WINDOW good
        steps (--spike). A value of 0, every group flat, does not count as a step: after many of
        them the first right answer would be a spike. others: only have to be finite. Otherwise a
        line in the log says what it was and which rows() the batch had, and the answer is False
        (--on_nonfinite skip) or a ValueError (stop; also after more than IN_A_ROW skipped ones).
        """
        wrong = [
            f"{name} is {value}"
            for name, value in (watched | others).items()
            if not math.isfinite(value)
        ]
        wrong += [told for name, value in watched.items() if (told := self.spike(name, value))]
        if not wrong:
            self.skipped = 0
            for name, value in watched.items():
                past = self.recent.setdefault(name, [])
                self.recent[name] = [*past, *([value] if value else [])][-self.WINDOW :]
            return True
        self.skipped += 1
        self.add(step, skipped=", ".join(wrong), rows=rows())
        if self.cfg.on_nonfinite == "stop" or self.skipped > self.IN_A_ROW:
            more = "" if self.skipped > 1 else "; --resume --on_nonfinite skip leaves it out"
            raise ValueError(
                f"{wrong[0]} at step {step}: stopped before the update, the last saved state is "
                f"intact, the batch's rows are in {self.path}{more}; if it comes again, start with "
                "a lower --lr"
            )
        return False

    def spike(self, name: str, value: float) -> str:
        """What is wrong with a value far above its recent ones, or nothing."""
        past = self.recent.get(name, [])
        if not self.cfg.spike or not math.isfinite(value) or len(past) < self.WINDOW:
            return ""
        mean, deviation = statistics.fmean(past), statistics.pstdev(past)
        if value <= mean + self.cfg.spike * deviation:
            return ""
        return f"{name} is {value:.4g} after {mean:.4g} ± {deviation:.2g} in {len(past)} steps"

    def flush(self):
        """Before a state is saved: the lines that it counts on are on the disk."""
        if not self.active:
            return
        os.fsync(self.file.fileno())
        if not self.path.exists() or not os.path.samestat(
            os.stat(self.path), os.fstat(self.file.fileno())
        ):
            raise ValueError(
                f"{self.path} was removed, or another run has the same --out: this one stops"
            )

    def close(self):
        if self.active:
            self.flush()
            self.file.close()
            self.end_track()
            self.bar.close()


def numbers_in(values: dict, above: str = ""):
    """(name, number) of a line of the log; those of a validation are validation/pass@1, ..."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers_in(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            yield above + name, value


def tracker(cfg, first: int, run_id: str):
    """What --track asks for -> two functions: of (step, {name: number}), and one that ends it.

    A run that resumes at step `first` goes on where its run_id began. Raises ValueError if the
    package is missing.
    """
    if cfg.track == "none":
        return (lambda step, numbers: None), (lambda: None)
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            package = importlib.import_module(cfg.track)
    except ImportError as error:
        raise ValueError(f"--track {cfg.track}: {error}; pip install {cfg.track}") from None
    if cfg.track == "tensorboard":
        writer = SummaryWriter(f"{cfg.out}.tensorboard", purge_step=first)
        atexit.register(writer.close)  # a run that is stopped keeps what it wrote

        def write(step, numbers):
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        return write, writer.close
    name = Path(cfg.out).stem
    more = {}
    if cfg.track == "wandb":
        more["id"] = run_id
    else:  # trackio knows a run by its name alone
        name += f"-{run_id[:6]}"
    run = package.init(
        project="rl-excursions",
        name=name,
        config=dataclasses.asdict(cfg),
        resume="allow",
        **more,
    )
    return (lambda step, numbers: run.log(numbers, step=step)), run.finish


def lines_before(step: int, path: Path) -> list[dict]:
    """The lines of a log that were written before this step."""
    if not step or not path.exists():
        return []
    return [line for line in read_rows(path) if line.get("step", step) < step]


def history(out) -> tuple[list[dict], dict]:
    """From the metrics of a run: its validations, and all that it cost.

    Each validation comes with the mean training reward since the one before and the costs up to it.
    """
    path = Path(f"{out}.metrics.jsonl")
    if not path.exists():
        return [], {}
    points = []
    rewards = []
    spent = dict.fromkeys(("flops", "questions", "sampled_tokens", "seconds"), 0)
    for line in read_rows(path):
        rewards += [line["reward"]] if "reward" in line else []
        spent = {name: line.get("totals", spent).get(name, 0) for name in spent}
        if "validation" in line:
            left_out = ("correct", "n", "temperature")
            kept = {k: v for k, v in line["validation"].items() if k not in left_out}
            mean = {"reward": sum(rewards) / len(rewards)} if rewards else {}
            points.append({"step": line["step"], **spent, **mean, **kept})
            rewards = []
    return points, spent


# ----------------------------------------------------------------------------------- --profile

# torch.profiler.record_function has these names in model.py and the scripts; they do not overlap.
# The gradient of the loss head is made in its forward pass, so "backward" is that of the blocks.
RANGES = (
    "data",
    "sampling",
    "reward",
    "forward",
    "loss head",
    "backward",
    "reduce",
    "optimizer",
)
WARM_UP = 5  # steps before: compilation, CUDA graphs, the first allocations


def profiled(steps, cfg, world: World):
    """The items of `steps`; cfg.profile of them, after WARM_UP others, are traced.

    Writes OUT.trace.json (for ui.perfetto.dev) and prints the shares of a step's time.
    """
    if not cfg.profile or world.rank > 0:
        yield from steps
        return

    path = f"{cfg.out}.trace.json"
    written = []

    def ready(profiler):
        profiler.export_chrome_trace(path)
        written.append(path)
        shares, seconds = time_shares(profiler.events())
        lines = [f"  {name:10}{share:6.1%}" for name, share in shares.items()]
        print(f"\n{path}: {seconds * 1e3:.1f} ms per step", *lines, sep="\n", flush=True)

    traced = schedule(wait=WARM_UP - 1, warmup=1, active=cfg.profile, repeat=1)
    with profile(schedule=traced, on_trace_ready=ready) as profiler:
        for step in steps:
            yield step
            profiler.step()
    if not written:
        say(f"--profile wrote no {path}: its first step is number {WARM_UP + 1}, the run was over")


def time_shares(events) -> tuple[dict[str, float], float]:
    """Shares of the traced steps' time by range, with "the rest"; and the seconds of a step.

    On a GPU the time is that of the kernels, counted for the range in which they were launched.
    """
    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    steps = [e.time_range for e in on_cpu if e.name.startswith("ProfilerStep")]
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in on_cpu if e.name in RANGES]
    spans.sort()
    spent = {name: 0.0 for name in RANGES if any(span[2] == name for span in spans)}
    # A kernel has the id of the call of CUDA that launched it, a whole graph's kernels that of one
    # call. Operators have ids of their own, and the launch of a graph is in none.
    calls = {e.id: e.time_range.start for e in on_cpu if e.name.startswith(("cu", "hip"))}
    kernels = [
        e
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    for kernel in kernels:
        at = calls.get(kernel.id, -1)
        place = bisect.bisect(spans, at, key=lambda span: span[0]) - 1
        if place >= 0 and at <= spans[place][1]:
            spent[spans[place][2]] += kernel.time_range.end - kernel.time_range.start
    if not kernels:
        for begin, end, name in spans:
            spent[name] += end - begin
    whole = sum(step.end - step.start for step in steps)
    total = max(whole, sum(spent.values()))
    spent["the rest"] = total - sum(spent.values())
    return {name: span / total for name, span in spent.items()}, whole / len(steps) / 1e6
