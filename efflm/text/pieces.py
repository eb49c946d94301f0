"""The bytes of text that each token of a vocabulary writes."""

import json
import re
from typing import Any


def of(core: Any, count: int) -> list[bytes]:
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
