"""Which form of an operator runs on this processor: ours, or torch's own unless ours is measured to be faster.

The measurement is made at first use, on operands of its own and in a thread of its own: so neither a compiler nor
autograd sees it. The forms round differently, so a run that must repeat its bits keeps `choices` and gives them to
`use`. The environment variable PEDGPT_CPU=always or =never decides in place of the measurement.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from pedgpt.kernels._transforms import transformed, without_numbers

GAIN, SECONDS = 1.1, 0.05  # Ours must be so many times as fast; a measurement takes so long, or three rounds.

Key = tuple[str, torch.dtype, str]  # operator, dtype, size class
Form = Callable[[], object]
# Each operator adds here, beside its code, what makes operands and returns its two forms, ours and torch's.
CANDIDATES: dict[Key, Callable[[], tuple[Form, Form]]] = {}
_given: dict[Key, bool] = {}
_measured: dict[tuple[Key, int], bool] = {}  # The number of threads belongs to the situation.
_lock = threading.Lock()


def prefer(operator: str, dtype: torch.dtype, size: str) -> bool:
    """Whether our form of `operator` runs, and not torch's; never under a compiler or torch.func."""
    if transformed() or without_numbers():
        return not transformed()
    key = operator, dtype, size
    if key in _given:
        return _given[key]
    situation = key, torch.get_num_threads()
    if situation not in _measured:
        with _lock:  # Several threads of autograd may ask at once.
            if situation not in _measured:
                _measured[situation] = _decide(*situation)
    return _measured[situation]


def settle() -> dict[str, bool]:
    """Whether our form runs, by operator, dtype and size class; what is not decided yet is decided now."""
    return {_name(key): prefer(*key) for key in CANDIDATES}


def use(choices: dict[str, bool]) -> None:
    """Follow `choices` and forget what was measured; what they do not name is measured at its next use.

    A warning names a form that this machine lacks: then the last bits differ from those of the run that chose it.
    """
    fixed = _fixed()
    with _lock:
        _measured.clear()
        _given.clear()
        _given.update({key: choices[_name(key)] for key in CANDIDATES if fixed is None and _name(key) in choices})
    lacking = {name for name, ours in choices.items() if ours} - {_name(key) for key in CANDIDATES}
    if lacking:
        print(f"warning: {min(lacking)}: this machine lacks the form of the run; last bits differ", file=sys.stderr)


def _name(key: Key) -> str:
    return f"{key[0]} {str(key[1]).removeprefix('torch.')} {key[2]}"


def _fixed() -> bool | None:
    value = os.environ.get("PEDGPT_CPU", "")
    if value not in ("", "always", "never"):
        raise ValueError(f'PEDGPT_CPU must be "always" or "never", or unset to measure, found {value!r}')
    return value == "always" if value else None


def _decide(key: Key, threads: int) -> bool:
    if (fixed := _fixed()) is not None or key not in CANDIDATES:
        return bool(fixed) and key in CANDIDATES
    rounds: list[list[float]] = []  # seconds of ours and of torch's

    def measure() -> None:
        torch.set_num_threads(threads)  # A new thread begins with the number of the environment.
        forms, until = CANDIDATES[key](), time.perf_counter() + SECONDS
        while len(rounds) < 4 or (len(rounds) < 16 and time.perf_counter() < until):
            rounds.append([])
            for form in forms:
                began = time.perf_counter()
                form()
                rounds[-1].append(time.perf_counter() - began)

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    if len(rounds) < 4:  # A form does not run on this machine, and the thread has printed why.
        return False
    # The first round warms up. Of the others the fastest counts, because other processes only make a round longer.
    ours, torchs = (min(seconds) for seconds in zip(*rounds[1:], strict=True))
    return torchs >= GAIN * ours
