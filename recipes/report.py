"""Write a run's report.md and plots, and print which expectations were met.

    python recipes/report.py --run runs/demo

A folder with answers/*.jsonl and nothing else is enough to compare systems.
"""

from dataclasses import dataclass

from pedgpt.evaluation.report import expectations, write_report
from pedgpt.evaluation.run import load_run
from pedgpt.training import run_recipe


@dataclass
class Config:
    run: str  # folder with STAGE/metrics.jsonl, evaluation/STAGE.json, answers, exams, judge, doctors


def main(config: Config) -> None:
    run = load_run(config.run)
    path = write_report(run)
    print(*(expectations(run) if run.stages else ()), f"report: {path}", sep="\n")


if __name__ == "__main__":
    run_recipe(main, Config)
