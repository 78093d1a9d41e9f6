"""``probekit compare``: how much two models differ on the images both have seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.cli.plain import count, interval, number, print_json, print_table, tame, wrapped

if TYPE_CHECKING:
    import xarray as xr

    from probekit.store.runfolder import Run


@dataclass
class Comparison:
    """One metric of two models on one dataset. `table` is `probekit.summaries.paired_difference`'s."""

    metric: str
    value: str
    units: str
    sides: tuple[tuple[Run, str, str], tuple[Run, str, str]]  # run, model, dataset
    table: xr.Dataset
    notes: list[str] = field(default_factory=list)


def compare_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Another run's folder.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Twice: A and B. Once: the same in both runs.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Only this metric; repeat for more.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Only this dataset.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How much higher A's curves are than B's, paired by image, with intervals.

    \b
    Examples:
      probekit compare runs/paper --model moco:vit-b16 --model simmim:vit-b16
      probekit compare runs/before runs/after --metric nmi
    """
    found = compare(folder, other, model or [], metric or [], dataset)
    if as_json:
        print_json([_json(each) for each in found])
        return
    for each in found:
        _print(each)


def compare(
    folder: Path, other: Path | None, models: list[str], metrics: list[str], dataset: str | None
) -> list[Comparison]:
    """Every comparison asked for. Raises `UsageError` where there is nothing to compare, `StoreError`."""
    from probekit.cli.reading import choose
    from probekit.errors import UsageError
    from probekit.store.runfolder import Run

    a = Run(folder)
    b = Run(other) if other is not None else a
    pairs = _models(a, b, models)
    shared = [m for m in a.metrics if m in b.metrics]
    if not shared:
        raise UsageError(
            "the runs have no metric in common", hint=f"{', '.join(a.metrics)}; {', '.join(b.metrics)}"
        )
    places = _datasets(a, b, dataset)
    found, reasons = [], []
    for name in choose("metric", metrics, shared):
        for one, two in pairs:
            for here, there in places:
                states = [(r, m, d, _end(r, name, m, d)) for r, m, d in ((a, one, here), (b, two, there))]
                missing = next((s for s in states if s[3][0] != "done"), None)
                if missing:
                    _, which, _, (status, reason) = missing
                    reasons.append(f"'{name}' of '{which}' is {status}{f': {reason}' if reason else ''}")
                    continue
                found.append(_compared(name, (a, one, here), (b, two, there)))
    if not found:
        raise UsageError(f"nothing can be compared: {tame(reasons[0])}", hint=f"`probekit status {folder}`")
    return found


def _models(a: Run, b: Run, asked: list[str]) -> list[tuple[str, str]]:
    from probekit.cli.reading import choose
    from probekit.errors import UsageError

    if len(asked) > 2:
        raise UsageError(f"{len(asked)} models can't be compared", hint="give --model twice")
    if len(asked) == 2:
        return [(choose("model", asked[:1], a.models)[0], choose("model", asked[1:], b.models)[0])]
    if a is b:
        if not asked and len(a.models) == 2:
            return [(a.models[0], a.models[1])]
        hint = f"--model A --model B, of {', '.join(map(tame, a.models))}"
        raise UsageError("say which two models of the run to compare", hint=hint)
    if asked:
        return [(choose("model", asked, a.models)[0], choose("model", asked, b.models)[0])]
    if len(a.models) == len(b.models) == 1:
        return [(a.models[0], b.models[0])]
    shared = [m for m in a.models if m in b.models]
    if not shared:
        raise UsageError("the runs have no model in common", hint="say which with --model A --model B")
    return [(m, m) for m in shared]


def _datasets(a: Run, b: Run, asked: str | None) -> list[tuple[str, str]]:
    from probekit.cli.reading import choose
    from probekit.errors import UsageError

    if asked is not None:
        return [(choose("dataset", [asked], a.datasets)[0], choose("dataset", [asked], b.datasets)[0])]
    shared = [d for d in a.datasets if d in b.datasets]
    if shared:
        return [(d, d) for d in shared]
    if len(a.datasets) == len(b.datasets) == 1:
        return [(a.datasets[0], b.datasets[0])]
    raise UsageError(
        "the runs have no dataset in common", hint="models can be compared on the same images only"
    )


def _end(run: Run, metric: str, model: str, dataset: str) -> tuple[str, str]:
    folder = run.folder(model, dataset)
    outcome = folder.outcome(metric)
    gone = outcome.status == "done" and not folder.result(metric).exists()
    return ("unfinished", "") if gone else (outcome.status, outcome.reason)


def _compared(metric: str, a: tuple[Run, str, str], b: tuple[Run, str, str]) -> Comparison:
    """Raises `UsageError` for two that were measured on other images or by another version of the metric."""
    from probekit.errors import UsageError
    from probekit.reports.curves import main_value
    from probekit.summaries import paired_difference

    abouts = [run.about(model, dataset) for run, model, dataset in (a, b)]
    notes = _same_images(abouts, a, b)
    results = [run.result(metric, model=model, dataset=dataset) for run, model, dataset in (a, b)]
    versions = [result.attrs.get("version") for result in results]
    if versions[0] != versions[1]:
        raise UsageError(
            f"'{metric}' was measured by version {versions[0]} and by version {versions[1]} of the metric",
            hint="run the older one again in a new folder",
        )
    value = main_value(results[0])
    if value is None or f"{value}_curve" not in results[0]:
        raise UsageError(f"'{metric}' has no curve over layers to compare")
    dtypes = [about["identity"].get("dtype") for about in abouts]
    if dtypes[0] != dtypes[1]:
        notes.append(f"A was measured in {dtypes[0]}, B in {dtypes[1]}")
    how = results[0][f"{value}_curve"].attrs.get("reduced", "mean")
    traces = [run.traces(metric, model=model, dataset=dataset) for run, model, dataset in (a, b)]
    table = paired_difference(traces[0], traces[1], value, curve=how)
    if f"{value}_difference" not in table:
        rows = [len(trace.rows) for trace in traces]
        notes.append(
            f"A has {rows[0]} rows over depth and B has {rows[1]}: only the mean over all is compared"
        )
    elif [(r.depth, r.grid) for r in traces[0].rows] != [(r.depth, r.grid) for r in traces[1].rows]:
        notes.append("the models' layers differ in depth or token grid; they are paired in order")
    units = str(results[0][value].attrs.get("units", ""))
    return Comparison(metric, value, "" if units == "1" else units, (a, b), table, notes)


def _same_images(abouts: list[Any], a: tuple[Run, str, str], b: tuple[Run, str, str]) -> list[str]:
    """Notes on the images; raises `UsageError` for images that aren't, or may not be, the same."""
    from probekit.errors import UsageError

    prints = [about["identity"].get("images") for about in abouts]
    if prints[0] == prints[1]:
        return []
    hint = "compare models on the same images"
    same_names = abouts[0]["ids"] == abouts[1]["ids"]
    if same_names:
        raise UsageError(
            f"the images of '{tame(a[2])}' changed between the two: same names, other contents or labels",
            hint="run the older one again in a new folder",
        )
    common = set(abouts[0]["ids"]) & set(abouts[1]["ids"])
    if not common:
        raise UsageError("the two were measured on different images: they have none in common", hint=hint)
    if a[2] != b[2]:
        both = f"'{tame(a[2])}' and '{tame(b[2])}'"
        raise UsageError(
            f"the two were measured on different images: {both} share only file names", hint=hint
        )
    return ["the lists of images differ: those of the same name are taken to be the same"]


# --- output


def _print(found: Comparison) -> None:
    attrs = found.table.attrs
    typer.echo(
        f"{tame(found.metric)} on {tame(found.sides[0][2])}{f' in {found.units}' if found.units else ''}"
    )
    runs = {str(run.path) for run, _, _ in found.sides}
    for side, (run, model, _) in zip("AB", found.sides, strict=True):
        typer.echo(f"  {side}  {tame(model)}{f' in {tame(run.path)}' if len(runs) > 1 else ''}")
    common = (
        f"{count(attrs['images'], 'image')} in common (A has {attrs['images_a']}, B has {attrs['images_b']})"
    )
    for text in (f"{common}; {attrs['interval']}", *(f"note: {note}" for note in found.notes)):
        for line in wrapped(text, 2):
            typer.echo(line)
    rows = [_cells(row) for row in _rows(found)]
    overall = _overall(found)
    rows.append(["", "all, mean", "", "", interval(*overall.values()), _mark(overall)])
    print_table(("depth", "layer", "A", "B", "A - B [low, high]", ""), rows, 5, 2)
    typer.echo("* the interval excludes 0; each row by itself, not corrected for their number")
    typer.echo()


def _cells(row: dict[str, Any]) -> list[str]:
    from probekit.reports.placing import shortened

    difference = {key: row[key] for key in ("difference", "low", "high")}
    values = [number(row["a"]), number(row["b"]), interval(*difference.values()), _mark(difference)]
    return [f"{row['depth']:g}", shortened(row["layer"], 24), *values]


def _mark(ends: dict[str, float]) -> str:
    return "*" if ends["low"] > 0 or ends["high"] < 0 else ""


def _overall(found: Comparison) -> dict[str, float]:
    name = f"{found.value}_overall"
    keys = {"difference": name, "low": f"{name}_low", "high": f"{name}_high"}
    return {key: float(found.table[source].values) for key, source in keys.items()}


def _rows(found: Comparison) -> list[dict[str, Any]]:
    table, value = found.table, found.value
    if f"{value}_difference" not in table:
        return []
    names = {"a": f"{value}_a", "b": f"{value}_b", "difference": f"{value}_difference"}
    names |= {end: f"{value}_difference_{end}" for end in ("low", "high")}
    columns = {key: table[name].values for key, name in names.items()}
    return [
        {
            "depth": float(table["depth"].values[i]),
            "layer": str(table["layer"].values[i]),
            "layer_b": str(table["layer_b"].values[i]),
            **{key: float(column[i]) for key, column in columns.items()},
        }
        for i in range(table.sizes["layer"])
    ]


def _json(found: Comparison) -> dict[str, Any]:
    sides = {
        side: {"run": str(run.path), "model": model, "dataset": dataset}
        for side, (run, model, dataset) in zip("ab", found.sides, strict=True)
    }
    keys = ("images", "images_a", "images_b", "interval")
    about = {"metric": found.metric, "value": found.value, "units": found.units, **sides}
    about |= {key: found.table.attrs[key] for key in keys}
    return {**about, "notes": found.notes, "rows": _rows(found), "overall": _overall(found)}
