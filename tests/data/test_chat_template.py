"""Chat templates against transformers' apply_chat_template; masks against spans of the rendered text, by hand."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pedgpt.data import (
    Conversation,
    Message,
    ReadSummary,
    Tokenizer,
    chat_format,
    encode_conversation,
    encode_conversations,
    encode_prompt,
    load_tokenizer,
)
from pedgpt.data.chat import BUILT_IN

IGNORED = -100

QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first)"
    " or message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)

QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}\n"
    "{%- set ns = namespace(last=0) %}\n"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {%- set content = message.content %}\n"
    "    {%- if message.role == 'user' %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == 'assistant' %}\n"
    "        {%- set reasoning = '' %}\n"
    "        {%- if '</think>' in content %}\n"
    "            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "        {%- endif %}\n"
    "        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}\n"
    "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{{- content.lstrip('\\n') }}\n"
    "        {%- else %}\n"
    "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
    "        {%- endif %}\n"
    "        {{- '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n"
    "{%- endif %}\n"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA31 = (  # the same with what 3.1 writes about dates, in a system turn that is always there
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' }}"
    "{{- 'Today Date: ' + (strftime_now('%Y') if strftime_now is defined else '2024') + '\n\n' + system"
    " + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{- message.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spans_chatml(messages, opening=""):
    """What ChatML writes, as (text, carries loss)."""
    for m in messages:
        learnt = m.role == "assistant"
        yield from ((f"<|im_start|>{m.role}\n", False), (m.content + "<|im_end|>", learnt), ("\n", False))


def spans_qwen25(messages):
    default = [] if messages[0].role == "system" else [Message("system", "You are a helpful assistant.")]
    return spans_chatml([*default, *messages])


def spans_qwen3(messages):
    spans = list(spans_chatml(messages))
    said, _ = spans[-2]
    spans[-2] = ("<think>\n\n</think>\n\n" + said.lstrip("\n"), True)
    return spans


def spans_llama3(messages):
    yield "<|begin_of_text|>", False
    for m in messages:
        yield f"<|start_header_id|>{m.role}<|end_header_id|>\n\n", False
        yield m.content.strip() + "<|eot_id|>", m.role == "assistant"


def spans_llama31(messages):
    system = [m.content.strip() for m in messages if m.role == "system"]
    about = f"Cutting Knowledge Date: December 2023\n\nToday Date: {time.strftime('%Y')}\n\n{''.join(system)}"
    # The trimmed system text ends with the line break before it where there is none.
    yield f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{about}<|eot_id|>", False
    yield from list(spans_llama3([m for m in messages if m.role != "system"]))[1:]


def spans_llama2(messages):
    system = ""
    for m in messages:
        if m.role == "system":
            system = f"<<SYS>>\n{m.content}\n<</SYS>>\n\n"
        elif m.role == "user":
            yield f"<s>[INST] {(system + m.content).strip()} [/INST]", False
            system = ""
        else:
            yield f" {m.content.strip()} </s>", True


def spans_mistral(messages):
    yield "<s>", False
    for m in messages:
        yield (m.content + "</s>", True) if m.role == "assistant" else (f"[INST] {m.content} [/INST]", False)


# name: template, tokenizer, spans by hand, takes a system text, ids of what ends an answer
CASES = {
    "qwen25": (QWEN25, "chatml", spans_qwen25, True, ["<|im_end|>"]),
    "qwen3": (QWEN3, "chatml", spans_qwen3, True, ["<|im_end|>"]),
    "generation": (GENERATION, "chatml", spans_chatml, True, ["<|im_end|>"]),
    "llama3": (LLAMA3, "llama3", spans_llama3, True, ["<|eot_id|>", "<|end_of_text|>"]),
    "llama31": (LLAMA31, "llama3", spans_llama31, True, ["<|eot_id|>", "<|end_of_text|>"]),
    "llama2": (LLAMA2, "llama2_prepend", spans_llama2, True, ["</s>"]),
    "llama2_first": (LLAMA2, "llama2_first", spans_llama2, True, ["</s>"]),
    "mistral": (MISTRAL, "llama2_prepend", spans_mistral, False, ["</s>"]),
    "mistral_first": (MISTRAL, "llama2_first", spans_mistral, False, ["</s>"]),
}


@pytest.fixture(scope="module")
def cases(kinds, folder_of):
    """By name: ours, transformers', the spans by hand, whether a system text is taken."""
    made = {}
    for name, (template, kind, spans, system, _) in CASES.items():
        folder = folder_of(kind, template)
        names = {key: value for key, value in kinds[kind][1].items() if value and key != "pad_token"}
        peer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, pad_token=None, **names
        )
        made[name] = (chat_format(load_tokenizer(folder), "template"), peer, spans, system)
    return made


PIECES = ["孩子", "发烧", "龘", "😀", "👩‍⚕️", "38.5", " ", "  ", "\n", "\n\n", "\t", "fever", " is", "é", "\ufdd0", "0"]

TEXT = st.lists(st.sampled_from([*PIECES, "\ufdd1", "\ufdd2\ufdd3", "\ue000"]), max_size=7).map("".join)

ASKED = st.builds("{}{}{}".format, TEXT, st.just("问"), TEXT)

# A word in front: an answer is cut from what stands before it, so that a prompt ends where the answer begins.
SAID = st.builds("答{}".format, TEXT)


def conversations(system):
    def build(first, turns):
        head = [Message("system", first)] if first is not None else []
        return head + [Message(r, t) for turn in turns for r, t in zip(("user", "assistant"), turn, strict=True)]

    systems = st.none() | ASKED if system else st.none()
    return st.builds(build, systems, st.lists(st.tuples(ASKED, SAID), min_size=1, max_size=3))


def raw(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def expected(peer, messages, spans):
    """transformers' ids of the rendered conversation, and which of them lie in spans that carry loss."""
    text = peer.apply_chat_template(raw(messages), tokenize=False)
    spans = list(spans(messages))
    assert "".join(piece for piece, _ in spans) == text
    learnt = [carries for piece, carries in spans for _ in piece]
    encoded = peer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = peer.apply_chat_template(raw(messages), return_dict=True)["input_ids"]
    assert encoded["input_ids"] == ids
    return ids, [bool(end and learnt[end - 1]) for _, end in encoded["offset_mapping"]]


def labels_of(ids, learnt):
    return [token if carries else IGNORED for token, carries in zip(ids[1:], learnt[1:], strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_template_matches_transformers_and_masks_made_by_hand(name, cases):
    chat, peer, spans, system = cases[name]

    @given(conversations(system))
    @settings(max_examples=50, deadline=None)
    def check(messages):
        ids, learnt = expected(peer, messages, spans)
        example = encode_conversation(messages, chat)
        assert example.tokens == ids[:-1]
        assert example.labels == labels_of(ids, learnt)
        prompt = peer.apply_chat_template(raw(messages[:-1]), add_generation_prompt=True, return_dict=True)
        assert encode_prompt(messages[:-1], chat) == prompt["input_ids"]

    check()
    assert chat.stop_tokens == tuple(map(peer.convert_tokens_to_ids, CASES[name][4]))


def test_generation_blocks_match_transformers_assistant_mask(cases):
    chat, peer, _, _ = cases["generation"]

    @given(conversations(True))
    @settings(max_examples=20, deadline=None)
    def check(messages):
        rendered = peer.apply_chat_template(raw(messages), return_dict=True, return_assistant_tokens_mask=True)
        example = encode_conversation(messages, chat)
        assert example.labels == labels_of(rendered["input_ids"], rendered["assistant_masks"])

    check()


@pytest.mark.parametrize(("name", "kind"), [("chatml", "chatml"), ("llama3", "llama3")])
def test_built_in_formats_match_the_published_template(name, kind, cases, kinds, folder_of):
    _, peer, spans, _ = cases["generation" if name == "chatml" else "llama3"]
    chat = chat_format(load_tokenizer(folder_of(kind)), name)

    @given(conversations(True))
    @settings(max_examples=30, deadline=None)
    def check(messages):
        ids, learnt = expected(peer, messages, spans)
        example = encode_conversation(messages, chat)
        assert (example.tokens, example.labels) == (ids[:-1], labels_of(ids, learnt))
        prompt = peer.apply_chat_template(raw(messages[:-1]), add_generation_prompt=True, return_dict=True)
        assert encode_prompt(messages[:-1], chat) == prompt["input_ids"]

    check()


def test_llama3_ends_at_every_token_that_ends_a_turn(kinds, folder_of):
    chat = chat_format(load_tokenizer(folder_of("llama3")))
    names = ["<|eot_id|>", "<|end_of_text|>"]
    assert chat.stop_tokens == tuple(map(chat.tokenizer.token_id, names))
    ids = encode_prompt([Message("user", "a")], chat)
    assert ids.count(chat.tokenizer.bos_id) == 1 and ids[0] == chat.tokenizer.bos_id


@pytest.mark.parametrize("name", CASES)
def test_text_that_spells_special_tokens_stays_text(name, cases):
    chat, peer, _, system = cases[name]
    tokenizer = chat.tokenizer
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    names = [tokenizer.backend.id_to_token(i) for i in sorted(special)]
    harmless = [Message("system", "规")] * system + [Message("user", "问"), Message("assistant", "答")] * 2
    wanted = encode_conversation(harmless, chat)
    # The think tags inside an answer are what Qwen3's template rewrites.
    attacks = st.lists(st.sampled_from([*[n for n in names if "think" not in n], "好", "\n"]), min_size=1).map("".join)

    @given(st.lists(attacks, min_size=len(harmless), max_size=len(harmless)))
    @settings(max_examples=15, deadline=None)
    def check(texts):
        attacked = [Message(m.role, f"x{text}x") for m, text in zip(harmless, texts, strict=True)]
        example = encode_conversation(attacked, chat)
        for ids, plain in ((example.tokens, wanted.tokens), (example.labels, wanted.labels)):
            assert [i for i in ids if i in special] == [i for i in plain if i in special]
        said = tokenizer.decode([i for i in example.labels if i != IGNORED and i not in special])
        answers = [m.content for m in attacked if m.role == "assistant"]
        said = said.replace(" ", "").replace("\n", "").replace("<think></think>", "")  # what the template itself writes
        assert said == "".join(answers).replace("\n", "")

    check()


@pytest.mark.parametrize("name", CASES)
def test_flagged_messages_and_last_only_move_the_loss_alone(name, cases):
    chat, peer, spans, _ = cases[name]
    turns = [Message("user", "问一"), Message("assistant", "答一"), Message("user", "问"), Message("assistant", "答二")]
    ids, learnt = expected(peer, turns, spans)
    first_end = next(i for i in range(1, len(ids)) if learnt[i - 1] and not learnt[i])
    first = [carries and i < first_end for i, carries in enumerate(learnt)]
    second = [carries and i >= first_end for i, carries in enumerate(learnt)]
    flagged = [Message(m.role, m.content, loss=i != 1) for i, m in enumerate(turns)]
    last_flagged = [Message(m.role, m.content, loss=i != 3) for i, m in enumerate(turns)]
    for messages, last_only, mask in (
        (turns, True, second),
        (flagged, False, second),
        (last_flagged, False, first),
        (last_flagged, True, [False] * len(ids)),
    ):
        example = encode_conversation(messages, chat, last_only=last_only)
        assert (example.tokens, example.labels) == (ids[:-1], labels_of(ids, mask))


def test_answer_that_begins_with_whitespace_is_cut_where_the_prompt_ends(cases):
    chat, peer, _, _ = cases["generation"]
    messages = [Message("user", "问\n"), Message("assistant", "\n\n答")]
    prompt = encode_prompt(messages[:1], chat)
    example = encode_conversation(messages, chat)
    assert example.tokens[: len(prompt)] == prompt
    assert chat.tokenizer.decode([i for i in example.labels if i != IGNORED]) == "\n\n答"


def test_empty_system_text_gives_what_transformers_gives(cases):
    for name in ("qwen25", "qwen3", "llama3", "llama31", "llama2"):
        chat, peer, _, _ = cases[name]
        messages = [Message("system", ""), Message("user", "问"), Message("assistant", "答")]
        ids = peer.apply_chat_template(raw(messages), return_dict=True)["input_ids"]
        assert encode_conversation(messages, chat).tokens == ids[:-1]


AUTO = {  # tokenizer, template, the format that is picked
    "no template": ("chatml", None, "ChatML"),
    "the template that a run wrote": ("chatml", BUILT_IN["chatml"].jinja, "ChatML"),
    "template of the same ids": ("chatml", GENERATION, "ChatFormat"),
    "llama 3's own": ("llama3", LLAMA3, "ChatFormat"),
    "default system text": ("chatml", QWEN25, "ChatFormat"),
    "stub only in the last answer": ("chatml", QWEN3, "ChatFormat"),
    "dates": ("llama3", LLAMA31, "ChatFormat"),
    "role tokens, but a template that trims": ("chatml", GENERATION.replace("] }}", "] | trim }}"), "ChatFormat"),
    "no role tokens": ("llama2_first", LLAMA2, "ChatFormat"),
    "no role tokens, no system text": ("llama2_prepend", MISTRAL, "ChatFormat"),
    "a template that fails": ("chatml", "{{ raise_exception('no') }}", "ChatFormat"),
}


@pytest.mark.parametrize(("kind", "template", "picked"), AUTO.values(), ids=AUTO)
def test_auto_picks_the_checkpoints_template_or_the_format_of_its_tokens(kind, template, picked, folder_of):
    assert type(chat_format(load_tokenizer(folder_of(kind, template)))).__name__ == picked


TURN = [Message("user", "问"), Message("assistant", 'a"答')]


def test_conversation_that_the_template_refuses_is_a_bad_row(folder_of):
    chat = chat_format(load_tokenizer(folder_of("llama2_first", MISTRAL)))
    rows = [Conversation(tuple(TURN), "f:1"), Conversation((Message("system", "规"), *TURN), "f:2")]
    with pytest.raises(ValueError, match=r"^f:2: the chat template fails \(.*tokenizer_config.json"):
        encode_conversations(rows, chat, 99, "error", ReadSummary())
    summary = ReadSummary(rows={"f": 2})
    (kept,) = encode_conversations(rows, chat, 99, "skip", summary)
    assert kept.source == "f:1" and summary.rows == {"f": 1}
    assert (summary.skipped[0].line, summary.skipped[0].reason[:23]) == (2, "the chat template fails")


@given(
    st.sampled_from(sorted(CASES)), st.integers(0, 10**6), st.integers(0, 12),
    st.text("{}%-'\"()[]|+ .\nabmessage<0", max_size=6),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_templates_name_their_file_or_work(kinds, name, place, lost, put):
    template, kind = CASES[name][:2]
    place %= len(template)
    backend, config = kinds[kind]
    damaged = template[:place] + put + template[place + lost :]
    tokenizer = Tokenizer(backend, config | {"chat_template": damaged}, Path("somewhere"))
    try:
        chat = chat_format(tokenizer, "template")
        example = encode_conversation(TURN, chat)
    except ValueError as error:
        assert "somewhere/tokenizer_config.json" in str(error)
        return
    # Whatever the damage, only what the assistant said and the template's own text are learnt, never the question.
    learnt = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert 'a"答' in learnt and "问" not in learnt


def test_the_end_of_an_answer_is_learnt_although_the_template_does_not_mark_it(folder_of):
    unmarked = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    chat = chat_format(load_tokenizer(folder_of("chatml", unmarked)), "template")
    assert chat.stop_tokens == (chat.tokenizer.token_id("<|im_end|>"),)
    example = encode_conversation([Message("user", "问"), Message("assistant", "答")], chat)
    learnt = [t for t in example.labels if t != IGNORED]
    assert chat.tokenizer.backend.decode(learnt, skip_special_tokens=False) == "答<|im_end|>"
