"""Exams: sheets written by us in the layout of PediaBench and others, answers as people write them, scores by hand."""

import json
import random
from itertools import permutations

import numpy as np
import pytest

from pedgpt.evaluation.exams import (
    WEIGHTS,
    ExamQuestion,
    as_questions,
    calibration,
    chance,
    grade,
    points,
    read_answer,
    read_exam,
    summarize,
)

openpyxl = pytest.importorskip("openpyxl")
CHOICES = ["questions", "options", "answers"]
DISEASES = ["新生儿疾病", "儿科呼吸系统疾病"]


def sheet(path, header, rows):
    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(row)
    book.create_sheet("notes").append(["not", "part", "of", "the exam"])
    book.save(path)
    return path


@pytest.fixture(scope="module")
def pediabench(tmp_path_factory):
    """Twenty rows of each of the five sheets. Synthetic, written for this test."""
    folder = tmp_path_factory.mktemp("exam")
    group = lambda i: DISEASES[i % 2]  # noqa: E731
    head = "Disease Groups"
    truths = [[group(i), f"说法{i}成立。", "对 " if i % 2 else "错"] for i in range(20)]
    sheet(folder / "True or False.xlsx", [head, "questions", "answers", "explanations"], truths)
    forms = ["A.{}\nB.{}\nC.{}\nD.{}", "A. {}\n　　B. {}\n　　C. {}\n　　D. {}"]
    forms += ["A{}\nB{}\nC{}\nD{}", "A、{} B、{} C、{} D、{}"]
    options = [forms[i % 4].format(*(f"项{i}甲乙丙丁"[: n + 3] for n in range(4))) for i in range(20)]
    choices = [[group(i), f"选择{i}？", options[i], ["A", "C ", "ABD"][i % 3]] for i in range(20)]
    sheet(folder / "Multiple Choice.xlsx", [head, "questions", "options", "answers", "explanations"], choices)
    shuffled = [f"答案{i - i % 4 + (i + 1) % 4}" for i in range(20)]
    pairs = [["disease", f"问题{i % 4 + 1}", f"配伍{i}（　）。", f"答案{i}", shuffled[i]] for i in range(20)]
    header = ["disease groups", "question number", "questions", "answers", "disrupted answers", "explanlations"]
    sheet(folder / "Pairing.xlsx", header, pairs)
    essays = [[group(i), f"简述{i}", f"要点{i}"] for i in range(20)]
    sheet(folder / "EssayShort Answer.xlsx", [head, "questions", "answers"], essays)
    sheet(folder / "Case Analysis.xlsx", ["questions", "answers"], [[f"病例{i}", f"诊断{i}（2分）"] for i in range(20)])
    return folder


def test_the_five_sheets_are_read(pediabench):
    exam = read_exam(pediabench)
    kinds = {kind: [one for one in exam if one.kind == kind] for kind in WEIGHTS}
    assert [len(found) for found in kinds.values()] == [20, 20, 5, 20, 20]
    assert [one.answer for one in kinds["true_false"][:2]] == ["错", "对"]
    assert {one.group for one in kinds["choice"]} == set(DISEASES)
    for i, one in enumerate(kinds["choice"]):
        assert dict(one.options) == {letter: f"项{i}甲乙丙丁"[: n + 3] for n, letter in enumerate("ABCD")}
        assert one.answer == ["A", "C", "ABD"][i % 3] and one.place.endswith(f"Choice.xlsx:{i + 2}")
    pairing = kinds["pairing"][1]
    assert list(pairing.options.values()) == ["答案5", "答案6", "答案7", "答案4"] and pairing.answer == "DABC"
    assert "1. 配伍4" in pairing.text and "4. 配伍7" in pairing.text


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        (CHOICES, ["问", "A.甲\nB.乙", "E"], r"x.xlsx:2: cell C2: answer is 'E', expected some of A, B"),
        (CHOICES, ["问", "甲 乙", "A"], r"x.xlsx:2: cell B2: found 0 options"),
        (CHOICES, ["问", "A.甲\nB.乙", None], r"x.xlsx:2: cell C2: empty, expected answer"),
        (CHOICES, [None, "A.甲\nB.乙", "A"], r"x.xlsx:2: cell A2: empty, expected question"),
        (CHOICES[:2], ["问", "A.甲\nB.乙"], r"found columns questions, options, expected answer"),
        (["question number", *CHOICES[::2], "disrupted answers"], ["1", "问", "甲", "乙"], "cell C2: '甲' is not"),
        (["text"], ["随便"], "found columns text, expected question"),
    ],
)  # fmt: skip
def test_malformed_sheets_are_refused_with_their_cells(tmp_path, header, row, told):
    with pytest.raises(ValueError, match=told):
        read_exam(sheet(tmp_path / "x.xlsx", header, [row]))


def test_a_truth_that_is_neither_makes_no_true_or_false_sheet(tmp_path):
    rows = [["说法", "对"], ["说法", "也许"]]
    assert {one.kind for one in read_exam(sheet(tmp_path / "x.xlsx", ["questions", "answers"], rows))} == {"essay"}


def test_other_projects_layouts(tmp_path):
    cmb = {"exam_subject": "儿科学", "question": "问？", "answer": "B"}
    cmb["option"] = {"A": "甲", "B": "乙", "C": "丙", "D": ""}
    (tmp_path / "cmb.json").write_text(json.dumps([cmb, {**cmb, "answer": "AC"}], ensure_ascii=False), encoding="utf-8")
    (one, two) = read_exam(tmp_path / "cmb.json")
    assert (one.group, one.answer, dict(one.options)) == ("儿科学", "B", {"A": "甲", "B": "乙", "C": "丙"})
    assert two.answer == "AC" and one.single and not two.single
    cmexam = "Question,Options,Answer\n问？,\"A 甲\nB 乙\nC 丙\",C\n"
    (tmp_path / "cmexam.csv").write_text(cmexam, encoding="utf-8")
    (one,) = read_exam(tmp_path / "cmexam.csv")
    assert (dict(one.options), one.answer) == ({"A": "甲", "B": "乙", "C": "丙"}, "C")
    rows = {"question": "问？", "options": ["甲", "乙"], "answer": ["A", "B"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert read_exam(tmp_path / "own.jsonl")[0].answer == "AB"


def test_options_are_told_apart_wherever_they_stand(tmp_path):
    texts = {
        "A.甲B.一块组成\nC.丙": ["甲", "一块组成", "丙"],
        "A.维生素D.的缺乏\nB.乙": ["维生素D.的缺乏", "乙"],
        "A.甲\nc.丙\nB.乙": ["甲\nc.丙", "乙"],
        "A.甲\nC.丙\nD.丁": ["甲", "丙", "丁"],
        "A.90mL/(kg·d)\nB.140mL/(kg·d)\nC.110mL/(kg·d)\nD.130mL/(kg·d)": [f"{n}mL/(kg·d)" for n in (90, 140, 110, 130)],
        "Ａ．甲　Ｂ．乙": ["甲", "乙"],
    }  # fmt: skip
    for number, (text, expected) in enumerate(texts.items()):
        path = sheet(tmp_path / f"{number}.xlsx", ["questions", "options", "answers"], [["问", text, "A"]])
        assert list(read_exam(path)[0].options.values()) == expected


def test_cmexams_options_are_read_and_one_mistake_makes_no_essays_of_statements(tmp_path):
    row = {"Question": "问", "Options": [{"key": "A", "value": "甲"}, {"key": "B", "value": "乙"}], "Answer": "B"}
    (tmp_path / "cmexam.json").write_text(json.dumps([row]), encoding="utf-8")
    assert read_exam(tmp_path / "cmexam.json")[0].options == {"A": "甲", "B": "乙"}
    path = sheet(tmp_path / "truths.xlsx", ["questions", "answers"], [["一", "对"], ["二", "队"], ["三", "错"]])
    with pytest.raises(ValueError, match="truths.xlsx:3: cell B3: answer is '队', expected 对 or 错"):
        read_exam(path)


CHOICE = ExamQuestion("choice", "问", "B", "f:1", options=dict(zip("ABCDE", "甲乙丙丁戊", strict=True)))
SEVERAL = ExamQuestion("choice", "问", "ABD", "f:1", options=CHOICE.options)
TRUTH = ExamQuestion("true_false", "说法", "对", "f:1")
PAIRS = ExamQuestion("pairing", "问", "CAB", "f:1", options=dict(zip("ABC", "甲乙丙", strict=True)))


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        *((CHOICE, text, "B") for text in (
            "B", "b", " B。", "（B）", "答案：B", "答案是B。", "正确答案为 B", "选B", "应选B。", "故选 B", "B. 乙",
            "B、乙。因为其他都不对", "答案：B\n解析：A错，C错。", "本题选B，正确答案是B。",
        )),
        *((CHOICE, text, None) for text in (
            "", "不知道", "A或者B都有可能", "答案：A。答案：B", "A. 甲\nB. 乙\nC. 丙", "维生素B缺乏", "F", "BMI",
            "I think so", "选项B是错误的", "选项B不正确。", "不选B", "不应选B", "选项A、B错误", "错误选项B",
            "答案：B或C",
        )),
        *((SEVERAL, text, "ABD") for text in (
            "ABD", "A、B、D", "A,B,D", "DBA", "A B D", "答案：ABD", "正确选项是A、B和D。", "选ABD",
        )),
        (SEVERAL, "AB", "AB"),
        *((TRUTH, text, "对") for text in (
            "对", "对。", "正确", "正确。因为……", "答案：对", "该说法正确", "√", "对\n解析：……", "正确的",
        )),
        *((TRUTH, text, "错") for text in (
            "错", "错误", "不对", "不正确。", "答案是错", "这个说法不正确", "说法是错误的", "×",
        )),
        *((TRUTH, text, None) for text in (
            "", "不知道", "对吗", "对？", "对于这个说法", "正确的做法是就医", "对症治疗", "有时对有时错",
            "答案：对。答案：错",
        )),
        *((PAIRS, text, "CAB") for text in ("1-C，2-A，3-B", "1. C\n2. A\n3. B", "1：C 2：A 3：B", "1→c; 2→a; 3→b")),
        (PAIRS, "1-C，3-A", "C?A"), (PAIRS, "1-C，1-A", None), (PAIRS, "CAB", None),
    ],
)  # fmt: skip
def test_answers_are_read_strictly(question, text, expected):
    assert read_answer(question, text) == expected


def test_points():
    assert [points(PAIRS, said) for said in ("CAB", "CBA", "C??", "ABC", "???", None)] == [1, 1 / 3, 1 / 3, 0, 0, 0]
    assert [points(SEVERAL, said) for said in ("ABD", "AB", None)] == [1, 0, 0]
    exam = [CHOICE, TRUTH, ExamQuestion("essay", "问", "答", "f:3")]
    shares, unread = grade(exam, ["B", "也许", "很长的回答"])
    assert shares == [1, 0, None] and unread == ["question 2 (f:1): '也许'"]


def test_chance_is_what_guessing_gives():
    assert chance(CHOICE) == 1 / 5 and chance(TRUTH) == 1 / 2 and chance(SEVERAL) == 1 / 31
    for n in range(2, 6):
        letters = "ABCDEF"[:n]
        one = ExamQuestion("pairing", "问", letters, "f:1", options=dict.fromkeys(letters, ""))
        expected = np.mean([points(one, "".join(order)) for order in permutations(letters)])
        assert chance(one) == pytest.approx(expected, abs=1e-12)


def test_the_total_is_pediabenchs(pediabench):
    exam = read_exam(pediabench)
    by_kind = {"true_false": 1.0, "choice": 0.5, "pairing": 1 / 3, "essay": 0.6, "case": 0.25}
    shares = [by_kind[one.kind] for one in exam]
    found = summarize(exam, shares)
    assert found["total"] == pytest.approx([10 * 1 + 40 * 0.5 + 10 / 3 + 30 * 0.6 + 10 * 0.25] * 3)
    guessed = [float(i % 2) if one.kind == "choice" else 1.0 for i, one in enumerate(exam)]
    half = 40 * 1.96 * 0.5 / 20**0.5
    assert summarize(exam, guessed)["total"] == pytest.approx([80, 80 - half, 80 + half], abs=1.5)
    assert found["kinds"]["choice"]["questions"] == 20 and set(found["groups"]) == {*DISEASES, "disease"}
    assert summarize(exam, [None if one.kind == "case" else 1.0 for one in exam])["total"] is None


def test_a_question_that_occurs_often_makes_no_interval_narrower(pediabench):
    exam = [one for one in read_exam(pediabench) if one.kind == "true_false"]
    shares = [float(i % 3 == 0) for i in range(20)]
    assert summarize(exam * 5, shares * 5)["kinds"]["true_false"]["score"] == pytest.approx(
        summarize(exam, shares)["kinds"]["true_false"]["score"]
    )


def test_a_random_examinee_has_the_chance_level_in_its_interval(pediabench):
    dice = random.Random(0)
    exam = [one for one in read_exam(pediabench) if one.single] * 30
    shares, unread = grade(exam, [dice.choice(one.letters) for one in exam])
    assert not unread
    for found in summarize(exam, shares)["kinds"].values():
        assert found["score"][1] <= found["chance"] <= found["score"][2]


def test_rotation_moves_every_option_and_the_answer():
    moved = SEVERAL.rotated()
    assert dict(moved.options) == {"A": "戊", "B": "甲", "C": "乙", "D": "丙", "E": "丁"} and moved.answer == "BCE"
    assert {moved.options[letter] for letter in moved.answer} == {SEVERAL.options[letter] for letter in SEVERAL.answer}


def test_calibration_by_hand():
    found = calibration([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0], [True, True, True, False, True, False, True])
    high = abs(4 / 5 - (4 * 0.95 + 1) / 5) * 5 / 7
    assert found["ece"] == pytest.approx(100 * (high + abs(0.5 - 0.55) * 2 / 7))
    assert [one["questions"] for one in found["bins"]] == [2, 5]
    assert calibration([0.25] * 4, [True, False, False, False])["ece"] == pytest.approx(0)


def test_questions_hold_options_and_kind(pediabench):
    asked = as_questions(read_exam(pediabench / "Multiple Choice.xlsx"))
    assert "A. 项0" in asked[0].text and asked[0].task == "选择题" and "一个或几个" in asked[0].text
    assert "单项选择题" in as_questions([CHOICE])[0].text
