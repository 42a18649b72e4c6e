"""One-token forward passes on the CPU over weights laid out for them; the whole cost of decoding is reading weights.

Letters: B batch, V vocabulary, N specific experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedgpt.files import available_memory
from pedgpt.kernels import Linear
from pedgpt.models.positions import apply_rope, rotary_tables

if TYPE_CHECKING:
    from pedgpt.models.generation import KVCache
    from pedgpt.models.transformer import Transformer


MAX_ROWS = 64  # beyond, products are bound by arithmetic and the layout gains little


class Product:
    """x ↦ x Wᵀ (+ b) for few rows x, in oneDNN's blocked layout, which reads W two to three times as fast."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


class SharedInput:
    """Linear layers that read the same x, with what adapters add, as at most two products.

    One skinny product, in float32, gives s = x [A_u, A_1 … A_N, W_g]ᵀ of all adapted layers. What the gate leaves of s
    stands behind x, and (α/r) B behind W, so the second product is base and adapters at once: [x, h] [W, (α/r) B]ᵀ.
    Everything between them is written into buffers made once: at this size a new tensor costs more than its numbers.
    """

    def __init__(self, layers: Sequence[Any], rows: int) -> None:
        adapted: list[Any] = [layer for layer in layers if getattr(layer, "enabled", False)]
        width, dtype = layers[0].in_features, layers[0].weight.dtype
        self.down: Tensor | None = None
        self.specific = hidden = 0
        if adapted:
            rank = adapted[0].rank
            self.specific = getattr(adapted[0], "num_specific_experts", 0)
            # The universal experts (or plain LoRAs) of all layers first, then the specific ones, then the routers.
            down = [layer.lora_A[:rank] for layer in adapted] + [layer.lora_A[rank:] for layer in adapted]
            universal, hidden = len(adapted) * rank, sum(map(len, down))
            down += [layer.router for layer in adapted] if self.specific else []
            self.down = torch.cat(down).detach().float().t().contiguous()
            self.s = torch.empty(rows, self.down.shape[1])
            self.input = torch.empty(rows, width + hidden, dtype=dtype)
            self.x, h = self.input.split((width, hidden), dim=1)
            self.always = self.s[:, :universal], h[:, :universal]
            if self.specific:
                self.routes = self.s[:, hidden:].view(rows, -1, self.specific)
                self.gates = torch.empty_like(self.routes)
                each = (rows, len(adapted) * self.specific, -1)
                self.gated = self.s[:, universal:hidden].view(each), self.gates.view(each), h[:, universal:].view(each)
        weight = layers[0].weight
        if adapted or len(layers) > 1:
            weight = torch.zeros(sum(layer.out_features for layer in layers), width + hidden, dtype=dtype)
            for layer, block in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
                block[:, :width] = layer.weight.detach()
                if layer in adapted:
                    number, up = adapted.index(layer), layer.scaling * layer.lora_B.detach()
                    columns = block[:, width:].split((universal, hidden - universal), dim=1)
                    columns[0].view(len(block), len(adapted), -1)[:, number] = up[:, :rank]
                    columns[1].view(len(block), len(adapted), -1)[:, number] = up[:, rank:]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.product = Product(weight, torch.cat(biases) if biases else None, rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.down is None:
            return self.product(x)
        self.x.copy_(x)
        torch.mm(x.float(), self.down, out=self.s)
        s, h = self.always
        h.copy_(s)
        if self.specific:
            torch.softmax(self.routes, -1, out=self.gates)
            s, gates, h = self.gated
            torch.mul(s, gates, out=h)
        return self.product(self.input)


class DecodeStep:
    """A model's forward pass for one new token a row, over a cache; equal to the model's own up to rounding."""

    def __init__(self, model: Transformer, rows: int) -> None:
        self.model = model
        self.layers: list[tuple[Any, list[SharedInput]]] = []
        for block in model.model.layers:
            self.layers.append((block, [SharedInput(group, rows) for group in _groups(block)]))
        self.head = Product(model.head_weight(), None, rows)

    def __call__(self, tokens: Tensor, positions: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        """Logits [B, V] of the next token, for tokens, positions and documents [B, 1]."""
        config, rows = self.model.config, len(tokens)
        cache.check_room(rows, 1)
        x = self.model.model.embed_tokens(tokens[:, 0])
        all_positions, all_documents = cache.extend(positions, documents)
        if config.positions == "rope":
            cos, sin = rotary_tables(config, positions, x.dtype)
        mask = self.model._attention_mask(positions, all_positions, documents, all_documents, x.dtype)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(len(mask), groups, heads // groups, -1)
        for i, (block, (qkv, out, gate_up, down)) in enumerate(self.layers):
            packed = qkv(block.input_layernorm(x)).view(rows, -1, 1, config.head_dim)
            qk, v = packed.split((heads + groups, groups), dim=1)
            if config.qk_norm:
                qk = torch.cat((block.self_attn.q_norm(qk[:, :heads]), block.self_attn.k_norm(qk[:, heads:])), dim=1)
            if config.positions == "rope":
                qk = apply_rope(qk, cos, sin)
            q, k = qk.split((heads, groups), dim=1)
            keys, values = cache.append(i, k, v)
            # With one query a row, the heads that share keys are queries beside each other.
            q = q.reshape(rows, groups, heads // groups, config.head_dim)
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + out(mixed.reshape(rows, -1))
            gate, up = gate_up(block.post_attention_layernorm(x)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        return self.head(self.model.model.norm(x))


def decode_step_for(model: Transformer, rows: int) -> DecodeStep | None:
    """A DecodeStep where one can be had and pays: on the CPU, in evaluation, with memory to spare for its copy.

    None for a model with layers that it does not know, or with hooks, which it would pass by.
    """
    parameters = list(model.parameters())
    if model.training or rows > MAX_ROWS:
        return None
    if any(type(p.data) is not Tensor or p.device.type != "cpu" for p in parameters):
        return None
    dtypes = {p.dtype for p in model.model.layers.parameters()}
    if not dtypes <= {torch.float32, torch.bfloat16} or not torch.backends.mkldnn.is_available():
        return None
    if torch.bfloat16 in dtypes and not _supports_bfloat16():
        return None
    if not copy_fits(sum(p.nbytes for p in parameters)):
        return None
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or getattr(module, "gate_record", None) is not None:
            return None
    if any(not _uniform(group) for block in model.model.layers for group in _groups(block)):
        return None
    return DecodeStep(model, rows)


def _supports_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def copy_fits(weights: int) -> bool:
    """Whether a second copy of so many bytes of weights leaves half of the free memory alone."""
    return 2 * weights <= (available_memory() or 0)


def _groups(block: Any) -> list[list[Any]]:
    """The linear layers of a block that share an input."""
    attention, mlp = block.self_attn, block.mlp
    inputs = ["W_pack"] if attention.fused_qkv else ["q_proj", "k_proj", "v_proj"]
    return [
        [getattr(attention, name) for name in inputs], [attention.o_proj], [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]  # fmt: skip


def _uniform(layers: Sequence[Any]) -> bool:
    """Whether the adapters among these layers are of one kind and size, and all or none have biases."""
    plain = all(type(layer) in (nn.Linear, Linear) or hasattr(layer, "adapter_parameters") for layer in layers)
    adapted = [layer for layer in layers if getattr(layer, "enabled", False)]
    kinds = {(type(layer), layer.rank, layer.lora_A.shape) for layer in adapted}
    return plain and len(kinds) <= 1 and len({layer.bias is None for layer in layers}) == 1
