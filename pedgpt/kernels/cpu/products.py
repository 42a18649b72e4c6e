"""Products on the CPU by oneDNN: in float32 where it is the faster library, and from weights in its blocked layout.

torch uses MKL for products in float32. Which library is faster depends on the processor
(`python benchmarks/bench_operators.py`). So the first large product measures both, in a new thread that neither a
compiler nor autograd sees. The libraries round differently: a run that must repeat its bits saves the result of
`settle()` and passes it to `use`. PEDGPT_CPU=always (oneDNN) or =never in the environment skips the measurement.

Decoding reads weights more than it computes. The layout lets a processor read them in order, which makes products of a
few rows up to twice as fast (`bench_generate.py`).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from timeit import timeit
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedgpt.files import available_memory
from pedgpt.kernels._dispatch import transformed

AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BFLOAT16: bool = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default if AVAILABLE else None
LIBRARY = "oneDNN"  # computes x Wᵀ and dy W. dyᵀ x is left to torch, because oneDNN was no faster there.
GAIN, ROUNDS = 1.1, 8  # oneDNN's fastest round must take 1/1.1 of the time of torch's; the first does not count.
# torch computes products of fewer multiplications, or of fewer rows, for which it does not pay to rearrange a weight.
FEWEST, FEWEST_ROWS = 2**26, 8
MAX_ROWS = 64  # With more rows, arithmetic bounds the products and the layout gains little.
LEAST = 2**17  # numbers of a weight, because for fewer the call costs what the layout gains
CACHED = 2**22  # numbers; fewer in all weights stay in the processor's cache, and one row gains nothing from the layout
_choice: dict[str, bool] = {}  # whether LIBRARY is used, once that is known
_ACTIVE = threading.local()  # `copies` of the weights: by address and shape, each with its weight


class Linear(nn.Linear):
    """An `nn.Linear` that multiplies with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b) [..., O] for x [..., D], weight [O, D], bias [O], in any strides: `F.linear` up to rounding."""
    if (found := packed_product(x, weight, bias)) is not None:
        return found
    fits = bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1])
    fits = fits and _suits(x, weight) and not torch.is_autocast_enabled("cpu")
    if not fits or not (_choice or settle())[LIBRARY]:
        return F.linear(x, weight, bias)  # It raises the error if shapes or dtypes do not fit.
    multiply = _Linear.apply if torch.is_grad_enabled() else _onednn
    return multiply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def sum_of_products(x: Tensor, weight: Tensor, h: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + h Bᵀ (+ b) [T, O] for x [T, D], W [O, D], and h [T, R], B = `up` [O, R] of few columns; without autograd.

    In half precision the small product comes first, so that the large one is rounded only once, as part of the sum. In
    float32 it comes second, because oneDNN adds slowly where R is small.
    """
    if x.element_size() > 2:
        return linear(x, weight, bias).addmm_(h, up.t())
    y = linear(h, up, bias)
    return y.addmm_(x, weight.t()) if (found := packed_product(x, weight, onto=y)) is None else found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = linear(dy, weight.t()) if needs_x else None  # `linear` has a derivative, for create_graph=True
        return dx, dy.t() @ x if needs_weight else None, dy.sum(0) if needs_bias else None


def refuse_create_graph(operator: str) -> None:
    """Raises RuntimeError under create_graph=True, because the caller's backward pass has no derivative."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operator} is differentiable once: no create_graph=True")


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is large enough for oneDNN, and oneDNN can compute it."""
    work = x.numel() * weight.shape[0] if weight.ndim == 2 and x.ndim and x.dtype == torch.float32 else 0
    # A compiler cannot follow oneDNN's operator, and torch.func and tensor subclasses do not support it.
    if not work or work < FEWEST or not AVAILABLE or transformed() or torch.jit.is_tracing():
        return False
    return bool(torch.backends.mkldnn.enabled) and all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.layout == torch.strided
        and t.device.type == "cpu" and t.shape[-1] == x.shape[-1] and t.numel() >= FEWEST_ROWS * t.shape[-1]
        for t in (x, weight)
    )  # fmt: skip


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
    return _multiply(x.contiguous(), weight, None if bias is None else bias.contiguous(), "none", [], "")


def settle() -> dict[str, bool]:
    """Whether oneDNN computes large products, which the first call measures unless PEDGPT_CPU decides."""
    if not _choice:
        fixed = _fixed()
        _choice[LIBRARY] = AVAILABLE and (_measured() if fixed is None else fixed)
    return dict(_choice)


def use(choices: dict[str, bool]) -> None:
    """Follow what `settle` gave elsewhere, unless PEDGPT_CPU decides; what it does not name is measured when needed."""
    _choice.clear()
    if _fixed() is None and LIBRARY in choices:
        _choice[LIBRARY] = AVAILABLE and choices[LIBRARY]


def _fixed() -> bool | None:
    value = os.environ.get("PEDGPT_CPU", "")
    if value not in ("", "always", "never"):
        raise ValueError(f'PEDGPT_CPU must be "always" or "never", or unset to measure, found {value!r}')
    return value == "always" if value else None


def _measured() -> bool:
    # A new thread would use the environment's number of threads.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as thread:
        try:
            return thread.submit(_wins).result()
        except RuntimeError:  # This machine lacks a form.
            return False


def _wins() -> bool:
    """Whether oneDNN is faster than torch in x Wᵀ and in dy W."""
    x, weight = (torch.full((rows, 512), 0.5, dtype=torch.float32, device="cpu") for rows in (128, 3072))
    for w in (weight, weight.t().contiguous().t()):
        forms = functools.partial(_onednn, x, w), functools.partial(torch.mm, x, w.t())
        rounds = [[timeit(form, number=1) for form in forms] for _ in range(ROUNDS)]
        ours, torchs = map(min, zip(*rounds[1:], strict=True))  # because other processes only add time
        if torchs < GAIN * ours:
            return False
    return True


class PackedWeights:
    """Copies of matrices [O, D] in the blocked layout, which products of `rows` rows read within a `with` block.

    There are none where they gain nothing, or would take more than half of the free memory.
    """

    def __init__(self, weights: Iterable[Tensor], rows: int) -> None:
        chosen = {(weight.data_ptr(), weight.shape): weight for weight in weights if _pays(weight, rows)}
        fit = 2 * sum(weight.nbytes for weight in chosen.values()) <= (available_memory() or 0)
        fit = fit and (rows > 1 or sum(weight.numel() for weight in chosen.values()) >= CACHED)
        # A weight is kept beside its copy, so that no other tensor gets its address.
        self.copies = {
            key: (w, torch.ops.mkldnn._reorder_linear_weight(w.detach(), rows)) for key, w in chosen.items() if fit
        }

    def __enter__(self) -> None:
        self.before, _ACTIVE.copies = getattr(_ACTIVE, "copies", {}), self.copies

    def __exit__(self, *_: object) -> None:
        _ACTIVE.copies = self.before


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor | None:
    """x Wᵀ (+ b), or y + x Wᵀ `onto` y, by a copy that is active in this thread; None if there is none of W."""
    copies = None if transformed() else getattr(_ACTIVE, "copies", None)
    if not copies or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    _, copy = copies.get((weight.data_ptr(), weight.shape), (None, None))
    fits = x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1] and weight.is_contiguous()
    fits = fits and (bias is None or (bias.dtype == x.dtype and len(bias) == len(weight)))
    if copy is None or not fits or x.numel() > MAX_ROWS * x.shape[-1]:
        return None
    if onto is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, onto, copy, None, "add")
    bias = None if bias is None else bias.contiguous()
    return _multiply(x, copy, bias, "none", [], "")


def _pays(weight: Tensor, rows: int) -> bool:
    """Whether oneDNN multiplies it from the layout on this processor."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and BFLOAT16)
    return known and rows <= MAX_ROWS and weight.numel() >= LEAST and AVAILABLE
