"""Where a chat template is looked for, and templates that cannot be used: each is an error that names its file."""

import pytest

from pedgpt.data import Message, chat_format, encode_conversation, encode_prompt, load_tokenizer

TURN = [Message("user", "问"), Message("assistant", 'a"答')]

ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"

BROKEN = {
    "syntax": ("{% for m in %}", "not valid Jinja.*Expected"),
    "unknown tag": ("{% generaton %}", "not valid Jinja.*generaton"),
    "its own complaint": ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
    "type error": ("{{ messages + 1 }}", "fails .*list"),
    "missing attribute": ("{{ nothing.at_all }}", "nothing"),
    "forbidden": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "division": ("{{ 1 // 0 }}", "zero"),
    "rewrites": ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "changes the messages' text"),
    "escapes": ("{% for m in messages %}{{ m.content | tojson }}</s>{% endfor %}", "changes the messages' text"),
    "looks at the text": ("{% if '问' in messages[0].content %}b{% endif %}" + ALL, "changes the messages' text"),
    "leaves out": ("{% for m in messages[1:] %}{{ m.content }}</s>{% endfor %}", "leaves out message 1.*user"),
    "no end": ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "never learn to stop.*eos_token"),
    "half a text": ("{% for m in messages %}{{ m.content[:1] + m.content }}</s>{% endfor %}", "changes"),
    "too long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "too big"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid Jinja"),
}


def test_template_file_wins_and_lists_hold_a_default(folder_of):
    def prompt(folder):
        chat = chat_format(load_tokenizer(folder), "template")
        return chat.tokenizer.backend.decode(encode_prompt([Message("user", "a")], chat), skip_special_tokens=False)

    def named(name, text):
        return {"name": name, "template": text + "{{ messages[0].content }}"}

    folder = folder_of("chatml", [named("tool_use", "tool:"), named("default", "own:")])
    assert prompt(folder) == "own:a"
    (folder / "chat_template.jinja").write_text("file:{{ messages[0].content }}", encoding="utf-8")
    assert prompt(folder) == "file:a"
    for unusable, told in (([named("rag", "x")], "no chat_template"), (3, "tokenizer_config.json: .*not valid Jinja")):
        with pytest.raises(ValueError, match=told):
            chat_format(load_tokenizer(folder_of("chatml", unusable)), "template")


@pytest.mark.parametrize(("template", "told"), BROKEN.values(), ids=BROKEN)
def test_unusable_templates_are_errors_that_name_the_file(template, told, folder_of):
    folder = folder_of("llama2_first", template)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if name == "chat_template.jinja":
            (folder / name).write_text(template, encoding="utf-8")
        with pytest.raises(ValueError, match=told) as caught:
            encode_conversation(TURN, chat_format(load_tokenizer(folder)), source="rows.jsonl:7")
        assert str(folder / name) in str(caught.value)
        assert "not valid" in told or str(caught.value).startswith("rows.jsonl:7: ")


def test_template_that_is_a_link_out_of_the_folder_is_refused(folder_of, tmp_path):
    (tmp_path / "secret").write_text("{{ messages[0].content }}", encoding="utf-8")
    folder = folder_of("chatml")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link out of its folder"):
        chat_format(load_tokenizer(folder))


def test_template_without_a_file_is_an_error_that_says_so(folder_of):
    folder = folder_of("llama2_first")
    with pytest.raises(ValueError, match="chat_template"):
        chat_format(load_tokenizer(folder))
    with pytest.raises(ValueError, match="chat_template"):
        chat_format(load_tokenizer(folder), "template")
