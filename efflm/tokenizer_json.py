"""What a tokenizer.json describes, looked through before the library that reads it is let near.

It is a stranger's, and the `tokenizers` library trusts it: it cuts text at places that a file names without looking
whether a character begins there, and replaces text by as much as a file says.
"""

from typing import Any

from efflm.config import require

MOST_GROWTH = 10_000


def require_sound(described: dict[str, Any], where: Any) -> None:
    """Raise InputError for what a tokenizer.json holds that would end the process or grow text without bounds."""
    model = described.get("model")
    require(isinstance(model, dict), f"{where} is not a tokenizer: it has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    require(kind in ("BPE", "Unigram"), f"{where} has a model of type {kind!r:.80}, but read are BPE and Unigram")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(key), f"{where} has a {key}, {model.get(key)!r:.80}, which is not supported")
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


def _growth(stage: dict[str, Any]) -> float:
    """How many times as long a stage can make a text of one character or more."""
    pattern = stage.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression, like an empty string, can match before each character and at the end.
    shortest = len(replaced) if isinstance(replaced, str) and replaced else 0.5
    replacing, prepended = stage.get("content"), stage.get("prepend")
    longest = len(replacing) / shortest if isinstance(replacing, str) else 1
    return max(1.0, longest, 1 + len(prepended) if isinstance(prepended, str) else 1)
