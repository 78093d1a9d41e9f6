"""Figures for a paper or a talk: a folder with each chart and picture of a run as SVG and as PNG.

Files are named by the paper's figure, the metric and what is drawn: ``fig-8a--shape_bias.svg``. Models stand
side by side in a figure. ``captions.md`` says what each shows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from probekit.errors import StoreError
from probekit.names import slug
from probekit.reports.charts import clean
from probekit.reports.contents import place
from probekit.reports.curves import charts
from probekit.reports.figures import WIDE, caption, drawing_style, panel_figure
from probekit.reports.looks import INK, SERIES, Style, legend_name, styles
from probekit.reports.pictures import pictures
from probekit.reports.pictures_drawing import Sheet, blank, cloud_names, draw, groups, size
from probekit.reports.pictures_panels import Panel, Picture
from probekit.reports.placing import shortened
from probekit.store.sealing import write_bytes

if TYPE_CHECKING:
    from probekit.store.runfolder import Run

_FILES = (("svg", 144, ("Date", "Creator", "Format", "Type")), ("png", 216, ("Software",)))
"""Ending, dots per inch of pixels (letters are 12 or 13 points), what isn't said of the making."""

_TITLE, _GAP, _LEGEND = 22.0, 24.0, 18.0
_ABREAST = 3


def render(run: Run, path: Path) -> Path:
    """Write the folder `path` and return it. The same run gives the same bytes.

    Raises `StoreError` where there is nothing to draw, or a file can't be written.
    """
    folder, found = Path(path), []
    with drawing_style("path"):
        for order, name, figure, text in _figures(run):
            for kind, dpi, metadata in _FILES:
                data = io.BytesIO()
                figure.savefig(data, format=kind, dpi=dpi, metadata=dict.fromkeys(metadata))
                write_bytes(folder / f"{name}.{kind}", data.getvalue())
            found.append((order, name, " ".join(clean(text).split())))
    if not found:
        raise StoreError(
            f"'{run.path}' has no result to draw", hint="`probekit status` says what its cells lack"
        )
    lines = [f"- `{name}`: {text}\n" for _, name, text in sorted(found)]
    write_bytes(folder / "captions.md", "".join(lines).encode("utf-8"))
    return folder


def _figures(run: Run) -> Iterator[tuple[tuple, str, Figure, str]]:
    """Order, file name without ending, figure and caption."""
    looks, several = styles(run.models, run.untrained), len(run.datasets) > 1
    for chart in charts(run)[0]:
        for panel in chart.panels:
            # as high as its labels need, so that none goes without
            height = max(WIDE.height, 17.0 * (len(panel.curves) + len(panel.baselines)) + 140)
            figure = panel_figure(chart, panel, looks, replace(WIDE, height=height))
            on = panel.dataset if several else ""
            figure.patch.set(alpha=1, facecolor="white")
            said = caption(panel, chart.reduced, looks)
            text = f"{chart.label} over depth, on {panel.dataset}. {said}"
            yield place(chart.figure), _name(chart.figure, chart.metric, "", on), figure, text
    for picture in pictures(run)[0]:
        on = picture.dataset if several else ""
        what = "" if picture.variable == picture.metric else picture.variable
        text = f"{picture.title}, on {picture.dataset}. {picture.caption}"
        name = _name(picture.figure, picture.metric, what or "picture", on)
        yield place(picture.figure), name, _composed(picture, looks), text


def _name(*parts: str) -> str:
    """``fig-4--nmi--nmi_density``"""
    first, *others = parts
    first = first.lower().replace(".", "").replace(" ", "-")
    return "--".join(slug(part) for part in (first, *others) if part)


def _composed(picture: Picture, looks: Mapping[str, Style]) -> Figure:
    """All panels of a picture, three abreast, each with its model's name, above them what colours mean."""
    tiles = groups(picture)
    sizes = [size(panels) for panels in tiles]
    columns = min(_ABREAST, len(tiles))
    width = max(w for w, _ in sizes)
    heights = [
        max(h for _, h in sizes[start : start + columns]) + _TITLE + _GAP
        for start in range(0, len(tiles), columns)
    ]
    legend = _legend(picture, looks)
    top = _LEGEND * len(legend) + (8 if legend else 0)
    figure = blank(columns * (width + _GAP) - _GAP, sum(heights) + top)
    figure.patch.set(alpha=1, facecolor="white")
    _draw_legend(figure, legend)
    for number, panels in enumerate(tiles):
        row, column = divmod(number, columns)
        left, above = column * (width + _GAP), top + sum(heights[:row])
        whole = Sheet(figure, left, above, width, _TITLE)
        whole.text(
            4, _TITLE / 2, shortened(_title(picture, panels[0], looks), int(width / 7.5)), colour=INK, size=13
        )
        draw(Sheet(figure, left, above + _TITLE, *sizes[number]), picture, panels, looks)
    return figure


def _title(picture: Picture, panel: Panel, looks: Mapping[str, Style]) -> str:
    if picture.kind == "dots":
        return panel.layer
    beside = getattr(panel, "beside", "")
    return legend_name(panel.model, looks) + (f" with {legend_name(beside, looks)}" if beside else "")


def _legend(picture: Picture, looks: Mapping[str, Style]) -> list[tuple[str, str, str]]:
    """Colour, marker and name of what is told apart by colour."""
    if picture.kind == "dots":
        models = dict.fromkeys(panel.model for panel in picture.panels)
        return [(looks[model].colour, looks[model].marker, legend_name(model, looks)) for model in models]
    if picture.kind == "points":
        names = [name for name in cloud_names(picture) if name]
        return [(SERIES[n % len(SERIES)], "o", name) for n, name in enumerate(names)]
    return []


def _draw_legend(figure: Figure, legend: list[tuple[str, str, str]]) -> None:
    sheet = Sheet(figure, 0, 0, *(figure.get_size_inches() * 72))
    for number, (colour, marker, name) in enumerate(legend):
        y = 4 + _LEGEND * (number + 0.5)
        axes = sheet.picture(4, y - 6, 12, 12)
        axes.plot([0], [0], marker=marker, color=colour, markersize=6, linewidth=0)
        sheet.text(22, y, name, colour=INK)
