"""Our ids and texts against `sentencepiece` and `transformers`, on all text of a folder and on random strings.

    python benchmarks/check_tokenizers.py --data ../shared/data --baichuan2 ../shared/tokenizers/baichuan2

It trains SentencePiece BPE models with Baichuan2's and Llama 2's settings, the latter also without byte pieces, and
byte-level tokenizer.json files with the patterns of Llama 3 and Qwen. It loads each, and the genuine Baichuan2 file if
it is there, with `load_tokenizer`, and compares every string. For the latter, the strings include every overlap of
pieces that share a score. For the sentencepiece that it compares with, `<reserved_106>` and its like are made control
symbols, because in pedgpt text never becomes one. A mismatch ends the script with status 1. Needs the `test` extra.
"""

import argparse
import csv
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pedgpt.data import Tokenizer, load_tokenizer

EXACT = {
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
    "split_digits": True, "byte_fallback": True,
}  # fmt: skip
SPECIAL = rb"(<(?:reserved_\d+|SEP|CLS|!DOCTYPE)>\x15....\x18)\x04"  # in the file's bytes: a user-defined piece
RESERVED = [f"<reserved_{i}>" for i in range(106, 110)]
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "baichuan2": EXACT | {"add_dummy_prefix": False, "user_defined_symbols": RESERVED},
    "llama2": EXACT,
    "no_bytes": EXACT | {"byte_fallback": False},
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama3": WORDS % r"\p{N}{1,3}", "qwen": WORDS % r"\p{N}"}
CONTROL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
SPELLED = ["<s>", "</s>", "<unk>", "<pad>", "<0x41>", *RESERVED, *CONTROL["llama3"], *CONTROL["qwen"], "[INST]", "▁"]
RANDOM: list[Callable[[random.Random], str]] = [
    lambda rng: chr(rng.randrange(0x1F300, 0x1FAFF)) + rng.choice(["", "\u200d", "\ufe0f", "🏽"]),  # emoji
    lambda rng: chr(rng.randrange(0x4E00, 0x9FFF)),
    lambda rng: chr(rng.choice([rng.randrange(0x3400, 0x4DBF), rng.randrange(0x20000, 0x323AF)])),  # rare Han
    lambda rng: chr(rng.choice([*range(32), *range(127, 160), 0xAD, 0x200B, 0x2028, 0xFEFF, 0xFFFD])),  # control
    lambda rng: rng.choice([" ", "\u3000", "\u00a0", "\n", "\t", "\r\n"]) * rng.randint(1, 9),
    lambda rng: "".join(rng.choices("0123456789０１９.,%℃/-", k=rng.randint(1, 12))),
    lambda rng: (
        rng.choice("aeouncxAE가か") + "".join(rng.choices("\u0301\u0302\u0323\u0308\u3099", k=rng.randint(1, 4)))
    ),
    lambda rng: rng.choice(SPELLED),
    lambda rng: rng.choice(["fever", "don't", "I'LL", " the", "mg/kg", "ﬁ", "Ａ", "ﷺ", "㎎", "①", "ß"]),
    lambda rng: chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])),  # anything
]


@dataclass
class Row:
    """One tokenizer's result, and the seconds that it took to load."""

    name: str
    oracle: str
    texts: int
    wrong_ids: list[str]
    wrong_texts: list[str]
    seconds: float

    def __str__(self) -> str:
        wrong = f"{len(self.wrong_ids):>9}  {len(self.wrong_texts):>10}"
        return f"{self.name:<10} {self.oracle:<14} {self.texts:>7}  {wrong}  {self.seconds:>5.2f} s"


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def texts_of(folder: Path) -> list[str]:
    """Every string of every JSONL, CSV, text and Markdown file, each once, and whole text files too."""
    found: dict[str, None] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".jsonl", ".csv", ".txt", ".md"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            found |= dict.fromkeys(cell for row in csv.reader(text.splitlines(keepends=True)) for cell in row)
        elif path.suffix == ".jsonl":
            found |= dict.fromkeys(s for line in text.split("\n") if line.strip() for s in strings(json.loads(line)))
        else:
            found[text] = None
    return [text for text in found if not any("\ud800" <= char <= "\udfff" for char in text)]


def random_texts(count: int) -> list[str]:
    """Strings of one kind, and of all kinds mixed."""
    rng = random.Random(0)
    kinds = [[kind] for kind in RANDOM] + [RANDOM] * len(RANDOM)
    made = ("".join(rng.choice(kinds[i % len(kinds)])(rng) for _ in range(rng.randint(1, 24))) for i in range(count))
    return list(made)


def train_sentencepiece(folder: Path, corpus: Path, vocabulary: int, options: dict[str, Any]) -> None:
    """Write tokenizer.model."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=vocabulary,
        character_coverage=0.9995, hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip


def overlaps(oracle: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Texts in which two pieces of equal score overlap, and in which one follows the other."""
    found: dict[str, None] = {}
    by_score: dict[float, list[str]] = {}
    for i in range(len(oracle)):
        if len(oracle.id_to_piece(i)) > 1 and oracle.get_score(i) < 0:
            by_score.setdefault(oracle.get_score(i), []).append(oracle.id_to_piece(i))
    for pieces in by_score.values():
        for a, b in itertools.permutations(pieces, 2):
            sizes = [n for n in range(1, min(len(a), len(b))) if a.endswith(b[:n])]
            found |= dict.fromkeys(a + b[n:] for n in [*sizes, 0])
    return [*found]


def train_byte_level(folder: Path, corpus: Path, vocabulary: int, name: str) -> None:
    """Write tokenizer.json, with added tokens and a post-processor as the family has them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if name == "qwen" else None
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    backend.train([str(corpus)], trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL[name]])
    first, end = CONTROL[name][0], CONTROL[name][1 if name == "llama3" else 2]
    bare = processors.ByteLevel(trim_offsets=False)
    bos = processors.TemplateProcessing(f"{first} $A", special_tokens=[(first, backend.token_to_id(first))])
    backend.post_processor = processors.Sequence([bare, bos]) if name == "llama3" else bare
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": first if name == "llama3" else None, "eos_token": end, "pad_token": first}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def compare(
    ours: Tokenizer, texts: Sequence[str], encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> tuple[list[str], list[str]]:
    """The texts whose ids differ, and those whose ids decode to another text."""
    wrong_ids, wrong_texts = [], []
    for text in texts:
        ids = encode(text)
        if ours.document_prefix + ours.encode(text) != ids:
            wrong_ids.append(text)
        if ours.decode(ids) != decode(ids):
            wrong_texts.append(text)
    return wrong_ids, wrong_texts


def check(
    folder: Path, texts: list[str], corpus: list[str], vocabulary: int, genuine: Path | None = None
) -> Iterator[Row]:
    """Train, load and compare one tokenizer after another, in `folder`."""
    written = folder / "corpus.txt"
    written.write_text("\n".join(corpus), encoding="utf-8")
    for name in [*SENTENCEPIECE, *(["genuine"] if genuine else []), *PATTERNS]:
        place = genuine if name == "genuine" and genuine else folder / name
        place.mkdir(exist_ok=True)
        more: list[str] = []
        if name in PATTERNS:
            train_byte_level(place, written, vocabulary, name)
            reference = PreTrainedTokenizerFast.from_pretrained(place, split_special_tokens=True)  # as text, as ours
            encode = lambda text, reference=reference: reference(text)["input_ids"]  # noqa: E731
            decode = lambda ids, reference=reference: reference.decode(  # noqa: E731
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        else:
            if name in SENTENCEPIECE:
                train_sentencepiece(place, written, vocabulary, SENTENCEPIECE[name])
            data = (place / "tokenizer.model").read_bytes()
            control = re.sub(SPECIAL, lambda found: found[1] + b"\3", data, flags=re.DOTALL)
            oracle = sentencepiece.SentencePieceProcessor(model_proto=control)
            encode, decode = oracle.encode, oracle.decode
            more = overlaps(oracle) if name == "genuine" else []
        start = time.perf_counter()
        ours = load_tokenizer(place)
        seconds = time.perf_counter() - start
        wrong = compare(ours, texts + more, encode, decode)
        package = "transformers" if name in PATTERNS else "sentencepiece"
        yield Row(name, package, len(texts + more), *wrong, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--random", type=int, default=10_000, help="random strings")
    parser.add_argument("--vocabulary", type=int, default=8_000, help="tokens of each model")
    parser.add_argument("--baichuan2", type=Path, default=Path("../shared/tokenizers/baichuan2"), help="genuine folder")
    options = parser.parse_args()
    found, drawn = texts_of(options.data), random_texts(options.random)
    if not found:
        raise SystemExit(f"{options.data}: no text in .jsonl, .csv, .txt or .md files")
    print(f"{len(found)} texts of {options.data}, {sum(map(len, found)):,} characters; {len(drawn)} random strings")
    print("tokenizer  oracle           texts  wrong ids  wrong text     load", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        genuine = options.baichuan2 if options.baichuan2.is_dir() else None
        for row in check(Path(folder), found + drawn, found[::4], options.vocabulary, genuine):
            print(row, flush=True)
            wrong += len(row.wrong_ids) + len(row.wrong_texts)
            for text in (row.wrong_ids + row.wrong_texts)[:3]:
                print(f"    {text[:200]!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
