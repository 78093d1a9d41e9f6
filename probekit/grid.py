"""What a run is asked to do: models x metrics x datasets, from the command line or a file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from probekit.errors import UsageError
from probekit.names import slug

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog, Entry


SETTINGS = ("limit", "train", "train_limit", "seed", "dtype", "image_size", "on_bad_image", "allow_unwatched")


DEFAULT_DATASET, DEFAULT_LIMIT = "shapetex", 512
"""What is measured where no dataset is named, and how many of its images."""


class Grid(BaseModel):
    """A grid as asked. Every field can be given in a YAML or TOML file under its own name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] = Field(min_length=1)
    datasets: list[str] = Field([DEFAULT_DATASET], min_length=1)
    metrics: list[str] = ["all"]
    limit: int | None = Field(None, ge=1)
    train: str | None = None
    train_limit: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    batch_size: int | None = Field(None, ge=1)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    image_size: tuple[int, int] | None = None
    workers: int = Field(0, ge=0)
    on_bad_image: Literal["skip", "fail"] = "skip"
    allow_unwatched: bool = False

    @model_validator(mode="before")
    @classmethod
    def _default_dataset(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and not values.get("datasets"):
            return {"limit": DEFAULT_LIMIT, **values, "datasets": [DEFAULT_DATASET]}
        return values

    @field_validator("models", "datasets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("metrics", mode="before")
    @classmethod
    def _with_options(cls, value: Any) -> Any:
        """``nmi``, ``nmi:compat=cl-vs-mim``, or in a file ``{nmi: {compat: cl-vs-mim}}``."""
        values = [value] if isinstance(value, (str, Mapping)) else value
        if not isinstance(values, list):
            return values
        texts = []
        for item in values:
            if isinstance(item, Mapping):
                for name, options in item.items():
                    texts.append(":".join((str(name), *(f"{k}={v}" for k, v in (options or {}).items()))))
            else:
                texts.append(item)
        return texts

    @field_validator("image_size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, (str, int)) else value

    def settings(self) -> dict[str, Any]:
        """What every cell of a run shares: numbers made with other settings don't belong in one folder."""
        return self.model_dump(mode="json", include=set(SETTINGS))


def parse_size(value: str | int) -> tuple[int, int]:
    """``224`` or ``224x448`` (rows x columns)."""
    rows, _, columns = str(value).lower().partition("x")
    try:
        size = int(rows), int(columns or rows)
    except ValueError:
        size = (0, 0)
    if min(size) < 1:
        raise UsageError(f"image size '{value}' is not a size", hint="write --image-size 224 or 224x448")
    return size


def read_grid(path: Path, **overrides: Any) -> Grid:
    """A grid file in YAML or TOML, with what the command line gives on top."""
    if not path.is_file():
        raise UsageError(f"grid file '{path}' does not exist", hint="`probekit run --help` shows an example")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if path.suffix.lower() == ".toml":
            content = tomllib.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except Exception as error:
        where = " ".join(str(error).split())
        raise UsageError(f"grid file '{path}' can't be read: {where}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"grid file '{path}' holds no settings", hint="it needs 'models:' and 'datasets:'")
    return make_grid({**content, **overrides}, f"grid file '{path}'")


def make_grid(values: Mapping[str, Any], owner: str = "the grid") -> Grid:
    """Validate, with one sentence about the first thing that is wrong."""
    try:
        return Grid(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            from probekit.names import did_you_mean

            hint = did_you_mean(name, list(Grid.model_fields))
            raise UsageError(f"{owner} has no setting '{name}'", hint=hint) from None
        if first["type"] == "missing":
            option = {"models": "--model", "datasets": "--dataset"}.get(name, f"--{name}")
            raise UsageError(f"{owner} says nothing about '{name}'", hint=f"add {option}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"{owner}: '{name}' can't be {first['input']!r}: {message[:1].lower()}{message[1:]}"
        ) from None


@dataclass(frozen=True)
class Resolved:
    """A grid with every name looked up: what a run will do, in order."""

    grid: Grid
    models: tuple[Entry, ...]
    metrics: tuple[Entry, ...]
    datasets: tuple[Entry, ...]
    train: Entry | None = None

    def names(self) -> dict[str, list[str]]:
        return {k: [str(e.ref) for e in getattr(self, k)] for k in ("models", "metrics", "datasets")}


def resolve(grid: Grid, catalog: Catalog) -> Resolved:
    """Look every name up; raises `UsageError` or `PluginError` before anything is loaded."""
    return Resolved(
        grid,
        _distinct(catalog.select("models", grid.models)),
        _distinct(catalog.select("metrics", grid.metrics)),
        _distinct([catalog.dataset(name) for name in grid.datasets]),
        catalog.dataset(grid.train) if grid.train else None,
    )


def _distinct(entries: list[Entry]) -> tuple[Entry, ...]:
    """Each once, in order; two that would share a folder are refused."""
    chosen = {str(e.ref): e for e in entries}
    folders: dict[str, str] = {}
    for name in chosen:
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise UsageError(f"'{name}' and '{other}' would share one folder")
    return tuple(chosen.values())
