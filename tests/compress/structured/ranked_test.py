"""Layers of different widths, and targets by bytes and by time."""

import dataclasses

import jax
import numpy as np
import pytest

from efflm import api as efflm
from efflm import ops, trees
from efflm.compress import recipe
from efflm.compress.finetune import Finetune
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.compress.structured import importance, latency, width
from efflm.compress.structured.width import Width
from efflm.config import InputError
from efflm.config.train import TrainConfig
from efflm.infer.generate import generate
from efflm.model import placement
from efflm.model.params import table
from efflm.parallel import meshes
from efflm.text import tokenizer
from efflm.train import trainer
from tests import tiny

CONFIG = tiny.LLAMA.config()
MODEL = tiny.model()
CONTEXT = Context(
    mesh=meshes.make_mesh(),
    calibration=tiny.batch(CONFIG, rows=4),
    batches=lambda step: tiny.batch(CONFIG, rows=2, seed=step),
)
TOKENS = tiny.tokens(CONFIG, 2, 12)


@pytest.fixture(scope="module")
def ranked():
    """A model whose two layers differ."""
    after, _ = Width(parameters=0.2, importance="taylor", layers="ranked")(MODEL, CONTEXT)
    assert after.config.blocks[0] != after.config.blocks[1]
    return after


def test_the_slices_of_the_largest_scores_stay():
    found = importance.taylor(MODEL, CONTEXT.calibration, CONTEXT.mesh, ("mlp",))
    step = Width(parameters=0.2, axes="mlp", importance="taylor", layers="ranked", refit=False)
    after, _ = step(MODEL, CONTEXT)
    assert abs(trees.count(after.params) / trees.count(MODEL.params) - 0.8) <= 96 / trees.count(MODEL.params)
    stays = []
    for i, block in enumerate(after.config.blocks):
        kept = np.sort(np.argsort(-found[i, "mlp"])[: block.mlp_dim])
        up = MODEL.params[f"block_{i}"]["feedforward"]["up"]["kernel"][:, kept]
        np.testing.assert_array_equal(after.params[f"block_{i}"]["feedforward"]["up"]["kernel"], up)
        stays.append((found[i, "mlp"][kept].min(), np.delete(found[i, "mlp"], kept).max()))
    assert min(least for least, _ in stays) >= max(most for _, most in stays)


def test_layers_that_differ_generate_as_they_read(ranked):
    prompt = TOKENS[0, :5].tolist()
    (ids,) = generate(ranked, [prompt], 4)
    whole = np.asarray(tiny.logits(ranked, np.array([prompt + ids], np.int32)))[0]
    assert np.argmax(whole[4:-1], axis=1).tolist() == ids


def test_layers_that_differ_train_and_quantize_and_prune(ranked):
    steps = (Finetune(steps=2), Magnitude(sparsity=0.5), Quantize())
    after, records = recipe.apply(ranked, steps, CONTEXT)
    assert after.config == ranked.config
    assert records[-1].predicted_bytes == ops.stored_nbytes(after.params, after.masks)
    looped, scanned = (
        trainer.fit(
            trainer.model_task(ranked.config, train, tiny.copies(ranked.params), CONTEXT.batches), mesh=CONTEXT.mesh
        )
        for train in (TrainConfig(steps=1), TrainConfig(steps=1, scan=True))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), scanned.params, looped.params)


def test_layers_that_differ_are_stored_and_sharded_as_any(ranked, tmp_path):
    want = tiny.logits(ranked, TOKENS)
    efflm.save(tmp_path / "ranked", ranked, tokenizer.train((), tokenizer.BYTES))
    again, _ = efflm.load(tmp_path / "ranked")
    assert again.config.unused == ((tokenizer.BYTES, ranked.config.vocabulary),)
    assert dataclasses.replace(again.config, unused=()) == ranked.config
    np.testing.assert_array_equal(tiny.logits(again, TOKENS), want)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    spread = jax.device_put(ranked, placement.shardings(ranked, mesh))
    np.testing.assert_allclose(tiny.logits(spread, TOKENS), want, atol=2e-4)


@pytest.mark.parametrize(
    "formats", [(Quantize(bits=4, group=16),), tiny.combination((Magnitude(sparsity=0.5), Quantize()))]
)
def test_a_share_of_the_bytes_goes(formats, capsys, monkeypatch):
    monkeypatch.setitem(width.NEAR["bytes"], "candidates", 6)  # each compiles for its shapes
    model, _ = recipe.apply(MODEL, formats, CONTEXT)
    after, record = Width(bytes=0.2, axes="mlp", refit=False)(model, CONTEXT)
    stored = [ops.stored_nbytes(each.params, each.masks) for each in (model, after)]
    assert abs(1 - stored[1] / stored[0] - 0.2) < 0.01  # a channel of both layers
    assert record.settings["removed"]["bytes"] == pytest.approx(1 - stored[1] / stored[0], abs=2e-3)
    assert record.settings["removed"]["parameters"] == pytest.approx(
        1 - trees.count(after.params) / trees.count(model.params)
    )
    assert "fewer parameters save" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"bytes is 0\.99, but the smallest model that can be made saves"):
        Width(bytes=0.99, axes="mlp")(model, CONTEXT)


def test_a_share_of_the_time_goes(monkeypatch, capsys):
    """As a clock would have it by which each parameter takes as long."""
    counted = lambda model, phase: trees.count(model.params)
    monkeypatch.setattr(latency, "runner", counted)
    monkeypatch.setattr(latency, "saved", lambda before, after: 0.8 * (1 - after / before))
    after, record = Width(latency=0.2, axes="mlp", refit=False)(MODEL, CONTEXT)
    share = 1 - trees.count(after.params) / trees.count(MODEL.params)
    assert abs(0.8 * share - 0.2) <= 0.02
    assert record.settings["removed"] == {"parameters": pytest.approx(share), "latency": pytest.approx(0.8 * share)}
    assert 1 < capsys.readouterr().out.count("of latency") <= 8
    with pytest.raises(InputError, match=r"latency is 0\.9, but the smallest model that can be made saves"):
        Width(latency=0.9, axes="mlp")(MODEL, CONTEXT)


def test_the_clock_runs_and_medians_are_compared(monkeypatch):
    for phase in ("both", "prefill"):
        run = latency.runner(MODEL, phase)
        assert run() > 0
    monkeypatch.setattr(latency, "LEAST", 0.0)
    turns = []
    times = {"A": iter([99.0, 4.0, 4.0, 4.0, 400.0, 4.0]), "B": iter([99.0, 3.0, 3.0, 3.0, 3.0, 900.0])}
    run = lambda name: lambda: turns.append(name) or next(times[name])
    assert latency.saved(run("A"), run("B")) == pytest.approx(0.25)
    assert "".join(turns) == "AB" * 6


@pytest.mark.parametrize("axes", [tiny.combination("width"), "groups mlp width"])
def test_the_model_gets_narrower(axes):
    after, record = Width(parameters=0.2, axes=axes, importance="taylor", refit=False)(MODEL, CONTEXT)
    assert after.config.width < 32
    assert abs(trees.count(after.params) / trees.count(MODEL.params) - 0.8) < 0.02
    assert (after.config.blocks != CONFIG.blocks) == (axes != "width")
    assert after.config.blocks[0] == after.config.blocks[1]
    assert {path: w.shape for path, w in trees.flatten(after.params)} == {
        path: param.shape for path, param in table(after.config).items()
    }
    assert "final_norm/scale" in record.leaves


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"parameters is 0\.0, bytes is 0\.0, latency is 0\.0: set one of them, the others to 0"),
        ({"parameters": 0.3, "bytes": 0.3}, "set one of them"),
        ({"bytes": 1.5}, r"bytes is 1\.5, but must be between 0 and 1"),
        (
            {"parameters": 0.3, "layers": "ranked", "importance": "magnitude"},
            "importance by magnitude does not compare",
        ),
        ({"parameters": 0.3, "layers": "ranked", "axes": "width"}, "layers is ranked, but axes is width"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Width(**settings)
