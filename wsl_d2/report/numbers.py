"""Numbers as tables and sentences show them."""

from __future__ import annotations


def signed(value: float, sign: str = "+") -> str:
    """Returns "+1.2", "-0.3", or "0.0" where nothing else is left of it; without the plus for an empty ``sign``."""
    text = f"{value:{sign}.1f}"
    return "0.0" if float(text) == 0 else text


def with_interval(value: float, low: float, high: float) -> str:
    """Returns "+1.2 [+0.4, +2.0]", whose bracket does not break into lines."""
    return f"{signed(value)} [{signed(low)},\u00a0{signed(high)}]"


def mean_and_spread(mean: float, spread: float | None) -> str:
    """Returns "26.7 ± 0.4", or "26.7" without a spread, such as a standard deviation or half an interval's width."""
    return f"{mean:.1f}" + (f"\u00a0±\u00a0{spread:.1f}" if spread is not None else "")


def p_value(value: float | None) -> str:
    """Returns "0.034", "< 0.002", below which a thousand resamples tell nothing, or "" where there is none."""
    return "" if value is None or value != value else "< 0.002" if value < 0.002 else f"{value:.3f}"
