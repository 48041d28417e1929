"""Tables and figures of report.md, from what data/report.py has read and decided."""

import re

import matplotlib
import numpy as np
from PIL import Image

from data import report

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend first: there may be no display

STYLES = {"base": ("#000000", "o"), "rl": ("#0072B2", "s"), "sft": ("#E69F00", "^"), "sft->rl": ("#D55E00", "v"),
          "mix": ("#CC79A7", "D"), "sft-gold": ("#009E73", "P"), "sft-gold->rl": ("#56B4E9", "X")}  # fmt: skip
PARENT = {"rl": "base", "sft": "base", "sft->rl": "sft", "mix": "base", "sft-gold": "base", "sft-gold->rl": "sft-gold"}
DETAILS = {"formatted": "in format %", "cut": "cut %", "answers": "different answers a question", "probability":
           "probability of the right choice %", "log_prob": "log-prob a token (nats)",
           "flexible@1": "right in any format %", "questions": "questions seen", "sampled_tokens": "tokens sampled",
           "flops": "training FLOPs", "seconds": "training seconds"}  # fmt: skip  # a row's field -> its column

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


# ---- figures ----
def style(name):
    """Colour, marker and line of an arm: the recipe's, dashed for the base without shots."""
    colour, marker = STYLES.get(name.split()[0], ("#777777", "*"))
    return {"color": colour, "marker": marker, "linestyle": "--" if "0-shot" in name else "-", "markersize": 5.5,
            "linewidth": 1.5, "label": name, "markerfacecolor": "white" if "0-shot" in name else colour}  # fmt: skip


def plot_ours(axis, r, metric, names):
    for i, name in enumerate(names):  # bars a little apart
        levels = {t: r.level(name, t, metric) for t in r.tokens}
        points = [(t / 1e6 * 1.015 ** (i - 3), 100 * e.mean, 100 * e.half()) for t, e in levels.items() if e]
        if points:
            x, mean, half = zip(*points, strict=True)
            axis.errorbar(x, mean, half, capsize=2, elinewidth=0.9, **style(name))
    axis.set_xscale("log")
    axis.set_xticks([t / 1e6 for t in r.tokens], [f"{t / 1e6:.2g}" for t in r.tokens])


def plot_paper(axis, metric, base):
    for series in PAPER:
        name, recipe, *values = series.split()
        points = [(t, float(v)) for t, v in zip(PAPER_TOKENS, values, strict=True) if v != "-"]
        if name == metric:
            axis.plot(*zip(*points, strict=True), **style(recipe.replace("base", base)))
    axis.set_xscale("log")
    axis.set_xticks([2, 4, 10, 20, 44], ["2", "4", "10", "20", "44"])


def save(figure, path, handles):
    """One legend for all panels, under them; no version or date in the file."""
    columns = 4 if len(handles) > 3 else len(handles)
    rows = -(-len(handles) // columns)
    bottom = (0.05 + 0.2 * rows) / figure.get_figheight()
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="lower center", ncol=columns, frameon=False,
                  columnspacing=1.2, handlelength=2.2)  # fmt: skip
    figure.tight_layout(rect=(0, bottom, 1, 1), h_pad=0.8, w_pad=0.6)
    figure.set_dpi(150)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture.quantize(64).save(path, optimize=True, dpi=(150, 150))  # a third of the bytes of full colour
    plt.close(figure)
    return path.name


def finish(axes):
    """Labels' minor ticks off, light grid; -> the legend's entries of all panels."""
    handles = {}
    for axis in axes:
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
                    if label not in handles}  # fmt: skip
    return handles


def draw_pass(r, folder, benchmark):
    """pass@1, 8, 32 against pre-training tokens, one line a recipe; the paper's GSM8K below the main benchmark."""
    names = [n for n in r.names if n in [*STYLES][1:] or (n.startswith("base ") and n.endswith("-shot"))]
    below = benchmark == r.benchmarks[0]
    figure, axes = plt.subplots(1 + below, 3, figsize=(7.2, 5.4 if below else 3.2), squeeze=False)
    for column, k in enumerate((1, 8, 32)):
        plot_ours(axes[0, column], r, f"{benchmark} pass@{k}", names)
        axes[0, column].set(title=f"pass@{k}, {benchmark}", xlabel="tokens (M)")
        if below:
            plot_paper(axes[1, column], f"pass@{k}", "base 8-shot")
            axes[1, column].set(title=f"pass@{k}, paper", xlabel="tokens (B)")
    for row in axes:
        row[0].set_ylabel("%")
    return save(figure, folder / f"pass-{benchmark}.png", finish(axes.flat))


def draw_general(r, folder):
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6))
    plot_ours(left, r, "accuracy", STYLES)
    left.set(title=f"accuracy, {' + '.join(r.general)}", xlabel="tokens (M)", ylabel="%")
    plot_paper(right, "accuracy", "base")
    right.set(title="paper, 5 benchmarks", xlabel="tokens (B)")
    return save(figure, folder / "general.png", finish((left, right)))


def curve(r, name, tokens):
    """-> {key: {step: mean over seeds}} of the validation points along the runs of an arm."""
    found = {}
    for key, runs in r.index.items():
        if key[:3] == ("curve", name, tokens):
            for point in (point for row in runs.values() for point in row["points"]):
                for field, value in point.items():
                    found.setdefault(field, {}).setdefault(point["step"], []).append(value)
    return {field: {step: float(np.mean(values)) for step, values in sorted(steps.items())}
            for field, steps in found.items() if field != "step"}  # fmt: skip


def draw_dynamics(r, folder):
    """Along RL: from SFT, and direct, at the middle checkpoint (the last one that has curves if there is no middle)."""
    tokens = [t for t in r.tokens if curve(r, "rl", t)] or [t for t in r.tokens if curve(r, "sft->rl", t)]
    try:
        tokens = [t for t in r.checkpoints("pass@1", "base", low=0.3) if t in tokens][:1] or tokens
    except report.Missing:
        pass
    if not tokens:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 4.0), sharey=True)
    for axis, name in zip(axes, ("sft->rl", "rl"), strict=True):
        points = curve(r, name, tokens[-1])
        ks = sorted(int(field[5:]) for field in points if field.startswith("pass@"))
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(ks)))
        for k, colour, marker in zip(ks, colours, "ov^sDPX*"[: len(ks)], strict=True):
            steps = points[f"pass@{k}"]
            axis.plot([*steps], [100 * v for v in steps.values()], color=colour, marker=marker, markersize=5,
                      label=f"pass@{k}")  # fmt: skip
        if "formatted" in points:
            axis.plot([*points["formatted"]], [100 * v for v in points["formatted"].values()], color="#D55E00",
                      linestyle="--", label="in format")  # fmt: skip
        title = f"{'SFT, then' if name == 'sft->rl' else 'direct'} RL at {report.tokens_name(tokens[-1])}"
        axis.set(title=title if points else f"{title}: no rows", xlabel="RL step")
    axes[0].set_ylabel("validation %")
    return save(figure, folder / "dynamics.png", finish(axes))


def draw(r, folder):
    """Writes every figure the rows allow; -> their file names."""
    with plt.rc_context({"font.size": 12, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 11,
                         "xtick.labelsize": 10, "ytick.labelsize": 10}):  # fmt: skip  # readable at half width
        names = [draw_pass(r, folder, benchmark) for benchmark in r.benchmarks]
        names += [draw_dynamics(r, folder)] + ([draw_general(r, folder)] if r.general else [])
    return [name for name in names if name]


# ---- tables ----
def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def outcome(finding, verdict):
    """This run's figures for one finding, in points."""
    e = verdict.estimate
    if not e:
        return ""
    if e.df:
        half = e.half(0.9 if finding.kind == "equivalence" else 0.95)
        text = f"{100 * e.mean:+.1f} [{100 * (e.mean - half):+.1f}, {100 * (e.mean + half):+.1f}], p {verdict.p:.2g} "
        text += f"(Holm {verdict.holm:.2g}), {e.seeds} seeds{f' x {e.questions} questions' * (e.questions > 1)}"
    else:
        text = f"{100 * e.mean:+.1f} ±{100 * e.se:.1f} (one SE over questions)"
    runs = ", ".join(f"{run}: {100 * mean:+.1f}" for run, mean in e.runs.items())
    return f"{text}; {verdict.text}" + (f"; by pre-training seed {runs}" if len(e.runs) > 1 else "")


def lines(verdicts):
    """The findings for the console."""
    return [f"{number}  {v.verdict}{f' ({v.reason})' if v.reason else ''}: {f.claim}  {outcome(f, v)}"
            for (number, v), f in zip(verdicts.items(), report.FINDINGS, strict=True)]  # fmt: skip


def secondary(r, finding):
    """Rows of secondary differences, one column a checkpoint."""
    rows = []
    for metric, first, second in finding.secondary:
        row = [f"{metric}: {first} - {second}"]
        for t in r.tokens:
            try:
                e = report.estimate(r.contrast(metric, report.minus(first, second, [t]))[1])
                row.append(f"{100 * e.mean:+.1f} ±{100 * e.half():.1f}")
            except report.Missing:
                row.append("-")
        rows += [row] if set(row[1:]) != {"-"} else []
    return rows


def details(r, name, tokens, benchmark):
    """Format, diversity, cost, and the questions newly solved and lost against the parent, means over seeds."""
    rows, general = [*r.rows("pass", name, tokens, benchmark).values()], re.sub(r" \d+-shot", "", name)
    rows += [row for task in r.general for row in r.rows("general", general, tokens, task).values()]
    cells = []
    for field, column in DETAILS.items():
        values = [row[field] for row in rows if row.get(field) is not None]
        mean = np.mean(values) * (100 if "%" in column else 1) if values else 0
        cells.append("-" if not values else f"{mean:.3g}" if mean >= 1000 else f"{mean:.{1 if abs(mean) >= 1 else 2}f}")
    try:
        metric, parent = f"{benchmark} solved", PARENT.get(name.split()[0], name)
        arms = [(sign, r.arm(arm, tokens, metric)) for sign, arm in ((1, name), (-1, parent))]
        change = np.concatenate([[*cell.values()] for cell in report.combine(arms).values()])
        solved = [f"{100 * np.maximum(sign * change, 0).mean():.1f}" for sign in (1, -1)]
    except report.Missing:
        solved = ["-", "-"]
    return cells + (solved if name.split()[0] in PARENT else ["-", "-"])


def page(r, verdicts, torn, pictures):
    """The text of report.md."""
    checkpoints = [report.tokens_name(t) for t in r.tokens]
    parts = [f"# Report\n\nWorld {r.world}, model {r.model}, {r.split} questions; shares in %, differences in points. "
             "±: half of the 95% interval over seeds and questions, or one standard error with one seed.\n"]
    findings = [[number, finding.claim, f"{finding.rule} ({finding.kind})", outcome(finding, v), finding.paper,
                 f"**{v.verdict}**{f' ({v.reason})' if v.reason else ''}"]
                for (number, v), finding in zip(verdicts.items(), report.FINDINGS, strict=True)]  # fmt: skip
    parts += ["## Findings\n", table(["", "finding", "primary contrast", "this run", "paper", "verdict"], findings)]
    parts += [report.RULES + "\n"] + [f"![{name}]({name})\n" for name in pictures]
    rows = [[n, *row] for n, finding in zip(verdicts, report.FINDINGS, strict=True) for row in secondary(r, finding)]
    parts += ["## Secondary differences\n", table(["", "difference", *checkpoints], rows)] if rows else []
    for metric in [f"{b} pass@{k}" for b in r.benchmarks for k in (1, 8, 32)] + ["accuracy"] * bool(r.general):
        names = [name for name in r.names if name != "base" or metric == "accuracy"]  # "base" is 0-shot or 8-shot
        rows = [[name] + [str(r.level(name, t, metric) or "-") for t in r.tokens] for name in names]
        rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
        title = f"accuracy, mean of {', '.join(r.general)}" if metric == "accuracy" else metric
        parts += [f"## {title}\n", table(["", *checkpoints], rows)] if rows else []
    header = ["", "tokens", *DETAILS.values(), "newly solved against the parent %", "lost %"]
    for benchmark in r.benchmarks:
        rows = [[name, report.tokens_name(t), *details(r, name, t, benchmark)] for name in r.names for t in r.tokens
                if r.rows("pass", name, t, benchmark)]  # fmt: skip
        columns = [column for column in zip(header, *rows, strict=True) if set(column[1:]) != {"-"}]
        first, *rest = zip(*columns, strict=True)
        parts += [f"## Answers, {benchmark}\n", table(first, rest)] if rest else []
    found = {(n.split()[0], t) for n in r.names for t in r.tokens for b in r.benchmarks if r.rows("pass", n, t, b)}
    absent = [f"no rows for {name} at {report.tokens_name(t)}" for t in r.tokens for name in STYLES
              if (name, t) not in found]  # fmt: skip
    parts += ["## Missing\n", "\n".join(f"- {line}" for line in [*absent, *torn]) or "Nothing."]
    return "\n".join(parts) + "\n"
