"""Multinomial linear classifiers on frozen features, for many sets of features of the same images.

Two solvers. ``lbfgs`` minimises, in float64 and to a stated gradient,

    mean over images of -log softmax(W x + b)[label]  +  l2/2 |W|^2

which is scikit-learn's LogisticRegression with C = 1 / (l2 n), the bias free. It is deterministic. ``sgd`` is
the recipe of Park et al., Table A.1. The gradient is written out (softmax minus one-hot), so no graph is
kept; learning rates are tried side by side as one wider head. What isn't given (l2; the learning rate) is
chosen by accuracy on images held out of the training images, the smaller loss deciding ties; then the
classifier is fitted to all of them. Test images are never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from probekit.errors import DoesNotApply, MetricError
from probekit.metrics.solvers import Logistic, descend

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
LR_GRID = (0.01, 0.1, 1.0)
GRADIENT = 1e-7
"""The largest element of the gradient at which ``lbfgs`` stops."""

_ROUGH = 1e-4  # while l2 is chosen
_EPS = 1e-6
_CHUNK = 4096  # images scored at once


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained.

    norm:     ``bn``: mean and variance (ddof 0) of each feature over the training images; ``ln``: over the
              features of each image; ``none``. No affine parameters, epsilon 1e-6
    l2:       None: chosen of `L2_GRID` (lbfgs), 0.05 (sgd, where it also decays the bias)
    lr:       for 256 images, scaled by batch / 256; None: chosen of `LR_GRID`. sgd only
    held_out: share of the training images that choices are made on, of every class alike
    batch, epochs, momentum: sgd only; the learning rate falls to 0 as a cosine, step by step
    """

    norm: Literal["bn", "ln", "none"] = "bn"
    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    l2: float | None = None
    lr: float | None = None
    held_out: float = 0.2
    batch: int = 1024
    epochs: int = 50
    momentum: float = 0.9

    @property
    def chooses(self) -> bool:
        return (self.l2 if self.solver == "lbfgs" else self.lr) is None

    @property
    def decay(self) -> float:
        """l2 of sgd: Table A.1's weight decay."""
        return 0.05 if self.l2 is None else self.l2


@dataclass(frozen=True)
class Probe:
    """A trained classifier of (n, C) features.

    known:      (K,) the class numbers that occurred in training; no other is ever answered
    weights:    (C, K) and `bias` (K,), on normalised features, float64
    centre, scale: of ``bn``; None otherwise
    l2, lr:     what it was trained with; lr is NaN for lbfgs
    gradient:   largest element of the objective's gradient at the end
    """

    classes: int
    known: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    norm: str
    centre: np.ndarray | None
    scale: np.ndarray | None
    l2: float
    lr: float
    gradient: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(n, classes) float64; -inf for classes that did not occur in training."""
        found = np.full((len(features), self.classes), -np.inf)
        found[:, self.known] = self._scores(features)
        return found

    def decide(self, features: np.ndarray) -> np.ndarray:
        """The most likely class of each image, (n,) int64; of equals the lowest number."""
        found = np.empty(len(features), dtype=np.int64)
        for part in _parts(len(features)):
            found[part] = self.known[self._scores(features[part]).argmax(1)]
        return found

    def ranks(self, features: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        """How many classes come before each image's own, (n,) int64; `classes` where that is unknown."""
        labels = np.asarray(labels)
        place = np.minimum(np.searchsorted(self.known, labels), len(self.known) - 1)
        found = np.empty(len(features), dtype=np.int64)
        for part in _parts(len(features)):
            scores = self._scores(features[part])
            own = np.take_along_axis(scores, place[part, None], 1)
            before = np.arange(len(self.known)) < place[part, None]
            found[part] = ((scores > own) | ((scores == own) & before)).sum(1)
        return np.where(self.known[place] == labels, found, self.classes)

    def _scores(self, features: np.ndarray) -> np.ndarray:
        x = _apply(np.asarray(features, dtype=np.float64), self.norm, self.centre, self.scale)
        return x @ self.weights + self.bias


def fit(
    features: np.ndarray, labels: Sequence[int], classes: int, recipe: Recipe | None = None, *, seed: int = 0
) -> Probe:
    """`fit_many` for one set of features."""
    return fit_many([features], labels, classes, recipe, seed=seed)[0]


def fit_many(
    features: Sequence[np.ndarray],
    labels: Sequence[int],
    classes: int,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[Probe]:
    """A probe for each (n, C) of `features`, all with the same n labels out of `classes`.

    groups: rows of one group are held out together (patches of an image)
    device: where it is computed; sgd on a GPU trains all sets of equal width as one batched problem

    Raises `DoesNotApply` where fewer than two classes occur, or nothing can be held out to choose on;
    `MetricError` for features that aren't finite and where sgd diverges.
    """
    recipe = recipe or Recipe()
    known, targets = np.unique(np.asarray(labels), return_inverse=True)
    if len(known) < 2:
        raise DoesNotApply(f"the train split shows {len(known)} of the classes, a probe needs two")
    device = torch.device(device)
    if device.type == "mps":  # it has no float64
        device = torch.device("cpu")
    task = _Task(recipe, targets, len(known), device, seed)
    held = held_out(targets, recipe.held_out, seed, groups) if recipe.chooses else None
    solve = _lbfgs if recipe.solver == "lbfgs" else _sgd
    return [
        Probe(classes, known, s.weights, s.bias, recipe.norm, s.centre, s.scale, s.l2, s.lr, s.gradient)
        for s in solve(features, task, held)
    ]


def held_out(
    labels: Sequence[int], share: float, seed: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """Which of the training rows choices are made on, (n,) bool.

    ``share`` of every class, rounded, at least one and never all; with `groups`, of the groups, whatever
    their classes. Raises `DoesNotApply` where no class (or only one group) has two.
    """
    labels = np.asarray(labels)
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = np.zeros(len(labels), dtype=bool)
    if groups is not None:
        every = np.unique(groups)
        if len(every) < 2:
            raise DoesNotApply("one training image leaves none to choose l2 on")
        count = min(max(1, round(share * len(every))), len(every) - 1)
        return np.isin(groups, generator.permutation(every)[:count])
    for number in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == number))
        chosen[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not chosen.any():
        raise DoesNotApply(
            "no class of the train split has two images, so there are none to choose the probe's settings on",
            hint="give l2 (solver=lbfgs) or lr (solver=sgd), or bring more training images",
        )
    return chosen


# --- one classifier a set of features


@dataclass(frozen=True)
class _Task:
    recipe: Recipe
    targets: np.ndarray
    classes: int
    device: torch.device
    seed: int

    def descend(
        self, x: Tensor, targets: Tensor, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r = self.recipe
        return descend(
            x,
            targets,
            self.classes,
            lr,
            r.decay,
            batch=r.batch,
            epochs=r.epochs,
            momentum=r.momentum,
            seed=self.seed,
        )


@dataclass(frozen=True)
class _Solved:
    weights: np.ndarray
    bias: np.ndarray
    centre: np.ndarray | None
    scale: np.ndarray | None
    l2: float
    lr: float
    gradient: float


def _lbfgs(features: Sequence[np.ndarray], task: _Task, held: np.ndarray | None) -> Iterator[_Solved]:
    targets = torch.from_numpy(task.targets).to(task.device)
    for x in features:
        x = _finite(x).astype(np.float64)
        l2, start = task.recipe.l2, np.zeros(task.classes * (x.shape[1] + 1))
        if held is not None:
            l2, start = _chosen_l2(x, targets, task, held, start)
        z, centre, scale = _normalised(x, task.recipe.norm)
        theta, gradient = Logistic(_to(z, task), targets, task.classes).minimum(l2, start, GRADIENT)
        weights = theta.reshape(task.classes, -1)
        yield _Solved(weights[:, :-1].T.copy(), weights[:, -1].copy(), centre, scale, l2, math.nan, gradient)


def _chosen_l2(
    x: np.ndarray, targets: Tensor, task: _Task, held: np.ndarray, start: np.ndarray
) -> tuple[float, np.ndarray]:
    """From the strongest to the weakest, each starting where the last one ended."""
    z, centre, scale = _normalised(x[~held], task.recipe.norm)
    z, out = _to(z, task), _to(_apply(x[held], task.recipe.norm, centre, scale), task)
    kept = torch.from_numpy(~held).to(task.device)
    loss = Logistic(z, targets[kept], task.classes)
    best: tuple[tuple[float, float], float, np.ndarray] | None = None
    for l2 in L2_GRID:
        start, _ = loss.minimum(l2, start, _ROUGH)
        w = torch.from_numpy(start).to(task.device).view(task.classes, -1)
        score = _score(torch.addmm(w[:, -1], out, w[:, :-1].T), targets[~kept])
        if best is None or score > best[0]:
            best = (score, l2, start)
    return best[1], best[2]


def _sgd(features: Sequence[np.ndarray], task: _Task, held: np.ndarray | None) -> Iterator[_Solved]:
    recipe = task.recipe
    for stack in _stacks(features, task.device):
        raw = [_finite(features[i]) for i in stack]
        lr = np.full((len(raw), 1), recipe.lr or math.nan)
        if held is not None:
            lr = _chosen_lr(raw, task, held)
        normed = [_normalised(x, recipe.norm) for x in raw]
        x = torch.stack([_to(z, task, torch.float32) for z, _, _ in normed])
        targets = torch.from_numpy(task.targets).to(task.device)
        weights, bias, slope = task.descend(x, targets, lr)
        if not np.isfinite(weights).all():
            raise MetricError(
                f"sgd diverged at a learning rate of {np.nanmax(lr):g}", hint="use norm=bn or a smaller lr"
            )
        for number, (_, centre, scale) in enumerate(normed):
            yield _Solved(
                weights[number, :, 0],
                bias[number, 0],
                centre,
                scale,
                recipe.decay,
                float(lr[number, 0]),
                float(slope[number, 0]),
            )


def _chosen_lr(raw: Sequence[np.ndarray], task: _Task, held: np.ndarray) -> np.ndarray:
    """The learning rate of each of a stack, (G, 1), all of the grid tried at once."""
    norm = task.recipe.norm
    normed = [_normalised(x[~held], norm) for x in raw]
    x = torch.stack([_to(z, task, torch.float32) for z, _, _ in normed])
    targets = torch.from_numpy(task.targets).to(task.device)
    kept = torch.from_numpy(~held).to(task.device)
    grid = np.tile(LR_GRID, (len(raw), 1))
    weights, bias, _ = task.descend(x, targets[kept], grid)
    found = np.empty((len(raw), 1))
    for number, (_, centre, scale) in enumerate(normed):
        out = _apply(raw[number][held].astype(np.float64), norm, centre, scale)
        scores = []
        for r in range(len(LR_GRID)):
            z = out @ weights[number, :, r] + bias[number, r]
            finite = np.isfinite(z).all()
            scores.append(_score(_to(z, task), targets[~kept]) if finite else (-math.inf, -math.inf))
        found[number] = LR_GRID[scores.index(max(scores))]
    return found


def _stacks(features: Sequence[np.ndarray], device: torch.device) -> list[list[int]]:
    """Sets trained as one batched problem: on a GPU neighbours of equal width. One by one on a CPU, where a
    set stays in the cache and a batched product is slower."""
    if device.type == "cpu":
        return [[i] for i in range(len(features))]
    found: list[list[int]] = []
    for i, x in enumerate(features):
        if found and features[found[-1][0]].shape == x.shape:
            found[-1].append(i)
        else:
            found.append([i])
    return found


# --- pieces


def _score(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy, and minus the mean loss for ties."""
    right = (logits.argmax(1) == targets).double().mean().item()
    return right, -torch.nn.functional.cross_entropy(logits, targets).item()


def _normalised(x: np.ndarray, norm: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The training features as the classifier sees them, and what makes others so."""
    x = x.astype(np.float64)
    if norm != "bn":
        return _apply(x, norm, None, None), None, None
    centre = x.mean(0)
    scale = 1 / np.sqrt(x.var(0) + _EPS)
    return _apply(x, norm, centre, scale), centre, scale


def _apply(x: np.ndarray, norm: str, centre: np.ndarray | None, scale: np.ndarray | None) -> np.ndarray:
    if norm == "ln":
        return _layer_norm(x)
    return (x - centre) * scale if norm == "bn" else x


def _layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + _EPS)


def _finite(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if not np.isfinite(x).all():
        raise MetricError("the features of the train split hold NaN or infinity")
    return x


def _to(x: np.ndarray, task: _Task, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(task.device, dtype)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))
