"""Models that were made smaller and then trained, beside the one they were made of."""

from typing import Any

from efflm.report import numbers
from efflm.report.rows import Row
from efflm.report.swept import FOUR, TIMES
from efflm.report.table import figure

NONE = dict.fromkeys(("over_dense", "deviation", "recovered", "memory", "prefill", "decode", "calibration"))


def row(name: str, **figures: Any) -> Row:
    """What became of a chain: means over seeds.

    over_dense: bits per byte over the first model; deviation: its standard deviation over seeds; error: over documents,
    None of one. recovered: the share that training took away of the loss that what came before it had brought. tokens,
    seconds: of training. memory: bytes that it needed at most above what was held before. calibration: the expected
    calibration error (evaluate.confidence). prefill, decode: speed over the first model's.
    """
    return Row(name, {**NONE, "error": 0.0, "tokens": 0, "seconds": 0.0, "seeds": 1, **figures})


some = lambda form: lambda value: form(value) if value else "—"  # of what there is nothing of without training
COLUMNS = (
    figure("chain", "name", str),
    figure("parameters", "parameters", numbers.millions),
    figure("MB", "bytes", numbers.megabytes),
    figure("bits/byte", "bits_per_byte", FOUR),
    figure("over dense", "over_dense", numbers.signed, "error", "reference", 0.0),
    figure("s.d. of seeds", "deviation", FOUR),
    figure("recovered", "recovered", "{:.0%}".format),
    figure("tokens trained on", "tokens", some("{:,}".format)),
    figure("seconds", "seconds", some("{:.0f}".format)),
    figure("MB to train", "memory", some(numbers.megabytes), least=0.0),
    figure("calibration error", "calibration", FOUR),
    figure("prefill", "prefill", TIMES),
    figure("decode", "decode", TIMES),
)
