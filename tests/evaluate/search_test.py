"""The search on made-up models, of which it is known how much they lose and how much that varies over documents."""

import json

import numpy as np
import pytest

from efflm.evaluate.acceptance import CHANCE
from efflm.evaluate.quality import Quality
from efflm.evaluate.search import FINALISTS, FIRST, UNSEEN, Search, between

PARTS = {"0": 8, "1": 8, "2": 16, UNSEEN: 40}  # documents of each text


def texts(seed=0):
    """Bits of the first model for each document: some are much longer than others."""
    rng = np.random.default_rng(seed)
    return {text: rng.gamma(2.0, 200.0, count) for text, count in PARTS.items()}


def searched(true, costs, rng, allowed=0.02, state=None, measured=None, most=np.inf, spread=0.02, halve=True, seed=0):
    """A search over models {name: the share by which they lose, or {text: share}}; it is given the costs."""
    base = texts(seed)

    def measure(name, text):
        if measured is not None:
            measured.append((name, text))
        lost = true.get(name, 0.0)
        lost = lost.get(text, lost["selection"]) if isinstance(lost, dict) else lost
        noise = rng.normal(0, spread, len(base[text])) if name != FIRST else 0.0
        bits = base[text] * (1 + lost + noise)
        return Quality(bits, base[text], base[text], base[text], base[text])

    state = {"sums": {}, "tests": []} if state is None else state
    found = Search(
        parts=3, allowed=allowed, most=most, sums=state["sums"], costs=dict(costs), tests=state["tests"],
        measure=measure, say=lambda name: None, kept=lambda: None,
    )  # fmt: skip
    for text in PARTS:
        found.read(FIRST, text)
    if halve:
        found.halve(list(costs))
        list(found.accept())
    return found


def test_the_smallest_that_keeps_to_the_loss_is_found_and_half_of_the_others_read_little(rng):
    true = {f"m{i}": 0.004 * i for i in range(16)}
    costs = {name: 16.0 - i for i, name in enumerate(true)}
    measured = []
    found = searched(true, costs, rng, measured=measured, spread=0.005)
    assert 2 <= int(found.best["name"][1:]) <= 4  # m5 loses just what is allowed
    read = [sum(text == each and name != FIRST for name, text in measured) for each in PARTS]
    assert read[0] == 16
    assert read[1] <= 8
    assert read[2] <= 4
    assert read[3] <= FINALISTS
    assert found.best["bound"] <= 0.02


def test_models_that_lose_just_more_than_allowed_are_accepted_as_seldom_as_promised():
    """Several at the limit, of different sizes, so that each is worth a test."""
    wrong, times = 0, 300
    for seed in range(times):
        rng = np.random.default_rng(seed)
        costs = {f"m{i}": float(i) for i in range(6)}
        # Chosen to look good: on the selection text they do not lose at all.
        true = {name: {"selection": 0.0, UNSEEN: 0.02} for name in costs}
        wrong += searched(true, costs, rng, spread=0.05, seed=seed).best is not None
    assert wrong / times <= CHANCE + 3 * np.sqrt(CHANCE * (1 - CHANCE) / times)
    assert wrong > 0  # not because nothing is ever accepted


def test_one_that_knows_the_selection_text_by_heart_is_refused_and_does_not_bar_the_others(rng):
    true = {"learned": {"selection": -0.5, UNSEEN: 0.4}, "good": 0.0, "larger": 0.004}
    found = searched(true, {"learned": 1.0, "good": 2.0, "larger": 3.0}, rng)
    assert (found.tests[0]["name"], found.tests[0]["accepted"]) == ("learned", False)
    assert found.best["name"] == "good"
    assert (found.tests[-1]["name"], found.tests[-1]["bound"]) == ("larger", None)  # it would be of no use


def test_what_was_measured_is_not_measured_again_and_other_limits_have_tests_of_their_own(rng):
    true, costs, state = {"a": 0.0, "b": 0.01, "c": 0.2}, {"a": 3.0, "b": 2.0, "c": 1.0}, {"sums": {}, "tests": []}
    first = searched(true, costs, rng, state=state, spread=0.002)
    kept, measured = json.loads(json.dumps(state)), []
    again = searched(true, costs, rng, state=kept, measured=measured, spread=0.002)
    assert measured == []
    assert again.best == json.loads(json.dumps(first.best))
    looser = searched(true, costs, rng, allowed=0.3, state=kept | {"tests": []}, measured=measured, spread=0.002)
    assert looser.best["name"] == "c"
    assert {name for name, _ in measured} == {"c"}  # which was not given all texts before


def test_an_interrupted_search_goes_on(rng):
    true, costs, state = {"a": 0.0, "b": 0.0}, {"a": 2.0, "b": 1.0}, {"sums": {}, "tests": []}

    class Stopping(list):
        def append(self, each):
            super().append(each)
            if len(self) == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(true, costs, rng, state=state, measured=Stopping())
    done, measured = sum(map(len, state["sums"].values())), []
    assert done == 6
    found = searched(true, costs, rng, state=state, measured=measured)
    assert len(measured) <= 4 + 2 * 4 - done
    assert found.best["name"] == "b"


def test_within_a_number_of_bytes_the_least_loss_is_wanted_and_all_bounds_hold_together(rng):
    true, costs = {"a": 0.0, "b": 0.05, "c": 0.02, "d": 0.3}, {"a": 9.0, "b": 3.0, "c": 4.0, "d": 1.0}
    found = searched({**true}, costs, rng, allowed=np.inf, most=5.0, spread=0.005, halve=False)
    found.halve(["a", "b", "c", "d"])  # a for another claim, perhaps: it takes too much
    list(found.accept())
    assert found.best["name"] == "c"
    assert [test["level"] for test in found.tests] == pytest.approx([CHANCE / 2, CHANCE / 6])


def test_settings_between_a_good_one_and_a_bad_one():
    good = {"mixed@4": False, "mixed@6": True, "w@0.2,x@0.5": True, "w@0.4,x@0.5": False, "w@0.4,x@0.9": False}
    good |= {"magnitude@2:4": True, "magnitude@4:8": False, "w8a16": True, "near@0.50": True, "near@0.51": False}
    assert between(list(good), good.get) == ["mixed@5", "w@0.3,x@0.5"]


def test_with_tasks_the_answers_must_hold_too(rng):
    asked = []
    found = searched({"a": 0.0, "b": 0.0, "c": 0.5}, {"a": 3.0, "b": 2.0, "c": 1.0}, rng, spread=0.002, halve=False)
    found.flips, found.allowed_flips = lambda name: asked.append(name) or ((0, 400) if name == "a" else (40, 400)), 0.05
    found.halve(["a", "b", "c"])
    tests = {test["name"]: test for test in found.accept()}
    assert found.best["name"] == "a"
    assert tests["b"]["bound"] <= 0.02
    assert (tests["b"]["accepted"], tests["b"]["flips"]) == (False, (40, 400))
    assert sorted(asked) == ["a", "b"]  # the one that loses too much is not asked
