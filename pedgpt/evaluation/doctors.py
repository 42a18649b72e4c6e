"""Pages on which doctors compare answers without knowing whose they are; votes.py merges what they choose.

A rater's page is one HTML file that needs no network. The key alone tells which system stands behind which letter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from pedgpt.evaluation.responses import Answers, set_hash, thin

DIMENSIONS = ("professionalism", "factuality", "safety", "overall")
LETTERS = "ABCDEFGH"
TIE = "tie"
FORMAT = "doctors-1"  # of a rater's file
MAKERS = """ChatGPT GPT-4 GPT-4o OpenAI Claude Anthropic Gemini Qwen Tongyi Baichuan DeepSeek ChatGLM Zhipu Llama ERNIE
    Kimi Doubao InternLM Mistral HuatuoGPT BianQue DISC-MedLLM Zhongjing PediatricsGPT pedgpt 通义千问 百川 文心一言
    智谱 深度求索 豆包 月之暗面 书生 讯飞 华佗GPT 扁鹊GPT 阿里云 百度 腾讯""".split()


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys and without spaces; the page computes the same."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def share_out(tasks: Sequence[str], raters: Sequence[str], per_question: int, seed: int = 0) -> dict[str, list[int]]:
    """The numbers of each rater's questions, in the order of the page; `per_question` raters get each question.

    Loads differ by at most one. Of raters with equal loads, those come first who share least with the ones chosen.
    """
    random = Random(seed)
    loads: dict[str, list[int]] = {rater: [] for rater in raters}
    shared: Counter[frozenset[str]] = Counter()
    for number in sorted(range(len(tasks)), key=lambda number: (tasks[number], random.random())):
        chosen: list[str] = []
        for _ in range(per_question):
            met = {rater: sum(shared[frozenset((rater, other))] for other in chosen) for rater in raters}
            ranks = [(len(loads[rater]), met[rater], random.random(), rater) for rater in raters if rater not in chosen]
            chosen.append(min(ranks)[-1])
            loads[chosen[-1]].append(number)
        shared.update(map(frozenset, combinations(chosen, 2)))
    return {rater: random.sample(numbers, len(numbers)) for rater, numbers in loads.items()}


def balanced_orders(count: int, systems: Sequence[str], seed: str) -> list[list[str]]:
    """So many orders of the systems, by Latin squares: each system stands in each position equally often, ±1."""
    random = Random(seed)
    found: list[list[str]] = []
    while len(found) < count:
        row = random.sample(systems, len(systems))
        found += [row[turn:] + row[:turn] for turn in range(len(row))]
    return random.sample(found[:count], count)


def mentions(systems: Sequence[Answers]) -> list[tuple[str, int, str]]:
    """Answers that name a maker or a compared system, or say that they have one: (system, question, what is said)."""
    own = [Path(str(system.about.get(key) or "")).name for system in systems for key in ("model", "adapter")]
    names = sorted({*MAKERS, *own, *(system.name for system in systems)} - {"", "model", "adapter"})
    words = [rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])" for name in names]
    pattern = re.compile("|".join([*words, r"我是[^。！？!?\n]{0,30}(?:开发|研发|训练|推出|创建|打造)的"]), re.I)
    said = ((system.name, number, one) for system in systems for number, one in enumerate(system.answers, 1))
    return [(name, number, found[0]) for name, number, one in said if (found := pattern.search(one.content))]


def build_pages(
    systems: Sequence[Answers], raters: Sequence[str], per_question: int = 0, limit: int = 0, seed: int = 0,
    language: str = "zh",
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """The page of each rater, and the key: the systems behind the letters, by page and question.

    `per_question` raters get each question and at most `limit` questions are asked; 0 stands for all. Raises ValueError
    for systems or raters that do not fit.
    """
    names = [system.name for system in systems]
    total = len(systems[0].questions) if systems else 0
    asked = thin(range(total), limit or total)
    count = per_question or len(raters)
    if not 2 <= len(names) <= len(LETTERS) or TIE in names:
        raise ValueError(f"a page compares 2 to {len(LETTERS)} files of answers, none named {TIE}.jsonl, found {names}")
    free = {rater.casefold() for rater in raters} - {"", "key", *(name.casefold() for name in names)}
    if len(free) < len(raters) or not re.fullmatch(r"[\w-]+", "".join(raters)):
        raise ValueError(f"raters need different names of letters and digits, none a system's, found {list(raters)}")
    if not 1 <= count <= len(raters) or len(asked) * count < len(raters):
        raise ValueError(f"{count} of {len(raters)} raters cannot share {len(asked)} questions; change per_question")
    questions = [systems[0].questions[number] for number in asked]
    texts = [{system.name: system.answers[number].content.strip() for system in systems} for number in asked]
    whole = digest([set_hash(questions), names, texts, list(raters), count, seed])[:16]
    ids = [digest([whole, number])[:10] for number in asked]
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    rows = [{"number": n + 1, "task": q.task, "question": q.text} for n, q in zip(asked, questions, strict=True)]
    key: dict[str, Any] = {"set": whole, "question_set": systems[0].about.get("question_set"), "systems": names}
    key |= {"questions": dict(zip(ids, rows, strict=True)), "pages": {}}
    pages = {}
    for rater, numbers in share_out([question.task for question in questions], raters, count, seed).items():
        page = digest([whole, rater])[:16]
        orders = balanced_orders(len(numbers), names, f"{page} {seed}")
        shown = []
        for number, order in zip(numbers, orders, strict=True):
            history = [{"role": said.role, "content": said.content} for said in questions[number].history]
            shown.append({"id": ids[number], "history": history, "answers": [texts[number][name] for name in order]})
        content: dict[str, Any] = {"format": FORMAT, "set": whole, "page": page, "rater": rater, "language": language}
        content |= {"dimensions": DIMENSIONS, "questions": shown}
        # Without "<" no text of an answer can end the script that holds it or begin a comment in it.
        text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c").encode(errors="replace").decode()
        pages[rater] = template.replace("{{DATA}}", text)
        key["pages"][page] = {"rater": rater, "orders": dict(zip([ids[n] for n in numbers], orders, strict=True))}
    return pages, key
