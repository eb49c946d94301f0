"""The arguments of the functions in efflm.api, checked: what is wrong is named with its value and the remedy."""

import os
from collections.abc import Mapping
from typing import Any

from efflm.compress import grammar
from efflm.compress.step import Step
from efflm.config import at_home, require
from efflm.data import corpora, enwik8
from efflm.model import LanguageModel
from efflm.text.tokenizer import Tokenizer

SOURCE = str | os.PathLike
TEXT = f"a file or folder of UTF-8 text, {corpora.DEFAULT!r} or {enwik8.NAME!r}"


def shown(value: Any) -> str:
    """A value in an error: models and long texts by their kind alone."""
    words = repr(value) if isinstance(value, str | int | float | os.PathLike | None) else type(value).__name__
    return f"{words[:60]}..." if len(words) > 63 else words


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(os.fspath(value))


def require_model(model: Any) -> None:
    require(
        isinstance(model, LanguageModel),
        f"model is {shown(model)}, but must be a model, as in model, tokenizer = efflm.load(...)",
    )


def require_tokenizer(tokenizer: Any, model: LanguageModel, why: str) -> None:
    given = "there is none" if tokenizer is None else f"tokenizer is {shown(tokenizer)}"
    require(
        isinstance(tokenizer, Tokenizer),
        f"{why} the tokenizer that efflm.load returned with the model, but {given}: give tokenizer=tokenizer",
    )
    require(
        tokenizer.vocabulary <= model.config.vocabulary,
        f"the tokenizer has {tokenizer.vocabulary} entries, but the model a vocabulary of {model.config.vocabulary}: "
        "give the tokenizer that was loaded with this model",
    )


def named(models: Any) -> dict[str, LanguageModel]:
    """The models by name."""
    if isinstance(models, LanguageModel):
        return {"model": models}
    require(
        isinstance(models, Mapping) and len(models) > 0 and all(isinstance(name, str) for name in models),
        f"models is {shown(models)}, but must be one model, or several by name, as in "
        '{"before": model, "after": small}',
    )
    for model in models.values():
        require_model(model)
    return dict(models)


def chain(given: Any) -> tuple[str, tuple[Step, ...]]:
    """The steps, and what they are called together."""
    parts = list(given) if isinstance(given, list | tuple) else [given]
    choices = "give a chain such as 'gptq@3,distill@0.5', or steps such as Depth(layers=2)"
    names, steps = [], []
    for part in parts:
        if isinstance(part, str):
            name, own = grammar.only(part)
        else:
            require(not isinstance(part, type), f"steps holds the class {getattr(part, '__name__', '')}: call it first")
            require(callable(part), f"steps is {shown(part)}: {choices}")
            name, own = grammar.write([part]), (part,)
        names.append(name)
        steps += own
    require(bool(steps), f"there is no step: {choices}")
    return grammar.file_name(",".join(names)), tuple(steps)


def text_of(text: Any) -> str:
    require(is_path(text), f"text is {shown(text)}, but must be {TEXT}")
    return at_home(os.fspath(text))
