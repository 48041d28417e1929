"""Statistics, rows and arms, the rules of a verdict, and what a person sees after one seed."""

import itertools
import json
import math
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from helpers import ROOT
from results import figures, findings, report, tables
from results.findings import BASE, FINDINGS, RL, SFT, Finding, Part, decide
from results.rows import OPTIONAL, Arm, Missing, Record, combined, read
from results.stats import (
    Estimate,
    chances,
    estimate,
    holm,
    outcome,
    pass_at_k,
    spread,
    standard_error,
)

TOKENS = [1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000]
MODELS, QUESTIONS, N = range(8), 40, 64
SEEDED = (0, 1)  # models with eight seeds of rl at the second checkpoint
INFINITE = math.inf

# What is true in a made world: arm -> (share of questions that it can solve, how often it solves
# one of these, accuracy, probability, text loss); one that solves a question at all solves it
# within 32 answers. Every claim holds in the first world and is contradicted in the second.
HOLDS = {
    "base": (0.40, 0.10, 0.80, 0.60, 1.20),
    "base 8-shot": (0.45, 0.20, 0.80, 0.60, 1.20),
    "rl": (0.60, 0.50, 0.80, 0.60, 1.20),
    "sft": (0.80, 0.20, 0.70, 0.50, 1.40),
    "sft->rl": (0.65, 0.35, 0.72, 0.50, 1.40),
    "mix": (0.90, 0.50, 0.80, 0.60, 1.20),
    "n=64": (0.60, 0.50),
    "n=5": (0.60, 0.50),
    "more math": (0.60, 0.50),
    "larger": (0.40, 0.50),
    "seeds": (-0.2, -0.15, -0.1, -0.05, 0.05, 0.1, 0.15, 0.2),  # of two models, around their mean
}
CONTRADICTED = {
    "base": (0.60, 0.35, 0.80, 0.60, 1.20),
    "base 8-shot": (0.50, 0.20, 0.80, 0.60, 1.20),
    "rl": (0.40, 0.20, 0.70, 0.50, 1.40),
    "sft": (0.50, 0.50, 0.80, 0.60, 1.20),
    "sft->rl": (0.70, 0.50, 0.80, 0.60, 1.20),
    "mix": (0.25, 0.10, 0.60, 0.60, 1.20),
    "n=64": (0.60, 0.50),
    "n=5": (0.60, 0.30),
    "more math": (0.40, 0.50),
    "larger": (0.60, 0.50),
    "seeds": (0.0,) * 8,
}
SAME = dict.fromkeys(CONTRADICTED, (0.5, 0.2, 0.8, 0.6, 1.2))
SAME["seeds"] = (-0.065, -0.05, -0.03, -0.01, 0.01, 0.03, 0.05, 0.065)


def run_of(recipe, tokens, model, seed, **more):
    """The fields of all rows of a run."""
    name = f"{recipe}-{tokens}-{model}-{seed}-{'-'.join(map(str, more.values()))}"
    same = {"checkpoint": f"{name}.pt", "config_hash": name, "model": "toy", "world": "toy-math"}
    same |= {"recipe": recipe, "tokens": tokens, "pretrain_seed": model, "seed": seed}
    return same | {"step": 300, "split": "test"} | more


def with_questions(recipe):
    """sft->rl -> sft-1600-questions->rl-1600-questions, as the trainers name it."""
    return "->".join(f"{part}-1600-questions" for part in recipe.split("->"))


def made(truth, noise=0.0, models=MODELS):
    """Rows of the shape of record 3. noise: how far a cell's share of questions varies, which the
    seeds of a model have in common, beside what sampling makes of it; tasks and text by half of
    it."""
    rng = np.random.default_rng(5)
    rows = []

    def varied(share):
        return share + noise * rng.normal()

    def solved(run, share, rate, asked="easy", shots=0):
        good = min(max(round(QUESTIONS * share), 1), QUESTIONS)
        counts = np.clip(np.rint(N * rate + rng.normal(0, 1, QUESTIONS)), 1, N).astype(int)
        counts[good:] = 0
        ids = [f"{run['pretrain_seed']}-{asked}-{q}" for q in range(QUESTIONS)]
        row = {"kind": "pass", "benchmark": asked, "shots": shots, "n": N, "ids": ids}
        loose = counts.mean() / N + 0.01 * rng.random()
        row |= {"correct": counts.tolist(), "formatted": 0.8, "flexible@1": loose}
        rows.append(run | row)

    def watched(run):
        points = [{"step": 0, "questions": 0, "flops": 0, "formatted": 0.4}]
        points[0] |= {"pass@1": 0.1, "se@1": 0.02, "pass@32": 0.5}
        for step in range(20, 301, 20):
            spent = {"step": step, "questions": 16 * step, "flops": 1e9 * step}
            points.append(points[0] | spent | {"pass@1": 0.5 + 0.002 * rng.normal()})
        rows.append(run | {"kind": "curve", "split": "val", "points": points})

    def beside(run, accuracy, probability, loss):
        for task, items in (("agreement", 100), ("facts", 200)):
            right = round(items * min(accuracy + noise / 2 * rng.normal(), 1)) + rng.integers(2)
            row = {"kind": "general", "benchmark": task}
            row |= {"right": [int(i < right) for i in range(items)]}
            rows.append(run | row | {"probability": probability + 0.002 * rng.normal()})
        losses = loss + rng.normal(0, 0.003, 5) + noise / 2 * rng.normal()
        rows.append(run | {"kind": "text", "benchmark": "text", "losses": losses.tolist()})

    for (at, t), model in itertools.product(enumerate(TOKENS), models):
        for split in ("test", "val"):
            run = run_of("base", t, model, model) | {"split": split}
            for shots, name in ((0, "base"), (8, "base 8-shot")):
                share, rate, *_ = truth[name] if at else (0.1, 0.1)
                solved(run, varied(share), rate, shots=shots)
        beside(run_of("base", t, model, model), *truth["base"][2:])
        for recipe in ("rl", "sft", "sft->rl", "mix"):
            share, rate, *general = truth[recipe]
            here = varied(share)
            many = recipe == "rl" and at == 1 and model in SEEDED
            for seed, away in enumerate(truth["seeds"] if many else (0,)):
                group = {} if recipe == "sft" else {"group": 8}
                run = run_of(recipe, t, model, seed, **group)
                solved(run, here, rate + away)
                watched(run)
                beside(run, *general)
            if at in (2, 4):
                run = run_of(with_questions(recipe), t, model, 0, **group)
                solved(run, varied(share), rate)
                watched(run)
    for model in models:
        for group, asked in itertools.product((5, 64), ("easy", "hard")):
            run = run_of("rl", TOKENS[-1], model, 0, group=group, asked=asked)
            share, rate, *_ = truth[f"n={group}"]
            solved(run, varied(share), rate, asked)
            watched(run)
        for name, where in (
            ("more math", {"world": "toy-math60"}),
            ("larger", {"model": "toy-large"}),
        ):
            run = run_of("rl", TOKENS[-1], model, 0, group=8, asked=name) | where
            share, rate, *_ = truth[name]
            solved(run, varied(share), rate, "hard")
            watched(run)
    return rows


def save(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def record(rows):
    frame = pd.DataFrame(rows).assign(where="here:1")
    return Record(frame.reindex(columns=frame.columns.union(OPTIONAL, sort=False)))


@pytest.fixture(scope="module")
def holding():
    """Rows, Record, verdicts of a world in which every claim is true."""
    rows = json.loads(json.dumps(made(HOLDS)))
    r = record(rows)
    return rows, r, decide(r)


@pytest.fixture(scope="module")
def noisy():
    rows = json.loads(json.dumps(made(SAME, noise=0.2)))
    r = record(rows)
    return rows, r, decide(r)


def few(rows, *recipes):
    """The first model, without its further seeds, and some of its recipes."""
    kept = [row for row in rows if row["pretrain_seed"] == 0 and row["seed"] == 0]
    kept = [row for row in kept if row["world"] == "toy-math" and row["model"] == "toy"]
    return [row for row in kept if not recipes or row["recipe"] in recipes]


# ---- statistics


def test_pass_at_k_equals_counting_every_subset():
    for n, k in ((1, 1), (5, 1), (6, 3), (7, 7)):
        for c in range(n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            counted = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(counted, abs=1e-12)
    assert pass_at_k(32, np.array([[0, 1], [31, 32]]), 32).tolist() == [[0, 1], [1, 1]]
    exact = 1 - math.comb(99_990, 500) / math.comb(100_000, 500)  # more digits than a float
    assert pass_at_k(100_000, 10, 500) == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="pass@8"):
        pass_at_k(4, 1, 8)
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(reference.sem([0, 1, 1, 0]))


def test_holm_by_hand():
    # sorted .005 .01 .03 .04: times 4, 3, 2, 1 = .02 .03 .06 .04, and never below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.05 / 9] + [1.0] * 8)[0] == pytest.approx(0.05)  # those not tested count


@pytest.mark.parametrize("models", [4, 8])
def test_models_with_questions_of_their_own_are_a_t_test_of_their_means(models):
    rng = np.random.default_rng(models)
    cells = {
        (m, 0): {f"{m}-{q}": rng.normal(0.03, 0.1) for q in range(5 + m)} for m in range(models)
    }
    means = [statistics.fmean(questions.values()) for questions in cells.values()]
    e = estimate(pd.DataFrame(cells))
    test = reference.ttest_1samp(means, 0)
    low, high = test.confidence_interval(0.95)
    assert (e.mean - e.half(), e.mean + e.half()) == pytest.approx((low, high))
    assert e.se == pytest.approx(reference.sem(means))
    assert (e.df, e.seeds, e.questions) == (models - 1, models, models + 4)
    assert [*e.runs.values()] == pytest.approx(means)


def test_fewer_than_four_models_have_the_error_of_their_questions():
    rng = np.random.default_rng(1)
    one = {(0, 0): {f"q{q}": rng.random() for q in range(20)}}
    values = [*one[0, 0].values()]
    e = estimate(pd.DataFrame(one))
    assert e.mean == pytest.approx(statistics.fmean(values)) and e.df == 0
    assert e.se == e.half() == pytest.approx(reference.sem(values))
    others = {(m, 0): {f"{m}-{q}": rng.random() for q in range(10 * m)} for m in (1, 2)}
    e = estimate(pd.DataFrame(one | others))
    groups = [values, *([*questions.values()] for questions in others.values())]
    assert e.mean == pytest.approx(statistics.fmean(map(statistics.fmean, groups)))
    assert e.df == 0 and e.seeds == 3
    assert e.se == pytest.approx(math.hypot(*map(reference.sem, groups)) / 3)


def test_the_seeds_of_a_model_are_averaged_on_the_questions_that_they_share():
    seeds = {(0, 0): {"a": 0.0, "b": 1.0}, (0, 1): {"a": 2.0, "b": 6.0, "not shared": 9.0}}
    e = estimate(pd.DataFrame(seeds))  # the questions 1 and 3.5
    assert (e.mean, e.df, e.seeds, e.questions) == (2.25, 0, 2, 2)
    assert e.se == pytest.approx(reference.sem([1, 3.5]))
    many = {(0, seed): {"a": 1.0 + seed} for seed in range(8)}  # eight seeds are one model
    e = estimate(pd.DataFrame(many | {(m, 0): {"a": float(m)} for m in (1, 2, 3)}))
    assert e.df == 3 and e.runs == {0: 4.5, 1: 1.0, 2: 2.0, 3: 3.0}
    assert (e.mean, e.se) == pytest.approx((10.5 / 4, reference.sem([4.5, 1, 2, 3])))


def of(values):
    return estimate(pd.DataFrame({(m, 0): {"q": x} for m, x in enumerate(values)}))


def above(values, x):
    return reference.ttest_1samp(values, x, alternative="greater").pvalue


def below(values, x):
    return reference.ttest_1samp(values, x, alternative="less").pvalue


def test_the_chances_of_a_region_are_one_or_two_t_tests():
    values = [0.013, -0.002, 0.021, 0.008, 0.006, 0.012, -0.004, 0.009]
    e = of(values)
    assert chances(e, 0.0, INFINITE) == pytest.approx((above(values, 0), below(values, 0)))
    assert chances(e, -INFINITE, 0.0) == pytest.approx((below(values, 0), above(values, 0)))
    tost = max(above(values, -0.02), below(values, 0.02))
    outside = min(below(values, -0.02), above(values, 0.02))
    assert chances(e, -0.02, 0.02) == pytest.approx((tost, outside))
    far = [x + 0.05 for x in values]
    inside, outside = chances(of(far), -0.02, 0.02)
    assert inside == pytest.approx(below(far, 0.02)) and outside == pytest.approx(above(far, 0.02))
    assert outside < 0.01 < 0.99 < inside
    assert chances(of([0.01] * 8), 0.0, 0.02)[0] < 1e-9  # no spread at all
    assert chances(of([0.01]), 0.0, 0.02) == chances(of([0.5]), 0.0, 0.02) == (1.0, 1.0)


def test_several_differences_hold_together_and_one_of_them_contradicts():
    """Intersection-union: the largest p-value inside, the smallest times their number outside."""
    values = [0.013, -0.002, 0.021, 0.008, 0.006, 0.012, -0.004, 0.009]
    other = [0.030, 0.010, 0.025, 0.031, 0.012, 0.040, 0.018, 0.027]
    parts = [chances(of(values), 0.0, INFINITE), chances(of(other), 0.0, INFINITE)]
    parts += [chances(of(other), -0.1, 0.1)]
    inside, outside = outcome(parts)
    assert inside == pytest.approx(max(above(values, 0), above(other, 0)))
    assert inside == pytest.approx(above(values, 0)) and outside == 1.0
    parts[1] = chances(of([-x for x in other]), 0.0, INFINITE)
    inside, outside = outcome(parts)
    assert outside == pytest.approx(3 * above(other, 0)) and outside < 0.01
    assert inside == pytest.approx(1 - above(other, 0))
    assert outcome([(0.2, 0.01), (0.001, 0.3)]) == (0.2, 0.02)
    assert outcome([(0.03, 0.4)]) == (0.03, 0.4)  # of one difference: its own


def test_the_spread_of_seeds_is_a_chi_square_test_of_their_pooled_variance():
    groups = [np.array([0.10, 0.16, 0.13, 0.05, 0.12, 0.20, 0.09, 0.15])]
    groups += [np.array([0.41, 0.44, 0.40, 0.43, 0.38, 0.42, 0.45, 0.39, 0.41, 0.47])]
    e, (over, under) = spread(groups, [30, 31], 0.0275)
    squares = 7 * statistics.variance(groups[0]) + 9 * statistics.variance(groups[1])
    assert e.mean == pytest.approx(math.sqrt(squares / 16)) and e.df == 16 and e.seeds == 18
    assert e.se == pytest.approx(e.mean / math.sqrt(32))
    assert e.runs == pytest.approx(dict(zip([30, 31], map(statistics.stdev, groups), strict=True)))
    assert over == pytest.approx(reference.chi2(16).sf(squares / 0.0275**2))
    assert under == pytest.approx(reference.chi2(16).cdf(squares / 0.0275**2))
    # with an even number of degrees the upper tail is a sum: exp(-x) x^i / i!, x half the ratio
    half = squares / 0.0275**2 / 2
    assert over == pytest.approx(
        math.exp(-half) * sum(half**i / math.factorial(i) for i in range(8))
    )
    apart = [group + shift for group, shift in zip(groups, (0.3, -0.2), strict=True)]
    assert spread(apart, [30, 31], 0.0275)[1] == pytest.approx((over, under))  # within models alone
    wide = spread([3 * group for group in groups], [30, 31], 0.0275)[1]
    assert wide[0] < 1e-6 and spread([group / 9 for group in groups], [0, 1], 0.0275)[1][1] < 1e-6
    assert spread([np.full(8, 0.5)] * 2, [0, 1], 0.0275)[1] == (1.0, 0.0)


def fixed(number, *regions):
    """A claim whose differences are known."""
    parts = [Part("", e, low, high, [], [], chances(e, low, high)) for e, low, high in regions]
    return Finding(number, "", "", lambda r: parts)


def test_holm_over_all_claims_decides_also_over_those_that_are_not_tested():
    values = [0.013, -0.002, 0.021, 0.008, 0.006, 0.012, -0.004, 0.009]
    claim = fixed("1", (of(values), 0.0, INFINITE))
    p = reference.ttest_1samp(values, 0).pvalue
    alone = decide(None, [claim])["1"]
    assert (alone.p, alone.holm, alone.verdict) == (pytest.approx(p), pytest.approx(p), "holds")
    beside = decide(None, [claim, fixed("2", (of([0.1]), 0.0, INFINITE))])
    assert beside["1"].holm == pytest.approx(2 * p) and 0.025 < p < 0.05
    assert words(beside) == {"1": "not resolved", "2": "not tested"}


def test_intervals_cover_the_truth_and_verdicts_err_in_5_percent(monkeypatch):
    """2,000 experiments of 8 models with 6 questions of their own; the truth is 0."""
    rng = np.random.default_rng(3)
    rows = [(m, q) for m in range(8) for q in range(6)]
    columns = pd.MultiIndex.from_tuples((m, 0) for m in range(8))
    found = []
    for _ in range(2000):
        values = np.full((len(rows), 8), np.nan)
        means = rng.normal(0, 0.02, 8)
        for m in range(8):
            values[6 * m : 6 * m + 6, m] = means[m] + rng.normal(0, 0.05, 6)
        found.append(estimate(pd.DataFrame(values, index=rows, columns=columns)))
    assert 0.93 <= np.mean([abs(e.mean) <= e.half() for e in found]) <= 0.97
    expected = 0.02**2 / 8 + 0.05**2 / 48
    assert np.mean([e.se**2 for e in found]) == pytest.approx(expected, rel=0.05)
    monkeypatch.setattr(findings, "holm", list)  # each experiment is one of its own

    def errors(regions):
        return [v.verdict for v in decide(None, map(fixed, itertools.count(), *regions)).values()]

    on_edge = [e._replace(mean=e.mean + 0.02) for e in found]
    both = [errors([[(e, 0.0, INFINITE) for e in found]])]
    both += [errors([[(e, -0.02, 0.02) for e in on_edge]])]
    pairs = [[(e, 0.0, INFINITE) for e in found[at::2]] for at in (0, 1)]
    both += [errors(pairs)]  # two differences, both on the edge of what the claim says
    for words in both:
        assert np.mean([word != "not resolved" for word in words]) <= 0.055
    assert 0.015 <= np.mean([word == "holds" for word in both[0]]) <= 0.035
    assert 0.015 <= np.mean([word == "contradicted" for word in both[0]]) <= 0.035


def test_the_spread_of_normal_seeds_errs_in_2_and_a_half_percent_on_either_side(monkeypatch):
    """2,000 experiments of two models with 8 seeds, whose standard deviation is the limit."""
    rng = np.random.default_rng(4)
    limit = findings.SPREAD
    monkeypatch.setattr(findings, "holm", list)  # each experiment is one of its own

    def of_seeds(number, deviation):
        groups = [level + rng.normal(0, deviation, 8) for level in (0.2, 0.5)]
        e, p = spread(groups, [0, 1], limit)
        parts = [Part("", e, limit, INFINITE, [], [], p)]
        return Finding(number, "", "", lambda r: parts)

    def shares(deviation, count):
        found = decide(None, [of_seeds(i, deviation) for i in range(count)])
        counts = [v.verdict for v in found.values()]
        return [counts.count(word) / count for word in ("holds", "contradicted")]

    assert all(0.015 <= share <= 0.035 for share in shares(limit, 2000))
    assert shares(2 * limit, 200)[0] > 0.9 and shares(limit / 2, 200)[1] > 0.9


def test_the_limit_of_the_spread_is_2_points_from_the_median_for_normal_seeds():
    seeds = np.random.default_rng(6).normal(0, findings.SPREAD, (50_000, 8))
    away = np.abs(seeds - np.median(seeds, axis=1, keepdims=True)).mean()
    assert away == pytest.approx(0.02, rel=0.02)


def test_a_base_serves_every_seed_with_the_mean_of_its_draws_and_pairs_them_with_itself():
    base = pd.DataFrame({(0, 7): {"a": 0.0, "b": 1.0}, (0, 8): {"a": 0.5, "b": 0.5}})
    rl = pd.DataFrame(
        {(0, 1): {"a": 1.0, "b": 1.0}, (0, 2): {"a": 0.0, "b": 1.0}, (1, 3): {"a": 1.0}}
    )
    gain = combined([(1, rl, False), (-1, base, True)])
    assert gain[0].to_dict() == {1: {"a": 0.75, "b": 0.25}, 2: {"a": -0.25, "b": 0.25}}
    assert [*gain] == [(0, 1), (0, 2)]  # run 1 has no base
    assert [*combined([(1, base, True), (-1, base, True)])] == [(0, 7), (0, 8)]
    with pytest.raises(Missing):
        combined([(1, rl, False), (-1, pd.DataFrame({(5, 1): {"a": 1.0}}), False)])


# ---- verdicts


def words(verdicts):
    return {number: v.verdict for number, v in verdicts.items()}


def test_every_claim_holds_where_it_is_true(holding):
    assert words(holding[2]) == dict.fromkeys((f.number for f in FINDINGS), "holds")


def test_every_claim_is_contradicted_where_the_opposite_is_true():
    verdicts = decide(record(made(CONTRADICTED)))
    assert words(verdicts) == dict.fromkeys((f.number for f in FINDINGS), "contradicted")


def test_no_claim_is_resolved_where_all_arms_are_the_same_and_models_differ(noisy):
    assert words(noisy[2]) == dict.fromkeys((f.number for f in FINDINGS), "not resolved")


# Each claim again: (metric, arm, other arm, where the claim says it is, checkpoints, questions)
LATE, TWO, LAST = [1, 2, 3, 4], [2, 4], [4]
UP, DOWN, NOT_BELOW, EQUAL = (0, INFINITE), (-INFINITE, 0), (-0.02, INFINITE), (-0.02, 0.02)


def best(metric, region, size=""):
    at = TWO if size else LATE
    mix, *rivals = ("mix", "rl", "sft", "sft->rl")
    if size:
        mix, *rivals = map(with_questions, (mix, *rivals))
    return [(metric, mix, rival, region, at, "easy") for rival in rivals]


DIFFERENCES = {
    "1": [("pass@1", "rl", "base", UP, [1], "easy")],
    "1f": [("flexible@1", "rl", "base", UP, [1], "easy")],
    "2": [("pass@1", "rl", "sft", UP, LATE, "easy")],
    "2q": [("pass@1", "rl-1600-questions", "sft-1600-questions", UP, TWO, "easy")],
    "3s": [("pass@32", "sft->rl", "sft", DOWN, LATE, "easy")],
    "3e": [("pass@40", "rl", "base", UP, LATE, "easy")],  # 32 of 40 in the format
    "4": [
        (metric, "rl", "base", EQUAL, LATE, "easy")
        for metric in ("accuracy", "probability", "loss")
    ],
    "5": best("pass@32", UP),
    "5q": best("pass@32", UP, "-1600-questions"),
    "6": [("pass@1", "more math", "larger", UP, LAST, "hard")],
    "7": [("pass@1", "n=64", "n=5", EQUAL, LAST, asked) for asked in ("easy", "hard")],
    "9": [("pass@1", "base 8-shot", "base 0-shot", UP, LAST, "easy")],
    "A1": [("pass@1", "rl", "sft->rl", NOT_BELOW, [1], "easy")],
    "A2": [
        ("pass@32", "sft->rl", "sft", DOWN, LATE, "easy"),
        ("pass@40", "rl", "base", NOT_BELOW, LATE, "easy"),
    ],
    "A3": [
        ("accuracy", "sft", "base", DOWN, LATE, "easy"),
        ("accuracy", "sft", "rl", DOWN, LATE, "easy"),
        ("accuracy", "rl", "base", NOT_BELOW, LATE, "easy"),
    ],
    "A4": [d for k in (1, 8, 32) for d in best(f"pass@{k}", UP)] + best("accuracy", NOT_BELOW),
}
FILTERS = {
    "base 0-shot": {"recipe": "base", "shots": 0},
    "base 8-shot": {"recipe": "base", "shots": 8},
    "more math": {"recipe": "rl", "world": "toy-math60"},
    "larger": {"recipe": "rl", "model": "toy-large"},
    "n=5": {"recipe": "rl", "group": 5},
    "n=64": {"recipe": "rl", "group": 64},
}
KINDS = {"accuracy": "general", "probability": "general", "loss": "text"}


def matching(rows, metric, arm, tokens, model, asked, split="test"):
    where = {"model": "toy", "world": "toy-math", "split": split, "tokens": tokens}
    where |= {"pretrain_seed": model, "kind": KINDS.get(metric, "pass")}
    where |= FILTERS.get(arm, {"recipe": arm})
    where |= {} if metric in KINDS else {"benchmark": asked}
    where |= {"group": 8} if where["recipe"] == "rl" and "group" not in where else {}
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def value(row, metric):
    if metric in ("accuracy", "loss"):
        return statistics.fmean(row["right" if metric == "accuracy" else "losses"])
    if metric in ("probability", "flexible@1"):
        return row[metric]
    n, k = row["n"], int(metric.removeprefix("pass@"))
    return statistics.fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in row["correct"])


def better_base(rows, metric, tokens, asked, split="val"):
    """The number of shots that is ahead on validation questions, over all models."""
    names = "base 0-shot", "base 8-shot"
    means = [
        statistics.fmean(
            x for m in MODELS for x in ends(rows, metric, name, tokens, m, asked, split).values()
        )
        for name in names
    ]
    return names[means.index(max(means))]


def ends(rows, metric, arm, tokens, model, asked, split="test"):
    """{seed: mean} of a model; of the base the better number of shots."""
    if arm == "base" and metric not in KINDS:
        arm = better_base(rows, metric, tokens, asked)
    found = {}
    for row in matching(rows, metric, arm, tokens, model, asked, split):
        found.setdefault(row["seed"], []).append(value(row, metric))
    return {seed: statistics.fmean(tasks) for seed, tasks in found.items()}


def difference(rows, metric, first, second, tokens, model, asked):
    """The mean over checkpoints, on the seeds that all trained arms have at all of them."""
    cells = [
        (sign, arm, ends(rows, metric, arm, t, model, asked))
        for t in tokens
        for sign, arm in ((1, first), (-1, second))
    ]
    shared = [set(found) for _, arm, found in cells if not arm.startswith("base")]
    shared = set.intersection(*shared) if shared else {model}
    total = 0
    for sign, arm, found in cells:
        assert found
        kept = [x for seed, x in found.items() if seed in shared or arm.startswith("base")]
        total += sign * statistics.fmean(kept)
    return total / len(tokens)


def test_each_claim_again_from_its_rows(noisy):
    """Differences by hand, t-tests of scipy, the spread by hand, Holm by hand."""
    rows, _, verdicts = noisy
    ps = {}
    for number, differences in DIFFERENCES.items():
        parts = verdicts[number].parts
        inside, outside = [], []
        for part, (metric, first, second, (low, high), at, asked) in zip(
            parts, differences, strict=True
        ):
            tokens = [TOKENS[i] for i in at]
            gaps = [difference(rows, metric, first, second, tokens, m, asked) for m in MODELS]
            test = reference.ttest_1samp(gaps, 0)
            e = part.estimate
            assert part.tokens == tokens and (part.low, part.high) == (low, high), number
            steps = [(name, t) for name, t, _ in part.used]
            assert len(steps) == 2 * len(tokens) and {t for _, t in steps} == {*tokens}
            assert e.mean == pytest.approx(statistics.fmean(gaps)), (number, part.name)
            assert e.half() == pytest.approx(e.mean - test.confidence_interval(0.95).low)
            assert [*e.runs] == [*MODELS] and [*e.runs.values()] == pytest.approx(gaps)
            ps_here = [above(gaps, low) if low > -INFINITE else 0]
            ps_here += [below(gaps, high) if high < INFINITE else 0]
            inside.append(max(ps_here))
            outside.append(min(1 - p for p in ps_here))
        smaller = min(max(inside), len(outside) * min(outside))
        ps[number] = min(1, 2 * smaller)
        assert verdicts[number].p == pytest.approx(ps[number]), number
    seeds = [ends(rows, "pass@1", "rl", TOKENS[1], m, "easy").values() for m in SEEDED]
    squares = sum(7 * statistics.variance(found) for found in seeds)
    (part,) = verdicts["8"].parts
    assert [*map(len, seeds)] == [8, 8] and part.tokens == [TOKENS[1]]
    assert part.used == [(RL, TOKENS[1], "")] and (part.low, part.high) == (0.0275, INFINITE)
    assert part.estimate.mean == pytest.approx(math.sqrt(squares / 14))
    assert part.estimate.runs == pytest.approx({0: statistics.stdev(seeds[0]),
                                                1: statistics.stdev(seeds[1])})  # fmt: skip
    tail = reference.chi2(14).cdf(squares / 0.0275**2)
    ps["8"] = 2 * min(tail, 1 - tail)
    assert verdicts["8"].p == pytest.approx(ps["8"])
    assert {*ps} == {*verdicts} == {finding.number for finding in FINDINGS}
    largest = 0
    for i, number in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, (len(FINDINGS) - i) * ps[number])
        assert verdicts[number].holm == pytest.approx(min(1, largest)), number


def test_the_base_has_the_shots_that_are_best_on_validation_questions(noisy, holding):
    """On the test questions only if no others were asked."""
    rows, r, _ = noisy
    shots = {"base 0-shot": 0, "base 8-shot": 8}
    metrics = [("pass@1", "pass@1"), ("pass@32", "pass@32"), ("32 in format", "pass@40")]
    metrics.append(("flexible@1", "flexible@1"))
    base = [row for row in rows if row["recipe"] == "base"]
    without = record([row for row in base if row["split"] == "test"])
    others = 0
    for t, (metric, by_hand) in itertools.product(TOKENS, metrics):
        on_val, on_test = (better_base(rows, by_hand, t, "easy", x) for x in ("val", "test"))
        assert r.best(BASE, t, metric).shots == shots[on_val]
        assert without.best(BASE, t, metric).shots == shots[on_test]
        level = statistics.fmean(
            x for m in MODELS for x in ends(rows, by_hand, on_val, t, m, "easy").values()
        )
        assert r.level(BASE, t, metric).mean == pytest.approx(level)
        others += on_val != on_test
    assert others  # it does matter
    assert holding[1].best(BASE, TOKENS[-1], "pass@1", "hard") == BASE  # was not asked at all


def test_claim_8_takes_two_models_with_eight_seeds(holding):
    """At the earliest checkpoint that has them; those with fewer seeds do not count."""
    rows, _, verdicts = holding
    runs = [row for row in rows if row["recipe"] in ("rl", "base") and row["model"] == "toy"]
    runs = [row for row in runs if row["world"] == "toy-math" and row.get("group", 8) == 8]

    def seeds_of(place):  # (tokens, model) -> those to keep
        return [row for row in runs if row["recipe"] == "base" or row["seed"] < place(row)]

    one = record(seeds_of(lambda row: 8 - (row["pretrain_seed"] == 1)))
    assert decide(one)["8"].reason == "needs two models with 8 seeds of rl"
    assert decide(one)["8"].verdict == "not tested" and not decide(one)["8"].parts
    assert decide(record(seeds_of(lambda row: 8)))["8"].parts == verdicts["8"].parts
    early = [  # eight seeds of one model at the first checkpoint
        row | {"tokens": TOKENS[0], "config_hash": f"{row['config_hash']} early"}
        for row in runs
        if row["recipe"] == "rl" and (row["tokens"], row["pretrain_seed"]) == (TOKENS[1], 0)
    ]
    early = [row | {"checkpoint": f"{row['config_hash']}.pt"} for row in early]
    others = [
        row for row in runs
        if (row["recipe"], row["tokens"], row["pretrain_seed"]) != ("rl", TOKENS[0], 0)
    ]  # fmt: skip
    assert decide(record(others + early))["8"].parts == verdicts["8"].parts
    (part,) = verdicts["8"].parts
    assert part.estimate.df == 14 and [*part.estimate.runs] == [*SEEDED]
    shown = [line.split(" | ") for line in tables.seeds(record(runs)).splitlines()]
    shown = {int(line[2]): line for line in shown if line[0] == "| **rl**" and line[4] == "pass@1"}
    at = next(t for t in TOKENS if len(ends(runs, "pass@1", "rl", t, SEEDED[0], "easy")) >= 8)
    for m in SEEDED:
        found = [100 * x for x in ends(runs, "pass@1", "rl", at, m, "easy").values()]
        assert shown[m][5] == f"{min(found):.1f} to {max(found):.1f}"
        assert shown[m][6] == f"{statistics.stdev(found):.1f} |"
    assert tables.seeds(one).count("pass@1") == 1  # of the other model


def test_early_is_the_first_checkpoint_with_base_pass32_of_20_percent_on_validation(holding):
    rows, r, verdicts = holding
    assert findings.early(r) == TOKENS[1] and findings.from_early_on(r) == TOKENS[1:]
    base = [row for row in rows if row["recipe"] == "base" and row["kind"] == "pass"]

    def with_solved(count, tokens, split):  # of 40 questions of each model
        right = [N] * count + [0] * (QUESTIONS - count)
        place = tokens, split
        return [
            row | {"correct": right} if (row["tokens"], row["split"]) == place else row
            for row in base
        ]

    assert findings.early(record(with_solved(8, TOKENS[0], "val"))) == TOKENS[0]  # 20%
    assert findings.early(record(with_solved(7, TOKENS[0], "val"))) == TOKENS[1]
    assert findings.early(record(with_solved(40, TOKENS[0], "test"))) == TOKENS[1]
    assert findings.early(record(with_solved(7, TOKENS[1], "val"))) == TOKENS[2]
    only_test = [row for row in with_solved(8, TOKENS[0], "test") if row["split"] == "test"]
    assert findings.early(record(only_test)) == TOKENS[0]
    weak = record([row | {"correct": [0] * QUESTIONS} for row in base])
    assert decide(weak)["1"].reason == "no checkpoint with base pass@32 of 20%"


def curves_of(rows, height):
    """Rows with validations of a height at each step; those of the others are as they were."""
    steps = range(0, 301, 20)
    return [
        row | {"points": [{"step": s, "pass@1": height(row, s)} for s in steps]}
        if row["kind"] == "curve"
        else row
        for row in rows
    ]


def gains_of(gains, further=()):
    """A Record of the curves of an arm; gains: model -> that of the last 100 steps."""
    runs = [(m, 0, gain) for m, gain in enumerate(gains)] + [(0, 1 + i, x) for i, x in further]
    rows = [run_of("rl", TOKENS[0], m, s) | {"kind": "curve", "split": "val"} for m, s, _ in runs]
    rows = [row | {"points": [], "gain": x} for row, (*_, x) in zip(rows, runs, strict=True)]

    def height(row, step):  # what is before the last 200 steps does not count
        return 0.3 if step <= 100 else 0.5 + row["gain"] * (step > 200)

    return record([{**row, "split": "val"} for row in curves_of(rows, height)])


def test_gain_is_the_last_100_steps_less_the_100_before_over_models():
    gains = [0.011, 0.024, 0.006, 0.019, 0.013, 0.008, 0.021, 0.002]
    e = findings.gain(gains_of(gains), RL, TOKENS[0])
    interval = reference.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert e.mean == pytest.approx(statistics.fmean(gains)) and e.df == 7
    assert e.mean - e.half() == pytest.approx(interval.low)
    seeds = [*enumerate([0.3, 0.2])]  # two further seeds of a model: it is one model
    means = [(0.011 + 0.3 + 0.2) / 3, *gains[1:]]
    e = findings.gain(gains_of(gains, seeds), RL, TOKENS[0])
    assert e.df == 7 and e.mean == pytest.approx(statistics.fmean(means))
    assert e.se == pytest.approx(reference.sem(means)) and e.runs[0] == pytest.approx(means[0])
    e = findings.gain(gains_of([0.01], [*enumerate([0.03, 0.02, 0.05])]), RL, TOKENS[0])
    assert e.df == 3 and e.se == pytest.approx(reference.sem([0.01, 0.03, 0.02, 0.05]))
    short = run_of("rl", TOKENS[0], 0, 0) | {"kind": "curve", "split": "val"}
    short |= {"points": [{"step": s, "pass@1": 0.5} for s in (0, 50, 90)]}
    with pytest.raises(Missing, match="no 200 steps"):
        findings.gain(record([short]), RL, TOKENS[0])


@pytest.mark.parametrize(
    "mean, ready", [(0.0, True), (-0.2, True), (0.0165, True), (0.017, False), (0.03, False)]
)
def test_rl_has_converged_if_the_one_sided_interval_of_its_gain_ends_below_2_points(mean, ready):
    noise = np.array([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5]) / 200
    gains = mean + noise
    upper = reference.ttest_1samp(gains, 0, alternative="less").confidence_interval(0.95).high
    assert (upper < 0.02) == ready  # at 0.0165 the two-sided interval ends above
    used = [(RL, TOKENS[0], ""), (SFT, TOKENS[0], "")]
    part = Part("", of([0.1] * 8), 0.0, INFINITE, [], used, (0.01, 0.99))
    reason = findings.unready(gains_of(gains), [part])
    assert reason == ("" if ready else "rl at 1M has not converged")


USES = {  # arm -> the claims that rest on it at the early and at the last checkpoint
    "rl": ("1 1f 2 3e 4 5 8 A1 A2 A3 A4", "2 3e 4 5 A2 A3 A4"),
    "sft->rl": ("3s 5 A1 A2 A4", "3s 5 A2 A4"),
    "mix": ("5 A4", "5 A4"),
    "rl-1600-questions": ("", "2q 5q"),
    "mix-1600-questions": ("", "5q"),
    with_questions("sft->rl"): ("", "5q"),
    "n=64": ("", "7"),
    "n=5": ("", "7"),
    "more math": ("", "6"),
    "larger": ("", "6"),
    "sft": ("", ""),
}


def rests_on(arm, row, tokens):
    """Is a row, as a Record has it, one of an arm of USES at a checkpoint?"""
    where = {"tokens": tokens} | FILTERS.get(arm, {"recipe": arm})
    main = arm in FILTERS or not (row["world"] or row["model"] or row["group"])
    return main and all(row.get(key) == value for key, value in where.items())


def known(verdicts):
    """Claims whose differences are those of earlier verdicts."""
    return [Finding(number, "", "", lambda r, v=v: v.parts) for number, v in verdicts.items()]


@pytest.mark.parametrize("place", [0, 1])
def test_an_arm_whose_validation_still_rises_makes_its_claims_not_tested(
    holding, monkeypatch, place
):
    """By 3 points in the last 100 steps, at the early or the last checkpoint."""
    _, r, verdicts = holding
    still, t = r.rows, (TOKENS[1], TOKENS[-1])[place]
    for arm, claims in USES.items():

        def rising(*asked, arm=arm, **more):
            found = []
            for row in still(*asked, **more):
                if rests_on(arm, row, t):
                    last = [p | {"pass@1": p["pass@1"] + 0.03 * (p["step"] > 200)}
                            for p in row["points"]]  # fmt: skip
                    row = row | {"points": last}
                found.append(row)
            return found

        monkeypatch.setattr(r, "rows", rising)
        found = decide(r, known(verdicts))
        not_tested = [number for number, v in found.items() if v.verdict == "not tested"]
        assert not_tested == claims[place].split(), arm
        assert all("has not converged" in found[number].reason for number in not_tested)
        assert all(found[number].p == found[number].holm == 1 for number in not_tested)
        assert all(found[number].parts for number in not_tested)  # they are shown
        assert words(decide(r, known(verdicts), waived=True)) == words(verdicts)


@pytest.mark.parametrize("place", [0, 1])
def test_runs_of_an_arm_with_different_numbers_of_steps_make_its_claims_not_tested(
    holding, monkeypatch, place
):
    """One model has 600 steps; where all of them have, the claims are tested."""
    _, r, verdicts = holding
    still, t = r.rows, (TOKENS[1], TOKENS[-1])[place]
    for (arm, claims), models in itertools.product(USES.items(), ([3], MODELS)):

        def longer(*asked, arm=arm, models=models, **more):
            return [
                row | {"step": 600} if rests_on(arm, row, t) and row["pretrain_seed"] in models
                else row
                for row in still(*asked, **more)
            ]  # fmt: skip

        monkeypatch.setattr(r, "rows", longer)
        found = decide(r, known(verdicts))
        not_tested = {number: v.reason for number, v in found.items() if v.reason}
        expected = claims[place].split() if models == [3] else []
        assert [*not_tested] == expected, arm
        at = f" at {t // 1_000_000}M has runs of [300, 600] steps"
        assert all(reason.endswith(at) for reason in not_tested.values())
        tested = {number: v.verdict for number, v in found.items() if number not in not_tested}
        assert all(found[number].p == verdicts[number].p for number in tested)
        assert expected or tested == words(verdicts)


def test_a_run_that_went_on_counts_as_it_is_at_its_last_step(holding):
    """The rows of 300 steps stay beside those of 600. In seven of eight models: not tested."""
    rows, _, verdicts = holding
    main = [row for row in rows if row["recipe"] in ("base", "rl", "sft")]
    main = [row for row in main if row["world"] == "toy-math" and row["model"] == "toy"]
    main = [row for row in main if row.get("group") in (8, None)]
    ours = [row for row in main if (row["recipe"], row["tokens"]) == ("rl", TOKENS[-1])]
    further = [row | {"step": 600, "config_hash": f"{row['config_hash']} 600"} for row in ours]
    further = [row | {"checkpoint": f"{row['config_hash']}.pt"} for row in further]
    further = [
        row | {"correct": [max(c - 16, 0) for c in row["correct"]]} if "correct" in row else row
        for row in further
    ]
    assert len({*(row["checkpoint"] for row in ours + further)}) == 16
    found = decide(record(further + main))
    gaps = [
        difference([row for row in main if row not in ours] + further, "pass@1", "rl", "sft",
                   TOKENS[1:], m, "easy")
        for m in MODELS
    ]  # fmt: skip
    assert found["2"].parts[0].estimate.mean == pytest.approx(statistics.fmean(gaps))
    assert found["2"].parts[0].estimate.mean < verdicts["2"].parts[0].estimate.mean - 0.03
    assert found["2"].reason == "" and found["2"].verdict == "holds"
    seven = decide(record([row for row in further if row["pretrain_seed"] != 5] + main))
    assert seven["2"].reason == "rl at 5M has runs of [300, 600] steps"
    assert seven["2"].p == 1 and seven["2"].parts and seven["1"].verdict == "holds"
    counts = [  # of each model and question, in the longer run and in the shorter
        (max(c - 16, 0), c, row["n"]) for row in ours if "correct" in row for c in row["correct"]
    ]
    change = 100 * statistics.fmean((after - before) / n for after, before, n in counts)
    assert f"| 5M | **rl** | 300 to 600 | {change:+.1f} " in tables.longer(record(further + main))
    assert tables.longer(record(main)) == ""
    some = [row for row in further + main if row["kind"] == "pass"]
    some = [row | {"n": 16, "correct": [c // 4 for c in row["correct"]]} for row in some]
    known = "| pass@8 | pass@1 of the shorter"  # pass@32 and text loss are not
    assert known in tables.longer(record(some))


def test_seven_models_or_no_curves_test_nothing_and_show_what_there_is(holding):
    rows, r, verdicts = holding
    fewer = [v._replace(parts=[part._replace(estimate=of([0.1] * 7)) for part in v.parts])
             for v in verdicts.values()]  # fmt: skip
    for v in fewer:
        assert findings.unready(r, v.parts) == "7 models, needs 8"
    few_models = Part("", of([0.1]), 0, 1, [], [], (1.0, 1.0))
    assert findings.unready(r, [few_models]) == "1 model, needs 8"
    without = [row for row in rows if row["kind"] != "curve"]
    arms = ("base", "rl", "sft")
    found = decide(record([row for row in without if row["recipe"] in arms]))
    assert found["2"].reason == "rl at 2M: no 200 steps with validations"
    assert found["2"].parts[0].estimate == verdicts["2"].parts[0].estimate
    assert found["9"].verdict == "holds"  # has no RL
    assert found["3s"].reason == "no rows for sft->rl at 5M" and not found["3s"].parts
    assert found["5"].reason == "no rows for mix at 5M"


# ---- rows


def test_reading_keeps_the_last_row_skips_a_torn_line_and_names_a_bad_one(tmp_path, holding):
    first, second = few(holding[0], "rl")[:2]
    deep = tmp_path / "p0/hard"
    deep.mkdir(parents=True)
    save(deep, [first, second, first | {"correct": [1] * QUESTIONS}])
    with open(deep / "rows.jsonl", "a") as file:
        file.write(json.dumps(second)[:-20])
    frame, torn = read(tmp_path)
    assert len(frame) == 3 and len(torn) == 1 and "rows.jsonl:4" in torn[0]
    assert Record(frame).level(RL, TOKENS[0], "pass@1").mean == pytest.approx(1 / N)
    absent = {name: value for name, value in first.items() if name != "n"}
    bad = ["{not json}", "[]", *map(json.dumps, (first | {"kind": "x"}, absent))]
    bad += [json.dumps(first | {"correct": counts}) for counts in ([N + 1] * QUESTIONS, [1])]
    for line in bad:
        (deep / "rows.jsonl").write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(first)}\n")
        with pytest.raises(ValueError, match="rows.jsonl:2: "):
            read(tmp_path)
    (deep / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="eval.py"):
        read(tmp_path)


def test_two_runs_of_one_arm_and_seed_are_refused_and_in_a_sweep_each_rate_is_a_recipe(holding):
    rows = [row | {"lr": 1e-3} for row in few(holding[0], "rl") if row["tokens"] == TOKENS[0]]
    other = [row | {"lr": 3e-4, "config_hash": "1", "checkpoint": "y.pt"} for row in rows]
    with pytest.raises(ValueError, match="y.pt"):
        record(rows + other)
    again = [row | {"weights": "a"} for row in rows]  # the same flags, of changed code
    again += [row | {"weights": "b", "checkpoint": "mine.pt"} for row in rows]
    with pytest.raises(ValueError, match="mine.pt"):
        record(again)
    twice = [row | {"noise": 1} for row in rows] + [row | {"noise": 2} for row in rows]
    with pytest.raises(ValueError, match="measured a second time"):
        record(twice)  # of one run: not the same with more steps
    sweep = record([row | {"split": "val"} for row in rows + other])
    assert [*map(str, sweep.arms)] == ["rl lr=0.0003", "rl lr=0.001"]


def test_arms_of_no_common_model_have_no_difference(holding):
    """A record that stopped when it had a base of one model and RL of another."""
    rows = [row for row in few(holding[0], "rl", "base") if row["tokens"] == TOKENS[0]]
    other = {"pretrain_seed": 1, "seed": 1}
    r = record([row | other if row["recipe"] == "rl" else row for row in rows])
    assert r.level(RL, TOKENS[0], "pass@1") and r.level(BASE, TOKENS[0], "pass@1")
    with pytest.raises(Missing, match="no seed in all arms"):
        r.cells("pass@1", [(1, RL, TOKENS[0]), (-1, BASE, TOKENS[0])])


def test_runs_on_two_question_sets_are_two_arms(holding):
    """What a run on hard questions forgets is no part of finding 4."""
    rows = [row for row in few(holding[0], "rl", "base") if row["tokens"] == TOKENS[0]]
    for row in [row for row in rows if row["recipe"] == "rl"]:
        other = row | {"checkpoint": "hard.pt", "config_hash": "1"}
        if row["kind"] == "pass":
            rows.append(other | {"benchmark": "hard"})
        elif row["kind"] == "general":
            rows.append(other | {"right": [0] * len(row["right"])})
    r = record(rows)
    assert r.level(RL, TOKENS[0], "accuracy").mean > 0.75 and r.benchmarks == ["easy", "hard"]


def test_rows_without_a_probability_are_no_error(holding):
    rows = few(holding[0], "base", "rl")
    old = record([{k: v for k, v in row.items() if k != "probability"} for row in rows])
    assert decide(old)["4"].reason == "no probability"


def test_the_error_of_a_curve_is_over_models_or_over_their_validation_questions():
    def of_runs(runs):
        curve = run_of("rl", TOKENS[0], 0, 0) | {"kind": "curve", "split": "val"}
        rows = []
        for model, seed, value, error in runs:
            name = f"{model}-{seed}"
            point = {"step": 20, "pass@1": value, "se@1": error}
            unit = {"pretrain_seed": model, "seed": seed, "config_hash": name}
            rows.append(curve | unit | {"checkpoint": name, "points": [point]})
        return record(rows).curve(RL, TOKENS[0], "pass@1")[20]

    e = of_runs([(0, 0, 0.2, 0.03), (0, 1, 0.4, 0.05), (1, 0, 0.5, 0.03)])
    assert e.mean == pytest.approx(0.4) and e.df == 0  # seeds share their questions
    assert e.se == pytest.approx(math.hypot(0.04, 0.03) / 2)
    values = [0.2, 0.3, 0.5, 0.6]
    e = of_runs([(m, 0, x, 0.5) for m, x in enumerate(values)])
    assert e.df == 3 and e.se == pytest.approx(reference.sem(values))


# ---- what a person sees


def test_one_model_is_a_direction_said_once(tmp_path, capsys, holding):
    save(tmp_path, few(holding[0]))
    found = report.report(tmp_path, as_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["findings"] == dict.fromkeys(found, "not tested")
    assert printed.count("no verdict") == 1 and str(tmp_path / "pass1.png") in printed
    assert f"↑ {100 * found['2'].parts[0].estimate.mean:+.1f} ±" in printed
    level = record(few(holding[0])).level(RL, TOKENS[2], "pass@32")
    assert f"{100 * level.mean:.1f}" in printed
    pictures = {path.name for path in tmp_path.glob("*.png")}
    names = {"pass1.png", "recipes.png", "curves.png", "rollouts.png", "map.png"}
    assert pictures == names
    for name in ("5M", "sft->rl", "base 8-shot", "general", "claimed > 0", "claims 6, 8: not all"):
        assert name in printed, name


def test_the_map_has_an_error_over_models_whose_seeds_are_averaged(tmp_path, monkeypatch):
    drawn = {}
    keep = lambda axis, x, found, **look: drawn.update({look["label"]: [*zip(x, found)]})  # noqa
    monkeypatch.setattr(figures, "plot", keep)

    def rows_of(models, seeds):
        rows = []
        for model, seed in itertools.product(models, seeds):
            for recipe, end in (("rl", 0.3 + 0.1 * model + 0.01 * seed), ("sft", 0.2)):
                run = run_of(recipe, TOKENS[0], model, seed) | {"split": "val", "kind": "curve"}
                points = [{"step": step, "pass@1": x} for step, x in ((0, 0.0), (50, end))]
                rows.append(run | {"points": points})
        return rows

    figures.draw_map(record(rows_of([0], range(4))), tmp_path / "map.png")
    (_, start), (step, end) = drawn["1M"]
    assert (step, end.df) == (50, 0) and end.mean == pytest.approx(0.115)
    assert start.mean == pytest.approx(-0.2)
    figures.draw_map(record(rows_of(range(4), range(2))), tmp_path / "map.png")
    (_, end) = drawn["1M"][-1]
    by_model = [0.105, 0.205, 0.305, 0.405]
    assert end.df == 3 and end.se == pytest.approx(reference.sem(by_model))


def test_each_task_has_its_own_accuracy(holding):
    _, r, _ = holding
    header, rows = cells_of(tables.by_task(r))
    assert header == ["tokens", "arm", *"agreement;agreement, less the base's".split(";"),
                      *"facts;facts, less the base's".split(";")]  # fmt: skip
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert found["3M", "**base 0-shot**"][1::2] == ["-", "-"]
    level, gap = found["3M", "**sft**"][2:]
    both = [of_task(r, recipe, TOKENS[2], "facts") for recipe in ("sft", "base")]
    assert float(level.split()[0]) == pytest.approx(100 * np.mean(both[0]), abs=0.06)
    difference = [100 * (x - y) for x, y in zip(*both, strict=True)]
    half = reference.t.ppf(0.975, 7) * reference.sem(difference)
    assert gap == f"{np.mean(difference):+.1f} ±{half:.1f}"


def of_task(r, recipe, tokens, task):
    """Accuracy by model, of the rows as they are."""
    some = r.frame[(r.frame.kind == "general") & (r.frame.split == "test")]
    some = some[(some.recipe == recipe) & (some.tokens == tokens) & (some.benchmark == task)]
    some = some[(some.world == "") & (some.model == "") & (some.asked == r.main)]
    assert sorted(some.pretrain_seed) == [*MODELS]
    return [statistics.fmean(right) for right in some.sort_values("pretrain_seed").right]


def test_rows_of_a_variant_alone_are_reported(tmp_path, holding):
    rows = [row | {"share": 0.25} for row in few(holding[0], "mix")]
    save(tmp_path, rows)
    report.report(tmp_path)
    assert (tmp_path / "report.md").exists() and not (tmp_path / "recipes.png").exists()


def test_the_claims_in_full_have_their_units():
    """Text loss in nats, everything else in points."""
    e = Estimate(0.01, 0.002, 7, 8, 5, {3: 0.0126})
    accuracy = Part("rl - base, accuracy", e, -0.02, 0.02, [TOKENS[0]], [], (0.01, 0.99))
    loss = accuracy._replace(name="rl - base, loss")
    half = 0.002 * reference.t.ppf(0.975, 7)
    assert tables.span(accuracy) == f"+1.0 [{1 - 100 * half:+.1f}, {1 + 100 * half:+.1f}]"
    assert tables.span(loss) == f"+0.010 [{0.01 - half:+.3f}, {0.01 + half:+.3f}]"
    assert [tables.region(part) for part in (accuracy, loss)] == ["-2 to +2", "-0.02 to +0.02"]
    assert tables.region(accuracy._replace(high=INFINITE)) == "> -2"
    assert tables.region(accuracy._replace(low=-INFINITE, high=0.0)) == "< 0"
    seeds = accuracy._replace(low=findings.SPREAD, high=INFINITE)
    assert tables.region(seeds) == "> 2.75"
    one = e._replace(df=0)
    assert tables.span(loss._replace(estimate=one)) == "+0.010 ±0.002 SE"
    assert tables.span(loss._replace(estimate=one._replace(se=0.0))) == "+0.010"
    v = findings.Verdict("holds", "", [accuracy, loss], 0.001, 0.01)
    page = tables.in_full(*2 * [{f.number: v for f in FINDINGS}])
    assert "| 3: +1.3 |" in page and "| 3: +0.013 |" in page
    assert "waived" not in page
    not_tested = v._replace(verdict="not tested", reason="rl at 1M has not converged")
    page = tables.in_full({f.number: not_tested for f in FINDINGS}, {f.number: v for f in FINDINGS})
    assert "| with convergence waived (Holm) |" in page
    assert page.count("| holds (0.01) |") == len(FINDINGS)


def cells_of(text):
    """A Markdown table -> its header and its rows."""
    lines = [line.strip("| \n").split(" | ") for line in text.strip().splitlines()]
    return lines[0], lines[2:]


def test_of_several_differences_the_block_shows_the_one_that_decides():
    """The one that is least likely to lie where the claim says, though another is smaller."""

    def difference(name, mean, low, high=INFINITE):
        e = Estimate(mean, 0.01, 7, 8, 300, {})
        return Part(name, e, low, high, TOKENS[:1], [], chances(e, low, high))

    sure = difference("mix - rl, pass@8", 0.05, 0.0)
    weak = difference("mix - sft, pass@32", 0.06, 0.055)
    several = findings.Verdict("not resolved", "", [sure, weak], 0.3, 1.0)
    assert tables.said(several, several) == (
        "**not resolved** +6.0 [+3.6, +8.4] (mix - sft, pass@32, the weakest of 2)"
    )
    one = several._replace(parts=[sure])
    found = "+5.0 [+2.6, +7.4] (mix - rl, pass@8)"
    assert tables.said(one, one) == f"**not resolved** {found}"
    rising = one._replace(verdict="not tested", reason="rl rises")
    words = "**not tested** (rl rises; without this rule: not resolved)"
    assert tables.said(rising, one) == f"{words} {found}"
    missing = findings.Verdict("not tested", "no rows", [], 1.0, 1.0)
    assert tables.said(missing, missing) == "**not tested** (no rows)"


def test_the_convergence_of_each_arm_has_its_gain_the_bound_and_each_model():
    gains = [0.011, 0.024, 0.006, 0.019, 0.013, 0.008, 0.021, 0.002]
    r = gains_of(gains)
    r.benchmarks = [r.main]  # no questions are asked in it
    header, (row,) = cells_of(tables.convergence(r))
    along = "at step 0, 50, 100, 200, 300, 600"  # questions have one empty name, so no column
    assert header == [
        "arm",
        "tokens",
        along,
        "last 100 steps - 100 before",
        "upper bound",
        "by run",
    ]
    bound = reference.ttest_1samp(gains, 0, alternative="less").confidence_interval(0.95).high
    levels = r.curve(RL, TOKENS[0], "pass@1")
    shown = [f"{100 * levels[s].mean:.1f}" for s in (0, 50, 100, 200, 300) if s in levels]
    assert row[:3] == ["rl", "1M", ", ".join(shown)] and len(shown) > 2
    assert row[3:5] == ["+1.3", f"{100 * bound:+.2f}"]
    assert row[5] == ", ".join(f"{m}: {100 * x:+.1f}" for m, x in enumerate(gains))


def test_the_convergence_of_all_arms_of_a_record(holding):
    """A row for each arm with RL, checkpoint and question set, and none for SFT or the base."""
    rows, r, _ = holding
    header, lines = cells_of(tables.convergence(r))
    assert header[2] == "questions" and len(header) == 7 == len({*header})
    curves = [row for row in rows if row["kind"] == "curve" and row["recipe"] != "sft"]
    places = {
        (row["recipe"], row["group"], row["world"], row["model"], row["tokens"],
         row.get("asked") if row["group"] != 8 else None)
        for row in curves if row["recipe"] != "sft-1600-questions"
    }  # fmt: skip
    assert len(lines) == len(places)
    line = next(line for line in lines if line[:3] == ["sft->rl", "5M", "easy"])
    gains = []
    for row in curves:
        if (row["recipe"], row["tokens"]) == ("sft->rl", TOKENS[-1]):
            late = {p["step"]: p["pass@1"] for p in row["points"]}
            last, before = (
                [late[s] for s in steps] for steps in (range(220, 301, 20), range(120, 201, 20))
            )
            gains.append(statistics.fmean(last) - statistics.fmean(before))
    bound = reference.ttest_1samp(gains, 0, alternative="less").confidence_interval(0.95).high
    assert line[4:6] == [f"{100 * statistics.fmean(gains):+.1f}", f"{100 * bound:+.2f}"]
    assert line[6] == ", ".join(f"{m}: {100 * x:+.1f}" for m, x in enumerate(gains))
    _, few_lines = cells_of(tables.convergence(record(few(rows, "rl", "base"))))
    assert len(few_lines[0]) == 6  # no bound without four models


def test_an_unknown_recipe_has_rows_a_colour_and_a_place_beside_what_it_varies(
    tmp_path, capsys, holding, monkeypatch
):
    monkeypatch.setattr(figures, "draw", lambda r, folder: [])
    rows = few(holding[0], "base", "rl", "sft")
    rows += [row | {"recipe": "rl-dr"} for row in few(holding[0], "rl") if row["group"] == 8]
    r = record(rows)
    assert tables.references(r, Arm("rl-dr"))[0] == RL and SFT in tables.references(r, Arm("rl-dr"))
    report.report(save(tmp_path, rows))
    assert "rl-dr - rl" in capsys.readouterr().out
    assert "rl-dr - rl" in (tmp_path / "report.md").read_text()
    looks = [figures.style(r, arm) for arm in (RL, Arm("rl-dr"), SFT)]
    assert len({look["color"] for look in looks}) == 3


@pytest.mark.parametrize("recipe", ["base", "dpo"])
def test_few_rows_print_what_there_is(tmp_path, capsys, recipe, holding):
    rows = [row for row in few(holding[0], "sft") if row["tokens"] == TOKENS[1]]
    rows = [row | {"recipe": recipe} for row in rows if row["kind"] in ("pass", "general")]
    report.report(save(tmp_path, rows))
    assert recipe in capsys.readouterr().out
    assert report.report(save(tmp_path, rows[1:]))["1"].verdict == "not tested"  # no pass row
    solved = rows[0] | {"n": 8, "correct": [c // 8 for c in rows[0]["correct"]]}
    report.report(save(tmp_path, [solved]))  # no pass@32


def test_a_folder_of_records_fills_one_block_of_the_prose(tmp_path, monkeypatch, holding):
    monkeypatch.setattr(figures, "draw", lambda r, folder: [])
    one = few(holding[0], "base", "rl", "sft")
    recipes = ("base", "rl", "sft")
    main = [row for row in holding[0] if row["recipe"] in recipes and row.get("group") in (8, None)]
    main = [row for row in main if row["world"] == "toy-math" and row["model"] == "toy"]
    for name, rows in (("record-3", main), ("record-4", one), ("more", one)):
        (tmp_path / "results" / name).mkdir(parents=True)
        save(tmp_path / "results" / name, rows)
    (tmp_path / "results/earlier/record-1").mkdir(parents=True)
    save(tmp_path / "results/earlier/record-1", one)  # frozen: nothing is written there
    prose = "# Ours\n\n<!-- findings -->\nold\n<!-- /findings -->\n\n<!-- other -->\nkept\n"
    (tmp_path / "RESULTS.md").write_text(prose)
    (tmp_path / "README.md").write_text(prose)
    first = report.report(tmp_path / "results")
    block = (tmp_path / "results/findings.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == prose.replace("old\n", block)
    assert (tmp_path / "README.md").read_text() == prose
    assert "**holds**" in block and "**not tested**" in block and first["2"].verdict == "holds"
    assert "| record 3 | record 4 | records 1 and 2 |" in block
    for name in ("record-3", "record-4", "more"):
        assert (tmp_path / "results" / name / "report.md").exists()
    assert [*(tmp_path / "results/earlier").rglob("report.md")] == []
    page = (tmp_path / "results/record-3/report.md").read_text()
    assert "## Has RL converged?" in page and "Base pass@32 on validation questions: 1M" in page
    e = first["2"].parts[0].estimate
    assert f"{100 * e.mean:+.1f} [{100 * (e.mean - e.half()):+.1f}, " in page


def test_evaluating_needs_no_pandas_scipy_or_matplotlib():
    heavy = "pandas", "scipy", "matplotlib", "datasets"
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nimport eval"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
