"""What a saved folder says of itself, read by transformers: its ends, its chat format, and the same greedy answers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pedgpt.data import Message, chat_format, encode_prompt, load_tokenizer, train_tokenizer
from pedgpt.models import ModelConfig, Transformer, generate, generation_defaults, load_model, save_model

TEXTS = [
    "宝宝发热三天，体温38.5℃，怎么办？多喝水，注意休息，及时就医。",
    "孩子咳嗽、腹泻、湿疹。The child has a fever.\n\n",
] * 3
QUESTIONS = [
    f"宝宝{what}{n}天{ask}" for n in (1, 3) for what in ("发热", "咳嗽", "腹泻", "湿疹", "a b") for ask in ("？", "\n")
]
LLAMA3 = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
# Unknown, begin and end of a text come first: the only end that a base model knows.
SPECIAL = {
    "chatml": ["<|unk|>", "<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<unk>"] + [f"<|{name}|>" for name in LLAMA3],
    "baichuan2": ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"],
}  # fmt: skip
LOUD = 1.3  # the special tokens' rows in the head, so that some answers end and some do not
FAMILY = {
    "chatml": {"model_type": "qwen2"},
    "llama3": {"model_type": "llama"},
    "baichuan2": {"model_type": "baichuan", "pedgpt_positions": "rope", "pedgpt_norm_head": True},
}


def base(folder, kind, *, tied=False):
    """A base model: random weights, no chat template, and one end, that of a text."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=320, special_tokens=SPECIAL[kind])
    config = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": tied, "bos_token_id": 1,
        "eos_token_id": 2, **FAMILY[kind],
    }  # fmt: skip
    torch.manual_seed(3)
    model = Transformer(ModelConfig.from_hf(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5)
        model.lm_head.weight[2 : len(SPECIAL[kind])] *= LOUD
    save_model(model, folder)
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def theirs(folder, questions, **settings):
    """(answer, whether it ended) of each question by transformers, with the folder's own generation settings."""
    reader, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for question in questions:
        asked = [{"role": "user", "content": question}]
        inputs = reader.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        (ids,) = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        found.append(
            (reader.decode(ids, skip_special_tokens=True), ids[-1] in (ends if isinstance(ends, list) else [ends]))
        )
    return found


# Only Baichuan2's head is saved in another way when it is tied, because it is normalised.
@pytest.mark.parametrize(
    ("kind", "tied"), [("chatml", False), ("llama3", True), ("baichuan2", False), ("baichuan2", True)]
)
def test_greedy_answers_of_a_saved_folder_match_transformers(kind, tied, lab, tmp_path):
    folder = base(tmp_path / "base", kind, tied=tied)
    chat, saved = chat_format(load_tokenizer(folder), kind), tmp_path / "saved"
    if kind == "baichuan2":
        result = lab.call("export_llama", ["--model", str(folder), "--output", str(saved)])
        assert result.code == 0, result.err
    else:
        save_model(load_model(folder), saved)
        chat.save(saved)
    answers = theirs(saved, QUESTIONS, max_new_tokens=24)
    again = chat_format(load_tokenizer(saved))
    assert type(again) is type(chat) and set(again.stop_tokens) == set(chat.stop_tokens)
    prompts = [encode_prompt([Message("user", question)], chat) for question in QUESTIONS]
    assert prompts == [encode_prompt([Message("user", question)], again) for question in QUESTIONS]
    ids = generate(load_model(folder), prompts, max_new_tokens=24, stop_tokens=again.stop_tokens)
    assert [again.tokenizer.decode(answer) for answer in ids] == [text for text, _ in answers]
    assert [len(answer) < 24 for answer in ids] == [ended for _, ended in answers]
    assert 2 < sum(ended for _, ended in answers) < 20 and len({text for text, _ in answers}) > 10


ROWS = [
    {"question": "宝宝发热怎么办？", "answer": "多喝水。"},
    {"question": "孩子咳嗽怎么办？", "answer": "及时就医。"},
]
TINY = {"row_length": 64, "max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "device": "cpu"}


def flags(**settings):
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def test_a_tuned_base_model_names_its_ends_and_its_format(lab, tmp_path):
    folder, rows = base(tmp_path / "base", "chatml"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": 2, "top_p": 0.8, "do_sample": false, "max_new_tokens": 9}'
    )
    common = {"model": folder, "instructions": rows, "chat_format": "chatml", **TINY}
    for recipe, result, more in (("full_finetune", "model", {}), ("expert_finetune", "adapter", {"rank": 1})):
        done = lab.call(recipe, flags(**common, **more, output=tmp_path / recipe))
        assert done.code == 0, done.err
        out = tmp_path / recipe / result
        settings = GenerationConfig.from_pretrained(out)
        assert (settings.eos_token_id, settings.top_p, settings.max_new_tokens) == ([2, 4], 0.8, 9)
        assert generation_defaults(out)["stop_tokens"] == (2, 4)
        asked = [{"role": "user", "content": "问"}]
        ids = AutoTokenizer.from_pretrained(out).apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        chat = chat_format(load_tokenizer(out))
        assert ids == encode_prompt([Message("user", "问")], chat) and 4 in chat.stop_tokens
    assert chat_format(load_tokenizer(folder), "chatml").stop_tokens == (4, 2)
    assert not (folder / "chat_template.jinja").exists()


def test_a_template_of_its_own_stays_unless_a_built_in_format_was_taught(tmp_path):
    folder = base(tmp_path / "base", "chatml")
    same = chat_format(load_tokenizer(folder), "chatml").jinja.replace("message", "turn").replace("turns", "messages")
    greeting = "{{ '<|im_start|>system\\n你好<|im_end|>\\n' }}" + same
    for name, own in (("same", same), ("greeting", greeting), ("broken", "{% if %}")):
        (folder / "chat_template.jinja").write_text(own, encoding="utf-8")
        chat = chat_format(load_tokenizer(folder), "chatml")
        chat.save(tmp_path / name)
        assert (tmp_path / name / "chat_template.jinja").read_text(encoding="utf-8") == chat.jinja
    (folder / "chat_template.jinja").write_text(greeting, encoding="utf-8")
    chat_format(load_tokenizer(folder)).save(tmp_path / "auto")
    assert (tmp_path / "auto" / "chat_template.jinja").read_text(encoding="utf-8") == greeting
    (folder / "chat_template.jinja").unlink()  # a template of an earlier save would hide that of the tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(load_tokenizer(folder).config | {"chat_template": same}))
    chat_format(load_tokenizer(folder)).save(tmp_path / "auto")
    assert AutoTokenizer.from_pretrained(tmp_path / "auto").chat_template == same


def test_ends_of_the_generation_config_end_answers_everywhere(tmp_path):
    folder = base(tmp_path / "base", "llama3")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9]}')
    assert chat_format(load_tokenizer(folder), "llama3").stop_tokens == (5, 2, 7, 9)
