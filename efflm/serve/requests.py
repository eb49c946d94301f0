"""Requests of OpenAI's API, checked before a model sees them: the bodies of /v1/completions and /v1/chat/completions.

A field that would change the text and is not supported is refused; null is as if the field was left out.
"""

import dataclasses
import functools
import json
import secrets
from typing import Any

from efflm.config import InputError, require, require_seed
from efflm.infer.logprobs import TOP
from efflm.infer.sampling import Sampling

PROMPTS, STOPS = 128, 16  # in one request at most
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {  # values that ask for nothing
    "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "suffix": "", "tools": [],
    "top_logprobs": 0, "response_format": {"type": "text"},
}  # fmt: skip
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """prompts: texts or token ids, to be continued each; or messages: a conversation to be answered. max_tokens: None
    for as many as there is room for. usage: tell it at the end of a stream too. logprobs: how many of the likeliest
    tokens to give, None for no probabilities. Raises InputError."""

    prompts: tuple[str | list[int], ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    model: str | None
    max_tokens: int | None
    sampling: Sampling
    seed: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    echo: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        least, wanted = 0 if self.echo else 1, self.logprobs
        require(
            self.max_tokens is None or self.max_tokens >= least,
            f"max_tokens is {self.max_tokens}, but must be at least {least}",
        )
        require(wanted is None or 0 <= wanted <= TOP, f"logprobs is {wanted}, but must be from 0 to {TOP}")
        require(wanted is None or not self.stream, "logprobs cannot be streamed: leave out one of the two")
        require_seed(self.seed)


def parse(body: bytes, chat: bool) -> Request:
    """Raises InputError."""
    fields = _object(body)
    take = functools.partial(_take, fields)
    sampling = Sampling(
        temperature=take("temperature", float, 1.0),
        top_p=take("top_p", float, 1.0),
        top_k=take("top_k", int, 0),
        min_p=take("min_p", float, 0.0),
    )
    stop = fields.pop("stop", None) or []
    common = {
        "model": take("model", str, None),
        "sampling": sampling,
        "seed": take("seed", int, secrets.randbits(32)),
        "stops": _texts("stop", [stop] if isinstance(stop, str) else stop, STOPS, str),
        "stream": take("stream", bool, False),
        "usage": take("stream_options", dict, {}).get("include_usage") is True,
    }
    if chat:
        count = take("max_completion_tokens", int, take("max_tokens", int, None))
        require(not take("logprobs", bool, False), "logprobs is not supported in a chat: leave it out")
        request = Request(**common, messages=_messages(fields.pop("messages", None)), max_tokens=count)
    else:
        prompt, count = fields.pop("prompt", None), take("max_tokens", int, 16)  # OpenAI's default
        several = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
        prompts = _texts("prompt", several, PROMPTS, str, list)
        require(
            bool(prompts) and all(isinstance(each, str) or _is_ids(each) for each in prompts),
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists",
        )
        more = {"echo": take("echo", bool, False), "logprobs": take("logprobs", int, None)}
        request = Request(**common, **more, prompts=prompts, max_tokens=count)
    for name, value in fields.items():
        known = name in IGNORED or value is None or (name in NEUTRAL and value == NEUTRAL[name])
        require(known, f"{name:.60} is {value!r:.60}, which is not supported: leave it out")
    return request


def _object(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        found = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error!s:.100}") from None
    require(isinstance(found, dict), "the body must be a JSON object")
    return found


def _take(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """The value of a field, which is then no longer among them. True is no number here, as it is in Python."""
    value = fields.pop(name, None)
    right = type(value) is kind or (kind is float and type(value) is int)
    require(value is None or right, f"{name} is {value!r:.60}, but must be {KINDS[kind]}")
    return default if value is None else value


def _texts(name: str, given: Any, most: int, *kinds: type) -> tuple[Any, ...]:
    require(
        isinstance(given, list) and all(type(each) in kinds for each in given), f"{name} must be text or a list of it"
    )
    require(len(given) <= most, f"{name} has {len(given)} entries, but may have {most}")
    return tuple(given)


def _is_ids(value: Any) -> bool:
    """Whether it is a list of at least one token id, as far as that can be told without a model."""
    return bool(value) and isinstance(value, list) and all(type(id) is int and 0 <= id < 1 << 31 for id in value)


def _messages(given: Any) -> tuple[dict[str, str], ...]:
    require(isinstance(given, list) and bool(given), "messages must be a list of at least one message")
    return tuple(_message(each, f"messages[{i}]") for i, each in enumerate(given))


def _message(given: Any, where: str) -> dict[str, str]:
    require(isinstance(given, dict), f"{where} must be an object with role and content")
    found = {name: value for name, value in given.items() if value is not None}
    content = found.get("content")
    if isinstance(content, list):  # text in parts
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        found["content"] = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    for name in {"role": 0, "content": 0} | found:
        require(name in ("role", "content"), f"{where}.{name:.60} is not supported: leave it out")
        require(isinstance(found.get(name), str), f"{where}.{name} must be text")
    return found
