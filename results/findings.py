"""What is claimed, each claim as a region for one or more differences, and the rules of a verdict.

Fixed before the first row of record 3, but for what results/record-3/protocol.md lists. A claim
holds if each of its differences lies inside its region, and is contradicted if one lies outside:

    RL beats SFT                  0 < rl - sft                      in pass@1
    RL leaves capability as it is -2 < rl - base < 2                in accuracy, and so on

A replicate is a model: a pre-training run of its own text, questions and seed. The one-sided
p-value of a claim is the largest of its differences' (all have to lie inside), that of its
contradiction the smallest times their number; twice the smaller one goes into Holm's correction
over all claims. So a single difference decides by its interval of 95%: inside or outside.

"Early" is the first checkpoint with base pass@32 of at least 20% on validation questions, and
"from early on" the mean from there. `base` has the number of solved examples ("shots") that scores
best on validation questions. An arm is the end of its run, after as many steps in every model. An
arm with RL has to have converged: over models, the upper end of the one-sided 95% interval of (mean
validation pass@1 of the last 100 steps - that of the 100 before) is below 2 points. Otherwise the
claim is not tested.
"""

import math
from typing import NamedTuple

from results.rows import BEST, Arm, Missing, minus, tokens_name
from results.stats import Estimate, chances, estimate, holm, of_models, outcome, spread

MODELS = 8  # what a verdict rests on
SEEDS = 8  # of one model, where the claim is about seeds
SPREAD = 0.0275  # standard deviation of seeds: 2 points from the median in the mean, if normal
MARGIN = 0.02  # "the same" and "unchanged": within 2 points
LOSS_MARGIN = 0.02  # nats per token
STEPS = 100  # of RL, that its convergence is judged by
BASE, BARE = Arm("base", BEST), Arm("base")
RL, SFT, SFT_RL, MIX = Arm("rl"), Arm("sft"), Arm("sft->rl"), Arm("mix")
INFINITE = math.inf


class Part(NamedTuple):
    """A difference of a claim, and where the claim says that it lies."""

    name: str
    estimate: Estimate
    low: float
    high: float
    tokens: list  # checkpoints that it is a mean of
    used: list  # (arm, tokens, question set) that have to have converged
    chances: tuple  # p-values that it lies inside, outside


def early(r) -> int:
    """The first checkpoint at which the base solves a fifth of the questions in 32 tries."""
    for t in r.tokens:
        e = r.level(BASE, t, "pass@32", split="val") or r.level(BASE, t, "pass@32")
        if e and e.mean >= 0.2:
            return t
    raise Missing("no checkpoint with base pass@32 of 20%")


def from_early_on(r) -> list[int]:
    return [t for t in r.tokens if t >= early(r)]


def part(r, metric, first, second, tokens, low=0.0, high=INFINITE, asked=""):
    """first - second, the mean of those checkpoints at which both have rows."""
    both = [t for t in tokens if r.gap(metric, first, second, t, asked)]
    if not both:
        for arm in (first, second):
            r.values(arm, tokens[-1], metric, asked)  # says what is missing
        raise Missing(f"{first} and {second} share no checkpoint")
    cells = r.cells(metric, minus(first, second, both), asked)
    used = [(arm, t, asked) for arm in (first, second) for t in both]
    name = f"{first} - {second}, {asked and asked + ' '}{metric}"
    e = estimate(cells)
    return Part(name, e, low, high, both, used, chances(e, low, high))


def unchanged(r, arm, other, tokens):
    """What a model can do beside the questions, by three measures."""
    return [
        part(r, "accuracy", arm, other, tokens, -MARGIN, MARGIN),
        part(r, "probability", arm, other, tokens, -MARGIN, MARGIN),
        part(r, "loss", arm, other, tokens, -LOSS_MARGIN, LOSS_MARGIN),
    ]


def best_of_one_solution(r, metrics, low=0.0, size=""):
    """mix against each of its rivals: it is the best if it is above all of them."""
    names = [arm.recipe.replace("->", f"{size}->") + size for arm in (MIX, RL, SFT, SFT_RL)]
    mix, *rivals = map(Arm, names)  # with a size also sft-1600-questions->rl-1600-questions
    tokens = from_early_on(r)
    return [part(r, m, mix, rival, tokens, low) for m in metrics for rival in rivals]


def data_or_size(r):
    more_math, larger = Arm("rl", world=r.another[0]), Arm("rl", model=r.another[1])
    asked = "hard" if "hard" in r.benchmarks else ""  # MATH rows are in a folder of their own
    return [part(r, "pass@1", more_math, larger, r.tokens[-1:], asked=asked)]


def rollouts(r):
    many, few = r.with_rollouts(64), r.with_rollouts(5)
    asked = [a for a in r.benchmarks if any(r.gap("pass@1", many, few, t, a) for t in r.tokens)]
    if not asked:
        raise Missing("no rows of 64 and of 5 answers per question")
    return [part(r, "pass@1", many, few, r.tokens, -MARGIN, MARGIN, a) for a in asked]


def brittle(r):
    """The standard deviation of the seeds of a model, pooled over the models that have eight of
    them, at the earliest checkpoint with two such models. It speaks for these models alone; its
    p-values are of the chi-square distribution, as if seeds were normal."""
    for t in r.tokens:
        ends = r.level(RL, t, "pass@1") and r.values(RL, t, "pass@1").mean()
        many = [] if ends is None else [g for _, g in ends.groupby(level=0) if len(g) >= SEEDS]
        if len(many) > 1:
            e, p = spread([g.to_numpy() for g in many], [g.index[0][0] for g in many], SPREAD)
            name = "standard deviation of the seeds of a model, pass@1"
            return [Part(name, e, SPREAD, INFINITE, [t], [(RL, t, "")], p)]
    raise Missing(f"needs two models with {SEEDS} seeds of rl")


def shots(r):
    counts = [arm.shots for arm in r.arms if arm == BARE._replace(shots=arm.shots)]
    most = BARE._replace(shots=max(counts, default=0) or 8)
    return [part(r, "pass@1", most, BARE, r.tokens[-1:])]


class Finding(NamedTuple):
    number: str
    claim: str
    paper: str  # its numbers, or "abstract"
    contrast: object  # Record -> [Part, ...]; raises Missing
    earlier: str = ""  # records 1 and 2, with RL stopped at 60 steps


SIZE = "-1600-questions"
FINDINGS = (
    Finding(
        "1", "RL works early", "after 4B tokens: 1.8 -> 15.6, 6B: 2.4 -> 19.9",
        lambda r: [part(r, "pass@1", RL, BASE, [early(r)])],
        "holds, at the middle checkpoint",
    ),
    Finding(
        "1f", "RL works early, in any format", "no figures",
        lambda r: [part(r, "flexible@1", RL, BASE, [early(r)])],
    ),
    Finding(
        "2", "with one solution a question RL beats SFT, 400 questions",
        "rl - sft: 6B +1.1, 10B +5.3, 44B +17.0",
        lambda r: [part(r, "pass@1", RL, SFT, from_early_on(r))],
        "contradicted",
    ),
    Finding(
        "2q", "the same, 1,600 questions, middle and last checkpoint", "no figures",
        lambda r: [part(r, "pass@1", Arm("rl" + SIZE), Arm("sft" + SIZE), from_early_on(r))],
    ),
    Finding(
        "3s", "RL after SFT sharpens: it lowers pass@32", "10B: -3.1, 44B: -3.5; not on MATH",
        lambda r: [part(r, "pass@32", SFT_RL, SFT, from_early_on(r), -INFINITE, 0.0)],
        "12 of 12 pairs of model and checkpoint",
    ),
    Finding(
        "3e", "RL from the base expands: pass@k rises, 32 answers in the format each",
        "pass@32, 10B: +20.5, 44B: +13.1",
        lambda r: [part(r, "32 in format", RL, BASE, from_early_on(r))],
        "not shown",
    ),
    Finding(
        "4", "RL leaves general capability unchanged: accuracy, probability, text loss",
        "44B, accuracy of six benchmarks: +0.4",
        lambda r: unchanged(r, RL, BASE, from_early_on(r)),
        "holds, accuracy alone",
    ),
    Finding(
        "5", "parallel averaging has the best pass@32 of one solution, 400 questions",
        "mix - best: 6B +6.3, 10B +7.2, 44B +3.9",
        lambda r: best_of_one_solution(r, ["pass@32"]),
        "not resolved",
    ),
    Finding(
        "5q", "the same, 1,600 questions, middle and last checkpoint", "no figures",
        lambda r: best_of_one_solution(r, ["pass@32"], size=SIZE),
    ),
    Finding(
        "6", "hard questions: more math in the text beats a larger model", "no figures",
        data_or_size,
        "holds",
    ),
    Finding(
        "7", "64 and 5 rollouts end at the same place", "no figures",
        rollouts,
        "contradicted, at equal answers",
    ),
    Finding(
        "8", "early RL is brittle: seeds of a model have a standard deviation above 2.75 points",
        "two seeds at 4 to 10B: 15 and 4",
        brittle,
        "not resolved, another rule",
    ),
    Finding(
        "9", "shots in the prompt measure the base best", "0-shot falls behind from 28B on",
        shots,
        "holds",
    ),
    Finding(
        "A1", "RL matches SFT->RL early: at most 2 points below", "from 20B on",
        lambda r: [part(r, "pass@1", RL, SFT_RL, [early(r)], -MARGIN)],
    ),
    Finding(
        "A2", "RL sharpens only where it follows SFT: it lowers pass@32 there, and from the base, "
        "at 32 answers in the format, by less than 2 points", "10B: -3.1 and +20.5",
        lambda r: [
            part(r, "pass@32", SFT_RL, SFT, from_early_on(r), -INFINITE, 0.0),
            part(r, "32 in format", RL, BASE, from_early_on(r), -MARGIN),
        ],
    ),
    Finding(
        "A3", "accuracy of the tasks falls after SFT, and by less than 2 points after RL",
        "44B, accuracy of six benchmarks: sft -6.1, rl +0.4",
        lambda r: [
            part(r, "accuracy", SFT, BASE, from_early_on(r), -INFINITE, 0.0),
            part(r, "accuracy", SFT, RL, from_early_on(r), -INFINITE, 0.0),
            part(r, "accuracy", RL, BASE, from_early_on(r), -MARGIN),
        ],
    ),
    Finding(
        "A4", "parallel averaging is the best at every k, and at most 2 points below in accuracy",
        "44B: pass@1 47.9, below rl 54.8",
        lambda r: [
            *best_of_one_solution(r, ["pass@1", "pass@8", "pass@32"]),
            *best_of_one_solution(r, ["accuracy"], -MARGIN),
        ],
    ),
)  # fmt: skip


class Verdict(NamedTuple):
    verdict: str  # holds, contradicted, not resolved, or not tested
    reason: str  # why it is not tested, else ""
    parts: list  # [Part, ...]
    p: float
    holm: float


def gain(r, arm, tokens, asked="") -> Estimate:
    """Validation pass@1 of the last STEPS steps less that of the STEPS before, over models (over
    runs, where there are fewer than four models)."""
    gains = {}
    for run, points in r.validations(arm, tokens, asked).items():
        end = max(points, default=0)
        last = [x for step, x in points.items() if end - STEPS < step]
        before = [x for step, x in points.items() if end - 2 * STEPS < step <= end - STEPS]
        if last and before:
            gains[run] = sum(last) / len(last) - sum(before) / len(before)
    if not gains:
        raise Missing(f"{arm} at {tokens_name(tokens)}: no {2 * STEPS} steps with validations")
    models = {}
    for (run, _), x in gains.items():
        models.setdefault(run, []).append(x)
    means = {run: sum(xs) / len(xs) for run, xs in models.items()}
    return of_models(means if len(means) >= 4 else gains)


def trains_by_rl(arm) -> bool:
    return arm.recipe.rpartition(">")[2].startswith(("rl", "mix"))  # its last stage


def unready(r, parts, waived=False) -> str:
    """Why a claim is not tested: too few models, or RL that has not converged; "" if it is.

    waived: RL counts as converged, as it stands.
    """
    for p in parts:
        e = p.estimate
        if e.df < MODELS - 1:
            return f"{len(e.runs)} model{'s' * (len(e.runs) > 1)}, needs {MODELS}"
        for arm, tokens, asked in p.used:
            if trains_by_rl(arm):
                steps = {row["step"] for row in r.rows("curve", arm, tokens, asked, split="val")}
                if len(steps) > 1:
                    return f"{arm} at {tokens_name(tokens)} has runs of {sorted(steps)} steps"
                if waived:
                    continue
                try:
                    g = gain(r, arm, tokens, asked)
                except Missing as missing:  # the differences are known, and are shown
                    return str(missing)
                if g.mean + g.half(0.9) >= MARGIN:  # the upper end of a one-sided interval of 95%
                    return f"{arm} at {tokens_name(tokens)} has not converged"
    return ""


def decide(r, findings=FINDINGS, waived=False) -> dict[str, Verdict]:
    """The verdict on each claim, by its number; waived: without the rule of convergence."""
    found = {}
    for finding in findings:
        try:
            parts = finding.contrast(r)
        except Missing as missing:
            parts, reason = [], str(missing)
        else:
            reason = unready(r, parts, waived)
        inside, outside = (1.0, 1.0) if reason else outcome([p.chances for p in parts])
        word = "not tested" if reason else "holds" if inside < outside else "contradicted"
        p = min(1.0, 2 * min(inside, outside))
        found[finding.number] = Verdict(word, reason, parts, p, p)
    verdicts = {}
    adjusted = holm([v.p for v in found.values()])
    for (number, v), p in zip(found.items(), adjusted, strict=True):
        word = v.verdict if v.reason or p < 0.05 else "not resolved"
        verdicts[number] = v._replace(verdict=word, holm=p)
    return verdicts
