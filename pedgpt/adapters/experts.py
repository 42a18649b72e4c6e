"""The mixture of universal-specific experts (PediatricsGPT §3.4), in its packed form.

                              x [T, in]
         ┌───────────────────────┼─────────────────────────┐
         ▼                       ▼                         ▼
    ┌──────────┐     ┌──────────────────────┐     ┌─────────────────┐
    │ W  frozen│     │ A_u                  │     │ router W_g      │
    │          │     │ A_1                  │     │ [N, in], noise  │
    │ [out, in]│     │ ...                  │     │ by W_n [N, in]  │
    │          │     │ A_N      [(N+1)R, in]│     └─────────────────┘
    └──────────┘     └──────────────────────┘              ▼ softmax
         │                       ▼  h [T, (N+1)R]      gates [T, N]
         │                ┌──────────────┐                 │
         │                │ scale of R   │◄────────────────┘
         │                │ numbers each │  1 for A_u, gate j for A_j
         │                └──────────────┘
         │                       ▼
         │           ┌──────────────────────┐
         │           │ B_u B_1 ... B_N      │
         │           │         [out, (N+1)R]│
         │           └──────────────────────┘
         └────────► + ◄──────────┘ times α/R
                    ▼
                y [T, out]

Letters: T tokens, N specific experts, R rank; u is the universal expert, which is always on and stands first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pedgpt.adapters.lora import LoRALinear, temporarily
from pedgpt.kernels.hashing import hash_bits, shift_right, signed


class ExpertLoRALinear(LoRALinear):
    """One universal expert, always on, and N specific ones, softly gated per token.

        G(x) = softmax(x W_gᵀ + ε ⊙ softplus(x W_nᵀ)),  ε ~ N(0,1) while training, 0 in evaluation
        y    = W x (+ b) + (α/r) ( E_u(x) + Σ_j G(x)_j E_j(x) ),  E(x) = B A x

    Computed as one LoRA of rank (N+1)·r whose hidden vector the gate scales: no [tokens, experts, out] tensor exists.
    Products run in the dtype of x, the gate in float32. Dropout reaches the experts, not the router; `rslora` scales by
    α/√r. W_g (`router` [N, in]) and W_n (`router_noise` [N, in]) start at zero (Shazeer et al. 2017): equal gates, with
    noise of scale softplus(0).

    Variants, in any combination: `num_universal_experts` may be 0 (a plain soft mixture) or several; with `top_k` only
    the k largest routes, noise included, enter the softmax (NOTE: with k = 1 every gate is 1, so no router learns);
    with `shared_A` (HydraLoRA) all experts have one A [r, in]; a subclass that overrides `gates` has its own gate.
    """

    def __init__(
        self, base: nn.Linear, rank: int = 8, alpha: float = 16, num_specific_experts: int = 3, dropout: float = 0.0,
        *, num_universal_experts: int = 1, top_k: int | None = None, shared_A: bool = False, rslora: bool = False,
    ) -> None:  # fmt: skip
        for name, number, least in (("specific", num_specific_experts, 1), ("universal", num_universal_experts, 0)):
            if number < least:
                raise ValueError(f"num_{name}_experts must be at least {least}, found {number}")
        if top_k is not None and not 1 <= top_k <= num_specific_experts:
            raise ValueError(f"top_k must be in 1 to num_specific_experts, {num_specific_experts}, found {top_k}")
        experts = num_universal_experts + num_specific_experts
        super().__init__(base, rank, alpha, dropout, rslora=rslora, _copies=(1 if shared_A else experts, experts))
        self.num_specific_experts, self.num_universal_experts = num_specific_experts, num_universal_experts
        self.top_k, self.shared_A = top_k, shared_A
        self.router = nn.Parameter(self.lora_A.new_zeros(num_specific_experts, base.in_features))
        self.router_noise = nn.Parameter(torch.zeros_like(self.router))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().adapter_parameters(), "router": self.router, "router_noise": self.router_noise}

    @property
    def universal_experts(self) -> list[tuple[Tensor, Tensor]]:
        """(A [r, in], B [out, r]) of each expert that is always on."""
        return self._experts()[: self.num_universal_experts]

    universal_expert = property(lambda layer: layer.universal_experts[0])  # the first one, most often the only one

    @property
    def specific_experts(self) -> list[tuple[Tensor, Tensor]]:
        """(A [r, in], B [out, r]) of each gated expert."""
        return self._experts()[self.num_universal_experts :]

    def gates(self, x: Tensor) -> Tensor | None:
        """The specific experts' weights [..., N], any differentiable function of x [..., in]; None: the fused gate."""
        return None

    def _routing(self, x: Tensor) -> dict[str, Any]:
        count = self.gate_record is not None and self.gate_record.where
        routing: dict[str, Any] = {"universal": self.num_universal_experts, "count": count, "gates": self.gates(x)}
        if routing["gates"] is not None:
            return routing
        own = {"router": self.router, "router_noise": self.router_noise, "top_k": self.top_k, "noise": self.noise(x)}
        return routing | own

    def noise(self, x: Tensor) -> Tensor | NoiseStream | None:
        """ε [..., N] for x [..., in] while training, in float32 or float64, or its stream; None in evaluation."""
        if not self.training:
            return None
        if (stream := self.noise_stream) is not None:
            if x.ndim != 3 or len(x) != len(stream.rows):
                raise ValueError(f"gate noise for {len(stream.rows)} rows needs [rows, tokens, in], found {[*x.shape]}")
            return stream
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.randn(*x.shape[:-1], self.num_specific_experts, dtype=dtype, device=x.device)


class GateRecord:
    """Sums over tokens of one layer's gates and of their entropy, on the layer's device until they are read."""

    def __init__(self, where: Tensor | bool = True, keep: bool = False) -> None:
        self.where = where  # [...] bool: the tokens that count
        self.kept: list[Tensor] | None = [] if keep else None  # the gates [..., N] of every pass
        self.totals: Tensor | None = None  # [N + 2] float64: gates, entropy, number of tokens

    def add(self, totals: Tensor, gates: Tensor | None = None) -> None:
        """Add what `lora_linear` counted in one pass."""
        if self.kept is not None and gates is not None:
            self.kept.append(gates.detach())
        self.totals = totals if self.totals is None else self.totals + totals

    @property
    def count(self) -> int:
        """How many tokens were seen."""
        return 0 if self.totals is None else int(self.totals[-1])

    def mean(self) -> list[float]:
        """Mean weight of each specific expert over the tokens seen; sums to 1."""
        return self._means()[:-1]

    def entropy(self) -> float:
        """Mean entropy of the gates over the tokens seen, in nats: 0 where one expert has all, log N where equal."""
        return self._means()[-1]

    def _means(self) -> list[float]:
        if self.totals is None or not self.count:
            raise ValueError("no gates were recorded: no token came by, or adapters were switched off")
        return (self.totals[:-1] / self.totals[-1]).tolist()


@contextmanager
def record_gates(
    model: nn.Module, where: Tensor | bool = True, *, keep: bool = False
) -> Iterator[dict[str, GateRecord]]:
    """Within the context, collect every expert layer's gates by module name, without waiting for the device.

    `where` [B, T] (bool) chooses the tokens that count; `keep` also keeps each token's gates. What activation
    checkpointing computes again is not counted again if the backward pass runs outside of the context.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertLoRALinear)}
    if not layers:
        raise ValueError("the model has no expert layers; inject_experts or load_adapter first")
    records = {name: GateRecord(where, keep) for name in layers}
    with temporarily("gate_record", {layers[name]: record for name, record in records.items()}):
        yield records


def gate_metrics(records: Mapping[str, GateRecord], weight: int | None = None) -> dict[str, Tensor]:
    """Each specific expert's weight and the gates' entropy, averaged over layers and *summed* over the tokens.

    `weight` takes the place of the number of tokens: the result is the mean over them times the weight. Scalars on the
    device, by the names `gates/expert_1` … and `gates/entropy`. An expert's mean is over the layers that have it.
    """
    columns: dict[str, list[Tensor]] = {}
    for totals in sorted(_totals(records), key=len, reverse=True):
        names = [f"gates/expert_{j + 1}" for j in range(len(totals) - 2)] + ["gates/entropy", "count"]
        for name, value in zip(names, totals.detach(), strict=True):
            columns.setdefault(name, []).append(value)
    means = {name: torch.stack(values).mean() for name, values in columns.items()}
    count = means.pop("count").clamp(min=1)
    return means if weight is None else {name: mean * (weight / count) for name, mean in means.items()}


def balance_loss(records: Mapping[str, GateRecord]) -> Tensor:
    """The mean over layers of CV²(Σ_tokens G_j over j), 0 where experts have equal shares (Shazeer et al. 2017).

    Its gradient reaches the gates of the passes that were recorded, so make it before their backward pass.
    """
    sums = [totals[:-2] for totals in _totals(records)]
    return torch.stack([s.var(correction=0) / s.mean().square().clamp(min=1e-300) for s in sums]).mean()  # no token: 0


def _totals(records: Mapping[str, GateRecord]) -> list[Tensor]:
    if found := [record.totals for record in records.values() if record.totals is not None]:
        return found
    raise ValueError("no gates were recorded: adapters were switched off")


class NoiseStream:
    """One layer's gate noise: a function of (seed, row, token, layer, expert), however rows are spread over ranks.

    A counter-based generator: each number is a 64-bit hash of its coordinates, turned normal by Box-Muller. So one
    process or many, any micro-batch size, and activation checkpointing's recomputation all draw the same noise.
    """

    def __init__(self, seed: int, layer: int, rows: Tensor) -> None:
        self.key, self.rows = hash_bits(signed(hash_bits(signed(seed)) + layer)), rows.long()

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape and dtype of `like` [B, T, N]; B must be the number of rows."""
        stream = hash_bits(self.key + self.rows)[:, None]
        stream = hash_bits(stream + torch.arange(like.shape[1], device=like.device))[..., None]
        bits = hash_bits(stream + torch.arange(like.shape[2], device=like.device))
        first = (shift_right(bits, 32) + 1).double() / 2**32  # in (0, 1], so that its logarithm is finite
        second = (bits & 0xFFFFFFFF).double() / 2**32
        return ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).to(like.dtype)


def set_noise_rows(model: nn.Module, seed: int, rows: Tensor | None) -> None:
    """From now on, expert layers draw the noise of batch row i as `rows[i]` (int64 [B]) says; None: at random.

    No context manager: activation checkpointing calls the layers again in the backward pass.
    """
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, ExpertLoRALinear)):
        layer.noise_stream = None if rows is None else NoiseStream(seed, number, rows)
