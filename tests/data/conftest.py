"""Small tokenizers: ours, a Qwen-like one made with `tokenizers` alone, and the same with unmarked special tokens."""

import json

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from pedgpt.data import Message, load_tokenizer, train_tokenizer

TEXTS = [
    "医生您好，我家孩子发烧三天了，体温38.5度，还有点咳嗽，请问是怎么回事？",
    "请问孩子多大了？除了发烧和咳嗽，有没有皮疹？做过血常规检查吗？",
    "两岁半，没有皮疹，昨天晚上开始流鼻涕，精神还可以。",
    "考虑急性上呼吸道感染，建议多休息、多喝水，体温高时使用退热药，三天不退请及时就医。",
    "The child has had a fever for 3 days.\nGive water and rest.\n\nSee a doctor if it lasts.",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAICHUAN_TOKENS = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_qwen(folder, marked):
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in QWEN_TOKENS])
    backend.add_tokens([AddedToken("<tool_call>", special=False)])
    save(folder, backend, marked, {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}})


def save(folder, backend, marked, config):
    folder.mkdir(exist_ok=True)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and marked
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def train_baichuan(folder, marked):
    trained = train_tokenizer(TEXTS * 3, vocab_size=400, special_tokens=BAICHUAN_TOKENS)
    # A checkpoint whose post-processor would add bos: pedgpt must not let it.
    trained.backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    save(folder, trained.backend, marked, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"})


MAKERS = {"baichuan": train_baichuan, "qwen": train_qwen}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tokenizer folders by name; in those that end in "_unmarked" no added token is marked special."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in MAKERS.items():
        make(root / name, marked=True)
        make(root / f"{name}_unmarked", marked=False)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="session")
def tokenizers_by_name(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(params=["baichuan", "baichuan_unmarked", "qwen", "qwen_unmarked"])
def tokenizer(request, tokenizers_by_name):
    return tokenizers_by_name[request.param]


@pytest.fixture(scope="session")
def texts():
    """Any text a parent may write; special tokens spelled out among it."""
    plain = ["孩子发烧", "龘", "𠮷", "😀", "👩‍⚕️", "38.5", " ", "\n", "fever ", "é", "\t", "。"]
    pieces = st.sampled_from([*plain, *BAICHUAN_TOKENS, *QWEN_TOKENS])
    return st.one_of(st.lists(pieces, max_size=8).map("".join), st.text(max_size=20))


@pytest.fixture(scope="session")
def conversations(texts):
    """Lists of messages: perhaps a system text, then user and assistant in turn, the assistant last."""
    # No message is empty, and none has a thought, which would leave its content.
    text = texts.map(lambda body: "问" + body.replace("</think>", ""))
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)

    def build(system, pairs):
        head = [Message("system", system)] if system else []
        return head + [
            Message(role, said) for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)
        ]

    return st.builds(build, st.none() | text, turns)
