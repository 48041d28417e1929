"""What is the same in every script: flags, the loop over the steps with its saves and signals, the metrics log.

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
import inspect
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import types
import typing
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import checkpoint, ranks

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


# ----------------------------------------------------------------------------------------------------------- the loop


def begin(cfg, stage: str, sizes: dict, Model, ModelConfig):
    """What a trainer that starts from --init does first: join the world, load the parent (or the saved state of this
    run), take over what the flags leave open from `sizes` ({"toy": ..., "paper": ...}) and from the parent's meta.

    -> cfg, world, model, the parent's meta, state (None for a fresh run)."""
    world = ranks.start(cfg.device, cfg.dtype)
    parent = checkpoint.load(cfg.init)
    meta = parent["meta"]
    named = {"questions": meta["questions"], "out": str(Path(cfg.init).with_suffix("")) + f"-{stage}.pt"}
    cfg = fill(cfg, named | sizes["toy" if meta["preset"].startswith("toy") else "paper"])
    state = checkpoint.claim(cfg.out, cfg)
    return cfg, world, checkpoint.load_model(state or parent, Model, ModelConfig, world), meta, state


def loop(first: int, steps: int, cfg, world, save):
    """The steps first, ..., steps - 1 of a run; what is saved between them is saved here, by save(steps done).

    That is every cfg.save_every steps, every cfg.save_minutes minutes, after the last step (what follows it may still
    fail), and when a SIGTERM or SIGINT comes to any rank: the step ends, all ranks save and leave with status 143 or 130.
    A second signal stops at once."""
    asked, saved = [], time.monotonic()

    def ask(number, _):
        if not asked:
            print(f"{signal.Signals(number).name}: ending after this step, once more to stop at once", file=sys.stderr, flush=True)
            asked.append((number, time.monotonic()))
        elif time.monotonic() - asked[0][1] > 1:  # torchrun passes on what the terminal has sent already
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for step in range(first, steps):
            yield step
            done, late = step + 1, time.monotonic() - saved > 60 * cfg.save_minutes
            late, stop = world.max(late, asked[0][0] if asked else 0)  # one decision for all ranks
            if late or stop or done % cfg.save_every == 0 or done == steps:
                save(done)
                saved = time.monotonic()
            if stop:
                if world.rank == 0:
                    print(f"stopped after step {step}, its state is saved: --resume goes on", file=sys.stderr, flush=True)
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

    state: what `checkpoint.save_state` has saved, or None: steps after it are done again, their lines go."""

    WINDOW, IN_A_ROW = 128, 10  # steps that a spike is measured against (OLMo-core's SkipStepOptimizer); skipped before it stops

    def __init__(self, out, world, steps: int, state: dict | None, shown: str):
        self.path, self.shown, self.active, self.totals = Path(f"{out}.metrics.jsonl"), shown.split(), world.rank == 0, {}
        first, self.recent, self.skipped = (state["step"], state["recent"], state["skipped"]) if state else (0, {}, 0)
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_lines(self.path) if first and self.path.exists() else []
        kept = [line for line in lines if line["step"] < first]
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, self.path)  # a kill here must not cost what was measured before
        self.totals = next((line["totals"] for line in reversed(kept) if "totals" in line), {})
        self.file = open(self.path, "a", buffering=1)
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

    def healthy(self, step: int, cfg, rows, **values: float) -> bool:
        """Whether the update of this step may be made: all values (loss, gradient norm) are numbers, and with cfg.spike none
        is more than that many standard deviations above its mean over the last WINDOW good steps. Otherwise a line in the
        log says what it was and which rows() the batch had; cfg.on_nonfinite: "skip" -> False, "stop" -> ValueError."""
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        for name, value in values.items():
            past = self.recent.setdefault(name, [])
            if cfg.spike and not wrong and len(past) == self.WINDOW:
                mean, deviation = statistics.fmean(past), statistics.pstdev(past)
                if value > mean + cfg.spike * deviation:
                    wrong.append(f"{name} is {value:.4g} after {mean:.4g} ± {deviation:.2g} in {len(past)} steps")
        if not wrong:
            self.skipped = 0
            for name, value in values.items():
                self.recent[name] = [*self.recent[name], value][-self.WINDOW:]
            return True
        self.skipped += 1
        self.add(step, skipped=", ".join(wrong), rows=rows())
        if cfg.on_nonfinite == "stop" or self.skipped > self.IN_A_ROW:
            raise ValueError(f"{wrong[0]} at step {step}: stopped before the update, the last saved state is intact, the batch's rows "
                             f"are in {self.path}; lower --lr" + ("" if self.skipped > 1 else ", or --on_nonfinite skip"))  # fmt: skip
        return False

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
