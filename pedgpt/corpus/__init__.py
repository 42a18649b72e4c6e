"""Building PedCorpus: from textbooks, guidelines, knowledge graphs and dialogues to the instructions of each stage.

sources → builders (build) → filters, duplicates, split (assemble) → shards, manifest, card; each module works alone.
"""

from pedgpt.corpus.builders.knowledge_graph import diseases
from pedgpt.corpus.classify import classify
from pedgpt.corpus.decontaminate import Decontaminator
from pedgpt.corpus.duplicates import NearDuplicates
from pedgpt.corpus.quality import normalize, scrub
from pedgpt.corpus.sources import read_listing
from pedgpt.corpus.split import Split

__all__ = ["Decontaminator", "NearDuplicates", "Split", "classify", "diseases", "normalize", "read_listing", "scrub"]
