import functools

import pytest

from efflm.evaluate.scoring import ROUNDED
from efflm.report import comparison, verdicts
from efflm.report.comparison import Comparison, Limits
from tests.report.example import ANSWERS, TEN, asked, likeness
from tests.report.example import row as any_row

row = functools.partial(any_row, first=(1000, 100))
DENSE = row("float32", 16.0, 1000, 100, None)


def positive(*rows, **limits):
    return verdicts.positive(Comparison(rows, Limits(**limits)))


def negative(*rows, **limits):
    return {each.name: each.words for each in verdicts.negative(Comparison(rows, Limits(**limits)))}


def said(found):
    return {verdict.heading: (verdict.name, verdict.words) for verdict in found}


def test_of_ten_models():
    found = said(positive(*TEN))
    name, words = found["Smallest, fastest prefill and fastest decode within 1% of the original's loss"]
    assert name == "shrink_distill_int8"
    assert "6.15× smaller" in words
    assert "decode 3.45× as fast" in words
    assert "+0.32% ± 0.10%" in words
    assert "divergence 0.250 ± 0.013 nats a token; the same likeliest token at 75.00% ± 0.10% of the tokens" in words
    name, words = found["Smallest within 0.1% of the original's loss, divergence and errors included"]
    assert name == "w8a16"
    assert "no difference beyond 3.7 standard errors" in words
    assert "prefill as fast, within the errors" in words
    name, words = found["Fastest decode within 1% of the original's loss, divergence included"]
    assert name == "bfloat16"
    assert "decode 1.60× as fast" in words
    against = negative(*TEN)
    assert against.keys() == {
        "w8a8", "magnitude50", "magnitude24", "magnitude50_trained", "student_scratch", "student_distilled"
    }  # fmt: skip
    assert against["magnitude50_trained"].startswith("w8a16 is 2.56× smaller")  # the student is worse in its likeness
    assert against["w8a8"].startswith("w8a16 is 1.16× as fast in prefill, is 2.63× as fast in decode and agrees with")


def test_nothing_smaller_or_faster():
    same = row("other", 16.0, 990, 101, 0.001, kl_to_original=0.0, kl_to_original_stderr=0.0, top1_agreement=1.0)
    found = said(positive(DENSE, same))
    assert found.keys() == {"Smallest, fastest prefill and fastest decode: the original"}
    assert "smaller, faster in prefill or faster in decode than" in next(iter(found.values()))[1]
    assert "divergence exactly 0 nats a token" in positive(DENSE, same.but(bytes=1))[0].words
    assert negative(DENSE, same) == {}  # no worse than the original, by the errors


def test_a_model_that_gains_nothing_and_says_something_else_is_not_worth_it():
    other = row("other", 16.0, 990, 101, 0.001, kl_to_original=0.02)
    assert negative(DENSE, other)["other"].startswith(
        "float32 is what this one diverges from, by 0.02000 ± 0.00020 nats a token"
    )


def test_nothing_within_the_limit():
    found = positive(DENSE, row("ruined", 4.0, 1000, 100, 0.5, 0.01), row("bad", 8.0, 1000, 100, 0.1, 0.01))
    assert [verdict.name for verdict in found] == [""]
    assert "the nearest is bad, loss +5.00% ± 0.50%; divergence 0.00100" in found[0].words


def test_an_error_that_reaches_over_the_limit_is_said():
    close = row("close", 4.0, 1000, 100, 0.018, 0.003)
    assert "no difference" not in positive(DENSE, close)[0].words
    assert "2.6 standard errors reach beyond the limit" in positive(DENSE, close)[0].words


def test_a_model_that_nothing_beats_but_that_loses_too_much_is_not_worth_it():
    ruined = row("ruined", 4.0, 1000, 100, 0.5, 0.01)
    assert negative(DENSE, ruined) == {"ruined": "loss +25.00% ± 0.50%, more than 1%."}
    assert negative(DENSE, ruined, loss=0.3) == {}


def test_the_limits_are_the_users():
    close = row("close", 4.0, 1000, 100, 0.018, 0.0001)
    assert "within 1% of" in positive(DENSE, close)[0].heading
    assert positive(DENSE, close, loss=0.005)[0].heading == "Within 0.5% of the original's loss"
    same = {
        each.heading: each.name for each in positive(DENSE, close, row("s", 8.0, 1000, 100, 0.003, 1e-4), same=2e-3)
    }
    assert same["Smallest within 0.2% of the original's loss, divergence and errors included"] == "s"


def test_a_single_document_has_no_error():
    one = row("one", 4.0, 1000, 100, 0.001, bits_per_byte_increase_stderr=None)
    smallest = positive(DENSE, one)[0]
    assert "of one document, so without an error" in smallest.words


def test_equally_small_ones_are_named_and_the_better_one_wins():
    pair = [row("worse", 4.0, 1000, 100, 0.009), row("better", 4.02, 1000, 100, 0.001)]
    smallest = positive(DENSE, *pair)[0]
    assert smallest.name == "better"
    assert smallest.words.endswith("As good at it: worse (worse in loss).")


def test_of_equally_small_ones_divergence_and_agreement_decide_too():
    likely = {"kl_to_original": 0.03, "top1_agreement": 0.95}
    pair = [row("other", 4.0, 1000, 100, 0.0010, **likely), row("close", 4.0, 1000, 100, 0.0011)]
    smallest = positive(DENSE, *pair)[0]
    assert smallest.name == "close"
    assert smallest.words.endswith("As good at it: other (worse in divergence and agreement).")
    assert [each.name for each in positive(DENSE, pair[0])] == ["other", "float32"]  # within 1%, but not unchanged
    likely["kl_to_original_stderr"] = 0.001
    assert [each.name for each in positive(DENSE, row("other", 2.0, 1000, 100, 0.0010, **likely), pair[1])] == [
        "other", "float32", "close"
    ]  # fmt: skip
    assert negative(DENSE, *pair)["other"] == (
        "close diverges from float32 by 0.02900 ± 0.00028 nats a token less and agrees with float32 on the likeliest "
        "token at 4.50% ± 0.14% more of the tokens."
    )


def test_a_model_is_not_beaten_where_it_is_better_in_something():
    fast, small = row("fast", 16.0, 2000, 100, 0.0), row("small", 4.0, 1000, 100, 0.0)
    assert negative(DENSE, fast, small) == {}
    slow = row("slow", 4.0, 500, 100, 0.0)
    assert negative(DENSE, fast, small, slow) == {"slow": "small is 2.00× as fast in prefill."}
    for better in ({"kl_to_original": 0.0005}, {"top1_agreement": 0.998}):
        assert negative(DENSE, fast, small, row("slow", 4.0, 500, 100, 0.0, **better)) == {}


def test_a_model_that_is_larger_and_worse_than_the_dense_one_is_not_worth_it():
    words = negative(DENSE, row("worse", 20.0, 1000, 100, 0.1))["worse"]
    assert words.startswith("float32 is 1.25× smaller, loses 0.1000 ± 0.0010 bits per byte less")


def test_a_loss_that_is_not_finite_is_worse_than_any():
    broken = row("broken", 4.0, 1000, 100, float("nan"), kl_to_original=float("nan"), top1_agreement=float("nan"))
    assert negative(DENSE, broken) == {"broken": "its loss is not finite."}
    small = row("small", 4.0, 1000, 100, 0.0)
    assert "has a finite loss" in negative(DENSE, broken, small)["broken"]
    assert negative(DENSE, broken, small).keys() == {"broken"}
    assert positive(DENSE, broken, small)[0].name == "small"
    assert "the nearest is broken" in positive(DENSE, broken)[0].words
    first = DENSE.but(bits_per_byte=float("nan"), perplexity=float("inf"))
    assert len(positive(first, broken)) == 1
    assert comparison.protocol(Comparison([first, broken])).startswith(
        "Verdicts: a difference of quality counts beyond 2.6"
    )


def with_answers(*rows, known=ANSWERS):
    return Comparison(asked(DENSE, *rows), Limits(), {}, {}, known)


def small(name, megabytes=4.0, **more):
    return row(name, megabytes, 1000, 100, 0.0001, 0.0001, **likeness(0.0001, 0.999), **more)


@pytest.mark.parametrize("known", [ANSWERS, {}])
def test_a_model_whose_answers_changed_is_not_called_unchanged(known):
    flips, same = small("flips"), small("same", 8.0)
    found = said(verdicts.positive(with_answers(flips, same, known=known)))
    where = "within 1% of the original's loss, no task's accuracy lower beyond chance"
    name, words = found[f"Smallest {where}"]
    assert name == "flips"
    assert "40 of 500 answers changed, 20 from right to wrong, 20 from wrong to right (float rounding alone" in words
    assert "arc: accuracy 0.0 points (95% interval -2.5 to +2.5; detectable from 3.6 on), flips +20/-20." in words
    where = "within 0.1% of the original's loss, divergence and errors included"
    where += ", no more answers changed than by float rounding"
    assert found[f"Smallest {where}"][0] == "same"
    assert [each.name for each in verdicts.positive(with_answers(flips, known=known))] == ["flips", "float32"]


def test_a_model_that_answers_fewer_items_is_not_worth_it():
    compared = with_answers(small("loses"), small("flips", 8.0))
    words = {each.name: each.words for each in verdicts.negative(compared)}
    interval = "95% interval -14.8 to -9.1; detectable from 4.4 on"
    assert words == {"loses": f"less accurate, beyond chance: arc: accuracy -12.0 points ({interval}), flips +0/-60."}
    assert verdicts.positive(compared)[0].name == "flips"
    assert verdicts.positive(with_answers(small("loses")))[0].words.startswith("No model: the nearest is loses")


def test_answers_are_compared_with_what_rounding_alone_changes():
    no_smaller = small("flips", 16.0)
    (verdict,) = verdicts.negative(with_answers(no_smaller))
    assert verdict.words == "float32 is what this one differs from in 40 of 500 answers to arc."
    assert verdicts.negative(with_answers(no_smaller, known=ANSWERS | {ROUNDED: ANSWERS["flips"]})) == []
    compared = with_answers(small("same"), small("flips"))
    assert {each.name: each.words for each in verdicts.negative(compared)} == {
        "flips": "same keeps float32's answers to 7.6 ± 1.2 points more of the items of arc."
    }
    compared = with_answers(small("same"), small("loses"))
    words = verdicts.negative(compared)[0].words  # of the answers no more than the accuracy
    assert words == "same is more accurate on arc by 12.0 ± 1.5 points."


def test_a_faster_model_whose_answers_changed_does_not_beat_the_other():
    pair = [row("flips", 4.0, 1000, 200, 0.0, **likeness(0.0001, 0.999)), row("same", 4.0, 1000, 100, 0.0)]
    pair[1] = pair[1].but(**likeness(0.0001, 0.999))
    assert verdicts.negative(with_answers(*pair)) == []
    assert negative(DENSE, *pair) == {"same": "flips is 2.00× as fast in decode."}


def test_the_divergence_of_rounding_alone_is_said_beside_that_of_a_model():
    noise = {"kl_to_original": 0.0003, "kl_to_original_stderr": 0.00002}
    words = positive(DENSE.but(noise=noise), small("small"))[0].words
    assert "0.00001 nats a token (float rounding alone: 0.00030 ± 0.00002); the same" in words
