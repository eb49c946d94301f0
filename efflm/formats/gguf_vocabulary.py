"""A tokenizer as the metadata of a GGUF file: what gguf_tokenizer reads, and llama.cpp.

Both read byte-level BPE that splits text in one of the ways that have a name there, and SentencePiece BPE, in which
scores stand for the order of merges. Whatever else a tokenizer does is refused, so that no text gets other tokens.
"""

import json
import re
from typing import Any

from efflm.config import require
from efflm.formats import gguf_tokenizer
from efflm.formats.gguf_tokenizer import BYTE, CONTROL, ENDS, SPLITS, UNKNOWN, UNUSED, USER_DEFINED
from efflm.text.tokenizer import Tokenizer

NORMAL = 1
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
KEY = "tokenizer.ggml."


def to_metadata(tokens: Tokenizer, size: int, begin: tuple[int, ...]) -> dict[str, Any]:
    """The keys of a tokenizer for a model of `size` entries; ids without a token are named [PAD...].

    begin: the ids that the model expects before a text; a single one is the BOS token of the file. Raises InputError
    for what GGUF cannot say.
    """
    where, described = tokens.where, json.loads(tokens.core.to_str())
    model = described["model"]
    require(model["type"] == "BPE", f"{where} is of the kind {model['type']}, but GGUF files are written with BPE")
    vocabulary = {token: index for token, index in tokens.core.get_vocab().items() if index < size}
    names = {index: token for token, index in vocabulary.items()}
    types = dict.fromkeys(names, NORMAL)
    for index, added in tokens.core.get_added_tokens_decoder().items():
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if getattr(added, flag)]
        require(not flags, f"{where}: {added.content!r:.80} has {', '.join(flags)}, which a GGUF file cannot say")
        types |= {index: CONTROL if added.special else USER_DEFINED} if index in names else {}
    ids = {key: vocabulary.get(tokens.names.get(name, "")) for key, name in NAMES.items()}
    if model.get("byte_fallback"):
        types |= {vocabulary[token]: BYTE for token in vocabulary if re.fullmatch("<0x[0-9A-F]{2}>", token)}
        ids["unknown"] = vocabulary.get(model.get("unk_token") or "", ids["unknown"])
        types |= {} if ids["unknown"] is None else {ids["unknown"]: UNKNOWN}
    listed = [names.get(index, f"[PAD{index}]") for index in range(size)]
    require(len(set(listed)) == size, f"{where} has a token of the name of one that pads the vocabulary, [PAD...]")
    kinds = [types.get(index, UNUSED) for index in range(size)]
    how = _sentencepiece(tokens, described, listed, kinds) if model.get("byte_fallback") else _byte_level(described)
    require(how is not None, f"{where} splits or changes text in a way that has no name in GGUF files")
    ids |= {"bos": begin[0]} if len(begin) == 1 else {}
    for side, end in ((begin, "bos"), (tokens.after, "eos")):
        known = side in ((), (ids[end],))
        require(known, f"{where} puts the ids {side} beside a text, but a GGUF file can say one {end} token only")
    others = [end for end in tokens.extra_stops if names.get(end) not in ENDS]
    require(
        len(others) <= 2, f"{where}: {len(others)} tokens end an answer beside {tokens.eos}, but GGUF has two names"
    )
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    metadata = {f"{KEY}{name}": value for name, value in how.items()}
    metadata |= {f"{KEY}tokens": listed, f"{KEY}token_type": kinds}
    metadata |= {f"{KEY}{name}_token_id": index for name, index in ids.items() if index is not None}
    metadata |= {f"{KEY}add_bos_token": bool(begin), f"{KEY}add_eos_token": bool(tokens.after)}
    return metadata | ({"tokenizer.chat_template": tokens.template} if tokens.template else {})


def _byte_level(described: dict[str, Any]) -> dict[str, Any] | None:
    """The name of the way in which text is split, and the merges; None where it has none."""
    split = described["pre_tokenizer"] or {}
    patterns = []
    for stage in split.get("pretokenizers", [split]):
        match stage:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += SPLITS["gpt-2"]["patterns"] if stage.get("use_regex", True) else []
            case _:
                return None
    model = described["model"]
    how = (patterns, described["normalizer"], bool(model.get("ignore_merges")))
    for name, known in SPLITS.items():
        if how == (known["patterns"], known.get("normalizer"), known.get("ignore_merges", False)):
            return {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in model["merges"]]}
    return None


def _sentencepiece(
    tokens: Tokenizer, described: dict[str, Any], listed: list[str], kinds: list[int]
) -> dict[str, Any] | None:
    """Scores in the order of the merges, from which the same merges follow; None where that is not so."""
    model, normalizer, split = described["model"], described["normalizer"], described["pre_tokenizer"]
    stages = (normalizer or {}).get("normalizers", [normalizer])
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefixed = stages == [{"type": "Prepend", "prepend": "▁"}, space]
    harmless = split is None or (split["type"] == "Split" and split["pattern"] == {"String": " "})  # no space is left
    if not harmless or not (prefixed or stages == [space]):
        return None
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), -float(rank))
    scores = [ranks.get(token, -float(len(model["merges"]))) for token in listed]
    keys = {"model": "llama", "scores": scores, "add_space_prefix": prefixed}
    found = gguf_tokenizer.merges_of(listed, kinds, scores, tokens.where)
    in_order = lambda pairs: [ranks["".join(pair)] for pair in pairs]
    same = {tuple(pair) for pair in model["merges"]} == set(found)
    return keys if same and in_order(model["merges"]) == in_order(found) else None
