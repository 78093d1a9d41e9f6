"""The command line's verbs from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.errors import DoesNotApply, MetricError, ProbekitError, UsageError
from probekit.grid import make_grid, resolve
from probekit.metric import Metric, Traces
from probekit.plugins.catalog import Catalog
from probekit.plugins.loading import blamed, describe
from probekit.store.runfolder import Run, choose_folder

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor, nn

    from probekit.engine import Collector
    from probekit.models.model import Model


def run(
    models: str | Sequence[str],
    datasets: str | Sequence[str] = (),
    metrics: str | Sequence[str] = "all",
    *,
    out: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    on_event: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Run:
    """Measure a grid of models x metrics x datasets, doing only what is missing in `out`.

    models, metrics, datasets: references as on the command line, e.g. ``"moco:vit-b16@random"``; without a
               dataset 512 images of ``shapetex``
    out:       the run's folder; by default a new one under ``runs``, or the newest of the same grid
    plugins:   files with metrics or hooks, as ``--plugin``
    on_event:  hears of progress (`probekit.events.Event`)
    settings:  limit, train, train_limit, seed, batch_size, device, dtype, image_size, workers, on_bad_image,
               allow_unwatched

    Raises `ProbekitError`. A metric that fails is recorded in the run, not raised.
    """
    from probekit.execution import execute

    as_list = [v if not isinstance(v, str) else [v] for v in (models, datasets, metrics)]
    grid = make_grid(
        {"models": as_list[0], "datasets": as_list[1], "metrics": as_list[2], **settings}, "run()"
    )
    catalog = Catalog.load(plugins)
    resolved = resolve(grid, catalog)
    folder = Path(out) if out is not None else choose_folder(resolved)[0]
    return execute(resolved, catalog, folder, on_event or (lambda event: None))


def open(path: str | Path) -> Run:
    """The run in a folder."""
    return Run(path)


def probe(
    model: str | nn.Module | Model,
    images: Tensor,
    metrics: Sequence[str | Metric | type[Metric]] = ("all",),
    *,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
    allow_unwatched: bool = False,
) -> Mapping[str, xr.Dataset]:
    """Measure one model on images in memory.

    model:   any `nn.Module` (left as it was), a `Model`, or a model name
    images:  (B, 3, H, W), floats normalised as the model wants them, B >= 1; moved to the module's device
    metrics: names, `Metric` classes or objects, no two of one name; of ``"all"``, those that don't apply
             are left out

    Returns ``{metric: xarray.Dataset}``; the variable named like the metric has dims layer and head (or
    frequency), averaged over images. Raises `DoesNotApply` for a metric asked for by name that has no
    meaning for this model, `MetricError` for one that is broken, `WatchError` for a model that can't be
    watched, `PluginError` for one whose code fails, `UsageError` for arguments that make no sense.
    """
    import torch

    from probekit.engine import collector, measure_batch, numerics, within_memory
    from probekit.models.model import Model, load_model, wrap
    from probekit.subject import watched

    if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] != 3 or not len(images):
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise UsageError(f"images must be a tensor (B, 3, H, W), not {shape}")
    asked = {"seed": seed, "batch_size": batch_size, "dtype": dtype, "allow_unwatched": allow_unwatched}
    batch_size = make_grid({"models": ["one"], **asked}, "probe()").batch_size or len(images)
    catalog = Catalog.load()
    if isinstance(model, str):
        model = load_model(model, catalog, seed=seed)
    elif not isinstance(model, (torch.nn.Module, Model)):
        wrap(model)  # says what a model is
    chosen = _metrics(metrics, catalog)
    measured = _measured(chosen, catalog)
    loaded = model if isinstance(model, Model) else Model(model)
    loaded.check()
    module = loaded.module
    training = {m: m.training for m in module.modules()}
    first = next(module.parameters(), None)
    device = first.device if first is not None else images.device
    _require_floats(images, first, dtype)
    try:
        with numerics(device, dtype), blamed(f"model {loaded.who}"):
            with within_memory(device):
                pixels = images.to(device)
            watcher = watched(loaded, pixels, allow_unwatched=allow_unwatched)
            collectors = {name: collector(metric, watcher) for name, metric in measured.items()}
            taken = {name: _sampled(name, metric, len(images)) for name, metric in measured.items()}
            parts: dict[str, list[dict[str, Any]]] = {name: [] for name in measured}
            for start in range(0, len(images), batch_size):
                batch = range(start, min(start + batch_size, len(images)))
                picked = [[i - start for i in taken[name] if i in batch] for name in measured]
                with within_memory(device, len(batch)):
                    shown = pixels[start : batch.stop]
                    found = measure_batch(watcher, shown, list(collectors.values()), picked)
                for name, values, some in zip(measured, found, picked, strict=True):
                    parts[name] += [values] if some else []
    finally:
        for m, mode in training.items():
            m.training = mode
    results = {}
    for name, (metric, required) in chosen.items():
        source = metric.source or name
        c = collectors[source]
        if c.failure is not None:
            raise MetricError(f"metric '{name}': {c.failure.message}")
        try:
            if not c.applies:
                raise DoesNotApply(next(iter(c.reasons.values()), "the model has no such layers"))
            size = watcher.anatomy.image_size
            results[name] = _summarised(
                name, metric, c, parts[source], taken[source], len(images), seed, size
            )
        except DoesNotApply as reason:
            if required:
                raise DoesNotApply(f"metric '{name}' does not apply: {reason.message}") from None
    return results


def _require_floats(images: Tensor, weights: Tensor | None, dtype: str) -> None:
    """Raise `UsageError` for images that aren't the numbers the model computes with."""
    given = str(images.dtype).removeprefix("torch.")
    if not images.is_floating_point():
        raise UsageError(
            f"images are {given}, not floats",
            hint="normalise them as the model wants: (pixels / 255 - mean) / std",
        )
    if not bool(images.isfinite().all()):
        raise UsageError("images hold NaN or infinity")
    if (
        dtype == "float32"
        and weights is not None
        and weights.is_floating_point()
        and weights.dtype != images.dtype
    ):
        own = str(weights.dtype).removeprefix("torch.")
        raise UsageError(f"images are {given}, the model's weights are {own}", hint=f"images.to(torch.{own})")


def _sampled(name: str, metric: Metric, count: int) -> Sequence[int]:
    from probekit.contract import wrong_sample

    with _metric_blamed(name, "'sample'"):
        chosen = metric.sample(count, None)
        wrong = wrong_sample(chosen, count) if chosen is not None else ""
    if wrong:
        raise MetricError(f"metric '{name}': {wrong}")
    return range(count) if chosen is None else sorted(chosen)


def _summarised(
    name: str,
    metric: Metric,
    measured: Collector,
    parts: Sequence[Mapping[str, Any]],
    taken: Sequence[int],
    of: int,
    seed: int,
    image_size: tuple[int, int],
) -> xr.Dataset:
    """A metric's result from what was measured, batch by batch, of the images `taken` of so many."""
    import numpy as np

    from probekit.contract import wrong_summary

    with _metric_blamed(name, "'summarize'"):
        values = {n: np.concatenate([p[n] for p in parts]) for n in measured.metric.dims}
        ids, sampled_of = [str(i) for i in taken], of if len(taken) < of else 0
        traces = Traces(
            values, measured.rows, ids, None, measured.constants, seed, sampled_of, image_size=image_size
        )
        found = metric.summarize(traces)
        wrong = wrong_summary(metric.name, found)
    if wrong:
        raise MetricError(f"metric '{name}': {wrong}")
    return found


@contextmanager
def _metric_blamed(name: str, what: str) -> Iterator[None]:
    """What a metric's code raises by mistake becomes a `MetricError` that names it."""
    try:
        yield
    except DoesNotApply:
        raise
    except ProbekitError as error:
        raise MetricError(f"metric '{name}': {error.message}", hint=error.hint) from error
    except (Exception, SystemExit) as error:
        raise MetricError(f"metric '{name}': {what} raised {describe(error)}") from error


def _metrics(
    asked: Sequence[str | Metric | type[Metric]], catalog: Catalog
) -> dict[str, tuple[Metric, bool]]:
    """Metric objects by the name their result gets, each with whether it was asked for by name.

    One that needs more than images alone is refused, or left out of ``"all"``. Two of one name are refused:
    the second's result would take the first's place.
    """
    from probekit.jobs import make_metric

    found: dict[str, tuple[Metric, bool]] = {}
    own: set[str] = set()
    for item in asked if isinstance(asked, Iterable) and not isinstance(asked, str) else [asked]:
        if isinstance(item, str):
            named = {str(e.ref): e for e in catalog.select("metrics", [item])}
            twice = own & named.keys()
            for name, entry in named.items():
                required = item != "all" or (name in found and found[name][1])
                found[name] = make_metric(entry, catalog), required
        else:
            metric = _own_metric(item)
            twice = {metric.name} & found.keys()
            own.add(metric.name)
            found[metric.name] = metric, True
        if twice:
            raise UsageError(
                f"two metrics are called '{min(twice)}', and results go by their names",
                hint="probe them one after the other, or give a subclass another 'name'",
            )
    chosen = {}
    for name, (metric, required) in found.items():
        wants = sorted(metric.requires) + ["variations"] * bool(metric.variations())
        if not wants:
            chosen[name] = metric, required
        elif required:
            raise DoesNotApply(
                f"metric '{name}' does not apply to images alone: it needs {wants[0]}",
                hint="give a dataset: probekit.run(...)",
            )
    return chosen


def _own_metric(item: Any) -> Metric:
    """A metric given as a class or an object. Raises `UsageError` or `MetricError` for what is none."""
    from probekit.contract import wrong_declaration

    if not isinstance(item, Metric) and not (isinstance(item, type) and issubclass(item, Metric)):
        given = f"the class '{item.__name__}'" if isinstance(item, type) else f"a '{type(item).__name__}'"
        raise UsageError(
            f"a metric is a name, a probekit.Metric class or an object of one, not {given}",
            hint="`probekit list metrics` shows the names",
        )
    kind = item if isinstance(item, type) else type(item)
    try:
        metric = item() if isinstance(item, type) else item
    except ProbekitError:
        raise
    except (Exception, SystemExit) as error:
        raise MetricError(
            f"metric class '{kind.__name__}' can't be made without options: {describe(error)}",
            hint=f"give an object: {kind.__name__}(...)",
        ) from error
    if wrong := wrong_declaration(metric):
        raise MetricError(f"metric class '{kind.__name__}': {wrong}")
    return metric


def _measured(chosen: Mapping[str, tuple[Metric, bool]], catalog: Catalog) -> dict[str, Metric]:
    """The metrics that measure, by name: those chosen, and those whose traces they draw on."""
    from probekit.jobs import make_metric

    found = {name: metric for name, (metric, _) in chosen.items() if not metric.source}
    for metric, _ in chosen.values():
        if metric.source and metric.source not in found:
            found[metric.source] = make_metric(catalog.metric(metric.source), catalog)
    return found
