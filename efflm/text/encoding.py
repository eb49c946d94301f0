"""What can be tokenized, a long text as token ids with the bytes of the text that each of them stands for, where a text
that comes in parts ends, and the bytes that each token of a vocabulary writes."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from efflm.config import InputError

CONTEXT = 256  # characters on either side of a stretch that are tokenized with it

Sized = tuple[list[int], np.ndarray]  # ids, and the bytes of each, int64


def require_characters(text: str, what: str) -> None:
    """Raise InputError for half of a surrogate pair, which no tokenizer can read and no file can hold. what: the
    text's name in the error."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has {text[error.start]!r} at character {error.start}, which is half of a surrogate pair and no "
            "character: leave it out, or decode what it was made from as UTF-8 or UTF-16"
        ) from None


def sized(encode: Callable[[str], Any], pieces: Sequence[bytes], stretches: Iterable[str]) -> Iterator[Sized]:
    """The ids of each stretch of a text, as those of the whole text, and the bytes of the text that each stands for.

    The bytes are the text's own, whatever a normalizer makes of it, so they add up to its size. Each stretch is
    tokenized with CONTEXT characters before and after it: neither does a space come before each, as it comes before a
    whole text in SentencePiece's way, nor is a token cut. What no token stands for counts for the token after it, and
    at the end for the last one. A character of several tokens counts for the first, but where the text is just the
    `pieces` of its ids each counts its own bytes. encode: a text -> its tokenizers.Encoding.
    """
    before, skipped, held = "", 0, None
    for text, after in itertools.pairwise(itertools.chain(stretches, [""])):
        found = encode(before + text + after[:CONTEXT])
        ends = np.maximum.accumulate(np.array([end for _, end in found.offsets], np.int64)) - len(before)
        own = slice(np.searchsorted(ends, 0, "right") if before else 0, np.searchsorted(ends, len(text), "right"))
        ids, size = found.ids[own], len(text.encode())
        before = (before + text)[-CONTEXT:]
        if ids:
            written = [pieces[i] for i in ids]
            sizes = np.array(list(map(len, written)), np.int64)
            if b"".join(written) != text.encode():
                places = _places(text)[ends[own]]
                places[-1] = size
                sizes = np.diff(places, prepend=0)
            sizes[0] += skipped
            if held:
                yield held
            held, skipped = (ids, sizes), 0
        elif held:
            held[1][-1] += size
        else:
            skipped += size
    if held:
        yield held


def _places(text: str) -> np.ndarray:
    """The byte at which each character begins, and the end, int64 [characters + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(np.int64)
    return np.concatenate([[0], np.cumsum(sizes)])


def until(stops: Sequence[str]) -> Callable[..., tuple[str, bool]]:
    """A function (text, final=False) -> what this text adds to those of the calls before, up to the first of the stops
    to be complete, and whether there was one: then it is not called again. A stop may be split over several texts: its
    possible beginning is held back, until final=True. An empty stop is none."""
    stops, held = tuple(filter(None, stops)), ""

    def up_to(text: str, final: bool = False) -> tuple[str, bool]:
        nonlocal held
        held += text
        found = [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]
        if found:
            return held[: min(found)[1]], True
        begins = lambda tail: any(stop.startswith(tail) for stop in stops)
        longest = 0 if final else min(len(held), max(map(len, stops), default=1) - 1)
        shown = len(held) - next((n for n in range(longest, 0, -1) if begins(held[-n:])), 0)
        text, held = held[:shown], held[shown:]
        return text, False

    return up_to


def pieces_of(core: Any, count: int) -> list[bytes]:
    """The bytes that each of the first `count` ids of a tokenizer of the `tokenizers` library writes; none for special
    tokens and for ids without a token."""
    described = stages(core.decoder)
    byte_level = any(stage["type"] == "ByteLevel" for stage in described)
    space = next((stage["replacement"] for stage in described if stage["type"] == "Metaspace"), "▁")
    fallback = any(stage["type"] == "ByteFallback" for stage in described)
    alphabet = _byte_alphabet()

    def bytes_of(token: str) -> bytes:
        if byte_level:
            known = all(character in alphabet for character in token)
            return bytes(alphabet[character] for character in token) if known else token.encode()
        if fallback and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(match[1])
        return token.replace(space, " ").encode()

    found = {index: bytes_of(token) for token, index in core.get_vocab(with_added_tokens=False).items()}
    added = core.get_added_tokens_decoder().items()
    found |= {index: b"" if token.special else token.content.encode() for index, token in added}
    return [found.get(index, b"") for index in range(count)]


def stages(decoder: Any) -> list[dict[str, Any]]:
    """The stages of a decoder as plain values."""
    described = plain(decoder)
    return described.get("decoders", [described]) if described else []


def plain(part: Any) -> dict[str, Any]:
    """A part of the library's tokenizer as plain values; nothing where it has no such part."""
    return {} if part is None else json.loads(part.__getstate__())


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): the byte's own in Latin-1 where
    that can be seen, else those from U+0100 on, in turn."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
