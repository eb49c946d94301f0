"""A tokenizer beside a model whose vocabulary has another size: padded with ids that no token has, or too small for
tokens that were added later."""

import dataclasses
import itertools
import json
import sys
from typing import Any

from efflm.config import InputError, require
from efflm.text import tokenizer as tokenizers
from efflm.text.tokenizer import Tokenizer


def to_vocabulary(tokens: Tokenizer, vocabulary: int, where: Any) -> Tokenizer:
    """The tokenizer for a model of `vocabulary` entries: tokens that were added to it beyond these are read as plain
    text, with a warning on stderr where one is. where: the model, for errors.

    Raises InputError if other tokens lie beyond them too: then it is another model's.
    """
    ids = tokens.core.get_vocab()
    beyond = {index for index in ids.values() if index >= vocabulary}
    if not beyond:
        return dataclasses.replace(tokens, limit=None, reader=None)
    added = set(tokens.core.get_added_tokens_decoder())
    require(
        beyond <= added and any(index < vocabulary for index in ids.values()),
        f"{where}: the tokenizer has {max(beyond) + 1} tokens, more than the model's {vocabulary}, and they were not "
        "just added to it: give the tokenizer that belongs to the model",
    )
    described = json.loads(tokens.core.to_str())
    described["added_tokens"] = [each for each in described["added_tokens"] if each["id"] < vocabulary]
    if isinstance(described["model"].get("vocab"), dict):
        own = described["model"]["vocab"].items()
        described["model"]["vocab"] = {token: index for token, index in own if index < vocabulary}
    try:
        reader = tokenizers.from_description(described, where)
    except InputError:
        raise InputError(
            f"{where}: the tokenizer has {max(beyond) + 1} tokens, more than the model's {vocabulary}, and cannot do "
            "without them: give the tokenizer that belongs to the model"
        ) from None
    for name in ("bos_token", "eos_token"):
        if name in tokens.names and ids[tokens.names[name]] >= vocabulary:
            print(
                f"warning: {where}: the {name} {tokens.names[name]!r} has id {ids[tokens.names[name]]}, but the model "
                f"a vocabulary of {vocabulary}: it is not used",
                file=sys.stderr,
            )
    return dataclasses.replace(tokens, limit=vocabulary, reader=reader)


def unused(tokens: Tokenizer, vocabulary: int) -> tuple[tuple[int, int], ...]:
    """The ids of a vocabulary that no token has, as ranges (first, one past the last) in order."""
    known = sorted({index for index in tokens.core.get_vocab().values() if index < vocabulary})
    pairs = itertools.pairwise([-1, *known, vocabulary])
    return tuple((before + 1, after) for before, after in pairs if after > before + 1)


def told(model: Any, tokens: Tokenizer) -> Any:
    """A LanguageModel that was made here and not loaded, knowing which of its ids no token has."""
    config = model.config
    if config.unused or tokens.vocabulary >= config.vocabulary:
        return model
    kept = vars(model).setdefault("_told", {})  # one value of the model for each tokenizer, which is laid out once
    if tokens.digest not in kept:
        config = dataclasses.replace(config, unused=unused(tokens, config.vocabulary))
        kept[tokens.digest] = model.replace(config=config).with_about(model.about)
    return kept[tokens.digest]
