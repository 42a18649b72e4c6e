"""Measure how well words tell what a row is about, on real rows that people labelled by a department or a file name.

    python benchmarks/bench_classify.py [--data ../shared/data] [--half odd|even] [--show 20]

The word lists were tuned on rows whose SHA-256 is even. Of the odd half only the totals were looked at, and the rows of
general chat that are called medical were read; no word was taken from it. The classifier does not see departments,
except in the last column. The script ends with an error if fewer than 97 % of the medical rows are found, or if more
than 2 % of the general chat that is not about medicine is called medical.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pedgpt.corpus.classify import GENERAL, GENERAL_MEDICAL, PEDIATRIC, classify
from pedgpt.data import Conversation, iter_records

MEDICAL = "medical"  # this label does not say whether the patient is a child
FILES = {  # each file's label; "" where a column gives it
    "pediatric_qa.jsonl": PEDIATRIC,
    "general_medical_qa.jsonl": GENERAL_MEDICAL,
    "internal_medicine_qa.csv": "",
    "dialogues_alpaca_history.jsonl": "",
    "cmd_cases.jsonl": "",
    "cmd_model_dialogues.jsonl": "",
    "medical_sharegpt.jsonl": MEDICAL,
    "general_sharegpt.jsonl": GENERAL,
}
# The classifier called these rows of general chat medical, and a person who read them agreed: a case of
# thrombocytopenia, how to sit when out of breath, magnesium before potassium chloride, side effects of a vaccine, an
# operation, toothache and the like. The table shows the share with and without them.
READ_AS_MEDICAL = """
0404d9d006dd 346fa8ec4a62 eaaf67a95f43 8dfdd5016658 f5899242f57e ef8706c364ba f5914e60c025 fda982b17985 e19955395b21
41dcb3055874
""".split()


def checksum(row: Conversation) -> str:
    return hashlib.sha256("\n".join(message.content for message in row.messages).encode()).hexdigest()


def read(file: Path, odd: bool) -> Iterator[Conversation]:
    """The file's conversations whose texts' SHA-256 begins with an odd byte, or an even one."""
    for row in iter_records(file, "conversations", on_bad_row="skip"):
        if int(checksum(row)[:2], 16) % 2 == odd:
            yield row


def domain(row: Conversation) -> str:
    found = classify(row)
    return found if found in (GENERAL, GENERAL_MEDICAL) else PEDIATRIC


def measure(file: Path, odd: bool, show: int = 0) -> dict[str, float]:
    """Count one half of a file: its rows, those called medical, those called as labelled, and with the department."""
    counts = dict.fromkeys(("rows", "medical", "read as medical", "as labelled", "with department"), 0)
    for row in read(file, odd):
        found = domain(replace(row, department=""))
        label = FILES[file.name] or (PEDIATRIC if "儿" in row.department else GENERAL_MEDICAL)
        right = found == label or (label == MEDICAL and found != GENERAL)
        counts["rows"] += 1
        counts["medical"] += found != GENERAL
        counts["read as medical"] += found != GENERAL and label == GENERAL and checksum(row)[:12] in READ_AS_MEDICAL
        counts["as labelled"] += right
        counts["with department"] += domain(row) == label
        if not right and show > 0:
            show -= 1
            print(f"    {found}, {label}: {row.messages[0].content[:90]!r} {row.messages[1].content[:60]!r}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared" / "data")
    parser.add_argument("--half", choices=("odd", "even"), default="odd")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong rows of each file")
    arguments = parser.parse_args()
    rows = found = 0
    print(f"{'file':32}{'rows':>7}{'medical':>9}{'as labelled':>13}{'with department':>17}")
    for name, label in FILES.items():
        counts = measure(arguments.data / name, arguments.half == "odd", arguments.show)
        shares = [f"{counts[key] / counts['rows']:.4f}" for key in ("medical", "as labelled", "with department")]
        print(f"{name:32}{counts['rows']:>7,}{shares[0]:>9}{shares[1]:>13}{shares[2] if not label else '':>17}")
        if label != GENERAL:
            rows, found = rows + counts["rows"], found + counts["medical"]
        else:
            chat, called, noise = counts["rows"], counts["medical"], counts["read as medical"]
    wrong = (called - noise) / (chat - noise)
    print(f"\nmedical rows called medical: {found / rows:.4f} of {rows:,}")
    print(f"general chat called medical: {called / chat:.4f} of {chat:,}; {called} rows, {noise} of them medical for a")
    print(f"reader; without those {wrong:.4f}")
    if found / rows < 0.97 or wrong > 0.02:
        sys.exit("fewer than 97 % or more than 2 %")


if __name__ == "__main__":
    main()
