"""What a run folder holds beside its stages, for the report: other systems' answers, exams, a judge and doctors.

<run>/answers/<system>.jsonl   written by answer.py or evaluate.py
<run>/exams/<name>.json        written by exam.py
<run>/judge/<name>.json        written by judge.py
<run>/doctors/<name>.json      the merged ratings, written by doctors.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pedgpt.evaluation.agreement import bootstrap, cohen_kappa, paired_difference, raw_agreement
from pedgpt.evaluation.generation_metrics import score_answers, signature
from pedgpt.evaluation.responses import read_answers
from pedgpt.evaluation.run import Stage
from pedgpt.files import read_object

Interval = Sequence[float] | None
KEYS = {  # of a result, at least
    "exams": {"likelihood", "generated", "questions"},
    "judge": {"judge", "question_set"},
    "doctors": {"raters", "systems", "comparisons", "agreement", "votes", "unsafe"},
}


@dataclass
class Findings:
    """The results by the name of their file; `scores` are those of all answers, if some are of no stage."""

    stages: set[str] = field(default_factory=set)
    scores: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    exams: dict[str, dict[str, Any]] = field(default_factory=dict)
    judge: dict[str, dict[str, Any]] = field(default_factory=dict)
    doctors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def likelihoods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(system, result) of each exam that was answered by likelihood."""
        for exam in self.exams.values():
            yield from exam["likelihood"].items()

    def verdicts(self) -> list[dict[str, Any]]:
        """A row for each judge or the doctors' majority, pair of systems, task and dimension, with win, tie, loss."""
        rows = []
        for found in self.judge.values():
            for pair in found.get("pairs", ()):
                for task, scores in pair["tasks"].items():
                    about = {"by": found["judge"], "first": pair["systems"][0], "second": pair["systems"][1]}
                    shares = ({"dimension": name, **one} for name, one in scores.items() if name != "rows")
                    rows += [{**about, "task": task, "n": scores["rows"], **one} for one in shares]
        for found in self.doctors.values():
            majority = [row for row in found["comparisons"] if row["by"] == "majority" and row["n"]]
            rows += [{**row, "by": f"{len(found['raters'])} doctors"} for row in majority]
        return rows


def load_findings(folder: Path, stages: set[str]) -> Findings:
    """Read all that is there; `stages` are the systems whose answers are scored already.

    Raises ValueError for a file that its recipe did not write.
    """
    found = Findings()
    for name, keys in KEYS.items():
        for path in sorted((folder / name).glob("*.json")):
            result = read_object(path.parent, path.name)
            if path.name == "key.json" or (name == "doctors" and "checksum" in result):
                continue  # it tells which system stands behind a letter, or is one rater's
            if not keys <= result.keys():
                recipe = f"{name.removesuffix('s') if name == 'exams' else name}.py"
                raise ValueError(f"{path}: not a result of {recipe}; move it to another folder")
            getattr(found, name)[path.stem] = result
    paths = sorted((folder / "answers").glob("*.jsonl"))
    if {path.stem for path in paths} - stages:  # then the stages stand beside the others
        found.scores = {path.stem: score_answers(read_answers(path)) for path in paths}
        found.stages = stages
    return found


def show(value: float | None, digits: int = 2) -> str:
    """A number for people, – if there is none."""
    return "–" if value is None else f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def percent(value: float | None) -> str:
    """A share as per cent."""
    return "–" if value is None else f"{100 * value:.1f} %"


def plus_minus(stage: Stage, *keys: str, scale: float = 1, digits: int = 1) -> str:
    """A stage's number with half of its 95 % interval, where that is known."""
    value, ends = stage.number(*keys), stage.interval(*keys)
    if value is None or ends is None:
        return show(None if value is None else scale * value, digits)
    digits = digits if abs(value) < 1000 else 0
    return f"{show(scale * value, digits)} ± {show(scale * (ends[1] - ends[0]) / 2, digits)}"


def between(figures: Interval, scale: float = 1, digits: int = 1) -> str:
    """A figure and its interval, as in 54.2 [48.9, 59.8]."""
    if figures is None or any(figure is None for figure in figures):
        return "–"
    value, low, high = (f"{scale * figure:,.{digits}f}" for figure in figures)
    return f"{value} [{low}, {high}]"


def escape(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\`*_#~|<>\[\]]|&(?=#?\w+;))", r"\\\1", text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header, the first column stands on the left."""
    header, *body = ([escape(cell).replace("\n", "<br>") for cell in row] for row in rows)
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


def sections(found: Findings, plots: Mapping[str, list[str]]) -> list[str]:
    """The parts of the report's page, each with its plots; 95 % intervals in brackets."""
    page = [*_answer_section(found), *_exam_section(found), *plots.get("calibration.png", [])]
    page += [*_verdict_section(found), *plots.get("verdicts.png", []), *_agreement_section(found)]
    return page


def _answer_section(found: Findings) -> list[str]:
    rows, differences = [["system", "task", "questions", "empty", "ROUGE-L", "GLEU"]], []
    for name, tasks in found.scores.items():
        for task, scores in tasks.items():
            talks = scores["conversations"]
            cells = [between(bootstrap(scores["values"][name], clusters=talks)) for name in ("rouge-l", "gleu")]
            rows.append([name, task or "all", str(scores["rows"]), str(scores["empty"]), *cells])
    pairs = (pair for pair in combinations(found.scores, 2) if {*pair} - found.stages)
    for one, two in pairs:
        for task in found.scores[one].keys() & found.scores[two].keys():
            first, second = found.scores[one][task], found.scores[two][task]
            if first["question_set"] == second["question_set"]:
                values = first["values"]["rouge-l"], second["values"]["rouge-l"]
                figures = paired_difference(*values, clusters=first["conversations"])
                one_talk = len({*first["conversations"]}) < 2  # its interval has no width
                told = ": no difference beyond chance" if one_talk or figures[1] <= 0 <= figures[2] else ""
                differences.append(f"- ROUGE-L on {escape(task or 'all')}, {escape(one)} − {escape(two)}: ")
                differences[-1] += f"{between(figures)}{told}"
    if len(rows) == 1:
        return []
    page = ["## Answers compared", f"`{signature()}`", markdown_table(rows)]
    return [*page, *(["On the same questions:", "\n".join(sorted(differences))] if differences else [])]


def _exam_section(found: Findings) -> list[str]:
    page: list[str] = []
    for name, exam in found.exams.items():
        rows, unread = [["system", "answered by", "kind", "score, % of points", "questions", "guessing"]], []
        for way in ("likelihood", "generated"):
            for system, result in exam[way].items():
                for kind, one in result["kinds"].items():
                    counts = [str(one["questions"]), show(one["chance"], 1)]
                    rows.append([system, way, kind.replace("_", " "), between(one["score"]), *counts])
                if result.get("total") is not None:
                    rows.append([system, way, "total of PediaBench", between(result["total"]), "–", "–"])
                if "rotated" in result:
                    again = [between(result["rotated"]["score"]), str(result["rotated"]["questions"])]
                    rows.append([system, way, "choice, other letters", *again, "–"])
                if result.get("unread"):
                    unread.append(f"- {escape(system)}: {len(result['unread'])} answers could not be read or graded.")
        page += [f"## Exam: {escape(name)}", markdown_table(rows), *unread]
        if "in_corpus" in exam:
            page.append(f"{len(exam['in_corpus'])} of its {exam['questions']} questions stand in the training corpus.")
    return page


def _verdict_section(found: Findings) -> list[str]:
    rows = [["judged by", "systems", "task", "aspect", "questions", "win, %", "tie, %", "loss, %"]]
    for row in found.verdicts():
        shares = [between(row[kind], 100, 0) for kind in ("win", "tie", "loss")]
        systems = f"{row['first']} : {row['second']}"
        rows.append([row["by"], systems, row["task"], row["dimension"], str(row["n"]), *shares])
    page = ["## Compared by judge and doctors", markdown_table(rows)] if len(rows) > 1 else []
    for result in found.judge.values():
        for pair in result.get("pairs", ()):
            if not pair["rows"]:
                continue
            first, longer, wins, controlled = (
                f"{between(pair[name], 100)} %" for name in ("first", "longer", "win_rate", "length_controlled")
            )
            page.append(
                f"{escape(result['judge'])}, {escape(' against '.join(pair['systems']))}: {percent(pair['flips'])} of "
                f"the pairs change with the order. Of its decisions, {first} prefer the answer shown first and "
                f"{longer} the longer one. A tie as half a win, the first system wins {wins}"
                + (f", and {controlled} if both answers are equally long." if pair["length_controlled"] else ".")
            )
        for system, strength in result.get("bradley_terry", {}).items():
            page.append(f"- Bradley-Terry strength of {escape(system)}: {between(strength, digits=2)}")
        for system, scores in result.get("scores", {}).items():
            told = ", ".join(f"{escape(task)} {between(figures, digits=2)}" for task, figures in scores.items())
            page.append(f"- {escape(result['judge'])} gives {escape(system)} of {result['points']} points: {told}")
        page += [f"**{escape(warning)}**" for warning in result.get("warnings", ())]
        if planted := result.get("found_planted"):
            found_right = f"{between(planted['right'], 100)} % of the right references"
            unreadable = f"{planted['unreadable']} without a readable verdict"
            page.append(f"In {planted['pairs']} planted pairs, {unreadable}, the judge found {found_right}.")
    return page


def _agreement_section(found: Findings) -> list[str]:
    page = []
    for result in found.doctors.values():
        rows = [["task", "aspect", "questions", "raw", "Cohen κ", "Fleiss κ", "Krippendorff α"]]
        for row in result["agreement"]:
            figures = [show(row[name]) for name in ("raw", "cohen", "fleiss")]
            alpha = between(row["krippendorff"], digits=2)
            rows.append([row["task"], row["dimension"], str(row["n"]), *figures, alpha])
        page += ["### Agreement of the doctors", markdown_table(rows)]
        for name, strengths in result.get("strengths", {}).items():
            listed = ", ".join(f"{escape(system)} {between(one, digits=2)}" for system, one in strengths.items())
            page.append(f"Bradley-Terry strengths by the doctors' majority, {name}: {listed}.")
        unsafe = [
            f"- question {row['number']}, {escape(row['system'])}, by {', '.join(row['raters'])}"
            for row in result["unsafe"]
        ]
        page += ["Answers that a doctor calls unsafe:", "\n".join(unsafe)] if unsafe else []
        for judge in found.judge.values():
            page += _judge_against(judge, result)
    return page


def _judge_against(judge: Mapping[str, Any], doctors: Mapping[str, Any]) -> list[str]:
    """Agreement of a judge with the doctors' majority, overall, on the questions that both compared."""
    overall = (row for row in doctors["votes"] if row["dimension"] == "overall")
    majority = {row["number"]: row["majority"] for row in overall if row["majority"]}
    lines = []
    for pair in judge.get("pairs", ()) if judge.get("question_set") == doctors.get("question_set") else ():
        if not {*pair["systems"]} <= {*doctors["systems"]}:
            continue  # they compared one of the two with another system
        names = {"1": pair["systems"][0], "2": pair["systems"][1], "tie": "tie"}
        rows = [row for row in judge["verdicts"] if row["systems"] == pair["systems"] and row["number"] in majority]
        both = [(names[row["verdict"]["overall"]], majority[row["number"]]) for row in rows]
        codes = np.array([[[*names.values()].index(one) for one in two] for two in both if two[1] in names.values()])
        if len(codes):
            kappa = bootstrap(codes, statistic=lambda pairs: cohen_kappa(*pairs.T.tolist()))
            lines.append(
                f"{escape(judge['judge'])} and the doctors' majority agree on {percent(raw_agreement(codes))} of "
                f"{len(codes)} questions ({escape(' : '.join(pair['systems']))}), κ {between(kappa, digits=2)}."
            )
    return lines
