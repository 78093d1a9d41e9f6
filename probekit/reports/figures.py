"""Curves over depth as inline SVG, drawn by matplotlib without pyplot. The same panel gives the same text."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from probekit.reports.charts import Baseline, Chart, Curve, Panel, Point, clean
from probekit.reports.looks import HAIRLINE, INK, MUTED, SURFACE, Style, embedded, label, legend_name
from probekit.reports.placing import apart, fitting, shortened, tick_room

_FONT = 13.0  # px, as everything here: one unit of the SVG's view box is a px of matplotlib at 72 dpi
_ROW = 17.0  # height of a line of labels
_GLYPH = 7.4  # width of a character at _FONT, an upper estimate for most fonts
_LEFT, _RIGHT, _BOTTOM = 64.0, 14.0, 50.0
_BANDS = 8

REDUCED = {
    "mean": "each image's values of a layer are averaged first, intervals are over images",
    "last": "each image's last value of a layer, intervals are over images",
}


@dataclass(frozen=True)
class Form:
    """Size of a figure in px, and how long a label beside a line may be (0: none)."""

    name: str
    width: float
    height: float
    label_chars: int


WIDE = Form("wide", 860, 390, 27)
NARROW = Form("narrow", 380, 330, 0)


@dataclass(frozen=True)
class Line:
    """A line of a panel as a legend or a label names it."""

    name: str
    points: Sequence[Point]
    look: Style


def lines_of(panel: Panel, looks: Mapping[str, Style]) -> list[Line]:
    """Every line of a panel: models in order, then baselines, grey where they hold for several models."""
    lines = [Line(legend_name(c.model, looks), _drawn(c.line), looks[c.model]) for c in panel.curves]
    for baseline in panel.baselines:
        points = _drawn([p for segment in baseline.segments for p in segment])
        look = _baseline_look(baseline, panel, looks)
        lines.append(Line(baseline_name(baseline, panel, looks), points, look))
    return lines


def baseline_name(baseline: Baseline, panel: Panel, looks: Mapping[str, Style]) -> str:
    """``uniform``, and whose it is where the models don't share it: ``uniform: swin and 1 more``"""
    others = len(baseline.models) - 1
    if len(baseline.models) == len(panel.curves):
        return baseline.name
    more = f" and {others} more" if others else ""
    return f"{baseline.name}: {legend_name(baseline.models[0], looks)}{more}"


def has_labels(panel: Panel, form: Form) -> bool:
    """Whether the lines are labelled in the figure, so that it needs no legend beside it."""
    count = len(panel.curves) + len(panel.baselines)
    return bool(form.label_chars) and count * _ROW <= form.height - _top(panel) - _BOTTOM


def describe(chart: Chart, panel: Panel, looks: Mapping[str, Style]) -> str:
    """The figure in a sentence, for those who don't see it."""
    names = ", ".join(legend_name(c.model, looks) for c in panel.curves)
    return (
        f"Line chart: {_axis_label(chart)} over depth of {names} on {panel.dataset}. "
        "The table after the figure holds its values."
    )


def caption(panel: Panel, reduced: str, looks: Mapping[str, Style]) -> str:
    """What the marks are, for this panel."""
    points = [p for curve in panel.curves for p in curve.points]
    counts = sorted({curve.images for curve in panel.curves})
    images = " or ".join("1 image" if n == 1 else f"{n} images" for n in counts)
    texts = [f"{'Mean over' if all(c.averaged for c in panel.curves) else 'Over'} {images}"]
    if any(math.isfinite(p.low) for p in points):
        texts[0] += (
            ", band: 95 % interval over images"
            if has_bands(panel)
            else "; 95 % intervals over images are in the table"
        )
    elif counts == [1]:
        texts[0] += ": one image gives no interval"
    if reduced and reduced not in REDUCED:
        texts.append(f"Drawn: {reduced}")
    if any(p.site == "mid" for p in points):
        texts.append("Line: embedding and layer outputs; faint points: between attention and MLP")
    if panel.baselines:
        texts.append(f"Dotted: {', '.join(dict.fromkeys(b.name for b in panel.baselines))}")
    if any(looks[curve.model].untrained for curve in panel.curves):
        texts.append("Dashed: untrained networks, random weights")
    places: dict[str, list[str]] = {}
    for curve in panel.curves:
        places.setdefault(curve.at, []).append(legend_name(curve.model, looks))
    for place, models in places.items():
        if place:
            texts.append(f"At {place}" + (f": {', '.join(models)}" if len(places) > 1 else ""))
    return ". ".join(texts) + "."


def has_bands(panel: Panel) -> bool:
    """Whether intervals are drawn: those of many models can't be told apart."""
    return len(panel.curves) <= _BANDS


def panel_svg(chart: Chart, panel: Panel, looks: Mapping[str, Style], form: Form, key: str) -> str:
    """One panel as an ``<svg>`` element.

    looks: a `Style` for every model of the panel (`probekit.reports.looks.styles`)
    key:   prefix of the ids in it; unique on a page
    """
    with drawing_style():
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        panel_figure(chart, panel, looks, form).savefig(text, format="svg", metadata=nothing)
    return embedded(text.getvalue(), key, describe(chart, panel, looks), form.name)


def panel_figure(chart: Chart, panel: Panel, looks: Mapping[str, Style], form: Form) -> Figure:
    """One panel as a figure of matplotlib's, to be made and saved within `drawing_style`."""
    drawing = _Drawing(chart, panel, looks, form)
    drawing.draw()
    return drawing.figure


@contextmanager
def drawing_style(fonts: str = "none") -> Iterator[None]:
    """No setting of the reader's own: the same run gives the same bytes everywhere.

    fonts: ``none`` keeps text as text, ``path`` makes it look the same everywhere
    """
    settings = {"svg.fonttype": fonts, "svg.hashsalt": "probekit", "path.simplify": False}
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a browser has it
        yield


class _Drawing:
    """One panel on its way to the canvas. Places are px from the lower left corner of the figure."""

    def __init__(self, chart: Chart, panel: Panel, looks: Mapping[str, Style], form: Form):
        self.chart, self.panel, self.looks, self.form = chart, panel, looks, form
        self.labelled = has_labels(panel, form)
        longest = max((len(line.name) for line in lines_of(panel, looks)), default=0)
        right = _RIGHT + (26 + min(longest, form.label_chars) * _GLYPH if self.labelled else 0)
        self.limits = _limits(chart.panels)
        self.x0, self.x1 = max(_LEFT, 24 + tick_room(self.limits, 6)), form.width - right
        self.y0, self.y1 = _BOTTOM, form.height - _top(panel)
        self.figure = Figure(figsize=(form.width / 72, form.height / 72), dpi=72)
        FigureCanvasSVG(self.figure)
        self.px = Affine2D().scale(1 / 72) + self.figure.dpi_scale_trans
        self.figure.patch.set_alpha(0)
        size = ((self.x1 - self.x0) / form.width, (self.y1 - self.y0) / form.height)
        self.axes: Axes = self.figure.add_axes((self.x0 / form.width, self.y0 / form.height, *size))
        depths = [p.depth for c in panel.curves for p in c.points] or [0.0, 1.0]
        self.depths = min(depths) - 0.4, max(depths) + 0.4

    def draw(self) -> None:
        outside = [b for b in self.panel.baselines if not _inside(b, self.limits)]
        self._frame()
        self._sections()
        for baseline in self.panel.baselines:
            if baseline not in outside:
                look = _baseline_look(baseline, self.panel, self.looks)
                for part in baseline.segments:
                    self.axes.plot(
                        *_stretched(part), color=look.colour, linewidth=1.3, dashes=look.dashes, zorder=2
                    )
        # untrained ones first: a baseline never hides what it is compared with
        for curve in sorted(self.panel.curves, key=lambda c: not self.looks[c.model].untrained):
            self._curve(curve, self.looks[curve.model])
        self._edge_notes(outside)
        if self.labelled:
            gone = {id(b) for b in outside}
            lines = lines_of(self.panel, self.looks)
            kept = lines[: len(self.panel.curves)]
            beside = zip(self.panel.baselines, lines[len(kept) :], strict=True)
            self._end_labels([*kept, *(line for b, line in beside if id(b) not in gone)])

    def x(self, depth: float) -> float:
        return self.x0 + (depth - self.depths[0]) / (self.depths[1] - self.depths[0]) * (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return self.y0 + (value - self.limits[0]) / (self.limits[1] - self.limits[0]) * (self.y1 - self.y0)

    def text(
        self, x: float, y: float, text: str, ha: str, va: str, colour: str = MUTED, size: float = _FONT - 1
    ):
        self.figure.text(
            x,
            y,
            clean(text),
            transform=self.px,
            ha=ha,
            va=va,
            color=colour,
            fontsize=size,
            parse_math=False,
        )

    def _frame(self) -> None:
        axes = self.axes
        axes.set_xlim(*self.depths)
        axes.set_ylim(*self.limits)
        axes.patch.set_alpha(0)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.tick_params(axis="x", colors=MUTED, labelsize=_FONT, length=3)
        axes.tick_params(axis="y", colors=MUTED, labelsize=_FONT, length=0)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.yaxis.offsetText.set(fontsize=_FONT, color=MUTED, parse_math=False)
        axes.grid(axis="y", color=HAIRLINE, linewidth=1)
        axes.set_axisbelow(True)
        self.text((self.x0 + self.x1) / 2, 8, "depth (attention layer)", "center", "bottom", INK, _FONT)
        self.figure.text(
            16,
            (self.y0 + self.y1) / 2,
            clean(_axis_label(self.chart)),
            transform=self.px,
            ha="center",
            va="center",
            rotation=90,
            color=INK,
            fontsize=_FONT,
            parse_math=False,
        )

    def _curve(self, curve: Curve, look: Style) -> None:
        marker = {
            "marker": look.marker,
            "markeredgecolor": SURFACE,
            "markeredgewidth": 0.8,
            "color": look.colour,
        }
        for segment in (_drawn(s) for s in curve.segments):
            if not segment:
                continue
            x, y, low, high = np.array([(p.depth, p.mean, p.low, p.high) for p in segment]).T
            known = ~(np.isnan(low) | np.isnan(high)) & has_bands(self.panel)
            band = {"color": look.colour, "alpha": 0.2, "zorder": 1}
            if known.any() and len(segment) > 1:
                self.axes.fill_between(x, low, high, where=known, linewidth=0, **band)
            elif known.any():
                self.axes.vlines(x, low, high, linewidth=5, **band)
            self.axes.plot(x, y, linewidth=1.8, dashes=look.dashes, markersize=5.5, zorder=4, **marker)
        if between := _drawn(curve.between):
            x, y = [p.depth for p in between], [p.mean for p in between]
            self.axes.plot(x, y, linewidth=0, markersize=4, alpha=0.45, zorder=3, **marker)

    def _sections(self) -> None:
        """A strip above the axes for each way of dividing the models, and thin rules where parts meet."""
        place = self.y1 + 4
        for sections, models in reversed(_divisions(self.panel).items()):
            for number, section in enumerate(sections):
                start, stop = max(section.start, self.depths[0]), min(section.stop, self.depths[1])
                if number:
                    self.axes.axvline(section.start, color=MUTED, linewidth=0.8, alpha=0.55, zorder=1)
                name = fitting(section.label, (self.x(stop) - self.x(start)) / (_GLYPH - 0.5))
                self.text((self.x(start) + self.x(stop)) / 2, place, name, "center", "bottom")
            place += _ROW
            if _named(self.panel):
                room = int((self.x1 - self.x0) / _GLYPH)
                names = shortened(", ".join(legend_name(m, self.looks) for m in models) + ":", room)
                self.text(self.x0, place, names, "left", "bottom")
                place += _ROW

    def _edge_notes(self, outside: Sequence[Baseline]) -> None:
        """Baselines that would squeeze the curves together are named at the edge they lie beyond."""
        for above in (True, False):
            found: dict[str, list[float]] = {}
            for baseline in outside:
                values = [p.mean for p in _drawn(baseline.points)]
                if (min(values) > self.limits[1]) == above:
                    found.setdefault(baseline.name, []).extend(values)
            texts = []
            for name, values in found.items():
                ends = dict.fromkeys(f"{v:.3g}".replace("-", "\u2212") for v in (min(values), max(values)))
                texts.append(f"{name} {' to '.join(ends)}")
            if texts:
                arrow, place = ("\u2191", self.y1 - 2) if above else ("\u2193", self.y0 + 3)
                said = f"{arrow} {', '.join(texts)}"
                self.text(self.x1 - 3, place, said, "right", "top" if above else "bottom")

    def _end_labels(self, lines: Sequence[Line]) -> None:
        """A label beside the end of each line, moved apart where they would overlap."""
        ends = sorted(
            ((self.y(line.points[-1].mean), line) for line in lines if line.points), key=lambda e: e[0]
        )
        low, high = self.y0 + 4, self.y1 - 4
        places = apart([min(max(y, low), high) - low for y, _ in ends], _ROW, high - low)
        for (y, line), place in zip(ends, places, strict=True):
            x, place = self.x(line.points[-1].depth), place + low
            self.text(
                self.x1 + 24,
                place,
                label(line.name, self.form.label_chars),
                "left",
                "center_baseline",
                INK,
                _FONT,
            )
            # along the line's height to the edge, where it isn't data, then to the label
            near = max(x, self.x1 - 4)
            to_edge = {"color": MUTED, "linewidth": 0.6, "dashes": (1.0, 3.0)}
            to_label = {"color": line.look.colour, "linewidth": 1, "alpha": 0.75}
            drawn = [([near, self.x1 + 8, self.x1 + 20], [y, place, place], to_label)]
            if self.x1 - x >= 40:
                drawn.append(([x + 6, near], [y, y], to_edge))
            for xs, ys, how in drawn:
                self.axes.plot(xs, ys, transform=self.px, zorder=2, clip_on=False, **how)


def _top(panel: Panel) -> float:
    """Room above the axes for the strips of parts and stages."""
    return 12 + _ROW * len(_divisions(panel)) * (2 if _named(panel) else 1)


def _divisions(panel: Panel) -> dict[tuple, list[str]]:
    """Each way the models are divided into parts and stages, with the models that are."""
    found: dict[tuple, list[str]] = {}
    for curve in panel.curves:
        if curve.sections:
            found.setdefault(tuple(curve.sections), []).append(curve.model)
    return found


def _named(panel: Panel) -> bool:
    """Whether a strip must say whose stages it shows."""
    strips = _divisions(panel)
    return len(strips) != 1 or len(next(iter(strips.values()))) != len(panel.curves)


def _drawn(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.mean)]


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """One y axis for all panels: curves with their intervals, and baselines that leave them most of it.

    A baseline of one model among several is no frame of the others.
    """
    points = [p for panel in panels for c in panel.curves for p in _drawn(c.points)]
    values = [v for p in points for v in (p.mean, p.low, p.high) if math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    for baseline in (b for p in panels for b in p.baselines if len(b.models) > 1 or len(p.curves) == 1):
        own = [p.mean for p in _drawn(baseline.points)]
        if max(high, *own) - min(low, *own) <= 3 * (high - low) or high == low:
            low, high = min(low, *own), max(high, *own)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _inside(baseline: Baseline, limits: tuple[float, float]) -> bool:
    return any(limits[0] <= p.mean <= limits[1] for p in _drawn(baseline.points))


def _baseline_look(baseline: Baseline, panel: Panel, looks: Mapping[str, Style]) -> Style:
    """Neutral where it holds for several models, else the model's colour."""
    alone = len(baseline.models) == 1 and len(panel.curves) > 1
    return Style(looks[baseline.models[0]].colour if alone else MUTED, "", "baseline")


def _stretched(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """A little beyond the first and last point, so that a stage of one layer shows a line too."""
    x = [p.depth for p in points]
    return [x[0] - 0.3, *x, x[-1] + 0.3], [points[0].mean, *(p.mean for p in points), points[-1].mean]


def _axis_label(chart: Chart) -> str:
    return f"{chart.label} ({chart.units})" if chart.units else chart.label
