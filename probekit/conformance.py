"""What every metric has to do, checked: `probekit.testing.check_metric` and ``probekit plugins check``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probekit import attention as core
from probekit.contract import described, wrong_declaration, wrong_summary, wrong_values
from probekit.engine import collector, measure_batch
from probekit.errors import DoesNotApply, MetricError, ProbekitError
from probekit.layer import Layer, Scores
from probekit.metric import Metric, Traces
from probekit.store.results import write_result
from probekit.testing import TinyViT, make_layer

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog


def check(metric: Metric | type[Metric], catalog: Catalog | None = None) -> None:
    """See `probekit.testing.check_metric`."""
    found = _made(metric)
    name = getattr(found, "name", None) or type(found).__name__
    if wrong := wrong_declaration(found):
        raise MetricError(f"metric '{name}': {wrong}")
    alone = not (found.source or found.requires or found.variations())
    if not alone:  # on made-up images of three classes, with all that a dataset can offer
        made_up = _made_up(found, catalog)
        _check_summary(found, _guarded(f"metric '{name}'", "summarize", found.summarize, made_up))
    if found.source:
        return
    applied = 0
    reason = ""
    for label, layer in _layers(found):
        try:
            _check_measure(found, label, layer)
            applied += 1
        except DoesNotApply as error:
            reason = error.message
    if not applied:
        raise MetricError(f"metric '{name}' applies to no layer of a plain ViT: {reason}")
    if alone:
        _check_probe(found)


def _made(metric: Metric | type[Metric]) -> Metric:
    if not isinstance(metric, type):
        if not isinstance(metric, Metric):
            raise MetricError(f"'{type(metric).__name__}' is not a subclass of probekit.Metric")
        return metric
    if not issubclass(metric, Metric):
        raise MetricError(f"'{metric.__name__}' is not a subclass of probekit.Metric")
    return _guarded(f"'{metric.__name__}'", "be made without options", metric)


def _guarded(who: str, what: str, call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`; what it raises by mistake becomes a `MetricError` that says so."""
    try:
        return call(*args)
    except ProbekitError:
        raise
    except Exception as error:
        raise MetricError(f"{who} can't {what}: it raised {type(error).__name__}: {error}") from error


def _layers(metric: Metric) -> list[tuple[str, Callable[[slice | Tensor], Layer]]]:
    """Kinds of layers, each as a function that makes one of some of four images."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(4, 37, 24, generator=generator)
    q, k, v = torch.randn(3, 4, 3, 37, 8, generator=generator).unbind()
    maps = core.probabilities(q, k, scale=1.5)
    wq, wk, wv = torch.randn(3, 4, 4, 3, 9, 8, generator=generator).unbind()  # images, windows, heads

    def whole(which: Any) -> Layer:
        return make_layer(q=q[which], k=k[which], v=v[which], tokens=tokens[which], grid=(6, 6), prefix=1)

    def given(which: Any) -> Layer:
        return make_layer(
            maps[which], v=v[which], q=q[which], k=k[which], tokens=tokens[which], grid=(6, 6), prefix=1
        )

    def oblong(which: Any) -> Layer:
        return make_layer(q=q[which], k=k[which], v=v[which], tokens=tokens[which], grid=(4, 9), prefix=1)

    def windowed(which: Any) -> Layer:
        parts = {n: t[which].flatten(0, 1) for n, t in (("q", wq), ("k", wk), ("v", wv))}
        return make_layer(**parts, tokens=tokens[which, 1:], grid=(6, 6), window=3)

    def output(which: Any) -> Layer:
        layer = whole(which)
        return replace(layer, captured={"output": tokens[which, 0]})

    if "output" in metric.needs:
        return [("a model's output", output)]
    return [
        ("a layer", whole),
        ("a layer with maps", given),
        ("a grid of 4 x 9", oblong),
        ("windows", windowed),
    ]


def _check_measure(metric: Metric, label: str, make: Callable[[Any], Layer]) -> None:
    everything = slice(None)
    values = _measured(metric, label, make(everything))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = _measured(metric, label, make(order))
    halves = [_measured(metric, label, make(part)) for part in (slice(0, 1), slice(1, 4))]
    for n, value in values.items():
        for what, other, expected in (
            ("with the images in another order", shuffled[n], value[order]),
            ("in another batch", torch.cat([h[n] for h in halves]), value),
        ):
            if not torch.allclose(other, expected, rtol=1e-3, atol=1e-5, equal_nan=metric.holes):
                raise MetricError(f"metric '{metric.name}': '{n}' of an image changes {what}, on {label}")


def _measured(metric: Metric, label: str, layer: Layer) -> dict[str, Tensor]:
    """Values per image, one view or the mean over windows; checked on the way."""
    own = metric.windows == "own" or "tokens" in metric.needs
    total: dict[str, Tensor] = {}
    for view in [layer] if own else layer.windows():
        before = {n: _snapshot(value) for n, value in view.captured.items()}
        values = _guarded(f"metric '{metric.name}'", f"measure {label}", metric.measure, view)
        changed = [n for n, value in view.captured.items() if not _equal(before[n], _snapshot(value))]
        if changed:
            raise MetricError(
                f"metric '{metric.name}' changes '{changed[0]}' in place, which others measure too"
            )
        _check_values(metric, label, view, values)
        said = _guarded(f"metric '{metric.name}'", f"describe {label}", metric.describe, view)
        constants, wrong = described(said)
        if holes := [n for n, constant in constants.items() if not np.isfinite(constant).all()]:
            wrong = f"'describe' gives '{holes[0]}' that is not finite"
        if wrong:
            raise MetricError(f"metric '{metric.name}': {wrong}, on {label}")
        for n, value in values.items():
            if view is not layer:
                value = view.unfold(value.float()).mean(1) * view.window_share
            total[n] = total[n] + value if n in total else value.clone()
    return total


def _snapshot(value: Any) -> list[Tensor]:
    if isinstance(value, Scores):
        return [t.clone() for t in (value.q, value.k, value.bias, value.probabilities) if t is not None]
    return [value.clone()] if isinstance(value, Tensor) else []


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _check_values(metric: Metric, label: str, layer: Layer, values: Any) -> None:
    wrong = wrong_values(metric, values, layer)
    for n, value in {} if wrong else values.items():
        if not value.is_floating_point():
            wrong = f"'{n}' is of {value.dtype}, not floating point"
        elif not bool((value.isfinite() | (value.isnan() & metric.holes)).all()):
            wrong = f"'{n}' is not finite"
    if wrong:
        raise MetricError(f"metric '{metric.name}': {wrong}, on {label}")


def _check_summary(metric: Metric, result: Any) -> None:
    """Whether a result can be told, drawn and stored."""
    if wrong := wrong_summary(metric.name, result):
        raise MetricError(f"metric '{metric.name}': {wrong}")
    with tempfile.TemporaryDirectory() as folder:
        write_result(Path(folder) / f"{metric.name}.nc", result)


def _made_up(metric: Metric, catalog: Catalog | None) -> Traces:
    """Traces of a `TinyViT` on noise that is brighter for each of three classes."""
    from probekit.plugins.catalog import Catalog
    from probekit.watch import Watcher

    catalog = catalog or Catalog.load()
    entry = catalog.metric(metric.source) if metric.source else None
    source = catalog.resolve_target(entry)(**entry.options) if entry else metric
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    watcher = Watcher(TinyViT(), images)

    def traces(count: int, seed: int) -> Traces:
        labels = [i % 3 for i in range(count)]
        noise = torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
        taken = collector(source, watcher)
        values = measure_batch(watcher, noise + torch.tensor(labels)[:, None, None, None], [taken])[0]
        if taken.failure is not None:
            raise MetricError(f"metric '{metric.name}': {taken.failure.message}")
        ids = [f"{seed}-{i}" for i in range(count)]
        shapes, textures = [i % 3 for i in range(count)], [(i + 1) % 3 for i in range(count)]

        def mask(position: int) -> np.ndarray:
            return np.indices((48, 48)).sum(0) // 32 % 3 - (position % 2)

        return Traces(
            values, taken.rows, ids, labels, taken.constants, 0, 0, ["a", "b", "c"],
            cues={"shape": shapes, "texture": textures}, mask=mask, image_size=(48, 48),
        )  # fmt: skip

    train = traces(36, 3)
    varied = {v.name: replace(traces(24, 4), train=train) for v in metric.variations()}
    return replace(traces(24, 4), train=train, variations=varied, others={"another": traces(24, 4)})


def _check_probe(metric: Metric) -> None:
    from probekit.api import probe

    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    whole, apart = (
        _guarded(f"metric '{metric.name}'", "be run by probekit.probe", _probed, probe, metric, images, size)
        for size in (4, 1)
    )
    _check_summary(metric, whole)
    if type(metric).summarize is Metric.summarize:
        for n, axes in metric.dims.items():
            if whole[n].dims != ("layer", *axes):
                raise MetricError(
                    f"metric '{metric.name}': '{n}' has the axes {whole[n].dims}, not (layer, ...)"
                )
            if not np.allclose(whole[n], apart[n], rtol=1e-3, atol=1e-5, equal_nan=True):
                raise MetricError(f"metric '{metric.name}': '{n}' depends on the size of the batch")


def _probed(probe: Callable[..., Mapping[str, Any]], metric: Metric, images: Tensor, batch_size: int) -> Any:
    return probe(TinyViT(), images, metrics=[metric], batch_size=batch_size)[metric.name]
