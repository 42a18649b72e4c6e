"""Agreement between raters, strengths from comparisons, and bootstrap intervals, for doctors, judges and scores.

N questions, R raters, C categories, S systems, D draws. Ratings [N, R] are any labels; None and NaN are missing ones.
A question with fewer than two ratings says nothing of agreement and is left out. A figure that the data leaves
undefined is NaN: agreement where no question has two ratings, κ and α where all ratings are one category.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Labels = Sequence[Hashable]
LIMITS = (0.025, 0.975)  # the quantiles that bound an interval


def category_counts(ratings: Sequence[Labels] | Array) -> Array:
    """How many raters chose each category: [N, R] → [N, C]; rows may have unequal lengths."""
    if isinstance(ratings, np.ndarray) and ratings.dtype.kind in "biuf":  # numbers: no loop over the labels
        return (ratings[:, :, None] == np.unique(ratings[~np.isnan(ratings)])).sum(1)
    known = [[label for label in row if label is not None and label == label] for row in ratings]
    codes = {label: code for code, label in enumerate(dict.fromkeys(label for row in known for label in row))}
    counts = np.zeros((len(known), len(codes)), dtype=int)
    for question, row in enumerate(known):
        for label in row:
            counts[question, codes[label]] += 1
    return counts


def raw_agreement(ratings: Sequence[Labels] | Array) -> float:
    """Share of pairs of raters who agree: the mean over questions of Σ n(n - 1) / m(m - 1) (Fleiss 1971, eq. 2)."""
    counts = category_counts(ratings)
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return np.nan
    raters = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1)
    return float((agreeing / (raters * (raters - 1))).mean())


def cohen_kappa(first: Labels, second: Labels) -> float:
    """Agreement of two raters [N] beyond chance: κ = (p_o - p_e) / (1 - p_e) (Cohen 1960); ValueError as of `zip`."""
    pairs = [pair for pair in zip(first, second, strict=True) if all(x is not None and x == x for x in pair)]
    one_hot = category_counts([pair[:1] for pair in pairs] + [pair[1:] for pair in pairs])  # [2N, C]
    mine, theirs = one_hot[: len(pairs)], one_hot[len(pairs) :]
    if not pairs:
        return np.nan
    observed = (mine * theirs).sum(1).mean()
    return _beyond_chance(observed, mine.mean(0) @ theirs.mean(0))


def _beyond_chance(observed: float, by_chance: float) -> float:
    return float((observed - by_chance) / (1 - by_chance)) if by_chance < 1 else np.nan


def fleiss_kappa(ratings: Sequence[Labels] | Array) -> float:
    """Agreement of several raters beyond chance: κ = (P̄ - P̄_e) / (1 - P̄_e) (Fleiss 1971, eq. 7).

    Two questions may have different raters. Raises ValueError unless all questions have the same number of ratings.
    """
    counts = category_counts(ratings)
    raters = np.unique(counts.sum(1)).tolist()
    if len(raters) != 1 or raters[0] < 2:
        raise ValueError(f"Fleiss' κ needs two or more ratings, as many for each question, found {raters}; use α")
    shares = counts.sum(0) / counts.sum()
    return _beyond_chance(raw_agreement(ratings), (shares**2).sum())


def krippendorff_alpha(ratings: Sequence[Labels] | Array) -> float:
    """Agreement with missing ratings: α = 1 - D_o / D_e for nominal categories (Krippendorff 2011, section C)."""
    counts = category_counts(ratings)
    counts = counts[counts.sum(1) > 1]
    agreeing = ((counts * (counts - 1)).sum(1) / (counts.sum(1) - 1)).sum()
    total = counts.sum()
    by_chance = total**2 - (counts.sum(0) ** 2).sum()
    return float(1 - (total - agreeing) * (total - 1) / by_chance) if by_chance else np.nan


def _members(rows: Array, clusters: Labels | None) -> list[Array]:
    """The numbers of the rows in each cluster; every row is a cluster of its own where `clusters` is None."""
    names = np.unique(np.arange(len(rows)) if clusters is None else np.asarray(clusters), return_inverse=True)[1]
    if not len(rows) or len(names) != len(rows):
        raise ValueError(f"a bootstrap needs rows and the cluster of each, found {len(rows)} rows, {len(names)} names")
    return np.split(np.argsort(names, kind="stable"), np.bincount(names).cumsum()[:-1])


def resampled_means(values: Any, draws: int = 2000, seed: int = 0, clusters: Labels | None = None) -> Array:
    """Means of questions drawn with replacement, whole clusters at a time: [N, ...] → [D, ...]; see `bootstrap`."""
    rows = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    if np.isnan(rows).any():
        raise ValueError("a mean needs values without NaN; leave out the questions that have none")
    members = _members(rows, clusters)
    sums = np.stack([rows[these].sum(0) for these in members])
    sizes = np.array([len(these) for these in members])
    chosen = (random.integers(len(members), size=len(members)) for _ in range(draws))
    return np.stack([sums[draw].sum(0) / sizes[draw].sum() for draw in chosen])


def bootstrap(
    values: Any, draws: int = 2000, seed: int = 0, clusters: Labels | None = None, statistic: Callable | None = None
) -> tuple[Any, Any, Any]:
    """A statistic of the questions with its 95 % percentile interval (Efron 1979): (whole, low, high).

    `values` is [N] or [N, M], a row for each question. Without a statistic it is the mean: floats for [N], [M] for
    [N, M]. A statistic takes rows and gives a number or an array; draws where it is NaN are left out. Rows with the
    same name in `clusters` [N] are drawn together. Raises ValueError for no rows, and for NaN where it is the mean.
    """
    rows = np.asarray(values, dtype=float)
    members = _members(rows, clusters)
    if statistic is None:
        whole = rows.mean(0)
        drawn = resampled_means(rows, draws, seed, clusters)
    else:
        random = np.random.default_rng(seed)
        whole = np.asarray(statistic(rows), dtype=float)
        found = []
        for _ in range(draws):
            chosen = random.integers(len(members), size=len(members))
            found.append(statistic(rows[np.concatenate([members[cluster] for cluster in chosen])]))
        drawn = np.array(found, dtype=float)
    if np.isnan(drawn).all():
        low = high = np.full(whole.shape, np.nan)
    else:
        low, high = np.nanquantile(drawn, LIMITS, axis=0)
    if whole.ndim:
        return whole, low, high
    return float(whole), float(low), float(high)


def paired_difference(first: Any, second: Any, **sampling: Any) -> tuple[Any, Any, Any]:
    """`bootstrap` of first - second, two systems on the same questions; ValueError for unequal shapes."""
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != two.shape:
        raise ValueError(f"paired values are of the same questions, found {one.shape} and {two.shape}")
    return bootstrap(one - two, **sampling)


def bradley_terry(wins: Any, prior: float = 0.0) -> Array:
    """Log-strengths β, with mean 0, where P(i beats j) = σ(β_i - β_j), by maximum likelihood (Bradley & Terry 1952).

    `wins` [..., S, S] counts how often i won against j, a tie as half a win of each; β is [..., S]. `prior` wins are
    added to both sides of each pair, so that a system that never lost gets a finite strength. Raises ValueError where
    β is infinite, because no chain of wins leads from one system to another (Ford 1957).
    """
    wins = np.asarray(wins, dtype=float)
    diagonal = np.eye(wins.shape[-1])
    wins = (wins + prior) * (1 - diagonal)
    reached = wins + diagonal > 0
    for _ in diagonal:
        reached = reached @ reached
    if not reached.all():
        raise ValueError("the strength of a system that won or lost everything is infinite; give a prior such as 0.5")
    games = wins + wins.swapaxes(-1, -2)
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(1000):  # Newton's method with a bounded step takes about ten iterations
        expected = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
        slope = (wins - games * expected).sum(-1, keepdims=True)
        weights = games * expected * (1 - expected)
        curvature = weights.sum(-1, keepdims=True) * diagonal - weights
        curvature += weights.mean((-1, -2), keepdims=True)  # fixes the mean, which no win depends on
        step = np.linalg.solve(curvature, slope)[..., 0].clip(-1, 1)
        strengths = strengths + step - step.mean(-1, keepdims=True)
        if abs(step).max() < 1e-12:
            break
    return strengths


def bradley_terry_intervals(wins: Any, prior: float = 0.5, **sampling: Any) -> tuple[Array, Array, Array]:
    """`bradley_terry` of the wins in each question [N, S, S], and the limits of its interval: three times [S].

    NOTE: a prior is needed, because some draws hold no loss of a system that lost a few comparisons in the whole.
    """
    drawn = bradley_terry(resampled_means(wins, **sampling) * len(wins), prior)
    return bradley_terry(np.sum(wins, axis=0), prior), *np.quantile(drawn, LIMITS, axis=0)
