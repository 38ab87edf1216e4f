"""Numbers and counts in messages, tables and pages."""


def number(value: float) -> str:
    """Three significant digits: `0.0123`, `1.23e-05`, `12.3`, `1,234`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 05 min`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    )


def count(amount: int, noun: str, plural: str | None = None) -> str:
    """An amount and its noun: `1 step`, `1,234 steps`."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"
