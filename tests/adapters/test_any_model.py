"""Experts on models of transformers: equal to a loop over the experts, or refused with what to do instead."""

import copy

import pytest
import torch
import transformers
from torch import nn

from pedgpt.adapters import adapted_layers, inject_experts, inject_lora, load_adapter, save_adapter

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PLAIN = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4} | {
    "decoder_start_token_id": 0
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | {
    key: SIZES[key] for key in ("initializer_range", "bos_token_id", "eos_token_id")
}
# Family, its settings, and how many layers "all-linear" finds; `ForCausalLM` where no class is named.
WORKS = {
    "Llama": (SIZES, 14),
    "Qwen2": (SIZES, 14),
    "Qwen3": (SIZES | {"tie_word_embeddings": True}, 14),
    "Gemma3Text": (SIZES | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}, 14),
    "Phi3": (SIZES, 8),  # qkv_proj and gate_up_proj hold several layers' rows
    "GPTNeoX": (PLAIN, 8),  # as does query_key_value
    "OPT": ({key: value for key, value in PLAIN.items() if key != "intermediate_size"} | {"ffn_dim": 44}, 12),
    "Bert": (PLAIN, 13),
    "T5": (T5 | {"tie_word_embeddings": True}, 32),
}
CLASSES = {
    "Bert": "BertForMaskedLM", "T5": "T5ForConditionalGeneration", "Gemma3Text": "Gemma3ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
}  # fmt: skip
MAMBA = {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
FALCON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = SIZES | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}


def make(family, settings):
    """A random model in evaluation and float64, or float32 where its own experts know no other."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))
    model = model._from_config(config, attn_implementation="eager").eval()
    return model if "num_experts_per_tok" in settings else model.double()


class Loop(nn.Module):
    """SPEC §4, one expert after another."""

    def __init__(self, base, layer, rank):
        super().__init__()
        self.base, self.weight = base, base.weight  # T5 asks a layer for its weight's dtype
        self.lora_A, self.lora_B, self.router = layer.lora_A, layer.lora_B, layer.router
        self.rank, self.scaling = rank, layer.alpha / rank

    def forward(self, x):
        gates = torch.exp(x @ self.router.T)
        gates = gates / gates.sum(-1, keepdim=True)
        y = self.base(x)
        for e in range(len(self.router) + 1):
            rows = slice(e * self.rank, (e + 1) * self.rank)
            expert = x @ self.lora_A[rows].T @ self.lora_B[:, rows].T
            y = y + self.scaling * expert * (gates[..., e - 1 : e] if e else 1)
        return y


def loss_of(model):
    """(loss, logits) of fixed tokens, of which some are padding."""
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    found = model(input_ids=tokens, attention_mask=mask, labels=tokens)
    return found.loss, found.logits


@pytest.mark.parametrize("family", WORKS)
def test_experts_on_a_family_match_a_loop_over_them(family, randomize):
    settings, count = WORKS[family]
    model, loop = make(family, settings), make(family, settings)
    names = inject_experts(model, rank=3, alpha=5, num_specific_experts=2)
    assert len(names) == count and "lm_head" not in names
    randomize(model)
    for name, layer in adapted_layers(copy.deepcopy(model)).items():
        parent, _, child = name.rpartition(".")
        setattr(loop.get_submodule(parent), child, Loop(loop.get_submodule(name), layer, 3))
    results = []
    for each in (model, loop):
        loss, logits = loss_of(each)
        loss.backward()
        results.append(logits)
    base = make(family, settings)
    assert (loss_of(base)[1] - results[0]).abs().max() > 0.01  # norms and rope compute in float32 in some families
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    for name in names:
        for parameter in ("lora_A", "lora_B", "router"):
            found, expected = (getattr(each.get_submodule(name), parameter).grad for each in (model, loop))
            size = expected.abs().max()
            assert size > 0
            torch.testing.assert_close(found / size, expected / size, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inject", [inject_lora, inject_experts])
@pytest.mark.parametrize("targets", ["all-linear", "c_attn", "transformer.h.1.mlp.c_fc", "*.attn.*"])
def test_a_transposed_weight_is_refused_by_name(inject, targets):
    model = make("GPT2", GPT2)
    with pytest.raises(ValueError, match=r"asks for transformer.h.*weight, \[32, .* of a Conv1D .*nn.Linear first"):
        inject(model, target_modules=targets)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_transposed_weight_in_a_linear_layer_works_as_the_message_says(randomize):
    model, base = make("GPT2", GPT2), make("GPT2", GPT2)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape, dtype=module.weight.dtype)
            linear.weight.data, linear.bias = module.weight.data.T.contiguous(), module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    assert len(inject_experts(model, rank=2)) == 8
    torch.testing.assert_close(loss_of(model)[1], loss_of(base)[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "settings", "reachable"),
    [
        ("Qwen3Moe", MOE | {"num_experts": 4}, "k_proj, o_proj, q_proj, v_proj"),
        ("Mixtral", MOE | {"num_local_experts": 4}, "k_proj, o_proj, q_proj, v_proj"),
        ("GptOss", MOE | {"num_local_experts": 4}, "k_proj, o_proj, q_proj, v_proj"),
    ],
)
def test_experts_in_one_parameter_are_never_left_out_silently(family, settings, reachable, tmp_path, randomize):
    model = make(family, settings)
    for targets in ("all-linear", "gate_up_proj", "*.mlp.*", ["q_proj", "*down_proj"]):
        with pytest.raises(ValueError, match=rf"experts\.\w+, \[4, .* of a {family}Experts .*has {reachable}\)"):
            inject_experts(model, target_modules=targets)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())
    # What the message offers works, and loads again.
    assert len(inject_experts(model, target_modules=reachable.split(", "), rank=2)) == 8
    loss, logits = loss_of(randomize(model))
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "router_noise" not in n)
    save_adapter(model, tmp_path)
    again = make(family, settings)
    assert len(load_adapter(again, tmp_path)) == 8
    torch.testing.assert_close(loss_of(again)[1], logits, rtol=1e-6, atol=1e-6)


def test_layers_whose_weights_a_kernel_takes_are_left_out_with_a_warning():
    """On a CPU only dt_proj is never called; the kernels for a GPU also take the weights of x_proj and out_proj."""
    model = make("Mamba", MAMBA)
    why = r"_proj.weight, which MambaMixer reads without a call of the layer \(6 such"
    with pytest.warns(UserWarning, match=f"leaves out backbone.layers.0.mixer.{{1,3}}{why}"):
        assert [name.rpartition(".")[2] for name in inject_experts(model)] == ["in_proj"] * 2
    with pytest.raises(ValueError, match=r"asks for backbone.layers.0.mixer.x_proj.weight, .*model has in_proj\)"):
        inject_lora(model, target_modules="x_proj", name="other")


def test_linear_layers_that_compute_otherwise_are_refused_by_name():
    why = r"query_key_value.weight, \[.*\] of a FalconLinear \(8 such in all\).* has none that is plain\)"
    with pytest.raises(ValueError, match=rf"also asks for transformer.h.0.self_attention.{why}"):
        inject_experts(make("Falcon", FALCON))


@pytest.mark.parametrize(
    ("family", "head"),
    [("Bert", "cls.predictions.decoder"), ("GPTNeoXJapanese", "embed_out"), ("BioGpt", "output_projection")],
)
def test_a_head_of_any_name_stays_out_where_it_shares_nothing(family, head):
    model = make(family, PLAIN | {"tie_word_embeddings": False})
    assert model.get_submodule(head).weight is not model.get_input_embeddings().weight
    assert head not in inject_lora(model)


def test_a_head_that_shares_the_embeddings_is_no_target_under_any_name():
    model = make("Bert", PLAIN)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    with pytest.raises(ValueError, match="'decoder' matches no linear layer"):
        inject_lora(model, target_modules="decoder")
