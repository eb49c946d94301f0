import numpy as np
import pytest

from efflm.evaluate import quality
from efflm.evaluate.quality import Quality
from tests import reference, tiny


def log_softmax(x):
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


@pytest.mark.parametrize("logits", [quality.LOGITS, 5 * 300])
def test_sums_by_document_equal_float64(logits, monkeypatch):
    monkeypatch.setattr(quality, "LOGITS", logits)  # held at a time: all of them, or those of five tokens
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    rows = tiny.batch(model.config, rows=3, length=12)
    rows["segments"] = np.where(rows["segments"] > 0, rows["segments"] + 2 * np.arange(3)[:, None], 0)
    rows["segments"] = rows["documents"] = rows["segments"].astype(np.int32)
    rows["bytes"] = rows["targets"] % 5
    blocks = [{name: array[start : start + 2] for name, array in rows.items()} for start in (0, 2)]
    got = quality.measure({"a": other, "same": model}, blocks, reference=model)
    for document in range(1, 7):
        r, mine = (document - 1) // 2, rows["segments"] == document
        tokens, targets = rows["inputs"][mine], rows["targets"][mine]
        q = log_softmax(reference.forward(other.config, other.params, tokens))
        p = log_softmax(reference.forward(model.config, model.params, tokens))
        assert np.all(mine[[i for i in range(3) if i != r]] == 0)
        expected = {
            "bits": -q[np.arange(len(targets)), targets].sum() / np.log(2),
            "bytes": (targets % 5).sum(),
            "tokens": len(targets),
            "kl": (np.exp(p) * (p - q)).sum(),
            "agreement": (p.argmax(-1) == q.argmax(-1)).sum(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(got["a"], name)[document - 1], value, rtol=1e-3, err_msg=name)
    assert quality.divergence(got["same"]) == (0.0, 0.0)
    assert quality.agreement(got["same"]) == (1.0, 0.0)
    assert 0 <= quality.agreement(got["a"])[0] < 0.5


def test_the_reference_reads_and_unembeds_a_text_once_for_all_models(monkeypatch):
    model, calls = tiny.model(seed=0), []
    counted = lambda name, fn: lambda *args: calls.append((name, args[0])) or fn(*args)
    for name in ("states", "_expected"):
        monkeypatch.setattr(quality, name, counted(name, getattr(quality, name)))
    rows = tiny.batch(model.config, rows=2, length=12)
    rows |= {"documents": rows["segments"].astype(np.int32), "bytes": rows["targets"] % 5}
    others = {str(seed): tiny.model(seed=seed) for seed in (1, 2, 3)}
    quality.measure(others | {"same": model}, [rows], reference=model)
    assert [name for name, _ in calls].count("_expected") == 1
    assert sum(name == "states" and read is model for name, read in calls) == 1


def of(bits, sizes):
    bits, sizes = np.asarray(bits, float), np.asarray(sizes, float)
    return Quality(bits, sizes, sizes, sizes, sizes)


def test_the_ratio_and_its_error(rng):
    assert quality.bits_per_byte(of([2, 4, 6], [1, 2, 3])) == (2.0, 0.0)  # all alike: no error
    means, errors = [], []
    for _ in range(400):
        sizes = rng.integers(50, 150, 40)
        means.append(quality.bits_per_byte(of(sizes * rng.normal(2.0, 0.3, 40), sizes))[0])
        errors.append(quality.bits_per_byte(of(sizes * rng.normal(2.0, 0.3, 40), sizes))[1])
    np.testing.assert_allclose(np.mean(errors), np.std(means), rtol=0.1)


def test_a_perplexity_beyond_the_largest_number_is_infinite():
    assert quality.perplexity(of([1020.0 * 9, 1020.0 * 11], [9, 11])) == (pytest.approx(2.0**1020), 0.0)
    assert quality.perplexity(of([1030.0 * 9, 1030.0 * 11], [9, 11])) == (np.inf, None)


def test_differences_of_several_seeds_are_paired_and_of_one_document_have_no_error(rng):
    before, made = of([2, 4, 9], [1, 2, 3]), [of([2, 5, 9], [1, 2, 3]), of([3, 4, 12], [1, 2, 3])]
    pairs = [quality.paired_difference(each, before) for each in made]
    mean, error, deviation = quality.mean_difference(made, before)
    assert (mean, error) == (pytest.approx(2.5 / 6), pytest.approx((pairs[0][1] + pairs[1][1]) / 2))
    assert deviation == pytest.approx(3 / 6 / 2**0.5)
    assert quality.mean_difference([of([3], [1])], of([2], [1])) == (1.0, None, None)


def test_the_deviation_over_seeds():
    assert quality.deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    assert quality.deviation([1.0]) is None
    assert quality.deviation([1.0, np.inf]) is None


def test_of_one_document_there_is_no_error():
    one = of([2], [1])
    assert quality.bits_per_byte(one) == (2.0, None)
    assert quality.perplexity(one) == (4.0, None)
    assert quality.paired_difference(one, one) == (0.0, None)
    assert quality.words(quality.bits_per_byte(one)) == "2.0000 (one document: no error bar)"
    assert quality.words((2.0, 0.5), "+.1f") == "+2.0 ± 0.5"


def test_pairing_cancels_what_both_find_hard(rng):
    sizes = np.full(50, 100.0)
    hard = rng.normal(200, 50, 50)
    first, second = of(hard - 10, sizes), of(hard, sizes)
    difference, error = quality.paired_difference(first, second)
    np.testing.assert_allclose(difference, -0.1)
    assert error < 1e-9 < quality.bits_per_byte(first)[1]
