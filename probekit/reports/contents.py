"""In what order a report shows metrics: that of the paper's figures."""

from __future__ import annotations

import re
from collections.abc import Iterable

from probekit.reports.charts import Chart

_FIGURE = re.compile(r"(?:(?P<appendix>[A-Z])\.)?(?P<number>\d+)(?P<part>[a-z]?)")


def ordered(charts: Iterable[Chart]) -> list[Chart]:
    """By figure: ``Fig. 3``, ``Fig. 8a``, ``Fig. E.2``, then what has none; otherwise in the order given."""
    return sorted(charts, key=lambda chart: place(chart.figure))


def place(figure: str) -> tuple[int, str, int, str]:
    """A key to sort figures of a paper: main text, appendices, none."""
    found = _FIGURE.search(figure)
    if not found:
        return 2, "", 0, figure
    appendix = found["appendix"] or ""
    return int(bool(appendix)), appendix, int(found["number"]), found["part"]
