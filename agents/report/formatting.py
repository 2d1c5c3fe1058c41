"""Numbers as text for people."""

import math

from agents.report.values import as_float

MISSING = "–"
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


def format_number(value: object, digits: int = 3) -> str:
    """A number with the given significant digits; a dash if it is missing or not finite."""
    finite = as_float(value)
    if finite is None:
        return MISSING
    is_plain = finite.is_integer() or abs(finite) >= 10**digits
    return with_minus_sign(f"{finite:.0f}" if is_plain and abs(finite) < 1e6 else f"{finite:#.{digits}g}")


def format_signed(value: object) -> str:
    """A number with its sign; a dash if it is missing or not finite."""
    finite = as_float(value)
    if finite is None:
        return MISSING
    return with_minus_sign(f"{finite:+.3g}") if finite else "0"


def format_estimate(mean: float | None, stderr: float | None, percent: bool = False, sign: str = "") -> str:
    """A mean and its standard error, such as `1.234 ± 0.021`.

    The error has two significant digits, the mean as many decimals as the error. Without an error the mean has three
    significant digits.

    Args:
        mean: the mean; None gives a dash.
        stderr: its standard error.
        percent: whether to show both as percentages.
        sign: "+" shows the sign of a positive mean.
    """
    if mean is None:
        return MISSING
    mean, unit = (100 * mean, NO_BREAK_SPACE + "%") if percent else (mean, "")
    if not stderr or stderr < 0:
        return ("+" if sign and mean > 0 else "") + format_number(mean) + unit
    stderr = stderr * 100 if percent else stderr
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    form = f"z.{decimals}f" if decimals <= 6 else ".2g"  # many leading zeros are hard to read
    text = f"{mean:{sign}{form}} ± {stderr:{form}}"
    return with_minus_sign(text.replace(" ", NO_BREAK_SPACE)) + unit


def format_duration(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 05 s` or `2 h 07 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def with_minus_sign(text: str) -> str:
    """The text with the minus sign U+2212 instead of each hyphen."""
    return text.replace("-", "−")
