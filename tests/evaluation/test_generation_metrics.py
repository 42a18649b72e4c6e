"""Scores against the packages called directly and against arithmetic done by hand."""

import math
import sys

import pytest

pytest.importorskip("jieba")
pytest.importorskip("nltk")
pytest.importorskip("rouge")

from pedgpt.evaluation.generation_metrics import METRICS, answer_scores, signature  # noqa: E402

REFERENCES = ["患儿发热三天,体温38.5度,建议口服布洛芬。", "多喝水,注意休息。", "母乳喂养至少六个月。Keep warm."]
HYPOTHESES = ["孩子发热,体温38.5度,可以口服布洛芬混悬液。", "注意休息,多喝水,多喝水。", "建议母乳喂养。"]


def generation_scores(references, hypotheses):
    """The means over all responses."""
    return {name: math.fsum(values) / len(values) for name, values in answer_scores(references, hypotheses).items()}


def test_scores_match_the_packages_called_directly():
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.gleu_score import sentence_gleu
    from rouge import Rouge

    method3 = SmoothingFunction().method3
    expected = {name: 0.0 for name in METRICS}
    for reference, hypothesis in zip(REFERENCES, HYPOTHESES, strict=True):
        r, h = list(jieba.cut(reference)), list(jieba.cut(hypothesis))
        rouge = Rouge().get_scores(" ".join(h), " ".join(r))[0]
        for name in ("rouge-1", "rouge-2", "rouge-l"):
            expected[name] += rouge[name]["f"]
        expected["bleu-1"] += sentence_bleu([r], h, weights=(1,), smoothing_function=method3)
        expected["bleu-2"] += sentence_bleu([r], h, weights=(0.5, 0.5), smoothing_function=method3)
        expected["bleu-3"] += sentence_bleu([r], h, weights=(0.33, 0.33, 0.33), smoothing_function=method3)
        expected["bleu-4"] += sentence_bleu([r], h, weights=(0.25,) * 4, smoothing_function=method3)
        expected["gleu"] += sentence_gleu([r], h)
        expected["distinct-1"] += len(set(h)) / len(h)
        expected["distinct-2"] += len(set(zip(h, h[1:], strict=False))) / (len(h) - 1)
    scores = generation_scores(REFERENCES, HYPOTHESES)
    assert list(scores) == list(METRICS)
    assert scores == pytest.approx({name: 100 * total / len(REFERENCES) for name, total in expected.items()}, rel=1e-12)


def test_scores_match_hand_arithmetic():
    # jieba leaves Latin words whole and keeps the blanks: reference a _ b _ c, hypothesis a _ b _ d.
    scores = generation_scores(["a b c"], ["a b d"])
    assert scores["rouge-1"] == pytest.approx(100 * 2 / 3, abs=1e-5)  # a, b of 3, blanks dropped by rouge
    assert scores["rouge-2"] == pytest.approx(50, abs=1e-5)  # "a b" of 2
    assert scores["rouge-l"] == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert scores["bleu-1"] == pytest.approx(100 * 4 / 5)  # a _ b _ of 5
    assert scores["bleu-2"] == pytest.approx(100 * math.sqrt(4 / 5 * 3 / 4))
    assert scores["bleu-3"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3) ** 0.33)
    assert scores["bleu-4"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert scores["gleu"] == pytest.approx(100 * (4 + 3 + 2 + 1) / (5 + 4 + 3 + 2))
    assert scores["distinct-1"] == pytest.approx(100 * 4 / 5)
    assert scores["distinct-2"] == pytest.approx(100)  # a_ _b b_ _d


def test_identical_text_scores_100():
    scores = generation_scores(REFERENCES, REFERENCES)
    for name in METRICS[:8]:
        assert scores[name] == pytest.approx(100, abs=1e-5), name


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_hypothesis_scores_zero_everywhere(empty):
    assert generation_scores(["多喝水。"], [empty]) == dict.fromkeys(METRICS, 0.0)
    full, half = generation_scores(["多喝水。"], ["多喝水。"]), generation_scores(["多喝水。"] * 2, ["多喝水。", empty])
    assert half == pytest.approx({name: value / 2 for name, value in full.items()})


@pytest.mark.parametrize("dots", [".", "...", ". .", ". . ."])
def test_hypothesis_of_full_stops_has_no_rouge(dots):
    # rouge raises on ".", and would let the empty word it sees in ". ." match the reference's.
    scores = generation_scores(["drink water . ."], [dots])
    assert scores["rouge-1"] == scores["rouge-2"] == scores["rouge-l"] == 0
    assert scores["distinct-1"] > 0


def test_one_word_answer_has_no_distinct_2():
    scores = generation_scores(["发热"], ["发热"])
    assert (scores["distinct-1"], scores["distinct-2"]) == (100, 0)


def test_long_texts_do_not_exhaust_the_recursion():
    text, limit = " ".join(f"w{number}" for number in range(300)), sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(300)  # so that a short text, whose table is small, is too long for it
        assert generation_scores([text], [text])["rouge-l"] == pytest.approx(100, abs=1e-5)
        assert sys.getrecursionlimit() == 300
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        (["a", " "], ["a", "b"], "reference 1 has no words"),
        (["..."], ["a"], "reference 0 has no words"),
        (["a"], ["a", "b"], "longer"),
    ],
)
def test_unusable_rows_are_refused(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        generation_scores(references, hypotheses)


@pytest.mark.parametrize("package", ["jieba", "nltk.translate.bleu_score", "rouge"])
def test_missing_package_names_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    for call in (lambda: generation_scores(["a"], ["a"]), signature):
        with pytest.raises(ValueError, match=r'pip install -e "\.\[eval\]"'):
            call()


def test_signature_names_packages_and_versions():
    from importlib.metadata import version

    words, bleu, gleu, rouge, ours = signature().split("|")
    assert words == f"words:jieba-{version('jieba')}"
    assert bleu == f"bleu:nltk-{version('nltk')}.sentence_bleu.method3"
    assert gleu == f"gleu:nltk-{version('nltk')}.sentence_gleu"
    assert rouge == f"rouge:rouge-{version('rouge')}"
    assert ours.startswith("pedgpt:")


def test_nothing_is_printed_while_the_dictionary_loads(monkeypatch, capfd):
    for name in [name for name in sys.modules if name.split(".")[0] == "jieba"]:
        monkeypatch.delitem(sys.modules, name)  # so that it is imported anew, with its dictionary still to be loaded
    generation_scores(["多喝水"], ["多喝水"])
    assert sys.modules["jieba"].dt.initialized and capfd.readouterr() == ("", "")
