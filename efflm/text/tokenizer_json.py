"""What a tokenizer.json describes, looked through before the library that reads it is let near.

It is a stranger's, and the `tokenizers` library trusts it: it cuts text at places that a file names without looking
whether a character begins there, and replaces text by as much as a file says.
"""

import json
from typing import Any

from efflm.config import require

MOST_GROWTH = 10_000
STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# What a tokenizer.json, its model and its added tokens may hold, all of which the library reads.
PARTS = {"version", "truncation", "padding", "added_tokens", "model", *STAGES}
MODEL = {"type", "vocab", "merges", "unk_token", "unk_id", "fuse_unk", "byte_fallback", "ignore_merges", "dropout"}
MODEL |= {"continuing_subword_prefix", "end_of_word_suffix"}
ADDED = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
OLDER = {"Metaspace": {"add_prefix_space", "str_rep"}}  # fields that the library reads and writes as others


def require_sound(described: dict[str, Any], where: Any) -> None:
    """Raise InputError for what a tokenizer.json holds that would end the process or grow text without bounds."""
    model = described.get("model")
    require(isinstance(model, dict), f"{where} is not a tokenizer: it has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    require(kind in ("BPE", "Unigram"), f"{where} has a model of type {kind!r:.80}, but read are BPE and Unigram")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(key), f"{where} has a {key}, {model.get(key)!r:.80}, which is not supported")
    require(
        not model.get("dropout"), f"{where} splits words at random (dropout {model.get('dropout')!r:.80}): set it to 0"
    )
    added = described.get("added_tokens")
    parts = [
        (described, PARTS),
        (model, MODEL),
        *((token, ADDED) for token in (added if isinstance(added, list) else ())),
    ]
    for part, known in parts:
        other = _first_beyond(part, known)
        require(other is None, f"{where} holds {other!r:.80}, which is not known and may change its tokens")
    growth = 1.0
    stages = [described.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while stages:
        stage = stages.pop()
        if isinstance(stage, list):
            stages += stage
        elif isinstance(stage, dict):
            stages += [below for below in stage.values() if isinstance(below, dict | list)]
            growth *= _growth(stage)
    require(growth <= MOST_GROWTH, f"{where} makes text over {MOST_GROWTH:,} times as long, which no tokenizer needs")


def _first_beyond(part: Any, known: set[str]) -> str | None:
    """The first key of an object that is not known and says something."""
    said = part.items() if isinstance(part, dict) else ()
    return next((key for key, value in said if key not in known and value is not None), None)


def require_all_read(described: dict[str, Any], core: Any, where: Any) -> None:
    """Raise InputError for a field of a stage that the library skipped when it made `core`: one that is newer than it
    changes the tokens in a way it does not know."""
    for name in STAGES:
        stage = getattr(core, name)
        pairs = [(described.get(name), json.loads(stage.__getstate__()))] if stage is not None else []
        while pairs:
            given, read = pairs.pop()
            if isinstance(given, dict) and isinstance(read, dict):
                other = _first_beyond(given, read.keys() | OLDER.get(str(read.get("type")), set()))
                require(
                    other is None,
                    f"{where} holds {other!r:.80} in its {name}, which is not known and may change its tokens",
                )
                pairs += [(value, read.get(key)) for key, value in given.items()]
            elif isinstance(given, list) and isinstance(read, list):
                pairs += zip(given, read, strict=False)


def _growth(stage: dict[str, Any]) -> float:
    """How many times as long a stage can make a text of one character or more."""
    pattern = stage.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression, like an empty string, can match before each character and at the end.
    shortest = len(replaced) if isinstance(replaced, str) and replaced else 0.5
    replacing, prepended = stage.get("content"), stage.get("prepend")
    longest = len(replacing) / shortest if isinstance(replacing, str) else 1
    return max(1.0, longest, 1 + len(prepended) if isinstance(prepended, str) else 1)
