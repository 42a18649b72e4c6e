"""Checkpoints: what was saved comes back, the last complete one is found, and nothing in one is run as code."""

import hashlib
import json
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pedgpt.files import DiskFull
from pedgpt.training import World, shard
from pedgpt.training import checkpoint as checkpoints
from pedgpt.training.checkpoint import Checkpoints, latest_checkpoint, prune_checkpoints, refuse_changes

WORLD = World(0, 1, torch.device("cpu"))
RUN = {"seed": 1, "数据": "甲"}


def save_checkpoint(folder, step, model, optimizer, run, world):
    Checkpoints(folder, 2, model, optimizer, run, world).save(step)


def load_checkpoint(checkpoint, model, optimizer, run, world):
    return Checkpoints(checkpoint.parent, 2, model, optimizer, run, world).load(checkpoint)


def make(seed, steps=3, width=5, classes=3):
    """A model with a frozen part, and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width).requires_grad_(False), nn.Linear(width, classes, bias=seed != 99))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = make(0)
    save_checkpoint(tmp_path, 3, model, optimizer, RUN, WORLD)
    return tmp_path / "step_0000003"


def test_weights_and_moments_come_back_bit_for_bit(saved):
    model, optimizer = make(0)
    other, other_optimizer = make(1, steps=0)
    frozen = other[0].weight.clone()
    assert load_checkpoint(saved, other, other_optimizer, RUN, WORLD)["step"] == 3
    assert torch.equal(other[0].weight, frozen)  # what does not train is no part of a checkpoint
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight)
        other[0].bias.copy_(model[0].bias)
    for _ in range(2):  # the same next steps need the same moments and the same count of steps
        x = torch.randn(2, 4)
        for one, its in ((model, optimizer), (other, other_optimizer)):
            one(x).square().sum().backward()
            its.step()
            its.zero_grad()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), DiskFull)]
)
def test_a_checkpoint_appears_only_when_complete(tmp_path, saved, monkeypatch, error, told):
    def half(tensors, handle):
        handle.write(b"half")
        raise error

    model, optimizer = make(0)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoints.torch, "save", half)
        with pytest.raises(told):
            save_checkpoint(tmp_path, 4, model, optimizer, RUN, WORLD)
    assert latest_checkpoint(tmp_path) == saved and not (tmp_path / "step_0000004").exists()
    # The next save takes over what is left of the broken one.
    save_checkpoint(tmp_path, 4, model, optimizer, RUN, WORLD)
    assert load_checkpoint(tmp_path / "step_0000004", *make(1, steps=0), RUN, WORLD)["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000003", "step_0000004"]


def test_saving_a_step_again_replaces_it(tmp_path, saved):
    model, optimizer = make(7)
    save_checkpoint(tmp_path, 3, model, optimizer, RUN, WORLD)
    other, other_optimizer = make(1, steps=0)
    load_checkpoint(saved, other, other_optimizer, RUN, WORLD)
    assert torch.equal(other[1].weight, model[1].weight)


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("names", "latest"),
    [
        ((), None),
        (("step_0000009", "step_0000010", "step_0000002"), "step_0000010"),
        ((".step_0000009.tmp", "step_0000008"), "step_0000008"),
        ((".step_0000009.tmp",), None),
        (("step_0000008", "step_0000009_copy", "step_9", "step_final", "steps"), "step_0000008"),
    ],
)
def test_latest_is_the_complete_checkpoint_of_the_highest_step(tmp_path, names, latest):
    folders(tmp_path, *names)
    assert latest_checkpoint(tmp_path) == (tmp_path / latest if latest else None)
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (3, [5, 20, 30]), (9, [5, 20, 30])])
def test_pruning_keeps_the_last_ones_and_what_is_no_checkpoint(tmp_path, keep, left):
    folders(tmp_path, *(f"step_{step:07d}" for step in (20, 5, 30)))
    folders(tmp_path, ".step_0000031.tmp/inner", "step_0000030_copy", "mine")
    prune_checkpoints(tmp_path, keep)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"step_{step:07d}" for step in left), "step_0000030_copy", "mine",
    }  # fmt: skip


def test_changes_are_refused_by_name():
    refuse_changes({"a": 1, "b": [1]}, {"b": [1], "a": 1}, Path("x"))
    refuse_changes({"a": 1}, {"a": 1, "a_later_switch": False}, Path("x"))
    with pytest.raises(ValueError, match="a_later_switch was None, is True"):
        refuse_changes({"a": 1}, {"a": 1, "a_later_switch": True}, Path("x"))
    with pytest.raises(ValueError) as error:
        refuse_changes({"rate": 0.1, "same": 1, "gone": 2}, {"rate": 0.2, "same": 1, "more": "甲"}, Path("run"))
    assert str(error.value) == (
        "run belongs to a run with other settings: gone was 2, is None; more was None, is '甲'; rate was 0.1, is 0.2. "
        "Go back to those, choose another --output, or delete the folder to start anew"
    )


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(saved):
    model, optimizer = make(1, steps=0)
    before = model[1].weight.clone()
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        load_checkpoint(saved, model, optimizer, {**RUN, "seed": 2}, WORLD)
    assert torch.equal(model[1].weight, before)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Call(torch.load, str(mark)),
        lambda mark: Call(Path.touch, mark),
    ],
    ids=["system", "eval", "load", "method"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_names_code_is_refused_and_nothing_runs(saved, tmp_path, payload, zipped):
    mark = tmp_path / "ran"
    if zipped:
        torch.save({"model.1.weight": payload(mark)}, saved / "rank_00000.pt")
    else:
        (saved / "rank_00000.pt").write_bytes(pickle.dumps(payload(mark)))
    sign(saved)
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(saved, *make(1, steps=0), RUN, WORLD)
    assert not mark.exists()


def sign(checkpoint):
    """Make the checksums those of the files as they are, so that what comes after them is tested."""
    sums = json.loads((checkpoint / "checksums.json").read_text())
    for name in sums:
        sums[name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["rank_00000.pt", "state.json", "checksums.json"])
@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\x80garbage" * 999), Path.unlink,
     lambda path: path.write_bytes(pickle.dumps({"step": 3}))],
    ids=["cut", "empty", "garbage", "missing", "other"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_an_error_in_one_line_that_names_it(saved, file, damage, capfd):
    damage(saved / file)
    with pytest.raises(ValueError) as error:
        load_checkpoint(saved, *make(1, steps=0), RUN, WORLD)
    message = str(error.value)
    assert message.startswith(str(saved)) and "cannot be read" in message and "\n" not in message
    assert not message.endswith("()") and capfd.readouterr().err == ""


def test_every_flipped_bit_of_a_checkpoint_is_found(saved):
    random.seed(1)
    for file in sorted(saved.iterdir()):
        content = file.read_bytes()
        for place in {0, len(content) - 1, *(random.randrange(len(content)) for _ in range(30))}:
            flipped = bytearray(content)
            flipped[place] ^= 1 << random.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match="cannot be read") as error:
                load_checkpoint(saved, *make(1, steps=0), RUN, WORLD)
            assert str(error.value).startswith(str(saved)) and f"rm -r '{saved}'" in str(error.value)
        file.write_bytes(content)
    assert load_checkpoint(saved, *make(1, steps=0), RUN, WORLD)["step"] == 3


def test_ranks_that_share_the_reading_leave_no_file_unread(saved, monkeypatch):
    """Each rank takes every n-th file, so all need the same order; that of a set differs from process to process."""
    sums = json.loads((saved / "checksums.json").read_text())
    for rank in range(1, 9):
        torch.save({}, saved / f"rank_{rank:05d}.pt")
        sums[f"rank_{rank:05d}.pt"] = ""
    (saved / "checksums.json").write_text(json.dumps(sums))
    sign(saved)
    read, real = [], checkpoints._checksum
    monkeypatch.setattr(checkpoints, "_checksum", lambda path: read.append(path.name) or real(path))
    assert load_checkpoint(saved, *make(1, steps=0), RUN, WORLD)["step"] == 3
    assert read == ["state.json", *sorted(sums.keys() - {"state.json"})]


def ranks_worker(rank, ranks, folder, saves):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
    world = World(rank, ranks, WORLD.device)
    model, optimizer = made_split(world)
    if saves:
        steps(model, optimizer)
        save_checkpoint(Path(folder), 1, model, optimizer, RUN, world)
    else:
        load_checkpoint(Path(folder) / "step_0000001", model, optimizer, RUN, world)
    found = {name: value.full_tensor() for name, value in model.named_parameters()}
    found |= {f"{n} moment": optimizer.state[value]["exp_avg"].full_tensor() for n, value in model.named_parameters()}
    if rank == 0:
        torch.save(found, f"{folder}/{ranks}.pt")
    open(f"{folder}/{ranks}.{rank}", "w").close()
    while not all(os.path.exists(f"{folder}/{ranks}.{other}") for other in range(ranks)):
        time.sleep(0.01)
    os._exit(0)


def made_split(world):
    """Five rows, so that of three ranks the last has one, and one row, which only the first has."""
    torch.manual_seed(world.size)
    model = shard(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)), [], world, torch.float32)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def steps(model, optimizer):
    for _ in range(2):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_checkpoint_of_three_ranks_serves_two_and_one_bit_for_bit(tmp_path, start_ranks):
    start_ranks(ranks_worker, 3, str(tmp_path), True, ranks=3)
    start_ranks(ranks_worker, 2, str(tmp_path), False, ranks=2)
    three, two = torch.load(tmp_path / "3.pt"), torch.load(tmp_path / "2.pt")
    model, optimizer = made_split(WORLD)
    load_checkpoint(tmp_path / "step_0000001", model, optimizer, RUN, WORLD)
    one = dict(model.named_parameters())
    one |= {f"{name} moment": optimizer.state[value]["exp_avg"] for name, value in model.named_parameters()}
    assert three.keys() == two.keys() == one.keys()
    assert all(torch.equal(three[name], two[name]) and torch.equal(three[name], one[name]) for name in three)


@pytest.mark.parametrize(
    ("chosen", "named"),
    [({"width": 6}, "must match"), ({"classes": 2}, "1.weight has 2 rows, and 3 are saved"), ({"seed": 99}, None)],
)
def test_a_checkpoint_of_another_model_is_refused(saved, chosen, named):
    other = make(**{"seed": 1, "steps": 0, **chosen})
    if named is None:  # fewer tensors than saved: the rest is left alone
        assert load_checkpoint(saved, *other, RUN, WORLD)["step"] == 3
    else:
        with pytest.raises(ValueError, match=named):
            load_checkpoint(saved, *other, RUN, WORLD)


def test_the_state_is_readable(saved):
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    assert state["run"].items() >= {**RUN, "optimizer": "AdamW"}.items() and state["step"] == 3
