"""Figures of the report, each drawn if its rows are there."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image

from results.along import lead, mean, of_questions, rivals
from results.findings import BASE, RL, SFT, SFT_RL
from results.rows import RECIPES, Arm, tokens_name

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend first: there may be no display

plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "legend.fontsize": 9.5})
UNKNOWN = ("#0000CC", "#AA4499", "#44AA99", "#661100", "#117733", "#DDAA33")
MARKERS = "osv^DPX*<>hp"
NAMES = {  # what a stranger would rather read: the presets of model.py, the worlds of data/toy.py
    "toy-math30": "generated word problems",
    "toy": "0.5M parameters",
    "toy-large": "1.9M parameters",
    "190m": "190M parameters",
    "1b": "1B parameters",
    "4b": "4B parameters",
}
SPLITS = {"val": "validation", "test": "test"}
PAPER = pd.read_csv(Path(__file__).with_name("paper.csv")).set_index(["metric", "recipe"])


def style(r, arm):
    """Colour, marker and label; those of an arm that RECIPES does not have follow its place."""
    usual = arm.recipe in RECIPES and arm == Arm(arm.recipe, arm.shots)
    place = [*RECIPES].index(arm.recipe) if usual else r.arms.index(arm)
    colour = RECIPES[arm.recipe] if usual else UNKNOWN[place % len(UNKNOWN)]
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)], "ms": 5, "label": str(arm)}


def plot(axis, x, found, **look):
    """A line through Estimates, in %, with their 95% intervals; two standard errors over
    questions where there are fewer than four models."""
    points = [(at, e) for at, e in zip(x, found, strict=True) if e]
    half = [100 * (e.half() if e.df else 2 * e.se) for _, e in points]
    mean = [100 * e.mean for _, e in points]
    axis.errorbar([at for at, _ in points], mean, half, capsize=2, elinewidth=0.8, **look)


def tick_names(tokens):
    """Names of the checkpoints on a log scale, without those that would touch the next one."""
    names, right = [], np.inf
    for t in reversed(tokens):
        far = np.log(right / t) > 0.2 * np.log(tokens[-1] / tokens[0])
        names.append(tokens_name(t) if far else "")
        right = t if far else right
    return names[::-1]


def bars(r):
    """What the error bars of test or validation rows are."""
    many = any(e.df for e in (r.level(arm, t, "pass@1") for arm in r.arms for t in r.tokens) if e)
    return "95% intervals over models" if many else "two standard errors over questions"


def trained(r):
    """Arms of the main world and model, without those that map.png draws."""
    arms = [arm for arm in r.arms if arm == Arm(arm.recipe) and arm.recipe != "base"]
    arms = [arm for arm in arms if not of_questions(arm.recipe)]
    asked = [arm for arm in arms if any(r.level(arm, t, "pass@1") for t in r.tokens)]
    return asked[: len(MARKERS)]


def save(figure, path, note=""):
    """One legend for all panels, and a note, under them; no version or date in the file."""
    handles = {}
    for axis in figure.axes:
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    height = figure.get_figheight()
    under = 0.2 * bool(note) / height
    bottom = under + (0.05 + 0.2 * -(-len(handles) // 5)) / height
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, under)}
    figure.legend(handles.values(), handles, ncol=5, frameon=False, **place)
    figure.text(0.5, 0.06 / height, note, ha="center", fontsize=9, color="#444444")
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.set_dpi(150)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture = picture.quantize(256, kmeans=3)  # without kmeans some lines share a colour
    picture.save(path, optimize=True, dpi=(150, 150))
    plt.close(figure)
    return path.name


def draw_pass1(r, path):
    """pass@1 against pre-training tokens, ours on the left and the paper's on the right."""
    own = [arm for arm in trained(r) if arm.recipe not in RECIPES]
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    theirs = PAPER.loc["pass@1"]
    billions = theirs.columns.astype(float)

    def place(tokens, low, high, start, width):  # on a log scale
        return start + width * np.log(np.array(tokens) / low) / max(np.log(high / low), 1e-9)

    ours = place(r.tokens, r.tokens[0], r.tokens[-1], 0, 1)
    right = place(billions, billions[0], billions[-1], 1.35, 1.25)
    shown = [BASE, SFT, RL, SFT_RL, *own[:4]]
    for i, arm in enumerate(shown):
        look = style(r, arm)
        beside = ours + 0.02 * (i - (len(shown) - 1) / 2)  # bars that are not on one another
        plot(axis, beside, [r.level(arm, t, "pass@1") for t in r.tokens], **look)
        if arm.recipe in theirs.index:
            known = theirs.loc[arm.recipe].notna()
            axis.plot(right[known], theirs.loc[arm.recipe][known], **look)
    few = [0, 1, 3, 6, 8]
    names = [*tick_names(r.tokens), *(f"{t:g}B" for t in billions[few])]
    axis.set_xticks([*ours, *right[few]], names)
    axis.axvspan(1.175, 2.75, color="#000000", alpha=0.05, linewidth=0)
    axis.set(xlim=(-0.15, 2.75), ylim=(0, max(60, axis.get_ylim()[1])))
    axis.set(xlabel="pre-training tokens (log scale)", ylabel="pass@1: right answers (%)")
    look = {"ha": "center", "va": "bottom", "transform": axis.get_xaxis_transform()}
    asked = NAMES.get(r.world, r.world)
    size = NAMES.get(r.model, f"model {r.model}")
    axis.text(0.5, 1.01, f"this repository: {size},\n{asked}", **look)
    axis.text(1.96, 1.01, "the paper: 1B parameters,\nGSM8K", **look)
    return save(figure, path, f"{SPLITS[r.split]} questions; bars: {bars(r)}")


def draw_recipes(r, path):
    """pass@k and general capability of every recipe, the paper's below."""
    arms = [BASE, *trained(r)]
    levels = {  # metric -> arm -> level at each checkpoint
        metric: {arm: [r.level(arm, t, metric) for t in r.tokens] for arm in arms}
        for metric in PAPER.index.unique(0)
    }
    levels = {metric: of for metric, of in levels.items() if any(map(any, of.values()))}
    if not levels:
        return None
    size = (0.4 + 2.5 * len(levels), 5.9)
    figure, axes = plt.subplots(2, len(levels), figsize=size, sharey=True, squeeze=False)
    gaps = np.diff(np.log(r.tokens))
    width = min([0.12, *(0.5 * gaps)])  # of the arms of a checkpoint, side by side
    for (above, below), (metric, of) in zip(axes.T, levels.items(), strict=True):
        for shift, arm in zip(np.linspace(-width, width, len(arms)) / 2, arms, strict=True):
            plot(above, np.exp(shift) * np.array(r.tokens), of[arm], **style(r, arm))
        for recipe, values in PAPER.loc[metric].iterrows():
            known = values.dropna()
            arm = BASE if recipe == "base" else Arm(recipe)
            below.plot(known.index.astype(float), known, **style(r, arm))
        name = metric.replace("accuracy", "general capability")
        above.set(title=f"{name}, ours", xscale="log", xlabel="pre-training tokens")
        above.set_xticks(r.tokens, tick_names(r.tokens))
        below.set(title=f"{name}, paper", xscale="log", xlabel="pre-training tokens")
        below.set_xticks([2, 4, 10, 20, 44], ["2B", "4B", "10B", "20B", "44B"])
    for (axis, *_), name in zip(axes, (SPLITS[r.split], "GSM8K"), strict=True):
        axis.set(ylabel=f"% ({name} questions)", ylim=(0, 102))
    return save(figure, path, f"bars: {bars(r)}")


def draw_curves(r, path, arms, sets, panels, note):
    """Validation along training: a row per (question set, checkpoint), panels (field, against)."""
    names = {"flexible@1": "pass@1 in any format", "formatted": "in the format"}
    names |= {"step": "training step", "flops": "FLOPs of training"}
    names |= {"questions": "questions, with repeats"}
    found = {
        (a, t): [arm for arm in arms if len(r.curve(arm, t, "pass@1", a)) > 2] for a, t in sets
    }
    found = {place: there for place, there in found.items() if there}
    if not found:
        return None
    size = (3.2 * len(panels), 1.1 + 2.2 * len(found))
    figure, axes = plt.subplots(len(found), len(panels), figsize=size, squeeze=False)
    for row, ((asked, t), there) in zip(axes, found.items(), strict=True):
        for axis, (field, against) in zip(row, panels, strict=True):
            ends = []  # (x of the last validation, its estimate, colour)
            for arm in there:
                points = r.curve(arm, t, field, asked)
                x = {step: step for step in points}
                if against != "step":
                    x = {step: e.mean for step, e in r.curve(arm, t, against, asked).items()}
                if not points:  # not validated in this way
                    continue
                look = style(r, arm)
                axis.plot([x[s] for s in points], [100 * e.mean for e in points.values()], **look)
                ends.append((x[max(points)], points[max(points)], look["color"]))
            widest = max([end for end, *_ in ends], default=0)
            for i, (end, e, colour) in enumerate(ends):  # the interval, a little beside the end
                place = 1 + sum(abs(other - end) < 0.1 * widest for other, *_ in ends[:i])
                plot(axis, [end + 0.02 * place * widest], [e], color=colour)
            top = 103 if field == "formatted" else max(10, 1.05 * axis.dataLim.y1)
            axis.set(xlabel=names[against], ylim=(0, top))
        row[0].set_ylabel(f"{asked}, {tokens_name(t)} tokens\nvalidation (%)")
    for axis, (field, _) in zip(axes[0], panels, strict=True):
        axis.set_title(names.get(field, field))
    return save(figure, path, note)


def draw_map(r, path):
    """Where RL overtakes SFT: pass@1 of rl along its steps less that of sft at its end, a panel per
    number of training questions, a line per checkpoint."""
    found = {}  # title -> {tokens: {step: Estimate}}
    for size, t, rl, sft in rivals(r):
        title = f"{int(size):,} training questions" if size else "the usual training questions"
        gaps = lead(r, rl, sft, t)
        if len(gaps):
            line = {step: mean(dict(row)) for step, row in gaps.iterrows()}
            found.setdefault(title, {})[t] = line
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(2.4 + 3 * len(found), 3.9), sharey=True)
    axes = np.atleast_1d(axes)
    for axis, (title, lines) in zip(axes, found.items(), strict=True):
        for t, line in lines.items():
            place = r.tokens.index(t)
            colour = plt.get_cmap("viridis")(0.9 * place / max(1, len(r.tokens) - 1))
            marker = MARKERS[place % len(MARKERS)]
            look = {"color": colour, "marker": marker, "ms": 4, "label": tokens_name(t)}
            steps = sorted(line)
            plot(axis, steps, [line[step] for step in steps], **look)
        axis.axhline(0, color="#444444", linewidth=0.8)
        axis.set(title=title if len(found) > 1 else "", xlabel="steps of RL")
    axes[0].set_ylabel("rl - sft, pass@1 (points)")
    note = f"validation; above the line RL is ahead; lines: tokens of pre-training; bars: {bars(r)}"
    return save(figure, path, note)


def draw(r, folder):
    """Writes every figure that the rows allow; -> their file names."""
    if not r.main or any(" lr=" in arm.recipe for arm in r.arms):  # a sweep is a table
        return []
    names = [draw_pass1(r, folder / "pass1.png"), draw_recipes(r, folder / "recipes.png")]
    panels = [("pass@1", "step"), ("flexible@1", "step"), ("formatted", "step")]
    sets = [(r.main, t) for t in r.tokens]
    note = f"scales differ; bars at the end: {bars(r)}"
    names.append(draw_curves(r, folder / "curves.png", trained(r), sets, panels, note))
    panels = [("pass@1", "step"), ("pass@1", "questions"), ("pass@1", "flops")]
    sets = [(asked, t) for asked in r.benchmarks for t in r.tokens]
    arms = [r.with_rollouts(5), r.with_rollouts(64)]
    sets = [(a, t) for a, t in sets if all(r.curve(arm, t, "pass@1", a) for arm in arms)]
    note = f"n: answers to each question of a step; {note}"
    names.append(draw_curves(r, folder / "rollouts.png", arms, sets, panels, note))
    names.append(draw_map(r, folder / "map.png"))
    return [name for name in names if name]
