"""Role-playing instruction building (PediatricsGPT §3.1): one role asks, an experienced pediatrician answers.

Question and answer are made from one passage, and the answer is checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pedgpt.corpus.builders.knowledge_graph import MEDKQA
from pedgpt.corpus.builders.sections import BETWEEN, sentences, unnumbered
from pedgpt.corpus.builders.support import support
from pedgpt.corpus.rows import Ask, Built, Dropped, Unusable, pick, templates
from pedgpt.data.records import Conversation, Document, Message

ROLES = ("parent", "colleague")
_LONGEST_SUBJECT = 20  # characters


def role_play(passage: Document, ask: Ask | None = None) -> Iterator[Built | Dropped]:
    """Rows of one question and one answer; `details` hold "support" (0 to 1), "role" and "aspect".

    Offline: the passage's sentences are sorted into aspects by cue words (症状, 病因, 治疗, ...); of each aspect found,
    a parent or a colleague asks in one of several phrasings, chosen by a hash of the passage, and the doctor answers
    with its sentences in their order. The subject of the questions is the passage's disease or, cleaned of 诊疗指南 and
    such, its title or the nearest heading that names more than 治疗; a passage without a subject gives no rows.

    With a teacher: two calls for each of a parent and a colleague, who asks, and the doctor, who answers and quotes the
    passage (`details["evidence"]`).

    An answer that the passage does not support is Dropped, as is a teacher's question that points at the passage or
    repeats, and a quotation that is not in it.
    """
    yield from _templated(passage) if ask is None else _asked(passage, ask)


def subject(passage: Document) -> str:
    """What the passage is about, as a question would name it, or ""."""
    general = re.compile(templates("role_play")["general_titles"])
    headings = passage.source.split(BETWEEN)[:0:-1]  # the nearest first, without the file
    for name in (passage.disease, passage.title, *headings):
        name = unnumbered(name.strip())
        if not general.fullmatch(name):
            for words in templates("role_play")["title_words"]:
                name = re.sub(words, "", name).strip()
        if 2 <= len(name) <= _LONGEST_SUBJECT and not re.search("[。？！，；：]", name) and not general.fullmatch(name):
            return name
    return ""


def _templated(passage: Document) -> Iterator[Built | Dropped]:
    if not (name := subject(passage)):
        return
    table = templates("role_play")
    for aspect, parts in _by_aspect(passage, name).items():
        forms, openings = table["aspects"][aspect], table["openings"]
        role = pick(ROLES, passage.text, aspect)
        question = pick(forms[role], passage.text, aspect, "question").format(subject=name)
        body = _spoken("".join(parts), name, role)
        grave = role == "parent" and re.search(table["grave"], question + body)
        opening = pick(openings["grave" if grave else role], passage.text, aspect, "opening")
        closing = pick(forms["closings"], passage.text, aspect, "closing") if role == "parent" else ""
        if any(closing[i : i + 3] in body for i in range(len(closing) - 2)):
            closing = ""  # said already
        yield _checked(passage, question, opening + body + closing, aspect, role, body)


def _by_aspect(passage: Document, name: str) -> dict[str, list[str]]:
    """The sentences of each aspect, in order; parts between semicolons are sentences if they have another aspect."""
    found: dict[str, list[str]] = {}
    previous, ended, dangling = "", True, templates("role_play")["dangling"]
    for part in sentences(passage.text):
        scores = _scores(part, name, passage.title)
        best = max(scores, key=lambda aspect: scores[aspect])
        # What leans on the sentence before it stays with it.
        leans = re.match(dangling, part) or (not ended and scores[best] < scores.get(previous, 0) + 2)
        if previous and leans:
            best = previous
        ended = not part.endswith(("；", ";"))
        previous = best if scores[best] or leans else ""
        if previous:
            found.setdefault(previous, []).append(part)
    return {aspect: [*parts[:-1], re.sub("[；;]$", "。", parts[-1])] for aspect, parts in found.items()}


def _scores(sentence: str, name: str, title: str) -> dict[str, int]:
    """How many cues of each aspect a sentence has, those that it begins with threefold, its heading twofold."""
    scores = {}
    for aspect, forms in templates("role_play")["aspects"].items():
        begins = any(re.match(cue.replace("{subject}", re.escape(name)), sentence) for cue in forms["begins"])
        cues = 3 * begins + sum(bool(re.search(cue, sentence)) for cue in forms["cues"])
        heading = 2 * bool(re.fullmatch(forms["titles"], title))
        scores[aspect] = cues + heading if begins or heading or not forms.get("strict") else 0
    return scores


def _spoken(answer: str, name: str, role: str) -> str:
    """An answer without a pronoun at its beginning: 其 is the subject's, 本病 the subject; plainer to parents."""
    table = templates("role_play")
    answer = re.sub(f"^(?:{table['pronouns']})", lambda _: name, answer)
    answer = re.sub(f"^(?:{table['possessive']})", lambda _: name + "的", answer)
    for form, words in table["to_parents"].items() if role == "parent" else ():
        answer = re.sub(f"^(?:{form})", words, answer)
    return answer


def _asked(passage: Document, ask: Ask) -> Iterator[Built | Dropped]:
    forms = templates("role_play")["teacher"]
    known: set[str] = set()
    for role, spoken in forms["roles"].items():
        values = {"role": spoken, "title": subject(passage) or passage.title, "passage": passage.text}
        try:
            fields: dict[str, type] = {"question": str, "role": str}
            said = ask(forms["system_question"].format(**values), forms["question"].format(**values), fields)
            question = said["question"].strip()
            fault = "question points at its passage" if re.search(templates("role_play")["pointing"], question) else ""
            fault = fault or ("question repeats another role's" if question in known else "")
            if fault or not question:
                yield Dropped(passage.source, fault or "teacher's answer was unusable", question)
                continue
            known.add(question)
            values["question"] = question
            said = ask(forms["system_answer"], forms["answer"].format(**values), {"answer": str, "evidence": str})
        except Unusable as unusable:
            yield Dropped(passage.source, "teacher's answer was unusable", str(unusable))
            continue
        answer, evidence = said["answer"].strip(), said["evidence"].strip()
        text = _letters(passage.text)
        if not _letters(evidence) or any(_letters(part) not in text for part in sentences(evidence)):
            yield Dropped(passage.source, "evidence is not in its passage", evidence)
        elif re.search(templates("role_play")["pointing"], answer):
            yield Dropped(passage.source, "answer points at its passage", answer)
        else:
            aspect = _aspect_of(question, answer, values["title"])
            yield _checked(passage, question, answer, aspect, role, answer, evidence=evidence)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


def _aspect_of(question: str, answer: str, name: str) -> str:
    for text in (question, answer):
        scores = _scores(text, name, "")
        best = max(scores, key=lambda aspect: scores[aspect])
        if scores[best]:
            return best
    return ""


def _checked(
    passage: Document, question: str, answer: str, aspect: str, role: str, said: str, **details: Any
) -> Built | Dropped:
    """The row, if the passage supports `said`: the answer without what the template puts around it."""
    found = support(said, passage.text, question=question)
    if not found.ok():
        return Dropped(passage.source, "answer not supported by its passage", f"{found.describe()}; {answer}")
    task = templates("role_play")["aspects"][aspect]["task"] if aspect else MEDKQA
    messages = (Message("user", question), Message("assistant", answer))
    record = Conversation(messages, passage.source, task, passage.disease, passage.department)
    return Built(record, {"support": round(found.share, 3), "role": role, "aspect": aspect, **details})
