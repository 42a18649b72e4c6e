"""chat.py as its user meets it: Ctrl-C, stop strings, the model's own defaults, templates that refuse."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pedgpt.data import Message, StreamDecoder, chat_format, encode_prompt, load_tokenizer, train_tokenizer
from pedgpt.files import printable
from pedgpt.models import ModelConfig, Transformer, generate, load_model, save_model

CHAT = Path(__file__).resolve().parents[2] / "recipes" / "chat.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Baichuan2 that talks without end."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    special = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
    texts = ["宝宝发热三天。怎么办？多喝水，及时就医。"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=300, special_tokens=special)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "baichuan", "vocab_size": 300, "max_position_embeddings": 100_000, **sizes}
    torch.manual_seed(2)
    model = Transformer(ModelConfig.from_hf({**config, "pedgpt_positions": "rope", "pedgpt_norm_head": True}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
        model.lm_head.weight[:5] = -model.lm_head.weight[5:].mean(0)  # no special token ever wins
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def start(python, folder, *flags):
    environment = {**os.environ, "PYTHONPATH": str(CHAT.parents[1])}
    command = [python, str(CHAT), "--model", str(folder), *map(str, flags)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, **pipes)


def talk(lab, text, folder, *flags):
    """What is printed when `text` is piped in."""
    with patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")):
        result = lab.call("chat", ["--model", str(folder), *map(str, flags)])
    return result.out, result.err


def expected(folder, text, **settings):
    tokenizer = load_tokenizer(folder)
    chat = chat_format(tokenizer)
    prompt = encode_prompt([Message("user", text)], chat)
    said = tokenizer.decode(generate(load_model(folder), [prompt], stop_tokens=chat.stop_tokens, **settings)[0])
    return printable(said)


def test_ctrl_c_stops_the_answer_and_not_the_program(folder, python):
    process = start(python, folder, "--max_new_tokens", 90_000)
    process.stdin.write("发热\n".encode())
    process.stdin.flush()
    said = b""
    while len(said.partition("助手> ".encode())[2]) < 20:
        said += os.read(process.stdout.fileno(), 4096)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/quit\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err
    answer = (said + out).decode().partition("助手> ")[2].rstrip("\n")
    whole = expected(folder, "发热", max_new_tokens=len(answer) + 200)
    assert "Traceback" not in answer and 20 < len(answer) and whole.startswith(answer[:20])


def test_a_turn_reads_only_what_is_new_and_answers_as_if_it_read_all(lab, folder, monkeypatch):
    chat, asked = lab.module("chat"), []

    def steps(model, prompts, *, cache, **settings):
        held = cache.share(prompts[0], 0, [0])
        ids = list(chat.pedgpt_steps(model, prompts, cache=cache, **settings))
        asked.append((len(prompts[0]), held, ids == list(chat.pedgpt_steps(model, prompts, **settings))))
        return ids

    monkeypatch.setattr(chat, "pedgpt_steps", chat.generate_steps, raising=False)
    monkeypatch.setattr(chat, "generate_steps", steps)
    out, err = talk(lab, "发热\n咳嗽\n/reset\n发热\n", folder, "--max_new_tokens", 20)
    assert not err and out.count("助手>") == 3
    (first, none, *_), (second, held, _), (again, forgotten, _) = asked
    assert [equal for _, _, equal in asked] == [True, True, True]
    assert (none, again, forgotten) == (0, first, 0) and first <= held < second


def test_a_stop_string_ends_the_answer_before_it(lab, folder):
    whole = expected(folder, "发热", max_new_tokens=60)
    stop = whole[10:13]
    out, err = talk(lab, "发热\n", folder, "--max_new_tokens", 60, "--stop_strings", stop)
    assert not err
    assert out.partition("助手> ")[2].strip() == whole[: whole.index(stop)].strip()


def test_a_stop_string_that_names_a_special_token_ends_the_answer(lab, folder):
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.encode("多喝水。"), tokenizer.token_id("<reserved_107>"), *tokenizer.encode("及时就医")]
    for stop, told in (("<reserved_107>", "多喝水。"), ("<s>", "多喝水。及时就医")):
        steps = iter([(token,) for token in ids])
        assert lab.module("chat").stream(steps, StreamDecoder(tokenizer, [stop]), {2, 3}) == told


def test_the_models_own_defaults_hold_unless_a_setting_says_otherwise(lab, folder, tmp_path):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(folder), str(model)], check=True)
    own = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "max_new_tokens": 25}
    (model / "generation_config.json").write_text(json.dumps(own))
    sampling = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 0}
    out, _ = talk(lab, "发热\n", model)
    assert out.partition("助手> ")[2].strip() == expected(folder, "发热", max_new_tokens=25, **sampling).strip()
    out, _ = talk(lab, "发热\n", model, "--temperature", 0, "--max_new_tokens", 12)
    assert out.partition("助手> ")[2].strip() == expected(folder, "发热", max_new_tokens=12).strip()
    (model / "generation_config.json").write_text('{"do_sample": true, "top_p": 3}')
    out, err = talk(lab, "发热\n", model)
    assert "助手" not in out and "generation_config.json: top_p is 3" in err


def test_a_template_that_refuses_does_not_end_the_chat(lab, folder, tmp_path):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(folder), str(model)], check=True)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system text here') }}{% endif %}"
        "{{ '<reserved_106>' if m.role == 'user' else '<reserved_107>' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<reserved_107>{% endif %}"
    )
    flags = ["--chat_format", "template", "--max_new_tokens", 9]
    out, err = talk(lab, "/system 你是医生\n发热\n/system\n发热\n", model, *flags)
    assert not err
    first, second = out.split("家长> 发热\n")[1:]
    assert "no system text here" in first and "助手" not in first
    assert second.partition("助手> ")[2].strip()


def test_commands_are_confirmed_and_unknown_ones_named(lab, folder):
    typed = "/help\n/systemx 你好\n/reste\n/xyzzy\n/reset\n/system 你是\x1b[31m医生\n/3岁\n/quit\n发热\n"
    out, err = talk(lab, typed, folder, "--max_new_tokens", 3)
    assert not err and "\x1b" not in out
    assert re.search(r"^/help +list the commands$", out, re.MULTILINE)
    assert "(/systemx is no command; did you mean '/system'?)" in out
    assert "(/reste is no command; did you mean '/reset'?)" in out
    assert "(/xyzzy is no command; known commands: /help, /reset, /system, /quit)" in out
    assert "(a new conversation, without system text)" in out
    assert "(a new conversation, the system text is '你是\\x1b[31m医生')" in out
    assert out.count("助手>") == 1 and "家长> /3岁" in out and "家长> 发热" not in out


# Reads questions until the input ends, with chat.py's function alone: to import torch takes longer.
READ = """
import ast, pathlib, select, sys
from contextlib import suppress
tree = ast.parse(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
tree.body = [node for node in tree.body if getattr(node, "name", "") == "read_question"]
exec(compile(tree, "chat.py", "exec"))
while True:
    try:
        print(repr(read_question()))
    except EOFError:
        break
"""


def test_pasted_lines_are_one_question_and_history_is_kept_in_memory(tmp_path):
    main, other = pty.openpty()
    home = {"HOME": str(tmp_path), "TERM": "xterm", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(CHAT)]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env={**os.environ, **home})
    os.close(other)

    def answer_to(typed):
        """What is printed after the prompt and what is typed, until the next prompt."""
        os.write(main, typed.encode())
        said = b""
        while not said.endswith("家长> ".encode()):
            said += os.read(main, 4096)
        return said.decode()

    answer_to("")
    # A terminal that does not mark what is pasted; one that does; arrow keys that edit, and bring back a line.
    assert "'孩子发热\\n三天了\\n怎么办'" in answer_to("孩子发热\n三天了\n怎么办\n")
    assert "'咳嗽\\n两天'" in answer_to("\x1b[200~咳嗽\r两天\x1b[201~\r")
    assert "'两一只'" in answer_to("一只\x1b[D\x1b[D两\r")
    assert "'两一只！'" in answer_to("\x1b[A！\r")
    os.write(main, b"\x04")
    assert process.wait(20) == 0
    os.close(main)
    assert not list(tmp_path.iterdir())


def test_chat_before_the_demo_says_what_to_do(tmp_path):
    command = ["make", "-C", str(CHAT.parents[1]), "chat", f"RUN={tmp_path}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and f'there is no trained model in {tmp_path} yet; run "make demo" first' in done.stderr
    assert not list(tmp_path.iterdir())
