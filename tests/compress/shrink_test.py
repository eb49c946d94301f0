import dataclasses
import itertools

import numpy as np
import pytest

from efflm.compress import recipe
from efflm.compress.shrink import Shrink, block_influence
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model import sharding
from tests import reference, tiny

SHAPE = dataclasses.replace(tiny.LLAMA, layers=4)
MODEL = tiny.model(SHAPE)
CONTEXT = Context(mesh=sharding.make_mesh(), calibration=tiny.batch(SHAPE.config(), rows=2), corpus="text")


def expected(model, batch):
    """In float64, from the residual stream of the reference: a model of the first layers and no final norm."""
    found = np.zeros(len(model.config.blocks))
    documents = [np.nonzero(row == which)[0] for row in batch["segments"] for which in (1, 2)]
    for i, tokens in enumerate(documents):
        ids = batch["inputs"][i // 2][tokens]
        streams = reference.streams(model.config, model.params, ids)
        for layer, (x, y) in enumerate(itertools.pairwise(streams)):
            cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
            found[layer] += (1 - cosine).sum()
    return found / (batch["segments"] > 0).sum()


def test_block_influence_is_that_of_the_paper_over_tokens_that_are_no_padding():
    batch = dict(CONTEXT.calibration)
    want = expected(MODEL, batch)
    np.testing.assert_allclose(block_influence(MODEL, batch, CONTEXT.mesh), want, rtol=1e-4)
    np.testing.assert_allclose(block_influence(MODEL, batch, sharding.data_parallel(2)), want, rtol=1e-4)


def test_the_layers_of_the_least_influence_go():
    influence = block_influence(MODEL, CONTEXT.calibration, CONTEXT.mesh)
    for keep in (1, 2, 3):
        after, record = Shrink(layers=keep, importance="block_influence")(MODEL, CONTEXT)
        stay = sorted(np.argsort(influence)[-keep:])
        for new, old in enumerate(stay):
            assert after.params[f"block_{new}"] is MODEL.params[f"block_{old}"]
        assert len(after.config.blocks) == keep
        assert record.corpus == "text"


def test_text_is_read_only_where_it_is_needed():
    assert recipe.calibrates([Shrink(importance="block_influence")])
    assert not recipe.calibrates([Shrink()])
    _, record = Shrink()(MODEL, dataclasses.replace(CONTEXT, calibration=None))
    assert record.corpus == ""
    with pytest.raises(InputError, match="block influence needs calibration text: give a corpus"):
        Shrink(importance="block_influence")(MODEL, dataclasses.replace(CONTEXT, calibration=None))
    with pytest.raises(InputError, match="importance is block_influence, but with init=random no layer's weights"):
        Shrink(importance="block_influence", init="random")
    padding = CONTEXT.calibration | {"segments": np.zeros_like(CONTEXT.calibration["segments"])}
    with pytest.raises(InputError, match="only padding"):
        Shrink(importance="block_influence")(MODEL, dataclasses.replace(CONTEXT, calibration=padding))
