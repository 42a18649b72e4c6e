"""Stage 1's mixture: running text, and instructions rewritten as running text (hybrid instruction pre-training).

Pre-training on raw medical text alone lets a model drift from the form in which it will be asked. Here a conversation
becomes a plain completion without chat role tokens, in several surface forms, and every token carries loss.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pedgpt.data.records import Conversation

# Question and answer as one running text. Forms differ so that the knowledge is tied to none of them.
SURFACE_FORMS = (
    "{question}\n{answer}",
    "问：{question}\n答：{answer}",
    "问题：{question}\n解答：{answer}",
    "有人问：{question}\n回答是：{answer}",
    "{question}{answer}",
)


def as_completion(conversation: Conversation, form: int) -> str:
    """A conversation as running text in surface form `form` (modulo their number); a system text is left out."""
    template = SURFACE_FORMS[form % len(SURFACE_FORMS)]
    turns = [message for message in conversation.messages if message.role != "system"]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return "\n".join(template.format(question=question.content, answer=answer.content) for question, answer in pairs)


@dataclass(frozen=True)
class Mixture:
    """Which text, in which order, and how many tokens of each source went in."""

    texts: list[list[int]]
    sources: list[str]
    tokens: dict[str, int]
    epochs: dict[str, float]

    def describe(self) -> str:
        """One line a source: tokens, share, and how often its text was repeated."""
        total = sum(self.tokens.values())
        return "\n".join(
            f"  {name:<14}{count:>10,} tokens {count / total:>6.1%}  {self.epochs[name]:.2f} epochs"
            for name, count in self.tokens.items()
        )


def mix(
    sources: Mapping[str, Sequence[Sequence[int]]], shares: Mapping[str, float], *, total_tokens: int, seed: int
) -> Mixture:
    """Draw whole tokenised texts until each source has its share of `total_tokens`, then shuffle them.

    A source is read in a shuffled order, again and again if its share asks for more than it holds. Deterministic in
    `seed`. Raises ValueError if a source with a share is empty, or the shares are negative or sum to nothing.
    """
    weight = sum(shares.values())
    if weight <= 0 or min(shares.values()) < 0:
        raise ValueError(f"the shares of the mixture must not be negative and must not all be 0, found {dict(shares)}")
    drawn: list[tuple[str, list[int]]] = []
    tokens: dict[str, int] = {}
    epochs: dict[str, float] = {}
    for name, share in shares.items():
        if share == 0:
            continue
        texts = [list(text) for text in sources[name] if text]
        if not texts:
            raise ValueError(f"the mixture gives {name!r} a share of {share / weight:.0%}, but it holds no text")
        generator = random.Random(f"{seed}/{name}")
        budget, count, used = round(total_tokens * share / weight), 0, 0
        order: list[int] = []
        while count < budget:
            if not order:
                order = list(range(len(texts)))
                generator.shuffle(order)
            text = texts[order.pop()]
            drawn.append((name, text))
            count += len(text)
            used += 1
        tokens[name], epochs[name] = count, used / len(texts)
    random.Random(f"{seed}/order").shuffle(drawn)
    return Mixture([text for _, text in drawn], [name for name, _ in drawn], tokens, epochs)
