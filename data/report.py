"""Result rows -> report.md with tables and figures, and a verdict on each of the nine findings by rules fixed here.

A replicate is a training seed. An arm has a name: "rl", "base 8-shot", "rl n=64", "mix share=0.25", "rl in toy-math60"
(another world), "rl as wide" (another model). Shares inside, percent in print.
"""

from collections import Counter, namedtuple
from functools import cache
from json import dumps, loads
from math import atan, comb, exp, lgamma, pi, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECIPES = ("base", "rl", "sft", "sft->rl", "mix", "sft-gold", "sft-gold->rl")
ROLLOUTS = (5, 64)  # rows with one of these as "group" are arms of their own (finding 7); any other is the usual one
SHARE = 0.5  # so are rows with a "share" that is not this one
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)  # for the tail of Student's t
MARGIN = 0.02  # "unchanged" and "the same" mean within 2 points
RULES = """Fixed before the run: one primary contrast a finding, paired on the same questions and seeds. SE^2 =
var(seed means)/S + var(question means)/Q; t with S - 1 degrees of freedom. With 2 or 3 pre-training seeds the variance
is taken within each (S - 2 or S - 3) and the interval is about these runs; from 4 on they are the replicates. p:
two-sided for a difference, of two one-sided tests for an equivalence; Holm over the nine, not tested is p = 1. A
difference holds if p (Holm) < 0.05 with the claim's sign, is contradicted with the other. An equivalence holds if its
90% interval lies inside +-2 points, contradicted if outside (either is p < 0.05), and Holm agrees. Brackets: 95%, or
90% for an equivalence, before Holm. `base`: the better of its shots, so that learning the format counts little. An arm
is the end of its run. Middle checkpoint: the first with base pass@32 >= 30%, on validation if it has rows."""


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


def estimate(cells):
    """{(pre-training seed, seed): {question: value}} -> Estimate of the mean, on the questions that all seeds share."""
    units, questions = sorted(cells), sorted(set.intersection(*map(set, cells.values())), key=str)
    values = np.array([[cells[unit][question] for question in questions] for unit in units])  # (S, Q)
    run = np.array([pretrain_seed for pretrain_seed, _ in units])
    runs = {int(r): values[run == r].mean(0) for r in np.unique(run)}
    if len(runs) >= 4:  # enough pre-training runs to be the replicates
        values, run = np.stack(list(runs.values())), np.zeros(len(runs))
    (S, Q), means, df = values.shape, values.mean(1), len(values) - len(np.unique(run))
    spread = sum(((means[run == r] - means[run == r].mean()) ** 2).sum() for r in np.unique(run))
    se = sqrt((spread / df / S if df else 0) + standard_error(values.mean(0)) ** 2)
    return Estimate(float(means.mean()), se, df, S, Q, {r: float(value.mean()) for r, value in runs.items()})


def p_value(kind, e):
    if kind == "difference > 0":
        return 2 * t_tail(abs(e.mean) / max(e.se, 1e-12), e.df)
    inside = t_tail((MARGIN - abs(e.mean)) / max(e.se, 1e-12), e.df)  # the larger of the two one-sided p-values
    return min(inside, 1 - inside)


# ---- rows ----
NEEDS = {"pass": ("benchmark", "shots", "n", "ids", "correct"), "general": ("benchmark", "right"), "curve": ("points",)}
KEY = ("kind", "world", "model", "recipe", "tokens", "pretrain_seed", "seed", "step", "split")


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


def read(folder):
    """-> rows under the folder by step, the last one of each key, and the torn last lines skipped. Else ValueError."""
    rows, torn = {}, []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")  # a whole file ends in a newline: its last piece is empty
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    row = parse(line)
                    key = tuple(row.get(field) for field in (*KEY, "benchmark", "shots", "group", "share"))
                    if rows.setdefault(key, row)["config_hash"] != row["config_hash"]:
                        raise ValueError(f"{row['checkpoint']} and {rows[key]['checkpoint']} are two runs of one arm and seed")
                    rows[key] = row
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"{path}:{number}: {error}") from error
                torn.append(f"{path}:{number}: torn last line skipped, its row is missing here")
    if not rows:
        raise ValueError(f"no result rows under {folder}: run eval.py first")
    return sorted(rows.values(), key=lambda row: row["step"]), torn


def combine(terms):
    """Sum of weight * arm on the seeds and questions they share; `base` serves every seed of its pre-training run."""
    arms = [arm for _, arm in terms]
    trained = [arm for arm in arms if all(seed is not None for _, seed in arm)] or arms
    cells = {}
    for run, seed in set.intersection(*map(set, trained)):
        values = [arm.get((run, seed), arm.get((run, None))) for arm in arms]
        if seed is not None and None not in values:
            shared = set.intersection(*map(set, values))
            cells[run, seed] = {q: sum(w * v[q] for (w, _), v in zip(terms, values, strict=True)) for q in shared}
    if not cells or not set.intersection(*map(set, cells.values())):
        raise Missing("no seed with the same questions in all arms")
    return cells


class Results:
    """The rows of a folder by arm. The main world and model are those with the most rows."""

    def __init__(self, rows):
        counts = Counter((row["world"], row["model"]) for row in rows)
        self.world, self.model = max(sorted(counts), key=counts.get)
        self.split = "test" if any(row["split"] == "test" for row in rows if row["kind"] != "curve") else "val"
        self.tokens = sorted({row["tokens"] for row in rows})
        self.arm, self.level = cache(self.arm), cache(self.level)  # tables and figures ask again and again
        groups = Counter(row["group"] for row in rows if row["recipe"] == "rl" and row.get("group"))
        self.group = max(sorted(groups), key=groups.get, default=None)  # the usual one
        self.index = {}  # (kind, arm, tokens, benchmark, split) -> {(pre-training seed, seed): row}, the last step
        for row in rows:
            key = row["kind"], self.name(row), row["tokens"], row.get("benchmark"), row["split"]
            self.index.setdefault(key, {})[row["pretrain_seed"], row["seed"]] = row
        self.benchmarks = sorted({key[3] for key in self.index if key[0] == "pass"})  # the first one is the main one
        self.general = sorted({key[3] for key in self.index if key[0] == "general"})
        names = {key[1]: key[1].split()[0] for key in self.index}
        self.names = sorted(names, key=lambda name: ((*RECIPES, names[name]).index(names[name]), name))

    def name(self, row):
        name = row["recipe"]
        name += f" {row['shots']}-shot" if row["kind"] == "pass" and (name == "base" or row["shots"]) else ""
        name += f" n={row['group']}" if row.get("group") in ROLLOUTS and row["group"] != self.group else ""
        name += f" share={row['share']}" if row.get("share") not in (None, SHARE) else ""
        name += f" in {row['world']}" if row["world"] != self.world else ""
        return name + (f" as {row['model']}" if row["model"] != self.model else "")

    def rows(self, kind, name, tokens, benchmark, split=None):
        name = name.removesuffix(f" n={self.group}")
        return self.index.get((kind, name, tokens, benchmark, split or self.split), {})

    def arm(self, name, tokens, metric, split=None):
        """-> {(pre-training seed, seed): {(benchmark, question): value}}; of `base` also its mean, at seed None.

        metric: "pass@8", "accuracy", "solved" (any of n right), or "easy+hard pass@1": benchmarks of the same weight.
        """
        *chosen, what = metric.split()
        kind = "general" if what == "accuracy" else "pass"
        benchmarks = chosen[0].split("+") if chosen else self.general if kind == "general" else self.benchmarks[:1]
        if name == "base" and kind == "pass":  # the better of its shots
            shots = [n for n in self.names if n.startswith("base ") and n.endswith("-shot")]
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
        for run in {run for run, _ in arm if name.startswith("base")}:
            same = [values for unit, values in arm.items() if unit[0] == run]
            arm[run, None] = {q: sum(a[q] for a in same) / len(same) for q in set.intersection(*map(set, same))}
        return arm

    @staticmethod
    def values(row, what):
        if what == "accuracy":
            return dict(enumerate(map(float, row["right"])))
        k = row["n"] if what == "solved" else int(what.removeprefix("pass@"))
        if row["n"] < k:
            raise Missing(f"no {what} from {row['n']} answers a question")
        return dict(zip(row["ids"], pass_at_k(row["n"], row["correct"], k).tolist(), strict=True))

    def level(self, name, tokens, metric, split=None):
        """-> Estimate of one arm's mean, None if it has no rows."""
        try:
            return estimate(combine([(1, self.arm(name, tokens, metric, split))]))
        except Missing:
            return None

    def checkpoints(self, metric, *names, low=0.0, high=1.0):
        """Checkpoints with rows of every arm and base pass@32 within the limits, on val if it has rows there."""
        found = [t for t in self.tokens if all(self.level(name, t, metric) for name in names)]
        for name in names:
            if not any(self.level(name, t, metric) for t in self.tokens):
                self.arm(name, self.tokens[-1], metric)  # says what is missing
        if low > 0:
            base = {t: self.level("base", t, "pass@32", "val") or self.level("base", t, "pass@32") for t in found}
            found = [t for t in found if base[t] and low <= base[t].mean <= high]
        if not found:
            raise Missing(f"no checkpoint with {', '.join(names)} and base pass@32 in {low:.0%} to {high:.0%}")
        return found

    def contrast(self, metric, terms):
        """terms [(weight, arm's name, tokens)] -> the means of the arms in words, cells as of combine."""
        cells, means = combine([(weight, self.arm(name, t, metric)) for weight, name, t in terms]), {}
        for _, name, t in terms:
            means.setdefault(name, []).append(100 * self.level(name, t, metric).mean)
        levels = ", ".join(f"{name} {np.mean(values):.1f}" for name, values in means.items())
        return f"{levels}; at {', '.join(tokens_name(t) for t in sorted({t for *_, t in terms}))}", cells


def tokens_name(tokens):
    return f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"


def minus(first, second, tokens):
    return [(sign / len(tokens), name, t) for t in tokens for sign, name in ((1, first), (-1, second))]


# ---- the nine findings ----
def difference(metric, first, second, which=slice(None), low=0.0):
    """Contrast of two arms, averaged over their checkpoints with base pass@32 of at least `low`, or the one chosen."""
    return lambda r: r.contrast(metric, minus(first, second, r.checkpoints(metric, first, second, low=low)[which]))


def pipeline(r):
    room = r.checkpoints("pass@32", "rl", "base", "sft->rl", "sft", low=0.3, high=0.8)
    return r.contrast("pass@32", minus("rl", "base", room) + minus("sft", "sft->rl", room))


def averaging(r):
    terms, rivals = [], ("rl", "sft", "sft->rl")
    tokens = r.checkpoints("pass@32", "mix", *rivals)
    for t in tokens:
        means = {name: r.level(name, t, "pass@32").mean for name in rivals}
        terms += [(1 / len(tokens), "mix", t), (-1 / len(tokens), max(means, key=means.get), t)]
    return r.contrast("pass@32", terms)


def data_or_size(r):
    arms = [next((n for n in r.names if n.startswith(f"rl {other[:2]} ") and n.count(" ") == 2), f"rl {other}")
            for other in ("in another world", "as another model")]  # fmt: skip
    level = "hard " if "hard" in r.benchmarks else ""  # the MATH rows are in a folder of their own
    return difference(f"{level}pass@1", *arms, slice(-1, None))(r)


def rollouts(r):
    arms = "rl n=64", "rl n=5"
    both = [b for b in r.benchmarks if any(all(r.rows("pass", name, t, b) for name in arms) for t in r.tokens)]
    return difference(f"{'+'.join(both or r.benchmarks[:1])} pass@1", *arms)(r)


def brittle(r):
    tokens, off, text = r.checkpoints("pass@1", "rl", low=0.3), [], []
    arms = [combine([(1, r.arm("rl", t, "pass@1"))]) for t in (tokens[0], tokens[-1])]
    units = sorted(set(arms[0]) & set(arms[1]))
    seeds = min(Counter(run for run, _ in units).values(), default=0)
    if len(tokens) < 2 or seeds < 8:
        raise Missing(f"{seeds} seed{'s' * (seeds != 1)} at {min(len(tokens), 2)} of 2 checkpoints, needs 8")
    for t, arm in zip((tokens[0], tokens[-1]), arms, strict=True):  # distances from the median of a pre-training run
        mean = {unit: np.mean(list(arm[unit].values())) for unit in units}
        off.append({u: abs(mean[u] - np.median([mean[v] for v in units if v[0] == u[0]])) for u in units})
        end = 100 * np.sort([*mean.values()])
        best = end @ [comb(i, 3) for i in range(len(end))] / comb(len(end), 4)  # of 4 drawn at random
        text.append(f"{tokens_name(t)}: mean {end.mean():.1f}, {end[0]:.1f} to {end[-1]:.1f}, best of 4 {best:.1f}")
    return "; ".join(text), {unit: {"distance": off[0][unit] - off[1][unit]} for unit in units}


# rule: the primary contrast in words; contrast: Results -> text, cells; secondary: (metric, arm, arm) to be shown
Finding = namedtuple("Finding", "claim kind rule paper contrast secondary", defaults=[()])
FINDINGS = (
    Finding("RL works early", "difference > 0", "pass@1: rl - base at the middle checkpoint",
            "4B: 1.8 -> 15.6, 6B: 2.4 -> 19.9", difference("pass@1", "rl", "base", slice(1), low=0.3),
            (("pass@1", "rl", "base 0-shot"), ("pass@1", "rl", "sft"), ("pass@1", "rl", "sft->rl"))),
    Finding("with one solution a question RL beats SFT", "difference > 0",
            "pass@1: rl - sft, mean of the checkpoints from the middle on", "rl - sft: 6B +1.1, 10B +5.3, 44B +17.0",
            difference("pass@1", "rl", "sft", low=0.3),
            (("pass@8", "sft-gold", "rl"), ("pass@32", "sft-gold", "rl"), ("pass@1", "sft-gold->rl", "sft->rl"))),
    Finding("RL expands, after SFT it sharpens", "difference > 0",
            "pass@32: (rl - base) - (sft->rl - sft), mean of the checkpoints with base pass@32 in 30 to 80%",
            "10B: +20.5 and -3.1, 44B: +13.1 and -3.5; the rise of rl is at its start; none of it on MATH", pipeline,
            (("pass@1", "rl", "base"), ("pass@32", "rl", "base"), ("pass@32", "rl", "base 0-shot"),
             ("pass@1", "sft->rl", "sft"), ("pass@32", "sft->rl", "sft"))),
    Finding("RL leaves general capability unchanged", "equivalence", "accuracy: rl - base, mean of all checkpoints",
            "44B, six benchmarks: rl +0.4, sft -6.1, sft-gold -7.1", difference("accuracy", "rl", "base"),
            tuple(("accuracy", name, "base") for name in RECIPES[1:])),
    Finding("parallel averaging has the best pass@32 of one solution", "difference > 0",
            "pass@32: mix - the best of rl, sft and sft->rl at each checkpoint, mean of all checkpoints",
            "mix - best: 6B +6.3, 10B +7.2, 44B +3.9; pass@1 below rl", averaging,
            (*(("pass@32", "mix", name) for name in ("rl", "sft", "sft->rl")), ("pass@1", "mix", "rl"))),
    Finding("hard questions: more math in the text beats a larger model", "difference > 0",
            "hard pass@1: rl in the world with more math - rl as the larger model, last checkpoint of both",
            "no figures; 44B on MATH: base 1, rl 10, sft 21, sft->rl 33", data_or_size,
            (("hard pass@1", "rl", "base"), ("hard pass@1", "sft->rl", "rl"), ("hard pass@32", "sft->rl", "sft"))),
    Finding("64 and 5 rollouts end at the same place", "equivalence",
            "pass@1: rl n=64 - rl n=5, mean of benchmarks and checkpoints that have both", "no figures", rollouts,
            (("easy pass@1", "rl n=64", "rl n=5"), ("hard pass@1", "rl n=64", "rl n=5"))),
    Finding("early RL is brittle", "difference > 0",
            "pass@1 of rl: distance of a seed from the median seed, at the middle checkpoint - at the last; 8 seeds",
            "two seeds at 4 to 10B: 15 and 4; best of 4 reported", brittle),
    Finding("8 shots measure the base best", "difference > 0", "pass@1: base 8-shot - base 0-shot, last checkpoint",
            "0-shot falls behind from 28B on", difference("pass@1", "base 8-shot", "base 0-shot", slice(-1, None)),
            (("pass@1", "base 8-shot", "base 0-shot"), ("pass@32", "base 8-shot", "base 0-shot"))),
)  # fmt: skip


Verdict = namedtuple("Verdict", "verdict reason text estimate p holm")


def decide(r, findings=FINDINGS):
    """-> {"1": Verdict, ...}: holds, contradicted, not resolved, or not tested and the reason."""
    outcomes = []
    for finding in findings:
        try:
            text, cells = finding.contrast(r)
            e = estimate(cells)
            outcomes.append(("" if e.df else "1 seed", text, e, p_value(finding.kind, e) if e.df else 1.0))
        except Missing as missing:
            outcomes.append((str(missing), "", None, 1.0))
    verdicts = {}
    for number, (reason, text, e, p) in enumerate(outcomes):
        adjusted = holm([outcome[-1] for outcome in outcomes])[number]
        sign = MARGIN - abs(e.mean) if e and findings[number].kind == "equivalence" else e.mean if e else 0
        verdict = "not resolved" if adjusted >= 0.05 else "holds" if sign > 0 else "contradicted"
        verdicts[str(number + 1)] = Verdict("not tested" if reason else verdict, reason, text, e, p, adjusted)
    return verdicts


def report(folder, json=False):
    """Writes report.md and its figures into the folder and prints the findings; -> {"1": Verdict, ...}."""
    from data import figures  # here: matplotlib takes a second that no trainer should wait for
    rows, torn = read(folder)
    r = Results(rows)
    verdicts = decide(r)
    Path(folder, "report.md").write_text(figures.page(r, verdicts, torn, figures.draw(r, Path(folder))))
    print("\n".join(torn + figures.lines(verdicts)))
    if json:
        print(dumps({"findings": {number: verdict.verdict for number, verdict in verdicts.items()}}))
    return verdicts
