"""Overlap scores between answers and references, with the semantics under which the paper's figures were published."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from pedgpt.evaluation.responses import Answers, set_hash

METRICS = (
    "rouge-1", "rouge-2", "rouge-l", "bleu-1", "bleu-2", "bleu-3", "bleu-4", "gleu", "distinct-1", "distinct-2",
)  # fmt: skip
# .33 and not 1/3: the published weights, which leave 1 % of BLEU-3's exponent unused.
BLEU_WEIGHTS = {1: (1.0,), 2: (0.5, 0.5), 3: (0.33, 0.33, 0.33), 4: (0.25, 0.25, 0.25, 0.25)}


def answer_scores(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, list[float]]:
    """ROUGE-1/2/L F, BLEU-1..4, GLEU and Distinct-1/2 of each response, × 100 (SPEC §9).

    Words are `list(jieba.cut(text))`, white space included. An empty hypothesis scores 0 everywhere; so does
    Distinct-2 of a single word. An answer of fewer than n words can't reach BLEU-n = 100, even if it equals its
    reference: that is nltk's method3. Raises ValueError for unequal lengths, a reference without words, and
    when the extra `eval` isn't installed.
    """
    for index, reference in enumerate(references):
        if not _has_rouge_words(reference):
            raise ValueError(f"reference {index} has no words ({reference!r}): drop the row or fill in its reference")
    tools = _import_tools()
    rows = [_score_row(tools, *pair) for pair in zip(references, hypotheses, strict=True)]
    return {name: [100 * row[name] for row in rows] for name in METRICS}


def score_answers(found: Answers) -> dict[str, dict[str, Any]]:
    """By task: the questions ("rows"), the empty answers, and the `METRICS` of each answer that has a reference.

    "conversations" numbers the one that each answer belongs to.
    """
    scores: dict[str, dict[str, Any]] = {}
    for task, numbers in found.tasks().items():
        known = found.choose([i for i in numbers if _has_rouge_words(found.questions[i].reference)])
        if known.questions:
            texts = [said.content for said in known.answers]
            values = answer_scores([question.reference for question in known.questions], texts)
            empty = sum(not text.strip() for text in texts)
            talks = {question.conversation: None for question in known.questions}
            order = {talk: number for number, talk in enumerate(talks)}
            told = {"rows": len(texts), "empty": empty, "question_set": set_hash(known.questions), "values": values}
            scores[task] = {**told, "conversations": [order[question.conversation] for question in known.questions]}
    return scores


def signature() -> str:
    """One line naming the word splitter, packages and versions: scores compare only under equal signatures."""
    _import_tools()
    words, bleu, rouge = (f"{name}-{metadata.version(name)}" for name in ("jieba", "nltk", "rouge"))
    try:
        ours = metadata.version("pedgpt")
    except metadata.PackageNotFoundError:
        ours = "not-installed"
    return f"words:{words}|bleu:{bleu}.sentence_bleu.method3|gleu:{bleu}.sentence_gleu|rouge:{rouge}|pedgpt:{ours}"


def _import_tools() -> SimpleNamespace:
    try:
        with warnings.catch_warnings():  # jieba 0.42.1 has invalid escapes and asks for pkg_resources
            warnings.simplefilter("ignore")
            import jieba
            from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
            from nltk.translate.gleu_score import sentence_gleu
            from rouge import Rouge
    except ImportError as error:
        raise ValueError('evaluation needs the extra: pip install -e ".[eval]"') from error
    jieba.setLogLevel(logging.WARNING)  # it announces the loading of its dictionary on stderr
    return SimpleNamespace(
        cut=jieba.cut, bleu=sentence_bleu, smoothing=SmoothingFunction().method3, gleu=sentence_gleu, rouge=Rouge()
    )


def _score_row(tools: SimpleNamespace, reference: str, hypothesis: str) -> dict[str, float]:
    if not hypothesis.strip():
        return dict.fromkeys(METRICS, 0.0)
    expected, words, scores = list(tools.cut(reference)), list(tools.cut(hypothesis)), dict.fromkeys(METRICS, 0.0)
    if _has_rouge_words(hypothesis):
        with _recursion_room(len(expected) + len(words)):
            rouge = tools.rouge.get_scores(" ".join(words), " ".join(expected))[0]
        scores.update({name: parts["f"] for name, parts in rouge.items()})
    for n, weights in BLEU_WEIGHTS.items():
        scores[f"bleu-{n}"] = tools.bleu([expected], words, weights=weights, smoothing_function=tools.smoothing)
    scores["gleu"] = tools.gleu([expected], words)
    for n in (1, 2):
        ngrams = list(zip(*(words[start:] for start in range(n)), strict=False))
        scores[f"distinct-{n}"] = len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return scores


def _has_rouge_words(text: str) -> bool:
    """Whether anything is left once `rouge` has cut the text at every "." into sentences.

    It raises on "." alone, and takes ". ." for a sentence holding one empty word, which could match another one.
    (It cuts "38.5" in two as well. The published figures contain that, so it stays.)
    """
    return bool(text.replace(".", " ").split())


@contextmanager
def _recursion_room(words: int) -> Iterator[None]:
    """`rouge` walks back its longest common subsequence by recursion, one level per word of either text."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + words)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
