"""``probekit inspect``, ``fetch`` and ``doctor``: a model's anatomy, its weights, this installation."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.cli import state
from probekit.cli.plain import json_alone

if TYPE_CHECKING:
    from probekit.specs import ModelSpec, Weights

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds ``inspect``, ``fetch`` and ``doctor`` to the command line."""
    app.command("inspect")(inspect_command)
    app.command("fetch")(fetch_command)
    app.command("doctor")(doctor_command)


def inspect_command(
    model: Annotated[str, typer.Argument(help="NAME[:VARIANT][@WEIGHTS]")],
    image_size: Annotated[str | None, typer.Option(help="224 or 224x448 (rows x columns).")] = None,
    allow_unwatched: Annotated[
        bool, typer.Option("--allow-unwatched", help="Leave out attention that can't be watched.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Layers, heads, prefix tokens, grids, strides and windows of a model, as one forward pass shows them.

    \b
    Examples:
      probekit inspect moco:vit-s16@random
      probekit inspect timm:swin_tiny_patch4_window7_224@random
      probekit inspect timm:vit_tiny_patch16_224@random --image-size 224x448
    """
    import torch

    from probekit.grid import parse_size
    from probekit.models.model import load_model
    from probekit.specs import Preprocessing
    from probekit.subject import check_spec, watched

    size = parse_size(image_size) if image_size else None
    with json_alone(as_json):
        loaded = load_model(model, state.catalog(), image_size=size)
        preprocessing = loaded.preprocessing or Preprocessing()
        pixels = torch.randn(2, 3, *(size or preprocessing.size), generator=torch.Generator().manual_seed(0))
        watcher = watched(loaded, pixels, allow_unwatched=allow_unwatched)
    anatomy = watcher.anatomy
    check_spec(loaded.spec, anatomy)
    if as_json:
        about = {
            "model": model,
            "weights": {
                "kind": loaded.weights.kind,
                "source": loaded.weights.source,
                "sha256": loaded.weights.sha256,
            },
            "preprocessing": preprocessing.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in loaded.module.parameters()),
        }
        typer.echo(json.dumps({**about, **anatomy.to_json()}))
        return
    parameters = sum(p.numel() for p in loaded.module.parameters())
    typer.echo(f"{model}: {type(watcher.module).__name__}, {parameters / 1e6:.1f} M parameters")
    weights = loaded.weights
    typer.echo(f"  weights        {weights.kind}: {weights.source} (sha256 {weights.sha256[:12]})")
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (preprocessing.mean, preprocessing.std))
    rows, columns = anatomy.image_size
    typer.echo(
        f"  input          {rows} x {columns} px, mean {mean}, std {std}, {preprocessing.interpolation}"
    )
    typer.echo("  all of the following was inferred from one forward pass")
    _table(anatomy)
    for other in anatomy.others:
        typer.echo(f"  not a layer    {other['name']}: {other['why']}")
    for warning in anatomy.warnings:
        typer.echo(f"  note           {warning}")


def _table(anatomy: Any) -> None:
    """One line for each run of layers that look alike."""
    from rich.console import Console
    from rich.table import Table

    groups: list[tuple[Any, list[Any]]] = []
    for layer in anatomy.layers:
        look = (
            layer.part,
            layer.stage,
            layer.heads,
            layer.prefix,
            layer.grid,
            layer.stride,
            layer.window,
            layer.role,
            layer.width,
            layer.kind,
        )
        if groups and groups[-1][0] == look:
            groups[-1][1].append(layer)
        else:
            groups.append((look, [layer]))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("depth", "layers", "part", "heads", "prefix", "grid", "stride", "attention"):
        table.add_column(name, no_wrap=name != "attention", overflow="ellipsis")
    for _, layers in groups:
        first, last = layers[0], layers[-1]
        depth = f"{first.depth}" if first is last else f"{first.depth}-{last.depth}"
        names = _span(first.name, last.name)
        grid = "x".join(map(str, first.grid)) if first.grid else "none"
        stride = "x".join(f"{s:g}" for s in dict.fromkeys(first.stride)) if first.stride else ""
        window = first.window.replace(", masked regions", " masked")
        what = window if first.role == "tokens" else f"{window}, {first.role}"
        part = (
            f"{first.part} {first.stage}"
            if anatomy.layers[-1].stage or first.part != "encoder"
            else first.part
        )
        table.add_row(depth, names, part, str(first.heads), str(first.prefix), grid, stride, what)
    Console(width=min(Console().width, 110)).print(table, markup=False, highlight=False)


def _span(first: str, last: str) -> str:
    """``blocks.0-11.attn`` for the first and last of similar names."""
    parts = [a if a == b else f"{a}-{b}" for a, b in zip(first.split("."), last.split("."), strict=False)]
    return ".".join(parts)


def fetch_command(
    model: Annotated[list[str], typer.Argument(help="NAME:VARIANT; several are fetched one after another.")],
    as_json: Json = False,
) -> None:
    """Download a model's published weights, check them, and say where they are.

    \b
    Examples:
      probekit fetch moco:vit-b16
      probekit fetch moco:vit-b16 simmim:vit-b16 --json
    """
    from probekit.errors import WeightsError
    from probekit.models.fetch import fetch

    catalog = state.catalog()
    published = {name: _published(name, catalog.model(name).spec) for name in model}
    found = {}
    for name, weights in published.items():
        try:
            found[name] = str(fetch(weights))
        except WeightsError as error:
            raise WeightsError(f"'{name}': {error.message}", hint=error.hint) from error
        if not as_json:
            typer.echo(f"{name}: {found[name]}")
    if as_json:
        typer.echo(json.dumps(found, indent=2))


def _published(name: str, spec: ModelSpec) -> Weights:
    """The published file of a model. Raises `UsageError`."""
    from probekit.errors import UsageError

    if spec.weights is None:
        hint = f"it is loaded when used: `probekit inspect {name}`"
        raise UsageError(f"'{name}' has no published file to fetch", hint=hint)
    if spec.weights.bundled:
        hint = f"the published model is '{spec.name}:{spec.published_as}'" if spec.published_as else None
        raise UsageError(f"nothing is to be fetched: the weights of '{name}' come with its pack", hint=hint)
    return spec.weights


def doctor_command(as_json: Json = False) -> None:
    """What is installed, what works, what doesn't. Paste its output into a bug report.

    \b
    Examples:
      probekit doctor
      probekit doctor --json
    """
    checks = list(_checks())
    if as_json:
        typer.echo(
            json.dumps([{"check": c, "value": v, "ok": ok, "hint": h} for c, v, ok, h in checks], indent=2)
        )
    else:
        for check, value, ok, hint in checks:
            typer.echo(f"{'ok ' if ok else 'BAD'}  {check:<22} {value}")
            if hint:
                typer.echo(f"     {'':<22} {hint}")
    if not all(ok for _, _, ok, _ in checks):
        raise typer.Exit(1)


def _checks() -> Any:
    """(what, value, ok, hint) of everything worth knowing."""
    yield "python", f"{platform.python_version()} on {platform.platform()}", sys.version_info >= (3, 11), ""
    for name in ("vit-probekit", "torch", "timm", "numpy", "h5py", "xarray", "pluggy", "pydantic"):
        yield _package(name, required=True)
    for name in ("transformers",):
        yield _package(name, required=False)
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "devices", ", ".join(gpus) or f"cpu ({torch.get_num_threads()} threads)", True, ""
    from probekit.models.fetch import cache_dir

    folder = cache_dir()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    writable = os.access(nearest, os.W_OK)
    yield (
        "weights cache",
        str(folder),
        writable,
        "" if writable else "set PROBEKIT_CACHE to a folder you can write to",
    )
    catalog = state.catalog(announce=False)
    for kind in ("models", "metrics", "datasets", "reports"):
        yield kind, f"{len(catalog.entries(kind))} entries", True, ""
    for plugin in catalog.plugins:
        bad = [str(p) for p in plugin.problems]
        yield f"plugin {plugin.name}", bad[0] if bad else f"{plugin.version}", not bad, ""


def _package(name: str, *, required: bool) -> tuple[str, str, bool, str]:
    try:
        return name, metadata.version(name), True, ""
    except metadata.PackageNotFoundError:
        return name, "not installed", not required, f"pip install {name}" if required else ""
