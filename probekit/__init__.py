"""probekit: what did this Vision Transformer learn?

    import probekit

    results = probekit.probe(module, images, metrics=["nmi"])
    run = probekit.run(models=["moco:vit-b16@random"], metrics=["all"], datasets=["folder:photos"])
    run.result("nmi")

Names are imported when first used, so ``import probekit`` loads neither torch nor xarray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "probe": "api",
    "run": "api",
    "open": "api",
    "Run": "store.runfolder",
    "Metric": "metric",
    "Traces": "metric",
    "Layer": "layer",
    "Model": "models.model",
    "Dataset": "datasets.dataset",
    "Watcher": "watch.watcher",
    "Visitor": "watch.watcher",
    "Anatomy": "anatomy",
    "Declared": "anatomy",
    "ModelSpec": "specs",
    "MetricSpec": "specs",
    "DatasetSpec": "specs",
    "ReportSpec": "specs",
    "CommandSpec": "specs",
    "Option": "specs",
    "Weights": "specs",
    "Layout": "specs",
    "Preprocessing": "specs",
    "hookimpl": "hookspecs",
    "ProbekitError": "errors",
    "DoesNotApply": "errors",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vit-probekit")
    if name not in _PLACES:
        raise AttributeError(f"module 'probekit' has no attribute '{name}'")
    value = getattr(import_module(f"probekit.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
