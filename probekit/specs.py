"""What plugins offer: plain, frozen data. A target is imported only when its name is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Objective = Literal["CL", "MIM", "supervised", "hybrid", "untrained", "other"]

_TARGET = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Option(_Frozen):
    """One setting of a model, metric or dataset, given as ``name:option=value``."""

    default: str | int | float | bool | None = None
    help: str = ""
    choices: tuple[str | int | float | bool, ...] = ()


class Spec(_Frozen):
    """The part all specs share.

    name:     what users type; lower case, digits, ``-``, ``_``, ``.``
    summary:  one line for listings
    target:   ``"package.module:attribute"``, imported when the name is used and not before
    options:  settings users may give after the name
    citation: how to cite the work, for provenance
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", max_length=100)
    summary: str = Field(min_length=1, max_length=200)
    target: str = Field(pattern=_TARGET)
    options: dict[str, Option] = {}
    citation: str | None = None


class Preprocessing(_Frozen):
    """How an image becomes the network's input, in the terms of timm's data config."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    crop_pct: float = Field(0.875, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] = "center"
    size: tuple[int, int] = (224, 224)  # rows, columns

    @field_validator("size")
    @classmethod
    def _positive(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            raise ValueError("size must be positive")
        return size


class Layout(_Frozen):
    """How a checkpoint's keys become the module's.

    name:      what such a file is called, for messages and provenance ("pre-training checkpoint")
    options:   values of the model's options this layout is for; an option not named may be anything
    container: keys to descend into, in order (``("state_dict",)``); a file that holds only tensors
               is taken to be what the container would have held
    prefix:    kept and stripped; keys without it must be on `ignore`
    ignore:    glob patterns, matched on the full key before stripping, that may go unused;
               they win over `prefix`
    rename:    (regular expression, replacement) pairs, applied in order after stripping
    convert:   optional ``"module:function"``: (state, module) -> state, for what renaming can't do,
               and for telling a file of another kind: a WeightsError raised there goes on from the
               file's name ("is a fine-tuned ..., not a ...")
    hint:      the way out when a file doesn't fit
    """

    name: str = ""
    options: dict[str, str | int | float | bool] = {}
    container: tuple[str, ...] = ()
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    convert: str | None = Field(None, pattern=_TARGET)
    hint: str | None = None

    def suits(self, options: Mapping[str, object]) -> bool:
        """Whether the options a user chose are among those this layout is for."""
        return all(str(options.get(key, value)) == str(value) for key, value in self.options.items())


class Weights(_Frozen):
    """A published checkpoint: where it is, what it is, and how its keys map.

    `bundled` is a small file that comes with the pack, ``"package:file"``; it needs no download.
    `layout` is the published file's; `layouts` are the other files users may hold of the same model
    (its second encoder, a linear probe, a fine-tuned form). Of those whose options suit, the one in
    which most keys find a place is taken, and that one must then account for every key. Without a
    `url` there is nothing published: users bring the file.
    """

    url: str | None = Field(None, pattern=r"^https?://")
    bundled: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[\w.\-]+$")
    filename: str = Field("", pattern=r"^([^./\\:\x00-\x1f][^/\\:\x00-\x1f]*)?$")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    bytes: int | None = Field(None, gt=0)
    licence: str = ""
    layout: Layout = Layout()
    layouts: tuple[Layout, ...] = ()

    @model_validator(mode="after")
    def _published(self) -> Weights:
        if self.url and not (self.filename and self.licence):
            raise ValueError("a published checkpoint needs a filename and a licence")
        if self.url and self.bundled:
            raise ValueError("a checkpoint comes with the pack or from a URL, not both")
        return self

    def suiting(self, options: Mapping[str, object]) -> tuple[Layout, ...]:
        """The layouts to try for these options, the published one first."""
        return tuple(one for one in (self.layout, *self.layouts) if one.suits(options))


class ModelSpec(Spec):
    """One entry ``NAME[:VARIANT]``.

    `target` is ``build(variant, *, image_size=None, **options)`` and returns an ``nn.Module`` (with
    random weights) or a `probekit.Model`. With `loads_weights` it also takes
    ``weights: "published" | "random" | pathlib.Path`` and loads them itself (``timm:``, ``hf:``).
    """

    variant: str = ""
    objective: Objective = "other"
    weights: Weights | None = None
    preprocessing: Preprocessing = Preprocessing()
    default: bool = False  # what the bare family name means
    any_variant: bool = False  # timm:NAME, hf:REPO: the variant is free text
    loads_weights: bool = False
    heads: int | tuple[int, ...] | None = None  # of every layer, or of each stage; checked when given
    layers: int | None = None  # the encoder's, or the whole model's; checked when given
    published_as: str | None = None  # for a bundled miniature: the variant it stands for

    @property
    def full_name(self) -> str:
        return f"{self.name}:{self.variant}" if self.variant else self.name


def miniature(
    name: str,
    method: str,
    *,
    bundled: str,
    objective: Objective,
    citation: str = "",
    published_as: str | None = None,
    convert: str = "probekit.models.timm:fit_grid",
    ignore: tuple[str, ...] = (),
    **changes: Any,
) -> ModelSpec:
    """A pack's bundled miniature, ``NAME:mini``, which the bare name then means.

    method:       what it was trained with, for the summary
    bundled:      its file, ``"package:file"``, in float16 as `probekit pretrain --half` writes it
    published_as: the variant it stands for
    convert, ignore: the layout's
    changes:      other fields of the spec, such as `target` for another network than the common one
    """
    return ModelSpec(
        **{
            "name": name,
            "variant": "mini",
            "summary": f"bundled miniature of {method} (ViT, 12 layers, 1.4 M), trained on shapetex",
            "target": "probekit.models.miniature:build",
            "citation": citation,
            "objective": objective,
            "weights": Weights(
                bundled=bundled,
                licence="Apache-2.0",
                layout=Layout(name=f"miniature of {method}", ignore=ignore, convert=convert),
            ),
            "preprocessing": Preprocessing(size=(64, 64), crop_pct=1.0),
            "heads": 3,
            "layers": 12,
            "default": True,
            "published_as": published_as,
            **changes,
        }
    )


class MetricSpec(Spec):
    """`target` is a `probekit.Metric` class; options are its constructor's keyword arguments."""

    figure: str | None = None  # the paper's figure
    on_request: bool = False  # not meant by `all`: made for other metrics, or dear


class DatasetSpec(Spec):
    """`target` is ``load(argument, **options) -> probekit.Dataset``; the argument follows the colon."""

    argument: str | None = None  # what follows the colon, for listings: "PATH"; "[KIND]" may be left out


class ReportSpec(Spec):
    """`target` is ``render(run, path) -> pathlib.Path``; `suffix` names the file it writes."""

    suffix: str = ".html"


class FindingSpec(Spec):
    """`target` is a `probekit.findings.Finding`, or a class of one that takes no arguments."""


class CommandSpec(Spec):
    """`target` is a ``typer.Typer`` app or a function; it becomes ``probekit NAME``."""
