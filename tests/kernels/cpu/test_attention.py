"""Packed documents one after another against softmax(q kᵀ / √K + bias) v in float64, and against torch over a mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pedgpt.kernels import Layout, attention
from pedgpt.kernels.cpu import attention as cpu
from pedgpt.models import ModelConfig, Transformer

# B, H, G, T, K
SHAPES = [(2, 4, 1, 384, 40), (3, 2, 2, 385, 7), (1, 4, 4, 400, 128), (1, 4, 2, 512, 1)]
LAYOUTS = ["none", "documents", "a long document", "single tokens", "padding", "returning", "trees", "alibi"]
LAYOUTS += ["alibi of documents"]


def draw(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(B=2, H=4, G=2, T=400, K=16, dtype=torch.bfloat16):
    """q, k, v and dout."""
    return tuple(draw(B, heads, T, K, seed=seed, dtype=dtype) for seed, heads in enumerate((H, G, G, H)))


def document_ids(name, B, T):
    generator = torch.Generator().manual_seed(9)
    if name == "single tokens":
        return torch.arange(T).expand(B, T)
    if name == "padding":  # one document of all that stands behind the text, as packing has it
        lengths = torch.randint(1, T, (B, 1), generator=generator)
        return (torch.arange(T) >= lengths).long()
    if name == "a long document":
        return (torch.arange(T) > 1).long().expand(B, T)
    runs = (torch.rand(B, T, generator=generator) < 0.05).cumsum(1)
    return runs % 3 if name == "returning" else runs


def make_layout(name, B, T, H=4):
    """Every kind that Transformer makes."""
    positions = torch.arange(T).expand(B, T)
    if name == "none":
        return Layout(positions)
    documents = branches = slopes = None
    if name.startswith("alibi"):
        slopes = 2.0 ** -(torch.arange(1, H + 1) * 8 / H)
    if name == "trees":
        branches = (torch.arange(T) % 60 // 20).expand(B, T)  # a trunk of 20 tokens and two branches
        documents = (torch.arange(T) // 60).expand(B, T)
    elif name != "alibi":
        documents = document_ids(name, B, T)
    return Layout(positions, documents=documents, branches=branches, slopes=slopes)


def dense(layout, dtype):
    """The same as a mask [B, 1 or H, T, T] to add to the scores."""
    B, T = layout.positions.shape
    allowed = torch.ones(B, T, T, dtype=torch.bool).tril()
    if layout.documents is not None:
        allowed &= layout.documents[:, :, None] == layout.documents[:, None]
    if layout.branches is not None:
        allowed &= (layout.branches[:, :, None] == layout.branches[:, None]) | (layout.branches[:, None] == 0)
    mask = torch.zeros(B, 1, T, T, dtype=torch.float64)
    if layout.slopes is not None:
        distance = layout.positions[:, None] - layout.positions[:, :, None]
        mask = layout.slopes.double()[:, None, None] * distance[:, None]
    return mask.masked_fill(~allowed[:, None], -torch.inf).to(dtype)


def definition(q, k, v, layout=None):
    layout = layout or make_layout("none", len(q), q.shape[2])
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("bhtk,bhsk->bhts", q, k)
    scores = scores / q.shape[-1] ** 0.5 + dense(layout, scores.dtype)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return torch.einsum("bhts,bhsk->bhtk", weights / weights.sum(-1, keepdim=True), v)


def torchs(q, k, v, layout=None):
    mask = None if layout is None or layout.plain else dense(layout, q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def output_and_gradients(function, q, k, v, layout, dout, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, v)]
    out = function(*leaves, layout)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    assert out.shape == q.shape and out.dtype == (dtype or q.dtype)
    return [out.detach(), *gradients]


def errors(found, truth):
    assert all(t.isfinite().all() for t in found)
    # Where the truth is nothing but its own rounding (one token sees itself: dq = dk = 0) the error is absolute.
    norms = [t.norm().item() for t in truth]
    return [
        (a.double() - b).norm().item() / (norm if norm > 1e-9 else b.numel() ** 0.5)
        for a, b, norm in zip(found, truth, norms, strict=True)
    ]


def alone(q, k, v, layout):
    """torch's own kernel on one document after another."""
    rows = []
    for row, ids in enumerate(layout.documents.tolist()):
        starts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
        parts = []
        for start, stop in itertools.pairwise(starts):
            part = slice(row, row + 1), slice(None), slice(start, stop)
            at = layout.positions[row : row + 1, start:stop]
            branches = None if layout.branches is None else layout.branches[row : row + 1, start:stop]
            parts.append(torchs(q[part], k[part], v[part], Layout(at, branches=branches, slopes=layout.slopes)))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def check(function, q, k, v, layout, dout):
    """No further from float64 than torch's own kernel, over a mask of whole rows or on every document."""
    truth = output_and_gradients(definition, q, k, v, layout, dout, torch.float64)
    found = errors(output_and_gradients(function, q, k, v, layout, dout), truth)
    budgets = [errors(output_and_gradients(torchs, q, k, v, layout, dout), truth)]
    ids = () if layout.documents is None else layout.documents
    if len(ids) and all(len(row.unique()) == len(row.unique_consecutive()) for row in ids):
        budgets.append(errors(output_and_gradients(alone, q, k, v, layout, dout), truth))
    for name, mine, *theirs in zip(("out", "dq", "dk", "dv"), found, *budgets, strict=True):
        assert mine <= 1.02 * max(theirs) + 1e-6, f"{name}: {mine:.2e}, torch's own {theirs}"


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def masks(monkeypatch):
    """What torch's kernel is given to add to the scores, call by call."""
    found, kernel = [], F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None, **settings):
        found.append(attn_mask)
        return kernel(q, k, v, attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return found


@pytest.mark.parametrize(
    ("number", "name"),
    [(number, name) for number in range(len(SHAPES)) for i, name in enumerate(LAYOUTS) if (number // 2 + i) % 2 == 0],
)
def test_documents_are_as_close_to_float64_as_a_mask(number, name, masks):
    """No call has a mask of the whole row, unless a document goes on after another one.

    Every layout with two shapes and two dtypes, every shape with half of the layouts and each of four dtypes.
    """
    shape, (B, H, _, T, _) = SHAPES[number], SHAPES[number]
    dtypes = torch.float32, torch.float64, torch.float16, torch.bfloat16
    dtype = dtypes[(number + LAYOUTS.index(name)) % 4]
    q, k, v, dout = operands(*shape, dtype)
    layout = make_layout(name, B, T, H)
    attention(q, k, v, layout)
    whole = any(mask is not None and mask.shape[-2:] == (T, T) for mask in masks)
    assert whole == (name in ("returning", "alibi"))
    check(attention, q, k, v, layout, dout)


def test_documents_in_a_row_match_each_on_its_own(masks):
    q, k, v, dout = operands(1, 4, 2, 400, 16)
    ids = torch.tensor([5] * 137 + [2] * 1 + [7] * 262)[None]
    positions = torch.arange(400)[None]
    packed = output_and_gradients(attention, q, k, v, Layout(positions, documents=ids), dout)
    assert masks == [None] * 3
    for part in (slice(0, 137), slice(137, 138), slice(138, 400)):
        one = output_and_gradients(
            definition, *(t[:, :, part] for t in (q, k, v)), None, dout[:, :, part], torch.float64
        )
        assert max(errors([t[:, :, part] for t in packed], one)) < 6e-3


def test_short_rows_are_left_to_a_mask(masks):
    for T in (cpu.SHORTEST - 1, cpu.SHORTEST):
        masks.clear()
        q, k, v, dout = operands(T=T)
        check(attention, q, k, v, make_layout("documents", 2, T), dout)
        assert (masks[0] is None) == (T == cpu.SHORTEST)


@pytest.mark.parametrize("axis", ["part of wider rows", "expanded"])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
def test_any_strides_are_as_close_to_float64(which, axis):
    values, layout = list(operands()), make_layout("documents", 2, 400)
    if axis == "expanded":
        values[which] = values[which][:1, :, :1].expand_as(values[which])
    else:
        wide = torch.full((2, 400, 4, 48), torch.nan, dtype=torch.bfloat16).transpose(1, 2)  # as the model has q, k, v
        view = wide[:, : values[which].shape[1], :, 16:32]
        values[which] = view.copy_(values[which])
    q, k, v, dout = values
    check(attention, q, k, v, layout, dout)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant):
    q, k, v, dout = operands()
    layout = make_layout("trees", 2, 400)
    expected = output_and_gradients(attention, q, k, v, layout, dout)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = checkpoint(attention, *leaves, layout, use_reentrant=reentrant)
    out.backward(dout)  # the reentrant form knows no autograd.grad
    assert equal([out, *(leaf.grad for leaf in leaves)], expected)


def test_autocast_to_bfloat16_gives_the_same_bits():
    q, k, v, _ = operands()
    layout = make_layout("documents", 2, 400)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q.float(), k.float(), v.float(), layout), attention(q, k, v, layout))


def test_no_rows_give_no_rows():
    q, k, v, dout = operands(B=0)
    results = output_and_gradients(attention, q, k, v, make_layout("documents", 0, 400), dout)
    assert [t.shape for t in results] == [t.shape for t in (dout, q, k, v)]


def outcome(function, *args):
    """What comes back, or that it is refused."""
    try:
        return function(*args)
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("change", ["batch", "values", "types", "heads"])
def test_operands_that_do_not_fit_are_served_or_refused_as_over_a_mask(change):
    q, k, v, _ = operands()
    layout = make_layout("documents", 2, 400)
    if change == "batch":
        q = q[:1]
    elif change == "values":
        v = torch.cat((v, v), dim=-1)
    elif change == "heads":
        k, v = (x[:, :1].expand(-1, 3, -1, -1) for x in (k, v))
    else:
        k = k.float()
    expected, found = (outcome(function, q, k, v, layout) for function in (torchs, attention))
    assert found is expected if isinstance(expected, type) else torch.equal(found, expected)


# In a model

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "alibi": {"model_type": "baichuan", "pedgpt_positions": "alibi", "pedgpt_norm_head": True},
}


def states_and_gradients(model, tokens, documents=None, weights=None):
    """Hidden states of the rows, and the gradient of every parameter for Σ weights · states."""
    model.zero_grad()
    states = model.hidden_states(tokens, documents=documents)
    (states.double() * weights).sum().backward()
    gradients = [p.grad.double() for p in model.model.parameters()]
    return states.detach(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_in_bfloat16_match_each_alone_in_float64(family, checkpointing):
    """Within a fifth of what bfloat16 loses with torch over a mask; chance alone is about a tenth."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf(SIZES | FAMILIES[family])).bfloat16()
    exact = Transformer(ModelConfig.from_hf(SIZES | FAMILIES[family])).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(97, (2, 320), generator=torch.Generator().manual_seed(1))
    lengths = [[140, 1, 179], [260, 60]]
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    weights = draw(2, 320, 32, dtype=torch.float64)

    model.activation_checkpointing = checkpointing
    found = states_and_gradients(model, tokens, documents, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SHORTEST", 1000)
        budget = states_and_gradients(model, tokens, documents, weights)
    truth, total = torch.zeros(2, 320, 32, dtype=torch.float64), 0
    for row in range(2):
        for number in range(len(lengths[row])):
            one = documents[row] == number
            states, gradient = states_and_gradients(exact, tokens[None, row, one], None, weights[None, row, one])
            truth[row, one] = states[0]
            total = total + gradient
    for name, mine, theirs in zip(
        ("states", "gradients"), errors(found, [truth, total]), errors(budget, [truth, total]), strict=True
    ):
        assert mine <= 1.2 * theirs, f"{name}: {mine:.2e}, torch's own {theirs:.2e}"


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_a_document_whose_numbers_lie_apart_is_read_right(which):
    """torch's operator would take any last stride for 1."""
    values = list(operands(1, 4, 4, 400, 32, torch.float32))
    values[which] = values[which].mT.contiguous().mT
    assert values[which].stride(-1) != 1
    q, k, v, dout = values
    check(attention, q, k, v, make_layout("none", 1, 400), dout)


def test_halves_keep_no_copies_of_shared_heads():
    q, k, v, _ = (x.requires_grad_() for x in operands(1, 8, 2, 512, 32))
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def kept_by(function):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(q, k, v, None)
        return sum(kept.values())

    mask = 256 * 512 * q.itemsize  # of the second half
    assert kept_by(attention) <= kept_by(torchs) + mask < 2 * sum(x.nbytes for x in (q, k, v)) + mask
