"""HF folders: exact round trips, and errors that name the file and the key."""

import json
import os
import pathlib
import pickle
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pedgpt.models import (
    checkpoint,
    load_model,
    load_weights,
    model_fingerprint,
    round_weights,
    save_model,
    weight_files,
    weights_fingerprint,
)

KINDS = ["llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"]


@pytest.fixture
def folder(make_model, tmp_path):
    """A saved llama with an untied head."""
    save_model(make_model("llama"), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Change the stored dictionary of weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def as_bin(folder):
    """The same weights as an older pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def as_shards(monkeypatch, model, folder):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_model(model, folder)
    monkeypatch.undo()
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_save_then_load_gives_the_logits_bit_for_bit(make_model, random_tokens, tmp_path, kind, dtype):
    model, tokens = make_model(kind).to(dtype), random_tokens(2, 40)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {dtype} and all(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_written_folder_has_the_published_layout(make_model, tmp_path):
    save_model(make_model("qwen2"), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in reader.keys()  # tied


@pytest.mark.parametrize("load", ["load_model", "load_weights"])
def test_zero_rows_of_a_normalised_head_are_named_at_load(make_model, random_tokens, tmp_path, load):
    model, tokens = make_model("baichuan-rope"), random_tokens(2, 12)
    with torch.no_grad():
        expected = model(tokens)
        model.lm_head.weight[[3, *range(120, 127)]] = 0
    save_model(model, tmp_path)
    with pytest.warns(UserWarning, match=r"for the tokens 3, 120, 121, 122, 123, … \(8 in all\) are zeros"):
        loaded = load_model(tmp_path)
        if load == "load_weights":
            loaded = load_model(tmp_path, device="meta")
            load_weights(loaded, tmp_path)
    with torch.no_grad():
        logits = loaded(tokens)
    assert not logits[..., [3, *range(120, 127)]].any()
    assert torch.equal(logits[..., 4:120], expected[..., 4:120])
    loaded(tokens).log_softmax(-1)[..., 3].sum().backward()
    gradient = loaded.lm_head.weight.grad
    assert not gradient[3].any() and 0 < gradient.norm() < 1e3


@pytest.mark.parametrize("compared", [2**20, 2**10], ids=["all", "a sample"])
def test_the_user_is_told_what_rounding_did_to_the_training(make_model, tmp_path, capsys, monkeypatch, compared):
    """In bfloat16 the numbers from 1 on are 2^-7 apart: of 1 + k·2^-9 all up to k = 2 are 1 again."""
    monkeypatch.setattr(checkpoint, "COMPARED", compared)
    model = make_model("qwen2")  # with a tied head, which the folder does not hold
    start = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    save_model(model.bfloat16(), tmp_path)
    steps = {name: torch.arange(tensor.numel()).view(tensor.shape) % 5 for name, tensor in start.items()}
    trained = {name: start[name] + 2**-9 * steps[name] for name in start}
    saved = dict(round_weights(trained.items(), torch.bfloat16, since=tmp_path))
    assert all(torch.equal(saved[name], trained[name].bfloat16()) for name in trained)
    k = torch.cat([step.flatten() for name, step in steps.items() if name != "lm_head.weight"]).double()
    rounded = torch.where(k < 3, 0.0, 4.0)  # k = 2 is half-way, and goes to the even one
    share = ((rounded - k).square().sum() / k.square().sum()).sqrt()
    found = int(re.search(r"moved the weights by (\d+)% of what training moved them", capsys.readouterr().out)[1])
    assert found == pytest.approx(100 * share.item(), abs=0.5 if compared == 2**20 else 2)
    # No figure where nothing is rounded or nothing is left to compare with, but always the weights.
    assert all(torch.equal(v, trained[n]) for n, v in round_weights(trained.items(), torch.float32, since=tmp_path))
    assert len(dict(round_weights(trained.items(), torch.bfloat16, since=tmp_path / "gone"))) == len(trained)
    assert not capsys.readouterr().out


def test_baichuan_keys_are_the_vendors(make_model, tmp_path):
    save_model(make_model("baichuan-alibi", num_hidden_layers=1), tmp_path)
    block = "model.layers.0."
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        block + "self_attn.W_pack.weight", block + "self_attn.o_proj.weight",
        block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight", block + "mlp.down_proj.weight",
        block + "input_layernorm.weight", block + "post_attention_layernorm.weight",
    }  # fmt: skip


@pytest.mark.parametrize("stored", ["torch_dtype", "dtype"])
def test_saved_dtype_is_the_one_transformers_loads(folder, tmp_path, stored):
    """transformers writes `dtype`, older files `torch_dtype`: neither may outlive a change of dtype."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if "dtype" not in key} | {stored: "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    save_model(load_model(folder, dtype=torch.bfloat16), tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert next(load_model(tmp_path / "half").parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path / "half", dtype=torch.float32).parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_sharded_checkpoint_loads_here_and_in_transformers(make_model, random_tokens, tmp_path, monkeypatch, kind):
    model, tokens = make_model(kind), random_tokens(1, 9)
    index = as_shards(monkeypatch, model, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert [shard.name for shard in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    held = {key: shard.name for shard in shards for key in load_file(shard)}
    assert index["weight_map"] == held and held.keys() == dict(model.named_parameters()).keys()
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    sizes = [[tensor.nbytes for tensor in load_file(shard).values()] for shard in shards]
    assert all(sum(size) <= 20_000 or len(size) == 1 for size in sizes)  # one tensor may be larger by itself
    assert all(sum(left + right) > 20_000 for left, right in zip(sizes, sizes[1:], strict=False))  # none in vain
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)


def test_saving_again_leaves_no_stale_shards(make_model, random_tokens, tmp_path, monkeypatch):
    first, second, tokens = make_model("llama"), make_model("llama", seed=5), random_tokens(1, 9)
    (tmp_path / "tokenizer.json").write_text("{}")
    for _ in range(2):
        as_shards(monkeypatch, first, tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path)(tokens), first(tokens))
        save_model(second, tmp_path)
        names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(file.name for file in tmp_path.iterdir()) == names
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path)(tokens), second(tokens))


def test_model_may_be_saved_over_the_folder_it_came_from(folder, random_tokens):
    """The weights may be mapped from the very file that is replaced."""
    model, tokens = load_model(folder), random_tokens(1, 9)
    with torch.no_grad():
        before = model(tokens)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(load_model(folder)(tokens), before)  # training does not write through
        changed = model(tokens)
        save_model(model, folder)
        assert torch.equal(load_model(folder)(tokens), changed)
        assert not torch.equal(changed, before)


def test_gathered_state_dict_replaces_the_models_own(make_model, random_tokens, tmp_path):
    model, other, tokens = make_model("qwen2"), make_model("qwen2", seed=3), random_tokens(1, 9)
    save_model(model, tmp_path, other.state_dict())
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens), other(tokens))


def test_adapters_are_not_saved_as_base_weights(make_model, tmp_path):
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj\.lora_A.*save_adapter"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", ["safetensors", "bin", "bin-shards"])
def test_every_layout_gives_the_same_model(make_model, folder, random_tokens, stored):
    if stored != "safetensors":
        file = as_bin(folder)
    if stored == "bin-shards":
        weights = torch.load(file)
        file.unlink()
        weight_map = {key: f"pytorch_model-{1 + ('mlp' in key):05d}-of-00002.bin" for key in weights}
        for name in set(weight_map.values()):
            torch.save({key: value for key, value in weights.items() if weight_map[key] == name}, folder / name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), make_model("llama")(tokens))


def test_rotary_inv_freq_is_dropped(make_model, folder, random_tokens):
    wrong = torch.full((4,), 9.0)
    names = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    rewrite(folder, lambda weights: weights.update({name: wrong.clone() for name in names}))
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), make_model("llama")(tokens))


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_checkpoint_needs_no_head(make_model, random_tokens, tmp_path, with_head):
    model, tokens = make_model("qwen2"), random_tokens(1, 9)
    save_model(model, tmp_path)
    if with_head:
        rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_tied_checkpoint_without_embedding_is_an_error(make_model, tmp_path):
    save_model(make_model("qwen2"), tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"1 missing: model\.embed_tokens\.weight"):
        load_model(tmp_path)


Q = "model.layers.0.self_attn.q_proj.weight"
RENAMED = "model.layers.0.self_attn.query_proj.weight"


def test_missing_and_unexpected_keys_are_named_with_their_nearest(folder):
    rewrite(folder, lambda weights: weights.update({RENAMED: weights.pop(Q)}))
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert f"1 missing: {Q} (nearest: {RENAMED})" in message and str(folder) in message
    assert f"1 unexpected: {RENAMED} (nearest: {Q})" in message


@pytest.mark.parametrize("layers", [1, 4])
def test_wrong_number_of_layers_is_counted(folder, layers):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    label, count = ("unexpected", 9) if layers == 1 else ("missing", 18)
    with pytest.raises(ValueError, match=rf"{count} {label}: .*model\.layers\.\d.* and {count - 5} more"):
        load_model(folder)


def test_head_missing_from_an_untied_checkpoint_is_an_error(folder):
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight$"):
        load_model(folder)


def test_misshapen_weight_is_named_with_both_shapes(folder):
    rewrite(folder, lambda weights: weights.update({Q: weights[Q][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q} has the shape \[47, 48\].*\[48, 48\]"):
        load_model(folder)


def test_missing_folder_config_or_weights_are_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere/config.json: no such file"):
        load_model(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{folder}: no weights; expected model\.safetensors"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_truncated_weights_are_an_error(folder, stored, kept):
    file = folder / "model.safetensors" if stored == "safetensors" else as_bin(folder)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=rf"{file.name}: cannot be read"):
        load_model(folder)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_pickle_that_carries_code_is_refused_and_not_run(folder, tmp_path, container):
    file, marker = as_bin(folder), tmp_path / "was-run"
    content = {**torch.load(file), "evil": Payload(marker)}
    if container == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"evil": Payload(marker)}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(folder)
    assert not marker.exists()


def test_safetensors_are_preferred_to_pickles(folder, make_model, random_tokens):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), make_model("llama")(tokens))


@pytest.mark.parametrize("kind", ["parent", "absolute", "nested", "dots", "folder"])
def test_index_that_leaves_the_folder_is_refused(folder, make_model, monkeypatch, kind):
    """The outside file exists and is whole, so that nothing but the check stands in the way."""
    index = as_shards(monkeypatch, make_model("llama"), folder)
    key, shard = next(iter(index["weight_map"].items()))
    outside = folder.parent / shard
    (folder / "inner").mkdir()
    for copy in (outside, folder / "inner" / shard):
        copy.write_bytes((folder / shard).read_bytes())
    name = {
        "parent": f"../{shard}", "absolute": str(outside), "nested": f"inner/../../{shard}", "dots": "..",
        "folder": f"inner/{shard}",
    }[kind]  # fmt: skip
    index["weight_map"][key] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json"):
        load_model(folder)


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path, make_model, random_tokens, monkeypatch):
    """huggingface_hub's cache holds a snapshot as links into a folder of blobs."""
    model, tokens = make_model("llama"), random_tokens(1, 9)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "4f3e", tmp_path / "models--a--b" / "blobs"
    as_shards(monkeypatch, model, snapshot)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../../blobs/{i}")
    with torch.no_grad():
        assert torch.equal(load_model(snapshot)(tokens), model(tokens))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_leave_the_folder_are_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: a link out of its folder"):
        load_model(folder)


def test_absent_shard_is_named(folder, make_model, monkeypatch):
    index = as_shards(monkeypatch, make_model("llama"), folder)
    shard = max(index["weight_map"].values())
    (folder / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard}: no such file"):
        load_model(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 7}}', '"text"']
)
def test_broken_index_is_an_error(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(folder)


def test_failed_save_leaves_the_last_checkpoint(folder, make_model, random_tokens, monkeypatch):
    def die(*_args, **_settings):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", die)
    with pytest.raises(OSError, match="disk full"):
        save_model(make_model("llama", seed=5), folder)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), make_model("llama")(tokens))


def test_a_state_dict_that_lacks_weights_is_not_saved(make_model, tmp_path):
    model = make_model("llama")
    weights = dict(model.state_dict())
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        save_model(model, tmp_path / "model", weights)
    assert not (tmp_path / "model").exists()


def test_a_fingerprint_follows_the_weights_and_the_config_but_not_the_place(folder, tmp_path):
    name = model_fingerprint(folder)
    assert model_fingerprint(shutil.copytree(folder, tmp_path / "elsewhere")) == name
    rewrite(folder, lambda weights: weights["model.norm.weight"].add_(1))
    changed = model_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}), encoding="utf-8")
    assert len({name, changed, model_fingerprint(folder)}) == 3


@pytest.mark.parametrize("dies_at", range(8))
@pytest.mark.parametrize("change", ["shards-over-shards", "shards-over-single", "single-over-shards"])
def test_a_save_that_dies_leaves_the_old_model_or_the_new_one(
    make_model, random_tokens, tmp_path, monkeypatch, change, dies_at
):
    """Killed before any of its renames, writes or deletions: never half of each."""
    old, new, tokens = make_model("llama"), make_model("llama", seed=5), random_tokens(1, 9)
    before, after = change.split("-over-")[::-1]
    as_shards(monkeypatch, old, tmp_path / "model") if before == "shards" else save_model(old, tmp_path / "model")
    calls = 0

    def dying(function):
        def call(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls > 3 * dies_at:
                raise KeyboardInterrupt
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000 if after == "shards" else 2**40)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(pathlib.Path, "unlink", dying(pathlib.Path.unlink))
        try:
            save_model(new, tmp_path / "model")
            died = False
        except KeyboardInterrupt:
            died = True
    with torch.no_grad():
        found = load_model(tmp_path / "model")(tokens)
        assert torch.equal(found, old(tokens)) or torch.equal(found, new(tokens))
        assert died or torch.equal(found, new(tokens))
    save_model(new, tmp_path / "model")  # and the next save puts all in order
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(tokens), new(tokens))
    kept = {file.name for file in (tmp_path / "model").glob("*.safetensors")}
    index = tmp_path / "model" / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert kept == named


def test_saving_deletes_nobody_elses_files(folder, make_model, monkeypatch):
    others = ["model_backup.safetensors", "model-my-ema.safetensors", "model.safetensors.bak"]
    for name in others:
        (folder / name).write_text("kept")
    as_shards(monkeypatch, make_model("llama"), folder)
    save_model(make_model("llama"), folder)
    assert all((folder / name).read_text() == "kept" for name in others)


def test_one_stored_tensor_under_two_names_becomes_two_parameters(folder, make_model, random_tokens):
    file = as_bin(folder)
    weights = torch.load(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    norm = weights["model.norm.weight"]
    weights |= {key: norm for key in weights if "norm" in key}
    torch.save(weights, file)
    model = load_model(folder)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    save_model(model, folder.parent / "again")
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(folder.parent / "again")(tokens), model(tokens))


def test_a_fingerprint_notices_a_change_in_the_middle_of_a_large_file(folder, tmp_path):
    """A LoRA merged into one layer changes neither the head nor the tail of a file."""
    size = 72 * 2**20
    for change in (None, 5 * 2**20, 70 * 2**20 + 100):
        with open(folder / "model.safetensors", "wb") as handle:
            handle.truncate(size)
            if change:
                handle.seek(change)
                handle.write(b"x")
        (tmp_path / str(change)).write_text(model_fingerprint(folder))
    assert len({(tmp_path / name).read_text() for name in ("None", "5242880", str(70 * 2**20 + 100))}) == 3


@pytest.mark.parametrize("content", ["{", '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": 3}'])
def test_a_broken_folder_can_be_saved_over(folder, make_model, random_tokens, monkeypatch, content):
    model, tokens = make_model("llama", seed=5), random_tokens(1, 9)
    for save in (save_model, lambda *given: as_shards(monkeypatch, *given)):
        (folder / "model.safetensors.index.json").write_text(content)
        save(model, folder)
        with torch.no_grad():
            assert torch.equal(load_model(folder)(tokens), model(tokens))


def test_a_copy_in_another_dtype_is_the_same_base_and_a_trained_one_is_not(folder, tmp_path):
    model = load_model(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # some numbers so small that float16 rounds them
            parameter.copy_(parameter * torch.logspace(-9, 0, parameter.shape[-1]).roll(number))
    names = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        save_model(model.to(dtype), tmp_path / str(dtype))
        names.append(weights_fingerprint(tmp_path / str(dtype)))
        model = load_model(tmp_path / str(torch.bfloat16))
    assert len(set(names)) == 1
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    save_model(model, tmp_path / "trained")
    assert weights_fingerprint(tmp_path / "trained") != names[0]


def test_a_fingerprint_opens_an_old_bin_file_once_and_not_for_every_tensor(folder, tmp_path, monkeypatch):
    opened, reader = [], weight_files._BinReader
    monkeypatch.setattr(weight_files, "_BinReader", lambda file: opened.append(file) or reader(file))
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert weights_fingerprint(tmp_path) == weights_fingerprint(folder) and len(opened) == 1
