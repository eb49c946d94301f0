import dataclasses

import numpy as np
import pytest

from efflm import trees
from efflm.compress.structured import residual
from efflm.config import InputError
from efflm.parallel import meshes
from tests import reference, tiny

MESH = meshes.make_mesh()
NEOX = tiny.model(tiny.CONFIGS["neox"])  # LayerNorms, and both norms of a layer read the residual stream before it
BATCH = tiny.batch(NEOX.config, rows=2)


def norms():
    """In float64: {norm: its weights, what it reads [tokens, D]}."""
    found = {}
    for row in range(2):
        for which in (1, 2):
            ids = BATCH["inputs"][row][BATCH["segments"][row] == which]
            streams = reference.streams(NEOX.config, NEOX.params, ids)
            for i, x in enumerate(streams[:-1]):
                for name in ("attention_norm", "feedforward_norm"):
                    found.setdefault(f"block_{i}/{name}", []).append(x)
            found.setdefault("final_norm", []).append(streams[-1])
    weights = dict(trees.flatten(NEOX.params))
    scaled = lambda name: [np.float64(weights[f"{name}/{leaf}"]) for leaf in ("scale", "bias")]
    return {name: (*scaled(name), np.concatenate(parts)) for name, parts in found.items()}


def test_channels_are_scored_by_what_all_norms_give():
    total = 0.0
    for scale, bias, x in norms().values():
        normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + NEOX.config.norm_epsilon)
        total += np.abs(normed * scale + bias).mean(0)
    np.testing.assert_allclose(residual.channels(NEOX, BATCH, MESH), total, rtol=1e-4)


def test_norms_are_corrected_for_the_deviation_over_what_stays():
    kept = np.array([0, 3, 4, 9, 20, 21, 30])
    small = dict(trees.flatten(residual.narrowed(NEOX, kept, BATCH, MESH).params))
    for name, (scale, bias, x) in norms().items():
        ratio = (x[:, kept].std(1) / np.sqrt(x.var(1) + NEOX.config.norm_epsilon)).mean()
        np.testing.assert_allclose(small[f"{name}/scale"], scale[kept] * ratio, rtol=1e-4)
        np.testing.assert_allclose(small[f"{name}/bias"], bias[kept], rtol=1e-6)
    assert small["embedding"].shape == (300, 7)


@pytest.mark.parametrize("name", ["llama", "offset", tiny.combination("untied"), tiny.combination("qwen3")])
def test_without_channels_that_hold_nothing_the_model_computes_the_same(name):
    offset = dataclasses.replace(tiny.CONFIGS["llama"], norm_offset=1.0)
    config = (tiny.CONFIGS | {"offset": offset})[name]
    model = tiny.model(dataclasses.replace(config, norm_epsilon=1e-9, blocks=config.blocks[:1]))
    dead = np.array([1, 7, 8, 31])

    def kill(path, w):
        writes = path.endswith(("embedding", "output/kernel", "down/kernel")) and path != "unembedding"
        return w.at[:, dead].set(0.0) if writes else w

    model = model.replace(params=trees.map_with_path(kill, model.params))
    order = np.argsort(residual.channels(model, BATCH, MESH), kind="stable")
    assert sorted(order[:4]) == dead.tolist()
    small = residual.narrowed(model, np.sort(order[4:]), BATCH, MESH)
    assert small.config.width == 28
    tokens = tiny.tokens(model.config, 2, 12)
    np.testing.assert_allclose(tiny.logits(small, tokens), tiny.logits(model, tokens), atol=1e-4)


def test_norms_after_the_parts_are_refused():
    with pytest.raises(InputError, match=r"axes has width, but the norms after .* \(post_norm\) are not corrected"):
        residual.channels(tiny.model(tiny.CONFIGS["gemma"]), BATCH, MESH)


def test_padding_alone_is_refused():
    padding = BATCH | {"segments": np.zeros_like(BATCH["segments"])}
    with pytest.raises(InputError, match="only padding"):
        residual.channels(NEOX, padding, MESH)
