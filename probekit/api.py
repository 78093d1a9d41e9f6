"""The command line's verbs from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.errors import DoesNotApply, MetricError, UsageError
from probekit.grid import make_grid, resolve
from probekit.metric import Metric, Traces
from probekit.plugins.catalog import Catalog
from probekit.store.runfolder import Run, choose_folder

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor, nn

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
    images:  (B, 3, H, W), normalised as the model wants them, B >= 1; moved to the module's device
    metrics: names, `Metric` classes or objects; of ``"all"``, those that don't apply are left out

    Returns ``{metric: xarray.Dataset}``; the variable named like the metric has dims layer and head (or
    frequency), averaged over images. Raises `DoesNotApply` for a metric asked for by name that has no
    meaning for this model, `MetricError` for one that is broken, `WatchError` for a model that can't be
    watched.
    """
    import numpy as np
    import torch

    from probekit.engine import collector, measure_batch, numerics
    from probekit.models.model import Model, load_model, wrap
    from probekit.watch import Watcher

    if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] != 3 or not len(images):
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise UsageError(f"images must be a tensor (B, 3, H, W), not {shape}")
    catalog = Catalog.load()
    if isinstance(model, str):
        model = load_model(model, catalog, seed=seed)
    elif not isinstance(model, (torch.nn.Module, Model)):
        wrap(model)  # says what a model is
    chosen = _metrics(metrics, catalog)
    measured = _measured(chosen, catalog)
    loaded = model if isinstance(model, Model) else Model(model)
    module, parts = loaded.module, loaded.declared.parts if loaded.declared else None
    training = {m: m.training for m in module.modules()}
    first = next(module.parameters(), None)
    device = first.device if first is not None else images.device
    try:
        with numerics(device, dtype):
            pixels = images.to(device)
            watcher = Watcher(
                module,
                pixels,
                forward=loaded.forward,
                declared_parts=parts,
                allow_unwatched=allow_unwatched,
            )
            collectors = {name: collector(metric, watcher) for name, metric in measured.items()}
            taken = {name: _sampled(metric, len(images)) for name, metric in measured.items()}
            parts: dict[str, list[dict[str, Any]]] = {name: [] for name in measured}
            for start in range(0, len(images), batch_size):
                batch = range(start, min(start + batch_size, len(images)))
                picked = [[i - start for i in taken[name] if i in batch] for name in measured]
                found = measure_batch(watcher, pixels[start : batch.stop], list(collectors.values()), picked)
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
            values = {n: np.concatenate([p[n] for p in parts[source]]) for n in c.metric.dims}
            ids, of = [str(i) for i in taken[source]], len(images)
            traces = Traces(
                values,
                c.rows,
                ids,
                None,
                c.constants,
                seed,
                of if len(ids) < of else 0,
                image_size=watcher.anatomy.image_size,
            )
            results[name] = metric.summarize(traces)
        except DoesNotApply as reason:
            if required:
                raise DoesNotApply(f"metric '{name}' does not apply: {reason.message}") from None
    return results


def _sampled(metric: Metric, count: int) -> Sequence[int]:
    chosen = metric.sample(count, None)
    return range(count) if chosen is None else sorted(chosen)


def _metrics(
    asked: Sequence[str | Metric | type[Metric]], catalog: Catalog
) -> dict[str, tuple[Metric, bool]]:
    """Metric objects by the name their result gets, each with whether it was asked for by name.

    One that needs more than images alone is refused, or left out of ``"all"``.
    """
    from probekit.jobs import make_metric

    found: dict[str, tuple[Metric, bool]] = {}
    for item in [asked] if isinstance(asked, (str, Metric, type)) else asked:
        if isinstance(item, str):
            for entry in catalog.select("metrics", [item]):
                found[str(entry.ref)] = make_metric(entry, catalog), item != "all"
        else:
            metric = item() if isinstance(item, type) else item
            found[metric.name] = metric, True
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


def _measured(chosen: Mapping[str, tuple[Metric, bool]], catalog: Catalog) -> dict[str, Metric]:
    """The metrics that measure, by name: those chosen, and those whose traces they draw on."""
    from probekit.jobs import make_metric

    found = {}
    for name, (metric, _) in chosen.items():
        if not metric.source:
            found[name] = metric
        elif metric.source not in found:
            found[metric.source] = make_metric(catalog.metric(metric.source), catalog)
    return found
