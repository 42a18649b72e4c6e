"""Ids and texts of converted SentencePiece models, against the `sentencepiece` package itself."""

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pedgpt.data import load_tokenizer
from pedgpt.data.sentencepiece import convert_sentencepiece, parse_sentencepiece

sentencepiece = pytest.importorskip("sentencepiece")

PHRASES = (
    "患儿 发热 咳嗽 三天 体温 38.5℃ 建议口服 布洛芬 混悬液 每次 5ml 宝宝 腹泻 呕吐 两次 精神 尚可 请问 医生 怎么办 "
    "你好 注意 补液 观察 尿量 如有 惊厥 立即 就诊 the fever child dose mg/kg vitamin D 2024年 12月 （一） 、 。 ， ？"
).split(" ")
ALPHABET = " ▁  ab e\n\t\r0１9Aｅé，。患儿发热龘𠮷ﷺﾞｶ각\x00\x01\x7f\u0301\u0302\u200d\ufe0f\u3000😀👩‍⚕️"
SPELLED = "<s> </s> <unk> <sep> <sep>x <reserved_106> <0x41> ▁▁ < x 宝宝 发热 e\u0302\u0301 ｶﾞ [INST]".split()

IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity"}
EXACT_SPACES: dict[str, Any] = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "baichuan2": IDENTITY
    | EXACT_SPACES
    | {
        "add_dummy_prefix": False,
        "split_digits": True,
        "byte_fallback": True,
        "user_defined_symbols": ["<reserved_106>", "<reserved_107>", "<sep>", "<sep>x", "\n\n", "▁▁▁"],
    },
    "llama2": IDENTITY | EXACT_SPACES | {"split_digits": True, "byte_fallback": True, "pad_id": 3},
    "across_words": IDENTITY | EXACT_SPACES | {"split_by_whitespace": False, "split_by_unicode_script": False},
    "no_bytes": IDENTITY | EXACT_SPACES | {"control_symbols": ["[INST]"]},
}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    rng = random.Random(0)
    text = "\n".join("".join(rng.choices([*PHRASES, " ", "  "], k=30)) for _ in range(600))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    trained: dict[str, Path] = {}

    def train_model(name: str, model_type: str = "bpe", **options: Any) -> Path:
        if name not in trained:
            sentencepiece.SentencePieceTrainer.train(
                input=str(folder / "corpus.txt"), model_prefix=str(folder / name), model_type=model_type,
                vocab_size=700, hard_vocab_limit=False, minloglevel=2, **(options or SETTINGS.get(name, {})),
            )  # fmt: skip
            trained[name] = folder / f"{name}.model"
        return trained[name]

    return train_model


def varint(number: int) -> bytes:
    number %= 1 << 64
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str | bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text if isinstance(text, bytes) else text.encode()) + field(2, score) + field(3, kind))


HEAD = piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("</s>", kind=3)
PLAIN = field(3, 0) + field(4, 0)  # a normalizer without dummy prefix that keeps spaces
TAIL = field(2, field(3, 2)) + field(3, PLAIN)
PREFIX = field(2, field(3, 2)) + field(3, field(4, 0))  # and one with it
LETTERS = piece("a", -8.0) + piece("b", -9.0)


def some_texts(count: int) -> list[str]:
    rng = random.Random(1)
    texts = ["", "   ", " ▁ ", "a" * 300, " " * 100, *ALPHABET, *SPELLED, "\r\n", "\n\n"]
    sources = [PHRASES, ALPHABET, SPELLED, [*PHRASES, *SPELLED, *ALPHABET]]
    return texts + ["".join(rng.choices(sources[i % 4], k=rng.randint(1, 40))) for i in range(count)]


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_and_text_match_sentencepiece(train: Callable[..., Path], name: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train(name)))
    tokenizer = convert_sentencepiece(train(name))
    assert tokenizer.get_vocab_size() == oracle.get_piece_size()
    for i in range(oracle.get_piece_size()):
        assert tokenizer.id_to_token(i) == oracle.id_to_piece(i)

    def compare(text: str) -> None:
        ids = oracle.encode(text)
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids) == oracle.decode(ids)

    for text in some_texts(800):
        compare(text)
    pieces = st.one_of(st.sampled_from([*PHRASES, *SPELLED]), st.sampled_from(ALPHABET), st.text(max_size=4))
    texts = st.one_of(st.text(), st.lists(pieces, max_size=12).map("".join))
    settings(max_examples=60, deadline=None, database=None)(given(texts)(compare))()


def test_special_ids_and_unknown_pieces_decode_as_in_sentencepiece(train: Callable[..., Path]) -> None:
    for name in ("baichuan2", "llama2", "no_bytes"):
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(train(name)))
        tokenizer = convert_sentencepiece(train(name))
        words = oracle.encode("宝宝 fever")
        for ids in ([0], [0, *words], [*words, 0, *words], [1, *words, 2], [1, 2], [*words, 2, 1, *words]):
            assert tokenizer.decode(ids) == oracle.decode(ids)


@pytest.mark.parametrize("name", SETTINGS)
def test_model_fields_match_sentencepiece(train: Callable[..., Path], name: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(train(name)))
    pieces, _ = parse_sentencepiece(train(name).read_bytes())
    for i, (text, score, kind) in enumerate(pieces):
        assert (text, score) == (oracle.id_to_piece(i), oracle.get_score(i))
        assert (kind == 2, kind == 3, kind == 6) == (oracle.is_unknown(i), oracle.is_control(i), oracle.is_byte(i))


def test_merges_of_any_vocabulary_match_sentencepiece(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for seed in range(60):  # pieces of few letters in any order: many splits, ties and pieces that nothing reaches
        rng = random.Random(seed)
        words = sorted({"".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(14)})
        rng.shuffle(words)
        path.write_bytes(HEAD + b"".join(piece(w, -0.5 * i) for i, w in enumerate(words)) + LETTERS + TAIL)
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
        tokenizer = convert_sentencepiece(path)
        for _ in range(40):
            text = "".join(rng.choices("ab", k=rng.randint(1, 30)))
            assert tokenizer.encode(text).ids == oracle.encode(text)


def test_merges_come_by_score_then_by_the_ids_of_the_halves(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(HEAD + piece("ba", -2.0) + piece("aba", -1.0) + piece("ab", -3.0) + LETTERS + TAIL)
    merges = json.loads(convert_sentencepiece(path).to_str())["model"]["merges"]  # ids: ba 3, aba 4, ab 5, a 6, b 7
    assert merges == [["ab", "a"], ["a", "ba"], ["b", "a"], ["a", "b"]]


def test_a_vocabulary_that_a_user_extended_with_pieces_of_score_0_is_refused(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    extended = b"".join(piece(word) for word in ("发热咳", "热咳嗽", "咳嗽三"))
    (tmp_path / "tokenizer.model").write_bytes(train("baichuan2").read_bytes() + extended)
    with pytest.raises(ValueError, match=r"tokenizer\.model: .* of its pieces share a score"):
        load_tokenizer(tmp_path)


def test_settings_that_the_file_leaves_out_are_those_of_the_format() -> None:
    data = HEAD + field(2, field(3, 2)) + field(2, field(42, 2**64 - 1))  # two parts of one message
    _, settings = parse_sentencepiece(data)
    assert settings["model_type"] == 2 and settings["unk_surface"].decode() == " ⁇ "
    assert settings["add_dummy_prefix"] and settings["remove_extra_whitespaces"] and not settings["byte_fallback"]


REFUSED = {
    "empty": (b"", "its model_type is 1"),
    "no pieces": (TAIL, "not enough values"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "KeyError"),
    "truncated in a piece": (HEAD[:-1], "claims"),
    "truncated in a number": (HEAD + b"\x90\x80", "IndexError"),
    "length beyond the file": (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "claims"),
    "invalid UTF-8": (HEAD + piece(b"\xe6\x82"), "utf-8"),
    "no model type": (HEAD + LETTERS, "its model_type is 1, and only 2 can be converted"),
    "word model": (HEAD + LETTERS + field(2, field(3, 3)), "its model_type is 3"),
    "suffix spaces": (HEAD + TAIL + field(2, field(24, 1)), "treat_whitespace_as_suffix"),
    "unescaped spaces": (HEAD + TAIL + field(3, field(5, 0)), "escape_whitespaces"),
    "another unknown text": (HEAD + TAIL + field(2, field(44, b"?")), "its unk_surface is b'.'"),
    "characters that change": (HEAD + TAIL + field(3, field(2, b"\x00\x04\x00\x00abc")), "its charsmap is"),
    "spaces that are removed": (HEAD + TAIL + field(3, field(4, 1)), "its remove_extra_whitespaces is 1"),
    "denormalizer": (HEAD + TAIL + field(5, field(2, b"xxxx")), "denormalizer"),
    "unused pieces": (HEAD + LETTERS + piece("ab", -1.0, kind=5) + TAIL, "piece 'ab' of type 5"),
    "a letter that is no piece": (HEAD + LETTERS + piece("abc") + TAIL, "'c', which is not a piece"),
    "user-defined after a prefix": (HEAD + piece("<a>", kind=4) + PREFIX, "piece '<a>' of type 4"),
    "user-defined with a space": (HEAD + piece("a b", kind=4) + TAIL, "piece 'a b' of type 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_or_foreign_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data, message = REFUSED[name]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)


def test_a_unigram_model_is_refused(train: Callable[..., Path]) -> None:
    path = train("unigram", model_type="unigram", normalization_rule_name="identity")
    with pytest.raises(ValueError, match="its model_type is 1"):
        convert_sentencepiece(path)


def test_a_vocabulary_of_baichuan2_size_converts_in_seconds(tmp_path: Path) -> None:
    rng = random.Random(3)
    letters = [chr(0x4E00 + i) for i in range(8000)]
    words: dict[str, None] = {}
    while len(words) < 125_696 - 3 - len(letters):
        words["".join(rng.choices(letters[: 100 + len(words) // 40], k=rng.choice((2, 2, 2, 3, 4))))] = None
    path = tmp_path / "tokenizer.model"
    scored = b"".join(piece(word, float(-i)) for i, word in enumerate([*words, *letters]))
    path.write_bytes(HEAD + scored + TAIL)
    start = time.perf_counter()
    tokenizer = convert_sentencepiece(path)
    seconds = time.perf_counter() - start
    print(f"125,696 pieces converted in {seconds:.2f} s")
    assert tokenizer.get_vocab_size() == 125_696 and seconds < 10
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    drawn = rng.choices([*words], k=2000)
    for i in range(0, 2000, 10):
        text = "".join(drawn[i : i + 10])
        assert tokenizer.encode(text).ids == oracle.encode(text)
