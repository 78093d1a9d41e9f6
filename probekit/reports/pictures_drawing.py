"""Pictures as inline SVG, drawn by matplotlib without pyplot. The same panel gives the same text.

Heat maps, small images and many points are PNG inside of the SVG. Places are px; y counts from above.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from probekit.reports.charts import clean
from probekit.reports.figures import drawing_style
from probekit.reports.looks import HAIRLINE, INK, MUTED, SERIES, Style, embedded, legend_name
from probekit.reports.pictures_panels import (
    Block,
    Dots,
    Maps,
    Matrix,
    Panel,
    Picture,
    Points,
    Profile,
    Scatter,
)
from probekit.reports.placing import shortened, tick_room

WIDTH = 400.0
_FONT, _GLYPH, _LINE = 12.0, 7.0, 18.0
_CROWD = 500
"""Points of a panel beyond which they are pixels."""


def groups(picture: Picture) -> list[list[Panel]]:
    """The panels of each figure: one each, all in one where models stand side by side on one axis."""
    return [picture.panels] if picture.kind == "dots" else [[panel] for panel in picture.panels]


def size(panels: Sequence[Panel]) -> tuple[float, float]:
    """Width and height of a figure."""
    first = panels[0]
    if isinstance(first, Profile):
        return WIDTH, 320.0
    if isinstance(first, Matrix):
        side = WIDTH - 128
        return WIDTH, 62 + max(80.0, min(2 * side, side * len(first.rows) / max(1, len(first.columns))))
    if isinstance(first, Dots):
        return WIDTH, 50 + _row_height(panels) * len(_categories(panels))
    if isinstance(first, Points):
        return WIDTH, sum(_scatter_height(scatter) for scatter in first.scatters) + 4
    return WIDTH, sum(_block_height(block) for block in first.blocks) + 2


def describe(picture: Picture, panels: Sequence[Panel], looks: Mapping[str, Style]) -> str:
    """A figure in a sentence or two, for those who don't see it."""
    kinds = {
        "profile": "Lines over",
        "matrix": "Heat map over",
        "dots": "Dots over",
        "points": "Points in the plane",
        "maps": "Small images",
    }
    names = ", ".join(legend_name(panel.model, looks) for panel in panels)
    over = f" {picture.across}" if picture.across else ""
    beside = getattr(panels[0], "beside", "")
    with_it = f" with {legend_name(beside, looks)}" if beside else ""
    return (
        f"{kinds[picture.kind]}{over}: {picture.title} of {names}{with_it} on {picture.dataset}. "
        f"{picture.caption}"
    )


def picture_svg(picture: Picture, panels: Sequence[Panel], looks: Mapping[str, Style], key: str) -> str:
    """The panels of one figure as an ``<svg>`` element. key: prefix of the ids in it, unique on a page."""
    with drawing_style():
        width, height = size(panels)
        figure = blank(width, height)
        draw(Sheet(figure, 0, 0, width, height), picture, panels, looks)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, dpi=144)
    return embedded(text.getvalue(), key, describe(picture, panels, looks), "picture")


def blank(width: float, height: float) -> Figure:
    """A figure of this size in px, without a ground."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    return figure


class Sheet:
    """A rectangle of a figure to draw on."""

    def __init__(self, figure: Figure, left: float, top: float, width: float, height: float):
        self.figure, self.left, self.top, self.width, self.height = figure, left, top, width, height
        self.whole = figure.get_size_inches() * 72
        self.px = Affine2D().scale(1 / 72) + figure.dpi_scale_trans

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        axes = self.figure.add_axes(self._box(left, top, width, height))
        axes.patch.set_alpha(0)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.tick_params(axis="x", colors=MUTED, labelsize=_FONT, length=3)
        axes.tick_params(axis="y", colors=MUTED, labelsize=_FONT, length=0)
        axes.set_axisbelow(True)
        return axes

    def picture(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes for pixels, without a frame."""
        axes = self.figure.add_axes(self._box(left, top, width, height))
        axes.set_axis_off()
        return axes

    def _box(self, left: float, top: float, width: float, height: float) -> tuple[float, ...]:
        across, up = self.whole
        bottom = up - self.top - top - height
        return (self.left + left) / across, bottom / up, width / across, height / up

    def text(
        self, x: float, y: float, text: str, ha="left", va="center", colour=MUTED, size=_FONT, turn=0
    ) -> None:
        """Text that is never a formula."""
        self.figure.text(
            self.left + x,
            self.whole[1] - self.top - y,
            clean(text),
            transform=self.px,
            ha=ha,
            va=va,
            color=colour,
            fontsize=size,
            rotation=turn,
            parse_math=False,
        )


def draw(sheet: Sheet, picture: Picture, panels: Sequence[Panel], looks: Mapping[str, Style]) -> None:
    """The panels of one figure."""
    _DRAWERS[picture.kind](sheet, picture, panels, looks)


# --- one kind each


def _profile(sheet: Sheet, picture: Picture, panels: Sequence[Profile], looks: Mapping[str, Style]) -> None:
    (panel,) = panels
    everything = [line for p in picture.panels for line in p.lines if len(line.x)]
    across, up = (
        _room([v for side in sides for v in (side.min(), side.max())])
        for sides in ([line.x for line in everything], [line.y for line in everything])
    )
    left = max(50.0, 24 + tick_room(up, 6))
    width = sheet.width - left - 12
    axes = sheet.axes(left, 30, width, sheet.height - 76)
    axes.set(xlim=across, ylim=up)
    depths = [line.depth for line in panel.lines]
    for line in panel.lines:
        dashes = (4.0, 2.0) if line.part in panel.second else (None, None)
        mark = {"marker": "o", "markersize": 3} if len(line.x) < 2 else {}
        colour = _depth_colour(line.depth, depths)
        axes.plot(line.x, line.y, color=colour, linewidth=1.3, dashes=dashes, **mark)
    axes.grid(axis="y", color=HAIRLINE, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.ticklabel_format(useOffset=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.offsetText.set(fontsize=_FONT, color=MUTED, parse_math=False)
    sheet.text(left + width / 2, sheet.height - 10, shortened(picture.across, 45), "center", colour=INK)
    middle, name = 30 + (sheet.height - 76) / 2, picture.up
    if len(name) > 38 and picture.units:
        name = name.removesuffix(f" ({picture.units})")  # the title says it
    sheet.text(12, middle, shortened(name, 38), "center", colour=INK, turn=90)
    _depth_key(sheet, depths)


def _matrix(sheet: Sheet, picture: Picture, panels: Sequence[Matrix], looks: Mapping[str, Style]) -> None:
    (panel,) = panels
    values = np.concatenate([p.values.ravel() for p in picture.panels])
    low, high = (float(end(values)) for end in (np.nanmin, np.nanmax))
    if low == high:
        low, high = low - 0.5, high + 0.5
    width, height = sheet.width - 128, sheet.height - 62
    axes = sheet.axes(54, 10, width, height)
    options = {"aspect": "auto", "interpolation": "none", "origin": "lower"}
    axes.imshow(panel.values, cmap=_nothing("viridis"), vmin=low, vmax=high, **options)
    axes.spines["bottom"].set_visible(False)
    for places, setting in ((panel.columns, axes.set_xticks), (panel.rows, axes.set_yticks)):
        shown = _ticks(places)
        setting(shown, [f"{places[number]:g}" for number in shown])
    sheet.text(54 + width / 2, sheet.height - 10, picture.across, "center", colour=INK)
    sheet.text(12, 10 + height / 2, picture.up, "center", colour=INK, turn=90)
    bar = sheet.axes(54 + width + 16, 10, 12, height)
    bar.imshow(np.linspace(0, 1, 128)[:, None], extent=(0, 1, low, high), cmap="viridis", **options)
    bar.spines["bottom"].set_visible(False)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.tick_params(axis="y", length=0)
    bar.yaxis.set_major_locator(MaxNLocator(nbins=5))
    bar.ticklabel_format(axis="y", useOffset=False)


def _dots(sheet: Sheet, picture: Picture, panels: Sequence[Dots], looks: Mapping[str, Style]) -> None:
    names, step = _categories(panels), _row_height(panels)
    place = {name: number for number, name in enumerate(names)}
    left, height = 128, step * len(names)
    axes = sheet.axes(left, 6, sheet.width - left - 16, height)
    ends = [v for p in panels for v in (*p.values, *p.low, *p.high, p.line) if np.isfinite(v)]
    axes.set_xlim(*_room(ends))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="x", color=HAIRLINE, linewidth=1)
    for number, panel in enumerate(panels):
        look = looks[panel.model]
        y = np.array([place[name] for name in panel.categories]) + _offset(number, len(panels))
        known = np.isfinite(panel.low) & np.isfinite(panel.high)
        axes.hlines(y[known], panel.low[known], panel.high[known], color=look.colour, alpha=0.35, linewidth=2)
        axes.plot(panel.values, y, linewidth=0, marker=look.marker, markersize=5.5, color=look.colour)
        if np.isfinite(panel.line):
            axes.axvline(panel.line, color=look.colour, linewidth=1.4, dashes=look.dashes, zorder=1)
    for name, number in place.items():
        sheet.text(left - 8, 6 + step * (number + 0.5), shortened(name, 15), "right", colour=INK)
    sheet.text(left + (sheet.width - left - 16) / 2, sheet.height - 10, picture.across, "center", colour=INK)


def _points(sheet: Sheet, picture: Picture, panels: Sequence[Points], looks: Mapping[str, Style]) -> None:
    (panel,) = panels
    names = cloud_names(picture)
    top = 0.0
    for scatter in panel.scatters:
        pairs = [(0, 1), (0, 2)] if len(scatter.axes) > 2 else [(0, 1)]
        width, height = (sheet.width - 4) / len(pairs), _scatter_height(scatter) - 48
        sheet.text(4, top + 11, scatter.layer, colour=INK)
        crowd = sum(len(c.points) * (1 if c.after is None else 2) for c in scatter.clouds) > _CROWD
        for column, (a, b) in enumerate(pairs):
            axes = sheet.axes(width * column + 22, top + 22, width - 26, height)
            axes.set(xticks=[], yticks=[])
            axes.spines["left"].set(visible=True, color=MUTED)
            axes.margins(0.06)
            for cloud in scatter.clouds:
                colour = SERIES[names.index(cloud.name) % len(SERIES)]
                options = {"linewidths": 0, "color": colour, "rasterized": crowd}
                if cloud.after is None:
                    axes.scatter(*cloud.points[:, (a, b)].T, s=4 if crowd else 7, alpha=0.6, **options)
                    continue
                axes.scatter(*cloud.points[:, (a, b)].T, s=5, alpha=0.25, **options)
                axes.scatter(*cloud.after[:, (a, b)].T, s=5, alpha=0.8, **options)
                start, stop = (side[:, (a, b)].mean(0) for side in (cloud.points, cloud.after))
                arrow = {"arrowstyle": "->", "color": INK, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", xy=stop, xytext=start, arrowprops=arrow)
            left, middle = 22 + width * (column + 0.5) - 13, top + 22 + height / 2
            sheet.text(left, top + height + 32, scatter.axes[a], "center", size=_FONT - 1)
            sheet.text(12 + width * column, middle, scatter.axes[b], "center", size=_FONT - 1, turn=90)
        top += height + 48


def _maps(sheet: Sheet, picture: Picture, panels: Sequence[Maps], looks: Mapping[str, Style]) -> None:
    (panel,) = panels
    top = 0.0
    for block in panel.blocks:
        left, cell, heads = _block_measures(block)
        rows, columns, height, width = block.maps.shape
        tall, y = cell * height / width, top + (_LINE if block.title else 0)
        if block.title:
            sheet.text(0, top + _LINE / 2, block.title, colour=INK)
        for number, name in enumerate(block.columns):
            if heads:
                text = shortened(name, max(3, int(cell / (_GLYPH - 0.8))))
                sheet.text(left + (cell + 4) * number + cell / 2, y + 8, text, "center", size=_FONT - 1)
        y += heads
        for row in range(rows):
            if left:
                text = shortened(block.rows[row], int(left / _GLYPH))
                sheet.text(left - 6, y + tall / 2, text, "right", size=_FONT - 1)
            for column in range(columns):
                axes = sheet.picture(left + (cell + 4) * column, y, cell, tall)
                axes.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=HAIRLINE))
                axes.imshow(_coloured(block.maps[row, column]), aspect="auto", interpolation="none")
                box = block.marks[row] if row < len(block.marks) else None
                if box is not None:
                    corner = box[1] * width - 0.5, box[0] * height - 0.5
                    edge = {"fill": False, "edgecolor": "#ff2d2d", "linewidth": 1.4, "clip_on": False}
                    axes.add_patch(Rectangle(corner, box[3] * width, box[2] * height, **edge))
            y += tall + 4
        top = y + 8


_DRAWERS: Mapping[str, Callable[..., None]] = {
    "profile": _profile,
    "matrix": _matrix,
    "dots": _dots,
    "points": _points,
    "maps": _maps,
}


# --- helpers


def cloud_names(picture: Picture) -> list[str]:
    """Of all clouds of a picture of points, in the order of their colours."""
    clouds = (c for panel in picture.panels for s in panel.scatters for c in s.clouds)
    return list(dict.fromkeys(cloud.name for cloud in clouds))


def _room(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if np.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _depth_colour(depth: float, depths: Sequence[float]) -> tuple[float, float, float, float]:
    low, high = min(depths), max(depths)
    return colormaps["plasma"](0.86 * (depth - low) / (high - low) if high > low else 0.4)


def _depth_key(sheet: Sheet, depths: Sequence[float]) -> None:
    """Which colour is which depth: a bar above the axes."""
    low, high = min(depths), max(depths)
    if low == high:
        sheet.text(sheet.width - 12, 12, f"depth {low:g}", "right")
        return
    bar = sheet.picture(sheet.width - 12 - 24 - 90, 8, 90, 9)
    bar.imshow(
        [[_depth_colour(v, (0.0, 1.0)) for v in np.linspace(0, 1, 64)]], aspect="auto", interpolation="none"
    )
    sheet.text(sheet.width - 12 - 24 - 96, 12, f"depth {low:g}", "right")
    sheet.text(sheet.width - 12 - 18, 12, f"{high:g}")


def _nothing(name: str):
    """A colour map that draws nothing for NaN."""
    return colormaps[name].with_extremes(bad=(0, 0, 0, 0))


def _ticks(places: np.ndarray) -> list[int]:
    """Entries of an axis to be labelled: whole depths, not too many.

    Each once: a decoder begins where the encoder ends.
    """
    first = np.unique(places, return_index=True)[1]
    whole = [int(number) for number in sorted(first) if places[number] == round(places[number])]
    for step in (1, 2, 3, 4, 5, 6, 10, 12, 20, 50, 100):
        found = [number for number in whole if places[number] % step == 0]
        if len(found) <= 8:
            return found
    return whole[:: -(-len(whole) // 8)]


def _coloured(values: np.ndarray) -> np.ndarray:
    """(height, width) -> RGBA; from 0, or a negative least value, to the largest."""
    present = values[np.isfinite(values)]
    low, high = (min(0.0, present.min()), present.max()) if present.size else (0.0, 1.0)
    scaled = (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.0, np.nan)
    colours = colormaps["viridis"](np.nan_to_num(scaled))
    colours[~np.isfinite(values)] = to_rgba("white", 0)
    return (255 * colours).round().astype(np.uint8)


def _categories(panels: Sequence[Dots]) -> list[str]:
    return list(dict.fromkeys(name for panel in panels for name in panel.categories))


def _row_height(panels: Sequence[Dots]) -> float:
    return max(24.0, 6.0 + 7.0 * len(panels))


def _offset(number: int, count: int) -> float:
    return 0.6 * ((number + 0.5) / count - 0.5)


def _scatter_height(scatter: Scatter) -> float:
    return 172.0 if len(scatter.axes) > 2 else 300.0


def _block_measures(block: Block) -> tuple[float, float, float]:
    """Room at the left for names, the width of a map, and the height of the heads of columns."""
    longest = max(map(len, block.rows), default=0)
    left = min(longest, 10) * _GLYPH + 8 if longest else 0.0
    columns = block.maps.shape[1]
    return left, min(110.0, (WIDTH - left) / columns - 4), _LINE - 2 if any(block.columns) else 0.0


def _block_height(block: Block) -> float:
    _, cell, heads = _block_measures(block)
    rows, _, height, width = block.maps.shape
    return (_LINE if block.title else 0) + heads + rows * (cell * height / width + 4) + 8
