"""Which form of an operator a run computes with: the main rank decides, the checkpoints keep it."""

import json
import os
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pedgpt.kernels.cpu import products
from pedgpt.training import World, settle_run

WORLD = World(0, 1, torch.device("cpu"))


def chosen(output, world=WORLD, settled=None):
    """(what the run computes with, all that `use` was given)."""
    used = []
    settle = lambda: {"new float32 small": True, **used[-1]} if settled is None else settled  # noqa: E731
    with patch.multiple(products, settle=settle, use=used.append):
        settle_run(output, world)
    return used[-1], used


def store(output, state):
    folder = output / "checkpoints" / "step_0000003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state, encoding="utf-8")


def test_without_a_checkpoint_all_is_settled_anew(tmp_path):
    assert chosen(tmp_path) == (new := {"new float32 small": True}, [{}, new])


def test_those_of_the_last_checkpoint_are_followed_and_the_rest_is_settled(tmp_path):
    stored = {"a float32 small": False, "b float32 small": True}
    store(tmp_path, json.dumps({"step": 3, "run": {}, "choices": stored}))
    assert chosen(tmp_path) == (found := {"new float32 small": True, **stored}, [stored, found])


@pytest.mark.parametrize("state", ['{"step": 3, "run": {}}', '{"choices": 3}', "{", "[]"])
def test_a_checkpoint_without_choices_or_with_none_that_can_be_read_settles_anew_in_silence(tmp_path, state, capfd):
    store(tmp_path, state)
    assert chosen(tmp_path)[0] == {"new float32 small": True}
    assert capfd.readouterr() == ("", "")


def test_on_a_gpu_nothing_is_measured(tmp_path):
    def never():
        raise AssertionError

    with patch.multiple(products, settle=never):
        settle_run(tmp_path, World(0, 1, torch.device("cuda", 0)))


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    found = chosen(f"{folder}/output", world, {"a": rank == 0, "b": rank == 1})
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    while not os.path.exists(f"{folder}/{1 - rank}.json"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)


def test_ranks_follow_the_main_rank(tmp_path, start_ranks):
    start_ranks(worker, str(tmp_path))
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert main[0] == other[0] == main[1][-1] == other[1][-1] == {"a": True, "b": False}
