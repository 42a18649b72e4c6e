"""A Baichuan written as a Llama, read back by transformers without the vendor's code."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pedgpt.data import Message, chat_format, encode_conversation, encode_prompt, load_tokenizer, train_tokenizer
from pedgpt.models import ModelConfig, Transformer, load_model, save_model

TALK = [
    Message("system", "你是儿科医生。"),
    Message("user", "宝宝发热 38.5℃ 怎么办？\n\n"),
    Message("assistant", " 多喝水。"),
    Message("user", "谢谢"),
    Message("assistant", "不客气"),
]


@pytest.fixture
def folder(tmp_path):
    """A Baichuan2 in small: rotary positions, normalised head, reserved tokens."""
    special = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
    texts = [message.content for message in TALK] * 3
    tokenizer = train_tokenizer(texts, vocab_size=320, special_tokens=special)
    config = {
        "model_type": "baichuan", "vocab_size": 400, "hidden_size": 48, "intermediate_size": 50,
        "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 64, "pedgpt_positions": "rope",
        "pedgpt_norm_head": True, "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    save_model(model, tmp_path / "baichuan")
    tokenizer.save(tmp_path / "baichuan")
    return tmp_path / "baichuan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_gives_equal_logits_and_ids(lab, folder, tmp_path, dtype):
    save_model(load_model(folder, dtype=dtype), folder)
    result = lab.call("export_llama", ["--model", str(folder), "--output", str(tmp_path / "llama")])
    assert result.code == 0, result.err
    ours, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == dtype
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(tokens), theirs(tokens).logits
        back = load_model(tmp_path / "llama")(tokens)
    close = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(back, expected, **close)

    tokenizer, reader = load_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "llama")
    chat = chat_format(tokenizer, "baichuan2")
    messages = [{"role": message.role, "content": message.content} for message in TALK]
    prompt = reader.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert reader(prompt, add_special_tokens=False).input_ids == encode_prompt(TALK[:-1], chat)
    whole = reader(reader.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    assert whole == [*encode_conversation(TALK, chat).tokens, 2]
    assert chat_format(load_tokenizer(tmp_path / "llama")).stop_tokens == chat.stop_tokens


def test_a_format_of_its_own_is_exported_instead_of_the_familys(lab, folder, tmp_path):
    own = "{% for m in messages %}{{ '问' if m.role == 'user' else '答' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}答{% endif %}"
    (folder / "chat_template.jinja").write_text(own, encoding="utf-8")
    assert lab.call("export_llama", ["--model", str(folder), "--output", str(tmp_path / "llama")]).code == 0
    asked = [{"role": "user", "content": "发热"}]
    reader = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert reader.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) == "问发热</s>答"
    assert json.loads((tmp_path / "llama" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_a_tied_normalised_head_is_written_out(lab, folder, tmp_path):
    """The embedding keeps its lengths, the head does not: a Llama needs both."""
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    tied = Transformer(ModelConfig.from_hf(config))
    tied.load_state_dict(load_model(folder).state_dict())
    save_model(tied, folder)
    assert lab.call("export_llama", ["--model", str(folder), "--output", str(tmp_path / "llama")]).code == 0
    tokens = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, load_model(folder)(tokens), atol=1e-5, rtol=0)


def test_what_is_no_llama_is_refused(lab, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pedgpt_positions": "alibi"}))
    result = lab.call("export_llama", ["--model", str(folder), "--output", str(tmp_path / "llama")])
    assert result.code == 2 and "alibi" in result.err
    assert not (tmp_path / "llama").exists()


def test_a_quantised_model_is_refused(lab, folder, tmp_path):
    codes = tmp_path / "codes"
    save_model(load_model(folder, quantize="int8"), codes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (codes / file).write_bytes((folder / file).read_bytes())
    result = lab.call("export_llama", ["--model", str(codes), "--output", str(tmp_path / "llama")])
    assert result.code == 2 and "the model is quantised; export the one that it was made from" in result.err
