"""The counter of a plan: what it counts on tensors without numbers is what the same code holds on real ones."""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pedgpt.training.plan import ACTIVATIONS, EXCHANGED, cards, counting, on_shapes, processes


def test_what_is_alive_counts_until_nothing_refers_to_it():
    with counting() as counter:
        kept = torch.empty(100)
        view = torch.zeros(50, dtype=torch.float64).view(5, 10)  # one storage of 400 bytes
        del view
        assert counter.total == 400 and counter.parts() == {ACTIVATIONS: 800}
        counter.begin()
        kept.add_(1)  # in place: nothing new
        assert counter.parts() == {ACTIVATIONS: 400}


def test_what_is_claimed_later_has_its_part_in_earlier_peaks_too():
    with torch.device("meta"):
        model = nn.Linear(8, 4, bias=False)
    with counting() as counter:
        on_shapes(model)
        counter.claim(model.parameters(), "weights")
        counter.begin()
        model(torch.empty(2, 8)).sum().backward()
        counter.claim([model.weight.grad, None], "gradients")
    found = counter.parts()
    assert found["weights"] == found["gradients"] == 128 and found[ACTIVATIONS] >= 64


def test_a_storage_that_is_resized_counts_with_its_new_size():
    """As FSDP2 frees the weights that it gathered."""
    with counting() as counter:
        gathered = torch.empty(100)
        gathered.untyped_storage().resize_(0)
        assert counter.total == 0
        counter.begin()
        gathered.untyped_storage().resize_(400)
    assert counter.parts() == {EXCHANGED: 400}


def test_questions_about_values_get_the_answers_of_a_step_that_goes_well():
    with counting():
        x, labels = torch.empty(6, 3), torch.empty(6, dtype=torch.long)
        assert len((labels != -100).nonzero()) == 6  # every token is supervised
        assert labels[labels < 0].numel() == 0  # and no check finds a wrong one
        assert not x.isnan().any()
        assert x.sum().item() == 1.0 and labels.sum().item() == 1
        assert x[labels].shape == (6, 3)


def test_code_is_told_of_a_gpu_only_where_one_is_planned():
    with counting(on_gpu=True):
        assert torch.empty(2).is_cuda and nn.Parameter(torch.empty(2)).is_cuda
    with counting():
        assert not torch.empty(2).is_cuda
    assert not torch.empty(2).is_cuda


def test_tied_parameters_stay_tied():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).to(torch.bfloat16)
        model[1].weight = model[0].weight
    with counting() as counter:
        on_shapes(model)
        assert model[1].weight is model[0].weight and counter.total == 2 * 20


def test_no_memory_is_taken():
    def resident() -> int:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    with counting() as counter:
        before = resident()
        counter.begin()
        matrix = torch.zeros(2**17, 2**13)  # 4 GiB
        (matrix @ matrix.t()).exp()  # 64 GiB each
        assert resident() - before < 2**28
    assert counter.parts() == {ACTIVATIONS: 4 * 2**30 + 2 * 64 * 2**30}
    gc.collect()


def test_other_processes_are_only_imagined():
    with processes(8) as world:
        assert (world.rank, world.size, torch.distributed.get_world_size()) == (0, 8, 8)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("plan", "found"), [("24", (1, 24)), ("8x80", (8, 80)), ("1x0.5", (1, 0.5))])
def test_cards(plan, found):
    assert cards(plan) == found


@pytest.mark.parametrize("plan", ["", "8*80", "0x80", "x80", "8x", "-1", "nan", "24 GB"])
def test_a_mistaken_plan_is_told_the_form(plan):
    with pytest.raises(ValueError, match=r'as "24", or also their number, as "8x80"'):
        cards(plan)
