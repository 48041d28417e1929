"""A folder of records: side by side, the sweep, the marked blocks; and the committed results, recomputed by other code."""

import contextlib
import functools
import io
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from math import comb, sqrt

import mpmath
import numpy as np
import pytest
from helpers import ROOT, call, refused

import mix
import rl
import sft
from data import figures, report, tables

TOKENS = (2_000_000, 4_000_000, 6_000_000)
LOGIT = {"base": (-5.5, -3.8, -2.4), "rl": (-4.0, -0.6, 1.2), "sft": (-1.8, -1.2, 0.3), "sft->rl": (-1.1, 0.0, 1.4),
         "mix": (-2.2, -0.6, 1.0), "sft-gold": (-1.0, 0.2, 1.2), "sft-gold->rl": (-0.6, 0.8, 1.8), "mix-text": (0, -0.7, 0),
         "text": (0, 0, -2.3), "rl->text": (0, 0, 0.2)}  # fmt: skip
WIDTH = {"base": 1.0, "rl": 1.0, "sft->rl": 2.6, "mix": 0.7}  # of the questions' difficulty: wide is a low pass@32
RUN = {"": {"lr": 4e-3}, "rl": {"group": 8, "lr": 3e-4}, "sft": {"lr": 2e-3}, "mix": {"group": 8, "share": 0.5, "lr": 3e-4, "sft_lr": 2e-3}}
EVERY = [(run, run * 4 + i) for run in (0, 1) for i in range(4)]  # 2 pre-training seeds x 4


def cell(recipe, t, unit, benchmark="easy", logit=None, split="test", shots=0, questions=40, **more):
    """All rows of one checkpoint: pass, general, text, and a curve where there is RL."""
    run, seed = unit
    own = benchmark.startswith("split")  # questions of this pre-training run alone, more of them easy ones
    questions = {"split-easy": 40 + 8 * run, "split-hard": 20}.get(benchmark, questions)
    place = TOKENS.index(t)
    key = [seed, place, shots, *map(ord, recipe + benchmark + split), *map(ord, json.dumps(more))]
    rng = np.random.default_rng(key)
    difficulty = np.random.default_rng([run, len(benchmark), len(split)]).normal(size=questions)
    logit = (LOGIT[recipe][place] if logit is None else logit) + (0 if recipe == "base" else rng.normal(0, 0.12))
    p = 1 / (1 + np.exp(-logit - WIDTH.get(recipe, 1.2) * difficulty - rng.normal(0, 0.2, questions)))
    stage = "rl" if recipe.endswith("rl") else "mix" if recipe.startswith("mix") else "sft" if "sft" in recipe else ""
    base = recipe == "base"
    name = f"ckpt/p{run}/{t}" + ("" if base else "-".join(["", recipe, benchmark, *map(str, more.values()), f"s{seed}"]))
    same = {"checkpoint": f"{name}.pt", "config_hash": name, "model": "toy", "world": "toy-math30", "recipe": recipe, "tokens": t,
            "pretrain_seed": run, "seed": seed, "step": 1 if base else 50, "split": split, **RUN.get(stage, {}), **more}  # fmt: skip
    many = more.get("group") == 64
    cost = {"flops": 4e12 if many else 2e12, "questions": 80 if many else 800, "sampled_tokens": 9e4, "seconds": 40.0}
    if not base or t == TOKENS[-1]:
        same |= cost
    ids = [f"{benchmark}-{f'{run}-' * own}{i}" for i in range(questions)]
    yield {**same, "kind": "pass", "benchmark": benchmark, "shots": shots, "n": 32, "ids": ids,
           "correct": rng.binomial(32, p).tolist(), "formatted": 0.9, "cut": 0.0, "answers": 4.0}  # fmt: skip
    forgets = 0.88 if recipe in ("sft", "sft-gold") else 0.95
    for task, items in (("facts", 120), ("lastword", 80)):
        right = np.random.default_rng([run, items]).random(items) < forgets
        right = (right ^ (rng.random(items) < (0.0 if base else 0.01))).astype(int)  # likelihoods: no draw of a base changes them
        yield {**same, "kind": "general", "benchmark": task, "right": right.tolist(), "probability": 0.8}
    loss = np.random.default_rng(run).normal(1.5, 0.2, 30) + {"sft": 0.2, "mix": 0.1, "rl": 0.03}.get(recipe, 0.0)
    yield {**same, "kind": "text", "benchmark": "text", "losses": (loss + rng.normal(0, 0.01, 30)).round(5).tolist()}
    if stage == "rl":
        points = []
        for step in range(0, 51, 5 if many else 10):
            done = step / 50
            point = {"step": step, "formatted": 0.2 + 0.7 * done, **{name: value * done for name, value in cost.items()}}
            point |= {f"pass@{k}": float(p.mean() ** (1 / (1 + k / 8)) * done) for k in (1, 2, 4, 8, 16, 32)}
            points.append(point | ({"reward": float(p.mean() * done)} if step else {}))
        yield {**same, "kind": "curve", "split": "val", "points": points}


def record(shift=0.0, everything=True):
    """8 seeds of each of the paper's arms; and 16 of `rl` at two checkpoints, the arms of findings 6 and 7, and fewer of what no
    verdict rests on. shift: of the logit of `rl`."""
    rows = []
    for t, unit in itertools.product(TOKENS, EVERY):
        for shots in (0, 1, 3):
            rows += cell("base", t, unit, shots=shots, logit=LOGIT["base"][TOKENS.index(t)] + 0.2 * shots)
        for recipe in report.RECIPES[1:]:
            rows += cell(recipe, t, unit, logit=LOGIT[recipe][TOKENS.index(t)] + shift * (recipe == "rl"))
    for t, run in itertools.product(TOKENS, (0, 1)):
        rows += cell("base", t, (run, run * 4), split="val")
    if not everything:
        return rows
    middle, last = TOKENS[1:]
    for t, unit in itertools.product((middle, last), [(run, 8 + run * 4 + i) for run in (0, 1) for i in range(4)]):
        rows += cell("rl", t, unit)
    for unit in EVERY:
        for recipe, logit in (("base", -3.5), ("rl", -1.5))[unit[1] % 4 > 0:]:  # one row of the base for each run
            rows += cell(recipe, last, unit, "hard", logit)
            rows += cell(recipe, last, unit, "hard", logit + 0.8, world="toy-math60")
            rows += cell(recipe, last, unit, "hard", logit + 0.3, model="toy-large")
        for group, benchmark in itertools.product((5, 64), ("split-easy", "split-hard")):
            rows += cell("rl", last, unit, benchmark, 0.4 if "easy" in benchmark else -1.5, group=group)
    for unit in EVERY[::2]:  # four seeds
        for share, logit in ((0.1, -0.9), (0.25, -0.8), (0.75, -0.5), (0.9, -0.5)):
            rows += cell("mix", middle, unit, logit=logit, share=share)
        rows += cell("mix", middle, unit, logit=-0.3, share=0.0, share_end=1.0)
        rows += [*cell("mix-text", middle, unit), *cell("text", last, unit), *cell("rl->text", last, unit)]
    return rows


def sweep_rows():
    rows = [*cell("base", TOKENS[1], (9, 9), split="val")]
    for lr, logit in ((1e-4, -1.5), (3e-4, -0.5), (1e-3, -2.0)):
        rows += cell("rl", TOKENS[1], (9, 9), split="val", logit=logit, lr=lr)
        rows += cell("mix", TOKENS[1], (9, 9), split="val", logit=logit - 0.1, lr=3e-4, sft_lr=10 * lr)
    return rows


def why_rows():
    """rl, sft and recipes of one's own, on validation questions; and 256 answers a question, a fifth of the base's in format."""
    arms = {"rl": -0.5, "sft": -0.7, "rl-50-questions": -1.5, "sft-50-questions": -2.5, "rl-240-steps": -0.2}
    rows = [row for unit in EVERY[::2] for recipe, logit in arms.items() for row in cell(recipe, TOKENS[2], unit, split="val", logit=logit)]
    many = [row | {"n": 256, "correct": [8 * count for count in row["correct"]], "formatted": 0.2 if recipe == "base" else 1.0}
            for recipe in ("base", "rl") for row in cell(recipe, TOKENS[1], (0, 0), split="val") if row["kind"] == "pass"]  # fmt: skip
    return rows, many


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for run in sorted({row["pretrain_seed"] for row in rows}):
        (folder / f"p{run}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["pretrain_seed"] == run))
    return folder


def told(folder):
    """The lines that `eval.py --report FOLDER --json` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report.report(folder, json=True)
    return out.getvalue().splitlines()


def undrawn(r, folder):
    """In place of figures.draw, which takes seconds: the figures that the report names."""
    return re.findall(r"!\[(.+)\]", (folder / "report.md").read_text())


def block(text, name):
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


def decided(rows):
    return report.decide(report.Results(sorted(rows, key=lambda row: row["step"])), seeds=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> the folder of two records, the second one smaller, and a sweep, and the lines that its report printed."""
    folder = tmp_path_factory.mktemp("made") / "results"
    write(folder / "record-1", record())
    write(folder / "record-2", record(-1.5, everything=False))
    write(folder / "sweep", sweep_rows())
    write(folder / "sweep-again", [row for row in sweep_rows() if row["recipe"] != "mix"])
    for name, rows in zip(("why", "why-many"), why_rows(), strict=True):
        write(folder / name, rows)
    marks = "\n\n".join(f"<!-- {name} -->\nan old number: 12.3\n<!-- /{name} -->" for name in tables.BLOCKS)
    (folder.parent / "RESULTS.md").write_text(f"# Results\n\n{marks}\n\nThe end.\n")
    (folder.parent / "README.md").write_text("# Us\n\n<!-- findings-short -->\n<!-- /findings-short -->\n")
    draw = figures.draw
    with pytest.MonkeyPatch.context() as patch:  # the figures of one record are enough
        patch.setattr(figures, "draw", lambda r, path: draw(r, path) if path.name == "record-1" else [])
        return folder, told(folder)


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A copy of it that is drawn without figures: they take seconds."""
    monkeypatch.setattr(figures, "draw", undrawn)
    shutil.copytree(made[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "results"


@pytest.fixture(scope="module")
def everything(made):
    """The rows of record 1."""
    return report.read(made[0] / "record-1")[0]


@pytest.fixture(params=["made", "committed"])
def results(request):
    """A folder of records with its report: the one made here, and the repository's."""
    if request.param == "made":
        return request.getfixturevalue("made")[0]
    return committed()


def committed():
    if not (ROOT / "results/record-1").is_dir():
        pytest.skip("no results/record-1: the run of record is not in the repository yet")
    return ROOT / "results"


# ---- records and blocks


def test_each_record_is_decided_on_its_own_rows(made, copy):
    folder, printed = made
    found = json.loads(printed[-1])
    assert set(found) == {"findings", "record-2"}
    for name, verdicts in zip(("record-1", "record-2"), (found["findings"], found["record-2"]), strict=True):
        alone = report.decide(report.Results(report.read(folder / name)[0]))
        assert verdicts == {number: verdict.verdict for number, verdict in alone.items()}
    (copy / "record-2/report.md").write_text("")
    (copy / "README.md").write_text("<!-- nobody -->\n")  # a folder of rows leaves it alone
    assert json.loads(told(copy / "record-2")[-1]) == {"findings": found["record-2"]}  # as a folder of rows, alone
    assert (copy / "record-2/report.md").read_bytes() == (folder / "record-2/report.md").read_bytes()
    assert found["findings"]["2"] == "holds" and found["record-2"]["2"] == "contradicted"
    assert found["findings"]["7"] != "not tested" == found["record-2"]["7"]
    table = (folder / "report.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| 2 | with one")]
    *_, paper, first, second, _ = line.split(" | ") + [""]
    assert "10B +5.3" in paper and first.startswith("**holds** +") and second.startswith("**contradicted** -")


def test_every_figure_is_drawn_and_small(made):
    drawn = {path.name: path.stat().st_size for path in (made[0] / "record-1").glob("*.png")}
    assert set(drawn) == {"pass-easy.png", "dynamics.png", "general.png", "rollouts.png", "seeds.png", "data-size.png",
                          "budget.png", "budget-more.png", "shares.png", "text.png", "gone-on.png"}  # fmt: skip
    assert all(5_000 < size < 100_000 for size in drawn.values())
    page = (made[0] / "record-1/report.md").read_text()
    assert all(f"![{name}]({name})" in page for name in drawn)


def test_what_was_explored_afterwards_has_tables_of_its_own(made):
    text = (made[0].parent / "RESULTS.md").read_text()
    differences, answers, tasks = block(text, "why").split("\n\n")
    arms = [line.split(" | ")[1:3] for line in answers.splitlines()[2:]]
    assert arms == [[name, "4"] for name in ("rl", "sft", "rl-240-steps", "rl-50-questions", "sft-50-questions")]
    assert [line.split(" | ")[1] for line in tasks.splitlines()[2:]] == [name for name, _ in arms]
    differences = [line.strip("| ").split(" | ") for line in differences.splitlines()[2:]]
    assert [line[1] for line in differences] == ["rl - sft", "rl-240-steps - sft", "rl-50-questions - sft-50-questions"]
    ones = {name: [statistics.fmean(row["correct"]) / 0.32 for row in why_rows()[0] if (row["kind"], row["recipe"]) == ("pass", name)]
            for name, _ in arms}  # fmt: skip
    for _, name, seeds, one, *_ in differences:
        first, second = (statistics.fmean(ones[arm]) for arm in name.split(" - "))
        assert seeds == "4" and float(one.split(" ±")[0]) == pytest.approx(first - second, abs=0.051)
    assert tables.rivals("rl-lr-3e-4 n=64", ["sft"]) == ["rl n=5"]
    assert tables.rivals("mix as wide", ["sft", "sft as wide"]) == ["sft as wide"]
    few = ["sft", "sft-5-questions", "sft-5-questions-9-epochs", "sft-50-questions"]
    assert tables.rivals("rl-5-questions", few) == few[1:3] and tables.rivals("mix-lr-6e-4", few) == ["sft"]
    base, rl = [line.strip("| ").split(" | ") for line in block(text, "many").splitlines()[2:]]
    assert base[:4] == ["4M", "base 0-shot", "1", "20"] and rl[:4] == ["4M", "rl", "1", "100"]
    counts = next(row for row in why_rows()[1] if row["recipe"] == "base")["correct"]
    at = [100 * statistics.fmean(1 - comb(256 - c, k) / comb(256, k) for c in counts) for k in (1, 32, 256, 160)]  # 160 = 32 / 0.2
    assert [float(cell.split(" ")[0]) for cell in base[4:8]] == pytest.approx(at, abs=0.051)
    assert base[8] == f"0: {base[7].split(' ')[0]}" and rl[7] == rl[5] and len(rl) == 9  # itself: no difference
    assert float(base[9].split(" ")[0]) == pytest.approx(float(rl[7].split(" ")[0]) - at[3], abs=0.11)
    assert (made[0] / "why-many/pass-k.png").stat().st_size > 5000 and (made[0] / "why/questions.png").stat().st_size > 5000


def test_blocks_are_replaced_and_a_second_run_changes_nothing(made, copy):
    text = (made[0].parent / "RESULTS.md").read_text()
    assert "an old number" not in text and text.startswith("# Results\n") and text.endswith("\n\nThe end.\n")
    assert all(len(block(text, name)) > 100 for name in tables.BLOCKS)
    assert block(text, "findings-short") == block((made[0].parent / "README.md").read_text(), "findings-short")
    pages = [copy.parent / "RESULTS.md", copy.parent / "README.md", *copy.rglob("*.md")]
    before = {path: path.read_bytes() for path in pages}
    told(copy)
    assert {path: path.read_bytes() for path in pages} == before
    stale = text.replace("| 4M | rl | 16 | ", "| 4M | rl | 16 | 9", 1).replace("The end.", "The end, as before.")
    assert stale != text
    (copy.parent / "RESULTS.md").write_text(stale)
    told(copy)
    assert (copy.parent / "RESULTS.md").read_text() == text.replace("The end.", "The end, as before.")


@pytest.mark.parametrize("marks, says", [("<!-- finding -->\n<!-- /finding -->", "has a block 'finding'; there are findings, "),
                                         ("<!-- levels -->\n", "the block 'levels' has no end")])  # fmt: skip
def test_a_block_that_nobody_knows_or_that_has_no_end(copy, capsys, marks, says):
    text = f"# Us\n\n{marks}\n"
    (copy.parent / "README.md").write_text(text)
    assert says in refused(capsys, "eval", report=copy)
    assert (copy.parent / "README.md").read_text() == text


# ---- the sweep


def test_the_sweep_has_an_arm_a_rate_and_marks_the_highest_pass_at_1(made, tmp_path):
    assert report.choose({"a": 0.1, "b": 0.4, "c": 0.3}) == "b"
    lines = block((made[0].parent / "RESULTS.md").read_text(), "sweep").splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| rl", "easy", "lr 0.0001"], ["| rl", "easy", "lr 0.0003"], ["| rl", "easy", "lr 0.001"],
        *(["| mix", "easy", f"lr 0.0003, SFT {rate}"] for rate in (0.001, 0.003, 0.01))]  # fmt: skip
    counts = {row["lr"]: row["correct"] for row in sweep_rows() if (row["recipe"], row["kind"]) == ("rl", "pass")}
    for line, rate in zip(lines, counts, strict=False):
        assert f"| {100 * statistics.mean(counts[rate]) / 32:.1f} / " in line
        assert line.endswith("| chosen |") == (rate == 3e-4)
    assert block((made[0].parent / "RESULTS.md").read_text(), "sweep-again").splitlines()[2:] == lines[:3]


def test_a_setting_that_was_tried_at_more_checkpoints_is_chosen(tmp_path):
    """By its mean: 2e-3 is the best at the first checkpoint and was not tried again; 3e-4 is the second there and worse later."""
    rows = [*sweep_rows(), *cell("rl", TOKENS[1], (9, 9), split="val", logit=3.0, lr=2e-3)]
    for lr, logit in ((1e-4, 2.0), (3e-4, -2.5)):
        rows += cell("rl", TOKENS[2], (9, 9), split="val", logit=logit, lr=lr)
    lines = [line for line in tables.sweep_table(report.sweep(write(tmp_path, rows))).splitlines() if line.startswith("| rl ")]
    assert [line.endswith("| chosen |") for line in lines] == [True, False, False, False]
    assert [line.split(" | ")[4] == "-" for line in lines] == [False, False, True, True]


def test_a_sweep_alone_has_the_table(made, copy, capsys):
    assert report.report(copy / "sweep") == {}
    text = block((made[0].parent / "RESULTS.md").read_text(), "sweep")
    assert capsys.readouterr().out == text and text in (copy / "sweep/report.md").read_text()


def test_a_rate_makes_no_arm_in_a_record_and_test_rows_none_in_the_sweep(tmp_path):
    with pytest.raises(ValueError, match="are two runs of one arm and seed"):
        report.read(write(tmp_path / "record-1", sweep_rows()))
    with pytest.raises(ValueError, match="sweep has test rows of ckpt/p9"):
        report.sweep(write(tmp_path / "sweep", [{**row, "split": "test"} for row in sweep_rows()]))
    with pytest.raises(ValueError, match="are two runs of one arm and seed"):
        report.report(tmp_path / "sweep")  # as a record


# ---- rows and arms


def test_runs_on_two_question_sets_are_two_arms(everything):
    """n = 5 on the easy split and on the hard one have curves and general capability of their own; what RL on hard questions
    forgets is no part of finding 4."""
    r = report.Results(everything)
    last = [r.curve("rl n=5", TOKENS[2], "pass@1", benchmark)[50].mean for benchmark in ("split-easy", "split-hard")]
    assert last[0] > last[1] + 0.2
    assert r.level("rl n=5 on split-easy", TOKENS[2], "accuracy").seeds == 8 and r.level("rl n=5", TOKENS[2], "accuracy") is None
    assert r.curve("rl", TOKENS[2], "pass@1")[50].seeds == 16
    lost = [{**row, "right": [0] * len(row["right"])} if row["kind"] == "general" and row["on"] == "hard" else row
            for row in everything]
    assert report.decide(report.Results(lost))["4"] == report.decide(r)["4"]


def test_arms_with_few_seeds_do_not_shrink_a_primary_contrast(everything):
    whole = decided(everything)
    assert [whole[n].estimate.seeds for n in "12345679"] == [16, *[8] * 7] and whole["8"].estimate.seeds == 16
    few = [row for row in everything if not (row["recipe"] == "rl" and row["tokens"] == TOKENS[0] and row["seed"] % 2)]
    found = decided(few)["4"]  # of all checkpoints: without the one that has 4 seeds
    assert found.estimate.seeds == 16 and found.text.endswith("at 4M, 6M")
    two = [row for row in everything if not (row["recipe"] == "rl" and (row["seed"] % 2 or row["seed"] >= 8))]  # none has 8
    assert decided(two)["4"].estimate.seeds == 4 and decided(two)["4"].text.endswith("at 2M, 4M, 6M")


def test_a_base_is_the_mean_of_its_draws_beside_an_arm_and_pairs_them_against_itself(everything):
    r = report.Results(everything)
    counts = {(row["recipe"], row["shots"], row["pretrain_seed"], row["seed"]): np.array(row["correct"]) / 32 for row in everything
              if row["kind"] == "pass" and row["tokens"] == TOKENS[2] and row["benchmark"] == "easy" and row["split"] == "test"
              and row.get("group", 8) == 8}  # fmt: skip
    cells = r.cells("pass@1", report.minus("rl", "base 3-shot", TOKENS[2:]))
    expected = counts["rl", 0, 1, 5] - np.mean([counts["base", 3, 1, seed] for seed in range(4, 8)], axis=0)
    assert len(cells) == 16 and [*cells[1, 5].values()] == pytest.approx(expected.tolist())
    cells = r.cells("pass@1", report.minus("base 3-shot", "base 0-shot", TOKENS[2:]))
    assert [*cells] == EVERY
    assert [*cells[1, 5].values()] == pytest.approx((counts["base", 3, 1, 5] - counts["base", 0, 1, 5]).tolist())
    ninth = decided(everything)["9"]
    assert ninth.estimate.df == 6 and ninth.text.startswith("base 3-shot ") and ninth.text.endswith("; at 6M")


def test_validation_rows_of_the_base_name_the_middle_and_what_decides(everything):
    def base(share, t):  # all validation questions of the base solved in so large a share
        return [{**row, "correct": [32 * (i < share * 40) for i in range(40)]} if row["kind"] == "pass" and row["recipe"] == "base"
                and row["split"] == "val" and row["tokens"] == t else row for row in everything]  # fmt: skip

    assert decided(base(0.3, TOKENS[1]))["1"].text.endswith("at 4M") and decided(base(0.275, TOKENS[1]))["1"].text.endswith("at 6M")
    assert decided(base(0.8, TOKENS[2]))["3"].text.endswith("at 4M, 6M") and decided(base(0.825, TOKENS[2]))["3"].text.endswith("at 4M")
    without = [row for row in everything if row["split"] != "val" or row["kind"] == "curve"]
    assert decided(without)["1"].text.endswith("at 4M")  # on test rows then: 69% by its better shots


# ---- tables


def test_costs_count_each_run_once(made):
    lines = block((made[0].parent / "RESULTS.md").read_text(), "costs").splitlines()
    assert "| pre-training |  | 2 / 80 / 4.00e+12 | 2 / 80 / 4.00e+12 | - | - | - |" in lines  # of 3 checkpoints, 8 draws, 3 shots
    sweeps = "3 / 120 / 6.00e+12 | 3 / 120 / 6.00e+12"
    assert f"| rl | easy | 40 / 1,600 / 8.00e+13 | 24 / 960 / 4.80e+13 | {sweeps} | 4 / 160 / 8.00e+12 |" in lines
    assert "| rl n=5 | split-hard | 8 / 320 / 1.60e+13 | - | - | - | - |" in lines
    runs = 6 + 16 + 6 * 24 + 3 * 8 + 4 * 8 + 8 * 4
    assert any(line.startswith(f"| all |  | {runs} / {40 * runs:,} / ") for line in lines)


def test_seeds_have_the_reward_of_the_last_10_steps_and_the_best_of_4(everything):
    r = report.Results(everything)
    found = tables.ends(r)
    assert [*found] == [*TOKENS[1:]] and all(len(at) == 16 for at in found.values())
    (curve,) = [row for row in everything if (row["kind"], row["recipe"], row["tokens"], row["seed"], row.get("group")) ==
                ("curve", "rl", TOKENS[1], 13, 8)]  # fmt: skip
    reward, one, _ = found[TOKENS[1]][1, 13]
    assert reward == curve["points"][-1]["reward"] and one == pytest.approx(reward, abs=0.05)
    ends = [values for unit, values in found[TOKENS[2]].items() if unit[0] == 1]  # of one pre-training run
    fours = [max(four, key=lambda values: values[1]) for four in itertools.combinations(ends, 4)]  # chosen by pass@1
    best = [statistics.mean(values[i] for values in fours) for i in (1, 2)]
    assert report.best_of_4([values[1] for values in ends]) == pytest.approx(best[0]) and report.best_of_4([0.2, 0.1]) == 0.2
    spread = [line.strip(" |").split(" | ") for line in tables.spread(r).splitlines() if line.startswith("| easy | 6M | 1 | 8 |")]
    ones, lots = ([100 * values[i] for values in ends] for i in (1, 2))
    assert spread[0][4] == f"{min(ones):.1f} to {max(ones):.1f}"
    assert spread[0][6] == f"{100 * statistics.stdev(ones) / statistics.mean(ones):.0f}%"
    assert [float(spread[0][i]) for i in (5, 8)] == pytest.approx([statistics.stdev(x) for x in (ones, lots)], abs=0.051)
    line = [line for line in tables.seeds(r).splitlines() if line.startswith("| 1 | best of 4 by pass@1 |")][0]
    assert [float(cell) for cell in line.strip(" |").split(" | ")[6:]] == pytest.approx([100 * x for x in best], abs=0.051)


def test_curves_have_the_error_of_their_questions(everything):
    """The seeds of a run share its validation questions, so their spread does not know of them."""
    rows = json.loads(json.dumps(everything))
    before = report.Results(rows).curve("rl", TOKENS[1], "pass@1")[50]
    for row in rows:
        for point in row.get("points", ()):
            point["se@1"] = 0.1
    after = report.Results(rows).curve("rl", TOKENS[1], "pass@1")[50]
    assert after.mean == before.mean and after.se**2 == pytest.approx(before.se**2 + 2 * 0.05**2)
    assert report.Results(rows).curve("rl", TOKENS[1], "formatted")[50].se < 0.05


def test_what_64_answers_need_to_come_near(everything):
    assert tables.reached([0, 10, 20], [0.0, 0.4, 0.8], 0.6) == "15.0" and tables.reached([0, 10], [0.0, 0.5], 0.6) == "-"
    assert tables.reached([5, 10], [0.7, 0.9], 0.6) == "5.0" and tables.reached([0, 10, 20], [0.0, 0.7, 0.8], 0.6) == "< 10.0"
    lines = [line.split(" | ") for line in tables.rollouts(report.Results(everything)).splitlines()[2:6]]
    assert [line[0][2:] + line[2] for line in lines] == [f"split-{level}rl n={n}" for level in ("easy", "hard") for n in (5, 64)]
    for five, many in (lines[:2], lines[2:]):  # the curves are straight lines from 0: 90% of the lower end is their way to it
        assert [float(cell) for cell in (five[6], five[8], many[6], many[8])] == [800, 2e12, 80, 4e12]
        ends = [statistics.fmean(point["pass@1"] for row in everything for point in row.get("points", ()) if point["step"] == 50
                                 and row["on"] == five[0][2:] and row["group"] == n) for n in (5, 64)]  # fmt: skip
        for line, end in zip((five, many), ends, strict=True):
            way = [0.9 * min(ends) / end * float(line[i]) for i in (6, 8)]
            assert [float(line[10]), float(line[11])] == pytest.approx(way, rel=0.005)
            assert float(line[12].split(" ±")[0]) == pytest.approx(100 * end, abs=0.051) and line[12].endswith("(50) |")


def test_text_losses_are_paired_with_the_base(everything):
    losses = {(row["recipe"], row["pretrain_seed"], row["seed"], row["tokens"]): np.array(row["losses"]) for row in everything
              if row["kind"] == "text" and row["split"] == "test" and row.get("share") in (None, 0.5)
              and (row["recipe"] == "base") == ("group" not in row) and row["world"] == "toy-math30"}  # fmt: skip
    t, u = TOKENS[1:]
    means = [np.mean(losses["mix-text", *unit, t] - losses["rl", *unit, t]) for unit in EVERY[::2]]
    (line,) = [line for line in tables.beyond(report.Results(everything)).splitlines() if line.startswith("| 4M | mix-text |")]
    assert line.split(" | ")[-1].startswith(f"{np.mean(means):+.3f} ±")
    gone = [line for line in tables.beyond(report.Results(everything)).splitlines() if line.startswith("| rl->text at 6M - text at 6M |")]
    assert len(gone) == 1 and tables.gone_on(report.Results(everything)) == [(t, u, u)]
    order = tables.shares(report.Results(everything), t)
    assert order == ["mix share=0.1", "mix share=0.25", "mix", "mix share=0.75", "mix share=0.9", "mix share=0-1"]


# ---- the table again, without a line of report.py


class Raw:
    """The rows of a record."""

    def __init__(self, folder):
        self.all = [json.loads(line) for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text().splitlines()]
        kinds = [(row["world"], row["model"]) for row in self.all]
        self.rows = [row for row, kind in zip(self.all, kinds, strict=True) if kind == statistics.mode(kinds)]
        self.group = statistics.mode(row["group"] for row in self.rows if row["recipe"] == "rl")

    @staticmethod
    def solved(rows, k):
        """{(pre-training seed, seed): {question: pass@k by binomials}}."""
        return {(row["pretrain_seed"], row["seed"]):
                {q: 1 - comb(row["n"] - c, k) / comb(row["n"], k) for q, c in zip(row["ids"], row["correct"], strict=True)}
                for row in rows}  # fmt: skip

    def arm(self, recipe, tokens, k, split="test", shots=0):
        """Of the main world and model, on easy questions."""
        return self.solved((row for row in self.rows if
                (row["kind"], row["recipe"], row["tokens"], row["split"], row.get("benchmark"), row.get("shots"))
                == ("pass", recipe, tokens, split, "easy", shots) and row.get("group") in (None, self.group)
                and row.get("share") in (None, 0.5) and row.get("share_end") in (None, 0.5)), k)  # fmt: skip

    def base(self, tokens, k, split="test"):
        """{pre-training seed: {question: mean over the draws}} of the shots with the highest mean."""
        shots = {row["shots"] for row in self.rows if row["recipe"] == "base" and row["kind"] == "pass" and row["benchmark"] == "easy"}
        arms = [arm for n in sorted(shots) if (arm := self.arm("base", tokens, k, split, n))]
        best = max(arms, key=lambda arm: statistics.fmean(statistics.fmean(values.values()) for values in arm.values()))
        return {run: {q: statistics.fmean(values[q] for (r, _), values in best.items() if r == run) for q in next(iter(best.values()))}
                for run in {run for run, _ in best}}  # fmt: skip

    def tokens(self, *recipes, low=0.0, high=1.0):
        """Checkpoints with 8 seeds of each and so much base pass@32 on validation."""
        found = []
        for t in sorted({row["tokens"] for row in self.rows if row["recipe"] == "rl"}):
            base = statistics.fmean(statistics.fmean(values.values()) for values in self.base(t, 32, "val").values())
            if low <= base <= high and all(len(self.arm(recipe, t, 1)) >= 8 for recipe in recipes):
                found.append(t)
        return found

    def sixth(self):
        rows = [row for row in self.all if (row["kind"], row["recipe"], row.get("benchmark")) == ("pass", "rl", "hard")]
        return [(1, self.solved((row for row in rows if row["world"] == "toy-math60"), 1)),
                (-1, self.solved((row for row in rows if row["model"] == "toy-large"), 1))]  # fmt: skip

    def seventh(self):
        """Each benchmark has half of the weight; a run has its own questions."""
        arms = []
        for sign, group in ((1, 64), (-1, 5)):
            easy, hard = (self.solved((row for row in self.all if row["kind"] == "pass" and row["benchmark"] == f"split-{level}"
                                       and row.get("group") == group), 1) for level in ("easy", "hard"))  # fmt: skip
            arms.append((sign, {unit: {q: value * (len(easy[unit]) + len(hard[unit])) / 2 / len(part[unit])
                                       for part in (easy, hard) for q, value in part[unit].items()} for unit in easy.keys() & hard}))
        return arms

    def eighth(self):
        """Distances from the median seed of a run as values of one question."""
        arms, tokens = [], self.tokens("rl", low=0.3)
        for sign, t in ((1, tokens[0]), (-1, tokens[-1])) if len(tokens) > 1 else ():
            ends = {unit: statistics.fmean(values.values()) for unit, values in self.arm("rl", t, 1).items()}
            medians = {run: statistics.median(end for (r, _), end in ends.items() if r == run) for run, _ in ends}
            arms.append((sign, {unit: {"distance": abs(end - medians[unit[0]])} for unit, end in ends.items()}))
        return arms

    def second(self):
        tokens = self.tokens("rl", "sft", low=0.3)
        return [(sign / len(tokens), self.arm(name, t, 1)) for t in tokens for sign, name in ((1, "rl"), (-1, "sft"))]

    def third(self):
        tokens, arms = self.tokens("rl", "sft", "sft->rl", low=0.3, high=0.8), []
        for t in tokens:
            rl, base = self.arm("rl", t, 32), self.base(t, 32)
            arms += [(1, rl), (-1, {unit: base[unit[0]] for unit in rl}), (-1, self.arm("sft->rl", t, 32)), (1, self.arm("sft", t, 32))]
        return [(sign / len(tokens), arm) for sign, arm in arms]

    def fourth(self):
        tokens, arms = self.tokens("rl"), []
        on_easy = {row["checkpoint"] for row in self.rows if row["kind"] == "pass" and row["benchmark"] == "easy"}
        tasks = sorted({row["benchmark"] for row in self.rows if row["kind"] == "general"})
        for recipe, t in itertools.product(("rl", "base"), tokens):
            arm = {}
            for row in self.rows:
                if (row["kind"], row["recipe"], row["tokens"], row["split"]) == ("general", recipe, t, "test") and (
                        row["checkpoint"] in on_easy and row.get("group") in (None, self.group)):  # fmt: skip
                    mine = arm.setdefault((row["pretrain_seed"], row["seed"]), {})
                    mine.update({(row["benchmark"], i): right / len(row["right"]) for i, right in enumerate(row["right"])})
            if recipe == "base":  # the same whatever the draw
                rl = {unit for _, values in arms for unit in values}
                arm = {unit: next(values for (run, _), values in arm.items() if run == unit[0]) for unit in rl}
            items = len(next(iter(arm.values())))  # mean over all items of value * items / (tasks * items of the task)
            arms.append(((1 if recipe == "rl" else -1) / len(tokens),
                         {unit: {q: v * items / len(tasks) for q, v in values.items()} for unit, values in arm.items()}))  # fmt: skip
        return arms


@functools.cache
def raw(folder):
    return Raw(folder)


def interval(arms, level):
    """Mean and interval in points of the sum of weight * arm, as the rules say it."""
    units = sorted(set.intersection(*(set(arm) for _, arm in arms)))
    asked = {run: set.intersection(*(set(arm[unit]) for _, arm in arms for unit in units if unit[0] == run)) for run, _ in units}
    cells = {unit: {q: sum(weight * arm[unit][q] for weight, arm in arms) for q in asked[unit[0]]} for unit in units}
    means = {unit: statistics.fmean(values.values()) for unit, values in cells.items()}
    runs = {run: [mean for unit, mean in means.items() if unit[0] == run] for run in asked}
    assert 2 <= len(runs) <= 3 and len(units) >= 8
    df = len(units) - len(runs)
    of_seeds = sum((mean - statistics.fmean(same)) ** 2 for same in runs.values() for mean in same) / df / len(units)
    same = len({frozenset(questions) for questions in asked.values()}) == 1
    of_questions = 0
    for of in [units] if same else [[unit for unit in units if unit[0] == run] for run in runs]:
        column = [statistics.fmean(cells[unit][q] for unit in of) for q in asked[of[0][0]]]
        of_questions += (len(of) / len(units)) ** 2 * (np.var(column, ddof=1) / len(column) if len(column) > 1 else 0)
    tail = (1 - level) / 2
    t = mpmath.findroot(lambda t: mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True) / 2 - tail, 2)
    mean, half = statistics.fmean(means.values()), float(t) * sqrt(of_seeds + of_questions)
    return [100 * x for x in (mean, mean - half, mean + half)]


ROWS = [(2, Raw.second, 0.95), (3, Raw.third, 0.95), (4, Raw.fourth, 0.9),
        (6, Raw.sixth, 0.95), (7, Raw.seventh, 0.9), (8, Raw.eighth, 0.95)]  # fmt: skip


@pytest.mark.parametrize("number, finding, level", ROWS)
def test_a_row_of_the_table_from_raw_counts(results, number, finding, level):
    begins = f"| {number} | {report.FINDINGS[number - 1].claim} | "
    (line,) = [line for line in (results / "report.md").read_text().splitlines() if line.startswith(begins)]
    for name, cell in zip(sorted(path.name for path in results.glob("record-*")), line.strip("| ").split(" | ")[4:], strict=True):
        arms = finding(raw(results / name))
        eight = len(set.intersection(*(set(arm) for _, arm in arms)) if arms else ()) >= (16 if number == 8 else 8)
        assert eight != ("not tested" in cell), cell
        if eight:
            printed = [float(x) for x in re.search(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", cell).groups()]
            assert printed == pytest.approx(interval(arms, level), abs=0.0501), name


def test_verdicts_follow_from_the_p_values(results):
    """Holm over the nine by hand, and the word that belongs to it, from what is printed."""
    lines = [line.strip("| ").split(" | ") for line in (results / "report.md").read_text().splitlines() if re.match(r"\| [1-9] \| ", line)]
    lines = lines[:9]
    for column in range(4, 4 + len([*results.glob("record-*")])):
        cells = [line[column] for line in lines]
        tested = {i: [float(x) for x in re.search(r"p ([\d.e-]+) \(Holm ([\d.e-]+)\)", cell).groups()]
                  for i, cell in enumerate(cells) if "not tested" not in cell}  # fmt: skip
        highest = 0.0
        for rank, i in enumerate(sorted(tested, key=lambda i: tested[i][0])):
            highest = max(highest, min(1.0, (9 - rank) * tested[i][0]))
            assert tested[i][1] == pytest.approx(highest, rel=0.06), cells[i]  # p has two digits
            mean = float(re.search(r"\*\* ([+-][\d.]+)", cells[i])[1])
            right = abs(mean) < 2 if "equivalence" in lines[i][2] else mean > 0
            assert cells[i].startswith("**not resolved**" if tested[i][1] >= 0.05 else "**holds**" if right else "**contradicted**")


# ---- the committed results


def same_pages(before, after):
    pages = [path.relative_to(before) for path in [*before.glob("results/**/*.md"), before / "README.md", before / "RESULTS.md"]]
    assert len(pages) > 3
    for page in pages:
        assert (after / page).read_bytes() == (before / page).read_bytes(), page


@pytest.fixture
def repository(tmp_path):
    shutil.copytree(committed(), tmp_path / "results")
    for name in ("README.md", "RESULTS.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_committed_pages_are_what_the_report_writes(repository, monkeypatch, capsys):
    monkeypatch.setattr(figures, "draw", undrawn)
    call("eval", "--json", report=repository / "results")
    verdicts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(verdicts["findings"]) == {str(number) for number in range(1, 10)}
    same_pages(ROOT, repository)


def test_numbers_in_the_prose_are_in_the_tables():
    """What is written by hand about the records has no decimal that the report does not print; whole numbers are rounded ones."""
    pages = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md")}
    written = {name: re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", "", text, flags=re.S) for name, text in pages.items()}
    drawn = "".join(re.findall(r"<!-- [\w-]+ -->\n(.*?)<!-- /", "".join(pages.values()), re.S))
    drawn += "".join(path.read_text() for path in sorted(committed().rglob("report.md")))
    printed = set(re.findall(r"\d+\.\d+", drawn))
    results = [written["RESULTS.md"].partition(f"\n## {title}\n")[2].partition("\n## ")[0]
               for title in ("Finding by finding", "Beyond the paper", "Explored afterwards")]  # fmt: skip
    intro = written["README.md"].partition("\n![")[2].partition("\n## ")[0]
    assert all(len(text) > 300 for text in (*results, intro))
    unknown = [x for text in (*results, intro) for x in re.findall(r"(?<![v/.])\b\d+\.\d+", text) if x not in printed]
    assert not unknown, unknown


@pytest.mark.slow
def test_the_command_draws_the_committed_report(repository):
    command = [sys.executable, "eval.py", "--report", repository / "results", "--json"]
    subprocess.run(command, cwd=ROOT, check=True)
    same_pages(ROOT, repository)


def test_the_defaults_are_what_the_sweep_chose():
    lines = [line.strip("| ").split(" | ") for line in tables.sweep_table(report.sweep(committed() / "sweep")).splitlines()]
    chosen = {recipe: setting for recipe, _, setting, *_, last in lines if last == "chosen"}
    matrix = (ROOT / "matrix.sh").read_text()
    gold, after = (re.search(rf' {name}="[^"]*--lr ([\d.e-]+)', matrix)[1] for name in ("GOLD", "AFTER"))
    rates = [rl.SIZES["toy"]["lr"], sft.SIZES["toy"]["lr"], float(gold), float(after)]
    alone, one, many, then = (f"lr {rate:g}" for rate in rates)
    both = f"lr {mix.SIZES['toy']['lr']:g}, SFT {mix.SIZES['toy']['sft_lr']:g}"
    assert chosen == {"rl": alone, "sft": one, "sft->rl": alone, "sft-gold": many, "sft-gold->rl": then, "mix": both}


def test_the_committed_sweep_has_no_test_question_and_verdicts_rest_on_8_seeds():
    folder = committed()
    sweep = raw(folder / "sweep").rows
    assert sweep and {row["split"] for row in sweep} == {"val"}
    assert not any("-test-" in question for row in sweep for question in row.get("ids", ()))
    for path in folder.glob("record-*"):
        for number, verdict in report.decide(report.Results(report.read(path)[0])).items():
            assert verdict.verdict == "not tested" or verdict.estimate.seeds >= 8, (path.name, number)
