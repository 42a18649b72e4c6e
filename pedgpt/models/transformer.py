"""The decoder of all families, whole, in one file. Module names are those of the HF checkpoints.

- Pre-norm blocks with RMSNorm, SwiGLU, grouped key-value heads, rotary embedding or ALiBi; no dropout.
- Packed documents and trees of branches in a row: one `Layout` a batch tells every layer who sees whom.
- NormHead: logits by rows of unit length, computed anew in each forward pass and never written into the weights.
- One forward pass for training and decoding: a cache gives a layout, too, and takes the new keys and values.

Letters: B batch, T query tokens, S key tokens, D hidden, H heads, G key-value heads, K head_dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pedgpt.kernels import Layout, Linear, add_rms_norm, attention, linear, rotary, swiglu, unit_rows
from pedgpt.kernels.recompute import CHECKPOINTING, offloaded, selective
from pedgpt.models.cache import KVCache
from pedgpt.models.config import ModelConfig
from pedgpt.models.positions import alibi_slopes, document_positions, rotary_tables

Tables = tuple[Tensor, Tensor] | None  # cos and sin of the rotary embedding; None for ALiBi


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + ε) over the last axis, the variance in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of x; given `residual`, the norm of x + residual and that sum."""
        normed, total = add_rms_norm(x, residual, self.weight, self.eps)
        return normed if residual is None else (normed, total)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads. Without a `layout` it is plainly causal."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.fused_qkv = size, config.fused_qkv
        if self.fused_qkv:
            self.W_pack = Linear(config.hidden_size, 3 * heads * size, bias=config.attention_bias)
        else:
            self.q_proj = Linear(config.hidden_size, heads * size, bias=config.attention_bias)
            self.k_proj = Linear(config.hidden_size, groups * size, bias=config.attention_bias)
            self.v_proj = Linear(config.hidden_size, groups * size, bias=config.attention_bias)
        self.o_proj = Linear(heads * size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, tables: Tables, layout: Layout | None, cache: KVCache | None, layer: int) -> Tensor:
        packed = self.W_pack(x).chunk(3, -1) if self.fused_qkv else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in packed)
        q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = rotary(q, k, *tables)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.o_proj(attention(q, k, v, layout).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, tables: Tables, layout: Layout | None, cache: Any = None, layer: int = 0) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), tables, layout, cache, layer)
        norm = self.post_attention_layernorm
        if type(norm) is RMSNorm and not norm._forward_hooks and not norm._forward_pre_hooks:
            normed, x = norm(attended, x)
        else:  # A module of another kind takes one tensor, and so do hooks.
            normed = norm(x := x + attended)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part that HF checkpoints name `model.`"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.vocab_size, config.hidden_size
        meta = torch.get_default_device().type == "meta"  # Drawing numbers there takes longer than the rest of loading.
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape) if meta else None)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model of any supported family, with random weights until a checkpoint fills them.

    `model(tokens)` gives logits [B, T, V]. `activation_checkpointing` says what the backward pass computes again in
    place of keeping it: "none", "selective" (norms and SwiGLU, which are cheap), "block" (all but a block's input) or
    "offload" (as "block", and the blocks' inputs wait in the host's memory).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = "none"
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation_checkpointing" and value not in CHECKPOINTING:
            raise ValueError(f"{name} must be one of {', '.join(CHECKPOINTING)}, found {value!r}")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Normal(0, initializer_range) for matrices, zeros for biases, ones for norms."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, **arguments: Any) -> Tensor:
        """Logits [B, T, V] in the model's dtype; arguments as in `hidden_states`."""
        return linear(self.hidden_states(tokens, **arguments), self.head_weight())

    def hidden_states(
        self, tokens: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None,
        branches: Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Final normalised states [B, T, D] for token ids [B, T] (int64).

        `documents` [B, T]: tokens attend only within equal integers, and positions restart where the integer changes.
        `branches` [B, T] makes each document (without `documents`, each row) a tree: its trunk, marked 0, comes first
        and is seen by all that follows it; then any number of branches, each one run of its own integer, which see the
        trunk and themselves. The positions of each go on from the trunk's. `positions` [B, T] overrides what is so
        derived. With `cache`, `tokens` continue the text of each of its rows. Raises ValueError for another shape, a
        batch that differs from the cache's, or any of the three beside a `cache`.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have the shape [batch, tokens], found {list(tokens.shape)}")
        for name, value in {"positions": positions, "documents": documents, "branches": branches}.items():
            if value is not None and value.shape != tokens.shape:
                raise ValueError(f"{name} has the shape {list(value.shape)}, tokens have {list(tokens.shape)}")
        alibi = self.config.positions == "alibi"
        slopes = alibi_slopes(self.config.num_attention_heads, tokens.device) if alibi else None
        if cache is None:
            positions = document_positions(tokens, documents, branches) if positions is None else positions
            layout = Layout(positions, documents=documents, branches=branches, slopes=slopes)
        elif any(given is not None for given in (positions, documents, branches)):
            raise ValueError("each row of a cache is one text, without positions, documents and branches of its own")
        else:
            layout = cache.extend(tokens, slopes)
        hidden = self.model.embed_tokens(tokens)
        tables = None if alibi else rotary_tables(self.config, layout.positions, hidden.dtype)
        how = self.activation_checkpointing if torch.is_grad_enabled() and cache is None else "none"
        for i, block in enumerate(self.model.layers):
            if how in ("block", "offload"):
                with offloaded(how == "offload"):
                    hidden = checkpoint(block, hidden, tables, layout, use_reentrant=False)
            else:
                with selective(how == "selective"):
                    hidden = block(hidden, tables, layout, cache, i)
        return self.model.norm(hidden)

    def head_weight(self) -> Tensor:
        """The output matrix [V, D] as it multiplies. NormHead's rows get unit length, in slices to save memory."""
        if not self.config.normalize_head:
            return self.lm_head.weight
        return torch.cat([unit_rows(rows.float()).to(rows.dtype) for rows in self.lm_head.weight.split(8192)])
