"""What the experts of a mixture do: which tokens each of them gets, in which layers, and how alike they are.

`token_gates` gives one text's gates by layer, and `page` shows them; `measure` is what evaluate.py writes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from pedgpt.adapters import ExpertLoRALinear, record_gates
from pedgpt.data.packing import Row
from pedgpt.data.tokenizer import StreamDecoder, Tokenizer
from pedgpt.evaluation.likelihood import document_losses

COLORS = ("#2F6DB5", "#E0772F", "#2A9D7F", "#8559A5", "#B8860B", "#C2476A", "#4A90A4", "#6B8E23")
UNUSED = 0.1  # An expert with less than a tenth of an equal share counts as unused.

_STYLE = """body{font:16px/1.9 system-ui,sans-serif;color:#2B2F36;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2.5rem}h3{font-size:.95rem;margin-bottom:.2rem;color:#6B727C}
p.text{margin-top:0}span{border-radius:3px;padding:1px 0}span.key{padding:2px 8px;margin-right:6px;color:#fff}"""


def measure(model: Any, rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """What the experts do on packed rows by task, as evaluate.py writes it.

    `layer_gates`: the mean gates of every layer; `gates`: their mean over layers; `gate_entropy`: a token's, in nats;
    `similarity`: the mean over layers, if these have equally many experts; `unused_experts`: in sentences.
    """
    layers: dict[str, dict[str, list[float]]] = {}
    entropy = {}
    for task, packed in rows.items():
        if packed:
            with record_gates(model) as records:
                document_losses(model, packed, batch_size=1)  # a row at a time, so that no padding is counted
            layers[task] = {name: record.mean() for name, record in records.items()}
            entropy[task] = fmean(record.entropy() for record in records.values())
    experts = [module for module in model.modules() if isinstance(module, ExpertLoRALinear)]
    alike = [expert_similarity(layer) for layer in experts]
    names = {name: None for found in layers.values() for name in found}
    whole = {name: mean_by_expert(found[name] for found in layers.values()) for name in names}
    return {
        "gates": {task: mean_by_expert(found.values()) for task, found in layers.items()},
        "gate_entropy": entropy,
        "layer_gates": layers,
        "similarity": torch.stack(alike).mean(0).tolist() if len({len(one) for one in alike}) == 1 else None,
        "unused_experts": unused_experts(whole),
    }


def mean_by_expert(rows: Iterable[Sequence[float]]) -> list[float]:
    """The mean of each column, over the rows that have it: layers may have different numbers of experts."""
    return [fmean(weight for weight in column if weight is not None) for column in zip_longest(*rows)]


@torch.no_grad()
def token_gates(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The gates [T, N] (float32, on the CPU) of every expert layer for one row of token ids [T], by module name."""
    with record_gates(model, keep=True) as records:
        model(tokens[None])
    return {name: record.kept[0][0].float().cpu() for name, record in records.items() if record.kept}


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; empty for a special token, and for the first ones of a character of several."""
    decoder = StreamDecoder(tokenizer)
    found = [decoder.push(token) for token in tokens]
    return [*found[:-1], found[-1] + decoder.finish()] if found else []


def expert_similarity(layer: ExpertLoRALinear) -> Tensor:
    """Cosines [E, E] between what the experts add to the weight, universal ones first; 0 where an expert adds nothing.

        cos(i, j) = ⟨B_i A_i, B_j A_j⟩ / (‖B_i A_i‖ ‖B_j A_j‖),  ⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀ B_j) ⊙ (A_i A_jᵀ)

    so no matrix as large as the weight is made.
    """
    experts = [*layer.universal_experts, *layer.specific_experts]
    A, B = (torch.stack(parts).detach().double() for parts in zip(*experts, strict=True))
    inner = torch.einsum("ixd,jyd->ijxy", A, A).mul_(torch.einsum("iox,joy->ijxy", B, B)).sum((-2, -1))
    norms = inner.diagonal().clamp(min=0).sqrt()
    return torch.nan_to_num(inner / norms[:, None] / norms, nan=0.0).float()


def unused_experts(means: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each layer with a specific expert that hardly any token uses, with what to do about it.

    `means` holds each layer's mean gates [N], as `GateRecord.mean` gives them.
    """
    found = []
    for layer, weights in means.items():
        share = 1 / len(weights)
        if few := [number for number, weight in enumerate(weights, 1) if weight < UNUSED * share]:
            which = ", ".join(f"expert {number} ({weights[number - 1]:.1%})" for number in few)
            found.append(f"{layer}: {which} of the weight, where an equal share is {share:.1%}")
    if found:
        found.append("Such experts cost time and change little: train with --balance 0.01, or give fewer experts.")
    return found


def page(texts: Mapping[str, tuple[Sequence[str], Mapping[str, Tensor]]], groups: int = 3) -> str:
    """A page of HTML that shows each text with every token in the color of its strongest expert.

    `texts` has a title, the tokens' `pieces` and their `token_gates`. The decoder's layers are cut into
    `groups` of neighbours, and gates are averaged over each group. The stronger the color, the more the expert's weight
    exceeds an equal share. Layers whose number of experts differs are grouped apart.
    """
    experts = max((gate.shape[1] for _, gates in texts.values() for gate in gates.values()), default=0)
    keys = (f'<span class="key" style="background:{_color(j)}">expert {j + 1}</span>' for j in range(experts))
    parts = [f"<p>{''.join(keys)} The pointer over a token tells its weights.</p>"]
    for title, (texts_of, gates) in texts.items():
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for name, mean in _grouped(gates, groups).items():
            tokens = "".join(_span(piece, row) for piece, row in zip(texts_of, mean.tolist(), strict=True))
            parts.append(f'<h3>{html.escape(name)}</h3><p class="text">{tokens}</p>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    return f"<!doctype html>{head}<title>Routing</title><h1>Which expert each token asks</h1>{''.join(parts)}\n"


def layer_number(name: str) -> int:
    """The number of the decoder layer in a module's name, `model.layers.3.mlp.up_proj`; 0 if there is none."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else 0


def _grouped(gates: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Mean gates [T, N] over the layers of each group, by the group's name."""
    numbers = sorted({layer_number(name) for name in gates})
    edges = [round(i * len(numbers) / groups) for i in range(groups + 1)]
    found: dict[str, Tensor] = {}
    for chunk in (numbers[start:stop] for start, stop in pairwise(edges) if stop > start):
        by_experts: dict[int, list[Tensor]] = {}
        for name, gate in gates.items():
            if layer_number(name) in chunk:
                by_experts.setdefault(gate.shape[1], []).append(gate)
        title = f"layers {chunk[0]} to {chunk[-1]}" if len(chunk) > 1 else f"layer {chunk[0]}"
        for experts, same in by_experts.items():
            found[title if len(by_experts) == 1 else f"{title}, {experts} experts"] = torch.stack(same).mean(0)
    return found


def _color(expert: int) -> str:
    return COLORS[expert % len(COLORS)]


def _span(piece: str, weights: Sequence[float]) -> str:
    """One token in its strongest expert's color, whose opacity says by how much the expert exceeds an equal share."""
    expert = max(range(len(weights)), key=weights.__getitem__)
    share = 1 / len(weights)
    excess = (weights[expert] - share) / (1 - share) if share < 1 else 1.0
    alpha = f"{round(255 * (0.08 + 0.72 * min(1.0, max(0.0, excess)))):02x}"
    shown = html.escape(piece or "▏").replace("\n", "↵<br>")
    told = "  ".join(f"{number}: {weight:.2f}" for number, weight in enumerate(weights, 1))
    return f'<span style="background:{_color(expert)}{alpha}" title="{told}">{shown}</span>'
