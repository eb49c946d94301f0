"""Models that were made smaller and then trained, beside the one they were made of."""

import dataclasses

from efflm.report import numbers
from efflm.report.table import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a chain: means over seeds.

    over_dense: bits per byte over the first model; deviation: its standard deviation over seeds; error: over documents,
    None of one.
    recovered: the share that training took away of the loss that what came before it had brought. tokens, seconds: of
    training. memory: bytes that it needed at most above what was held before. calibration: the expected calibration
    error (evaluate.confidence). prefill, decode: speed over the first model's.
    """

    name: str
    parameters: int
    bytes: int
    bits_per_byte: float
    over_dense: float | None = None
    error: float | None = 0.0
    deviation: float | None = None
    recovered: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    memory: int | None = None
    prefill: float | None = None
    decode: float | None = None
    calibration: float | None = None
    seeds: int = 1
    note: str = ""


def times(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}x"


COLUMNS = (
    Column("chain", lambda row: row.name),
    Column("parameters", lambda row: f"{row.parameters / 1e6:.2f} M", lambda row: row.parameters),
    Column("MB", lambda row: numbers.megabytes(row.bytes), lambda row: row.bytes),
    Column("bits/byte", lambda row: f"{row.bits_per_byte:.4f}", lambda row: row.bits_per_byte),
    Column(
        "over dense",
        lambda row: "reference" if row.over_dense is None else numbers.with_error(row.over_dense, row.error, sign=True),
        lambda row: row.over_dense or 0.0,
    ),
    Column(
        "s.d. of seeds", lambda row: "—" if row.deviation is None else f"{row.deviation:.4f}", lambda row: row.deviation
    ),
    Column(
        "recovered", lambda row: "—" if row.recovered is None else f"{row.recovered:.0%}", lambda row: row.recovered
    ),
    Column("tokens trained on", lambda row: f"{row.tokens:,}" if row.tokens else "—", lambda row: row.tokens),
    Column("seconds", lambda row: f"{row.seconds:.0f}" if row.seconds else "—", lambda row: row.seconds),
    Column(
        "MB to train", lambda row: numbers.megabytes(row.memory) if row.memory else "—", lambda row: row.memory or 0
    ),
    Column(
        "calibration error",
        lambda row: "—" if row.calibration is None else f"{row.calibration:.4f}",
        lambda row: row.calibration,
    ),
    Column("prefill", lambda row: times(row.prefill), lambda row: row.prefill),
    Column("decode", lambda row: times(row.decode), lambda row: row.decode),
)
