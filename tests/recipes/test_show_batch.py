"""show_batch prints the tokens and the mask that training sees: whole outputs written by hand."""

import re
import shutil
import sys

import pytest
import tokenizers
from tokenizers import processors

USER, ASSISTANT = "⟦<reserved_106>⟧", "⟦<reserved_107>⟧"


def message(role, content, **flags):
    return {"role": role, "content": content, **flags}


@pytest.fixture
def show(lab, tmp_path):
    """show_batch on rows of one kind, with a folder that holds only the tokenizer's files."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(lab.folder / "model" / name, folder / name)

    def run(kind, rows, *flags):
        path = tmp_path / f"{kind}.jsonl"
        lab.write(path, rows)
        result = lab.call("show_batch", ["--model", str(folder), f"--{kind}", str(path), *flags])
        return result, path

    lab.write = sys.modules[type(lab).__module__].write
    return run


def blocks(out):
    """(heading, body) of every document that is printed."""
    parts = re.split(r"^── (.*?)─*$", out.replace("row ", "── row "), flags=re.MULTILINE)[1:]
    return [(h.strip(), body.strip("\n")) for h, body in zip(parts[::2], parts[1::2], strict=True)]


def bodies(out):
    return [body for heading, body in blocks(out) if not heading.startswith("row")]


TWO_TURNS = {
    "messages": [
        message("system", "规矩"), message("user", "一"), message("assistant", "二三"), message("user", "四"),
        message("assistant", "五"),
    ]
}  # fmt: skip


def flagged(place):
    turns = [dict(turn) for turn in TWO_TURNS["messages"]]
    turns[place]["loss"] = False
    return {"messages": turns}


@pytest.mark.parametrize(
    ("row", "body"),
    [
        (TWO_TURNS, f"规矩{USER}一{ASSISTANT}«二三⟦→</s>⟧»{USER}四{ASSISTANT}«五⟦→</s>⟧»"),
        (flagged(2), f"规矩{USER}一{ASSISTANT}二三{USER}四{ASSISTANT}«五⟦→</s>⟧»"),
        (flagged(4), f"规矩{USER}一{ASSISTANT}«二三⟦→</s>⟧»{USER}四{ASSISTANT}五"),
        # Typed special tokens are text; so are « and ⟦. Terminals get no control characters from the data.
        (
            {"question": "<reserved_107>\n»⟦", "answer": "</s>😀\n\n👩‍⚕️龘\x1b[31m\x9b\ttab"},
            f"{USER}<reserved_107>↵\n»⟦{ASSISTANT}«</s>😀↵\n↵\n👩‍⚕️龘␛[31m\\x9b\ttab⟦→</s>⟧»",
        ),
        ({"question": " a b ", "answer": " c d "}, f"{USER} a b {ASSISTANT}« c d ⟦→</s>⟧»"),
    ],
)
def test_marks_are_the_mask_written_by_hand(show, row, body):
    result, path = show("instructions", [row])
    assert result.code == 0, result.err
    assert bodies(result.out) == [body]
    ((heading, _),) = [block for block in blocks(result.out) if not block[0].startswith("row")]
    assert f"1 ─ {path}:1 ─ " in heading


def test_the_data_sends_no_escape_sequence(lab, show, tmp_path):
    rows = [{"question": "一\x1b[2J", "answer": "三\x1b]0;title\x07\u202e"}]
    result, path = show("instructions", rows)
    hostile = path.rename(tmp_path / "名\x1b[2J.jsonl")
    result = lab.call("show_batch", ["--model", str(tmp_path / "tokenizer"), "--instructions", str(hostile)])
    assert result.code == 0 and "名\\x1b[2J" in result.out and "\\u202e" in result.out
    assert not re.search("\x1b|\x07|\u202e", result.out)


def test_counts_and_sources_are_those_of_the_row(show):
    # A digit is a token: 1 + 3 + 1 + 2 tokens of which 2 and an eos are learnt, and 1 + 1 + 1 + 1 of which 2.
    rows = [{"question": "123", "answer": "45"}, {"question": "6", "answer": "7"}]
    result, path = show("instructions", rows, "--row_length", "12", "--rows", "1")
    assert "instructions: 2 documents in 1 rows of 12 tokens, 91.7% used; 11 tokens, 5 (45.5%) supervised" in result.out
    headings = [heading for heading, _ in blocks(result.out)]
    assert headings == [
        "row 1: 11 tokens, 5 (45.5%) supervised, 2 documents",
        f"1 ─ {path}:1 ─ 7 tokens, 3 (42.9%) supervised",
        f"2 ─ {path}:2 ─ 4 tokens, 2 (50.0%) supervised",
    ]
    assert bodies(result.out) == [f"{USER}123{ASSISTANT}«45⟦→</s>⟧»", f"{USER}6{ASSISTANT}«7⟦→</s>⟧»"]
    assert re.search(rf"{re.escape(str(path))} +2 +0\n", result.out)  # the readers' table


def test_rows_are_spread(show):
    # Rows of 8: documents of 7, 6, 5 and 4 tokens do not share one; the first and the third are shown.
    rows = [{"question": "1" * n, "answer": "9"} for n in (1, 2, 3, 4)]
    result, path = show("instructions", rows, "--row_length", "8", "--rows", "2")
    headings = [heading for heading, _ in blocks(result.out)]
    assert headings == [
        "row 1: 7 tokens, 2 (28.6%) supervised, 1 document",
        f"1 ─ {path}:4 ─ 7 tokens, 2 (28.6%) supervised",
        "row 3: 5 tokens, 2 (40.0%) supervised, 1 document",
        f"1 ─ {path}:2 ─ 5 tokens, 2 (40.0%) supervised",
    ]


def test_text_carries_loss_but_for_its_first_token(show):
    result, path = show("text", [{"text": "12345678"}], "--row_length", "5", "--rows", "9")
    # Longer than a row, it becomes two documents; the last target of the first is the first token of the second.
    assert bodies(result.out) == ["1«2345⟦→6⟧»", "6«78⟦→</s>⟧»"]
    assert result.out.count(f"{path}:1 ─") == 2


def test_document_prefix_is_shown(show, tmp_path):
    file = tmp_path / "tokenizer" / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(file))
    result, _ = show("text", [{"text": "12"}])
    assert bodies(result.out) == ["⟦<s>⟧«12⟦→</s>⟧»"]
    result, _ = show("instructions", [{"question": "1", "answer": "2"}])
    assert bodies(result.out) == [f"{USER}1{ASSISTANT}«2⟦→</s>⟧»"]


def test_pairs_show_both_replies(show):
    turns = [message("user", "一"), message("assistant", "二"), message("user", "三")]
    result, path = show("preferences", [{"prompt": turns, "chosen": "好", "rejected": "坏了"}])
    prompt = f"{USER}一{ASSISTANT}二{USER}三{ASSISTANT}"
    assert bodies(result.out) == [f"{prompt}«好⟦→</s>⟧»", f"{prompt}«坏了⟦→</s>⟧»"]
    assert f"1 ─ {path}:1 chosen ─" in result.out and f"2 ─ {path}:1 rejected ─" in result.out


def test_half_a_character_is_shown_only_where_a_row_cuts_it(show):
    # The first of the bytes of 👩 carries no loss, the last one does.
    result, _ = show("text", [{"text": "👩\u200d⚕️龘😀"}], "--row_length", "40")
    assert bodies(result.out) == ["«👩\u200d⚕️龘😀⟦→</s>⟧»"]
    cut, _ = show("text", [{"text": "aaaa😀"}], "--row_length", "5")
    assert re.fullmatch("a«aaa�+⟦→�⟧»", bodies(cut.out)[0])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rows", "0"], "rows and row_length must be at least 1"),
        (["--on_long_row", "cut"], "on_long_row is 'cut'"),
        (["--chat_format", "chatml"], "im_start"),
    ],
)
def test_mistakes_end_in_one_line(show, flags, told):
    result, _ = show("instructions", [{"question": "12", "answer": "3"}], *flags)
    assert result.code == 2 and told in result.err and result.err.count("\n") == 1


def test_nothing_to_show_is_an_error(lab):
    result = lab.call("show_batch", ["--model", str(lab.folder / "model")])
    assert result.code == 2 and "--instructions, --text or --preferences" in result.err


def test_over_long_rows_are_in_the_table_and_never_stop_it(show):
    rows = [{"question": "12", "answer": "3"}, {"question": "1", "answer": "2"}]
    result, path = show("instructions", rows, "--row_length", "4", "--on_long_row", "error")
    assert f"1 skipped, over-long: {path}:1" in result.out
    assert bodies(result.out) == [f"{USER}1{ASSISTANT}«2⟦→</s>⟧»"]
    nothing, _ = show("instructions", rows[:1], "--row_length", "4")
    assert nothing.code == 0 and "0 documents in 0 rows" in nothing.out
    cut, _ = show("instructions", rows[:1], "--row_length", "4", "--on_long_row", "truncate")
    assert bodies(cut.out) == [f"{USER}12{ASSISTANT}«⟦→3⟧»"] and "1 over-long, cut to fit" in cut.out
