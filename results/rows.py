"""Result rows: read into a DataFrame, and its arms compared on the questions and seeds they share.

eval.py writes one JSON object per line, of four kinds: "pass" (right answers of each question),
"general" (a task of general capability), "text" (losses), "curve" (validation along a run).
"""

import json
from collections import Counter
from functools import cache
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from results.stats import estimate, pass_at_k

# Order and colour in tables and figures (Okabe and Ito); any other recipe comes after these by
# itself, with a colour of its own.
RECIPES = {
    "base": "#000000",
    "rl": "#0072B2",
    "sft": "#E69F00",
    "sft->rl": "#D55E00",
    "mix": "#CC79A7",
    "sft-gold": "#009E73",
    "sft-gold->rl": "#56B4E9",
}
BEST = -1  # shots of a base: the number that scores best
ANOTHER = "another"  # a world or a model: the most common one beside the main one
NEEDS = {
    "pass": ("benchmark", "shots", "n", "ids", "correct"),
    "general": ("benchmark", "right"),
    "text": ("benchmark", "losses"),
    "curve": ("points",),
}
RUN = ("checkpoint", "config_hash", "world", "model", "recipe", "tokens", "pretrain_seed", "seed")
OPTIONAL = ("benchmark", "shots", "group", "share", "share_end", "lr", "sft_lr", "flops", "seconds")


class Missing(LookupError):
    """What is not among the rows."""


class Arm(NamedTuple):
    """A filter on the rows: a recipe and the columns in which it differs from the usual."""

    recipe: str
    shots: int = 0  # solved questions in the prompt, or BEST
    group: int = 0  # rollouts per question; 0: the usual number
    share: str = ""  # of RL in mix: "0.25", "0-1" for a schedule; "": a half
    world: str = ""  # "": the one with the most rows
    model: str = ""  # likewise
    lr: str = ""  # only where runs of one arm differ in it: a sweep

    def __str__(self):
        shown = self.shots > 0 or self.shots == 0 and self.recipe == "base"
        shots = f" {self.shots}-shot" if shown else ""
        parts = [f" n={self.group}" * bool(self.group), f" share={self.share}" * bool(self.share)]
        parts += [f" in {self.world}" * bool(self.world), f" as {self.model}" * bool(self.model)]
        return self.recipe + shots + "".join(parts) + f" lr={self.lr}" * bool(self.lr)


def checked(line):
    """The row of a line; ValueError if it is none."""
    row = json.loads(line)
    if not isinstance(row, dict) or row.get("kind") not in NEEDS:
        raise ValueError(f"not a result row, its kind is not one of {', '.join(NEEDS)}")
    for field in (*RUN, "step", "split", *NEEDS[row["kind"]]):
        if field not in row:
            raise ValueError(f"no field {field!r}")
    if row["kind"] == "pass":
        counts = row["correct"]
        if len(row["ids"]) != len(counts) or not set(counts) <= set(range(row["n"] + 1)):
            raise ValueError(f"needs a count of 0 to n = {row['n']} for each of its questions")
    return row


def read(folder):
    """All rows of the *.jsonl files under a folder -> (DataFrame, notes on torn last lines).

    The columns are the fields of the rows (NaN where a row has none) and "place", FILE:LINE.
    Raises ValueError for a folder without rows and for a line that is no result row, unless it
    is the last one and has no end: its writer was killed.
    """
    rows, torn = [], []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    rows.append(checked(line) | {"place": f"{path}:{number}"})
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"{path}:{number}: {error}") from error
                torn.append(f"{path}:{number}: a torn last line, its row is left out")
    if not rows:
        raise ValueError(f"no result rows under {folder}: run eval.py first")
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=frame.columns.union(OPTIONAL, sort=False)), torn


def of_row(row, metric):
    """What a row says of each question (or task item, or window of text), as a Series."""
    if metric in ("flexible@1", "formatted"):  # known as a mean alone
        if pd.isna(row.get(metric)):
            raise Missing(f"no {metric}")
        return pd.Series({metric: row[metric]})
    if metric in ("accuracy", "loss"):
        return pd.Series(row["right" if metric == "accuracy" else "losses"], dtype=float)
    n = int(row["n"])
    if metric == "32 in format":  # pass@k at the k of which 32 have the format, on average
        k = round(32 / max(row["formatted"], 1 / n))
    else:
        k = int(metric.removeprefix("pass@"))
    if n < k:
        raise Missing(f"no {metric} from {n} answers per question")
    return pd.Series(pass_at_k(n, row["correct"], k), index=row["ids"])


def combined(terms):
    """Sum of weight * values on the seeds and questions that all terms share.

    terms: (weight, values as a DataFrame of questions x seeds, is it a base?). Beside trained
    arms a base serves every seed of its pre-training run with the mean of its draws of shots;
    against itself, draws of the same number are paired.
    """
    trained = [values for _, values, is_base in terms if not is_base]
    units = set.intersection(*(set(v.columns) for v in trained or [v for _, v, _ in terms]))
    total = 0
    for weight, values, is_base in terms:
        if is_base and trained:
            runs = values.columns.unique(0)
            means = {run: values[run].dropna().mean(axis=1) for run in runs}
            values = pd.DataFrame({unit: means[unit[0]] for unit in units if unit[0] in means})
        total = total + weight * values
    cells = total.dropna(axis=1, how="all").sort_index(axis=1)
    if cells.empty or any(cells[run].dropna().empty for run in cells.columns.unique(0)):
        raise Missing("no seed with the same questions in all arms")
    return cells


def minus(first, second, tokens):
    """first - second, mean over checkpoints, as terms (weight, arm, tokens)."""
    weights = [(sign / len(tokens), t) for t in tokens for sign in (1, -1)]
    return [(weight, first if weight > 0 else second, t) for weight, t in weights]


class Record:
    """The rows of a folder by arm.

    tokens: its checkpoints; benchmarks: its question sets, of which the first, `main`, is meant
    where none is named; tasks: of general capability; split: test if there are test rows.
    """

    def __init__(self, frame):
        counts = Counter(zip(frame.world, frame.model, strict=True))
        order = sorted(counts, key=lambda pair: (-counts[pair], pair))
        self.world, self.model = order[0]
        worlds = [world for world, model in order if model == self.model]
        models = [model for world, model in order if world == self.world]
        self.another = {"world": [*worlds, ANOTHER][1], "model": [*models, ANOTHER][1]}
        self.tokens = sorted(frame.tokens.unique().tolist())
        measured = frame[frame.kind != "curve"]
        self.split = "test" if (measured.split == "test").any() else "val"
        self.benchmarks = sorted(frame.benchmark[frame.kind == "pass"].unique())
        self.main = self.benchmarks[0] if self.benchmarks else ""
        self.tasks = sorted(frame.benchmark[frame.kind == "general"].unique())
        groups = frame.group[(frame.recipe == "rl") & (frame.group > 0)]
        self.group = int(groups.mode()[0]) if len(groups) else 0
        self.frame = self._arms(frame)
        self._index = self.frame.groupby(self._KEY[:-2]).indices
        found = {Arm(*key) for key in self.frame.groupby(list(Arm._fields)).indices}
        names = [*RECIPES, *sorted({arm.recipe for arm in found} - set(RECIPES))]
        self.arms = sorted(found, key=lambda arm: (names.index(arm.recipe), arm))
        self.values, self.level = cache(self.values), cache(self.level)  # asked again and again

    _KEY = ["kind", "part", "asked", *Arm._fields, "tokens", "split", "pretrain_seed", "seed"]

    def _arms(self, frame):
        """The columns of an arm, coded as in Arm, and "asked", the question set of a run: runs of
        one recipe on two sets are two arms, also where no question is asked (curves, tasks)."""
        solved = frame[frame.kind == "pass"]
        sets = solved.groupby(["checkpoint", "config_hash"]).benchmark.unique()
        own = {run: found[0] for run, found in sets.items() if len(found) == 1}
        runs = zip(frame.checkpoint, frame.config_hash, strict=True)
        asked = pd.Series([own.get(run, self.main) for run in runs], frame.index)
        start, end = frame.share, frame.share_end.fillna(frame.share)
        share = start.map("{:g}".format).where(start == end, [f"{a:g}-{b:g}" for a, b in
                                                             zip(start, end, strict=True)])
        frame = frame.assign(
            asked=asked.where(frame.kind != "pass", frame.benchmark),
            part=frame.benchmark.where(frame.kind.isin(["general", "text"]), ""),
            shots=frame.shots.fillna(0).astype(int),
            group=frame.group.where(frame.group != self.group, 0).fillna(0).astype(int),
            share=share.where(start.notna() & (share != "0.5"), ""),
            world=frame.world.where(frame.world != self.world, ""),
            model=frame.model.where(frame.model != self.model, ""),
            rates=[(a, b) for a, b in zip(frame.lr, frame.sft_lr, strict=True)],
            lr="",
        ).sort_values("step", kind="stable")
        clash = self._clash(frame)
        if clash is not None and set(frame.split) == {"val"}:  # a sweep
            rates = [f"{a:g}" + (f", SFT {b:g}" if b == b else "") for a, b in frame.rates]
            frame["lr"] = pd.Series(rates, frame.index).where(frame.recipe != "base", "")
            clash = self._clash(frame)
        if clash is not None:
            names = " and ".join(clash.checkpoint.unique()[:2])
            raise ValueError(f"{clash.place.iloc[-1]}: {names} are two runs of one arm and seed")
        return frame.drop_duplicates(self._KEY, keep="last")

    def _clash(self, frame):
        """The rows of one arm, seed and step that come from two runs, or None."""
        same = frame.groupby([*self._KEY, "step"], sort=False)
        clashes = frame[same.config_hash.transform("nunique") > 1]
        if clashes.empty:
            return None
        return frame[same.ngroup() == same.ngroup()[clashes.index[0]]]

    def rows(self, kind, arm, tokens, asked="", part="", split=""):
        """The rows of one kind, one per seed."""
        key = kind, part, asked or self.main, *arm, tokens, split or self.split
        return self.frame.iloc[self._index.get(key, [])]

    def resolved(self, arm, tokens=0, metric="accuracy", *where):
        """An arm as it stands in the columns: BEST, ANOTHER and the usual group replaced."""
        for field in ("world", "model"):
            if getattr(arm, field) == ANOTHER:
                arm = arm._replace(**{field: self.another[field]})
        if arm.group == self.group:
            arm = arm._replace(group=0)
        if metric in ("accuracy", "loss"):
            return arm._replace(shots=0)
        if arm.shots == BEST:
            same = [other for other in self.arms if other._replace(shots=BEST) == arm]
            levels = {other: self.level(other, tokens, metric, *where) for other in same}
            levels = {other: e.mean for other, e in levels.items() if e}
            return max(levels, key=levels.get, default=arm)
        return arm

    def values(self, arm, tokens, metric, asked="", split=""):
        """-> DataFrame of questions x (pre-training seed, seed); raises Missing.

        metric: "pass@8", "32 in format", "accuracy" (of all tasks, or of one: "facts accuracy"),
        "loss", "flexible@1", "formatted". asked: question sets of the same weight, as "a+b".
        """
        task, _, metric = metric.rpartition(" ") if metric.endswith("accuracy") else ("", "", metric)
        arm = self.resolved(arm, tokens, metric, asked, split)
        places = [("pass", name, "") for name in (asked or self.main).split("+")]
        if metric == "accuracy":
            places = [("general", "", name) for name in ([task] if task else self.tasks)]
        if metric == "loss":
            places = [("text", "", "text")]
        found = [self.rows(kind, arm, tokens, name, part, split) for kind, name, part in places]
        if not found or any(rows.empty for rows in found):
            raise Missing(f"no rows for {arm} at {tokens_name(tokens)}")
        tables = []
        for rows in found:
            units = zip(rows.pretrain_seed, rows.seed, strict=True)
            columns = [of_row(row, metric) for row in rows.to_dict("records")]
            tables.append(pd.concat(columns, axis=1, keys=pd.MultiIndex.from_tuples(units)))
        counts = [table.count() for table in tables]
        weights = [sum(counts) / len(counts) / count for count in counts]
        scaled = [table * weight for table, weight in zip(tables, weights, strict=True)]
        cells = pd.concat(scaled, keys=range(len(scaled)), join="inner")
        if cells.shape[1] == 0:
            raise Missing(f"no seed of {arm} at {tokens_name(tokens)} has all of {asked}")
        return cells.sort_index(axis=1)

    def cells(self, metric, terms, asked=""):
        """terms [(weight, arm, tokens)] -> DataFrame of their sum, paired; raises Missing."""
        return combined([(weight, self.values(arm, t, metric, asked), arm.recipe == "base")
                         for weight, arm, t in terms])

    def gap(self, metric, first, second, tokens, asked=""):
        """-> Estimate of first - second at a checkpoint, None without rows."""
        try:
            return estimate(self.cells(metric, minus(first, second, [tokens]), asked))
        except Missing:
            return None

    def level(self, arm, tokens, metric, asked="", split=""):
        """-> Estimate of the mean of one arm, None without rows."""
        try:
            cells = self.values(arm, tokens, metric, asked, split)
            return estimate(combined([(1, cells, arm.recipe == "base")]))
        except Missing:
            return None

    def curve(self, arm, tokens, field, asked=""):
        """-> {step: Estimate} over the seeds, of one field of the validations along their runs.

        The seeds of a pre-training run share its validation questions: the standard error over
        these, where it is known, is added for each run.
        """
        rows = self.rows("curve", self.resolved(arm), tokens, asked, split="val")
        found = {}
        for run, seed, points in zip(rows.pretrain_seed, rows.seed, rows.points, strict=True):
            for point in points:
                if point.get(field) is not None:
                    error = point.get(f"se{field.removeprefix('pass')}", 0)
                    found.setdefault(point["step"], {})[run, seed] = point[field], error
        curve = {}
        for step, at in sorted(found.items()):
            e = estimate(pd.DataFrame({unit: [value] for unit, (value, _) in at.items()}))
            variance = e.se**2
            for run in e.runs:
                errors = [error for unit, (_, error) in at.items() if unit[0] == run]
                variance += (sum(errors) / len(at)) ** 2
            curve[step] = e._replace(se=sqrt(variance))
        return curve

    def contrast(self, metric, terms, asked=""):
        """-> levels of the arms in words, on the seeds and questions that count; the cells."""
        means = {}
        for _, arm, tokens in terms:
            alone = [(float((a, t) == (arm, tokens)), a, t) for _, a, t in terms]
            mean = estimate(self.cells(metric, alone, asked)).mean
            means.setdefault(str(self.resolved(arm)._replace(shots=arm.shots)), {})[tokens] = mean
        said = [f"{arm} {100 * np.mean([*found.values()]):.1f}" for arm, found in means.items()]
        at = ", ".join(tokens_name(t) for t in sorted({t for _, _, t in terms}))
        return f"{', '.join(said)}; at {at}", self.cells(metric, terms, asked)


def tokens_name(tokens):
    return f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"
