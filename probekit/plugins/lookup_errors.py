"""What a lookup says when a name isn't there, or isn't enough: the sentence and the way out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.errors import PluginError, ProbekitError, UsageError
from probekit.names import ModelRef, did_you_mean, quoted
from probekit.plugins.loading import BUILT_IN

if TYPE_CHECKING:
    from probekit.plugins.catalog import Catalog, Entry

OFFICIAL = ("moco", "simmim", "mae", "swin", "pit", "dino", "beit", "deit", "train")
"""Packs of this project, each installed as ``vit-probekit-NAME``."""


def unknown(catalog: Catalog, kind: str, ref: Any) -> ProbekitError:
    """The error for a name nobody offers, with whatever may be the reason."""
    what, name = kind[:-1], ref.name + (f":{ref.variant}" if getattr(ref, "variant", "") else "")
    broken = {problem.plugin: problem for problem in reversed(catalog.problems)}
    loaded = [plugin.name for plugin in catalog.plugins]
    owner = ref.pack or ref.name
    if owner in broken and owner != BUILT_IN:
        hint = f"`probekit plugins check {owner}` shows all that is wrong"
        return PluginError(f"{what} {quoted(name)} is not available: {broken[owner]}", hint=hint)
    missing = [pack for pack in OFFICIAL if pack not in loaded]
    hints = []
    if ref.pack and ref.pack not in loaded:
        message = f"no plugin {quoted(ref.pack)} is loaded"
        near = did_you_mean(ref.pack, loaded)
        hints += [near] if near and ref.pack not in missing else []
    else:
        message = (
            f"plugin {quoted(ref.pack)} offers no {what} {quoted(name)}"
            if ref.pack
            else f"unknown {what} {quoted(name)}"
        )
        entries = [e for e in catalog.entries(kind) if ref.pack in (None, e.pack)]
        families = [entry.spec.name for entry in entries]
        official = missing if kind == "models" and not ref.pack else []
        full = [entry.name for entry in entries] if name != ref.name else []
        near = did_you_mean(name, full) or did_you_mean(ref.name, families + official)
        if near and owner not in official:
            hints.append(near)
            owner = next((pack for pack in official if quoted(pack) in near), owner)
    if owner in missing and (ref.pack or kind == "models"):
        hints.append(f"`pip install vit-probekit-{owner}`")
    if kind == "datasets" and Path(str(ref)).exists():
        hints.append(f"images in a folder are {quoted(f'folder:{ref}')}")
    if kind == "models" and Path(str(ref)).is_file():
        hints.append(f"weights follow an '@': {quoted(f'moco:vit-b16@{ref}')}")
    hints.append(f"`probekit list {kind}` shows {len(catalog.entries(kind))}")
    others = sorted(set(broken) - {BUILT_IN})
    if others:
        hints.append(f"broken plugins may offer it: {', '.join(map(quoted, others))}, see `probekit plugins`")
    if not catalog.enabled:
        hints.append("installed plugins are off (--no-plugins)")
    elif os.environ.get("PROBEKIT_PLUGINS"):
        hints.append("PROBEKIT_PLUGINS leaves the other plugins out")
    return UsageError(message, hint="; ".join(hints).replace("?;", "?"))


def require_one_pack(what: str, ref: Any, found: Sequence[Entry]) -> None:
    packs = list(dict.fromkeys(entry.pack for entry in found))
    if len(packs) > 1:
        owners = " and ".join(quoted(pack) for pack in packs)
        choices = " or ".join(quoted(dataclasses.replace(ref, pack=pack)) for pack in packs)
        bare = ref.name + (f":{ref.variant}" if getattr(ref, "variant", "") else "")
        message = f"{what} {quoted(bare)} is offered by several plugins: {owners}"
        raise UsageError(message, hint=f"say {choices}")


def choose_variant(message: str, ref: ModelRef, found: Sequence[Entry]) -> UsageError:
    if free := [entry for entry in found if entry.spec.any_variant]:
        return UsageError(message, hint=f"write {quoted(f'{ref.name}:NAME')}; {free[0].spec.summary}")
    texts = [str(dataclasses.replace(ref, variant=entry.spec.variant)) for entry in found]
    near = did_you_mean(str(ref), texts) if ref.variant else None
    shown = ", ".join(quoted(text) for text in texts[:8]) + (", ..." if len(texts) > 8 else "")
    return UsageError(message, hint=f"{near + ' ' if near else ''}it has {shown}; see `probekit list models`")
