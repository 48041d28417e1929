"""The paper's nine findings (claims.csv), one primary contrast each, and the rules of a verdict.

Fixed before the run (RESULTS.md lists what changed since). A contrast is paired on the same
questions and seeds; its error is `stats.estimate`'s. p: two-sided for a difference, of two
one-sided tests for an equivalence; Holm over the nine, where not tested (no rows, or fewer than 8
seeds) is p = 1. A difference holds if p (Holm) < 0.05 with the claim's sign, and is contradicted
with the other. An equivalence holds if its 90% interval lies inside +-2 points, and is
contradicted if it lies outside (either is a one-sided p < 0.05), and Holm agrees.
`base` has the number of shots that scores best on the questions of the contrast, averaged over
its draws of shots and noise; against itself each draw is a replicate. The best rival is chosen on
the same questions. An arm is the end of its run. Middle checkpoint: the first with base pass@32
>= 30%, on validation if it has rows. A checkpoint with fewer than 8 seeds of an arm is left out
where others have 8. In finding 7 each pre-training run has questions of its own: means are taken
within a run, with the variance of its questions, then over the runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from results.rows import BEST, Arm, Missing, minus
from results.stats import MARGIN, Estimate, estimate, holm, p_value

SEEDS = 8  # what a verdict rests on
BASE, BARE = Arm("base", BEST), Arm("base")
RL, SFT, SFT_RL, MIX = Arm("rl"), Arm("sft"), Arm("sft->rl"), Arm("mix")


def checkpoints(r, metric, *arms, low=0.0, high=1.0, asked=""):
    """Checkpoints with rows of every arm and base pass@32 within the limits; raises Missing."""
    levels = {t: [r.level(arm, t, metric, asked) for arm in arms] for t in r.tokens}
    for arm, column in zip(arms, zip(*levels.values(), strict=True), strict=True):
        if not any(column):
            r.values(arm, r.tokens[-1], metric, asked)  # says what is missing
    found = [t for t in r.tokens if all(levels[t])]
    if low > 0:
        bases = [
            r.level(BASE, t, "pass@32", split="val") or r.level(BASE, t, "pass@32") for t in found
        ]
        found = [t for t, e in zip(found, bases, strict=True) if e and low <= e.mean <= high]
    if not found:
        raise Missing(
            f"no checkpoint with {', '.join(map(str, arms))} base pass@32 in the range of the rule"
        )
    trained = [i for i, arm in enumerate(arms) if arm.recipe != "base"] or range(len(arms))
    seeds = {t: min(levels[t][i].seeds for i in trained) for t in found}
    return [t for t in found if seeds[t] >= min(SEEDS, max(seeds.values()))]


def difference(r, metric, first, second, which=slice(None), **limits):
    """Paired first - second, the mean of the checkpoints that there are, or of some of them."""
    tokens = checkpoints(r, metric, first, second, **limits)[which]
    return r.cells(metric, minus(first, second, tokens), limits.get("asked", "")), tokens


def pipeline(r):
    tokens = checkpoints(r, "pass@32", RL, BASE, SFT_RL, SFT, low=0.3, high=0.8)
    return r.cells("pass@32", minus(RL, BASE, tokens) + minus(SFT, SFT_RL, tokens)), tokens


def averaging(r):
    rivals = RL, SFT, SFT_RL
    tokens = checkpoints(r, "pass@32", MIX, *rivals)
    terms = []
    for t in tokens:
        best = max(rivals, key=lambda arm: r.level(arm, t, "pass@32").mean)
        terms += [(1 / len(tokens), MIX, t), (-1 / len(tokens), best, t)]
    return r.cells("pass@32", terms), tokens


def data_or_size(r):
    asked = "hard" if "hard" in r.benchmarks else ""  # MATH rows are in a folder of their own
    more_math, larger = Arm("rl", world=r.another[0]), Arm("rl", model=r.another[1])
    return difference(r, "pass@1", more_math, larger, slice(-1, None), asked=asked)


def rollouts(r):
    many, few = r.with_rollouts(64), r.with_rollouts(5)
    asked = [a for a in r.benchmarks if any(r.gap("pass@1", many, few, t, a) for t in r.tokens)]
    return difference(r, "pass@1", many, few, asked="+".join(asked))


def brittle(r):
    ends = {t: r.values(RL, t, "pass@1").mean() for t in checkpoints(r, "pass@1", RL, low=0.3)}
    tokens = [t for t, end in ends.items() if end.groupby(level=0).size().min() >= SEEDS]
    if len(tokens) < 2:
        raise Missing(f"needs two checkpoints with {SEEDS} seeds of rl in each run")
    both = pd.concat([ends[tokens[0]], ends[tokens[-1]]], axis=1, join="inner")
    distance = (both - both.groupby(level=0).transform("median")).abs()
    return (distance[0] - distance[1]).to_frame("distance").T, [tokens[0], tokens[-1]]


def shots(r):
    counts = [arm.shots for arm in r.arms if arm == BARE._replace(shots=arm.shots)]
    most = BARE._replace(shots=max(counts, default=0) or 8)
    return difference(r, "pass@1", most, BARE, slice(-1, None))


class Finding(NamedTuple):
    claim: str
    paper: str  # its numbers
    kind: str  # "difference > 0" or "equivalence"
    rule: str  # the contrast in words
    contrast: Callable  # Record -> cells, the checkpoints; raises Missing


CONTRASTS = (
    lambda r: difference(r, "pass@1", RL, BASE, slice(1), low=0.3),
    lambda r: difference(r, "pass@1", RL, SFT, low=0.3),
    pipeline,
    lambda r: difference(r, "accuracy", RL, BASE),
    averaging,
    data_or_size,
    rollouts,
    brittle,
    shots,
)
CLAIMS = pd.read_csv(Path(__file__).with_name("claims.csv")).itertuples(index=False)
FINDINGS = [Finding(*claim, contrast) for claim, contrast in zip(CLAIMS, CONTRASTS, strict=True)]


class Verdict(NamedTuple):
    verdict: str  # holds, contradicted, not resolved, or not tested
    reason: str  # of the last
    estimate: Estimate | None
    tokens: list
    p: float
    holm: float


def decide(r, findings=tuple(FINDINGS), seeds=SEEDS, pooled=False):
    """-> {"1": Verdict, ...} of a Record; not tested with fewer than `seeds`. pooled: with all
    seeds as those of one pre-training run, so that the runs' difference is in the interval."""
    outcomes = []
    for finding in findings:
        try:
            cells, tokens = finding.contrast(r)
            e = estimate(cells, pooled)
            reason = (
                ""
                if e.seeds >= seeds and e.df
                else f"{e.seeds} seed{'s' * (e.seeds > 1)}, needs {seeds}"
            )
            outcomes.append((reason, e, tokens, 1.0 if reason else p_value(finding.kind, e)))
        except Missing as missing:
            outcomes.append((str(missing), None, [], 1.0))
    adjusted, verdicts = holm([p for *_, p in outcomes]), {}
    for i, (reason, e, tokens, p) in enumerate(outcomes):
        same = findings[i].kind == "equivalence"
        if reason or adjusted[i] >= 0.05:
            verdict = "not tested" if reason else "not resolved"
        else:
            verdict = "holds" if (abs(e.mean) < MARGIN if same else e.mean > 0) else "contradicted"
        verdicts[str(i + 1)] = Verdict(verdict, reason, e, tokens, p, adjusted[i])
    return verdicts
