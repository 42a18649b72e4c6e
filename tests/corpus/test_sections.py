"""Books become passages that say where they stand, and no text is lost."""

import random
import re

import pytest

from pedgpt.corpus.builders.sections import passages, sentences, unnumbered
from pedgpt.data import Document, read_documents

BOOK = """前言写在第一个标题之前。

# 儿科学

第三章 呼吸系统疾病

第一节 肺炎
肺炎是肺部的炎症。

一、病因
多由病毒引起。
常见的有两种：
一、呼吸道合胞病毒
二、腺病毒
（一）细菌
肺炎链球菌多见。

二、治疗
首先休息。第二天，
体温为
38.5 ℃以上者用退热药。

第二节 哮喘
哮喘反复发作。
# 附录
1.1 检查
做肺功能。
1.1.1 方法
吹气。
1.2 随访
每年一次。
"""


def test_a_book_with_all_kinds_of_headings(tmp_path):
    (tmp_path / "book.md").write_text(BOOK, encoding="utf-8")
    (document,) = read_documents(tmp_path / "book.md")
    found = list(passages(document))
    file = document.source
    assert [(p.source.replace(file, "book.md"), p.title, p.text) for p in found] == [
        ("book.md:1", "儿科学", "前言写在第一个标题之前。"),
        ("book.md:8 › 儿科学 › 第三章 呼吸系统疾病 › 第一节 肺炎", "肺炎", "肺炎是肺部的炎症。"),
        ("book.md:11 › 儿科学 › 第三章 呼吸系统疾病 › 第一节 肺炎 › 一、病因", "病因",
         # A numbered line without text beneath it is an item of a list.
         "多由病毒引起。\n常见的有两种：\n一、呼吸道合胞病毒"),
        ("book.md:16 › 儿科学 › 第三章 呼吸系统疾病 › 第一节 肺炎 › 二、腺病毒 › （一）细菌", "细菌",
         "肺炎链球菌多见。"),
        ("book.md:19 › 儿科学 › 第三章 呼吸系统疾病 › 第一节 肺炎 › 二、治疗", "治疗",
         "首先休息。第二天，\n体温为\n38.5 ℃以上者用退热药。"),
        ("book.md:24 › 儿科学 › 第三章 呼吸系统疾病 › 第二节 哮喘", "哮喘", "哮喘反复发作。"),
        ("book.md:27 › 附录 › 1.1 检查", "检查", "做肺功能。"),
        ("book.md:29 › 附录 › 1.1 检查 › 1.1.1 方法", "方法", "吹气。"),
        ("book.md:31 › 附录 › 1.2 随访", "随访", "每年一次。"),
    ]  # fmt: skip


def test_a_short_document_without_headings_is_itself():
    document = Document("一、二、三，走。\n第一节课讲的是肺炎。", "a.jsonl:3", "题", "肺炎", "儿科")
    assert list(passages(document)) == [document]
    long = Document("肺炎是炎症。" * 10, "a.jsonl:3", "题", "肺炎", "儿科")
    parts = list(passages(long, max_characters=20))
    assert [p.text for p in parts] == ["肺炎是炎症。" * 3] * 3 + ["肺炎是炎症。"]
    assert {(p.source, p.title, p.disease, p.department) for p in parts} == {("a.jsonl:3", "题", "肺炎", "儿科")}
    (headed,) = passages(Document("# 肺炎\n炎症。", "a.jsonl:3"))
    assert (headed.source, headed.title, headed.text) == ("a.jsonl:3 › 肺炎", "肺炎", "炎症。")


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("# 肺炎", True), ("###### 肺炎 ##", True), ("#肺炎", False), ("第一章", True), ("第十二章　总论", True),
        ("第3章肺炎", True), ("第三节：治疗", True), ("第一编 总论", True), ("第一章讲肺炎。", False),
        ("第一次发病", False),
        ("一、病因", True), ("十一、预防", True), ("一、病因：", False), ("一、多喝水，多休息", False),
        ("一般治疗", False),
        ("（一）临床表现", True), ("(二) 检查", True), ("（续）", False), ("1.2 治疗", True), ("1.2.3治疗", True),
        ("2.5毫克", False), ("38.5 ℃以上", False), ("1.5至2岁", False), ("3 mg", False), ("1. 休息", False),
        ("一、" + "很长" * 15, False), ("2020.1", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_heading(line, heading):
    found = list(passages(Document(f"{line}\n正文在此。", "a.md"), max_characters=60))
    assert [p.text for p in found] == (["正文在此。"] if heading else [f"{line}\n正文在此。"])


def test_split_at_paragraphs_then_sentences_then_anywhere():
    text = f"甲甲甲甲。乙乙乙。\n\n丙丙丙丙丙！“丁丁？”戊戊；{'己' * 11}，{'庚' * 13}。\n\n\n辛。"
    parts = [p.text for p in passages(Document(text, "a.txt"), max_characters=12)]
    assert parts[:3] == ["甲甲甲甲。乙乙乙。", "丙丙丙丙丙！“丁丁？”", "戊戊；"]
    assert parts[3:] == ["己" * 11 + "，", "庚" * 12, "庚。\n\n\n辛。"]
    sources = [p.source for p in passages(Document(text, "a.txt"), max_characters=12)]
    assert sources == ["a.txt:1"] + ["a.txt:3"] * 5


def test_sentences_keep_their_ends():
    assert sentences("他说：“好吗？”她答；（是。）完了") == ["他说：“好吗？”", "她答；", "（是。）", "完了"]
    assert sentences("  \n ") == []


def test_numbers_of_headings():
    for heading, name in [("第二节 肺炎", "肺炎"), ("第二节", "第二节"), ("一、病因", "病因"), ("（三）治疗", "治疗"),
                          ("1.2.3 预后", "预后"), ("肺炎", "肺炎"), ("21三体综合征", "21三体综合征")]:  # fmt: skip
        assert unnumbered(heading) == name


def random_book(rng):
    """Lines of headings and text, and the text alone; every heading of a doubtful kind has text beneath it."""
    lines, body, path = [], [], []
    kinds = [lambda i: "#" * (i % 3 + 1) + f" 题{i}", lambda i: f"第{i}章 题", lambda i: f"第{i}节",
             lambda i: "一、题目", lambda i: "（二）题目", lambda i: f"{i % 9 + 1}.{i % 7 + 1} 题目"]  # fmt: skip
    for i in range(rng.randrange(1, 12)):
        if rng.random() < 0.8:
            lines.append(rng.choice(kinds)(i + 1))
            path.append(lines[-1])
            lines += [""] * rng.randrange(2)
        for _ in range(rng.randrange(1, 4)):
            lengths = rng.choices(range(1, 40), k=rng.randrange(1, 6))
            parts = ["".join(rng.choices("甲乙丙丁戊己，、ab ", k=length)) for length in lengths]
            text = "".join(part + rng.choice("。！？；\n") for part in parts)
            text = "始" + text.strip().replace("\n\n", "\n") + "。"
            lines += [text, *[""] * rng.randrange(2)]
            body.append(text)
    return "\n".join(lines), "".join(body), path


@pytest.mark.parametrize("seed", range(60))
def test_all_text_comes_out_once_in_order(seed):
    rng = random.Random(seed)
    text, body, headings = random_book(rng)
    limit = rng.choice([7, 30, 80, 1200])
    found = list(passages(Document(text, "book.md", "书", "病", "科"), max_characters=limit))
    bare = lambda string: re.sub(r"\s", "", string)  # noqa: E731
    assert bare("".join(p.text for p in found)) == bare(body)
    lines = text.split("\n")
    for p in found:
        assert 0 < len(p.text) <= limit and p.text == p.text.strip() and p.disease == "病" and p.department == "科"
        if headings or len(text) > limit:
            place, *path = p.source.split(" › ")
            line = lines[int(place.removeprefix("book.md:")) - 1]
            assert p.text.split("\n")[0] in line
            assert all(heading in [h.lstrip("# ") for h in headings] for heading in path)
            # The nearest heading before that line is the last of the path.
            before = [h for h in lines[: int(place.removeprefix("book.md:"))] if h in headings]
            assert path[-1:] == [h.lstrip("# ") for h in before[-1:]]
    end = 0
    for p in found:
        start = text.index(p.text, end)
        end = start + len(p.text)
        if p.text[-1] not in "。！？；" and not re.match(r"[ \t]*\n[ \t]*\n", text[end:]):
            # Cut inside a sentence only where the sentence is longer than a passage.
            left = max(text.rfind(mark, 0, end) for mark in "。！？；") + 1
            right = min(at for mark in "。！？；" if (at := text.find(mark, end)) >= 0) + 1
            while text[right : right + 1] in tuple("。！？；"):
                right += 1
            assert len(text[left:right].strip()) > limit
