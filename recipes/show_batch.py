"""Print packed rows of your data, with every token marked by whether it carries loss: look before you train.

    python recipes/show_batch.py --model runs/demo/base --instructions runs/demo/corpus/train/generalist
    python recipes/show_batch.py --model runs/demo/base --text runs/demo/corpus/train/text \\
        --preferences runs/demo/corpus/train/preferences --rows 1 --row_length 1024

Rows are made as the training recipes make them: instructions as in full_finetune.py and expert_finetune.py, text as in
continued_pretrain.py (without its mixing), preferences as in dfpo.py (but the prompt before each answer). Of the model
only the tokenizer's files are read.
"""

from dataclasses import dataclass, field, replace
from itertools import groupby

from pedgpt.data import (
    ChatSettings,
    Example,
    ReadSummary,
    Tokenizer,
    encode_conversations,
    encode_document,
    encode_pairs,
    load_tokenizer,
    pack,
    parse_columns,
    read_conversations,
    read_documents,
    read_preferences,
)
from pedgpt.data.chat import IGNORE_INDEX
from pedgpt.training import run_recipe

LEGEND = "«…» carries loss, ⟦…⟧ special token, ⟦→…⟧ to be predicted but not in the input, ↵ line break"


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


def main(config: Config) -> None:
    if not (config.instructions or config.text or config.preferences):
        raise ValueError("nothing to show; give --instructions, --text or --preferences")
    if config.rows < 1 or config.row_length < 1:
        raise ValueError(f"rows and row_length must be at least 1, found {config.rows} and {config.row_length}")
    tokenizer, length, summary = load_tokenizer(config.model), config.row_length, ReadSummary()
    policy = {"on_bad_row": config.on_bad_row, "summary": summary}
    read = {"columns": parse_columns(config.columns), **policy}
    # A row that is too long would stop a training run; here it is only counted.
    fit = {**policy, "on_long_row": "skip" if config.on_long_row == "error" else config.on_long_row}

    shown: dict[str, list[list[Example]]] = {}  # rows by kind
    if config.instructions or config.preferences:
        chat = config.format(tokenizer)
        ends = " or ".join(tokenizer.backend.id_to_token(token) for token in chat.stop_tokens)
        print(f"chat format {chat.template.file.name}; an answer ends at {ends}\n")
    if config.instructions:
        conversations = read_conversations(config.instructions, **read)
        shown["instructions"] = pack(encode_conversations(conversations, chat, length, **fit), length)
    if config.text:
        around = {"eos_id": tokenizer.eos_id, "prefix": tokenizer.document_prefix, "row_length": length}
        texts = read_documents(config.text, **read)
        pieces = [encode_document(tokenizer.encode(row.text), source=row.source, **around) for row in texts]
        shown["text"] = pack([one for examples in pieces for one in examples], length)
    if config.preferences:
        pairs = encode_pairs(read_preferences(config.preferences, **read), chat, length, **fit)
        shown["preferences"] = [
            [
                replace(one, source=f"{one.source} {name}")
                for name, one in zip(("chosen", "rejected"), both, strict=True)
            ]
            for both in ((pair.chosen, pair.rejected) for pair in pairs)
        ]

    print(f"{summary.describe()}\n\n{LEGEND}")
    for kind, rows in shown.items():
        total = sum(len(one.tokens) for row in rows for one in row)
        used = f"{len(rows):,} rows of {length} tokens, {total / max(1, len(rows) * length):.1%} used"
        used = f"{len(rows):,} pairs" if kind == "preferences" else used
        print(f"\n{kind}: {sum(map(len, rows)):,} documents in {used}; {counts([one for row in rows for one in row])}")
        wanted = min(len(rows), config.rows)
        for number in (i * len(rows) // wanted for i in range(wanted)):  # the longest documents stand in the first rows
            row = rows[number]
            print(f"\nrow {number + 1}: {counts(row)}, {len(row)} document{'s' * (len(row) != 1)}")
            for place, one in enumerate(row, 1):
                print(f"── {place} ─ {one.source} ─ {counts([one])} ".ljust(100, "─"))
                print(marked(one, tokenizer))


def counts(examples: list[Example]) -> str:
    tokens, taught = sum(len(one.tokens) for one in examples), sum(one.supervised for one in examples)
    return f"{tokens:,} tokens, {taught:,} ({taught / max(1, tokens):.1%}) supervised"


def marked(example: Example, tokenizer: Tokenizer) -> str:
    """A document's text with marks; a character whose bytes are several tokens is one, marked as its last token."""
    special = set(tokenizer.special.values())
    # A position's label is what it predicts: a token is learnt if the position before it has it as label.
    items: list[tuple[int, bool, str]] = []
    for token, label in zip([*example.tokens, None], [IGNORE_INDEX, *example.labels], strict=True):
        if label not in (IGNORE_INDEX, token):
            items.append((label, True, "→"))
        if token is not None:
            items.append((token, label == token, ""))
    found: list[tuple[bool, str]] = []
    pending: list[int] = []
    before: list[int] = []  # what stands in front, lest a space between words be taken for one at the beginning
    for (token, learnt, arrow), following in zip(items, [*items[1:], None], strict=True):
        if token in special or arrow:
            name = tokenizer.backend.id_to_token(token) if token in special else tokenizer.decode([token])
            found.append((learnt, f"⟦{arrow}{visible(name)}⟧"))
            before = []
            continue
        pending.append(token)
        text = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
        if text.endswith("\ufffd") and following and following[0] not in special and not following[2]:
            continue
        found.append((learnt, visible(text)))
        before, pending = pending, []
    runs = [(learnt, "".join(text for _, text in run)) for learnt, run in groupby(found, key=lambda item: item[0])]
    return "".join(f"«{text}»" if learnt else text for learnt, text in runs)


def visible(text: str) -> str:
    """`text` with its line breaks shown and made, and control characters, as of terminals, only shown."""
    shown = "".join(chr(0x2400 + ord(char)) if char < " " and char not in "\n\t" else char for char in text)
    return shown.replace("\n", "↵\n")


if __name__ == "__main__":
    run_recipe(main, Config)
