"""Write a run's report.md and plots, and print what came out: python recipes/report.py --run runs/demo"""

import argparse
import sys
from pathlib import Path

from pedgpt.evaluation.report import expectations, stage_table, write_report
from pedgpt.evaluation.run import load_run


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.md and its plots into a run folder.")
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER",
                        help="holds <stage>/metrics.jsonl and evaluation/<stage>.json")  # fmt: skip
    folder = parser.parse_args().run
    try:
        run = load_run(folder)
        path = write_report(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(stage_table(run), *expectations(run), f"report: {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
