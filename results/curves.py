"""Curves of runs, while they run or after: their metrics.jsonl in one picture."""

from pathlib import Path

import numpy as np

from data.files import read_rows
from results.figures import plt, save

WINDOW = 10  # steps in the running mean that is drawn over the faint steps themselves
PANELS = ("reward", "correct", "formatted", "entropy", "length", "loss", "validation")


def points(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a panel: pass@1 of validations, or a number of each step.

    The loss of RL says nothing (rl.py), and is left out.
    """
    found = []
    for line in lines:
        value = line.get("validation", {}).get("pass@1") if name == "validation" else line.get(name)
        if value is not None and not (name == "loss" and "reward" in line):
            found.append((line["step"], value))
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: list[float], window: int = WINDOW) -> np.ndarray:
    """The mean of each value and those before it, at most `window` of them."""
    sums = np.cumsum([0.0, *values])
    first = np.maximum(0, np.arange(1, len(sums)) - window)
    return (sums[1:] - sums[first]) / (np.arange(1, len(sums)) - first)


def read_runs(paths) -> dict[str, list[dict]]:
    """{name of a run: lines of its metrics}. Raises ValueError for a file that is not there."""
    runs = {}
    for path in map(str, paths):
        path = Path(path.removesuffix(".metrics.jsonl") + ".metrics.jsonl")
        if not path.is_file():
            raise ValueError(f"there is no {path}: trainers write it beside their checkpoint")
        name = path.name.removesuffix(".metrics.jsonl").removesuffix(".pt")
        name = f"{path.parent.name}/{name}" if name in runs else name
        runs[name] = read_rows(path)
    return runs


def draw(paths, out) -> str:
    """A panel for each of PANELS that a run has numbers of; -> what was written."""
    runs = read_runs(paths)
    found = {panel: {run: points(lines, panel) for run, lines in runs.items()} for panel in PANELS}
    panels = [panel for panel in PANELS if any(steps for steps, _ in found[panel].values())]
    if not panels:
        raise ValueError("these runs have no step yet: wait for the first")
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    size = (3.6 * columns, 0.8 + 2.6 * height)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (run, (steps, values)) in enumerate(found[panel].items()):
            look = dict(color=f"C{number % 10}", ls=("-", "--", ":")[number // 10 % 3])
            if panel == "validation":
                axis.plot(steps, values, marker="o", ms=4, label=run, **look)
            else:
                axis.plot(steps, values, alpha=0.25, linewidth=0.7, **look)
                axis.plot(steps, running_mean(values), label=run, **look)
        axis.set_title("validation pass@1" if panel == "validation" else panel)
        axis.set_xlabel("step")
    for axis in axes.flat[len(panels) :]:
        figure.delaxes(axis)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(figure, out)
    return f"{out}: {', '.join(panels)} of {len(runs)} runs"
