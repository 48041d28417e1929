"""What the benchmarks share: two sides that take turns, shapes of models, one table.

Each benchmark prints one table; with --json its last line is one JSON object. A peer that is not
installed, or that fails, is a line of the table.
"""

import argparse
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from data import tokens  # noqa: E402
from model import PRESETS, ModelConfig, round_up  # noqa: E402


def parser(doc: str, turns: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    found.add_argument("--turns", type=int, default=turns, help="turns of each side")
    return found


def missing(package: str) -> str:
    """Why a peer cannot run, or nothing."""
    return "" if find_spec(package) else f"{package} is not installed"


def why(problem: Exception) -> str:
    """An error in one short line, for the table."""
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:80]


def machine(device="cpu") -> str:
    device = torch.device(device)
    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"torch {torch.__version__}, {where}"


def clock(device="cpu") -> float:
    """Seconds, once all that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def turns(ours, theirs, count: int, device="cpu") -> tuple[float, float, float]:
    """Median seconds of each, and the median over turns of theirs / ours; the first is not counted.

    They take turns because the speed of a shared machine drifts. theirs None: NaN.
    """
    pairs = []
    for _ in range(count + 1):
        pair = []
        for side in (ours, theirs):
            began = clock(device)
            if side:
                side()
            pair.append(clock(device) - began if side else float("nan"))
        pairs.append(pair)
    first, second = zip(*pairs[1:], strict=True)
    ratio = statistics.median(b / a for a, b in pairs[1:])
    return statistics.median(first), statistics.median(second), ratio


def show(title: str, head: list[str], rows: list[list]):
    """A table; the first column is words, None is a dash. A row of two is a name and a remark."""
    lines = [head, *([x if isinstance(x, str) else "-" for x in row] for row in rows)]
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in full) for i in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)
    print(f"\n{title}")
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        if len(line) == len(head):
            cells += [x.rjust(width) for x, width in zip(line[1:], widths[1:], strict=True)]
        else:
            cells += line[1:]
        print("  ".join(cells))


def number(value: float | None, form: str = ",.0f") -> str | None:
    """For the table; NaN is None, too."""
    return None if value is None or value != value else format(value, form)


def finish(args, figures: dict):
    """The figures, those that are NaN as null."""
    if args.json:
        known = {k: None if isinstance(v, float) and v != v else v for k, v in figures.items()}
        print(json.dumps(known))


def config_of(preset: str, length: int = 0) -> ModelConfig:
    """The shape of a preset with the vocabulary that its checkpoints have."""
    vocab = tokens.VOCABULARY["toy" if preset.startswith("toy") else "cl100k_base"]
    shape = dict(PRESETS[preset])
    shape["context"] = max(length, shape["context"])
    return ModelConfig(**shape, vocab=vocab, padded_vocab=round_up(vocab, 128))
