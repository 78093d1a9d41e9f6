"""What the discovery pass saw, as a plan: which call belongs to which layer, and where its tokens are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from probekit.anatomy import LayerInfo, Role
from probekit.discover import Add, Call, Record
from probekit.errors import WatchError
from probekit.geometry import TokenLayout, first_image, grid_of, raster, token_layout, window_groups
from probekit.positions import Where


@dataclass(frozen=True)
class Tap:
    """Where a token tensor is: an operand (or the result) of one addition."""

    ordinal: int
    operand: int | None
    layout: TokenLayout
    in_place: bool


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its calls (several where heads are separate calls) and its token tensors."""

    info: LayerInfo
    calls: tuple[Call, ...]
    taps: Mapping[str, Tap]


@dataclass(frozen=True)
class Plan:
    """All layers, in order, and what else was seen."""

    layers: tuple[LayerPlan, ...]
    others: tuple[Mapping[str, str], ...]
    warnings: tuple[str, ...]


def make_plan(name: str, record: Record, declared_parts: Mapping[str, str]) -> Plan:
    """Resolve the record into layers. Raises `WatchError` if no layer attends between patch tokens."""
    before = {c.number: _residual(record, c) for c in record.calls}
    others, drafts = [], []
    for call in record.calls:
        role = _role(call)
        if role is None:
            others.append(
                {"name": call.path, "why": "class attention or pooling: its queries are no patches"}
            )
        else:
            drafts.append((call, role, before[call.number]))
    layers: list[LayerPlan] = []
    mids = {add.result for _, _, found in drafts if found for add in (found[0],)}
    previous: Add | None = None
    for calls, role, found in _merged(drafts):
        out = _after_mlp(record, found[0], mids) if found else None
        plan = _layer(len(layers), calls, role, found, out, declared_parts)
        plan = replace(plan, info=_placed(plan.info, layers, found, previous))
        layers.append(plan)
        previous = out
    if not any(p.info.role != "untraced" for p in layers):
        lost = next((f"; the trail of its tokens is lost at '{op}' in '{at}'" for at, op in record.lost.items()), "")
        raise WatchError(f"no attention between tokens was found in '{name}'{lost if layers else ''}")
    return Plan(tuple(layers), tuple(others), tuple(_warnings(layers)))


def _role(call: Call) -> Role | None:
    """None for queries that are no patches (class attention, attention pooling)."""
    if call.queries is not None and not bool(call.queries[1].isfinite().any()):
        return None
    if call.lead is None:
        return "untraced"
    queries, keys = first_image(call.lead, call.queries), first_image(call.lead, call.keys)
    q_places, k_places = raster(queries)[0], raster(keys)[0]
    if len(q_places) == 1 and queries.shape[1] > 1:
        return "channels"
    if not len(k_places):
        return "untraced"
    return "tokens" if np.array_equal(q_places, k_places) else "pooled keys"


def _residual(record: Record, call: Call) -> tuple[Add, int] | None:
    """The addition after the call's attention, and which operand is the stream before it.

    Of several before the next attention the last: inner ones add the queries back (MViT).
    """
    ancestors = record.nodes[call.asks].ancestors
    later = [c.node for c in record.calls if record.nodes[c.node].calls >> call.number & 1 and c is not call]
    limit = min(later, default=len(record.nodes))
    first = last = None
    for add in record.adds:
        after = [record.nodes[n].calls >> call.number & 1 for n in add.nodes]
        skip = after.index(0) if sum(after) == 1 else None
        if skip is not None and ancestors >> add.nodes[skip] & 1:
            first = first or (add, skip)
            last = (add, skip) if add.result < limit else last
    return last or first


def _after_mlp(record: Record, mid: Add, mids: set[int]) -> Add | None:
    """The next addition onto the stream, before any other attention's: tokens after the MLP."""
    fallback = None
    start = next(i for i, add in enumerate(record.adds) if add is mid)
    for add in record.adds[start + 1 :]:
        if add.result in mids:
            break
        ancestors = [record.nodes[n].ancestors for n in add.nodes]
        if add.shape.numel() != mid.shape.numel() or not all(a >> mid.result & 1 for a in ancestors):
            continue
        a, b = add.nodes
        if a == b or not (ancestors[1] >> a & 1 or ancestors[0] >> b & 1):
            continue
        if mid.result in add.nodes:
            return add
        fallback = fallback or add
    return fallback


def _merged(drafts: Sequence[tuple]) -> list[tuple]:
    """Calls that end in one addition and see the same places are the heads of one layer."""
    merged: list[tuple] = []
    for call, role, found in drafts:
        if merged:
            calls, last_role, last = merged[-1]
            same = found and last and found[0] is last[0] and role == last_role
            if same and _same_places(calls[0], call):
                merged[-1] = ((*calls, call), role, found)
                continue
        merged.append(((call,), role, found))
    return merged


def _same_places(a: Call, b: Call) -> bool:
    if a.kind != b.kind or a.lead is None or b.lead is None or a.lead.windows != b.lead.windows:
        return False
    return all(
        np.array_equal(first_image(a.lead, x), first_image(b.lead, y), equal_nan=True)
        for x, y in ((a.queries, b.queries), (a.keys, b.keys))
    )


def _layer(
    index: int,
    calls: tuple[Call, ...],
    role: Role,
    found: tuple[Add, int] | None,
    out: Add | None,
    parts: Mapping[str, str],
) -> LayerPlan:
    call = calls[0]
    taps: dict[str, Tap] = {}
    positions = None
    width = None
    if found:
        add, skip = found
        for capture, where, one, operand in (
            ("tokens_in", add.wheres[skip], add, skip),
            ("tokens_mid", add.where, add, None),
            ("tokens_out", out.where if out else None, out, None),
        ):
            layout = _tokens(where)
            if layout is not None:
                taps[capture] = Tap(one.ordinal, operand, layout[0], one.in_place)
                positions = layout[1] if positions is None or capture == "tokens_mid" else positions
                width = one.shape[layout[0].axes[-1]]
    groups, masked, prefix, padded, windows = (), False, 0, 0, 1
    if call.lead is not None and role != "channels":
        queries, keys = first_image(call.lead, call.queries), first_image(call.lead, call.keys)
        own, numbers = raster(queries)
        if positions is None or not np.array_equal(own, positions):
            positions = (
                own if positions is None or role != "tokens" or len(own) != len(positions) else positions
            )
            positions = own
        allowed = call.allowed.cpu().numpy() if call.allowed is not None else None
        groups, masked = window_groups(queries, keys, numbers, allowed)
        prefix = int(np.isnan(queries).any(-1).sum(1).max())
        padded = int(np.isinf(keys).any(-1).sum())
        windows = call.lead.windows
    if positions is None:
        positions = np.zeros((0, 2))
    if role == "channels" and "tokens_mid" in taps:
        prefix = len(taps["tokens_mid"].layout.prefix)
    grid, stride = grid_of(positions)
    heads = sum(c.lead.heads if c.lead else 0 for c in calls)
    info = LayerInfo(
        index=index, name=_common([c.path for c in calls]), depth=index + 1, part=_part(call.path, parts), stage=0, role=role,
        kind=call.kind, heads=heads, prefix=prefix, width=width, grid=grid, stride=stride, positions=positions,
        windows=windows, groups=groups, padded=padded, masked=masked,
        sites=tuple(n for n, c in (("in", "tokens_in"), ("mid", "tokens_mid"), ("out", "tokens_out")) if c in taps),
        note=call.note,
    )  # fmt: skip
    return LayerPlan(info, calls, taps)


def _tokens(where: Where | None) -> tuple[TokenLayout, np.ndarray] | None:
    return token_layout(where.rows) if where is not None else None


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


def _placed(
    info: LayerInfo, layers: list[LayerPlan], found: tuple[Add, int] | None, previous: Add | None
) -> LayerInfo:
    """Stage, and whether the layer's input is a token site of its own (nobody's output)."""
    if not layers:
        return replace(info, starts=True)
    last = layers[-1].info
    seen = list(dict.fromkeys((p.info.part, p.info.grid, p.info.width) for p in layers if p.info.part == info.part))
    shape = (info.part, info.grid, info.width)
    stage = seen.index(shape) if shape in seen else len(seen)
    changed = shape != (last.part, last.grid, last.width)
    continues = found and previous is not None and found[0].nodes[found[1]] == previous.result
    return replace(info, stage=stage, starts=bool(changed or not (continues or "out" in last.sites)))


def _warnings(layers: Sequence[LayerPlan]) -> list[str]:
    warnings = []
    padded = [p.info.name for p in layers if p.info.padded]
    if padded:
        warnings.append(
            f"{len(padded)} layers attend to padding (first: '{padded[0]}'); padded keys are dropped and rows renormalised"
        )
    untraced = [p.info.name for p in layers if p.info.role == "untraced"]
    if untraced:
        warnings.append(
            f"token positions could not be traced in {len(untraced)} layers (first: '{untraced[0]}')"
        )
    lost = [p.info.name for p in layers if "tokens_mid" not in p.taps]
    if lost:
        warnings.append(
            f"no residual addition was found around {len(lost)} attention layers (first: '{lost[0]}')"
        )
    return warnings
