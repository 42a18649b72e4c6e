"""Every form of a row and what it becomes; every expectation is written by hand, none by the code under test."""

import json
from pathlib import Path

import pytest

from pedgpt.data.readers import (
    BadRow,
    detect_kind,
    iter_records,
    read_conversations,
    read_documents,
    read_preferences,
)
from pedgpt.data.records import Conversation, Document, Message, PreferencePair, ReadSummary, Triple


def read_triples(path, **settings):
    return list(iter_records(path, "triples", **settings))


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
READERS = {
    "documents": read_documents,
    "conversations": read_conversations,
    "preferences": read_preferences,
    "triples": read_triples,
}


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


def system(text):
    return Message("system", text)


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


FEVER = (user("孩子发烧怎么办？"), assistant("多喝水，观察体温。"))
SAFE = (system("你是儿科医生。"), *FEVER)

CONVERSATION_FORMS = {
    "question_answer": ({"question": "孩子发烧怎么办？", "answer": "多喝水，观察体温。"}, FEVER),
    "cmd_cases_spelling": ({"id": "1", "question": "孩子发烧怎么办？", "raw_anwser": "多喝水，观察体温。"}, FEVER),
    "alpaca": ({"instruction": "孩子发烧怎么办？", "input": "", "output": "多喝水，观察体温。"}, FEVER),
    "alpaca_null_input": ({"instruction": "孩子发烧怎么办？", "input": None, "output": "多喝水，观察体温。"}, FEVER),
    "alpaca_input": (
        {"instruction": "翻译", "input": "fever", "output": "发烧"},
        (user("翻译\nfever"), assistant("发烧")),
    ),
    "alpaca_system_and_history": (
        {"instruction": "三", "output": "四", "system": "零", "history": [["一", "二"]]},
        (system("零"), user("一"), assistant("二"), user("三"), assistant("四")),
    ),
    "alpaca_empty_system_and_history": (
        {"instruction": "三", "output": "四", "system": "", "history": []},
        (user("三"), assistant("四")),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "你是儿科医生。"},
                {"from": "human", "value": "孩子发烧怎么办？"},
                {"from": "gpt", "value": "多喝水，观察体温。"},
            ]
        },
        SAFE,
    ),
    "sharegpt_empty_system_message": (
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "孩子发烧怎么办？"},
                {"from": "gpt", "value": "多喝水，观察体温。"},
            ]
        },
        FEVER,
    ),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": "你是儿科医生。"},
                {"role": "user", "content": "孩子发烧怎么办？"},
                {"role": "assistant", "content": "多喝水，观察体温。"},
            ]
        },
        SAFE,
    ),
    "patient_and_doctor": (
        {
            "conversation": [
                {"role": "patient", "content": "孩子发烧怎么办？"},
                {"role": "doctor", "content": "多喝水，观察体温。"},
            ],
            "system": "你是儿科医生。",
        },
        SAFE,
    ),
    "padding_is_kept": ({"question": " 问 ", "answer": "答\n"}, (user(" 问 "), assistant("答\n"))),
}


@pytest.mark.parametrize("form", CONVERSATION_FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_every_conversation_form_becomes_the_same_messages(tmp_path, form, suffix):
    row, messages = CONVERSATION_FORMS[form]
    path = tmp_path / f"rows{suffix}"
    text = json.dumps(row, ensure_ascii=False)
    path.write_text(f"[{text},\n{text}]" if suffix == ".json" else f"{text}\n{text}", encoding="utf-8")
    assert read_conversations(path) == [Conversation(messages, f"{path}:1"), Conversation(messages, f"{path}:2")]


def test_task_is_copied_when_it_is_a_string(tmp_path):
    row = {"question": "问", "answer": "答"}
    path = write(tmp_path / "a.jsonl", row | {"task": "medqa"}, row | {"task": 3}, row)
    assert [found.task for found in read_conversations(path)] == ["medqa", "", ""]


PROMPT_LIST = [{"role": "user", "content": "问"}]
PREFERENCE_FORMS = {
    "strings": ({"prompt": "问", "chosen": "好", "rejected": "坏"}, (user("问"),)),
    "system": ({"system": "令", "prompt": "问", "chosen": "好", "rejected": "坏"}, (system("令"), user("问"))),
    "trl_lists": (
        {
            "prompt": PROMPT_LIST,
            "chosen": [{"role": "assistant", "content": "好"}],
            "rejected": [{"role": "assistant", "content": "坏"}],
        },
        (user("问"),),
    ),
    "trl_whole_conversations": (
        {
            "prompt": "问",
            "chosen": [*PROMPT_LIST, {"role": "assistant", "content": "好"}],
            "rejected": [*PROMPT_LIST, {"role": "assistant", "content": "坏"}],
        },
        (user("问"),),
    ),
    "whole_conversations_without_the_system": (
        {
            "system": "令",
            "prompt": PROMPT_LIST,
            "chosen": [*PROMPT_LIST, {"role": "assistant", "content": "好"}],
            "rejected": "坏",
        },
        (system("令"), user("问")),
    ),
    "sharegpt_strings": (
        {"conversations": [{"from": "human", "value": "问"}], "chosen": "好", "rejected": "坏"},
        (user("问"),),
    ),
    "sharegpt_messages": (
        {
            "conversations": [
                {"from": "system", "value": "令"},
                {"from": "human", "value": "一"},
                {"from": "gpt", "value": "二"},
                {"from": "human", "value": "问"},
            ],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        (system("令"), user("一"), assistant("二"), user("问")),
    ),
}


@pytest.mark.parametrize("form", PREFERENCE_FORMS)
def test_every_preference_form_becomes_prompt_chosen_rejected(tmp_path, form):
    row, prompt = PREFERENCE_FORMS[form]
    path = write(tmp_path / "pairs.jsonl", row)
    assert read_preferences(path) == [PreferencePair(prompt, "好", "坏", f"{path}:1")]
    assert detect_kind(path) == "preferences"


def test_triples_are_read_from_tsv_with_header_comments_and_plain_quotes(tmp_path):
    path = tmp_path / "graph.tsv"
    path.write_text('# 图谱\nhead\trelation\ttail\n\n感冒\t症状\t"发热"\n"肺炎\t症状\t 咳嗽 \n', encoding="utf-8")
    assert read_triples(path) == [
        Triple("感冒", "症状", '"发热"', f"{path}:4"),
        Triple('"肺炎', "症状", "咳嗽", f"{path}:5"),
    ]


def test_a_triple_tsv_needs_no_header(tmp_path):
    path = tmp_path / "graph.tsv"
    path.write_text("感冒\t症状\t发热\n", encoding="utf-8")
    assert read_triples(path) == [Triple("感冒", "症状", "发热", f"{path}:1")]


def test_triples_are_read_from_jsonl(tmp_path):
    path = write(tmp_path / "graph.jsonl", {"head": "感冒", "relation": "症状", "tail": "发热", "weight": 1})
    assert read_triples(path) == [Triple("感冒", "症状", "发热", f"{path}:1")]


def test_documents_are_whole_text_files_or_jsonl_rows(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_bytes("前言\r\n## 第一章 C# ##\r\n正文\r\n".encode())
    (tmp_path / "b.txt").write_text("只有正文", encoding="utf-8")
    write(tmp_path / "sub" / "c.jsonl", {"text": "甲", "title": "书"}, {"text": "乙"}, {"text": "丙", "title": None})
    (tmp_path / "ignored.pdf").write_bytes(b"\xff")
    assert read_documents(tmp_path) == [
        Document("前言\n## 第一章 C# ##\n正文\n", str(tmp_path / "a.md"), "第一章 C#"),
        Document("只有正文", str(tmp_path / "b.txt")),
        Document("甲", f"{tmp_path}/sub/c.jsonl:1", "书"),
        Document("乙", f"{tmp_path}/sub/c.jsonl:2"),
        Document("丙", f"{tmp_path}/sub/c.jsonl:3"),
    ]


def test_several_paths_are_read_in_the_order_given(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", {"text": name}) for name in "ba"]
    assert [found.text for found in read_documents(paths)] == ["b", "a"]


@pytest.mark.parametrize("question", ["question", "ask", "instruction", "prompt", "query"])
@pytest.mark.parametrize("answer", ["answer", "output", "response"])
def test_a_csv_is_recognised_by_its_header(tmp_path, question, answer):
    path = tmp_path / "a.csv"
    path.write_text(f"department,title,{question},{answer},system,task\n儿科,标题,问,答,令,qa\n", encoding="utf-8")
    talk = (system("令"), user("问"), assistant("答"))
    assert read_conversations(path) == [Conversation(talk, f"{path}:2", "qa", department="儿科")]


def test_columns_name_the_headers_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("input,问题,回答,ask\n甲,乙,丙,丁\n", encoding="utf-8")
    columns = {"question": "input", "answer": "回答"}
    assert read_conversations(path, columns=columns) == [Conversation((user("甲"), assistant("丙")), f"{path}:2")]
    with pytest.raises(ValueError, match=r"a\.csv:2.*回复"):
        read_conversations(path, columns={"question": "问题", "answer": "回复"})
    with pytest.raises(ValueError, match="reply"):
        read_conversations(path, columns={"reply": "回答"})


def test_a_repeated_csv_column_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer,answer\n问,答,答二\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv: .*answer twice"):
        read_conversations(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_quoted_newlines_commas_and_quotes_stay_in_their_cell(tmp_path, newline):
    path = tmp_path / "a.csv"
    rows = ["question,answer", '"一,""二""', '三",答', "", "  ", '"问', "", '问",', "问,末"]
    path.write_bytes(newline.join(rows).encode())
    summary = ReadSummary()
    found = read_conversations(path, on_bad_row="skip", summary=summary)
    assert [(each.messages, each.source) for each in found] == [
        ((user('一,"二"\n三'), assistant("答")), f"{path}:2"),
        ((user("问"), assistant("末")), f"{path}:9"),
    ]
    assert [(row.line, row.reason.split(":")[0]) for row in summary.skipped] == [(6, "answer is empty")]


def test_a_conversation_tsv_is_read_by_its_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("question\tanswer\ttask\n问\t答,答\tqa\n", encoding="utf-8")
    assert read_conversations(path) == [Conversation((user("问"), assistant("答,答")), f"{path}:2", "qa")]
    assert detect_kind(path) == "conversations"


# Rows by the README beside the data, and those that end with a user's turn, counted by a separate script.
SHARED_FILES = {
    "pediatric_qa.jsonl": ("conversations", 521, 0),
    "general_medical_qa.jsonl": ("conversations", 3715, 0),
    "internal_medicine_qa.csv": ("conversations", 5331, 0),
    "dialogues_alpaca_history.jsonl": ("conversations", 721, 0),
    "safety_instructions.jsonl": ("conversations", 99, 0),
    "medical_sharegpt.jsonl": ("conversations", 707, 0),
    "general_sharegpt.jsonl": ("conversations", 695, 6),
    "preference_sharegpt.jsonl": ("preferences", 376, 0),
    "cmd_cases.jsonl": ("conversations", 79, 0),
    "cmd_model_dialogues.jsonl": ("conversations", 474, 0),
}


@pytest.mark.parametrize("name", SHARED_FILES)
def test_no_row_of_real_data_is_lost(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    kind, rows, bad = SHARED_FILES[name]
    assert detect_kind(path) == kind
    summary = ReadSummary()
    found = READERS[kind](path, on_bad_row="skip", summary=summary)
    assert (len(found), len(summary.skipped), summary.rows) == (rows - bad, bad, {str(path): rows - bad})


def test_every_file_of_the_shared_folder_has_an_expectation():
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here")
    assert {path.name for path in SHARED.iterdir()} - {"README.md"} == set(SHARED_FILES)


def test_real_dialogue_text_survives_unchanged():
    path = SHARED / "dialogues_alpaca_history.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    for row, found in zip(rows, read_conversations(path), strict=True):
        texts = [text for pair in row["history"] for text in pair] + [row["instruction"], row["output"]]
        assert [message.content for message in found.messages] == texts
        assert [message.role for message in found.messages] == ["user", "assistant"] * (len(texts) // 2)


# Flags of a message that say whether it is learnt from


def openai(*turns, **more):
    """A row of (role, text, flags) messages."""
    return {"messages": [{"role": role, "content": text, **flags} for role, text, flags in turns], **more}


FLAGS = {
    "loss": ({"loss": False}, {"loss": True}),
    "weight": ({"weight": 0}, {"weight": 1}),
    "both": ({"loss": False, "weight": 0}, {}),
}


@pytest.mark.parametrize(("first", "second"), FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("names", [("role", "content", "messages"), ("from", "value", "conversations")])
def test_loss_flags_are_read(tmp_path, first, second, names):
    role, content, turns = names
    row = openai(
        ("system", "令", {"loss": False}), ("user", "一", {"weight": 0}), ("assistant", "二", first),
        ("user", "三", {}), ("assistant", "四", second),
    )  # fmt: skip
    renamed = {"role": role, "content": content}
    row = {turns: [{renamed.get(key, key): value for key, value in turn.items()} for turn in row["messages"]]}
    (read,) = read_conversations(write(tmp_path / "a.jsonl", row))
    assert read.messages == (
        system("令"), user("一"), Message("assistant", "二", loss=False), user("三"), assistant("四"),
    )  # fmt: skip
    assert Message("assistant", "二", loss=False) != assistant("二")


BAD_FLAGS = {
    "string": ({"loss": "false"}, "loss or weight is unusable: found ['false', True], expected true, false, 1 or 0"),
    "share": ({"weight": 0.5}, "loss or weight is unusable: found [True, 0.5]"),
    "two": ({"weight": 2}, "loss or weight is unusable: found [True, 2]"),
    "list": ({"weight": [1]}, "loss or weight is unusable"),
}


@pytest.mark.parametrize(("flags", "told"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_unusable_loss_flags_are_bad_rows_with_their_line(tmp_path, flags, told):
    good = openai(("user", "一", {}), ("assistant", "二", {}))
    bad = openai(("user", "一", {}), ("assistant", "二", flags), ("user", "三", {}), ("assistant", "四", {}))
    path = write(tmp_path / "a.jsonl", good, bad, good)
    with pytest.raises(BadRow) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:2: ") and told in str(caught.value)
    summary = ReadSummary()
    assert len(read_conversations(path, on_bad_row="skip", summary=summary)) == 2
    assert [(row.line, told in row.reason) for row in summary.skipped] == [(2, True)]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (openai(("user", "一", {}), ("assistant", "二", {"loss": False})), "nothing carries loss"),
        (
            openai(("user", "一", {}), ("assistant", "二", {"weight": 0}), ("user", "三", {}),
                   ("assistant", "四", {"loss": False})),
            "nothing carries loss",
        ),
    ],
)  # fmt: skip
def test_a_row_without_loss_is_a_bad_row(tmp_path, row, told):
    with pytest.raises(BadRow, match=f"a.jsonl:1: {told}"):
        read_conversations(write(tmp_path / "a.jsonl", row))
