"""Let a judge compare the answers of two or more systems: win, tie and loss, in both orders (PediatricsGPT §4.3).

    python recipes/judge.py --answers a.jsonl b.jsonl --endpoint recipes/configs/judge.toml --output judge.json
    python recipes/judge.py --answers a.jsonl b.jsonl --check_judge true

The files come from answer.py or evaluate.py. The judge is any OpenAI-compatible endpoint. What it has said is kept in
OUTPUT.sqlite, so that a run that was stopped asks nothing twice. With --plan true it only says what will be asked and
what that costs at most. With --points 5 each answer gets 0 to 5 points against its reference, instead of comparisons.
--check_judge shows what the figures say of judges with known faults, and gives the judge itself pairs of a reference
and the reference of another question, of which it must find the right one.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar

from pedgpt.endpoint import Endpoint, in_order, load_endpoint
from pedgpt.evaluation import judging
from pedgpt.evaluation.report import between
from pedgpt.evaluation.responses import check_output, read_systems, thin
from pedgpt.files import write_json
from pedgpt.training import run_recipe

percent = partial(between, scale=100, digits=0, unit=" %")


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
    if not config.endpoint and not config.check_judge:
        raise ValueError("give --endpoint, the TOML file of the judge, or --check_judge true")
    check_output(config.output, *config.answers)
    systems = read_systems(config.answers)
    numbers = thin(range(len(systems[0].questions)), config.limit or len(systems[0].questions))
    systems = [system.choose(numbers) for system in systems]
    if len(systems) < 2 and not config.points:
        raise ValueError("--answers: comparing needs two files or more")
    results = {"systems": {system.name: system.about for system in systems}, "reference": config.reference}
    results |= {"template": judging.template_hash(), "question_set": systems[0].about.get("question_set")}
    if config.check_judge and len(systems) > 1:
        results["known_judges"] = judging.known_judges(systems, seed=config.seed)
        print_known(results["known_judges"])
    if not config.endpoint:
        return
    if not (config.output or config.plan):
        raise ValueError("give --output, the JSON file for the results")
    settings = replace(load_endpoint(config.endpoint), temperature=0.0)  # the same answer each time, if the server can
    planted = judging.planted_pairs(systems[0]) if config.check_judge else []
    if config.check_judge and not planted:
        print("The judge itself is not checked: no two questions of one task have references that differ.")
    checks = [prompt for pair in planted for prompt in judging.pair_prompts(pair, reference=False)]
    if config.points:
        prompts, read = judging.score_prompts(systems, config.points), partial(judging.read_score, points=config.points)
    else:
        prompts, read = judging.pair_prompts(systems, reference=config.reference), judging.read_verdict
    print_plan(settings, checks + prompts)
    if config.plan:
        return
    work = [(prompt, judging.read_verdict) for prompt in checks] + [(prompt, read) for prompt in prompts]
    with Endpoint(settings, f"{config.output}.sqlite") as endpoint:
        bar = {"workers": settings.concurrency, "desc": "judge", "endpoints": [endpoint]}
        said = list(in_order(work, lambda one: judging.ask_strictly(endpoint.ask, *one), **bar))
        print(endpoint.describe())
        results |= {"judge": settings.model, "usage": asdict(endpoint.usage)}
    if planted:
        results["found_planted"] = judging.found_planted(said[: len(checks)])
    said = said[len(checks) :]
    if config.points:
        results |= judging.summarize_scores(systems, said, config.points)
    else:
        table = judging.verdict_table([verdict for verdict, _ in said], math.comb(len(systems), 2))
        results |= judging.summarize(systems, table, seed=config.seed) | judging.verdict_rows(systems, said)
        for row in (*results["verdicts"], *results["unreadable"]):
            row["number"] = numbers[row["number"] - 1] + 1  # as in the files
    print_results(results)
    write_json(config.output, results)


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


def outcome(row: dict) -> str:
    return "".join(f"{kind} {percent(row.get(kind)):<22}" for kind in ("win", "tie", "loss")).rstrip()


def print_results(results: dict) -> None:
    if planted := results.get("found_planted"):
        print("Of {pairs} planted pairs, {unreadable} without a readable verdict,".format_map(planted), end=" ")
        print(f"the judge found {percent(planted['right'])} of the right references.")
    for name, tasks in results.get("scores", {}).items():
        for task, found in tasks.items():
            print(f"{name} {task}: {between(found, digits=2)} points")
    for row in results.get("comparisons", ()):
        asked = f"{row['first']} against {row['second']}, {row['task']:<10}{row['dimension']:<14}{row['n']:5}"
        print(f"{asked}  {outcome(row)}")
    for pair in results.get("pairs", ()):
        print(f"{pair['first']} against {pair['second']}, overall: {pair['n']} questions, judged by {results['judge']}")
        if pair["n"]:
            print(f"  a tie as half a win: {percent(pair['win_rate'])}")
            print(f"  the same for equally long answers: {percent(pair['length_controlled'])}")
            print(f"  changed with the order: {pair['flips']:.0%}; preferred the first: {percent(pair['shown_first'])}")
    for name, strength in results.get("bradley_terry", {}).items():
        print(f"  Bradley-Terry strength of {name}: {between(strength, digits=2)}")
    for warning in results.get("warnings", ()):
        print(f"warning: {warning}")
    for one in results["unreadable"][:5]:
        who = one.get("system") or " and ".join(one["systems"])
        problem = one.get("problem") or next(filter(None, one["problems"]))
        print(f"nothing readable: question {one['number']}, {who}: {problem}")
    if others := results["unreadable"][5:]:
        print(f"… and {len(others)} more; the results hold them all")


def print_known(judges: dict) -> None:
    print("What these figures say of judges with known faults:")
    for name, found in judges.items():
        print(f"  {name}: {outcome(found)}; flips {found['flips']:.0%}, longer preferred {percent(found['longer'])}")
        if name == "planted":
            print(f"    64 % of the pairs should have the planted winner, which have it: {percent(found['right'])}")
        for warning in found["warned"]:
            print(f"    warning: {warning}")


if __name__ == "__main__":
    run_recipe(main, Config)
