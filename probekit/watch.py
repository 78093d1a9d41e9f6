"""The watcher: runs a model as its author wrote it and hands each layer to whoever asked, as it happens.

    watcher = Watcher(model, images[:2])
    watcher.anatomy
    watcher.run(images, [Visitor(frozenset({"attention"}), on_layer)])

The plan comes from one discovery pass (probekit.discover). A run counts the calls that matter, asserts that
they look as planned, captures inside the call and frees what nobody asks for any more. No hook is left
behind, nothing is patched, outputs are bit-identical.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probekit import positions
from probekit.anatomy import Anatomy
from probekit.discover import KINDS, Call, bind_mha, discover, fused_arguments, mha_arguments
from probekit.errors import WatchError
from probekit.layer import Layer, Scores
from probekit.metric import Row
from probekit.plan import LayerPlan, Tap, make_plan

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
}
"""What has to be captured for each field a metric may name in `needs`."""

SITES = {"tokens_in": "embed", "tokens_mid": "mid", "tokens_out": "out"}


@dataclass(frozen=True)
class Visitor:
    """Someone who wants to see every layer (or, with ``"tokens"``, every token site) with some fields."""

    needs: frozenset[str]
    visit: Callable[[Layer], None]

    @property
    def captures(self) -> frozenset[str]:
        unknown = self.needs - CAPTURES.keys()
        if unknown:
            raise WatchError(
                f"a layer has no field '{sorted(unknown)[0]}'", hint=f"fields: {', '.join(sorted(CAPTURES))}"
            )
        return frozenset().union(*(CAPTURES[n] for n in self.needs))


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's or a parallel wrapper."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


class Watcher:
    """Watches one module at one input size.

    module:  any `nn.Module`; put into eval mode
    images:  the first images (B, 3, H, W), normalised; two are forwarded to make the plan
    forward: ``forward(module, images)``, by default ``module(images)``
    declared_parts: path prefixes that name a part, e.g. ``{"decoder_blocks": "decoder"}``

    Raises `WatchError` when attention is missing, hidden or not what it seems.
    """

    def __init__(
        self,
        module: nn.Module,
        images: Tensor,
        *,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        declared_parts: Mapping[str, str] | None = None,
        allow_unwatched: bool = False,
    ):
        self.module = unwrap(module).eval()
        self._forward = forward or (lambda m, x: m(x))
        _refuse_unwatchable(self.module)
        pair = (images if len(images) > 1 else images.repeat(2, 1, 1, 1))[:2].detach().clone()
        with self._eager(), torch.no_grad():
            self._forward(self.module, pair)  # caches (masks, position tables) are filled before the plan
            record = discover(self.module, lambda x: self._forward(self.module, x), pair)
        if not allow_unwatched:
            _refuse_gaps(type(self.module).__name__, record)
        self.layers = make_plan(type(self.module).__name__, record, declared_parts or {})
        self.anatomy: Anatomy = Anatomy(
            tuple(pair.shape[-2:]),
            tuple(p.info for p in self.layers.layers),
            self.layers.others,
            self.layers.warnings,
        )
        self._verified = False

    # ------------------------------------------------------------------ rows

    def layer_rows(self) -> list[Row]:
        """The layer axis of metrics on attention: one row per layer."""
        return [_row(plan, plan.info.name, plan.info.depth, "attention") for plan in self.layers.layers]

    def site_rows(self) -> list[Row]:
        """The layer axis of metrics on tokens: embedding, then after attention and after the MLP."""
        return [row for plan in self.layers.layers for row, _ in _sites(plan)]

    # ------------------------------------------------------------------ run

    def run(self, images: Tensor, visitors: Sequence[Visitor], *, verify: bool | None = None) -> Any:
        """Forward `images` and call each visitor at each layer, in the order of the forward pass.

        `verify` compares the reconstruction with what the model computed (default: on the first call).
        Returns the model's output, bit-identical to an unwatched forward.
        """
        verify = not self._verified if verify is None else verify
        mode = _Run(self.layers.layers, visitors, len(images), verify)
        with self._eager(), torch.no_grad(), mode:
            out = self._forward(self.module, images)
        mode.finish()
        self._verified = True
        return out

    def forward(self, images: Tensor) -> Any:
        """The bare forward pass."""
        with self._eager(), torch.no_grad():
            return self._forward(self.module, images)

    @contextmanager
    def _eager(self) -> Iterator[None]:
        compiled = any(getattr(m, "_compiled_call_impl", None) for m in self.module.modules())
        compiled = compiled or any(hasattr(m, "_orig_mod") for m in self.module.modules())
        if not compiled:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


def _row(plan: LayerPlan, label: str, depth: float, site: str) -> Row:
    info = plan.info
    grid, stride = info.grid or (0, 0), info.stride or (float("nan"),) * 2
    return Row(label, float(depth), site, info.part, info.stage, info.heads, grid, stride)


def _sites(plan: LayerPlan) -> list[tuple[Row, str]]:
    """Token sites of a layer with the capture each comes from; "in" only where no layer's output is it."""
    found = []
    for capture, site in SITES.items():
        if capture not in plan.taps or (capture == "tokens_in" and not plan.info.starts):
            continue
        depth = plan.info.depth - {"embed": 1.0, "mid": 0.5, "out": 0.0}[site]
        found.append((_row(plan, f"{plan.info.name}.{site}", depth, site), capture))
    return found


def _refuse_unwatchable(module: nn.Module) -> None:
    name = type(module).__name__
    for path, m in module.named_modules():
        where = f"'{path}' of '{name}'" if path else f"'{name}'"
        if isinstance(m, torch.jit.ScriptModule):
            raise WatchError(
                f"{where} is a TorchScript module, which hides its attention", hint="load the Python module"
            )
        if isinstance(m, nn.DataParallel):
            raise WatchError(
                f"{where} is a DataParallel, which runs in other threads", hint="pass its '.module'"
            )
        if type(m).__name__ == "GraphModule" and not path:
            raise WatchError(
                f"{where} is an exported graph without modules", hint="pass the original nn.Module"
            )
        config = getattr(m, "config", None)
        kind = getattr(config, "_attn_implementation", None)
        if isinstance(kind, str) and kind not in ("eager", "sdpa"):
            raise WatchError(
                f"{where} uses attention implementation '{kind}', which can't be watched",
                hint="model.set_attn_implementation('sdpa')",
            )


def _refuse_gaps(name: str, record: Any) -> None:
    if record.opaque:
        raise WatchError(
            f"attention in '{name}' goes through {record.opaque[0]}, which shows neither q nor k",
            hint="switch the model to torch's scaled_dot_product_attention",
        )
    if record.unnormalised:
        raise WatchError(
            f"'{record.unnormalised[0]}' of '{name}' weighs tokens by scores whose rows don't sum to 1: not softmax attention",
            hint="leave it out with --allow-unwatched",
        )
    if record.silent:
        raise WatchError(
            f"attention module '{record.silent[0]}' of '{name}' ran, but no attention was seen in it",
            hint="switch it to torch's scaled_dot_product_attention, or leave it out with --allow-unwatched",
        )


@dataclass
class _Running:
    """One layer during one forward: what was captured, and who still waits for what."""

    plan: LayerPlan
    captured: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[Any]] = field(default_factory=dict)
    waiting: list[Visitor] = field(default_factory=list)


class _Run(TorchFunctionMode):
    def __init__(self, plans: Sequence[LayerPlan], visitors: Sequence[Visitor], batch: int, verify: bool):
        super().__init__()
        self.batch, self.verify = batch, verify
        self.counts: Counter[str] = Counter()
        self.layer_visitors = [v for v in visitors if "tokens" not in v.needs]
        self.site_visitors = [v for v in visitors if "tokens" in v.needs]
        wanted = frozenset().union(*(v.captures for v in visitors)) if visitors else frozenset()
        self.wanted = wanted | (frozenset(SITES) if "tokens" in wanted else frozenset())
        if verify:
            self.wanted = self.wanted | {"scores", "v", "heads"}
        self.actions: dict[tuple[str, int], list[Callable]] = {}
        self.running = [_Running(p, waiting=list(self.layer_visitors)) for p in plans]
        for state in self.running:
            self._arrange(state)

    def _arrange(self, state: _Running) -> None:
        plan = state.plan
        if self.wanted & {"scores", "q", "k", "v", "heads"}:
            for call in plan.calls:
                kind = "product" if call.kind == "explicit" else call.kind
                self._at(kind, call.ordinal, lambda *a, c=call: self._attend(state, c, *a))
                if call.scores and self.wanted & {"q", "k"}:
                    self._at("product", call.scores[0], lambda *a, c=call: self._scores(state, c, *a))
                if call.softmax is not None:
                    self._at("softmax", call.softmax, lambda *a, c=call: self._softmax(state, c, *a))
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
        if self.actions:
            kind, ordinal = min(self.actions)
            raise WatchError(
                f"the forward pass took another way than in the plan: {kind} call {ordinal + 1} never came",
                hint="a model whose layers depend on its input can't be watched",
            )

    # ------------------------------------------------------------------ captures

    def _attend(self, state: _Running, call: Call, func: Any, args: Any, kwargs: Any) -> Callable | None:
        lead = call.lead
        if lead is None:
            return None

        def after(out: Any) -> None:
            got: dict[str, Any] = {}
            if call.kind == "explicit":
                form = positions.contraction(func.__name__, args, kwargs)
                maps, values = (form.a, form.b) if call.map_first else (form.b, form.a)
                letters, other = (form.left, form.right) if call.map_first else (form.right, form.left)
                queries, width = (
                    (form.left_only, form.right_only) if call.map_first else (form.right_only, form.left_only)
                )

                def lay(t: Tensor, have: str, last: str) -> Tensor:
                    return lead.canonical(t.permute([have.index(c) for c in (*form.shared, *last)]))

                if call.softmax is None:
                    got["scores"] = Scores(probabilities=lay(maps, letters, queries + form.summed))
                got["v"] = lay(values, other, form.summed + width)
                got["heads"] = lay(out, form.out, queries + width)
            else:
                given = (
                    mha_arguments(bind_mha(args, kwargs))
                    if call.kind == "mha"
                    else fused_arguments(args, kwargs)
                )
                q, k, got["v"] = (lead.canonical(t) for t in (given.q, given.k, given.v))
                got["scores"] = Scores(q, k, given.scale, _canonical_bias(lead, given.bias, given.q, given.k))
                got["q"], got["k"] = q, k
                if call.kind == "fused":
                    got["heads"] = lead.canonical(out)
                elif self.wanted & {"heads"}:
                    got["heads"] = got["scores"].full() @ got["v"].float()
            self._shapes(state, call, got)
            if self.verify and call.softmax is None:
                _verify(state.plan, got, lead.windows, exact=call.kind != "mha")
            self._store(state, got, len(state.plan.calls))

        return after

    def _softmax(self, state: _Running, call: Call, func: Any, args: Any, kwargs: Any) -> Callable:
        return lambda out: self._store(state, {"scores": Scores(probabilities=out)}, len(state.plan.calls))

    def _scores(self, state: _Running, call: Call, func: Any, args: Any, kwargs: Any) -> Callable:
        form = positions.contraction(func.__name__, args, kwargs)

        def after(_: Any) -> None:
            got = {}
            for name, t, have, own in (
                ("q", form.a, form.left, form.left_only),
                ("k", form.b, form.right, form.right_only),
            ):
                order = [have.index(c) for c in (*form.shared, own, *form.summed)]
                got[name] = call.lead.canonical(t.permute(order))
            self._store(state, got, len(state.plan.calls))

        return after

    def _tokens(
        self, state: _Running, capture: str, tap: Tap, func: Any, args: Any, kwargs: Any
    ) -> Callable | None:
        if capture == "tokens_in":
            before = args[tap.operand]
            kept = self._waiting_for(state, capture) and tap.in_place
            self._deliver_tokens(state, capture, tap, before.clone() if kept else before)
            return None
        return lambda out: self._deliver_tokens(state, capture, tap, out)

    def _waiting_for(self, state: _Running, capture: str) -> bool:
        return any(capture in v.captures and len(v.captures) > 1 for v in state.waiting)

    def _deliver_tokens(self, state: _Running, capture: str, tap: Tap, tensor: Tensor) -> None:
        total = len(tap.layout.order) + len(tap.layout.prefix)
        if tap.layout.flat(tensor).shape[:2] != (self.batch, total):
            raise WatchError(
                f"tokens at '{state.plan.info.name}' changed shape after the plan: {tuple(tensor.shape)}, "
                f"planned {total} tokens of {self.batch} images"
            )
        patches = tap.layout.patches(tensor)
        prefix = tap.layout.prefix_tokens(tensor) if len(tap.layout.prefix) else patches[:, :0]
        for row, source in _sites(state.plan):
            if source == capture and self.site_visitors:
                layer = Layer(state.plan.info, row, self.batch, {"tokens": patches, "prefix:tokens": prefix})
                for visitor in self.site_visitors:
                    visitor.visit(layer)
        self._deliver(state, {capture: patches, f"prefix:{capture}": prefix})

    def _shapes(self, state: _Running, call: Call, got: Mapping[str, Any]) -> None:
        heads = got["heads"]
        expected = self.batch * call.lead.windows
        if heads.size(0) != expected or heads.size(1) != call.lead.heads:
            raise WatchError(
                f"attention of '{state.plan.info.name}' changed shape after the plan: "
                f"{heads.size(0)} x {heads.size(1)} maps, planned {expected} x {call.lead.heads}"
            )

    def _store(self, state: _Running, got: dict[str, Any], count: int) -> None:
        """Collect what one call gave; a layer whose heads are separate calls is complete with the last."""
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
            row = _row(state.plan, state.plan.info.name, state.plan.info.depth, "attention")
            layer = Layer(state.plan.info, row, self.batch, dict(state.captured))
            for visitor in ready:
                visitor.visit(layer)
            state.waiting = [v for v in state.waiting if v not in ready]
        if not state.waiting:
            state.captured.clear()


def _join_heads(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    if parts[0].probabilities is not None:
        return Scores(probabilities=torch.cat([p.probabilities for p in parts], 1))
    same = all(p.scale == parts[0].scale and p.bias is None for p in parts)
    if same:
        q, k = (torch.cat([getattr(p, n) for p in parts], 1) for n in ("q", "k"))
        return Scores(q, k, parts[0].scale)
    return Scores(probabilities=torch.cat([p.full() for p in parts], 1))


def _canonical_bias(lead: Any, bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    plain = lead.windows == 1 and q.dim() == 4 and lead.order == (0, 1)
    if plain:
        return bias[(None,) * (4 - bias.dim())]
    return lead.canonical(bias.expand(*q.shape[:-1], k.size(-2)))


def _verify(plan: LayerPlan, got: Mapping[str, Any], windows: int, *, exact: bool) -> None:
    """The first image's probabilities sum to 1 and, times v, give what the model computed."""
    s = got["scores"]
    cut = {n: getattr(s, n) for n in ("q", "k", "bias", "probabilities")}
    one = Scores(
        **{n: t[: windows if t.size(0) > 1 else 1] if t is not None else None for n, t in cut.items()},
        scale=s.scale,
    )
    maps = one.full()
    name = plan.info.name
    total = maps.sum(-1)
    low = got["heads"].dtype in (torch.float16, torch.bfloat16)
    if not bool(((total - 1).abs() < (2e-2 if low else 1e-3)).logical_or(total == 0).all()):
        raise WatchError(
            f"attention rows of '{name}' don't sum to 1", hint="report this model as a bug of probekit"
        )
    if not exact:
        return
    heads = got["heads"][:windows].float()
    error = (maps @ got["v"][:windows].float() - heads).abs().max()
    limit = (3e-2 if low else 1e-3) * (1 + heads.abs().max())
    if not bool(error <= limit):
        raise WatchError(
            f"attention rebuilt for '{name}' doesn't give what the model computed (off by {float(error):.2g})",
            hint="report this model as a bug of probekit",
        )
