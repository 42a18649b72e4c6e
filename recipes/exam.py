"""Grade an exam: a model by the likelihood of its option letters, files of answers by what they say.

    python recipes/exam.py --exam path/to/PediaBench/data --adapter runs/demo/experts/adapter --output exam.json
    python recipes/answer.py --exam path/to/PediaBench/data --endpoint other.toml --output other.jsonl
    python recipes/exam.py --exam path/to/PediaBench/data --answers other.jsonl --judge judge.toml --output exam.json

An exam is PediaBench's folder of sheets, the JSON of CMB or CMExam, or any table with question, options and answer.
Essays and cases need a judge, an OpenAI-compatible endpoint. With --corpus it also counts the questions that a training
corpus holds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pedgpt.corpus import Decontaminator
from pedgpt.corpus.assemble import messages
from pedgpt.data import Message, iter_records
from pedgpt.data.readers import detect_kind
from pedgpt.data.tables import files_of
from pedgpt.endpoint import Endpoint, in_order, load_endpoint
from pedgpt.evaluation import exams, judging
from pedgpt.evaluation.responses import Answers, check_output, read_systems
from pedgpt.evaluation.system import SystemSettings
from pedgpt.files import write_json
from pedgpt.training import run_recipe, start


@dataclass(kw_only=True)
class Config(SystemSettings):
    lock_beside: ClassVar[bool] = True
    exam: str  # file or folder of the exam
    answers: list[str] = field(default_factory=list)  # files of answers to it, from answer.py --exam
    output: str = ""  # JSON file for the results
    judge: str = ""  # TOML file of the endpoint that grades essays and cases
    corpus: str = ""  # folder of training data, to count the questions that it holds
    batch_size: int = 8  # questions per pass


def main(config: Config) -> None:
    if not (config.answers or config.model or config.adapter or config.corpus):
        raise ValueError("give --answers, --model or --adapter to be graded, or --corpus to be searched")
    check_output(config.output, config.exam, *config.answers)
    exam = exams.read_exam(config.exam)
    results = {"exam": config.exam, "questions": len(exam), "likelihood": {}, "generated": {}}
    if (config.model or config.adapter) and not any(one.single for one in exam):  # before a judge is asked
        raise ValueError(f"{config.exam}: no question has exactly one right letter; leave out --model and --adapter")
    if again := len(exam) - len({(one.kind, one.text, str(one.options)) for one in exam}):
        print(f"warning: {again} of {len(exam)} questions occur again in {config.exam}, and count again")
    if config.judge:
        results |= {"judge": load_endpoint(config.judge).model, "template": judging.template_hash()}
    if config.corpus:
        results["in_corpus"] = overlap(exam, config.corpus)
        print(f"{len(results['in_corpus'])} of {len(exam)} questions stand in {config.corpus}")
    for path, said in zip(config.answers, read_systems(config.answers), strict=True):
        if said.questions != exams.as_questions(exam):
            raise ValueError(f"{path}: answers another exam than {config.exam}; write it with answer.py --exam")
        texts = [one.content for one in said.answers]
        shares, unread = exams.grade(exam, texts)
        if config.judge:
            unread += grade_texts(exam, texts, shares, config)
        elif None in shares:
            print(f"{shares.count(None)} essays and cases are not graded and do not count; give --judge")
        found = exams.summarize(exam, shares) | {"unread": unread, "shares": shares}
        results["generated"][said.name] = found
        print_scores(f"{said.name}, by its answers", found)
    if config.model or config.adapter:
        chat = config.load_chat()
        model = config.load_model(start(config.device).device)
        found = exams.by_likelihood(model, chat, exam, config.batch_size)
        results["likelihood"][name_of(config.adapter or config.model)] = found
        print_scores(f"{config.adapter or config.model}, by likelihood", found)
    if config.output:
        write_json(config.output, results)


def name_of(folder: str) -> str:
    """A system's name: its folder's, but the stage's for the folders in which a stage leaves its results."""
    path = Path(folder).resolve()
    return path.parent.name if path.name in ("model", "adapter") else path.name


def grade_texts(exam, texts, shares, config: Config) -> list[str]:
    """Fill in the shares of essays and cases by the judge; what it could not grade is listed and stays ungraded."""
    settings = load_endpoint(config.judge)
    settings.temperature = 0.0
    numbers = [i for i, one in enumerate(exam) if one.kind in exams.POINTS]
    unread = []

    def grade(i):
        asked, most = exams.as_questions([exam[i]]), exams.POINTS[exam[i].kind]
        (prompt,) = judging.score_prompts([Answers("", asked, [Message("assistant", texts[i])])], most)
        return judging.ask_strictly(endpoint.ask, prompt, lambda text: judging.read_score(text, most) / most)

    with Endpoint(settings, f"{config.output or 'exam.json'}.sqlite") as endpoint:
        graded = in_order(numbers, grade, workers=settings.concurrency, desc="judge", endpoints=[endpoint])
        for i, (share, problem) in zip(numbers, graded, strict=True):
            shares[i] = share
            if share is None:
                unread.append(f"question {i + 1} ({exam[i].place}): not graded: {problem}")
        print(endpoint.describe())
    return unread


def overlap(exam, corpus: str) -> list[str]:
    """Where the questions come from that a row of the corpus holds, word for word or lightly edited."""
    found, decontaminator = set(), Decontaminator()
    for one in exam:
        decontaminator.add(one.place, one.text, question=True)

    def rows():
        for path in files_of(corpus):
            for record in iter_records(path, detect_kind(path), on_bad_row="skip"):
                yield messages(record)

    for row in rows():
        decontaminator.count(row)
    for row in rows():
        if match := decontaminator.match(row):
            found.add(match[0])
    return sorted(found)


def print_scores(title: str, found: dict) -> None:
    print(f"\n{title}")
    for part in ("kinds", "groups"):
        for name, one in found[part].items():
            score, low, high = one["score"]
            about = f"{one['questions']} questions, guessing {one['chance']:.1f} %"
            print(f"  {name:<12} {score:6.2f} % of the points, 95 % {low:.2f} to {high:.2f}, {about}")
    if found["total"] is not None:
        about = "  total, weighted as PediaBench weights the kinds: {:.2f} of 100, 95 % {:.2f} to {:.2f}"
        print(about.format(*found["total"]))
    if "rotated" in found:
        print("  options under other letters: {:.2f} %, 95 % {:.2f} to {:.2f}".format(*found["rotated"]["score"]))
        print("  the same option taken both times: {:.1f} %, 95 % {:.1f} to {:.1f}".format(*found["stable"]))
    if "calibration" in found:
        print(f"  expected calibration error {found['calibration']['ece']:.1f} %")
    for one in found.get("unread", [])[:3]:
        print(f"  not read, no points: {one}" if "not graded" not in one else f"  left out: {one}")
    if len(found.get("unread", [])) > 3:
        print(f"  … and {len(found['unread']) - 3} more; the results hold them all")


if __name__ == "__main__":
    run_recipe(main, Config)
