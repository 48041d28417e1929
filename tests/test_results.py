"""The committed rows: that they are read, and differences again, from the raw counts and without a
line of results/. The verdicts of records 1 and 2 had other rules, and are in their reports."""

import collections
import functools
import json
import statistics
from math import comb, hypot

import pytest
from scipy import stats as reference

from helpers import ROOT
from results import rows
from results.findings import MIX, RL, SFT, decide
from results.tables import training

EARLIER = ROOT / "results/earlier"
MIDDLE, LAST = 4900864, 7000064


@functools.cache
def raw(name):
    lines = (EARLIER / name / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@functools.cache
def record(name):
    return rows.Record(rows.read(EARLIER / name)[0])


def solved(name, k, arm, tokens):
    """{(model, seed): {question: pass@k by binomials}} of the main world and model."""
    where = {"kind": "pass", "split": "test", "world": "toy-math30", "model": "toy"}
    where |= {"benchmark": "easy", "tokens": tokens, "recipe": arm.recipe}
    where |= {} if arm == SFT else {"group": 8}
    found = {}
    for row in raw(name):
        if all(row.get(key) == value for key, value in where.items()):
            total = comb(row["n"], k)
            each = [1 - comb(row["n"] - c, k) / total for c in row["correct"]]
            unit = row["pretrain_seed"], row["seed"]
            found[unit] = dict(zip(row["ids"], each, strict=True))
    return found


@pytest.mark.parametrize("name", ["record-1", "record-2"])
@pytest.mark.parametrize("k, first, second", [(1, RL, SFT), (32, MIX, SFT)])
def test_differences_from_raw_counts(name, k, first, second):
    """On the seeds of both arms, the mean of two models and the standard error over questions."""
    for tokens in (MIDDLE, LAST):
        one, other = (solved(name, k, arm, tokens) for arm in (first, second))
        shared = sorted(one.keys() & other.keys())
        assert len(shared) == 8  # of two models
        gaps = {}
        for model in sorted({model for model, _ in shared}):
            units = [unit for unit in shared if unit[0] == model]
            gaps[model] = [
                statistics.fmean(one[unit][question] - other[unit][question] for unit in units)
                for question in one[units[0]]
            ]
        e = record(name).gap(f"pass@{k}", first, second, tokens)
        means = [*map(statistics.fmean, gaps.values())]
        assert [*e.runs] == [*gaps] and [*e.runs.values()] == pytest.approx(means)
        assert e.mean == pytest.approx(statistics.fmean(means)) and e.df == 0
        assert e.se == e.half() == pytest.approx(hypot(*map(reference.sem, gaps.values())) / 2)


@pytest.mark.parametrize("name", ["record-1", "sweep", "why"])
def test_earlier_rows_are_read_and_test_no_claim_of_8_models(name):
    """Records 1 and 2 have two models, and RL of 60 steps."""
    found = decide(record(name))
    assert {v.verdict for v in found.values()} == {"not tested"}
    assert all(v.p == v.holm == 1 for v in found.values())
    if name == "record-1":
        assert found["2"].reason == "2 models, needs 8"
        assert found["8"].reason == "rl at 4.9M: no 200 steps with validations"


def test_the_records_run_with_the_rates_that_the_sweep_chose():
    assert not any("-test-" in q for row in raw("sweep") for q in row.get("ids", ()))
    r = record("sweep")
    levels = {str(a): [r.level(a, t, "pass@1") for t in r.tokens] for a in r.arms}
    twice = {name: sum(e.mean for e in found) for name, found in levels.items() if all(found)}
    for recipe in ("rl", "sft", "mix", "sft-gold"):
        best = max((name for name in twice if name.startswith(f"{recipe} ")), key=twice.get)
        used = [row for row in raw("record-1") if (row["recipe"], row["model"]) == (recipe, "toy")]
        rates = [f" lr={row['lr']:g}" + f" sft_lr={row.get('sft_lr', 0):g}" for row in used]
        assert all(rate.startswith(best.removeprefix(recipe)) for rate in rates)


def test_the_claims_of_record_3_from_raw_counts():
    """Every difference of two trained arms in pass@k, without a line of results/; its mean over
    models, and with four models or more its standard error over them."""
    lines = (ROOT / "results/record-3/rows.jsonl").read_text().splitlines()
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in map(json.loads, lines):
        alike = row["kind"] == "pass" and row["split"] == "test" and row["model"] == "toy"
        alike = alike and row["seed"] == row["pretrain_seed"]  # not the other seeds of claim 8
        if alike and row["world"] == "toy-math30" and row["benchmark"] == "easy":
            for k in (1, 8, 32):
                none = [comb(row["n"] - c, k) / comb(row["n"], k) for c in row["correct"]]
                place = row["recipe"], row["tokens"], f"pass@{k}"
                found[place][row["pretrain_seed"]].append(1 - statistics.fmean(none))
    checked = 0
    for v in decide(rows.Record(rows.read(ROOT / "results/record-3")[0])).values():
        for part in v.parts:
            arms, _, metric = part.name.rpartition(", ")
            names = arms.split(" - ")
            if "base" in arms or metric not in ("pass@1", "pass@8", "pass@32") or len(names) != 2:
                continue
            gaps = collections.defaultdict(list)
            for t in part.tokens:
                one, other = (found[name, t, metric] for name in names)
                for model in one.keys() & other.keys():
                    gaps[model].append(one[model][0] - other[model][0])
            means = [statistics.fmean(each) for _, each in sorted(gaps.items())]
            assert part.estimate.mean == pytest.approx(statistics.fmean(means))
            assert [*part.estimate.runs.values()] == pytest.approx(means)
            if len(means) > 3:
                assert part.estimate.se == pytest.approx(reference.sem(means))
            checked += 1
    assert checked >= 10


def test_the_costs_of_record_3_from_raw_rows():
    """Seconds and FLOPs of pre-training and of one arm by its steps, each run once."""
    lines = (ROOT / "results/record-3/rows.jsonl").read_text().splitlines()
    shown = training(rows.Record(rows.read(ROOT / "results/record-3")[0]))
    asked = [("pre-training", "base", [None], 5859), ("rl", "rl", ["easy"], 300)]
    for name, recipe, questions, steps in [*asked, ("rl", "rl", ["easy", "hard"], 600)]:
        runs = {}
        for row in map(json.loads, lines):
            own = (
                row["recipe"] == recipe and row["model"] == "toy" and row.get("group") in (8, None)
            )
            own = (
                own
                and row["world"] == "toy-math30"
                and row.get("benchmark") in [*questions, "text"]
            )
            if own and row.get("flops") and row["step"] == steps:
                seed = 0 if recipe == "base" else row["seed"]
                runs[row["checkpoint"], seed] = row["seconds"], row["flops"]
        seconds, flops = (statistics.fmean(x) for x in zip(*runs.values(), strict=True))
        hours = seconds * len(runs) / 3600
        line = f"| {name} | {steps} | {len(runs)} | {seconds:,.0f} | {flops:.2e} | {hours:.2f} |"
        assert line in shown


def test_at_most_20_files_of_rows():
    assert 0 < len([*(ROOT / "results").rglob("*.jsonl")]) <= 20
    assert len([row for path in EARLIER.glob("*/rows.jsonl") for row in open(path)]) == 4132
