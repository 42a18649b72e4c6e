"""Rows through an Assembly, and the corpus that they became, read back without the library."""

import json

import pytest

from pedgpt.corpus.assemble import Assembly, Limits
from pedgpt.corpus.sources import Source
from pedgpt.corpus.split import Split

SOURCE = Source("instructions", "talk", domain="pediatric")


def limits(**changed):
    values = {"min_characters": 1, "max_characters": 5000, "min_chinese": 0.0, "near_duplicate": 0.8,
              "shard_rows": 1000, "keep_personal_data": False, "seed": 0}  # fmt: skip
    return Limits(**(values | changed))


@pytest.fixture
def assembled(tmp_path):
    """Take lists of steps, one for each input, and finish: the rows written by side and table, and those listed."""
    count = iter(range(10**6))

    def run(inputs, *, source=SOURCE, share=0.0, split=None, before=None, after=None, **changed):
        folder = tmp_path / f"corpus{next(count)}"
        assembly = Assembly(folder, limits(**changed), split or Split([], heldout_share=0.0, seed=0))
        if before:
            before(assembly)
        for steps in inputs:
            assembly.take(steps, source)
        if after:
            after(assembly)
        assembly.finish(share)
        return assembly, read(folder), listed(folder)

    return run


def jsonl(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def listed(folder):
    return jsonl(folder / "reports" / "dropped.jsonl")


def read(folder):
    """All rows by (side, table, source), in the order of the shards."""
    rows = {}
    for path in sorted(folder.rglob("*.jsonl")):
        side, *table = path.relative_to(folder).parent.parts
        if side != "reports":
            rows.setdefault((side, "/".join(table), path.stem.rpartition("-")[0]), []).extend(jsonl(path))
    return rows
