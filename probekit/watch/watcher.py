"""The watcher: runs a model as its author wrote it and hands each layer to whoever asked, as it happens.

    watcher = Watcher(model, images[:2])
    watcher.anatomy
    watcher.run(images, [Visitor(frozenset({"attention"}), on_layer)])

The plan comes from one discovery pass (`probekit.watch.discover`). A run counts the calls that matter,
asserts that they look as planned, captures inside the call and frees what nobody asks for any more. No hook
is left behind, nothing is patched, outputs are bit-identical.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probekit.anatomy import Anatomy
from probekit.errors import DoesNotApply, WatchError
from probekit.layer import Layer
from probekit.metric import Row
from probekit.watch.discover import discover, tensors_of
from probekit.watch.observe import CAPTURES, Observation, Visitor, layer_row, layer_sites
from probekit.watch.plan import Plan, make_plan
from probekit.watch.record import Record

__all__ = ["CAPTURES", "Visitor", "Watcher", "unwrap"]


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
    allow_unwatched: leave out what can't be watched, and list it in ``anatomy.others``

    Forward passes run without torch.compile and without the fused kernels of torch's own nn.Transformer
    layers, which hide their attention and move results by about 1e-6.

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
        name = type(self.module).__name__
        _refuse_unwatchable(self.module)
        pair = (images if len(images) > 1 else images.repeat(2, 1, 1, 1))[:2].detach().clone()
        with _plain(), torch.no_grad():
            before = _random_states(pair.device)
            first = self._forward(self.module, pair)  # fills caches (masks, position tables) too
            draws = not all(map(torch.equal, before, _random_states(pair.device)))
            record = self._discover(pair)
            _refuse_chance(name, first, record, self._discover(pair) if draws else None)
        unwatched = _gaps(name, record)
        if unwatched and not allow_unwatched:
            raise next(iter(unwatched.values()))
        self.layers: Plan = make_plan(name, record, declared_parts or {})
        self.anatomy: Anatomy = Anatomy(
            tuple(pair.shape[-2:]),
            tuple(p.info for p in self.layers.layers),
            (
                *self.layers.others,
                *({"name": p, "why": f"not watched: {e.message}"} for p, e in unwatched.items()),
            ),
            self.layers.warnings,
        )
        self._verified = False

    def _discover(self, pair: Tensor) -> Record:
        return discover(self.module, lambda x: self._forward(self.module, x), pair)

    # ------------------------------------------------------------------ rows

    def layer_rows(self) -> list[Row]:
        """The layer axis of metrics on attention: one row per layer."""
        return [layer_row(plan, plan.info.name, plan.info.depth, "attention") for plan in self.layers.layers]

    def site_rows(self) -> list[Row]:
        """The layer axis of metrics on tokens: embedding, then after attention and after the MLP."""
        return [row for plan in self.layers.layers for row, _ in layer_sites(plan)]

    def output_rows(self) -> list[Row]:
        """The layer axis of metrics on the model's output: one row after the last layer."""
        last = self.layers.layers[-1]
        return [layer_row(last, "output", last.info.depth, "output")]

    def output_layer(self, out: Any, batch: int) -> Layer:
        """What `forward` returned, as a metric on ``"output"`` sees it."""
        scores = getattr(out, "logits", out)
        if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != batch:
            scores = DoesNotApply("the model returns no scores of classes, (images, classes)")
        return Layer(self.layers.layers[-1].info, self.output_rows()[0], batch, {"output": scores})

    # ------------------------------------------------------------------ run

    def run(self, images: Tensor, visitors: Sequence[Visitor], *, verify: bool | None = None) -> Any:
        """Forward `images` and call each visitor at each layer, in the order of the forward pass.

        `verify` compares the reconstruction with what the model computed (default: on the first call).
        Returns the model's output, bit-identical to that of `forward`. Raises `WatchError` where the pass
        isn't the planned one: what visitors were given is then of no use.
        """
        size = tuple(images.shape[-2:])
        if size != self.anatomy.image_size:
            planned, got = (" x ".join(map(str, s)) for s in (self.anatomy.image_size, size))
            raise WatchError(f"images are {got}, the model is watched at {planned}")
        verify = not self._verified if verify is None else verify
        observation = Observation(self.layers, visitors, len(images), verify)
        with _plain(), torch.no_grad(), observation:
            out = self._forward(self.module, images)
        observation.finish()
        self._verified = True
        return out

    def forward(self, images: Tensor) -> Any:
        """The bare forward pass."""
        with _plain(), torch.no_grad():
            return self._forward(self.module, images)


@contextmanager
def _plain() -> Iterator[None]:
    """Neither compiled graphs nor nn.Transformer's fused kernels, which no mode can look into."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the CPU, whose numbers a model elsewhere may draw too, and of the device."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _refuse_chance(name: str, first: Any, record: Record, second: Record | None) -> None:
    """Raises `WatchError` if two forward passes of the same images differ."""
    same = second is None or _same_places(record, second)
    for a, b in zip(tensors_of(first), tensors_of(record.output), strict=False):
        same = same and a.shape == b.shape
        if same and a.is_floating_point():
            same = torch.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True)
    if not same:
        raise WatchError(
            f"'{name}' draws random numbers: two forward passes of the same images differ",
            hint="fix them in 'forward', such as the noise that orders a masked autoencoder's tokens",
        )


def _same_places(a: Record, b: Record) -> bool:
    """Whether the attention calls of two passes were between the same tokens."""
    if [(c.path, c.kind, c.ordinal) for c in a.calls] != [(c.path, c.kind, c.ordinal) for c in b.calls]:
        return False
    pairs = [
        (x, y)
        for c, d in zip(a.calls, b.calls, strict=True)
        for x, y in ((c.queries, d.queries), (c.keys, d.keys))
    ]
    return all(
        (x is None) == (y is None)
        and (
            x is None
            or all(torch.equal(s.nan_to_num(-1), t.nan_to_num(-1)) for s, t in zip(x, y, strict=True))
        )
        for x, y in pairs
    )


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


def _gaps(name: str, record: Record) -> dict[str, WatchError]:
    """What could not be watched, by module path, each with the error it is unless it's allowed."""
    found: dict[str, WatchError] = {}
    leave = "leave it out with --allow-unwatched"
    switch = "switch it to torch's scaled_dot_product_attention"
    for path, what in record.opaque:
        text = f"attention in '{path or name}' of '{name}' goes through {what}, which shows neither q nor k"
        found.setdefault(path, WatchError(text, hint=switch))
    for path in record.unnormalised:
        where = f"'{path or name}' of '{name}'"
        text = f"{where} weighs tokens by rows that don't sum to 1 before the product with v"
        found.setdefault(path, WatchError(text, hint=leave))
    for path in record.unused:
        text = (
            f"'{path or name}' of '{name}' takes a softmax between tokens, but not as a matrix of attention"
        )
        found.setdefault(path, WatchError(text, hint=leave))
    for path in record.cut:
        text = f"how '{path or name}' of '{name}' makes its result from its input can't be seen"
        found.setdefault(path, WatchError(text, hint=leave))
    for path in record.silent:
        text = f"attention module '{path or name}' of '{name}' ran, but no attention was seen in it"
        found.setdefault(path, WatchError(text, hint=f"{switch}, or {leave}"))
    return found
