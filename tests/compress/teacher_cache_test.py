import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.compress import teacher_cache
from efflm.compress.distill import Distill
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model import Transformer
from efflm.parallel import meshes
from efflm.train import losses
from tests import tiny

SHAPE = dataclasses.replace(tiny.LLAMA, layers=1)
STEP = Distill(steps=2, learning_rate=1e-2, weight=0.6)


def context(**fields):
    batches = lambda step: tiny.batch(SHAPE.config(), seed=step)
    given = {"mesh": meshes.make_mesh(), "batches": batches, "teacher": tiny.model(SHAPE, seed=2)}
    return Context(**(given | {"tokenizer": "words", "corpus": "text"} | fields))


def kept(tmp_path, kind, entries=5, **fields):
    where = context(**fields)
    return teacher_cache.batches_with(tmp_path / kind, where.teacher, where, 2, kind, entries)


def teachers(batch, seed=2):
    """The teacher's probabilities, float64 [B, T, V]."""
    inputs = {name: batch[name] for name in ("segments", "positions")}
    return np.float64(jax.nn.softmax(tiny.logits(tiny.model(SHAPE, seed=seed), batch["inputs"], **inputs), axis=-1))


@pytest.mark.parametrize("repeated", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_sparse_distribution(repeated):
    B, T, K, D, V = 2, 6, 4, 8, 11
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((D, V)).astype(np.float32)
    ids = rng.integers(0, V, (B, T, K)) if repeated else np.argsort(rng.random((B, T, V)), axis=-1)[..., :K]
    p, weights = rng.random((B, T, K)).astype(np.float32) / K, rng.random((B, T)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))

    def plain(x):
        log_q = jax.nn.log_softmax(x @ w, axis=-1)
        chosen = jnp.take_along_axis(log_q, ids, axis=-1)
        d = jnp.sum(p * (jnp.log(p) - chosen), axis=-1)
        nll = -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
        sums = [jnp.sum(weights * each) for each in (0.6 * d + 0.4 * nll, d, nll)]
        return sums[0], sums

    def chunked(x):
        sums = ops.cached_distillation((x, w, False), p, ids, targets, weights, share=0.6)
        return sums[0], list(sums)

    (_, got), gradient = jax.value_and_grad(chunked, has_aux=True)(x)
    (_, want), expected = jax.value_and_grad(plain, has_aux=True)(x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_all_probabilities_teach_like_the_teacher_itself(tmp_path):
    batches, size = kept(tmp_path, "full")
    batch, model, teacher = batches(1), tiny.model(SHAPE, seed=1), tiny.model(SHAPE, seed=2)
    assert size == 2 * 300
    student = Transformer(model.config)
    of = lambda loss, frozen: jax.jit(jax.value_and_grad(lambda params: loss(params, frozen, batch, None)[0]))(
        model.params
    )
    live = of(losses.distillation_loss(student, student, temperature=1.0, weight=0.6), teacher.params)
    from_disk = of(losses.cached_distillation_loss(student, weight=0.6), {})
    np.testing.assert_allclose(from_disk[0], live[0], rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-4), from_disk[1], live[1])
    largest, _ = kept(tmp_path, "top_k", entries=300)
    of_all = np.zeros(batch["teacher_p"].shape)
    np.put_along_axis(of_all, largest(1)["teacher_ids"], np.float64(largest(1)["teacher_p"]), axis=-1)
    np.testing.assert_allclose(of_all, batch["teacher_p"], rtol=2e-3, atol=1e-6)


def test_the_largest_are_kept_and_made_to_add_up_to_one(tmp_path):
    batches, size = kept(tmp_path, "top_k")
    batch = batches(0)
    assert size == 5 * (2 + 2)
    p = np.sort(teachers(batch), axis=-1)[..., ::-1][..., :5]
    np.testing.assert_allclose(batch["teacher_p"], p / p.sum(-1, keepdims=True), rtol=5e-3)
    files = sum(file.stat().st_size for file in (tmp_path / "top_k").glob("[ip]*.npy"))
    assert files == pytest.approx(size * 2 * batch["inputs"].size, abs=300)


def test_drawn_tokens_are_an_unbiased_estimate():
    batch, model = tiny.batch(SHAPE.config(), rows=2), tiny.model(SHAPE, seed=2)
    found = teacher_cache.distributions(model, batch, jax.random.key(0), kind="sampled", entries=4000)["ids"]
    p = teachers(batch)
    for row, of_row in zip(np.asarray(found).reshape(-1, 4000)[:6], p.reshape(-1, 300)[:6], strict=True):
        share = np.bincount(row, minlength=300) / 4000
        assert np.all(np.abs(share - of_row) < 5 * np.sqrt(of_row / 4000) + 1e-3)


def test_training_from_disk_writes_once_and_on_two_devices_is_the_same(tmp_path, monkeypatch, capsys):
    step, model = dataclasses.replace(STEP, cache="sampled", entries=7), tiny.model(SHAPE, seed=1)
    first, record = step(model, context(cache=tmp_path / "one"))
    assert "the teacher's cache: 14 bytes a token" in capsys.readouterr().out
    assert record.settings["cache"] == "sampled"
    for axes in ({"data": 2}, {"tensor": 2}):
        on_two = context(cache=tmp_path / "-".join(axes), mesh=meshes.make_mesh(**axes))
        second, _ = step(model, on_two)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), first.params, second.params)
    monkeypatch.setattr(teacher_cache, "write", None)
    again, _ = step(model, context(cache=tmp_path / "one"))
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_an_interrupt_leaves_nothing_that_would_be_read(tmp_path):
    def stopped(step):
        if step:
            raise KeyboardInterrupt
        return tiny.batch(SHAPE.config())

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, "full", batches=stopped)
    assert not (tmp_path / "full").exists()
    kept(tmp_path, "full")
    assert json.loads((tmp_path / "full" / "cache.json").read_text())["steps"] == 2
    assert not (tmp_path / "full.partial").exists()


def test_another_teacher_tokenizer_text_or_kind_is_refused(tmp_path):
    kept(tmp_path, "top_k")
    for fields, words in (
        ({"tokenizer": "other"}, "has tokenizer 'words', but 'other' is needed: remove it"),
        ({"corpus": "other"}, "has corpus 'text', but 'other' is needed"),
        ({"seed": 4}, "has seed 0, but 4 is needed"),
        ({"teacher": tiny.model(SHAPE, seed=3)}, "has teacher"),
        ({"entries": 6}, "has entries 5, but 6 is needed"),
    ):
        with pytest.raises(InputError, match=words):
            kept(tmp_path, "top_k", **fields)
    batches, _ = kept(tmp_path, "top_k", batches=lambda step: tiny.batch(SHAPE.config(), seed=step + 5))
    with pytest.raises(InputError, match="was made for other text than that of step 0"):
        batches(0)
    where = context()
    with pytest.raises(InputError, match="has steps 2, but 3 is needed"):
        teacher_cache.batches_with(tmp_path / "top_k", where.teacher, where, 3, "top_k", 5)
    with pytest.raises(InputError, match="entries is 301, but must be from 1 to the vocabulary, 300"):
        kept(tmp_path, "sampled", entries=301)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"holds something that is no teacher's cache"):
        teacher_cache.batches_with(tmp_path / "mine", where.teacher, where, 2, "top_k", 5)
    for fields in ({"temperature": 2.0}, {"divergence": "reverse"}, {"hidden": 1.0}, {"attention": 1.0}):
        with pytest.raises(InputError, match="cache is 'full', which holds what forward KL at temperature 1 needs"):
            Distill(cache="full", **fields)
