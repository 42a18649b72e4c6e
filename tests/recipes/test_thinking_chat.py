"""chat.py and evaluate.py with a thinking model, whose words are put into its mouth."""

import io
import json
import shutil
import sys

import pytest

from pedgpt.corpus.assemble import _as_row
from pedgpt.corpus.rows import map_texts, texts
from pedgpt.data import Conversation, Message, load_tokenizer, read_conversations, taught_folder

TEMPLATE = (  # of Qwen3's kind: reasoning stands in the last answer only
    "{% for m in messages %}{{ '<reserved_106>' if m.role == 'user' else '<reserved_107>' }}"
    "{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n' + m.reasoning_content | default('') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
THOUGHT = "<think>\n想想\n</think>\n\n"


@pytest.fixture
def thinker(lab, tmp_path):
    """The tiny model with a thinking model's template."""
    folder = tmp_path / "thinker"
    shutil.copytree(lab.folder / "model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def test_chat_goes_on_after_a_thought_and_remembers_the_answer_only(lab, thinker, monkeypatch):
    chat, tokenizer = lab.module("chat"), load_tokenizer(thinker)
    asked, said = [], iter([THOUGHT + "多喝水。", THOUGHT + "先看医生。"])

    def steps(model, prompts, *, max_new_tokens, **rest):
        asked.append((tokenizer.backend.decode(prompts[0], skip_special_tokens=False), max_new_tokens))
        return ([token] for token in [*tokenizer.encode(next(said)), tokenizer.eos_id])

    monkeypatch.setattr(chat, "generate_steps", steps)

    def talk(text, **settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
        chat.main(chat.Config(model=str(thinker), device="cpu", max_new_tokens=5, max_thinking_tokens=40, **settings))
        sys.stdout.seek(0)
        return sys.stdout.read()

    printed = talk("发热\n吃药吗\n")
    assert printed.count(THOUGHT.strip()) == 2
    first = "<reserved_106>发热<reserved_107>"
    assert [prompt for prompt, _ in asked] == [first, first + "多喝水。</s><reserved_106>吃药吗<reserved_107>"]
    assert [room for _, room in asked] == [45, 45]
    said = iter(["<think>\n想想", "多喝水。"])
    assert "the reasoning did not end" in talk("咳嗽\n发热\n")
    assert asked[-1][0] == first  # a question that was not answered is forgotten
    said = iter(["多喝水。"])
    talk("发热\n", enable_thinking=False)
    assert asked[-1] == ("<reserved_106>发热<reserved_107><think>\n\n</think>\n\n", 5)


def test_a_perfect_answer_of_a_thinking_model_scores_100(lab, thinker, monkeypatch, tmp_path):
    evaluate, tokenizer = lab.module("evaluate"), load_tokenizer(thinker)
    rows = [{"question": f"孩子{what}怎么办？", "answer": THOUGHT + "多喝水，及时就医。"} for what in ("发热", "咳嗽")]
    (tmp_path / "heldout" / "tasks").mkdir(parents=True)
    path = tmp_path / "heldout" / "tasks" / "medkqa.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def generate(model, prompts, *, max_new_tokens, **_):
        return [tokenizer.encode("<think>\n别的想法\n</think>\n\n多喝水，及时就医。")[:max_new_tokens] for _ in prompts]

    monkeypatch.setattr("pedgpt.evaluation.responses.generate", generate)
    out = tmp_path / "result.json"
    answers, heldout = tmp_path / "answers.jsonl", str(tmp_path / "heldout")
    config = evaluate.Config(model=str(thinker), heldout=heldout, output=str(out), answers=str(answers), device="cpu")
    evaluate.main(config)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["tasks"]["MedKQ&A"]["rouge-l"] == pytest.approx(100) and result["template_date"] is None
    row = json.loads(answers.read_text(encoding="utf-8").splitlines()[0])
    assert row["answer"] == row["reference"] == "多喝水，及时就医。"


def test_what_an_adapter_says_of_chat_and_ends_comes_before_its_base(lab, thinker, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert taught_folder(str(thinker), str(adapter)) == taught_folder(str(thinker)) == str(thinker)
    load_tokenizer(thinker).save(adapter)
    assert taught_folder(str(thinker), str(adapter)) == str(adapter)


def test_a_corpus_keeps_what_was_thought_but_no_personal_data_in_it(tmp_path):
    answer = Message("assistant", "<think>\n家长电话13812345678，先看精神。\n</think>\n\n多喝水。")
    row = Conversation((Message("user", "发热怎么办？"), answer), "f:1")
    assert "13812345678" in texts(row)[1]
    cleaned = map_texts(row, lambda text: text.replace("13812345678", "[电话]"))
    path = tmp_path / "built.jsonl"
    path.write_text(json.dumps(_as_row(cleaned), ensure_ascii=False), encoding="utf-8")
    (back,) = read_conversations(path)
    assert back.messages == cleaned.messages
    assert (back.messages[1].reasoning, back.messages[1].content) == ("家长电话[电话]，先看精神。", "多喝水。")
