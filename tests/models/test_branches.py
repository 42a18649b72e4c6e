"""A tree in a row is its paths in rows of their own: states, logits and gradients, with RoPE and with ALiBi."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pedgpt.data import Example, collate_pairs
from pedgpt.data.preference import EncodedPair
from pedgpt.models import load_model
from pedgpt.models.cache import KVCache
from pedgpt.models.transformer import document_positions

KINDS = ["llama", "qwen3", "baichuan-rope", "baichuan-alibi"]
# A row's documents; of each, the tokens of its trunk and of its branches.
LAYOUTS = [
    [[5, 3, 4]],
    [[5, 3, 4], [2, 1, 1], [0, 3, 2], [1, 6, 1, 2]],
    [[0, 2, 3]],
    [[1, 1, 1], [1, 1, 1]],
    [[4], [3, 2], [0, 5], [2, 1, 1, 1, 1, 1]],
    [[60, 40, 50], [70, 2, 90]],
]


def tree_of(layout, names=(4, 0, -1, 17), branch_names=(7, 2, 2**40, -3, 5)):
    """Documents and branches [1, T], and of each path (trunk and one branch) the indices of trunk and of branch."""
    documents, branches, paths = [], [], []
    for name, (trunk, *sizes) in zip(names, layout, strict=False):
        start = len(documents)
        shared = list(range(start, start + trunk))
        documents += [name] * (trunk + sum(sizes))
        branches += [0] * trunk
        for size, branch in zip(sizes, branch_names, strict=False):
            paths.append((shared, list(range(len(branches), len(branches) + size))))
            branches += [branch] * size
        if not sizes:
            paths.append((shared, []))
    return torch.tensor([documents]), torch.tensor([branches]), paths


def visible(documents, branches):
    """The rule, pair by pair: [T, T]."""
    return [
        [
            k <= q and documents[k] == documents[q] and (branches[k] == 0 or branches[k] == branches[q])
            for k in range(len(documents))
        ]
        for q in range(len(documents))
    ]


# Every kind with every layout, and both of them with both dtypes.
@pytest.mark.parametrize(
    ("kind", "layout", "dtype"),
    [(k, layout, (torch.float32, torch.float64)[(i + j) % 2]) for i, k in enumerate(KINDS)
     for j, layout in enumerate(LAYOUTS)],
    ids=str,
)  # fmt: skip
def test_path_of_a_tree_matches_a_row_of_its_own(make_model, random_tokens, kind, layout, dtype):
    model, atol = make_model(kind).to(dtype), 1e-5 if dtype == torch.float32 else 1e-10
    documents, branches, paths = tree_of(layout)
    tokens = random_tokens(*documents.shape)
    with torch.no_grad():
        states = model.hidden_states(tokens, documents=documents, branches=branches)
        logits = model(tokens, documents=documents, branches=branches)
        for trunk, branch in paths:
            row = tokens[:, trunk + branch]
            expected = model.hidden_states(row)
            torch.testing.assert_close(states[:, trunk + branch], expected, atol=atol, rtol=0)
            torch.testing.assert_close(logits[:, trunk + branch], model(row), atol=atol, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_hold_different_trees(make_model, random_tokens, kind):
    model = make_model(kind)
    layouts = [[[5, 3, 4], [2, 1, 1]], [[16]], [[0, 8, 8]], [[1, 15]]]
    documents, branches = (torch.cat(column) for column in zip(*(tree_of(row)[:2] for row in layouts), strict=True))
    tokens = random_tokens(4, 16)
    with torch.no_grad():
        together = model(tokens, documents=documents, branches=branches)
        for i in range(4):
            row = slice(i, i + 1)
            alone = model(tokens[row], documents=documents[row], branches=branches[row])
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_documents_a_row_is_one_tree(make_model, random_tokens, kind):
    model, tokens = make_model(kind), random_tokens(2, 12)
    branches = tree_of([[5, 3, 4]])[1].expand(2, -1)
    with torch.no_grad():
        got = model(tokens, branches=branches)
        assert torch.equal(got, model(tokens, documents=torch.full_like(tokens, 3), branches=branches))
        assert (got - model(tokens))[:, 8:].abs().max() > 0.01
        trunk_only = model(tokens, branches=torch.zeros_like(tokens))
        torch.testing.assert_close(trunk_only, model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [[[5, 3, 4], [0, 2, 2]], [[80, 30, 50], [3, 9, 4]]], ids=str)
def test_changing_a_branch_leaves_all_else_bit_for_bit(make_model, random_tokens, kind, layout, dtype):
    model = make_model(kind).to(dtype)
    documents, branches, paths = tree_of(layout)
    tokens = random_tokens(*documents.shape)
    with torch.no_grad():
        before = model(tokens, documents=documents, branches=branches)
        for _, branch in paths:
            changed = tokens.clone()
            changed[:, branch] = (tokens[:, branch] + 1) % 131
            moved = (model(changed, documents=documents, branches=branches) != before).any(-1)[0]
            assert moved.nonzero()[:, 0].tolist() == branch


@pytest.mark.parametrize(
    ("make", "configure", "changes"),
    [(LlamaForCausalLM, LlamaConfig, {}), (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12})],
)
def test_tree_matches_a_mask_by_hand_in_transformers(randomize, random_tokens, tmp_path, make, configure, changes):
    config = configure(
        vocab_size=131, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, **changes,
    )  # fmt: skip
    theirs = randomize(make(config)).eval()
    theirs.save_pretrained(tmp_path)
    documents, branches, _ = tree_of([[3, 1, 4], [0, 2, 2], [2, 3, 1]])
    tokens = random_tokens(*documents.shape)
    positions = torch.tensor([[0, 1, 2, 3, 3, 4, 5, 6, 0, 1, 0, 1, 0, 1, 2, 3, 4, 2]])
    allowed = torch.tensor(visible(documents[0].tolist(), branches[0].tolist()))
    with torch.no_grad():
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        expected = theirs(tokens, attention_mask=mask[None, None], position_ids=positions).logits
        got = load_model(tmp_path)(tokens, documents=documents, branches=branches)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("documents", "branches", "expected"),
    [
        ([0] * 8, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 3, 4, 5]),
        ([0] * 8, [1, 1, 1, 2, 2, 3, 4, 4], [0, 1, 2, 0, 1, 0, 0, 1]),  # no trunk
        ([0] * 8, [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 2, 0, 1, 1, 2], [0, 1, 2, 2, 0, 1, 2, 1]),
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 2, 3, 0, 1, 0, 1]),  # a branch beside a branch
        ([0, 0, 0, 4, 4, -1, -1, -1], [0, 1, 2, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0, 1, 2]),
        ([7] * 8, [0, 5, -2, 9, 9, 3, 3, 1], [0, 1, 1, 1, 2, 1, 2, 1]),
    ],
)
def test_positions_go_on_from_the_trunk_in_every_branch(documents, branches, expected):
    tokens = torch.zeros(2, 8, dtype=torch.long)
    documents = torch.tensor([documents, [9] * 8])
    branches = torch.tensor([branches, [0, 0, 0, 0, 0, 0, 1, 2]])
    found = document_positions(tokens, documents, branches)
    assert found.tolist() == [expected, [0, 1, 2, 3, 4, 5, 6, 6]]
    if len(set(documents[0].tolist())) == 1:
        assert torch.equal(document_positions(tokens, None, branches), found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(1, 3), max_size=4)), min_size=1, max_size=4))
def test_position_counts_the_tokens_seen_before(layout):
    documents, branches, _ = tree_of([[trunk, *sizes] for trunk, sizes in layout])
    seen = visible(documents[0].tolist(), branches[0].tolist())
    found = document_positions(documents, documents, branches)
    assert found.tolist() == [[sum(row) - 1 for row in seen]]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_float32_as_rows_are(make_model, random_tokens, kind):
    exact, model = make_model(kind), make_model(kind).bfloat16()
    exact.load_state_dict(model.state_dict())
    documents, branches, paths = tree_of([[140, 30, 45], [130, 2, 60], [0, 20, 131]])
    tokens = random_tokens(*documents.shape)
    states = model.hidden_states(tokens, documents=documents, branches=branches)
    ours, rows = [], []
    with torch.no_grad():
        for trunk, branch in paths:
            row = tokens[:, trunk + branch]
            truth = exact.hidden_states(row)[:, len(trunk) :]
            ours.append((states[:, branch] - truth).flatten())
            rows.append((model.hidden_states(row)[:, len(trunk) :] - truth).flatten())
    ours, rows = torch.cat(ours), torch.cat(rows)
    assert ours.square().mean() <= 1.05 * rows.square().mean()
    assert ours.abs().max() <= 1.5 * rows.abs().max()


def answer_loss(model, tokens, at, targets, weights, **layout):
    """Σ w log p(target) over the places `at` [(row, index)]."""
    logits = model(tokens, **layout)
    rows, indices = torch.tensor(at).unbind(1)
    logps = logits[rows, indices].log_softmax(-1)
    return (weights * logps[torch.arange(len(at)), targets]).sum()


# Every layout with RoPE and with ALiBi; the rest with the two richest, of which one needs attention over blocks.
GRADIENTS = [(kind, torch.float32, "none", layout) for kind in ("llama", "baichuan-alibi") for layout in LAYOUTS]
GRADIENTS += [
    (*case, layout) for layout in (LAYOUTS[1], LAYOUTS[-1]) for case in [
        ("qwen3", torch.float32, "none"), ("baichuan-rope", torch.float32, "none"),
        ("qwen3", torch.float64, "none"), ("baichuan-alibi", torch.float64, "none"),
        ("llama", torch.float32, "selective"), ("baichuan-alibi", torch.float32, "block"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "checkpointing", "layout"), GRADIENTS, ids=str)
def test_gradients_match_those_of_rows(make_model, random_tokens, kind, dtype, checkpointing, layout):
    documents, branches, paths = tree_of(layout)
    tokens = random_tokens(*documents.shape)
    generator = torch.Generator().manual_seed(1)
    places = sum(len(branch) for _, branch in paths)
    targets = torch.randint(0, 131, (places,), generator=generator)
    weights = torch.randn(places, generator=generator, dtype=dtype) / places

    apart = make_model(kind, tie_word_embeddings=False).to(dtype)
    width = max(len(trunk + branch) for trunk, branch in paths)
    rows = torch.zeros(len(paths), width, dtype=torch.long)
    at = []
    for i, (trunk, branch) in enumerate(paths):
        rows[i, : len(trunk + branch)] = tokens[0, trunk + branch]
        at += [(i, len(trunk) + t) for t in range(len(branch))]
    expected = answer_loss(apart, rows, at, targets, weights)
    expected.backward()

    together = make_model(kind, tie_word_embeddings=False).to(dtype)
    together.activation_checkpointing = checkpointing
    at = [(0, t) for _, branch in paths for t in branch]
    found = answer_loss(together, tokens, at, targets, weights, documents=documents, branches=branches)
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 1e-10, rtol=0)
    # Norms compute their gradients in float32 even in a float64 model.
    limit = 1e-5 if dtype == torch.float32 else 1e-6
    for (name, parameter), other in zip(apart.named_parameters(), together.parameters(), strict=True):
        error = (other.grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= limit, (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_share_their_prompt_score_as_two_rows(make_model, kind):
    """From `collate_pairs` on: summed log-probabilities of each answer, several pairs in a row."""
    model = make_model(kind).double()
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for prompt, chosen, rejected in [(9, 3, 5), (1, 2, 1), (4, 1, 1), (12, 6, 2), (2, 9, 3)]:
        ids = torch.randint(0, 131, (prompt + chosen + rejected,), generator=generator).tolist()
        answers = ids[prompt : prompt + chosen], ids[prompt + chosen :]
        pairs.append(
            EncodedPair(
                *(
                    Example([*ids[:prompt], *answer][:-1], [-100] * (prompt - 1) + answer)
                    for answer in answers
                )
            )
        )  # fmt: skip
    scores, sizes = [], []
    for shared in (True, False):
        batch = collate_pairs(pairs, range(5), shared_prompt=shared)
        with torch.no_grad():
            logits = model(batch.tokens, documents=batch.documents, branches=batch.branches)
        labelled = batch.labels != -100
        logps = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        scores.append(logits.new_zeros(10).index_add(0, batch.sequences[labelled], logps[labelled]))
        sizes.append(batch.tokens.numel())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-10, rtol=0)
    assert len(collate_pairs(pairs, range(5)).tokens) < 5 and sizes[0] < sizes[1] / 2


def test_branches_are_refused_where_they_cannot_be(make_model, random_tokens):
    model, tokens = make_model("llama"), random_tokens(2, 6)
    with pytest.raises(ValueError, match=r"branches has the shape \[2, 5\], tokens have \[2, 6\]"):
        model(tokens, branches=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"branches has the shape \[6\]"):
        model.hidden_states(tokens, branches=torch.zeros(6, dtype=torch.long))
    cache = KVCache(model, 2, 8)
    with pytest.raises(ValueError, match="branch"):
        model(tokens, branches=torch.zeros_like(tokens), cache=cache)
    assert cache.ids == [[], []]
