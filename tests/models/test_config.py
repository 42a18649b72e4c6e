"""config.json of the published checkpoints, what is inferred from it, what is refused, and what saving keeps."""

import json

import pytest
import torch

from pedgpt.models import ModelConfig, Transformer, load_model, save_model

BAICHUAN2_7B = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "tokenizer_class": "BaichuanTokenizer", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_max_length": 4096, "model_type": "baichuan", "num_attention_heads": 32,
    "num_hidden_layers": 32, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 125696,
}  # fmt: skip
BAICHUAN2_13B = {
    "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 13696, "model_max_length": 4096, "num_attention_heads": 40,
    "num_hidden_layers": 40, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 125696,
    "z_loss_weight": 0,
}  # fmt: skip
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
LLAMA32_1B = {
    "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
QWEN25_7B = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN25_05B = {
    **QWEN25_7B, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip
QWEN3_06B = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_8B = {
    **QWEN3_06B, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}  # fmt: skip

# (config.json, published number of parameters, what the network must be)
PUBLISHED = {
    "Baichuan2-7B": (
        BAICHUAN2_7B, 7_505_973_248,
        {"positions": "rope", "rope_theta": 10_000.0, "normalize_head": True, "fused_qkv": True, "head_dim": 128,
         "num_key_value_heads": 32, "max_position_embeddings": 4096, "attention_bias": False},
    ),
    "Baichuan2-13B": (
        BAICHUAN2_13B, 13_896_668_160,
        {"positions": "alibi", "normalize_head": True, "fused_qkv": True, "max_position_embeddings": 4096},
    ),
    "Baichuan-7B": (
        {**BAICHUAN2_7B, "vocab_size": 64000, "architectures": ["BaiChuanForCausalLM"]}, 7_000_559_616,
        {"positions": "rope", "normalize_head": False, "fused_qkv": True},
    ),
    "Baichuan-13B": (
        {**BAICHUAN2_13B, "vocab_size": 64000}, 13_264_901_120,
        {"positions": "alibi", "normalize_head": False, "fused_qkv": True},
    ),
    "Llama-2-7B": (
        LLAMA2_7B, 6_738_415_616,
        {"positions": "rope", "rope_theta": 10_000.0, "rope_scaling": None, "rms_norm_eps": 1e-5, "head_dim": 128,
         "fused_qkv": False, "normalize_head": False, "attention_bias": False, "attention_output_bias": False},
    ),
    "Llama-3.2-1B": (
        LLAMA32_1B, 1_235_814_400,
        {"tie_word_embeddings": True, "rope_theta": 5e5, "num_key_value_heads": 8,
         "rope_scaling": LLAMA32_1B["rope_scaling"], "qk_norm": False},
    ),
    "Qwen2.5-7B": (
        QWEN25_7B, 7_615_616_512,
        {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False, "rope_theta": 1e6,
         "head_dim": 128, "qk_norm": False},
    ),
    "Qwen2.5-0.5B": (QWEN25_05B, 494_032_768, {"tie_word_embeddings": True, "head_dim": 64}),
    "Qwen3-0.6B": (
        QWEN3_06B, 596_049_920,
        {"qk_norm": True, "head_dim": 128, "attention_bias": False, "rope_theta": 1e6, "tie_word_embeddings": True},
    ),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360, {"qk_norm": True, "head_dim": 128, "tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_gives_its_published_number_of_parameters(name):
    raw, count, facts = PUBLISHED[name]
    config = ModelConfig.from_hf(raw)
    assert {key: getattr(config, key) for key in facts} == facts
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip_keeps_network_and_other_keys(name):
    raw = {**PUBLISHED[name][0], "eos_token_id": [2, 7], "my_own_key": {"nested": [1, None]}}
    before = json.dumps(raw)
    config = ModelConfig.from_hf(raw)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    assert ModelConfig.from_hf(written).to_hf() == written
    for key, value in raw.items():
        if value is not None:
            assert written[key] == value, key
    assert json.dumps(raw) == before  # the caller's dictionary is not edited


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("baichuan-rope", {"rope_theta": 500.0}),
        ("baichuan-rope", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("baichuan-rope", {"pedgpt_norm_head": False}),
        ("baichuan-alibi", {"rms_norm_eps": 0.01}),
        ("llama", {"pedgpt_positions": "alibi"}),
        ("qwen3", {"pedgpt_norm_head": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 14, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}}),
        ("qwen3", {"attention_bias": True}),
    ],
    ids=str,
)
def test_every_switch_survives_saving(raw_config, randomize, random_tokens, tmp_path, kind, changes):
    model = randomize(Transformer(ModelConfig.from_hf(raw_config(kind, **changes))))
    plain = Transformer(ModelConfig.from_hf(raw_config(kind)))
    if plain.state_dict().keys() == model.state_dict().keys() and "head_dim" not in changes:
        plain.load_state_dict(model.state_dict())
    tokens = random_tokens(1, 20)
    save_model(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
        assert not torch.equal(plain(tokens), model(tokens))  # the switch is one that shows


def test_both_rope_spellings_are_one_config(raw_config):
    scaling = {k: v for k, v in LLAMA32_1B["rope_scaling"].items() if k != "rope_type"}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **scaling}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 500000, "rope_type": "llama3", **scaling}},
    ]
    configs = [ModelConfig.from_hf(raw_config("llama", **spelling)) for spelling in spellings]
    assert configs[0].rope_theta == 5e5 and configs[0].rope_scaling == {"rope_type": "llama3", **scaling}
    assert all(config == configs[0] for config in configs)
    for plain in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": {}}):
        config = ModelConfig.from_hf(raw_config("llama", **plain))
        assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)


def test_own_keys_override_what_the_sizes_imply(raw_config):
    large = ModelConfig.from_hf({**BAICHUAN2_7B, "pedgpt_positions": "alibi", "pedgpt_norm_head": False})
    assert (large.positions, large.normalize_head) == ("alibi", False)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 125_700},  # four tokens were added
        {"vocab_size": 64_008},
        {"hidden_size": 2048},
        {"vocab_size": 125_700, "pedgpt_positions": "rope"},
        {"hidden_size": 2048, "pedgpt_norm_head": True},
        {"vocab_size": 125_700, "pedgpt_positions": None, "pedgpt_norm_head": None},
    ],
    ids=str,
)
def test_a_resized_baichuan_is_not_guessed(changes):
    with pytest.raises(ValueError, match="is no Baichuan that the vendor published") as found:
        ModelConfig.from_hf({**BAICHUAN2_7B, **changes})
    sizes = BAICHUAN2_7B | changes
    for told in ("pedgpt_positions", "pedgpt_norm_head", str(sizes["vocab_size"]), str(sizes["hidden_size"])):
        assert told in str(found.value)
    keys = {"pedgpt_positions": "alibi", "pedgpt_norm_head": True}
    config = ModelConfig.from_hf({**BAICHUAN2_7B, **changes, **keys})
    assert (config.positions, config.normalize_head) == ("alibi", True)
    assert config.to_hf().items() >= keys.items()


def test_a_switch_that_is_no_truth_value_is_refused(raw_config):
    for key in ("pedgpt_norm_head", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        with pytest.raises(ValueError, match=f"{key} must be true or false, found 'false'"):
            ModelConfig.from_hf({**raw_config("llama"), key: "false"})


def test_config_is_read_from_folder_and_dictionary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    expected = ModelConfig.from_hf(QWEN3_06B)
    for source in (tmp_path, str(tmp_path)):
        assert ModelConfig.from_hf(source) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported.*baichuan, llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        (
            {"use_sliding_window": True, "max_window_layers": 1, "max_position_embeddings": 4097},
            "window of 4096 tokens is used.*use_sliding_window",
        ),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 31}, "window of 31 tokens is used"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*only full_attention"),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            'window of 4096 tokens is used.*"sliding_window": null',
        ),
        ({"model_type": "mistral", "sliding_window": 8}, "window of 8 tokens is used"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": 50}, "hidden_size 50 is.* multiple of num_attention_heads 6"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is.* multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "even head_dim, found 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
        ({"vocab_size": "131"}, "vocab_size must be a positive integer, found '131'"),
        ({"vocab_size": True}, "vocab_size"),
        ({"intermediate_size": 50.0}, "intermediate_size"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, found None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, found 0"),
        ({"pedgpt_positions": "learned"}, "pedgpt_positions.*'learned'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "lacks factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}}, "beta_fast must be a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "differ from layer to layer"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "lacks high_freq_factor"),
    ],
    ids=str,
)
def test_unusable_config_is_an_error(raw_config, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**raw_config("llama"), **changes})


def test_errors_name_missing_keys_and_files(raw_config, tmp_path):
    raw = raw_config("llama")
    with pytest.raises(ValueError, match="missing vocab_size, num_hidden_layers"):
        ModelConfig.from_hf({k: v for k, v in raw.items() if k not in ("vocab_size", "num_hidden_layers")})
    with pytest.raises(ValueError, match="W_pack"):
        own = {"pedgpt_positions": "rope", "pedgpt_norm_head": False}
        ModelConfig.from_hf({**raw, "model_type": "baichuan", **own})
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match=f"{file}: no such file"):
        ModelConfig.from_hf(tmp_path)
    for content, message in ((b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "expected a JSON object")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_hf(tmp_path)
