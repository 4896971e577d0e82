"""Numbers, sizes and times as a report says them."""

import math


def format_number(value: float | None, form: str | None = None) -> str:
    """A number in as few digits as its size asks for, or in `form`; '-' for one that is not known."""
    if value is None or math.isnan(value):
        return "-"
    return format(value, form or (".3g" if abs(value) < 0.01 else ".4f" if abs(value) < 100 else ",.1f"))


def format_size(count: float | None) -> str | None:
    """Bytes, kB, MB or GB; None stays None."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000


def format_duration(seconds: float | None) -> str | None:
    """Seconds, minutes or hours; None stays None."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{seconds / 60:.1f} min"
