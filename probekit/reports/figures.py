"""Curves over depth as inline SVG, drawn by matplotlib without pyplot.

Colours are CSS custom properties with a fallback (``stroke: var(--s1, #0072b2)``), so that a page can give
them others in dark mode and a file of its own still looks right. The same panel gives the same text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from probekit.reports.curves import Baseline, Chart, Curve, Panel, Point, clean, is_untrained

# Okabe and Ito's colours without yellow, ordered so that neighbours differ most for colour-blind readers.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5578f", "#56a5d8", "#b07d00")
UNTRAINED, INK, MUTED, HAIRLINE, SURFACE = "#7a7a7a", "#222222", "#5c5c5c", "#e1e1e1", "#fdfdfd"
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_PROPERTIES = {
    **{colour: f"--s{number}" for number, colour in enumerate(SERIES, 1)},
    UNTRAINED: "--untrained",
    INK: "--ink",
    MUTED: "--muted",
    HAIRLINE: "--hairline",
    SURFACE: "--surface",
}
DASHES = {"solid": (), "untrained": (5.0, 3.0), "baseline": (2.0, 2.5)}

_FONT = 12.0  # px, as everything here: one unit of the SVG's view box
_ROW = 16.0  # height of a line of labels
_GLYPH = 6.9  # width of an average character at _FONT, an upper estimate for most fonts


@dataclass(frozen=True)
class Style:
    """How a model is drawn, in every chart of a page."""

    colour: str
    marker: str
    dash: str = "solid"

    @property
    def variable(self) -> str:
        return f"var({_PROPERTIES[self.colour]}, {self.colour})"


@dataclass(frozen=True)
class Form:
    """Size of a figure in px, and whether lines are labelled where they end."""

    name: str
    width: float
    height: float
    label_chars: int  # 0: no labels beside the lines


WIDE = Form("wide", 860, 380, 26)
NARROW = Form("narrow", 380, 320, 0)


def styles(models: Sequence[str]) -> dict[str, Style]:
    """A style for each model: colours for trained ones, grey dashes for untrained ones.

    Where none is trained the untrained ones aren't a baseline of anything: they get colours, still dashed.
    """
    trained = [m for m in models if not is_untrained(m)]
    found = {}
    for number, model in enumerate(trained or models):
        dash = "solid" if trained else "untrained"
        found[model] = Style(SERIES[number % len(SERIES)], _MARKERS[number % len(_MARKERS)], dash)
    for number, model in enumerate(m for m in models if m not in found):
        found[model] = Style(UNTRAINED, _MARKERS[number % len(_MARKERS)], "untrained")
    return found


def legend_name(model: str) -> str:
    """``moco:vit-b16 (untrained)``"""
    return f"{model.removesuffix('@random')} (untrained)" if is_untrained(model) else model


def has_labels(panel: Panel, form: Form) -> bool:
    """Whether the lines are labelled in the figure, so that it needs no legend beside it."""
    count = sum(bool(_drawn(c.points)) for c in panel.curves) + len(panel.baselines)
    room = form.height - _margins(panel, form)[2] - _margins(panel, form)[3]
    return bool(form.label_chars) and count * _ROW <= room


def panel_svg(chart: Chart, panel: Panel, looks: Mapping[str, Style], form: Form, key: str) -> str:
    """One panel as an ``<svg>`` element.

    looks: a `Style` for every model of the panel (`styles`)
    key:   prefix of the ids in it; unique on a page
    """
    # No setting of the reader's own: the same run gives the same bytes everywhere.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "probekit", "path.simplify": False}
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has it
        figure = Figure(figsize=(form.width / 72, form.height / 72), dpi=72)
        FigureCanvasSVG(figure)
        left, right, top, bottom = _margins(panel, form)
        axes = figure.add_axes(
            (
                left / form.width,
                bottom / form.height,
                (form.width - left - right) / form.width,
                (form.height - top - bottom) / form.height,
            )
        )
        _draw(axes, chart, panel, looks, form)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embedded(text.getvalue(), key, describe(chart, panel), form)


def describe(chart: Chart, panel: Panel) -> str:
    """The figure in a sentence, for those who don't see it."""
    names = ", ".join(legend_name(c.model) for c in panel.curves)
    return (
        f"Line chart: {_axis_label(chart)} over depth, {names}, on {panel.dataset}. "
        "The table after the figure holds its values."
    )


def sections_of(panel: Panel) -> dict[tuple[Any, ...], list[str]]:
    """Each way the models are divided into parts and stages, with the models that are."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for curve in panel.curves:
        if curve.sections:
            found.setdefault(tuple(curve.sections), []).append(curve.model)
    return found


# --- drawing


def _margins(panel: Panel, form: Form) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the axes in px."""
    names = [legend_name(c.model) for c in panel.curves] + [b.name for b in panel.baselines]
    longest = max((len(_short(n, form.label_chars)) for n in names), default=0) if form.label_chars else 0
    strips = sections_of(panel)
    top = 10 + _ROW * len(strips) * (1 if _same_for_all(panel) else 2)
    return 62.0, 14.0 + (26 + longest * _GLYPH if form.label_chars else 0), top, 46.0


def _same_for_all(panel: Panel) -> bool:
    strips = sections_of(panel)
    return len(strips) == 1 and len(next(iter(strips.values()))) == len(panel.curves)


def _draw(axes: Axes, chart: Chart, panel: Panel, looks: Mapping[str, Style], form: Form) -> None:
    limits = _limits(panel)
    outside = [b for b in panel.baselines if not _inside(b, limits)]
    _frame(axes, chart, panel, limits)
    _sections(axes, panel)
    for baseline in panel.baselines:
        if baseline not in outside:
            colour = _baseline_colour(baseline, panel, looks)
            for part in baseline.segments:
                x, y = _stretched(part)
                axes.plot(x, y, color=colour, linewidth=1.3, dashes=DASHES["baseline"], zorder=2)
    # untrained ones first: a baseline never hides what it is compared with
    for curve in sorted(panel.curves, key=lambda c: not c.untrained):
        _curve(axes, curve, looks[curve.model])
    _edge_notes(axes, outside, limits)
    if has_labels(panel, form):
        _end_labels(axes, panel, outside, looks, form)


def _frame(axes: Axes, chart: Chart, panel: Panel, limits: tuple[float, float]) -> None:
    depths = [p.depth for c in panel.curves for p in c.points] or [0.0, 1.0]
    low, high = min(depths), max(depths)
    axes.set_xlim(low - 0.4, high + 0.4)
    axes.set_ylim(*limits)
    axes.set_facecolor("none")
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.tick_params(axis="x", colors=MUTED, labelsize=_FONT, length=3)
    axes.tick_params(axis="y", colors=MUTED, labelsize=_FONT, length=0)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color=HAIRLINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel("depth (attention layer)", color=INK, fontsize=_FONT, parse_math=False)
    axes.set_ylabel(clean(_axis_label(chart)), color=INK, fontsize=_FONT, parse_math=False)
    axes.yaxis.offsetText.set(fontsize=_FONT, color=MUTED, parse_math=False)
    # where matplotlib would place it depends on the width of the tick labels
    axes.yaxis.set_label_coords(-48, 0.5, blended_transform_factory(_offset(axes), axes.transAxes))


def _offset(axes: Axes) -> Any:
    """px from the left edge of the axes."""
    from matplotlib.transforms import Affine2D

    x0 = axes.get_position().x0 * axes.figure.get_figwidth() * 72
    return Affine2D().translate(x0, 0)


def _curve(axes: Axes, curve: Curve, look: Style) -> None:
    marker = {"marker": look.marker, "markeredgecolor": SURFACE, "markeredgewidth": 0.8}
    for segment in (_drawn(s) for s in curve.segments):
        if not segment:
            continue
        x, y, low, high = (np.array([getattr(p, n) for p in segment]) for n in ("depth", "mean", "low", "high"))
        known = ~(np.isnan(low) | np.isnan(high))
        if known.any() and len(segment) > 1:
            axes.fill_between(x, low, high, where=known, color=look.colour, alpha=0.2, linewidth=0, zorder=1)
        elif known.any():
            axes.vlines(x, low, high, color=look.colour, linewidth=5, alpha=0.2, zorder=1)
        axes.plot(
            x, y, color=look.colour, linewidth=1.8, markersize=5.5, zorder=4, **marker, dashes=DASHES[look.dash] or (None, None)
        )
    between = _drawn(curve.between)
    if between:
        x, y = [p.depth for p in between], [p.mean for p in between]
        axes.plot(x, y, color=look.colour, linewidth=0, markersize=4, alpha=0.45, zorder=3, **marker)


def _sections(axes: Axes, panel: Panel) -> None:
    """A strip above the axes for each way of dividing the models, and thin rules where parts meet."""
    height = axes.get_position().height * axes.figure.get_figheight() * 72
    width = axes.get_position().width * axes.figure.get_figwidth() * 72
    low, high = axes.get_xlim()
    named = not _same_for_all(panel)
    transform = blended_transform_factory(axes.transData, axes.transAxes)
    for level, (sections, models) in enumerate(reversed(sections_of(panel).items())):
        base = 1 + (4 + _ROW * level * (2 if named else 1)) / height
        for number, section in enumerate(sections):
            start, stop = max(section.start, low), min(section.stop, high)
            if number:
                axes.axvline(section.start, color=MUTED, linewidth=0.8, alpha=0.55, zorder=1)
            room = (stop - start) / (high - low) * width
            label = _fitting(section.label, room)
            axes.text(
                (start + stop) / 2, base, label, transform=transform, ha="center", va="bottom", parse_math=False,
                fontsize=_FONT - 1, color=MUTED,
            )  # fmt: skip
        if named:
            names = _short(", ".join(legend_name(m) for m in models), int(width / _GLYPH))
            axes.text(
                0, base + _ROW / height, names, transform=axes.transAxes, ha="left", va="bottom", parse_math=False,
                fontsize=_FONT - 1, color=MUTED,
            )  # fmt: skip


def _edge_notes(axes: Axes, outside: Sequence[Baseline], limits: tuple[float, float]) -> None:
    """Baselines that would squeeze the curves together are named at the edge they lie beyond."""
    for above in (True, False):
        texts = []
        for baseline in outside:
            values = [p.mean for p in _drawn(baseline.points)]
            if (min(values) > limits[1]) == above:
                span = f"{min(values):.3g}" if np.ptp(values) < 1e-9 else f"{min(values):.3g} to {max(values):.3g}"
                texts.append(f"{clean(baseline.name)} {span}".replace("-", "\u2212"))
        if texts:
            arrow = "\u2191" if above else "\u2193"
            axes.text(
                0.995, 0.985 if above else 0.015, f"{arrow} {', '.join(texts)}", transform=axes.transAxes,
                ha="right", va="top" if above else "bottom", fontsize=_FONT - 1, color=MUTED, parse_math=False,
            )  # fmt: skip


def _end_labels(
    axes: Axes, panel: Panel, outside: Sequence[Baseline], looks: Mapping[str, Style], form: Form
) -> None:
    """A label beside the end of each line, moved apart where they would overlap."""
    ends = []  # (y in px, x and y of the line's end, label, colour)
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_figheight() * 72
    items = [(legend_name(c.model), c.line, looks[c.model].colour) for c in panel.curves]
    items += [(b.name, b.points, _baseline_colour(b, panel, looks)) for b in panel.baselines if b not in outside]
    for name, points, colour in items:
        drawn = _drawn(points)
        if drawn:
            y = (drawn[-1].mean - low) / (high - low) * height
            ends.append((y, drawn[-1].depth, drawn[-1].mean, _short(clean(name), form.label_chars), colour))
    ends.sort(key=lambda end: end[0])
    places = _apart([end[0] for end in ends], _ROW, height)
    right = axes.get_xlim()[1]
    for (_, x, y, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name, xy=(x, y), xycoords="data", xytext=(22, place), textcoords=_label_place(axes), va="center",
            ha="left", fontsize=_FONT, color=INK, annotation_clip=False, parse_math=False, zorder=6,
        )  # fmt: skip
        pixel = axes.transAxes.inverted()
        origin = axes.transAxes.transform((1, 0))
        elbow, tip = (pixel.transform((origin[0] + dx, origin[1] + place)) for dx in (8, 18))
        start = axes.transLimits.transform((x, y))
        middle = [start, axes.transLimits.transform((right, y))] if right - x < 1 else [start]
        line = np.array([*middle, elbow, tip])
        axes.plot(
            line[:, 0], line[:, 1], transform=axes.transAxes, color=colour, linewidth=1, alpha=0.75, clip_on=False,
            zorder=2,
        )  # fmt: skip


def _label_place(axes: Axes) -> Any:
    """px from the lower right corner of the axes."""
    from matplotlib.transforms import Affine2D

    x, y = axes.transAxes.transform((1, 0))
    return Affine2D().translate(x, y)


def _apart(places: Sequence[float], gap: float, height: float) -> list[float]:
    """Sorted places moved as little as needed to be `gap` apart and within 0 and `height`."""
    groups: list[list[float]] = []  # [sum of wishes for the first place, count]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and _first(groups[-2], gap, height) + groups[-2][1] * gap > _first(
            groups[-1], gap, height
        ):
            wish, count = groups.pop()
            groups[-1][0] += wish - groups[-1][1] * gap * count
            groups[-1][1] += count
    return [_first(g, gap, height) + n * gap for g in groups for n in range(int(g[1]))]


def _first(group: Sequence[float], gap: float, height: float) -> float:
    return min(max(group[0] / group[1], 0.0), max(0.0, height - (group[1] - 1) * gap))


# --- what is drawn where


def _drawn(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.mean)]


def _limits(panel: Panel) -> tuple[float, float]:
    """The y axis: all curves with their intervals, and baselines unless they would take most of the room."""
    points = [p for c in panel.curves for p in _drawn(c.points)]
    values = [v for p in points for v in (p.mean, p.low, p.high) if math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    for baseline in panel.baselines:
        own = [p.mean for p in _drawn(baseline.points)]
        wide = max(high, *own) - min(low, *own)
        if wide <= 3 * (high - low) or high == low:
            low, high = min(low, *own), max(high, *own)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _inside(baseline: Baseline, limits: tuple[float, float]) -> bool:
    return any(limits[0] <= p.mean <= limits[1] for p in _drawn(baseline.points))


def _baseline_colour(baseline: Baseline, panel: Panel, looks: Mapping[str, Style]) -> str:
    """Neutral where it holds for every model, else the model's."""
    shared = len(baseline.models) == len(panel.curves) or len(baseline.models) > 1
    return MUTED if shared else looks[baseline.models[0]].colour


def _stretched(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """A little beyond the first and last point, so that a stage of one layer shows a line too."""
    x = [p.depth for p in points]
    return [x[0] - 0.3, *x, x[-1] + 0.3], [points[0].mean, *(p.mean for p in points), points[-1].mean]


def _axis_label(chart: Chart) -> str:
    name = chart.value.replace("_", " ")
    return f"{name} ({chart.units})" if chart.units else name


def _short(text: str, limit: int) -> str:
    """Cut in the middle: both ends of a model's name tell something."""
    if len(text) <= limit or limit < 3:
        return text
    head = (limit - 1) * 3 // 5
    return f"{text[:head]}\u2026{text[len(text) - (limit - 1 - head) :]}"


def _fitting(label: str, room: float) -> str:
    """The longest form of a section's label that fits into `room` px, "" where none does."""
    for text in (label, label.replace("stage ", ""), label[:4] + "." if len(label) > 5 else label):
        if len(text) * (_GLYPH - 0.5) <= room:
            return text
    return ""


# --- from a file of matplotlib's to an element of a page


def _embedded(text: str, key: str, label: str, form: Form) -> str:
    """The <svg> element alone: no ids nobody refers to, none that another figure has, colours as properties."""
    root = ET.fromstring(text.encode())
    used = set(re.findall(r'(?:url\(|xlink:href=")#([\w.\-]+)', text))
    for element in root.iter():
        for child in [c for c in element if c.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{key}-{attributes['id']}"
            if element.attrib["id"] not in used:
                del attributes["id"]
        if "href" in attributes:
            attributes["href"] = attributes["href"].replace("#", f"#{key}-", 1)
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{key}-", 1)
        if "style" in attributes:
            attributes["style"] = _styled(attributes["style"])
        element.attrib.clear()
        element.attrib.update(attributes)
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = "\n"
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": f"plot {form.name}",
            "style": "stroke-linejoin: round; stroke-linecap: butt",
            "role": "img",
            "aria-label": clean(label),
        }
    )
    return ET.tostring(root, encoding="unicode").strip()


def _styled(text: str) -> str:
    text = re.sub(r"\s*font-family:[^;]*;?", "", text)
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda m: f"var({_PROPERTIES[m[0]]}, {m[0]})" if m[0] in _PROPERTIES else m[0],
        text,
    )
