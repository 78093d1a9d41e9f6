"""How models look in every figure of a page, and matplotlib's SVG file made an element of a page.

Colours are CSS custom properties with a fallback (``stroke: var(--s1, #0072b2)``), so that a page can give
them others in dark mode and a file of its own still looks right.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from probekit.reports.charts import clean
from probekit.reports.placing import shortened

# Okabe and Ito's colours without yellow, ordered so that neighbours differ most for colour-blind readers.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5578f", "#4595cc", "#b07d00")
UNTRAINED, INK, MUTED, HAIRLINE, SURFACE = "#7a7a7a", "#222222", "#5c5c5c", "#e1e1e1", "#fdfdfd"
# matplotlib's markers, and the same as a path around (17, 7) for legends
_SHAPES = {
    "o": "M13.5 7a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "s": "M14 4h6v6h-6z",
    "D": "M17 3l4 4l-4 4l-4-4z",
    "^": "M17 3l4 7.5h-8z",
    "v": "M17 11l4-7.5h-8z",
    "P": "M15.7 3h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "X": "M15 3l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2l-2-2z",
}
_MARKERS = tuple(_SHAPES)
_MARK = " (untrained)"
_PROPERTIES = {
    **{colour: f"--s{number}" for number, colour in enumerate(SERIES, 1)},
    UNTRAINED: "--untrained",
    INK: "--ink",
    MUTED: "--muted",
    HAIRLINE: "--hairline",
    SURFACE: "--surface",
}
_DASHES = {
    "solid": (),
    "second": (9.0, 2.0, 2.0, 2.0),
    "third": (9.0, 2.0, 2.0, 2.0, 2.0, 2.0),
    "untrained": (5.0, 3.0),
    "baseline": (2.0, 2.5),
}
_TURNS = ("solid", "second", "third")
"""Of trained models: another for each time the colours are through."""


@dataclass(frozen=True)
class Style:
    """How a model is drawn, in every chart of a page.

    untrained: nothing has trained it: a baseline for the others
    """

    colour: str
    marker: str
    dash: str = "solid"
    untrained: bool = False

    @property
    def variable(self) -> str:
        """The colour as CSS."""
        return f"var({_PROPERTIES[self.colour]}, {self.colour})"

    @property
    def dashes(self) -> tuple[float | None, ...]:
        """Lengths of dashes and gaps, None for a line without gaps."""
        return _DASHES[self.dash] or (None, None)

    def swatch(self) -> str:
        """A piece of the line for a legend, as an ``<svg>`` element."""
        lengths = " ".join(f"{length:g}" for length in _DASHES[self.dash])
        dashes = f' stroke-dasharray="{lengths}"' if lengths else ""
        line = f'<path d="M1 7H33" style="stroke: {self.variable}; stroke-width: 2"{dashes}/>'
        shape = _SHAPES.get(self.marker)
        marker = f'<path d="{shape}" style="fill: {self.variable}"/>' if shape else ""
        return f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">{line}{marker}</svg>'


def styles(models: Sequence[str], untrained: Callable[[str], bool]) -> dict[str, Style]:
    """A style for each model: colours for trained ones, grey dashes for untrained ones.

    Where none is trained the untrained ones aren't a baseline of anything: they get colours, still dashed.

    untrained: whether a model is (`probekit.Run.untrained`)
    """
    trained = [m for m in models if not untrained(m)]
    found = {}
    for number, model in enumerate(trained or models):
        dash = _TURNS[number // len(SERIES) % len(_TURNS)] if trained else "untrained"
        look = SERIES[number % len(SERIES)], _MARKERS[number % len(_MARKERS)], dash
        found[model] = Style(*look, untrained=not trained)
    for number, model in enumerate(m for m in models if m not in found):
        found[model] = Style(UNTRAINED, _MARKERS[number % len(_MARKERS)], "untrained", untrained=True)
    return found


def legend_name(model: str, looks: Mapping[str, Style]) -> str:
    """``moco:vit-b16 (untrained)``; what is no model's name as it is."""
    if model not in looks or not looks[model].untrained or "untrained" in model:
        return model
    return f"{model.removesuffix('@random')}{_MARK}"


def label(name: str, limit: int) -> str:
    """A name of at most `limit` characters that still says what is untrained."""
    if name.endswith(_MARK) and len(name) > limit > len(_MARK) + 3:
        return shortened(name.removesuffix(_MARK), limit - len(_MARK)) + _MARK
    return shortened(name, limit)


def embedded(text: str, key: str, label: str, form: str) -> str:
    """The <svg> element alone: colours as properties, no ids that nobody refers to or another figure has."""
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
            "class": f"plot {form}",
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
