"""Carry out a grid, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from probekit.cell import Forecast, forecast_cell, run_cell
from probekit.datasets.dataset import Dataset
from probekit.engine import pick_device
from probekit.errors import PluginError
from probekit.events import Listener, nobody
from probekit.finishing import compare_models
from probekit.grid import Resolved
from probekit.jobs import Chosen, choose_metrics
from probekit.plugins.catalog import Catalog, Entry
from probekit.store.cells import CellFolder
from probekit.store.runfolder import Run, create_run
from probekit.store.writing import RunLock
from probekit.subject import Live, Subject, open_dataset, versions


def execute(resolved: Resolved, catalog: Catalog, out: Path, listen: Listener = nobody) -> Run:
    """Do what is missing of a grid in the folder `out` and return the run.

    A metric, model or dataset that fails is recorded and the rest goes on. Ctrl-C leaves everything complete
    that was completed; the same call does the rest.

    Raises `ProbekitError` for what no cell can survive: a locked, full or newer folder, an unknown dataset,
    a path that leads to no images.
    """
    with_metrics, loads = _arranged(resolved, catalog, listen)
    with RunLock(out):
        create_run(out, resolved, versions())
        for model, dataset, load in loads:
            run_cell(CellFolder(out, model, dataset), load, with_metrics, resolved.grid, listen)
        return finish_run(Run(out), with_metrics, listen)


def forecast(resolved: Resolved, catalog: Catalog, out: Path) -> list[Forecast]:
    """What `execute` would do, from one measured batch of two images per pass. Writes nothing."""
    with_metrics, loads = _arranged(resolved, catalog, nobody)
    return [
        forecast_cell(CellFolder(out, model, dataset), load, with_metrics, resolved.grid)
        for model, dataset, load in loads
    ]


def _arranged(
    resolved: Resolved, catalog: Catalog, listen: Listener
) -> tuple[list[Chosen], list[tuple[str, str, Callable[[], Subject]]]]:
    """The metrics, and every cell's model and dataset with what loads them."""
    device = pick_device(resolved.grid.device)
    datasets = [(entry, _opened(entry, catalog)) for entry in resolved.datasets]
    train = open_dataset(resolved.train, catalog) if resolved.train else None
    # `--train` may name a dataset by its held-out images: what is meant is its train split
    train = train.train if train is not None and train.train is not None else train
    chosen = choose_metrics(resolved.metrics, catalog)
    cells = [
        (
            str(model.ref),
            str(entry.ref),
            partial(_refuse, dataset)
            if isinstance(dataset, PluginError)
            else partial(Live.load, model, (entry, dataset), resolved.grid, catalog, device, listen, train),
        )
        for model in resolved.models
        for entry, dataset in datasets
    ]
    return chosen, cells


def _opened(entry: Entry, catalog: Catalog) -> Dataset | PluginError:
    """A dataset, or what is wrong with its code: its cells fail with that, those of others are measured.

    A name or a path that the user got wrong is raised, before anything is measured.
    """
    try:
        return open_dataset(entry, catalog)
    except PluginError as error:
        return error


def _refuse(error: PluginError) -> Subject:
    raise error


def finish_run(run: Run, metrics: Sequence[Chosen], listen: Listener) -> Run:
    """When all cells are measured: the metrics that compare their models."""
    for chosen in metrics:
        if chosen.metric.others:
            compare_models(run, chosen.entry, chosen.metric, chosen.measured, listen)
    return run
