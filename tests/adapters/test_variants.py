"""Variants of the experts in a model: statistics, balance, merging, packing, decoding, noise, gates of a user's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pedgpt.adapters import (
    ExpertLoRALinear,
    adapted_layers,
    balance_loss,
    gate_metrics,
    inject_experts,
    merge_lora,
    pack_adapters,
    record_gates,
    set_noise_rows,
    unmerge_lora,
)
from pedgpt.models import generate, load_model, save_model

VARIANTS = {
    "top 1": {"top_k": 1},
    "one A": {"shared_A": True},
    "none universal": {"num_universal_experts": 0},
    "two universal": {"num_universal_experts": 2},
    "by block": {"num_specific_experts": [2, 5]},
    "all": {"top_k": 2, "shared_A": True, "num_universal_experts": 2, "num_specific_experts": {"*.0.*": 2, "*": 4}},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


class Cosine(ExpertLoRALinear):
    """G = softmax of the cosines between x and the rows of W_g, over a learned temperature."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(self.router.new_ones(1))

    def adapter_parameters(self):
        return {**super().adapter_parameters(), "temperature": self.temperature}

    def gates(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        cosines = F.normalize(x.to(wide), dim=-1) @ F.normalize(self.router.to(wide), dim=-1).T
        return (cosines / self.temperature.to(wide).square()).softmax(-1)


@pytest.fixture
def adapted(make_model, randomize):
    def make(variant="all", dtype=torch.float32, **settings):
        model = make_model().to(dtype)
        inject_experts(model, **{"rank": 3, "alpha": 5, **VARIANTS[variant], **settings})
        return randomize(model).train()

    return make


def by_hand(layer, x, noise=None):
    """(y, gates) of a layer from its named experts, in float64; `noise` [B, T, N]."""
    scores = x @ layer.router.T
    if noise is not None:
        scores = scores + noise * F.softplus(x @ layer.router_noise.T)
    if layer.top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(layer.top_k, -1).values[..., -1:], -torch.inf)
    gates = scores.softmax(-1) if type(layer) is ExpertLoRALinear else layer.gates(x)
    weights = [1.0] * layer.num_universal_experts + list(gates.unsqueeze(-1).unbind(-2))
    y = F.linear(x, layer.weight, layer.bias)
    for weight, (A, B) in zip(weights, [*layer.universal_experts, *layer.specific_experts], strict=True):
        y = y + layer.scaling * weight * (x @ A.T @ B.T)
    return y, gates


@pytest.mark.parametrize("layer_type", [ExpertLoRALinear, Cosine])
@every_variant
def test_layers_match_their_named_experts_in_float64(adapted, tokens, variant, layer_type):
    """Output, every gradient, and the noise of rows, as one layer draws it however many experts others have."""
    model = adapted(variant, torch.float64, layer_type=layer_type)
    rows = torch.tensor([3, 9])
    set_noise_rows(model, 5, rows)
    for layer in adapted_layers(model).values():
        x = torch.randn(2, 6, layer.in_features, dtype=torch.float64, requires_grad=True)
        noise = layer.noise_stream.normal(x.new_zeros(2, 6, layer.num_specific_experts))
        results = []
        for y in (layer(x), by_hand(layer, x, noise)[0]):
            leaves = [x, *layer.adapter_parameters().values()]
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)])
        for found, expected in zip(*results, strict=True):
            expected = torch.zeros_like(found) if expected is None and found is not None else expected
            assert (found is None) == (expected is None)
            assert found is None or torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_type", [ExpertLoRALinear, Cosine])
@every_variant
def test_recorded_gates_and_the_balance_loss_match_hand_arithmetic(adapted, tokens, variant, layer_type):
    model = adapted(variant, torch.float64, layer_type=layer_type).eval()
    where = tokens % 3 > 0
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in adapted_layers(model).items()
    ]
    with record_gates(model, where) as records:
        y = model(tokens)
    for hook in hooks:
        hook.remove()
    gates = {name: by_hand(layer, inputs[name])[1][where] for name, layer in adapted_layers(model).items()}
    ratios = []
    for name, found in gates.items():
        sums = found.sum(0)
        torch.testing.assert_close(records[name].totals[:-2], sums, rtol=1e-12, atol=1e-12)
        ratios.append(((sums - sums.mean()) ** 2).mean() / sums.mean() ** 2)
    expected = sum(ratios) / len(ratios)
    found = balance_loss(records)
    assert expected > 1e-4 and abs(found - expected) <= 1e-12
    trained = [p for p in model.parameters() if p.requires_grad]
    results = [
        torch.autograd.grad(y.square().mean() + 3 * loss, trained, retain_graph=True, allow_unused=True)
        for loss in (found, expected)
    ]
    for ours, theirs in zip(*results, strict=True):
        assert ours is None or torch.allclose(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=1e-11)
    metrics = gate_metrics(records, 30)
    widest = max(g.shape[-1] for g in gates.values())
    assert list(metrics) == [f"gates/expert_{j + 1}" for j in range(widest)] + ["gates/entropy"]
    for j in range(widest):
        means = [g.detach().mean(0)[j] for g in gates.values() if g.shape[-1] > j]
        assert not metrics[f"gates/expert_{j + 1}"].requires_grad
        assert float(metrics[f"gates/expert_{j + 1}"]) == pytest.approx(30 * float(sum(means)) / len(means))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_the_balance_loss_is_the_same_with_recomputation(adapted, tokens, checkpointing):
    results = []
    for how in ("none", checkpointing):
        model = adapted()
        model.activation_checkpointing = how
        set_noise_rows(model, 5, torch.arange(4))
        with record_gates(model, tokens > 20) as records:
            y = model(tokens)
        (y.square().mean() + 3 * balance_loss(records)).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_on_the_balance_loss_alone_makes_shares_equal(adapted, tokens):
    model = adapted("two universal")
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n.endswith("router")], lr=0.03)
    losses = []
    for _ in range(60):
        set_noise_rows(model, 0, torch.arange(4))
        with record_gates(model) as records:
            model(tokens)
        losses.append(balance_loss(records))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 20


def test_without_a_token_the_balance_loss_is_zero(adapted, tokens):
    model = adapted()
    with record_gates(model, torch.zeros_like(tokens, dtype=torch.bool)) as records:
        model(tokens)
    loss = balance_loss(records)
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layer_type", [ExpertLoRALinear, Cosine])
@every_variant
def test_packed_copied_and_decoded_alike(adapted, tokens, variant, layer_type):
    model = adapted(variant, torch.bfloat16, layer_type=layer_type)
    set_noise_rows(model, 5, torch.arange(4))

    def outcome(model):
        model.zero_grad()
        y = model(tokens)
        y.float().square().mean().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = outcome(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    pack_adapters(model)
    assert all(layer.packed_parameters() is not None for layer in adapted_layers(model).values())
    for found in (outcome(model), outcome(twin)):
        assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model.float().eval()
    prompt = tokens[0].tolist()
    (answer,) = generate(model, [prompt], max_new_tokens=12)
    with torch.no_grad():
        whole = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].argmax(-1)
    assert whole.tolist() == answer


@every_variant
def test_universal_experts_are_merged_and_unmerged(adapted, tokens, variant):
    model = adapted(variant, torch.float64).eval()
    logits = model(tokens)
    layers = adapted_layers(model)
    if not VARIANTS[variant].get("num_universal_experts", 1):
        with pytest.raises(ValueError, match="universal_only is for experts that are always on"):
            merge_lora(model, universal_only=True)
        assert torch.equal(model(tokens), logits)
        return
    merge_lora(model, universal_only=True)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)  # norms and rope compute in float32
    for name, layer in adapted_layers(model).items():
        weight = layers[name].weight + layer.scaling * sum(B @ A for A, B in layers[name].universal_experts)
        torch.testing.assert_close(layer.weight, weight, rtol=1e-13, atol=1e-13)
        assert not any(B.any() for _, B in layer.universal_experts) and layer.lora_B.any()
    unmerge_lora(model)
    assert torch.equal(model(tokens), logits)


@every_variant
def test_a_quantised_base_computes_the_same_addition(make_model, randomize, tmp_path, variant):
    save_model(make_model(), tmp_path)
    model = load_model(tmp_path, quantize="int8")
    inject_experts(model, rank=3, **VARIANTS[variant])
    randomize(model).eval()
    for layer in adapted_layers(model).values():
        x = torch.randn(2, 5, layer.in_features, requires_grad=True)
        found = layer(x)
        base = layer.base_type.forward(layer, x)
        plain = copy.deepcopy(layer)
        plain.weight, plain.quantization = nn.Parameter(torch.zeros(layer.out_features, layer.in_features)), None
        torch.testing.assert_close(found - base, plain(x), rtol=1e-4, atol=1e-4)
        found.sum().backward()
        assert all(p.grad is not None for name, p in layer.adapter_parameters().items() if name != "router_noise")


def test_only_k_specific_experts_of_a_token_have_a_weight():
    layer = ExpertLoRALinear(nn.Linear(9, 4), 2, 4, 5, top_k=2)
    nn.init.normal_(layer.router)
    with record_gates(nn.Sequential(layer)) as records:
        layer(torch.randn(1, 9))
    mean = records["0"].mean()
    assert sum(weight > 0 for weight in mean) == 2 and sum(mean) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_a_k_out_of_range_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k must be in 1 to num_specific_experts, 3, found {top_k}"):
        ExpertLoRALinear(nn.Linear(3, 3), num_specific_experts=3, top_k=top_k)


def test_universal_experts_are_at_least_none():
    with pytest.raises(ValueError, match="num_universal_experts must be at least 0, found -1"):
        ExpertLoRALinear(nn.Linear(3, 3), num_universal_experts=-1)


@every_variant
def test_a_new_adapter_is_the_identity_bit_for_bit(make_model, tokens, variant):
    model, base = make_model().train(), make_model()
    inject_experts(model, **VARIANTS[variant])
    assert torch.equal(model(tokens), base(tokens))


@pytest.mark.parametrize(("top_k", "learns"), [(1, False), (2, True), (None, True)])
def test_a_router_learns_unless_one_expert_has_all_the_weight(adapted, top_k, learns):
    """The softmax over one route is 1 whatever the route is, so that no gradient comes back."""
    model = adapted("none universal", top_k=top_k)
    model(torch.arange(12)[None]).logsumexp(-1).sum().backward()
    for layer in adapted_layers(model).values():
        for weight in (layer.router, layer.router_noise):
            assert bool(weight.grad.abs().max() > 1e-6) == learns
        assert layer.lora_A.grad.abs().max() > 1e-6
