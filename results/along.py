"""What validation along the runs says: where RL overtakes SFT, and 64 answers against 5."""

import re

import numpy as np
import pandas as pd

from results.findings import STEPS
from results.rows import Arm, tokens_name
from results.stats import estimate
from results.tables import shown, table

DRAWS = 2000  # of models with replacement, for the range of a crossing
FIRST = 300  # steps of RL, where some runs go on


def along(r, arm, tokens, asked="", against="step"):
    """-> {(pre-training seed, seed): pass@1 at each validation of a run of an arm, a Series}.

    against: its index, "step" or another field of the points, "flops" or "questions".
    """
    runs = {}
    for row in r.rows("curve", arm, tokens, asked, split="val"):
        points = [p for p in row["points"] if p.get("pass@1") is not None]
        index = [float(p.get(against, 0)) for p in points]  # nothing is spent before the first step
        runs[row["pretrain_seed"], row["seed"]] = pd.Series([p["pass@1"] for p in points], index)
    return runs


def between(run, x):
    """A Series at x, by a straight line between its points."""
    return float(np.interp(x, run.index, run))


def mean(values):
    """{run: number} -> Estimate over models."""
    return estimate(pd.DataFrame({run: [value] for run, value in values.items()}))


# ---- where RL overtakes SFT


def of_questions(recipe):
    """ "50" of "rl-50-questions"; None where a name says nothing."""
    found = re.search(r"-(\d+)-questions", recipe)
    return found and found[1]


def rivals(r):
    """rl and sft by what they were trained on -> [(size, tokens, rl, sft), ...]; size: "" is the
    usual number of questions; rl and sft: arms."""
    sizes = {of_questions(arm.recipe) for arm in r.arms} - {None}
    for size in ("", *sorted(sizes, key=int)):
        name = size and f"-{size}-questions"
        for t in r.tokens:
            yield size, t, Arm("rl" + name), Arm("sft" + name)


def lead(r, rl, sft, tokens):
    """pass@1 of rl along its steps less that of sft at its end: a DataFrame of steps x runs."""
    ours, theirs = along(r, rl, tokens), along(r, sft, tokens)
    runs = sorted(ours.keys() & theirs.keys())
    return pd.DataFrame({run: ours[run] - theirs[run].iloc[-1] for run in runs}).dropna()


def crossing(steps, gap):
    """The step at which a difference is no longer negative; infinite if it always is. Between two
    validations by a straight line."""
    ahead = np.flatnonzero(gap >= 0)
    if not len(ahead):
        return np.inf
    after = ahead[0]
    if after == 0:
        return float(steps[0])
    low, high = gap[after - 1 : after + 1]
    return float(steps[after - 1] + (steps[after] - steps[after - 1]) * -low / (high - low))


def crossing_range(steps, gaps):
    """95% of the crossings of means over models, drawn with replacement; gaps: (steps, models)."""
    draw = np.random.default_rng(0)
    models = gaps.shape[1]
    drawn = [gaps[:, draw.integers(models, size=models)].mean(axis=1) for _ in range(DRAWS)]
    found = [crossing(steps, gap) for gap in drawn]
    return np.quantile(found, (0.025, 0.975), method="nearest")


def step_name(step):
    return "never" if np.isinf(step) else f"{step:.0f}"


def overtaking(r):
    """A table of where rl passes sft, by questions and checkpoint."""
    rows = []
    for size, t, rl, sft in rivals(r):
        gaps = lead(r, rl, sft, t)
        if gaps.empty:
            continue
        spent, ours = along(r, sft, t, against="flops"), along(r, rl, t, against="flops")
        ends = along(r, sft, t)
        level = {run: between(ours[run], spent[run].index[-1]) for run in gaps}
        level = {run: value - ends[run].iloc[-1] for run, value in level.items()}
        steps, values = gaps.index.to_numpy(), gaps.to_numpy()
        cells = [step_name(crossing(steps, values.mean(axis=1)))]
        if values.shape[1] >= 4:
            cells[0] += " ({} to {})".format(*map(step_name, crossing_range(steps, values)))
        cells.append(shown(mean(level), sign="+"))
        cells.append(shown(mean(dict(gaps.iloc[-1])), sign="+"))
        later = gaps.iloc[-1] - gaps[gaps.index <= FIRST].iloc[-1]
        cells.append(shown(mean(dict(later)), sign="+") if gaps.index[-1] > FIRST else "-")
        rows.append([size or "as usual", tokens_name(t), f"{steps[-1]:.0f}", *cells])
    header = ["questions", "tokens", "steps of rl", "rl passes sft after (95% of resampled models)"]
    header += ["rl - sft at the FLOPs of sft", "at the end", f"rl, end - step {FIRST}"]
    title = "## Where rl overtakes sft: validation pass@1\n\nsft is taken at its end.\n"
    return f"{title}\n{table(header, rows)}" if rows else ""


# ---- 64 answers against 5


def compared(r, few, many, tokens, asked):
    """[(where, {run: pass@1 of few}, {the same of many}), ...]; few: the arm with 5 answers."""
    a, b = (along(r, arm, tokens, asked) for arm in (few, many))
    spent, others = (along(r, arm, tokens, asked, "flops") for arm in (few, many))
    runs = sorted(a.keys() & b.keys())
    ends = {run: a[run].index[-1] for run in runs}
    both = {run: min(ends[run], b[run].index[-1]) for run in runs}
    last = {run: a[run].iloc[-1] for run in runs}
    return [
        (
            f"mean of the last {STEPS} steps",
            {run: a[run][a[run].index > ends[run] - STEPS].mean() for run in runs},
            {run: b[run][b[run].index > b[run].index[-1] - STEPS].mean() for run in runs},
        ),
        (
            "as many steps and questions",
            {run: between(a[run], both[run]) for run in runs},
            {run: between(b[run], both[run]) for run in runs},
        ),
        (
            "as many answers",
            last,
            {run: between(b[run], ends[run] * 5 / 64) for run in runs},
        ),
        (
            "as many FLOPs",
            last,
            {run: between(others[run], spent[run].index[-1]) for run in runs},
        ),
    ]


def answers_compared(r):
    """A table of rl with 64 and with 5 answers per question."""
    few, many = r.with_rollouts(5), r.with_rollouts(64)
    rows = []
    for asked in r.benchmarks:
        for t in r.tokens:
            for where, a, b in compared(r, few, many, t, asked):
                if a:
                    gap = {run: b[run] - a[run] for run in a}
                    cells = [shown(mean(a)), shown(mean(b)), shown(mean(gap), sign="+")]
                    rows.append([asked, tokens_name(t), where, *cells])
    header = ["questions", "tokens", "after", "n=5", "n=64", "n=64 - n=5"]
    return f"## 64 answers against 5: validation pass@1\n\n{table(header, rows)}" if rows else ""
