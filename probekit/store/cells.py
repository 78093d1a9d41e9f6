"""The folder of a run: where everything is, and what a cell is made of. Reads without torch.

run.json                                  the grid, versions, host
cells/<model>/<dataset>/cell.json         identity: weights, images, preprocessing, dtype, anatomy
cells/<model>/<dataset>/traces/<metric>-v1[--<options>]/all/rows.json, shard-00017.h5
cells/<model>/<dataset>/results/<metric>[-<options>].nc
cells/<model>/<dataset>/outcomes/<metric>[-<options>].json
report.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from probekit.errors import StoreError
from probekit.metric import Row, Traces
from probekit.names import slug
from probekit.store.mapped import VALUES, mapped_values
from probekit.store.shards import canonical_json, disagreement, shard_problem
from probekit.store.writing import read_json, read_shard, seal_json, shard_name, shard_ranges

FORMAT_VERSION = 1
MEASURED = "all"

Status = Literal["done", "failed", "does not apply", "unfinished"]


@dataclass(frozen=True)
class Outcome:
    """How a metric ended on one cell. `trace` is the identity of what it was measured with."""

    status: Status
    reason: str = ""
    hint: str = ""
    details: str = ""
    pack: str = ""
    version: str = ""
    images: int = 0
    seconds: float = 0.0
    trace: str = ""


@dataclass(frozen=True)
class CellFolder:
    """One model on one dataset, on disk."""

    root: Path
    model: str
    dataset: str

    @property
    def path(self) -> Path:
        return self.root / "cells" / slug(self.model) / slug(self.dataset)

    def trace(self, metric: str, version: int, images: str = MEASURED) -> Path:
        """Where a metric's traces are; `images` names others than the measured ones (`Pass.name`)."""
        name, *options = metric.split(":", 1)
        return self.path / "traces" / slug(":".join((f"{name}-v{version}", *options))) / images

    def result(self, metric: str) -> Path:
        return self.path / "results" / f"{slug(metric)}.nc"

    def _outcome(self, metric: str) -> Path:
        return self.path / "outcomes" / f"{slug(metric)}.json"

    def read(self) -> dict[str, Any] | None:
        """cell.json, or None before the cell has begun."""
        path = self.path / "cell.json"
        return read_json(path, "cell", FORMAT_VERSION) if path.exists() else None

    def write(self, content: Mapping[str, Any]) -> None:
        seal_json(self.path / "cell.json", {"format_version": FORMAT_VERSION, **content})

    def outcome(self, metric: str) -> Outcome:
        path = self._outcome(metric)
        if not path.exists():
            return Outcome("unfinished")
        found = read_json(path, "outcome", FORMAT_VERSION)
        return Outcome(**{k: v for k, v in found.items() if k in Outcome.__dataclass_fields__})

    def end(self, metric: str, outcome: Outcome) -> None:
        seal_json(
            self._outcome(metric), {"format_version": FORMAT_VERSION, "metric": metric, **asdict(outcome)}
        )


def identity_hash(identity: Mapping[str, Any]) -> str:
    """What a shard says it belongs to: weights, images, preprocessing and dtype in one short text."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def require_same(folder: CellFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `StoreError` when a cell's inputs aren't what its folder was made from."""
    for key in dict.fromkeys([*now, *before]):
        if canonical_json(before.get(key)) != canonical_json(now.get(key)):
            was, is_now = _short(before.get(key)), _short(now.get(key))
            raise StoreError(
                f"'{folder.path}' was made with another '{key}': {was}, now {is_now}",
                hint="use another folder with `--out`",
            )


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class TraceFolder:
    """The shards of one metric on one cell.

    sample: the images measured, of all `images`; None for every one. A shard none of them falls into doesn't
            exist
    """

    path: Path
    identity: Mapping[str, Any]
    images: int
    per_shard: int
    sample: tuple[int, ...] | None = None

    @property
    def ranges(self) -> list[range]:
        return shard_ranges(self.images, self.per_shard)

    def held(self, index: int) -> list[int]:
        """Images that shard `index` is for."""
        images = self.ranges[index]
        return list(images) if self.sample is None else [i for i in self.sample if i in images]

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards there should be."""
        if self.sample is None:
            return list(range(len(self.ranges)))
        return sorted({i // self.per_shard for i in self.sample})

    def shard(self, index: int) -> Path:
        return self.path / shard_name(index)

    def expected(self, index: int) -> dict[str, Any]:
        r = self.ranges[index]
        return {**self.identity, "start": r.start, "stop": r.stop}

    def missing(self) -> tuple[list[int], list[str]]:
        """Shards still to be measured, and what is wrong with those that exist but can't be kept."""
        if self.absent:
            return [], []
        wanted, problems = [], []
        described = self.rows() is not None
        for index in self.shards:
            problem = shard_problem(self.shard(index), self.expected(index), verify=True)
            if problem is None and described:
                continue
            wanted.append(index)
            if problem is not None and self.shard(index).exists():
                problems.append(problem)
        return wanted, problems

    def rows(self) -> dict[str, Any] | None:
        path = self.path / "rows.json"
        return read_json(path, "trace", FORMAT_VERSION) if path.exists() else None

    def forget_rows(self) -> None:
        """Before everything is measured again: another version may describe its rows otherwise."""
        (self.path / "rows.json").unlink(missing_ok=True)

    def write_rows(
        self, rows: Sequence[Row], constants: Mapping[str, np.ndarray], reasons: Mapping[str, str]
    ) -> None:
        content = {
            "format_version": FORMAT_VERSION,
            "rows": [asdict(row) for row in rows],
            "constants": {name: _listed(value) for name, value in constants.items()},
            "reasons": dict(reasons),
            **({"sample": list(self.sample)} if self.sample is not None else {}),
        }
        seal_json(self.path / "rows.json", content)

    @property
    def absent(self) -> str:
        """Why there is nothing to measure (a variation changes layers the model hasn't got); else ""."""
        said = self.rows() or {}
        # another version of the metric may find something
        same = canonical_json(said.get("identity")) == canonical_json(self.identity)
        return said.get("absent", "") if same else ""

    def write_absent(self, reason: str) -> None:
        said = {"absent": reason, "identity": dict(self.identity)}
        seal_json(self.path / "rows.json", {"format_version": FORMAT_VERSION, **said})

    def as_written(self) -> TraceFolder:
        """This folder with the sample that it was made with."""
        sample = (self.rows() or {}).get("sample")
        return replace(self, sample=tuple(sample) if sample is not None else None)

    def read(
        self, ids: Sequence[str], labels: Sequence[int] | None, seed: int, *, mapped: bool = False
    ) -> Traces:
        """All shards in dataset order; with `mapped` the values stay on disk until they are indexed.

        Raises `StoreError` for a shard that says something else than this folder's identity.
        """
        about = self.rows()
        values: dict[str, Any] = {}
        shards = []
        for index in self.shards:
            path = self.shard(index)
            shards.append(read_shard(path, [] if mapped else None))
            if problem := disagreement(path, shards[-1].attrs, self.expected(index)):
                raise StoreError(problem, hint="the command that measured it measures it again")
        if mapped:
            kept, values = mapped_values([self.shard(i) for i in self.shards])
        else:
            kept = np.concatenate([s.arrays["index"] for s in shards])
            full = [s.arrays for s in shards if len(s.arrays["index"])]
            names = [n for n in full[0] if n.startswith(VALUES)] if full else []
            values = {n.removeprefix(VALUES): np.concatenate([a[n] for a in full]) for n in names}
        rows = [Row(**{**r, "grid": tuple(r["grid"]), "stride": _floats(r["stride"])}) for r in about["rows"]]
        constants = {name: np.asarray(_floats(v), dtype=np.float64) for name, v in about["constants"].items()}
        return Traces(
            values,
            rows,
            [ids[i] for i in kept],
            [labels[i] for i in kept] if labels is not None else None,
            constants,
            seed,
            of=self.images if self.sample is not None else 0,
        )

    def bad_images(self) -> list[dict[str, Any]]:
        """Images that could not be read, from every shard that exists."""
        found = []
        for index in self.shards:
            if self.shard(index).exists():
                found += read_shard(self.shard(index), []).attrs.get("bad", [])
        return found


def _listed(value: np.ndarray) -> Any:
    """Numbers as JSON; NaN as null, which JSON has."""
    if isinstance(value, np.ndarray):
        return [_listed(v) for v in value] if value.ndim else _listed(value.item())
    return None if isinstance(value, float) and np.isnan(value) else float(value)


def _floats(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_floats(v) for v in value)
    return float("nan") if value is None else value
