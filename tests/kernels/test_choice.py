"""The measurement that chooses between oneDNN and torch's own library for products on the CPU."""

import json
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.kernels import linear
from pedgpt.kernels.cpu import products

KIND = products.KINDS[0]


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
    """A clock that only the forms move on, and forms that take so many seconds."""

    def __init__(self, monkeypatch, ours, torchs):
        self.now, self.made, self.threads = 0.0, 0, set()
        self.rounds = []
        self.seconds = {"ours": ours, "torch's": torchs}
        monkeypatch.setattr(products.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(products, "_forms", self.forms)

    def forms(self, kind):
        self.made += 1
        return (lambda: self.run("ours")), (lambda: self.run("torch's"))

    def run(self, form):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu") and type(torch.zeros(1)) is torch.Tensor
        self.threads.add(torch.get_num_threads())
        self.rounds.append(form)
        seconds = self.seconds[form]
        self.now += seconds(len(self.rounds)) if callable(seconds) else seconds


@pytest.mark.parametrize(
    ("ours", "torchs", "wins"),
    [(1.0, 2.0, True), (1.0, 1.11, True), (1.0, 1.09, False), (1.0, 1.0, False), (2.0, 1.0, False)],
)
def test_ours_must_win_by_a_tenth(ours, torchs, wins, monkeypatch):
    clock = Clock(monkeypatch, ours, torchs)
    assert products.prefer(KIND) is wins and products.prefer(KIND) is wins
    assert clock.made == 1 and clock.rounds == ["ours", "torch's"] * products.ROUNDS  # in turn


def test_the_first_round_and_rounds_that_were_disturbed_do_not_count(monkeypatch):
    Clock(monkeypatch, lambda round: 50.0 if round in (1, 5) else 1.0, lambda round: 1.2)
    assert products.prefer(KIND)


def test_it_measures_with_the_threads_of_the_program(monkeypatch):
    clock, before = Clock(monkeypatch, 1.0, 2.0), torch.get_num_threads()
    try:
        for threads in (1, 2):
            products.use({})
            torch.set_num_threads(threads)
            assert products.prefer(KIND) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert clock.threads == {1, 2}


def test_threads_that_ask_at_once_measure_once(monkeypatch):
    clock, found = Clock(monkeypatch, 1.0, 2.0), []
    threads = [threading.Thread(target=lambda: found.append(products.prefer(KIND))) for _ in range(8)]
    numbers = torch.get_num_threads()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(numbers)
    assert found == [True] * 8 and clock.made == 1


class Anything(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError("the measurement was seen")


def test_what_is_at_work_where_it_is_asked_does_not_reach_the_measurement(monkeypatch):
    Clock(monkeypatch, 1.0, 2.0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch._subclasses.FakeTensorMode():
        assert products.prefer(KIND)
    products.use({})
    with torch.no_grad(), torch.device("meta"), Anything():
        assert products.prefer(KIND)


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    assert set(products.settle()) == set(products.KINDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_form_that_does_not_run_on_this_machine_is_torchs(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    monkeypatch.setattr(clock, "run", lambda form: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert products.prefer(KIND) is False


def test_compilers_and_torch_func_do_not_measure(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    torch._dynamo.reset()
    torch.compile(linear, fullgraph=True, backend="aot_eager")(x.requires_grad_(), weight).sum().backward()
    torch.func.grad(lambda x: linear(x, weight).sum())(x.detach())
    assert clock.made == 0
    linear(x, weight)
    assert clock.made == 1


@pytest.mark.parametrize("value", ["always", "never"])
def test_the_environment_decides_without_a_measurement(value, monkeypatch):
    clock = Clock(monkeypatch, 1.0, 1.0)
    monkeypatch.setenv("PEDGPT_CPU", value)
    assert products.prefer(KIND) is (value == "always")
    products.use({KIND: value == "never"})
    assert set(products.settle().values()) == {value == "always"} and clock.made == 0
    monkeypatch.setattr(products, "AVAILABLE", False)
    products.use({})
    assert set(products.settle().values()) == {False}


@pytest.mark.parametrize("value", ["1", "Always", "sometimes"])
def test_another_word_in_the_environment_is_refused_with_the_two(value, monkeypatch):
    monkeypatch.setenv("PEDGPT_CPU", value)
    for ask in (lambda: products.prefer(KIND), products.settle, lambda: products.use({})):
        with pytest.raises(ValueError, match=f"PEDGPT_CPU must be \"always\" or \"never\".*found '{value}'"):
            ask()


def test_choices_come_back_through_json_and_are_followed(monkeypatch, capsys):
    clock = Clock(monkeypatch, 1.0, 2.0)
    found = json.loads(json.dumps(products.settle()))
    assert found == dict.fromkeys(products.KINDS, True) and clock.made == 2
    given = {**dict.fromkeys(products.KINDS, False), "gone": False}
    products.use(given)
    assert products.settle() == dict.fromkeys(products.KINDS, False) and clock.made == 2
    del given[KIND]  # of an older version: chosen anew, in silence
    products.use(given)
    assert products.prefer(KIND) and clock.made == 3 and not capsys.readouterr().err


def test_a_choice_that_this_machine_lacks_is_warned_of_once(monkeypatch, capsys):
    products.use({"gone": True, "gone too": True})
    assert capsys.readouterr().err.count("warning") == 1
    monkeypatch.setattr(products, "AVAILABLE", False)
    products.use({KIND: True})
    assert KIND in capsys.readouterr().err and not products.prefer(KIND)


@pytest.mark.parametrize("kind", products.KINDS)
def test_both_forms_of_a_product_compute_the_same(kind):
    ours, torchs = (form() for form in products._forms(kind))
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-4)


def test_linear_follows_the_choice(monkeypatch):
    x, weight = torch.randn(512, 512), torch.randn(512, 512)
    for ours in (True, False):
        calls = []
        monkeypatch.setattr(products, "_onednn", lambda x, w, b, calls=calls: calls.append(1) or F.linear(x, w, b))
        products.use(dict.fromkeys(products.KINDS, ours))
        linear(x, weight)
        assert bool(calls) == ours
        calls.clear()
        linear(x[:7], weight), linear(x[:, :120], weight[:, :120])
        assert not calls  # Products of few rows and of few multiplications are torch's.
