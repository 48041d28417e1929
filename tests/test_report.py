import itertools
import json
import math
import statistics

import numpy as np
import pytest

from data import figures, report

TOKENS = (800_000, 2_800_000, 8_000_000)
LOGIT = {"base": (-6.3, -4.2, -2.6), "rl": (-3.4, -0.5, 1.6), "sft": (-1.8, -1.3, 0.4), "sft->rl": (-1.0, 0.0, 1.7),
         "mix": (-2.4, -0.6, 1.1), "sft-gold": (-1.0, 0.2, 1.2), "sft-gold->rl": (-0.6, 0.8, 1.9)}  # fmt: skip
WIDTH = {"rl": 1.5, "sft->rl": 2.6, "mix": 0.9}  # of the questions' difficulty: wide is a low pass@32 for its pass@1
IDENTITY = {"checkpoint": "x.pt", "config_hash": "0", "model": "toy", "world": "toy-math30", "pretrain_seed": 0}
IDENTITY["step"] = 60


def rows_of(recipe, index, seed, questions=120, logit=None, split="test", **extra):
    """A pass row and a general row of one cell, drawn from a logistic model with question and seed effects."""
    benchmark, shots = extra.get("benchmark", "easy"), extra.get("shots", 0)
    rng = np.random.default_rng([seed, index, len(recipe), sum(map(ord, recipe + benchmark)), shots, extra.get("group", 0)])
    difficulty = np.random.default_rng(index).normal(size=questions)  # the same questions in all arms
    logit = (LOGIT[recipe][index] if logit is None else logit) + rng.normal(0, 0 if recipe == "base" else 0.12)
    p = 1 / (1 + np.exp(-logit - WIDTH.get(recipe, 1.4) * difficulty - rng.normal(0, 0.3, questions)))
    correct = rng.binomial(32, p).tolist()
    same = {**IDENTITY, "recipe": recipe, "tokens": TOKENS[index], "seed": seed, "split": split}
    right = np.random.default_rng(7).random(400) < (0.86 if "sft" in recipe and "rl" not in recipe else 0.95)
    right = (right ^ (rng.random(400) < 0.01)).astype(int)
    yield {**same, "kind": "pass", "benchmark": benchmark, "shots": shots, "n": 32, "temperature": 0.6,
           "ids": [f"q{i}" for i in range(questions)], "correct": correct, "answers": 5.5,
           "formatted": 0.2 if shots == 0 and recipe == "base" else 0.97, "cut": 0.01, **extra}  # fmt: skip
    if not extra:
        yield {**same, "kind": "general", "benchmark": "facts", "right": right.tolist(), "probability": 0.8}


def matrix(seeds=8, recipes=tuple(LOGIT)):
    rows = []
    for index, seed in itertools.product(range(3), range(seeds)):
        for recipe in recipes:
            rows += rows_of(recipe, index, seed)
        rows += rows_of("base", index, seed, logit=LOGIT["base"][index] + 0.7, shots=8)
    return rows


@pytest.fixture(scope="module")
def eight_seeds():
    return matrix()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take seconds; tests/test_results.py looks at them."""
    monkeypatch.setattr(figures, "draw", lambda r, folder: [])


def save(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verdicts(rows):
    return report.decide(report.Results(sorted(rows, key=lambda row: row["step"])), seeds=2)


def relabel(rows, names):
    return [{**row, "recipe": names.get(row["recipe"], row["recipe"])} for row in rows]


def test_pass_at_k_equals_counting_every_subset():
    for n, k in ((1, 1), (5, 1), (6, 3), (7, 7)):
        for c in range(n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert report.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    counts = np.array([[0, 1], [31, 32]])
    assert report.pass_at_k(32, counts, 32).tolist() == [[0, 1], [1, 1]]
    exact = 1 - math.comb(99_990, 500) / math.comb(100_000, 500)  # the binomials have more digits than a float
    assert report.pass_at_k(100_000, 10, 500) == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="pass@8 needs 8 answers"):
        report.pass_at_k(4, 1, 8)
    assert report.standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(statistics.stdev([0, 1, 1, 0]) / 2)


def test_student_t_equals_the_printed_tables():
    for p, df, t in ((0.975, 1, 12.706), (0.975, 3, 3.182), (0.975, 7, 2.365), (0.95, 7, 1.895), (0.95, 15, 1.753),
                     (0.995, 7, 3.499), (0.9995, 4, 8.610), (0.975, 120, 1.980)):  # fmt: skip
        assert report.t_quantile(p, df) == pytest.approx(t, abs=6e-4)
    assert report.t_tail(0, 5) == pytest.approx(0.5) and report.t_tail(-2.365, 7) == pytest.approx(0.975, abs=1e-4)
    assert report.t_tail(1.0, 1) == pytest.approx(0.25)  # Cauchy
    assert report.t_tail(20.0, 2) == pytest.approx(0.5 - 20 / (2 * math.sqrt(402)), rel=1e-9)  # closed form
    assert report.t_tail(1.959964, 400) == pytest.approx(0.02535, abs=3e-5)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04: times 4, 3, 2, 1 = .02 .03 .06 .04, and never below the one before
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0]
    assert report.holm([0.05 / 9] + [1.0] * 8)[0] == pytest.approx(0.05)  # findings not tested still count


@pytest.mark.parametrize("seeds, seed_sd, question_sd, highest", [
    (4, 0.05, 0.10, 0.985), (8, 0.05, 0.10, 0.985), (8, 0.05, 0.25, 0.985),
    (4, 0.05, 0.25, 1.0), (4, 0.02, 0.30, 1.0), (8, 0.02, 0.30, 1.0)])  # fmt: skip
def test_intervals_cover_the_truth(seeds, seed_sd, question_sd, highest):
    """Nominal 95%, paired differences on 300 questions; sampling noise of 32 answers on top of both effects.

    Over 6,000 runs, in the order of the cases: 96.7, 96.6, 97.5; 98.5, 99.8, 98.1. Conservative, with 4 seeds up to
    99.8%, where the questions' part of the variance is as large as the seeds': it is well known and yet gets the few
    degrees of freedom of the seeds. No upper bound is tested there.
    """
    rng, covered, runs = np.random.default_rng([seeds, int(1000 * seed_sd)]), 0, 500
    for _ in range(runs):
        values = (0.1 + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, question_sd, 300)
                  + rng.normal(0, 0.1, (seeds, 300)))  # fmt: skip
        e = report.estimate({(0, seed): dict(enumerate(row)) for seed, row in enumerate(values.tolist())})
        covered += abs(e.mean - 0.1) <= e.half()
    assert 0.93 <= covered / runs <= highest, covered / runs


@pytest.mark.parametrize("seed_sd, question_sd", [(0.05, 0.1), (0.02, 0.3), (0.01, 0.1)])
def test_intervals_of_two_pre_training_runs_cover_the_truth(seed_sd, question_sd):
    """The structure of the records: 2 pre-training runs 6 points apart, 4 seeds in each, 300 questions that have the same names
    and other texts in the two runs. The truth lies on the margin of equivalence.

    Over 6,000 runs, in the order of the cases: the 95% interval covers in 95.6, 98.5, 98.6%, the 90% interval of an
    equivalence in 90.3, 94.8, 95.1%; "the same" is claimed in 0.3, 0.0, 2.6%; the mean of SE^2 is 1.02, 1.02, 1.13 of the
    variance of the estimate (as derived in `estimate`: to within 1% too large by the noise that is in both parts).
    """
    rng, estimates, runs, truth = np.random.default_rng([int(1000 * seed_sd), int(1000 * question_sd)]), [], 400, report.MARGIN
    for _ in range(runs):
        values = (truth + np.array([-0.03, 0.03])[:, None, None] + rng.normal(0, seed_sd, (2, 4, 1))
                  + rng.normal(0, question_sd, (2, 1, 300)) + rng.normal(0, 0.1, (2, 4, 300)))  # fmt: skip
        cells = {(run, seed): dict(enumerate(values[run, seed].tolist())) for run in range(2) for seed in range(4)}
        estimates.append(report.estimate(cells))
    covered = [np.mean([abs(e.mean - truth) <= e.half(level) for e in estimates]) for level in (0.95, 0.9)]
    assert 0.93 <= covered[0] <= 0.995 and 0.87 <= covered[1] <= 0.97, covered
    assert np.mean([abs(e.mean) + e.half(0.9) < report.MARGIN for e in estimates]) <= 0.05
    noise = 0.1**2 / (8 * 300)
    derived = seed_sd**2 / 8 + question_sd**2 / (2 * 300) + 2 * noise
    assert np.mean([e.se**2 for e in estimates]) == pytest.approx(derived, rel=0.1)
    assert np.var([e.mean for e in estimates]) == pytest.approx(derived - noise, rel=0.25)


def test_intervals_cover_the_truth_where_all_seeds_share_a_base():
    """rl - base: each run's base is the mean of four draws of shots, which move all its questions by 0.5 points. That part is
    in no term of SE^2, and too small to matter: over 6,000 runs the 95% interval covers in 96.8%."""
    rng, covered, runs = np.random.default_rng(5), 0, 300
    for _ in range(runs):
        rl, base = {}, {}
        for run in range(2):
            p = rng.uniform(0, 0.3, 300)
            drawn = p + rng.normal(0, 0.005, (4, 1)) + rng.normal(0, 0.05, (4, 300))
            base[run, None] = dict(enumerate(drawn.mean(0).tolist()))
            gain = 0.1 + rng.normal(0, 0.02, (4, 1)) + rng.normal(0, 0.1, 300) + rng.normal(0, 0.1, (4, 300))
            rl |= {(run, seed): dict(enumerate(values)) for seed, values in enumerate((p + gain).tolist())}
        e = report.estimate(report.combine([(1, rl), (-1, base | {(run, 0): base[run, None] for run in range(2)})]))
        covered += abs(e.mean - 0.1) <= e.half()
    assert 0.93 <= covered / runs <= 0.99, covered / runs


def test_standard_error_by_hand():
    cells = {(0, 0): {"a": 0.0, "b": 1.0}, (0, 1): {"a": 2.0, "b": 3.0, "not shared": 9.0}}
    e = report.estimate(cells)  # seed means .5, 2.5: variance 2; question means 1, 2: variance .5
    assert (e.mean, e.df, e.seeds, e.questions) == (1.5, 1, 2, 2) and e.se == pytest.approx(math.sqrt(2 / 2 + 0.5 / 2))
    two_runs = {(run, seed): {"a": 10.0 * run + seed, "b": 10.0 * run + seed} for run in (0, 1) for seed in (0, 1)}
    e = report.estimate(two_runs)  # the 10 points between two pre-training runs are shown and in no interval
    assert e.df == 2 and e.se == pytest.approx(math.sqrt(0.5 / 4)) and e.runs == {0: 0.5, 1: 10.5}
    e = report.estimate(two_runs, pooled=True)  # of 0, 1, 10, 11: variance 101 / 3
    assert e.df == 3 and e.se == pytest.approx(math.sqrt(101 / 3 / 4)) and e.runs == {0: 0.5, 1: 10.5}
    e = report.estimate({(run, seed): {"a": run + seed} for run in range(4) for seed in (0, 1)})
    assert e.df == 3 and e.se == pytest.approx(math.sqrt(statistics.variance(range(4)) / 4))  # four are the replicates


def test_runs_with_question_sets_of_their_own():
    """Those of finding 7: hardly a name is in both, and what is in both decides nothing."""
    rng = np.random.default_rng(0)
    names = {0: [f"q{i}" for i in range(40)], 1: [f"q{i}" for i in range(38, 50)]}
    cells = {(run, seed): {q: rng.random() for q in names[run]} for run, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))}
    e = report.estimate(cells)
    means = {unit: statistics.fmean(values.values()) for unit, values in cells.items()}
    spread = sum((means[u] - statistics.fmean(means[v] for v in cells if v[0] == u[0])) ** 2 for u in cells)
    of_questions = [statistics.variance([statistics.fmean(cells[u][q] for u in cells if u[0] == run) for q in names[run]]) / len(names[run])
                    for run in (0, 1)]  # fmt: skip
    assert e.mean == pytest.approx(statistics.fmean(means.values())) and (e.df, e.seeds, e.questions) == (3, 5, 52)
    assert e.se**2 == pytest.approx(spread / 3 / 5 + 0.6**2 * of_questions[0] + 0.4**2 * of_questions[1])
    assert report.combine([(1, cells), (-1, cells)]) == {unit: dict.fromkeys(values, 0) for unit, values in cells.items()}
    with pytest.raises(report.Missing, match="no seed with the same questions"):
        report.combine([(1, {(0, 0): {"a": 1.0}, (0, 1): {"b": 1.0}})])


@pytest.mark.parametrize("mean, se, verdict", [
    (0.002, 0.002, "holds"), (-0.002, 0.002, "holds"), (0.0, 0.02, "not resolved"),
    (0.018, 0.002, "not resolved"), (0.05, 0.002, "contradicted"), (-0.05, 0.002, "contradicted")])  # fmt: skip
def test_equivalence_is_the_90_percent_interval_against_2_points(mean, se, verdict):
    noise = np.array([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5])
    noise *= se * math.sqrt(8) / noise.std(ddof=1)
    cells = {(0, seed): {"one question": mean + x} for seed, x in enumerate(noise)}
    e = report.estimate(cells)
    inside, outside = abs(mean) + e.half(0.9) < 0.02, abs(mean) - e.half(0.9) > 0.02
    assert (report.p_value("equivalence", e) < 0.05) == (inside or outside)
    finding = report.Finding("", "equivalence", "", "", lambda r: ("", cells))
    assert report.decide(None, [finding])["1"].verdict == verdict


def test_swapping_recipe_labels_changes_the_verdicts(eight_seeds):
    right = verdicts(eight_seeds)
    assert [right[n].verdict for n in "12349"] == ["holds"] * 5
    swapped = verdicts(relabel(eight_seeds, {"rl": "sft", "sft": "rl"}))
    assert swapped["2"].verdict == "contradicted" and swapped["2"].estimate.mean == -right["2"].estimate.mean
    assert swapped["4"].verdict == "contradicted"
    assert verdicts(relabel(eight_seeds, {"rl": "base", "base": "rl"}))["1"].verdict != "holds"
    assert verdicts(relabel(eight_seeds, {"mix": "sft-gold", "sft-gold": "mix"}))["5"].estimate != right["5"].estimate
    turned = [{**row, "shots": 8 - row["shots"]} if row["recipe"] == "base" and "shots" in row else row
              for row in eight_seeds]  # fmt: skip
    assert verdicts(turned)["9"].verdict == "contradicted"


def test_a_row_of_the_table_from_raw_counts(eight_seeds, undrawn, tmp_path):
    """Finding 2 again, without a line of report.py but the t table: rl - sft, pass@1, 2.8M and 8M tokens."""
    verdict = report.report(save(tmp_path, eight_seeds))["2"]
    counts = {(row["recipe"], row["tokens"], row["seed"]): row["correct"] for row in eight_seeds if row["kind"] == "pass"}
    differences = [[statistics.mean((counts["rl", t, seed][q] - counts["sft", t, seed][q]) / 32 for t in TOKENS[1:])
                    for q in range(120)] for seed in range(8)]  # fmt: skip
    mean = statistics.mean(map(statistics.mean, differences))
    se = math.sqrt(statistics.variance(map(statistics.mean, differences)) / 8
                   + statistics.variance(map(statistics.mean, zip(*differences, strict=True))) / 120)  # fmt: skip
    assert (verdict.estimate.mean, verdict.estimate.se) == pytest.approx((mean, se))
    low, high = 100 * (mean - 2.3646 * se), 100 * (mean + 2.3646 * se)  # t, 7 degrees of freedom
    (line,) = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| 2 | with one")]
    assert f"{100 * mean:+.1f} [{low:+.1f}, {high:+.1f}]" in line and "at 2.8M, 8M" in line and "**holds**" in line


def test_one_seed_is_not_tested_and_shows_the_direction(tmp_path, capsys):
    rows = matrix(1)
    curve = {**rows[0], "kind": "curve", "recipe": "rl", "split": "val"}
    curve["points"] = [{"step": step, "formatted": 0.5, "pass@1": 0.1, "pass@32": 0.4} for step in (0, 10)]
    found = report.report(save(tmp_path, [*rows, curve]), json=True)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == {"findings": {str(n): "not tested" for n in range(1, 10)}}
    assert found["1"].reason == "1 seed, needs 8" and found["8"].reason == "1 seed at 2 of 2 checkpoints, needs 8"
    assert printed[0].startswith("1  not tested (1 seed, needs 8): ") and "  +" in printed[0] and "one SE over" in printed[0]
    assert (tmp_path / "dynamics.png").exists()


def test_partial_results_say_what_is_missing(tmp_path):
    found = report.report(save(tmp_path, matrix(2, ("base",))))
    assert found["2"].reason == "no rows for rl at 8M" and found["2"].verdict == "not tested"
    assert "no rows for mix at 0.8M" in (tmp_path / "report.md").read_text()
    few = [{**row, "n": 8, "correct": [c // 4 for c in row["correct"]]} for row in matrix(2) if row["kind"] == "pass"]
    assert verdicts(few)["3"].reason == "no pass@32 from 8 answers a question"
    (tmp_path / "general").mkdir()
    report.report(save(tmp_path / "general", [row for row in matrix(1) if row["kind"] == "general"]))


def test_the_arms_of_findings_6_7_8():
    rows = matrix(8, ("base", "rl"))
    for seed in range(8):
        for group, logit in ((5, 1.3), (64, 1.6)):
            rows += rows_of("rl", 2, seed, logit=logit, group=group)
        rows += [{**row, "world": "toy-math60"} for row in rows_of("rl", 2, seed, benchmark="hard", logit=1.0)]
        rows += [{**row, "model": "wide"} for row in rows_of("rl", 2, seed, benchmark="hard", logit=0.0)]
        rows += [row for row in rows_of("rl", 1, seed, logit=-2.0 if seed % 2 else 1.0) if row["kind"] == "pass"]
    found = report.decide(report.Results(rows))
    assert found["6"].verdict == "holds" and "rl in toy-math60" in found["6"].text and "rl as wide" in found["6"].text
    ends = {n: statistics.fmean(c / 32 for row in rows if row.get("group") == n for c in row["correct"]) for n in (5, 64)}
    assert found["7"].estimate.seeds == 8 and found["7"].estimate.mean == pytest.approx(ends[64] - ends[5]) and ends[64] > ends[5] + 0.02
    assert found["8"].verdict == "holds" and found["8"].estimate.mean > 0.1  # seeds apart at 2.8M, not at 8M
    assert "mean" in found["8"].text and "best of 4" in found["8"].text


def test_test_rows_win_over_validation_rows(eight_seeds):
    val = [{**row, "split": "val", **({"correct": [0] * 120} if row["recipe"] == "rl" and "n" in row else {})}
           for row in eight_seeds]  # fmt: skip
    assert verdicts(val)["2"].verdict == "contradicted" and report.Results(val).split == "val"
    assert verdicts(val + eight_seeds)["2"] == verdicts(eight_seeds)["2"]


def test_reading_keeps_the_last_row_skips_a_torn_line_and_names_a_bad_one(tmp_path):
    first, second = matrix(1, ("base",))[:2]
    again = {**first, "correct": [1] * 120}
    save(tmp_path, [first, second, again])
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write(json.dumps(second)[:-20])
    rows, torn = report.read(tmp_path)
    assert len(rows) == 2 and [row["correct"] for row in rows if "correct" in row] == [[1] * 120]
    assert len(torn) == 1 and "rows.jsonl:4: torn" in torn[0]
    bad = [("{not json}", "rows.jsonl:2"), ("[]", "not a result row"), (json.dumps({**first, "kind": "x"}), "kind"),
           (json.dumps({k: v for k, v in first.items() if k != "n"}), "no field 'n'"),
           (json.dumps({**first, "correct": [33] * 120}), "0 to n = 32"),
           (json.dumps({**first, "correct": [1]}), "120 ids")]  # fmt: skip
    for line, message in bad:
        (tmp_path / "rows.jsonl").write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(first)}\n")
        with pytest.raises(ValueError, match=message) as error:
            report.read(tmp_path)
        assert "rows.jsonl:2: " in str(error.value)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="no result rows under"):
        report.read(tmp_path)
