"""The measurement that chooses between oneDNN and torch's own library for products on the CPU."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.kernels import linear
from pedgpt.kernels.cpu import products


def prefers():
    return products.settle()[products.LIBRARY]


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The tests of this file measure; all others have PEDGPT_CPU=always."""
    assert os.environ["PEDGPT_CPU"] == "always"
    monkeypatch.delenv("PEDGPT_CPU")
    products.use({})
    yield
    monkeypatch.undo()
    products.use({})


class Clock:
    """Takes the place of `timeit`: the forms take so many seconds, or what a function of the count of calls says."""

    def __init__(self, monkeypatch, ours, torchs):
        self.threads, self.rounds = set(), []
        self.seconds = {"ours": ours, "torch's": torchs}
        monkeypatch.setattr(products, "timeit", self.timeit)

    def timeit(self, form, number):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and number == 1
        assert not torch.is_autocast_enabled("cpu") and type(torch.zeros(1)) is torch.Tensor
        self.threads.add(torch.get_num_threads())
        name = "ours" if form.func is products._onednn else "torch's"
        self.rounds.append(name)
        seconds = self.seconds[name]
        return seconds(len(self.rounds)) if callable(seconds) else seconds


@pytest.mark.parametrize(
    ("ours", "torchs", "wins"),
    [(1.0, 2.0, True), (1.0, 1.11, True), (1.0, 1.09, False), (1.0, 1.0, False), (2.0, 1.0, False)],
)
def test_ours_must_win_by_a_tenth(ours, torchs, wins, monkeypatch):
    clock = Clock(monkeypatch, ours, torchs)
    assert prefers() is wins and prefers() is wins
    assert clock.rounds == ["ours", "torch's"] * products.ROUNDS * (2 if wins else 1)  # in turn


@pytest.mark.parametrize("slow", [0, 1], ids=["x W^T", "dy W"])
def test_ours_must_win_both_kinds_of_product(slow, monkeypatch):
    later = 2 * products.ROUNDS
    Clock(monkeypatch, lambda call: 2.0 if (call > later) == bool(slow) else 1.0, 1.5)
    assert not prefers()


def test_the_first_round_and_rounds_that_were_disturbed_do_not_count(monkeypatch):
    Clock(monkeypatch, lambda call: 50.0 if call in (1, 5) else 1.0, lambda call: 1.2)
    assert prefers()


def test_it_measures_with_the_threads_of_the_program(monkeypatch):
    clock, before = Clock(monkeypatch, 1.0, 2.0), torch.get_num_threads()
    try:
        for threads in (1, 2):
            products.use({})
            torch.set_num_threads(threads)
            assert prefers() and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert clock.threads == {1, 2}


class Anything(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError("the measurement was seen")


def test_what_is_at_work_where_it_is_asked_does_not_reach_the_measurement(monkeypatch):
    Clock(monkeypatch, 1.0, 2.0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch._subclasses.FakeTensorMode():
        assert prefers()
    products.use({})
    with torch.no_grad(), torch.device("meta"), Anything():
        assert prefers()


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    assert set(products.settle()) == {products.LIBRARY}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_form_that_does_not_run_on_this_machine_is_torchs(monkeypatch):
    def lacks(form, number):
        raise RuntimeError("no such form")

    monkeypatch.setattr(products, "timeit", lacks)
    assert prefers() is False


def test_compilers_and_torch_func_do_not_measure(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    torch._dynamo.reset()
    torch.compile(linear, fullgraph=True, backend="aot_eager")(x.requires_grad_(), weight).sum().backward()
    torch.func.grad(lambda x: linear(x, weight).sum())(x.detach())
    with torch._subclasses.FakeTensorMode() as mode:
        linear(mode.from_tensor(x), mode.from_tensor(weight))
    assert not clock.rounds
    linear(x, weight)
    assert clock.rounds


@pytest.mark.parametrize("value", ["always", "never"])
def test_the_environment_decides_without_a_measurement(value, monkeypatch):
    clock = Clock(monkeypatch, 1.0, 1.0)
    monkeypatch.setenv("PEDGPT_CPU", value)
    assert prefers() is (value == "always")
    products.use({products.LIBRARY: value == "never"})
    assert prefers() is (value == "always") and not clock.rounds
    monkeypatch.setattr(products, "AVAILABLE", False)
    products.use({})
    assert not prefers()


@pytest.mark.parametrize("value", ["1", "Always", "sometimes"])
def test_another_word_in_the_environment_is_refused_with_the_two(value, monkeypatch):
    monkeypatch.setenv("PEDGPT_CPU", value)
    for ask in (products.settle, lambda: products.use({})):
        with pytest.raises(ValueError, match=f"PEDGPT_CPU must be \"always\" or \"never\".*found '{value}'"):
            ask()


def test_choices_come_back_through_json_and_are_followed(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    found = json.loads(json.dumps(products.settle()))
    assert found == {products.LIBRARY: True}
    clock.rounds.clear()
    products.use({products.LIBRARY: False, "gone": True})
    assert products.settle() == {products.LIBRARY: False} and not clock.rounds
    products.use({"gone": True})  # of an older version: chosen anew
    assert prefers() and clock.rounds
    monkeypatch.setattr(products, "AVAILABLE", False)
    products.use({products.LIBRARY: True})
    assert not prefers()


@pytest.mark.parametrize("transposed", [False, True])
def test_both_forms_of_a_product_compute_the_same(transposed):
    x, weight = torch.randn(128, 512), torch.randn(3072, 512)
    weight = weight.t().contiguous().t() if transposed else weight
    torch.testing.assert_close(products._onednn(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-4)


def test_linear_follows_the_choice(monkeypatch):
    x, weight = torch.randn(512, 512), torch.randn(512, 512)
    for ours in (True, False):
        calls = []
        monkeypatch.setattr(products, "_onednn", lambda x, w, b, calls=calls: calls.append(1) or F.linear(x, w, b))
        products.use({products.LIBRARY: ours})
        linear(x, weight)
        assert bool(calls) == ours
        calls.clear()
        linear(x[:7], weight), linear(x[:, :120], weight[:, :120])
        assert not calls  # Products of few rows and of few multiplications are torch's.
