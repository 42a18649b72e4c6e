"""Text that a model writes, token by token, against UTF-8 itself and the text of all ids."""

import codecs

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pedgpt.data import StreamDecoder, load_tokenizer
from pedgpt.data.tokenizer import Tokenizer

MARKED = ["baichuan", "qwen"]

CHILD = "孩子发烧38.5度，𠮷龘😀👩‍⚕️\n\nfever  3 days\t。"


@pytest.fixture(scope="module")
def byte_fallback():
    """A BPE that writes unknown characters as bytes, as SentencePiece models do."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"孩子发烧咳嗽，。abc "]
    backend = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend, {})


@pytest.mark.parametrize("name", MARKED)
def test_stream_decoder_matches_incremental_utf8(name, tokenizers_by_name):
    # The bytes of each token by GPT-2's table, decoded by Python as they come.
    ours = tokenizers_by_name[name]
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(ours.backend.get_added_tokens_decoder())

    @given(
        st.one_of(
            st.text(alphabet="孩子发烧龘𠮷😀👩\u200d⚕️ab \n", max_size=15).map(ours.encode),
            st.lists(st.integers(0, ours.vocab_size - 1), max_size=15),
        )
    )
    @settings(max_examples=60, deadline=None)
    def check(ids):
        stream, utf8, written, complete = StreamDecoder(ours), codecs.getincrementaldecoder("utf-8")("replace"), "", ""
        for token in ids:
            written += stream.push(token)
            raw = b"" if token in special else bytes(byte_of[c] for c in ours.backend.id_to_token(token))
            complete += utf8.decode(raw)
            assert complete.startswith(written)
            if not utf8.getstate()[0] and not complete.endswith("\ufffd"):
                assert written == complete
        assert written + stream.finish() == complete + utf8.decode(b"", final=True)
        assert stream.finish() == ""

    check()


@pytest.mark.parametrize("text", [CHILD, "龘龘😀a龘", "孩子😀", "", "\n\n"])
def test_stream_decoder_never_shows_half_a_character(text, tokenizer, byte_fallback):
    for tokens in (tokenizer, byte_fallback):
        stream = StreamDecoder(tokens)
        ids = tokens.encode(text)
        assert tokens is tokenizer or len(ids) >= len(text)
        pieces = [stream.push(token) for token in ids]
        assert "\ufffd" not in "".join(pieces)
        assert text.startswith("".join(pieces)) and "".join(pieces) + stream.finish() == text
        assert tokens is byte_fallback or "".join(pieces) == text  # a run of byte pieces is certain when it ends


def test_stream_decoder_shows_a_broken_end_only_when_asked(byte_fallback):
    stream = StreamDecoder(byte_fallback)
    first, second = byte_fallback.encode("龘")[:2]
    assert [stream.push(first), stream.push(second)] == ["", ""]
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.push(byte_fallback.token_id("孩")) == "孩"  # nothing of the broken end is left


@pytest.mark.parametrize("name", ["baichuan", "qwen", "llama2", "baichuan2", "no_bytes"])
def test_streamed_text_matches_decode_of_all_ids(name, tokenizers_by_name, sp_folders):
    ours = tokenizers_by_name[name] if name in tokenizers_by_name else load_tokenizer(sp_folders[name])
    bytes_and_spaces = [i for i in range(ours.vocab_size) if ours.backend.id_to_token(i)[:3] in ("<0x", "▁", "▁▁", "Ġ")]
    any_id = st.integers(0, ours.vocab_size - 1)
    ids = st.lists(any_id | st.sampled_from(bytes_and_spaces or [0]) | st.sampled_from([0, 1, 2, 3]), max_size=20)
    texts = st.text(alphabet="孩发烧龘😀👩\u200d ▁ab\n", max_size=12).map(ours.encode)
    mixed = st.lists(texts | ids, max_size=3).map(lambda parts: [i for part in parts for i in part])

    @given(mixed)
    @settings(max_examples=100, deadline=None)
    def check(ids):
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)

    check()


def test_stream_decoder_keeps_the_space_after_a_special_token(sp_folders):
    ours = load_tokenizer(sp_folders["llama2"])
    fever, end = ours.encode("fever"), ours.token_id("</s>")
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, [*fever, end, *fever])) == "fever fever"


@pytest.mark.parametrize("name", ["qwen", "llama2"])
def test_stop_strings_end_the_text_and_are_never_shown(name, tokenizers_by_name, sp_folders):
    ours = tokenizers_by_name[name] if name in tokenizers_by_name else load_tokenizer(sp_folders[name])
    alphabet = "ab孩😀\n "
    stops = st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=3)

    @given(st.text(alphabet, max_size=25).map(ours.encode), stops)
    @settings(max_examples=100, deadline=None)
    def check(ids, stops):
        text = ours.decode(ids)
        ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
        expected = text
        if ends:  # as soon as one is complete, all that belongs to it goes
            done = text[: ends[0]]
            expected = done[: -max(len(stop) for stop in stops if done.endswith(stop))]
        stream, written = StreamDecoder(ours, stops), ""
        for token in ids:
            written += stream.push(token)
            assert expected.startswith(written) and not any(stop in written for stop in stops)
        assert written + stream.finish() == expected
        assert stream.stopped == bool(ends) and stream.finish() == ""

    check()


def test_stop_strings_hold_back_only_what_may_begin_one(tokenizers_by_name):
    ours = tokenizers_by_name["qwen"]
    stream = StreamDecoder(ours, ["\n\nUser"])
    assert "".join(map(stream.push, ours.encode("多喝水。\n"))) == "多喝水。"
    assert "".join(map(stream.push, ours.encode("观察"))) == "\n观察"
    assert "".join(map(stream.push, ours.encode("\n\nUser: 好"))) == "" and stream.stopped
    assert stream.push(ours.encode("再")[0]) + stream.finish() == ""


@pytest.mark.parametrize(("name", "stop"), [("qwen", "<|im_end|>"), ("baichuan_unmarked", "<reserved_106>")])
def test_a_stop_string_that_spells_a_special_token_stops_by_id(name, stop, tokenizers_by_name):
    ours = tokenizers_by_name[name]
    assert ours.stop_ids(["\n", stop, "<|absent|>"]) == {ours.token_id(stop)} and not ours.stop_ids([])
    begun = ours.encode("多喝水。\n")  # the line break may begin the other stop string, so it is held back
    stream = StreamDecoder(ours, ["\n\nUser", stop])
    assert "".join(map(stream.push, begun)) == "多喝水。" and not stream.stopped
    assert stream.push(ours.token_id(stop)) == "\n" and stream.stopped
    assert stream.push(ours.encode("再")[0]) + stream.finish() == ""
    typed = StreamDecoder(ours, [stop])  # a model that spells it in plain text stops as well
    assert "".join(map(typed.push, ours.encode(f"热{stop}咳"))) == "热" and typed.stopped
    without = StreamDecoder(ours, ["\n\nUser"])
    assert without.push(ours.token_id(stop)) == "" and not without.stopped
