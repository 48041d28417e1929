"""Figures of the report, each drawn if its rows are there."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image

from results.findings import BASE, RL, SFT, SFT_RL
from results.rows import RECIPES, Arm, tokens_name

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend first: there may be no display

plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "legend.fontsize": 9.5})
UNKNOWN = ("#0000CC", "#AA4499", "#44AA99", "#661100", "#117733", "#DDAA33")
MARKERS = "osv^DPX*<>hp"
PAPER = pd.read_csv(Path(__file__).with_name("paper.csv")).set_index(["metric", "recipe"])


def style(r, arm):
    """Colour, marker and label; those of an arm that RECIPES does not have follow its place."""
    usual = arm.recipe in RECIPES and arm == Arm(arm.recipe, arm.shots)
    place = [*RECIPES].index(arm.recipe) if usual else r.arms.index(arm)
    colour = RECIPES[arm.recipe] if usual else UNKNOWN[place % len(UNKNOWN)]
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)], "ms": 5, "label": str(arm)}


def plot(axis, x, found, **look):
    """A line through Estimates, in %, with their 95% intervals; two standard errors over
    questions where no pre-training run has two seeds."""
    points = [(at, e) for at, e in zip(x, found, strict=True) if e]
    half = [100 * (e.half() if e.df else 2 * e.se) for _, e in points]
    mean = [100 * e.mean for _, e in points]
    axis.errorbar([at for at, _ in points], mean, half, capsize=2, elinewidth=0.8, **look)


def trained(r):
    """Arms of the main world and model with rows at half of the checkpoints or more."""
    arms = [arm for arm in r.arms if arm == Arm(arm.recipe) and arm.recipe != "base"]
    rows = {arm: sum(r.level(arm, t, "pass@1") is not None for t in r.tokens) for arm in arms}
    return [arm for arm in arms if 2 * rows[arm] >= len(r.tokens)][: len(MARKERS)]


def save(figure, path):
    """One legend for all panels, under them; no version or date in the file."""
    handles = {}
    for axis in figure.axes:
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    bottom = (0.05 + 0.2 * -(-len(handles) // 5)) / figure.get_figheight()
    figure.legend(handles.values(), handles, loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.set_dpi(150)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture.quantize(64).save(path, optimize=True, dpi=(150, 150))  # a third of full colour
    plt.close(figure)
    return path.name


def draw_pass1(r, path):
    """pass@1 against pre-training tokens, ours on the left and the paper's on the right."""
    own = [arm for arm in r.arms if arm == Arm(arm.recipe) and arm.recipe not in RECIPES]
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    theirs = PAPER.loc["pass@1"]
    billions = theirs.columns.astype(float)

    def place(tokens, low, high, start, width):  # on a log scale
        return start + width * np.log(np.array(tokens) / low) / max(np.log(high / low), 1e-9)

    ours = place(r.tokens, r.tokens[0], r.tokens[-1], 0, 1)
    right = place(billions, billions[0], billions[-1], 1.35, 1.25)
    for arm in (BASE, SFT, RL, SFT_RL, *own[:4]):
        look = style(r, arm)
        plot(axis, ours, [r.level(arm, t, "pass@1") for t in r.tokens], **look)
        if arm.recipe in theirs.index:
            known = theirs.loc[arm.recipe].notna()
            axis.plot(right[known], theirs.loc[arm.recipe][known], **look)
    few = [0, 1, 3, 6, 8]
    names = [*map(tokens_name, r.tokens), *(f"{t:g}B" for t in billions[few])]
    axis.set_xticks([*ours, *right[few]], names)
    axis.axvspan(1.175, 2.75, color="#000000", alpha=0.05, linewidth=0)
    axis.set(xlim=(-0.15, 2.75), ylim=(0, max(60, axis.get_ylim()[1])))
    axis.set(xlabel="pre-training tokens (log scale)", ylabel="pass@1: right answers (%)")
    look = {"ha": "center", "va": "bottom", "transform": axis.get_xaxis_transform()}
    axis.text(0.5, 1.01, f"this repository\n(model {r.model}, world {r.world})", **look)
    axis.text(1.96, 1.01, "the paper\n(1B parameters, GSM8K)", **look)
    return save(figure, path)


def draw_recipes(r, path):
    """pass@k and general capability of every recipe, the paper's below."""
    figure, axes = plt.subplots(2, 4, figsize=(9.6, 5.8), sharey=True)
    for (above, below), metric in zip(axes.T, PAPER.index.unique(0), strict=True):
        for i, arm in enumerate([BASE, *trained(r)]):
            x = [t * 1.02 ** (i - 3) for t in r.tokens]
            plot(above, x, [r.level(arm, t, metric) for t in r.tokens], **style(r, arm))
        for recipe, values in PAPER.loc[metric].iterrows():
            known = values.dropna()
            arm = BASE if recipe == "base" else Arm(recipe)
            below.plot(known.index.astype(float), known, **style(r, arm))
        title = metric.replace("accuracy", "general")
        above.set(title=f"{title}, ours", xscale="log", xlabel="tokens")
        above.set_xticks(r.tokens, map(tokens_name, r.tokens))
        below.set(title=f"{title}, paper", xscale="log", xlabel="tokens (B)")
        below.set_xticks([2, 4, 10, 20, 44], [2, 4, 10, 20, 44])
    return save(figure, path)


def draw_curves(r, path, arms, sets, panels):
    """Validation along training: a row per (question set, checkpoint), panels (field, against)."""
    found = {
        (a, t): [arm for arm in arms if len(r.curve(arm, t, "pass@1", a)) > 2] for a, t in sets
    }
    found = {place: there for place, there in found.items() if there}
    if not found:
        return None
    size = (3.2 * len(panels), 0.9 + 2.2 * len(found))
    figure, axes = plt.subplots(len(found), len(panels), figsize=size, squeeze=False, sharey=True)
    for row, ((asked, t), there) in zip(axes, found.items(), strict=True):
        for axis, (field, against) in zip(row, panels, strict=True):
            for i, arm in enumerate(there):
                points = r.curve(arm, t, field, asked)
                x = {step: step for step in points}
                if against != "step":
                    x = {step: e.mean for step, e in r.curve(arm, t, against, asked).items()}
                if not points:  # not validated in this way
                    continue
                look = style(r, arm)
                axis.plot([x[s] for s in points], [100 * e.mean for e in points.values()], **look)
                last = max(points)  # the interval of the end, a little beside it
                plot(axis, [x[last] * (1.02 + 0.02 * i)], [points[last]], color=look["color"])
            axis.set(title=f"{asked}, {tokens_name(t)}: {field}", xlabel=against, ylim=(0, 103))
        row[0].set_ylabel("validation (%)")
    return save(figure, path)


def draw_questions(r, path):
    """pass@1 and pass@32 by the number of training questions: recipes like "rl-50-questions"."""
    found = {}  # (recipe without the number, number) -> arm
    for arm in (arm for arm in r.arms if arm == Arm(arm.recipe)):
        recipe, number, *more = [*arm.recipe.split("-"), "all"][:2] + arm.recipe.split("-")[2:]
        if more[:1] == ["questions"] or number == "all":
            found["-".join([recipe, *more[1:]]), number] = arm
    counts = sorted({count for _, count in found} - {"all"}, key=int) + ["all"]
    names = [name for name, count in found if count == counts[0] != "all"]
    if not names:
        return None
    figure, axes = plt.subplots(len(r.tokens), 2, figsize=(6.4, 0.9 + 2.4 * len(r.tokens)))
    for row, t in zip(np.atleast_2d(axes), r.tokens, strict=True):
        for axis, k in zip(row, (1, 32), strict=True):
            for i, name in enumerate(names):
                arms = [found.get((name, count)) for count in counts]
                levels = [arm and r.level(arm, t, f"pass@{k}") for arm in arms]
                look = style(r, Arm(name.split("-")[0])) | {"label": name}
                look |= {"ls": "--", "mfc": "white"} if "-" in name else {}
                plot(axis, np.arange(len(counts)) + 0.06 * (i - 1.5), levels, **look)
            axis.set_xticks(range(len(counts)), counts)
            axis.set(
                title=f"pass@{k}, {tokens_name(t)}", xlabel="training questions", ylim=(0, 100)
            )
    return save(figure, path)


def draw(r, folder):
    """Writes every figure that the rows allow; -> their file names."""
    if not r.main or any(" lr=" in arm.recipe for arm in r.arms):  # a sweep is a table
        return []
    names = [draw_pass1(r, folder / "pass1.png"), draw_recipes(r, folder / "recipes.png")]
    panels = [("pass@1", "step"), ("pass@32", "step"), ("formatted", "step")]
    sets = [(r.main, t) for t in r.tokens]
    names.append(draw_curves(r, folder / "curves.png", trained(r), sets, panels))
    panels = [("pass@1", "step"), ("pass@1", "questions"), ("pass@1", "flops")]
    sets = [(asked, t) for asked in r.benchmarks for t in r.tokens]
    arms = [r.with_rollouts(5), r.with_rollouts(64)]
    sets = [(a, t) for a, t in sets if all(r.curve(arm, t, "pass@1", a) for arm in arms)]
    names.append(draw_curves(r, folder / "rollouts.png", arms, sets, panels))
    names.append(draw_questions(r, folder / "questions.png"))
    return [name for name in names if name]
