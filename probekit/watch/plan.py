"""What the discovery pass saw, as a plan: which call belongs to which layer, and where its tokens are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from probekit.anatomy import LayerInfo, Role, WindowGroup
from probekit.errors import WatchError
from probekit.watch.geometry import TokenLayout, first_image, grid_of, raster, window_groups
from probekit.watch.record import Add, Call, Record
from probekit.watch.residuals import Residual, after_mlp, has_mlp_beside, residual


@dataclass(frozen=True)
class Tap:
    """Where a token tensor is: an operand (`place` among the arguments) or, without one, the result of an
    addition. `written`: its memory is written to again, so whoever keeps it needs a copy."""

    ordinal: int
    place: int | None
    layout: TokenLayout
    written: bool


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its calls (several where heads are separate calls) and its token tensors.

    scaled: the stream is scaled on its way to the addition of the attention (MetaFormer)
    """

    info: LayerInfo
    calls: tuple[Call, ...]
    taps: Mapping[str, Tap]
    scaled: bool

    @property
    def captures(self) -> frozenset[str]:
        """What a run can capture of this layer."""
        if self.info.role == "untraced":
            return frozenset(self.taps)
        found = {"scores", "v", "heads", *self.taps}
        if all(c.kind != "explicit" or c.scores is not None for c in self.calls):
            found |= {"q", "k"}
        return frozenset(found)


@dataclass(frozen=True)
class Plan:
    """All layers, in order, what else was seen, and how many calls of each kind a forward pass makes."""

    layers: tuple[LayerPlan, ...]
    others: tuple[Mapping[str, str], ...]
    warnings: tuple[str, ...]
    counts: Mapping[str, int]


def make_plan(name: str, record: Record, declared_parts: Mapping[str, str]) -> Plan:
    """Resolve the record into layers. Raises `WatchError` if no layer attends between patch tokens."""
    others, drafts = [], []
    for call in record.calls:
        role = _role(call)
        if role is None:
            others.append(
                {"name": call.path, "why": "class attention or pooling: its queries are no patches"}
            )
        else:
            drafts.append((call, role, residual(record, call)))
    layers: list[LayerPlan] = []
    streams: set[int] = set()
    for calls, role, found in _merged(record, drafts):
        out = after_mlp(record, found) if found else None
        if found and out is None:
            found = replace(found, whole=has_mlp_beside(record, calls[0], found))
        plan = _layer(record, len(layers), calls, role, found, out, declared_parts)
        starts = _starts(plan.info, layers, found, streams)
        layers.append(replace(plan, info=replace(plan.info, starts=starts)))
        streams |= {add.result for add in ((found.add, out) if found else ()) if add is not None}
    if not any(p.info.role != "untraced" for p in layers):
        raise _nothing_found(name, record, layers)
    layers = [replace(p, info=replace(p.info, stage=s)) for p, s in zip(layers, _stages(layers), strict=True)]
    warnings = (*_warnings(layers), *_misplaced(record, layers))
    return Plan(tuple(layers), tuple(others), warnings, dict(record.counts))


def _nothing_found(name: str, record: Record, layers: Sequence[LayerPlan]) -> WatchError:
    text = f"no attention between tokens was found in '{name}'"
    if not layers:
        return WatchError(text)
    first = layers[0].calls[0]
    text += f": the attention in '{first.path or name}' is between tokens whose places could not be traced"
    if record.lost:
        at, op = next(iter(record.lost.items()))
        return WatchError(f"{text}; the trail is lost at '{op}' in '{at}'")
    return WatchError(
        text, hint="attend to the whole batch in one call: a loop over its images can't be watched"
    )


def _role(call: Call) -> Role | None:
    """None for queries that are no patches (class attention, attention pooling)."""
    if call.queries is not None and not bool(call.queries[1].isfinite().any()):
        return None
    if call.lead is None:
        return "untraced"
    queries, keys = first_image(call.lead, call.queries), first_image(call.lead, call.keys)
    q_places, numbers = raster(queries)
    k_places = raster(keys)[0]
    if len(q_places) == 1 and (numbers >= 0).sum() > 1:
        return "channels" if call.over_channels else "untraced"
    if not len(k_places) or (numbers >= 0).sum() != len(q_places):
        return "untraced"  # a token that asks in two windows has no one map
    return "tokens" if np.array_equal(q_places, k_places) else "pooled keys"


# ---------------------------------------------------------------------- calls of one layer


def _merged(record: Record, drafts: Sequence[tuple]) -> list[tuple]:
    """Calls that end in one addition and see the same places are the heads of one layer."""
    merged: list[tuple] = []
    for call, role, found in drafts:
        if merged:
            calls, last_role, last = merged[-1]
            same = found and last and found.add is last.add and role == last_role
            apart = not any(record.nodes[call.node].calls >> c.number & 1 for c in calls)
            if same and apart and _same_places(calls[0], call):
                merged[-1] = ((*calls, call), role, found)
                continue
        merged.append(((call,), role, found))
    return merged


_SUBTRACTED = "differential attention: the heads of both softmaxes, whose results are subtracted"


def _subtracted(record: Record, calls: Sequence[Call]) -> bool:
    """Whether the results of some of the calls are subtracted from those of others."""
    every = sum(1 << c.number for c in calls)
    sides = ([record.nodes[n].calls & every for n in pair] for pair in record.subtracted)
    return any(a and b and not a & b for a, b in sides)


def _same_places(a: Call, b: Call) -> bool:
    if a.kind != b.kind or a.lead is None or b.lead is None or a.lead.windows != b.lead.windows:
        return False
    return all(
        np.array_equal(first_image(a.lead, x), first_image(b.lead, y), equal_nan=True)
        for x, y in ((a.queries, b.queries), (a.keys, b.keys))
    )


# ---------------------------------------------------------------------- layers


def _layer(
    record: Record,
    index: int,
    calls: tuple[Call, ...],
    role: Role,
    found: Residual | None,
    out: Add | None,
    parts: Mapping[str, str],
) -> LayerPlan:
    call = calls[0]
    groups: tuple[WindowGroup, ...] = ()
    masked, prefix, padded, windows = False, 0, 0, 1
    positions = None
    if call.lead is not None and role not in ("channels", "untraced"):
        queries, keys = first_image(call.lead, call.queries), first_image(call.lead, call.keys)
        positions, numbers = raster(queries)
        allowed = call.allowed.cpu().numpy() if call.allowed is not None else None
        groups, masked = window_groups(queries, keys, numbers, allowed)
        prefix = int(np.isnan(queries).any(-1).sum(1).max())
        padded = int(np.isinf(keys).any(-1).sum())
        windows = call.lead.windows
    taps: dict[str, Tap] = {}
    width = None
    for capture, add, operand in _token_tensors(record, found, out):
        layout = add.layouts[2 if operand is None else operand]
        if layout is None or (positions is not None and not np.array_equal(layout[1], positions)):
            continue
        place = add.places[operand] if operand is not None else None
        taps[capture] = Tap(
            add.ordinal, place, layout[0], add.memory[2 if operand is None else operand] in record.written
        )
        positions, width = layout[1], add.shape[layout[0].axes[-1]]
    if positions is None:
        positions = np.zeros((0, 2))
    if role == "channels" and taps:
        prefix = len(next(iter(taps.values())).layout.prefix)
    grid, stride = grid_of(positions)
    sites = tuple(n for n in ("in", "mid", "out") if f"tokens_{n}" in taps)
    info = LayerInfo(
        index=index,
        name=_common([c.path for c in calls]),
        depth=index + 1,
        part=_part(call.path, parts),
        stage=0,
        role=role,
        kind=call.kind,
        heads=sum(c.lead.heads if c.lead else 0 for c in calls),
        prefix=prefix,
        width=width,
        grid=grid,
        stride=stride,
        positions=positions,
        windows=windows,
        groups=groups,
        padded=padded,
        masked=masked,
        sites=sites,
        note=_SUBTRACTED if _subtracted(record, calls) else call.note,
    )
    scaled = found is not None and found.before is None and found.stream is not None
    return LayerPlan(info, calls, taps, scaled)


def _token_tensors(
    record: Record, found: Residual | None, out: Add | None
) -> Iterator[tuple[str, Add, int | None]]:
    if found is None:
        return
    if found.before is not None:
        yield "tokens_in", found.add, found.before
    else:  # a scaled skip: the stream itself, where an addition made it
        yield from (("tokens_in", add, None) for add in record.adds if add.result == found.stream)
    yield "tokens_out" if found.whole else "tokens_mid", found.add, None
    if out is not None:
        yield "tokens_out", out, None


def _common(paths: list[str]) -> str:
    """The longest common module path: 'blocks.0.attn' of its heads."""
    split = [p.split(".") for p in paths]
    same = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return ".".join(same) or paths[0]


def _part(path: str, declared: Mapping[str, str]) -> str:
    for prefix, part in declared.items():
        if path == prefix or path.startswith(f"{prefix}."):
            return part
    return "decoder" if re.search(r"(^|[._])decoder", path) else "encoder"


def _starts(info: LayerInfo, layers: Sequence[LayerPlan], found: Residual | None, streams: set[int]) -> bool:
    """Whether the tokens before a layer are a site of their own: nobody's result, and the first so shaped."""
    if found is None or found.stream is None:
        return False
    shape = (info.part, info.grid, info.width)
    known = [p.info for p in layers if (p.info.part, p.info.grid, p.info.width) == shape]
    return found.stream not in streams and not any("mid" in i.sites for i in known)


def _stages(layers: Sequence[LayerPlan]) -> list[int]:
    """Stages of a part are its token grids and widths, in order; an unknown width is the next one's."""
    shapes: list[tuple] = []
    for i, plan in enumerate(layers):
        info = plan.info
        same = [
            p.info for p in (*layers[i:], *layers[:i]) if (p.info.part, p.info.grid) == (info.part, info.grid)
        ]
        width = next((s.width for s in same if s.width is not None), None)
        shapes.append((info.part, info.grid, width))
    return [list(dict.fromkeys(s for s in shapes if s[0] == shape[0])).index(shape) for shape in shapes]


# ---------------------------------------------------------------------- what a reader should know


def _warnings(layers: Sequence[LayerPlan]) -> Iterator[str]:
    def those(chosen: Callable[[LayerPlan], object], what: str) -> Iterator[str]:
        names = [p.info.name for p in layers if chosen(p)]
        if names:
            yield what.format(f"{len(names)} layers (first: '{names[0]}')")

    yield from those(
        lambda p: p.info.padded, "{} attend to padding; padded keys are dropped and rows renormalised"
    )
    yield from those(lambda p: p.info.role == "untraced", "token positions could not be traced in {}")
    found = [p for p in layers if {"tokens_mid", "tokens_out"} & p.taps.keys()]
    yield from those(lambda p: p not in found, "no residual addition was found around {}")
    yield from those(
        lambda p: p.scaled and "tokens_in" not in p.taps,
        "no tokens before the attention were found in {}: their skip is scaled",
    )
    yield from those(
        lambda p: p in found and "tokens_out" not in p.taps, "no tokens after the MLP were found in {}"
    )
    runs = Counter(p.calls[0].run for p in layers if p.calls[0].path)
    yield from those(
        lambda p: runs[p.calls[0].run] > 1,
        "{} share one run of a module (a cascade of heads, queries in chunks): each call is a layer",
    )
    yield from those(
        lambda p: p.info.note == _SUBTRACTED,
        "{} subtract two attentions: the heads of both are measured, their difference isn't",
    )
    yield from those(
        lambda p: p.calls[0].shared,
        "{} ask the same queries in every window; a query's place is the token it writes to",
    )


def _misplaced(record: Record, layers: Sequence[LayerPlan]) -> Iterator[str]:
    """Layers whose attention lands on other tokens than those that asked."""
    adds = {add.ordinal: add for add in record.adds}
    for plan in layers:
        tap = plan.taps.get("tokens_mid")
        places = (
            [_ordered(*found) if found else None for found in adds[tap.ordinal].layouts[:2]] if tap else []
        )
        if len(places) == 2 and all(p is not None for p in places):
            a, b = places
            if a.shape != b.shape or not np.allclose(
                a, b, atol=0.51 * min(plan.info.stride or (1,)), equal_nan=True
            ):
                yield f"attention of '{plan.info.name}' is added to tokens at other places than it asked from"


def _ordered(layout: TokenLayout, positions: np.ndarray) -> np.ndarray:
    """Positions of a token tensor's tokens in its own order, (tokens, 2)."""
    places = np.full((layout.total, 2), np.nan)
    places[layout.order] = positions
    return places
