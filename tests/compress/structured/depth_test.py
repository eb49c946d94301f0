import dataclasses
import itertools

import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress.step import Context, calibrates
from efflm.compress.structured import latency
from efflm.compress.structured.depth import Depth, block_influence
from efflm.config import InputError
from efflm.parallel import meshes
from tests import reference, tiny

SHAPE = dataclasses.replace(tiny.LLAMA, layers=4)
MODEL = tiny.model(SHAPE)
CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(SHAPE.config(), rows=2), corpus="text")


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
    np.testing.assert_allclose(block_influence(MODEL, batch, meshes.data_parallel(2)), want, rtol=1e-4)


def test_the_layers_of_the_least_influence_go():
    influence = block_influence(MODEL, CONTEXT.calibration, CONTEXT.mesh)
    for keep in (1, 2, 3):
        after, record = Depth(layers=keep, importance="block_influence")(MODEL, CONTEXT)
        stay = sorted(np.argsort(influence)[-keep:])
        for new, old in enumerate(stay):
            assert after.params[f"block_{new}"] is MODEL.params[f"block_{old}"]
        assert len(after.config.blocks) == keep
        assert record.corpus == "text"


def test_text_is_read_only_where_it_is_needed():
    assert calibrates([Depth(importance="block_influence")])
    assert not calibrates([Depth()])
    _, record = Depth()(MODEL, dataclasses.replace(CONTEXT, calibration=None))
    assert record.corpus == ""
    with pytest.raises(InputError, match="block influence needs calibration text: give a corpus"):
        Depth(importance="block_influence")(MODEL, dataclasses.replace(CONTEXT, calibration=None))
    with pytest.raises(InputError, match="importance is block_influence, but with init=random no layer's weights"):
        Depth(importance="block_influence", init="random")
    padding = CONTEXT.calibration | {"segments": np.zeros_like(CONTEXT.calibration["segments"])}
    with pytest.raises(InputError, match="only padding"):
        Depth(importance="block_influence")(MODEL, dataclasses.replace(CONTEXT, calibration=padding))


@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_so_many_layers_go_as_come_nearest_to_the_target(name, capsys):
    deep = tiny.model(dataclasses.replace(tiny.LLAMA, layers=7))
    size = lambda model: trees.count(model.params) if name == "parameters" else ops.stored_nbytes(model.params)
    for target in (0.1, 0.3, 0.52):
        after, record = Depth(**{name: target})(deep, CONTEXT)
        models = [shrunk(deep, keep) for keep in range(1, 8)]
        gaps = [abs(1 - size(model) / size(deep) - target) for model in models]
        keep = 1 + int(np.argmin(gaps))
        assert trees.count(after.params) == trees.count(models[keep - 1].params)
        assert record.settings["removed"] == {
            "layers": 7 - keep,
            name: pytest.approx(1 - size(after) / size(deep)),
        }
    assert f"of {name}" in capsys.readouterr().out


def shrunk(model, keep):
    return model if keep == len(model.config.blocks) else Depth(layers=keep)(model, CONTEXT)[0]


def test_by_latency_few_candidates_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(latency, "runner", lambda model, phase: len(model.config.blocks))
    monkeypatch.setattr(latency, "saved", lambda before, after: measured.append(after) or 1 - (after + 1) / before)
    deep = tiny.model(dataclasses.replace(tiny.LLAMA, layers=8))
    after, record = Depth(latency=0.35, importance="block_influence")(deep, CONTEXT)
    assert len(after.config.blocks) == 4
    assert record.settings["removed"] == {"layers": 4, "latency": pytest.approx(1 - 5 / 8)}
    influence = block_influence(deep, CONTEXT.calibration, CONTEXT.mesh)
    for new, old in enumerate(sorted(np.argsort(influence)[-4:])):
        assert after.params[f"block_{new}"] is deep.params[f"block_{old}"]
    assert len(measured) == len(set(measured)) <= 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 2, "bytes": 0.3}, r"layers is 2 and bytes is 0\.3: set one of them, or none to keep half"),
        ({"parameters": 0.3, "bytes": 0.3}, r"parameters is 0\.3 and bytes is 0\.3: set one of them"),
        ({"parameters": 1.5}, r"parameters is 1\.5, but must be between 0 and 1"),
        ({"parameters": 0.99}, r"parameters is 0\.99, but the smallest model that can be made saves"),
        ({"bytes": 0.01}, r"bytes is 0\.01, but whole layers make it 0: ask for more"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Depth(**settings)(MODEL, CONTEXT)
