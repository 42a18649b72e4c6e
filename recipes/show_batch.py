"""Print packed rows of your data, with every token marked by whether it carries loss: look before you train.

    python recipes/show_batch.py --model runs/demo/base --instructions runs/demo/corpus/train/generalist
    python recipes/show_batch.py --model runs/demo/base --text runs/demo/corpus/train/text \\
        --preferences runs/demo/corpus/train/preferences --rows 1 --row_length 1024 --color never

Rows are made as the training recipes make them: instructions as in full_finetune.py and expert_finetune.py, text as in
continued_pretrain.py (without its mixing), preferences as in dfpo.py (but the prompt before each answer). Of the model
only the tokenizer's files are read.
"""

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from pedgpt.data import (
    Batch,
    ChatSettings,
    ReadSummary,
    Tokenizer,
    chat_format,
    collate,
    collate_pairs,
    encode_conversations,
    encode_document,
    encode_pairs,
    load_tokenizer,
    pack,
    parse_columns,
    read_conversations,
    read_documents,
    read_preferences,
    utilization,
)
from pedgpt.data.chat import IGNORE_INDEX
from pedgpt.files import printable
from pedgpt.training import make_printable, run_recipe

# How a span begins, by (a special token, carries loss).
COLORS = {
    (False, True): "\033[32m",  # green
    (False, False): "\033[2m",  # dim
    (True, True): "\033[1;30;42m",  # black on green
    (True, False): "\033[35m",  # magenta
}
RESET = "\033[0m"
RULE = "─"
Span = tuple[str, bool, bool]  # text, whether it is a special token's name, whether it carries loss


@dataclass(kw_only=True)
class Config(ChatSettings):
    model: str  # folder of a model, or of its tokenizer's files only
    instructions: list[str] = field(default_factory=list)  # conversations: files or folders
    text: list[str] = field(default_factory=list)  # documents: files or folders
    preferences: list[str] = field(default_factory=list)  # preference pairs: files or folders
    rows: int = 2  # rows (pairs) of each kind to print, spread over all of them
    row_length: int = 512  # tokens a packed row
    template_date: str = ""  # the day that a dated template writes, like 2026-03-31; empty: today
    on_long_row: str = "skip"  # "truncate" shows rows that do not fit as training cuts them; else they are only counted
    color: str = "auto"  # auto: on a terminal, unless NO_COLOR is set; always; never


def main(config: Config) -> None:
    if not (config.instructions or config.text or config.preferences):
        raise ValueError("nothing to show; give --instructions, --text or --preferences")
    if config.rows < 1 or config.row_length < 1:
        raise ValueError(f"rows and row_length must be at least 1, found {config.rows} and {config.row_length}")
    if config.color not in ("auto", "always", "never"):
        raise ValueError(f'color must be "auto", "always" or "never", found {config.color!r}')
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    paint = in_color if config.color == "always" or (config.color == "auto" and wanted) else in_marks
    make_printable(sys.stdout, "\x1b")  # lets colours through; the text between them is made printable below
    tokenizer = load_tokenizer(config.model)
    summary = ReadSummary()
    policy = {"on_bad_row": config.on_bad_row, "summary": summary}
    read = {"columns": parse_columns(config.columns), **policy}
    if config.on_long_row == "error":  # what would stop a training run is only counted here
        config.on_long_row = "skip"
    length = config.row_length

    shown: list[tuple[str, Batch, list[list[str]]]] = []  # heading, rows, and the sources in each row

    def add(kind: str, examples: list) -> None:
        rows = pack(examples, length)
        tokens, taught = sum(len(e.tokens) for e in examples), sum(e.supervised for e in examples)
        heading = f"{kind}: {len(examples):,} documents in {len(rows):,} rows of {length} tokens, "
        heading += f"{utilization(rows, length):.1%} used; {tokens:,} tokens, {share(taught, tokens)} supervised"
        chosen = spread(len(rows), config.rows)
        shown.append((heading, collate([rows[i] for i in chosen], chosen), [rows[i].sources for i in chosen]))

    if config.instructions or config.preferences:
        chat = chat_format(tokenizer, config.chat_format, config.enable_thinking, config.template_date)
        ends = " or ".join(map(name_of(tokenizer), chat.stop_tokens))
        print(f"{type(chat).__name__}; an answer ends at {printable(ends)}\n")
    if config.instructions:
        conversations = read_conversations(config.instructions, **read)
        add("instructions", encode_conversations(conversations, chat, length, on_long_row=config.on_long_row, **policy))
    if config.text:
        add("text", [
            piece
            for row in read_documents(config.text, **read)
            for piece in encode_document(
                tokenizer.encode(row.text), tokenizer.eos_id, length, row.source, tokenizer.document_prefix
            )
        ])  # fmt: skip
    if config.preferences:
        found = read_preferences(config.preferences, **read)
        pairs = encode_pairs(found, chat, length, on_long_row=config.on_long_row, **policy)
        chosen = spread(len(pairs), config.rows)
        names = [[f"{pairs[i].chosen.source} {side}"] for side in ("chosen", "rejected") for i in chosen]
        batch = collate_pairs([pairs[i] for i in chosen], chosen, shared_prompt=False)  # easier to read
        shown.append((f"preferences: {len(pairs):,} pairs, chosen before rejected", batch, names))

    print(f"{printable(summary.describe())}\n\n{legend(paint)}")
    for heading, batch, sources in shown:
        print(f"\n{heading}")
        for number, names in enumerate(sources):  # none where there are no rows
            show_row(batch, number, names, tokenizer, paint)


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` rows: packing puts the longest documents first, so not just the first rows."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(1, whole):.1%})"


def legend(paint: Callable[[list[Span]], str]) -> str:
    seen = [
        paint([span])
        for span in (
            ("carries loss", False, True), ("no loss", False, False), ("special token", True, True),
            ("special token", True, False), ("→token", True, True),
        )
    ]  # fmt: skip
    return (
        f"{seen[0]}, {seen[1]}, {seen[2]} with loss, {seen[3]} without, {seen[4]} to be predicted but not in the input,"
        " ↵ line break"
    )


def show_row(
    batch: Batch, number: int, sources: list[str], tokenizer: Tokenizer, paint: Callable[[list[Span]], str]
) -> None:
    """The row's counts, then each of its documents under a line that names it."""
    tokens, labels, documents = (x[number].tolist() for x in (batch.tokens, batch.labels, batch.documents))
    used = sum(document >= 0 for document in documents)
    taught = share(sum(label != IGNORE_INDEX for label in labels), used)
    counts = f"{used} tokens, {taught} supervised, {len(sources)} document{'s' * (len(sources) != 1)}"
    print(f"\nrow {int(batch.row_ids[number]) + 1}: {counts}, {len(tokens) - used} padding")
    for document, source in enumerate(sources):
        mine = [t for t, owner in enumerate(documents) if owner == document]
        part, targets = [tokens[t] for t in mine], [labels[t] for t in mine]
        taught = share(sum(label != IGNORE_INDEX for label in targets), len(part))
        heading = (
            f"{RULE * 2} {document + 1} {RULE} {printable(source)} {RULE} {len(part)} tokens, {taught} supervised "
        )
        print(printable(heading) + RULE * max(2, 100 - len(heading)))
        print(paint(spans(part, targets, tokenizer)))


def spans(tokens: list[int], labels: list[int], tokenizer: Tokenizer) -> list[Span]:
    """What a document holds, in order; a character whose bytes are several tokens is one, marked as its last token."""
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    # A position's label is what it predicts: a token is learnt if the position before it has it as label.
    items: list[tuple[int, bool, str]] = []
    for token, label in zip([*tokens, None], [IGNORE_INDEX, *labels], strict=True):
        if label not in (IGNORE_INDEX, token):
            items.append((label, True, "→"))
        if token is not None:
            items.append((token, label == token, ""))
    found: list[Span] = []
    pending: list[int] = []
    before: list[int] = []  # what stands in front, lest a space between words be taken for one at the beginning
    for (token, learnt, arrow), following in zip(items, [*items[1:], None], strict=True):
        if token in special or arrow:
            name = name_of(tokenizer)(token) if token in special else tokenizer.decode([token])
            found.append((arrow + name, True, learnt))
            before = []
            continue
        pending.append(token)
        text = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
        if text.endswith("\ufffd") and following and following[0] not in special and not following[2]:
            continue
        if found and found[-1][1:] == (False, learnt):
            text = found.pop()[0] + text
        found.append((text, False, learnt))
        before, pending = pending, []
    return found


def in_color(spans: list[Span]) -> str:
    text = ""
    for seen, special, learnt in spans:
        color = COLORS[special, learnt]
        # A colour ends with its line, so that pagers keep it right.
        text += color + visible(seen).replace("\n", f"{RESET}\n{color}") + RESET
    return text


def in_marks(spans: list[Span]) -> str:
    """Without colours: « and » around what carries loss, ⟦ and ⟧ around special tokens."""
    text = ""
    for learnt, group in itertools.groupby(spans, key=lambda span: span[2]):
        seen = "".join(f"⟦{visible(name)}⟧" if special else visible(name) for name, special, _ in group)
        text += f"«{seen}»" if learnt else seen
    return text


def visible(text: str) -> str:
    """`text` with its line breaks shown and made, and other control characters, as of terminals, only shown."""
    shown = "".join(chr(0x2400 + ord(char)) if char < " " and char not in "\n\t" else char for char in text)
    return printable(shown).replace("\n", "↵\n")


def name_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    return lambda token: tokenizer.backend.id_to_token(token) or f"<{token}>"


if __name__ == "__main__":
    run_recipe(main, Config)
