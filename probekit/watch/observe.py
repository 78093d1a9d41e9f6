"""One watched forward pass: calls are counted, the planned ones captured, and whoever waits is visited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probekit.attention import exact_float32
from probekit.errors import DoesNotApply, MetricError, WatchError
from probekit.layer import Layer, Scores
from probekit.metric import Row
from probekit.watch.attention_calls import bind_mha, fused_arguments, mha_arguments, mha_output
from probekit.watch.contraction import Contraction, contraction
from probekit.watch.geometry import Lead
from probekit.watch.lineage import KINDS
from probekit.watch.maps import row_tolerance
from probekit.watch.plan import LayerPlan, Plan, Tap
from probekit.watch.record import Call

CAPTURES: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        ("attention", "attention_full", "attention_stats", "prefix_mass", "distances"), frozenset({"scores"})
    ),
    "q": frozenset({"q"}),
    "k": frozenset({"k"}),
    "v": frozenset({"v"}),
    "head_outputs": frozenset({"heads"}),
    "tokens_in": frozenset({"tokens_in"}),
    "tokens_mid": frozenset({"tokens_mid"}),
    "tokens_out": frozenset({"tokens_out"}),
    "tokens": frozenset({"tokens"}),
    "output": frozenset(),
}
"""What has to be captured for each field a metric may name in `needs`."""

SITES = {"tokens_in": "embed", "tokens_mid": "mid", "tokens_out": "out"}

_ATTENTION = frozenset({"scores", "q", "k", "v", "heads"})


@dataclass(frozen=True)
class Visitor:
    """Someone who wants to see every layer (or, with ``"tokens"``, every token site) with some fields.

    Raises `MetricError` for a field that no layer has.
    """

    needs: frozenset[str]
    visit: Callable[[Layer], None]

    def __post_init__(self) -> None:
        unknown = sorted(self.needs - CAPTURES.keys())
        if unknown:
            raise MetricError(
                f"a layer has no field '{unknown[0]}'", hint=f"fields: {', '.join(sorted(CAPTURES))}"
            )
        for alone, place in (("tokens", "a token site"), ("output", "the model's output")):
            beside = sorted(self.needs - {alone}) if alone in self.needs else []
            if beside:
                raise MetricError(
                    f"{place} has '{alone}' alone, no '{beside[0]}'",
                    hint="need 'tokens_in', 'tokens_mid' or 'tokens_out' to see tokens and attention",
                )

    @property
    def captures(self) -> frozenset[str]:
        return frozenset().union(*(CAPTURES[n] for n in self.needs))


def layer_row(plan: LayerPlan, label: str, depth: float, site: str) -> Row:
    """An entry of a result's layer axis."""
    info = plan.info
    grid, stride = info.grid or (0, 0), info.stride or (float("nan"),) * 2
    return Row(label, float(depth), site, info.part, info.stage, info.heads, grid, stride)


def layer_sites(plan: LayerPlan) -> list[tuple[Row, str]]:
    """Token sites of a layer with the capture each comes from; "in" only where no layer's output is it."""
    found = []
    for capture, site in SITES.items():
        if capture not in plan.taps or (capture == "tokens_in" and not plan.info.starts):
            continue
        depth = plan.info.depth - {"embed": 1.0, "mid": 0.5, "out": 0.0}[site]
        found.append((layer_row(plan, f"{plan.info.name}.{site}", depth, site), capture))
    return found


@dataclass
class _Running:
    """One layer during one forward: what was captured, and who still waits for what."""

    plan: LayerPlan
    captured: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[Any]] = field(default_factory=dict)
    waiting: list[Visitor] = field(default_factory=list)


class Observation(TorchFunctionMode):
    """Active during one forward pass; `finish` it afterwards."""

    def __init__(self, plan: Plan, visitors: Sequence[Visitor], batch: int, verify: bool):
        super().__init__()
        self.plan, self.batch, self.verify = plan, batch, verify
        self.counts: Counter[str] = Counter()
        self.layer_visitors = [v for v in visitors if "tokens" not in v.needs]
        self.site_visitors = [v for v in visitors if "tokens" in v.needs]
        wanted = frozenset().union(*(v.captures for v in visitors)) if visitors else frozenset()
        self.wanted = wanted | (frozenset(SITES) if "tokens" in wanted else frozenset())
        if verify:
            self.wanted = self.wanted | {"scores", "v", "heads"}
        self.actions: dict[tuple[str, int], list[Callable]] = {}
        self.running = [_Running(p, waiting=list(self.layer_visitors)) for p in plan.layers]
        for state in self.running:
            self._arrange(state)

    def _arrange(self, state: _Running) -> None:
        plan = state.plan
        for name in frozenset().union(*CAPTURES.values()) - plan.captures:
            state.captured[name] = _missing(plan, name)
        if self.wanted & _ATTENTION & plan.captures:
            for call in plan.calls:
                kind = "product" if call.kind == "explicit" else call.kind
                self._at(kind, call.ordinal, lambda *a, c=call: self._attend(state, c, *a))
                if call.scores and "q" in plan.captures and self.wanted & {"q", "k"}:
                    self._at("product", call.scores.ordinal, lambda *a, c=call: self._scores(state, c, *a))
                if call.softmax is not None:
                    self._at("softmax", call.softmax[0], lambda *a, c=call: self._softmax(state, c, *a))
        for capture in SITES:
            tap = plan.taps.get(capture)
            if tap is not None and capture in self.wanted:
                self._at("add", tap.ordinal, lambda *a, n=capture, t=tap: self._tokens(state, n, t, *a))

    def _at(self, kind: str, ordinal: int, action: Callable) -> None:
        self.actions.setdefault((kind, ordinal), []).append(action)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(getattr(func, "__name__", ""))
        if kind is None:
            return func(*args, **(kwargs or {}))
        ordinal = self.counts[kind]
        self.counts[kind] += 1
        actions = self.actions.pop((kind, ordinal), None)
        kwargs = kwargs or {}
        if actions is None:
            return func(*args, **kwargs)
        later = [action(func, args, kwargs) for action in actions]
        out = func(*args, **kwargs)
        for after in later:
            if after is not None:
                after(out)
        return out

    def finish(self) -> None:
        """Visit for layers that have nothing of what is needed. Raises `WatchError` where calls differ."""
        for kind in sorted({*self.counts, *self.plan.counts}):
            seen, planned = self.counts[kind], self.plan.counts.get(kind, 0)
            if seen != planned:
                raise _otherwise(f"{seen} {kind} calls instead of {planned}")
        for state in self.running:
            self._deliver(state, {})

    # ------------------------------------------------------------------ captures

    def _attend(self, state: _Running, call: Call, func: Any, args: Any, kwargs: Any) -> Callable:
        lead = call.lead
        form = _same_product(call.form, func, args, kwargs) if call.form else None

        def after(out: Any) -> None:
            got: dict[str, Any] = {}
            expected = None
            if form is not None:
                maps, values = (form.a, form.b) if call.map_first else (form.b, form.a)
                letters, other = (form.left, form.right) if call.map_first else (form.right, form.left)
                queries, width = (
                    (form.left_only, form.right_only) if call.map_first else (form.right_only, form.left_only)
                )

                shared = [out.size(form.out.index(c)) for c in form.shared]

                def lay(t: Tensor, have: str, last: str) -> Tensor:
                    t = t.permute([have.index(c) for c in (*form.shared, *last)])
                    return lead.canonical(t.expand(*shared, -1, -1))  # one head of keys for all (MQA)

                if call.softmax is None:
                    got["scores"] = Scores(probabilities=lay(maps, letters, queries + form.summed))
                got["v"] = lay(values, other, form.summed + width)
                got["heads"] = expected = lay(out, form.out, queries + width)
            else:
                bound = bind_mha(args, kwargs) if call.kind == "mha" else None
                given = mha_arguments(bound) if bound else fused_arguments(args, kwargs)
                q, k, got["v"] = (lead.canonical(t) for t in (given.q, given.k, given.v))
                got["scores"] = Scores(q, k, given.scale, _canonical_bias(lead, given.bias, given.q, given.k))
                got["q"], got["k"] = q, k
                if bound is None:
                    got["heads"] = expected = lead.canonical(out)
                elif self.wanted & {"heads"}:
                    with exact_float32(got["v"].device):  # whatever the forward's precision
                        got["heads"] = got["scores"].full() @ got["v"].float()
                    if self.verify:
                        _close(state.plan, mha_output(bound, got["heads"]), out[0])
            self._shapes(state, call, got)
            if self.verify and "scores" in got:
                _verify(state.plan, got, lead.windows, expected)
            self._store(state, got)

        return after

    def _softmax(self, state: _Running, call: Call, func: Any, args: Any, kwargs: Any) -> Callable:
        def after(out: Tensor) -> None:
            got = {"scores": Scores(probabilities=out.permute(call.softmax[1]))}
            if self.verify:
                _verify(state.plan, got, 1, None)
            self._store(state, got)

        return after

    def _scores(self, state: _Running, call: Call, func: Any, args: Any, kwargs: Any) -> Callable:
        product = call.scores
        form = _same_product(product.form, func, args, kwargs)

        def after(_: Any) -> None:
            got = {}
            names = ("k", "q") if product.keys_first else ("q", "k")
            sides = ((form.a, form.left, form.left_only), (form.b, form.right, form.right_only))
            shared = [max(t.size(have.index(c)) for t, have, _ in sides) for c in form.shared]
            for name, (t, have, own) in zip(names, sides, strict=True):
                t = t.permute([have.index(c) for c in (*form.shared, own, *form.summed)])
                got[name] = product.lead.canonical(t.expand(*shared, -1, -1))
            self._store(state, got)

        return after

    def _tokens(
        self, state: _Running, capture: str, tap: Tap, func: Any, args: Any, kwargs: Any
    ) -> Callable | None:
        if tap.place is not None:
            if len(args) <= tap.place or not isinstance(args[tap.place], Tensor):
                raise _otherwise(f"tokens at '{state.plan.info.name}' are no tensor")
            self._deliver_tokens(state, capture, tap, args[tap.place])
            return None
        return lambda out: self._deliver_tokens(state, capture, tap, out)

    def _deliver_tokens(self, state: _Running, capture: str, tap: Tap, tensor: Tensor) -> None:
        layout = tap.layout
        same = tensor.dim() == len(layout.axes) and tensor.size(layout.axes[0]) == self.batch * layout.folds
        if not same or layout.flat(tensor).shape[1] != layout.total:
            raise _otherwise(
                f"tokens at '{state.plan.info.name}' are {tuple(tensor.shape)} instead of {tap.layout.total} "
                f"tokens of {self.batch} images"
            )
        if tap.written:
            tensor = tensor.clone()
        if tensor.dtype in (torch.float16, torch.bfloat16):  # metrics see float32, whatever the forward's
            tensor = tensor.float()
        patches = tap.layout.patches(tensor)
        prefix = tap.layout.prefix_tokens(tensor) if len(tap.layout.prefix) else patches[:, :0]
        for row, source in layer_sites(state.plan):
            if source == capture and self.site_visitors:
                layer = Layer(state.plan.info, row, self.batch, {"tokens": patches, "prefix:tokens": prefix})
                for visitor in self.site_visitors:
                    visitor.visit(layer)
        self._deliver(state, {capture: patches, f"prefix:{capture}": prefix})

    def _shapes(self, state: _Running, call: Call, got: Mapping[str, Any]) -> None:
        planned = (self.batch * call.lead.windows, call.lead.heads, call.keys[0].shape[-1])
        seen = tuple(got["v"].shape[:3])
        if seen != planned:
            got, wanted = (" x ".join(map(str, s)) for s in (seen, planned))
            raise _otherwise(
                f"attention of '{state.plan.info.name}' is over {got} keys (images and windows, heads, keys) "
                f"instead of {wanted}"
            )

    # ------------------------------------------------------------------ visits

    def _store(self, state: _Running, got: dict[str, Any]) -> None:
        """Collect what one call gave; a layer whose heads are separate calls is complete with the last."""
        count = len(state.plan.calls)
        if count == 1:
            self._deliver(state, got)
            return
        complete = {}
        for name, value in got.items():
            parts = state.parts.setdefault(name, [])
            parts.append(value)
            if len(parts) == count:
                complete[name] = _join_heads(parts)
        self._deliver(state, complete)

    def _deliver(self, state: _Running, got: Mapping[str, Any]) -> None:
        if not state.waiting:
            return
        state.captured.update(got)
        ready = [v for v in state.waiting if v.captures <= state.captured.keys()]
        if ready:
            row = layer_row(state.plan, state.plan.info.name, state.plan.info.depth, "attention")
            layer = Layer(state.plan.info, row, self.batch, dict(state.captured))
            for visitor in ready:
                visitor.visit(layer)
            state.waiting = [v for v in state.waiting if not any(v is r for r in ready)]
        if not state.waiting:
            state.captured.clear()
            state.parts.clear()


def _otherwise(what: str) -> WatchError:
    return WatchError(
        f"the forward pass took another way than in the plan: {what}",
        hint="a model whose layers depend on its input can't be watched",
    )


def _same_product(planned: Contraction, func: Any, args: Any, kwargs: Any) -> Contraction:
    form = contraction(func.__name__, args, kwargs)
    if form is None or (form.left, form.right, form.out) != (planned.left, planned.right, planned.out):
        raise _otherwise(f"'{func.__name__}' is not the product that was planned")
    return form


def _missing(plan: LayerPlan, name: str) -> DoesNotApply:
    where = f"'{plan.info.name}'"
    if name.startswith("tokens"):
        return DoesNotApply(f"no tokens of that kind were found around {where}")
    if plan.info.role == "untraced":
        return DoesNotApply(f"the token positions of {where} could not be traced")
    return DoesNotApply(f"'{name}' of {where} can't be told from its scores")


def _join_heads(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    if parts[0].probabilities is not None:
        return Scores(probabilities=torch.cat([p.probabilities for p in parts], 1))
    if all(p.scale == parts[0].scale and p.bias is None for p in parts):
        q, k = (torch.cat([getattr(p, n) for p in parts], 1) for n in ("q", "k"))
        return Scores(q, k, parts[0].scale)
    return Scores(probabilities=torch.cat([p.full() for p in parts], 1))


def _canonical_bias(lead: Lead, bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if lead.windows == 1 and q.dim() == 4 and lead.order == (0, 1):
        return bias[(None,) * (4 - bias.dim())]
    return lead.canonical(bias.expand(*q.shape[:-1], k.size(-2)))


def _verify(plan: LayerPlan, got: Mapping[str, Any], windows: int, expected: Tensor | None) -> None:
    """The first image's probabilities sum to 1 and, times v, give what the model computed."""
    s = got["scores"]
    cut = {n: getattr(s, n) for n in ("q", "k", "bias", "probabilities")}
    one = Scores(
        **{n: t[: windows if t.size(0) > 1 else 1] if t is not None else None for n, t in cut.items()},
        scale=s.scale,
    )
    maps = one.full()
    total = maps.sum(-1)
    if not bool(total.isfinite().all()):
        raise WatchError(
            f"attention of '{plan.info.name}' is NaN or infinite",
            hint="the weights are not finite, or the forward pass overflows: --dtype float32 or bfloat16",
        )
    tolerance = max(row_tolerance(t) for t in cut.values() if t is not None)
    if not bool(((total - 1).abs() < tolerance).logical_or(total == 0).all()):
        raise WatchError(
            f"attention rows of '{plan.info.name}' don't sum to 1",
            hint="report this model as a bug of probekit",
        )
    if expected is not None:
        _close(plan, maps @ got["v"][:windows].float(), expected[:windows])


def _close(plan: LayerPlan, ours: Tensor, theirs: Tensor) -> None:
    low = theirs.dtype in (torch.float16, torch.bfloat16)
    error = float((ours - theirs.float()).abs().max())
    if not error <= (3e-2 if low else 1e-3) * (1 + float(theirs.abs().max())):
        raise WatchError(
            f"attention rebuilt for '{plan.info.name}' is not what the model computed (off by {error:.2g})",
            hint="report this model as a bug of probekit",
        )
