"""Held-out turns and the answers to them, against a plain greedy loop without cache or batch."""

import pytest
import torch

from pedgpt.data import Conversation, Message, chat_format, encode_prompt, train_tokenizer
from pedgpt.evaluation.responses import Item, answer, items
from pedgpt.models import ModelConfig, Transformer

SPECIAL = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]


def talk(*texts, system=None):
    head = (Message("system", system),) if system else ()
    return Conversation(
        head + tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)), "f:1"
    )


def test_every_assistant_turn_is_an_item_with_the_true_history():
    first, second = talk("问1", "答1", "问2", "答2", system="规"), talk("问3", "答3")
    assert items([first, second], 10) == [
        Item(first.messages[:2], "答1"),
        Item(first.messages[:4], "答2"),
        Item(second.messages[:1], "答3"),
    ]
    assert items([], 10) == []


@pytest.mark.parametrize(
    ("limit", "kept"), [(10, range(10)), (99, range(10)), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0]), (0, [])]
)
def test_items_are_thinned_evenly(limit, kept):
    found = items([talk(f"问{i}", f"答{i}") for i in range(10)], limit)
    assert [item.reference for item in found] == [f"答{i}" for i in kept]


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
    asked = [Item((Message("user", question),), "") for question in questions]
    turns = (Message("system", "规"), Message("user", "孩"), Message("assistant", "水"), Message("user", "孩"))
    asked.append(Item(turns, ""))
    expected = [greedy(model, chat, item.history, 6) for item in asked]
    assert len({tuple(ids) for ids in expected}) >= 8  # so that a wrong order is seen
    assert answer(model, chat, asked, max_new_tokens=6, batch_size=batch_size) == [
        chat.tokenizer.decode(ids).strip() for ids in expected
    ]


def test_answers_end_at_stop_tokens(model, chat):
    asked = Item((Message("user", "孩子发烧怎么办"),), "")
    ids = greedy(model, chat, asked.history, 6)
    assert len(ids) == 6
    stopping = chat_format(chat.tokenizer)
    cut = next(i for i in range(1, 6) if ids[i] not in ids[:i])
    stopping.stop_tokens = (ids[cut],)
    (text,) = answer(model, stopping, [asked], max_new_tokens=6)
    assert text == chat.tokenizer.decode(ids[:cut]).strip()
    assert answer(model, chat, [asked], max_new_tokens=0) == [""]
    assert answer(model, chat, [], max_new_tokens=6) == []
