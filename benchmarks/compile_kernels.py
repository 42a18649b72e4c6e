"""Compile every Triton kernel of pedgpt for an H100 (sm_90); it needs Triton's wheel and no GPU.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --switches  # a third of them, in which each switch of each kernel occurs

Each operator below is called as the library calls it, and whatever it would launch is compiled with the same arguments
and settings instead. Printed are, for each kernel and case, registers a thread, bytes spilled, shared memory and warps.
Exit code 1: a kernel spills, needs more shared memory than a program may have, or is compiled by no case.

To add a kernel, add calls of its operator to `cases`, the largest first. NOTE: Triton is imported before pedgpt,
because with a torch that has no GPU pedgpt leaves it out unless it is loaded already.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

from pedgpt import kernels
from pedgpt.kernels import linear_logps, lora_linear, optimizer, pointwise, quantized

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of shared memory that a program may have on sm_90
TOKENS, DTYPES = 32, (torch.bfloat16, torch.float32)


def cases() -> Iterator[tuple[torch.dtype, str, Callable[[], Any]]]:
    """(dtype, what is called, the call) of every operator, for the shapes of Baichuan2 and Llama."""
    for dtype in DTYPES:
        for operator in (
            pointwise_cases, head_cases, expert_cases, variant_cases, quantized_cases, optimizer_cases,
        ):  # fmt: skip
            for what, call in operator(dtype):
                yield dtype, what, call


def pointwise_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    for width in (8192, 4096, 128):
        x, weight = random(TOKENS, width, dtype=dtype), random(width, dtype=dtype)
        yield f"norm {width}", trained(lambda *t: pointwise.rms_norm(*t, 1e-5, impl="triton"), x, weight)
        both = functools.partial(pointwise.add_rms_norm, eps=1e-5, impl="triton")
        yield f"norm {width} of a sum", trained(lambda *t, both=both: both(*t), x, x, weight)
        frozen = weight.detach()
        yield f"norm {width}, frozen", trained(lambda *t, both=both, frozen=frozen: both(*t, frozen), x, x)
    with_master = [random(TOKENS, 4096, dtype=d) for d in (torch.bfloat16, torch.float32)]
    yield "norm 4096, autocast", trained(
        lambda *t: pointwise._RMSNorm.apply(*t, 1e-5, torch.bfloat16, pointwise._norm_triton),
        *with_master, random(4096, dtype=torch.float32),
    )  # fmt: skip
    for heads, groups, size in ((64, 8, 128), (32, 32, 128), (32, 8, 128), (16, 2, 64)):
        q, k = random(2, TOKENS, heads, size, dtype=dtype), random(2, TOKENS, groups, size, dtype=dtype)
        table = random(2, 1, TOKENS, size, dtype=dtype).detach()
        yield (
            f"{heads} and {groups} heads of {size}",
            trained(lambda *t, table=table: pointwise.rotary(*t, table, table, impl="triton"), q, k),
        )
    halves = random(TOKENS, 2 * 13696, dtype=dtype).chunk(2, -1)
    yield "13696, halves of one product", trained(lambda *t: pointwise.swiglu(*t, impl="triton"), *halves)


def head_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    labels, stats = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(3, TOKENS)
    for vocabulary in (125_696, 32_000):
        logits, factors, inverse = torch.zeros(TOKENS, vocabulary, dtype=dtype), stats[0], torch.ones(vocabulary)
        for head, lengths in (("head", None), ("NormHead", inverse)):
            for what, given in (("values", None), ("gradients", factors)):
                yield (
                    f"{head} {vocabulary}, {what}",
                    functools.partial(linear_logps._softmax_triton, logits, labels, lengths, given, stats),
                )


def expert_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    for rank, experts in ((64, 3), (16, 3), (8, 3), (64, 0), (16, 0)):
        x, weight = random(TOKENS, 1024, dtype=dtype), random(512, 1024, dtype=dtype)
        lora = [random((experts + 1) * rank, 1024, dtype=dtype), random(512, (experts + 1) * rank, dtype=dtype)]
        name = f"rank {rank}, " + (f"E {experts + 1}" if experts else "LoRA")
        gate = {} if not experts else {
            "router": random(experts, 1024, dtype=dtype), "router_noise": random(experts, 1024, dtype=dtype),
        }  # fmt: skip
        for noise in (None, torch.zeros(TOKENS, experts)) if experts else (None,):
            call = functools.partial(lora_linear, scaling=2.0, noise=noise, impl="triton", **gate)
            yield (
                name + ", noise" * (noise is not None),
                trained(lambda *t, call=call, given=(x, weight, None): call(*given, *t)[0], *lora),
            )


def variant_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Experts of rank 16, three specific ones; the totals' gradient too, over some tokens."""
    for what, universal, shared, top_k in (
        ("top 1", 1, False, 1), ("one A", 1, True, None), ("none universal", 0, False, None),
        ("U 2, one A, top 2", 2, True, 2), ("gates given", 1, False, None), ("gates given, one A", 2, True, None),
    ):  # fmt: skip
        columns = 16 * (3 + universal)
        x, weight = random(TOKENS, 1024, dtype=dtype), random(512, 1024, dtype=dtype)
        lora = random(16 if shared else columns, 1024, dtype=dtype), random(512, columns, dtype=dtype)
        gate = {"router": random(3, 1024, dtype=dtype), "router_noise": random(3, 1024, dtype=dtype)}
        gate |= {"noise": torch.zeros(TOKENS, 3)}
        if what.startswith("gates"):
            gate = {"gates": random(TOKENS, 3, dtype=torch.float32)}
        settings: Any = {"scaling": 2.0, "universal": universal, "top_k": top_k, "impl": "triton", **gate}
        for count in (True, torch.ones(TOKENS, dtype=torch.bool)):
            call = functools.partial(lora_linear, x, weight, None, count=count, **settings)
            yield what + ", mask" * (count is not True), trained(lambda *t, call=call: call(*t)[::2], *lora)


def quantized_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """An eighth of Baichuan2's widths: what is compiled depends on their divisors alone."""
    for kind in ("int8", "nf4"):
        layer = quantized.QuantizedLinear(torch.nn.Linear(640, 1712, bias=False, dtype=dtype), kind)
        layer.impl = "triton"
        for tokens in (1, quantized.FEW, TOKENS):
            yield f"{kind}, {tokens} tokens", trained(layer, random(tokens, 640, dtype=dtype))


def optimizer_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    weight, grad = torch.zeros(4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    settings: Any = {"step": 1, "lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "key": 2**62 + 1}
    for state in DTYPES:
        moments = torch.zeros(4096, dtype=state), torch.zeros(4096, dtype=state)
        for first in (0, 1, 16, 2**32 + 3):
            call = functools.partial(optimizer.adamw_, weight, grad, *moments, **settings, first=first, impl="triton")
            yield f"AdamW, {str(state).removeprefix('torch.')}, from {first}", call


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def trained(function: Callable[..., Any], *leaves: torch.Tensor) -> Callable[[], None]:
    """A call of the function and of its backward pass."""

    def call() -> None:
        found = function(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

    return call


def registers(compiled: Any) -> tuple[int, int]:
    """(registers a thread, bytes of a thread's local memory: what does not fit into registers is spilled there)."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def switches(kernel: Any, values: dict[str, Any]) -> set[tuple[Any, ...]]:
    """What of a launch changes the code: dtypes, what is None, which constants are 0, numbers that are 1 or wide."""
    constants, found = {p.name for p in kernel.params if p.is_constexpr}, set()
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            found.add((kernel.__name__, name, value.dtype))
        elif value is None or name in constants:
            found.add((kernel.__name__, name, bool(value)))
        elif isinstance(value, int):
            found.add((kernel.__name__, name, value == 1, value >= 2**31))
    return found


def own_kernels() -> set[str]:
    """The names of all functions under pedgpt.kernels that Triton compiles and that end in _kernel."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "pedgpt.kernels.")]
    jit = triton.runtime.KernelInterface
    return {name for m in modules for name, f in vars(m).items() if name.endswith("_kernel") and isinstance(f, jit)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", action="store_true", help="only until each kernel had each switch once")
    few = parser.parse_args().switches
    stub = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(stub)
    run, rows, seen, tried = triton.JITFunction.run, {}, set(), set()

    def compile_instead(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        new = switches(self, dict(zip(self.arg_names, arguments, strict=False)) | settings)
        if few and new <= tried:
            return None
        tried.update(new)
        compiled = run(self, *arguments, grid=grid, warmup=True, **settings)
        seen.add(self.__name__)
        rows.setdefault((self.__name__, compiled.hash), (what, str(dtype).removeprefix("torch."), compiled))
        return compiled

    triton.JITFunction.run = compile_instead
    for dtype, what, call in cases():  # noqa: B007 (compile_instead reads it)
        call()
    bad = 0
    print(f"{'kernel':<26}{'case':<32}{'dtype':<10}{'registers':>10}{'spilled':>9}{'shared':>9}{'warps':>7}")
    for (name, _), (what, numbers, compiled) in sorted(rows.items(), key=lambda row: row[0][0]):
        used, spilled = registers(compiled)
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        bad += spilled > 0 or shared > SHARED
        print(f"{name:<26}{what:<32}{numbers:<10}{used:>10}{spilled:>9}{shared:>9}{warps:>7}")
    missing = sorted(own_kernels() - seen)
    print(f"{len(rows)} compiled for sm_90 by Triton {triton.__version__}; {bad} that spill or need too much memory")
    if missing:
        print(f"no case compiles {', '.join(missing)}")
    sys.exit(bool(bad or missing))


if __name__ == "__main__":
    main()
