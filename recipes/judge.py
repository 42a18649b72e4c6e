"""Let a judge compare the answers of two or more systems: win, tie and loss, in both orders (PediatricsGPT §4.3).

    python recipes/judge.py --answers a.jsonl b.jsonl --endpoint recipes/configs/judge.toml --output judge.json
    python recipes/judge.py --answers a.jsonl b.jsonl --check_judge true

The files come from answer.py or evaluate.py. The judge is any OpenAI-compatible endpoint. What it has said is kept in
OUTPUT.sqlite, so that a run that was stopped asks nothing twice. With --plan true it only says what will be asked and
what that costs at most. With --points 5 each answer gets 0 to 5 points against its reference, instead of comparisons.
--check_judge shows what the figures say of judges with known faults, and gives the judge itself pairs of a reference
and the reference of another question, of which it must find the right one.
"""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from pedgpt.endpoint import Endpoint, in_order, load_endpoint
from pedgpt.evaluation import judging
from pedgpt.evaluation.responses import Answers, check_output, read_systems, thin
from pedgpt.files import write_json
from pedgpt.training import run_recipe


@dataclass(kw_only=True)
class Config:
    lock_beside: ClassVar[bool] = True
    answers: list[str]  # JSONL files of answers, one for each system
    endpoint: str = ""  # TOML file of the judge; empty: nobody is asked, for --check_judge alone
    output: str = ""  # JSON file for the results
    reference: bool = True  # show the judge the true answer too
    points: int = 0  # most points that an answer can get; 0: answers are compared
    limit: int = 0  # questions, evenly spread; 0: all
    check_judge: bool = False  # also check the judge, and these figures, where the right answer is known
    plan: bool = False  # only say how much will be asked, and what it costs at most
    seed: int = 0  # of the bootstrap


def main(config: Config) -> None:
    if min(config.limit, config.points) < 0:
        raise ValueError("limit and points must be at least 0")
    check_output(config.output, *config.answers)
    systems = read_systems(config.answers)
    numbers = range(len(systems[0].questions))
    if config.limit:
        numbers = thin(numbers, config.limit)
        systems = [choose(system, numbers) for system in systems]
    if len(systems) < 2 and not config.points:
        raise ValueError("--answers: comparing needs two files or more")
    if not config.endpoint and not config.check_judge:
        raise ValueError("give --endpoint, the TOML file of the judge, or --check_judge true")
    results = {"systems": {system.name: system.about for system in systems}, "reference": config.reference}
    results |= {"template": judging.template_hash(), "question_set": systems[0].about.get("question_set")}
    if config.check_judge and len(systems) > 1:
        results["known_judges"] = judging.known_judges(systems, seed=config.seed)
        print_known(results["known_judges"])
    if not config.endpoint:
        return
    if not (config.output or config.plan):
        raise ValueError("give --output, the JSON file for the results")
    settings = load_endpoint(config.endpoint)
    settings.temperature = 0.0  # the same answer each time, as far as the server can
    planted = judging.planted_pairs(systems[0]) if config.check_judge else []
    prompts = questions(systems, config) + [
        judging.pair_prompt(pair, shown, reference=False) for pair, shown in planted
    ]
    if config.check_judge and not planted:
        print("The judge itself is not checked: no two questions of one task have references that differ.")
    print_plan(settings, prompts)
    if config.plan:
        return
    read = judging.read_verdict if not config.points else lambda text: judging.read_score(text, config.points)
    readers = [read] * (len(prompts) - len(planted)) + [judging.read_verdict] * len(planted)
    with Endpoint(settings, f"{config.output}.sqlite") as endpoint:
        pairs = list(zip(prompts, readers, strict=True))
        work = in_order(
            pairs, lambda pair: judging.ask_strictly(endpoint.ask, *pair), workers=settings.concurrency, desc="judge",
            endpoints=[endpoint],
        )  # fmt: skip
        said = list(work)
        print(endpoint.describe())
        results |= {"judge": settings.model, "usage": asdict(endpoint.usage)}
    if planted:
        results["found_planted"] = judging.found_planted(said[-len(planted) :])
        print(
            "Of {pairs} planted pairs, {unreadable} without a readable verdict,".format_map(results["found_planted"]),
            f"the judge found {percent(results['found_planted']['right'])} of the right references.",
        )
        said = said[: -len(planted)]
    if config.points:
        results |= judging.summarize_scores(systems, said, config.points)
        print_scores(results)
    else:
        shown = zip(judging.showings(systems), said, strict=True)
        judged = judging.collect(systems, ((one, verdict, problem) for one, (verdict, problem) in shown))
        results |= {**judging.summarize(systems, judged, seed=config.seed), "verdicts": judged.rows}
        for row in (*judged.rows, *judged.unreadable):
            row["number"] = numbers[row["number"] - 1] + 1  # as in the files
        print_verdicts(results)
    write_json(config.output, results)


def choose(system: Answers, numbers) -> Answers:
    questions, answers = ([column[i] for i in numbers] for column in (system.questions, system.answers))
    return replace(system, questions=questions, answers=answers)


def questions(systems, config: Config) -> list:
    """What the judge is asked, in the order of `showings`, or with points system after system."""
    if not config.points:
        return [judging.pair_prompt(systems, one, reference=config.reference) for one in judging.showings(systems)]
    return [
        judging.score_prompt(question, said.content, config.points)
        for system in systems
        for question, said in zip(system.questions, system.answers, strict=True)
    ]


def print_plan(settings, prompts) -> None:
    read = sum(len(message["content"]) for prompt in prompts for message in prompt)
    written = settings.max_tokens * len(prompts)
    cost = (settings.price_per_million_input * read + settings.price_per_million_output * written) / 1e6
    priced = f", {cost:.2f} {settings.currency}" if cost else ""
    print(
        f"{settings.model} is asked {len(prompts):,} times: about {read:,} tokens of questions (one a character) and "
        f"at most {written:,} of answers{priced}, if every answer can be read; else it is asked again, up to "
        f"{judging.ATTEMPTS - 1} times. What it has said before is not asked again."
    )


def percent(figures) -> str:
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * x for x in figures)) if figures else "–"


def print_verdicts(results: dict) -> None:
    for pair in results["pairs"]:
        print(f"\n{' against '.join(pair['systems'])}: {pair['rows']} questions, judged by {results['judge']}")
        for task, found in pair["tasks"].items():
            print(f"  {task}, {found['rows']} questions")
            for name in judging.DIMENSIONS:
                cells = "".join(f"{kind} {percent(found[name][kind]):<22}" for kind in ("win", "tie", "loss"))
                print(f"    {name:<14}{cells}".rstrip())
        if pair["rows"]:
            print(f"  overall, a tie as half a win: {percent(pair['win_rate'])}")
            print(f"  the same for equally long answers: {percent(pair['length_controlled'])}")
            print(f"  verdicts that change with the order: {pair['flips']:.0%}; first shown: {percent(pair['first'])}")
    for name, strength in results.get("bradley_terry", {}).items():
        print("  Bradley-Terry strength of {}: {:.2f} ({:.2f} to {:.2f})".format(name, *strength))
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    for one in results["unreadable"]:
        print(f"no readable verdict: question {one['number']}, {' and '.join(one['systems'])}: {one['problems']}")


def print_scores(results: dict) -> None:
    for name, tasks in results["scores"].items():
        for task, found in tasks.items():
            print("{} {}: {:.2f} ({:.2f} to {:.2f}) points".format(name, task, *found))
    for one in results["unreadable"]:
        print(f"no readable score: question {one['number']} of {one['system']}: {one['problem']}")


def print_known(judges: dict) -> None:
    print("What these figures say of judges with known faults:")
    for name, found in judges.items():
        overall = found["tasks"]["all"]["overall"]
        shares = ", ".join(f"{kind} {percent(overall[kind])}" for kind in ("win", "tie", "loss"))
        print(f"  {name}: {shares}; flips {found['flips']:.0%}, longer preferred {percent(found['longer'])}")
        if name == "planted":
            print(f"    right in 80 % of the verdicts, so 64 % of the pairs: {percent(found['right'])}")
        for warning in found["warned"]:
            print(f"    warning: {warning}")


if __name__ == "__main__":
    run_recipe(main, Config)
