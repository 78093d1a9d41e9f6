"""What a metric has to keep to, checked in a run and by `probekit.conformance`: one rule for both.

Each function says what is wrong, as the rest of a sentence about the metric; "" where nothing is.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probekit.errors import DoesNotApply
from probekit.layer import Layer
from probekit.metric import Metric, Row, Variation
from probekit.plugins.loading import describe, in_words
from probekit.summaries import layer_coordinates
from probekit.watch.observe import CAPTURES

REQUIRED = frozenset({"labels", "train", "cues", "masks"})

_WORDS = {"windows": ("each", "own"), "curve": ("mean", "last")}
_AXES = frozenset({"layer", "image"})
_COORDINATES = frozenset({"stride_y", "stride_x", *layer_coordinates(())})
_PARTS = ("sd", "sem", "low", "high", "curve", "curve_low", "curve_high", "head_sd")  # of a summarised value
_VARIATION = re.compile(r"[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*")  # a folder's name, not ".."


def wrong_declaration(metric: Metric) -> str:
    """What can be said of a metric before it has measured anything."""
    cls, name = type(metric), getattr(metric, "name", None)
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        return f"'name' is {in_words(repr, name)}, not of letters, digits, '_' and '-'"
    if not isinstance(metric.version, int) or isinstance(metric.version, bool) or metric.version < 1:
        return f"'version' is {metric.version!r}, not a whole number from 1"
    if not isinstance(metric.requires, (set, frozenset)):
        return f"'requires' is {metric.requires!r}, not a set such as {{'labels'}}"
    if unheard := sorted(map(str, metric.requires - REQUIRED)):
        return f"'requires' names '{unheard[0]}', not one of {', '.join(sorted(REQUIRED))}"
    for attribute in ("units", "conventions"):
        if not isinstance(getattr(metric, attribute), Mapping):
            return f"'{attribute}' is {getattr(metric, attribute)!r}, not a mapping"
    for value, unit in metric.units.items():
        if not isinstance(unit, str):
            return f"'units' gives '{value}' {unit!r}, not text"
    if metric.source:
        if cls.summarize is Metric.summarize:
            return f"it draws on '{metric.source}' but has no 'summarize'"
        if cls.measure is not Metric.measure or metric.needs or metric.dims:
            return f"it draws on '{metric.source}', so 'measure', 'needs' and 'dims' are never used"
    else:
        if wrong := _wrong_needs(metric) or _wrong_dims(metric):
            return wrong
        if cls.measure is Metric.measure:
            return "it has no 'measure'"
    for attribute, allowed in _WORDS.items():
        if getattr(metric, attribute) not in allowed:
            return f"'{attribute}' is {getattr(metric, attribute)!r}, not one of {', '.join(allowed)}"
    return _wrong_variations(metric)


def _wrong_needs(metric: Metric) -> str:
    needs = getattr(metric, "needs", None)
    if not isinstance(needs, (set, frozenset)) or not needs:
        return f"'needs' is {needs!r}, not a set of fields such as {{'attention'}}"
    if unknown := sorted(str(n) for n in needs if n not in CAPTURES):
        return f"'needs' names '{unknown[0]}', which a layer doesn't have ({', '.join(sorted(CAPTURES))})"
    if "tokens" in needs and len(needs) > 1:
        return "'needs' names 'tokens' beside others; a token site has tokens alone"
    return ""


def _wrong_dims(metric: Metric) -> str:
    dims, name = getattr(metric, "dims", None), metric.name
    if not isinstance(dims, Mapping) or not dims:
        return f"'dims' is {dims!r}, not a mapping such as {{'{name}': ('head',)}}"
    for value, axes in dims.items():
        names = isinstance(axes, tuple) and all(isinstance(a, str) for a in axes)
        if not names or len(set(axes)) < len(axes):
            return f"'dims' gives '{value}' the axes {axes!r}, not a tuple of different names"
        if _AXES & set(axes):
            return f"'dims' names 'layer' or 'image' for '{value}'; those axes are there anyway"
    axes = dict.fromkeys(axis for inner in dims.values() for axis in inner)
    for one in (*dims, *axes):
        if not _nameable(one):
            return f"'dims' names {in_words(repr, one)}, which can't name a value or an axis"
    default = type(metric).summarize is Metric.summarize
    if default and name not in dims:
        return f"'dims' has no value '{name}', the one that is plotted"
    if default and (extra := sorted(set(metric.units) - set(dims))):
        return f"'units' names '{extra[0]}', which 'dims' doesn't"
    made = Counter([*dims, *axes, *_COORDINATES])
    if default:
        made.update(f"{value}_{part}" for value in dims for part in _PARTS)
    if twice := [one for one in (*dims, *axes) if made[one] > 1]:
        return f"'dims' names '{twice[0]}', which the result has for something else"
    return ""


def _nameable(name: Any) -> bool:
    """Whether it can name an array in a shard and a variable of a result."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name.strip(". ") != ""


def _wrong_variations(metric: Metric) -> str:
    try:
        listed = list(metric.variations())
    except DoesNotApply:  # said again, and recorded, where the metric is tried
        return ""
    except Exception as error:
        return f"'variations' raised {describe(error)}"
    for one in listed:
        if not isinstance(one, Variation):
            return f"'variations' holds a {type(one).__name__}, not a probekit.metric.Variation"
        if not isinstance(one.name, str) or not _VARIATION.fullmatch(one.name):
            named = in_words(repr, one.name)
            return f"'variations' names one {named}, not of letters, digits, '.', '_' and '-'"
    names = Counter(one.name.lower() for one in listed)
    if twice := [name for name, count in names.items() if count > 1]:
        return f"'variations' names two of them '{twice[0]}'"
    return ""


def wrong_sample(chosen: Any, count: int) -> str:
    """Of what `Metric.sample` returned for `count` images."""
    try:
        places = [operator.index(i) for i in chosen]
    except TypeError:
        return f"'sample' returned {in_words(repr, chosen)[:80]}, not the positions of images"
    if not places:
        return "'sample' chose no image; raise DoesNotApply where there is none to measure"
    if outside := [i for i in places if not 0 <= i < count]:
        return f"'sample' chose image {outside[0]} of {count}, counted from 0"
    if len(set(places)) < len(places):
        return f"'sample' chose image {Counter(places).most_common(1)[0][0]} twice"
    return ""


def wrong_rows(rows: Sequence[Any], every: Sequence[Row]) -> str:
    """Of what `Metric.rows` returned, out of `every` row of the model."""
    if odd := [row for row in rows if not isinstance(row, Row)]:
        return f"'rows' returned a {type(odd[0]).__name__}, not some of the rows it was given"
    labels = Counter(row.label for row in rows)
    if strange := sorted(labels.keys() - {row.label for row in every}):
        return f"'rows' returned '{strange[0]}', which the model hasn't got"
    if twice := [label for label, count in labels.items() if count > 1]:
        return f"'rows' returned '{twice[0]}' twice"
    return ""


def wrong_values(metric: Metric, values: Any, layer: Layer) -> str:
    """Of what `Metric.measure` returned for a layer; whether the numbers are finite is asked later."""
    dims = metric.dims
    if not isinstance(values, Mapping) or set(values) != set(dims):
        got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        return f"'measure' returned {got}, but 'dims' declares {sorted(dims)}"
    for name, value in values.items():
        if not isinstance(value, Tensor):
            return f"'{name}' is a {type(value).__name__}, not a tensor"
        if value.layout != torch.strided or value.is_meta:
            return f"'{name}' is a {'meta' if value.is_meta else 'sparse'} tensor, not a dense one of numbers"
        if value.is_complex():
            return f"'{name}' is of {value.dtype}, not real numbers"
        axes = ("image", *dims[name])
        if value.dim() != len(axes) or len(value) != layer.batch:
            shape = f"'{name}' has shape {tuple(value.shape)} for {layer.batch} images"
            return f"{shape}; 'dims' says ({', '.join(axes)}){_whole_images(value, layer)}"
        if "head" in axes and value.shape[axes.index("head")] != layer.heads:
            return f"'{name}' has shape {tuple(value.shape)}, but the layer has {layer.heads} heads"
    return ""


def _whole_images(value: Tensor, layer: Layer) -> str:
    """The usual reason for a wrong shape on windows: tokens of a layer aren't cut into them."""
    if layer.group is None or not value.dim() or len(value) * layer.window_count != layer.batch:
        return ""
    return '. Tokens are those of whole images, not of windows: say windows = "own" for them'


def described(found: Any) -> tuple[dict[str, np.ndarray], str]:
    """What `Metric.describe` returned, as arrays, and what is wrong with it."""
    if not isinstance(found, Mapping):
        return {}, f"'describe' returned {type(found).__name__}, not a mapping"
    arrays = {}
    for name, value in found.items():
        if not _nameable(name):
            return {}, f"'describe' names a constant {in_words(repr, name)}, which can't name a variable"
        try:
            value = value.detach().cpu() if isinstance(value, Tensor) else value
            arrays[name] = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError):
            return (
                {},
                f"'describe' gives '{name}' as {type(value).__name__}, not a number or an array of them",
            )
        if np.isinf(arrays[name]).any():
            return {}, f"'describe' gives '{name}' that is not finite"
    return arrays, ""


def wrong_summary(name: str, result: Any) -> str:
    """Of what `Metric.summarize` of the metric `name` returned: can it be told and drawn?"""
    if not isinstance(result, xr.Dataset):
        return f"'summarize' returned {type(result).__name__}, not an xarray.Dataset"
    means = [n for n, v in result.data_vars.items() if v.attrs.get("role") == "mean"]
    values = dict.fromkeys([name, *means] if name in result.data_vars else means)
    if not values:
        return f"'summarize' gives no '{name}', nor another variable with role=\"mean\""
    if wrong := _off_layers(result, values, exactly=False):
        return wrong
    ends = ("_curve", "_curve_low", "_curve_high")
    if wrong := _off_layers(result, [f"{v}{end}" for v in values for end in ends], exactly=True):
        return wrong
    for coordinate in ("layer", "depth"):
        if coordinate not in result.coords or result[coordinate].dims != ("layer",):
            way_out = "probekit.summaries.layer_coordinates(traces.rows) makes it"
            return f"'summarize' gives no coordinate '{coordinate}' of the layers; {way_out}"
    return ""


def _off_layers(result: xr.Dataset, names: Iterable[str], *, exactly: bool) -> str:
    """Which of the variables isn't numbers over layers, and over nothing else if `exactly`."""
    for name in (n for n in names if n in result.data_vars):
        dims, kind = result[name].dims, result[name].dtype
        if (dims if exactly else dims[:1]) != ("layer",):
            said = "is not one number per layer" if exactly else "has not 'layer' as its first axis"
            return f"'summarize' gives a '{name}' that {said}: its axes are ({', '.join(map(str, dims))})"
        if kind.kind not in "biuf":
            return f"'summarize' gives a '{name}' of {kind}, not of numbers"
    return ""
