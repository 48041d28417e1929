"""The committed rows: the verdicts that they were committed with, and contrasts again, from the
raw counts and without a line of results/."""

import functools
import json
import statistics
from math import comb, sqrt

import pytest
from scipy import stats as reference

from helpers import ROOT
from results import rows
from results.findings import decide

RESULTS = ROOT / "results"
SAVED = json.loads((ROOT / "tests/saved_verdicts.json").read_text())  # before they were merged


@functools.cache
def raw(name):
    lines = (RESULTS / name / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@functools.cache
def decided(name):
    return decide(rows.Record(rows.read(RESULTS / name)[0]))


@pytest.mark.parametrize("name", SAVED)
def test_the_committed_rows_have_the_committed_verdicts(name):
    found = decided(name).values()
    for v, saved in zip(found, SAVED[name], strict=True):
        e = v.estimate
        told = {"mean": e.mean, "half": e.half(), "p": v.p, "holm": v.holm}
        assert v.verdict == saved["verdict"] and e.seeds >= 8
        assert told == pytest.approx({name: saved[name] for name in told}, abs=1e-9)
    prose = (ROOT / "RESULTS.md").read_text()
    block = (RESULTS / "findings.md").read_text()
    assert f"<!-- findings -->\n{block}<!-- /findings -->" in prose
    for i, v in enumerate(found, 1):
        (line,) = [line for line in block.splitlines() if line.startswith(f"| {i} |")]
        cell = line.split(" | ")[3 + list(SAVED).index(name)]
        assert f"**{v.verdict}** {100 * v.estimate.mean:+.1f} [" in cell


def arm(name, k, **where):
    """{(run, seed): {question: pass@k by binomials}} of the main world and model."""
    where = {"kind": "pass", "split": "test", "world": "toy-math30", "model": "toy"} | where
    found = {}
    for row in raw(name):
        if all(row.get(key) == value for key, value in where.items()):
            total = comb(row["n"], k)
            solved = [1 - comb(row["n"] - c, k) / total for c in row["correct"]]
            found[row["pretrain_seed"], row["seed"]] = dict(zip(row["ids"], solved, strict=True))
    return found


def interval(terms, level=0.95):
    """Mean and interval in points of the sum of weight * arm; questions have the same names."""
    units = sorted(set.intersection(*(set(found) for _, found in terms)))
    questions = [*terms[0][1][units[0]]]
    values = {u: [sum(w * found[u][q] for w, found in terms) for q in questions] for u in units}
    means = {unit: statistics.fmean(x) for unit, x in values.items()}
    runs = {run: [mean for unit, mean in means.items() if unit[0] == run] for run, _ in units}
    df = len(units) - len(runs)
    within = sum(statistics.variance(same) * (len(same) - 1) for same in runs.values())
    columns = [statistics.fmean(column) for column in zip(*values.values(), strict=True)]
    se = sqrt(within / df / len(units) + statistics.variance(columns) / len(columns))
    half = reference.t.ppf((1 + level) / 2, df) * se
    mean = statistics.fmean(means.values())
    return pytest.approx([100 * x for x in (mean, mean - half, mean + half)], abs=1e-9)


def of(name, number, level=0.95):
    e = decided(name)[number].estimate
    return [100 * x for x in (e.mean, e.mean - e.half(level), e.mean + e.half(level))]


@pytest.mark.parametrize("name", SAVED)
def test_finding_2_from_raw_counts(name):
    terms = []
    for tokens in (4900864, 7000064):
        same = {"benchmark": "easy", "tokens": tokens}
        terms += [(0.5, arm(name, 1, recipe="rl", group=8, **same))]
        terms += [(-0.5, arm(name, 1, recipe="sft", **same))]
    e = decided(name)["2"].estimate
    assert [100 * x for x in (e.mean, e.mean - e.half(), e.mean + e.half())] == interval(terms)


def test_the_records_run_with_the_rates_that_the_sweep_chose():
    assert not any("-test-" in q for row in raw("sweep") for q in row.get("ids", ()))
    r = rows.Record(rows.read(RESULTS / "sweep")[0])
    levels = {str(a): [r.level(a, t, "pass@1") for t in r.tokens] for a in r.arms}
    twice = {name: sum(e.mean for e in found) for name, found in levels.items() if all(found)}
    for recipe in ("rl", "sft", "mix", "sft-gold"):
        best = max((name for name in twice if name.startswith(f"{recipe} ")), key=twice.get)
        used = [row for row in raw("record-1") if (row["recipe"], row["model"]) == (recipe, "toy")]
        rates = [f" lr={row['lr']:g}" + f" sft_lr={row.get('sft_lr', 0):g}" for row in used]
        assert all(rate.startswith(best.removeprefix(recipe)) for rate in rates)


def test_at_most_20_files_of_rows():
    assert 0 < len([*RESULTS.rglob("*.jsonl")]) <= 20
    assert len([row for path in RESULTS.glob("*/rows.jsonl") for row in open(path)]) == 4132
