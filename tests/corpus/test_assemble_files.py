"""What an Assembly reads and writes: cleaned rows, all of their fields, shards, checksums and statistics."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pedgpt.corpus.assemble import Assembly, Limits
from pedgpt.corpus.build import Step
from pedgpt.corpus.quality import fault
from pedgpt.corpus.rows import Built
from pedgpt.corpus.sources import Source
from pedgpt.corpus.split import Split
from pedgpt.data import Conversation, Document, Message, PreferencePair, ReadSummary, iter_records

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]
SOURCE, TEXTS = Source("instructions", "talk", domain="pediatric"), Source("encyclopedia", "book")


def limits(**changed):
    values = {"min_characters": 1, "max_characters": 5000, "min_chinese": 0.0, "near_duplicate": 0.8,
              "shard_rows": 1000, "keep_personal_data": False, "seed": 0}  # fmt: skip
    return Limits(**(values | changed))


def talk(*turns, source="f:1", **fields):
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    return Conversation(messages, source, **{"task": "MedKQ&A"} | fields)


def pair(asked, chosen, rejected, source="f:1", **fields):
    return PreferencePair((Message("user", asked),), chosen, rejected, source, **fields)


def words(seed, n=40):
    return "".join(random.Random(seed).sample(HAN, n))


def jsonl(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def listed(folder):
    return jsonl(folder / "reports" / "dropped.jsonl")


def said_of(record):
    if isinstance(record, Document):
        return [record.text]
    turns = record.prompt if isinstance(record, PreferencePair) else record.messages
    texts = [message.content for message in turns]
    return [*texts, record.chosen, record.rejected] if isinstance(record, PreferencePair) else texts


ODD = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\x1e\r\n\t\x00\ufeff\ufffe\u0301\U000e0041\U0010ffff𠮷😀\"\\|'"),
    ),
    max_size=30,
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_records_come_back_as_they_were_with_all_fields(assembled, data):
    number = iter(range(100))

    def text():
        return f"第{next(number)}段" + words(next(number), 20) + data.draw(ODD)

    def flag(role):
        return data.draw(st.booleans()) if role == "assistant" else True

    disease, department, title = (data.draw(st.one_of(st.just(""), ODD)) for _ in range(3))
    title = title if title.strip() else ""
    topic = {"disease": disease, "department": department}
    system = (Message("system", text()),) if data.draw(st.booleans()) else ()
    turns = [Message(role, text(), flag(role)) for role in ("user", "assistant") * data.draw(st.integers(1, 3))]
    turns[-1] = replace(turns[-1], loss=True)
    task = data.draw(st.sampled_from(["MedKQ&A", "safety", "儿科问答"]))
    records = [
        Document(text(), "某书.md:1 › 肺炎", title, **topic),
        Conversation((*system, *turns), "f:2", task, **topic),
        PreferencePair((*system, Message("user", text())), text(), text(), "f:3", **topic),
    ]
    assume(all(fault(r, min_characters=1, max_characters=5000, min_chinese=0) is None for r in records))
    details = {"versions": [{"answer": text()}], "support": 0.5, "none": None}
    steps = [[Step("", Built(record, details)) for record in records]]
    assembly, rows, left = assembled(steps, near_duplicate=1.0)
    assert not left
    back = {}
    for file in assembly.files:
        path = assembly.folder / file["path"]
        (back[file["kind"]],) = iter_records(path, file["kind"])
        (row,) = jsonl(path)
        assert row["origin"] == {"place": row["origin"]["place"], **details}
    for record, kind in zip(records, ("documents", "conversations", "preferences"), strict=True):
        assert back[kind] == replace(record, source=back[kind].source)
    assert {row["origin"]["place"] for found in rows.values() for row in found} == {r.source for r in records}


def test_very_long_text_is_written_whole(assembled):
    text = "".join(random.Random(0).choices(HAN + list("，。\n\u2028"), k=400_000))
    _, rows, left = assembled([[Step("", Built(Document(text, "b")))]], source=TEXTS)
    assert not left  # running text may be of any length
    assert rows["train", "text/pediatric", "book"][0]["text"] == text


def test_book_longer_than_a_conversation_may_be_is_not_left_out(tmp_path):
    assembly = Assembly(tmp_path / "corpus", limits(max_characters=100), Split([], heldout_share=0.0, seed=0))
    book = Document("。".join(words(i) for i in range(50)), "book.md")
    assert [record.source for record in assembly.clean([book], TEXTS)] == ["book.md"]
    assert not assembly.dropped
    assembly.close()


def clean(tmp_path, *records, **changed):
    assembly = Assembly(tmp_path / "corpus", limits(**changed), Split([], heldout_share=0.0, seed=0))
    cleaned = list(assembly.clean(records, replace(SOURCE, files=(tmp_path / "talk.jsonl",))))
    assembly.close()
    return assembly, cleaned, listed(assembly.folder)


def test_clean_normalises_scrubs_and_names_files_without_their_folder(tmp_path):
    asked = "我叫王小明，\u200b电话１３８12345678，孩子&nbsp;发烧？？？"
    row = talk(asked, "多喝水。\u3000", source=f"{tmp_path}/talk.jsonl:3")
    assembly, (cleaned,), left = clean(tmp_path, row)
    assert cleaned.source == "talk.jsonl:3" and not left
    asked, answered = (message.content for message in cleaned.messages)
    assert asked.startswith("我叫【姓名】，电话【电话】，孩子") and answered == "多喝水。"
    assert assembly.replaced == {"姓名": 1, "电话": 1}
    other = tmp_path / "kept"
    other.mkdir()
    _, (kept,), _ = clean(other, row, keep_personal_data=True)
    assert "王小明" in kept.messages[0].content and "13812345678" in kept.messages[0].content


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(pair("孩子发烧怎么办？", "多喝水\u200b。", "多喝水。"), id="equal when normalised"),
        pytest.param(pair("打给谁？", "请拨打13812345678。", "请拨打13912345678。"), id="equal when scrubbed"),
        pytest.param(talk("孩子发烧怎么办？", "多喝水，多休息。", "\u200b", "去医院检查。"), id="empty question"),
        pytest.param(talk("孩子发烧怎么办？", "\u200b", "还在咳嗽", "去医院检查。"), id="empty answer"),
        pytest.param(
            PreferencePair((Message("user", "\ue000"), Message("assistant", "您好。"), Message("user", "发烧怎么办？")),
                           "多喝水。", "喝水。", "f:1"), id="empty turn of a prompt"),
        pytest.param(talk("\u200b", "多喝水，多休息。"), id="no question"),
        pytest.param(talk("孩子发烧怎么办？", "\u3000\u200b"), id="no answer"),
        pytest.param(Document("\u200b\ue000", "f:1"), id="no text"),
    ],
)  # fmt: skip
def test_row_that_cleaning_leaves_unusable_is_listed_and_never_written(tmp_path, row):
    """Readers refuse empty messages and pairs of equal replies: a corpus that held one would not train."""
    _, cleaned, left = clean(tmp_path, row)
    assert not cleaned and len(left) == 1 and left[0]["place"] == "f:1"


@pytest.mark.parametrize("field", ["disease", "department", "task"])
def test_half_a_surrogate_pair_outside_of_the_texts_does_not_end_the_build(tmp_path, field):
    row = talk("孩子发烧怎么办？", "多喝水，多休息。", **{field: "儿\ud800"})
    assembly = Assembly(tmp_path / "corpus", limits(), Split(["肺炎"], heldout_share=0.1, seed=0))
    for cleaned in assembly.clean([row], SOURCE):
        assembly.take([Step("", Built(replace(cleaned, task="MedKQ&A")))], SOURCE)
    assembly.finish(0.0)
    assert assembly.built["talk"] == 1


def test_one_disease_in_two_spellings_is_one_disease(tmp_path):
    rows = [talk(words(i), words(-i), disease=name) for i, name in
            enumerate(["1型糖尿病", "１型糖尿病", " 1型糖尿病", "1型糖尿病\u200b"], 1)]  # fmt: skip
    _, cleaned, _ = clean(tmp_path, *rows)
    assert {record.disease for record in cleaned} == {"1型糖尿病"}


def test_unreadable_rows_are_listed_with_their_fault(tmp_path):
    path = tmp_path / "talk.jsonl"
    rows = ['{"question": "咳嗽？", "answer": "喝水。"}', "[", '{"question": 3, "answer": "好"}', '{"question": "一"}']
    path.write_text("\n".join(rows), encoding="utf-8")
    summary, source = ReadSummary(), replace(SOURCE, files=(path,))
    assembly = Assembly(tmp_path / "corpus", limits(), Split([], heldout_share=0.0, seed=0))
    for record in assembly.clean(iter_records(path, "conversations", on_bad_row="skip", summary=summary), source):
        assembly.take([Step("", Built(record))], source)
    assembly.unreadable(summary, source)
    assembly.finish(0.0)
    left = listed(assembly.folder)
    assert [(row["place"], row["reason"]) for row in left] == [
        ("talk.jsonl:2", "unreadable: invalid JSON"), ("talk.jsonl:3", "unreadable: question has the wrong type"),
        ("talk.jsonl:4", "unreadable: missing field"),
    ]  # fmt: skip
    assert assembly.built == {"talk": 1}  # what cannot be read is not built


def test_shards_checksums_and_statistics_by_hand(assembled):
    split = Split(["肺炎", "水痘"], heldout_share=0.5, seed=0)
    held = next(name for name in ("肺炎", "水痘") if split.side(f"disease/{name}") == "heldout")
    other = ({"肺炎", "水痘"} - {held}).pop()
    system, long = (Message("system", "你是医生。"),), talk("甲", "乙", "丙丙", "丁丁丁", disease=other)
    rows = [
        talk("一二三", "一二三四五", disease=other),
        replace(long, messages=(*system, *long.messages)),
        talk("一二三四", "五", disease=held),
        talk(words(1, 10), words(2, 20), disease=other),
        PreferencePair((*system, Message("user", "天地")), "玄黄宇", "宙", "p:1", disease=other),
    ]
    assembly, _, left = assembled([[Step("", Built(row))] for row in rows], split=split, shard_rows=2)
    assert not left
    assert [(file["path"], file["rows"], file["side"], file["stages"], file["kind"]) for file in assembly.files] == [
        ("heldout/tasks/medkqa/talk-00000.jsonl", 1, "heldout", [1, 4], "conversations"),
        ("train/preferences/talk-00000.jsonl", 1, "train", [3], "preferences"),
        ("train/tasks/medkqa/talk-00000.jsonl", 2, "train", [1, 4], "conversations"),
        ("train/tasks/medkqa/talk-00001.jsonl", 1, "train", [1, 4], "conversations"),
    ]
    for file in assembly.files:
        data = (assembly.folder / file["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"] and data.count(b"\n") == file["rows"]
    (last,) = jsonl(assembly.folder / "train/tasks/medkqa/talk-00001.jsonl")
    assert [message["content"] for message in last["messages"]] == [words(1, 10), words(2, 20)]
    counted = ("rows", "heldout", "turns", "asked", "answered")
    found = {name: tuple(s[each] for each in counted) for name, s in assembly.statistics.items()}
    assert found == {
        ("tasks/medkqa", "talk"): (4, 1, 5, 3 + 3 + 4 + 10, 5 + 4 + 1 + 20),
        ("preferences", "talk"): (1, 0, 1, 2, 3),
    }


def test_nothing_but_the_corpus_stays_in_its_folder(assembled):
    assembly, *_ = assembled([[Step("", Built(talk(words(1), words(2))))]])
    assert sorted(path.name for path in assembly.folder.iterdir()) == ["reports", "train"]
    assert [path.name for path in (assembly.folder / "reports").iterdir()] == ["dropped.jsonl"]
