"""What experts do, against hand arithmetic: gates token by token, similarity, experts that nobody asks, the page."""

import html.parser

import pytest
import torch
from torch import nn

from pedgpt.adapters import ExpertLoRALinear, inject_experts
from pedgpt.data import train_tokenizer
from pedgpt.data.examples import Example
from pedgpt.evaluation.routing import (
    expert_similarity,
    layer_number,
    mean_by_expert,
    measure,
    page,
    pieces,
    token_gates,
    unused_experts,
)
from pedgpt.models import ModelConfig, Transformer


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama", vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    made = Transformer(config).eval()
    inject_experts(made, num_specific_experts=3, rank=2)
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return made


def test_token_gates_match_the_softmax_of_each_layers_own_input(model):
    inputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertLoRALinear):
            layer.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0][0]))
    tokens = torch.randint(0, 300, (11,))
    found = token_gates(model, tokens)
    assert found.keys() == inputs.keys() and len(found) == 14
    for name, x in inputs.items():
        expected = (x @ model.get_submodule(name).router.t()).softmax(-1)
        assert torch.allclose(found[name], expected.detach(), atol=1e-6) and found[name].shape == (11, 3)


@pytest.mark.parametrize("settings", [{}, {"shared_A": True}, *({"num_universal_experts": n} for n in (0, 2))])
def test_similarity_matches_that_of_the_whole_products(settings):
    torch.manual_seed(1)
    layer = ExpertLoRALinear(nn.Linear(10, 7), rank=2, num_specific_experts=3, **settings)
    nn.init.normal_(layer.lora_B)
    products = [(B @ A).flatten() for A, B in (*layer.universal_experts, *layer.specific_experts)]
    expected = torch.stack([torch.stack([torch.cosine_similarity(p, q, dim=0) for q in products]) for p in products])
    assert torch.allclose(expert_similarity(layer), expected, atol=1e-5)


def test_an_expert_that_adds_nothing_is_like_none(model):
    layer = ExpertLoRALinear(nn.Linear(10, 7))  # as it begins: B is zero
    assert expert_similarity(layer).count_nonzero() == 0


def test_experts_that_nobody_asks_are_named_with_what_to_do():
    means = {"layers.0.mlp.up_proj": [0.5, 0.48, 0.02], "layers.1.mlp.up_proj": [0.4, 0.3, 0.3]}
    first, advice = unused_experts(means)
    assert first == "layers.0.mlp.up_proj: expert 3 (2.0%) of the weight, where an equal share is 33.3%"
    assert "--balance" in advice
    assert unused_experts({"a": [0.4, 0.6]}) == [] and unused_experts({"a": [1.0]}) == []


class Spans(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.titles, self.groups, self.tags, self.inside = [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag
        if tag == "span" and (title := dict(attributes).get("title")):
            self.titles.append((title, dict(attributes)["style"]))

    def handle_data(self, data):
        if self.inside == "h3":
            self.groups.append(data)


def test_the_page_shows_each_token_in_its_strongest_experts_color():
    sure = torch.tensor([[0.0, 1.0], [0.9, 0.1], [0.5, 0.5]])
    gates = {f"model.layers.{i}.mlp.up_proj": sure for i in range(4)}
    gates["model.layers.3.mlp.down_proj"] = torch.eye(3)  # another number of experts
    found = Spans(page({"<b>答</b>": (["感", "<script>", ""], gates)}, groups=2))
    assert found.groups == ["layers 0 to 1", "layers 2 to 3, 2 experts", "layers 2 to 3, 3 experts"]
    assert not {"script", "b"} & found.tags
    assert [title for title, _ in found.titles[:3]] == ["1: 0.00  2: 1.00", "1: 0.90  2: 0.10", "1: 0.50  2: 0.50"]
    colors = [style for _, style in found.titles]
    assert colors[0].startswith("background:#E0772F") and colors[1].startswith("background:#2F6DB5")
    strength = [int(style[-2:], 16) for style in colors[:3]]
    assert strength[0] > strength[1] > strength[2] == round(255 * 0.08)


def test_pieces_are_the_text_of_the_tokens():
    tokenizer = train_tokenizer(["孩子发烧怎么办"] * 4, vocab_size=270, special_tokens=["<unk>", "<s>", "</s>"])
    tokens = tokenizer.encode("孩子发烧😀。")
    found = pieces(tokenizer, tokens)
    assert "".join(found) == "孩子发烧😀。" and len(found) == len(tokens) and "" in found


def test_the_number_of_a_layer_is_read_from_its_name():
    assert [layer_number(name) for name in ("model.layers.12.mlp.up_proj", "transformer.h.3.attn", "fc")] == [12, 3, 0]


def test_what_is_measured_on_tasks_matches_the_gates_of_their_tokens(model):
    rows = {"a": [[Example(list(range(9)), list(range(1, 10)))]], "b": [[Example([7, 8], [8, 9])], [Example([3], [4])]]}
    found = measure(model, {**rows, "none": []})
    gates = [torch.stack(list(token_gates(model, torch.tensor(tokens)).values())) for tokens in (range(9), [7, 8], [3])]
    for task, parts in {"a": gates[:1], "b": gates[1:]}.items():
        means = torch.cat(parts, dim=1).mean(1)  # [layers, experts]
        assert torch.allclose(torch.tensor(list(found["layer_gates"][task].values())), means, atol=1e-6)
        assert torch.allclose(torch.tensor(found["gates"][task]), means.mean(0), atol=1e-6)
        entropy = torch.special.entr(torch.cat(parts, dim=1)).sum(-1).mean()
        assert found["gate_entropy"][task] == pytest.approx(entropy.item(), abs=1e-5)
    assert found["gates"].keys() == {"a", "b"} and torch.tensor(found["similarity"]).shape == (4, 4)
    assert mean_by_expert([[0.5, 0.5], [0.2, 0.2, 0.6]]) == pytest.approx([0.35, 0.35, 0.6])
