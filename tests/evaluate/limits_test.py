import numpy as np
import pytest
from scipy import stats

from efflm.evaluate import limits, probes, quality
from efflm.evaluate.limits import Targets


def made(rng, documents=9, targets=400):
    owners = np.sort(rng.integers(1, documents + 1, targets))
    fields = {"documents": owners, "targets": rng.integers(0, 50, targets), "bytes": rng.integers(1, 6, targets)}
    fields["positions"] = np.concatenate([np.arange(count) for count in np.bincount(owners)])
    one = lambda: {
        "bits": rng.gamma(2, 2, targets), "kl": rng.random(targets), "agreement": rng.random(targets) < 0.8,
        "right": rng.random(targets) < 0.5, "confidence": rng.random(targets),
    }  # fmt: skip
    return Targets(fields, {"first": one(), "second": one()})


def test_blocks_become_targets_whose_sums_are_the_qualities(rng):
    read = made(rng)
    cut = lambda part: (
        {k: v[part] for k, v in read.fields.items()},
        {n: {k: v[part] for k, v in f.items()} for n, f in read.found.items()},
    )
    found = limits.gathered([cut(slice(0, 100)), cut(slice(100, None))])
    own = found.quality("second")
    for document in range(1, 10):
        mine = read.fields["documents"] == document
        assert own.bits[document - 1] == pytest.approx(read.found["second"]["bits"][mine].sum())
        assert (own.tokens[document - 1], own.bytes[document - 1]) == (mine.sum(), read.fields["bytes"][mine].sum())


def test_what_a_group_has_is_its_mean_with_the_error_over_documents(rng):
    read, counts = made(rng), np.arange(50) * 30
    over = read.found["second"]["bits"] - read.found["first"]["bits"]
    found = limits.by_position(read, "second", "first")
    assert list(found) == ["0-15", "16-63"]
    mine = read.fields["positions"] < 16
    assert found["0-15"][0] == pytest.approx(over[mine].mean())
    sums = [
        (over[mine & (read.fields["documents"] == d)].sum(), (mine & (read.fields["documents"] == d)).sum())
        for d in range(1, 10)
    ]
    assert found["0-15"][1] == pytest.approx(quality.ratio(*map(np.array, zip(*sums)))[1])
    assert limits.by_position(read, "first", "first")["0-15"][0] == pytest.approx(
        read.found["first"]["bits"][mine].mean()
    )
    flips = limits.by_frequency(read, "second", counts)
    assert list(flips) == ["0", "10-99", "100-999", "1000+"]
    rare = (counts[read.fields["targets"]] >= 10) & (counts[read.fields["targets"]] < 100)
    assert flips["10-99"][0] == pytest.approx(1 - read.found["second"]["agreement"][rare].mean())


def test_the_calibration_error_is_that_of_the_text_and_its_error_that_of_resampled_documents(rng):
    read = made(rng)
    error = lambda name, part: quality.expected_error(*(read.found[name][f][part] for f in ("confidence", "right")))
    (value, spread), (over, _) = limits.calibration(read, "second", "first", times=2000)
    everything = np.arange(400)
    assert value == pytest.approx(error("second", everything))
    assert over == pytest.approx(error("second", everything) - error("first", everything))
    by_document = [np.flatnonzero(read.fields["documents"] == d) for d in range(1, 10)]
    drawn = [error("second", np.concatenate([by_document[i] for i in rng.integers(0, 9, 9)])) for _ in range(1000)]
    assert spread == pytest.approx(np.std(drawn), rel=0.1)
    assert limits.calibration(read, "first", "first")[1] is None


def test_ranks_are_spearman_s_with_ties(rng):
    one, other = rng.integers(0, 5, 12).tolist(), rng.integers(0, 5, 12).tolist()
    assert limits.rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert limits.rank_correlation([1, 1], [1, 2]) is None


def test_generated_tasks_have_one_right_answer_and_it_is_in_the_text_or_a_sum():
    tasks = {task.name: task for task in probes.tasks([" quixotic", " gossamer"], 20, seed=3)}
    assert list(tasks) == ["rare words", "digits", "sums", "names", "long-range copies"]
    for name, task in tasks.items():
        assert task.kind == "last word"
        for item in task.items:
            (answer,) = item.choices
            *_, last = item.context.splitlines()
            if name == "sums":
                a, b = map(int, last.removesuffix("=").split("+"))
                assert int(answer) == a + b
            else:
                assert item.context.count(answer) == 1, (name, item)
            assert answer[0] == " "
    assert len(tasks["long-range copies"].items[0].context.split()) > 190
    assert probes.tasks([], 2, seed=3)[0].name == "digits"
    assert probes.tasks([" a"], 3, seed=3) == probes.tasks([" a"], 3, seed=3) != probes.tasks([" a"], 3, seed=4)


def test_rare_words_are_the_words_of_one_token_that_come_least_often():
    class Words:
        decode = staticmethod(lambda ids: [" the", " rarest", "x1", " seldom", " ab", "Upper"][ids[0]])

    assert probes.rare_words(Words, np.array([90, 0, 0, 3, 0, 0]), 2) == [" rarest", " seldom"]
