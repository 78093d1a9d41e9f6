"""Where a layer's attention is added to the stream of tokens, and where its MLP is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.watch.geometry import first_image, raster
from probekit.watch.record import Add, Call, Record


@dataclass(frozen=True)
class Residual:
    """The addition of a layer's attention to the stream.

    before: which of its operands is the stream the queries came from; None where it was scaled, pooled or
            projected on the way
    stream: node of that stream; None where it was pooled or projected, so that the layer has no token
            tensor before it
    whole:  the attention and the MLP beside it are added at once: the result is the layer's output
    """

    add: Add
    before: int | None
    stream: int | None
    whole: bool = False


def residual(record: Record, call: Call) -> Residual | None:
    """The addition after the call's attention, and which operand is the stream before it.

    Of several before the MLP or the next attention the last: inner ones add the queries back (MViT). Where
    the stream was pooled or projected on the way to it, the addition onto tokens at the queries' places.
    """
    nodes = record.nodes
    later = [c.node for c in record.calls if c is not call and nodes[c.node].calls >> call.number & 1]
    limit = min(later, default=len(nodes))
    found: Residual | None = None
    pooled: Residual | None = None
    for add in record.adds:
        both = all(nodes[n].calls >> call.number & 1 for n in add.nodes)
        if both and (found or pooled) and _follows(record, *add.nodes):
            break
        skip = _around(record, add, call)
        if skip is None or (add.result >= limit and found is not None):
            continue
        asked = nodes[call.asks].ancestors
        plain = bool(asked >> add.nodes[skip] & 1)
        stream = add.nodes[skip] if plain else nodes[add.nodes[skip]].base
        if asked >> stream & 1:
            if add.where is None or add.layouts[2] is not None:
                found = Residual(add, skip if plain else None, stream)
        elif add.result < limit and _at_queries(add, call):
            pooled = Residual(add, None, None)
    if found is not None and found.add.result > limit and pooled is not None:
        found = pooled
    found = found or pooled
    return None if found is None or _between_heads(record, call, found) else found


def _around(record: Record, add: Add, call: Call) -> int | None:
    """Which operand of an addition does not descend from the call, where the other does."""
    after = [record.nodes[n].calls >> call.number & 1 for n in add.nodes]
    return after.index(0) if sum(after) == 1 else None


def _follows(record: Record, a: int, b: int) -> bool:
    """Whether one of two nodes descends from the other."""
    return bool(record.nodes[b].ancestors >> a & 1 or record.nodes[a].ancestors >> b & 1)


def _between_heads(record: Record, call: Call, found: Residual) -> bool:
    """Whether the addition hands one head's output on to the next (EfficientViT): that is no stream.

    Later attention of the same run of a module descends from it, and the stream goes around all of them.
    """
    nodes = record.nodes
    own = [c for c in record.calls if c.run == call.run]
    later = [c.node for c in own if c is not call and nodes[c.node].ancestors >> found.add.result & 1]
    calls = sum(1 << c.number for c in own)
    for add in record.adds if later else ():
        around = _around(record, add, call)
        if add.result < min(later) or around is None:
            continue
        skip = add.nodes[around]
        between = nodes[add.result].calls & ~nodes[skip].calls
        if nodes[call.asks].ancestors >> skip & 1 and not between & ~calls:
            return True
    return False


def has_mlp_beside(record: Record, call: Call, found: Residual) -> bool:
    """Whether something that comes from the stream, but not from q, k or v, was added to the attention
    before the stream was: x + (attention + MLP)."""
    if found.before is None:
        return False
    nodes = record.nodes
    branch = nodes[found.add.nodes[found.before ^ 1]].ancestors
    for add in record.adds:
        around = _around(record, add, call)
        if around is None or not branch >> add.result & 1:
            continue
        other = add.nodes[around]
        source, asked = nodes[other].ancestors, nodes[call.asks].ancestors
        if not source >> found.stream & 1 or asked >> other & 1:
            continue
        if call.values is None:
            return True
        # v itself on another way (LePE) shares with v what q does not come from
        if not source >> call.values & 1 and not source & nodes[call.values].ancestors & ~asked:
            return True
    return False


def _at_queries(add: Add, call: Call) -> bool:
    layout = add.layouts[2]
    if layout is None or call.lead is None:
        return False
    return np.array_equal(layout[1], raster(first_image(call.lead, call.queries))[0])


def after_mlp(record: Record, found: Residual) -> Add | None:
    """The next addition onto the stream, before any other attention's: tokens after the MLP.

    Of several in the module that added the attention, the last (XCiT adds a convolution in between).
    """
    out = _next_addition(record, found)
    for add in record.adds if out is not None else ():
        chained = out.result in add.nodes and add.nodes[0] != add.nodes[1] and _follows(record, *add.nodes)
        within = add.path == found.add.path and add.shape.numel() == out.shape.numel()
        other = record.nodes[add.result].calls & ~record.nodes[found.add.result].calls
        if add.result > out.result and chained and within and not other:
            out = add
    return out


def _next_addition(record: Record, found: Residual) -> Add | None:
    mid, nodes = found.add, record.nodes
    before = found.stream
    start = next(i for i, add in enumerate(record.adds) if add is mid)
    fallback = None
    for add in record.adds[start + 1 :]:
        if nodes[add.result].calls & ~nodes[mid.result].calls:
            break
        if add.shape.numel() != mid.shape.numel() or add.nodes[0] == add.nodes[1]:
            continue
        ancestors = [nodes[n].ancestors for n in add.nodes]
        if all(a >> mid.result & 1 for a in ancestors):
            if mid.result in add.nodes or mid.result in [nodes[n].base for n in add.nodes]:
                return add
            if _follows(record, *add.nodes):
                fallback = fallback or add
        elif mid.result in add.nodes and before is not None:
            other = ancestors[add.nodes.index(mid.result) ^ 1]
            if other >> before & 1:
                return add  # an MLP beside the attention: x + attention + mlp
    return fallback
