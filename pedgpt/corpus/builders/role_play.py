"""Role-playing instruction building (PediatricsGPT §3.1): one role asks, an experienced pediatrician answers.

Question and answer are made from one passage, and the answer is checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pedgpt.corpus.builders.sections import BETWEEN, sentences, unnumbered
from pedgpt.corpus.builders.support import support
from pedgpt.corpus.rows import Ask, Built, LeftOut, Row, answered, builder, pattern, pick, rewritten, spoken, templates
from pedgpt.data.records import Document
from pedgpt.data.tasks import MEDKQA, TRERECOM

ROLES = ("parent", "colleague")
_FORMS = templates("role_play")
_ASPECTS = _FORMS["aspects"]
_LONGEST_SUBJECT = 20  # characters


def role_play(passage: Document, ask: Ask | None = None) -> Iterator[Row]:
    """Rows of one question and one answer; `details` hold "support" (0 to 1), "role" and "aspect".

    Offline: cue words sort the passage's sentences into aspects (症状, 病因, 治疗, ...). A parent or a colleague asks
    about each aspect, and the doctor answers with its sentences; a passage without a `subject` gives no rows.

    With a teacher: a parent asks, then a colleague, and each time the doctor answers and quotes the passage
    (`details["evidence"]`). An answer that the passage does not support is Dropped, as is a teacher's question that
    points at the passage or repeats, and a quotation that is not in it.
    """
    if ask:
        known: set[str] = set()
        for role in ROLES:
            yield from _asked(passage, ask, role, known)
    elif name := subject(passage):
        for aspect, parts in _by_aspect(passage, name).items():
            yield from _templated(passage, name, aspect, re.sub("[；;]$", "。", "".join(parts)))


def subject(passage: Document) -> str:
    """What the passage is about: its disease, or the nearest title or heading that names more than 治疗; else ""."""
    general = pattern("role_play", "general_titles")
    headings = passage.source.split(BETWEEN)[:0:-1]  # the nearest first, without the file
    for name in (passage.disease, passage.title, *headings):
        name = unnumbered(name.strip())
        if not general.fullmatch(name):
            name = rewritten(name, [(words, "") for words in _FORMS["title_words"]]).strip()
        if 2 <= len(name) <= _LONGEST_SUBJECT and not re.search("[。？！，；：]", name) and not general.fullmatch(name):
            return name
    return ""


@builder
def _templated(passage: Document, name: str, aspect: str, text: str) -> Built:
    forms, body = _ASPECTS[aspect], re.sub(f"^(?:{_FORMS['pronouns']})", lambda _: name, text)
    body = re.sub(f"^{_FORMS['possessive']}", lambda _: f"{name}的", body)
    tone = role = pick(ROLES, passage.text, aspect)
    question, closing = pick(forms[role], passage.text, aspect, "question").format(subject=name), ""
    if role == "parent":
        body = rewritten(body, _FORMS["to_parents"])
        closing = pick(forms["closings"], passage.text, aspect, "closing")
        if any(closing[i : i + 3] in body for i in range(len(closing) - 2)):
            closing = ""  # said already
        tone = "grave" if pattern("role_play", "grave").search(question + body) else role
    opening = pick(_FORMS["openings"][tone], passage.text, aspect, "opening")
    return _checked(passage, question, opening + body + closing, aspect, role, body)


def _by_aspect(passage: Document, name: str) -> dict[str, list[str]]:
    """The sentences of each aspect, in order; parts between semicolons are sentences if they have another aspect."""
    found: dict[str, list[str]] = {}
    previous, ended = "", True
    for part in sentences(passage.text):
        scores = _scores(part, name, passage.title)
        # What leans on the sentence before it stays with it.
        leans = not ended and max(scores.values()) < scores.get(previous, 0) + 2
        if not (previous and (leans or pattern("role_play", "dangling").match(part))):
            previous = _best(scores)
        ended = not part.endswith(("；", ";"))
        if previous:
            found.setdefault(previous, []).append(part)
    return found


def _scores(sentence: str, name: str, title: str) -> dict[str, int]:
    """How many cues of each aspect a sentence has, those that it begins with threefold, its heading twofold."""
    scores = {}
    for aspect, forms in _ASPECTS.items():
        begins = any(re.match(cue.replace("{subject}", re.escape(name)), sentence) for cue in forms["begins"])
        heading = 2 * bool(re.fullmatch(forms["titles"], title))
        cues = 3 * begins + sum(bool(re.search(cue, sentence)) for cue in forms["cues"])
        scores[aspect] = cues + heading if begins or heading or not forms.get("strict") else 0
    return scores


@builder
def _asked(passage: Document, ask: Ask, role: str, known: set[str]) -> Built:
    """What a teacher asks in this role, unless it is among the `known` questions, and what it answers as the doctor."""
    prompts, pointing = _FORMS["teacher"], pattern("role_play", "pointing")
    values = {"role": prompts["roles"][role], "title": subject(passage) or passage.title, "passage": passage.text}
    question = answered(ask, prompts["question"], {"question": str, "role": str}, **values)["question"]
    if pointing.search(question):
        raise LeftOut("question points at its passage", question)
    if question in known:
        raise LeftOut("question repeats another role's", question)
    known.add(question)
    said = answered(ask, prompts["answer"], {"answer": str, "evidence": str}, question=question, **values)
    answer, evidence, marks = said["answer"], said["evidence"], re.compile(r"[\W_]+")
    quoted = [marks.sub("", part) for part in sentences(evidence)]
    if not any(quoted) or any(part not in marks.sub("", passage.text) for part in quoted):
        raise LeftOut("evidence is not in its passage", evidence)
    if pointing.search(answer):
        raise LeftOut("answer points at its passage", answer)
    aspect = _best(_scores(question, values["title"], "")) or _best(_scores(answer, values["title"], ""))
    return _checked(passage, question, answer, aspect, role, answer, evidence=evidence)


def _best(scores: dict[str, int]) -> str:
    """The first aspect of the highest score, "" if no aspect has one."""
    best = max(scores, key=lambda aspect: scores[aspect])
    return best if scores[best] else ""


def _checked(passage: Document, question: str, answer: str, aspect: str, role: str, said: str, **details: str) -> Built:
    """The row, if the passage supports `said`: the answer without what the template puts around it."""
    found = support(said, passage.text, question=question)
    if not found.ok():
        raise LeftOut("answer not supported by its passage", f"{found.describe()}; {answer}")
    task = TRERECOM if aspect in _FORMS["treating"] else MEDKQA
    origin = {"source": passage.source, "disease": passage.disease, "department": passage.department}
    kept = {"support": round(found.share, 3), "role": role, "aspect": aspect}
    return Built(spoken(question, answer, task=task, **origin), kept | details)
