"""Building PedCorpus: from textbooks, guidelines, knowledge graphs and dialogues to the instructions of each stage.

sources → builders (build) → filters, duplicates, split (assemble) → shards, manifest, card; each module works alone.
"""

from pedgpt.corpus.builders.knowledge_graph import (
    diseases,
    evidiag,
    medkqa,
    negative,
    trerecom,
    two_hop,
    verbalize,
)
from pedgpt.corpus.classify import GENERAL, GENERAL_MEDICAL, PEDIATRIC, classify
from pedgpt.corpus.decontaminate import Decontaminator
from pedgpt.corpus.duplicates import NearDuplicates
from pedgpt.corpus.quality import normalize, scrub
from pedgpt.corpus.sources import read_listing
from pedgpt.corpus.split import Split, question_key
from pedgpt.data.tasks import EVIDIAG, MEDKQA, TASKS, TRERECOM

__all__ = [
    "EVIDIAG", "GENERAL", "GENERAL_MEDICAL", "MEDKQA", "PEDIATRIC", "TASKS", "TRERECOM",
    "Decontaminator", "NearDuplicates", "Split", "classify", "diseases", "evidiag", "medkqa", "negative", "normalize",
    "question_key", "read_listing", "scrub", "trerecom", "two_hop", "verbalize",
]  # fmt: skip
