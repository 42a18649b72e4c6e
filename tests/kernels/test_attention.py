"""Attention over layouts against a definition of loops in Python and float64: who sees whom, output and gradients."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.kernels import Layout, attention, naive
from pedgpt.models import ModelConfig, Transformer
from pedgpt.models.generation import KVCache

module = sys.modules["pedgpt.kernels.attention"]  # the package's attribute of this name is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What a row holds: documents, branches, ALiBi, or a cache of S keys; its first query comes after `first` of them.
KINDS = ["plain", "documents", "returning", "padding", "tokens", "branches", "trees", "alibi", "alibi documents"]
CACHES = ["cache", "cache with alibi", "ragged cache", "ragged cache with alibi"]
LENGTHS = [1, 2, 127, 128, 129, 300]
SEEN = {}


def spread(names, T, generator):
    """Names in this order, each for a run of its own."""
    cuts = torch.randint(0, T + 1, (len(names) - 1,), generator=generator).sort().values.tolist()
    ends = [0, *cuts, T]
    return [name for name, start, end in zip(names, ends, ends[1:], strict=False) for _ in range(end - start)]


def make(kind, T, B=2, H=4, device=DEVICE):
    """A layout, and the same as lists of Python numbers."""
    generator = torch.Generator().manual_seed(T)
    behind = [0 if "cache" not in kind else 150 - 40 * b * kind.startswith("ragged") for b in range(B)]
    S = T + max(behind)  # in a ragged cache, some rows have keys that are not written yet
    documents = branches = None
    if "documents" in kind or kind in ("returning", "padding", "tokens", "trees"):
        names = [7, 2**40, 7, -1, 2**40] if kind == "returning" else [-4, 0, 1, 2**40]
        documents = [spread(names, S, generator) for _ in range(B)]
        if kind == "padding":
            documents = [[0] * (S - S // (2 + b)) + [9] * (S // (2 + b)) for b in range(B)]
        if kind == "tokens":
            documents = [list(range(S))] * B
    if kind in ("branches", "trees"):
        branches = [spread([0, 5, -3, 5, 0, 8] if kind == "trees" else [0, 2**40, 3], S, generator) for _ in range(B)]
    positions = torch.randint(0, 2 * S, (B, S), generator=generator).sort(dim=1).values.tolist()
    if "cache" in kind:
        positions = [list(range(S))] * B
    slopes = [2.0 ** -(h + 1) for h in range(H)] if "alibi" in kind else None
    lists = SimpleNamespace(
        T=T, S=S, first=behind, documents=documents, branches=branches, positions=positions, slopes=slopes,
        name=(kind, T, B),
    )  # fmt: skip

    def tensor(rows):
        return rows and torch.tensor([row[i : i + T] for i, row in zip(behind, rows, strict=True)], device=device)

    first = torch.tensor(behind, device=device)[:, None, None] if kind.startswith("ragged") else behind[0]
    layout = Layout(
        tensor(positions), documents=tensor(documents), branches=tensor(branches), first=first,
        slopes=slopes and torch.tensor(slopes, device=device),
        key_positions=torch.arange(S, device=device)[None] if "cache" in kind else None,
    )  # fmt: skip
    return layout, lists


def seen_by(lists):
    """Whether query i sees key j, [B, T, S], pair by pair; found once for all tests of the same lists."""
    if lists.name not in SEEN:
        count = range(len(lists.positions))
        documents, branches = (rows or [[0] * lists.S for _ in count] for rows in (lists.documents, lists.branches))
        pairs = bytearray()
        for d, b, first in zip(documents, branches, lists.first, strict=True):
            for i in range(first, first + lists.T):
                own, may = d[i], (0, b[i])
                pairs += bytes([x == own and y in may for x, y in zip(d[: i + 1], b[: i + 1], strict=True)])
                pairs += bytes(lists.S - i - 1)
        SEEN[lists.name] = torch.frombuffer(pairs, dtype=torch.bool).view(len(count), lists.T, lists.S)
    return SEEN[lists.name]


def definition(lists, q, k, v):
    """In the dtype of q, from the pairs."""
    shared = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhtk,bhsk->bhts", q, k.repeat_interleave(shared, 1)) / q.shape[-1] ** 0.5
    if lists.slopes:
        at = torch.tensor(lists.positions, dtype=torch.float64)
        queries = torch.stack([row[i : i + lists.T] for i, row in zip(lists.first, at, strict=True)])
        distance = at[:, None] - queries[:, :, None]
        bias = torch.tensor(lists.slopes, dtype=torch.float64)[:, None, None] * distance[:, None]
        scores = scores + bias.to(scores)
    scores = scores.masked_fill(~seen_by(lists)[:, None].to(scores.device), -torch.inf)
    return torch.einsum("bhts,bhsk->bhtk", scores.softmax(-1), v.repeat_interleave(shared, 1))


def operands(lists, H=4, G=2, K=16, dtype=torch.float64, device=DEVICE):
    """q, k, v and dout."""
    generator, B = torch.Generator().manual_seed(3), len(lists.positions)
    shapes = (B, H, lists.T, K), (B, G, lists.S, K), (B, G, lists.S, K), (B, H, lists.T, K)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def output_and_gradients(function, q, k, v, dout, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    assert out.shape == q.shape and out.dtype == leaves[0].dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def errors(found, truth):
    """Relative; where the truth is nothing but its own rounding (one token sees itself: dq = dk = 0), absolute."""
    assert all(x.isfinite().all() for x in found)
    norms = [x.norm().item() for x in truth]
    return [
        (a.double() - b).norm().item() / (norm if norm > 1e-9 else b.numel() ** 0.5)
        for a, b, norm in zip(found, truth, norms, strict=True)
    ]


# Who sees whom


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("kind", KINDS + CACHES)
def test_rules_on_index_grids_match_loops(kind, T):
    layout, lists = make(kind, T)
    expected = seen_by(lists).to(DEVICE)
    assert torch.equal(naive.visible(layout).expand_as(expected), expected)
    b, h, i, j = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in (2, 4, T, lists.S)), indexing="ij")
    if lists.slopes:
        at, first = torch.tensor(lists.positions, device=DEVICE), torch.tensor(lists.first, device=DEVICE)
        bias = torch.tensor(lists.slopes, device=DEVICE)[h] * (at[b, j] - at[b, i + first[b]])
        assert torch.equal(naive.bias(layout), bias)
    if kind in KINDS:
        score_mod, block_mask = layout.once(module._flex_arguments)
        assert torch.equal(block_mask.mask_mod(b, h, i, j), expected[:, None].expand(-1, 4, -1, -1))
        assert (score_mod is not None) == (lists.slopes is not None)
        if lists.slopes:
            assert torch.equal(score_mod(torch.zeros(b.shape, device=DEVICE), b, h, i, j), bias)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 256, 385])
@pytest.mark.parametrize("kind", KINDS)
def test_block_mask_visits_what_is_seen_and_asks_where_it_must(kind, T):
    layout, lists = make(kind, T, B=2)
    seen, blocks = seen_by(lists), layout.once(module._flex_arguments)[1].to("cpu")
    assert blocks.seq_lengths == (T, lists.S) and blocks.BLOCK_SIZE == (128, 128)
    count, key_count = -(-T // 128), -(-lists.S // 128)
    listed = {}
    for name in ("kv", "full_kv"):
        counts, order = getattr(blocks, f"{name}_num_blocks"), getattr(blocks, f"{name}_indices")
        listed[name] = {
            (b, i, int(j)) for b in range(2) for i in range(count) for j in order[b, 0, i, : int(counts[b, 0, i])]
        }
        back = name.replace("kv", "q")
        counts, order = getattr(blocks, f"{back}_num_blocks"), getattr(blocks, f"{back}_indices")
        transposed = {
            (b, int(i), j) for b in range(2) for j in range(key_count) for i in order[b, 0, j, : int(counts[b, 0, j])]
        }
        assert transposed == listed[name]
    assert not listed["kv"] & listed["full_kv"]
    visited = listed["kv"] | listed["full_kv"]
    for b in range(2):
        for i in range(count):
            for j in range(key_count):
                part = seen[b, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                whole = part.shape == (128, 128) and bool(part.all())
                assert whole or (b, i, j) not in listed["full_kv"]
                assert (b, i, j) in visited or not part.any()
                if kind in ("plain", "documents", "padding", "alibi", "alibi documents"):
                    assert (b, i, j) not in visited or part.any()  # Names in order: nothing is visited in vain.
                    assert not whole or (b, i, j) in listed["full_kv"]


def test_block_mask_is_found_without_a_tensor_of_all_pairs():
    layout, lists = make("trees", 4000, B=1)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple) else (found,):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return found

    with Sizes() as sizes:
        layout.once(module._flex_arguments)
    assert 0 < sizes.largest < 4000**2 / 256


# Output and gradients


@pytest.mark.parametrize(
    ("kind", "T"),
    [(kind, T) for kind in KINDS + CACHES for T in LENGTHS]
    # From 384 to 512 a CPU takes a document by halves: one such length of each kind, and all of a few.
    + [(kind, (385, 512, 513)[i % 3]) for i, kind in enumerate(KINDS + CACHES) if i]
    + [("plain", T) for T in (385, 512, 513)]
    + [("documents", 385), ("alibi", 385)],
)
def test_float64_matches_the_definition(kind, T):
    layout, lists = make(kind, T)
    *tensors, dout = operands(lists)
    truth = output_and_gradients(lambda *x: definition(lists, *x), *tensors, dout)
    for function in (attention, naive.attention):
        found = output_and_gradients(lambda *x, f=function: f(*x, layout), *tensors, dout)
        assert max(errors(found, truth)) < (1e-6 if lists.slopes else 1e-12)


@pytest.mark.parametrize(
    ("kind", "heads"),  # each kind with two sizes
    [(kind, heads) for i, kind in enumerate(KINDS + CACHES) for heads in range(5) if (i + heads) % 5 < 2],
)
def test_heads_of_any_size_are_as_close_to_float64_as_torchs_kernel(kind, heads):
    """On a GPU by FlexAttention; torch's own kernel is given the dense mask. Every second pair is in bfloat16."""
    H, G, K, T = [(4, 2, 64, 257), (4, 4, 80, 127), (3, 1, 128, 300), (6, 2, 7, 129), (2, 2, 33, 385)][heads]
    dtype = (torch.float32, torch.bfloat16)[((KINDS + CACHES).index(kind) + heads) % 2]
    layout, lists = make(kind, T, H=H)
    *tensors, dout = operands(lists, H, G, K, dtype)
    bias = torch.where(seen_by(lists).to(DEVICE)[:, None], naive.bias(layout), -torch.inf).to(dtype)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=H != G)

    truth = output_and_gradients(lambda *x: definition(lists, *x), *tensors, dout, torch.float64)
    found = errors(output_and_gradients(lambda *x: attention(*x, layout), *tensors, dout), truth)
    budget = errors(output_and_gradients(torchs, *tensors, dout), truth)
    floor, factor = 2e-6 if dtype == torch.float32 else 1e-6, 1.3 if DEVICE == "cuda" else 1.02
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), found, budget, strict=True):
        assert mine <= factor * theirs + floor, f"{name}: {mine:.2e}, torch's own {theirs:.2e}"


@pytest.mark.parametrize(("kinds", "T"), [(KINDS[1:], 129), (["trees"], 300)], ids=str)
def test_flex_attention_over_the_layout_matches_the_definition(kinds, T, by_flex):
    """FlexAttention itself; on the CPU, where it has no backward pass, the forward pass by torch's plain form of it."""
    for number, kind in enumerate(kinds):
        layout, lists = make(kind, T)
        q, k, v, _ = operands(lists, dtype=torch.float32)
        with torch.no_grad():
            found = attention(q, k, v, layout)
        assert by_flex.calls == number + 1
        assert errors([found], [definition(lists, *(x.double() for x in (q, k, v)))])[0] < 1e-5, kind


@pytest.fixture
def by_flex(monkeypatch):
    """Whole rows go to FlexAttention on any device, compiled by a compiler that needs no C++; counts calls, graphs."""
    from torch.nn.attention import flex_attention as flex

    count = SimpleNamespace(calls=0, graphs=0)

    def compiler(graph, inputs):
        count.graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex.flex_attention, backend="inductor" if DEVICE == "cuda" else compiler)

    def counted(*args, **kwargs):
        count.calls += 1
        return compiled(*args, **kwargs)

    monkeypatch.setattr(module, "_flex_attention", lambda: counted)
    monkeypatch.setattr(module, "_suits_flex", lambda q: q.shape[2] >= 128)
    monkeypatch.setattr(module.on_cpu, "attention", lambda *_: None)
    yield count
    torch._dynamo.reset()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the test's own compiler is given")
def test_a_run_compiles_once_for_a_length_and_once_for_all_others(by_flex):
    def run(*cases):
        for kind, T, B in cases:
            layout, lists = make(kind, T, B)
            q, k, v, _ = operands(lists, dtype=torch.float32)
            with torch.no_grad():
                attention(q, k, v, layout)
        return by_flex.graphs

    assert run(("documents", 256, 2), ("trees", 256, 2), ("returning", 256, 2), ("documents", 256, 2)) == 1
    assert run(("documents", 300, 2)) == 2  # another length, and from there on any
    assert run(("trees", 301, 2), ("branches", 384, 2), ("padding", 135, 2)) == 2
    assert run(("documents", 384, 3)) == 3  # another number of rows, and from there on any
    assert run(("trees", 131, 4), ("documents", 256, 5)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="measures the memory of a GPU")
@pytest.mark.parametrize("kind", ["documents", "trees", "alibi documents"])
def test_a_gpu_holds_no_tensor_of_all_pairs(kind):
    layout, lists = make(kind, 8192, B=1)
    *tensors, dout = operands(lists, dtype=torch.bfloat16, K=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output_and_gradients(lambda *x: attention(*x, layout), *tensors, dout)
    assert torch.cuda.max_memory_allocated() - before < 8192**2


# One query, few queries


def test_one_query_without_documents_needs_no_mask():
    layout, lists = make("cache", 1)
    q, k, v, _ = operands(lists)
    assert layout.plain
    assert torch.equal(attention(q, k, v, layout), attention(q, k, v)) and not layout.kept
    assert errors([attention(q, k, v)], [definition(lists, q, k, v)])[0] < 1e-12


@pytest.mark.parametrize("kind", [kind for kind in CACHES if kind != "cache"])
def test_a_mask_is_made_once_for_all_layers_and_without_copies_of_heads(kind, monkeypatch):
    layout, lists = make(kind, 1)
    q, k, v, _ = operands(lists)
    first = attention(q, k, v, layout)
    monkeypatch.setattr(naive, "visible", None)
    assert torch.equal(attention(q, k, v, layout), first)
    (mask,) = layout.kept.values()
    assert mask.shape[1:] == ((2, 2, lists.S) if lists.slopes else (1, 2, lists.S))
    if not lists.slopes and DEVICE == "cpu":
        assert mask.stride(2) == 0


# Compilers, torch.func, sizes alone


@pytest.mark.parametrize("kind", ["trees", "alibi documents", "ragged cache"])
def test_compiled_and_under_torch_func_it_matches_the_definition(kind):
    layout, lists = make(kind, 150)
    *tensors, dout = operands(lists)
    truth = output_and_gradients(lambda *x: definition(lists, *x), *tensors, dout)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = output_and_gradients(lambda *x: compiled(*x, layout), *tensors, dout)
    assert max(errors(found, truth)) < 1e-6
    gradients = torch.func.grad(lambda *x: (attention(*x, layout) * dout).sum(), argnums=(0, 1, 2))(*tensors)
    assert max(errors(gradients, truth[1:])) < 1e-6


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "alibi": {"model_type": "baichuan", "pedgpt_positions": "alibi", "pedgpt_norm_head": True},
}


def make_model(family, layers=2):
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_hf(SIZES | FAMILIES[family] | {"num_hidden_layers": layers})).to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_compiles_and_gives_the_same(family):
    model = make_model(family, layers=1)
    tokens = torch.randint(97, (2, 150), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    documents = (torch.arange(150, device=DEVICE) // 60).expand(2, -1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, documents=documents), model(tokens, documents=documents))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_all_layers_share_one_layout_in_both_passes(checkpointing):
    model = make_model("llama")
    model.activation_checkpointing = checkpointing
    layouts = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: layouts.append(args[2]))
    tokens = torch.arange(40, device=DEVICE)[None]
    model(tokens, documents=tokens // 7).sum().backward()
    assert len(layouts) == (4 if checkpointing == "block" else 2) and len(set(map(id, layouts))) == 1


def test_a_cache_continues_as_one_pass():
    model = make_model("alibi")
    tokens = torch.randint(97, (2, 180), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache, parts = KVCache(model, 2, 200), []
    with torch.no_grad():
        for part in (slice(0, 7), slice(7, 150), slice(150, 151), slice(151, 180)):
            parts.append(model(tokens[:, part], cache=cache))
        whole = model(tokens)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_are_known_without_numbers(dtype):
    """Under fake tensors, as a plan of memory runs a step: no document is looked at."""
    with FakeTensorMode():
        ids = torch.zeros(2, 300, dtype=torch.long)
        q = torch.empty(2, 4, 300, 16, dtype=dtype, requires_grad=True)
        out = attention(q, q, q, Layout(ids, documents=ids))
        out.sum().backward()
        assert out.shape == q.grad.shape == q.shape
