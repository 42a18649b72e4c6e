"""Models in 8 and 4 bits: quantised while they are read, and exchanged with bitsandbytes through files."""

import ctypes
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pedgpt.adapters import inject_lora
from pedgpt.kernels.quantized import QuantizedLinear
from pedgpt.models import (
    ModelConfig,
    checkpoint,
    generate,
    load_model,
    load_weights,
    model_fingerprint,
    save_model,
    weights_fingerprint,
)

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = ["nf4", "int8"]
Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """A folder with a llama in bfloat16, as it is and in 8 and 4 bits, in folders of their own."""
    root = tmp_path_factory.mktemp("saved")
    save_model(make_model("llama", **SIZES).bfloat16(), root / "plain")
    for kind in KINDS:
        save_model(load_model(root / "plain", quantize=kind), root / kind)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the plain llama."""
    return shutil.copytree(saved / "plain", tmp_path / "plain")


@pytest.fixture
def quantized(saved, tmp_path):
    """quantized(kind): a copy of that llama in 8 or 4 bits."""
    return lambda kind: shutil.copytree(saved / kind, tmp_path / kind, dirs_exist_ok=True)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changes
    (folder / "config.json").write_text(json.dumps(config))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def logits(model):
    with torch.no_grad():
        found = model(torch.arange(12)[None])
        return found if isinstance(found, torch.Tensor) else found.logits


def from_bitsandbytes(folder, **settings):
    """transformers' model in training mode, in which bitsandbytes does not change to kernels of lower precision."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM  # here, as it takes the ranks below seconds

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **settings).train()
    # LLM.int8() rounds the inputs of layers too, so weights in int8 are compared without it.
    return model.dequantize() if model.config.quantization_config.load_in_8bit else model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_bitsandbytes_load_here_and_ours_load_there(make_model, tmp_path, kind, family):
    """qwen2 has biases and a tied head."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_model(make_model(family, **SIZES), tmp_path / "plain")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**nf4 if kind == "nf4" else {"load_in_8bit": True})
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(from_bitsandbytes(tmp_path / "theirs"))

    model = load_model(tmp_path / "theirs")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert (logits(load_model(tmp_path / "plain")) - expected).abs().max() > 1e-3  # quantisation shows

    save_model(model, tmp_path / "ours")
    stored, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert stored.keys() == ours.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == ours[key].dtype
        if "quant_state" in key:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(ours[key].tolist()))
        else:
            torch.testing.assert_close(ours[key], tensor, atol=1e-6 * ("quant_map" in key), rtol=0)
    assert torch.equal(logits(from_bitsandbytes(tmp_path / "ours")), expected)


@pytest.mark.parametrize("stored", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_quantised_while_they_are_read(folder, monkeypatch, kind, stored):
    """As quantising each whole weight does it; everything else gets the dtype that was asked for."""
    plain = load_model(folder)
    if stored == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoint, "QUANTIZED_BYTES", 7 * 2 * 128)  # 7 rows of 128 numbers, or 4 of 192
    model = load_model(folder, dtype=torch.float32, quantize=kind)
    assert not model.training
    found = model.state_dict()
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            expected = QuantizedLinear(layer, kind)
            expected.quantization.quantize_(expected.weight, [layer.weight])
            assert_equal({key: found.pop(f"{name}.{key}") for key in expected.state_dict()}, expected.state_dict())
            assert not model.get_submodule(name).weight.requires_grad
            assert model.get_submodule(name).quantization.dtype == torch.float32
    assert_equal(found, {key: plain.state_dict()[key].float() for key in found})
    assert len(found) == 7
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parameters == found.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_bit_for_bit(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1)
    model = load_model(folder, quantize=kind)
    save_model(model, tmp_path / "saved")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    layers = [{key.split(".SCB")[0].split(".weight")[0] for key in load_file(shard)} for shard in shards]
    assert sorted(map(len, layers)) == [1] * 21  # other libraries read a layer from one file
    assert len(set.union(*layers)) == 21
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16" and settings["llm_int8_skip_modules"] == ["lm_head"]
    loaded = load_model(tmp_path / "saved")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config == ModelConfig.from_hf(tmp_path / "saved")
    assert loaded.get_submodule(Q).quantization.dtype == torch.bfloat16
    assert logits(load_model(tmp_path / "saved", dtype=torch.float32)).dtype == torch.float32
    half = load_model(tmp_path / "saved", dtype=torch.float16)
    assert half.state_dict()["model.norm.weight"].dtype == torch.float16
    name = "scale" if kind == "int8" else "nested_absmax"
    assert half.state_dict()[f"{Q}.quantization.{name}"].dtype == torch.float32


def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def load_watched(rank, folder, small, kind, result):
    """The bytes of the model and the peak of memory that loading it takes."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD, so that the heap gets no holes
    torch.set_num_threads(1)
    load_model(small, dtype=torch.float16, quantize=kind)  # what the libraries take when they are used first
    before, peaks, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, dtype=torch.float16, quantize=kind)
    done.set()
    watcher.join()
    Path(result).write_text(f"{sum(t.nbytes for t in model.state_dict().values())} {max(peaks) - before}")


@pytest.mark.parametrize(("kind", "stored"), [("nf4", "safetensors"), ("int8", "bin")])
def test_memory_peaks_at_the_quantised_model(folder, tmp_path, start_ranks, kind, stored):
    """84 MB in bfloat16, of which 67 MB become codes: a plain model beside it would show, and so would one shard."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = ModelConfig.from_hf({"model_type": "llama", "vocab_size": 4096, **sizes})
    with torch.device("meta"):
        model = checkpoint.Transformer(config)
    weights = {key: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for key, tensor in model.state_dict().items()}
    save_model(model, tmp_path, weights)
    if stored == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    start_ranks(load_watched, str(tmp_path), str(folder), kind, str(tmp_path / "result"), ranks=1)
    size, peak = map(int, (tmp_path / "result").read_text().split())
    assert 0.9 * size < peak < 1.05 * size + 16 * 2**20


def worker(rank, folder, kind, results):
    dist.init_process_group("gloo", init_method=f"file://{results}/meeting", rank=rank, world_size=2)
    model = load_model(folder, dtype=torch.float32, device="meta", quantize=kind)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_weights(model, folder, dtype=torch.float32)
    local = {key: getattr(tensor, "_local_tensor", tensor) for key, tensor in model.state_dict().items()}
    torch.save({"local": local, "logits": logits(model)}, f"{results}/{rank}.pt")
    while not os.path.exists(f"{results}/{1 - rank}.pt"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize("source", ["plain", "codes"])
def test_two_ranks_hold_their_rows_of_the_codes(make_model, tmp_path, start_ranks, source):
    save_model(make_model("qwen2", **SIZES), tmp_path / "model")
    whole = load_model(tmp_path / "model", quantize="nf4")
    if source == "codes":
        save_model(whole, tmp_path / "codes")
    folder, kind = (tmp_path / "codes", "none") if source == "codes" else (tmp_path / "model", "nf4")
    start_ranks(worker, str(folder), kind, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    for key, tensor in whole.state_dict().items():
        parts = tensor.chunk(2) if key in parameters else [tensor, tensor]
        for rank, part in zip(ranks, parts, strict=True):
            assert rank["local"][key].dtype == part.dtype and torch.equal(rank["local"][key], part), key
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], logits(whole), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_injected_before_loading_stay(folder, kind):
    expected = load_model(folder, dtype=torch.float32, quantize=kind)
    model = load_model(folder, dtype=torch.float32, quantize=kind, device="meta")
    inject_lora(model, target_modules=["q_proj", "*.mlp.*"], rank=4)
    adapter = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
    load_weights(model, folder, dtype=torch.float32)
    assert_equal(model.state_dict(), {**adapter, **expected.state_dict()})
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-6, rtol=0)  # B is zero


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_that_of_the_dequantised_weights(folder, kind):
    model, plain = load_model(folder, dtype=torch.float32, quantize=kind), load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                weight = layer.quantization.dense(layer.weight, torch.float32)
                plain.get_submodule(name).weight.copy_(weight)
    prompts = [[3, 17, 90, 4], [5], [101, 7, 7, 21, 66]]
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    for batch in (prompts, prompts[:1]):
        assert generate(model, batch, max_new_tokens=20) == generate(plain, batch, max_new_tokens=20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_which_some_layers_are_plain_is_saved_as_such(folder, tmp_path, kind):
    model = load_model(folder, dtype=torch.float32, quantize=kind)
    for name, layer in list(model.named_modules()):
        if name.endswith(("q_proj", "1.mlp.down_proj")):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(layer.quantization.dense(layer.weight, torch.float32))
            model.set_submodule(name, plain)
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) == 11
    assert_equal(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(logits(from_bitsandbytes(tmp_path / "saved")), logits(model), atol=2e-5, rtol=0)


def test_a_model_whose_layers_are_all_plain_again_is_a_plain_one(folder, quantized, tmp_path):
    weights = load_model(folder).state_dict()
    save_model(load_model(quantized("nf4")), tmp_path / "merged", weights)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert_equal(load_model(tmp_path / "merged").state_dict(), weights)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', and only 'nf4'"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant is False, and only True"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
        ({"load_in_4bit": False}, "load_in_4bit is False"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight is True"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
    ],
    ids=str,
)
def test_formats_that_would_be_rounded_again_are_refused(quantized, changes, named):
    folder = quantized("nf4")
    configure(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config: {named}.*quantize="):
        load_model(folder)


@pytest.mark.parametrize("names", [3, [3], "lm_head", {"lm_head": 1}], ids=str)
def test_the_list_of_plain_layers_is_checked(quantized, names):
    folder = quantized("int8")
    configure(folder, llm_int8_skip_modules=names)
    with pytest.raises(ValueError, match=r"config\.json: .*: llm_int8_skip_modules must be a list of names, found"):
        load_model(folder)


def test_layers_that_config_json_leaves_plain_are_plain(quantized):
    folder = quantized("nf4")
    configure(folder, llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.1.mlp", "model.layers.0.m"])
    model = load_model(folder, device="meta")
    plain = {name for name, layer in model.named_modules() if type(layer).__name__ == "Linear"}
    mlp = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert plain == {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", *mlp}


def test_an_old_config_without_a_dtype_of_storage_loads(quantized):
    """So were those written before that key came; the threshold of outliers is about inputs, not weights."""
    folder = quantized("nf4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["bnb_4bit_quant_storage"], config["quantization_config"]["llm_int8_skip_modules"]
    config["quantization_config"] |= {"load_in_8bit": False, "llm_int8_threshold": 6.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(load_model(folder).get_submodule(Q), QuantizedLinear)


def test_quantize_cannot_contradict_the_folder(folder, quantized):
    assert_equal(load_model(quantized("nf4"), quantize="nf4").state_dict(), load_model(quantized("nf4")).state_dict())
    with pytest.raises(ValueError, match=r"quantize is 'int8', expected none, because .*nf4 is stored in nf4"):
        load_model(quantized("nf4"), quantize="int8")
    with pytest.raises(ValueError, match=r"quantize is '4bit', expected none, int8 or nf4"):
        load_model(folder, quantize="4bit")
    with pytest.raises(ValueError, match=rf"70 missing: {Q}.weight.absmax .*; 28 unexpected: .*\.SCB"):
        load_weights(load_model(folder, device="meta", quantize="nf4"), quantized("int8"))
    with pytest.raises(ValueError, match=r"has the shape \[12288, 1\] in torch.uint8, not \[128, 192\]"):
        load_weights(load_model(folder, device="meta"), quantized("nf4"))


def test_nf4_needs_columns_in_blocks(make_model, tmp_path):
    save_model(make_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="64"):
        load_model(tmp_path, quantize="nf4")
    assert logits(load_model(tmp_path, quantize="int8")).isfinite().all()


def edited(text, **changes):
    state = json.loads(bytes(text.tolist())) | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def with_nan(tensor):
    return torch.cat([torch.full_like(tensor[:1], float("nan")), tensor[1:]])


DAMAGES = {
    "no absmax": (f"{Q}.weight.absmax", None),
    "absmax in float32": (f"{Q}.weight.absmax", lambda tensor: tensor.float()),
    "short absmax": (f"{Q}.weight.absmax", lambda tensor: tensor[:-1].clone()),
    "no nested absmax": (f"{Q}.weight.nested_absmax", None),
    "NaN in nested absmax": (f"{Q}.weight.nested_absmax", with_nan),
    "two rows less": (f"{Q}.weight", lambda tensor: tensor[:-128].clone()),
    "codes in int8": (f"{Q}.weight", lambda tensor: tensor.view(torch.int8)),
    "no state": (STATE, None),
    "truncated state": (STATE, lambda tensor: tensor[:-9].clone()),
    "empty state": (STATE, lambda tensor: tensor[:0].clone()),
    "state in float32": (STATE, lambda tensor: tensor.float()),
    "state in two dimensions": (STATE, lambda tensor: tensor[None]),
    "a list for a state": (STATE, lambda tensor: torch.tensor([91, 93], dtype=torch.uint8)),
    "deep state": (STATE, lambda tensor: torch.full((100_000,), 91, dtype=torch.uint8)),
    "fp4": (STATE, lambda tensor: edited(tensor, quant_type="fp4")),
    "other blocks": (STATE, lambda tensor: edited(tensor, blocksize=128)),
    "other nested blocks": (STATE, lambda tensor: edited(tensor, nested_blocksize=128)),
    "transposed": (STATE, lambda tensor: edited(tensor, shape=[64, 256])),
    "no offset": (STATE, lambda tensor: edited(tensor, nested_offset=None)),
    "infinite offset": (STATE, lambda tensor: edited(tensor, nested_offset=1e39)),
    "another table": (f"{Q}.weight.quant_map", lambda tensor: tensor.flip(0)),
    "another nested table": (f"{Q}.weight.nested_quant_map", lambda tensor: tensor * 0.99),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_in_4_bits_are_errors_that_name_the_key(quantized, damage):
    folder, (key, change) = quantized("nf4"), DAMAGES[damage]
    rewrite(folder, lambda weights: weights.update({key: change(weights[key])}) if change else weights.pop(key))
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert key in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (f"{Q}.SCB", None),
        (f"{Q}.SCB", with_nan),
        (f"{Q}.SCB", lambda tensor: tensor[:-1].clone()),
        (f"{Q}.weight", lambda tensor: tensor[:, :-1].clone()),
        (f"{Q}.weight", lambda tensor: tensor.view(torch.uint8)),
        (f"{Q}.weight_format", lambda tensor: tensor + 2),
    ],
    ids=["no scale", "NaN", "short scale", "misshapen", "unsigned", "columns"],
)
def test_damaged_files_in_8_bits_are_errors_that_name_the_key(quantized, key, change):
    folder = quantized("int8")
    rewrite(folder, lambda weights: weights.update({key: change(weights[key])}) if change else weights.pop(key))
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert key in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_cannot_be_quantised(folder, kind, value):
    rewrite(folder, lambda weights: weights[f"{Q}.weight"].view(-1)[5:6].fill_(value))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q}.weight holds numbers that are not finite"):
        load_model(folder, quantize=kind)


def test_whole_numbers_elsewhere_are_refused(folder):
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has the shape \[131, 128\] in torch\.int8, not"):
        load_model(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_follow_the_codes_and_not_the_dtype(folder, quantized, tmp_path, kind):
    saved = quantized(kind)
    assert weights_fingerprint(saved) != weights_fingerprint(folder)
    save_model(load_model(saved, dtype=torch.float32), tmp_path / "float32")
    assert weights_fingerprint(tmp_path / "float32") == weights_fingerprint(saved)
    assert model_fingerprint(tmp_path / "float32") != model_fingerprint(saved)
    key, before = (f"{Q}.SCB" if kind == "int8" else f"{Q}.weight.absmax"), weights_fingerprint(saved)
    rewrite(saved, lambda weights: weights[key].mul_(2))
    assert weights_fingerprint(saved) != before
