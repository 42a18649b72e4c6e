"""Intervals by drawing questions again, agreement between raters, shares of wins, and strengths from comparisons.

N questions, D draws, R raters, C categories, S systems. A statistic takes a row for each question and the weights
[D, N], how often each question counts in each draw, and gives [D, ...], so that one bootstrap serves all of them.
A figure that the data leaves undefined is NaN, and None in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Callable[[Array, Array], Array]
MEASURES = ("raw", "cohen", "fleiss", "krippendorff")


def mean(values: Array, weights: Array) -> Array:
    """[N, ...] → [D, ...]."""
    return np.tensordot(weights, values, 1) / weights.sum(1).reshape(-1, *[1] * (values.ndim - 1))


def ratio(values: Array, weights: Array) -> Array:
    """The sum of the first column over the sum of the second: [N, ..., 2] → [D, ...]."""
    sums = np.tensordot(weights, values, 1)
    return sums[..., 0] / sums[..., 1]


def perplexity_of(values: Array, weights: Array) -> Array:
    """From negative log-likelihoods and tokens: [N, ..., 2] → [D, ...]."""
    return np.exp(ratio(values, weights))


def bootstrap(
    values: Any, clusters: Any = None, *, statistic: Statistic = mean, draws: int = 2000, seed: int = 0
) -> Any:
    """A statistic of the questions and its 95 % percentile interval (Efron 1979): [whole, low, high].

    `values` has a row for each question. A statistic of several figures gives a list of such triples. Questions with
    equal names in `clusters` [N] are drawn together. Draws in which a figure is undefined are left out of its interval.
    Raises ValueError for no rows, and for another number of names.
    """
    rows = np.asarray(values, dtype=float)
    names, members = np.unique(np.arange(len(rows)) if clusters is None else clusters, return_inverse=True)
    if not len(rows) or len(members) != len(rows):
        raise ValueError(
            f"a bootstrap needs rows and the cluster of each, found {len(rows)} rows, {len(members)} names"
        )
    chosen = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = [statistic(rows, np.ones((1, len(rows))))]
        for block in np.array_split(chosen, 1 + draws * len(rows) // 2**20):  # all draws at once may need gigabytes
            places = block + len(names) * np.arange(len(block))[:, None]
            times = np.bincount(places.ravel(), minlength=block.size).reshape(block.shape)
            found.append(statistic(rows, times[:, members].astype(float)))
    drawn = np.concatenate(found[1:])
    known = ~np.isnan(drawn).all(0)
    low, high = np.nanquantile(np.where(known, drawn, 0), (0.025, 0.975), axis=0)
    figures = np.stack([found[0][0], np.where(known, low, np.nan), np.where(known, high, np.nan)], -1)
    return np.where(np.isnan(figures), np.array(None), figures.astype(object)).tolist()


def agreement(ratings: Array, weights: Array) -> Array:
    """What `MEASURES` names, [D, 4], of ratings [N, R]: numbers of categories, NaN where a rater gave none.

    Raw agreement is the share of pairs of raters who agree (Fleiss 1971, eq. 2). The others correct it for chance as
    (observed - chance) / (1 - chance): Cohen's κ of two raters (1960), Fleiss' κ of as many ratings for each question
    (1971, eq. 7), and Krippendorff's α for nominal categories (2011, section C). A question with fewer than two ratings
    says nothing of agreement and is left out. Where all ratings are one category, κ and α are undefined.
    """
    chose = ratings[:, :, None] == np.unique(ratings[~np.isnan(ratings)])  # [N, R, C]
    counts = chose.sum(1)
    raters = counts.sum(1)
    weights = weights * (raters > 1)
    questions, total = weights.sum(1), weights @ raters
    agreeing = (counts * (counts - 1)).sum(1) / np.maximum(raters - 1, 1)
    raw, of_ratings = weights @ (agreeing / np.maximum(raters, 1)) / questions, weights @ agreeing / total
    by_chance = ((weights @ counts / total[:, None]) ** 2).sum(1)
    both = [weights @ chose[:, rater] / questions[:, None] for rater in (0, -1)]
    cohen = np.prod(both, 0).sum(1) if ratings.shape[1] == 2 else np.nan * raw
    fleiss = by_chance if len({*raters[raters > 1].tolist()}) == 1 else np.nan * raw
    observed = np.stack([raw, raw, raw, of_ratings], 1)
    chance = np.stack([0 * raw, cohen, fleiss, (total * by_chance - 1) / (total - 1)], 1)
    return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def by_task(tasks: Sequence[str]) -> list[tuple[str, Array]]:
    """("all", all questions) and, of several tasks, (task, its questions), as masks [N]."""
    names = sorted({*tasks}) if len({*tasks}) > 1 else []
    return [(name, np.array([name in ("all", task) for task in tasks], dtype=bool)) for name in ("all", *names)]


def compare(
    choices: Array, win_tie_loss: tuple[float, float, float], tasks: Sequence[str], dimensions: Sequence[str],
    clusters: Any = None, **sampling: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Shares of wins, ties and losses, with intervals, by task and dimension, of choices [N, dimensions].

    A question where anything but one of the three codes was chosen says nothing of the pair and is not counted.
    """
    found = []
    for task, these in by_task(tasks):
        for dimension, column in zip(dimensions, choices.T, strict=True):
            counted = these & np.isin(column, win_tie_loss)
            row: dict[str, Any] = {"task": task, "dimension": dimension, "n": int(counted.sum())}
            if row["n"]:
                talks = None if clusters is None else np.asarray(clusters)[counted]
                shares = bootstrap(column[counted, None] == np.array(win_tie_loss), talks, **sampling)
                row |= dict(zip(("win", "tie", "loss"), shares, strict=True))
            found.append(row)
    return found


def bradley_terry(wins: Array, weights: Array, prior: float = 0.5) -> Array:
    """Log-strengths β [D, S], with mean 0, where P(i beats j) = σ(β_i - β_j), most likely (Bradley & Terry 1952).

    `wins` [N, S, S] counts how often i won against j, a tie as half a win of each. `prior` wins are added to both sides
    of each pair, because a system that never lost, perhaps only in one draw, would have an infinite strength.
    """
    diagonal = np.eye(wins.shape[-1])
    won = (np.tensordot(weights, wins, 1) + prior) * (1 - diagonal)
    games = won + won.swapaxes(1, 2)
    strengths = np.zeros(won.shape[:-1])
    for _ in range(1000):  # Newton's method with a bounded step takes about ten iterations
        expected = 1 / (1 + np.exp(strengths[:, None, :] - strengths[:, :, None]))
        slope = (won - games * expected).sum(-1, keepdims=True)
        curvature = games * expected * (1 - expected)
        curvature = curvature.sum(-1, keepdims=True) * diagonal - curvature
        # The mean, which no win depends on, is fixed by a constant.
        step = np.linalg.solve(curvature + games.mean((1, 2), keepdims=True), slope)[..., 0].clip(-1, 1)
        strengths = strengths + step - step.mean(-1, keepdims=True)
        if abs(step).max() < 1e-12:
            break
    return strengths
