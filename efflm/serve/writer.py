"""What a model writes for a request of OpenAI's API, and the JSON objects that tell it."""

import dataclasses
import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from efflm import ops
from efflm.config import require
from efflm.infer import streaming
from efflm.infer.generate import padded
from efflm.infer.logprobs import log_probabilities
from efflm.model import LanguageModel
from efflm.serve.requests import Request
from efflm.text.chat import prompt_ids
from efflm.text.tokenizer import Tokenizer

LEAST = -9999.0  # in place of minus infinity, which JSON does not have


class Part(NamedTuple):
    """A part of the answer to prompt `index`. read, written: tokens. end: of the last part, "stop" or "length"."""

    index: int
    text: str
    read: int = 0
    written: int = 0
    end: str | None = None
    logprobs: dict[str, list] | None = None


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model as it is served. name: what requests call it. limit: tokens that it writes for one request at most."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    draft: LanguageModel | None
    ahead: int
    limit: int

    def write(self, request: Request) -> Iterator[Part]:
        """Parts as they are written, prompt after prompt; the first of each says what was read, and is the prompt if it
        is to be echoed. Raises InputError, when called and not at the first part."""
        if request.messages:
            all_ids = [self.tokenizer.encode(self.tokenizer.chat(list(request.messages)))]
        else:
            of = lambda prompt: prompt_ids(self.tokenizer, prompt, self.model.about)
            all_ids = [of(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        count = request.max_tokens
        if count is None:
            longest = min(each.config.max_length for each in (self.model, self.draft) if each)
            count = max(1, min(self.limit, longest - len(all_ids[0])))
        require(
            count * len(all_ids) <= self.limit,
            f"max_tokens is {count}, but this server writes at most {self.limit} tokens for a request, all prompts "
            "together",
        )
        padded(all_ids, self.model.config, count)  # checks them
        how = {"stops": request.stops, "seed": request.seed, "draft": self.draft, "ahead": self.ahead}
        pieces = lambda ids: streaming.pieces(self.model, self.tokenizer, ids, count, request.sampling, **how)
        begun = [pieces(ids) if count else iter([streaming.Piece("", [], "length")]) for ids in all_ids]

        def parts() -> Iterator[Part]:
            for index, (ids, pieces) in enumerate(zip(all_ids, begun, strict=True)):
                prompt, new = request.prompts[index] if request.echo else "", []
                shown = prompt if isinstance(prompt, str) else self.tokenizer.stream()(prompt, final=True)
                yield Part(index, shown, read=len(ids))
                for piece in pieces:
                    new += piece.ids
                    logprobs = self._logprobs(request, ids, new) if piece.end else None
                    yield Part(index, piece.text, 0, len(piece.ids), piece.end or None, logprobs)

        return parts()

    def _logprobs(self, request: Request, ids: list[int], new: list[int]) -> dict[str, list] | None:
        """OpenAI's lists, one entry a token: of the prompt too if it is echoed, where the first token has none."""
        if request.logprobs is None:
            return None
        number = lambda value: max(float(value), LEAST)
        first, names = 0 if request.echo else len(ids), [self._text(token) for token in (*ids, *new)]
        found = log_probabilities(ops.prepared(self.model, jax.default_backend()), [*ids, *new])
        tops = []
        for name, value, top_ids, top in zip(names[1:], found.tokens, found.top_ids, found.top, strict=True):
            likeliest = [*zip(map(self._text, top_ids[: request.logprobs]), top), (name, value)]
            tops.append({name: number(value) for name, value in reversed(likeliest)})  # of one text the likelier token
        return {
            "tokens": names[first:],
            "token_logprobs": [None, *map(number, found.tokens)][first:],
            "top_logprobs": [None, *tops][first:],
            "text_offset": [0, *itertools.accumulate(map(len, names[first:]))][:-1],
        }

    def _text(self, token: int) -> str:
        """What the token writes, or its name where that is nothing or a part of a character."""
        text = self.tokenizer.stream()([token], final=True)
        return text if text and "\ufffd" not in text else self.tokenizer.core.id_to_token(int(token)) or f"<{token}>"


class Answer:
    """The objects that answer one request."""

    def __init__(self, request: Request, name: str):
        self.chat, self.usage = bool(request.messages), {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        kind, short = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.common = {"id": f"{short}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

    def _count(self, part: Part) -> None:
        for name, tokens in zip(self.usage, (part.read, part.written, part.read + part.written), strict=True):
            self.usage[name] += tokens

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        choices = []
        for index, group in itertools.groupby(parts, lambda part: part.index):
            of_one = list(group)
            text, last = "".join(part.text for part in of_one), of_one[-1]
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": last.logprobs, "finish_reason": last.end})
        for part in parts:
            self._count(part)
        return {**self.common, "choices": choices, "usage": self.usage}

    def chunk(self, part: Part | None) -> dict[str, Any]:
        """An object of a stream; without a part the last one, which tells the usage."""
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        if part is None:
            return {**self.common, **kind, "choices": [], "usage": self.usage}
        self._count(part)
        said = {"role": "assistant", "content": ""} if part.read else {"content": part.text} if part.text else {}
        choice = {"index": part.index, **({"delta": said} if self.chat else {"text": part.text}), "logprobs": None}
        return {**self.common, **kind, "choices": [choice | {"finish_reason": part.end}]}
