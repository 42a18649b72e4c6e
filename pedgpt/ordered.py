"""Work done in threads, whose results come in the order of the items, with a progress bar."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from pedgpt.files import printable

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    items: Iterable[T], work: Callable[[T], R], *, workers: int, desc: str = "", endpoints: Sequence[Any] = ()
) -> Iterator[R]:
    """`work` of each item, in the order of the items, done in `workers` threads; with 0, in this one.

    At most 4 × `workers` items are taken ahead of the last result. An exception is raised when the results before its
    item are given, and work in flight is finished. With `desc` a progress bar on stderr also shows `so_far()` of the
    `endpoints`; without threads it appears after three seconds.
    """
    often = 0.2 if sys.stderr.isatty() else 10  # seconds
    total = len(items) if isinstance(items, Sequence) else None
    with tqdm(desc=printable(desc), total=total, disable=not desc, mininterval=often, delay=0 if workers else 3) as bar:
        for result in _in_threads(items, work, workers) if workers else map(work, items):
            if desc and endpoints:
                bar.set_postfix_str(printable("; ".join(endpoint.so_far() for endpoint in endpoints)), refresh=False)
            bar.update()
            yield result


def _in_threads(items: Iterable[T], work: Callable[[T], R], workers: int) -> Iterator[R]:
    pool, flying = ThreadPoolExecutor(workers), deque[Future[R]]()
    try:
        for item in items:
            flying.append(pool.submit(work, item))
            if len(flying) == 4 * workers:  # so that one slow answer does not keep the others waiting
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:  # after Ctrl-C the endpoint is closed, which ends what is in flight
        pool.shutdown(isinstance(sys.exception(), Exception | None), cancel_futures=True)
