"""What a conversation or text of unknown origin is about, and which task a conversation belongs to, by its words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice

from pedgpt.corpus.quality import chinese_share, simplified
from pedgpt.corpus.rows import templates
from pedgpt.data.records import Conversation, Document
from pedgpt.data.tasks import EVIDIAG, MEDKQA, TRERECOM

DOMAINS = PEDIATRIC, GENERAL_MEDICAL, GENERAL = "pediatric", "general_medical", "general"

_TREATMENT = re.compile(r"怎么治|如何治|怎样治|治疗|吃什么药|用什么药|怎么办|怎么处理|怎么调理|如何缓解|用药|方案")
_WINDOW = 300  # how many characters of the question, and of the answer, are looked at


def classify(conversation: Conversation, pediatric: bool = False) -> str:
    """One of the three tasks for pediatric conversations, else "general_medical" or "general".

    `pediatric` says that the conversation is known to be about children. Otherwise the department that the row names
    decides, and without one `domain_of` does. A pediatric conversation of several turns is EviDiag, one that asks for
    treatment is TreRecom, and any other is MedKQ&A.
    """
    asked, answered = (
        "\n".join(message.content for message in conversation.messages if message.role == role)
        for role in ("user", "assistant")
    )
    if not pediatric:
        if conversation.department:
            found = PEDIATRIC if "儿" in simplified(conversation.department) else GENERAL_MEDICAL
        else:
            found = domain_of(asked, answered)
        if found != PEDIATRIC:
            return found
    if sum(message.role == "user" for message in conversation.messages) > 1:
        return EVIDIAG
    return TRERECOM if _TREATMENT.search(simplified(asked)) else MEDKQA


def domain_of(asked: str, answered: str) -> str:
    """One of DOMAINS for a question and its answer; for running text the question is empty.

    It is medical if its medical words, minus those of general chat, have at least 4 points; a word counts once. It is
    pediatric if it is medical and speaks of a child. The words and their points are in templates/classify.toml.
    """
    asked, answered = (simplified(text).lower() for text in (asked, answered))
    question, answer = asked[:_WINDOW], answered[:_WINDOW]
    medical, against_asked, against_answered = _counts()
    score = _counted(medical, f"{question}\n{answer}")
    score -= _counted(against_asked, question) + _counted(against_answered, answer)
    if min(chinese_share(question), chinese_share(question + answer)) < 0.5:
        score -= 20  # a general assistant is asked in any language; a report of letters and digits has more points
    if score < 4:
        return GENERAL
    child, grown, age = (_pattern(name).search(asked or answered) for name in ("child", "grown", "age"))
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


def _counted(words: Mapping[str, int], text: str) -> int:
    return sum(count for word, count in words.items() if word in text)


@cache
def _counts() -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The points of each word for medicine, against it in a question, and against it in an answer."""
    lists = templates("classify")

    def counted(**counts: int) -> dict[str, int]:
        return {word: count for name, count in counts.items() for word in simplified(lists[name]).split()}

    return (
        counted(weak=1, words=2, firm=4),
        counted(general=6, role_play=20, translated=1),
        counted(general=2, translated=3),
    )


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("".join(templates("classify")[name].split()))
