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
    datasets: str | Sequence[str],
    metrics: str | Sequence[str] = "all",
    *,
    out: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    on_event: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Run:
    """Measure a grid of models x metrics x datasets, doing only what is missing in `out`.

    models, metrics, datasets: references as on the command line, e.g. ``"moco:vit-b16@random"``
    out:       the run's folder; by default a new one under ``runs``, or the newest of the same grid
    plugins:   files with metrics or hooks, as ``--plugin``
    on_event:  hears of progress (`probekit.events.Event`)
    settings:  limit, seed, batch_size, device, dtype, image_size, workers, on_bad_image, allow_unwatched

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
            collectors = [collector(metric, watcher) for metric, _ in chosen.values()]
            measured = [measure_batch(watcher, batch, collectors) for batch in pixels.split(batch_size)]
    finally:
        for m, mode in training.items():
            m.training = mode
    results = {}
    for number, (name, found) in enumerate(zip(chosen, collectors, strict=True)):
        metric, required = chosen[name]
        if found.failure is not None:
            raise MetricError(f"metric '{name}': {found.failure.message}")
        if not found.applies:
            if required:
                raise DoesNotApply(f"metric '{name}' does not apply: {next(iter(found.reasons.values()))}")
            continue
        values = {n: np.concatenate([p[number][n] for p in measured]) for n in metric.dims}
        ids = [str(i) for i in range(len(images))]
        results[name] = metric.summarize(Traces(values, found.rows, ids, None, found.constants, seed))
    return results


def _metrics(
    asked: Sequence[str | Metric | type[Metric]], catalog: Catalog
) -> dict[str, tuple[Metric, bool]]:
    """Metric objects by the name their result gets, each with whether it was asked for by name."""
    from probekit.execution import make_metric

    chosen: dict[str, tuple[Metric, bool]] = {}
    for item in [asked] if isinstance(asked, (str, Metric, type)) else asked:
        if isinstance(item, str):
            for entry in catalog.select("metrics", [item]):
                chosen[str(entry.ref)] = make_metric(entry, catalog), item != "all"
        else:
            metric = item() if isinstance(item, type) else item
            chosen[metric.name] = metric, True
    return chosen
