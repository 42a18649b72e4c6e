"""Agreement, strengths and intervals against statsmodels, krippendorff, choix, scipy and published tables."""

import math

import choix
import krippendorff
import numpy as np
import pytest
import scipy.stats
from statsmodels.stats import inter_rater

from pedgpt.evaluation.agreement import (
    bootstrap,
    bradley_terry,
    bradley_terry_intervals,
    category_counts,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    paired_difference,
    raw_agreement,
    resampled_means,
)

# Fleiss (1971), table 1: six psychiatrists, 30 patients, five diagnoses.
FLEISS = """
    00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
    00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
""".split()
# Krippendorff (2011), example C: four observers, twelve units, and `.` is a missing rating.
KRIPPENDORFF = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def labels_of(row):
    """One of the many ratings [R] with these counts."""
    return [category for category, count in enumerate(map(int, row)) for _ in range(count)]


def columns(rows):
    return [[None if x == "." else x for x in unit] for unit in zip(*rows, strict=True)]


def random_ratings(seed, questions=40, raters=4, categories=3, missing=0.0):
    random = np.random.default_rng(seed)
    truth = random.integers(categories, size=(questions, 1))
    guess = random.integers(categories, size=(questions, raters))
    found = np.where(random.random(guess.shape) < 0.5, truth, guess)
    return np.where(random.random(found.shape) < missing, np.nan, found)


def test_fleiss_kappa_matches_the_table_of_1971():
    ratings = [labels_of(row) for row in FLEISS]
    assert [sum(int(row[column]) for row in FLEISS) for column in range(5)] == [26, 26, 30, 55, 43]
    assert sorted(category_counts(ratings).sum(0)) == [26, 26, 30, 43, 55]
    assert round(raw_agreement(ratings), 3) == 0.556
    assert round(fleiss_kappa(ratings), 3) == 0.430


def test_alpha_matches_the_examples_of_2011():
    assert round(krippendorff_alpha(columns(["0100000010", "1110010000"])), 3) == 0.095
    assert round(krippendorff_alpha(columns(["aabbdcccedda", "babbbccceddd"])), 3) == 0.692
    assert round(krippendorff_alpha(columns(KRIPPENDORFF)), 3) == 0.743


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("raters", [2, 3, 7])
def test_kappas_match_statsmodels(seed, raters):
    ratings = random_ratings(seed, raters=raters)
    table, _ = inter_rater.aggregate_raters(ratings.astype(int))
    assert fleiss_kappa(ratings) == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-9)
    crossed, _ = inter_rater.to_table(ratings[:, :2].astype(int))
    expected = inter_rater.cohens_kappa(crossed, return_results=False)
    assert cohen_kappa(*ratings[:, :2].T.tolist()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("missing", [0.0, 0.2, 0.6])
def test_alpha_matches_krippendorff(seed, missing):
    ratings = random_ratings(seed, missing=missing)
    expected = krippendorff.alpha(reliability_data=ratings.T, level_of_measurement="nominal")
    assert krippendorff_alpha(ratings) == pytest.approx(expected, abs=1e-9)
    labels = [[None if math.isnan(x) else "甲乙丙"[int(x)] for x in row] for row in ratings]
    assert krippendorff_alpha(labels) == pytest.approx(expected, abs=1e-9)
    assert krippendorff_alpha(np.array(labels, dtype=object)) == pytest.approx(expected, abs=1e-9)


def test_perfect_agreement_is_one_and_chance_agreement_is_zero():
    perfect = [["a", "a", "a"], ["b", "b", "b"]] * 3
    assert raw_agreement(perfect) == fleiss_kappa(perfect) == krippendorff_alpha(perfect) == 1
    assert cohen_kappa("abba", "abba") == 1 and cohen_kappa("abab", "baba") == -1
    random = np.random.default_rng(0).integers(3, size=(4000, 3)).astype(float)
    assert abs(fleiss_kappa(random)) < 0.02 and abs(krippendorff_alpha(random)) < 0.02
    assert abs(cohen_kappa(*random[:, :2].T.tolist())) < 0.04 and abs(raw_agreement(random) - 1 / 3) < 0.02


def test_agreement_that_is_undefined_is_nan():
    for one_rater in ([["a"], ["b"]], [["a", None], [None, "b"]]):
        assert math.isnan(raw_agreement(one_rater)) and math.isnan(krippendorff_alpha(one_rater))
    one_category = [["a", "a"], ["a", "a"]]
    assert raw_agreement(one_category) == 1
    assert all(math.isnan(x) for x in (fleiss_kappa(one_category), krippendorff_alpha(one_category)))
    assert math.isnan(cohen_kappa("aa", "aa")) and math.isnan(cohen_kappa(["a"], [None]))


def test_ratings_that_do_not_fit_are_refused():
    for ratings in ([["a"], ["b"]], [["a", "b"], ["a"]], []):
        with pytest.raises(ValueError, match="Fleiss' κ needs two or more ratings"):
            fleiss_kappa(ratings)
    with pytest.raises(ValueError):
        cohen_kappa("ab", "a")


def test_missing_ratings_leave_their_question_out():
    with_missing, without = [["a", "a"], ["a", None], ["b", "a"]], [["a", "a"], ["b", "a"]]
    assert raw_agreement(with_missing) == raw_agreement(without) == 0.5
    assert krippendorff_alpha(with_missing) == krippendorff_alpha(without)
    assert cohen_kappa("aab", ["a", None, "a"]) == cohen_kappa("ab", "aa")


def random_wins(seed, systems=5):
    """Wins with ties that count half, and the comparisons as choix takes them: each win twice, a tie once each way."""
    random = np.random.default_rng(seed)
    wins = random.integers(1, 20, size=(systems, systems)) / 2
    np.fill_diagonal(wins, 0)
    return wins, [(i, j) for i in range(systems) for j in range(systems) for _ in range(round(2 * wins[i, j]))]


@pytest.mark.parametrize("seed", range(6))
def test_strengths_match_choix(seed):
    wins, comparisons = random_wins(seed)
    expected = choix.opt_pairwise(len(wins), comparisons, method="Newton-CG", tol=1e-14)
    expected = choix.mm_pairwise(len(wins), comparisons, initial_params=expected, tol=1e-13)
    assert bradley_terry(wins) == pytest.approx(expected - expected.mean(), abs=1e-9)


def test_strengths_of_two_systems_are_the_logarithm_of_their_odds():
    assert bradley_terry([[0, 30], [10, 0]]) == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-12)
    assert bradley_terry([[0, 3], [0, 0]], prior=0.5) == pytest.approx([math.log(7) / 2, -math.log(7) / 2], abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_strengths_are_where_the_likelihood_has_no_slope(seed):
    """Also for systems that are far apart: the expected wins of each system are its wins (Ford 1957)."""
    random = np.random.default_rng(seed)
    true = random.normal(scale=4, size=6)
    chance = 1 / (1 + np.exp(true[None] - true[:, None]))
    half = np.triu(random.binomial(400, chance), 1)
    wins = half + np.triu(400 - half, 1).T
    strengths = bradley_terry(wins, prior=0.01)
    expected = 400.02 / (1 + np.exp(strengths[None] - strengths[:, None]))
    np.fill_diagonal(expected, 0)
    assert expected.sum(1) == pytest.approx(wins.sum(1) + 0.05, abs=1e-6)


def test_infinite_strengths_are_refused():
    for wins in ([[0, 3], [0, 0]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 1, 1], [1, 0, 1], [0, 0, 0]]):
        with pytest.raises(ValueError, match="infinite; give a prior"):
            bradley_terry(wins)
        assert np.isfinite(bradley_terry(wins, prior=0.5)).all()


def test_intervals_of_strengths_cover_the_truth():
    random, true, covered = np.random.default_rng(1), np.array([0.6, 0.0, -0.6]), []
    for trial in range(60):
        wins = np.zeros((150, 3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            won = random.random(150) < 1 / (1 + np.exp(true[j] - true[i]))
            wins[:, i, j], wins[:, j, i] = won, ~won
        strengths, low, high = bradley_terry_intervals(wins, draws=200, seed=trial)
        assert (low < strengths).all() and (strengths < high).all()
        covered.append((low <= true) & (true <= high))
    assert 0.88 <= np.mean(covered) <= 1


@pytest.mark.parametrize("statistic", [None, np.mean, np.median])
def test_intervals_match_the_percentile_bootstrap_of_scipy(statistic):
    values = np.random.default_rng(3).gamma(2.0, size=80)
    whole, low, high = bootstrap(values, draws=20_000, statistic=statistic)
    expected = scipy.stats.bootstrap(
        (values,), statistic or np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert whole == (statistic or np.mean)(values)
    spread = expected.high - expected.low
    assert abs(low - expected.low) < 0.03 * spread and abs(high - expected.high) < 0.03 * spread


def test_the_mean_and_a_statistic_that_is_the_mean_draw_the_same_samples():
    values, clusters = np.random.default_rng(5).normal(size=(30, 2)), np.arange(30) // 4
    fast, slow = (bootstrap(values, 50, clusters=clusters, statistic=s) for s in (None, lambda rows: rows.mean(0)))
    assert np.array(fast) == pytest.approx(np.array(slow), abs=1e-12)
    assert bootstrap(values[:, 0], 50) == pytest.approx([float(found[0]) for found in bootstrap(values, 50)])
    assert bootstrap(values, 50, seed=1)[1].tolist() != bootstrap(values, 50, seed=2)[1].tolist()


def test_clusters_are_drawn_whole():
    """Ten copies of each question carry no more information than one."""
    values = np.random.default_rng(6).normal(size=25)
    copies, clusters = np.repeat(values, 10), np.repeat([f"q{i:02}" for i in range(25)], 10)
    assert bootstrap(copies, 300, clusters=clusters) == pytest.approx(bootstrap(values, 300))
    assert resampled_means([0, 0, 9], 500, clusters=["a", "a", "b"]).tolist().count(3.0) > 150


def test_statistics_may_be_undefined_in_some_draws():
    ratings = np.array([[0, 0], [0, 0], [1, 1], [0, 1], [np.nan, 1]])
    alpha, low, high = bootstrap(ratings, 400, statistic=krippendorff_alpha)
    assert alpha == krippendorff_alpha(ratings) and low < alpha <= high == 1
    assert all(map(math.isnan, bootstrap(np.zeros((3, 2)), 20, statistic=krippendorff_alpha)))


def test_paired_differences_are_narrower_than_unpaired_ones():
    random = np.random.default_rng(7)
    level = random.normal(scale=10, size=100)
    first, second = level + random.normal(size=100), level + random.normal(size=100) - 1
    mean, low, high = paired_difference(first, second, draws=500)
    assert mean == pytest.approx((first - second).mean()) and 0 < low < mean < high < 2
    _, lowest, highest = bootstrap(first, draws=500)
    assert highest - lowest > 5 * (high - low)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: bootstrap([]), "found 0 rows"), (lambda: bootstrap([1.0, math.nan]), "without NaN"),
        (lambda: bootstrap([1.0, 2.0], clusters=["a"]), "2 rows, 1 names"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), r"\(1,\) and \(2,\)"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
