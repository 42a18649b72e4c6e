"""Stage 1's mixture: running text, and instructions rewritten as running text (hybrid instruction pre-training).

Pre-training on raw medical text alone lets a model drift from the form in which it will be asked. Here a conversation
becomes a plain completion without chat role tokens, in several surface forms, and every token carries loss.

The data never lies in memory: `stage_sources` says which files there are, `write_tokens` turns them into ids on disk
(a `TokenStore`), `mix` draws documents by their lengths, and `PackedRows` makes the rows that a step asks for.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pedgpt.data.manifest import DOMAIN, GENERAL, INSTRUCTIONS, TextSource
from pedgpt.data.records import Conversation

Numbers = NDArray[np.int64]

# Question and answer as one running text. Forms differ so that the knowledge is tied to none of them.
SURFACE_FORMS = (
    "{question}\n{answer}",
    "问：{question}\n答：{answer}",
    "问题：{question}\n解答：{answer}",
    "有人问：{question}\n回答是：{answer}",
    "{question}{answer}",
    "关于“{question}”，解答如下：\n{answer}",
    "【提问】{question}\n【回复】{answer}",
)


def as_completion(conversation: Conversation, form: int) -> str:
    """A conversation as running text in surface form `form` (modulo their number); no system text, no reasoning."""
    template = SURFACE_FORMS[form % len(SURFACE_FORMS)]
    turns = [message for message in conversation.messages if message.role != "system"]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return "\n".join(template.format(question=question.content, answer=answer.content) for question, answer in pairs)


@dataclass(frozen=True)
class Mixture:
    """Which documents, in which order, and how much of each source, named by (part, source), went in."""

    order: Numbers  # numbers of documents, over all sources end to end
    tokens: dict[tuple[str, str], int]
    epochs: dict[tuple[str, str], float]

    def describe(self) -> str:
        """One line a source: tokens, share, how often its text was read, and its part."""
        total = max(1, sum(self.tokens.values()))
        width = max(len(name) for _, name in self.tokens)
        return "\n".join(
            f"  {name:<{width}}{n:>14,} tokens {n / total:>6.1%}  {self.epochs[part, name]:.2f} epochs of {part}"
            for (part, name), n in self.tokens.items()
        )


def part_shares(instruction_share: float, domain_to_general: float, parts: Collection[str]) -> dict[str, float]:
    """The share of each part: of the text, `domain_to_general` tokens to one, if `parts` has any general text."""
    text = 1 - instruction_share
    general = text / (1 + domain_to_general) if GENERAL in parts else 0.0
    return {DOMAIN: text - general, GENERAL: general, INSTRUCTIONS: instruction_share}


def mix(
    sources: Sequence[TextSource], sizes: Sequence[Numbers], shares: dict[str, float], *, total_tokens: int, seed: int
) -> Mixture:
    """Draw whole documents, given by their lengths, until each part has its share of `total_tokens`; shuffle them.

    `total_tokens` 0 reads the first part with a share once: each of its sources `weight` times, or `epochs`. Inside a
    part, sources with `epochs` are read that often, and the rest goes to the others in proportion to weight x tokens,
    each within one document. A source is read in a shuffled order, again and again if need be. The draw depends on
    lengths, settings and `seed` alone: permutations sort the raw output of PCG64, which numpy keeps across versions.

    Raises ValueError if a part with a share holds no text, or the fixed epochs of a part do not fit its share.
    """
    total_share = sum(shares.values())
    held = [int(size.sum()) for size in sizes]
    members = {part: [i for i, s in enumerate(sources) if s.part == part] for part in shares if shares[part] > 0}
    wanted = {part: sum(held[i] * (sources[i].epochs or sources[i].weight) for i in members[part]) for part in members}
    for part, tokens_once in wanted.items():
        if not tokens_once:
            given = f"the mixture gives {part!r} a share of {shares[part] / total_share:.0%}"
            raise ValueError(f"{given}, but it holds no text, or all weights in it are 0")
    if not total_tokens:
        part, tokens_once = next(iter(wanted.items()))
        total_tokens = round(round(tokens_once) * total_share / shares[part])

    first = np.cumsum([0, *map(len, sizes)])
    drawn: list[Numbers] = []
    tokens: dict[tuple[str, str], int] = {}
    epochs: dict[tuple[str, str], float] = {}
    for part, inside in members.items():
        budget = round(total_tokens * shares[part] / total_share)
        fixed = {i: round(sources[i].epochs * held[i]) for i in inside if sources[i].epochs}
        weights = {i: sources[i].weight * held[i] for i in inside if i not in fixed}
        rest, slack = budget - sum(fixed.values()), len(inside)  # each is rounded
        if rest < -slack or (rest > max(slack, budget // 100) and not any(weights.values())):
            asked = ", ".join(f"{sources[i].name} {sources[i].epochs:g} x {held[i]:,}" for i in fixed)
            raise ValueError(
                f"the mixture gives {part!r} {budget:,} of {total_tokens:,} tokens, but the fixed epochs of its "
                f"sources take {sum(fixed.values()):,} ({asked}); change one of these, or give a source a weight"
            )
        scale = max(0, rest) / (sum(weights.values()) or 1)
        for i in inside:
            key = (part, sources[i].name)
            picked = _draw(sizes[i], fixed[i] if i in fixed else round(weights[i] * scale), (seed, *key))
            drawn.append(first[i] + picked)
            tokens[key] = int(sizes[i][picked].sum())
            epochs[key] = tokens[key] / max(1, held[i])
    order = np.concatenate(drawn)
    return Mixture(order[_shuffled(len(order), (seed, "order"))], tokens, epochs)


def _draw(sizes: Numbers, budget: int, key: tuple[int | str, ...]) -> Numbers:
    """The fewest documents that reach `budget` tokens, read in a new shuffled order each time all were read."""
    usable = np.flatnonzero(sizes)
    held = int(sizes.sum())
    whole, rest = divmod(budget, held) if held else (0, 0)
    picked = [usable[_shuffled(len(usable), (*key, epoch))] for epoch in range(whole + (rest > 0))]
    if rest:
        reached = np.cumsum(sizes[picked[-1]])
        picked[-1] = picked[-1][: int(np.searchsorted(reached, rest)) + 1]
    return np.concatenate(picked) if picked else np.empty(0, np.int64)


def _shuffled(count: int, key: tuple[int | str, ...]) -> Numbers:
    """A permutation of `count` numbers that depends on `key` alone."""
    entropy = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest())
    return np.argsort(np.random.PCG64(entropy).random_raw(count), kind="stable")
