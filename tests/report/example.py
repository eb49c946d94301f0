"""Rows of a comparison as the tests need them."""

import dataclasses

import numpy as np

from efflm.evaluate.answers import Answers
from efflm.evaluate.scoring import ROUNDED
from efflm.report import rows

ROW = rows.Row("w8a16", note="<b>bold & free</b>", figures=dict(  # noqa: C408
    precision="float32", parameters=4_000_000, nonzeros=3_990_000, bytes=4_070_000, bits_a_weight=8.14,
    component_bytes={"embedding": 1_000_000, "feedforward": 3_000_000},
    prefill_tokens_per_second=14000.0,
    prefill_spread=(13000.0, 15000.0), decode_tokens_per_second=1400.0, decode_spread=(1300.0, 1500.0),
    prefill_speedup=1.0, prefill_speedup_stderr=0.02, decode_speedup=3.5, decode_speedup_stderr=0.02,
    bits_per_byte=2.2, bits_per_byte_stderr=0.07, bits_per_byte_increase=0.001,
    bits_per_byte_increase_stderr=0.0005, perplexity=12.5, perplexity_stderr=0.25,
    kl_to_original=0.001, kl_to_original_stderr=0.0002, top1_agreement=0.995, top1_agreement_stderr=0.001,
))  # fmt: skip
OVER = ("bits_per_byte_increase", "kl_to_original", "top1_agreement", "prefill_speedup", "decode_speedup")
NONE = dict.fromkeys(f"{name}{end}" for name in OVER for end in ("", "_stderr"))


def row(
    name: str, megabytes: float, prefill: float, decode: float, over: float | None, error: float = 0.001,
    first: tuple[float, float] = (14000, 400), **more,
) -> rows.Row:  # fmt: skip
    """A model with these figures, its speeds known to 1%; over is None for the first one, whose speeds are `first`."""
    bits = 2.0 + (over or 0.0)
    ratios = {"prefill_speedup": prefill / first[0], "decode_speedup": decode / first[1]}
    ratios |= {f"{name}_stderr": 0.01 * ratio for name, ratio in ratios.items()}
    figures = {"bits_per_byte_increase": over, "bits_per_byte_increase_stderr": error, **ratios, **more}
    figures = NONE if over is None else figures
    return dataclasses.replace(ROW, name=name, note=f"what {name} is").but(
        bytes=int(megabytes * 1e6), bits_per_byte=bits,
        prefill_tokens_per_second=prefill, prefill_spread=(0.97 * prefill, 1.03 * prefill),
        decode_tokens_per_second=decode, decode_spread=(0.97 * decode, 1.03 * decode), **figures,
    )  # fmt: skip


def likeness(divergence: float, agreement: float) -> dict[str, float]:
    return {"kl_to_original": divergence, "kl_to_original_stderr": 0.05 * divergence, "top1_agreement": agreement}


def answered(chosen: list[int], kl: float = 0.0) -> Answers:
    """To a task of three choices an item, of which the first is right: these, each with a probability of 0.8."""
    picked = np.eye(3)[chosen] > 0
    size = np.full(picked.shape, 2)
    sure, right = np.full(len(picked), 0.8), picked[:, 0]
    loglikelihoods = np.log(np.where(picked, 0.8, 0.1))
    return Answers(
        "choices", loglikelihoods, size, size, picked, np.full(len(picked), kl), sure, right, np.zeros(len(picked), int)
    )


# Of 500 items the original has 300 right. Rounding changes 2 of its answers; "flips" has as many right, but others;
# "loses" has 60 fewer.
DENSE = [0] * 300 + [1] * 200
ARC = {
    "float32": DENSE,
    ROUNDED: [1] + [0] * 299 + [2] + [1] * 199,
    "same": [0] * 300 + [2, 2] + [1] * 198,
    "flips": [1] * 20 + [0] * 300 + [1] * 180,
    "loses": [1] * 60 + [0] * 240 + [1] * 200,
}
ANSWERS = {name: {"arc": answered(chosen, 0.0 if name == "float32" else 0.02)} for name, chosen in ARC.items()}


def asked(*models: rows.Row) -> list[rows.Row]:
    """The rows with what ANSWERS say of them; the first is the original's."""
    return [each.but(tasks=rows.tasks(ANSWERS, each.name, models[0].name)) for each in models]


TEN = [
    row("float32", 16.0, 14000, 400, None),
    row("bfloat16", 8.0, 10000, 640, -0.00001, 0.00002, **likeness(0.00001, 0.998)),
    row("w8a16", 4.1, 13900, 395, 0.00001, 0.00002, **likeness(0.0004, 0.992)),
    row("w8a8", 4.1, 12000, 150, 0.0001, 0.00005, **likeness(0.0012, 0.986)),
    row("magnitude50", 10.5, 14100, 398, 0.005, 0.0005, **likeness(0.03, 0.93)),
    row("magnitude24", 10.5, 13900, 401, 0.013, 0.0007, **likeness(0.05, 0.91)),
    row("magnitude50_trained", 10.5, 14000, 399, 0.0015, 0.0004, **likeness(0.03, 0.93)),
    row("student_scratch", 10.1, 27000, 1400, 0.53, 0.01, **likeness(0.6, 0.6)),
    row("student_distilled", 10.1, 27500, 1410, 0.34, 0.01, **likeness(0.4, 0.68)),
    row("shrink_distill_int8", 2.6, 27100, 1380, 0.0064, 0.002, **likeness(0.25, 0.75)),
]
