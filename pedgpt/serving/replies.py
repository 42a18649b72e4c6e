"""What a client gets, in the form of OpenAI's API, from the pieces that the scheduler delivers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from pedgpt.serving.api import Served
from pedgpt.serving.scheduler import Piece, Request

_OPEN, _CLOSE = "<think>", "</think>"


class Reply:
    """One response with one choice a request; `add` returns the chunks of a stream and keeps what makes a whole."""

    def __init__(self, chat: bool, fields: Mapping[str, Any], served: Served, requests: list[Request]) -> None:
        self.chat, self.fields, self.served, self.requests = chat, fields, served, requests
        self.texts = [""] * len(requests)
        self.sent = [("", "")] * len(requests)  # reasoning and content
        self.logprobs: list[list[dict[str, Any]]] = [[] for _ in requests]
        self.ends: list[str | None] = [None] * len(requests)
        kind = ("chat.completion" if chat else "text_completion") + ".chunk" * (chat and fields["stream"])
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, "object": kind, "created": int(time.time()),
            "model": fields["model"], "system_fingerprint": served.fingerprint,
        }  # fmt: skip

    def opening(self) -> list[dict[str, Any]]:
        roles = [self._choice(i, delta={"role": "assistant", "content": ""}) for i in range(len(self.requests))]
        return [self._chunk(choice) for choice in roles if self.chat]

    def add(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """Take one token in; the chunks that tell of it."""
        self.texts[number] += piece.text
        self.ends[number] = piece.finish
        before, now = self.sent[number], self._divided(number)
        self.sent[number] = now
        new = [text[len(old) :] for text, old in zip(now, before, strict=True)]
        told = self._told(piece) if self.requests[number].top_logprobs is not None else None
        if told:
            self.logprobs[number].append(told)
        if not self.fields["stream"] or not (any(new) or told or piece.finish):
            return []
        if not self.chat:
            logprobs = _legacy([told]) if told else None
            return [self._chunk(self._choice(number, text=new[1], logprobs=logprobs, finish_reason=piece.finish))]
        delta = {name: text for name, text in zip(("reasoning_content", "content"), new, strict=True) if text}
        logprobs = {"content": [told], "refusal": None} if told else None
        return [self._chunk(self._choice(number, delta=delta, logprobs=logprobs, finish_reason=piece.finish))]

    def closing(self) -> list[dict[str, Any]]:
        if not (self.fields["stream_options"] or {}).get("include_usage"):
            return []
        return [{**self.head, "choices": [], "usage": self._usage()}]

    def whole(self) -> dict[str, Any]:
        """The response of a request without `stream`."""
        choices = []
        for number in range(len(self.requests)):
            (reasoning, content), end = self._divided(number), {"finish_reason": self.ends[number]}
            told = self.logprobs[number] if self.requests[number].top_logprobs is not None else None
            if self.chat:
                message = {"role": "assistant", "content": content, "refusal": None}
                message |= {"reasoning_content": reasoning} if reasoning else {}
                logprobs = None if told is None else {"content": told, "refusal": None}
                choices.append(self._choice(number, message=message, logprobs=logprobs, **end))
            else:
                prompt = self.served.chat.tokenizer.decode(self.requests[number].prompt) if self.fields["echo"] else ""
                logprobs = None if told is None else _legacy(told)
                choices.append(self._choice(number, text=prompt + content, logprobs=logprobs, **end))
        return {**self.head, "choices": choices, "usage": self._usage()}

    def _divided(self, number: int) -> tuple[str, str]:
        """(reasoning, content) as far as they are certain: what may begin a tag is held back until the end."""
        text = self.texts[number]
        if not self.chat:
            return "", text
        opens, begun = self.served.chat.opens_thought, text.lstrip()
        if not opens and not begun.startswith(_OPEN):
            return "", "" if _OPEN.startswith(begun) and self.ends[number] is None else text
        thought, closed, answer = begun.removeprefix(_OPEN).partition(_CLOSE)
        if not closed and self.ends[number] is None:
            held = max((n for n in range(1, len(_CLOSE)) if thought.endswith(_CLOSE[:n])), default=0)
            thought = thought[: len(thought) - held]
        return thought.lstrip("\n"), answer.lstrip("\n")

    def _told(self, piece: Piece) -> dict[str, Any]:
        """A token's log-probability and those of the most probable ones."""
        name = self.served.chat.tokenizer.decode

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = name([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        assert piece.token is not None
        top = [one(token, logprob) for token, logprob in piece.top]
        return one(piece.token, piece.logprob) | {"top_logprobs": top}

    def _usage(self) -> dict[str, Any]:
        prompt, answers = len(self.requests[0].prompt), sum(len(request.answer) for request in self.requests)
        details = {"cached_tokens": self.requests[0].cached}
        counts = {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}
        return {**counts, "prompt_tokens_details": details}

    def _choice(self, number: int, **content: Any) -> dict[str, Any]:
        return {"index": number, "logprobs": None, "finish_reason": None, **content}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [choice]}


def _legacy(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities as /v1/completions gives them."""
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in told],
        "text_offset": [],
    }
