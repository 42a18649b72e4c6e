"""How well words alone tell what a row is about, on real rows that people labelled by a department or a file name.

    python benchmarks/bench_classify.py [--data ../shared/data] [--half odd|even] [--show 20]

The word lists were written while looking at rows whose SHA-256 is even; the half that is odd was not looked at before
they were finished. Departments are hidden from the classifier, but in the column that says so. Ends with an error if
fewer than 97 % of the medical rows are found or more than 2 % of general chat is called medical.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pedgpt.corpus.classify import GENERAL, GENERAL_MEDICAL, PEDIATRIC, classify
from pedgpt.data.records import Conversation, iter_records

# Each file's label; "" where a column gives it.
FILES = {
    "pediatric_qa.jsonl": PEDIATRIC,
    "general_medical_qa.jsonl": GENERAL_MEDICAL,
    "internal_medicine_qa.csv": "",
    "dialogues_alpaca_history.jsonl": "",
    "cmd_cases.jsonl": "",
    "cmd_model_dialogues.jsonl": "",
    "medical_sharegpt.jsonl": "medical",  # of whom is not said
    "general_sharegpt.jsonl": GENERAL,
}


def read(file: Path, odd: int) -> Iterator[Conversation]:
    """The file's conversations whose texts' SHA-256 is odd (1) or even (0)."""
    for row in iter_records(file, "conversations", on_bad_row="skip"):
        text = "\n".join(message.content for message in row.messages)
        if hashlib.sha256(text.encode()).digest()[0] % 2 == odd:
            yield row


def domain(row: Conversation) -> str:
    found = classify(row)
    return found if found in (GENERAL, GENERAL_MEDICAL) else PEDIATRIC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--half", choices=("odd", "even"), default="odd")
    parser.add_argument("--show", type=int, default=0, help="print so many of the rows of each file that are wrong")
    arguments = parser.parse_args()
    medical = right = general = wrong = 0
    print(f"{'file':32}{'rows':>7}{'medical':>9}{'as labelled':>13}{'with department':>17}")
    for name, label in FILES.items():
        rows = list(read(arguments.data / name, arguments.half == "odd"))
        found = [domain(replace(row, department="")) for row in rows]
        named = [label or (PEDIATRIC if "儿" in row.department else GENERAL_MEDICAL) for row in rows]
        as_medical = sum(each != GENERAL for each in found)
        if label == GENERAL:
            general, wrong = general + len(rows), wrong + as_medical
        else:
            medical, right = medical + len(rows), right + as_medical
        same = [one == other or (other == "medical" and one != GENERAL) for one, other in zip(found, named, strict=True)]
        seen = [domain(row) == other or other == "medical" for row, other in zip(rows, named, strict=True)]
        shown = f"{sum(seen) / len(rows):>17.4f}" if not label else f"{'':17}"
        print(f"{name:32}{len(rows):>7,}{as_medical / len(rows):>9.4f}{sum(same) / len(rows):>13.4f}{shown}")
        mistaken = [(row, one) for row, one, is_same in zip(rows, found, same, strict=True) if not is_same]
        for row, one in mistaken[: arguments.show]:
            print(f"    {one}, {row.department or '-'}: {row.messages[0].content[:90]!r} {row.messages[1].content[:60]!r}")
    print(f"\nmedical rows called medical {right / medical:.4f} of {medical:,}")
    print(f"general chat called medical {wrong / general:.4f} of {general:,}")
    if right / medical < 0.97 or wrong / general > 0.02:
        sys.exit("below 0.97 or above 0.02")


if __name__ == "__main__":
    main()
