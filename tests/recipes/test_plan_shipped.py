"""`--plan` of the settings that are shipped: each fits the cards that its first line names."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from pedgpt.data import full_pairs, full_rows
from pedgpt.models import ModelConfig, Transformer
from pedgpt.training import parse_settings
from pedgpt.training.plan import GB, count

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/configs"
STAGES = {"sft": "full_finetune", "dfpo": "dfpo", "experts": "expert_finetune"}
FOLDERS = ("baichuan2_7b", "baichuan2_13b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "qwen2.5-7b", "llama3.1-8b")


def shipped(folder, stage):
    """(number of cards, GB of each) that the first line of a settings file names, and the settings."""
    text = (CONFIGS / folder / f"{stage}.toml").read_text("utf-8")
    number, size = re.search(r"on (one|8) GPUs? of (24|80) GB", text.splitlines()[0]).groups()
    return int(number.replace("one", "1")), int(size), tomllib.loads(text)


def planned(lab, folder, stage, model=None):
    """The GB of each card that the recipe's command says a step of the shipped settings takes."""
    number, size, _ = shipped(folder, stage)
    model = model or CONFIGS / folder
    flags = ["--config", CONFIGS / folder / f"{stage}.toml", "--model", model, "--plan", f"{number}x{size}"]
    done = lab.call(STAGES[stage], list(map(str, flags)))
    assert done.code == 0, done.out + done.err
    return float(re.search(r"^fits: ([\d.]+) of", done.out, re.M)[1])


def held(lab, folder, stage, layers, path):
    """Bytes at the peak of a step of a stage's shipped settings, for a model of so many layers."""
    number, size, _ = shipped(folder, stage)
    sizes = json.loads((CONFIGS / folder / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps({**sizes, "num_hidden_layers": layers}))
    module = lab.module(STAGES[stage])
    flags = ["--config", CONFIGS / folder / f"{stage}.toml", "--model", path, "--plan", f"{number}x{size}"]
    settings = parse_settings(module.Config, list(map(str, flags)))
    return sum(count(module.model_and_loss, full_pairs if stage == "dfpo" else full_rows, settings).values())


# Eight cards, with RoPE and with ALiBi: more layers show that the bound is one, and a near one.
EIGHT = (("qwen2.5-7b", "sft"), ("baichuan2_13b", "dfpo"))


@pytest.mark.parametrize("stage", ["sft", "dfpo"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_shipped_settings_fit_the_cards_that_they_name(lab, tmp_path, folder, stage):
    """Three layers are planned, and each of the others adds at most what is kept of a layer that is checkpointed.

    That is 18 bytes a parameter (weight, gradient and AdamW's state in float32, the weight in bfloat16 for products)
    and 8 bytes a number of its input (in float32, twice).
    """
    cards, size, settings = shipped(folder, stage)
    three = held(lab, folder, stage, 3, tmp_path)
    sizes = ModelConfig.from_hf(tmp_path)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Transformer(sizes).model.layers[0].parameters())
    assert settings["activation_checkpointing"] == "block"
    tokens = settings["micro_batch_size"] * settings["row_length"] * (2 if stage == "dfpo" else 1)
    layers = json.loads((CONFIGS / folder / "config.json").read_text("utf-8"))["num_hidden_layers"]

    def bound(layers):
        return (three + (layers - 3) * (18 * weights / cards + 8 * tokens * sizes.hidden_size)) / GB

    assert bound(layers) < 0.9 * size  # the rest is for holes between what is held
    if (folder, stage) == ("qwen3-0.6b", "sft"):  # on one card, planned whole by the command
        assert 0.8 * bound(layers) < planned(lab, folder, stage) < bound(layers)
    if (folder, stage) in EIGHT:
        assert 0.9 * bound(8) < held(lab, folder, stage, 8, tmp_path) / GB < bound(8)


@pytest.mark.parametrize("folder", FOLDERS)
def test_shipped_settings_of_stage_4_fit_the_cards_that_they_name(lab, tmp_path, folder):
    """Over frozen layers the bytes are linear in the number of layers, so planning a few of them is enough."""
    one, two = (held(lab, folder, "experts", layers, tmp_path) for layers in (1, 2))
    layers = json.loads((CONFIGS / folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    whole = (one + (layers - 1) * (two - one)) / GB
    assert whole < 0.9 * shipped(folder, "experts")[1]
    if folder == "baichuan2_7b":  # on several cards
        assert held(lab, folder, "experts", 4, tmp_path) - two == 2 * (two - one)
    if folder == "qwen3-0.6b":  # by the command
        assert planned(lab, folder, "experts", tmp_path) == round(two / GB, 2)


@pytest.mark.parametrize("folder", FOLDERS)
def test_stage_1_takes_what_stage_2_does(folder):
    (*cards, cpt), (*others, sft) = shipped(folder, "cpt"), shipped(folder, "sft")
    names = "row_length", "micro_batch_size", "global_batch_size", "dtype", "activation_checkpointing"
    assert cards == others and [cpt[name] for name in names] == [sft[name] for name in names]
