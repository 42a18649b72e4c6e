"""Which task and domain a conversation of unknown origin belongs to, by its words."""

from __future__ import annotations

import re

from pedgpt.corpus.knowledge_graph import EVIDIAG, MEDKQA, TRERECOM
from pedgpt.data.records import Conversation

DOMAINS = PEDIATRIC, GENERAL_MEDICAL, GENERAL = "pediatric", "general_medical", "general"

_CHILD = re.compile(r"宝宝|孩子|小孩|小儿|婴儿|幼儿|儿童|新生儿|患儿|儿科|儿子|女儿|满月|个月大|早产儿")
_MEDICAL = re.compile(
    r"医生|医院|大夫|症状|治疗|患者|疾病|检查|手术|药|疼|痛|炎|癌|瘤|发烧|发热|咳嗽|感染|诊断|怀孕|月经|血压|血糖|过敏|皮肤|出血|病"
)
_TREATMENT = re.compile(r"怎么治|如何治|怎样治|治疗|吃什么药|用什么药|怎么办|怎么处理|怎么调理|如何缓解|用药|方案")


def classify(conversation: Conversation, pediatric: bool = False) -> str:
    """One of the three tasks for pediatric conversations, else "general_medical" or "general".

    A heuristic for raw data: pediatric if the user speaks of a child or the row's department is pediatrics; of several
    turns: EviDiag; asking for treatment: TreRecom; else MedKQ&A. Medical if the row names a department, or at least two
    medical words occur in what the user says and the first answer. `pediatric`: known to be so, whatever its words.
    """
    asked = "\n".join(message.content for message in conversation.messages if message.role == "user")
    answered = next(message.content for message in conversation.messages if message.role == "assistant")
    if not (pediatric or conversation.department) and len(set(_MEDICAL.findall(asked + answered))) < 2:
        return GENERAL
    if not pediatric and not _CHILD.search(asked) and "儿" not in conversation.department:
        return GENERAL_MEDICAL
    if sum(message.role == "user" for message in conversation.messages) > 1:
        return EVIDIAG
    return TRERECOM if _TREATMENT.search(asked) else MEDKQA
