"""Personal data goes, medicine stays: 300 sentences that may not change and 100 that must; personal data is made up."""

# ruff: noqa: E501, for the lists of sentences

import hashlib
import re
from itertools import product
from pathlib import Path

import pytest

from pedgpt.corpus.quality import normalize, scrub
from pedgpt.corpus.rows import texts
from pedgpt.data.readers import iter_records

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

MEDICINE = """头孢曲松+Vancomycin1g|+VitaminB12|加voriconazole200mg|+Vincristine1.5mg/m2|HBV-DNA定量 15800000000 IU/mL
精子总数 18600000000|精子總數18600000000，活力正常|泼尼松+VitaminD3 400IU|美罗培南加Vancomycin 15mg/kg q6h|加V 10000 IU 口服
白细胞计数13500000000/L|白細胞計數 13500000000 個|血小板 139 0000 0000/L|EBV-DNA 载量13812345678copies/ml|菌落数15000000000cfu
病毒载量：18912345678|HBV DNA 1.58E10 IU/ml|HCG 13345678901 mIU/ml|R-CHOP+Vincristine2mg d1|5%GS 250ml+VitC2.0g ivgtt
加voriconazole 6mg/kg，第二天改4mg/kg|利福平+VP-16 100mg|姓名 白细胞 5.6×10^9/L|姓名：白蛋白 35 g/L|孩子叫疼，给布洛芬5ml
我叫護士加了退燒藥5ml|女兒叫肚子痛，體溫38.5|電話裡醫生說每次2.5ml|微信上說吃400IU的VitaminD|+V.Zoster IgG 1:640
阿莫西林 250mg bid×7天|甲泼尼龙 1600mg/1.73m2|丙种球蛋白2g/kg，12小时|肝素 12500U，APTT 45s|维生素A+D3 1500/500IU
ALT 1580 U/L，AST 860U/L|CK-MB 12345 U/L|铁蛋白 15800.5 ng/ml|PCT 100.00 ng/mL，CRP 200mg/L|NT-proBNP 35000 pg/ml""".replace("\n", "|").split("|")

# 〔〕 marks what goes.
NAMES = "陳小明 劉志強 張偉 黃雅婷 欧阳小明 王磊 李思睿 林曉彤 吳佩雯 赵宇轩".split()
PHONES = "0912345678|0912-345-678|(02)2345-6789|04-22345678|91234567|2345 6789|13912345678|010-65551234".split("|")
CONTEXTS = [
    ("姓名", NAMES, "我叫〔〕|患者姓名：〔〕，年齡5歲|姓名：〔〕\n性別：男|兒子叫〔〕，咳嗽三天"),
    ("电话", PHONES, "電話：〔〕|手機號碼是〔〕，謝謝醫生|聯絡方式：〔〕。|电话:〔〕 下午有人接|我的手机：〔〕"),
    ("电话", ["+886 912 345 678", "+852 9123 4567", "+85323456789"], "打〔〕找我|有事聯繫〔〕，急"),
    ("身份证号", ["A123456789", "110105199003078013"], "身分證字號：〔〕|身份證號碼是〔〕，可以掛號嗎"),
    ("微信号", ["baby_2020", "lilei88", "xiaoming-66"], "加V：〔〕|微信號是〔〕"),
    ("邮箱", ["mama.bao@mail.com.tw", "wang88@163.com"], "報告寄到〔〕，謝謝|郵箱〔〕"),
]


def drawn(count: int) -> list[str]:
    """Sentences with doses, drugs in Latin letters and laboratory values, the same on every machine."""
    medical = re.compile(
        r"\d *(?:mg|ml|毫克|毫升|[微μu]g|g/|克|IU|单位|U/L|mmol|次方|片|粒|袋|%|℃|度)|[+＋加]\s?[A-Za-z]{2}|DNA|\d{5}|[A-Z]{2,}\d"
    )
    found = set()
    for name in ("internal_medicine_qa.csv", "general_medical_qa.jsonl", "pediatric_qa.jsonl", "cmd_cases.jsonl"):
        for record in iter_records(SHARED / name, "conversations", on_bad_row="skip"):
            for text in texts(record):
                found |= {s for s in re.split(r"[。！？；\n]", normalize(text)) if medical.search(s) and len(s) > 8}
    return sorted(found, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())[:count]


def test_drugs_doses_and_laboratory_values_are_left_as_they_are():
    assert [sentence for sentence in MEDICINE if scrub(sentence)[0] != sentence] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_medicine_in_real_questions_and_answers_is_left_as_it_is():
    sentences = drawn(300 - len(MEDICINE))
    assert len(sentences) + len(MEDICINE) == 300
    assert [sentence for sentence in sentences if scrub(sentence)[0] != sentence] == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("打138.1234.5678找我", "打【电话】找我"),
        ("139-12345678，139·1234·5678或139_1234_5678", "【电话】，【电话】或【电话】"),
        ("电话：852-91234567，電話 886-912-345-678", "电话：【电话】，電話 【电话】"),
        ("我叫做陈一鸣", "我叫做【姓名】"),
        ("批次139-20231215，比例138.12.34，Na 139.1", "批次139-20231215，比例138.12.34，Na 139.1"),
    ],
)
def test_odd_spellings_of_numbers_and_names_go_and_dates_stay(text, left):
    assert scrub(text)[0] == left


def test_a_hundred_sentences_with_personal_data_lose_it_in_simplified_and_traditional_characters():
    cases = [(c, v, kind) for kind, values, contexts in CONTEXTS for c, v in product(contexts.split("|"), values)]
    wrong = []
    for context, value, kind in cases:
        found, counts = scrub(context.replace("〔〕", value))
        if found != context.replace("〔〕", f"【{kind}】") or counts.total() != 1:
            wrong.append(found)
    assert wrong == [] and len(cases) == 100
