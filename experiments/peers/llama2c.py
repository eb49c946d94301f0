"""A checkpoint of llama2.c (its format 0, as stories15M.bin) and its tokenizer.

.venv/bin/python experiments/peers/llama2c.py stories15M.bin stories15M.tokenizer.bin OUT
"""

import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efflm import api
from efflm.config.model import BlockConfig, ModelConfig
from efflm.formats import gguf_tokenizer
from efflm.formats.gguf_tokenizer import BYTE, CONTROL, UNKNOWN
from efflm.model import LanguageModel
from efflm.text.tokenizer import Tokenizer

NORMAL, FIRST_PIECE = 1, 259  # after <unk>, <s>, </s> and the 256 bytes


def load_model(path: Path) -> LanguageModel:
    """Its rotary pairs (2i, 2i + 1) become ours, (i, i + H/2)."""
    raw = path.read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("<7i", raw[:28])
    floats, at = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return floats[at - int(np.prod(shape)) : at].reshape(shape)

    size = width // heads
    embedding, attention_norm = take(vocabulary, width), take(layers, width)
    query, key = take(layers, heads * size, width), take(layers, kv_heads * size, width)
    value, output = take(layers, kv_heads * size, width), take(layers, width, heads * size)
    feedforward_norm = take(layers, width)
    gate, down, up = take(layers, hidden, width), take(layers, width, hidden), take(layers, hidden, width)
    final_norm = take(width)

    def halves(w, count):
        return w.reshape(count, size // 2, 2, width).swapaxes(1, 2).reshape(count * size, width)

    params = {"embedding": embedding, "final_norm": {"scale": final_norm}}
    kernel = lambda w: {"kernel": w.T}
    for i in range(layers):
        params[f"block_{i}"] = {
            "attention_norm": {"scale": attention_norm[i]},
            "attention": {
                "query": kernel(halves(query[i], heads)),
                "key": kernel(halves(key[i], kv_heads)),
                "value": kernel(value[i]),
                "output": kernel(output[i]),
            },
            "feedforward_norm": {"scale": feedforward_norm[i]},
            "feedforward": {"gate": kernel(gate[i]), "up": kernel(up[i]), "down": kernel(down[i])},
        }
    block = BlockConfig(heads=heads, kv_heads=kv_heads, head_dim=size, mlp_dim=hidden)
    config = ModelConfig(vocabulary=abs(vocabulary), width=width, max_length=length, blocks=(block,) * layers)
    return LanguageModel(config, jax.tree.map(jnp.asarray, params))


def load_tokenizer(path: Path) -> Tokenizer:
    """Llama's SentencePiece vocabulary. Spaces and the bytes to fall back on are written as such there."""
    raw, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score - 1e-6 * len(scores))  # in their order where equal, as those of runs of spaces are
        at += 8 + length
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces[FIRST_PIECE:]]
    types = np.array([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - FIRST_PIECE))
    metadata = {"model": "llama", "tokens": tokens, "scores": np.array(scores), "token_type": types}
    metadata |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return gguf_tokenizer.from_metadata({f"tokenizer.ggml.{name}": each for name, each in metadata.items()}, path)


if __name__ == "__main__":
    checkpoint, vocabulary, out = map(Path, sys.argv[1:])
    print(api.save(out, load_model(checkpoint), load_tokenizer(vocabulary)))
