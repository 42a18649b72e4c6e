"""How many bytes a decoder needs, from its sizes alone: parameters, activations, head and cache.

The formulas follow transformer.py operation by operation; the tests count what autograd really keeps.
Letters: N tokens of a micro-batch, B its rows, T their length, D hidden, I intermediate, H heads, G key-value heads,
K head_dim, L layers, V vocabulary; s bytes of a number in the residual stream, c in a matrix product. Activations are
lists of tensors, each by its bytes, since allocators treat large ones and small ones differently.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from pedgpt.kernels import linear_logps as head
from pedgpt.kernels.cpu.attention import BLOCK, SCORES
from pedgpt.models.config import ModelConfig

QKV = ("W_pack", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass over `rows` rows of `length` tokens.

    `stream` is the dtype of the weights as the forward sees them, and so of the residual stream; `compute` that of
    matrix products, which autocast may lower. `trains`: all weights train; otherwise only adapters, which keep the
    inputs of the linear layers named in `adapted`. `documents`: attention is told which document a token is of.
    `on_cuda`: on a GPU, whose kernels differ from the CPU's.
    """

    rows: int
    length: int
    stream: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    trains: bool = True
    adapted: Collection[str] = ()
    documents: bool = True
    on_cuda: bool = False

    @property
    def tokens(self) -> int:
        """N = B·T."""
        return self.rows * self.length

    def keeps(self, *linears: str) -> bool:
        """Whether the input of one of these linear layers is kept for the backward pass."""
        return self.trains or any(name in self.adapted for name in linears)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of one block, by name."""
    d, i = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = {"W_pack": (d, 3 * queries)} if config.fused_qkv else dict(q_proj=(d, queries), k_proj=(d, keys))
    if not config.fused_qkv:
        qkv["v_proj"] = (d, keys)
    return {**qkv, "o_proj": (queries, d), "gate_proj": (d, i), "up_proj": (d, i), "down_proj": (i, d)}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; a tied head counts with the embedding."""
    d, size, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
    shapes = linear_shapes(config)
    biased = {
        **dict.fromkeys(QKV, config.attention_bias), "o_proj": config.attention_output_bias,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), config.mlp_bias),
    }  # fmt: skip
    count = {name: (rows + biased[name]) * out for name, (rows, out) in shapes.items()}
    attention = sum(count[name] for name in shapes if name in (*QKV, "o_proj"))
    return {
        "embedding": config.vocab_size * d,
        "attention": layers * (attention + 2 * size * config.qk_norm),
        "mlp": layers * (count["gate_proj"] + count["up_proj"] + count["down_proj"]),
        "norms": (2 * layers + 1) * d,
        "head": 0 if config.tie_word_embeddings else config.vocab_size * d,
    }


def saved_by_block(config: ModelConfig, run: Pass) -> list[int]:
    """The tensors that one block keeps for the backward pass, in bytes."""
    n, c = run.tokens, run.compute.itemsize
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q, k = heads * config.head_dim, groups * config.head_dim

    kept = _normed(config, run, QKV)
    if config.qk_norm:
        kept += _norm(n * heads, config.head_dim, c) + _norm(n * groups, config.head_dim, c)
    # Rotated q and k are new; v is a view, and of W_pack's output it keeps the whole.
    if config.positions == "rope" or config.qk_norm:
        kept += [c * n * q, c * n * k, c * n * (3 * q if config.fused_qkv else k)]
    else:
        kept += [c * n * (q + 2 * k)]
    if by_blocks(run):
        kept += [c * n * q] * run.keeps("o_proj")  # attention's output; the mask is shared as it is
    else:
        kept += [c * n * q, 4 * n * heads]  # its output and its log-sum-exp
        if config.positions == "alibi" and run.stream != run.compute:  # autocast casts the bias in every block anew
            kept += [c * run.rows * heads * run.length**2]
    return kept + _saved_by_mlp(config, run)


def _saved_by_mlp(config: ModelConfig, run: Pass) -> list[int]:
    inner = [run.compute.itemsize * run.tokens * config.intermediate_size]
    return _normed(config, run, ("gate_proj", "up_proj")) + inner * (3 if run.keeps("down_proj") else 2)


def _normed(config: ModelConfig, run: Pass, readers: Collection[str]) -> list[int]:
    """What a norm keeps, and the linear layers that read its output."""
    shapes, size = linear_shapes(config), run.compute.itemsize * run.tokens * config.hidden_size
    keeping = any(name in shapes and run.keeps(name) for name in readers)
    return _norm(run.tokens, config.hidden_size, run.stream.itemsize) + [size] * keeping


def by_blocks(run: Pass) -> bool:
    """Whether attention keeps only q, k and v: `kernels.attention` on the CPU, in bfloat16 and over rows not short."""
    return not run.on_cuda and run.compute == torch.bfloat16 and run.length >= BLOCK


def _scratch(config: ModelConfig, run: Pass, *, backward: bool) -> list[int]:
    """What attention by blocks takes at work: scores and probabilities, in float32 and bfloat16; keys and values."""
    if not by_blocks(run):
        return []
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    scores = BLOCK * run.length * (heads // groups)
    at_once = min(groups, max(1, SCORES // scores))
    keys = at_once * run.length * config.head_dim
    gradients = [4 * keys, 4 * keys, 2 * keys] if backward else []
    return [size * at_once * scores for size in (4, 4, 2, 2)] + [2 * keys] * 3 + gradients


def saved_once(config: ModelConfig, run: Pass) -> list[int]:
    """What all blocks share and the ends keep: token ids, rotation tables, a mask kept as it is, the last norm."""
    s, n, blocked = run.stream.itemsize, run.tokens, by_blocks(run)
    kept = [8 * n] * run.trains + _norm(n, config.hidden_size, s)
    if config.positions == "rope":
        mask = run.rows * run.length**2 * (1 if blocked else run.compute.itemsize)
        return kept + 2 * [s * n * config.head_dim] + [mask] * run.documents
    bias = [s * run.rows * config.num_attention_heads * run.length**2]
    return kept + bias * (run.stream == run.compute or blocked)


def saved(config: ModelConfig, run: Pass) -> list[int]:
    """The tensors that `hidden_states` keeps for the backward pass without activation checkpointing, in bytes."""
    kept = saved_once(config, run) + config.num_hidden_layers * saved_by_block(config, run)
    if not run.trains:  # nothing before the first adapter needs a gradient, so the first norm keeps nothing
        for size in _norm(run.tokens, config.hidden_size, run.stream.itemsize):
            kept.remove(size)
    return kept


def saved_by_checkpointing(config: ModelConfig, run: Pass) -> list[int]:
    """What activation checkpointing keeps: the input of every block, the mask, and what all blocks share."""
    inputs = config.num_hidden_layers * [run.stream.itemsize * run.tokens * config.hidden_size]
    apart = config.positions == "alibi" and run.stream != run.compute and not by_blocks(run)
    bias = [run.stream.itemsize * run.rows * config.num_attention_heads * run.length**2] * apart
    return inputs + bias + saved_once(config, run)


def backward_peak(config: ModelConfig, run: Pass, mlp_adapters: int = 0) -> list[int]:
    """What the backward pass of a norm, or of a block's MLP or attention, needs at most beside what is saved.

    `mlp_adapters`: bytes that the adapters of one MLP have saved, which attention finds free.
    """
    n, d, c = run.tokens, config.hidden_size, run.compute.itemsize
    mlp = [c * n * config.intermediate_size] * 2 + [6 * n * d]
    attention = []
    if scratch := _scratch(config, run, backward=True):  # what the MLP kept is free by then, and o_proj's input
        q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        gradients = [run.stream.itemsize * n * d, c * n * (q + 2 * k)] + [c * n * q] * (not run.keeps("o_proj"))
        attention = [max(0, sum(scratch + gradients) - sum(_saved_by_mlp(config, run)) - mlp_adapters)]
    return max([4 * n * d] * 4, mlp, attention, key=sum)


def chunks_of_head(config: ModelConfig, run: Pass) -> tuple[int, int]:
    """How many chunks `kernels.linear_logps` makes of a pass's tokens, and how many are in one."""
    logits = (head.CHUNK_CUDA if run.on_cuda else head.CHUNK) * 4 // run.compute.itemsize
    count = max(1, math.ceil(run.tokens / max(1, logits // config.vocab_size)))
    return count, math.ceil(run.tokens / count)


def logits_at_once(config: ModelConfig, run: Pass) -> list[int]:
    """The logits that head and loss have at a time, and on the CPU two blocks of them in float32."""
    height = chunks_of_head(config, run)[1]
    blocks = 2 * min(height, max(1, head.BLOCK // config.vocab_size)) * (not run.on_cuda)
    return [run.compute.itemsize * height * config.vocab_size, 4 * blocks * config.vocab_size]


def head_peaks(config: ModelConfig, run: Pass, *, by_sequence: bool = False) -> tuple[list[int], list[int]]:
    """What head and loss hold at most, every token labelled (in the forward pass, in the backward pass).

    One walk over the chunks makes the gradients: N·D of the states, and V·D of the head, in float32 while they are sums
    or to be projected. Autocast copies head and states first. A mean takes that walk in the forward pass; with a factor
    a sequence a head that trains takes it in the backward pass.
    """
    states, weights = run.tokens * config.hidden_size, config.vocab_size * config.hidden_size
    s, c, cast = run.stream.itemsize, run.compute.itemsize, run.stream != run.compute
    sums = 4 if config.normalize_head or chunks_of_head(config, run)[0] > 1 else s
    made = [s * states] + [sums * weights] * run.trains
    rounded = [s * weights] * (run.trains and sums != s)
    first = [c * weights, c * states] * cast + logits_at_once(config, run)
    part = min(weights, head.SLICE_CUDA if run.on_cuda else head.SLICE)  # of the head's gradient at a time
    walk = first + made + [c * part] * (run.trains and not run.on_cuda)
    if run.trains and config.normalize_head:
        walk = max(walk, first[:-2] + made + [4 * part] * 2, key=sum)
    if by_sequence and run.trains:
        return first, max(walk, made + rounded, key=sum)
    return walk, made + rounded + [4 * states, s * states] * by_sequence


def mask_peak(config: ModelConfig, run: Pass) -> list[int]:
    """What is held at once while the mask is made, and made additive if attention needs that."""
    area, s, heads = run.rows * run.length**2, run.stream.itemsize, config.num_attention_heads
    if config.positions == "alibi":  # distances, the float32 bias, its masked copy, and that in the stream's dtype
        return [5 * area, 4 * heads * area, 4 * heads * area] + [s * heads * area] * (s < 4)
    return ([area, area] + [run.compute.itemsize * area] * (not by_blocks(run))) * run.documents


def forward_peak(config: ModelConfig, run: Pass) -> list[int]:
    """What a block's forward pass holds at most without gradients, masks left out."""
    n, c = run.tokens, run.compute.itemsize
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = [c * n * (q + 2 * k), c * n * q] + 4 * [c * n * k]
    attention += _scratch(config, run, backward=False)
    return [c * n * config.hidden_size] * 2 + max(attention, 3 * [c * n * config.intermediate_size], key=sum)


def cache_bytes(config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype) -> int:
    """A KVCache: 2·L·B·G·capacity·K numbers in `dtype`, and a position and a document id a token (int64)."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize + 16
    return batch_size * capacity * token


def _norm(n: int, size: int, itemsize: int) -> list[int]:
    """RMSNorm keeps its input, and 1/rms in float32."""
    return [itemsize * n * size, 4 * n]
