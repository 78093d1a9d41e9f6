"""What a metric sees: one attention layer (or one token site) of one batch.

Everything is float32, on the model's device, patch tokens in raster order with prefix tokens dropped, and
computed when it is first asked for. What a metric doesn't declare in `needs` isn't there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from probekit import attention
from probekit.anatomy import LayerInfo, WindowGroup
from probekit.attention import AttentionStats
from probekit.errors import DoesNotApply, MetricError
from probekit.metric import Row


@dataclass(frozen=True)
class Scores:
    """Attention as the model computed it, for (B * windows) sequences of all tokens, prefix included.

    Either q, k (B*W, H, T, d) with `scale` and an additive `bias` (or None), or `probabilities`
    (B*W, H, Q, K).
    """

    q: Tensor | None = None
    k: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    probabilities: Tensor | None = None

    def full(self) -> Tensor:
        """(B*W, H, Q, K) probabilities over all keys, float32."""
        if self.probabilities is not None:
            return self.probabilities.float()
        return attention.probabilities(self.q, self.k, scale=self.scale, bias=self.bias)


@dataclass
class Layer:
    """One attention layer of one batch of images.

    batch:     number of images (of windows, on a folded layer)
    info:      the layer's place in the model (`probekit.anatomy.LayerInfo`)
    row:       its entry on the result's layer axis
    captured:  what was captured, by name: "scores", "q", "k", "v", "heads", "tokens_in", "tokens_mid",
               "tokens_out", and on a token site "tokens"; prefix tokens under "prefix:NAME"
    """

    info: LayerInfo
    row: Row
    batch: int
    captured: Mapping[str, object]
    group: WindowGroup | None = None

    # ------------------------------------------------------------------ geometry

    @property
    def heads(self) -> int:
        return self.info.heads

    @property
    def prefix(self) -> int:
        """Number of prefix tokens (CLS, distillation, registers)."""
        return self.info.prefix

    @property
    def tokens_count(self) -> int:
        """N, patch tokens of the image (of one window, on a folded layer)."""
        return self.group.size if self.group is not None else self.info.tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens. Raises `DoesNotApply` where they form no grid."""
        if self.info.grid is None:
            raise DoesNotApply(f"the tokens of '{self.info.name}' form no full grid")
        return self.info.grid

    @property
    def stride(self) -> tuple[float, float]:
        """Pixels of the network's input between neighbouring tokens, (rows, columns)."""
        if self.info.stride is None:
            raise DoesNotApply(f"the tokens of '{self.info.name}' form no regular grid")
        return self.info.stride

    @property
    def positions(self) -> Tensor:
        """Centres (row, column) in pixels, float32: (N, 2); (G, N, 2) on a folded layer."""
        places = self.info.positions if self.group is None else self.info.positions[self.group.tokens]
        return torch.from_numpy(places).float().to(self._device)

    @cached_property
    def distances(self) -> Tensor:
        """Euclidean distance in pixels from each query's centre to each key's, (1 or B, 1, N, K) float32."""
        groups = (self.group,) if self.group is not None else self._spatial().groups
        if len(groups) > 1 or (self.group is None and len(groups[0].windows) > 1):
            raise MetricError(f"'{self.info.name}' has windowed attention: use layer.windows()")
        group = groups[0]
        queries = self.info.positions[group.tokens]
        delta = queries[:, :, None, :] - group.key_positions[:, None, :, :]
        d = torch.from_numpy(np.sqrt((delta**2).sum(-1))).float().unsqueeze(1).to(self._device)
        return d if len(d) == 1 else d.repeat(self.batch // len(d), 1, 1, 1)

    # ------------------------------------------------------------------ attention

    @cached_property
    def attention(self) -> Tensor:
        """Attention probabilities among patch tokens, rows renormalised over them, (B, H, N, K)."""
        scores = self._restricted
        if scores.probabilities is not None:
            return attention.renormalise(scores.probabilities.float())
        return scores.full()

    @cached_property
    def attention_full(self) -> Tensor:
        """The model's own probabilities with prefix tokens, (B, H, prefix + N, prefix + K), rows sum to 1.

        Raises `DoesNotApply` for windows, and where keys are padding, which is neither patch nor prefix.
        """
        if self.info.windows > 1 or self.info.masked:
            raise DoesNotApply(f"'{self.info.name}' has windowed attention and no single full map")
        if self.info.padded:
            raise DoesNotApply(f"'{self.info.name}' attends to padding: its full map is not of tokens alone")
        group = self._spatial().groups[0]
        full = self._get("scores").full()
        q, k = (
            _after_prefix(places[0], n)
            for places, n in ((group.queries, full.size(-2)), (group.keys, full.size(-1)))
        )
        if np.array_equal(q, np.arange(full.size(-2))) and np.array_equal(k, np.arange(full.size(-1))):
            return full
        return full[:, :, torch.from_numpy(q).to(full.device)][..., torch.from_numpy(k).to(full.device)]

    @cached_property
    def attention_stats(self) -> AttentionStats:
        """Distance and entropies of the map, in one sweep that keeps no N x N map; see `AttentionStats`."""
        s = self._restricted
        if s.probabilities is not None:
            return attention.stats_from_probabilities(s.probabilities, self.distances)
        return attention.stats_from_scores(s.q, s.k, scale=s.scale, bias=s.bias, distances=self.distances)

    @cached_property
    def prefix_mass(self) -> Tensor:
        """Attention that patch queries give to prefix tokens and to learned keys that are no tokens, mean
        over queries, (B, H): what renormalisation hides. Zero where there are none.

        Raises `DoesNotApply` for such keys inside windows, or beside keys that are padding.
        """
        info, s = self._spatial(), self._get("scores")
        keys = (s.k if s.k is not None else s.probabilities.mT).size(2)
        if info.windows * keys == info.padded + sum(g.keys.size for g in info.groups):
            return torch.zeros(self.batch, self.heads, device=self._device)
        if info.windows > 1 or info.masked or info.padded:
            raise DoesNotApply(f"prefix tokens of '{info.name}' stand in windows or beside padding")
        group = info.groups[0]
        beside = np.setdiff1d(np.arange(keys), group.keys[0])[None]
        s = self._cut(replace(group, keys=beside))
        if s.probabilities is not None:
            return s.probabilities.float().sum(-1).mean(-1)
        log_mass = self.attention_stats.log_mass
        return attention.share_beside(s.q, s.k, scale=s.scale, bias=s.bias, log_mass=log_mass).mean(-1)

    @property
    def q(self) -> Tensor:
        """Queries of the patch tokens as the scores used them (after RoPE, norms), (B, H, N, d)."""
        return self._heads_view(self._get("q"))

    @property
    def k(self) -> Tensor:
        """Keys of the patch tokens, (B, H, N, d)."""
        return self._heads_view(self._get("k"), keys=True)

    @property
    def v(self) -> Tensor:
        """Values of the patch tokens, (B, H, N, d)."""
        return self._heads_view(self._get("v"), keys=True)

    @property
    def head_outputs(self) -> Tensor:
        """attention @ v per head, before the projection, patch tokens, (B, H, N, d)."""
        return self._heads_view(self._get("heads"))

    # ------------------------------------------------------------------ tokens

    @property
    def tokens_in(self) -> Tensor:
        """Residual stream before attention, (B, N, C)."""
        return self._get("tokens_in")

    @property
    def tokens_mid(self) -> Tensor:
        """Residual stream after the attention add, (B, N, C)."""
        return self._get("tokens_mid")

    @property
    def tokens_out(self) -> Tensor:
        """Residual stream after the MLP add, (B, N, C)."""
        return self._get("tokens_out")

    @property
    def tokens(self) -> Tensor:
        """The residual stream at this token site, (B, N, C)."""
        return self._get("tokens")

    @property
    def output(self) -> Tensor:
        """What the model returns, (B, K) float32: class scores where it has a classifier."""
        return self._get("output").float()

    def prefix_tokens(self, site: str = "tokens") -> Tensor:
        """Prefix tokens of `site` in the model's order, (B, P, C)."""
        return self._get(f"prefix:{site}")

    # ------------------------------------------------------------------ windows

    def windows(self) -> list[Layer]:
        """The layer cut into sets of tokens that attend among themselves.

        Each folded layer holds the G equal-sized sets of every image as its batch (B*G, image-major).
        ``[layer]`` when attention is global.
        """
        if self.group is not None or (self._spatial().windows == 1 and not self.info.masked):
            return [self]
        return list(self._folded)

    @cached_property
    def _folded(self) -> tuple[Layer, ...]:
        """Kept, so that metrics on windows share what they compute."""
        return tuple(replace(self, group=g, batch=self.batch * len(g.windows)) for g in self.info.groups)

    @property
    def window_count(self) -> int:
        """G, sets of this size per image; 1 when attention is global."""
        return len(self.group.windows) if self.group is not None else 1

    @property
    def window_share(self) -> float:
        """Share of the image's tokens in these sets."""
        return self.group.tokens.size / self.info.tokens if self.group is not None else 1.0

    def unfold(self, values: Tensor) -> Tensor:
        """(B*G, ...) -> (B, G, ...)."""
        return values.unflatten(0, (-1, self.window_count))

    def pick(self, images: Sequence[int]) -> Layer:
        """The same layer of some of its images only."""
        if self.group is not None:
            raise MetricError(f"windows of '{self.info.name}' can't be picked by image")
        index = torch.as_tensor(images, device=self._device)

        def picked(value: object) -> object:
            if isinstance(value, Scores):
                return Scores(
                    picked(value.q),
                    picked(value.k),
                    value.scale,
                    picked(value.bias),
                    picked(value.probabilities),
                )
            if not isinstance(value, Tensor) or value.size(0) % self.batch or value.size(0) < self.batch:
                return value  # what is shared by all images
            return value.unflatten(0, (self.batch, -1)).index_select(0, index).flatten(0, 1)

        captured = {name: picked(value) for name, value in self.captured.items()}
        return replace(self, batch=len(images), captured=captured)

    # ------------------------------------------------------------------ private

    @property
    def _device(self) -> torch.device:
        scores = self.captured.get("scores")
        found = (
            [t for t in (scores.q, scores.probabilities) if t is not None]
            if isinstance(scores, Scores)
            else []
        )
        found += [t for t in self.captured.values() if isinstance(t, Tensor)]
        return found[0].device if found else torch.device("cpu")

    def _get(self, name: str):
        try:
            value = self.captured[name]
        except KeyError:
            raise MetricError(
                f"'{name}' was not captured at '{self.row.label}'", hint="name it in the metric's 'needs'"
            ) from None
        if isinstance(value, DoesNotApply):
            raise value
        return value

    def _spatial(self) -> LayerInfo:
        if self.info.role == "channels":
            raise DoesNotApply(f"'{self.info.name}' attends over channels, not over tokens")
        if self.info.role == "untraced" or not self.info.groups:
            raise DoesNotApply(f"the token positions of '{self.info.name}' could not be traced")
        return self.info

    def _single_group(self) -> WindowGroup:
        info = self._spatial()
        if self.group is not None:
            return self.group
        if info.windows > 1 or info.masked:
            raise MetricError(f"'{info.name}' has windowed attention: use layer.windows()")
        return info.groups[0]

    @cached_property
    def _restricted(self) -> Scores:
        """The scores among this group's patch tokens only."""
        return self._cut(self._single_group())

    def _cut(self, group: WindowGroup) -> Scores:
        """The scores of a group's queries and keys."""
        s, pick = self._get("scores"), _Pick(group, self.info.windows)
        if s.probabilities is not None:
            return Scores(probabilities=pick.pairs(s.probabilities))
        bias = s.bias
        if bias is not None:
            bias = pick.pairs(bias.expand(-1, -1, s.q.size(2), s.k.size(2)))
        return Scores(pick.rows(s.q), pick.columns(s.k), s.scale, bias)

    def _heads_view(self, t: Tensor, *, keys: bool = False) -> Tensor:
        """(B*W, H, T, d) as captured -> patch tokens in raster order (B, H, N, d)."""
        info = self._spatial()
        if self.group is not None or (info.windows == 1 and not info.masked):
            pick = _Pick(self._single_group(), info.windows)
            return (pick.columns(t) if keys else pick.rows(t)).float()
        own = all(np.array_equal(info.positions[g.tokens], g.key_positions) for g in info.groups)
        if keys and not own:
            raise DoesNotApply(f"windows of '{info.name}' attend to other tokens than their own")
        parts = t.unflatten(0, (-1, info.windows))
        out = t.new_empty(parts.size(0), t.size(1), info.tokens, t.size(-1))
        for g in info.groups:
            chosen = (g.windows, g.keys if keys else g.queries, g.tokens)
            w, places, numbers = (torch.from_numpy(a).to(t.device) for a in chosen)
            out[:, :, numbers] = parts[:, w[:, None], :, places].permute(2, 3, 0, 1, 4)
        return out.float()


def _after_prefix(places: np.ndarray, total: int) -> np.ndarray:
    """All other places first (prefix tokens), then the patch tokens' in their order."""
    return np.concatenate([np.setdiff1d(np.arange(total), places), places])


class _Pick:
    """Cuts one group's queries and keys out of canonical tensors (B*W, H, ...)."""

    def __init__(self, group: WindowGroup, windows: int):
        self.group, self.count = group, windows

    def _axis(self, t: Tensor, axis: int, places: np.ndarray) -> Tensor:
        """Select each set's tokens along `axis`; a slice where they follow each other in all sets."""
        row = places[0]
        if (places == row).all():
            if np.array_equal(row, np.arange(row[0], row[0] + len(row))):
                return t.narrow(axis, int(row[0]), len(row))
            return t.index_select(axis, torch.from_numpy(row).to(t.device))
        g = len(places)
        shape = [1] * t.dim()
        shape[0], shape[axis] = g, places.shape[1]
        index = torch.from_numpy(places).to(t.device).view(shape)
        full = list(t.shape)
        full[axis] = places.shape[1]
        index = index.repeat(t.size(0) // g, *[1] * (t.dim() - 1)).expand(full)
        return t.gather(axis, index)

    def _windows(self, t: Tensor) -> Tensor:
        """(B*W, ...) -> (B*G, ...), this group's windows."""
        if np.array_equal(self.group.windows, np.arange(self.count)):
            return t
        chosen = torch.from_numpy(self.group.windows).to(t.device)
        return t.unflatten(0, (-1, self.count)).index_select(1, chosen).flatten(0, 1)

    def rows(self, t: Tensor) -> Tensor:
        return self._axis(self._windows(t), 2, self.group.queries)

    def columns(self, t: Tensor) -> Tensor:
        return self._axis(self._windows(t), 2, self.group.keys)

    def pairs(self, t: Tensor) -> Tensor:
        return self._axis(self._axis(self._windows(t), 2, self.group.queries), 3, self.group.keys)
