"""Packed documents never see each other: bit for bit, in RoPE and in ALiBi models."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = ["llama", "qwen3", "baichuan-rope", "baichuan-alibi"]
LAYOUTS = [[5, 7, 3], [1, 1, 1, 1], [1, 10, 1], [2, 1, 6, 1, 5], [9, 1], [1, 130, 1, 3, 370, 40]]


def documents_of(layout, names=(4, 0, -1, 17, 3, 8)):
    """Document ids [1, T]: any integers, in no order."""
    return torch.tensor([[name for name, size in zip(names, layout, strict=False) for _ in range(size)]])


@pytest.mark.parametrize(
    ("layout", "dtype"), [(layout, (torch.float32, torch.bfloat16)[i % 2]) for i, layout in enumerate(LAYOUTS)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_changing_a_document_leaves_the_others_bit_for_bit(make_model, random_tokens, kind, layout, dtype):
    model = make_model(kind).to(dtype)
    documents = documents_of(layout)
    tokens = random_tokens(*documents.shape)
    with torch.no_grad():
        before = model(tokens, documents=documents)
        for name in documents.unique():
            inside = documents == name
            changed = torch.where(inside, (tokens + 1 + random_tokens(*tokens.shape, seed=9) % 130) % 131, tokens)
            after = model(changed, documents=documents)
            assert torch.equal(after[~inside], before[~inside])
            assert (after[inside] != before[inside]).any(-1).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_document_matches_the_document_alone(make_model, random_tokens, kind, layout):
    model = make_model(kind)
    documents = documents_of(layout)
    tokens = random_tokens(*documents.shape)
    with torch.no_grad():
        parts = model(tokens, documents=documents).split(layout, dim=1)
        alone = [model(part) for part in tokens.split(layout, dim=1)]
    for got, expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_packed_differently(make_model, random_tokens, kind):
    model = make_model(kind)
    documents = torch.cat([documents_of(layout) for layout in ([5, 7, 3], [1, 13, 1], [15])])
    tokens = random_tokens(3, 15)
    with torch.no_grad():
        together = model(tokens, documents=documents)
        for row in range(3):
            single = model(tokens[row : row + 1], documents=documents[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], single, atol=1e-5, rtol=0)
        torch.testing.assert_close(together[2:], model(tokens[2:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_a_document(make_model, kind):
    """Each document has tokens of its own, so the embedding's gradient tells what a document's loss reaches."""
    model = make_model(kind, tie_word_embeddings=False)
    layout = [4, 1, 6]
    documents, tokens = documents_of(layout), torch.arange(11)[None]
    model.model.embed_tokens.weight.grad = None
    model(tokens, documents=documents)[:, 5:].square().sum().backward()
    reached = model.model.embed_tokens.weight.grad[:11].abs().sum(1)
    assert not reached[:5].any()
    assert reached[5:].all()


def test_packing_matches_a_block_mask_in_transformers(randomize, random_tokens, tmp_path):
    from pedgpt.models import load_model

    theirs = randomize(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=131, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6,
                num_key_value_heads=2,
            )
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    layout = [3, 1, 8]
    tokens = random_tokens(1, 12)
    blocks = torch.block_diag(*[torch.ones(n, n).tril() for n in layout])
    positions = torch.cat([torch.arange(n) for n in layout])[None]
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=blocks.log()[None, None], position_ids=positions).logits
        got = load_model(tmp_path)(tokens, documents=documents_of(layout))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_positions_override_the_derived_ones(make_model, random_tokens, kind):
    model, tokens = make_model(kind), random_tokens(1, 12)
    documents = documents_of([3, 1, 8])
    same = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7]])
    with torch.no_grad():
        derived = model(tokens, documents=documents)
        assert torch.equal(model(tokens, documents=documents, positions=same), derived)
        # Both encodings are relative: a shift per document changes nothing, a stretch does.
        shifted = same + torch.tensor([[9] * 3 + [50] + [2] * 8])
        torch.testing.assert_close(
            model(tokens, documents=documents, positions=shifted), derived, atol=1e-4, rtol=0
        )
        stretched = model(tokens, documents=documents, positions=2 * same)
        assert (stretched - derived).abs().max() > 0.05
