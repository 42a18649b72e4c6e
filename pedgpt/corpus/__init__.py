"""Building PedCorpus: from textbooks, guidelines, knowledge graphs and dialogues to the instructions of each stage."""

from pedgpt.corpus.classify import DOMAINS, GENERAL, GENERAL_MEDICAL, PEDIATRIC, classify
from pedgpt.corpus.decontaminate import Decontaminator
from pedgpt.corpus.dialogues import evidiag_dialogue
from pedgpt.corpus.duplicates import Contradictions, NearDuplicates
from pedgpt.corpus.knowledge_graph import (
    EVIDIAG,
    MEDKQA,
    TASKS,
    TRERECOM,
    diseases,
    evidiag,
    medkqa,
    negative,
    trerecom,
    two_hop,
    verbalize,
)
from pedgpt.corpus.preferences import humane_pair
from pedgpt.corpus.quality import fault, normalize, scrub
from pedgpt.corpus.reconstruct import reconstruct
from pedgpt.corpus.role_play import role_play
from pedgpt.corpus.rows import Built, Dropped, Unusable
from pedgpt.corpus.safety import safety, self_cognition
from pedgpt.corpus.sections import passages
from pedgpt.corpus.sources import Source, read_listing
from pedgpt.corpus.split import Split, question_key
from pedgpt.corpus.support import support
from pedgpt.corpus.teacher import Teacher, TeacherSettings, in_order, load_teacher

__all__ = [
    "DOMAINS", "EVIDIAG", "GENERAL", "GENERAL_MEDICAL", "MEDKQA", "PEDIATRIC", "TASKS", "TRERECOM", "Built",
    "Contradictions", "Decontaminator", "Dropped", "NearDuplicates", "Source", "Split", "Teacher", "TeacherSettings",
    "Unusable", "classify", "diseases", "evidiag", "evidiag_dialogue", "fault", "humane_pair", "in_order",
    "load_teacher", "medkqa", "negative", "normalize", "passages", "question_key", "read_listing", "reconstruct",
    "role_play", "safety", "scrub", "self_cognition", "support", "trerecom", "two_hop", "verbalize",
]  # fmt: skip
