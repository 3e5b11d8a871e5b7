"""Numbers for people."""

from __future__ import annotations


def si(value: float) -> str:
    """Three digits and a prefix, for a unit to follow: ``1.2 M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"


def duration(seconds: float) -> str:
    """A time: ``740 µs``."""
    if seconds == 0:
        return "0"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"
