"""What is the same in every script: flags, the loop over the steps with its saves and signals, the metrics log.

    @dataclass(frozen=True)
    class Config:
        lr: float = 3e-4  # peak learning rate; the comment is what --help shows

    def main(cfg): ...

    if __name__ == "__main__":
        run.main(main, Config, __doc__)

Errors for the user are ValueErrors with one line that says what to do; `main` prints that line and exits with status 2
(DEBUG=1 shows the traceback). So do a full disk and memory that does not suffice. What a Ctrl-C stops exits with 130, a
trainer that a SIGTERM stops with 143.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import traceback
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import checkpoint, profiler, ranks

# ------------------------------------------------------------------------------------------------------------- flags

# no whole number is negative, and these are not 0 either
COUNTS = set("tokens batch_tokens length batch questions_per_step group updates micro rows max_new n k save_every eval_n eval_rows".split())


def configure(Config, argv: list[str], doc: str = ""):
    """`--field value` or `--field=value` for every field of the dataclass Config (`--flag` alone for a bool).

    Integers may be 2000, 50e9 or 2.8M; tuples 1000,2000. Words without a flag go to the first field if that is a tuple of
    str (eval.py ckpt/*.pt). Raises ValueError for what is not a field or has the wrong type; --help exits 0."""
    hints, values, rest = typing.get_type_hints(Config), {}, list(argv)
    if "--help" in rest or "-h" in rest:
        comments = dict(re.findall(r"^    (\w+): [^#\n]*?#\s*(.*)$", inspect.getsource(Config), re.M))
        width = max(len(field.name) for field in dataclasses.fields(Config))
        lines = [(doc or "").strip(), "", "flags:"]
        for field in dataclasses.fields(Config):
            default = "" if field.default is dataclasses.MISSING else f" [{field.default}]"
            lines.append(f"  --{field.name:<{width}} {comments.get(field.name, '')}{default}")
        try:
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # --help | head; Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    if typing.get_origin(kind) is typing.Literal:
        if text not in (choices := typing.get_args(kind)):
            raise ValueError(f"--{name} takes {' or '.join(choices)}, not {text!r}")
        return text
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
    cfg = None
    try:
        cfg = configure(Config, sys.argv[1:] if argv is None else argv, doc)
        script(cfg)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while rank 0 still writes can take the others down with it
    except KeyboardInterrupt:  # between the steps of a trainer `loop` is there first
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, OSError, RuntimeError) as error:
        says = out_of_memory(error, cfg) if isinstance(error, RuntimeError) else str(error)
        if says is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(says.split())}", file=sys.stderr, flush=True)
        if os.environ.get("DEBUG"):
            raise
        raise SystemExit(2) from None
    if dist.is_initialized():  # not after an error: it would wait for ranks that wait for this one
        dist.destroy_process_group()


def out_of_memory(error: RuntimeError, cfg) -> str | None:
    """If PyTorch says that memory ran out, on a GPU or the CPU: one line with the flag to lower, and to what. How many rows
    were in work is read from the frames of the traceback: `_batch` of the sampler, or whose ids went forward or backward."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    wanted = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    what = "out of memory" + (f" ({wanted[1]} more)" if wanted else "")
    off = [flag for flag in ("checkpoint_activations", "shard") if getattr(cfg, flag, True) is False]
    more = " or ".join([f"--{flag}" for flag in off] + ["a shorter row" if off else "more GPUs"])
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    passes = hasattr(cfg, "micro") and any(frame.f_code.co_name in ("forward", "backward") for frame in frames)
    for local in (frame.f_locals for frame in frames):
        if {"Q", "n", "max_new"} <= local.keys():  # Q questions, n answers to each
            half = f"--rows {local['Q'] // 2 * local['n']}" if local["Q"] > 1 else "a lower --max_new"
            return f"{what} with {local['Q'] * local['n']} answers sampled side by side: try {half}"
        ids = getattr(local.get("micro"), "ids", local.get("ids"))
        if passes and torch.is_tensor(ids):
            rows, length = ids.shape
            return f"{what} in a pass over {rows} rows of {length} tokens: try {f'--micro {rows // 2}' if rows > 1 else more}"
    return f"{what} for weights, gradients and optimizer: try {'--shard over several GPUs' if 'shard' in off else 'more GPUs'}"


# ----------------------------------------------------------------------------------------------------------- the loop


def begin(cfg, recipe: str, sizes: dict, Model, ModelConfig):
    """What a trainer that starts from --init does first: join the world, load the parent (or the saved state of this
    run), take over what the flags leave open from `sizes` ({"toy": ..., "paper": ...}) and from the parent's meta.
    recipe: its name in file names.

    -> cfg, world, model, the parent's meta, state (None for a fresh run)."""
    world = ranks.start(cfg.device, cfg.dtype, cfg.shard)
    parent = checkpoint.load(cfg.init)
    meta = parent["meta"]
    out = f"{Path(cfg.init).with_suffix('')}-{recipe}" + (f"-s{cfg.seed}.pt" if cfg.seed else ".pt")
    named = {"questions": meta["questions"], "out": out}
    cfg = fill(cfg, named | sizes["toy" if meta["preset"].startswith("toy") else "paper"])
    if cfg.eval_questions and cfg.questions.endswith(".jsonl"):
        raise ValueError(f"{cfg.questions} is all for training: --eval_questions 0, or a folder that has val.jsonl beside train.jsonl")
    state = checkpoint.claim(cfg.out, cfg)
    model = checkpoint.load_model(state or parent, Model, ModelConfig, world)
    model.checkpoint_activations = cfg.checkpoint_activations
    return cfg, world, model, meta, state


def longest(meta: dict) -> int:
    """Tokens of the longest answer a checkpoint was trained to give; of a base, what its size gets."""
    return meta["run"].get("max_new") or (56 if meta["preset"].startswith("toy") else 512)


def loop(first: int, steps: int, cfg, world, save):
    """The steps first, ..., steps - 1 of a run; what is saved between them is saved here, by save(steps done).

    That is every cfg.save_every steps, after the first step that ends cfg.save_minutes minutes after the last save, after
    the last step (what follows it may still fail), and when a SIGTERM or SIGINT comes to any rank: the step ends, all ranks
    save and leave with status 143 or 130. A second signal, a second later or more, stops at once."""
    asked, saved = [], time.monotonic()

    def ask(number, _):
        if not asked:
            asked.append((number, time.monotonic()))
            note = f"\n{signal.Signals(number).name}: ending after this step, once more to stop at once\n"
            os.write(2, note.encode())  # print would fail if the signal came in the middle of another one
        elif time.monotonic() - asked[0][1] > 1:  # a scheduler may signal all processes, and torchrun passes its own on
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for step in profiler.profiled(range(first, steps), cfg.profile, f"{cfg.out}.trace.json", world.rank == 0):
            yield step
            done, late = step + 1, time.monotonic() - saved > 60 * cfg.save_minutes
            late, stop = world.max(late, asked[0][0] if asked else 0)  # one decision for all ranks
            if late or stop or done % cfg.save_every == 0 or done == steps:
                save(done)
                saved = time.monotonic()
                (stop,) = world.max(asked[0][0] if asked else 0)  # it may have come meanwhile; and no rank leaves while 0 writes
            if stop:
                if world.rank == 0:
                    print(f"\nstopped after {done} steps, the state is saved: --resume goes on", file=sys.stderr, flush=True)
                raise SystemExit(128 + int(stop))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_finite(step: int, **values: float):
    """Raises ValueError, before the update, if a value is not a number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} at step {step}: stopped before the update, the last saved state is intact; lower --lr")


class Log:
    """One JSON line a step in `<out>.metrics.jsonl`, and a progress bar that shows some of them. Rank 0 writes.

    state: what `checkpoint.save_state` has saved, or None: steps after it are done again, their lines go. Raises ValueError
    if lines before it are missing; without any file a warning, and the totals go on from the state."""

    WINDOW, IN_A_ROW = 128, 10  # steps that a spike is measured against (OLMo-core's SkipStepOptimizer); skipped before it stops

    def __init__(self, out, world, steps: int, state: dict | None, shown: str):
        self.path, self.shown, self.active, self.totals = Path(f"{out}.metrics.jsonl"), shown.split(), world.rank == 0, {}
        first, self.recent, self.skipped = (state["step"], state["recent"], state["skipped"]) if state else (0, {}, 0)
        if not self.active:
            return
        self.totals, kept = state["totals"] if state else {}, []
        if first and self.path.exists():
            kept = [line for line in read_lines(self.path) if line.get("step", first) < first]
            logged = {line["step"] for line in kept if "totals" in line}
            if missing := set(range(min(logged, default=0), first)) - logged:
                raise ValueError(f"{self.path} lacks step {min(missing)}, the saved state has {first} steps: put the file back, or "
                                 "remove it to go on without the record of what was done")  # fmt: skip
        elif first:
            kept = [{"step": first - 1, "totals": self.totals}]
            print(f"{self.path} is gone: the record begins again at step {first}", file=sys.stderr, flush=True)
        write_lines(self.path, kept)  # a kill here must not cost what was measured before
        self.file = open(self.path, "a+", buffering=1)
        pace = 0.5 if sys.stderr.isatty() else 20  # seconds between refreshes
        self.bar = tqdm(desc=Path(out).name, total=steps, initial=first, mininterval=pace, bar_format="{desc}  |  {remaining} left")

    def __call__(self, step: int, costs: dict, **values):
        """Record update `step` (from 0). `costs` (flops, seconds, questions, sampled_tokens ...) of this step are summed
        over the run, resumes included, and written as "totals"."""
        if not self.active:
            return
        self.totals = {name: self.totals.get(name, 0) + cost for name, cost in costs.items()}
        values = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}  # JSON has no nan
        self.add(step, **values, totals=self.totals)
        shown = "  ".join(f"{name} {values[name]:.3g}" for name in self.shown if values.get(name) is not None)
        name = self.path.name.removesuffix(".metrics.jsonl")
        self.bar.set_description_str(f"{name}: {step + 1}/{self.bar.total}  {shown}", refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def add(self, step: int, **values):
        """A line beside the steps (a validation, say): `step` updates were done."""
        if self.active:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise ValueError(f"could not write {self.path}: {error}; --resume goes on from the last saved state") from error

    def healthy(self, step: int, cfg, rows, watched: dict[str, float], **others: float) -> bool:
        """Whether the update of this step may be made: all values are numbers, and with cfg.spike none of the `watched` ones
        is more than that many standard deviations above its mean over the last WINDOW good steps. Watched are gradient norms
        and negative log-likelihoods; not the loss of RL, whose size says nothing, and 0 (every group flat) does not count as
        a step: after many of them the first right answer would be a spike. Otherwise a line in the log says what it was and
        which rows(), from 0, the batch had; cfg.on_nonfinite: "skip" -> False, "stop" -> ValueError; so are more than
        IN_A_ROW skipped ones."""
        wrong = [f"{name} is {value}" for name, value in (watched | others).items() if not math.isfinite(value)]
        for name, value in watched.items():
            past = self.recent.setdefault(name, [])
            if cfg.spike and math.isfinite(value) and len(past) == self.WINDOW:
                mean, deviation = statistics.fmean(past), statistics.pstdev(past)
                if value > mean + cfg.spike * deviation:
                    wrong.append(f"{name} is {value:.4g} after {mean:.4g} ± {deviation:.2g} in {len(past)} steps")
        if not wrong:
            self.skipped = 0
            for name, value in watched.items():
                self.recent[name] = [*self.recent[name], *([value] if value else [])][-self.WINDOW :]
            return True
        self.skipped += 1
        self.add(step, skipped=", ".join(wrong), rows=rows())
        if cfg.on_nonfinite == "stop" or self.skipped > self.IN_A_ROW:
            more = "" if self.skipped > 1 else "; --resume --on_nonfinite skip leaves it out"
            raise ValueError(f"{wrong[0]} at step {step}: stopped before the update, the last saved state is intact, the batch's rows "
                             f"are in {self.path}{more}; if it comes again, start with a lower --lr")  # fmt: skip
        return False

    def sync(self) -> str | None:
        """Before a state is saved: the lines that it counts on are on the disk. If the file was removed, its lines are
        written again and what is to be said about it is returned. Raises ValueError if another run has taken its place."""
        if not self.active:
            return None
        os.fsync(self.file.fileno())
        if self.path.exists():
            if not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                raise ValueError(f"{self.path} was replaced under this run: another one with the same --out is at work, this one stops")
            return None
        self.file.seek(0)
        lines = [json.loads(line) for line in self.file]
        self.file.close()
        write_lines(self.path, lines)
        self.file = open(self.path, "a+", buffering=1)
        return f"{self.path} was removed under the run: it and the state are written again, what else was there is not; --resume goes on"

    def close(self):
        if self.active:
            removed = self.sync()
            self.bar.close()
            self.file.close()
            if removed:
                raise ValueError(removed)


def history(out) -> tuple[list[dict], dict]:
    """From the metrics of a run: its validations, each with the mean training reward since the one before and the costs up to it;
    and all costs, nothing if there are no metrics."""
    lines, points, rewards = read_lines(path) if (path := Path(f"{out}.metrics.jsonl")).exists() else [], [], []
    spent = dict.fromkeys(("flops", "questions", "sampled_tokens", "seconds"), 0)
    for line in lines:
        rewards += [line["reward"]] if "reward" in line else []
        spent = {name: line.get("totals", spent).get(name, 0) for name in spent}
        if "validation" in line:
            kept = {k: v for k, v in line["validation"].items() if k not in ("correct", "n", "temperature")}
            points.append({"step": line["step"], **spent, **({"reward": sum(rewards) / len(rewards)} if rewards else {}), **kept})
            rewards = []
    return points, spent if lines else {}


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


def write_lines(path: Path, rows: list[dict]):
    """The counterpart; the file is whole or as it was."""
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"could not write {path}: {error}; what was there is intact") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
