"""`--plan` of the settings that are shipped: each fits the cards that its first line names."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from pedgpt.data import full_rows
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


def planned(lab, folder, stage):
    """The GB of each card that the recipe's command says a step of the shipped settings takes."""
    number, size, _ = shipped(folder, stage)
    flags = ["--config", CONFIGS / folder / f"{stage}.toml", "--model", CONFIGS / folder, "--plan", f"{number}x{size}"]
    done = lab.call(STAGES[stage], list(map(str, flags)))
    assert done.code == 0, done.out + done.err
    return float(re.search(r"^fits: ([\d.]+) of", done.out, re.M)[1])


@pytest.mark.parametrize("stage", ["sft", "dfpo"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_shipped_settings_fit_the_cards_that_they_name(lab, folder, stage):
    assert planned(lab, folder, stage) < 0.9 * shipped(folder, stage)[1]  # the rest is for holes between what is held


def held(lab, folder, layers, path):
    """Bytes at the peak of a step of stage 4's shipped settings, for a model of so many layers."""
    number, size, _ = shipped(folder, "experts")
    sizes = json.loads((CONFIGS / folder / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps({**sizes, "num_hidden_layers": layers}))
    module = lab.module(STAGES["experts"])
    flags = ["--config", CONFIGS / folder / "experts.toml", "--model", path, "--plan", f"{number}x{size}"]
    settings = parse_settings(module.Config, list(map(str, flags)))
    return sum(count(module.model_and_loss, full_rows, settings).values())


@pytest.mark.parametrize("folder", FOLDERS)
def test_shipped_settings_of_stage_4_fit_the_cards_that_they_name(lab, tmp_path, folder):
    """Over frozen layers the bytes are linear in the number of layers, so planning a few of them is enough."""
    two, three, four = (held(lab, folder, layers, tmp_path) for layers in (2, 3, 4))
    assert four - three == three - two
    layers = json.loads((CONFIGS / folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    whole = (two + (layers - 2) * (three - two)) / GB
    assert whole < 0.9 * shipped(folder, "experts")[1]
    if folder == "qwen3-0.6b":  # all of its layers, planned by the command
        assert planned(lab, folder, "experts") == round(whole, 2)


@pytest.mark.parametrize("folder", FOLDERS)
def test_stage_1_takes_what_stage_2_does(folder):
    (*cards, cpt), (*others, sft) = shipped(folder, "cpt"), shipped(folder, "sft")
    names = "row_length", "micro_batch_size", "global_batch_size", "dtype", "activation_checkpointing"
    assert cards == others and [cpt[name] for name in names] == [sft[name] for name in names]
