"""The statistics behind the report: pass@k, the mean of paired values, its interval and p-value.

A replicate is a training seed. `cells` is a DataFrame of values: one row per question, one column
per (pre-training seed, training seed); NaN where a seed was not asked that question. eval.py
imports this file, so scipy is loaded where a report needs it.
"""

from functools import cache
from math import comb, sqrt
from typing import NamedTuple

import numpy as np

MARGIN = 0.02  # "unchanged" and "the same" mean within 2 points


def pass_at_k(n, c, k):
    """Unbiased pass@k of each question, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    n: answers per question; c: right ones, an int or an array (Q,). Returns the shape of c.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} answers per question, not {n}: raise n or lower k")
    wrong = n - np.asarray(c)[..., None] - np.arange(k)  # (Q, k): k ratios, no large binomials
    return 1 - np.prod(np.maximum(wrong, 0) / (n - np.arange(k)), axis=-1)


def standard_error(values):
    """Standard error of the mean of independent values; 0 for a single value."""
    return float(np.std(values, ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0


def best_of_4(values):
    """Expected value of the largest of 4 drawn at random; of all if there are fewer than 4."""
    values = np.sort(values)
    if len(values) < 4:
        return float(values[-1])
    return float(values @ [comb(i, 3) for i in range(len(values))] / comb(len(values), 4))


def holm(p_values):
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


@cache
def quantile(p, df):
    """The t with P(T <= t) = p, of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(p, df))


class Estimate(NamedTuple):
    mean: float
    se: float  # over seeds and questions; over questions alone where df is 0
    df: int  # degrees of freedom; 0 where no pre-training run has two seeds
    seeds: int
    questions: int
    runs: dict  # pre-training seed -> mean

    def half(self, level=0.95):
        """Half of the interval; one standard error where df is 0."""
        return quantile((1 + level) / 2, self.df) * self.se if self.df else self.se


def estimate(cells, pooled=False):
    """Estimate of the mean of cells, on the questions that all seeds of a run share.

    value = mean + seed + question + noise: the seed means vary by var(seed) + var(noise)/Q, the
    question means by var(question) + var(noise)/S. SE^2 is the sum of their variances over S and
    Q: the variance of the mean, and var(noise)/(S Q) once more.
    With 2 or 3 pre-training runs the variance of seeds is taken within each; from 4 on, or if
    pooled (where all seeds count as those of one run), it is that of all replicates. Runs with
    other questions each add the variance of their own.
    """
    names = cells.columns.unique(0)
    tables = [cells[name].dropna() for name in names]  # (Q, S) each
    same = all(table.index.equals(tables[0].index) for table in tables)
    runs = [table.to_numpy().T for table in tables]
    told = {name: float(values.mean()) for name, values in zip(names, runs, strict=True)}
    replicates = len(runs) >= 4
    if replicates:
        runs = [values.mean(0, keepdims=True) for values in runs]
    sets = [np.concatenate(runs)] if same else runs
    groups = [values.mean(1) for values in runs]
    means = np.concatenate(groups)
    if replicates or pooled:
        groups = [means]
    seeds = len(means)
    df = seeds - len(groups)
    spread = sum(((group - group.mean()) ** 2).sum() for group in groups)
    variance = spread / df / seeds if df else 0.0
    for values in sets:
        variance += (len(values) / seeds * standard_error(values.mean(0))) ** 2
    questions = sum(values.shape[1] for values in sets)
    mean = round(float(means.mean()), 12)  # a tie in print does not hang on the last bit
    return Estimate(mean, sqrt(variance), df, seeds, questions, told)


def p_value(kind, e):
    """Of a difference: two-sided. Of an equivalence: the smaller of inside and outside 2 points."""
    from scipy import stats

    se = max(e.se, 1e-12)
    if kind == "difference > 0":
        return float(2 * stats.t.sf(abs(e.mean) / se, e.df))
    inside = float(stats.t.sf((MARGIN - abs(e.mean)) / se, e.df))  # the larger one-sided p-value
    return min(inside, 1 - inside)
