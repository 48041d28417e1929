"""Result rows -> a verdict on each of the nine findings, by rules fixed here; `report` writes them down (tables.py, figures.py).

A replicate is a training seed. An arm has a name: "rl", "base 8-shot", "rl n=64", "mix share=0.25", "mix share=0-1" (a
schedule), "rl in toy-math60" (another world), "rl as wide" (another model). Shares inside, percent in print; losses in nats.
"""

import re
from collections import Counter, namedtuple
from functools import cache
from json import dumps, loads
from math import atan, comb, exp, lgamma, pi, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECIPES = ("base", "rl", "sft", "sft->rl", "mix", "sft-gold", "sft-gold->rl")  # the paper's; any other has tables of its own
ROLLOUTS = (5, 64)  # rows with one of these as "group" are arms of their own (finding 7); any other is the usual one
SHARE = 0.5  # so are rows with a "share" that is not this one
RATES = ("lr", "sft_lr")  # these make arms in the sweep only
OTHERS = ("sweep", "sweep-again", "why", "why-many")  # rows beside the records: validation questions, tables of their own
SEEDS = 8  # what a verdict rests on
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)  # for the tail of Student's t
MARGIN = 0.02  # "unchanged" and "the same" mean within 2 points
RULES = """Fixed before the run (RESULTS.md lists what changed since): one primary contrast a finding, paired on the
same questions and seeds. SE^2 = var(seed means)/S + var(question means)/Q; t with S - 1 degrees of freedom. With 2 or
3 pre-training seeds the variance is taken within each (S - 2 or S - 3) and the interval is about these runs; from 4
on they are the replicates. p: two-sided for a difference, of two one-sided tests for an equivalence; Holm over the
nine, not tested (no rows, or fewer than 8 seeds) is p = 1. A difference holds if p (Holm) < 0.05 with the claim's
sign, is contradicted with the other. An equivalence holds if its 90% interval lies inside +-2 points, contradicted if
outside (either is a one-sided p < 0.05), and Holm agrees. Brackets: 95%, or 90% for an equivalence, before Holm.
`base` is the number of shots that scores best on the questions of the contrast, averaged over its draws of shots and
noise; against itself each draw is a replicate. The best rival is chosen on the same questions. An arm is the end of
its run. Middle checkpoint: the first with base pass@32 >= 30%, on validation if it has rows. A checkpoint with fewer
than 8 seeds of an arm is left out where others have 8. In finding 7 each pre-training run has questions of its own:
means are taken within a run, with the variance of its questions, then over the runs."""


# ---- statistics ----
def pass_at_k(n, c, k):
    """Unbiased pass@k of each question, 1 - C(n-c, k) / C(n, k), from c right answers of n (an int or an array)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} answers a question and there are {n}: raise n or lower k")
    wrong = n - np.asarray(c)[..., None] - np.arange(k)  # (..., k): a product of k ratios, no large binomials
    return 1 - np.prod(np.maximum(wrong, 0) / (n - np.arange(k)), axis=-1)


def standard_error(values):
    """Standard error of the mean of independent values, of questions for one; 0 for a single value."""
    return float(np.std(values, ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0


def best_of_4(values, by=None):
    """Expected value of the largest of 4 drawn at random, the largest `by` if given; of all if there are fewer than 4."""
    values = np.asarray(values)[np.argsort(values if by is None else by, kind="stable")]
    return float(values @ [comb(i, 3) for i in range(len(values))] / comb(len(values), 4) if len(values) > 3 else values[-1])


def t_tail(t, df):
    """P(T > t) of Student's t. With T = sqrt(df) tan(angle) its density is cos(angle)^(df - 1) over a constant."""
    half = (pi / 2 - atan(t / sqrt(df))) / 2
    area = half * (WEIGHTS * np.cos(pi / 2 - half + half * NODES) ** (df - 1)).sum()
    return float(area * exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(pi))


@cache
def t_quantile(p, df):
    """The t with P(T <= t) = p, for p from 0.5 up, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - p else (low, middle)
    return low


def holm(p_values):
    """Holm's adjusted p-values, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        adjusted[i] = largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


class Estimate(NamedTuple):
    mean: float
    se: float  # of questions alone where df is 0
    df: int
    seeds: int
    questions: int
    runs: dict  # pre-training seed -> mean

    def half(self, level=0.95):  # of the interval; with one seed, one standard error over questions
        return t_quantile((1 + level) / 2, self.df) * self.se if self.df else self.se

    def __str__(self):
        return f"{100 * self.mean:.1f} ±{100 * self.half():.1f}"


def column(values, questions):
    """{question: value} -> (Q,)."""
    return np.fromiter(map(values.__getitem__, questions), float, len(questions))


def asked(cells):
    """{(pre-training seed, seed): {question: value}} -> {pre-training seed: the questions that all its seeds share}."""
    sets = {}
    for (run, _), values in sorted(cells.items()):
        sets[run] = sets[run] & set(values) if run in sets else set(values)
    return {run: sorted(questions, key=str) for run, questions in sets.items()}


def estimate(cells, pooled=False):
    """{(pre-training seed, seed): {question: value}} -> Estimate of the mean, on the questions that the seeds of a run share.

    With value = mean + seed + question + noise, the seed means vary by var(seed) + var(noise)/Q and the question means by
    var(question) + var(noise)/S: the two parts of SE^2 add up to the variance of the mean and once more var(noise)/(S Q).
    Runs with other questions under the same names: the mean over the runs of one name has the variance of the mean. Runs
    with other names: each has the variance of its own questions. pooled: the seeds of 2 or 3 runs are taken as those of one.
    """
    questions = asked(cells)
    runs = {r: np.stack([column(cells[u], names) for u in sorted(cells) if u[0] == r]) for r, names in questions.items()}  # (S, Q)
    told = {r: float(values.mean()) for r, values in runs.items()}
    if replicates := len(runs) >= 4:  # enough pre-training runs
        runs = {r: values.mean(0, keepdims=True) for r, values in runs.items()}
    same = len({tuple(names) for names in questions.values()}) == 1
    sets = [np.concatenate([*runs.values()])] if same else [*runs.values()]
    groups = [values.mean(1) for values in runs.values()]
    means = np.concatenate(groups)
    groups = [means] if replicates or pooled else groups
    S, Q, df = len(means), sum(len(values[0]) for values in sets), len(means) - len(groups)
    spread = sum(((group - group.mean()) ** 2).sum() for group in groups)
    se = sqrt((spread / df / S if df else 0) + sum((len(values) / S * standard_error(values.mean(0))) ** 2 for values in sets))
    # rounded, so that a tie in print does not hang on the last bit
    return Estimate(round(float(means.mean()), 12), se, df, S, Q, told)


def p_value(kind, e):
    if kind == "difference > 0":
        return 2 * t_tail(abs(e.mean) / max(e.se, 1e-12), e.df)
    inside = t_tail((MARGIN - abs(e.mean)) / max(e.se, 1e-12), e.df)  # the larger of the two one-sided p-values
    return min(inside, 1 - inside)


# ---- rows ----
NEEDS = {"pass": ("benchmark", "shots", "n", "ids", "correct"), "general": ("benchmark", "right"), "curve": ("points",),
         "text": ("benchmark", "losses")}  # fmt: skip
KEY = ("kind", "world", "model", "recipe", "tokens", "pretrain_seed", "seed", "step", "split")
ARM = ("benchmark", "on", "shots", "group", "share", "share_end")  # may be absent


class Missing(LookupError):
    """What is not among the rows."""


def parse(line):
    row = loads(line)
    if not isinstance(row, dict) or row.get("kind") not in NEEDS:
        raise ValueError(f"not a result row, its kind is not one of {', '.join(NEEDS)}")
    if absent := [field for field in (*KEY, "checkpoint", "config_hash", *NEEDS[row["kind"]]) if field not in row]:
        raise ValueError(f"no field {absent[0]!r}")
    counts = row.get("correct", ())
    if row["kind"] == "pass" and (len(row["ids"]) != len(counts) or not set(counts) <= {*range(row["n"] + 1)}):
        raise ValueError(f"needs a count of right answers, 0 to n = {row['n']}, for each of its {len(row['ids'])} ids")
    return row


def read(folder, apart=()):
    """-> rows under the folder by step, the last one of each key, and the torn last lines skipped. Else ValueError.

    apart: more fields that make an arm. Each row gets "on", the question set of its checkpoint if it was measured on one:
    runs of one recipe on two sets are two arms, also where no question is asked (curves, general capability).
    """
    found, torn, sets, rows = [], [], {}, {}
    for path in sorted(Path(folder).rglob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")  # a whole file ends in a newline: its last piece is empty
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    found.append((f"{path}:{number}", parse(line)))
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"{path}:{number}: {error}") from error
                torn.append(f"{path}:{number}: torn last line skipped, its row is missing here")
    if not found:
        raise ValueError(f"no result rows under {folder}: run eval.py first")
    for _, row in found:
        if row["kind"] == "pass":
            sets.setdefault((row["checkpoint"], row["config_hash"]), set()).add(row["benchmark"])
    for place, row in found:
        asked = sets.get((row["checkpoint"], row["config_hash"]), ())
        row["on"] = min(asked) if len(asked) == 1 else None
        key = tuple(row.get(field) for field in (*KEY, *ARM, *apart))
        if rows.setdefault(key, row)["config_hash"] != row["config_hash"]:
            names = f"{row['checkpoint']} and {rows[key]['checkpoint']}"
            raise ValueError(f"{place}: {names} are two runs of one arm and seed")
        rows[key] = row
    return sorted(rows.values(), key=lambda row: row["step"]), torn


def combine(terms):
    """Sum of weight * arm on the seeds and questions they share. Beside trained arms `base` serves every seed of its
    pre-training run with the mean of its draws; against itself draws of the same number are paired."""
    arms = [arm for _, arm in terms]
    trained = [arm for arm in arms if all(seed is not None for _, seed in arm)]
    cells = {}
    for run, seed in sorted(unit for unit in set.intersection(*map(set, trained or arms)) if unit[1] is not None):
        values = [arm.get((run, None if trained else seed), arm.get((run, seed))) for arm in arms]
        if None not in values:
            in_all = set.intersection(*map(set, values))
            shared = [question for question in values[0] if question in in_all]
            columns = [w * column(v, shared) for (w, _), v in zip(terms, values, strict=True)]
            cells[run, seed] = dict(zip(shared, sum(columns).tolist(), strict=True))
    if not cells or not all(asked(cells).values()):
        raise Missing("no seed with the same questions in all arms")
    return cells


class Results:
    """The rows of a folder by arm. The main world and model are those with the most rows."""

    def __init__(self, rows, apart=()):
        counts = Counter((row["world"], row["model"]) for row in rows)
        self.world, self.model = max(sorted(counts), key=counts.get)
        others = sorted(counts, key=lambda key: (-counts[key], key))
        self.data = next((f"in {w}" for w, m in others if w != self.world and m == self.model), "in another world")
        self.size = next((f"as {m}" for w, m in others if m != self.model and w == self.world), "as another model")
        self.apart, self.all = apart, rows
        self.split = "test" if any(row["split"] == "test" for row in rows if row["kind"] != "curve") else "val"
        self.tokens = sorted({row["tokens"] for row in rows if row["recipe"] in RECIPES} or {row["tokens"] for row in rows})
        self.arm, self.level = cache(self.arm), cache(self.level)  # tables and figures ask again and again
        groups = Counter(row["group"] for row in rows if row["recipe"] == "rl" and row.get("group"))
        self.group = max(sorted(groups), key=groups.get, default=None)  # the usual one
        self.benchmarks = sorted({row["benchmark"] for row in rows if row["kind"] == "pass"})  # the first one is the main one
        self.main = self.benchmarks[0] if self.benchmarks else None
        self.general = sorted({row["benchmark"] for row in rows if row["kind"] == "general"})
        self.index = {}  # (kind, arm, tokens, benchmark, split) -> {(pre-training seed, seed): row}, the last step
        for row in rows:
            asked = row.get("on") or self.main if row["kind"] == "curve" else row.get("benchmark")
            key = row["kind"], self.name(row), row["tokens"], asked, row["split"]
            self.index.setdefault(key, {})[row["pretrain_seed"], row["seed"]] = row
        names = {key[1]: key[1].split()[0] for key in self.index}
        self.names = sorted(names, key=lambda name: ((*RECIPES, names[name]).index(names[name]), name))

    def name(self, row):
        name = row["recipe"]
        name += f" {row['shots']}-shot" if row["kind"] == "pass" and (name == "base" or row["shots"]) else ""
        name += f" n={row['group']}" if row.get("group") in ROLLOUTS and row["group"] != self.group else ""
        share, end = row.get("share"), row.get("share_end")
        if share is not None and (share != SHARE or end not in (None, share)):
            name += f" share={share:g}" + (f"-{end:g}" if end not in (None, share) else "")
        name += f" in {row['world']}" if row["world"] != self.world else ""
        name += f" as {row['model']}" if row["model"] != self.model else ""
        rates = [field for field in self.apart if row.get(field) is not None and row["recipe"] != "base"]
        name += "".join(f" {field}={row[field]:g}" for field in rates)
        on = row.get("on") or self.main
        return name + (f" on {on}" if row["kind"] in ("general", "text") and self.main not in (None, on) else "")

    def rows(self, kind, name, tokens, benchmark, split=None):
        name = name.removesuffix(f" n={self.group}")
        return self.index.get((kind, name, tokens, benchmark, split or self.split), {})

    def arm(self, name, tokens, metric, split=None):
        """-> {(pre-training seed, seed): {(benchmark, question): value}}; of `base` also its mean, at seed None.

        metric: "pass@8", "accuracy", "loss" (of text), "solved" (any of n right), "in-format@32" (pass@k at the k of which, by
        the row's share, 32 have the format), or "easy+hard pass@1": benchmarks of the same weight. name: "rl {data}" and
        "rl {size}" are rl in the other world and as the other model.
        """
        name = name.format(data=self.data, size=self.size)
        *chosen, what = metric.split()
        kind = {"accuracy": "general", "loss": "text"}.get(what, "pass")
        usual = {"general": self.general, "text": ["text"], "pass": self.benchmarks[:1]}[kind]
        benchmarks = chosen[0].split("+") if chosen else usual
        if name.startswith("base") and "-shot" not in name and kind == "pass":  # the better of its shots
            shots = [n for n in self.names if "-shot" in n and re.sub(r" \d+-shot", "", n) == name]
            levels = {n: e.mean for n in shots if (e := self.level(n, tokens, metric, split))}
            name = max(levels, key=levels.get, default=name)
        found = [self.rows(kind, name, tokens, b, split) for b in benchmarks]
        arm = {}
        for unit in sorted(set.intersection(*map(set, found))) if found else []:
            columns = [self.values(rows[unit], what) for rows in found]
            weights = [sum(map(len, columns)) / len(columns) / len(column) for column in columns]
            arm[unit] = {(b, q): weight * value for b, weight, column in zip(benchmarks, weights, columns, strict=True)
                         for q, value in column.items()}  # fmt: skip
        if not arm:
            raise Missing(f"no rows for {name} at {tokens_name(tokens)}")
        for run in sorted({run for run, _ in arm if name.startswith("base")}):
            same = [values for unit, values in arm.items() if unit[0] == run]
            in_all = set.intersection(*map(set, same))
            shared = [question for question in same[0] if question in in_all]
            arm[run, None] = dict(zip(shared, np.mean([column(a, shared) for a in same], axis=0).tolist(), strict=True))
        return arm

    @staticmethod
    def values(row, what):
        if what in ("flexible@1", "formatted"):  # known as a mean alone
            if what not in row:
                raise Missing(f"no {what}")
            return {what: row[what]}
        if what in ("accuracy", "loss"):
            return dict(enumerate(map(float, row["right" if what == "accuracy" else "losses"])))
        if what.startswith("in-format@"):  # pass@k at the k of which so many have the format, on average
            k = round(int(what.removeprefix("in-format@")) / max(row["formatted"], 1 / row["n"]))
        else:
            k = row["n"] if what == "solved" else int(what.removeprefix("pass@"))
        if row["n"] < k:
            raise Missing(f"no {what} from {row['n']} answers a question")
        return dict(zip(row["ids"], pass_at_k(row["n"], row["correct"], k).tolist(), strict=True))

    def level(self, name, tokens, metric, split=None):
        """-> Estimate of one arm's mean, None without rows."""
        try:
            return estimate(combine([(1, self.arm(name, tokens, metric, split))]))
        except Missing:
            return None

    def curve(self, name, tokens, field, benchmark=None):
        """-> {step: Estimate} over the seeds, of one field of the validations along the runs of an arm.

        The seeds of a pre-training run share its validation questions: the standard error over these, where it is known, is
        added for each run.
        """
        found, errors = {}, {}
        for unit, row in self.rows("curve", name, tokens, benchmark or self.main, "val").items():
            for point in row["points"]:
                if point.get(field) is not None:
                    found.setdefault(point["step"], {})[unit] = {field: point[field]}
                    errors.setdefault(point["step"], []).append((unit[0], point.get(f"se{field.removeprefix('pass')}", 0)))
        points = {step: estimate(cells) for step, cells in sorted(found.items())}
        for step, e in points.items():
            of_runs = [sum(error for r, error in errors[step] if r == run) / len(errors[step]) for run in e.runs]
            points[step] = e._replace(se=sqrt(e.se**2 + sum(error**2 for error in of_runs)))
        return points

    def checkpoints(self, metric, *names, low=0.0, high=1.0):
        """Checkpoints with rows of every arm and base pass@32 within the limits, on val if it has rows there."""
        names = [name.format(data=self.data, size=self.size) for name in names]
        levels = {t: [self.level(name, t, metric) for name in names] for t in self.tokens}
        for name, column in zip(names, zip(*levels.values(), strict=True), strict=True):
            if not any(column):
                self.arm(name, self.tokens[-1], metric)  # says what is missing
        found = [t for t in self.tokens if all(levels[t])]
        if low > 0:
            base = {t: self.level("base", t, "pass@32", "val") or self.level("base", t, "pass@32") for t in found}
            found = [t for t in found if base[t] and low <= base[t].mean <= high]
        if not found:
            raise Missing(f"no checkpoint with {', '.join(names)} and base pass@32 in {low:.0%} to {high:.0%}")
        trained = [i for i, name in enumerate(names) if not name.startswith("base")] or range(len(names))
        seeds = {t: min(levels[t][i].seeds for i in trained) for t in found}
        return [t for t in found if seeds[t] >= min(SEEDS, max(seeds.values()))]

    def cells(self, metric, terms):
        """terms [(weight, arm's name, tokens)] -> cells as of combine."""
        return combine([(weight, self.arm(name, t, metric)) for weight, name, t in terms])

    def gap(self, metric, *terms):
        """-> Estimate of their sum, None without rows."""
        try:
            return estimate(self.cells(metric, terms))
        except Missing:
            return None

    def contrast(self, metric, terms):
        """-> the means of the arms in words, on the seeds and questions that count, and the cells of their sum."""
        means = {}
        for _, name, t in terms:
            mean = estimate(self.cells(metric, [(float((n, u) == (name, t)), n, u) for _, n, u in terms])).mean
            means.setdefault(name.format(data=self.data, size=self.size), {})[t] = 100 * mean
        levels = ", ".join(f"{name} {np.mean([*values.values()]):.1f}" for name, values in means.items())
        tokens = ", ".join(tokens_name(t) for t in sorted({t for *_, t in terms}))
        return f"{levels}; at {tokens}", self.cells(metric, terms)


def tokens_name(tokens):
    return f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"


def minus(first, second, tokens):
    return [(sign / len(tokens), name, t) for t in tokens for sign, name in ((1, first), (-1, second))]


# ---- the nine findings ----
def difference(metric, first, second, which=slice(None), low=0.0):
    """Contrast of two arms, averaged over their checkpoints with base pass@32 of at least `low`, or the one chosen."""
    return lambda r: r.contrast(metric, minus(first, second, r.checkpoints(metric, first, second, low=low)[which]))


def room(r, *names):
    """The checkpoints that decide expansion: room for pass@32 to rise and to fall."""
    return r.checkpoints("pass@32", *names, low=0.3, high=0.8)


def pipeline(r):
    tokens = room(r, "rl", "base", "sft->rl", "sft")
    return r.contrast("pass@32", minus("rl", "base", tokens) + minus("sft", "sft->rl", tokens))


def averaging(r):
    terms, rivals = [], ("rl", "sft", "sft->rl")
    tokens = r.checkpoints("pass@32", "mix", *rivals)
    for t in tokens:
        means = {name: r.level(name, t, "pass@32").mean for name in rivals}
        terms += [(1 / len(tokens), "mix", t), (-1 / len(tokens), max(means, key=means.get), t)]
    return r.contrast("pass@32", terms)


def data_or_size(r):
    level = "hard " if "hard" in r.benchmarks else ""  # the MATH rows are in a folder of their own
    return difference(f"{level}pass@1", "rl {data}", "rl {size}", slice(-1, None))(r)


def splits(r):
    """The benchmarks that have both numbers of rollouts."""
    arms = "rl n=5", "rl n=64"
    return [b for b in r.benchmarks if any(all(r.rows("pass", name, t, b) for name in arms) for t in r.tokens)]


def rollouts(r):
    return difference(f"{'+'.join(splits(r) or r.benchmarks[:1])} pass@1", "rl n=64", "rl n=5")(r)


def early_and_late(r):
    """The middle and the last checkpoint of those with 8 seeds of `rl` in each pre-training run, and the seeds of both."""
    tokens = r.checkpoints("pass@1", "rl", low=0.3)
    runs = {t: Counter(run for run, _ in r.arm("rl", t, "pass@1")) for t in tokens}
    tokens = [t for t in tokens if min(runs[t].values()) >= SEEDS] or tokens
    units = sorted(set(r.arm("rl", tokens[0], "pass@1")) & set(r.arm("rl", tokens[-1], "pass@1")))
    seeds = min(Counter(run for run, _ in units).values(), default=0)
    if len(tokens) < 2 or seeds < SEEDS:
        raise Missing(f"{seeds} seed{'s' * (seeds != 1)} at {min(len(tokens), 2)} of 2 checkpoints, needs {SEEDS}")
    return (tokens[0], tokens[-1]), units


def brittle(r):
    tokens, units = early_and_late(r)
    off, text = [], []
    for t in tokens:  # distances from the median of a pre-training run
        arm = r.arm("rl", t, "pass@1")
        mean = {unit: np.mean(list(arm[unit].values())) for unit in units}
        off.append({u: abs(mean[u] - np.median([mean[v] for v in units if v[0] == u[0]])) for u in units})
        for run in sorted({run for run, _ in units}):
            end = 100 * np.sort([mean[unit] for unit in units if unit[0] == run])
            text.append(f"{tokens_name(t)}, run {run}: {end[0]:.1f} to {end[-1]:.1f}, mean {end.mean():.1f}, "
                        f"best of 4 {best_of_4(end):.1f}")  # fmt: skip
    return "; ".join(text), {unit: {"distance": off[0][unit] - off[1][unit]} for unit in units}


def shots(r):
    counts = [int(found[1]) for name in r.names if (found := re.fullmatch(r"base (\d+)-shot", name))]
    most = max((n for n in counts if any(r.level(f"base {n}-shot", t, "pass@1") for t in r.tokens)), default=0) or 8
    return difference("pass@1", f"base {most}-shot", "base 0-shot", slice(-1, None))(r)


# rule: the primary contrast in words; contrast: Results -> text, cells; secondary: (metric, arm, arm) to be shown
Finding = namedtuple("Finding", "claim kind rule paper contrast secondary", defaults=[()])
FINDINGS = (
    Finding("RL works early", "difference > 0", "pass@1: rl - base at the middle checkpoint",
            "after 4B tokens: 1.8 -> 15.6, 6B: 2.4 -> 19.9", difference("pass@1", "rl", "base", slice(1), low=0.3),
            (("pass@1", "rl", "base"), ("pass@1", "rl", "base 0-shot"), ("flexible@1", "rl", "base"),
             ("pass@1", "rl", "sft"), ("pass@1", "rl", "sft->rl"))),
    Finding("with one solution a question RL beats SFT", "difference > 0",
            "pass@1: rl - sft, mean of the checkpoints from the middle on", "rl - sft: 6B +1.1, 10B +5.3, 44B +17.0",
            difference("pass@1", "rl", "sft", low=0.3),
            (("pass@1", "sft-gold", "rl"), ("pass@8", "sft-gold", "rl"), ("pass@32", "sft-gold", "rl"),
             ("pass@1", "sft-gold->rl", "sft->rl"), ("pass@1", "sft-gold->rl", "rl"))),
    Finding("expansion depends on the pipeline: RL adds more pass@32 to the base than to SFT", "difference > 0",
            "pass@32: (rl - base) - (sft->rl - sft), mean of the checkpoints with base pass@32 in 30 to 80%",
            "10B: +20.5 and -3.1, 44B: +13.1 and -3.5; none of it on MATH", pipeline,
            tuple((metric, *arms) for metric in ("pass@32", "pass@1")
                  for arms in (("rl", "base"), ("rl", "base 0-shot"), ("sft->rl", "sft")))),
    Finding("RL leaves general capability unchanged", "equivalence", "accuracy: rl - base, mean of all checkpoints",
            "44B, six benchmarks: rl +0.4, sft -6.1, sft-gold -7.1", difference("accuracy", "rl", "base"),
            tuple((metric, name, "base") for metric in ("accuracy", "loss") for name in RECIPES[1:])),
    Finding("parallel averaging has the best pass@32 of one solution", "difference > 0",
            "pass@32: mix - the best of rl, sft and sft->rl at each checkpoint, mean of all checkpoints",
            "mix - best: 6B +6.3, 10B +7.2, 44B +3.9; pass@1 below rl", averaging,
            (*(("pass@32", "mix", name) for name in ("rl", "sft", "sft->rl")), ("pass@1", "mix", "rl"))),
    Finding("hard questions: more math in the text beats a larger model", "difference > 0",
            "hard pass@1: rl in the world with more math - rl as the larger model, last checkpoint of both",
            "no figures; 44B on MATH: base 1, rl 10, sft 21, sft->rl 33", data_or_size,
            (*((f"hard pass@{k}", f"{recipe} {{{other}}}", recipe) for recipe in ("rl", "base")
               for other in ("data", "size") for k in (1, 32)),
             ("hard pass@1", "rl", "base"), ("hard pass@1", "sft->rl", "rl"), ("hard pass@32", "sft->rl", "sft"))),
    Finding("64 and 5 rollouts end at the same place", "equivalence",
            "pass@1: rl n=64 - rl n=5, mean of benchmarks and checkpoints that have both", "no figures", rollouts,
            tuple((f"{split}{level} pass@{k}", "rl n=64", "rl n=5") for split in ("split-", "") for level in ("easy", "hard")
                  for k in (1, 32))),
    Finding("early RL is brittle", "difference > 0",
            "pass@1 of rl: distance of a seed from the median seed, at the middle checkpoint - at the last; 8 seeds a run",
            "two seeds at 4 to 10B: 15 and 4; best of 4 reported", brittle),
    Finding("shots in the prompt measure the base best", "difference > 0",
            "pass@1: base with the most shots there are - base 0-shot, last checkpoint; replicates are draws of the shots",
            "8 shots; 0-shot falls behind from 28B on", shots,
            tuple((f"pass@{k}", f"base {n}-shot", "base 0-shot") for n in (1, 2, 3, 4, 8) for k in (1, 32))),
)  # fmt: skip


Verdict = namedtuple("Verdict", "verdict reason text estimate p holm")


def decide(r, findings=FINDINGS, seeds=SEEDS, pooled=False):
    """-> {"1": Verdict, ...}: holds, contradicted, not resolved, or not tested and the reason: no rows, fewer than `seeds`.

    pooled: what would be said with S - 1 degrees of freedom over all seeds, where the difference between pre-training runs
    is in the interval.
    """
    outcomes = []
    for finding in findings:
        try:
            text, cells = finding.contrast(r)
            e = estimate(cells, pooled)
            few = f"{e.seeds} seed{'s' * (e.seeds != 1)}, needs {seeds}" if e.seeds < seeds or not e.df else ""
            outcomes.append((few, text, e, 1.0 if few else p_value(finding.kind, e)))
        except Missing as missing:
            outcomes.append((str(missing), "", None, 1.0))
    verdicts = {}
    for number, (reason, text, e, p) in enumerate(outcomes):
        adjusted = holm([outcome[-1] for outcome in outcomes])[number]
        sign = MARGIN - abs(e.mean) if e and findings[number].kind == "equivalence" else e.mean if e else 0
        verdict = "not resolved" if adjusted >= 0.05 else "holds" if sign > 0 else "contradicted"
        verdicts[str(number + 1)] = Verdict("not tested" if reason else verdict, reason, text, e, p, adjusted)
    return verdicts


# ---- the sweep ----
def choose(levels):
    """{setting: validation pass@1} -> the setting of a recipe that the records run with: the highest."""
    return max(levels, key=levels.get)


def sweep(folder):
    """Validation rows of arms that differ in learning rate -> Results, whose arms are named "rl lr=0.0003"."""
    rows = read(folder, RATES)[0]
    if tested := next((row["checkpoint"] for row in rows if row["split"] == "test"), None):
        raise ValueError(f"{folder} has test rows of {tested}: settings are chosen on validation questions, take them out")
    return Results(rows, RATES)


def is_sweep(folder):
    """Are there validation rows alone, and of one arm and seed with several learning rates?"""
    rows, rates = read(folder, RATES)[0], {}
    for row in rows:
        arm = tuple(row.get(field) for field in (*KEY, *ARM))
        rates.setdefault(arm, set()).add(tuple(row.get(field) for field in RATES))
    return {row["split"] for row in rows} == {"val"} and max(map(len, rates.values())) > 1


# ---- the report ----
Record = namedtuple("Record", "results verdicts torn pictures")


def report(folder, json=False):
    """Writes report.md and its figures and prints the findings; -> {"1": Verdict, ...}, of record 1.

    A folder of rows is one record, or a sweep, which has a table and no findings. A folder with record-1, record-2, ... has as
    many, each with a report of its own by its own rows, and report.md beside them has them side by side, and what is in
    sweep/, sweep-again/, why/ and why-many/ (OTHERS); so have the marked blocks of README.md and RESULTS.md in the folder above.
    ValueError: rows that cannot be read, a block that nobody knows.
    """
    from data import figures, tables  # here: matplotlib takes a second that no trainer should wait for
    folder = Path(folder)
    found = sorted(path for path in folder.glob("record-[1-9]") if path.is_dir())
    marked = [folder.resolve().parent / name for name in ("README.md", "RESULTS.md")] if found else []
    marked, records = {path: tables.marks(path) for path in marked if path.exists()}, {}
    if not found and is_sweep(folder):
        text = tables.sweep_table(sweep(folder))
        (folder / "report.md").write_text(f"# Sweep, on validation questions\n\n{text}")
        print(text, end="")
        return {}
    for path in found or [folder]:
        rows, torn = read(path)
        r = Results(rows)
        record = records[path.name] = Record(r, decide(r), torn, figures.draw(r, path))
        (path / "report.md").write_text(tables.page(record))
        print("\n".join([path.name] * bool(found) + torn + tables.lines(record.verdicts)))
    if found:
        there = [name for name in OTHERS if (folder / name).is_dir()]
        others = {name: sweep(folder / name) if name.startswith("sweep") else Results(read(folder / name)[0]) for name in there}
        if "why-many" in others:
            figures.draw_many(others["why-many"], folder / "why-many")
        if "why" in others:
            figures.draw_questions(others["why"], folder / "why")
        blocks = tables.blocks(records, others)
        (folder / "report.md").write_text(tables.side_by_side(records, blocks))
        for path, text in marked.items():
            tables.fill(path, text, blocks)
    first, *more = [{n: verdict.verdict for n, verdict in record.verdicts.items()} for record in records.values()]
    if json:
        print(dumps({"findings": first, **dict(zip([*records][1:], more, strict=True))}))
    return records[next(iter(records))].verdicts
