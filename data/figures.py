"""Figures, from what data/report.py has read: each is drawn if its rows are there."""

import re
from itertools import cycle

import matplotlib
import numpy as np
from PIL import Image
from tqdm import tqdm

from data import report, tables
from data.report import Missing, tokens_name

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend first: there may be no display

plt.rcParams.update({"font.size": 12, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 10,
                     "xtick.labelsize": 10, "ytick.labelsize": 10})  # fmt: skip  # readable at half width

# Okabe and Ito's colours, and a marker each
STYLES = {"base": ("#000000", "o"), "rl": ("#0072B2", "s"), "sft": ("#E69F00", "^"), "sft->rl": ("#D55E00", "v"),
          "mix": ("#CC79A7", "D"), "sft-gold": ("#009E73", "P"), "sft-gold->rl": ("#56B4E9", "X"),
          "mix-text": ("#009E73", "*"), "rl->text": ("#56B4E9", "P"), "text": ("#777777", "X")}  # fmt: skip
WIDTH = 6.4  # inches; at half of it the smallest letters are of 5 points

# paper: GSM8K and the average of five general benchmarks, %; columns are billions of pre-training tokens
PAPER_TOKENS = (2, 4, 6, 10, 12, 14, 20, 28, 44)
PAPER = """pass@1 base 1.4 1.8 2.4 3.7 3.2 4.2 7.8 11.0 14.8; pass@1 rl 3.8 15.6 19.9 29.8 35.6 38.3 47.4 51.9 54.8
pass@1 sft - - 18.8 24.5 - - 31.6 35.5 37.8; pass@1 sft->rl - - - 40.7 - - 48.5 53.3 53.6
pass@1 mix - - 17.5 27.3 - - 36.2 43.3 47.9; pass@1 sft-gold 27.3 35.0 38.9 44.2 45.4 46.9 50.2 51.2 54.1
pass@1 sft-gold->rl 34.9 - 46.0 49.8 51.9 - 54.6 - 60.3; pass@8 base 6.1 10.1 14.4 19.3 18.1 22.8 31.3 37.5 46.0
pass@8 rl 10.7 25.3 34.2 49.1 53.0 57.5 63.9 69.4 72.0; pass@8 sft - - 40.4 47.5 - - 56.1 59.3 60.8
pass@8 sft->rl - - - 53.8 - - 59.6 65.8 64.8; pass@8 mix - - 42.5 54.2 - - 63.1 69.9 73.2
pass@8 sft-gold 52.8 60.8 65.3 69.3 70.8 72.4 74.9 76.7 78.7; pass@8 sft-gold->rl 48.1 - 59.3 61.4 63.4 - 66.3 - 70.0
pass@32 base 13.8 24.8 34.5 41.0 40.8 46.7 54.3 58.8 67.5; pass@32 rl 19.4 35.5 45.9 61.5 63.6 68.9 72.8 78.7 80.6
pass@32 sft - - 56.0 63.8 - - 70.2 71.8 73.8; pass@32 sft->rl - - - 60.7 - - 65.3 71.3 70.3
pass@32 mix - - 62.3 71.0 - - 77.5 83.1 84.5; pass@32 sft-gold 69.5 74.7 78.6 81.6 82.4 84.0 83.8 86.0 87.8
pass@32 sft-gold->rl 56.2 - 66.4 67.3 69.8 - 72.4 - 75.1; accuracy base - - 41.0 44.2 - - 47.1 48.1 50.3
accuracy rl - - 41.0 44.2 - - 47.4 48.3 50.8; accuracy sft - - 35.4 38.2 - - 41.6 42.4 43.5
accuracy mix - - 40.7 44.7 - - 47.3 48.6 49.7""".replace("\n", "; ").split("; ")



# ---- parts of a figure ----
def style(name):
    """Colour, marker and line of an arm: the recipe's, dashed and hollow for the base without shots."""
    colour, marker = STYLES.get(name.split()[0], ("#777777", "*"))
    bare, shots = "0-shot" in name, name.removeprefix("base ").removesuffix("-shot")
    label = name if not name.endswith("-shot") else "base, no shots" if bare else f"base, {shots} shot{'s' * (shots != '1')}"
    return {"color": colour, "marker": marker, "linestyle": "--" if bare else "-", "markersize": 5.5, "linewidth": 1.5,
            "label": label, "markerfacecolor": "white" if bare else colour}  # fmt: skip


def bars(e, level=0.95):
    """Mean and half of the interval, in %; two standard errors over questions where no pre-training run has two seeds."""
    return 100 * e.mean, 100 * (e.half(level) if e.df else 2 * e.se)


def plot_ours(axis, r, level, names, interval=0.95):
    """level(arm, tokens) -> Estimate or None. Lines are means, small points the pre-training runs."""
    for i, name in enumerate(names):  # bars a little apart
        found = [(t / 1e6 * 1.025 ** (i - 3), e) for t in r.tokens if (e := level(name, t))]
        if found:
            mean, half = np.array([bars(e, interval) for _, e in found]).T
            axis.errorbar([x for x, _ in found], mean, half, capsize=2.5, elinewidth=1, **style(name) | {"markersize": 4})
            runs = [(x, 100 * mean) for x, e in found for mean in e.runs.values() if len(e.runs) > 1]
            axis.plot(*zip(*runs, strict=True) if runs else ([], []), ".", color=style(name)["color"], markersize=4, alpha=0.7)
    axis.set_xscale("log")
    axis.set_xticks([t / 1e6 for t in r.tokens], [f"{t / 1e6:.2g}" for t in r.tokens])


def paper(metric):
    """-> {recipe: {billions of tokens: %}}."""
    series = [line.split() for line in PAPER if line.startswith(metric + " ")]
    return {recipe: {t: float(v) for t, v in zip(PAPER_TOKENS, values, strict=True) if v != "-"} for _, recipe, *values in series}


def plot_paper(axis, series):
    for name, points in series.items():
        axis.plot([*points], [*points.values()], **style(name))
    axis.set_xscale("log")
    axis.set_xticks([2, 4, 10, 20, 44], ["2", "4", "10", "20", "44"])


def plot_band(axis, x, points, band=True, **look):
    """A line through Estimates of shares, in %, and its interval over seeds as a band."""
    mean, half = np.array([bars(e) for e in points]).T
    axis.plot(x, mean, **look)
    if band and any(e.df for e in points):
        low, high = np.clip([mean - half, mean + half], 0, 100)
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


def plot_cross(axis, x, y, scale=100, **look):
    """One Estimate against another (times `scale`), both with their intervals."""
    axis.errorbar(scale * x.mean, 100 * y.mean, 100 * y.half(), scale * x.half(), capsize=2, elinewidth=0.9, **look)


def save(figure, path, columns=4):
    """Light grid, one legend for all panels under them; no version or date in the file."""
    handles = {}
    for axis in figure.axes:
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
                    if label not in handles}  # fmt: skip
    rows = -(-len(handles) // columns)
    bottom = (0.05 + 0.2 * rows) / figure.get_figheight()
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="lower center", ncol=min(columns, len(handles)),
                  frameon=False, columnspacing=1.0, handletextpad=0.5, handlelength=2.0)  # fmt: skip
    figure.tight_layout(rect=(0, bottom, 1, 1), h_pad=0.8, w_pad=0.6)
    figure.set_dpi(150)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture.quantize(64).save(path, optimize=True, dpi=(150, 150))  # a third of the bytes of full colour
    plt.close(figure)
    return path.name


# ---- figures ----
def draw_pass(r, folder, benchmark):
    """pass@1, 8, 32 against pre-training tokens, one line a recipe; the paper's GSM8K below the main benchmark."""
    bases = [n for n in r.names if n.startswith("base ") and n.endswith("-shot")]  # of many, those with none and with the most
    bases = sorted(bases, key=lambda name: int(name[5:-5]))
    own = [n for n in r.names if " " not in n and n not in (*STYLES, "base")]  # a user's own recipes
    names = [*dict.fromkeys(bases[:1] + bases[-1:]), *(n for n in r.names if n in report.RECIPES[1:]), *own]
    found = [t for t in r.tokens if any(r.rows("pass", name, t, benchmark) for name in names)]
    below = benchmark == r.main
    if len(found) < 2 and not below:
        return None
    figure, axes = plt.subplots(1 + below, 3, figsize=(WIDTH, 5.6 if below else 3.4), squeeze=False, sharey=True)
    for column, k in enumerate((1, 8, 32)):
        plot_ours(axes[0, column], r, lambda name, t, k=k: r.level(name, t, f"{benchmark} pass@{k}"), names)
        axes[0, column].set(title=f"pass@{k}, {'ours' if below else benchmark}", xlabel="tokens (M)")
        if below:
            plot_paper(axes[1, column], {name.replace("base", "base 8-shot"): v for name, v in paper(f"pass@{k}").items()})
            axes[1, column].set(title=f"pass@{k}, paper", xlabel="tokens (B)")
    axes[0, 0].set_ylim(-2, min(axes[0, 0].get_ylim()[1], 104))
    for row in axes:
        row[0].set_ylabel("questions solved (%)")
    return save(figure, folder / f"pass-{benchmark}.png")


def draw_general(r, folder):
    """What each recipe does to the base's general capability, ours beside the paper's."""
    def change(name, t):
        return r.gap("accuracy", *report.minus(name, "base", [t]))

    names = [name for name in report.RECIPES[1:] if any(change(name, t) for t in r.tokens)]
    if not names:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True)
    plot_ours(left, r, change, names, 0.9)  # as in the rule
    left.axhspan(-100 * report.MARGIN, 100 * report.MARGIN, color="#000000", alpha=0.06, linewidth=0, label="±2 points")
    left.set(title=f"ours, {len(r.general)} tasks", xlabel="tokens (M)", ylabel="accuracy - base (points)")
    levels = paper("accuracy")
    base = levels.pop("base")
    plot_paper(right, {name: {t: v - base[t] for t, v in points.items()} for name, points in levels.items()})
    right.set(title="paper, 5 benchmarks", xlabel="tokens (B)")
    for axis in (left, right):
        axis.axhline(0, color="#000000", linewidth=0.8)
    return save(figure, folder / "general.png")


def draw_dynamics(r, folder):
    """Along RL at the checkpoints that decide expansion, or else at the last one that has curves: direct and after SFT."""
    arms = {"rl": "direct RL", "sft->rl": "SFT, then RL"}  # arm -> its panel's title
    tokens = [t for t in r.tokens if any(r.curve(name, t, "pass@1") for name in arms)]
    try:
        tokens = [t for t in report.room(r, "base") if t in tokens] or tokens[-1:]
    except Missing:
        tokens = tokens[-1:]
    if not tokens:
        return None
    figure, axes = plt.subplots(len(tokens), 3, figsize=(WIDTH, 1.2 + 2.3 * len(tokens)), squeeze=False, sharey=True, sharex="col")
    ks = (1, 2, 4, 8, 16, 32)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.8, 0.0, len(ks)))
    for row, t in zip(axes, tokens, strict=True):
        for axis, (name, title) in zip(row[:2], arms.items(), strict=True):
            for k, colour, marker in zip(ks, colours, "ov^sDP", strict=True):
                if points := r.curve(name, t, f"pass@{k}"):
                    plot_band(axis, [*points], [*points.values()], band=k in (1, 32), color=colour, marker=marker, markersize=4,
                              label=f"pass@{k}")  # fmt: skip
            axis.set(title=f"{title}, {tokens_name(t)}", ylim=(-2, 102))
            for field, line, says in (("formatted", "-", "in format"), ("reward", ":", "training reward")):
                if points := r.curve(name, t, field):
                    colour, marker = STYLES[name]
                    plot_band(row[2], [*points], [*points.values()], color=colour, marker=marker, markersize=4, linestyle=line,
                              label=f"{says}, {name}")  # fmt: skip
        row[2].set_title(f"format, reward; {tokens_name(t)}")
        row[0].set_ylabel("% (validation)")
    for axis in axes[-1]:
        axis.set_xlabel("RL step")
    return save(figure, folder / "dynamics.png", columns=4)


def plot_steps(r, columns, path):
    """Validation pass@1 and pass@32 along training; columns [(title, tokens, benchmark, {arm: look})]."""
    drawn = [{name: look for name, look in arms.items() if r.curve(name, t, "pass@1", benchmark)} for _, t, benchmark, arms in columns]
    columns = [(title, t, benchmark, arms) for (title, t, benchmark, _), arms in zip(columns, drawn, strict=True) if arms]
    if not columns:
        return None
    figure, axes = plt.subplots(2, len(columns), figsize=(WIDTH, 5), squeeze=False, sharex=True, sharey="row")
    for k, row in zip((1, 32), axes, strict=True):
        for axis, (title, t, benchmark, arms) in zip(row, columns, strict=True):
            for i, (name, look) in enumerate(arms.items()):
                if points := r.curve(name, t, f"pass@{k}", benchmark):
                    plot_band(axis, [*points], [*points.values()], band=False, **look | {"markersize": 4})
                    step, (mean, half) = max(points), bars(points[max(points)])  # the interval of the end, beside it
                    axis.vlines(step * (1.05 + 0.04 * i), max(mean - half, 0), min(mean + half, 100), color=look["color"])
            axis.set_title(f"pass@{k}, {title}")
        row[0].set_ylabel("% (validation)")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    return save(figure, path)


def draw_budget(r, folder):
    """The one RL budget: validation along every recipe that contains RL, a column a checkpoint."""
    arms = {name: style(name) for name in ("rl", "sft->rl", "mix", "sft-gold->rl")}
    return plot_steps(r, [(tokens_name(t), t, r.main, arms) for t in r.tokens], folder / "budget.png")


def draw_budget_more(r, folder):
    """The same for hard questions, with more math and as the larger model, and for the shares of parallel averaging."""
    lines = {"": "-", f" {r.data}": "--", f" {r.size}": ":"}
    hard = {name + more: style(name) | {"linestyle": line, "label": name + more, "fillstyle": "none" if more else "full"}
            for name in ("rl", "sft->rl") for more, line in lines.items()}  # fmt: skip
    columns = [(f"hard, {tokens_name(t)}", t, "hard", hard) for t in r.tokens] if "hard" in r.benchmarks and r.main != "hard" else []
    for t in tables.mixed(r):
        names = ["rl", *tables.shares(r, t), "mix-text"]
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(names)))
        looks = {name: {"color": colour, "marker": marker, "label": {"mix": f"mix share={report.SHARE}"}.get(name, name)}
                 for name, colour, marker in zip(names, colours, cycle("so^vDPX*<>"))}  # noqa: B905
        columns.append((f"shares, {tokens_name(t)}", t, r.main, looks | {"rl": style("rl"), "mix-text": style("mix-text")}))
    return plot_steps(r, columns, folder / "budget-more.png")


def draw_rollouts(r, folder):
    """Validation along RL with 5 and with 64 answers a question, against questions and FLOPs, a row a split."""
    names = {"rl n=5": ("#0072B2", "o"), "rl n=64": ("#D55E00", "s")}
    cells = [(b, t) for b in report.splits(r) for t in r.tokens if all(r.curve(name, t, "pass@1", b) for name in names)]
    if not cells:
        return None
    figure, axes = plt.subplots(len(cells), 2, figsize=(WIDTH, 0.9 + 2.3 * len(cells)), squeeze=False, sharey="row")
    for row, (benchmark, t) in zip(axes, cells, strict=True):
        for name, (colour, marker) in names.items():
            look = {"color": colour, "marker": marker, "markersize": 4, "label": name[3:]}
            for axis, cost, scale in zip(row, ("questions", "flops"), (1, 1e12), strict=True):
                x, points = tables.along(r, name, t, benchmark, cost)
                first = axis is row[0]  # no question on a log axis; both arms start at the same base
                plot_band(axis, np.array(x[first:]) / scale, points[first:], **look)
        ticks = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]
        row[0].set(xscale="log", title=f"{benchmark}, {tokens_name(t)}", xlabel="questions seen")
        low, high = row[0].get_xlim()
        row[0].set_xticks([tick for tick in ticks if low <= tick <= high], [f"{tick:,}" for tick in ticks if low <= tick <= high])
        row[1].set(title=f"{benchmark}, {tokens_name(t)}", xlabel="FLOPs (1e12)")
        row[0].set_ylabel("validation pass@1 (%)")
    return save(figure, folder / "rollouts.png")


def draw_seeds(r, folder):
    """Where 8 or more seeds of `rl` end, by their training reward: a row for the early and for the late checkpoint."""
    try:
        found = tables.ends(r)
    except Missing:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.2), sharex="row")
    runs = sorted({run for at in found.values() for run, _ in at})
    for row, (t, at) in zip(axes, found.items(), strict=True):
        for axis, (column, k) in zip(row, ((1, 1), (2, 32)), strict=True):
            for run, (colour, marker) in zip(runs, cycle([*STYLES.values()][1:7])):  # noqa: B905  only six are told apart
                points = 100 * np.array([values for unit, values in at.items() if unit[0] == run])
                axis.plot(points[:, 0], points[:, column], marker, color=colour, markersize=5.5, linestyle="", fillstyle="none",
                          label=f"run {run}")  # fmt: skip
                for value, line, label in ((points[:, column].mean(), "-", "mean"),
                                           (report.best_of_4(points[:, column], points[:, 1]), ":", "best of 4")):  # fmt: skip
                    span = [points[:, 0].min() - 1, points[:, 0].max() + 1]
                    axis.plot(span, [value] * 2, color=colour, linewidth=1.2, linestyle=line, label=f"run {run}, {label}")
            axis.set(title=f"test pass@{k} (%), {tokens_name(t)}")
    for axis in axes[-1]:
        axis.set_xlabel("training reward at the end (%)")
    return save(figure, folder / "seeds.png")


def draw_data_size(r, folder):
    """Hard questions, last checkpoint: the main model, the one on a text with more math, the larger one."""
    names = ["", f" {r.data}", f" {r.size}"]
    tokens = [t for t in r.tokens if all(r.level(f"rl{more}", t, "hard pass@1") for more in names)]
    if "hard" not in r.benchmarks or not tokens:
        return None
    recipes = [n for n in ("base", "rl", "sft", "sft->rl") if r.level(n, tokens[-1], "hard pass@1")]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for axis, k in zip(axes, (1, 32), strict=True):
        for i, recipe in enumerate(recipes):
            levels = [r.level(recipe + more, tokens[-1], f"hard pass@{k}") for more in names]
            points = [(x + 0.1 * (i - (len(recipes) - 1) / 2), *bars(e)) for x, e in enumerate(levels) if e]
            x, mean, half = zip(*points, strict=True)
            axis.errorbar(x, mean, half, capsize=2, elinewidth=0.9, **style(recipe) | {"linestyle": "", "markersize": 7})
        axis.set_xticks(range(3), ["main\nmodel", "more\nmath", "larger\nmodel"])
        axis.set(title=f"hard pass@{k} (%), {tokens_name(tokens[-1])}", xlim=(-0.5, 2.5), ylim=(0, min(axis.get_ylim()[1], 100)))
    return save(figure, folder / "data-size.png")


def draw_shares(r, folder):
    """Parallel averaging on the plane of pass@1 and pass@32: its share of RL, and a schedule. A point lies where its paired
    difference to a share of 0.5 puts it, with the bars of that difference."""
    tokens = [t for t in tables.mixed(r) if r.rows("pass", "mix", t, r.main)]
    if not tokens:
        return None
    figure, axes = plt.subplots(1, len(tokens), figsize=(WIDTH if len(tokens) > 1 else 4.8, 4.2), squeeze=False)
    for axis, t in zip(axes[0], tokens, strict=True):
        middle, points = [r.level("mix", t, f"pass@{k}") for k in (1, 32)], {}
        for name in ("rl", "sft", "sft->rl", *tables.shares(r, t)):
            gaps = [r.gap(f"pass@{k}", *report.minus(name, "mix", [t])) for k in (1, 32)]
            if all(gaps):
                points[name] = [gap._replace(mean=e.mean + gap.mean) for gap, e in zip(gaps, middle, strict=True)]
        constant = [ends for name, ends in points.items() if name.startswith("mix") and "-" not in name]
        axis.plot(*([100 * ends[i].mean for ends in constant] for i in (0, 1)), color=STYLES["mix"][0], linewidth=1)
        for name, ends in points.items():
            share = name.partition("share=")[2] or str(report.SHARE)
            mark = {"label": "mix, a schedule", "markerfacecolor": "white"} if "-" in share else {"label": name.split()[0]}
            plot_cross(axis, *ends, **style(name) | mark | {"linestyle": ""})
            if name.startswith("mix"):  # names on three sides in turn: good shares lie close together
                right, up = [(-1, 1), (1, 1), (1, -1)][constant.index(ends) % 3] if ends in constant else (1, -1)
                axis.annotate(share.replace("-", " to "), [100 * e.mean for e in ends], (5 * right, 5 * up), textcoords="offset points",
                              fontsize=9, ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")  # fmt: skip
        axis.set(title=f"share of RL, {tokens_name(t)}", xlabel="pass@1 (%)", ylabel="pass@32 (%)")
    return save(figure, folder / "shares.png", columns=3)


def draw_text(r, folder):
    """What pass@1 gains over the base and what the text loss pays for it, with text as the second stream and without."""
    found = {}
    for t in (t for t in r.tokens if r.rows("pass", "mix-text", t, r.main)):
        for name in ("rl", "sft", "mix", "mix-text"):
            loss, gain = (r.gap(metric, *report.minus(name, "base", [t])) for metric in ("loss", "pass@1"))
            if loss and gain:
                found.setdefault(t, {})[name] = loss, gain
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(WIDTH if len(found) > 1 else 4.8, 3.8), squeeze=False)
    for axis, (t, points) in zip(axes[0], found.items(), strict=True):
        for name, (loss, gain) in points.items():
            plot_cross(axis, loss, gain, scale=1, **style(name) | {"linestyle": "", "markersize": 7})
        axis.axvline(0, color="#000000", linewidth=0.8)
        axis.set(title=f"against the base, {tokens_name(t)}", xlabel="text loss - base (nats a token)", ylabel="pass@1 - base (points)")
    return save(figure, folder / "text.png")


def draw_gone_on(r, folder):
    """Pre-training that goes on from RL weights, beside a control from the base's. Bars are those of the paired differences
    to the base."""
    cells = tables.gone_on(r)
    if not cells:
        return None
    figure, axes = plt.subplots(len(cells), 3, figsize=(WIDTH, 1.0 + 2.5 * len(cells)), squeeze=False)
    for row, (t, u, v) in zip(axes, cells, strict=True):
        paths = {"base": [("base", t), ("base", v)], "rl": [("rl", t)], "text": [("base", t), ("text", u)],
                 "rl->text": [("rl", t), ("rl->text", u)]}  # fmt: skip
        for axis, metric in zip(row, ("pass@1", "pass@32", "loss"), strict=True):
            for (name, path), aside in zip(paths.items(), (0, 0, -0.04, 0.04), strict=True):
                scale, levels = (1 if metric == "loss" else 100), []
                for (arm, measured), at in zip(path, (t, v)[: len(path)], strict=True):
                    arm, base = tables.bare(arm, metric), tables.bare("base", metric)
                    e, gap = r.level(arm, measured, metric), r.gap(metric, (1, arm, measured), (-1, base, at))
                    levels.append(gap if metric == "loss" else e and e._replace(se=gap.se if gap else 0, df=gap.df if gap else 0))
                if all(levels):
                    axis.plot(range(len(path)), [scale * e.mean for e in levels], color=STYLES[name][0], linewidth=1.5)
                    own = [(x, e) for x, (e, arm) in enumerate(zip(levels, path, strict=True)) if arm[0] == name]
                    axis.errorbar([x + aside for x, _ in own], [scale * e.mean for _, e in own], [scale * e.half() for _, e in own],
                                  capsize=2, elinewidth=0.9, **style(name) | {"linestyle": ""})  # fmt: skip
            axis.set_xticks([0, 1], [tokens_name(t), tokens_name(u)])
            axis.set(title="text loss - base" if metric == "loss" else f"{metric} (%)", xlim=(-0.25, 1.25), xlabel="tokens")
    return save(figure, folder / "gone-on.png")


def draw_many(r, folder):
    """pass@k against k, as far as there are answers: a column a checkpoint."""
    names = [name for name in r.names if tables.with_shots(name)]
    figure, axes = plt.subplots(1, len(r.tokens), figsize=(WIDTH, 3.6), squeeze=False, sharey=True)
    for axis, t in zip(axes[0], r.tokens, strict=True):
        for name in names:
            if found := r.rows("pass", name, t, r.main):
                ks = [2**i for i in range(min(row["n"] for row in found.values()).bit_length())]
                axis.plot(ks, [100 * r.level(name, t, f"pass@{k}").mean for k in ks], **style(name) | {"markersize": 4})
        axis.set(xscale="log", title=tokens_name(t), xlabel="k")
        axis.set_xticks([1, 4, 16, 64, 256], [1, 4, 16, 64, 256])
    axes[0, 0].set_ylabel("validation pass@k (%)")
    return save(figure, folder / "pass-k.png")


def draw_questions(r, folder):
    """pass@1 and pass@32 against the number of questions that an arm trains on, a row a checkpoint that has several."""
    found = {}  # tokens -> {(questions, or inf for all of them; arm): its name}
    for t in r.tokens:
        there = [name for name in r.names if r.rows("pass", name, t, r.main)]
        named = [re.fullmatch(r"(rl|sft|mix)(?:-(\d+)-questions(-5-epochs)?)?", name) for name in there]
        arms = {(float(few[2] or "inf"), few[1] + (few[3] or "")): few[0] for few in named if few}
        if any(arm == "sft-5-epochs" for _, arm in arms):  # all of the questions are seen five times
            arms[float("inf"), "sft-5-epochs"] = "sft"
        if len({few for few, _ in arms}) > 1:
            found[t] = arms
    if not found:
        return None
    figure, axes = plt.subplots(len(found), 2, figsize=(WIDTH, 0.8 + 2.6 * len(found)), squeeze=False)
    for row, (t, names) in zip(axes, found.items(), strict=True):
        counts = sorted({few for few, _ in names})
        for axis, k in zip(row, (1, 32), strict=True):
            for i, arm in enumerate(dict.fromkeys(arm for _, arm in names)):
                points = [(x, r.level(names[few, arm], t, f"pass@{k}")) for x, few in enumerate(counts) if (few, arm) in names]
                mean, half = np.array([bars(e) for _, e in points]).T
                at = np.array([x for x, _ in points])
                look = style(arm.partition("-")[0])
                if arm == "sft-5-epochs":
                    look |= {"label": "sft, 5 epochs", "linestyle": "--", "markerfacecolor": "white"}
                axis.errorbar(at + 0.06 * (i - 1.5), mean, half, capsize=2.5, elinewidth=1, **look)
            axis.set_xticks(range(len(counts)), ["all" if few == float("inf") else f"{few:.0f}" for few in counts])
            axis.set(title=f"validation pass@{k} (%), {tokens_name(t)}", ylim=(0, 100))
    for axis in axes[-1]:
        axis.set_xlabel("training questions")
    return save(figure, folder / "questions.png")


def draw(r, folder):
    """Writes every figure the rows allow; -> their file names."""
    figures = [draw_dynamics, draw_budget, draw_budget_more, draw_general, draw_rollouts, draw_seeds, draw_data_size, draw_shares]
    figures += [draw_text, draw_gone_on]
    names = [draw_pass(r, folder, benchmark) for benchmark in r.benchmarks]
    names += [figure(r, folder) for figure in tqdm(figures, desc=f"{folder.name}: figures", delay=5, leave=False)]
    return [name for name in names if name]
