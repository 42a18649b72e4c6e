"""The probe that chooses between our form of an operator on the CPU and torch's."""

import json
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.kernels import linear
from pedgpt.kernels.cpu import choice, products

KEY = ("test", torch.float32, "small")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The tests of this file measure; all others have PEDGPT_CPU=always."""
    assert os.environ["PEDGPT_CPU"] == "always"
    monkeypatch.delenv("PEDGPT_CPU")
    choice.use({})
    yield
    monkeypatch.undo()
    choice.use({})


class Clock:
    """A clock that only the forms move on, and a candidate whose forms take so many seconds."""

    def __init__(self, monkeypatch, ours, torchs):
        self.now, self.made, self.threads = 0.0, 0, set()
        self.rounds = []
        self.seconds = {"ours": ours, "torch's": torchs}
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)
        monkeypatch.setitem(choice.CANDIDATES, KEY, self.forms)

    def forms(self):
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
    assert choice.prefer(*KEY) is wins and choice.prefer(*KEY) is wins
    assert clock.made == 1 and clock.rounds == ["ours", "torch's"] * 4  # in turn


def test_the_first_round_and_rounds_that_were_disturbed_do_not_count(monkeypatch):
    Clock(monkeypatch, lambda round: 50.0 if round in (1, 5) else 1.0, lambda round: 1.2)
    assert choice.prefer(*KEY)


def test_short_forms_run_several_times_and_not_for_ever(monkeypatch):
    clock = Clock(monkeypatch, 0.004, 0.004)
    choice.prefer(*KEY)
    assert len(clock.rounds) == 14  # 0.05 s
    clock = Clock(monkeypatch, 0.0, 0.0)
    choice.use({})
    choice.prefer(*KEY)
    assert len(clock.rounds) == 32


def test_another_number_of_threads_is_another_situation(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert choice.prefer(*KEY) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert clock.made == 2 and clock.threads == {1, 2}


def test_threads_that_ask_at_once_measure_once(monkeypatch):
    clock, found = Clock(monkeypatch, 1.0, 2.0), []
    threads = [threading.Thread(target=lambda: found.append(choice.prefer(*KEY))) for _ in range(8)]
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
        assert choice.prefer(*KEY)
    choice.use({})
    with torch.no_grad(), torch.device("meta"), Anything():
        assert choice.prefer(*KEY)


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    assert len(choice.settle()) == len(choice.CANDIDATES)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_form_that_does_not_run_on_this_machine_is_torchs(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    monkeypatch.setattr(clock, "run", lambda form: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert choice.prefer(*KEY) is False


def test_compilers_and_torch_func_do_not_measure(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 2.0)
    monkeypatch.setattr(products, "KINDS", ("test",) * 2)
    monkeypatch.setitem(choice.CANDIDATES, ("test", torch.float32, "medium"), clock.forms)
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    torch._dynamo.reset()
    torch.compile(linear, fullgraph=True, backend="aot_eager")(x.requires_grad_(), weight).sum().backward()
    torch.func.grad(lambda x: linear(x, weight).sum())(x.detach())
    assert not choice.prefer("unknown", torch.float32, "small") and clock.made == 0
    linear(x, weight)
    assert clock.made == 1


@pytest.mark.parametrize("value", ["always", "never"])
def test_the_environment_decides_without_a_measurement(value, monkeypatch):
    clock = Clock(monkeypatch, 1.0, 1.0)
    monkeypatch.setenv("PEDGPT_CPU", value)
    assert choice.prefer(*KEY) is (value == "always")
    choice.use({"test float32 small": value == "never"})
    assert set(choice.settle().values()) == {value == "always"} and clock.made == 0
    assert not choice.prefer("unknown", torch.float32, "small")


@pytest.mark.parametrize("value", ["1", "Always", "sometimes"])
def test_another_word_in_the_environment_is_refused_with_the_two(value, monkeypatch):
    monkeypatch.setenv("PEDGPT_CPU", value)
    for ask in (lambda: choice.prefer(*products_key()), choice.settle, lambda: choice.use({})):
        with pytest.raises(ValueError, match=f"PEDGPT_CPU must be \"always\" or \"never\".*found '{value}'"):
            ask()


def products_key():
    return products.KINDS[0], torch.float32, "small"


def test_choices_come_back_through_json_and_are_followed(monkeypatch, capsys):
    clock = Clock(monkeypatch, 1.0, 2.0)
    found = json.loads(json.dumps(choice.settle()))
    assert found["test float32 small"] is True and len(found) == len(choice.CANDIDATES)
    given = {**{name: not ours for name, ours in found.items()}, "gone float32 large": False}
    choice.use(given)
    assert not choice.prefer(*KEY) and clock.made == 1
    assert choice.settle() == {name: not ours for name, ours in found.items()}
    assert not capsys.readouterr().err
    del given["test float32 small"]  # of an older version: chosen anew, in silence
    choice.use(given)
    assert choice.prefer(*KEY) and clock.made == 2 and not capsys.readouterr().err


def test_a_choice_that_this_machine_lacks_is_warned_of_once(capsys):
    choice.use({"gone float32 large": True, "gone float32 small": True})
    assert capsys.readouterr().err.count("warning") == 1
    assert not choice.prefer("gone", torch.float32, "large")


@pytest.mark.parametrize("key", choice.CANDIDATES, ids=lambda key: choice._name(key))
def test_both_forms_of_every_candidate_compute_the_same(key):
    ours, torchs = (form() for form in choice.CANDIDATES[key]())
    for a, b in zip(flat(ours), flat(torchs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]


def test_linear_follows_the_choice(monkeypatch):
    x, weight = torch.randn(512, 512), torch.randn(512, 512)
    for ours in (True, False):
        calls = []
        monkeypatch.setattr(products, "_onednn", lambda x, w, b, calls=calls: calls.append(1) or F.linear(x, w, b))
        choice.use({choice._name(key): ours for key in choice.CANDIDATES})
        linear(x, weight)
        assert bool(calls) == ours
        calls.clear()
        linear(x[:7], weight), linear(x[:, :120], weight[:, :120])
        assert not calls  # Products of few rows and of few multiplications are torch's.
