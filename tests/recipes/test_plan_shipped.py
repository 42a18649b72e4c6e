"""`--plan` of the settings that are shipped: each fits the cards that its first line names."""

import re
import tomllib
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/configs"
STAGES = {"sft": "full_finetune", "dfpo": "dfpo", "experts": "expert_finetune"}
FOLDERS = ("baichuan2_7b", "baichuan2_13b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "qwen2.5-7b", "llama3.1-8b")


def shipped(folder, stage):
    """(number of cards, GB of each) that the first line of a settings file names, and the settings."""
    text = (CONFIGS / folder / f"{stage}.toml").read_text("utf-8")
    number, size = re.search(r"on (one|8) GPUs? of (24|80) GB", text.splitlines()[0]).groups()
    return int(number.replace("one", "1")), int(size), tomllib.loads(text)


@pytest.mark.parametrize("stage", ["sft", "dfpo", "experts"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_shipped_settings_fit_the_cards_that_they_name(lab, folder, stage):
    number, size, _ = shipped(folder, stage)
    flags = ["--config", CONFIGS / folder / f"{stage}.toml", "--model", CONFIGS / folder, "--plan", f"{number}x{size}"]
    done = lab.call(STAGES[stage], list(map(str, flags)))
    assert done.code == 0, done.out + done.err
    taken = float(re.search(r"^fits: ([\d.]+) of", done.out, re.M)[1])
    assert taken < 0.9 * size  # the rest is for the holes between what is held


@pytest.mark.parametrize("folder", FOLDERS)
def test_stage_1_takes_what_stage_2_does(folder):
    (*cards, cpt), (*others, sft) = shipped(folder, "cpt"), shipped(folder, "sft")
    names = "row_length", "micro_batch_size", "global_batch_size", "dtype", "activation_checkpointing"
    assert cards == others and [cpt[name] for name in names] == [sft[name] for name in names]
