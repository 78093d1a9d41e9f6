"""Differences between models with their intervals: paired over images, or over the trainings of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from probekit.findings.curves import Curves
from probekit.findings.finding import NAN, Effect, NotMeasured
from probekit.findings.spans import Over, Peak
from probekit.names import quoted
from probekit.summaries import LEVEL, RESAMPLES, mean_of, resampled_means

FEWEST = 10
"""Fewer images give no interval: a percentile bootstrap of less promises more than it keeps."""


@dataclass(frozen=True)
class Term:
    """A weighted reading of one subject's curves: of its one training, or of several."""

    weight: float
    curves: tuple[Curves, ...]


Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., terms) readings -> (...)"""


def effect(terms: Sequence[Term], over: Over, seed: int, statistic: Statistic | None = None) -> Effect:
    """The weighted sum of what `over` reads from each term's curves, with its 95 % interval.

    Where a term has several trainings the interval is over trainings: a t-interval. Else it is a paired
    percentile bootstrap over the images all have in common, the draws of `probekit.summaries`; and where a
    metric keeps nothing per image, the results' own intervals, combined as if independent.

    statistic: in place of the weighted sum; such a one has no interval but the bootstrap's

    Raises `NotMeasured` where curves can't be compared.
    """
    curves = [one for term in terms for one in term.curves]
    _comparable(curves)
    summed = statistic or (lambda readings: readings @ np.array([term.weight for term in terms]))
    units = "of the depth" if isinstance(over, Peak) else _of_a_difference(curves[0].units)
    note = _note(curves)
    if any(len(term.curves) > 1 for term in terms):
        readings = [np.array([float(over.read(c.mean, c.place)) for c in term.curves]) for term in terms]
        value = float(summed(np.array([r.mean() for r in readings])))
        count = sum(map(len, readings))
        if statistic is not None:
            return Effect(value, units=units, count=count, why="trainings are grouped", note=note)
        half, why = _half_width([term.weight for term in terms], readings)
        return Effect(value, value - half, value + half, units, "trainings", count, why, note)
    if all(c.values is not None for c in curves):
        return _over_images(curves, over, seed, summed, units, note)
    value = float(summed(np.array([float(over.read(c.mean, c.place)) for c in curves])))
    if statistic is not None or isinstance(over, Peak):
        why = "the metric keeps no values of each image"
        return Effect(value, units=units, why=why, note=note)
    return _from_results(terms, over, value, units, note)


def _of_a_difference(units: str) -> str:
    return "percentage points" if units == "%" else units


def _comparable(curves: Sequence[Curves]) -> None:
    first = curves[0]
    for other in curves[1:]:
        both = f"{quoted(first.model)} and {quoted(other.model)}"
        again = "run the older one again in a new folder"
        if other.version != first.version:
            raise NotMeasured(f"{both} were measured by different versions of the metric", hint=again)
        if other.prints != first.prints:
            raise NotMeasured(
                f"{both} were measured on different images: the dataset changed in between", hint=again
            )


def _note(curves: Sequence[Curves]) -> str:
    """Where the curves were taken at different places of an inner axis: other grids, other frequencies."""
    places = [c.at for c in curves if c.at]
    if len(set(places)) > 1:
        where = "the models' values were taken at different places, "
    elif any(len(at) > 1 for at in places):
        where = "the layers' values were taken at different places, "
    else:
        return ""
    texts = [" to ".join(f"{p:.3g}" for p in dict.fromkeys((at[0], at[-1]))) for at in dict.fromkeys(places)]
    return where + " and ".join(texts)


def _over_images(
    curves: Sequence[Curves], over: Over, seed: int, summed: Statistic, units: str, note: str
) -> Effect:
    common = common_images(curves)
    if not common:
        raise NotMeasured("the models have no image in common")
    means, draws = [], []
    for each in curves:
        values = _of_images(each, common)
        means.append(over.read(mean_of(values, 0), each.place))
        draws.append(over.read(_resampled(each, common, seed), each.place))
    value = float(summed(np.array(means, dtype=np.float64)))
    if len(common) < FEWEST:
        images = "1 image" if len(common) == 1 else f"{len(common)} images"
        why = f"{images} in common, at least {FEWEST} are needed"
        return Effect(value, units=units, count=len(common), why=why, note=note)
    resampled = summed(np.stack(draws, axis=-1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Effect(value, float(low), float(high), units, "images", len(common), note=note)


def common_images(curves: Sequence[Curves]) -> tuple[str, ...]:
    """Images all have, in the first one's order. Raises `NotMeasured` where an id occurs twice."""
    if all(c.images == curves[0].images for c in curves):
        shared = set(curves[0].images)
    else:
        shared = set.intersection(*(set(c.images) for c in curves))
    for each in curves:
        if len(set(each.images)) != len(each.images):
            raise NotMeasured(f"images of {quoted(each.model)} can't be paired: an id occurs twice")
    return tuple(i for i in curves[0].images if i in shared)


def _of_images(curves: Curves, images: tuple[str, ...]) -> np.ndarray:
    """(images, rows)"""
    if images == curves.images:
        return curves.values
    position = {image: index for index, image in enumerate(curves.images)}
    return curves.values[[position[image] for image in images]]


def _resampled(curves: Curves, images: tuple[str, ...], seed: int) -> np.ndarray:
    """(resamples, rows) means; the same draws of images for every model, which is what pairs them."""
    if images not in curves.resampled:
        values = _of_images(curves, images)
        columns = np.arange(values.shape[1])
        curves.resampled[images] = resampled_means(values, columns, seed, RESAMPLES)
    return curves.resampled[images]


def _half_width(weights: Sequence[float], readings: Sequence[np.ndarray]) -> tuple[float, str]:
    """Half the t-interval of sum_k w_k mean(x_k), and why there is none.

    Welch's where every term has several trainings; where one has a single one, its spread is taken to be the
    others' (pooled variance).
    """
    from scipy import stats

    sizes = np.array([len(r) for r in readings])
    spreads = np.array([r.var(ddof=1) if len(r) > 1 else NAN for r in readings])
    if np.nansum(spreads) == 0:
        return NAN, "the trainings do not differ at all"
    square = np.array(weights) ** 2
    several = sizes > 1
    if several.all():
        parts = square * spreads / sizes
        variance = parts.sum()
        freedom = variance**2 / (parts**2 / (sizes - 1)).sum()
    else:
        freedom = float((sizes[several] - 1).sum())
        pooled = (spreads[several] * (sizes[several] - 1)).sum() / freedom
        variance = pooled * (square / sizes).sum()
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom) * math.sqrt(variance)), ""


def _from_results(terms: Sequence[Term], over: Over, value: float, units: str, note: str) -> Effect:
    """Each model's interval widened as if its layers erred together, models as if they erred apart."""
    down = up = 0.0
    for term in terms:
        (curves,) = term.curves
        weights = term.weight * over.weights(curves.place)
        below, above = curves.mean - curves.low, curves.high - curves.mean
        used = weights != 0
        below, above, weights = below[used], above[used], weights[used]
        down += float(np.where(weights > 0, weights * below, -weights * above).sum()) ** 2
        up += float(np.where(weights > 0, weights * above, -weights * below).sum()) ** 2
    low, high = value - math.sqrt(down), value + math.sqrt(up)
    if math.isnan(low) or math.isnan(high):
        return Effect(
            value, units=units, why="the metric gives no interval and no values of each image", note=note
        )
    return Effect(value, low, high, units, "results", len(terms), note=note)
