"""Promises of the readers; every expectation is written by hand, none is computed by the code under test."""

import json
import warnings
from pathlib import Path

import pytest

from pedgpt.data.readers import (
    BadRow,
    detect_kind,
    read_conversations,
    read_documents,
    read_preferences,
    read_triples,
)
from pedgpt.data.records import Conversation, Document, Message, PreferencePair, ReadSummary, Triple

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


def test_a_triple_tsv_needs_no_header_and_reads_a_later_header_as_data(tmp_path):
    path = tmp_path / "graph.tsv"
    path.write_text("感冒\t症状\t发热\nhead\trelation\ttail\n", encoding="utf-8")
    assert read_triples(path) == [
        Triple("感冒", "症状", "发热", f"{path}:1"),
        Triple("head", "relation", "tail", f"{path}:2"),
    ]


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
    with pytest.raises(ValueError, match=r"a\.csv:1.*回复"):
        read_conversations(path, columns={"question": "问题", "answer": "回复"})
    with pytest.raises(ValueError, match="reply"):
        read_conversations(path, columns={"reply": "回答"})


def test_a_repeated_csv_column_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer,answer\n问,答,答二\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv:1.*answer twice"):
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


QA = {"question": "问", "answer": "答"}
PAIR = {"prompt": "问", "chosen": "好", "rejected": "坏"}


def turns(*roles):
    return {"messages": [{"role": role, "content": "言"} for role in roles]}


BAD_ROWS = {
    "invalid_json": ("conversations", '{"question": "问"', ["invalid JSON"]),
    "deep_json": ("conversations", "[" * 100_000, ["invalid JSON"]),
    "a_list": ("conversations", "[1]", ["the row", "list", "dict"]),
    "null": ("conversations", "null", ["the row", "null", "dict"]),
    "answer_of_wrong_type": ("conversations", QA | {"answer": 5}, ["answer has the wrong type", "int", "str"]),
    "answer_null": ("conversations", QA | {"answer": None}, ["missing field", "question", "answer"]),
    "system_of_wrong_type": ("conversations", QA | {"system": ["x"]}, ["system", "wrong type", "list"]),
    "missing_answer": ("conversations", {"question": "问", "id": "7"}, ["missing field", "question, id", "answer"]),
    "another_kind": ("conversations", {"text": "文"}, ["missing field", "text"]),
    "no_fields": ("conversations", {}, ["missing field"]),
    "empty_answer": ("conversations", QA | {"answer": ""}, ["answer is empty"]),
    "white_answer": ("conversations", QA | {"answer": " \n\u3000"}, ["answer is empty"]),
    "white_question": ("conversations", QA | {"question": "\t"}, ["question is empty"]),
    "half_a_pair": ("conversations", '{"question": "\\ud83d", "answer": "答"}', ["invalid UTF-8", "ud83d"]),
    "history_of_one": ("conversations", QA | {"history": [["一"]]}, ["history", "1 items"]),
    "history_of_strings": ("conversations", QA | {"history": ["一"]}, ["history", "str"]),
    "history_empty_answer": ("conversations", QA | {"history": [["一", ""]]}, ["history is empty"]),
    "messages_a_string": ("conversations", {"messages": "问"}, ["messages has the wrong type", "str"]),
    "message_a_string": ("conversations", {"messages": ["问"]}, ["message", "wrong type", "str"]),
    "message_without_role": ("conversations", {"messages": [{"content": "问"}]}, ["missing field", "content", "role"]),
    "message_without_text": ("conversations", {"messages": [{"role": "user"}]}, ["missing field", "role"]),
    "content_empty": ("conversations", {"messages": [{"role": "user", "content": " "}]}, ["content is empty"]),
    "unknown_role": ("conversations", turns("user", "tool"), ["unknown role", "tool"]),
    "no_messages": ("conversations", {"messages": []}, ["no assistant turn at the end", "no turn"]),
    "ends_with_user": ("conversations", turns("user", "assistant", "user"), ["no assistant turn at the end", "user"]),
    "two_users": ("conversations", turns("user", "user", "assistant"), ["roles do not alternate", "turn 2"]),
    "starts_with_assistant": ("conversations", turns("assistant"), ["roles do not alternate", "turn 1"]),
    "two_systems": ("conversations", turns("system", "system", "user", "assistant"), ["roles do not alternate"]),
    "late_system": ("conversations", turns("user", "system", "assistant"), ["roles do not alternate"]),
    "equal_replies": ("preferences", PAIR | {"rejected": "好"}, ["chosen equals rejected"]),
    "replies_equal_but_for_space": ("preferences", PAIR | {"rejected": "好 \n"}, ["chosen equals rejected"]),
    "missing_rejected": (
        "preferences",
        {"prompt": "问", "chosen": "好"},
        ["missing field", "prompt, chosen", "rejected"],
    ),
    "missing_prompt": ("preferences", {"chosen": "好", "rejected": "坏"}, ["missing field", "prompt"]),
    "empty_chosen": ("preferences", PAIR | {"chosen": ""}, ["chosen is empty"]),
    "chosen_a_number": ("preferences", PAIR | {"chosen": 1}, ["chosen", "wrong type", "int"]),
    "chosen_no_messages": ("preferences", PAIR | {"chosen": []}, ["chosen does not end with a reply"]),
    "chosen_by_user": ("preferences", PAIR | {"chosen": PROMPT_LIST}, ["chosen does not end with a reply", "user"]),
    "chosen_of_another_prompt": (
        "preferences",
        PAIR | {"chosen": [{"role": "user", "content": "别的"}, {"role": "assistant", "content": "好"}]},
        ["chosen repeats another prompt"],
    ),
    "prompt_ends_with_assistant": (
        "preferences",
        PAIR | {"prompt": [*PROMPT_LIST, {"role": "assistant", "content": "答"}]},
        ["no user turn at the end"],
    ),
    "triple_without_tail": (
        "triples",
        {"head": "感冒", "relation": "症状"},
        ["missing field", "head, relation", "tail"],
    ),
    "triple_empty": ("triples", {"head": "感冒", "relation": " ", "tail": "热"}, ["relation is empty"]),
    "document_empty": ("documents", {"text": ""}, ["text is empty"]),
    "document_a_list": ("documents", {"text": ["文"]}, ["text has the wrong type", "list"]),
    "title_a_number": ("documents", {"text": "文", "title": 1}, ["title has the wrong type", "int"]),
}
GOOD = {
    "documents": {"text": "文"},
    "conversations": QA,
    "preferences": PAIR,
    "triples": {"head": "感冒", "relation": "症状", "tail": "发热"},
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_or_skipped_and_counted(tmp_path, fault):
    kind, bad, words = BAD_ROWS[fault]
    good = json.dumps(GOOD[kind], ensure_ascii=False)
    bad = bad if isinstance(bad, str) else json.dumps(bad, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{good}\n", encoding="utf-8")

    with pytest.raises(BadRow) as raised:
        READERS[kind](path)
    message = str(raised.value)
    assert message.startswith(f"{path}:3: ")
    assert all(word in message for word in [*words, "found ", "expected ", "; "])

    summary = ReadSummary()
    found = READERS[kind](path, on_bad_row="skip", summary=summary)
    assert [record.source for record in found] == [f"{path}:1", f"{path}:4"]
    assert summary.rows == {str(path): 2}
    assert [(row.file, row.line, f"{path}:3: {row.reason}") for row in summary.skipped] == [(str(path), 3, message)]


@pytest.mark.parametrize(
    ("kind", "row", "length"),
    [
        ("documents", {"text": "四个字呀", "title": "不算在内"}, 4),
        ("conversations", {"system": "一", "instruction": "二", "input": "三", "output": "四"}, 5),
        ("preferences", {"prompt": "问", "chosen": "好的", "rejected": "坏"}, 3),
        ("triples", {"head": "感冒", "relation": "症状", "tail": "发热"}, 6),
    ],
)
def test_a_row_may_be_as_long_as_max_characters_and_no_longer(tmp_path, kind, row, length):
    path = write(tmp_path / "rows.jsonl", row)
    assert len(READERS[kind](path, max_characters=length)) == 1
    with pytest.raises(
        BadRow, match=rf"rows\.jsonl:1: over-long: found {length} characters, expected at most {length - 1};"
    ):
        READERS[kind](path, max_characters=length - 1)


@pytest.mark.parametrize(("row", "count"), [("问", 1), ("问,答,多", 3), ("问,答,,", 4)])
def test_a_csv_row_with_another_number_of_columns_is_bad(tmp_path, row, count):
    path = tmp_path / "a.csv"
    path.write_text(f"question,answer\n{row}\n问,答\n", encoding="utf-8")
    with pytest.raises(BadRow, match=rf"a\.csv:2: wrong number of columns: found {count}, expected 2"):
        read_conversations(path)
    summary = ReadSummary()
    assert [each.source for each in read_conversations(path, on_bad_row="skip", summary=summary)] == [f"{path}:3"]
    assert len(summary.skipped) == 1


def test_a_triple_line_with_two_columns_is_bad(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("感冒\t症状\n", encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.tsv:1: wrong number of columns: found 2, expected 3"):
        read_triples(path)


def test_a_csv_quote_that_is_never_closed_does_not_become_an_answer(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n问,答\n问,"没有结束\n问,答\n', encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.csv:3: invalid CSV.*lines 3 to 4"):
        read_conversations(path)


def test_a_quoted_empty_cell_is_a_bad_row_and_not_a_blank_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n\n""\n文\n', encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.csv:3: text is empty"):
        read_documents(path)


ENCODED = {
    "a.jsonl": (read_conversations, ['{"question": "问", "answer": "答"}'] * 3, 2),
    "id.jsonl": (read_conversations, ['{"id": "问", "question": "q", "answer": "a"}'] * 3, 2),
    "a.json": (
        read_conversations,
        ['[{"question": "问", "answer": "答"}', ',{"question": "问", "answer": "答"}', "]"],
        2,
    ),
    "a.csv": (read_conversations, ["question,answer", '问,"答', '二"', "问,答"], 3),
    "a.tsv": (read_triples, ["感冒\t症状\t发热"] * 3, 2),
}


@pytest.mark.parametrize("name", ENCODED)
def test_gb18030_bytes_in_one_line_cost_that_row_alone(tmp_path, name):
    reader, lines, bad_line = ENCODED[name]
    path = tmp_path / name
    path.write_bytes(
        b"\n".join(line.encode("gb18030" if n == bad_line else "utf-8") for n, line in enumerate(lines, 1))
    )
    row_line = 2  # where the row begins that holds the bad line; in a.json, the element's number
    with pytest.raises(BadRow, match=rf"{name}:{row_line}: invalid UTF-8: .*iconv"):
        reader(path)
    summary = ReadSummary()
    good = reader(path, on_bad_row="skip", summary=summary)
    assert [row.line for row in summary.skipped] == [row_line]
    assert len(good) == {"a.json": 1, "a.csv": 1}.get(name, 2)


def test_a_csv_header_in_another_encoding_is_refused_under_either_policy(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("醫師,question,answer\n劉大夫,咳嗽發燒怎麼辦,請多喝開水\n".encode("big5"))
    for policy in ("error", "skip"):
        with pytest.raises(ValueError, match=rf"{path}: found neither .* iconv -f BIG5 -t UTF-8 {path} > .*a.utf8.csv"):
            read_conversations(path, on_bad_row=policy)


def test_a_report_can_be_written_as_utf8_whatever_the_row_holds(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"\\ud83d": 1}\n{"messages": [{"role": "\\ud83d", "content": "a"}]}\n')
    summary = ReadSummary()
    assert read_conversations(path, on_bad_row="skip", summary=summary) == []
    assert len(summary.skipped) == 2
    assert all(row.reason.encode() for row in summary.skipped)


def test_invalid_utf8_in_a_text_file_is_reported_at_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一\n二\n".encode() + "三\n".encode("gb18030"))
    with pytest.raises(BadRow, match=r"a\.txt:3: invalid UTF-8"):
        read_documents(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.md"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path, name, newline):
    contents = {
        "a.jsonl": ['{"question": "问", "answer": "答"}', ""],
        "a.json": ["[", '{"question": "问", "answer": "答"}', "]"],
        "a.csv": ["question,answer", "问,答", ""],
        "a.tsv": ["head\trelation\ttail", "感冒\t症状\t发热", ""],
        "a.md": ["# 题", "文"],
    }
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + newline.join(contents[name]).encode())
    if name == "a.md":
        assert read_documents(path) == [Document("# 题\n文", str(path), "题")]
    elif name == "a.tsv":
        assert read_triples(path) == [Triple("感冒", "症状", "发热", f"{path}:2")]
    else:
        line = 2 if name == "a.csv" else 1
        assert read_conversations(path) == [Conversation((user("问"), assistant("答")), f"{path}:{line}")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1e"])
def test_unicode_line_separators_inside_text_do_not_split_a_row(tmp_path, separator):
    text = f"前{separator}后"
    table = tmp_path / "a.csv"
    table.write_text(f"question,answer\n{text},答\n问,答\n", encoding="utf-8", newline="")
    assert [each.source for each in read_conversations(table)] == [f"{table}:2", f"{table}:3"]
    assert read_conversations(table)[0].messages[0] == user(text)
    graph = tmp_path / "a.tsv"
    graph.write_text(f"{text}\t症状\t发热\n", encoding="utf-8", newline="")
    assert read_triples(graph) == [Triple(text, "症状", "发热", f"{graph}:1")]
    if separator >= "\x80":  # JSON allows these bare; the control characters it does not
        rows = write(tmp_path / "a.jsonl", {"question": text, "answer": "答"}, QA)
        assert [each.source for each in read_conversations(rows)] == [f"{rows}:1", f"{rows}:2"]
        assert read_conversations(rows)[0].messages[0] == user(text)


def test_a_late_bad_row_has_its_exact_line_number(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "x\xe2\x80\xa8"}\n'
    path.write_bytes(good * 100_000 + b"\n" * 50_000 + b'{"text": 1}\n' + good)
    with pytest.raises(BadRow, match=r"a\.jsonl:150001: text has the wrong type"):
        read_documents(path)
    table = tmp_path / "a.csv"
    table.write_bytes(b"question,answer\n" + b'q,"a\nb"\n' * 50_000 + b"q\n")
    with pytest.raises(BadRow, match=r"a\.csv:100002: wrong number of columns"):
        read_conversations(table)


@pytest.mark.parametrize("content", ["{", '"text"', "3"])
def test_a_json_file_that_is_no_list_of_rows_is_reported(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadRow, match=r"a\.json:1: "):
        read_documents(path)


@pytest.mark.parametrize("kind", READERS)
def test_a_wrong_setting_is_refused_before_reading(tmp_path, kind):
    path = write(tmp_path / "a.jsonl", GOOD[kind])
    with pytest.raises(ValueError, match='on_bad_row is \'ignore\', expected "error" or "skip"'):
        READERS[kind](path, on_bad_row="ignore")
    with pytest.raises(ValueError, match="max_characters is 0"):
        READERS[kind](path, max_characters=0)


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_path_an_empty_folder_and_an_unknown_file_are_named(tmp_path, kind):
    good = write(tmp_path / "a.jsonl", GOOD[kind])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("nowhere.jsonl", "empty", "a.parquet"):
        with pytest.raises(ValueError, match=name):
            READERS[kind]([good, tmp_path / name])
    assert READERS[kind]([]) == []


def test_a_text_file_among_conversations_is_a_bad_row(tmp_path):
    write(tmp_path / "a.jsonl", QA)
    (tmp_path / "book.md").write_text("# 说明", encoding="utf-8")
    with pytest.raises(BadRow, match=r"book\.md:1: a text file"):
        read_conversations(tmp_path)
    summary = ReadSummary()
    assert len(read_conversations(tmp_path, on_bad_row="skip", summary=summary)) == 1
    assert summary.rows == {f"{tmp_path}/book.md": 0, f"{tmp_path}/a.jsonl": 1}


def test_rows_skipped_without_a_summary_are_told_in_a_warning(tmp_path):
    path = write(tmp_path / "a.jsonl", QA, {"question": "问"})
    with pytest.warns(UserWarning, match=r"1 skipped, missing field: .*a\.jsonl:2"):
        assert len(read_conversations(path, on_bad_row="skip")) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_conversations(path, on_bad_row="skip", summary=ReadSummary())


def test_the_summary_tells_rows_and_skips_by_file_and_by_reason():
    summary = ReadSummary(rows={"a.jsonl": 3, "b.jsonl": 0})
    for line in (2, 5, 7, 8):
        summary.skip(f"a.jsonl:{line}", f"over-long: found {line} characters, expected at most 1; split it")
    summary.skip("b.jsonl:1", "invalid JSON: found nothing, expected one object; mend it")
    summary.skip("c.txt", "a text file: found .txt, expected rows; name the files")
    assert [(row.file, row.line) for row in summary.skipped][-2:] == [("b.jsonl", 1), ("c.txt", 0)]
    assert [line.split() for line in summary.describe().splitlines()[:3]] == [
        ["file", "rows", "skipped"],
        ["a.jsonl", "3", "4"],
        ["b.jsonl", "0", "1"],
    ]
    assert summary.describe().splitlines()[3:] == [
        "4 skipped, over-long: a.jsonl:2, a.jsonl:5, a.jsonl:7, ...",
        "1 skipped, invalid JSON: b.jsonl:1",
        "1 skipped, a text file: c.txt",
    ]


@pytest.mark.parametrize("kind", READERS)
def test_the_kind_is_found_by_content_after_bad_rows(tmp_path, kind):
    path = tmp_path / "misleading_name.jsonl"
    path.write_text("not JSON\n{}\n" + json.dumps(GOOD[kind], ensure_ascii=False), encoding="utf-8")
    assert detect_kind(path) == kind


def test_the_kind_of_text_and_tables_is_found(tmp_path):
    contents = {
        "a.txt": ("文", "documents"),
        "a.md": ("# 题", "documents"),
        "a.csv": ("title,ask,answer\n题,问,答", "conversations"),
        "a.tsv": ("感冒\t症状\t发热", "triples"),
        "b.tsv": ("text\ttitle\tpage\n文\t题\t1", "documents"),
        "a.json": ('[{"head": "感冒", "relation": "症状", "tail": "发热"}]', "triples"),
    }
    for name, (content, kind) in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert detect_kind(tmp_path / name) == kind


def test_a_file_of_no_kind_is_named(tmp_path):
    path = write(tmp_path / "odd.jsonl", {"a": 1})
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for wrong in (path, tmp_path / "empty.jsonl", tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(ValueError, match=wrong.name):
            detect_kind(wrong)


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
    "number for loss": ({"loss": 0}, "loss of a message is unusable: found 0, expected true or false"),
    "string for loss": ({"loss": "false"}, 'loss of a message is unusable: found "false"'),
    "bool for weight": ({"weight": True}, "weight of a message is unusable: found true, expected 0 or 1"),
    "float for weight": ({"weight": 1.0}, "weight of a message is unusable: found 1.0"),
    "share for weight": ({"weight": 0.5}, "weight of a message is unusable: found 0.5"),
    "two for weight": ({"weight": 2}, "weight of a message is unusable: found 2"),
    "list for weight": ({"weight": [1]}, "weight of a message is unusable"),
    "disagreement": ({"loss": True, "weight": 0}, "loss and weight disagree"),
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
        (openai(("user", "一", {"loss": True}), ("assistant", "二", {})), "loss asks for loss on another's words"),
        (openai(("user", "一", {"weight": 1}), ("assistant", "二", {})), "weight asks for loss on another's words"),
        (openai(("user", "一", {}), ("assistant", "二", {"loss": False})), "nothing carries loss"),
        (
            openai(("user", "一", {}), ("assistant", "二", {"weight": 0}), ("user", "三", {}),
                   ("assistant", "四", {"loss": False})),
            "nothing carries loss",
        ),
        ({"prompt": "一", "chosen": {"role": "assistant", "content": "二", "loss": False}, "rejected": "三"}, "chosen"),
    ],
)  # fmt: skip
def test_loss_where_it_cannot_be_is_a_bad_row(tmp_path, row, told):
    read = read_preferences if "chosen" in row else read_conversations
    with pytest.raises(BadRow, match=f"a.jsonl:1: {told}"):
        read(write(tmp_path / "a.jsonl", row))


def test_flags_in_a_pairs_prompt_change_nothing(tmp_path):
    turns = [("user", "一", {}), ("assistant", "二", {"loss": False}), ("user", "三", {"weight": 0})]
    prompt = openai(*turns)["messages"]
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    row = {"prompt": prompt, "chosen": [*plain, {"role": "assistant", "content": "好"}], "rejected": "坏"}
    path = write(tmp_path / "a.jsonl", row)
    assert read_preferences(path) == [
        PreferencePair((user("一"), assistant("二"), user("三")), "好", "坏", f"{path}:1")
    ]
