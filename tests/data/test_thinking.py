"""Thinking models: rendered text and ids against transformers, masks by hand, over empty, kept and dropped thoughts."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from pedgpt.data import (
    Conversation,
    Message,
    PreferencePair,
    ReadSummary,
    chat_format,
    encode_conversation,
    encode_conversations,
    encode_pairs,
    encode_prompt,
    load_tokenizer,
    read_conversations,
    read_preferences,
)
from pedgpt.data.examples import lessons
from pedgpt.evaluation import responses

IGNORED = -100
TURNS = (  # of Qwen3's kind: reasoning stands in the answers after the last question
    "{%- set asked = namespace(at=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set asked.at = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > asked.at %}"
    "{{- '<think>\\n' + m.reasoning_content | default('') | trim('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
)
SWITCHED = (
    TURNS + "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
ALWAYS = TURNS + "{{- '<think>\\n' }}{%- endif %}"
DROPPING = (  # of DeepSeek-R1's kind: no answer keeps its reasoning, and the prompt opens it
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' %}"
    "{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)
TEMPLATES = {"switched": SWITCHED, "always": ALWAYS, "dropping": DROPPING, "none": ""}
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """By template: a function that gives our format with `enable_thinking`, and transformers' tokenizer."""
    backend = tokenizers.Tokenizer.from_file(str(folders["qwen"] / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    backend.add_special_tokens(["<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    found = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        names = {"eos_token": "<|im_end|>"}
        if name == "dropping":
            names = {"eos_token": "<｜end▁of▁sentence｜>", "bos_token": "<｜begin▁of▁sentence｜>"}
        backend.save(str(folder / "tokenizer.json"))
        config = names | ({"chat_template": template} if template else {})
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        peer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=template or None, **names
        )
        found[name] = (lambda thinking=None, at=folder: chat_format(load_tokenizer(at), "auto", thinking), peer)
    return found


def talk(*turns, system=""):
    """(question, reasoning, answer) of each turn."""
    head = [Message("system", system)] if system else []
    return head + [m for q, r, a in turns for m in (Message("user", q), Message("assistant", a, reasoning=r))]


def raw(messages):
    return [
        {"role": m.role, "content": m.content} | ({"reasoning_content": m.reasoning} if m.reasoning else {})
        for m in messages
    ]


def learnt(chat, peer, example):
    """The stretches that carry loss, as text with special tokens."""
    found, run = [], []
    for label in [*example.labels, IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            found.append(peer.decode(run))
            run = []
    return found


TALK = [("问一", "想\n一想", "答一"), ("问二", "", "答二"), ("问三", "再想", "答三\n")]


@pytest.mark.parametrize("name", ["switched", "always"])
@pytest.mark.parametrize("thinking", [None, True])
def test_ids_and_masks_follow_the_templates_own_split(name, thinking, made):
    make, peer = made[name]
    chat, switch = make(thinking), {} if thinking is None else {"enable_thinking": thinking}
    begun = "<think>\n" if name == "always" else ""  # stands in the prompt
    taught = [
        ["<think>\n想\n一想\n</think>\n\n答一<|im_end|>"],
        ["答二<|im_end|>", "<think>\n再想\n</think>\n\n答三\n<|im_end|>"],  # the first answer was learnt already
    ]
    for system in ("", "规"):
        whole = Conversation(tuple(talk(*TALK, system=system)), "f:1")
        parts = lessons(whole, chat)
        assert [len(part.messages) - bool(system) for part in parts] == [2, 6]
        for part, expected in zip(parts, taught, strict=True):
            example = encode_conversation(part.messages, chat)
            ids = peer.apply_chat_template(raw(part.messages), return_dict=True, **switch)["input_ids"]
            assert example.tokens == ids[:-1]
            assert learnt(chat, peer, example) == [*expected[:-1], expected[-1].removeprefix(begun)]
            prompt = peer.apply_chat_template(
                raw(part.messages[:-1]), add_generation_prompt=True, return_dict=True, **switch
            )["input_ids"]
            assert encode_prompt(part.messages[:-1], chat) == prompt == ids[: len(prompt)]
    silent = encode_conversation(talk(("问", "", "答")), chat)  # an empty thought is learnt, so that it is written
    assert learnt(chat, peer, silent) == [(EMPTY + "答<|im_end|>").removeprefix(begun)]


def test_answer_goes_on_where_the_prompt_opened_the_reasoning(made):
    make, peer = made["dropping"]
    chat, end = make(), "<｜end▁of▁sentence｜>"
    for reasoning, wrote in (("再想", "再想\n</think>\n\n答三" + end), ("", "\n</think>\n\n答三" + end)):
        messages = talk(*TALK[:2], ("问三", reasoning, "答三"), system="规")
        prompt = peer.apply_chat_template(raw(messages[:-1]), add_generation_prompt=True, tokenize=False)
        assert prompt.endswith("答二" + end + "<｜User｜>问三<｜Assistant｜><think>\n") and "想" not in prompt
        example = encode_conversation(messages, chat)
        assert peer.decode([*example.tokens, example.labels[-1]]) == prompt + wrote
        assert learnt(chat, peer, example) == ["答二" + end, wrote]
        ids = encode_prompt(messages[:-1], chat)
        assert peer.decode(ids) == prompt and example.tokens[: len(ids)] == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_thinking_answers_have_no_reasoning(name, made):
    make, peer = made[name]
    chat = make(False)
    assert (
        not chat.thinks and not chat.opens_thought and lessons(Conversation(tuple(talk(*TALK)), "f:1"), chat)[1:] == []
    )
    example, prompt = encode_conversation(talk(*TALK), chat), encode_prompt(talk(*TALK)[:-1], chat)
    end = peer.eos_token
    assert learnt(chat, peer, example) == ["答一" + end, "答二" + end, "答三\n" + end]
    assert example.tokens[: len(prompt)] == prompt
    assert peer.decode(prompt).endswith("assistant\n" if name == "none" else EMPTY)  # the block is given, not learnt
    if name == "switched":
        bare = [{"role": m.role, "content": m.content} for m in talk(*TALK)]
        ids = peer.apply_chat_template(bare, return_dict=True, enable_thinking=False)["input_ids"]
        assert example.tokens == ids[:-1]


def test_built_in_format_writes_reasoning_before_the_last_answer_only(made):
    make, peer = made["none"]
    example = encode_conversation(talk(*TALK[:1], *TALK[2:]), make())
    assert learnt(make(), peer, example) == ["<think>\n再想\n</think>\n\n答三\n<|im_end|>"]
    assert "想\n一想" not in peer.decode(example.tokens)


def test_rows_with_thoughts_are_read_from_either_place_and_none_is_lost(made, tmp_path):
    rows = [
        {"question": "问", "answer": "<think>\n想\n</think>\n\n答"},
        {"question": "问", "answer": "想\n</think>\n\n答"},  # the prompt had opened it
        {"Question": "问", "Complex_CoT": "想", "Response": "答"},
        {"messages": raw(talk(("问", "想", "答")))},
        {"question": "问</think>", "answer": "答", "reasoning_content": None},
        {"question": "问", "answer": "<think>想</think>"},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    summary = ReadSummary()
    read = read_conversations(path, on_bad_row="skip", summary=summary)
    assert [(row.messages[1].reasoning, row.messages[1].content) for row in read] == [("想", "答")] * 4 + [("", "答")]
    assert read[4].messages[0].content == "问</think>"
    assert summary.skipped[0].line == 6 and "no answer after the reasoning" in summary.skipped[0].reason
    many = [Conversation(tuple(talk(*TALK)), "f:1"), read[0]]
    make, peer = made["switched"]
    examples = encode_conversations(many, make(), 99, "error", summary)
    said = "".join(text for example in examples for text in learnt(make(), peer, example))
    assert [said.count(text) for text in ("想\n一想", "再想", "答一", "答二", "答三")] == [1, 1, 1, 1, 1]


def test_pairs_learn_the_reasoning_of_both_answers(made, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rejected = [{"role": "assistant", "content": "坏", "reasoning_content": "乙"}]
    row = {"prompt": "问", "chosen": "<think>\n甲\n</think>\n\n好", "rejected": rejected}
    path.write_text(json.dumps(row), encoding="utf-8")
    (pair,) = read_preferences(path)
    assert isinstance(pair, PreferencePair)
    make, peer = made["switched"]
    (both,) = encode_pairs([pair], make(), 999, "error", ReadSummary())
    assert learnt(make(), peer, both.chosen) == ["<think>\n甲\n</think>\n\n好<|im_end|>"]
    assert learnt(make(), peer, both.rejected) == ["<think>\n乙\n</think>\n\n坏<|im_end|>"]


WRITTEN = {  # what a model wrote after the prompt: template, text, its answer
    "thought": ("switched", "<think>\n想</think>\n\n答 ", "答"),
    "thought that the prompt opened": ("dropping", "想\n</think>\n\n答", "答"),
    "no thought": ("switched", "答", "答"),
    "thought without an end": ("switched", "<think>\n想想想", ""),
    "opened thought without an end": ("always", "想想想", ""),
    "headings": ("none", "## Thinking\n\n想\n\n## Final Response\n\n答", "答"),
}


@pytest.mark.parametrize(("name", "text", "answer"), WRITTEN.values(), ids=WRITTEN)
def test_answers_are_read_without_their_reasoning(name, text, answer, made):
    message = made[name][0]().read_answer(text)
    assert message.content == answer and ("想" in message.reasoning) == ("想" in text)


def test_evaluation_scores_the_answer_and_leaves_room_for_the_reasoning(made, monkeypatch):
    chat = made["switched"][0]()
    written = "<think>\n" + "想" * 10 + "\n</think>\n\n孩子发烧多喝水"
    asked = []

    class Model:
        class config:  # noqa: N801
            max_position_embeddings = 120

    def generate(model, prompts, *, max_new_tokens, **_):
        asked.append((max_new_tokens, max(map(len, prompts))))
        return [chat.tokenizer.encode(written)[:max_new_tokens] for _ in prompts]

    monkeypatch.setattr(responses, "generate", generate)
    conversation = Conversation(tuple(talk(("问", "别的想法", "孩子发烧多喝水"))), "f:1")
    (item,) = responses.questions_of([conversation], 9)
    assert item.reference == "孩子发烧多喝水"
    size = len(chat.tokenizer.encode(item.reference))

    def answered(**room):
        return [said.content for batch in responses.answer(Model, chat, [item], **room) for said in batch.values()]

    assert answered(max_new_tokens=size, max_thinking_tokens=1000) == [item.reference]
    assert asked[-1][0] == 120 - asked[-1][1]  # no further than the model's window
    assert answered(max_new_tokens=3, max_thinking_tokens=70) == [
        chat.tokenizer.decode(chat.tokenizer.encode(item.reference)[:3])
    ]
    assert asked[-1][0] == 73
    with pytest.warns(UserWarning, match="1 of 1 answers are empty: their reasoning did not end; raise max_thinking"):
        assert answered(max_new_tokens=5) == [""]
    chat = made["switched"][0](False)
    written = item.reference
    assert answered(max_new_tokens=size, max_thinking_tokens=1000) == [item.reference] and asked[-1][0] == size
