"""Pictures as sections of a page: what its template needs of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from probekit.reports.looks import SERIES, Style, legend_name
from probekit.reports.pictures_drawing import cloud_names, groups, picture_svg
from probekit.reports.pictures_panels import Panel, Picture


def section(picture: Picture, looks: Mapping[str, Style], key: str) -> dict[str, Any]:
    """One picture. key: prefix of the ids in its figures, unique on the page."""
    return {
        "title": picture.title,
        "units": picture.units,
        "dataset": picture.dataset,
        "caption": picture.caption,
        "legend": _legend(picture, looks),
        "figures": [
            {
                "model": legend_name(panels[0].model, looks) if picture.kind != "dots" else "",
                "beside": _beside(panels, looks),
                "svg": Markup(picture_svg(picture, panels, looks, f"{key}-{number}")),
            }
            for number, panels in enumerate(groups(picture), 1)
        ],
    }


def _beside(panels: Sequence[Panel], looks: Mapping[str, Style]) -> str:
    beside = getattr(panels[0], "beside", "")
    return legend_name(beside, looks) if beside else ""


def _legend(picture: Picture, looks: Mapping[str, Style]) -> list[tuple[Markup, str]]:
    """Swatch and name of what is told apart by colour, beside layers."""
    if picture.kind == "dots":
        models = dict.fromkeys(panel.model for panel in picture.panels)
        return [(Markup(looks[model].swatch()), legend_name(model, looks)) for model in models]
    if picture.kind == "points":
        names = [name for name in cloud_names(picture) if name]
        return [(_spot(number), name) for number, name in enumerate(names)]
    return []


def _spot(number: int) -> Markup:
    colour = SERIES[number % len(SERIES)]
    return Markup(
        '<svg class="swatch spot" viewBox="0 0 14 14" aria-hidden="true">'
        f'<circle cx="7" cy="7" r="4.5" fill="{colour}"/></svg>'
    )
