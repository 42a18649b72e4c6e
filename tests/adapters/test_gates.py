"""Gate statistics: sums over the tokens that count, against hand computations."""

import math

import pytest
import torch
from torch import nn

from pedgpt.adapters import ExpertLoRALinear, GateRecord, gate_metrics, inject_experts, inject_lora, record_gates
from pedgpt.kernels.expert_gate import gate_totals


def gates(*shape, experts=3):
    return torch.rand(*shape, experts, generator=torch.Generator().manual_seed(7)).softmax(-1)


def test_means_and_entropy_match_a_hand_computation():
    record, values = GateRecord(), gates(4, 9)
    record.add(gate_totals(values[:2]))
    record.add(gate_totals(values[2:]))
    rows = values.double().flatten(0, 1)
    assert record.count == 36
    assert record.mean() == pytest.approx(rows.mean(0).tolist(), abs=1e-7)
    assert record.entropy() == pytest.approx(-(rows * rows.log()).sum(-1).mean().item(), abs=1e-6)


def test_entropy_is_zero_for_one_expert_and_log_n_for_equal_ones():
    sure, equal = GateRecord(), GateRecord()
    sure.add(gate_totals(torch.eye(4)[[2, 0, 1]]))
    equal.add(gate_totals(torch.full((5, 4), 0.25)))
    assert sure.entropy() == 0 and equal.entropy() == pytest.approx(math.log(4), abs=1e-6)


def test_only_the_tokens_of_the_mask_count():
    values, where = gates(2, 6), torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    record, chosen = GateRecord(), GateRecord()
    record.add(gate_totals(values, where))
    chosen.add(gate_totals(values[where]))
    assert 0 < record.count == int(where.sum()) < 12
    assert record.mean() == pytest.approx(chosen.mean()) and record.entropy() == pytest.approx(chosen.entropy())


@pytest.mark.parametrize("shape", [(6,), (2, 1), (2, 7), (1, 2, 6)])
def test_a_mask_of_another_shape_is_refused(shape):
    layer = nn.Sequential(ExpertLoRALinear(nn.Linear(5, 4)))
    with pytest.raises(ValueError, match=r"count must have the shape \[2, 6\], found "):
        with record_gates(layer, torch.ones(shape, dtype=torch.bool)):
            layer(torch.zeros(2, 6, 5))


def test_metrics_are_sums_over_tokens_and_means_over_layers(make_model, tokens, randomize):
    model = make_model()
    names = inject_experts(model, num_specific_experts=2, target_modules=["o_proj", "up_proj"])
    randomize(model).eval()
    where = tokens % 3 == 0
    with record_gates(model, where) as records:
        model(tokens)
    found = gate_metrics(records)
    assert list(found) == ["gates/expert_1", "gates/expert_2", "gates/entropy"]
    for number, name in enumerate(("gates/expert_1", "gates/expert_2")):
        expected = sum(records[layer].mean()[number] for layer in names) / len(names) * int(where.sum())
        assert float(found[name]) == pytest.approx(expected)
    assert float(found["gates/expert_1"] + found["gates/expert_2"]) == pytest.approx(int(where.sum()))
    entropy = sum(records[layer].entropy() for layer in names) / len(names) * int(where.sum())
    assert float(found["gates/entropy"]) == pytest.approx(entropy)


def test_recording_changes_neither_output_nor_gradient(make_model, tokens, randomize):
    def result(recorded):
        model = make_model()
        inject_experts(model)
        randomize(model).train()
        torch.manual_seed(3)
        if recorded:
            with record_gates(model):
                y = model(tokens)
        else:
            y = model(tokens)
        y.square().mean().backward()
        return [y, *(p.grad for p in model.parameters() if p.requires_grad)]

    assert all(torch.equal(a, b) for a, b in zip(result(True), result(False), strict=True))


def test_what_checkpointing_computes_again_is_not_counted_again(make_model, tokens):
    model = make_model()
    inject_experts(model, target_modules="q_proj")
    model.train().activation_checkpointing = "block"
    with record_gates(model) as records:
        loss = model(tokens).square().mean()
    loss.backward()
    assert {record.count for record in records.values()} == {tokens.numel()}


def test_an_inner_recording_gives_the_outer_one_back(make_model, tokens):
    model = make_model().eval()
    inject_experts(model, target_modules="q_proj")
    with record_gates(model) as outer:
        model(tokens)
        with record_gates(model) as inner:
            model(tokens[:1])
        model(tokens)
    assert {record.count for record in inner.values()} == {tokens[:1].numel()}
    assert {record.count for record in outer.values()} == {2 * tokens.numel()}


def test_nothing_recorded_is_an_error_that_says_so(make_model):
    model = make_model()
    inject_experts(model, target_modules="q_proj")
    with record_gates(model) as records:
        pass
    for read in (lambda: gate_metrics(records), GateRecord().mean, GateRecord().entropy):
        with pytest.raises(ValueError, match="no gates were recorded"):
            read()
    empty = GateRecord()
    empty.add(gate_totals(torch.zeros(0, 3)))
    with pytest.raises(ValueError, match="no gates were recorded"):
        empty.mean()


def test_a_model_without_experts_cannot_be_recorded(make_model):
    model = make_model()
    inject_lora(model)
    with pytest.raises(ValueError, match="no expert layers"), record_gates(model):
        pass


def test_recording_needs_no_python_number_before_it_is_read():
    """Nothing that would wait for a device: the totals stay tensors."""
    layer = nn.Sequential(ExpertLoRALinear(nn.Linear(6, 4)))
    with record_gates(layer) as records:
        layer(torch.randn(2, 6))
    assert isinstance(records["0"].totals, torch.Tensor)
    assert all(isinstance(value, torch.Tensor) for value in gate_metrics(records).values())
