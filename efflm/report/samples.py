"""What models write, greedily, side by side: where each first differs from the first model."""

import dataclasses
from typing import Any

from efflm.evaluate import throughput
from efflm.evaluate.throughput import Protocol
from efflm.infer.generate import generate
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sample:
    """A continuation of `prompt`: what it has in common with the first model's, the first token that differs ("" if
    none does), and the rest."""

    prompt: str
    common: str
    differs: str = ""
    rest: str = ""


def write(
    model: LanguageModel, tokenizer: Any, prompt: list[int], tokens: int, protocol: Protocol | None = None
) -> list[int]:
    """The ids of a greedy continuation, as many as the model's length allows.

    protocol: of the rounds in which this model's speed was measured, whose programs are used where the prompt and the
    continuation fit into them.
    """
    tokens = min(tokens, model.config.max_length - len(prompt))
    if protocol and len(prompt) <= protocol.start and 0 < tokens <= protocol.new:
        ids = throughput.continued(model, prompt, protocol)[:tokens]
        return ids[: next((i for i, token in enumerate(ids) if token in tokenizer.stops), tokens)]
    return generate(model, [prompt], tokens, stops=tokenizer.stops)[0] if tokens > 0 else []


def text(ids: list[int], tokenizer: Any) -> str:
    """What the ids are as a continuation: a space that they begin with is part of it."""
    return tokenizer.stream()(ids, final=True)


def compare(prompt: str, ids: list[int], first: list[int], tokenizer: Any) -> Sample:
    """The sample of `ids`, against those of the first model."""
    same, decode = _same(ids, first), tokenizer.stream()
    common, differs, rest = decode(ids[:same]), "", iter(ids[same:])
    for token in rest:
        differs += decode([token])
        if differs:  # of a character of several tokens the last one shows it
            break
    return Sample(prompt, common, differs, decode(rest, final=True))


def agreement(ids: list[int], first: list[int], name: str) -> str:
    """How long both write the same, in words."""
    same = _same(ids, first)
    if same == len(first) == len(ids):
        return f"All {same} tokens are those of {name}."
    return f"The first {same} tokens are those of {name}; marked is the first that differs."


def _same(ids: list[int], first: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(ids, first)) if a != b), min(len(ids), len(first)))
