"""One pass: batches of images go through a watched model; every metric measures every layer on the way."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probekit.attention import AttentionStats, exact_float32
from probekit.contract import described, wrong_rows, wrong_values
from probekit.errors import DataError, DoesNotApply, MetricError, ProbekitError, UsageError
from probekit.layer import Layer, Scores
from probekit.metric import Metric, Row
from probekit.plugins.loading import in_words
from probekit.watch import Visitor

if TYPE_CHECKING:
    from probekit.subject import Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Failure:
    """Why a metric has no result here: one sentence, and the traceback for whoever wrote it."""

    message: str
    details: str = ""

    @classmethod
    def of(cls, error: BaseException, who: str) -> Failure:
        """Of an exception that is being handled. who: what raised it, if it isn't one of ours"""
        if isinstance(error, ProbekitError):
            return cls(f"{error.message}; {error.hint}" if error.hint else error.message)
        return cls(f"{who} raised {type(error).__name__}: {in_words(str, error)}", traceback.format_exc())


class _Spoiled(BaseException):
    """A metric wrote into what the model and the others go on with: the forward pass is of no use.

    No `Exception`: the model's own code is between who raises it and who catches it.
    """


@dataclass
class Collector:
    """Gathers one metric's values over a pass.

    rows:      the result's layer axis
    constants: what `Metric.describe` said, ``{name: (rows, ...)}``, complete after the first batch
    reasons:   rows the metric has no meaning for, with why
    failure:   set when the metric broke its contract; from then on it is left out
    chosen:    positions of the batch's images that are measured; None for all
    """

    metric: Metric
    rows: Sequence[Row]
    failure: Failure | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    chosen: Sequence[int] | None = None
    _described: dict[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    _values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the axes, the same in every batch

    @property
    def of_output(self) -> bool:
        """Whether it measures the model's output instead of its layers."""
        return "output" in self.metric.needs

    @property
    def visitor(self) -> Visitor:
        return Visitor(frozenset(self.metric.needs), self._visit)

    @cached_property
    def _labels(self) -> frozenset[str]:
        return frozenset(row.label for row in self.rows)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for found in self._described.values() for name in found)
        return {
            name: _stack([self._described.get(row.label, {}).get(name) for row in self.rows])
            for name in names
        }

    @property
    def applies(self) -> bool:
        return len(self.reasons) < len(self.rows)

    def _visit(self, layer: Layer) -> None:
        label = layer.row.label
        if self.failure is not None or label in self.reasons or label not in self._labels:
            return
        if self.chosen is not None and len(self.chosen) < layer.batch:
            layer = layer.pick(self.chosen)
        shared: list[tuple[str, Tensor, int]] = []
        try:
            with exact_float32(layer._device):  # the forward around this may run in bfloat16
                own = self.metric.windows == "own" or "tokens" in self.metric.needs
                views = [layer] if own else layer.windows()
                shared = _shared([layer, *views], self.metric.needs)
                if label not in self._described:
                    self._describe(label, views)
                self._values[label] = self._measured(views, layer)
        except DoesNotApply as reason:
            self.reasons[label] = reason.message
        except ProbekitError as error:
            self.failure = Failure(f"{error.message} (at '{label}')")
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit too: others are measured in this pass
            text = f"it raised {type(error).__name__} at '{label}': {in_words(str, error)}"
            self.failure = Failure(text, traceback.format_exc())
        if written := [name for name, tensor, before in shared if tensor._version != before]:
            # q, k and v may be parts of one tensor, all written to if one is
            field = next((name for name in written if name in self.metric.needs), written[0])
            what = f"it changed the layer's '{field}' in place at '{label}'; the model and other metrics"
            self.failure = Failure(f"{what} go on with it, so write on a copy: '.clone()'")
            raise _Spoiled

    def _describe(self, label: str, views: Sequence[Layer]) -> None:
        found = _described(self.metric, views)
        for before in self._described.values():
            for name in found.keys() & before.keys():
                if found[name].ndim != before[name].ndim:
                    said = f"{found[name].ndim} axes, at another layer with {before[name].ndim}"
                    raise MetricError(f"'describe' gives '{name}' with {said}")
        self._described[label] = found

    def _measured(self, views: Sequence[Layer], layer: Layer) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for view in views:
            values = self.metric.measure(view)
            if wrong := wrong_values(self.metric, values, view):
                raise MetricError(wrong)
            for name, value in values.items():
                if view is not layer:
                    value = view.unfold(value.float()).mean(1) * view.window_share
                total[name] = total[name] + value if name in total else value
        return total

    def take(self, batch: int) -> dict[str, np.ndarray]:
        """This batch's values, ``{name: (batch, rows, *dims)}`` float32, NaN where a row has none."""
        found = {}
        for name in self.metric.dims:
            arrays = [
                self._values[row.label][name].detach().float().cpu().numpy()
                if row.label in self._values
                else None
                for row in self.rows
            ]
            for row, array in zip(self.rows, arrays, strict=True):
                if array is None or self.failure is not None:
                    continue
                wrong = np.isinf(array) if self.metric.holes else ~np.isfinite(array)
                if wrong.any():
                    what = "NaN" if np.isnan(array[wrong]).any() else "infinity"
                    self.failure = Failure(f"'{name}' is {what} at '{row.label}'")
            found[name] = np.moveaxis(_stack(arrays, (batch, *(0,) * len(self.metric.dims[name]))), 0, 1)
            now = found[name].shape[1:]
            if self._values and (before := self._sizes.setdefault(name, now)) != now:
                text = f"'{name}' has {before} values (layers, *axes) in one batch and {now} in another"
                self.failure = self.failure or Failure(text)
        self._values.clear()
        return found


def _described(metric: Metric, views: Sequence[Layer]) -> dict[str, np.ndarray]:
    """`describe` of a layer; of a windowed one, the mean over its windows."""
    found = []
    for view in views:
        arrays, wrong = described(metric.describe(view))
        if wrong:
            raise MetricError(wrong)
        found.append(arrays)
    if len(found) == 1:
        return found[0]
    shares = [view.window_share for view in views]
    return {n: sum(d[n] * share for d, share in zip(found, shares, strict=True)) for n in found[0]}


_KEPT = ("attention", "attention_full", "attention_stats", "distances", "prefix_mass")


def _shared(layers: Sequence[Layer], needs: Iterable[str]) -> list[tuple[str, Tensor, int]]:
    """Tensors that the model or other metrics go on with: name, tensor, how often it was written to.

    What a layer computes once for all metrics is computed here if it is needed, so that the first to read it
    isn't the first to write on it unseen.
    """
    found = []
    for layer in layers:
        for name in set(_KEPT).intersection(needs):
            with suppress(Exception):  # the metric gets it too, where it reads the field
                getattr(layer, name)
        kept = {name: vars(layer)[name] for name in _KEPT if name in vars(layer)}
        for name, value in {**layer.captured, **kept}.items():
            parts = vars(value).values() if isinstance(value, (Scores, AttentionStats)) else [value]
            tensors = [t for t in parts if isinstance(t, Tensor) and not t.is_inference()]
            found += [(name, t, t._version) for t in tensors]
    return found


def _stack(values: Sequence[Any], empty: tuple[int, ...] = ()) -> np.ndarray:
    """Rows of unequal length side by side, NaN where one has none."""
    arrays = [np.asarray(v, dtype=np.float32) if v is not None else None for v in values]
    shapes = [a.shape for a in arrays if a is not None] or [empty]
    out = np.full(
        (len(arrays), *(max(sizes) for sizes in zip(*shapes, strict=True))), np.nan, dtype=np.float32
    )
    for number, array in enumerate(arrays):
        if array is not None:
            out[(number, *(slice(0, n) for n in array.shape))] = array
    return out


def pick_device(asked: str) -> torch.device:
    """``auto`` is the first of CUDA, Apple's GPU and the CPU. Raises `UsageError` for what isn't there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device '{asked}' can't be used: {reason}", hint="--device auto") from error
    return device


@contextmanager
def numerics(device: torch.device, dtype: str) -> Iterator[None]:
    """Forward passes in `dtype` (autocast below float32), denormals flushed, both put back afterwards.

    Swin's mask of -100 makes probabilities denormal, which slows products with them 50 times on a CPU.
    cuDNN's convolutions take TF32 for float32 unless told otherwise.
    """
    flushed = float(torch.tensor([1e-39]) * 0.5) == 0.0
    convolutions = torch.backends.cudnn.conv
    precision = convolutions.fp32_precision
    torch.set_flush_denormal(True)
    try:
        if dtype == "float32":
            convolutions.fp32_precision = "ieee"
        with torch.autocast(device.type, dtype=DTYPES[dtype], enabled=dtype != "float32"):
            yield
    finally:
        convolutions.fp32_precision = precision
        torch.set_flush_denormal(flushed)


@contextmanager
def within_memory(device: torch.device, images: int = 0) -> Iterator[None]:
    """Turns the device's lack of memory into `DataError` with a way out.

    images: how many are forwarded at once; 0 while the model is put there and its plan made
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"{images} images at once" if images else "the model and two images"
        raise DataError(
            f"{what} don't fit into the memory of '{device}'",
            hint=f"--batch-size {max(1, images // 2)}" if images else "--device cpu",
        ) from error


def measure_batch(
    source: Source,
    pixels: Tensor,
    collectors: Sequence[Collector],
    chosen: Sequence[Sequence[int]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Forward one batch and return each collector's values; those of a failed metric are of no use.

    chosen: for each collector, the positions of the images it measures; by default all
    """
    counts = [len(pixels)] * len(collectors) if chosen is None else [len(one) for one in chosen]
    for number, c in enumerate(collectors):
        c.chosen = None if chosen is None else chosen[number]
    whole = False
    while not whole:
        visiting = [c for c, n in zip(collectors, counts, strict=True) if c.failure is None and n]
        whole = _forwarded(source, pixels, visiting)
    return [c.take(n) for c, n in zip(collectors, counts, strict=True)]


def _forwarded(source: Source, pixels: Tensor, visiting: Sequence[Collector]) -> bool:
    """Show a batch to the collectors. Whether to the end: else one of them spoiled it, and has failed."""
    try:
        out = source.run(pixels, [c.visitor for c in visiting if not c.of_output])
        for c in visiting:
            if c.of_output:
                c._visit(source.output_layer(out, len(pixels)))
    except _Spoiled:
        return False
    return True


def collector(metric: Metric, source: Source) -> Collector:
    """A collector for a metric, its layer axis taken from the watched model or the capture."""
    rows = {"tokens": source.site_rows, "output": source.output_rows}
    axis = next((rows[need] for need in metric.needs if need in rows), source.layer_rows)
    made = Collector(metric, [])
    every = axis()
    try:
        made.rows = list(metric.rows(every))
        if wrong := wrong_rows(made.rows, every):
            raise MetricError(wrong)
        made.visitor.captures  # noqa: B018  says so where a layer has no such field
    except DoesNotApply as reason:
        made.reasons[""] = reason.message
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        made.rows, made.failure = [], Failure.of(error, "'rows'")
    return made
