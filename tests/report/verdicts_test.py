import dataclasses

from efflm.report import verdicts
from tests.report.example import TEN, row

DENSE = row("float32", 16.0, 1000, 100, None)


def said(found):
    return {verdict.heading: (verdict.name, verdict.words) for verdict in found}


def test_of_ten_models():
    found = said(verdicts.positive(TEN))
    name, words = found["Smallest, fastest prefill and fastest decode within 1% of the dense loss"]
    assert name == "shrink_distill_int8"
    assert "6.15× smaller" in words
    assert "decode 3.5× as fast" in words
    assert "+0.32% ± 0.10%" in words
    name, words = found["Smallest within 0.1% of the dense loss, standard error included"]
    assert name == "w8a16"
    assert "no difference beyond two standard errors" in words
    assert "prefill as fast, within the spread" in words
    against = {verdict.name: verdict.words for verdict in verdicts.negative(TEN)}
    assert against.keys() == {
        "w8a8", "magnitude50", "magnitude24", "magnitude50_trained", "student_scratch", "student_distilled"
    }  # fmt: skip
    assert against["magnitude50_trained"].startswith(
        "w8a16 is 2.56× smaller"
    )  # the student loses more than one error more
    assert against["w8a8"].startswith("w8a16 is 1.16× as fast in prefill and is 2.6× as fast in decode")


def test_nothing_smaller_or_faster():
    same = row("other", 16.0, 990, 101, 0.001)
    found = said(verdicts.positive([DENSE, same]))
    assert found.keys() == {"Smallest, fastest prefill and fastest decode: the dense model"}
    assert "smaller, faster in prefill or faster in decode than" in next(iter(found.values()))[1]
    assert verdicts.negative([DENSE, same]) == []  # no worse than the dense model, by the errors


def test_nothing_within_the_limit():
    found = verdicts.positive([DENSE, row("ruined", 4.0, 1000, 100, 0.5, 0.01), row("bad", 8.0, 1000, 100, 0.1, 0.01)])
    assert [verdict.name for verdict in found] == [""]
    assert "the nearest is bad, loss +5.00% ± 0.50%" in found[0].words


def test_an_error_that_reaches_over_the_limit_is_said():
    close = row("close", 4.0, 1000, 100, 0.018, 0.008)
    assert "two standard errors reach beyond the limit" in verdicts.positive([DENSE, close])[0].words


def test_a_model_that_nothing_beats_but_that_loses_too_much_is_not_worth_it():
    (ruined,) = verdicts.negative([DENSE, row("ruined", 4.0, 1000, 100, 0.5, 0.01)])
    assert ruined.words == "loss +25.00% ± 0.50%, more than 1%."


def test_a_single_document_has_no_error():
    one = dataclasses.replace(row("one", 4.0, 1000, 100, 0.001), bits_per_byte_over_dense_stderr=None)
    (smallest, _) = verdicts.positive([DENSE, one])
    assert "of one document, so without an error" in smallest.words


def test_equally_small_ones_are_named_and_the_better_one_wins():
    pair = [row("worse", 4.0, 1000, 100, 0.009), row("better", 4.02, 1000, 100, 0.001)]
    smallest = verdicts.positive([DENSE, *pair])[0]
    assert smallest.name == "better"
    assert smallest.words.endswith("As good at it: worse.")


def test_a_model_is_not_beaten_where_it_is_better_in_something():
    fast, small = row("fast", 16.0, 2000, 100, 0.0), row("small", 4.0, 1000, 100, 0.0)
    assert verdicts.negative([DENSE, fast, small]) == []
    slow = row("slow", 4.0, 500, 100, 0.0)
    (beaten,) = verdicts.negative([DENSE, fast, small, slow])
    assert (beaten.name, beaten.words) == ("slow", "small is 2.00× as fast in prefill.")


def test_a_model_that_is_larger_and_worse_than_the_dense_one_is_not_worth_it():
    (beaten,) = verdicts.negative([DENSE, row("worse", 20.0, 1000, 100, 0.1)])
    assert beaten.words == "float32 is 1.25× smaller and loses 0.1000 ± 0.0010 bits per byte less."
