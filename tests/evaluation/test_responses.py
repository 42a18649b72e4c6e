"""Held-out turns and the answers to them, against a plain greedy loop without cache or batch."""

import json

import pytest
import torch

from pedgpt.data import Conversation, Message, chat_format, encode_prompt, train_tokenizer
from pedgpt.evaluation.responses import (
    Answers,
    Question,
    answer,
    check_output,
    questions_of,
    read_answers,
    read_part,
    read_systems,
    set_hash,
    write_answers,
)
from pedgpt.models import ModelConfig, Transformer

SPECIAL = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


def talk(*texts, system=None):
    head = (Message("system", system),) if system else ()
    return Conversation(
        head + tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)), "f:1"
    )


def answers(model, chat, questions, **settings):
    found = {}
    for batch in answer(model, chat, questions, **settings):
        assert not batch.keys() & found.keys()
        found |= batch
    return [found[i].content for i in range(len(questions))]


def test_every_assistant_turn_is_a_question_with_the_true_history():
    first, second = talk("问1", "答1", "问2", "答2", system="规"), talk("问3", "答3")
    assert questions_of([first, second], 10) == [
        Question(first.messages[:2], "答1"),
        Question(first.messages[:4], "答2"),
        Question(second.messages[:1], "答3"),
    ]
    assert questions_of([first, second]) == questions_of([first, second], 3)
    assert questions_of([], 10) == []


@pytest.mark.parametrize(
    ("limit", "kept"), [(10, range(10)), (99, range(10)), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0]), (0, [])]
)
def test_questions_are_thinned_evenly(limit, kept):
    found = questions_of([talk(f"问{i}", f"答{i}") for i in range(10)], limit)
    assert [one.reference for one in found] == [f"答{i}" for i in kept]


@pytest.fixture(scope="module")
def chat():
    return chat_format(train_tokenizer(["孩子发烧咳嗽怎么办多喝水"] * 3, vocab_size=290, special_tokens=SPECIAL))


@pytest.fixture(scope="module")
def model(chat):
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="baichuan", vocab_size=chat.tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8, max_position_embeddings=128,
        initializer_range=0.4, fused_qkv=True,
    )  # fmt: skip
    return Transformer(config).eval()


@torch.no_grad()
def greedy(model, chat, history, max_new_tokens):
    tokens = encode_prompt(history, chat)
    written = []
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([tokens + written]))[0, -1].argmax())
        if token in chat.stop_tokens:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answers_match_a_plain_greedy_loop_in_order(model, chat, batch_size):
    questions = ["咳嗽怎么办多喝水" * 3, "孩", "发烧", "多喝水" * 5, "孩子发烧怎么办", "abc", "1234567", "办", "咳"]
    asked = [Question((Message("user", question),)) for question in questions]
    turns = (Message("system", "规"), Message("user", "孩"), Message("assistant", "水"), Message("user", "孩"))
    asked.append(Question(turns))
    expected = [greedy(model, chat, one.history, 6) for one in asked]
    assert len({tuple(ids) for ids in expected}) >= 8  # so that a wrong order is seen
    assert answers(model, chat, asked, max_new_tokens=6, batch_size=batch_size) == [
        chat.tokenizer.decode(ids).strip() for ids in expected
    ]


def test_answers_end_at_stop_tokens(model, chat):
    asked = Question((Message("user", "孩子发烧怎么办"),))
    ids = greedy(model, chat, asked.history, 6)
    assert len(ids) == 6
    stopping = chat_format(chat.tokenizer)
    cut = next(i for i in range(1, 6) if ids[i] not in ids[:i])
    stopping.stop_tokens = (ids[cut],)
    (text,) = answers(model, stopping, [asked], max_new_tokens=6)
    assert text == chat.tokenizer.decode(ids[:cut]).strip()
    assert answers(model, chat, [asked], max_new_tokens=0) == [""]
    assert answers(model, chat, [], max_new_tokens=6) == []


def test_batches_that_are_done_are_not_answered_again(model, chat):
    asked = [Question((Message("user", "孩子发烧" * n),)) for n in (3, 1, 2, 5, 4)]
    whole = list(answer(model, chat, asked, max_new_tokens=4, batch_size=2))
    rest = list(answer(model, chat, asked, max_new_tokens=4, batch_size=2, done=whole[0]))
    assert rest == whole[1:] and [sorted(batch) for batch in whole] == [[1, 2], [0, 4], [3]]
    hot = {"max_new_tokens": 8, "batch_size": 2, "temperature": 1.0, "seed": 5}
    whole = list(answer(model, chat, asked, **hot))
    assert list(answer(model, chat, asked, **hot, done=whole[0])) == whole[1:]  # random numbers do not depend on it
    assert list(answer(model, chat, asked, **{**hot, "seed": 6})) != whole


def some_answers(name="a", count=3, **about):
    turns = (Message("system", "规"), Message("user", "早"), Message("assistant", "好"), Message("user", "热？\n"))
    questions = [Question(turns, f"答{i}", "EviDiag") for i in range(count)]
    said = [Message("assistant", f"喝水{i}", reasoning="想") for i in range(count)]
    about = {"model": "m", "adapter": None, "weights": None, "seed": 0, "decoding": {"temperature": 0}, **about}
    return Answers(name, questions, said, {"question_set": set_hash(questions), **about})


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write_answers(path, some_answers())
    assert read_answers(path) == some_answers()
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert row["history"] == [
        {"role": "system", "content": "规"}, {"role": "user", "content": "早"}, {"role": "assistant", "content": "好"}
    ]  # fmt: skip
    assert (row["question"], row["answer"], row["reasoning"]) == ("热？\n", "喝水1", "想")
    assert (row["number"], row["of"]) == (2, 3)


def test_lines_in_any_order_are_the_same_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    write_answers(path, some_answers())
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[::-1]), encoding="utf-8")
    assert read_answers(path) == some_answers()


def test_a_file_of_another_program_needs_only_the_texts(tmp_path):
    row = {"history": [], "question": "问", "task": "", "reference": "", "answer": "答", "reasoning": ""}
    (tmp_path / "x.jsonl").write_text(json.dumps({**row, "question_set": "1"}) + "\n", encoding="utf-8")
    found = read_answers(tmp_path / "x.jsonl")
    assert found.questions == [Question((Message("user", "问"),))] and found.answers[0].content == "答"


def test_an_editors_byte_order_mark_and_line_ends_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    write_answers(path, some_answers())
    whole = read_answers(path)
    path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_answers(path) == whole


def changed(line, **values):
    return json.dumps({**json.loads(line), **values}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: lines[:2], "holds 2 of 3 answers"),
        (lambda lines: [], "holds no answers"),
        (lambda lines: [lines[0], lines[0], lines[1]], "holds 2 of 3 answers"),
        (lambda lines: [*lines[:2], changed(lines[2], question_set="?")], ":3: is of another question_set"),
        (lambda lines: [*lines[:2], changed(lines[2], seed=7)], ":3: is of another seed"),
        (lambda lines: [lines[0], "{", lines[2]], ":2: not an answer"),
        (lambda lines: [lines[0], "[]", lines[2]], ":2: not an answer"),
        (lambda lines: [lines[0], changed(lines[1], answer=3), lines[2]], ":2: not an answer .a text is no string"),
        (lambda lines: [lines[0].replace('"user"', '"tool"'), *lines[1:]], ":1: not an answer .role 'tool', expected"),
        (lambda lines: [lines[0].replace('"answer": "', '"answer": "\\ud83d'), *lines[1:]], ":1: .*surrogates not"),
        (lambda lines: [lines[0], lines[1].replace('"reference"', '"ref"'), lines[2]], ":2: .*lacks 'reference'"),
    ],
)
def test_a_file_that_is_not_one_systems_answers_is_refused(tmp_path, change, told):
    path = tmp_path / "a.jsonl"
    write_answers(path, some_answers())
    path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        read_answers(path)


def test_systems_answer_the_same_questions_under_different_names(tmp_path):
    for folder, name, count in (("x", "a", 3), ("x", "b", 3), ("x", "c", 2), ("y", "a", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_answers(tmp_path / folder / f"{name}.jsonl", some_answers(name, count))
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("x/a", "x/b", "x/c", "y/a")}
    assert [system.name for system in read_systems([paths["x/a"], paths["x/b"]])] == ["a", "b"]
    with pytest.raises(ValueError, match="answers other questions"):
        read_systems([paths["x/a"], paths["x/c"]])
    with pytest.raises(ValueError, match="two files are named a"):
        read_systems([paths["x/a"], paths["y/a"]])


def test_an_output_that_is_an_input_is_refused(tmp_path):
    check_output(tmp_path / "new.json", tmp_path / "a.jsonl", "", tmp_path / "x")
    check_output("", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="is among the files to be read"):
        check_output(tmp_path / "exam/results.json", tmp_path / "exam")
    with pytest.raises(ValueError, match="is among the files to be read"):
        check_output(tmp_path / "x" / ".." / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "a.jsonl")


def test_a_stopped_run_keeps_its_whole_lines(tmp_path):
    whole, path = some_answers(), tmp_path / "a.jsonl"
    write_answers(path, whole)
    path.write_bytes(path.read_bytes()[:-20])  # in the middle of the third line
    assert read_part(path, whole.about) == dict(enumerate(whole.answers[:2]))
    assert path.read_bytes().endswith(b"}\n") and len(path.read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(ValueError, match="another seed"):
        read_part(path, {**whole.about, "seed": 3})
