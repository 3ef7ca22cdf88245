"""Figures and lists as people read them."""

from __future__ import annotations

import time
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """In the two largest units: 3 d 4 h, 2 h 05 min, 3 min 20 s, 45 s, 0.35 s."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min {whole % 60:02} s"
    return f"{whole} s" if seconds >= 10 else f"{seconds:.2g} s"


def now() -> str:
    """Such as 2026-11-26T18:30:00Z, whatever the machine's zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def either(names: Sequence[str]) -> str:
    """`a, b or c`; not empty."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
