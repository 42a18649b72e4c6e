"""A run that dies at any moment, and the same command again: as if it had not died."""

import json
import shutil
import signal
import time

import pytest
import torch

from pedgpt.kernels.cpu import products

LONG = {"epochs": 10, "checkpoint_every": 3, "keep_checkpoints": 2}  # 34 steps

# The recipe, but the second checkpoint kills the process when half of it is written.
KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
from pathlib import Path
from pedgpt.training import checkpoint
real, saves = checkpoint.torch.save, []
def save(tensors, handle):
    saves.append(handle)
    if len(saves) == 2:
        handle.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, handle)
checkpoint.torch.save = save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_at_any_step_goes_on_bit_for_bit(lab, tmp_path):
    output, expected = tmp_path / "killed", tmp_path / "whole"
    flags = lab.arguments("full_finetune", output, **LONG)
    (process,) = lab.fork(lab.script("full_finetune"), flags)
    log, deadline = output / "metrics.jsonl", time.monotonic() + 60
    while (not log.exists() or len(log.read_text().splitlines()) < 10) and time.monotonic() < deadline:
        assert process.is_alive(), lab.ended([process])
        time.sleep(0.002)
    process.kill()
    assert lab.ended([process]).code == -signal.SIGKILL and not (output / "done.json").exists()
    reached = len(lab.metrics(output))
    assert 10 <= reached < 34
    # A death in the middle of a line, too.
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"step": 99, "loss": 1.')

    result = lab.call("full_finetune", flags)
    assert result.code == 0, result.err
    start = max(step for step in range(0, reached + 1, 3))
    assert any(f"/step_{step:07d} at step {step} of 34" in result.err for step in (start, start - 3))
    assert lab.run("full_finetune", expected, **LONG).code == 0
    lab.assert_as_if_nothing_happened(output, expected)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(lab, tmp_path):
    output, expected = tmp_path / "killed", tmp_path / "whole"
    settings = {"epochs": 3, "checkpoint_every": 3}
    flags = lab.arguments("expert_finetune", output, **settings)
    (lab.folder / "killed.py").write_text(KILLED_WHILE_SAVING, encoding="utf-8")
    result = lab.ended(lab.fork(lab.folder / "killed.py", [lab.script("expert_finetune"), *flags]))
    assert result.code == -signal.SIGKILL, result.err
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"step_0000003", ".step_0000006.tmp"}
    assert len(lab.metrics(output)) == 6

    result = lab.call("expert_finetune", flags)
    assert result.code == 0 and "step_0000003 at step 3 of 11" in result.err
    assert lab.run("expert_finetune", expected, **settings).code == 0
    lab.assert_as_if_nothing_happened(output, expected)


@pytest.mark.parametrize("recipe", ["continued_pretrain", "full_finetune", "dfpo", "expert_finetune"])
@pytest.mark.parametrize("step", [1, 4])
def test_every_recipe_resumes_bit_for_bit(lab, recipe, step, tmp_path):
    assert lab.run(recipe, tmp_path, checkpoint_every=1, die_after=step).code == -9
    assert len(lab.metrics(tmp_path)) == step
    # What changes neither data nor weights may change on the way.
    result = lab.run(recipe, tmp_path, checkpoint_every=0, keep_checkpoints=5, device="auto")
    assert result.code == 0 and f"at step {step} of 5" in result.err
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference(recipe))


def test_dropout_resumes_bit_for_bit(lab, tmp_path):
    output, expected, other = tmp_path / "died", tmp_path / "whole", lab.reference("expert_finetune")
    assert lab.run("expert_finetune", output, dropout=0.3, checkpoint_every=1, die_after=3).code == -9
    torch.manual_seed(12345)  # the next process begins elsewhere
    assert lab.run("expert_finetune", output, dropout=0.3).code == 0
    assert lab.run("expert_finetune", expected, dropout=0.3).code == 0
    lab.assert_as_if_nothing_happened(output, expected)
    assert lab.metrics(output)[1]["loss"] != lab.metrics(other)[1]["loss"]


def test_a_run_that_dies_before_it_is_marked_done_is_finished_by_the_next(lab, tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pedgpt.training.finish", die)
        result = lab.run("full_finetune", tmp_path)
        assert result.code == 130 and result.err.splitlines()[-1].startswith("stopped by Ctrl-C; the same command goes")
    assert (tmp_path / "model" / "model.safetensors").exists() and not (tmp_path / "done.json").exists()
    shutil.rmtree(tmp_path / "model")
    result = lab.run("full_finetune", tmp_path)
    assert result.code == 0 and "at step 5 of 5" in result.err  # the training is not repeated
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))


@pytest.mark.parametrize("recipe", ["continued_pretrain", "full_finetune", "dfpo", "expert_finetune"])
def test_a_finished_run_does_nothing_and_says_so(lab, recipe):
    output = lab.reference(recipe)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    result = lab.run(recipe, output, micro_batch_size=4, evaluate_every=1)
    assert result.code == 0 and result.out == f"{output}: finished already\n" and result.err == ""
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("finished", [False, True], ids=["half", "finished"])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 1e-3, "seed": 8}, ["learning_rate was 0.003, is 0.001", "seed was 7, is 8"]),
        ({"epochs": 2}, ["epochs was 1.25, is 2.0", "total_steps was 5, is 7"]),
        ({"instructions": "heldout.jsonl", "max_steps": 5}, ["instructions was", "max_steps was", "rows_and"]),
        ({"dtype": "bfloat16"}, ["dtype was 'float32', is 'bfloat16'"]),
    ],
)
def test_other_settings_in_the_same_output_are_refused_by_name(lab, changed, named, finished, tmp_path):
    end = {} if finished else {"die_after": 2}
    lab.run("full_finetune", tmp_path, checkpoint_every=2, **end)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    result = lab.run("full_finetune", tmp_path, checkpoint_every=2, **changed)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    for name in named:
        assert name in result.err
    assert result.err.count(" was ") == len(named)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_data_under_the_same_name_is_refused(lab, tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "run"
    rows = (lab.folder / "train.jsonl").read_text(encoding="utf-8")
    data.write_text(rows, encoding="utf-8")
    assert lab.run("full_finetune", output, instructions=data, checkpoint_every=2, die_after=2).code == -9
    data.write_text(rows.replace("多喝水", "多饮水"), encoding="utf-8")
    result = lab.run("full_finetune", output, instructions=data, checkpoint_every=2)
    assert result.code == 2 and "rows_and_base_model was" in result.err and result.err.count(" was ") == 1
    data.write_text(rows, encoding="utf-8")
    assert lab.run("full_finetune", output, instructions=data, checkpoint_every=2).code == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(lab, tmp_path):
    settings = {"checkpoint_every": 2, "keep_checkpoints": 2}
    assert lab.run("full_finetune", tmp_path, die_after=4, **settings).code == -9
    last = tmp_path / "checkpoints" / "step_0000004"
    (file,) = last.glob("*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    result = lab.run("full_finetune", tmp_path, **settings)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert f"{last}: cannot be read (rank_00000.pt is not what was written: its checksum differs)" in result.err
    assert f"; delete it to go on from the one before, or to start anew if there is none: rm -r '{last}'" in result.err
    shutil.rmtree(last)
    assert "at step 2 of 5" in lab.run("full_finetune", tmp_path, **settings).err
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))


def test_done_is_a_readable_record_of_the_settings(lab):
    done = json.loads((lab.reference("dfpo") / "done.json").read_text(encoding="utf-8"))
    assert done["beta"] == 0.1 and done["preferences"] == [str(lab.folder / "pairs.jsonl")] and done["total_steps"] == 5


def test_a_run_goes_on_with_the_forms_that_it_began_with(lab, tmp_path, monkeypatch):
    """Also on a machine, or in a moment, in which a measurement goes the other way."""
    monkeypatch.delenv("PEDGPT_CPU")
    output, expected = tmp_path / "killed", tmp_path / "whole"
    with monkeypatch.context() as patched:
        patched.setattr(products, "_measured", lambda: True)
        assert lab.run("dfpo", expected, checkpoint_every=5, die_after=5).code == -9
        assert lab.run("dfpo", output, checkpoint_every=2, die_after=2).code == -9
    with monkeypatch.context() as patched:
        patched.setattr(products, "_measured", lambda: False)
        assert lab.run("dfpo", output, checkpoint_every=5, die_after=5).code == -9
    products.use({})
    states = [json.loads((folder / "checkpoints/step_0000005/state.json").read_text()) for folder in (output, expected)]
    assert states[0] == states[1]
    assert states[0]["choices"] == {products.LIBRARY: True}
    parts = [(folder / "checkpoints/step_0000005/rank_00000.pt").read_bytes() for folder in (output, expected)]
    assert parts[0] == parts[1]


def test_another_word_than_always_and_never_is_refused(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDGPT_CPU", "sometimes")
    result = lab.run("full_finetune", tmp_path)
    assert result.code not in (0, None) and 'PEDGPT_CPU must be "always" or "never"' in result.err
    monkeypatch.undo()
    products.use({})
