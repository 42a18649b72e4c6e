"""The scheduler against `generate`, one prompt at a time."""

import queue
import random
import threading

import pytest
import torch

from pedgpt.data import StreamDecoder
from pedgpt.models import generate
from pedgpt.serving.scheduler import Request

from .conftest import tiny


@pytest.fixture
def make_request(tokenizer):
    def make(prompt, max_tokens=20, model="base", stops=(), **settings):
        told, decoder = queue.Queue(), StreamDecoder(tokenizer, stops)

        def deliver(_, piece):
            told.put(piece)

        request = Request(model, list(prompt), max_tokens, decoder, frozenset({2}), deliver, **settings)
        request.told = told
        return request

    return make


def finished(request):
    """All pieces of a request, once it has ended."""
    found = [request.told.get(timeout=60)]
    while found[-1].finish is None:
        found.append(request.told.get(timeout=60))
    return found


def prompts(count, seed=0):
    rng = random.Random(seed)
    shared = [rng.randrange(5, 300) for _ in range(20)]
    ends = ([rng.randrange(5, 300) for _ in range(rng.randrange(1, 40))] for _ in range(count))
    return [shared[: rng.choice((0, 20))] + end for end in ends]


def test_greedy_answers_equal_those_of_each_request_alone(models, make_scheduler, make_request):
    """Slots, parts of prompts, shared beginnings and two models: an answer does not depend on who else is served."""
    scheduler, rng = make_scheduler(slots=5, queue=200, prefill=16), random.Random(1)
    requests = [make_request(p, rng.randrange(1, 40), rng.choice(("base", "experts"))) for p in prompts(30)]

    def client(part):
        for request in part:
            scheduler.submit([request])

    for number in range(4):
        threading.Thread(target=client, args=(requests[number::4],)).start()
    for request in requests:
        end, count = finished(request)[-1].finish, len(request.answer)
        with torch.no_grad():  # Each token is the likeliest one after those before it, in the model itself.
            logits = models[request.model](torch.tensor([[*request.prompt, *request.answer[:-1]]]))
        assert logits[0, -count:].argmax(-1).tolist() == request.answer and 2 not in request.answer[:-1]
        assert end == "stop" if request.answer[-1] == 2 else (end, count) == ("length", request.max_tokens)
    assert scheduler.counts["generated"] == sum(len(request.answer) for request in requests)
    assert scheduler.counts["cached"] > 75


def test_a_cancelled_request_frees_its_slot_within_a_step(make_scheduler, make_request):
    scheduler = make_scheduler(slots=1)
    long, short = make_request([5, 6], 120), make_request([7, 8], 1)
    scheduler.submit([long])
    long.told.get(timeout=10)
    scheduler.submit([short])
    before = len(long.answer)
    long.cancelled = True
    assert finished(short)[-1].finish in ("length", "stop")
    assert len(long.answer) <= before + 2 and finished(long)[-1].finish == "cancelled"


def test_sampled_answers_depend_on_the_seed_alone(make_scheduler, make_request):
    settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}
    answers = []
    for others in (0, 3):
        scheduler = make_scheduler()
        requests = [make_request([5, 6, 7], 15, seed=3, **settings)]
        requests += [make_request([8 + i], 30, seed=i, **settings) for i in range(others)]
        scheduler.submit(requests)
        finished(requests[0])
        answers.append(requests[0].answer)
    assert answers[0] == answers[1]
    other = make_request([5, 6, 7], 15, seed=4, **settings)
    scheduler.submit([other])
    finished(other)
    assert other.answer != answers[0]


def test_log_probabilities_match_the_models_own(models, make_scheduler, make_request):
    request = make_request([5, 6, 7, 8], 10, "experts", top_logprobs=3)
    make_scheduler().submit([request])
    for count, piece in enumerate(finished(request)):
        with torch.no_grad():
            text = torch.tensor([[*request.prompt, *request.answer[:count]]])
            expected = models["experts"](text)[0, -1].log_softmax(-1)
        assert piece.logprob == pytest.approx(expected[piece.token].item(), abs=1e-4)
        assert [token for token, _ in piece.top] == expected.topk(3).indices.tolist()
        assert [value for _, value in piece.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_what_fails_ends_alone_and_the_others_go_on(models, make_scheduler, make_request, capsys):
    scheduler = make_scheduler()
    good, bad = make_request([5, 6], 60), make_request([5, 6], 60, "experts")
    scheduler.models["experts"] = tiny()
    torch.nn.init.constant_(scheduler.models["experts"].model.norm.weight, float("nan"))
    scheduler.submit([good, bad])
    assert finished(bad)[-1].finish == "error"
    assert finished(good)[-1].finish in ("length", "stop")
    assert capsys.readouterr().err == "1 requests failed: ValueError\n"
    (alone,) = generate(models["base"], [[5, 6]], max_new_tokens=60, stop_tokens={2})
    assert [token for token in good.answer if token != 2] == alone


def test_a_long_prompt_does_not_stall_the_others(make_scheduler, make_request):
    scheduler = make_scheduler(prefill=8, slots=2)
    talking, long = make_request([5, 6], 100), make_request(range(5, 5 + 96), 2)
    scheduler.submit([talking])
    talking.told.get(timeout=10)
    at = len(talking.answer)
    scheduler.submit([long])
    finished(long)
    assert len(talking.answer) - at >= 96 // 8 - 3 or talking.answer[-1] == 2


def test_the_queue_has_an_end_and_a_closing_scheduler_takes_nothing(make_scheduler, make_request):
    scheduler = make_scheduler(slots=1, queue=2)
    running = make_request([5], 100)
    scheduler.submit([running])
    running.told.get(timeout=10)
    waiting = [make_request([6], 1) for _ in range(2)]
    scheduler.submit(waiting)
    with pytest.raises(queue.Full):
        scheduler.submit([make_request([7], 1)])
    scheduler.close(60)
    assert all(finished(one)[-1].finish in ("length", "stop") for one in (running, *waiting))
    with pytest.raises(queue.Full):
        scheduler.submit([make_request([7], 1)])


def test_a_scheduler_that_must_stop_tells_everyone(make_scheduler, make_request):
    scheduler = make_scheduler(slots=1)
    requests = [make_request([5], 120), make_request([6], 120)]
    scheduler.submit(requests)
    requests[0].told.get(timeout=10)
    scheduler.close(0)
    ends = [finished(one)[-1].finish for one in requests]
    assert ends[0] in ("cancelled", "stop") and ends[1] == "cancelled"


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(make_scheduler, make_request):
    scheduler = make_scheduler(slots=2)
    first = make_request(range(5, 45), 10)
    scheduler.submit([first])
    finished(first)
    other = make_request([200] * 30, 3)
    scheduler.submit([other])
    finished(other)
    held = [*first.prompt, *first.answer[:-1]]
    second = make_request([*held, 7, 8, 9], 5)
    scheduler.submit([second])
    finished(second)
    assert second.cached == len(held) and second.slot == first.slot != other.slot


def test_a_row_that_is_not_finite_ends_alone(models, make_scheduler, make_request, monkeypatch):
    scheduler = make_scheduler(slots=2)
    good, bad = make_request([5, 6], 30), make_request([7, 8], 30)
    real = scheduler.cache.step

    def step(model, rows, tokens):
        hidden = real(model, rows, tokens)
        if len(rows) == 2:
            hidden[1] = float("nan")
            scheduler.cache.values[:, rows[1], :, : len(scheduler.cache.ids[rows[1]])] = float("nan")
        return hidden

    monkeypatch.setattr(scheduler.cache, "step", step)
    scheduler.submit([good, bad])
    assert finished(bad)[-1].finish == "error" and finished(good)[-1].finish in ("stop", "length")
    monkeypatch.setattr(scheduler.cache, "step", real)
    again = make_request([5, 6], 30), make_request(range(7, 37), 30)  # The short one reads behind its own text.
    scheduler.submit(again)
    ends = [finished(request)[-1].finish for request in again]
    assert "error" not in ends and bad.slot in [request.slot for request in again]
    for request in (good, *again):
        (alone,) = generate(models["base"], [request.prompt], max_new_tokens=30, stop_tokens={2})
        assert [token for token in request.answer if token != 2] == alone
    assert scheduler.cache.values.isfinite().all()


def test_a_thread_that_ends_tells_everyone(make_scheduler, make_request, monkeypatch):
    scheduler = make_scheduler(slots=1)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(scheduler, "_take_turn", lambda: 1 / 0)
    requests = [make_request([5, 6], 30), make_request([7], 3)]
    scheduler.submit(requests)
    assert [finished(one)[-1].finish for one in requests] == ["error", "error"]
    with pytest.raises(queue.Full):
        scheduler.submit([make_request([7], 1)])


def test_an_error_before_a_slot_is_taken_leaves_the_others_alone(models, make_scheduler, make_request, monkeypatch):
    scheduler = make_scheduler(slots=2)
    running = [make_request([5, 6], 100), make_request([7, 8], 100)]
    scheduler.submit(running)
    running[1].told.get(timeout=10)
    real = scheduler._take_slot

    def fail(request):
        monkeypatch.setattr(scheduler, "_take_slot", real)
        raise MemoryError

    running[0].cancelled = True  # which frees a slot
    monkeypatch.setattr(scheduler, "_take_slot", fail)
    bad = make_request([9], 5)
    scheduler.submit([bad])
    assert finished(bad)[-1].finish == "error" and finished(running[1])[-1].finish in ("stop", "length")
    (alone,) = generate(models["base"], [[7, 8]], max_new_tokens=100, stop_tokens={2})
    assert [token for token in running[1].answer if token != 2] == alone


def test_a_slot_that_cannot_be_filled_ends_its_request_alone(make_scheduler, make_request, monkeypatch):
    scheduler = make_scheduler(slots=1)
    real = scheduler.cache.share

    def share(prompt, slot, sources):
        if prompt == [9, 9]:
            raise RuntimeError("out of memory")
        return real(prompt, slot, sources)

    monkeypatch.setattr(scheduler.cache, "share", share)
    bad, good = make_request([9, 9], 5), make_request([5, 6], 5)
    scheduler.submit([bad, good])
    assert finished(bad)[-1].finish == "error" and finished(good)[-1].finish in ("stop", "length")


def test_sizes_of_nothing_are_refused(make_scheduler):
    for name in ("slots", "prefill", "queue"):
        with pytest.raises(ValueError, match="at least 1"):
            make_scheduler(**{name: 0})
