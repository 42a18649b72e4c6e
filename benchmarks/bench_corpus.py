"""Building and packing a corpus of 30,000, 100,000 and 300,000 rows: rows/s and peak memory, a process each.

    python benchmarks/bench_corpus.py
    python benchmarks/bench_corpus.py --rows 3000 10000

The rows are synthetic questions and answers of some 250 characters, made from a seed; one in twenty repeats another
exactly, one in twenty nearly. They go through recipes/build_corpus.py (normalising, filters, personal data, exact and
near duplicates, split, decontamination, shards) and then into packed rows of 4,096 tokens, as stage 1 does.
"""

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
SYLLABLES = (
    "咳嗽发热头痛腹泻呕吐皮疹鼻塞流涕咽喉肿胀食欲精神睡眠体温血压心率呼吸肺炎感染病毒"
    "细菌过敏湿疹便秘贫血缺钙生长发育喂养疫苗检查治疗"
)


def make_rows(path: Path, count: int, seed: int) -> None:
    """Questions and answers as JSONL, one at a time."""
    generator = random.Random(seed)
    kept: list[tuple[str, str]] = []

    def words(least: int, most: int) -> str:
        return "".join(generator.choice(SYLLABLES) for _ in range(generator.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            chance = generator.random()
            if chance < 0.05 and kept:
                question, answer = generator.choice(kept)
            elif chance < 0.1 and kept:
                question, answer = generator.choice(kept)
                at = generator.randrange(len(answer))
                answer = answer[:at] + generator.choice(SYLLABLES) + answer[at + 1 :]
            else:
                question = f"孩子{words(8, 30)}，第{i}天了怎么办？"
                answer = "。".join(words(10, 30) for _ in range(generator.choice((1, 2, 3, 5, 8, 12, 20, 30)))) + "。"
            if len(kept) < 2000:
                kept.append((question, answer))
            file.write(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n")


LISTING = """
[[source]]
file = "rows.jsonl"
kind = "instructions"
licence = "synthetic"
[[source]]
file = "text.jsonl"
kind = "encyclopedia"
licence = "synthetic"
"""


def measure(count: int) -> None:
    """Build and pack `count` rows in this process, and print the result as JSON."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import build_corpus

    from pedgpt.data import PackedRows, TokenStore, load_tokenizer, mix, stage_sources, train_tokenizer, write_tokens
    from pedgpt.data.manifest import INSTRUCTIONS

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        (folder / "source").mkdir()
        make_rows(folder / "source" / "rows.jsonl", count, seed=0)
        text = [f"第{i}篇：" + SYLLABLES[i : i + 40] for i in range(20)]
        lines = [json.dumps({"text": row}, ensure_ascii=False) for row in text]
        (folder / "source" / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / "source" / "corpus.toml").write_text(LISTING, encoding="utf-8")
        train_tokenizer([*text, SYLLABLES], vocab_size=400, special_tokens=SPECIAL_TOKENS).save(folder / "model")
        tokenizer = load_tokenizer(folder / "model")
        imported = peak()
        began = time.perf_counter()
        build_corpus.main(build_corpus.Config(source=str(folder / "source"), output=str(folder / "corpus")))
        built, building = time.perf_counter() - began, peak()
        began = time.perf_counter()
        sources = stage_sources(folder / "corpus")
        for _ in write_tokens(folder / "tokens", sources, tokenizer):
            pass
        store = TokenStore(folder / "tokens")
        mixture = mix(store.sources, store.sizes(), {INSTRUCTIONS: 1.0}, total_tokens=0, seed=0)
        rows = PackedRows(store, mixture.order, 4096)
        for i in range(len(rows)):
            rows.row(i)
        packed = time.perf_counter() - began
        manifest = json.loads((folder / "corpus" / "manifest.json").read_text(encoding="utf-8"))
    result = {
        "rows": count, "built": built, "packed": packed, "imported": imported, "building": building, "peak": peak(),
        "utilization": rows.utilization, "dropped": manifest["dropped"].get("rows", {}),
    }  # fmt: skip
    print(json.dumps(result, ensure_ascii=False))


def peak() -> int:
    """Peak resident memory of this process [MiB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 100_000, 300_000])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    print("| rows | building | rows/s | packing | rows/s | peak MiB (before building) | positions used | left out |")
    print("| --: | --: | --: | --: | --: | --: | --: | :-- |")
    for count in arguments.rows:
        command = [sys.executable, __file__, "--measure", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        r = json.loads(done.stdout.splitlines()[-1])
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in r["dropped"].items())
        print(
            f"| {count:,} | {r['built']:.1f} s | {count / r['built']:,.0f} | {r['packed']:.1f} s |"
            f" {count / r['packed']:,.0f} | {r['peak']:,} ({r['imported']:,}) | {r['utilization']:.2%} | {left_out} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
