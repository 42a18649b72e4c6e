"""A folder with the genuine Baichuan2 tokenizer.model goes through the stages and into a chat."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pedgpt.data import load_tokenizer, tokenizer
from pedgpt.models import ModelConfig, Transformer, save_model

GENUINE = Path(__file__).parents[3] / "shared" / "tokenizers" / "baichuan2"
ANSWER = "多喝水，观察体温。"


@pytest.fixture
def folder(tmp_path):
    """Tiny weights of Baichuan2's shape, with all rows of its vocabulary, beside the vendor's tokenizer files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"model_type": "baichuan", "vocab_size": 125_696, "max_position_embeddings": 64, "initializer_range": 0.5}
    ours = {"pedgpt_positions": "rope", "pedgpt_norm_head": True}
    save_model(Transformer(ModelConfig.from_hf({**shape, **sizes, **ours})), tmp_path / "model")
    for file in GENUINE.iterdir():
        shutil.copy(file, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def read_once(monkeypatch):
    """Every copy of a tokenizer.model is looked at, and equal ones are converted once, which takes seconds."""
    convert, found = tokenizer.convert_sentencepiece, {}

    def converted(path):
        data = path.read_bytes()
        return found[data] if data in found else found.setdefault(data, convert(path))

    monkeypatch.setattr(tokenizer, "convert_sentencepiece", converted)


@pytest.mark.skipif(not GENUINE.is_dir(), reason="Baichuan2's tokenizer.model is not there")
def test_the_genuine_baichuan2_folder_goes_through_every_stage(lab, folder, tmp_path, monkeypatch, read_once):
    talk = [{"role": "user", "content": "孩子发烧怎么办？"}, {"role": "assistant", "content": ANSWER}]
    pair = {"prompt": "孩子发烧怎么办？", "chosen": ANSWER, "rejected": "<reserved_106>不知道"}
    for name, row in {"talk": {"messages": talk}, "pair": pair}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    instructions = ["--instructions", str(tmp_path / "talk.jsonl")]
    common = ["--row_length", "64", "--global_batch_size", "1", "--warmup_ratio", "0", "--device", "cpu"]
    stages = [
        ("full_finetune", [*instructions, "--learning_rate", "5e-2", "--epochs", "30"], 30),
        ("dfpo", ["--preferences", str(tmp_path / "pair.jsonl"), "--learning_rate", "1e-4"], 1),
        ("expert_finetune", [*instructions, "--learning_rate", "1e-4", "--rank", "2"], 1),
    ]
    model = folder
    for stage, flags, steps in stages:
        output = tmp_path / stage
        result = lab.call(stage, ["--model", str(model), "--output", str(output), *flags, *common])
        assert result.code == 0, result.err
        assert len([row for row in lab.metrics(output) if "loss" in row]) >= steps
        if (output / "model").is_dir():
            model = output / "model"
            assert all((model / file.name).read_bytes() == file.read_bytes() for file in GENUINE.iterdir())
    assert load_tokenizer(model).encode("孩子发烧") == load_tokenizer(folder).encode("孩子发烧")

    chat, screen = lab.module("chat"), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("孩子发烧怎么办？\n".encode()), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", screen)
    settings = {"adapter": str(tmp_path / "expert_finetune" / "adapter"), "device": "cpu", "max_new_tokens": 20}
    chat.main(chat.Config(**settings))
    monkeypatch.undo()
    screen.seek(0)
    assert screen.read().partition("助手> ")[2].strip() == ANSWER
