"""pass@k, and the mean of paired values with its interval and p-value.

A replicate is a training seed. `cells` is a DataFrame, one row per question and one column per
(pre-training seed, training seed). eval.py imports this file: scipy waits for a report.
"""

from functools import cache
from math import sqrt
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


def holm(p_values):
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


@cache
def quantile(p, df):
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
    """Estimate of the mean, on the questions that all seeds of a pre-training run share.

    value = mean + seed + question + noise: the seed means vary by var(seed) + var(noise)/Q, the
    question means by var(question) + var(noise)/S. SE^2, the sum of the first over S and the
    second over Q, is the variance of the mean and var(noise)/(S Q) more. With 2 or 3 runs the
    variance of seeds is that within a run, with 4 or more that of the runs' means; pooled: of all
    seeds. Runs with questions of their own each add the variance of these.
    """
    names, matrix = cells.columns.get_level_values(0), cells.to_numpy()
    tables = {name: matrix[:, names == name] for name in names.unique()}
    asked = [~np.isnan(table).any(axis=1) for table in tables.values()]
    runs = [table[rows].T for table, rows in zip(tables.values(), asked, strict=True)]  # (S, Q)
    told = {name: float(values.mean()) for name, values in zip(tables, runs, strict=True)}
    if many := len(runs) >= 4:
        runs = [values.mean(0, keepdims=True) for values in runs]
    groups = [values.mean(1) for values in runs]
    means = np.concatenate(groups)
    groups = [means] if many or pooled else groups
    seeds, df = len(means), len(means) - len(groups)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    variance = within / df / seeds if df else 0.0
    same = all(np.array_equal(rows, asked[0]) for rows in asked)
    sets = [np.concatenate(runs)] if same else runs
    for values in sets:
        variance += (len(values) / seeds * standard_error(values.mean(0))) ** 2
    questions = sum(values.shape[1] for values in sets)
    mean = round(float(means.mean()), 12)  # a tie in print does not hang on the last bit
    return Estimate(mean, sqrt(variance), df, seeds, questions, told)


def p_value(kind, e):
    """Two-sided for a difference; for an equivalence the smaller of inside and outside."""
    from scipy import stats

    se = max(e.se, 1e-12)
    if kind == "difference > 0":
        return float(2 * stats.t.sf(abs(e.mean) / se, e.df))
    inside = float(stats.t.sf((MARGIN - abs(e.mean)) / se, e.df))  # the larger of two one-sided
    return min(inside, 1 - inside)
