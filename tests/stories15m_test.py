"""A model trained elsewhere drives the same Transformer: llama2.c's stories15M goes on with a story."""

import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from efflm.compress.quantize import quantize
from efflm.config.model import BlockConfig, ModelConfig
from efflm.infer.generate import generate
from efflm.model import LanguageModel

DATA = Path(os.environ.get("EFFLM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not (DATA / "stories15M.bin").exists(), reason=f"no stories15M.bin in {DATA}: set EFFLM_DATA to its folder"
)
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the"


def load_model() -> LanguageModel:
    """llama2.c format, version 0; its rotary pairs (2i, 2i + 1) become ours, (i, i + H/2)."""
    raw = (DATA / "stories15M.bin").read_bytes()
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
    kernel = lambda w: {"kernel": jnp.asarray(w.T)}
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
    as_jax = lambda node: {k: as_jax(v) for k, v in node.items()} if isinstance(node, dict) else jnp.asarray(node)
    return LanguageModel(config, as_jax(params))


def load_pieces() -> list[bytes]:
    raw = (DATA / "stories15M.tokenizer.bin").read_bytes()
    pieces, at = [], 4
    while at < len(raw):
        (length,) = struct.unpack_from("<i", raw, at + 4)
        pieces.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


@pytest.mark.parametrize("quantized", [False, True])
def test_it_tells_a_story(quantized):
    model, pieces = load_model(), load_pieces()
    if quantized:
        model = LanguageModel(model.config, quantize(model.params))
    prompt = [1] + [pieces.index(word) for word in (b" Once", b" upon", b" a", b" time")]
    (ids,) = generate(model, [prompt], 40)
    text = b"".join(pieces[i] for i in [*prompt[1:], *ids]).decode().strip()
    assert text.startswith(STORY), text
