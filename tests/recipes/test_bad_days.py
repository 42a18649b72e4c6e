"""Full disks, two runs at once, signals, a death at the very end: what a run says, and that it goes on."""

import contextlib
import os
import re
import resource
import shutil
import signal
import time

import pytest
import torch

from pedgpt.files import sole_writer
from pedgpt.training import checkpoint, loop

RECIPES = ("continued_pretrain", "full_finetune", "dfpo", "expert_finetune")
FULL = r"cannot be written \(File too large\): ([\d,.]+ MB needed, )?[\d,.]+ MB free$"


@contextlib.contextmanager
def largest_file(size):
    """The system refuses to write files beyond this size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_space(lab, recipe, tmp_path):
    size = max(file.stat().st_size for file in lab.reference(recipe).glob("*/*.safetensors"))
    with largest_file(size - 1000):
        result = lab.run(recipe, tmp_path)
    *_, warning, line = result.err.splitlines()
    assert result.code == 2 and "Traceback" not in result.err
    assert line.startswith(f"error: {tmp_path}/") and re.search(FULL, line)
    assert f"warning: no checkpoint after step 5: {tmp_path}/checkpoints/.step_0000005.tmp/rank_0000" in result.err
    assert not list(tmp_path.glob("**/.*"))  # neither a lock nor half a file
    assert lab.run(recipe, tmp_path).code == 0
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference(recipe))


def test_every_recipe_that_writes_ends_in_one_line_on_a_full_disk(lab, tmp_path):
    output, adapter = tmp_path / "out", lab.folder / "references" / "lora"
    if not adapter.exists():
        assert lab.run("dfpo", adapter, adapter="lora", rank=2).code == 0
    (tmp_path / "held" / "text").mkdir(parents=True)
    shutil.copy(lab.folder / "heldout_text.jsonl", tmp_path / "held" / "text" / "pediatric.jsonl")
    (tmp_path / "source").mkdir()
    shutil.copy(lab.folder / "train.jsonl", tmp_path / "source")
    (tmp_path / "run" / "sft").mkdir(parents=True)
    shutil.copy(lab.reference("full_finetune") / "metrics.jsonl", tmp_path / "run" / "sft")
    model = ["--model", str(lab.folder / "model")]
    corpus = ["--text", str(lab.folder / "text.jsonl"), "--instructions", str(lab.folder / "train.jsonl")]
    tiny = ["--vocab_size", "300", "--hidden_size", "32", "--num_hidden_layers", "1"]
    for recipe, flags in (
        ("continued_pretrain", lab.arguments("continued_pretrain", output)),  # the token store
        ("dfpo", lab.arguments("dfpo", output)),  # the reference's log-probabilities
        ("init_model", [*corpus, *tiny, "--output", str(output)]),
        ("merge_lora", [*model, "--adapter", str(adapter / "adapter"), "--output", str(output)]),
        ("export_llama", [*model, "--output", str(output)]),
        ("build_corpus", ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "corpus")]),
        ("evaluate", [*model, "--heldout", str(tmp_path / "held"), "--output", str(tmp_path / "out.json")]),
        ("report", ["--run", str(tmp_path / "run")]),
    ):  # fmt: skip
        with largest_file(300):
            result = lab.call(recipe, flags)
        assert result.code == 2 and "Traceback" not in result.err, (recipe, result.err)
        line = result.err.splitlines()[-1]
        assert line.startswith(f"error: {tmp_path}/") and re.search(FULL, line), (recipe, line)


def test_a_checkpoint_that_the_disk_does_not_take_is_a_warning(lab, tmp_path):
    assert lab.run("full_finetune", tmp_path, checkpoint_every=1, keep_checkpoints=9, die_after=3).code == -9
    with largest_file(300_000):
        result = lab.run("full_finetune", tmp_path, checkpoint_every=1, keep_checkpoints=9)
    assert result.code == 0 and "at step 3 of 5" in result.err
    for step in (4, 5):
        assert f"warning: no checkpoint after step {step}: {tmp_path}/checkpoints/.step_000000{step}.tmp" in result.err
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))


def test_checkpoints_are_written_by_the_clock(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_TIMES", 0)
    saved = []
    real = checkpoint.Checkpoints.save

    def save(self, step, **notes):
        real(self, step, **notes)
        saved.append(step)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert lab.run("full_finetune", tmp_path / "often").code == 0
    assert saved == [1, 2, 3, 4, 5]
    monkeypatch.setattr(checkpoint, "_SECONDS", 600.0)
    assert lab.run("full_finetune", tmp_path / "end").code == 0
    assert saved[5:] == [5]  # before the result is saved
    assert lab.run("full_finetune", tmp_path / "never", checkpoint_every=0).code == 0
    assert saved[6:] == []
    settings = tmp_path / "settings.toml"
    settings.write_text("checkpoint_every = 1.5", encoding="utf-8")
    result = lab.run("full_finetune", tmp_path / "no", config=settings)
    assert "settings.toml line 1: checkpoint_every must be an integer or a string, found 1.5" in result.err
    for value in ("often", -1):
        result = lab.run("full_finetune", tmp_path / "no", checkpoint_every=value)
        assert result.code == 2 and 'checkpoint_every must be "auto" or a number of steps' in result.err


def test_two_runs_at_once(lab, tmp_path):
    with sole_writer(tmp_path):
        result = lab.run("full_finetune", tmp_path)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"error: {tmp_path} is in use by another run")
    assert lab.run("full_finetune", tmp_path).code == 0
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))


def test_two_ranks_stop_together_and_save_a_checkpoint_when_torchrun_is_told_to_end(lab, tmp_path, python):
    flags = lab.arguments("full_finetune", tmp_path, epochs=20)  # 68 steps
    process = lab.torchrun(python, lab.script("full_finetune"), flags)
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 100
    while (not log.exists() or len(log.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (step,) = map(int, re.findall(rf"{tmp_path}: step (\d+) of 68: stopped by SIGTERM; the same command goes on", err))
    assert len(lab.metrics(tmp_path)) == step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{step:07d}"]
    assert not (tmp_path / ".lock").exists() and "[rank1]" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_twice_is_one_wish_to_stop(lab, tmp_path, monkeypatch, number):
    real = loop._step

    def step(*arguments):  # as `timeout` does, and a service manager together with torchrun
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    before = signal.getsignal(number)
    monkeypatch.setattr(loop, "_step", step)
    result = lab.run("full_finetune", tmp_path)
    assert result.code == 128 + number and f"step 1 of 5: stopped by {number.name}; the same" in result.err
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    assert "at step 1 of 5" in lab.run("full_finetune", tmp_path).err
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))


def test_a_closed_terminal_is_survived(lab, tmp_path, monkeypatch):
    real, stderr = loop._step, os.dup(2)
    reader, writer = os.pipe()
    os.close(reader)

    def step(*arguments):
        os.dup2(writer, 2)  # what is written to it fails from now on
        os.kill(os.getpid(), signal.SIGHUP)
        return real(*arguments)

    monkeypatch.setattr(loop, "_step", step)
    try:
        assert lab.run("full_finetune", tmp_path).code == 128 + signal.SIGHUP
        assert os.write(2, b"lost") == 4
    finally:
        os.dup2(stderr, 2)
    monkeypatch.undo()
    assert "at step 1 of 5" in lab.run("full_finetune", tmp_path).err


def test_without_checkpoints_a_signal_says_what_is_lost(lab, tmp_path, monkeypatch):
    real = loop._step
    monkeypatch.setattr(loop, "_step", lambda *rest: (os.kill(os.getpid(), signal.SIGTERM), real(*rest))[1])
    result = lab.run("full_finetune", tmp_path, checkpoint_every=0)
    assert result.code == 143 and "step 1 of 5: stopped by SIGTERM; the same command goes on from" in result.err
    assert "or starts anew if there is none" in result.err and not (tmp_path / "checkpoints").exists()


def test_a_death_at_the_very_end_leaves_nothing_after_the_next_start(lab, tmp_path, monkeypatch):
    real = shutil.rmtree

    def half(folder, **rest):
        if folder.name != "checkpoints":
            return real(folder, **rest)
        (folder / "step_0000005" / "rank_00000.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.shutil, "rmtree", half)
        assert lab.run("full_finetune", tmp_path).code == 130
    (tmp_path / "model" / ".config.json.0123abcd.tmp").write_text("half")
    assert (tmp_path / "checkpoints").exists() and (tmp_path / "done.json").exists()
    result = lab.run("full_finetune", tmp_path)
    assert (result.code, result.out) == (0, f"{tmp_path}: finished already\n")
    lab.assert_as_if_nothing_happened(tmp_path, lab.reference("full_finetune"))
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("content", ["", "3", '{"seed": 1'])
def test_a_damaged_done_json_names_itself(lab, tmp_path, content):
    (tmp_path / "done.json").write_text(content)
    result = lab.run("full_finetune", tmp_path)
    assert result.code == 2 and result.err.startswith(f"error: {tmp_path}/done.json: ")


def test_how_a_path_is_spelt_does_not_matter(lab, tmp_path, monkeypatch):
    assert lab.run("full_finetune", tmp_path / "run", die_after=2, checkpoint_every=2).code == -9
    shutil.copytree(lab.folder / "model", tmp_path / "moved")
    shutil.copy(lab.folder / "train.jsonl", tmp_path / "renamed.jsonl")
    monkeypatch.chdir(tmp_path)
    result = lab.run("full_finetune", "run", model="moved", instructions="./renamed.jsonl")
    assert result.code == 0 and "at step 2 of 5" in result.err
    lab.assert_as_if_nothing_happened(tmp_path / "run", lab.reference("full_finetune"))
    assert "finished already" in lab.run("full_finetune", tmp_path / "run").out


def test_an_unfinished_run_may_go_on_with_another_dtype_for_its_result(lab, tmp_path):
    assert lab.run("expert_finetune", tmp_path, die_after=2, checkpoint_every=2).code == -9
    assert "at step 2 of 5" in lab.run("expert_finetune", tmp_path, save_dtype="bfloat16").err
    assert {tensor.dtype for tensor in lab.weights(tmp_path).values()} == {torch.bfloat16}
    assert "save_dtype was 'bfloat16', is 'float32'" in lab.run("expert_finetune", tmp_path, save_dtype="float32").err
