"""Small tokenizers: ours, a Qwen-like one made with `tokenizers` alone, and the same with unmarked special tokens."""

import json

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

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


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
SENTENCEPIECE = {
    "llama2": EXACT | {"vocab_size": 480},
    "baichuan2": EXACT
    | {"vocab_size": 480, "add_dummy_prefix": False, "user_defined_symbols": ["<reserved_106>", "▁▁"]},
    "no_bytes": EXACT | {"vocab_size": 220, "byte_fallback": False, "control_symbols": ["[INST]"]},
}


@pytest.fixture(scope="session")
def sp_folders(tmp_path_factory):
    """Folders with a tokenizer.model, by the name of its settings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    root = tmp_path_factory.mktemp("models")
    text = "孩子发烧38.5度，咳嗽三天。 请问医生怎么办？  多喝水，观察体温。 the fever  for 3 days\n"
    (root / "corpus.txt").write_text(text * 50, encoding="utf-8")
    for name, options in SENTENCEPIECE.items():
        (root / name).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(root / "corpus.txt"), model_prefix=str(root / name / "tokenizer"), model_type="bpe",
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
    return {name: root / name for name in SENTENCEPIECE}


CHAT_TEXTS = [
    "医生您好，我家孩子发烧三天了，体温38.5度，请问是怎么回事？",
    "考虑急性上呼吸道感染，建议多休息、多喝水。",
    "The child has had a fever for 3 days.\n\nGive water and rest, then see a doctor.\n",
    "system user assistant You are a helpful assistant.\n\n[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n [/INST] ok",
] * 3
CHAT_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
]  # fmt: skip


def train_kind(kind):
    """A backend of each kind, and the special tokens' names for its config."""
    backend = tokenizers.Tokenizer(models.BPE())
    if kind in ("chatml", "llama3"):
        names = CHATML_TOKENS if kind == "chatml" else LLAMA3_TOKENS
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CHAT_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(CHAT_TEXTS, trainer)
        backend.add_special_tokens([AddedToken(name, special=True) for name in names])
        if kind == "chatml":  # not marked special in Qwen's own files either
            backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
            return backend, {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "bos_token": None}
        return backend, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    # As Llama 2's files: bytes that have no piece fall back to <0xXX>, spaces are ▁, one is put before a text.
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, limit_alphabet=100
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)  # no piece goes on after a ▁
    backend.train_from_iterator([text.replace("\n", " ") for text in CHAT_TEXTS], trainer)
    if kind == "llama2_prepend":  # after every special token, too
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # byte pieces are ordinary ones
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="session")
def kinds():
    return {kind: train_kind(kind) for kind in ("chatml", "llama3", "llama2_prepend", "llama2_first")}


@pytest.fixture(scope="session")
def folder_of(kinds, tmp_path_factory):
    def make(kind, template=None):
        folder = tmp_path_factory.mktemp("folder")
        backend, config = kinds[kind]
        backend.save(str(folder / "tokenizer.json"))
        config = config if template is None else config | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make
