"""What metrics that read features out with a linear probe share: options, probes per row, intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
import xxhash
from scipy.special import ndtri

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.metric import Metric, Row, Traces
from probekit.metrics.depth import depth_curve
from probekit.metrics.pooled import POOLED, POOLS, source
from probekit.metrics.probing import GRADIENT, L2_GRID, LR_GRID, Probe, Recipe, fit_many
from probekit.summaries import LEVEL, layer_coordinates, result_attributes

_LAST: dict[bytes, list[Probe]] = {}  # what was fitted last, by what it was fitted to


@dataclass(frozen=True)
class Heads:
    """A trained probe for each row.

    places: of the rows among the traces' rows
    known:  the class numbers that occur in the train split
    """

    rows: Sequence[Row]
    places: Sequence[int]
    probes: Sequence[Probe]

    @property
    def known(self) -> np.ndarray:
        return self.probes[0].known

    def decide(self, traces: Traces) -> np.ndarray:
        """The class each row's probe gives each image, (rows, images) int64."""
        return np.stack([p.decide(x) for p, x in self._each(traces)])

    def ranks(self, traces: Traces, labels: Sequence[int]) -> np.ndarray:
        """How many classes come before each image's label, (rows, images) int64."""
        return np.stack([p.ranks(x, labels) for p, x in self._each(traces)])

    def right(self, traces: Traces, labels: Sequence[int]) -> np.ndarray:
        """Whether an image's label comes first, (rows, images) bool."""
        return self.ranks(traces, labels) == 0

    def _each(self, traces: Traces):
        for place, probe in zip(self.places, self.probes, strict=True):
            x = np.asarray(traces["features"][:, place, : len(probe.weights)])
            if not np.isfinite(x).all():
                raise MetricError(f"the features at '{traces.rows[place].label}' hold NaN or infinity")
            yield probe, x


class Readout(Metric):
    """A metric whose `summarize` trains probes on the features of the train split.

    pool:   ``mean`` of the patch tokens, ``cls`` (the first prefix token), or ``both`` concatenated
    norm:   affine-free, inside the probe: ``bn``, ``ln`` or ``none``
    solver: ``lbfgs`` (deterministic logistic regression) or ``sgd`` (the paper's Table A.1)
    l2, lr: a number; empty: chosen on a held-out part of the train split (l2 of sgd: 0.05)
    sites:  ``out``: the embedding and after each layer; ``all``: after each attention too
    own:    the subclass's own options
    """

    requires: ClassVar[frozenset[str]] = frozenset({"labels", "train"})
    whose: ClassVar[frozenset[str] | None] = None
    """The parts of a model it looks at; all by default."""

    def __init__(
        self,
        own: Mapping[str, Any] | None = None,
        *,
        pool: str = "mean",
        norm: str = "bn",
        solver: str = "lbfgs",
        l2: str | float = "",
        lr: str | float = "",
        sites: str = "out",
    ):
        super().__init__(pool=pool, norm=norm, solver=solver, l2=l2, lr=lr, sites=sites, **(own or {}))
        _among("sites", sites, ("out", "all"))
        self.source = source(pool, POOLS)
        self.sites = {"embed", "out"} | ({"mid"} if sites == "all" else set())
        self.recipe = recipe(norm, solver, l2, lr)
        self.conventions = {
            "features": f"{POOLED[pool]}, raw residual stream, no final norm of the model",
            **recipe_conventions(self.recipe),
        }

    def rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        wanted = [r for r in rows if r.site in self.sites]
        return [r for r in wanted if self.whose is None or r.part in self.whose]

    def heads(self, traces: Traces) -> Heads:
        """Probes trained on the train split, for the rows that have features.

        Raises `DoesNotApply` where there is nothing to train on, or no row has features.
        """
        train = traces.train
        if train is None or train.labels is None or not len(train):
            raise DoesNotApply("there is no train split with images of these classes to train a probe on")
        wanted = self.rows(traces.rows)
        rows, places, widths = [], [], []
        for place, row in enumerate(traces.rows):
            if row not in wanted:
                continue
            width = int((~np.isnan(train["features"][0, place])).sum())  # narrower rows end in NaN
            if width:
                rows.append(row)
                places.append(place)
                widths.append(width)
        if not rows:
            raise DoesNotApply("no layer of this model has features")
        matrices = _Matrices(train["features"], places, widths)
        return Heads(rows, places, self._fitted(matrices, traces))

    def _fitted(self, matrices: Sequence[np.ndarray], traces: Traces) -> list[Probe]:
        """The last ones are kept: accuracy, noise and shape bias read out the same features, one after
        another, and a probe takes longer than all that is asked of it."""
        labels, classes = np.asarray(traces.train.labels, dtype=np.int64), classes_of(traces)
        content = xxhash.xxh3_128(repr((self.recipe, classes, traces.seed, traces.device)).encode())
        for x in itertools.chain([labels], matrices):
            content.update(f"{x.dtype}{x.shape}".encode())
            content.update(np.ascontiguousarray(x))
        key = content.digest()
        if key not in _LAST:
            found = fit_many(matrices, labels, classes, self.recipe, seed=traces.seed, device=traces.device)
            _LAST.clear()
            _LAST[key] = found
        return _LAST[key]


class _Matrices(Sequence):
    """The features of each row, read when they are asked for: all rows needn't fit into memory."""

    def __init__(self, values: np.ndarray, places: Sequence[int], widths: Sequence[int]):
        self.values, self.places, self.widths = values, places, widths

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> np.ndarray:
        place, width = self.places[number], self.widths[number]
        return self.values[:, place, :width]


def recipe(norm: str, solver: str, l2: str | float, lr: str | float) -> Recipe:
    """The recipe that options of a metric name. Raises `UsageError`."""
    _among("norm", norm, ("bn", "ln", "none"))
    _among("solver", solver, ("lbfgs", "sgd"))
    if lr != "" and solver == "lbfgs":
        raise UsageError("lr is an option of solver=sgd", hint="drop lr, or add solver=sgd")
    return Recipe(norm, solver, _number("l2", l2), _number("lr", lr))


def recipe_conventions(recipe: Recipe) -> dict[str, Any]:
    """What a reader must know about how the probe was trained."""
    found: dict[str, Any] = {
        "norm": {"bn": "batch norm of the train split", "ln": "layer norm", "none": "none"}[recipe.norm]
        + (", no affine parameters, eps 1e-6" if recipe.norm != "none" else "")
    }
    where = (
        f"chosen by accuracy on {recipe.held_out:.0%} of the train split [my reading], then refitted to all"
    )
    if recipe.solver == "lbfgs":
        return found | {
            "probe": "multinomial logistic regression, float64, mean cross-entropy + l2/2 |W|^2, bias free",
            "stops": f"largest gradient element {GRADIENT:g}",
            "l2": f"of {', '.join(f'{v:g}' for v in L2_GRID)}, {where}" if recipe.l2 is None else recipe.l2,
        }
    return found | {
        "probe": f"SGD, batch {recipe.batch}, {recipe.epochs} epochs, cosine, no warm-up, no augmentation "
        f"(Table A.1); momentum {recipe.momentum}, zero start, last batch kept, decay of the bias too, "
        "rate times batch / 256 [my reading]",
        "l2": recipe.decay,
        "lr": f"of {', '.join(f'{v:g}' for v in LR_GRID)} (Table A.1: 1), {where}"
        if recipe.lr is None
        else recipe.lr,
    }


def classes_of(traces: Traces) -> int:
    """How many classes there are: those with a name, or as many as the numbers used."""
    if traces.classes is not None:
        return len(traces.classes)
    used = [traces.labels, traces.train.labels if traces.train else None, *traces.cues.values()]
    return 1 + max(int(np.max(numbers)) for numbers in used if numbers is not None and len(numbers))


def class_names(traces: Traces) -> np.ndarray:
    return np.array(traces.classes or [str(i) for i in range(classes_of(traces))], dtype=np.str_)


def best_constant(labels: Sequence[int], known: Sequence[int], k: int = 1) -> float:
    """Chance: the share in % of the labels that the best `k` constant answers among `known` give."""
    counts = np.bincount(np.asarray(labels), minlength=int(np.max(known)) + 1)[np.asarray(known)]
    return 100 * np.sort(counts)[::-1][:k].sum() / len(labels)


def wilson(hits: np.ndarray | int, trials: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a share in %, at `summaries.LEVEL`: low and high. NaN without a trial."""
    hits, n = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    z2 = ndtri((1 + LEVEL) / 2) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        p = hits / n
        middle = p + z2 / (2 * n)
        half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
        low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    # 0 of n and n of n end at 0 and 100, which rounding may miss by 1e-15
    low = np.where((hits == 0) & (n > 0), 0.0, low)
    return 100 * low, 100 * np.where((hits == n) & (n > 0), 1.0, high)


WILSON = f"{LEVEL:.0%}".replace("%", " %") + " Wilson score interval over {over}"


def share(
    name: str, hits: np.ndarray, trials: np.ndarray | int, dims: tuple[str, ...] = ("layer",)
) -> dict[str, xr.Variable]:
    """`name`, `_low` and `_high` in %; of one number a layer also `_curve`, `_curve_low`, `_curve_high`."""
    trials = np.broadcast_to(trials, np.shape(hits))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 100 * np.asarray(hits) / trials
    low, high = wilson(hits, trials)
    return numbers(name, found, low, high, "%", dims)


def numbers(
    name: str,
    found: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    units: str,
    dims: tuple[str, ...] = ("layer",),
) -> dict[str, xr.Variable]:
    """A value with its interval as reports expect it; its curve too, where it has one number a layer."""
    made = {
        "": (found, "mean" if dims[0] == "layer" else "table"),
        "_low": (low, "low"),
        "_high": (high, "high"),
    }
    variables = {
        f"{name}{suffix}": xr.Variable(dims, np.asarray(v, dtype=np.float64), {"units": units, "role": role})
        for suffix, (v, role) in made.items()
    }
    return variables | (depth_curve(name, found, low, high, units=units) if dims == ("layer",) else {})


def baseline(value: float | np.ndarray, rows: int, units: str = "%") -> xr.Variable:
    """The same for every layer, or one number a layer."""
    values = np.broadcast_to(np.asarray(value, dtype=np.float64), (rows,)).copy()
    return xr.Variable(("layer",), values, {"units": units, "role": "baseline"})


def chosen(heads: Heads) -> dict[str, xr.Variable]:
    """What each layer's probe was trained with, and how near to its optimum it ended."""
    made = {
        "l2": [p.l2 for p in heads.probes],
        "lr": [p.lr for p in heads.probes],
        "gradient": [p.gradient for p in heads.probes],
    }
    about = {"l2": "penalty", "lr": "learning rate for 256 images", "gradient": "largest element at the end"}
    return {
        name: xr.Variable(("layer",), np.array(values), {"role": "setting", "long_name": about[name]})
        for name, values in made.items()
        if not np.isnan(values).all()
    }


def dataset(
    metric: Metric,
    traces: Traces,
    rows: Sequence[Row],
    variables: Mapping[str, xr.Variable],
    interval: str,
    coordinates: Mapping[str, xr.Variable] | None = None,
    **attributes: Any,
) -> xr.Dataset:
    """The result: the variables over these rows, the images' ids, and how many images each split had."""
    counts = {"n_test": len(traces)} | ({"n_train": len(traces.train)} if traces.train is not None else {})
    attrs = {**result_attributes(metric, traces), "interval": interval, **counts, **attributes}
    return xr.Dataset(variables, {**layer_coordinates(rows), **(coordinates or {})}, attrs)


def _among(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"{name} is one of {', '.join(repr(c) for c in choices)}, not '{value}'")


def _number(name: str, text: str | float) -> float | None:
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    lowest = np.nextafter(0, 1) if name == "lr" else 0.0
    if not (lowest <= value < float("inf")):
        raise UsageError(f"{name} is a number{' above 0' if name == 'lr' else ''}, not '{text}'")
    return value
