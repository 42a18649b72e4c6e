"""Stages over a frozen base in 8 and 4 bits: as over its dequantised weights, resumed, split, merged, planned, used."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pedgpt.kernels.quantized import QuantizedLinear
from pedgpt.models import ModelConfig, Transformer, load_model, save_model

RATE = {"learning_rate": 1e-2}
STAGES = [
    ("expert_finetune", {}), ("full_finetune", {"adapter": "lora", "rank": 2, **RATE}),
    ("dfpo", {"adapter": "experts", "rank": 2, **RATE}),
    ("continued_pretrain", {"adapter": "lora", "rank": 2, **RATE}),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(lab):
    """A model whose columns nf4 can take, and for each format the model with the weights that its codes stand for."""
    config = ModelConfig.from_hf(lab.folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    wide = ModelConfig.from_hf({**config.to_hf(), **sizes, "num_key_value_heads": 4})
    torch.manual_seed(0)
    folder = lab.folder / "wide"
    save_model(Transformer(wide), folder)
    for kind in ("int8", "nf4"):
        model = load_model(folder, quantize=kind)
        weights = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                weights[f"{name}.weight"] = layer.quantization.dense(layer.weight, torch.float32)
        weights = {name: weight for name, weight in weights.items() if ".quantization." not in name}
        save_model(Transformer(wide), folder.with_name(f"wide_{kind}"), weights)
    for name in ("wide", "wide_int8", "wide_nf4"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (lab.folder / name / file).write_bytes((lab.folder / "model" / file).read_bytes())
    return folder


# Each stage, and experts as well as a LoRA over each format.
@pytest.mark.parametrize(
    ("recipe", "settings", "kind"),
    [(*stage, kind) for stage, kind in zip(STAGES, ("int8", "nf4", "nf4", "int8"), strict=True)],
)
def test_a_stage_trains_as_over_the_weights_that_the_codes_stand_for(lab, tmp_path, bases, recipe, settings, kind):
    common = {**settings, "max_steps": 3}
    done = lab.run(recipe, tmp_path / "codes", model=bases, quantize=kind, **common)
    assert done.code == 0, done.err
    assert lab.run(recipe, tmp_path / "dense", model=f"{bases}_{kind}", **common).code == 0
    for mine, theirs in zip(lab.metrics(tmp_path / "codes"), lab.metrics(tmp_path / "dense"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine.get("eval_loss") == pytest.approx(theirs.get("eval_loss"), abs=1e-5)
    plain = lab.run(recipe, tmp_path / "plain", model=bases, **common)
    assert re.search(r"\(\d+\.\d\d%\)", plain.out)[0] in done.out  # the share of all weights, whatever their format
    with safe_open(tmp_path / "codes/adapter/adapter_model.safetensors", "pt") as file:
        assert file.metadata()["pedgpt_base_format"] == kind


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_killed_run_goes_on_bit_for_bit(lab, tmp_path, bases, kind):
    settings = {"model": bases, "quantize": kind, "checkpoint_every": 1, "dtype": "bfloat16", "max_steps": 3}
    assert lab.run("expert_finetune", tmp_path / "whole", **settings).code == 0
    assert lab.run("expert_finetune", tmp_path / "halves", die_after=2, **settings).code == -9
    assert lab.run("expert_finetune", tmp_path / "halves", **settings).code == 0
    lab.assert_as_if_nothing_happened(tmp_path / "halves", tmp_path / "whole")


def test_a_reference_of_another_format_is_refused(lab, tmp_path, bases):
    shared = {"model": bases, "adapter": "lora", "reference_logps": tmp_path / "shared.safetensors", "max_steps": 1}
    assert lab.run("dfpo", tmp_path / "plain", **shared).code == 0
    done = lab.run("dfpo", tmp_path / "codes", quantize="nf4", **shared)
    assert done.code == 2 and "holds another run's reference log-probabilities" in done.err and "nf4" in done.err


def test_two_ranks_match_one(lab, tmp_path, bases):
    jobs = [(recipe, f"{recipe}_{kind}", {**settings, "model": str(bases), "quantize": kind, "max_steps": 3})
            for (recipe, settings), kind in zip(STAGES[1:3], ("int8", "nf4"), strict=True)]  # fmt: skip
    done = lab.two_ranks([(recipe, tmp_path / f"{name}_two", settings, None) for recipe, name, settings in jobs])
    assert done.code == 0, done.err
    for recipe, name, settings in jobs:
        assert lab.run(recipe, tmp_path / name, **settings).code == 0
        for mine, theirs in zip(lab.metrics(tmp_path / f"{name}_two"), lab.metrics(tmp_path / name), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        found, expected = lab.weights(tmp_path / f"{name}_two"), lab.weights(tmp_path / name)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-4)


def test_an_adapter_over_codes_is_merged_into_the_weights_that_they_stand_for(lab, tmp_path, bases):
    settings = {"model": bases, "quantize": "nf4", "adapter": "lora", "rank": 2, "max_steps": 3, **RATE}
    assert lab.run("full_finetune", tmp_path, **settings).code == 0
    arguments = ["--model", str(bases), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    done = lab.call("merge_lora", [*arguments, "--quantize", "nf4"])
    assert done.code == 0, done.err
    change = float(re.search(r"the largest change of a logit is (\S+)", done.out)[1])
    assert 0 < change < 1e-3
    merged, dense = load_file(tmp_path / "merged/model.safetensors"), load_file(f"{bases}_nf4/model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    A, B = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], dense[f"{name}.weight"] + 16 / 2 * B @ A)
    with pytest.warns(UserWarning, match="was trained on nf4, and is used with unquantised weights"):
        assert lab.call("merge_lora", [*arguments[:-1], str(tmp_path / "other")]).code == 0


def test_answers_of_a_quantised_system_are_those_of_its_weights(lab, tmp_path, bases):
    row = {"question": "孩子发热怎么办？", "answer": "多喝水。"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    answers = []
    for name, extra in (("codes", ["--quantize", "nf4"]), ("dense", [])):
        model = str(bases) if extra else f"{bases}_nf4"
        arguments = ["--model", model, "--questions", str(tmp_path / "questions.jsonl"), "--output"]
        flags = [*arguments, str(tmp_path / name), "--max_new_tokens", "8", "--device", "cpu", *extra]
        done = lab.call("answer", flags)
        assert done.code == 0, done.err
        *_, row = [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]
        answers.append(row["answer"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantize": "nf4"}, "quantize is set, but all parameters train"),
        ({"adapter": "lora", "quantize": "nf3"}, "quantize must be one of none, int8, nf4, found 'nf3'"),
        ({"adapter": "lora", "quantize": "nf4", "model": "model"}, "nf4 needs in_features that 64 divides"),
    ],
)
def test_mistakes_end_in_one_line(lab, tmp_path, bases, settings, said):
    done = lab.run("full_finetune", tmp_path, **{"model": bases, **settings})
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and said in done.err


def test_a_quantised_folder_cannot_train_all_its_weights(lab, tmp_path, bases):
    settings = {"model": bases, "quantize": "int8", "max_steps": 1}
    save_model(load_model(bases, quantize="int8"), tmp_path / "copy")
    assert lab.run("expert_finetune", tmp_path / "experts", **settings).code == 0
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "copy" / file).write_bytes((bases / file).read_bytes())
    done = lab.run("full_finetune", tmp_path / "full", model=tmp_path / "copy")
    assert done.code == 2 and "is quantised, so its weights cannot train; give --adapter lora or experts" in done.err
    again = lab.run("expert_finetune", tmp_path / "again", model=tmp_path / "copy", max_steps=1)
    assert again.code == 0
    assert lab.metrics(tmp_path / "again")[0]["loss"] == lab.metrics(tmp_path / "experts")[0]["loss"]
