"""``probekit verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from probekit.cli.plain import count, print_json, tame, wrapped


def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every shard and result with its checksums; list what is damaged and what to do (exit code 4).

    \b
    Examples:
      probekit verify runs/2026-11-22-1
      probekit verify runs/2026-11-22-1 --json
    """
    from probekit.store.integrity import Tally, verify
    from probekit.store.runfolder import Run
    from probekit.store.sealing import human_bytes

    run = Run(folder)
    tally = Tally(others=1)  # run.json
    faults = list(verify(run, tally))
    if as_json:
        print_json({"folder": str(folder), "damaged": [asdict(f) for f in faults], **asdict(tally)})
    else:
        kinds = ((tally.shards, "shard"), (tally.results, "result"), (tally.others, "other file"))
        whole = ", ".join(count(number, noun) for number, noun in kinds)
        typer.echo(f"whole: {whole} ({human_bytes(tally.bytes)})")
        if tally.unfinished:
            typer.echo(f"{count(tally.unfinished, 'cell')} unfinished: `probekit status {tame(folder)}`")
        if faults:
            typer.echo(f"damaged or missing: {count(len(faults), 'file')}")
        for fault in faults:
            typer.echo(f"  {tame(fault.file)}")
            for line in (*wrapped(fault.problem, 4), *wrapped(f"what to do: {fault.remedy}", 4)):
                typer.echo(line)
    if faults:
        raise typer.Exit(4)
