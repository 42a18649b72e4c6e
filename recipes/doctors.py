"""Let doctors compare answers blindly: one offline HTML page for each rater, then all their files as one result.

    python recipes/doctors.py --answers answers/sft.jsonl answers/experts.jsonl --raters li wang zhao \\
        --output runs/doctors
    python recipes/doctors.py --merge ratings/ratings_li.json ratings/ratings_wang.json ratings/ratings_zhao.json \\
        --key runs/doctors/key.json --output runs/doctors/results.json

The first command writes RATER.html, which needs no network, and key.json, which says what system stands behind each
letter: send the pages, keep the key. The raters send back what their pages export, which the second command merges.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pedgpt.evaluation.agreement import MEASURES
from pedgpt.evaluation.doctors import build_pages, mentions
from pedgpt.evaluation.responses import check_output, read_systems
from pedgpt.evaluation.votes import merge, read_key
from pedgpt.files import write_json, write_text
from pedgpt.training import run_recipe


@dataclass
class Config:
    lock_beside: ClassVar[bool] = True
    output: str  # folder for the pages and the key; with merge: JSON file for the results
    answers: list[str] = field(default_factory=list)  # files that answer.py wrote, one for each system
    raters: list[str] = field(default_factory=list)  # names of the raters, of letters and digits; each gets a page
    per_question: int = 0  # raters who get each question; 0: all of them
    limit: int = 0  # questions to ask, evenly spread over the files; 0: all of them
    language: str = "zh"  # of the pages when they open: zh or en
    merge: list[str] = field(default_factory=list)  # files that the raters' pages exported
    key: str = ""  # the key.json of these pages
    partial: bool = False  # also merge files in which some choices are missing
    draws: int = 2000  # bootstrap draws of each interval
    seed: int = 0  # of the shares and orders, or of the bootstrap


def main(config: Config) -> None:
    if config.merge:
        if not config.key or config.answers:
            raise ValueError("merge reads raters' files and --key, the key.json of their pages, and no --answers")
        if config.draws < 1:
            raise ValueError(f"draws must be at least 1, found {config.draws}")
        check_output(config.output, *config.merge, config.key)
        results = merge(config.merge, read_key(config.key), config.partial, draws=config.draws, seed=config.seed)
        write_json(config.output, results)
        print_results(results)
        print(f"all of it: {config.output}")
        return
    if config.language not in ("zh", "en"):
        raise ValueError(f'language must be "zh" or "en", found {config.language!r}')
    systems = read_systems(config.answers)
    pages, key = build_pages(
        systems, config.raters, config.per_question, config.limit, seed=config.seed, language=config.language
    )
    output = Path(config.output)
    if (output / "key.json").exists() and read_key(output / "key.json") != key:
        raise ValueError(f"{output}/key.json is the key of other pages, which raters may have; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "key.json", key)
    for rater, page in pages.items():
        write_text(output / f"{rater}.html", page)
    asked = {row["number"] for row in key["questions"].values()}
    for name, number, found in mentions(systems):
        if number in asked:
            print(f"warning: the answer of {name} to question {number} says {found}: it may tell whose it is")
    shared = {name: {*page["orders"]} for page in key["pages"].values() for name in [page["rater"]]}
    print(f"{len(key['questions'])} questions, {len(key['systems'])} systems; questions that two raters share:")
    for name, mine in shared.items():
        print(f"  {name:16}" + "".join(f"{len(mine & theirs):6}" for theirs in shared.values()))
    print(f"send {output}/RATER.html to each rater; keep {output}/key.json, which names the systems")


def print_results(results: dict) -> None:
    def shown(value: list | float | None, percent: bool = False) -> str:
        if value is None or value == [None] * 3:
            return "–"
        first, *ends = [
            f"{100 * x:.1f}" if percent else f"{x:.2f}" for x in (value if isinstance(value, list) else [value])
        ]
        return f"{first} [{', '.join(ends)}]" if ends else first

    print(f"{results['questions']} questions, raters {', '.join(results['raters'])}")
    if results["missing_raters"]:
        print(f"no file of {', '.join(results['missing_raters'])}")
    print("\nmajority, % of questions [95 % interval]: the first system wins, ties, loses")
    for row in results["comparisons"]:
        if row["by"] == "majority" and row["n"]:
            outcome = "".join(f"{shown(row[name], True):>22}" for name in ("win", "tie", "loss"))
            print(f"  {row['task']:12}{row['dimension']:16}{row['n']:5}{outcome}  {row['first']} : {row['second']}")
    print(f"\n{'agreement':30}{'n':>5}{'raw':>22}{'Cohen κ':>22}{'Fleiss κ':>22}{'Krippendorff α':>22}")
    for row in results["agreement"]:
        figures = "".join(f"{shown(row[name]):>22}" for name in MEASURES)
        print(f"  {row['task']:12}{row['dimension']:16}{row['n']:5}{figures}")
    for name, found in results["strengths"].items():
        listed = ", ".join(f"{system} {shown(value)}" for system, value in found.items())
        print(f"Bradley-Terry strengths, {name}: {listed}")
    print("\nrater           questions  ties %  left %  agrees with others %  median seconds  unsafe")
    for name, row in results["raters"].items():
        shares = f"{shown(row['ties'], True):>8}{shown(row['left'], True):>8}{shown(row['agreement'], True):>22}"
        print(f"  {name:14}{row['questions']:9}{shares}{shown(row['seconds']):>16}{row['unsafe']:>8}")
    print(f"\n{len(results['disagreements'])} disagreements, {len(results['unsafe'])} answers called unsafe:")
    for row in results["unsafe"]:
        comments = "; ".join(f"{rater}: {text}" for rater, text in row["comments"].items())
        print(f"  question {row['number']}, {row['system']}, by {', '.join(row['raters'])}. {comments}")


if __name__ == "__main__":
    run_recipe(main, Config)
