"""How figures are written: no more digits than their error allows, thousands with commas, no negative zero. What is not
finite is written as inf and nan."""

import math

from efflm.config.written import size as size

MOST_DECIMALS = 5  # a bit per byte is not compared beyond
LARGE = 1e9  # from here on as powers of ten


def decimals(error: float, most: int = MOST_DECIMALS) -> int:
    """Digits after the point of a figure with this error: the error keeps two. Negative: that many zeros before it."""
    if not error or not math.isfinite(error):
        return most
    return min(most, 1 - math.floor(math.log10(abs(error))))


def fixed(value: float, places: int, sign: bool = False) -> str:
    """`value` rounded to so many places after the point, or before it where they are negative; zero has no sign."""
    rounded = round(value, places)
    if not math.isfinite(rounded):
        return str(rounded)
    if abs(rounded) >= LARGE:
        return f"{rounded:{'+' if sign else ''}.2e}"
    return f"{rounded or 0.0:{'+' if sign and rounded else ''},.{max(0, places)}f}"


def with_error(
    value: float, error: float | None, *, sign: bool = False, unknown: int = 4, most: int = MOST_DECIMALS
) -> tuple[str, str]:
    """A figure, and "± its error". With no error, as of a single document, it has `unknown` places and "" beside it."""
    if error is None or not math.isfinite(error):
        return fixed(value, unknown, sign), ""
    if value == error == 0:
        return "0", "exactly"
    places = decimals(max(abs(error), 10.0**-most), most)
    least = 10.0**-places
    small = f"± {fixed(error, places)}" if error >= least / 2 else f"± <{least:.{places}f}"
    return fixed(value, places, sign), small


def signed(value: float, error: float | None) -> tuple[str, str]:
    """A difference and its error."""
    return with_error(value, error, sign=True)


def perplexity(value: float, error: float | None) -> tuple[str, str]:
    """One beyond the largest number is said to be that."""
    if value == math.inf:
        return "> 1e308", ""
    return with_error(value, error, unknown=2, most=3)


def percent(value: float, error: float | None, *, sign: bool = False, most: int = 2) -> tuple[str, str]:
    """A share and its error in percent."""
    shown, spread = with_error(100 * value, None if error is None else 100 * error, sign=sign, unknown=1, most=most)
    return f"{shown}%", f"{spread}%" if spread.startswith("±") else spread


def with_range(median: float, bounds: tuple[float, float]) -> tuple[str, str]:
    """A median, and "(its quartiles)", to the first digit in which they differ."""
    places = decimals((bounds[1] - bounds[0]) / 2, 3 if median < 10 else 1) - 1
    return fixed(median, places), f"({fixed(bounds[0], places)}–{fixed(bounds[1], places)})"


def ratio(value: float, spread: float = 0.0) -> str:
    """How many times, to the first digit of its error; spread: its relative error, 0 where it is exact."""
    places = max(0, min(2 if value < 10 else 1, decimals(value * spread, 3) - 1))
    return f"{fixed(value, places)}×"


def times(value: float, error: float | None) -> tuple[str, str]:
    """How many times, and the error of that."""
    shown, beside = with_error(value, error, unknown=2, most=2)
    return f"{shown}×", "" if beside == "exactly" else beside


def megabytes(count: float) -> str:
    """Bytes in MB: three digits or two places, whatever is more."""
    return fixed(count / 1e6, 2 if count < 1e8 else 1 if count < 1e9 else 0)


def millions(count: float) -> str:
    return f"{fixed(count / 1e6, 2)} M"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def three_digits(value: float) -> str:
    return fixed(value, max(0, 2 - math.floor(math.log10(value))) if value else 0)
