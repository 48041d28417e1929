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
from results import figures, report, tables
from results.findings import BARE, RL, SFT, Finding, decide
from results.rows import Arm, Missing, Record, combined, read
from results.stats import MARGIN, estimate, holm, p_value, pass_at_k, standard_error

TOKENS = (800_000, 2_800_000, 8_000_000)
LOGIT = {
    "base": (-6.3, -4.2, -2.6),
    "rl": (-3.4, -0.5, 1.6),
    "sft": (-1.8, -1.3, 0.4),
    "sft->rl": (-1.0, 0.0, 1.7),
    "mix": (-2.4, -0.6, 1.1),
    "sft-gold": (-1.0, 0.2, 1.2),
    "sft-gold->rl": (-0.6, 0.8, 1.9),
}
WIDTH = {"rl": 1.5, "sft->rl": 2.6, "mix": 0.9}  # of the questions: wide is a low pass@32


def rows_of(recipe, index, seed, questions=120, logit=None, split="test", **extra):
    """A pass row and a general row of one cell, by a logistic model of questions and seeds."""
    benchmark, shots = extra.get("benchmark", "easy"), extra.get("shots", 0)
    name = sum(map(ord, recipe + benchmark))
    rng = np.random.default_rng([seed, index, name, shots, extra.get("group", 0)])
    difficulty = np.random.default_rng(index).normal(size=questions)  # the same in all arms
    logit = LOGIT[recipe][index] if logit is None else logit
    logit += rng.normal(0, 0 if recipe == "base" else 0.12)
    width = WIDTH.get(recipe, 1.4)
    p = 1 / (1 + np.exp(-logit - width * difficulty - rng.normal(0, 0.3, questions)))
    forgets = "sft" in recipe and "rl" not in recipe
    right = np.random.default_rng(7).random(400) < (0.86 if forgets else 0.95)
    same = {"checkpoint": "x.pt", "config_hash": "0", "model": "toy", "world": "toy-math30"}
    same |= {"recipe": recipe, "tokens": TOKENS[index], "pretrain_seed": 0, "seed": seed}
    same |= {"step": 60, "split": split}
    solved = {"n": 32, "ids": [f"q{i}" for i in range(questions)], "formatted": 0.97}
    solved |= {"correct": rng.binomial(32, p).tolist(), "shots": shots, "benchmark": benchmark}
    yield same | {"kind": "pass"} | solved | extra
    if not extra:
        right = (right ^ (rng.random(400) < 0.01)).astype(int).tolist()
        yield same | {"kind": "general", "benchmark": "facts", "right": right}


def matrix(seeds=8, recipes=tuple(LOGIT)):
    rows = []
    for index, seed in itertools.product(range(3), range(seeds)):
        for recipe in recipes:
            rows += rows_of(recipe, index, seed)
        rows += rows_of("base", index, seed, logit=LOGIT["base"][index] + 0.7, shots=8)
    return rows


def save(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def record(rows):
    columns = ["benchmark", "shots", "group", "share", "share_end", "lr", "sft_lr", "flops", "n"]
    frame = pd.DataFrame(rows).assign(place="here:1")
    return Record(frame.reindex(columns=frame.columns.union(columns, sort=False)))


def verdicts(rows):
    return decide(record(rows), seeds=2)


def relabel(rows, names):
    return [row | {"recipe": names.get(row["recipe"], row["recipe"])} for row in rows]


@pytest.fixture(scope="module")
def eight_seeds():
    return matrix()


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


def test_one_run_of_one_question_is_a_t_test():
    values = [0.03, 0.05, 0.01, 0.04, 0.02]
    e = estimate(pd.DataFrame({(0, i): {"q": x} for i, x in enumerate(values)}))
    test = reference.ttest_1samp(values, 0)
    assert p_value("difference > 0", e) == pytest.approx(test.pvalue)
    low, high = test.confidence_interval(0.95)
    assert (e.mean - e.half(), e.mean + e.half()) == pytest.approx((low, high))
    outside = reference.ttest_1samp(values, MARGIN, alternative="greater").pvalue
    assert p_value("equivalence", e) == pytest.approx(min(outside, 1 - outside))


def test_holm_by_hand():
    # sorted .005 .01 .03 .04: times 4, 3, 2, 1 = .02 .03 .06 .04, and never below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.05 / 9] + [1.0] * 8)[0] == pytest.approx(0.05)  # those not tested count


def test_standard_error_by_hand():
    seeds = {(0, 0): {"a": 0.0, "b": 1.0}, (0, 1): {"a": 2.0, "b": 3.0, "not shared": 9.0}}
    e = estimate(
        pd.DataFrame(seeds)
    )  # seed means .5, 2.5: variance 2; question means 1, 2: variance .5
    assert (e.mean, e.df, e.seeds, e.questions) == (1.5, 1, 2, 2)
    assert e.se == pytest.approx(math.sqrt(2 / 2 + 0.5 / 2))
    two = {(run, seed): dict.fromkeys("ab", 10 * run + seed) for run in (0, 1) for seed in (0, 1)}
    e = estimate(
        pd.DataFrame(two)
    )  # the 10 points between two pre-training runs are in no interval
    assert e.df == 2 and e.se == pytest.approx(math.sqrt(0.5 / 4)) and e.runs == {0: 0.5, 1: 10.5}
    e = estimate(pd.DataFrame(two), pooled=True)  # of 0, 1, 10, 11: variance 101 / 3
    assert e.df == 3 and e.se == pytest.approx(math.sqrt(101 / 3 / 4))
    e = estimate(pd.DataFrame({(run, i): {"a": run + i} for run in range(4) for i in (0, 1)}))
    assert e.df == 3 and e.se == pytest.approx(math.sqrt(statistics.variance(range(4)) / 4))


def test_runs_with_question_sets_of_their_own():
    """Those of finding 7: hardly a name is in both, and what is in both decides nothing."""
    rng = np.random.default_rng(0)
    names = {0: [f"q{i}" for i in range(40)], 1: [f"q{i}" for i in range(38, 50)]}
    units = (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)
    values = {unit: {q: rng.random() for q in names[unit[0]]} for unit in units}
    e = estimate(pd.DataFrame(values))
    means = {unit: statistics.fmean(found.values()) for unit, found in values.items()}
    runs = {run: [mean for unit, mean in means.items() if unit[0] == run] for run in (0, 1)}
    spread = sum(statistics.variance(same) * (len(same) - 1) for same in runs.values())
    each = [
        statistics.variance(
            [statistics.fmean(values[u][q] for u in units if u[0] == run) for q in names[run]]
        )
        / len(names[run])
        for run in (0, 1)
    ]
    assert e.mean == pytest.approx(statistics.fmean(means.values()))
    assert (e.df, e.seeds, e.questions) == (3, 5, 52)
    assert e.se**2 == pytest.approx(spread / 3 / 5 + 0.6**2 * each[0] + 0.4**2 * each[1])


@pytest.mark.parametrize("seed_sd, question_sd", [(0.05, 0.1), (0.02, 0.3), (0.01, 0.1)])
@pytest.mark.parametrize("runs", [1, 2])
def test_intervals_cover_the_truth(runs, seed_sd, question_sd):
    """Nominal 95%, with sampling noise on top of both effects. Two runs lie 6 points apart and
    have other questions under the same names, as in the records; the truth is on the margin."""
    rng = np.random.default_rng([runs, int(1000 * seed_sd)])
    units = [(run, seed) for run in range(runs) for seed in range(8 // runs)]
    apart, found = np.repeat([-0.03, 0.03][:runs] if runs == 2 else [0.0], 8 // runs), []
    for _ in range(300):
        questions = np.repeat(rng.normal(0, question_sd, (runs, 300)), 8 // runs, axis=0)
        seeds = MARGIN + apart[:, None] + rng.normal(0, seed_sd, (8, 1))
        values = seeds + questions + rng.normal(0, 0.1, (8, 300))
        found.append(estimate(pd.DataFrame(values.T, columns=pd.MultiIndex.from_tuples(units))))
    covered = np.mean([abs(e.mean - MARGIN) <= e.half() for e in found])
    assert 0.92 <= covered <= 1.0
    assert np.mean([abs(e.mean) + e.half(0.9) < MARGIN for e in found]) <= 0.06  # "the same"
    derived = seed_sd**2 / 8 + question_sd**2 / (300 * runs) + 2 * 0.1**2 / (8 * 300)
    assert np.mean([e.se**2 for e in found]) == pytest.approx(derived, rel=0.12)


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


# ---- rules


@pytest.mark.parametrize(
    "mean, se, verdict",
    [
        (0.002, 0.002, "holds"),
        (-0.002, 0.002, "holds"),
        (0.0, 0.02, "not resolved"),
        (0.018, 0.002, "not resolved"),
        (0.05, 0.002, "contradicted"),
        (-0.05, 0.002, "contradicted"),
    ],
)
def test_equivalence_is_the_90_percent_interval_against_2_points(mean, se, verdict):
    noise = np.array([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5])
    noise *= se * math.sqrt(8) / noise.std(ddof=1)
    found = pd.DataFrame({(0, seed): {"one question": mean + x} for seed, x in enumerate(noise)})
    e = estimate(found)
    inside, outside = abs(mean) + e.half(0.9) < MARGIN, abs(mean) - e.half(0.9) > MARGIN
    assert (p_value("equivalence", e) < 0.05) == (inside or outside)
    finding = Finding("", "", "equivalence", "", lambda r: (found, []))
    assert decide(None, [finding])["1"].verdict == verdict


def test_swapping_recipe_labels_turns_the_verdicts(eight_seeds):
    right = verdicts(eight_seeds)
    assert [right[n].verdict for n in "12349"] == ["holds"] * 5
    swapped = verdicts(relabel(eight_seeds, {"rl": "sft", "sft": "rl"}))
    assert swapped["2"].verdict == "contradicted" == swapped["4"].verdict
    assert swapped["2"].estimate.mean == -right["2"].estimate.mean
    assert verdicts(relabel(eight_seeds, {"rl": "base", "base": "rl"}))["1"].verdict != "holds"
    mixed = verdicts(relabel(eight_seeds, {"mix": "sft-gold", "sft-gold": "mix"}))
    assert mixed["5"].estimate != right["5"].estimate
    turned = [
        row | {"shots": 8 - row["shots"]} if row["recipe"] == "base" and "n" in row else row
        for row in eight_seeds
    ]
    assert verdicts(turned)["9"].verdict == "contradicted"


def test_the_arms_of_findings_6_7_8():
    rows = matrix(8, ("base", "rl"))
    for seed in range(8):
        for group, logit in ((5, 1.3), (64, 1.6)):
            rows += rows_of("rl", 2, seed, logit=logit, group=group)
        for logit, where in ((1.0, {"world": "toy-math60"}), (0.0, {"model": "wide"})):
            rows += [row | where for row in rows_of("rl", 2, seed, benchmark="hard", logit=logit)]
        apart = rows_of("rl", 1, seed, logit=-2.0 if seed % 2 else 1.0)
        rows += [row for row in apart if row["kind"] == "pass"]
    found = decide(record(rows))
    ends = {
        group: statistics.fmean(
            c / 32 for row in rows if row.get("group") == group for c in row["correct"]
        )
        for group in (5, 64)
    }
    assert found["6"].verdict == "holds" and found["6"].tokens == [TOKENS[2]]
    assert found["7"].estimate.mean == pytest.approx(ends[64] - ends[5])
    assert found["8"].verdict == "holds" and found["8"].estimate.mean > 0.1  # apart at 2.8M


def test_a_checkpoint_with_few_seeds_does_not_shrink_a_contrast(eight_seeds):
    few = [
        row
        for row in eight_seeds
        if not (row["recipe"] == "rl" and row["tokens"] == TOKENS[0] and row["seed"] % 2)
    ]
    found = verdicts(few)["4"]
    assert found.estimate.seeds == 8 and found.tokens == [*TOKENS[1:]]


# ---- rows


def test_reading_keeps_the_last_row_skips_a_torn_line_and_names_a_bad_one(tmp_path):
    first, second = matrix(1, ("base",))[:2]
    deep = tmp_path / "p0/hard"
    deep.mkdir(parents=True)
    save(deep, [first, second, first | {"correct": [1] * 120}])
    with open(deep / "rows.jsonl", "a") as file:
        file.write(json.dumps(second)[:-20])
    frame, torn = read(tmp_path)
    assert len(frame) == 3 and len(torn) == 1 and "rows.jsonl:4" in torn[0]
    level = Record(frame).level(BARE, TOKENS[0], "pass@1")
    assert level.mean == pytest.approx(1 / 32)
    absent = {name: value for name, value in first.items() if name != "n"}
    bad = ["{not json}", "[]", *map(json.dumps, (first | {"kind": "x"}, absent))]
    bad += [json.dumps(first | {"correct": counts}) for counts in ([33] * 120, [1])]
    for line in bad:
        (deep / "rows.jsonl").write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(first)}\n")
        with pytest.raises(ValueError, match="rows.jsonl:2: "):
            read(tmp_path)
    (deep / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="eval.py"):
        read(tmp_path)


def test_two_runs_of_one_arm_and_seed_are_refused_and_in_a_sweep_each_rate_is_a_recipe():
    rows = [row | {"lr": 1e-3} for row in rows_of("rl", 0, 0)]
    other = [row | {"lr": 3e-4, "config_hash": "1", "checkpoint": "y.pt"} for row in rows]
    with pytest.raises(ValueError, match="y.pt"):
        record(rows + other)
    sweep = record([row | {"split": "val"} for row in rows + other])
    assert [*map(str, sweep.arms)] == ["rl lr=0.0003", "rl lr=0.001"]


def test_runs_on_two_question_sets_are_two_arms():
    """What a run on hard questions forgets is no part of finding 4."""
    rows = [*rows_of("rl", 0, 0), *rows_of("base", 0, 0)]
    hard = [row | {"checkpoint": "hard.pt", "config_hash": "1"} for row in rows_of("rl", 0, 0)]
    solved, general = hard
    rows += [solved | {"benchmark": "hard"}, general | {"right": [0] * 400}]
    r = record(rows)
    assert r.level(RL, TOKENS[0], "accuracy").mean > 0.9 and r.benchmarks == ["easy", "hard"]


# ---- what a person sees


def test_one_seed_is_a_direction_said_once(tmp_path, capsys):
    curve = matrix(1)[0] | {"kind": "curve", "recipe": "rl", "split": "val"}
    points = [{"step": step, "formatted": 0.5, "pass@1": 0.1, "pass@32": 0.4} for step in (0, 5, 9)]
    short = [{"step": point["step"], "pass@1": 0.2} for point in points]  # without a pass@32
    curves = [curve | {"points": points}, curve | {"points": short, "recipe": "mix"}]
    save(tmp_path, [*matrix(1), *curves])
    found = report.report(tmp_path, as_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["findings"] == dict.fromkeys(found, "not tested")
    assert printed.count("no verdict") == 1 and str(tmp_path / "pass1.png") in printed
    level = record(matrix(1)).level(RL, TOKENS[2], "pass@32")
    assert (
        f"{100 * level.mean:.1f}" in printed and f"{100 * found['2'].estimate.mean:+.1f}" in printed
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "pass1.png",
        "recipes.png",
        "curves.png",
    }
    for name in ("8M", "sft-gold->rl", "base 8-shot", "general"):
        assert name in printed


def test_an_unknown_recipe_has_rows_a_colour_and_a_place_beside_what_it_varies(tmp_path, capsys):
    own = relabel(matrix(2, ("rl",)), {"rl": "rl-dr", "base": "dpo"})
    own = [row for row in own if row.get("shots") != 8]
    rows = [*matrix(2, ("base", "rl", "sft")), *own]
    r = record(rows)
    assert tables.references(r, Arm("rl-dr"))[0] == RL and SFT in tables.references(r, Arm("rl-dr"))
    report.report(save(tmp_path, rows))
    assert "rl-dr - rl" in capsys.readouterr().out
    assert "rl-dr - rl" in (tmp_path / "report.md").read_text()
    looks = [figures.style(r, arm) for arm in (RL, Arm("rl-dr"), SFT)]
    assert len({look["color"] for look in looks}) == 3


@pytest.mark.parametrize("recipe", ["base", "dpo"])
def test_few_rows_print_what_there_is(tmp_path, capsys, recipe):
    known = recipe if recipe in LOGIT else "rl"
    rows = [row | {"recipe": recipe} for row in rows_of(known, 1, 0)]
    report.report(save(tmp_path, rows))
    assert recipe in capsys.readouterr().out
    assert report.report(save(tmp_path, rows[1:]))["1"].verdict == "not tested"  # no pass row
    solved = rows[0] | {"n": 8, "correct": [c // 4 for c in rows[0]["correct"]]}
    report.report(save(tmp_path, [solved]))  # no pass@32


def test_a_folder_of_records_fills_one_block_of_the_prose(tmp_path, monkeypatch, eight_seeds):
    monkeypatch.setattr(figures, "draw", lambda r, folder: [])
    few = matrix(2, ("base", "rl", "sft"))
    for name, rows in (("record-1", eight_seeds), ("record-2", few), ("more", few)):
        (tmp_path / "results" / name).mkdir(parents=True)
        save(tmp_path / "results" / name, rows)
    prose = "# Ours\n\n<!-- findings -->\nold\n<!-- /findings -->\n\n<!-- other -->\nkept\n"
    (tmp_path / "RESULTS.md").write_text(prose)
    (tmp_path / "README.md").write_text(prose)
    first = report.report(tmp_path / "results")
    block = (tmp_path / "results/findings.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == prose.replace("old\n", block)
    assert (tmp_path / "README.md").read_text() == prose
    assert "**holds**" in block and "**not tested**" in block and first["2"].verdict == "holds"
    assert all(
        (tmp_path / "results" / name / "report.md").exists() for name in ("record-2", "more")
    )


def test_evaluating_needs_no_pandas_scipy_or_matplotlib():
    heavy = "pandas", "scipy", "matplotlib", "datasets"
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nimport eval"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
