"""Result rows in a DataFrame, and arms compared on the questions and seeds that they share."""

import json
from collections import Counter
from functools import cache
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from results.stats import estimate, pass_at_k

# Order and colour in tables and figures; any other recipe comes after these, with its own colour
RECIPES = {
    "base": "#000000",
    "rl": "#0072B2",
    "sft": "#E69F00",
    "sft->rl": "#D55E00",
    "mix": "#CC79A7",
    "sft-gold": "#009E73",
    "sft-gold->rl": "#56B4E9",
    "mix-text": "#882255",
    "rl->text": "#999933",
    "text": "#777777",
}
NEEDS = {  # kind of row -> its fields: right answers of each question; tasks; losses; validation
    "pass": ["benchmark", "shots", "n", "ids", "correct"],
    "general": ["benchmark", "right"],
    "text": ["benchmark", "losses"],
    "curve": ["points"],
}
RUN = ["checkpoint", "config_hash", "world", "model", "recipe", "tokens", "pretrain_seed", "seed"]
OPTIONAL = ["benchmark", "shots", "group", "share", "share_end", "lr", "sft_lr", "n"]
OPTIONAL += ["weights", "noise", "content"]
OPTIONAL += ["formatted", "flexible@1", "probability", "flops", "seconds"]
BEST = -1  # shots of a base: as many as score best


class Missing(LookupError):
    """What is not among the rows."""


class Arm(NamedTuple):
    """A filter on the columns of the rows: a recipe, and where it differs from the usual."""

    recipe: str
    shots: int = 0  # solved questions in the prompt
    group: int = 0  # rollouts per question; 0: the usual number
    share: str = ""  # of RL in mix: "0.25", "0-1" for a schedule; "": a half
    world: str = ""  # "": the one with the most rows
    model: str = ""  # likewise

    def __str__(self):
        shown = self.shots > 0 or self.shots == 0 and self.recipe == "base"
        words = [self.recipe] + [f"{self.shots}-shot"] * shown
        formats = ("n={}", "share={}", "in {}", "as {}")
        words += [form.format(x) for form, x in zip(formats, self[2:], strict=True) if x]
        return " ".join(words)


PLACE = ["kind", "part", "asked", *Arm._fields, "tokens", "split"]
UNIT = ["pretrain_seed", "seed"]


def checked(line):
    row = json.loads(line)
    if not isinstance(row, dict) or row.get("kind") not in NEEDS:
        raise ValueError(f"not a result row, its kind is not one of {', '.join(NEEDS)}")
    for field in [*RUN, "step", "split", *NEEDS[row["kind"]]]:
        if field not in row:
            raise ValueError(f"no field {field!r}")
    counts = row.get("correct", ())
    if counts and (len(row["ids"]) != len(counts) or not set(counts) <= {*range(row["n"] + 1)}):
        raise ValueError(f"needs a count of 0 to n = {row['n']} for each of its questions")
    return row


def read(folder):
    """The rows of all *.jsonl files under a folder -> (DataFrame, notes on torn last lines).

    Columns: the fields of the rows, and "where", FILE:LINE. Raises ValueError without rows and
    for a line that is no row, unless it is the last and has no end: its writer was killed.
    """
    rows, torn = [], []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    rows.append(checked(line) | {"where": f"{path}:{number}"})
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"{path}:{number}: {error}") from error
                torn.append(f"{path}:{number}: a torn last line, its row is left out")
    if not rows:
        raise ValueError(f"no result rows under {folder}: run eval.py first")
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=frame.columns.union(OPTIONAL, sort=False)), torn


@cache
def index_of(names):
    return pd.Index(names)  # one object for each set of questions: pandas aligns these at once


def of_row(row, metric):
    """-> Series of the questions, task items or windows of text of a row.

    "32 in format" is pass@k at k = 32 / share of answers in the format, rounded: on average 32 of
    the k have it. Raises Missing if that is more than were sampled.
    """
    if metric in ("accuracy", "loss"):
        return pd.Series(row["right" if metric == "accuracy" else "losses"], dtype=float)
    if metric in row and not metric.startswith("pass@"):  # a field that is one number
        if pd.isna(row[metric]):
            raise Missing(f"no {metric}")
        return pd.Series({metric: row[metric]})
    n = int(row["n"])
    in_format = round(32 / max(row["formatted"], 1 / n)) if metric == "32 in format" else 0
    k = in_format or int(metric.removeprefix("pass@"))
    if n < k:
        raise Missing(f"no {metric} from {n} answers per question")
    return pd.Series(pass_at_k(n, row["correct"], k), index_of(tuple(row["ids"])))


def combined(terms):
    """The sum of weight * values on the seeds and questions that all terms share.

    terms: (weight, DataFrame of questions x seeds, is it a base?). Beside trained arms a base
    serves each seed of its pre-training run with the mean of its draws of shots; against itself,
    draws of the same number are paired.
    """
    trained = [values for _, values, is_base in terms if not is_base]
    units = set.intersection(*(set(v.columns) for v in trained or [v for _, v, _ in terms]))
    total = 0
    for weight, values, is_base in terms:
        runs = values.columns.get_level_values(0)
        kept = sorted(unit for unit in units if unit[0] in runs)
        if not kept:
            raise Missing("no seed in all arms")
        if is_base and trained:
            means = [values.to_numpy()[:, runs == run].mean(axis=1) for run, _ in kept]
            values = pd.DataFrame(dict(zip(kept, means, strict=True)), values.index)
        total = total + weight * (values[kept] if len(kept) < values.shape[1] else values)
    cells = total.dropna(axis=1, how="all")
    asked, runs = cells.notna().to_numpy(), cells.columns.get_level_values(0)
    if cells.empty or not all(asked[:, runs == run].all(axis=1).any() for run in set(runs)):
        raise Missing("no seed with the same questions in all arms")
    return cells


def minus(first, second, tokens):
    """first - second, the mean over checkpoints, as terms (weight, arm, tokens)."""
    both = (1, first), (-1, second)
    return [(sign / len(tokens), arm, t) for t in tokens for sign, arm in both]


def tokens_name(tokens):
    return f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"


class Record:
    """The rows of a folder by arm. main: the question set that is meant where none is named."""

    def __init__(self, frame):
        counts = Counter(zip(frame.world, frame.model, strict=True))
        order = sorted(counts, key=lambda pair: (-counts[pair], pair))
        self.world, self.model = order[0]
        worlds = [world for world, model in order if model == self.model]
        models = [model for world, model in order if world == self.world]
        self.another = [*worlds, "another world"][1], [*models, "another model"][1]
        self.tokens = sorted(frame.tokens.unique().tolist())
        self.split = "test" if (frame.split[frame.kind != "curve"] == "test").any() else "val"
        self.benchmarks = sorted(frame.benchmark[frame.kind == "pass"].unique())
        self.main = self.benchmarks[0] if self.benchmarks else ""
        self.tasks = sorted(frame.benchmark[frame.kind == "general"].unique())
        groups = [frame.group[frame.recipe == "rl"].mode(), frame.group.mode()]
        self.group = int(next((usual[0] for usual in groups if len(usual)), 0))
        self.frame = self._with_arms(frame)
        found = [Arm(*key) for key in self.frame.groupby(list(Arm._fields)).groups]
        names = [*RECIPES, *sorted({arm.recipe for arm in found} - set(RECIPES))]
        self.arms = sorted(found, key=lambda arm: (names.index(arm.recipe), arm))
        self._index = self.frame.groupby(PLACE).indices
        self._rows = self.frame.to_dict("records")
        for name in ("values", "level", "gap", "curve"):  # asked again and again
            setattr(self, name, cache(getattr(self, name)))

    def _with_arms(self, frame):
        """With the columns of Arm, and "asked": the question set of a run. Runs of one recipe on
        two sets are two arms, also where no question is asked (curves, tasks, text)."""
        solved = frame[frame.kind == "pass"]
        sets = solved.groupby(["checkpoint", "config_hash"]).benchmark.unique()
        own = {run: found[0] for run, found in sets.items() if len(found) == 1}
        runs = zip(frame.checkpoint, frame.config_hash, strict=True)
        asked = pd.Series([own.get(run, self.main) for run in runs], frame.index)
        start, end = (frame[name].map("{:g}".format) for name in ("share", "share_end"))
        share = start.where(frame.share_end.isna() | (start == end), start + "-" + end)
        frame = frame.assign(
            asked=asked.where(frame.kind != "pass", frame.benchmark),
            part=frame.benchmark.where(frame.kind.isin(["general", "text"]), ""),
            shots=frame.shots.fillna(0).astype(int),
            group=frame.group.where(frame.group != self.group).fillna(0).astype(int),
            share=share.where(frame.share.notna() & (share != "0.5"), ""),
            world=frame.world.where(frame.world != self.world, ""),
            model=frame.model.where(frame.model != self.model, ""),
        )

        # of one arm, seed and step: by their flags, by what came of them, or by what was asked
        def two_runs():
            same = frame.groupby([*PLACE, *UNIT, "step"])
            marks = same[["config_hash", "weights", "noise", "content"]]
            return frame[(marks.transform("nunique") > 1).any(axis=1)]

        if len(two_runs()) and set(frame.split) == {"val"}:  # a sweep: each rate is a recipe
            rates = " lr=" + frame.lr.map("{:g}".format)
            rates += (" sft_lr=" + frame.sft_lr.map("{:g}".format)).where(frame.sft_lr.notna(), "")
            frame["recipe"] += rates.where(frame.recipe != "base", "")
        if len(found := two_runs()):
            where, name = found.iloc[-1][["where", "checkpoint"]]
            raise ValueError(
                f"{where}: {name} is a second run of one arm and seed, or measured a second time"
            )
        frame = frame.sort_values("step", kind="stable")
        again = frame.duplicated([*PLACE, *UNIT], keep="last")
        self.shorter = frame[again]  # rows of runs of which there is one with more steps
        return frame[~again]

    def rows(self, kind, arm, tokens, asked="", part="", split=""):
        """The rows of one kind, one per seed, as dicts."""
        key = kind, part, asked or self.main, *arm, tokens, split or self.split
        return [self._rows[i] for i in self._index.get(key, ())]

    def with_rollouts(self, group):
        return Arm("rl", group=0 if group == self.group else group)

    def best(self, arm, tokens, metric, asked="", split=""):
        """An arm with BEST shots, as it stands in the rows: of the number that scores best on
        validation questions, if they were asked."""
        same = [other for other in self.arms if other._replace(shots=BEST) == arm]
        for chosen_on in ("val", split):
            levels = {other: self.level(other, tokens, metric, asked, chosen_on) for other in same}
            if levels := {other: e.mean for other, e in levels.items() if e}:
                break
        return max(levels, key=levels.get, default=arm)

    def values(self, arm, tokens, metric, asked="", split=""):
        """-> DataFrame of questions x (pre-training seed, seed); raises Missing.

        metric: "pass@8"; "32 in format", pass@k at the k of which 32 have the format; "loss";
        "accuracy" of all tasks; the name of one; or a field of the rows. asked: the question set.
        """
        places = [("pass", asked or self.main, "")]
        if metric in self.tasks:
            arm, places, metric = arm._replace(shots=0), [("general", "", metric)], "accuracy"
        elif metric in ("accuracy", "probability", "loss"):  # measured without shots
            arm = arm._replace(shots=0)
            places = [("general", "", name) for name in self.tasks or [""]]
            places = [("text", "", "text")] if metric == "loss" else places
        elif arm.shots == BEST:
            arm = self.best(arm, tokens, metric, asked, split)
        tables = []
        for kind, name, part in places:
            rows = self.rows(kind, arm, tokens, name, part, split)
            if not rows:
                raise Missing(f"no rows for {arm} at {tokens_name(tokens)}")
            each = {(row["pretrain_seed"], row["seed"]): of_row(row, metric) for row in rows}
            tables.append(pd.DataFrame(each).sort_index(axis=1))
        if len(tables) < 2:
            return tables[0]
        items = sum(table.count() for table in tables) / len(tables)
        scaled = [table * (items / table.count()) for table in tables]
        return pd.concat(scaled, keys=range(len(scaled)), join="inner")

    def cells(self, metric, terms, asked=""):
        """terms (weight, arm, tokens) -> DataFrame of their paired sum; raises Missing."""
        found = [(w, self.values(a, t, metric, asked), a.recipe == "base") for w, a, t in terms]
        return combined(found)

    def gap(self, metric, first, second, tokens, asked=""):
        """-> Estimate of first - second at a checkpoint, None without rows."""
        try:
            return estimate(self.cells(metric, minus(first, second, [tokens]), asked))
        except Missing:
            return None

    def level(self, arm, tokens, metric, asked="", split=""):
        """-> Estimate of the mean of an arm, None without rows."""
        try:
            return estimate(self.values(arm, tokens, metric, asked, split))
        except Missing:
            return None

    def validations(self, arm, tokens, asked=""):
        """-> {(pre-training seed, seed): {step: pass@1}} along each run of an arm."""
        return {
            (row["pretrain_seed"], row["seed"]): {
                p["step"]: p["pass@1"] for p in row["points"] if p.get("pass@1") is not None
            }
            for row in self.rows("curve", arm, tokens, asked, split="val")
        }

    def curve(self, arm, tokens, field, asked=""):
        """-> {step: Estimate} of one field of the validations along the runs of an arm.

        With fewer than four models the error is that over their validation questions, which the
        seeds of a model share.
        """
        found = {}
        for row in self.rows("curve", arm, tokens, asked, split="val"):
            for point in row["points"]:
                if point.get(field) is not None:
                    at = found.setdefault(point["step"], {})
                    error = point.get(f"se{field.removeprefix('pass')}", 0)
                    at[row["pretrain_seed"], row["seed"]] = point[field], error
        curve = {}
        for step, at in sorted(found.items()):
            e = estimate(pd.DataFrame({unit: [value] for unit, (value, _) in at.items()}))
            errors = [[x for (r, _), (_, x) in at.items() if r == run] for run in e.runs]
            variance = sum((sum(found) / len(found)) ** 2 for found in errors)
            curve[step] = e if e.df else e._replace(se=sqrt(variance) / len(e.runs))
        return curve
