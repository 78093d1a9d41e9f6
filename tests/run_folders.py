"""Run folders made without a model: what the engine writes, from made-up traces. Not a test itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from probekit.metric import Metric, Row, Traces
from probekit.store.cells import FORMAT_VERSION, CellFolder, Outcome, TraceFolder, identity_hash
from probekit.store.results import write_result
from probekit.store.runfolder import Run, shard_size
from probekit.store.shards import write_shard
from probekit.store.writing import seal_json

VIT, SWIN, MAE, SMALL = "vit", "swin", "mae", "small"


class Distance(Metric):
    name = "attention_distance"
    needs = frozenset({"attention_stats"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention_distance": ("head",)}
    units: ClassVar[Mapping[str, str]] = {"attention_distance": "px"}
    figure = "Fig. 3"
    conventions: ClassVar[Mapping[str, Any]] = {
        "definition": "Park et al. 2023, Fig. 3",
        "prefix": "dropped from queries and keys",
        "renormalised": True,
        "eps": 0.0,
    }


class Nmi(Metric):
    name = "nmi"
    needs = frozenset({"attention_stats"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"nmi": ("head",), "nmi_global": ("head",)}
    units: ClassVar[Mapping[str, str]] = {"nmi": "1", "nmi_global": "1"}
    figure = "Fig. 4"
    conventions: ClassVar[Mapping[str, Any]] = {
        "reading": "0: every query sees the same map; 1: every query has a key of its own.",
        "does_not_show": "random but peaked attention is high too: read it with the distance.",
        "log": "natural",
    }


class Fourier(Metric):
    name = "fourier"
    needs = frozenset({"tokens"})
    dims: ClassVar[Mapping[str, tuple[str, ...]]] = {"fourier": ("frequency",), "floor_channels": ()}
    units: ClassVar[Mapping[str, str]] = {"fourier": "nats", "floor_channels": "1"}
    figure = "Fig. 9"
    curve = "last"


METRICS = {"attention_distance": Distance, "nmi": Nmi, "fourier": Fourier}


def layers(kind: str) -> list[tuple[str, str, int, int, int]]:
    """(name, part, stage, heads, side of the grid) of every attention layer."""
    if kind == SWIN:
        depths, heads, sides = (2, 2, 6, 2), (3, 6, 12, 24), (56, 28, 14, 7)
        return [
            (f"layers.{s}.blocks.{b}.attn", "encoder", s, heads[s], sides[s])
            for s in range(4)
            for b in range(depths[s])
        ]
    if kind == MAE:
        encoder = [(f"blocks.{b}.attn", "encoder", 0, 12, 14) for b in range(12)]
        return encoder + [(f"decoder_blocks.{b}.attn", "decoder", 0, 16, 14) for b in range(8)]
    return [(f"blocks.{b}.attn", "encoder", 0, 3, 14) for b in range(2 if kind == SMALL else 12)]


def rows_of(kind: str, metric: str) -> list[Row]:
    found, last = [], None
    for number, (name, part, stage, heads, side) in enumerate(layers(kind), 1):
        about = (part, stage, heads, (side, side), (224 / side, 224 / side))
        if metric != "fourier":
            found.append(Row(name, float(number), "attention", *about))
            continue
        if (part, stage) != last:
            found.append(Row(f"{name}.embed", number - 1.0, "embed", *about))
        found.append(Row(f"{name}.mid", number - 0.5, "mid", *about))
        found.append(Row(f"{name}.out", float(number), "out", *about))
        last = (part, stage)
    return found


def traces_of(kind: str, metric: str, ids: Sequence[str], seed: int) -> Traces:
    """Smooth made-up curves, different for every seed, with noise over images and heads."""
    rng = np.random.default_rng(seed)
    rows = rows_of(kind, metric)
    depth = np.array([row.depth for row in rows]) / max(row.depth for row in rows)
    wave = np.sin(2.2 * depth * math.pi + seed) * 0.25
    images = rng.normal(0, 0.25, (len(ids), 1, 1))
    if metric == "fourier":
        size = max(math.ceil(row.grid[0] / 2) for row in rows)
        f = np.array([2 * np.arange(size) / row.grid[0] for row in rows])
        values = -(1.6 + 0.4 * (seed % 3) - wave[:, None]) * f + images * 0.2
        values = values + rng.normal(0, 0.05, (len(ids), len(rows), size))
        outside = np.arange(size) >= np.array([math.ceil(row.grid[0] / 2) for row in rows])[:, None]
        f[outside] = np.nan
        values[:, outside] = np.nan
        noise = np.where(np.isnan(f), np.nan, np.where(f > 0, 0.5 * math.log(2), 0.0))
        found = {"fourier": values, "floor_channels": np.zeros((len(ids), len(rows)))}
        constants = {"frequency": f, "white_noise": noise}
    else:
        heads = max(row.heads for row in rows)
        window = np.array([min(7 * row.stride[0], 112) * 0.52 if kind == SWIN else 116.0 for row in rows])
        scale, offset = (window, 0.75) if metric == "attention_distance" else (1.0, 0.3)
        curve = scale * (offset + 0.6 * wave - 0.05 * (seed % 4))
        spread = rng.normal(0, 0.05, (1, len(rows), heads)) * np.reshape(scale, (-1, 1))
        values = curve[:, None] + spread + images * np.reshape(scale, (-1, 1)) * 0.3
        values[:, np.arange(heads) >= np.array([row.heads for row in rows])[:, None]] = np.nan
        if metric == "nmi":
            found = {"nmi": values, "nmi_global": values + 0.1}
            constants = {"uniform": np.zeros(len(rows)), "uniform_global": np.full(len(rows), 0.2)}
        else:
            found, constants = {"attention_distance": values}, {"uniform": window}
    arrays = {name: np.asarray(v, dtype=np.float32) for name, v in found.items()}
    return Traces(arrays, rows, list(ids), None, constants, 0)


def make_run(
    path: Path,
    models: Mapping[str, str],
    *,
    datasets: Sequence[str] = ("folder:photos",),
    metrics: Sequence[str] = ("attention_distance", "nmi", "fourier"),
    images: int = 20,
    outcomes: Mapping[tuple[str, str], Outcome] | None = None,
    shards: Mapping[tuple[str, str], int] | None = None,
    bad: Sequence[Mapping[str, Any]] = (),
    prefix: str = "image",
    about: Mapping[str, Any] | None = None,
    fingerprint: str = "",
) -> Run:
    """A run folder as the engine leaves it.

    models:   the kind of network (`VIT`, `SWIN`, `MAE`, `SMALL`) by reference
    outcomes: by (model, metric), for cells that didn't end with a result
    shards:   by (model, metric), for cells that were interrupted after so many shards
    bad:      images (index, id, reason) that could not be read, left out of every trace
    about:    more for every cell.json
    fingerprint: of the images, by default the same for the same place in `datasets`
    """
    settings = {
        "limit": None,
        "seed": 0,
        "dtype": "float32",
        "image_size": None,
        "on_bad_image": "skip",
        "allow_unwatched": False,
    }
    names = {"models": list(models), "metrics": list(metrics), "datasets": list(datasets)}
    run = {
        "format_version": FORMAT_VERSION,
        "asked": {**names, **settings},
        "settings": settings,
        "names": names,
        "created": "2026-11-22T10:00:00+00:00",
        "host": "bench",
        "versions": {"python": "3.12.1", "torch": "2.9.0", "vit-probekit": "0.1.0"},
    }
    seal_json(path / "run.json", run)
    ids = [f"{prefix}-{i:04d}.jpg" for i in range(images)]
    for d, dataset in enumerate(datasets):
        for m, (model, kind) in enumerate(models.items()):
            folder = CellFolder(path, model, dataset)
            identity = {
                "model": model,
                "weights": f"{m + 1:064x}",
                "dataset": dataset,
                "images": fingerprint or f"{d + 10:032x}",
                "count": images,
                "preprocessing": {"mean": [0.485, 0.456, 0.406], "size": [224, 224], "crop_pct": 0.875},
                "dtype": "float32",
            }
            folder.write(
                {
                    "identity": identity,
                    "weights": {
                        "kind": "random" if model.endswith("@random") else "file",
                        "source": "",
                        "note": "",
                    },
                    "objective": "CL",
                    "citation": "Chen et al. 2021",
                    "licence": "CC BY-NC 4.0",
                    "pack": "probekit 0.1.0",
                    "anatomy": {"image_size": [224, 224], "layers": [], "others": [], "warnings": []},
                    "ids": ids,
                    "labels": None,
                    "classes": None,
                    "notes": [],
                    "batch_size": 16,
                    "device": "cpu",
                    "versions": run["versions"],
                    **(about or {}),
                }
            )
            for name in metrics:
                end = (outcomes or {}).get((model, name))
                if end is None or end.status != "does not apply":
                    traces = traces_of(kind, name.split(":")[0], ids, 10 * d + m)
                    kept = None if shards is None else shards.get((model, name))
                    _cell(folder, name, identity, traces, bad, kept if end is None else 0, end is None)
                if end is not None:
                    folder.end(name, end)
    return Run(path)


def _cell(
    folder: CellFolder,
    name: str,
    identity: Mapping[str, Any],
    traces: Traces,
    bad: Sequence[Mapping[str, Any]],
    kept: int | None,
    summarise: bool,
) -> None:
    metric = METRICS[name.split(":")[0]]()
    said = {"metric": f"probekit/{name.partition(':')[0]}", "version": metric.version, "options": {}}
    tag = {"cell": identity_hash(identity), **said}
    count = len(traces)
    where = TraceFolder(folder.trace(name, metric.version), tag, count, shard_size(count))
    where.write_rows(traces.rows, {n: np.asarray(v) for n, v in traces.constants.items()}, {})
    gone = {b["index"] for b in bad}
    for number, span in enumerate(where.ranges):
        if kept is not None and number >= kept:
            break
        index = np.array([i for i in span if i not in gone], dtype=np.int64)
        arrays = {f"values/{n}": v[index] for n, v in traces.values.items()}
        said = [dict(b) for b in bad if b["index"] in span]
        write_shard(where.shard(number), {**arrays, "index": index}, {**where.expected(number), "bad": said})
    if kept is not None or not summarise:
        return
    stored = where.read(traces.images, None, 0)
    result = metric.summarize(stored)
    result.attrs.update(model=folder.model, dataset=folder.dataset, pack="probekit 0.1.0")
    write_result(folder.result(name), result)
    folder.end(name, Outcome("done", pack="probekit", version="0.1.0", images=len(stored), seconds=1.0))
