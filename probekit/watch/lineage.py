"""The mode of the plan pass: follows every result back to the image, and recognises attention on the way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from probekit.watch import positions
from probekit.watch.attention_calls import bind_mha, fused_arguments, mha_arguments
from probekit.watch.contraction import CONTRACT, Contraction, contraction, through_contraction
from probekit.watch.geometry import Lead, first_image, lead_layout
from probekit.watch.maps import is_mix, map_axes, moves, row_stochastic, sampled
from probekit.watch.positions import Where, nowhere, tensors_in
from probekit.watch.record import Add, Call, Node, Record, ScoreProduct

KINDS = {
    "scaled_dot_product_attention": "fused",
    "multi_head_attention_forward": "mha",
    "softmax": "softmax",
    **dict.fromkeys(CONTRACT - {"linear"}, "product"),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_"), "add"),
}
"""Calls that are counted, by name. The run counts the same ones."""

_HIDDEN = (
    "scaled_dot_product",
    "flash_attention",
    "efficient_attention",
    "flex_attention",
    "multi_head_attention",
    "transformer_encoder_layer_fwd",
)
"""Parts of names of torch's own calls that attend without showing q and k where a mode can look."""

_ATTENDED = 1e-9
"""A pair to which no head gives more than this is masked. A mask of -100 that is added to the scores leaks
exp(-100 + their spread): 1.5e-11 with the largest scale that Swin V2 allows, 100. All heads count, and not
most of them: regions are connected parts, so a pair that peaked heads leave out is still joined through
others, while most heads of that scale leave out too many."""

_SCALED = frozenset(("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"))
"""Calls that may scale the stream by a parameter."""

_SUBTRACTED = frozenset(("sub", "sub_", "subtract", "__sub__", "__isub__"))

_SILENT_QUESTIONS = frozenset({"size", "dim", "__len__", "is_floating_point", "numel"})


@dataclass(frozen=True)
class _Softmax:
    """A softmax over token-to-token scores.

    where:  where its result's elements are
    axes:   its axes in the order (image, head, query, key), normalised along the last; None where they
            aren't these four
    turned: its scores were made as k q^T
    sample: some rows of it, as `sampled` cuts them
    """

    ordinal: int
    path: str
    where: Where
    axes: tuple[int, ...] | None
    turned: bool
    sizes: tuple[int, ...]
    sample: Tensor | None

    @property
    def of_tokens(self) -> bool:
        axes = range(len(self.where.shape))
        return all(any(moves(c, a) for a in axes) for c in (self.where.rows, self.where.keys))


class Discovery(TorchFunctionMode):
    """Records one forward pass; see the module's docstring."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.record = Record()
        self._running: list[tuple[str, int]] = []  # modules by name, and which run of a module it is
        self._runs = itertools.count(1)
        self._nodes: Any = WeakTensorKeyDictionary()
        self._where: Any = WeakTensorKeyDictionary()
        self._products: dict[int, tuple[int, Contraction, Where, Where]] = {}
        self._softmaxes: dict[int, _Softmax] = {}
        self._nodes[images] = self._new_node([], 0)
        self._where[images] = positions.of_image(images)

    def enter(self, path: str) -> None:
        """A module starts to run."""
        self._running.append((path, next(self._runs)))

    def leave(self) -> str:
        """The running module ends; its path."""
        return self._running.pop()[0]

    def _new_node(self, parents: Sequence[int], calls: int, base: int | None = None) -> int:
        number = len(self.record.nodes)
        ancestors = 1 << number
        for parent in parents:
            ancestors |= self.record.nodes[parent].ancestors
            calls |= self.record.nodes[parent].calls
        self.record.nodes.append(Node(ancestors, calls, number if base is None else base))
        return number

    def tracked(self, value: Any) -> bool:
        """Whether a tensor descends from the image."""
        return isinstance(value, Tensor) and value in self._nodes

    @property
    def here(self) -> str:
        """The running module."""
        return self._running[-1][0] if self._running else ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        kind = KINDS.get(name)
        ordinal = self.record.counts[kind] if kind else -1
        if kind:
            self.record.counts[kind] += 1
        inputs = [t for t in tensors_in((*args, *kwargs.values())) if t in self._nodes]
        if not inputs or name in _SILENT_QUESTIONS:
            return func(*args, **kwargs)
        parents = [self._nodes[t] for t in inputs]
        self._note_opaque(func, name, kind, inputs)
        self._note_written(name, args, kwargs)
        operands = self._operands(args) if kind == "add" else []
        out = func(*args, **kwargs)
        outputs = list(tensors_in((out,))) if name != "__setitem__" else [args[0]]
        if not outputs:
            return out
        number = len(self.record.nodes)
        call = self._attention(kind, ordinal, name, args, kwargs)
        scaled = name in _SCALED and len(inputs) == 1 and inputs[0].shape == outputs[0].shape
        base = self.record.nodes[parents[0]].base if scaled else None
        node = self._new_node(parents, 1 << call.number if call else 0, base)
        if name in _SUBTRACTED and len(parents) == 2:
            self.record.subtracted.append((parents[0], parents[1]))
        where = self._positions(call, name, func, args, kwargs, out, number)
        found = where if isinstance(where, tuple) else (where,) * len(outputs)
        for tensor, place in zip(outputs, found, strict=False):
            self._nodes[tensor] = node
            if isinstance(place, Where) and place.shape == tensor.shape:
                self._where[tensor] = place
            else:
                if any(t in self._where for t in inputs):
                    self.record.lost.setdefault(self.here, name)
                self._where.pop(tensor, None)
        if kind == "add" and isinstance(out, Tensor):
            self._add(ordinal, operands, node, out)
        if kind == "softmax":
            self._softmax(ordinal, node, outputs[0], args, kwargs)
        return out

    def _note_opaque(self, func: Any, name: str, kind: str | None, inputs: Sequence[Tensor]) -> None:
        namespace = getattr(func, "namespace", None) or getattr(func, "_qualified_op_name", "").split("::")[0]
        if kind is None and any(part in name for part in _HIDDEN):
            self.record.opaque.append((self.here, f"torch's '{name}'"))
        elif namespace and namespace not in ("aten", "prims", "torchvision") and len(inputs) >= 3:
            self.record.opaque.append((self.here, f"the custom operator '{func}'"))

    def _note_written(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        target = kwargs.get("out")
        if name in ("__setitem__", "__iadd__", "__imul__", "__isub__", "__itruediv__", "__idiv__") or (
            name.endswith("_") and not name.endswith("__")
        ):
            target = args[0] if args else None
        if isinstance(target, Tensor):
            self.record.written.add(_memory(target))

    # ------------------------------------------------------------------ positions

    def _positions(self, call, name, func, args, kwargs, out, number) -> Any:
        if call is not None and (call.kind != "explicit" or call.shared):
            return self._of_attention(call, args, kwargs, out if isinstance(out, Tensor) else out[0])
        if name in CONTRACT:
            form = contraction(name, args, kwargs)
            if form is None:
                return None
            a, b = self._factors(form)
            if a is not None and b is not None and a.keys is None and b.keys is None:
                self._products[number] = (self.record.counts["product"] - 1, form, a, b)
            return through_contraction(form, a, b, out, number)
        try:
            return positions.through_call(name, func, args, kwargs, out, self._where.get, self.tracked)
        except (RuntimeError, TypeError, IndexError, KeyError, ValueError):
            return None

    def _of_attention(self, call: Call, args, kwargs, result: Tensor) -> Where | None:
        """Positions of what an attention call returns: its queries'."""
        if call.shared:
            if call.form is not None:
                form = call.form
                letters = form.shared + (form.left_only if call.map_first else form.right_only)
                return Where(tuple(_spread(t, letters, form.out, result.shape) for t in call.queries))
            return Where(tuple(t.unsqueeze(-1).expand(result.shape) for t in call.queries))
        query = args[0] if args else kwargs["query"]
        source = self._where.get(query)
        if source is None:
            return None if self.tracked(query) else Where(nowhere(result))
        return Where(tuple(positions.collapse(t, -1).unsqueeze(-1).expand(result.shape) for t in source.rows))

    def _factors(self, form: Contraction) -> tuple[Where | None, Where | None]:
        """Positions of a product's two factors; scores made as k q^T are turned to queries and keys."""
        found = []
        for t, letters in ((form.a, form.left), (form.b, form.right)):
            where = self._where.get(t)
            if where is not None and where.keys is not None and len(form.summed) == 1:
                axis = letters.index(form.summed)
                if moves(where.rows, axis) and not moves(where.keys, axis):
                    where = replace(where, rows=where.keys, keys=where.rows, turned=True)
            found.append(where)
        return found[0], found[1]

    def _softmax(self, ordinal: int, node: int, out: Tensor, args, kwargs) -> None:
        where = self._where.get(out)
        if where is None:
            return
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if where.keys is None:
            if not isinstance(dim, int) or not moves(where.rows, dim):
                return
            where = Where(nowhere(out), where.rows, node)  # learned queries: places of the keys alone
            self._where[out] = where
        turned, axes = False, None
        if isinstance(dim, int):
            turned = moves(where.rows, dim) and not moves(where.keys, dim)
            axes = map_axes(replace(where, rows=where.keys, keys=where.rows) if turned else where)
            axes = axes if axes is not None and axes[-1] == dim % out.dim() else None
        maps = out.permute(axes) if axes is not None else None
        self._softmaxes[node] = _Softmax(
            ordinal,
            self.here,
            where,
            axes,
            turned,
            tuple(maps.shape) if maps is not None else (),
            sampled(maps) if maps is not None else None,
        )

    # ------------------------------------------------------------------ attention

    def _attention(self, kind, ordinal, name, args, kwargs) -> Call | None:
        if kind == "fused":
            return self._fused(ordinal, args, kwargs)
        if kind == "mha":
            return self._mha(ordinal, args, kwargs)
        if kind == "product":
            return self._explicit(ordinal, name, args, kwargs)
        return None

    def _call(self, kind: str, ordinal: int, asks: int, queries, keys, probabilities, **more: Any) -> Call:
        lead = lead_layout(queries, keys) if queries and keys else None
        allowed, shared = None, False
        if lead is not None and lead.windows > 1:
            maps = lead.canonical(probabilities())
            allowed = maps.unflatten(0, (-1, lead.windows)).amax((0, 2)) > _ATTENDED
            if _same_in_every_window(lead, queries) and not _same_in_every_window(lead, keys):
                shared = queries[0].shape == keys[0].shape
                queries = keys if shared else queries
        number, node = len(self.record.calls), len(self.record.nodes)
        call = Call(
            kind,
            ordinal,
            self.here,
            number,
            node,
            asks,
            queries,
            keys,
            lead,
            allowed,
            shared=shared,
            run=self._running[-1][1] if self._running else 0,
            **more,
        )
        self.record.calls.append(call)
        return call

    def _token_positions(self, tensor: Tensor) -> tuple[Tensor, ...] | None:
        where = self._where.get(tensor)
        if where is not None:
            return tuple(positions.collapse(t, -1) for t in where.rows)
        if tensor in self._nodes:
            return None
        return tuple(t[..., 0] for t in nowhere(tensor))  # learned queries (attention pooling)

    def _fused(self, ordinal, args, kwargs) -> Call:
        given = fused_arguments(args, kwargs)
        query, key = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key")))
        lead = given.q.shape[:-2]

        def spread(t: Tensor) -> Tensor:  # (lead..., tokens), for fewer heads of keys than of queries
            if len(lead) > 1 and t.size(-2) not in (1, lead[-1]):
                t = t.repeat_interleave(lead[-1] // t.size(-2), -2)
            return t.expand(*lead, -1)

        places = [self._token_positions(t) for t in (query, key)]
        q, k = (tuple(map(spread, p)) if p else None for p in places)
        value = args[2] if len(args) > 2 else kwargs["value"]
        return self._call(
            "fused",
            ordinal,
            self._nodes.get(query, 0),
            q,
            k,
            given.probabilities,
            values=self._nodes.get(value),
            over_channels=self._features_move(query),
        )

    def _features_move(self, query: Tensor) -> bool:
        """Whether the features of a query are of several places: then it is a channel, and no token."""
        where = self._where.get(query)
        return where is not None and moves(where.rows, -1)

    def _mha(self, ordinal, args, kwargs) -> Call:
        bound = bind_mha(args, kwargs)
        q, k = (self._token_positions(bound[n]) for n in ("query", "key"))
        heads = bound["num_heads"]

        def split(t: Tensor) -> Tensor:  # (L, B) -> (B, heads, L); the same place for every head
            return t.reshape(t.shape[0], -1).T.unsqueeze(1).expand(-1, heads, -1)

        return self._call(
            "mha",
            ordinal,
            self._nodes.get(bound["query"], 0),
            tuple(map(split, q)) if q else None,
            tuple(map(split, k)) if k else None,
            mha_arguments(bound).probabilities,
            over_channels=self._features_move(bound["query"]),
        )

    def _explicit(self, ordinal, name, args, kwargs) -> Call | None:
        form = contraction(name, args, kwargs)
        if form is None:
            return None
        a, b = self._factors(form)
        first = a is not None and a.keys is not None
        where = a if first else b
        if where is None or where.keys is None:
            return None
        queries, values = (form.left_only, form.right_only) if first else (form.right_only, form.left_only)
        if len(form.summed) != 1 or len(queries) != 1 or len(values) != 1:
            return None
        letters, factor = (form.left, form.a) if first else (form.right, form.b)
        order = tuple(letters.index(c) for c in (*form.shared, queries, form.summed))
        maps = factor.permute(order)
        softmax, note = None, ""
        if not row_stochastic(maps):
            found = self._softmax_behind(factor, where, order)
            if found is None:
                self.record.unnormalised.append(self.here)
                return None
            softmax, note = found, "talking heads: the softmax's own output, before heads are mixed"
        rows, keys = (tuple(t.permute(order) for t in channel) for channel in (where.rows, where.keys))
        _, product, asking, _ = self._products.get(where.scores, (0, None, None, None))
        summed = [product.left.index(c) for c in product.summed] if product is not None else []
        return self._call(
            "explicit",
            ordinal,
            where.scores,
            tuple(t[..., 0] for t in rows),
            tuple(t[..., 0, :] for t in keys),
            lambda: maps,
            form=form,
            map_first=first,
            map_node=self._nodes[factor],
            values=self._nodes.get(form.b if first else form.a),
            over_channels=any(moves(asking.rows, axis) for axis in summed),
            scores=self._score_product(where),
            softmax=softmax,
            note=note,
        )

    def _score_product(self, where: Where) -> ScoreProduct | None:
        """The product that made the scores, with what its own axes are."""
        if where.scores not in self._products:
            return None
        ordinal, form, a, b = self._products[where.scores]
        if len(form.summed) != 1 or len(form.left_only) != 1 or len(form.right_only) != 1:
            return None
        sides = []
        for place, letters, own in ((a, form.left, form.left_only), (b, form.right, form.right_only)):
            order = [letters.index(c) for c in (*form.shared, own)]
            at = letters.index(form.summed)
            order = [i - (i > at) for i in order]
            sides.append(tuple(positions.collapse(t, at).permute(order) for t in place.rows))
        lead = lead_layout(*sides)
        if lead is None:
            return None
        return ScoreProduct(ordinal, form, lead, keys_first=where.turned)

    def _softmax_behind(
        self, factor: Tensor, where: Where, order: Sequence[int]
    ) -> tuple[int, tuple[int, ...]] | None:
        """The softmax whose heads were mixed into a product's factor: its ordinal and axes.

        None where the model did anything else to it (subtracted another, cut a sink off, clamped it): its
        rows are not what the values are weighed by. order: the factor's axes, queries and keys last
        """
        nodes, node = self.record.nodes, self._nodes[factor]
        found = [
            s
            for n, s in self._softmaxes.items()
            if nodes[node].ancestors >> n & nodes[n].ancestors >> where.scores & 1
        ]
        axes = map_axes(where)
        if len(found) != 1 or axes is None or axes[2:] != tuple(order[-2:]):
            return None
        softmax, maps = found[0], factor.permute(axes)
        images, _, queries, keys = maps.shape
        if softmax.axes is None or softmax.turned != where.turned:
            return None
        if (softmax.sizes[0], *softmax.sizes[2:]) != (images, queries, keys):
            return None
        if not is_mix(sampled(maps), softmax.sample):
            return None
        return softmax.ordinal, softmax.axes

    # ------------------------------------------------------------------ additions

    def _operands(self, args: Sequence[Any]) -> list[tuple[int, Tensor, int, Where | None, int]]:
        """Tensors an addition adds up: argument, tensor, node, positions and memory before the call."""
        return [
            (i, t, self._nodes[t], self._where.get(t), _memory(t))
            for i, t in enumerate(args[:3])
            if isinstance(t, Tensor) and t in self._nodes
        ]

    def _add(self, ordinal: int, operands: list[tuple], node: int, out: Tensor) -> None:
        whole = [o for o in operands if o[1].shape == out.shape]
        if len(whole) != 2:
            return
        places, _, nodes, wheres, memory = zip(*whole, strict=True)
        where, memory = self._where.get(out), (*memory, _memory(out))
        self.record.adds.append(
            Add(ordinal, self.here, places, nodes, node, wheres, where, memory, out.shape)
        )

    def finish(self, output: Sequence[Tensor]) -> Record:
        """The record, with the softmaxes over tokens that the output depends on, but by no product."""
        nodes, used, matters = self.record.nodes, 0, 0
        for call in self.record.calls:
            used |= nodes[call.map_node].ancestors if call.map_node is not None else 0
        for tensor in output:
            matters |= nodes[self._nodes[tensor]].ancestors if self.tracked(tensor) else 0
        left = matters & ~used
        self.record.unused = [s.path for n, s in self._softmaxes.items() if left >> n & 1 and s.of_tokens]
        return self.record


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper tensors have none
        return id(tensor)


def _same_in_every_window(lead: Lead, channel: tuple[Tensor, ...]) -> bool:
    places = first_image(lead, channel)
    return bool(((places == places[:1]) | (places != places)).all())


def _spread(t: Tensor, letters: str, out: str, shape: torch.Size) -> Tensor:
    """Positions with axes `letters` as a view of a tensor with axes `out`."""
    kept = [letters.index(c) for c in out if c in letters]
    index = tuple(slice(None) if c in letters else None for c in out)
    return t.permute(kept)[index].expand(shape)
