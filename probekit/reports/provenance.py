"""What a run was made of, as texts: the command, versions, weights, images, preprocessing, warnings."""

from __future__ import annotations

import contextlib
import datetime
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from probekit.errors import StoreError

if TYPE_CHECKING:
    from probekit.store.runfolder import Run

_MOST = 200  # unreadable images listed by name

# settings as the command line spells them, with what they are when nobody says anything
_OPTIONS = {
    "limit": ("--limit", None),
    "train": ("--train", None),
    "train_limit": ("--train-limit", None),
    "seed": ("--seed", 0),
    "dtype": ("--dtype", "float32"),
    "image_size": ("--image-size", None),
    "on_bad_image": ("--on-bad-image", "skip"),
}


def summary(run: Run) -> str:
    """``2 models, 3 metrics, 1 dataset, begun 2026-11-22 10:00 UTC on host``"""
    counts = ((run.models, "model"), (run.metrics, "metric"), (run.datasets, "dataset"))
    sizes = ", ".join(f"{len(names)} {noun}{'' if len(names) == 1 else 's'}" for names, noun in counts)
    when, host = run.info.get("created"), run.info.get("host")
    return sizes + (f", begun {_moment(when)}" if when else "") + (f" on {host}" if host else "")


def facts(run: Run) -> list[tuple[str, str]]:
    """Settings and versions of the whole run."""
    settings = ((key, value) for key, value in run.info["settings"].items() if value not in (None, False))
    versions = ", ".join(
        f"{name} {version}" for name, version in sorted(run.info.get("versions", {}).items())
    )
    return [
        ("Settings", ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in sorted(settings))),
        ("Versions", versions),
    ]


def command(run: Run, folder: str) -> list[str]:
    """The command that makes this run, and that does what is missing in it: words quoted for a shell."""
    settings = run.info["settings"]
    words = ["probekit", "run"]
    if any(about.get("capture") for about in _abouts(run)):
        words += ["--replay", "CAPTURE", "--metrics", ",".join(run.metrics)]  # where it lay isn't recorded
        return [shlex.quote(word) for word in (*words, "--out", folder)]
    words += [word for name in run.models for word in ("--model", name)]
    words += ["--metrics", ",".join(run.metrics)]
    words += [word for name in run.datasets for word in ("--dataset", name)]
    for key, (option, default) in _OPTIONS.items():
        value = settings.get(key)
        if value is not None and value != default:
            words += [option, "x".join(map(str, value)) if isinstance(value, list) else str(value)]
    words += ["--allow-unwatched"] if settings.get("allow_unwatched") else []
    return [shlex.quote(word) for word in (*words, "--out", folder)]


def provenance(run: Run) -> list[dict[str, Any]]:
    """Every model on every dataset that has begun: facts, and what a reader of the numbers should know."""
    found = []
    for model in run.models:
        for dataset in run.datasets:
            try:
                about = run.about(model, dataset)
                bad = len(run.bad_images(model, dataset)) if about else 0
            except StoreError as error:
                found.append({"model": model, "dataset": dataset, "facts": [], "notes": [str(error)]})
                continue
            if about:
                rows = [(term, text) for term, text in _cell_facts(about, run, bad) if text]
                found.append({"model": model, "dataset": dataset, "facts": rows, "notes": _notes(about)})
    return found


def bad_images(run: Run) -> list[dict[str, Any]]:
    """Images that could not be read, once for models that agree about them."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model in run.models:
        for dataset in run.datasets:
            try:
                bad = run.bad_images(model, dataset)
            except StoreError:  # said under provenance
                continue
            key = (dataset, repr([(b.get("id"), b.get("reason")) for b in bad]))
            if bad:
                groups.setdefault(key, bad)
    return [
        {
            "text": "1 image of" if len(bad) == 1 else f"{len(bad)} images of",
            "dataset": dataset,
            "images": [{"id": str(b.get("id")), "reason": str(b.get("reason"))} for b in bad[:_MOST]],
            "more": max(0, len(bad) - _MOST),
        }
        for (dataset, _), bad in groups.items()
    ]


def plain(value: Any) -> str:
    """A setting or convention as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        sizes = len(value) > 1 and all(isinstance(v, int) for v in value)
        return " x ".join(map(str, value)) if sizes else f"({', '.join(plain(v) for v in value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _abouts(run: Run) -> Iterator[Mapping[str, Any]]:
    for model in run.models:
        for dataset in run.datasets:
            with contextlib.suppress(StoreError):  # said under provenance
                yield run.about(model, dataset)


def _moment(text: Any) -> str:
    try:
        when = datetime.datetime.fromisoformat(str(text)).astimezone(datetime.UTC)
    except ValueError:
        return str(text)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _cell_facts(about: Mapping[str, Any], run: Run, bad: int) -> list[tuple[str, str]]:
    identity, weights = about.get("identity", {}), about.get("weights", {})
    count = identity.get("count", len(about.get("ids", ())))
    used = f"{count - bad} of {count}" if bad else str(count)
    same = about.get("versions") == run.info.get("versions")
    versions = "" if same else plain(about.get("versions"))
    return [
        ("weights", ": ".join(t for t in (plain(weights.get("kind")), plain(weights.get("source"))) if t)),
        ("weights sha256", plain(identity.get("weights"))),
        ("weights loaded", plain(weights.get("note"))),
        ("licence", plain(about.get("licence"))),
        ("objective", plain(about.get("objective"))),
        ("cite", plain(about.get("citation"))),
        ("model from", plain(about.get("pack"))),
        ("measured on a capture", plain(about.get("capture", {}).get("stored"))),
        ("images", f"{used} used" if bad else used),
        ("images fingerprint", plain(identity.get("images"))),
        ("preprocessing", plain(identity.get("preprocessing"))),
        ("dtype", plain(identity.get("dtype"))),
        ("device", plain(about.get("device"))),
        ("batch size", plain(about.get("batch_size"))),
        ("seed", str(run.seed)),
        ("versions", versions),
    ]


def _notes(about: Mapping[str, Any]) -> list[str]:
    anatomy = about.get("anatomy") or {}
    others = [
        f"{plain(o.get('name'))} is not measured: {plain(o.get('why'))}" for o in anatomy.get("others", ())
    ]
    return [*map(str, anatomy.get("warnings", ())), *map(str, about.get("notes", ())), *others]
