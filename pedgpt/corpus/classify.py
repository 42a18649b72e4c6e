"""What a conversation or text of unknown origin is about, and which task a conversation belongs to, by its words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from pedgpt.corpus.quality import chinese_share, simplified
from pedgpt.corpus.rows import answers, asked, pattern, templates
from pedgpt.data.records import Conversation, Document
from pedgpt.data.tasks import EVIDIAG, MEDKQA, TRERECOM

DOMAINS = PEDIATRIC, GENERAL_MEDICAL, GENERAL = "pediatric", "general_medical", "general"

_WINDOW = 300  # how many characters of the question, and of the answer, are looked at
# The points of each list's words anywhere, in a question, and in an answer; those of general chat are negative.
_LISTS = [
    {"weak": 1, "words": 2, "firm": 4},
    {"general": -6, "role_play": -20, "translated": -1},
    {"general": -2, "translated": -3},
]
_POINTS = [
    {word: n for name, n in lists.items() for word in simplified(templates("classify")[name]).split()}
    for lists in _LISTS
]


def classify(conversation: Conversation, pediatric: bool = False) -> str:
    """One of the three tasks for pediatric conversations, else "general_medical" or "general".

    `pediatric` says that the conversation is known to be about children. Otherwise the department that the row names
    decides, and without one `domain_of` does. A pediatric conversation of several turns is EviDiag, one that asks for
    treatment is TreRecom, and any other is MedKQ&A.
    """
    turns = asked(conversation)
    if not pediatric and conversation.department:
        domain = PEDIATRIC if "儿" in simplified(conversation.department) else GENERAL_MEDICAL
    else:
        domain = PEDIATRIC if pediatric else domain_of("\n".join(turns), "\n".join(answers(conversation)))
    if domain != PEDIATRIC:
        return domain
    if len(turns) > 1:
        return EVIDIAG
    return TRERECOM if pattern("classify", "treatment").search(simplified("\n".join(turns))) else MEDKQA


def domain_of(question: str, answer: str) -> str:
    """One of DOMAINS for a question and its answer; for running text the question is empty.

    It is medical if its medical words, minus those of general chat, have at least 4 points; a word counts once. It is
    pediatric if it is medical and speaks of a child. The words and their points are in templates/classify.toml.
    """
    question, answer = (simplified(text).lower() for text in (question, answer))
    begins = [question[:_WINDOW], answer[:_WINDOW]]
    score = 0
    for words, text in zip(_POINTS, ("\n".join(begins), *begins), strict=True):
        score += sum(points for word, points in words.items() if word in text)
    if min(chinese_share(begins[0]), chinese_share("".join(begins))) < 0.5:
        score -= 20  # a general assistant is asked in any language; a report of letters and digits has more points
    if score < 4:
        return GENERAL
    child, grown, age = (pattern("classify", name).search(question or answer) for name in ("child", "grown", "age"))
    return PEDIATRIC if child and (age or not grown) else GENERAL_MEDICAL


def domain_of_texts(documents: Iterable[Document], most: int = 200) -> str:
    """One of DOMAINS for a file of running text, by its first `most` pieces of 300 characters.

    It is medical if half of them are. It is pediatric if a third of the medical ones speak of a child, because a book
    on children does not name them in every paragraph.
    """
    pieces = (d.text[i : i + _WINDOW] for d in documents for i in range(0, len(d.text), _WINDOW))
    found = Counter(domain_of("", piece) for piece in islice(pieces, most))
    medical = found[PEDIATRIC] + found[GENERAL_MEDICAL]
    if 2 * medical < found.total():
        return GENERAL
    return PEDIATRIC if 3 * found[PEDIATRIC] >= medical else GENERAL_MEDICAL
