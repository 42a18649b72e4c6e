"""The counter of a plan: what it counts on tensors without numbers is what the same code holds on real ones."""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pedgpt.training.plan import Peak, counting, on_shapes


def test_what_is_alive_counts_until_nothing_refers_to_it():
    with counting() as counter:
        counter.at("first", "kept")
        kept = torch.empty(100)
        counter.at("first", "temporary")
        view = torch.zeros(50, dtype=torch.float64).view(5, 10)  # one storage of 400 bytes
        del view
        counter.at("second", "temporary")
        kept.add_(1)  # in place: nothing new
        assert counter.parts == {"kept": 400, "temporary": 0}
    assert counter.peaks["first"].parts == {"kept": 400, "temporary": 400}
    assert counter.peaks["first"].total == 800 and counter.peaks["second"].total == 400


def test_gradients_copies_and_held_bytes_have_parts_of_their_own():
    with torch.device("meta"):
        model = nn.Linear(8, 4, bias=False)
    with counting(lasting=["weights"], small=100) as counter:
        on_shapes(model)
        counter.claim(model.parameters(), "weights")
        counter.at("step", "activations", held=1000)
        x = torch.empty(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            assert counter.parts["copies"] == 64  # the weight in bfloat16, while autocast keeps it
        y.sum().backward()
        counter.claim([model.weight.grad], "gradients")
        counter.hold("held", 0)
    found = counter.parts
    assert (found["weights"], found["gradients"], found["held"]) == (128, 128, 0)
    assert counter.peaks["step"].parts["held"] == 1000
    assert counter.peaks["step"].small < 500  # neither weights nor what is larger than 100 bytes


def test_questions_about_values_get_the_answers_of_a_step_that_goes_well():
    with counting():
        x, labels = torch.empty(6, 3), torch.empty(6, dtype=torch.long)
        assert len((labels != -100).nonzero()) == 6  # every token is supervised
        assert labels[labels < 0].numel() == 0  # and no check finds a wrong one
        assert not x.isnan().any() and x.isfinite().all()
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
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
    with counting() as counter:
        assert on_shapes(model, torch.bfloat16)[1].weight is model[0].weight
        counter.claim(model.parameters(), "weights")
        assert counter.parts["weights"] == 2 * 20


def test_no_memory_is_taken():
    def resident() -> int:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    with counting() as counter:
        before = resident()
        counter.at("step", "activations")
        matrix = torch.zeros(2**17, 2**13)  # 4 GiB
        (matrix @ matrix.t()).exp()  # 64 GiB each
        assert resident() - before < 2**28
    assert counter.peaks["step"].total == 4 * 2**30 + 2 * 64 * 2**30
    gc.collect()


@pytest.mark.parametrize("times", [0, 3])
def test_a_peak_grows_by_what_it_grew(times):
    grown = Peak({"a": 30, "b": 7}, 5).grown(Peak({"a": 20}, 3), times)
    assert grown == Peak({"a": 30 + 10 * times, "b": 7 + 7 * times}, 5 + 2 * times)
