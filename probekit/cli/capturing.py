"""``probekit capture``: raw activations of a model, for replay and for other tools."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.cli import running, state

if TYPE_CHECKING:
    from probekit.capturing.capture import Summary


def register(app: typer.Typer) -> None:
    """Adds ``capture`` to the command line."""
    app.command("capture")(capture_command)


def capture_command(
    model: Annotated[str, typer.Argument(help="NAME[:VARIANT][@WEIGHTS]")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="NAME:ARGUMENT, e.g. folder:PATH.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The capture's folder.")],
    sites: Annotated[
        str,
        typer.Option(help="attention, q, k, v, head_outputs, tokens_in, tokens_mid, tokens_out, or all."),
    ] = "attention",
    layers: Annotated[str, typer.Option(help="all, 0,3,-1 or 0:4, counted from 0.")] = "all",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32, as stored.")] = "float16",
    limit: Annotated[int | None, typer.Option(help="Use this many images, evenly spaced.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    forward_dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16 forward passes.")
    ] = "float32",
    image_size: Annotated[str | None, typer.Option(help="224 or 224x448 (rows x columns).")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    on_bad_image: Annotated[str, typer.Option(help="skip (and list them) or fail.")] = "skip",
    allow_unwatched: Annotated[
        bool, typer.Option("--allow-unwatched", help="Leave out attention that can't be watched.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many bytes it would be.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Write raw activations to HDF5; the same command again writes what is missing.

    Attention is stored as q, k, scale and bias (as probabilities where the model has no fused attention).

    \b
    Examples:
      probekit capture moco:vit-b16@random -d folder:photos -o moco --dry-run
      probekit capture moco -d shapetex -o moco --sites attention,tokens_out
      probekit capture simmim -d folder:photos -o last --sites all --layers -1
      probekit run --replay captures/moco --metrics nmi
    """
    from probekit.capturing.activations import parse_dtype, parse_layers, parse_sites
    from probekit.grid import make_grid, parse_size, resolve

    parse_sites(sites), parse_layers(layers), parse_dtype(dtype)  # before torch is imported
    asked = {
        "models": [model],
        "datasets": [dataset],
        "metrics": [],
        "limit": limit,
        "batch_size": batch_size,
        "device": device,
        "dtype": forward_dtype,
        "image_size": parse_size(image_size) if image_size else None,
        "seed": seed,
        "workers": workers,
        "on_bad_image": on_bad_image,
        "allow_unwatched": allow_unwatched,
    }
    catalog = state.catalog()
    resolved = resolve(make_grid(asked, "the command"), catalog)
    from probekit.capturing.capture import capture

    with running.shown(as_json) as listen:
        found = capture(
            resolved, catalog, out, sites=sites, layers=layers, dtype=dtype, dry_run=dry_run, listen=listen
        )
    if as_json:
        typer.echo(json.dumps({**asdict(found), "path": str(found.path), "dry_run": dry_run}, indent=2))
    else:
        _say(found, dry_run)
    return 0


def _say(found: Summary, dry_run: bool) -> None:
    from probekit.store.sealing import human_bytes

    def counted(n: int, noun: str) -> str:
        return f"{n} {noun}{'' if n == 1 else 's'}"

    layers = counted(len(found.layers), "layer")
    what = f"{counted(found.images, 'image')}, {layers}, {', '.join(found.sites)}"
    shards = counted(found.shards, "shard")
    size = f"{human_bytes(found.bytes)} in {shards}, {human_bytes(found.per_image)} an image"
    typer.echo(f"  {found.model} x {found.dataset}: {what}")
    if dry_run:
        typer.echo(
            f"  {found.bytes} bytes ({size}) as {found.dtype}; {human_bytes(found.missing)} to be written"
        )
        typer.echo(f"  the disk of {found.path} has {human_bytes(found.free)}")
        return
    typer.echo(f"  {size} as {found.dtype}, {counted(found.written, 'shard')} written now")
    if found.bad:
        typer.echo(f"  {counted(found.bad, 'image')} could not be read and left out")
    typer.echo(f"  {found.path}")
    typer.echo(f"  next: probekit run --replay {found.path} --metrics all")
