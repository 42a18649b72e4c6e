"""One writing, no personal data, no broken rows."""

import importlib.util
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.corpus.quality import (
    BROKEN,
    EMPTY,
    EQUAL,
    NO_QUESTION,
    NOT_CHINESE,
    TOO_LONG,
    TOO_SHORT,
    chinese_share,
    fault,
    normalize,
    scrub,
)
from pedgpt.data.records import Conversation, Document, Message, PreferencePair

spec = importlib.util.spec_from_file_location(
    "bench_quality", Path(__file__).resolve().parents[2] / "benchmarks" / "bench_quality.py"
)
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ＣＴ检查３次，体温３８．５℃", "CT检查3次，体温38.5℃"),
        ("发烧。。。。怎么办！！！！急!!!!", "发烧。怎么办！急!"),
        ("你好\u200b，\ufeff宝宝\ue000\x07咳嗽", "你好，宝宝咳嗽"),
        ("一\r\n二\r三\u2028四", "一\n二\n三\n四"),
        ("一<br>二<BR/>三</p><p class='a'>四", "一\n二\n三\n\n四"),
        ("a&nbsp;b &lt;5 &amp;amp; &#20320;", "a b <5 & 你"),
        ("&amp;lt;br&amp;gt;完", "完"),
        ("&amp;#38;#x26;AMP;amp;lt;3，&ampamp;，&ltlt;", "<3，&ampamp;，&ltlt;"),
        ("甲   乙\u3000\u3000丙\xa0丁", "甲 乙 丙 丁"),
        ("　　第一段\n　　第二段  \n\n\n\n第三段", "第一段\n第二段\n\n第三段"),
        ("嗯……好——的......", "嗯……好——的..."),
        ("| a   | b |\n|---|---|\n| 甲  | 丙 |", "| a   | b |\n|---|---|\n| 甲  | 丙 |"),
        ("看\n```\n  a =  '。。'\n\n\n\nb &lt; c\n```\n好。。", "看\n```\n  a =  '。。'\n\n\n\nb &lt; c\n```\n好。"),
        ("- 一\n    - 二", "- 一\n    - 二"),
        ("cafe\u0301 凉", "café 凉"),
        ("《“书”》（一）？：；、％", "《“书”》（一）？：；、％"),
        ("见 http://a.cn/?x=1&copy=2", "见 http://a.cn/?x=1&copy=2"),
        (" \t\n", ""),
    ],
)  # fmt: skip
def test_texts_are_written_one_way(text, expected):
    assert normalize(text) == expected


@given(st.text() | st.text(alphabet="a。。！!. \n\t`|&lt;#<br/>p\r　１Ａ～~…—amp;\u200be\u0301", max_size=40))
@settings(max_examples=200, deadline=None)
def test_normalizing_twice_changes_nothing_more(text):
    once = normalize(text)
    assert normalize(once) == once == unicodedata.normalize("NFC", once)


def test_chinese_share_counts_letters_alone():
    assert chinese_share("发烧38.5度，CT") == 3 / 5
    assert chinese_share("only English, 123") == 0 and chinese_share("123！") == 1
    assert chinese_share("привет你好") == 2 / 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("电话１３９１２３４５６７８，急", "电话【电话】，急"),
        ("拨+86 139-1234-5678或(010)6555-1234", "拨【电话】或【电话】"),
        ("13912345678/13887654321", "【电话】/【电话】"),
        ("身份证11010519491231002X，编号110105194912310021", "身份证【身份证号】，编号110105194912310021"),
        ("号110105491231002和110105491331002", "号【身份证号】和110105491331002"),
        ("发到li.lei＠１６３.com吧", "发到【邮箱】吧"),
        ("微信号：lilei_2020，QQ:123456", "微信号：【微信号】，QQ:【QQ号】"),
        ("姓名：欧阳小明 年龄：3岁", "姓名：【姓名】 年龄：3岁"),
        ("姓名：米歇尔·奥巴马", "姓名：米歇尔·奥巴马"),
        ("医生我叫窦磊，头晕", "医生我叫【姓名】，头晕"),
        ("我叫王某，订单号13912345678", "我叫王某，订单号13912345678"),
        ("git@github.com和me@example.com", "git@github.com和me@example.com"),
    ],
)
def test_personal_data_is_replaced_and_its_like_stays(text, expected):
    scrubbed, found = scrub(text)
    assert scrubbed == expected and scrub(scrubbed)[0] == scrubbed
    assert sum(found.values()) == expected.count("【")


def test_personal_data_is_found_in_sentences_and_nothing_else_is():
    there = gone = found = wrong = clean = 0
    for text, expected, kind in planted.personal(random.Random(20), 6000):
        scrubbed, counts = scrub(text)
        wanted = expected.count(f"【{kind}】") if kind else 0
        there, found = there + wanted, found + sum(counts.values())
        gone += wanted if scrubbed == expected else 0
        clean, wrong = clean + (not kind), wrong + (not kind and scrubbed != text)
    assert there > 3000 and gone / there >= 0.99 and gone / found >= 0.98
    assert clean == 3000 and wrong <= 10


@pytest.mark.parametrize("text", ["&" + "amp;" * 20000, "&" + "ampamp;" * 20000])
def test_nested_entities_take_no_time(text):
    once = normalize(text)  # minutes, were every level a pass
    assert normalize(once) == once and once in ("&", text)


def conversation(*turns):
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)), "a:1")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (conversation("宝宝能吃盐吗？", "不能。"), TOO_SHORT),
        (conversation("宝宝能吃盐吗？", "不能。", "为什么？", "肾还小。"), None),
        (conversation("？！", "请描述一下症状。"), NO_QUESTION),
        (conversation("问" * 10, "答案是这样的" * 20), TOO_LONG),
        (conversation("What is it?", "This is a cold."), NOT_CHINESE),
        (conversation("怎么办？", "锟斤拷锟斤拷要多喝水"), BROKEN),
        (conversation("怎么办\ufffd？", "多喝水就好了"), BROKEN),
        (conversation("孩子咳嗽怎么办？".encode().decode("gbk", "ignore"), "多喝水就好了"), BROKEN),
        (conversation("怎么办？", "哈" * 20 + "多喝水就好了"), BROKEN),
        (conversation("怎么办？", "多喝水，注意休息"), None),
        (conversation("画个表", "|--|-----|---------|可以"), None),
        (Document("咳嗽是常见症状。", "a:1"), None),
        (Document("咳嗽", "a:1"), TOO_SHORT),
        (PreferencePair((Message("user", "怎么办？"),), "多喝水，注意休息", "喝水", "a:1"), TOO_SHORT),
        (PreferencePair((Message("user", "怎么办？"),), "多喝水，注意休息", "多喝温水吧", "a:1"), None),
        (PreferencePair((Message("user", "怎么办？"),), "多喝水，注意休息", " 多喝水，注意休息\n", "a:1"), EQUAL),
        (PreferencePair((Message("user", "怎么办？"),), "多喝水，注意休息", " ", "a:1"), EMPTY),
        (PreferencePair((Message("system", ""), Message("user", "怎么办？")), "多喝水，好", "多休息，好", "a"), EMPTY),
        (conversation("宝宝咳嗽？", " \n", "为什么？", "多喝水，注意休息"), EMPTY),
        (conversation("宝宝咳嗽？", "多喝水，注意休息", " ", "不客气，再见"), EMPTY),
    ],
)
def test_faults_are_told_apart(record, reason):
    found = fault(record, min_characters=5, max_characters=100, min_chinese=0.5)
    assert (found and found[0]) == reason and (found is None or found[1])
