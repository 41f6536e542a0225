"""Times and rates with a unit of their size, and three digits that mean something."""

from __future__ import annotations

from moe_lens.numbers import decimal

_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def unit_of(ns: float) -> tuple[float, str]:
    """The unit in which a time is read best, and how many ns it has."""
    return next(((scale, unit) for scale, unit in _UNITS if ns >= scale), _UNITS[-1])


def digits(value: float) -> str:
    """Three digits that mean something."""
    return decimal(value, 0 if value >= 100 else 1 if value >= 10 else 2)


def rate(value: float, unit: str) -> tuple[str, str]:
    """A rate, and its unit with a prefix."""
    scale, prefix = next((p for p in _PREFIXES if value >= p[0]), _PREFIXES[-1])
    return digits(value / scale), prefix + unit


def in_unit(value: float, unit: str) -> str:
    """A rate in a unit that `rate` gave."""
    scale = next(scale for scale, prefix in _PREFIXES if unit.startswith(prefix))
    return digits(value / scale)
