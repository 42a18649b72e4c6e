"""Agreement, strengths and intervals against statsmodels, krippendorff, choix, scipy and published tables."""

import math

import choix
import krippendorff
import numpy as np
import pytest
import scipy.stats
from statsmodels.stats import inter_rater

from pedgpt.evaluation.agreement import MEASURES, agreement, bootstrap, bradley_terry, perplexity_of, ratio

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


def numbers_of(ratings):
    """Any labels as the numbers [N, R] of their categories; None is NaN, and so is what a shorter row lacks."""
    labels = sorted({label for row in ratings for label in row} - {None})
    codes, width = {label: float(number) for number, label in enumerate(labels)}, max(map(len, ratings))
    return np.array([[codes.get(label, math.nan) for label in [*row, *[None] * (width - len(row))]] for row in ratings])


def figures(ratings):
    ratings = ratings if isinstance(ratings, np.ndarray) else numbers_of(ratings)
    return dict(zip(MEASURES, [whole for whole, _, _ in bootstrap(ratings, statistic=agreement, draws=2)], strict=True))


def columns(rows):
    return [[None if x == "." else x for x in unit] for unit in zip(*rows, strict=True)]


def strengths_of(wins, **prior):
    """From the wins [S, S] of all questions."""
    return bradley_terry(np.asarray(wins, dtype=float)[None], np.ones((1, 1)), **prior)[0]


def random_ratings(seed, questions=40, raters=4, categories=3, missing=0.0):
    random = np.random.default_rng(seed)
    truth = random.integers(categories, size=(questions, 1))
    guess = random.integers(categories, size=(questions, raters))
    found = np.where(random.random(guess.shape) < 0.5, truth, guess)
    return np.where(random.random(found.shape) < missing, np.nan, found)


def test_fleiss_kappa_matches_the_table_of_1971():
    ratings = [labels_of(row) for row in FLEISS]
    assert [sum(int(row[column]) for row in FLEISS) for column in range(5)] == [26, 26, 30, 55, 43]
    found = figures(ratings)
    assert round(found["raw"], 3) == 0.556 and round(found["fleiss"], 3) == 0.430


def test_alpha_matches_the_examples_of_2011():
    for rows, alpha in (
        (["0100000010", "1110010000"], 0.095), (["aabbdcccedda", "babbbccceddd"], 0.692), (KRIPPENDORFF, 0.743),
    ):  # fmt: skip
        assert round(figures(columns(rows))["krippendorff"], 3) == alpha


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("raters", [2, 3, 7])
def test_kappas_match_statsmodels(seed, raters):
    ratings = random_ratings(seed, raters=raters)
    table, _ = inter_rater.aggregate_raters(ratings.astype(int))
    assert figures(ratings)["fleiss"] == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-9)
    crossed, _ = inter_rater.to_table(ratings[:, :2].astype(int))
    expected = inter_rater.cohens_kappa(crossed, return_results=False)
    assert figures(ratings[:, :2])["cohen"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("missing", [0.0, 0.2, 0.6])
def test_alpha_matches_krippendorff(seed, missing):
    ratings = random_ratings(seed, missing=missing)
    expected = krippendorff.alpha(reliability_data=ratings.T, level_of_measurement="nominal")
    assert figures(ratings)["krippendorff"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_copies_of_questions(seed):
    ratings, times = random_ratings(seed, raters=2), np.random.default_rng(seed).integers(4, size=40)
    copied = agreement(np.repeat(ratings, times, 0), np.ones((1, times.sum())))
    assert agreement(ratings, times[None].astype(float)) == pytest.approx(copied, abs=1e-12)


def test_perfect_agreement_is_one_and_chance_agreement_is_zero():
    perfect = figures([["a", "a", "a"], ["b", "b", "b"]] * 3)
    assert perfect["raw"] == perfect["fleiss"] == perfect["krippendorff"] == 1 and perfect["cohen"] is None
    for first, second, kappa in (("abba", "abba", 1), ("abab", "baba", -1)):
        assert figures(list(zip(first, second, strict=True)))["cohen"] == kappa
    random = np.random.default_rng(0).integers(3, size=(4000, 3)).astype(float)
    found = figures(random)
    assert abs(found["fleiss"]) < 0.02 and abs(found["krippendorff"]) < 0.02 and abs(found["raw"] - 1 / 3) < 0.02
    assert abs(figures(random[:, :2])["cohen"]) < 0.04


def test_agreement_that_is_undefined_is_none():
    for one_rater in ([["a"], ["b"]], [["a", None], [None, "b"]]):
        assert figures(one_rater) == dict.fromkeys(MEASURES)
    one_category = figures([["a", "a"], ["a", "a"]])
    assert one_category == {**dict.fromkeys(MEASURES), "raw": 1}
    assert figures([["a", "b", "a"], ["a", "b", None]])["fleiss"] is None  # unequally many ratings


def test_missing_ratings_leave_their_question_out():
    with_missing, without = [["a", "a"], ["a", None], ["b", "a"]], [["a", "a"], ["b", "a"]]
    assert figures(with_missing) == figures(without) and figures(without)["raw"] == 0.5


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
    assert strengths_of(wins, prior=0) == pytest.approx(expected - expected.mean(), abs=1e-9)


def test_strengths_of_two_systems_are_the_logarithm_of_their_odds():
    assert strengths_of([[0, 30], [10, 0]], prior=0) == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-12)
    assert strengths_of([[0, 3], [0, 0]], prior=0.5) == pytest.approx([math.log(7) / 2, -math.log(7) / 2], abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_strengths_are_where_the_likelihood_has_no_slope(seed):
    """Also for systems that are far apart: the expected wins of each system are its wins (Ford 1957)."""
    random = np.random.default_rng(seed)
    true = random.normal(scale=4, size=6)
    chance = 1 / (1 + np.exp(true[None] - true[:, None]))
    half = np.triu(random.binomial(400, chance), 1)
    wins = half + np.triu(400 - half, 1).T
    strengths = strengths_of(wins, prior=0.01)
    expected = 400.02 / (1 + np.exp(strengths[None] - strengths[:, None]))
    np.fill_diagonal(expected, 0)
    assert expected.sum(1) == pytest.approx(wins.sum(1) + 0.05, abs=1e-6)


def test_strengths_of_who_lost_everything_are_finite():
    for wins in ([[0, 3], [0, 0]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 1, 1], [1, 0, 1], [0, 0, 0]]):
        assert np.isfinite(strengths_of(wins)).all()


def test_intervals_of_strengths_cover_the_truth():
    random, true, covered = np.random.default_rng(1), np.array([0.6, 0.0, -0.6]), []
    for trial in range(60):
        wins = np.zeros((150, 3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            won = random.random(150) < 1 / (1 + np.exp(true[j] - true[i]))
            wins[:, i, j], wins[:, j, i] = won, ~won
        strengths, low, high = np.array(bootstrap(wins, statistic=bradley_terry, draws=200, seed=trial)).T
        assert (low < strengths).all() and (strengths < high).all()
        covered.append((low <= true) & (true <= high))
    assert 0.88 <= np.mean(covered) <= 1


def near(found, expected):
    """The limits of an interval, but for the error of sampling."""
    spread = expected.high - expected.low
    return abs(found[1] - expected.low) < 0.03 * spread and abs(found[2] - expected.high) < 0.03 * spread


def test_intervals_match_the_percentile_bootstrap_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=(80, 2))
    settings = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(4)}
    found = bootstrap(values[:, 0], draws=20_000)
    assert found[0] == pytest.approx(values[:, 0].mean(), abs=1e-12)
    assert near(found, scipy.stats.bootstrap((values[:, 0],), np.mean, **settings).confidence_interval)
    for statistic, by_hand in ((ratio, lambda a, b, axis: a.sum(axis) / b.sum(axis)),
                               (perplexity_of, lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)))):
        expected = scipy.stats.bootstrap((*values.T,), by_hand, paired=True, vectorized=True, **settings)
        found = bootstrap(values, draws=20_000, statistic=statistic)
        assert found[0] == pytest.approx(by_hand(*values.T, axis=0)) and near(found, expected.confidence_interval)


def test_columns_are_drawn_together_and_by_the_seed():
    values = np.random.default_rng(5).normal(size=(30, 2))
    assert bootstrap(values[:, 0], draws=50) == pytest.approx(bootstrap(values, draws=50)[0])
    one, two = (bootstrap(values, draws=50, seed=seed) for seed in (1, 2))
    assert one[0][0] == two[0][0] and one[0][1] != two[0][1]
    clusters = np.arange(30) // 4
    drawn = np.random.default_rng(0).integers(8, size=(50, 8))  # the eight clusters, drawn by hand
    means = [np.concatenate([values[clusters == name] for name in names]).mean(0) for names in drawn]
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    expected = np.stack([values.mean(0), low, high], 1)
    assert np.array(bootstrap(values, clusters, draws=50)) == pytest.approx(expected)


def test_clusters_are_drawn_whole():
    """Ten copies of each question carry no more information than one."""
    values = np.random.default_rng(6).normal(size=25)
    copies, clusters = np.repeat(values, 10), np.repeat([f"q{i:02}" for i in range(25)], 10)
    assert bootstrap(copies, clusters, draws=300) == pytest.approx(bootstrap(values, draws=300))


def test_many_questions_are_drawn_in_blocks_as_all_at_once():
    values = np.random.default_rng(8).normal(size=3000)
    drawn = np.random.default_rng(0).integers(3000, size=(1000, 3000))  # three blocks
    expected = [values.mean(), *np.quantile(values[drawn].mean(1), (0.025, 0.975))]
    assert bootstrap(values, draws=1000) == pytest.approx(expected)


def test_statistics_may_be_undefined_in_some_draws():
    ratings = np.array([[0, 0], [0, 0], [1, 1], [0, 1], [np.nan, 1]])
    *_, (alpha, low, high) = bootstrap(ratings, statistic=agreement, draws=400)
    assert alpha == figures(ratings)["krippendorff"] and low < alpha <= high == 1
    assert bootstrap(np.zeros((3, 2)), statistic=agreement, draws=20)[3] == [None] * 3


@pytest.mark.parametrize(
    ("call", "told"),
    [(lambda: bootstrap([]), "found 0 rows"), (lambda: bootstrap([1.0, 2.0], clusters=["a"]), "2 rows, 1 names")],
)
def test_values_that_do_not_fit_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
