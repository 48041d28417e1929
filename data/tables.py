"""Tables of report.md and of the marked blocks, from what data/report.py has read and decided."""

import os
import re

import numpy as np

from data import report
from data.report import Missing, tokens_name

BLOCKS = ("findings", "findings-short", "rules", "pooled", "room", "levels", "secondary", "sweep", "sweep-again", "costs", "beyond",
          "seeds", "rollouts", "why", "many")  # fmt: skip
PARENT = {"rl": "base", "sft": "base", "sft->rl": "sft", "mix": "base", "sft-gold": "base", "sft-gold->rl": "sft-gold"}
DETAILS = {"formatted": "in format %", "cut": "cut %", "answers": "different answers a question", "probability":
           "probability of the right choice %", "log_prob": "log-prob a token (nats)",
           "flexible@1": "right in any format %", "questions": "questions seen", "sampled_tokens": "tokens sampled",
           "flops": "training FLOPs", "seconds": "training seconds"}  # fmt: skip  # a row's field -> its column

PLUS_MINUS = ("±: half of the 95% interval over seeds and questions; SE: one standard error over questions, where no pre-training "
              "run has two seeds.")  # fmt: skip


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def shown(e, metric="", sign=""):
    """An Estimate in %, or in nats for a loss, with half of its interval, or one standard error over questions: SE."""
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    error = f" ±{scale * e.half():.{digits}f}{'' if e.df else ' SE'}" if e and e.half() else ""  # none of a share of one seed
    return f"{scale * e.mean:{sign}.{digits}f}{error}" if e else "-"


# ---- one record ----
def span(finding, e):
    """An estimate with the interval of its kind, in points."""
    if not e.df:
        return f"{100 * e.mean:+.1f} ±{100 * e.se:.1f} (one SE over questions)"
    half = e.half(0.9 if finding.kind == "equivalence" else 0.95)
    return f"{100 * e.mean:+.1f} [{100 * (e.mean - half):+.1f}, {100 * (e.mean + half):+.1f}]"


def outcome(finding, verdict):
    """This run's figures for one finding."""
    e = verdict.estimate
    if not e:
        return ""
    text = span(finding, e)
    if e.df:
        text += f", p {verdict.p:.2g} (Holm {verdict.holm:.2g}), {e.seeds} seeds"
        text += f" x {e.questions} questions" * (e.questions > 1)
    runs = ", ".join(f"{run}: {100 * mean:+.1f}" for run, mean in e.runs.items())
    return f"{text}; {verdict.text}" + (f"; by pre-training seed {runs}" if len(e.runs) > 1 else "")


def word(verdict):
    return f"**{verdict.verdict}**{f' ({verdict.reason})' if verdict.reason else ''}"


def lines(verdicts):
    """The findings for the console."""
    return [f"{number}  {v.verdict}{f' ({v.reason})' if v.reason else ''}: {f.claim}  {outcome(f, v)}"
            for (number, v), f in zip(verdicts.items(), report.FINDINGS, strict=True)]  # fmt: skip


def secondary(r, finding):
    """{difference in words: one cell a checkpoint} of a finding's secondary differences."""
    rows = {}
    for metric, first, second in finding.secondary:
        gaps = [r.gap(metric, *report.minus(first, second, [t])) for t in r.tokens]
        cells = [shown(e, metric, "+") + (f" ({e.seeds})" if e and e.df and e.seeds < report.SEEDS else "") for e in gaps]
        if set(cells) != {"-"}:
            label = {"flexible@1": "right in any format (error of seeds alone)", "loss": "text loss (nats a token)"}.get(metric, metric)
            rows[f"{label}: {first} - {second}".format(data=r.data, size=r.size)] = cells
    return rows


def number(values, scale=1):
    """The mean of what there is, short."""
    mean = round(scale * float(np.mean(values)), 9) if values else 0
    return "-" if not values else f"{mean:.3g}" if mean >= 1000 else f"{mean:.{1 if abs(mean) >= 1 else 2}f}"


def details(r, name, tokens, benchmark):
    """Format, diversity, cost, and the questions newly solved and lost against the parent, means over seeds."""
    rows, general = [*r.rows("pass", name, tokens, benchmark).values()], general_name(r, name, benchmark)
    rows += [row for task in r.general for row in r.rows("general", general, tokens, task).values()]
    cells = [number([row[field] for row in rows if row.get(field) is not None], 100 if "%" in column else 1)
             for field, column in DETAILS.items()]  # fmt: skip
    try:
        elsewhere = re.search(r"( in .*| as .*)?$", name)[0]  # the parent is of the same world and model
        metric, parent = f"{benchmark} solved", PARENT.get(name.split()[0], name.removesuffix(elsewhere)) + elsewhere
        arms = [(sign, r.arm(arm, tokens, metric)) for sign, arm in ((1, name), (-1, parent))]
        difference = np.concatenate([[*cell.values()] for cell in report.combine(arms).values()])
        solved = [f"{round(100 * float(np.maximum(sign * difference, 0).mean()), 9):.1f}" for sign in (1, -1)]
    except Missing:
        solved = ["-", "-"]
    return cells + (solved if name.split()[0] in PARENT else ["-", "-"])


def general_name(r, name, benchmark):
    """The arm whose general capability belongs to what `name` does on a benchmark."""
    return re.sub(r" \d+-shot", "", name) + (f" on {benchmark}" if benchmark != r.main and not name.startswith("base") else "")


def with_shots(name):
    """A base's pass@k is that of 0 or of 8 shots; its best is no arm of its own in a table."""
    return not name.startswith("base") or "-shot" in name


def page(record):
    """The text of one record's report.md."""
    r, checkpoints = record.results, [tokens_name(t) for t in record.results.tokens]
    parts = [f"# Report\n\nWorld {r.world}, model {r.model}, {r.split} questions; shares in %, differences in points. "
             f"{PLUS_MINUS}\n"]
    findings = [[n, finding.claim, f"{finding.rule} ({finding.kind})", outcome(finding, v), finding.paper, word(v)]
                for (n, v), finding in zip(record.verdicts.items(), report.FINDINGS, strict=True)]  # fmt: skip
    parts += ["## Findings\n", table(["", "finding", "primary contrast", "this run", "paper", "verdict"], findings)]
    parts += [report.RULES + "\n"] + [f"![{name}]({name})\n" for name in record.pictures]
    rows = [[n, label, *cells] for n, finding in zip(record.verdicts, report.FINDINGS, strict=True)
            for label, cells in secondary(r, finding).items()]  # fmt: skip
    parts += ["## Secondary differences\n", table(["", "difference", *checkpoints], rows)] if rows else []
    for metric in [f"{b} pass@{k}" for b in r.benchmarks for k in (1, 8, 32)] + ["accuracy"] * bool(r.general):
        names = r.names if metric == "accuracy" else [name for name in r.names if with_shots(name)]
        rows = [[name] + [shown(r.level(name, t, metric)) for t in r.tokens] for name in names]
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        title = f"accuracy, mean of {', '.join(r.general)}" if metric == "accuracy" else metric
        parts += [f"## {title}\n", table(["", *checkpoints], rows)] if rows else []
    for title, block in (("Rollouts", rollouts(r)), ("Seeds", seeds(r)), ("Beyond the paper", beyond(r))):
        parts += [f"## {title}\n", block] if block else []
    header = ["", "tokens", *DETAILS.values(), "newly solved against the parent %", "lost %"]
    for benchmark in r.benchmarks:
        rows = [[name, tokens_name(t), *details(r, name, t, benchmark)] for name in r.names for t in r.tokens
                if r.rows("pass", name, t, benchmark)]  # fmt: skip
        columns = [column for column in zip(header, *rows, strict=True) if set(column[1:]) != {"-"}]
        first, *rest = zip(*columns, strict=True)
        parts += [f"## Answers, {benchmark}\n", table(first, rest)] if rest else []
    absent = [f"no rows for {name} at {tokens_name(t)}" for t in r.tokens for name in report.RECIPES
              if not r.level(name, t, "pass@1")]  # fmt: skip
    parts += ["## Missing\n", "\n".join(f"- {line}" for line in [*absent, *record.torn]) or "Nothing."]
    return "\n".join(parts) + "\n"


def levels(r):
    """pass@k and general capability of each arm, a table each for the main benchmark and the hard one, and one of the tasks."""
    parts = []
    for benchmark in [b for b in r.benchmarks if b in (r.main, "hard")]:
        rows = []
        for t, name in ((t, name) for t in r.tokens for name in filter(with_shots, r.names)):
            passes = [r.level(name, t, f"{benchmark} pass@{k}") for k in (1, 8, 32)]
            if any(passes):
                shots = name.startswith("base") and " 0-shot" not in name  # the tasks have none: shown once
                accuracy = None if shots else r.level(general_name(r, name, benchmark), t, "accuracy")
                row = [tokens_name(t), name, max(e.seeds for e in passes if e), *map(shown, [*passes, accuracy])]
                each = [", ".join(f"{run}: {100 * mean:.1f}" for run, mean in e.runs.items()) if e else "-" for e in passes[::2]]
                rows.append([*row, *each])
        header = ["tokens", benchmark, "seeds", "pass@1", "pass@8", "pass@32", "general capability", "pass@1 by run", "pass@32 by run"]
        parts += [table(header, rows)] if rows else []
    rows = []
    for t, name in ((t, name) for t in r.tokens for name in r.names if " on " not in name):
        each = [r.level(name, t, f"{task} accuracy") for task in r.general]
        if any(each):
            rows.append([tokens_name(t), name, *map(shown, each), shown(r.level(name, t, "loss"), "loss")])
    parts += [table(["tokens", "general capability", *r.general, "text loss"], rows)] if rows else []
    return "\n".join(parts)


def reached(x, y, level):
    """The first x at which the line through the points reaches the level, in words; "< x" if that is before the first point
    after the start, where nothing was measured."""
    for i, value in enumerate(y):
        if value >= level:
            if i < 2:
                return f"< {number([x[i]])}" if i else number([x[0]])
            return number([x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (value - y[i - 1])])
    return "-"


def along(r, name, tokens, benchmark, cost):
    """Validation pass@1 along the runs of an arm: its costs and levels at each point, means over seeds."""
    points, costs = r.curve(name, tokens, "pass@1", benchmark), r.curve(name, tokens, cost, benchmark)
    steps = [step for step in points if step in costs]
    return [costs[step].mean for step in steps], [points[step] for step in steps]


def rollouts(r):
    """n = 5 against 64: where they end, and what it takes to come near."""
    rows, names = [], ("rl n=5", "rl n=64")
    for benchmark, t in ((b, t) for b in report.splits(r) for t in r.tokens if r.rows("pass", names[0], t, b)):
        curves = [[*r.curve(name, t, "pass@1", benchmark).values()] for name in names]
        goal = 0.9 * min(points[-1].mean for points in curves) if all(curves) else 1.0
        updates = min((max(r.curve(name, t, "pass@1", benchmark), default=0) for name in names), default=0)
        for name in names:
            passes = [r.level(name, t, f"{benchmark} pass@{k}") for k in (1, 8, 32)]
            row = [benchmark, tokens_name(t), name, *map(shown, passes)]
            for cost in ("questions", "sampled_tokens", "flops", "seconds"):
                row.append(number([x[cost] for x in r.rows("pass", name, t, benchmark).values() if cost in x]))
            for cost in ("questions", "flops"):
                x, points = along(r, name, t, benchmark, cost)
                row.append(reached(x, [e.mean for e in points], goal))
            points = r.curve(name, t, "pass@1", benchmark)
            near = min((step for step in points if step >= updates), default=None)
            rows.append([*row, "-" if near is None else f"{shown(points[near])} ({near})"])
    header = ["questions", "tokens", "arm", "pass@1", "pass@8", "pass@32", "questions seen", "tokens sampled", "FLOPs", "seconds",
              "questions to 90%", "FLOPs to 90%", "validation pass@1 (after updates)"]  # fmt: skip
    said = ("To 90%: until validation pass@1, mean over seeds, is 90% of the lower of the two ends, on a straight line between "
            "validations; <: before the first of them. Last column: at the first validation after as many updates as n = 64 has.\n")
    return f"{table(header, rows)}\n{said}" if rows else ""


def ends(r):
    """Where the seeds of `rl` end at the early and the late checkpoint: {tokens: {unit: (reward, pass@1, pass@32)}}, shares.

    The reward is the training's, the mean of the curve points of the last 10 steps. Raises Missing as finding 8 does.
    """
    tokens, units = report.early_and_late(r)
    found = {}
    for t in tokens:
        arms, curves = [r.arm("rl", t, f"pass@{k}") for k in (1, 32)], r.rows("curve", "rl", t, r.main, "val")
        for unit in units:
            points = curves[unit]["points"] if unit in curves else []
            last = [p["reward"] for p in points if "reward" in p and p["step"] > points[-1]["step"] - 10]
            means = [float(np.mean([*arm[unit].values()])) for arm in arms]
            found.setdefault(t, {})[unit] = (float(np.mean(last)) if last else float("nan"), *means)
    return found


def seeds(r):
    """Training reward beside test pass@k of every seed, the mean beside the best of 4."""
    try:
        found = ends(r)
    except Missing:
        return ""
    header = ["pre-training seed", "seed"]
    header += [f"{tokens_name(t)}: {what}" for t in found for what in ("reward", "pass@1", "pass@32")]
    units = [*next(iter(found.values()))]
    values = np.array([[found[t][unit] for unit in units] for t in found])  # (2, S, 3)
    runs = np.array([run for run, _ in units])

    def row(first, second, cells):
        return [first, second, *("-" if np.isnan(x) else f"{round(100 * x, 9):.1f}" for x in np.ravel(cells))]

    def correlation(reward, end):  # within the pre-training runs
        x, y = (np.concatenate([v[runs == run] - v[runs == run].mean() for run in np.unique(runs)]) for v in (reward, end))
        return f"{x @ y / np.sqrt((x @ x) * (y @ y)):+.2f}" if (x @ x) * (y @ y) > 0 else "-"

    rows = [row(*unit, values[:, i]) for i, unit in enumerate(units)]
    for run in np.unique(runs):
        own = values[:, runs == run]
        rows += [row(run, "mean", own.mean(1)), row(run, "standard deviation", own.std(1, ddof=1)),
                 row(run, "best of 4 by pass@1", [[report.best_of_4(end, at[:, 1]) for end in at.T] for at in own])]  # fmt: skip
    told = [["", *(correlation(at[:, 0], at[:, i]) for i in (1, 2))] for at in values]
    said = "Best of 4: what is expected of the best of 4 seeds, chosen by its test pass@1. Correlation: within the pre-training runs.\n"
    return f"{table(header, [*rows, ['all', 'correlation with the reward', *told[0], *told[1]]])}\n{said}\n{spread(r)}"


def spread(r):
    """How far the seeds of `rl` lie apart, wherever a pre-training run has two, on the main questions and the hard ones."""
    rows = []
    for benchmark, t in ((b, t) for b in r.benchmarks if b in (r.main, "hard") for t in r.tokens):
        ends = [{unit: 100 * np.mean([*r.values(row, f"pass@{k}").values()]) for unit, row in r.rows("pass", "rl", t, benchmark).items()}
                for k in (1, 32)]  # fmt: skip
        for run in sorted({run for run, _ in ends[0]}):
            one, many = ([value for unit, value in end.items() if unit[0] == run] for end in ends)
            if len(one) > 1:
                cells = [f"{min(x):.1f} to {max(x):.1f}" for x in (one, many)]
                deviations = [f"{np.std(x, ddof=1):.1f}" for x in (one, many)]
                relative = f"{100 * np.std(one, ddof=1) / np.mean(one):.0f}%" if np.mean(one) else "-"
                rows.append([benchmark, tokens_name(t), run, len(one), cells[0], deviations[0], relative, cells[1], deviations[1]])
    header = ["questions", "tokens", "pre-training seed", "seeds", "pass@1", "standard deviation", "of the mean"]
    header += ["pass@32", "standard deviation"]
    return table(header, rows) if rows else ""


# ---- beyond the paper ----
def shares(r, tokens):
    """Arms of parallel averaging at a checkpoint, by their share of RL, a schedule last."""
    names = {name: name.partition("share=")[2] or str(report.SHARE) for name in r.names if re.fullmatch(r"mix( share=\S+)?", name)}
    names = {name: share for name, share in names.items() if r.rows("pass", name, tokens, r.main)}
    return sorted(names, key=lambda name: ("-" in names[name], float(names[name].split("-")[0])))


def mixed(r):
    """Checkpoints with more than one share."""
    return [t for t in r.tokens if len(shares(r, t)) > 1]


def bare(name, metric):
    """The base without shots, as what is compared with it has none; the tasks and the loss never have any."""
    return "base 0-shot" if name == "base" and metric not in ("accuracy", "loss") else name


def gone_on(r):
    """[(t, u, the base's checkpoint at u)]: text was gone on with from t, the last checkpoint with `rl` before u."""
    found = []
    for u in sorted({key[2] for key in r.index if key[1] == "rl->text" and key[0] == "pass"}):
        before = [t for t in r.tokens if t < u and r.rows("pass", "rl", t, r.main)]
        base = [t for t in r.tokens if abs(t - u) < 0.01 * u and r.level("base", t, "pass@1")]
        found += [(before[-1], u, base[-1] if base else u)] if before else []
    return found


def beyond(r):
    """Tables on shares and schedules, on text as the second stream, and on going on with text after RL."""
    parts, rows = [], []
    for t in mixed(r):
        for name in ("rl", "sft", "sft->rl", *shares(r, t)):
            each = [r.level(name, t, metric) for metric in ("pass@1", "pass@8", "pass@32", "accuracy")]
            cells = [max(e.seeds for e in each if e), *map(shown, each)] if any(each) else ["-"] * 5
            cells += ["" if name == "mix" else shown(r.gap(metric, *report.minus(name, "mix", [t])), sign="+")
                      for metric in ("pass@1", "pass@32")]  # fmt: skip
            rows.append([tokens_name(t), f"mix share={report.SHARE}" if name == "mix" else name, *cells])
    header = ["tokens", "arm", "seeds", "pass@1", "pass@8", "pass@32", "general capability", "pass@1 - mix 0.5", "pass@32 - mix 0.5"]
    said = "Share of the RL update, and a schedule from SFT to RL. Differences are on the seeds that both have.\n"
    parts += [said, table(header, rows)] if rows else []

    rows = []
    for t in (t for t in r.tokens if r.rows("pass", "mix-text", t, r.main)):
        for name in ("rl", "sft", "mix", "mix-text"):
            cells = ["" if name == other else shown(r.gap(metric, *report.minus(name, other, [t])), metric, "+")
                     for other in ("base", "rl") for metric in ("pass@1", "pass@32", "accuracy", "loss")]  # fmt: skip
            rows.append([tokens_name(t), name, shown(r.level(name, t, "formatted")), *cells])
    header = ["tokens", "arm", "in format"] + [f"{metric} - {other}" for other in ("base", "rl")
                                  for metric in ("pass@1", "pass@32", "general capability", "text loss")]  # fmt: skip
    said = "Pre-training text as the second stream (mix-text); text loss in nats a token.\n"
    parts += [said, table(header, rows)] if rows else []

    rows, metrics = [], ("pass@1", "flexible@1", "formatted", "pass@32", "accuracy", "loss")
    for t, u, v in gone_on(r):
        for name, at in (("base", t), ("rl", t), ("base", v), ("text", u), ("rl->text", u)):
            rows.append([f"{name} at {tokens_name(at)}", *(shown(r.level(bare(name, metric), at, metric), metric) for metric in metrics)])
        for first, second in ((("rl->text", u), ("text", u)), (("rl->text", u), ("rl", t)), (("text", u), ("base", v))):
            label = " - ".join(f"{name} at {tokens_name(at)}" for name, at in (first, second))
            pairs = [[(sign, bare(name, metric), at) for sign, (name, at) in ((1, first), (-1, second))] for metric in metrics]
            rows.append([label, *(shown(r.gap(metric, *pair), metric, "+") for metric, pair in zip(metrics, pairs, strict=True))])
    said = ("Pre-training goes on after RL (rl->text) and without it (text), both with a fresh optimizer; text is one run a model, listed "
            "once a seed. All without shots. Right in any format and in format: the error is of seeds alone.\n")  # fmt: skip
    header = ["arm", "pass@1", "right in any format", "in format", "pass@32", "general capability", "text loss"]
    parts += [said, table(header, rows)] if rows else []
    return "\n".join(parts)


# ---- explored after a record ----
def rivals(name, names):
    """What an arm that was tried afterwards is compared with: SFT under the same change, or else as it is; 5 answers for 64."""
    if name.endswith(" n=64"):
        return ["rl n=5"]
    recipe, _, where = name.partition(" ")
    change = recipe.partition("-")[2]
    same = [peer for peer in names if change and re.fullmatch(rf"sft-{change}(-\d+-epochs)?", peer)]
    return same or [peer for peer in names if peer == " ".join(filter(None, ("sft", where)))]


def why(r):
    """Levels, and differences to each arm's rivals."""
    rows = []
    for t, name in ((t, name) for t in r.tokens for name in r.names if re.match("(rl|mix)\\b", name)):
        for peer in rivals(name, r.names):
            if any(gaps := [r.gap(f"pass@{k}", *report.minus(name, peer, [t])) for k in (1, 8, 32)]):
                rows.append([tokens_name(t), f"{name} - {peer}", gaps[0].seeds, *(shown(e, sign="+") for e in gaps)])
    differences = table(["tokens", "difference", "seeds", "pass@1", "pass@8", "pass@32"], rows) if rows else ""
    return "\n".join(filter(None, (differences, levels(r))))


def many(r):
    """pass@k of many answers a question, also at as many answers in format as 32 of a model that knows it."""
    rows, most = [], min(row["n"] for row in r.all if row["kind"] == "pass")
    for t, name in ((t, name) for t in r.tokens for name in filter(with_shots, r.names)):
        if found := r.rows("pass", name, t, r.main):
            share = 100 * float(np.mean([row["formatted"] for row in found.values()]))
            fair = r.level(name, t, "in-format@32")
            less = "" if name == "rl" else shown(r.gap("in-format@32", *report.minus("rl", name, [t])), sign="+")
            runs = [f"{run}: {100 * mean:.1f}" for run, mean in fair.runs.items()] if fair else []
            rows.append([tokens_name(t), name, len(found), f"{share:.0f}", *(shown(r.level(name, t, f"pass@{k}")) for k in (1, 32, most)),
                         shown(fair), ", ".join(runs), less])  # fmt: skip
    header = ["in format %", "pass@1", "pass@32", f"pass@{most}", "32 in format: pass@k", "by run", "rl - it"]
    return table(["tokens", "arm", "runs", *header], rows) if rows else ""


# ---- all records ----
def spoken(name):
    return name.replace("-", " ")


def findings(records, short=False):
    """The nine, one column a record."""
    rows = []
    for i, finding in enumerate(report.FINDINGS):
        verdicts = [record.verdicts[str(i + 1)] for record in records.values()]
        if short:
            told = [f"{word(v)} {span(finding, v.estimate) if v.estimate else ''}".strip() for v in verdicts]
            rows.append([i + 1, finding.claim, finding.paper, *told])
        else:
            told = [f"{word(v)} {outcome(finding, v)}".strip() for v in verdicts]
            rows.append([i + 1, finding.claim, f"{finding.rule} ({finding.kind})", finding.paper, *told])
    return table(["", "finding", *["primary contrast"] * (not short), "paper", *map(spoken, records)], rows)


def pooled(records):
    """The verdicts by the rules, and with the seeds of a record's pre-training runs pooled."""
    rows = []
    for name, record in records.items():
        others = report.decide(record.results, pooled=True)
        for (n, v), finding in zip(record.verdicts.items(), report.FINDINGS, strict=True):
            told = [f"{span(finding, x.estimate)}, Holm {x.holm:.2g}: {x.verdict}" if x.estimate and not x.reason else "not tested"
                    for x in (v, others[n])]  # fmt: skip
            rows.append([spoken(name), n, *told, "" if v.verdict == others[n].verdict else "another verdict"])
    header = ["", "finding", "within the pre-training runs (the rule)", "pooled, S - 1 degrees of freedom", ""]
    return table(header, rows)


def room(r):
    """Where pass@32 of the base lies on validation questions, by pre-training run: is there room both ways?"""
    rows = []
    for t in r.tokens:
        if e := r.level("base", t, "pass@32", "val"):
            runs = [f"{run}: {100 * mean:.0f}" for run, mean in e.runs.items()]
            rows.append([tokens_name(t), f"{100 * e.mean:.0f}", ", ".join(runs)])
    return table(["tokens", "base pass@32, validation", "by run"], rows) if rows else ""


def all_secondary(records):
    """The secondary differences of all records, one column a record and checkpoint."""
    header, width, rows = ["", "difference"], [], {}
    for name, record in records.items():
        header += [f"{spoken(name)}, {tokens_name(t)}" for t in record.results.tokens]
        width.append(len(record.results.tokens))
    for i, finding in enumerate(report.FINDINGS):
        each = [secondary(record.results, finding) for record in records.values()]
        for label in dict.fromkeys(label for found in each for label in found):
            cells = [found.get(label, ["-"] * n) for found, n in zip(each, width, strict=True)]
            rows[i + 1, label] = sum(cells, [])
    said = (f"{PLUS_MINUS} (4): of 4 seeds, where others have {report.SEEDS}. Unadjusted. An arm with more seeds than the other is cut to "
            "those of both, so that a difference need not be that of the levels.\n")  # fmt: skip
    return f"{table(header, [[*key, *cells] for key, cells in rows.items()])}\n{said}"


def sweep_table(r):
    """Each arm's settings on validation questions at each checkpoint. Chosen among those tried at most checkpoints."""
    metrics, tried = ("pass@1", "pass@8", "pass@32", "accuracy"), {}  # (benchmark, arm) -> {name: {tokens: means}}
    for benchmark in r.benchmarks:
        for name in (name for name in r.names if " lr=" in name):
            for t in r.tokens:
                found = [r.level(general_name(r, name, benchmark), t, metric) if metric == "accuracy" else
                         r.level(name, t, f"{benchmark} {metric}") for metric in metrics]  # fmt: skip
                if found[0]:
                    arm = tried.setdefault((benchmark, name.partition(" lr=")[0]), {})
                    arm.setdefault(name, {})[t] = [100 * e.mean if e else None for e in found]
    tokens, rows = [t for t in r.tokens if any(t in means for arm in tried.values() for means in arm.values())], []
    for (benchmark, arm), settings in tried.items():
        most = max(map(len, settings.values()))
        chosen = report.choose({name: round(float(np.mean([means[0] for means in found.values()])), 9)
                                for name, found in settings.items() if len(found) == most})  # fmt: skip
        for name, found in sorted(settings.items(), key=lambda item: [float(x) for x in re.findall(r"lr=(\S+)", item[0])]):
            cells = [" / ".join("-" if x is None else f"{round(x, 9):.1f}" for x in found[t]) if t in found else "-" for t in tokens]
            setting = "lr " + name.partition(" lr=")[2].replace(" sft_lr=", ", SFT ")
            rows.append([arm, benchmark, setting, *cells, "chosen" if name == chosen else ""])
    header = [f"{tokens_name(t)}: pass@1 / 8 / 32 / general capability" for t in tokens]
    return table(["recipe", "questions", "setting", *header, ""], rows)


def spent(r):
    """{(part, question set): [runs, seconds, FLOPs]} of training, each run counted once."""
    runs = {}
    for row in r.all:
        if row.get("flops") is not None:
            base = row["recipe"] == "base"  # its seeds are draws
            part = r.name({**row, "kind": "curve"}).partition(" lr=")[0].replace("base", "pre-training")
            asked = "" if base else row.get("on") or r.main or ""
            key = row["tokens"], row["pretrain_seed"], None if base else row["seed"], row["config_hash"]
            runs.setdefault((part, asked), {})[key] = row
    return {part: [len(rows), sum(row.get("seconds", 0) for row in rows.values()), sum(row["flops"] for row in rows.values())]
            for part, rows in runs.items()}  # fmt: skip


def costs(records, others):
    """Runs, seconds and FLOPs of each part, one column a record and one for each of the others {name: Results}."""
    columns = {spoken(name): spent(record.results) for name, record in records.items()}
    columns |= {name: spent(r) for name, r in others.items() if name != "why-many"}
    order = {name: i for i, name in enumerate(("pre-training", *report.RECIPES))}
    parts = sorted({part for found in columns.values() for part in found},
                   key=lambda part: (order.get(part[0].split()[0], len(order)), part))  # fmt: skip

    def cell(found):
        runs, seconds, flops = map(sum, zip(*found, strict=True)) if found else (0, 0, 0)
        return f"{runs} / {seconds:,.0f} / {flops:.2e}" if runs else "-"

    rows = [[part, asked, *(cell([found[part, asked]] if (part, asked) in found else []) for found in columns.values())]
            for part, asked in parts]  # fmt: skip
    rows.append(["all", "", *(cell([*found.values()]) for found in columns.values())])
    header = ["part", "questions", *(f"{name}: runs / seconds / FLOPs" for name in columns)]
    return f"{table(header, rows)}\nTraining alone; the seconds are those of runs side by side, evaluation is not in them.\n"


def blocks(records, others):
    """{name: text} of what stands between <!-- name --> and <!-- /name --> in README.md and RESULTS.md. others: {one of
    report.OTHERS: Results}, those that there are."""
    none = "No rows.\n"

    def each(block):
        found = {name: block(record.results) for name, record in records.items()}
        return "\n".join(f"{spoken(name).capitalize()}:\n\n{text}" for name, text in found.items() if text) or none

    sweep, again, tried, lots = (others.get(name) for name in report.OTHERS)
    sweeps = [sweep_table(rows) if rows else none for rows in (sweep, again)]
    texts = (findings(records), findings(records, short=True), report.RULES + "\n", pooled(records), each(room), each(levels),
             all_secondary(records), *sweeps, costs(records, others), each(beyond), each(seeds), each(rollouts),
             why(tried) if tried else none, many(lots) if lots else none)
    return dict(zip(BLOCKS, texts, strict=True))


def side_by_side(records, found):
    """The text of report.md beside the records, from the blocks."""
    links = ", ".join(f"[{spoken(name)}]({name}/report.md)" for name in records)
    parts = [f"# Report\n\nEach record is decided on its own rows and seeds: {links}.\n"]
    for name, text in (("Findings", found["findings"] + "\n" + found["rules"]), ("Secondary differences", found["secondary"]),
                       ("The sweep, on validation questions", found["sweep"]), ("Costs", found["costs"])):  # fmt: skip
        parts += [f"## {name}\n", text]
    return "\n".join(parts)


def marks(path):
    """The text of a file that may have marked blocks. ValueError: one that nobody knows or that has no end."""
    text = path.read_text()
    for name in re.findall(r"^<!-- ([\w-]+) -->$", text, re.M):
        if name not in BLOCKS:
            raise ValueError(f"{path} has a block {name!r}; there are {', '.join(BLOCKS)}")
        if f"\n<!-- /{name} -->" not in text:
            raise ValueError(f"{path}: the block {name!r} has no end, a line <!-- /{name} -->")
    return text


def fill(path, text, found):
    """Write the file again with the blocks as they are now."""
    text = re.sub(r"^<!-- ([\w-]+) -->\n.*?^<!-- /\1 -->$", lambda mark: f"<!-- {mark[1]} -->\n{found[mark[1]]}<!-- /{mark[1]} -->",
                  text, flags=re.M | re.S)  # fmt: skip
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)
