"""Stages 2 to 4 keep token ids in OUTPUT/tokens until they are finished: made by one rank, used again, told again."""

import json

import pytest

from pedgpt.data import store

CHATS = ("full_finetune", "dfpo", "expert_finetune")
BAD = {"full_finetune": {"question": "发烧怎么办？"}, "dfpo": {"prompt": "发烧怎么办？", "chosen": "多喝水。"}}
LONG = {
    "full_finetune": {"question": "发烧怎么办？", "answer": "水" * 200},
    "dfpo": {"prompt": "发烧怎么办？", "chosen": "水" * 200, "rejected": "喝水。"},
}


def fail(*arguments):
    raise AssertionError("encoded again")


@pytest.mark.parametrize("recipe", CHATS)
def test_a_run_that_was_killed_goes_on_from_its_tokens_bit_for_bit(lab, recipe, tmp_path, monkeypatch):
    expected = lab.reference(recipe)
    assert lab.run(recipe, tmp_path, checkpoint_every=1, die_after=2).code == -9
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {"train", "heldout"}
    monkeypatch.setattr(store, "encode_rows", fail)
    result = lab.run(recipe, tmp_path, checkpoint_every=1)
    assert result.code == 0 and "at step 2 of 5" in result.err
    lab.assert_as_if_nothing_happened(tmp_path, expected)  # and no tokens are left


@pytest.mark.parametrize("recipe", ["full_finetune", "dfpo"])
def test_what_was_skipped_is_told_at_every_start(lab, recipe, tmp_path, monkeypatch):
    name = "preferences" if recipe == "dfpo" else "instructions"
    rows = (lab.folder / ("pairs.jsonl" if recipe == "dfpo" else "train.jsonl")).read_text(encoding="utf-8")
    file = tmp_path / "rows.jsonl"
    added = [json.dumps(row, ensure_ascii=False) for row in (BAD[recipe], LONG[recipe])]
    file.write_text("\n".join([*added, rows]), encoding="utf-8")
    settings = {name: file, "on_bad_row": "skip", "on_long_row": "truncate", "checkpoint_every": 1}
    first = lab.run(recipe, tmp_path / "run", die_after=2, **settings)
    monkeypatch.setattr(store, "encode_rows", fail)
    second = lab.run(recipe, tmp_path / "run", **settings)
    assert first.code == -9 and second.code == 0 and "at step 2 of" in second.err
    for out in (first.out, second.out):
        assert f"1 skipped, missing field: {file}:1" in out and f"1 over-long, cut to fit: {file}:2" in out


def test_other_data_makes_other_tokens_and_is_refused_by_name(lab, tmp_path):
    assert lab.run("full_finetune", tmp_path, checkpoint_every=1, die_after=2).code == -9
    before = store.TokenStore(tmp_path / "tokens" / "train").digest
    result = lab.run("full_finetune", tmp_path, instructions="heldout.jsonl")
    assert result.code == 2 and "rows_and_base_model was" in result.err
    assert store.TokenStore(tmp_path / "tokens" / "train").digest != before
    assert "at step 2 of 5" in lab.run("full_finetune", tmp_path, checkpoint_every=1).err
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))


# The recipe, but a rank other than the first may not encode; the first may.
ONE_ENCODES = """
import os, runpy, sys
from pedgpt.data import store
if os.environ["RANK"] != "0":
    store.encode_rows = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_first_of_two_processes_encodes_for_both(lab, tmp_path):
    script = tmp_path / "one_encodes.py"
    script.write_text(ONE_ENCODES, encoding="utf-8")
    arguments = lab.arguments("full_finetune", tmp_path / "run", max_steps=2, epochs=None)
    result = lab.ended(lab.fork(script, [lab.script("full_finetune"), *arguments], ranks=2))
    assert result.code == 0, result.err
    for mine, alone in zip(lab.metrics(tmp_path / "run"), lab.metrics(lab.reference("full_finetune")), strict=False):
        assert mine["tokens"] == alone["tokens"]
    assert not (tmp_path / "run" / "tokens").exists()


def test_a_bad_row_ends_all_ranks(lab, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(BAD["full_finetune"]) + "\n", encoding="utf-8")
    arguments = lab.arguments("full_finetune", tmp_path / "run", instructions=file)
    result = lab.ended(lab.fork(lab.script("full_finetune"), arguments, ranks=2))
    assert result.code != 0 and not (tmp_path / "run").exists()
    assert f"error: {file}:1: missing field" in result.err and "RuntimeError" not in result.err
