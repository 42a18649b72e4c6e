"""Building PedCorpus: from a knowledge graph and other sources to the instructions of each stage."""

from pedgpt.corpus.classify import GENERAL, GENERAL_MEDICAL, classify
from pedgpt.corpus.knowledge_graph import (
    EVIDIAG,
    MEDKQA,
    TASKS,
    TRERECOM,
    diseases,
    evidiag,
    medkqa,
    trerecom,
    verbalize,
)
from pedgpt.corpus.split import question_key

__all__ = [
    "EVIDIAG",
    "GENERAL",
    "GENERAL_MEDICAL",
    "MEDKQA",
    "TASKS",
    "TRERECOM",
    "classify",
    "diseases",
    "evidiag",
    "medkqa",
    "question_key",
    "trerecom",
    "verbalize",
]
