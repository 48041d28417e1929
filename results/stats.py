"""pass@k, and the mean of paired values with its interval and p-value.

A replicate is a pre-trained model. `cells` is a DataFrame, one row per question and one column per
(pre-training seed, training seed). eval.py imports this file: scipy waits for a report.
"""

from functools import cache
from math import sqrt
from typing import NamedTuple

import numpy as np


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
    se: float  # over models; over questions where df is 0
    df: int  # degrees of freedom; 0 where there are fewer than four models
    seeds: int  # training runs in it
    questions: int
    runs: dict  # pre-training seed -> mean

    def half(self, level=0.95):
        """Half of the interval; one standard error where df is 0."""
        return quantile((1 + level) / 2, self.df) * self.se if self.df else self.se


def estimate(cells):
    """Estimate of the mean over models, each by the questions that all its seeds have.

    Every model has questions of its own, so the spread of four models or more has that of the
    questions in it. With fewer the error is over questions: the seeds of a model are averaged
    first.
    """
    names = cells.columns.get_level_values(0)
    tables = {name: cells.loc[:, names == name].dropna() for name in names.unique()}
    e = of_models({name: table.to_numpy().mean() for name, table in tables.items()})
    over = [standard_error(table.mean(axis=1).to_numpy()) for table in tables.values()]
    se = e.se if e.df else sqrt(sum(error**2 for error in over)) / len(over)
    return e._replace(se=se, seeds=len(names), questions=max(map(len, tables.values())))


def of_models(values):
    """Estimate of the mean of {model: value}; its error where there are four or more."""
    x = np.array([*values.values()], dtype=float)
    df = len(x) - 1 if len(x) >= 4 else 0
    variance = ((x - x.mean()) ** 2).sum() / df if df else 0.0
    told = {name: float(value) for name, value in values.items()}
    mean = round(float(x.mean()), 12)  # a tie in print does not hang on the last bit
    return Estimate(mean, sqrt(variance / len(x)), df, len(x), 1, told)


def chances(e, low, high):
    """One-sided p-values that the true value of an Estimate lies between low and high, and that it
    lies outside."""
    from scipy import stats

    se = max(e.se, 1e-12)
    above, below = ((x - e.mean) / se for x in (low, high))
    inside = max(stats.t.sf(-above, e.df), stats.t.sf(below, e.df)) if e.df else 1.0
    outside = min(stats.t.sf(above, e.df), stats.t.sf(-below, e.df)) if e.df else 1.0
    return float(inside), float(outside)


def spread(groups, names, limit):
    """The standard deviation within groups, pooled: an Estimate, and the one-sided p-values that
    the true one is above the limit, and below it (chi-square)."""
    from scipy import stats

    df = sum(len(group) - 1 for group in groups)
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    deviation = sqrt(squares / df)
    told = {name: float(group.std(ddof=1)) for name, group in zip(names, groups, strict=True)}
    count = sum(map(len, groups))
    e = Estimate(deviation, deviation / sqrt(2 * df), df, count, 1, told)
    ratio = squares / limit**2
    return e, (float(stats.chi2.sf(ratio, df)), float(stats.chi2.cdf(ratio, df)))


def outcome(parts):
    """[(p inside, p outside) of each difference, ...] -> that all lie inside, that one does not."""
    inside, outside = zip(*parts, strict=True)
    return max(inside), min(1.0, min(outside) * len(outside))
