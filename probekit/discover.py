"""The plan pass: one forward of two images, in which a model shows where its attention is.

A `TorchFunctionMode` sees every torch call. Each result that descends from the image gets a node (who are
its ancestors), and a `Where` (probekit.positions: which token each element belongs to). From these follow,
with no knowledge of any architecture:

- attention: a fused call, or a product whose one factor is a row-stochastic map of token-to-token scores,
  however its softmax was spelled;
- tokens before and after it: the addition in which one operand descends from the attention and the other
  is an ancestor of its queries; and after that, in the same way, tokens after the MLP;
- windows, shifts, prefix tokens, strides, pooled keys: from the positions of queries and keys.

The run (probekit.watch) then goes by the ordinal of each call and asserts that shapes are as planned.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from probekit import positions
from probekit.errors import WatchError
from probekit.geometry import Lead, lead_layout
from probekit.positions import Contraction, Where

KINDS = {
    "scaled_dot_product_attention": "fused",
    "multi_head_attention_forward": "mha",
    "softmax": "softmax",
    **dict.fromkeys(positions.CONTRACT - {"linear"}, "product"),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), "add"),
}
"""Calls that are counted, by name. The run counts the same ones."""


@dataclass(frozen=True)
class Node:
    """One call whose result descends from the image. `ancestors` and `calls` are bit sets."""

    ancestors: int
    calls: int


@dataclass
class Call:
    """One attention call as the plan pass saw it.

    kind:    fused (F.scaled_dot_product_attention), mha (F.multi_head_attention_forward), explicit
    ordinal: which call of its kind in KINDS (explicit: which product, the one with the values)
    asks:    node of the queries, or of the scores: what the residual stream must be an ancestor of
    queries, keys: (image, y, x) positions of shape (lead..., Q) and (lead..., K); None where lost
    form:    explicit only: the product of probabilities and values in einsum letters
    map_first: explicit only: the probabilities are the first operand
    scores:  explicit only: (ordinal, form) of the product that made the scores
    softmax: explicit only: ordinal of the softmax, where the product's factor isn't row-stochastic itself
    lead:    what the axes before queries and keys are; None where positions were lost
    allowed: (windows, Q, K) bool, pairs with any probability in two images; None when attention is global
    """

    kind: str
    ordinal: int
    path: str
    number: int
    node: int
    asks: int
    queries: tuple[Tensor, ...] | None
    keys: tuple[Tensor, ...] | None
    lead: Lead | None = None
    allowed: Tensor | None = None
    form: Contraction | None = None
    map_first: bool = True
    scores: tuple[int, Contraction] | None = None
    softmax: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Add:
    """An addition of two tensors that both descend from the image."""

    ordinal: int
    nodes: tuple[int, int]
    result: int
    wheres: tuple[Where | None, Where | None]
    where: Where | None
    in_place: bool
    shape: torch.Size


@dataclass
class Record:
    """What one plan pass saw."""

    calls: list[Call] = field(default_factory=list)
    adds: list[Add] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    unnormalised: list[str] = field(default_factory=list)
    opaque: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


class Discovery(TorchFunctionMode):
    """Records one forward pass; see the module's docstring."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.record = Record()
        self.path: list[str] = []
        self._nodes: Any = WeakTensorKeyDictionary()
        self._where: Any = WeakTensorKeyDictionary()
        self._products: dict[int, tuple[int, Contraction]] = {}
        self._softmaxes: dict[int, int] = {}
        self._counts: Counter[str] = Counter()
        self._nodes[images] = self._new_node([], 0)
        self._where[images] = positions.of_image(images)

    def _new_node(self, parents: Sequence[int], calls: int) -> int:
        number = len(self.record.nodes)
        ancestors = 1 << number
        for parent in parents:
            ancestors |= self.record.nodes[parent].ancestors
            calls |= self.record.nodes[parent].calls
        self.record.nodes.append(Node(ancestors, calls))
        return number

    def tracked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._nodes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        kind = KINDS.get(name)
        ordinal = self._counts[kind] if kind else -1
        if kind:
            self._counts[kind] += 1
        inputs = [t for t in _tensors((*args, *kwargs.values())) if t in self._nodes]
        parents = [self._nodes[t] for t in inputs]
        if not inputs or name in ("size", "dim", "__len__", "is_floating_point", "numel"):
            return func(*args, **kwargs)
        self._refuse_opaque(func, name, inputs)
        wheres = [self._where.get(t) for t in args if isinstance(t, Tensor)] if kind == "add" else []
        out = func(*args, **kwargs)
        outputs = list(_tensors((out,))) if name != "__setitem__" else [args[0]]
        if not outputs:
            return out
        number = len(self.record.nodes)
        call = self._attention(kind, ordinal, name, number, args, kwargs, out)
        node = self._new_node(parents, 1 << call.number if call else 0)
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
        if kind == "add":
            self._add(ordinal, name, args, parents, node, out, wheres)
        if kind == "softmax" and outputs[0] in self._where and self._where[outputs[0]].keys:
            self._softmaxes[node] = ordinal
        return out

    def _refuse_opaque(self, func: Any, name: str, inputs: Sequence[Tensor]) -> None:
        namespace = getattr(func, "namespace", None) or getattr(func, "_qualified_op_name", "").split("::")[0]
        if namespace == "aten" and "scaled_dot_product" in str(func):
            self.record.opaque.append(f"torch.ops.{func} in '{self.here}'")
        elif namespace and namespace not in ("aten", "prims", "torchvision") and len(inputs) >= 3:
            self.record.opaque.append(f"the custom operator '{func}' in '{self.here}'")

    @property
    def here(self) -> str:
        return self.path[-1] if self.path else ""

    def _positions(self, call, name, func, args, kwargs, out, number) -> Any:
        if call is not None and call.kind != "explicit":
            result = out if isinstance(out, Tensor) else out[0]
            source = self._where.get(args[0] if args else kwargs["query"])
            if source is None:
                return None
            return Where(
                tuple(positions.collapse(t, -1).unsqueeze(-1).expand(result.shape) for t in source.rows)
            )
        if name in positions.CONTRACT:
            form = positions.contraction(name, args, kwargs)
            if form is None:
                return None
            a, b = self._where.get(form.a), self._where.get(form.b)
            if a is not None and b is not None and a.keys is None and b.keys is None:
                self._products[number] = (self._counts["product"] - 1, form)
            return positions.through_contraction(form, a, b, out, number)
        try:
            return positions.through_call(name, func, args, kwargs, out, self._where.get)
        except (RuntimeError, TypeError, IndexError, KeyError, ValueError):
            return None

    def _attention(self, kind, ordinal, name, number, args, kwargs, out) -> Call | None:
        if kind == "fused":
            return self._fused(ordinal, args, kwargs)
        if kind == "mha":
            return self._mha(ordinal, args, kwargs)
        if kind == "product":
            return self._explicit(ordinal, name, args, kwargs)
        return None

    def _call(self, kind: str, ordinal: int, asks: int, queries, keys, probabilities, **more: Any) -> Call:
        lead = lead_layout(queries) if queries and keys else None
        allowed = None
        if lead is not None and lead.windows > 1:
            maps = lead.canonical(probabilities())
            allowed = maps.unflatten(0, (-1, lead.windows)).amax((0, 2)) > 1e-30
        number, node = len(self.record.calls), len(self.record.nodes)
        call = Call(kind, ordinal, self.here, number, node, asks, queries, keys, lead, allowed, **more)
        self.record.calls.append(call)
        return call

    def _token_positions(self, tensor: Tensor) -> tuple[Tensor, ...] | None:
        where = self._where.get(tensor)
        if where is not None:
            return tuple(positions.collapse(t, -1) for t in where.rows)
        if tensor in self._nodes:
            return None
        nowhere = torch.full((), torch.nan, device=tensor.device)  # learned queries (attention pooling)
        return (nowhere.expand(tensor.shape[:-1]),) * 3

    def _fused(self, ordinal, args, kwargs) -> Call:
        given = fused_arguments(args, kwargs)
        q, k = given.q, given.k
        return self._call(
            "fused", ordinal, self._nodes.get(q, 0), self._token_positions(q), self._token_positions(k),
            lambda: given.probabilities(),
        )  # fmt: skip

    def _mha(self, ordinal, args, kwargs) -> Call:
        bound = bind_mha(args, kwargs)
        q, k = (self._token_positions(bound[n]) for n in ("query", "key"))
        heads = bound["num_heads"]

        def split(t: Tensor) -> Tensor:  # (L, B) -> (B, heads, L); the same place for every head
            return t.reshape(t.shape[0], -1).T.unsqueeze(1).expand(-1, heads, -1)

        given = mha_arguments(bound)
        return self._call(
            "mha", ordinal, self._nodes.get(bound["query"], 0),
            tuple(map(split, q)) if q else None, tuple(map(split, k)) if k else None,
            lambda: given.probabilities(),
        )  # fmt: skip

    def _explicit(self, ordinal, name, args, kwargs) -> Call | None:
        form = positions.contraction(name, args, kwargs)
        if form is None:
            return None
        a, b = self._where.get(form.a), self._where.get(form.b)
        first = a is not None and a.keys is not None
        where = a if first else b
        if where is None or where.keys is None:
            return None
        queries, values = (form.left_only, form.right_only) if first else (form.right_only, form.left_only)
        if len(form.summed) != 1 or len(queries) != 1 or len(values) != 1:
            return None
        letters = form.left if first else form.right
        order = [letters.index(c) for c in (*form.shared, queries, form.summed)]
        factor = form.a if first else form.b
        maps = factor.permute(order)
        path, softmax = self.here, None
        if not _row_stochastic(maps):
            softmax = self._softmax_behind(self._nodes[factor])
            if softmax is None or factor.dim() != 4:
                self.record.unnormalised.append(path)
                return None
        return self._call(
            "explicit", ordinal, where.scores,
            tuple(t.permute(order)[..., 0] for t in where.rows), tuple(t.permute(order)[..., 0, :] for t in where.keys),
            lambda: maps, form=form, map_first=first, scores=self._products.get(where.scores), softmax=softmax,
            note="talking heads: the softmax's own output, before heads are mixed" if softmax is not None else "",
        )  # fmt: skip

    def _softmax_behind(self, node: int) -> int | None:
        ancestors = self.record.nodes[node].ancestors
        found = [n for n in self._softmaxes if ancestors >> n & 1]
        return self._softmaxes[max(found)] if found else None

    def _add(self, ordinal, name, args, parents, node, out, wheres) -> None:
        operands = [t for t in args[:2] if isinstance(t, Tensor)]
        if len(operands) != 2 or len(parents) != 2 or not isinstance(out, Tensor):
            return
        if any(t.shape != out.shape for t in operands):
            return
        in_place = name in ("add_", "__iadd__")
        pair = (parents[0], parents[1])
        self.record.adds.append(
            Add(ordinal, pair, node, (wheres[0], wheres[1]), self._where.get(out), in_place, out.shape)
        )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _row_stochastic(maps: Tensor) -> bool:
    if not maps.is_floating_point():
        return False
    total = maps.sum(-1, dtype=torch.float32)
    return bool((maps.amin() > -1e-5) & ((total - 1).abs().amax() < 2e-2))


@dataclass(frozen=True)
class Fused:
    """Arguments of one fused attention call, q and k as (lead..., tokens, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None

    def probabilities(self) -> Tensor:
        from probekit.attention import probabilities

        return probabilities(self.q, self.k, scale=self.scale, bias=self.bias)


_SDPA = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def fused_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Fused:
    """The call's tensors, its mask as an additive bias, grouped queries spelled out."""
    renamed = {{"query": "q", "key": "k", "value": "v"}.get(k, k): v for k, v in kwargs.items()}
    given = dict(zip(_SDPA, args, strict=False)) | renamed
    q, k, v = given["q"], given["k"], given["v"]
    if given.get("enable_gqa"):
        repeats = q.size(-3) // k.size(-3)
        k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
    bias = given.get("attn_mask")
    if given.get("is_causal"):
        bias = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=q.device).masked_fill(~bias, -torch.inf)
    scale = given.get("scale")
    return Fused(q, k, v, float(q.size(-1) ** -0.5 if scale is None else scale), bias)


_MHA = inspect.signature(F.multi_head_attention_forward)


def bind_mha(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _MHA.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def mha_arguments(bound: dict[str, Any]) -> Fused:
    """What `F.multi_head_attention_forward` computes inside, where no mode can look: its q, k and v.

    Shapes (B, heads, tokens, d).
    """
    if bound["bias_k"] is not None or bound["add_zero_attn"]:
        raise WatchError("nn.MultiheadAttention with 'add_bias_kv' or 'add_zero_attn' can't be watched")
    heads, width = bound["num_heads"], bound["embed_dim_to_check"]
    if bound["use_separate_proj_weight"]:
        weights = [bound[f"{n}_proj_weight"] for n in "qkv"]
    else:
        weights = bound["in_proj_weight"].split(width)
    biases = bound["in_proj_bias"].split(width) if bound["in_proj_bias"] is not None else (None,) * 3

    def project(i: int, name: str) -> Tensor:
        x = F.linear(
            bound[name] if bound[name].dim() == 3 else bound[name].unsqueeze(1), weights[i], biases[i]
        )
        return x.reshape(x.size(0), x.size(1), heads, -1).permute(1, 2, 0, 3)

    q, k, v = (project(i, n) for i, n in enumerate(("query", "key", "value")))
    bias = None
    for mask, shape in ((bound["attn_mask"], (-1, heads)), (bound["key_padding_mask"], None)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=q.device, dtype=q.dtype).masked_fill(mask, -torch.inf)
        if shape is None:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, shape)
        bias = mask if bias is None else bias + mask
    return Fused(q, k, v, q.size(-1) ** -0.5, bias)


_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


def discover(module: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> Record:
    """Forward two images and record what was seen. The module is left as it was, also after an error."""
    mode = Discovery(images)
    ran: dict[str, nn.Module] = {}
    with ExitStack() as stack:
        stack.enter_context(_names(module, mode, ran))
        stack.enter_context(torch.no_grad())
        with mode:
            run(images)
    record = mode.record
    spoke = [c.path for c in record.calls] + record.unnormalised
    record.silent = [
        path
        for path, m in ran.items()
        if _ATTENTION.search(type(m).__name__)
        and not isinstance(m, (nn.Dropout, nn.Identity, nn.Linear, nn.LayerNorm, nn.Softmax))
        and any(True for _ in m.parameters())
        and not any(p == path or p.startswith(f"{path}.") or path.startswith(f"{p}.") for p in spoke)
        and not any(isinstance(sub, nn.MultiheadAttention) for sub in m.modules() if sub is not m)
    ]
    return record


@contextmanager
def _names(module: nn.Module, mode: Discovery, ran: dict[str, nn.Module]) -> Iterator[None]:
    """Keeps `mode.path` the stack of running modules' names."""
    handles = []

    def entering(name: str, m: nn.Module) -> Callable:
        def hook(*_: Any) -> None:  # a value returned here would replace the module's input
            mode.path.append(name)
            ran.setdefault(name, m)

        return hook

    def leaving(*_: Any) -> None:
        mode.path.pop()

    try:
        for name, m in module.named_modules():
            if isinstance(m, (nn.Softmax, nn.Dropout, nn.Identity)):
                continue
            handles.append(m.register_forward_pre_hook(entering(name, m)))
            handles.append(m.register_forward_hook(leaving, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
