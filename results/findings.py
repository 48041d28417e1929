"""The paper's nine findings, each with one primary contrast, and the rules of a verdict."""

from collections import Counter
from typing import Callable, NamedTuple

import numpy as np
import pandas as pd

from results.rows import ANOTHER, BEST, Arm, Missing, minus, tokens_name
from results.stats import MARGIN, Estimate, best_of_4, estimate, holm, p_value

SEEDS = 8  # what a verdict rests on
RULES = """Fixed before the run (RESULTS.md lists what changed since): one primary contrast per
finding, paired on the same questions and seeds. SE^2 = var(seed means)/S + var(question means)/Q;
t with S - 1 degrees of freedom. With 2 or 3 pre-training seeds the variance is taken within each
(S - 2 or S - 3) and the interval is about these runs; from 4 on they are the replicates. p:
two-sided for a difference, of two one-sided tests for an equivalence; Holm over the nine, not
tested (no rows, or fewer than 8 seeds) is p = 1. A difference holds if p (Holm) < 0.05 with the
claim's sign, is contradicted with the other. An equivalence holds if its 90% interval lies inside
+-2 points, contradicted if outside (either is a one-sided p < 0.05), and Holm agrees. Brackets:
95%, or 90% for an equivalence, before Holm. `base` is the number of shots that scores best on the
questions of the contrast, averaged over its draws of shots and noise; against itself each draw is
a replicate. The best rival is chosen on the same questions. An arm is the end of its run. Middle
checkpoint: the first with base pass@32 >= 30%, on validation if it has rows. A checkpoint with
fewer than 8 seeds of an arm is left out where others have 8. In finding 7 each pre-training run
has questions of its own: means are taken within a run, with the variance of its questions, then
over the runs."""

BASE, BARE, RL, SFT, SFT_RL = Arm("base", BEST), Arm("base"), Arm("rl"), Arm("sft"), Arm("sft->rl")
MIX, FEW, MANY = Arm("mix"), Arm("rl", group=5), Arm("rl", group=64)
MORE_MATH, LARGER = Arm("rl", world=ANOTHER), Arm("rl", model=ANOTHER)


def checkpoints(r, metric, *arms, low=0.0, high=1.0, asked=""):
    """Checkpoints with rows of every arm and base pass@32 within the limits; raises Missing."""
    levels = {t: [r.level(arm, t, metric, asked) for arm in arms] for t in r.tokens}
    for arm, column in zip(arms, zip(*levels.values(), strict=True), strict=True):
        if not any(column):
            r.values(arm, r.tokens[-1], metric, asked)  # says what is missing
    found = [t for t in r.tokens if all(levels[t])]
    if low > 0:
        base = {t: r.level(BASE, t, "pass@32", split="val") for t in found}
        base = {t: e or r.level(BASE, t, "pass@32") for t, e in base.items()}
        found = [t for t in found if base[t] and low <= base[t].mean <= high]
    if not found:
        names = ", ".join(map(str, arms))
        raise Missing(f"no checkpoint with {names} and base pass@32 in {low:.0%} to {high:.0%}")
    trained = [i for i, arm in enumerate(arms) if arm.recipe != "base"] or range(len(arms))
    seeds = {t: min(levels[t][i].seeds for i in trained) for t in found}
    return [t for t in found if seeds[t] >= min(SEEDS, max(seeds.values()))]


def difference(metric, first, second, which=slice(None), low=0.0):
    """The contrast of two arms, averaged over the checkpoints with base pass@32 of at least
    `low`, or over those of them that are chosen."""

    def contrast(r):
        tokens = checkpoints(r, metric, first, second, low=low)[which]
        return r.contrast(metric, minus(first, second, tokens))

    return contrast


def pipeline(r):
    tokens = checkpoints(r, "pass@32", RL, BASE, SFT_RL, SFT, low=0.3, high=0.8)
    return r.contrast("pass@32", minus(RL, BASE, tokens) + minus(SFT, SFT_RL, tokens))


def averaging(r):
    rivals = RL, SFT, SFT_RL
    tokens = checkpoints(r, "pass@32", MIX, *rivals)
    terms = []
    for t in tokens:
        best = max(rivals, key=lambda arm: r.level(arm, t, "pass@32").mean)
        terms += [(1 / len(tokens), MIX, t), (-1 / len(tokens), best, t)]
    return r.contrast("pass@32", terms)


def data_or_size(r):
    asked = "hard" if "hard" in r.benchmarks else ""  # MATH rows are in a folder of their own
    tokens = checkpoints(r, "pass@1", MORE_MATH, LARGER, asked=asked)
    return r.contrast("pass@1", minus(MORE_MATH, LARGER, tokens[-1:]), asked)


def splits(r):
    """The question sets that have both numbers of rollouts."""
    arms = r.resolved(FEW), r.resolved(MANY)
    return [asked for asked in r.benchmarks if any(
        all(len(r.rows("pass", arm, t, asked)) for arm in arms) for t in r.tokens)]


def rollouts(r):
    asked = "+".join(splits(r) or r.benchmarks[:1])
    tokens = checkpoints(r, "pass@1", MANY, FEW, asked=asked)
    return r.contrast("pass@1", minus(MANY, FEW, tokens), asked)


def early_and_late(r):
    """-> [(tokens, mean pass@1 of each seed of rl)] of the middle and the last checkpoint, of
    those that have 8 seeds in each pre-training run."""
    ends = {t: r.values(RL, t, "pass@1").mean() for t in checkpoints(r, "pass@1", RL, low=0.3)}
    enough = [t for t, end in ends.items() if end.groupby(level=0).size().min() >= SEEDS]
    tokens = enough or list(ends)
    units = ends[tokens[0]].index.intersection(ends[tokens[-1]].index)
    seeds = min(Counter(run for run, _ in units).values(), default=0)
    if len(tokens) < 2 or seeds < SEEDS:
        count = f"{seeds} seed{'s' * (seeds != 1)} at {min(len(tokens), 2)} of 2 checkpoints"
        raise Missing(f"{count}, needs {SEEDS}")
    return [(t, ends[t][units]) for t in (tokens[0], tokens[-1])]


def brittle(r):
    off, said = [], []
    for t, ends in early_and_late(r):
        runs = ends.groupby(level=0)
        off.append((ends - runs.transform("median")).abs())
        for run, end in runs:
            end = 100 * end
            said.append(f"{tokens_name(t)}, run {run}: {end.min():.1f} to {end.max():.1f}, "
                        f"mean {end.mean():.1f}, best of 4 {best_of_4(end):.1f}")
    return "; ".join(said), pd.DataFrame(off[0] - off[1], columns=["distance"]).T


def shots(r):
    bases = [arm for arm in r.arms if arm == BARE._replace(shots=arm.shots)]
    counts = [a.shots for a in bases if any(r.level(a, t, "pass@1") for t in r.tokens)]
    most = Arm("base", max(counts, default=0) or 8)
    return difference("pass@1", most, BARE, slice(-1, None))(r)


class Finding(NamedTuple):
    claim: str
    kind: str  # "difference > 0" or "equivalence"
    rule: str  # the contrast in words
    paper: str
    contrast: Callable  # Record -> levels in words, cells; raises Missing


FINDINGS = (
    Finding(
        "RL works early",
        "difference > 0",
        "pass@1: rl - base at the middle checkpoint",
        "after 4B tokens: 1.8 -> 15.6, 6B: 2.4 -> 19.9",
        difference("pass@1", RL, BASE, slice(1), low=0.3),
    ),
    Finding(
        "with one solution a question RL beats SFT",
        "difference > 0",
        "pass@1: rl - sft, mean of the checkpoints from the middle on",
        "rl - sft: 6B +1.1, 10B +5.3, 44B +17.0",
        difference("pass@1", RL, SFT, low=0.3),
    ),
    Finding(
        "expansion depends on the pipeline: RL adds more pass@32 to the base than to SFT",
        "difference > 0",
        "pass@32: (rl - base) - (sft->rl - sft), mean of the checkpoints with base pass@32 in "
        "30 to 80%",
        "10B: +20.5 and -3.1, 44B: +13.1 and -3.5; none of it on MATH",
        pipeline,
    ),
    Finding(
        "RL leaves general capability unchanged",
        "equivalence",
        "accuracy: rl - base, mean of all checkpoints",
        "44B, six benchmarks: rl +0.4, sft -6.1, sft-gold -7.1",
        difference("accuracy", RL, BASE),
    ),
    Finding(
        "parallel averaging has the best pass@32 of one solution",
        "difference > 0",
        "pass@32: mix - the best of rl, sft and sft->rl at each checkpoint, mean of all",
        "mix - best: 6B +6.3, 10B +7.2, 44B +3.9; pass@1 below rl",
        averaging,
    ),
    Finding(
        "hard questions: more math in the text beats a larger model",
        "difference > 0",
        "hard pass@1: rl in the world with more math - rl as the larger model, last checkpoint",
        "no figures; 44B on MATH: base 1, rl 10, sft 21, sft->rl 33",
        data_or_size,
    ),
    Finding(
        "64 and 5 rollouts end at the same place",
        "equivalence",
        "pass@1: rl n=64 - rl n=5, mean of question sets and checkpoints that have both",
        "no figures",
        rollouts,
    ),
    Finding(
        "early RL is brittle",
        "difference > 0",
        "pass@1 of rl: distance of a seed from the median seed, at the middle checkpoint - at the "
        "last; 8 seeds per run",
        "two seeds at 4 to 10B: 15 and 4; best of 4 reported",
        brittle,
    ),
    Finding(
        "shots in the prompt measure the base best",
        "difference > 0",
        "pass@1: base with the most shots there are - base 0-shot, last checkpoint; replicates "
        "are draws of the shots",
        "8 shots; 0-shot falls behind from 28B on",
        shots,
    ),
)


class Verdict(NamedTuple):
    verdict: str  # holds, contradicted, not resolved, or not tested
    reason: str  # of the last
    text: str  # levels of the arms
    estimate: Estimate | None
    p: float
    holm: float


def decide(r, findings=FINDINGS, seeds=SEEDS, pooled=False):
    """-> {"1": Verdict, ...} of a Record by the RULES; not tested with fewer than `seeds`.

    pooled: with S - 1 degrees of freedom over all seeds, so that the difference between
    pre-training runs is in the interval.
    """
    outcomes = []
    for finding in findings:
        try:
            text, cells = finding.contrast(r)
            e = estimate(cells, pooled)
            few = e.seeds < seeds or not e.df
            reason = f"{e.seeds} seed{'s' * (e.seeds != 1)}, needs {seeds}" if few else ""
            outcomes.append((reason, text, e, 1.0 if few else p_value(finding.kind, e)))
        except Missing as missing:
            outcomes.append((str(missing), "", None, 1.0))
    adjusted = holm([p for *_, p in outcomes])
    verdicts = {}
    for i, (finding, (reason, text, e, p)) in enumerate(zip(findings, outcomes, strict=True)):
        if reason:
            verdict = "not tested"
        elif adjusted[i] >= 0.05:
            verdict = "not resolved"
        else:
            right = abs(e.mean) < MARGIN if finding.kind == "equivalence" else e.mean > 0
            verdict = "holds" if right else "contradicted"
        verdicts[str(i + 1)] = Verdict(verdict, reason, text, e, p, adjusted[i])
    return verdicts
