"""A LoRA merged by command: the folder stands alone, and computes what PEFT's merge computes."""

import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pedgpt.adapters import adapted_layers, inject_experts, inject_lora, load_adapter, save_adapter
from pedgpt.data import load_tokenizer, train_tokenizer
from pedgpt.models import ModelConfig, Transformer, checkpoint, load_model, save_model, weights_fingerprint


@pytest.fixture
def folders(tmp_path):
    """A small Llama with its tokenizer, and a random LoRA and experts for it."""
    tokenizer = train_tokenizer(["宝宝发热怎么办？"], vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.save(tmp_path / "base")
    config = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig.from_hf(config)), tmp_path / "base")
    for name, inject in (("lora", inject_lora), ("experts", inject_experts)):
        model = load_model(tmp_path / "base")
        inject(model, rank=3, alpha=5, target_modules=["q_proj", "*.mlp.*"])
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        save_adapter(model, tmp_path / name)
    return tmp_path


def arguments(folder, adapter="lora", output="merged", model="base"):
    return ["--model", str(folder / model), "--adapter", str(folder / adapter), "--output", str(folder / output)]


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_folder_matches_peft(lab, folders, dtype):
    result = lab.call("merge_lora", arguments(folders) + (["--dtype", dtype] if dtype else []))
    assert result.code == 0, result.err
    assert f"{folders / 'merged'}: merged into 8 layers; the largest change of a logit is " in result.out
    stored = getattr(torch, dtype or "float32")
    merged, base = load_model(folders / "merged"), load_model(folders / "base", dtype=stored)
    assert {p.dtype for p in merged.parameters()} == {stored}

    theirs = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=stored).eval()
    theirs = PeftModel.from_pretrained(theirs, folders / "lora").merge_and_unload()
    tight = {"rtol": 1e-6, "atol": 1e-6} if stored == torch.float32 else {"rtol": 2**-7, "atol": 0}
    state = theirs.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, state[name], **tight)

    load_adapter(base, folders / "lora")
    probe = torch.tensor([load_tokenizer(folders / "base").encode(lab.module("merge_lora").TEXT)])
    with torch.no_grad():
        change = (merged(probe).double() - base(probe).double()).abs().max().item()
    assert float(result.out.split()[-1]) == pytest.approx(change, rel=0.01)
    assert 0 < change < (1e-4 if stored == torch.float32 else 1)
    text = "宝宝发热 38.5℃"
    assert load_tokenizer(folders / "merged").encode(text) == load_tokenizer(folders / "base").encode(text)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"adapter": "experts"}, [], "experts cannot be merged.*depends on the input"),
        ({"adapter": "missing"}, [], "missing.*no such file"),
        ({"output": "base"}, [], "output: .*base would replace what is merged"),
        ({"output": "lora/../lora"}, [], "output: .*lora would replace what is merged"),
        ({}, ["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, found 'int8'"),
    ],
)
def test_what_cannot_be_merged_is_refused(lab, folders, changes, settings, message):
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    result = lab.call("merge_lora", arguments(folders, **changes) + settings)
    assert result.code == 2 and re.search(message, result.err), result.err
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before


def test_an_adapter_of_another_model_is_refused_by_name(lab, folders):
    """The same weights in another folder, in other files and another dtype are the same model."""
    model = load_model(folders / "base")
    load_adapter(model, folders / "lora")
    trained_on = {"base_model": str(folders / "base"), "base_weights": weights_fingerprint(folders / "base")}
    save_adapter(model, folders / "lora", **trained_on)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 20_000)
        save_model(load_model(folders / "base", dtype=torch.bfloat16), folders / "moved")
    assert (folders / "moved" / "model.safetensors.index.json").exists()
    other = load_model(folders / "base")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    save_model(other, folders / "trained")
    for name in ("moved", "trained"):
        load_tokenizer(folders / "base").save(folders / name)

    assert lab.call("merge_lora", arguments(folders, model="moved", output="same")).code == 0
    result = lab.call("merge_lora", arguments(folders, model="trained", output="other"))
    assert result.code == 2 and not (folders / "other").exists()
    for told in (str(folders / "lora"), str(folders / "trained"), str(folders / "base"), "--any_base true"):
        assert told in result.err
    (folders / "heldout").mkdir()
    paths = [*arguments(folders, model="trained")[:4], "--heldout", str(folders / "heldout")]
    assert "trained on other weights" in lab.call("evaluate", paths).err
    assert "trained on other weights" in lab.call("chat", paths[:4]).err
    (folders / "base").rename(folders / "away")
    gone = lab.call("chat", paths[2:4])
    assert gone.code == 2 and f"was trained on {folders / 'base'}, which is not there; give its --model" in gone.err
    (folders / "away").rename(folders / "base")
    forced = [*arguments(folders, model="trained", output="other"), "--any_base", "true"]
    assert lab.call("merge_lora", forced).code == 0
    # An adapter that does not name its weights is never refused; a name that differs is worth a warning.
    save_adapter(model, folders / "lora", base_model="Qwen/Qwen2.5-7B")
    with pytest.warns(UserWarning, match="was trained on Qwen/Qwen2.5-7B; make sure that .*trained is the same model"):
        assert lab.call("merge_lora", arguments(folders, model="trained", output="third")).code == 0
    # Every stage calls its result "model": the name alone tells nothing while the folder itself is there.
    (folders / "sft").mkdir()
    (folders / "base").rename(folders / "sft" / "trained")
    save_adapter(model, folders / "lora", base_model=str(folders / "sft" / "trained"))
    with pytest.warns(UserWarning, match=r"was trained on .*sft/trained; make sure that .*trained is the same model"):
        assert lab.call("merge_lora", arguments(folders, model="trained", output="fourth")).code == 0


def test_infinite_weights_are_not_written(lab, folders):
    model = load_model(folders / "base")
    load_adapter(model, folders / "lora")
    for layer in adapted_layers(model).values():
        layer.lora_B.data.mul_(1e6)
    save_adapter(model, folders / "lora")
    result = lab.call("merge_lora", [*arguments(folders), "--dtype", "float16"])
    assert result.code == 2 and "give --dtype float32 or bfloat16" in result.err
    assert not (folders / "merged").exists()


def test_universal_only_merges_the_expert_that_is_always_on_and_says_what_is_left_out(lab, folders):
    result = lab.call("merge_lora", [*arguments(folders, "experts"), "--universal_only"])
    assert result.code == 0, result.err
    merged, model = load_model(folders / "merged"), load_model(folders / "base")
    load_adapter(model, folders / "experts")
    tokens = load_tokenizer(folders / "base").encode(lab.module("merge_lora").TEXT)
    with torch.no_grad():
        change = (merged(torch.tensor([tokens])) - model.eval()(torch.tensor([tokens]))).abs()
        for layer in adapted_layers(model).values():
            a, b = layer.universal_expert
            layer.weight += layer.scaling * (b @ a)
    state = model.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)
    assert "merged into 8 layers" in result.out and "left out: 3 specific experts with their router" in result.out
    mean, most = re.search(r"by (\S+) on average and (\S+) at most", result.out).groups()
    assert float(mean) == pytest.approx(change.mean().item(), rel=0.01) and float(most) > float(mean) > 0
    assert float(most) == pytest.approx(change.max().item(), rel=0.01)
    result = lab.call("merge_lora", [*arguments(folders), "--universal_only"])
    assert result.code == 2 and "universal_only is for experts" in result.err
