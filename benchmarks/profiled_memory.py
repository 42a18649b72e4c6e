"""Memory of tensors: the peak during a call, and what autograd keeps for the backward pass."""

import os
from collections.abc import Callable, Iterable

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before torch is imported

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """What `call` holds at most beside what is held before it: CUDA's own count, or torch's profiler on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative when it is freed
        peak = max(peak, live)
    return peak


def kept_bytes(forward: Callable[[], object], own: Iterable[torch.Tensor]) -> int:
    """What autograd keeps of `forward` for the backward pass beside the tensors `own`; each storage counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
