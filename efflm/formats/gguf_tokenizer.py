"""The tokenizer that a GGUF file carries in its metadata, written as the tokenizer.json it was made from.

Two kinds: byte-level BPE ("gpt2"), whose merges the file lists and whose way to split text it names, and SentencePiece
BPE with bytes to fall back on ("llama"), whose merges follow from its scores.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efflm.config import InputError, require
from efflm.text import tokenizer, tokenizer_files
from efflm.text.tokenizer import Tokenizer

# ggml's types of tokens
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
# Tokens that end an answer in one chat format or another, whatever the file calls its end of sequence.
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
LONGEST = 256  # characters of a SentencePiece token; trainers stop at 16, some code tokens at 60

# How text is cut into words before merging, by the published tokenizer.json of each model: patterns applied in turn,
# each to what the one before left, matches and gaps alike.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = {"patterns": [r"\p{N}", _GPT2]}
SPLITS = {
    # What ggml does with vocabularies whose way to split its converter did not know.
    "default": {"patterns": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]},
    "gpt-2": {"patterns": [_GPT2]},
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": {"patterns": [_LLAMA3], "ignore_merges": True, "adds_bos": True},
    "llama3": {"patterns": [_LLAMA3], "ignore_merges": True, "adds_bos": True},
    "llama-v3": {"patterns": [_LLAMA3], "ignore_merges": True, "adds_bos": True},
    "dbrx": {"patterns": [_LLAMA3]},
    "smaug-bpe": {"patterns": [_LLAMA3]},
    "qwen2": {"patterns": [_QWEN2], "normalizer": {"type": "NFC"}},
    "deepseek-r1-qwen": {"patterns": [_QWEN2], "normalizer": {"type": "NFC"}},
}


def from_metadata(metadata: dict[str, Any], where: Path) -> Tokenizer:
    """Raises InputError for a kind of vocabulary or of splitting that is not known here, and for a damaged one."""
    kind = metadata.get("tokenizer.ggml.model")
    require(kind is not None, f"{where} holds no tokenizer: it has no tokenizer.ggml.model")
    require(kind in ("gpt2", "llama"), f"{where} has a tokenizer of kind {kind!r:.80}, but read are 'gpt2' and 'llama'")
    tokens = metadata.get("tokenizer.ggml.tokens")
    require(isinstance(tokens, list) and len(tokens) > 0, f"{where} has no list of strings tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        index = next(i for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise InputError(f"{where}: tokens {index} and {vocabulary[tokens[index]]} are both {tokens[index]!r:.80}")
    types = _numbers(metadata, "token_type", len(tokens), where)
    # llama.cpp's converter gives names to the rows that pad an embedding; no text has them as tokens.
    vocabulary = {token: index for token, index in vocabulary.items() if types[index] != UNUSED}
    byte_level = kind == "gpt2"
    split = _split(metadata, where) if byte_level else {"adds_bos": True}
    adds = {"bos": split.get("adds_bos", False), "eos": False}
    adds = {end: metadata.get(f"tokenizer.ggml.add_{end}_token", usual) for end, usual in adds.items()}
    for end, value in adds.items():
        name = f"tokenizer.ggml.add_{end}_token"
        require(isinstance(value, bool), f"{where}: {name} is {value!r:.80}, but must be a bool")
    ids = {name: _id(metadata, name, len(tokens), where) for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    if byte_level:
        stages = _byte_level(metadata, vocabulary, split, where)
    else:
        stages = _sentencepiece(metadata, tokens, vocabulary, types, ids["unknown"], where)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = (CONTROL, UNKNOWN) if not byte_level else (CONTROL,)
    described = {
        "version": "1.0",
        "added_tokens": [
            {"id": int(index), "content": tokens[index], "special": bool(types[index] in special), **flags}
            for index in np.flatnonzero(np.isin(types, (*special, USER_DEFINED)))
        ],
        **stages,
    }
    before, after = ({tokens[ids[end]]: ids[end]} if adds[end] and ids[end] is not None else {} for end in adds)
    core = tokenizer.from_description(tokenizer_files.with_ends(described, before, after), where)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ends = {vocabulary[end] for end in ENDS if end in vocabulary and types[vocabulary[end]] == CONTROL}
    ends |= {ids[name] for name in ("eot", "eom")} - {None}
    template = metadata.get("tokenizer.chat_template")
    require(template is None or isinstance(template, str), f"{where}: tokenizer.chat_template must be text")
    return Tokenizer(
        core,
        {name: tokens[ids[key]] for name, key in names.items() if ids[key] is not None},
        extra_stops=tuple(sorted(ends - {ids["eos"]})),
        template=template,
        where=where,
    )


def _split(metadata: dict[str, Any], where: Path) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    require(
        isinstance(name, str) and name in SPLITS,
        f"{where} splits text in the way {name!r:.80} (tokenizer.ggml.pre), but known are {', '.join(SPLITS)}",
    )
    return SPLITS[name]


def _byte_level(
    metadata: dict[str, Any], vocabulary: dict[str, int], split: dict[str, Any], where: Path
) -> dict[str, Any]:
    merges = metadata.get("tokenizer.ggml.merges")
    require(isinstance(merges, list), f"{where} has no list of strings tokenizer.ggml.merges")
    pairs = [merge.split(" ") for merge in merges]
    wrong = next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocabulary), None)
    require(wrong is None, f"{where}: {' '.join(wrong or ())!r:.80} merges no two tokens")
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", False)
    require(
        prefixed is False,
        f"{where}: tokenizer.ggml.add_space_prefix is {prefixed!r:.80}, but texts of byte-level tokenizers begin as "
        "they are",
    )
    stage = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split["patterns"]
    ]
    return {
        "normalizer": split.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, {**stage, "use_regex": False}]},
        "decoder": {**stage, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": pairs,
            "ignore_merges": split.get("ignore_merges", False),
        },
    }


def _sentencepiece(
    metadata: dict[str, Any],
    tokens: list[str],
    vocabulary: dict[str, int],
    types: np.ndarray,
    unknown: int | None,
    where: Path,
) -> dict[str, Any]:
    scores = _numbers(metadata, "scores", len(tokens), where).astype(np.float64)
    require(bool(np.isfinite(scores).all()), f"{where}: tokenizer.ggml.scores are not all finite")
    split = metadata.get("tokenizer.ggml.pre", "default")
    require(
        split == "default",
        f"{where}: tokenizer.ggml.pre is {split!r:.80}, but SentencePiece does not split text before merging",
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    require(
        isinstance(prefixed, bool), f"{where}: tokenizer.ggml.add_space_prefix is {prefixed!r:.80}, but must be a bool"
    )
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    written = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        written.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    before = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "decoder": {"type": "Sequence", "decoders": written},
        "model": {
            "type": "BPE",
            "unk_token": tokens[unknown] if unknown is not None else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges_of(tokens, types, scores, where),
        },
    }


def merges_of(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], where: Any
) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: every way to halve a token into two tokens is
    a merge, ranked by the token's score, and longer left halves first among equals."""
    known = {token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED}
    mergeable = [i for i, kind in enumerate(types) if kind not in (UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)]
    halves = []
    for index in mergeable:
        token = tokens[index]
        if len(token) > LONGEST:
            raise InputError(f"{where}: token {index} has {len(token)} characters, more than {LONGEST}")
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                halves.append((scores[index], token[:cut], token[cut:]))
    halves.sort(key=lambda half: (-half[0], -len(half[1])))
    return [(left, right) for _, left, right in halves]


def _numbers(metadata: dict[str, Any], name: str, count: int, where: Path) -> np.ndarray:
    """A list with a number for each token; zeros if the file has none."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return np.zeros(count, np.int32)
    right = isinstance(values, np.ndarray) and len(values) == count
    require(right, f"{where}: tokenizer.ggml.{name} must be a list of {count} numbers, one a token")
    return values


def _id(metadata: dict[str, Any], name: str, count: int, where: Path) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    right = value is None or (type(value) is int and 0 <= value < count)
    require(right, f"{where}: tokenizer.ggml.{name}_token_id is {value!r:.80}, but there are {count} tokens")
    return value
